"""The common corruptions of Hendrycks & Dietterich (2019): the same image and seed give the same pixels anywhere."""

from __future__ import annotations

import difflib
import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robust_backbones.errors import InputError

CORRUPTIONS = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
)
"""The 15 of the paper's ImageNet-C, in its order: noise, blur, weather, digital."""
SEVERITIES = (1, 2, 3, 4, 5)

_MIN_SIDE = 32  # the library refuses smaller images
# These take no random numbers from NumPy's global generator: one makes its own, one has numba's.
_SEEDED_BY_ARGUMENT = ("impulse_noise", "glass_blur")


def corrupt(image: NDArray[np.uint8], name: str, severity: int, *, seed: int) -> NDArray[np.uint8]:
    """The image with one corruption, by the code of the paper's authors as packaged by Michaelis et al. (2019).

    The global random generators are not changed. A side shorter than 32 pixels, which that code refuses, is padded by
    mirroring to 32 and cropped again.

    Args:
        image: shape (H, W, 3), RGB, 0-255; not changed.
        name: one of CORRUPTIONS.
        severity: 1 to 5, or 0 for the image itself.
        seed: determines every random number; ``image_seed`` gives one that is stable over runs and machines.

    Returns:
        Shape (H, W, 3), RGB, 0-255.

    Raises:
        InputError: no such corruption or severity, no such image, or the library is not installed.
    """
    check_corruption(name, severity)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise InputError(f"corruptions want RGB images of uint8, (H, W, 3), got {image.dtype} of shape {image.shape}")
    if severity == 0:
        return image
    library = load_library()
    height, width = image.shape[:2]
    padding = ((0, max(0, _MIN_SIDE - height)), (0, max(0, _MIN_SIDE - width)), (0, 0))
    padded = np.pad(image, padding, mode="symmetric")
    seed %= 2**32
    options = {"seed": seed} if name in _SEEDED_BY_ARGUMENT else {}
    state = np.random.get_state(legacy=False)
    np.random.seed(seed)
    try:
        corrupted: NDArray[np.uint8] = library.corrupt(padded, severity=severity, corruption_name=name, **options)
    finally:
        np.random.set_state(state)
    return corrupted[:height, :width]


def image_seed(name: str, corruption: str, severity: int, seed: int) -> int:
    """A seed in [0, 2^32) for one image under one corruption: SHA-256 of its arguments, the same on every machine."""
    text = "\0".join((name, corruption, str(severity), str(seed)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def check_corruption(name: str, severity: int) -> None:
    """Raise ``InputError`` unless ``corrupt`` supports both."""
    if name not in CORRUPTIONS:
        near = difflib.get_close_matches(name, CORRUPTIONS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(CORRUPTIONS)}"
        raise InputError(f"unknown corruption {name!r}: {hint}")
    if severity not in (0, *SEVERITIES):
        raise InputError(f"no severity {severity}: give 1 to 5, or 0 for the image as it is")


def load_library() -> Any:
    """The package ``imagecorruptions``; its import takes a second, and numba."""
    try:
        import imagecorruptions
    except ImportError as error:
        raise InputError(
            f"corruptions cannot be drawn ({error}): pip install 'robust-backbones[corruptions]'"
        ) from None
    return imagecorruptions
