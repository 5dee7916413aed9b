"""Detection and segmentation on top of Detectron2; the only part of the package that imports it.

Importing it registers ``robust://NAME`` as a path for all of Detectron2.
"""

import warnings

from robust_backbones.errors import MissingPackageError

with warnings.catch_warnings():
    # Detectron2 scripts small functions at import, which torch no longer likes.
    warnings.filterwarnings("ignore", message=r".*torch\.jit\.script")
    try:
        import detectron2.modeling  # noqa: F401
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "detectron2":
            raise
        raise MissingPackageError(
            "Detectron2 is not installed: run `robust-backbones doctor --install-detectron2`"
        ) from None
    import robust_backbones.detection.verify  # makes robust://NAME a path
    import robust_backbones.detection.vit_backbone  # noqa: F401  # which Detectron2 then knows by its name
    from robust_backbones.detection.config import add_config, load_config
    from robust_backbones.detection.evaluation import evaluate
    from robust_backbones.detection.predictor import Predictor
    from robust_backbones.detection.trainer import Trainer

__all__ = ["Predictor", "Trainer", "add_config", "evaluate", "load_config"]
