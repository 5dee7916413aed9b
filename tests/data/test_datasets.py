"""Classification data sets of either layout against torchvision's reading of them, and the synthetic shapes."""

import json
import math
import os
import pickle
import re
import shutil
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools.coco import COCO
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from robust_backbones.data import datasets, synthetic
from robust_backbones.data.datasets import ClassificationDataset, find_unreadable, mix, open_dataset, warn_of_shared
from robust_backbones.data.decoding import ImageInputError, ResizedCache
from robust_backbones.data.images import ImageFiles
from robust_backbones.data.synthetic import CLASSES, ShapesConfig, write_shapes
from robust_backbones.data.transforms import augmentation, train_transform, val_transform
from robust_backbones.errors import InputError
from tests.conftest import TINY_SHAPES

TRANSFORM = val_transform(32, resize=32)
AUGMENT = train_transform(32, min_crop_scale=0.3)


def write_noise(path: Path, seed: int, height: int = 40, width: int = 50) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    assert cv2.imwrite(str(path), image)


def same_items(one: ClassificationDataset, other: ClassificationDataset) -> bool:
    return all(torch.equal(a, b) and x == y for (a, x), (b, y) in zip(one, other, strict=True))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Six images in two classes; folders within folders, several formats, a name that sorts by letter case."""
    names = ("b/2.jpg", "b/10.jpg", "b/deep/er/1.JPEG", "A/z.png", "A/y.jpg", "A/Y.jpg")
    for seed, name in enumerate(names):
        write_noise(tmp_path / "train" / name, seed)
    (tmp_path / "train/A/notes.txt").write_text("not an image")
    return tmp_path / "train"


def test_classes_order_labels_and_pixels_are_those_of_torchvision(pictures: Path) -> None:
    ours = open_dataset(pictures, v2.Identity())
    theirs = ImageFolder(str(pictures))
    assert (ours.classes, ours.labels) == (theirs.classes, theirs.targets)
    assert [str(pictures / name) for name in ours.names] == [path for path, _ in theirs.samples]
    for (image, label), (expected, target) in zip(ours, theirs, strict=True):
        assert torch.equal(image, v2.functional.pil_to_tensor(expected))
        assert label == target


def test_images_of_formats_that_torchvision_passes_over_are_listed_too(pictures: Path) -> None:
    for name in ("a.jfif", "b.GIF"):
        Image.new("RGB", (40, 30), (200, 0, 0)).save(pictures / "b" / name)
    ours = open_dataset(pictures, v2.Identity())
    assert ours.names[3:] == ["b/10.jpg", "b/2.jpg", "b/a.jfif", "b/b.GIF", "b/deep/er/1.JPEG"]
    assert abs(ours[6][0].float() - torch.tensor([200, 0, 0])[:, None, None]).max() < 5


def test_files_that_may_be_images_are_not_left_out_without_a_word(
    pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    meant = open_dataset(pictures, v2.Identity()).names
    for name in ("A/notes.txt", "b/Thumbs.db", "b/._2", ".DS_Store", "labels.csv"):
        (pictures / name).touch()
    assert (open_dataset(pictures, v2.Identity()).names, capsys.readouterr().out) == (meant, "")
    for name in ("A/1.heic", "b/deep/ILSVRC2012_1", "b/2.Jxl", "a.jpg", "b.webp"):
        (pictures / name).touch()
    assert open_dataset(pictures, v2.Identity()).names == meant
    loose, unknown = capsys.readouterr().out.splitlines()
    assert "2 files beside the class folders" in loose
    assert f"the first {pictures / 'a.jpg'}: " in loose
    assert "3 files in" in unknown
    assert f"the first {pictures / 'A/1.heic'}: " in unknown


@pytest.mark.parametrize("other", [".ipynb_checkpoints", "@eaDir", "__MACOSX", ".DS_Store", "b/.cache", "b/@eaDir"])
def test_hidden_folders_are_no_classes_and_hidden_files_no_images(pictures: Path, other: str) -> None:
    """As notebooks, macOS and file servers leave them; the folder of the data itself may lie in a hidden one."""
    meant = open_dataset(pictures, v2.Identity())
    for name in (f"{other}/2-checkpoint.jpg", "b/._2.jpg", "._0.tar", "A/.z.png"):
        write_noise(pictures / name, 0) if name[-3:] != "tar" else (pictures / name).touch()
    root = pictures.rename(pictures.parent / ".train")
    found = open_dataset(root, v2.Identity())
    assert (found.classes, found.labels, found.names) == (meant.classes, meant.labels, meant.names)
    for name in ("A", "b"):
        shutil.rmtree(root / name)
    with pytest.raises(InputError, match="neither class folders nor shards"):
        open_dataset(root, v2.Identity())


def test_an_image_is_augmented_anew_each_epoch_and_seed_and_the_global_generator_is_left_alone(shapes: Path) -> None:
    dataset = open_dataset(shapes / "shapes_classification/train", AUGMENT)
    state = torch.random.get_rng_state()
    first = dataset[0][0]
    assert first.shape == (3, 32, 32)
    assert first.dtype == torch.uint8
    assert torch.equal(torch.random.get_rng_state(), state)
    dataset.epoch = 1
    assert not torch.equal(dataset[0][0], first)
    dataset.epoch = 0
    assert torch.equal(dataset[0][0], first)
    other_seed = open_dataset(shapes / "shapes_classification/train", AUGMENT, seed=1)
    assert not torch.equal(other_seed[0][0], first)


def test_augmentation_differs_between_images(tmp_path: Path) -> None:
    """The same picture under several names is not cropped the same way."""
    for index in range(4):
        write_noise(tmp_path / f"a/{index}.png", seed=0)
    dataset = open_dataset(tmp_path, AUGMENT)
    assert len({image.numpy().tobytes() for image, _ in dataset}) == 4


def test_a_data_set_travels_to_other_processes(pictures: Path) -> None:
    dataset = open_dataset(pictures, AUGMENT, seed=3)
    assert same_items(pickle.loads(pickle.dumps(dataset)), dataset)


def test_items_stay_what_they_are_when_others_are_left_out(pictures: Path) -> None:
    dataset = open_dataset(pictures, AUGMENT, seed=3)
    rest = dataset.without([dataset.names[0], dataset.names[4]])
    kept = [1, 2, 3, 5]
    assert len(rest) == 4
    assert rest.names == [dataset.names[index] for index in kept]
    assert rest.labels == [dataset.labels[index] for index in kept]
    assert rest.classes == dataset.classes
    for position, index in enumerate(kept):
        assert torch.equal(rest[position][0], dataset[index][0])
        assert rest[position][1] == dataset[index][1]
    again = rest.without([dataset.names[2]])
    assert torch.equal(again[1][0], dataset[3][0])
    assert len(dataset) == 6
    assert same_items(dataset.without([]), dataset)


def test_data_are_known_by_their_images_wherever_they_lie(pictures: Path, tmp_path: Path) -> None:
    """Of few images all count, with their labels; one that cannot be read counts for nothing."""
    own = open_dataset(pictures, AUGMENT).fingerprint()
    assert len(own) == 4 * 6
    moved = Path(shutil.copytree(pictures, tmp_path / "elsewhere"))
    for path in moved.rglob("*"):
        os.utime(path, (0, 0))
    dataset = open_dataset(moved, TRANSFORM, seed=3)
    assert dataset.fingerprint() == own == dataset.take([3, 1, 0, 2, 5, 4]).fingerprint()
    (moved / "A/y.jpg").unlink()
    assert len(dataset.fingerprint()) == 4 * 5
    write_noise(moved / "A/y.jpg", seed=9)
    assert sorted(dataset.fingerprint()) != sorted(own)
    assert (
        len({dataset.fingerprint()[place : place + 4] for place in range(0, 24, 4)} & {*re.findall("....", own)}) == 5
    )
    (moved / "A").rename(moved / "c")  # now the second class
    assert not {*re.findall("....", open_dataset(moved, TRANSFORM).fingerprint())} & {*re.findall("....", own)}


def test_a_fingerprint_is_of_few_images_of_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index in range(40):
        write_noise(tmp_path / f"a/{index}.png", index, 8, 8)
    dataset, read = open_dataset(tmp_path, TRANSFORM), list[int]()
    original = ImageFiles.read
    monkeypatch.setattr(ImageFiles, "read", lambda self, index: read.append(index) or original(self, index))
    whole = dataset.fingerprint()
    assert len(whole) == 64
    assert len({*read}) == len(read) == 16
    rest = [index for index in range(40) if index not in read]
    assert dataset.take(rest[4:] + read).fingerprint() == whole  # others may go


def test_what_cannot_be_left_out_is_named(pictures: Path) -> None:
    dataset = open_dataset(pictures, TRANSFORM)
    with pytest.raises(InputError, match=r"a/none\.jpg"):
        dataset.without(["a/none.jpg"])
    with pytest.raises(InputError, match="class A of"):
        dataset.without([name for name in dataset.names if name.startswith("A/")])


@pytest.mark.parametrize("workers", [0, 2])
def test_every_unreadable_image_is_found(pictures: Path, workers: int) -> None:
    (pictures / "A/y.jpg").write_bytes(b"not a picture")
    whole = (pictures / "b/10.jpg").read_bytes()
    (pictures / "b/10.jpg").write_bytes(whole[: len(whole) // 2])
    dataset = open_dataset(pictures, TRANSFORM)
    (pictures / "b/2.jpg").unlink()
    state = torch.random.get_rng_state()
    found = find_unreadable(dataset, workers=workers)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert set(found) == {"A/y.jpg", "b/10.jpg", "b/2.jpg"}
    assert found["A/y.jpg"] == "not in a known image format"
    assert "truncated" in found["b/10.jpg"]
    assert found["b/2.jpg"] == "No such file or directory"
    rest = dataset.without(found)
    assert len(rest) == 3
    assert find_unreadable(rest, workers=0) == {}
    with pytest.raises(ImageInputError, match=r"A/y\.jpg \(not in a known"):
        dataset[dataset.names.index("A/y.jpg")]


def test_items_from_a_cache_do_not_depend_on_what_it_held(pictures: Path, tmp_path: Path) -> None:
    datasets = [open_dataset(pictures, AUGMENT, cache=ResizedCache(tmp_path / "cache", 32)) for _ in range(2)]
    assert find_unreadable(datasets[0].without([datasets[0].names[0]]), workers=2) == {}
    assert same_items(*datasets)
    assert datasets[0].load(0).shape == (3, 32, 40)


def test_a_changed_image_and_another_part_are_cached_anew(tmp_path: Path) -> None:
    cache = ResizedCache(tmp_path / "cache", 32)
    for part, seed in (("train", 0), ("val", 1)):
        write_noise(tmp_path / part / "a/0.bmp", seed)
        os.utime(tmp_path / part / "a/0.bmp", (0, 0))  # one name, size and time: only the part tells them apart
    train, val = (open_dataset(tmp_path / part, v2.Identity(), cache=cache) for part in ("train", "val"))
    before = train[0][0]
    assert not torch.equal(val[0][0], before)
    write_noise(tmp_path / "train/a/0.bmp", seed=2, height=60)
    assert not torch.equal(train[0][0], before)


def test_bad_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no folder"):
        open_dataset(tmp_path / "none", TRANSFORM)
    with pytest.raises(InputError, match="neither class folders nor shards"):
        open_dataset(tmp_path, TRANSFORM)
    (tmp_path / "empty_class").mkdir()
    with pytest.raises(InputError, match="empty_class"):
        open_dataset(tmp_path, TRANSFORM)
    (tmp_path / "0.tar").touch()
    with pytest.raises(InputError, match="both class folders and shards"):
        open_dataset(tmp_path, TRANSFORM)


def test_validation_images_are_cropped_as_torchvision_crops_pillow_images(pictures: Path) -> None:
    ours = open_dataset(pictures, val_transform(24, resize=30))
    theirs = ImageFolder(str(pictures), v2.Compose([v2.Resize(30), v2.CenterCrop(24), v2.PILToTensor()]))
    for (image, _), (expected, _) in zip(ours, theirs, strict=True):
        assert image.shape == (3, 24, 24)
        assert (image.int() - expected.int()).abs().max() <= 1  # Pillow and torch round a half differently


def reduced_slowly(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear and antialiased: every pixel is the mean of a triangle as wide as the reduction, one axis at a time."""
    for axis, size in ((0, height), (1, width)):
        scale, count = image.shape[axis] / size, image.shape[axis]
        parts = []
        for place in range(size):
            center = (place + 0.5) * scale
            weights = np.maximum(0, 1 - np.abs(np.arange(count) + 0.5 - center) / scale)
            parts.append(np.tensordot(weights / weights.sum(), image, (0, axis)))
        image = np.stack(parts, axis)
    return image


