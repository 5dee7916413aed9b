"""Corruptions: same seed, same pixels, whatever ran before and wherever; stronger at each severity."""

import multiprocessing
import random
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from robust_backbones.data.corruptions import CORRUPTIONS, SEVERITIES, corrupt, image_seed
from robust_backbones.errors import InputError
from tests.conftest import ROOT

pytest.importorskip("imagecorruptions", reason="imagecorruptions-imaug is not installed: make setup")

Image = NDArray[np.uint8]
RANDOM = {*CORRUPTIONS} - {"defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression"}


def smooth_image(height: int, width: int, seed: int = 0) -> Image:
    """Soft random blobs, as photographs have them; none of its pixels is black or white."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 6, 6, generator=generator) * 180 + 40
    image = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return image[0].permute(1, 2, 0).byte().numpy()


def corrupted_bytes(name: str) -> bytes:
    return corrupt(smooth_image(40, 52), name, 3, seed=7).tobytes()


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize(
    "image",
    [smooth_image(*shape) for shape in ((32, 32), (33, 500), (200, 31), (1, 1), (1, 90))]
    + [
        np.zeros((48, 40, 3), np.uint8),
        np.full((40, 48, 3), 255, np.uint8),
        smooth_image(40, 40)[..., :1].repeat(3, 2),
    ],
    ids=["smallest", "wide", "narrow", "pixel", "line", "black", "white", "gray"],
)
def test_every_shape_and_content(name: str, image: Image) -> None:
    before = image.copy()
    for severity in SEVERITIES:
        corrupted = corrupt(image, name, severity, seed=0)
        assert corrupted.shape == image.shape
        assert corrupted.dtype == np.uint8
    assert np.array_equal(image, before)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_severity_0_is_the_image(name: str) -> None:
    image = smooth_image(8, 8)
    assert corrupt(image, name, 0, seed=0) is image


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_seed_alone_decides(name: str) -> None:
    """Not the generators' states, nor what was drawn before; and a random corruption differs with its seed."""
    image = smooth_image(64, 48)
    first = corrupt(image, name, 2, seed=5)
    np.random.seed(3)
    for other in ("gaussian_noise", "glass_blur", "impulse_noise"):
        corrupt(image, other, 1, seed=9)
    assert np.array_equal(corrupt(image, name, 2, seed=5), first)
    others = [corrupt(image, name, 2, seed=seed) for seed in range(6, 12)]
    assert any(not np.array_equal(other, first) for other in others) == (name in RANDOM)


def test_global_generators_are_left_alone() -> None:
    np.random.seed(1)
    random.seed(1)
    torch.manual_seed(1)
    expected = np.random.normal(size=3).tolist(), random.random(), torch.rand(1).item()
    np.random.seed(1)
    random.seed(1)
    torch.manual_seed(1)
    for name in CORRUPTIONS:
        corrupt(smooth_image(32, 32), name, 1, seed=4)
    assert (np.random.normal(size=3).tolist(), random.random(), torch.rand(1).item()) == expected


@pytest.mark.parametrize("names", [CORRUPTIONS[:3], pytest.param(CORRUPTIONS, marks=pytest.mark.slow)], ids=len)
def test_a_fresh_process_draws_the_same(names: tuple[str, ...]) -> None:
    """In another order too; seeds are not Python's own hash, which differs from process to process."""
    code = (
        "import hashlib\n"
        "import numpy as np\n"
        "from robust_backbones.data.corruptions import corrupt, image_seed\n"
        "image = np.arange(40 * 52 * 3, dtype=np.uint8).reshape(40, 52, 3) // 2 + 50\n"
        "lines = []\n"
        f"for name in {names[::-1]}:\n"
        "    pixels = corrupt(image, name, 3, seed=image_seed('a.jpg', name, 3, 0))\n"
        "    lines.append(f'{name} {hashlib.sha256(pixels.tobytes()).hexdigest()}')\n"
    )
    printed = subprocess.run([sys.executable, "-c", code + "print(*lines)"], cwd=ROOT, capture_output=True, text=True)
    here: dict[str, list[str]] = {}
    exec(code, here)
    assert len(here["lines"]) == len(names)
    assert printed.stdout.split() == " ".join(here["lines"]).split(), printed.stderr


def test_forked_workers_draw_the_same() -> None:
    """As the workers of a DataLoader do, in whatever order the images come to them."""
    expected = [corrupted_bytes(name) for name in CORRUPTIONS]
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork")) as pool:
        assert list(pool.map(corrupted_bytes, CORRUPTIONS)) == expected


@pytest.mark.parametrize("name", ["gaussian_noise", "shot_noise", "impulse_noise", "contrast", "brightness"])
def test_more_severe_is_farther_from_the_image(name: str) -> None:
    """In the mean over images, of the mean squared difference."""
    images = [smooth_image(64, 64, seed).astype(float) for seed in range(4)]
    distances = [
        np.mean([(corrupt(image.astype(np.uint8), name, s, seed=i) - image) ** 2 for i, image in enumerate(images)])
        for s in (0, *SEVERITIES)
    ]
    assert distances[0] == 0
    assert np.all(np.diff(distances) > 0)


def test_gaussian_noise_has_the_papers_scale() -> None:
    """On mid-gray, which is clipped to 0 and 1 by nothing but noise of more than 3 deviations at severities 1 to 3."""
    gray = np.full((256, 256, 3), 128, np.uint8)
    for severity, scale in ((1, 0.08), (2, 0.12)):
        noise = corrupt(gray, "gaussian_noise", severity, seed=0).astype(float) - 128
        assert noise.std() / 255 == pytest.approx(scale, rel=0.01)


def test_image_seeds_differ_in_every_argument_and_never_change() -> None:
    assert image_seed("a.jpg", "fog", 1, 0) == 1773701100
    changed = [("b.jpg", "fog", 1, 0), ("a.jpg", "snow", 1, 0), ("a.jpg", "fog", 2, 0), ("a.jpg", "fog", 1, 1)]
    assert len({image_seed(*arguments) for arguments in [("a.jpg", "fog", 1, 0), *changed]}) == 5


@pytest.mark.parametrize(
    ("image", "name", "severity", "words"),
    [
        (smooth_image(8, 8), "gausian_noise", 1, "did you mean gaussian_noise"),
        (smooth_image(8, 8), "xyzzy", 1, "jpeg_compression"),
        (smooth_image(8, 8), "fog", 6, "no severity 6"),
        (smooth_image(8, 8), "fog", -1, "no severity -1"),
        (smooth_image(8, 8)[..., 0], "fog", 1, "shape (8, 8)"),
        (smooth_image(8, 8).astype(np.float32), "fog", 1, "float32"),
        (np.zeros((0, 8, 3), np.uint8), "fog", 1, "shape (0, 8, 3)"),
    ],
)
def test_refuses(image: Image, name: str, severity: int, words: str) -> None:
    with pytest.raises(InputError) as error:
        corrupt(image, name, severity, seed=0)
    assert words in str(error.value)


def test_without_the_library_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    with pytest.raises(InputError, match=r"pip install 'robust-backbones\[corruptions\]'"):
        corrupt(smooth_image(8, 8), "fog", 1, seed=0)
