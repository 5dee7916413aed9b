"""Backbone checkpoints: read from any source, safely, and converted to Detectron2's format."""