def test_downscaled_images_have_less_detail_and_nothing_else_changes(pictures: Path) -> None:
    full = open_dataset(pictures, AUGMENT, seed=5)
    small = full.downscaled(16)
    assert (small.names, small.labels, small.classes, small.seed) == (full.names, full.labels, full.classes, full.seed)
    for position in range(len(full)):
        image = full.load(position).permute(1, 2, 0).double().numpy()
        found = small.load(position).permute(1, 2, 0).double().numpy()
        sides = [math.floor(16 * side / min(image.shape[:2])) for side in image.shape[:2]]
        assert min(sides) == 16
        assert np.abs(found - reduced_slowly(image, *sides)).max() <= 1  # rounded once an axis
        pillow = Image.fromarray(image.astype(np.uint8)).resize(sides[::-1], Image.Resampling.BILINEAR)
        assert np.abs(found - np.asarray(pillow, np.float64)).max() <= 1
        # The transform enlarges them again, with the draws that it has for this item.
        with torch.random.fork_rng():
            torch.manual_seed(mix(5, 0, position))
            assert torch.equal(small[position][0], AUGMENT(small.load(position)))
        assert small[position][0].shape == full[position][0].shape == (3, 32, 32)


def test_downscaling_leaves_smaller_images_and_parts_of_the_data_as_they_are(pictures: Path) -> None:
    full = open_dataset(pictures, TRANSFORM)
    assert same_items(full, full.downscaled(0))
    assert same_items(full, full.downscaled(500))
    part = full.downscaled(16).take([3, 1]).seen_through(TRANSFORM)
    assert torch.equal(part[0][0], full.downscaled(16)[3][0])
    assert not torch.equal(part[0][0], full[3][0])


