"""Image files to pixels against Pillow, whole and damaged, and the cache of reduced images."""

import io
import os
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from robust_backbones.data.annotations_images import read_header
from robust_backbones.data.decoding import ImageInputError, ResizedCache, decode
from robust_backbones.errors import InputError


def picture(height: int = 61, width: int = 83) -> Image.Image:
    """Smooth colours, the same each time; sides that no JPEG block divides."""
    blobs = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(cv2.resize(blobs, (width, height), interpolation=cv2.INTER_CUBIC))


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6  # Orientation: to be shown turned by 90 degrees
    return exif


def by_pillow(data: bytes) -> Tensor | None:
    """What torchvision's ImageFolder reads; None when it cannot."""
    try:
        with Image.open(io.BytesIO(data)) as file:
            if file.mode == "I;16":  # its convert clips to white
                gray = np.round(np.array(file) / 257).astype(np.uint8)
                return torch.from_numpy(gray).expand(3, -1, -1)
            return torch.from_numpy(np.array(file.convert("RGB"))).permute(2, 0, 1)
    except Exception:
        return None


def by_us(data: bytes) -> Tensor | None:
    try:
        return decode(data, "picture")
    except ImageInputError:
        return None


PLAIN = {
    "420": encoded(picture(), "JPEG"),
    "422": encoded(picture(), "JPEG", subsampling=1),
    "444": encoded(picture(), "JPEG", subsampling=0),
    "gray": encoded(picture().convert("L"), "JPEG"),
    "rgb": encoded(picture(), "JPEG", keep_rgb=True),
    "restarts": encoded(picture(), "JPEG", restart_marker_blocks=3),
    "turned": encoded(picture(), "JPEG", exif=turned()),
    "padded": encoded(picture(), "JPEG") + bytes(700),
    "with a trailer": encoded(picture(), "JPEG") + b"more",
}
OTHER = {
    "progressive": encoded(picture(), "JPEG", progressive=True),
    "cmyk": encoded(picture().convert("CMYK"), "JPEG"),
    "png": encoded(picture(), "PNG"),
    "palette": encoded(picture().quantize(16), "PNG"),
    "transparent": encoded(Image.merge("RGBA", (*picture().split(), picture().convert("L"))), "PNG"),
    "16 bit": encoded(Image.fromarray(np.arange(0, 65536, 11, dtype=np.uint16)[:5800].reshape(58, 100)), "PNG"),
    "bitmap": encoded(picture().convert("1"), "PNG"),
    "webp": encoded(picture(), "WEBP"),
}


@pytest.mark.parametrize("data", [*PLAIN.values(), *OTHER.values()], ids=[*PLAIN, *OTHER])
def test_pixels_are_those_of_pillow(data: bytes) -> None:
    image = decode(data, "picture")
    assert image.dtype == torch.uint8
    assert image.permute(1, 2, 0).is_contiguous()
    assert torch.equal(image, by_pillow(data))


@pytest.mark.parametrize("data", PLAIN.values(), ids=PLAIN)
def test_plain_jpegs_do_not_need_pillow(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = by_pillow(data)
    monkeypatch.setattr(Image, "open", None)
    assert torch.equal(decode(data, "picture"), expected)


@pytest.mark.parametrize("data", [*PLAIN.values(), *OTHER.values()], ids=[*PLAIN, *OTHER])
@settings(max_examples=100, deadline=None)
@given(share=st.floats(0, 1))
def test_a_cut_off_file_is_unreadable_when_pillow_says_so(data: bytes, share: float) -> None:
    cut = data[: int(share * len(data))]
    ours, expected = by_us(cut), by_pillow(cut)
    assert (ours is None) == (expected is None)
    assert ours is None or torch.equal(ours, expected)


@pytest.mark.parametrize("data", PLAIN.values(), ids=PLAIN)
@settings(max_examples=150, deadline=None)
@given(edits=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=3))
def test_damage_gives_what_pillow_gives(data: bytes, edits: list[tuple[float, int]]) -> None:
    damaged = bytearray(data)
    for place, value in edits:
        damaged[int(place * len(data))] = value
    ours, expected = by_us(bytes(damaged)), by_pillow(bytes(damaged))
    assert (ours is None) == (expected is None)
    assert ours is None or torch.equal(ours, expected)


def test_sixteen_bits_keep_black_gray_and_white() -> None:
    data = encoded(Image.fromarray(np.array([[0, 32768, 65535]], np.uint16)), "PNG")
    assert decode(data, "picture")[:, 0].tolist() == [[0, 128, 255]] * 3


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_without_a_known_range_are_refused(mode: str) -> None:
    data = encoded(picture().convert("L").convert(mode), "TIFF")
    with pytest.raises(ImageInputError, match=f"mode {mode}, without a known range"):
        decode(data, "picture")


