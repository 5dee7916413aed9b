"""Classification transfer: linear probes and full fine-tuning of a backbone on another data set."""