def test_padded_crops_are_windows_of_the_image_in_a_black_border() -> None:
    image = torch.randint(1, 256, (3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    bordered = np.zeros((3, 16, 16), np.uint8)
    bordered[:, 4:12, 4:12] = image
    windows = [bordered[:, y : y + 8, x : x + 8] for y in range(9) for x in range(9)]
    allowed = {window.tobytes() for window in windows} | {window[:, :, ::-1].tobytes() for window in windows}
    assert len(allowed) == 162
    transform = augmentation("padded_crop", 8, min_crop_scale=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        seen = {transform(image).numpy().tobytes() for _ in range(2000)}
    assert seen == allowed
    transform = augmentation("padded_crop", 32, min_crop_scale=1)
    assert transform(torch.zeros(3, 50, 70, dtype=torch.uint8)).shape == (3, 32, 32)


def test_a_sample_is_of_the_same_items_and_a_greater_one_adds_to_it(shapes: Path) -> None:
    dataset = open_dataset(shapes / "shapes_classification/train", train_transform(32, min_crop_scale=0.3))
    small, great = dataset.sample(5, seed=1), dataset.sample(9, seed=1)
    assert great.names[:5] == small.names
    assert set(great.names) < set(dataset.names)
    assert dataset.sample(9, seed=2).names != great.names
    for position, name in enumerate(great.names):
        image, label = great[position]
        whole_image, whole_label = dataset[dataset.names.index(name)]
        assert torch.equal(image, whole_image)  # cropped alike: it keeps its place in the full data set
        assert label == whole_label


def test_shapes_are_annotated_where_they_are(shapes: Path) -> None:
    """Polygon, box and area agree with the rasterised mask, boxes never overlap, and every class occurs."""
    coco = COCO(str(shapes / "shapes/annotations/instances_train.json"))
    assert [category["name"] for category in coco.loadCats(coco.getCatIds())] == list(CLASSES)
    for annotation in coco.anns.values():
        mask = coco.annToMask(annotation)
        ys, xs = np.nonzero(mask)
        x, y, width, height = annotation["bbox"]
        found = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
        assert np.abs(found - [x, y, x + width, y + height]).max() <= 1
        assert mask.sum() == pytest.approx(annotation["area"], rel=0.03)
    for image_id in coco.getImgIds():
        masks = [coco.annToMask(annotation) for annotation in coco.imgToAnns[image_id]]
        assert masks
        assert np.sum(masks, axis=0).max() == 1
    assert {annotation["category_id"] for annotation in coco.anns.values()} == {1, 2, 3, 4}


def test_a_shape_differs_from_its_ground(shapes: Path) -> None:
    """The annotated pixels are of one colour up to noise, those around them are not of it."""
    coco = COCO(str(shapes / "shapes/annotations/instances_train.json"))
    for annotation in list(coco.anns.values())[:10]:
        info = coco.imgs[annotation["image_id"]]
        image = cv2.imread(str(shapes / "shapes/train" / info["file_name"])).astype(float)
        mask = coco.annToMask(annotation)
        core = cv2.erode(mask, np.ones((5, 5), np.uint8)).astype(bool)
        around = (cv2.dilate(mask, np.ones((9, 9), np.uint8)) - cv2.dilate(mask, np.ones((5, 5), np.uint8))).astype(
            bool
        )
        assert image[core].std(axis=0).max() < 20
        assert np.abs(image[core].mean(0) - image[around].mean(0)).max() > 40


def test_shapes_are_reproducible_and_kept(tmp_path: Path, shapes: Path) -> None:
    write_shapes(tmp_path, TINY_SHAPES)
    for path in sorted(shapes.rglob("*.jp*g")):
        assert path.read_bytes() == (tmp_path / path.relative_to(shapes)).read_bytes()
    stamp = (tmp_path / "shapes/config.json").stat().st_mtime_ns
    write_shapes(tmp_path, TINY_SHAPES)
    assert (tmp_path / "shapes/config.json").stat().st_mtime_ns == stamp
    with pytest.raises(InputError, match="other settings"):
        write_shapes(tmp_path, replace(TINY_SHAPES, seed=1))
    train, val = (
        json.loads((tmp_path / f"shapes/annotations/instances_{part}.json").read_text()) for part in ("train", "val")
    )
    assert (len(train["images"]), len(val["images"])) == (TINY_SHAPES.train_scenes, TINY_SHAPES.val_scenes)


def test_the_shapes_of_who_was_sooner_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, write = ShapesConfig(1, 1, 1, 1), synthetic._write_detection

    def overtaken(root: Path, config: ShapesConfig) -> None:
        monkeypatch.setattr(synthetic, "_write_detection", write)
        write_shapes(tmp_path, config)
        write(root, config)

    monkeypatch.setattr(synthetic, "_write_detection", overtaken)
    write_shapes(tmp_path, config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shapes", "shapes_classification"]


@given(
    height=st.integers(1, 300),
    width=st.integers(1, 300),
    size=st.sampled_from([2, 7, 32, 224]),
    min_crop_scale=st.sampled_from([0.08, 0.5, 1.0]),
    channels_last=st.booleans(),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=150, deadline=None)
def test_training_crops_are_torchvisions(
    height: int, width: int, size: int, min_crop_scale: float, channels_last: bool, seed: int
) -> None:
    """The same bits of the same draws as RandomResizedCrop and RandomHorizontalFlip, and as many draws."""
    image = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))
    image = image.permute(2, 0, 1) if channels_last else image.permute(2, 0, 1).contiguous()
    scale = (min_crop_scale, 1.0)
    slow = v2.Compose([v2.RandomResizedCrop(size, scale=scale, antialias=True), v2.RandomHorizontalFlip()])
    results = []
    for transform in (train_transform(size, min_crop_scale=min_crop_scale), slow):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            results.append((transform(image), torch.rand(1)))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@given(seed=st.integers(0, 10**6), height=st.integers(20, 60), width=st.integers(20, 60))
@settings(deadline=None, max_examples=30)
def test_the_augmentation_of_robustness_is_the_librarys(seed: int, height: int, width: int) -> None:
    """Against its steps in float64, written here from its data_augmentation.py, on the same draws."""
    eigenvalues = np.array([0.2175, 0.0188, 0.0045])
    eigenvectors = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])
    image = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (3, height, width), dtype=np.uint8))
    library = v2.Compose(
        [v2.RandomResizedCrop(24, antialias=True), v2.RandomHorizontalFlip(), v2.ColorJitter(0.1, 0.1, 0.1)]
    )
    ours = augmentation("robustness", 24, min_crop_scale=0.08)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        found = ours(image)
        after = torch.rand(1)
        torch.manual_seed(seed)
        jittered = library(image).numpy() / 255
        # Lighting: alpha ~ N(0, 0.05); rgb = (eigvec * alpha * eigval).sum(1), added to every pixel.
        alpha = torch.empty(3).normal_(0, 0.05).numpy()
        assert torch.equal(torch.rand(1), after)
    rgb = (eigenvectors * alpha[None] * eigenvalues[None]).sum(1)
    expected = (jittered + rgb[:, None, None]).clip(0, 1)
    assert found.dtype == torch.uint8
    assert np.abs(found.numpy() / 255 - expected).max() <= 0.5 / 255 + 1e-6
    assert np.abs(255 * rgb).max() > 0