def test_a_jpeg_cut_in_half_is_refused() -> None:
    data = PLAIN["420"]
    with pytest.raises(ImageInputError, match=r"cannot read the image a/b\.jpg \(.*truncated.*\): repair"):
        decode(data[: len(data) // 2], "a/b.jpg")


def test_a_few_bytes_cannot_claim_a_hundred_million_pixels(tmp_path: Path) -> None:
    """Decoding would allocate them, and find then that they are not there."""
    file = io.BytesIO()
    Image.new("L", (24, 20), 7).save(file, "TIFF")
    data = file.getvalue()
    claim = bytes.fromhex("0101 0400 0100 0000")  # ImageLength, of 32 bits, one value
    short = bytes.fromhex("0101 0300 0100 0000")
    place = max(data.find(claim), data.find(short))
    damaged = data[:place] + claim + (2**22).to_bytes(4, "little") + data[place + 12 :]
    with pytest.raises(ImageInputError, match=rf"claims 24 x {2**22} pixels in {len(damaged)} bytes"):
        decode(damaged, "damaged.tif")
    (tmp_path / "damaged.tif").write_bytes(damaged)
    assert "claims 24 x" in read_header(tmp_path / "damaged.tif").problem
    flat = io.BytesIO()
    Image.new("RGB", (4500, 4000), (1, 2, 3)).save(flat, "PNG")  # of 18 million pixels, and compressed as far as can be
    assert decode(flat.getvalue(), "flat.png").shape == (3, 4000, 4500)


def test_a_stray_marker_is_refused() -> None:
    """OpenCV stops there, and fills the rest with gray."""
    data = bytearray(PLAIN["444"])
    middle = (bytes(data).index(b"\xff\xda") + len(data)) // 2
    data[middle : middle + 2] = b"\xff\x25"
    with pytest.raises(ImageInputError, match="broken data stream"):
        decode(bytes(data), "picture")


@pytest.mark.parametrize("data", [b"", b"\xff\xd8", b"\xff\xd8\xff\xd9", b"not a picture", bytes(100)], ids=repr)
def test_what_is_no_image_is_named_with_a_reason(data: bytes) -> None:
    with pytest.raises(ImageInputError) as error:
        decode(data, "x.jpg")
    assert error.value.reason == "not in a known image format"
    assert str(error.value) == (
        "cannot read the image x.jpg (not in a known image format): repair or remove it, or give --skip-unreadable, "
        "which pretrain and transfer have"
    )


def forbidden() -> bytes:
    raise AssertionError("the source was read")


def returns(data: bytes) -> Callable[[], bytes]:
    return lambda: data


def test_the_cache_reduces_the_shorter_side(tmp_path: Path) -> None:
    """As Pillow's antialiased filter does, but for what JPEG loses; without it noise would stay as strong as it was."""
    noise = np.random.default_rng(0).integers(0, 256, (120, 200, 3), dtype=np.uint8)
    noise[:, :, 0] //= 4  # channels that cannot be mistaken for each other
    image = ResizedCache(tmp_path, 32).load("a", (1,), returns(encoded(Image.fromarray(noise), "PNG")))
    assert image.shape == (3, 32, 53)
    slow = np.array(Image.fromarray(noise).resize((53, 32), Image.Resampling.BILINEAR)).astype(float)
    assert np.abs(image.permute(1, 2, 0).numpy() - slow).mean() < 10


def test_the_first_access_returns_what_later_ones_do(tmp_path: Path) -> None:
    data = encoded(picture(120, 200), "PNG")
    first = ResizedCache(tmp_path, 32).load("a", (1, 2), returns(data))
    assert torch.equal(ResizedCache(tmp_path, 32).load("a", (1, 2), forbidden), first)
    assert len(list(tmp_path.rglob("*"))) == 3  # two folders and the file


def test_the_cache_keeps_images_that_are_too_long_for_jpeg_as_they_are(tmp_path: Path) -> None:
    data = encoded(Image.new("RGB", (70_000, 4)), "PNG")
    for _ in range(2):
        assert ResizedCache(tmp_path, 2).load("a", (1,), returns(data)).shape == (3, 2, 35_000)
        assert ResizedCache(tmp_path, 3).load("a", (1,), returns(data)).shape == (3, 3, 52_500)
    data = encoded(Image.new("RGB", (88_000, 4)), "PNG")
    for _ in range(2):
        assert ResizedCache(tmp_path, 3).load("b", (1,), returns(data)).shape == (3, 4, 88_000)


@pytest.mark.parametrize("name", ["padded", "transparent"])
def test_the_cache_keeps_small_images_as_they_are(name: str, tmp_path: Path) -> None:
    data = {**PLAIN, **OTHER}[name]
    cache = ResizedCache(tmp_path, 61)
    for read in (returns(data), forbidden):
        assert torch.equal(cache.load("a", (1,), read), by_pillow(data))


def test_the_cache_tells_images_stamps_and_sizes_apart(tmp_path: Path) -> None:
    one, other = encoded(picture(120, 200), "JPEG"), encoded(picture(200, 120), "JPEG")
    ResizedCache(tmp_path, 32).load("a", (1,), returns(one))
    for name, stamp, short_side in (("b", (1,), 32), ("a", (2,), 32), ("a", (1,), 40)):
        image = ResizedCache(tmp_path, short_side).load(name, stamp, returns(other))
        assert image.shape[2] == short_side


@pytest.mark.parametrize("damage", [b"", b"\xff\xd8 not a picture", None], ids=["empty", "garbage", "cut"])
def test_a_damaged_cache_file_is_replaced(damage: bytes | None, tmp_path: Path) -> None:
    cache = ResizedCache(tmp_path, 32)
    data = encoded(picture(120, 200), "JPEG")
    first = cache.load("a", (1,), returns(data))
    (path,) = (path for path in tmp_path.rglob("*") if path.is_file())
    path.write_bytes(path.read_bytes()[:-20] if damage is None else damage)
    assert torch.equal(cache.load("a", (1,), returns(data)), first)
    assert torch.equal(cache.load("a", (1,), forbidden), first)


def test_an_unreadable_source_leaves_nothing_in_the_cache(tmp_path: Path) -> None:
    with pytest.raises(ImageInputError, match="the image a "):
        ResizedCache(tmp_path, 32).load("a", (1,), returns(b"not a picture"))
    assert not list(tmp_path.rglob("*"))


def test_a_cache_that_cannot_be_written_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError, match=r"cannot write the image cache .*No space left on device"):
        ResizedCache(tmp_path, 32).load("a", (1,), returns(PLAIN["420"]))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
