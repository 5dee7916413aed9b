"""R-CNN's training step (``MODEL.FAST_STEP``) over the whole batch: no loop over images waits for the device."""