def test_images_that_train_and_val_share_are_told(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(val: Path) -> str:
        warn_of_shared(*(open_dataset(root, TRANSFORM) for root in (pictures, val)))
        return capsys.readouterr().out

    for seed, name in enumerate(("A/z.png", "b/2.jpg"), 10):
        write_noise(tmp_path / "val" / name, seed)
    assert told(tmp_path / "val") == ""
    first = tmp_path / "val/A/another.png"
    shutil.copy(pictures / "A/z.png", first)
    (tmp_path / "val/b/10.jpg").symlink_to(pictures / "b/10.jpg")
    assert told(tmp_path / "val") == (
        f"warning: {tmp_path / 'val'} shares 2 images with {pictures}, the first: {first}, the same image as "
        f"{pictures / 'A/z.png'}; accuracy on them does not tell of others\n"
    )
    monkeypatch.setenv("RANK", "1")
    assert told(tmp_path / "val") == ""
    monkeypatch.delenv("RANK")
    monkeypatch.setattr(datasets, "_COMPARED", 5)  # more are compared by name
    assert f"shares 1 image with {pictures}, the first: {tmp_path / 'val/b/10.jpg'}" in told(tmp_path / "val")
    (tmp_path / "link").symlink_to(pictures)
    assert f"{tmp_path / 'link'} shares 6 images with {pictures}, the first: {pictures / 'A/Y.jpg'};" in told(
        tmp_path / "link"
    )
