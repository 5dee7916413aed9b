"""Decoding of image files, and a cache of downscaled images."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms import v2

from robust_backbones.errors import InputError
from robust_backbones.runs.files import atomic_path


class ImageInputError(InputError):
    """One image cannot be read; ``reason`` says why in a few words."""

    # A DataLoader worker's error is made anew from a traceback in which InputError looks for "InputError: ", with which
    # this class's name therefore ends; and from nothing else, so the reason is optional.
    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason

    @classmethod
    def of(cls, name: str, error: Exception) -> ImageInputError:
        # Pillow's own message about unknown bytes quotes the address of a buffer.
        unknown = isinstance(error, UnidentifiedImageError)
        text = "not in a known image format" if unknown else getattr(error, "strerror", None) or str(error)
        reason = " ".join(text.split()) or type(error).__name__
        mend = "repair or remove it, or give --skip-unreadable, which pretrain and transfer have"
        return cls(f"cannot read the image {name} ({reason}): {mend}", reason)


def decode(data: bytes, name: str) -> Tensor:
    """An image file's bytes as uint8 of shape (3, H, W), RGB, bit-identical to Pillow's ``convert("RGB")``.

    Pillow clips 16-bit gray images to white; here they are scaled to 8 bits. Orientation tags are ignored, as usual in
    ImageNet training. The memory layout is channels last, which torchvision resizes fastest.

    Raises:
        ImageInputError: ``name``, with Pillow's reason, or because it is unknown which of its values is white.
    """
    # OpenCV decodes a plain JPEG 1.5 times as fast as Pillow and no slower than torchvision.io, whose decoders are
    # deprecated since torchvision 0.29. It may return a cut-off file half gray, and treats CMYK or 16 bits in its own
    # way: all but whole, plain JPEGs are Pillow's, and so is the verdict on whatever OpenCV refuses.
    pixels = None
    if _is_plain_jpeg(data):
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    if pixels is None:
        try:
            with Image.open(io.BytesIO(data)) as file:
                check_claim(file, len(data))
                if file.mode in ("I", "F"):
                    raise ValueError(f"pixels of 32 bits, Pillow's mode {file.mode}, without a known range")
                image: Image.Image = file
                if file.mode.startswith("I;16"):
                    image = Image.fromarray((np.array(file, np.float32) / 257).round().astype(np.uint8))
                pixels = np.array(image.convert("RGB"))
        except Exception as error:  # on damaged bytes Pillow raises nearly every type there is
            raise ImageInputError.of(name, error) from None
    return torch.from_numpy(pixels).permute(2, 0, 1)


@cache
def image_suffixes() -> tuple[str, ...]:
    """Suffixes, such as ``.jpg``, of the image files that Pillow reads by itself."""
    Image.init()
    kinds = Image.OPEN.keys() - {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}  # need other programs
    return tuple(suffix for suffix, kind in sorted(Image.registered_extensions().items()) if kind in kinds)


def is_image(path: str) -> bool:
    """Whether a file, by its path within a data set, is an image of it: not hidden, of a format that Pillow reads."""
    return path.lower().endswith(image_suffixes()) and not is_hidden(path)


def is_hidden(path: str) -> bool:
    """Whether a file, by its path within a data set, does not belong to it: ``.DS_Store``, ``._cat.jpg`` and files in
    ``.ipynb_checkpoints``, ``@eaDir`` or ``__MACOSX``."""
    return _HIDDEN.search(path) is not None


_HIDDEN = re.compile(r"(^|/)(\.|@eaDir(/|$)|__MACOSX(/|$))")


def visible(folder: Path) -> list[Path]:
    """The files and folders in a folder that are not hidden, sorted."""
    return sorted(path for path in folder.iterdir() if not is_hidden(path.name))


def check_claim(image: Image.Image, size: int) -> None:
    """Raise ValueError if a file of ``size`` bytes claims impossibly many pixels, which decoding would allocate."""
    width, height = image.size
    if width * height > max(_ALWAYS, _PIXELS_A_BYTE * size):
        raise ValueError(f"it claims {width} x {height} pixels in {size} bytes")


_ALWAYS, _PIXELS_A_BYTE = 2**24, 2**12


def _is_plain_jpeg(data: bytes) -> bool:
    """Whether this is a baseline JPEG with 8 bits, one or three channels, and one scan that ends with the image.

    (ITU T.81, annex B.) A stray marker inside a scan is damage that OpenCV hides by filling with gray.
    """
    position = 2
    frame_is_plain = False
    while data.startswith(b"\xff\xd8") and position + 10 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker in (0xC0, 0xC1):  # start of a Huffman-coded frame that is not progressive
            frame_is_plain = data[position + 4] == 8 and data[position + 9] in (1, 3)
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        if marker == 0xDA:  # start of scan
            end = _MARKER.search(data, position)
            return frame_is_plain and end is not None and end[0] == b"\xff\xd9"
    return False


_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
"""Any marker except restart markers, which belong in a scan; 0xFF 0x00 is an escaped byte, repeated 0xFF is padding."""


_JPEG_SIDE = 65_500
"""The longest side in pixels that libjpeg writes."""


class ResizedCache:
    """A cache of images downscaled so that their shorter side is ``short_side`` pixels, in separate files.

    Training from large photographs then decodes only a fraction of the pixels. Downscaling is antialiased and bilinear,
    and files are JPEG of quality 95; an image that is small enough, or too long for JPEG, is kept byte for byte. The
    first access returns what later ones will read, so results never depend on the state of the cache. A changed source
    file is downscaled again, a damaged cache file is replaced, and any number of processes may share the folder.
    """

    def __init__(self, folder: Path, short_side: int) -> None:
        self.folder = folder
        self.short_side = short_side

    def load(self, name: str, stamp: tuple[int, ...], read: Callable[[], bytes]) -> Tensor:
        """The downscaled image, uint8 of shape (3, H, W).

        Args:
            name: the image's name in its data set.
            stamp: changes when the source does, such as size and modification time.
            read: returns the source's bytes; called only if the image is not in the cache.

        Raises:
            ImageInputError: the source cannot be decoded.
            InputError: the cache cannot be written.
        """
        path = self._path(name, stamp)
        try:
            return decode(path.read_bytes(), name)
        except (OSError, ImageInputError):
            pass  # not there yet, or damaged
        data = self._reduce(read(), name)
        try:
            with atomic_path(path, durable=False) as temporary:  # a million waits for the disk take hours
                temporary.write_bytes(data)
        except OSError as error:
            raise InputError(
                f"cannot write the image cache {self.folder} ({error.strerror}): free some space, or choose another"
            ) from None
        return decode(data, name)

    def _path(self, name: str, stamp: tuple[int, ...]) -> Path:
        digest = hashlib.sha256(repr((name, stamp, self.short_side)).encode()).hexdigest()
        return self.folder / digest[:2] / digest[2:4] / digest[4:]  # few enough files a folder at a million images

    def _reduce(self, data: bytes, name: str) -> bytes:
        image = decode(data, name)
        sides = sorted(image.shape[1:])
        if sides[0] <= self.short_side or sides[1] * self.short_side > _JPEG_SIDE * sides[0]:
            return data
        reduced: NDArray[np.uint8] = v2.functional.resize(image, [self.short_side], antialias=True).numpy()
        _, encoded = cv2.imencode(".jpg", reduced[::-1].transpose(1, 2, 0), [cv2.IMWRITE_JPEG_QUALITY, 95])
        return encoded.tobytes()
