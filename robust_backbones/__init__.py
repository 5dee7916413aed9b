"""Adversarially robust backbones for Detectron2: train, convert with proof, plug in, measure."""

# The functions of ``robust_backbones.api`` are imported, and torch with them, when they are first asked for.

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from robust_backbones.api import *  # noqa: F403

__version__ = "0.2.0"


def __dir__() -> list[str]:
    from robust_backbones import api

    return sorted([*globals(), *api.__all__])


def __getattr__(name: str) -> Any:
    # Submodules are asked for before they are imported; dunders by whoever inspects the package.
    if name == "__all__" or not (name.startswith("__") or find_spec(f"{__name__}.{name}")):
        from robust_backbones import api

        if name == "__all__" or name in api.__all__:
            return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
