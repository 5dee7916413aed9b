"""Detection and segmentation on top of Detectron2; the only part of the package that imports it."""

import logging
import warnings

from robust_backbones.errors import InputError

# Detectron2 scripts small functions at import; nothing its users can mend.
warnings.filterwarnings("ignore", message=r".*torch\.jit\.script", category=FutureWarning)
warnings.filterwarnings("ignore", message=r".*torch\.jit\.script", category=DeprecationWarning)
warnings.filterwarnings("ignore", message="torch.meshgrid")
logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)

try:
    import detectron2  # noqa: F401
except ImportError:
    raise InputError("Detectron2 is not installed: run `robust-backbones doctor --install-detectron2`") from None
