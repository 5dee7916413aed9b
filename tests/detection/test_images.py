"""Images of any kind: detectors get Pillow's pixels, as shown, or the file is refused by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetMapper
from numpy.random import default_rng
from PIL import Image, ImageOps

from robust_backbones.commands.predict import find_images
from robust_backbones.data.annotations_images import check_image, read_header
from robust_backbones.data.decoding import ImageInputError, image_suffixes
from robust_backbones.detection.visualize import read_rgb
from tests.detection.conftest import base_config

Save = Callable[[Path], Any]
PICTURE = Image.fromarray(default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))


def saved(suffix: str, mode: str = "RGB", **options: Any) -> tuple[str, Save]:
    return f".{suffix}", lambda path: PICTURE.convert(mode).save(path, **options)


def turned(suffix: str, orientation: int) -> tuple[str, Save]:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(suffix, exif=exif)


def deep(suffix: str, shape: tuple[int, ...], dtype: str) -> tuple[str, Save]:
    values = default_rng(1).integers(0, 60000, shape).astype(dtype)
    return f".{suffix}", lambda path: cv2.imwrite(str(path), values)


def palette(transparency: int | bytes) -> tuple[str, Save]:
    return ".png", lambda path: PICTURE.quantize(16).save(path, transparency=transparency)


def cut(suffix: str, mode: str = "RGB") -> tuple[str, Save]:
    def save(path: Path) -> None:
        PICTURE.convert(mode).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return f".{suffix}", save


RIGHT: dict[str, tuple[str, Save]] = {
    **{suffix: saved(suffix) for suffix in ("jpg", "png", "gif", "webp", "bmp", "tif", "ppm", "jp2")},
    **{f"{mode} {suffix}": saved(suffix, mode) for mode, suffix in (
        ("L", "jpg"), ("L", "png"), ("LA", "png"), ("LA", "tif"), ("1", "png"), ("1", "tif"), ("1", "bmp"),
        ("P", "png"),
        ("P", "gif"), ("P", "bmp"), ("PA", "tif"), ("RGBA", "png"), ("RGBA", "webp"), ("CMYK", "jpg"), ("CMYK", "tif"),
        ("LAB", "tif"), ("YCbCr", "tif"),
    )},
    **{f"turned {n} {suffix}": turned(suffix, n) for n in range(1, 9) for suffix in ("jpg", "png", "webp")},
    "progressive": saved("jpg", progressive=True),
    "lzw": saved("tif", compression="tiff_lzw"),
    "palette with one transparent colour": palette(3),
    "palette with alphas": palette(bytes(range(16))),
    "animated gif": saved("gif", save_all=True, append_images=[PICTURE.rotate(180)]),
    "pages of a tif": saved("tif", save_all=True, append_images=[PICTURE.rotate(180)]),
    "16 bits a colour": deep("png", (40, 60, 3), "uint16"),
    "text as suffix": (".txt", lambda path: PICTURE.save(path, format="PNG")),
}  # fmt: skip
REFUSED: dict[str, tuple[str, Save]] = {
    **{f"16 bits {suffix}": deep(suffix, (40, 60), "uint16") for suffix in ("png", "tif", "jp2", "pgm")},
    "float": deep("tif", (40, 60), "float32"),
    "float colours": deep("tif", (40, 60, 3), "float32"),
    **{f"turned {number} tif": turned("tif", number) for number in range(2, 9)},
    **{f"cut {mode} {suffix}": cut(suffix, mode) for mode, suffix in (
        ("RGB", "jpg"), ("CMYK", "jpg"), ("RGB", "png"), ("P", "png"), ("RGB", "gif"), ("RGB", "webp"), ("RGB", "bmp"),
        ("RGB", "tif"), ("RGB", "jp2"),
    )},
    "empty": (".jpg", Path.touch),
    "no image": (".png", lambda path: path.write_text("no image")),
}  # fmt: skip


@pytest.mark.parametrize(("suffix", "save"), RIGHT.values(), ids=RIGHT)
@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_pixels_are_those_that_pillow_shows(tmp_path: Path, suffix: str, save: Save) -> None:
    path = tmp_path / f"image{suffix}"
    save(path)
    check_image(path)
    with Image.open(path) as file:
        shown = np.array(ImageOps.exif_transpose(file).convert("RGB"))
    np.testing.assert_array_equal(read_rgb(path), shown)
    height, width = shown.shape[:2]
    assert read_header(path)[:2] == (width, height)
    cfg = base_config()
    for training in (False, True):  # as a detector gets them, in BGR
        cfg.INPUT.RANDOM_FLIP = "none"
        cfg.merge_from_list(["INPUT.MIN_SIZE_TRAIN", (min(height, width),), "INPUT.MIN_SIZE_TEST", min(height, width)])
        item = {"file_name": str(path), "height": height, "width": width, "annotations": []}
        pixels = DatasetMapper(cfg, training)(item)["image"]
        np.testing.assert_array_equal(pixels.permute(1, 2, 0).numpy()[..., ::-1], shown)


@pytest.mark.parametrize(("suffix", "save"), REFUSED.values(), ids=REFUSED)
def test_what_has_no_right_pixels_is_refused_by_name(tmp_path: Path, suffix: str, save: Save) -> None:
    path = tmp_path / f"image{suffix}"
    save(path)
    with pytest.raises(ImageInputError, match=f"the image {path} "):
        check_image(path)


def test_a_folder_is_searched_for_every_format_that_is_read_by_name(tmp_path: Path) -> None:
    for suffix in image_suffixes():
        (tmp_path / f"image{suffix}").touch()
    for other in ("notes.txt", "clip.mpg", "page.pdf", ".hidden.png"):
        (tmp_path / other).touch()
    assert {path.suffix for path in find_images([tmp_path])} == {*image_suffixes()}
    assert {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".jp2"} <= {*image_suffixes()}
