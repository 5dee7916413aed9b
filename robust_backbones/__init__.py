"""Adversarially robust backbones for Detectron2: train, convert with proof, plug in, measure."""

__version__ = "0.1.0"
