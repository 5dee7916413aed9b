"""Classification folders and the synthetic shapes."""

import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from pycocotools.coco import COCO

from robust_backbones.data.folders import (
    ClassificationFolder,
    train_loader,
    train_transform,
    val_loader,
    val_transform,
)
from robust_backbones.data.synthetic import CLASSES, write_shapes
from robust_backbones.errors import InputError
from tests.conftest import TINY_SHAPES

TRANSFORM = val_transform(32, resize=32)


def epoch_images(root: Path, *, workers: int, epoch: int, seed: int = 0) -> torch.Tensor:
    dataset = ClassificationFolder(root, train_transform(32, min_crop_scale=0.3), seed=seed)
    return torch.cat([images for images, _ in train_loader(dataset, 8, epoch=epoch, workers=workers)])


def test_batches_depend_on_seed_and_epoch_alone(shapes: Path) -> None:
    root = shapes / "shapes_classification/train"
    first = epoch_images(root, workers=0, epoch=0)
    assert torch.equal(epoch_images(root, workers=2, epoch=0), first)
    assert not torch.equal(epoch_images(root, workers=0, epoch=1), first)
    assert not torch.equal(epoch_images(root, workers=0, epoch=0, seed=1), first)
    assert first.shape == (32, 3, 32, 32)
    assert first.dtype == torch.uint8


def test_one_image_is_augmented_anew_each_epoch_and_the_global_generator_is_left_alone(shapes: Path) -> None:
    dataset = ClassificationFolder(shapes / "shapes_classification/train", train_transform(32, min_crop_scale=0.3))
    state = torch.random.get_rng_state()
    first = dataset[0][0]
    assert torch.equal(torch.random.get_rng_state(), state)
    dataset.epoch = 1
    assert not torch.equal(dataset[0][0], first)
    dataset.epoch = 0
    assert torch.equal(dataset[0][0], first)


def test_augmentation_differs_between_images(tmp_path: Path) -> None:
    """The same picture under several names is not cropped the same way."""
    (tmp_path / "a").mkdir()
    picture = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    for index in range(4):
        cv2.imwrite(str(tmp_path / "a" / f"{index}.png"), picture)
    dataset = ClassificationFolder(tmp_path, train_transform(32, min_crop_scale=0.3))
    assert len({dataset[index][0].numpy().tobytes() for index in range(4)}) == 4


def test_validation_images_come_once_and_in_order(shapes: Path) -> None:
    dataset = ClassificationFolder(shapes / "shapes_classification/val", TRANSFORM)
    labels = torch.cat([labels for _, labels in val_loader(dataset, 3, workers=0)])
    assert labels.tolist() == dataset.targets


def test_grayscale_images_get_three_channels(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    cv2.imwrite(str(tmp_path / "a/gray.jpg"), np.full((40, 50), 77, np.uint8))
    image, _ = ClassificationFolder(tmp_path, TRANSFORM)[0]
    assert image.shape == (3, 32, 32)
    assert image.float().mean() == pytest.approx(77, abs=1)


def test_bad_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no folder"):
        ClassificationFolder(tmp_path / "none", TRANSFORM)
    with pytest.raises(InputError, match="class folder"):
        ClassificationFolder(tmp_path, TRANSFORM)
    (tmp_path / "empty_class").mkdir()
    with pytest.raises(InputError, match="empty_class"):
        ClassificationFolder(tmp_path, TRANSFORM)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named(tmp_path: Path, workers: int) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/broken.jpg").write_bytes(b"not a picture")
    dataset = ClassificationFolder(tmp_path, TRANSFORM)
    with pytest.raises(InputError) as error:
        next(iter(val_loader(dataset, 1, workers=workers)))
    assert str(error.value).startswith("cannot read the image")
    assert "broken.jpg" in str(error.value)
    assert "\n" not in str(error.value)


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
