"""Detection and segmentation on top of Detectron2; the only part of the package that imports it."""

from robust_backbones.errors import InputError

try:
    import detectron2  # noqa: F401
except ImportError:
    raise InputError("Detectron2 is not installed: run `python tools/install_detectron2.py`") from None
