"""Pictures of objects: each in its place, in the colour of its class, under its name and score; columns of them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data.catalog import Metadata
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.visualizer import Visualizer
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as mask_util

from robust_backbones.detection.visualize import (
    TITLE_HEIGHT,
    draw_objects,
    ground_truth_beside_detections,
    objects_in,
    read_rgb,
    write_picture,
)
from robust_backbones.errors import InputError

NAMES = Metadata(thing_classes=["cat", "dog", "US$ or $"])


@pytest.fixture
def grey(tmp_path: Path) -> Path:
    """An image of 200 x 160 pixels without content, half as large as a panel."""
    Image.new("L", (200, 160), 128).save(tmp_path / "grey.png")
    return tmp_path / "grey.png"


@pytest.fixture
def labels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is written into pictures from now on."""
    written: list[str] = []
    draw_text = Visualizer.draw_text

    def note(self: Visualizer, text: str, *arguments: object, **options: object) -> object:
        written.append(text)
        return draw_text(self, text, *arguments, **options)

    monkeypatch.setattr(Visualizer, "draw_text", note)
    return written


def detections(*rows: tuple[list[int], int, float], masks: bool = False) -> Instances:
    """Of (x0, y0, x1, y1), class, score; with masks, the box's lower half is the object."""
    boxes, classes, scores = zip(*rows, strict=True) if rows else ((), (), ())
    found = Instances((160, 200))
    found.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    found.pred_classes = torch.tensor(classes, dtype=torch.int64)
    found.scores = torch.tensor(scores, dtype=torch.float32)
    if masks:
        found.pred_masks = torch.zeros(len(rows), 160, 200, dtype=torch.bool)
        for mask, (x0, y0, x1, y1) in zip(found.pred_masks, boxes, strict=True):
            mask[(y0 + y1) // 2 : y1, x0:x1] = True
    return found


def annotation(box: list[int], category: int, **content: object) -> dict[str, object]:
    return {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": category, **content}


def split(picture: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The left and the right panel, without titles."""
    left, right = np.split(picture[TITLE_HEIGHT:], 2, axis=1)
    return left, right


@pytest.mark.parametrize("metadata", [NAMES, Metadata(thing_colors=[(255, 0, 0), (0, 0, 255), (0, 255, 0)])])
def test_ground_truth_is_left_and_detections_are_right(grey: Path, metadata: Metadata) -> None:
    """A class has one colour in both panels and another class another one, whether or not the data set has colours."""
    left_box, right_box = [10, 20, 80, 120], [110, 20, 190, 120]
    items = [
        {"file_name": str(grey), "annotations": [annotation(left_box, 0), annotation(right_box, 1)]},
        {"file_name": str(grey)},
    ]
    found = [
        detections((left_box, 0, 0.9), (right_box, 0, 0.8), ([90, 10, 105, 150], 1, 0.4)),
        detections(([10, 20, 80, 120], 2, 0.49)),
    ]
    first, second = ground_truth_beside_detections(items, found, metadata)
    for picture in (first, second):
        assert picture.dtype == np.uint8
        assert picture.shape == (TITLE_HEIGHT + 320, 800, 3)
        for title in np.split(picture[:TITLE_HEIGHT], 2, axis=1):
            assert (title == 255).all(axis=2).mean() > 0.7
            assert (title < 50).any()
    truth, predicted = split(first)
    cat, dog = truth[180, 20], truth[180, 220]  # the left edges; panels are twice as large as the image
    assert np.ptp(cat) > 20  # not the image's grey
    assert np.abs(cat.astype(int) - dog).max() > 20
    assert np.array_equal(predicted[180, 20], cat)
    assert np.array_equal(predicted[180, 220], cat)
    assert (predicted[180, 185:205] == 128).all()  # no box there: its score is too low
    for panel in split(second):
        assert (panel == 128).all()  # no annotations, no score high enough
    again, _ = ground_truth_beside_detections(items, found, metadata)
    assert np.array_equal(first, again)


def test_min_score(grey: Path) -> None:
    items, found = [{"file_name": str(grey), "annotations": []}], [detections(([10, 20, 80, 120], 0, 0.6))]
    for min_score, is_drawn in ((0.55, True), (0.65, False)):
        (picture,) = ground_truth_beside_detections(items, found, NAMES, min_score=min_score)
        assert (split(picture)[1] != 128).any() == is_drawn


def test_as_many_detections_as_images(grey: Path) -> None:
    with pytest.raises(ValueError, match="shorter"):
        ground_truth_beside_detections([{"file_name": str(grey)}] * 2, [detections()], NAMES)


def test_names_and_scores(grey: Path, labels: list[str]) -> None:
    """Ground truth has no score; what lies between dollar signs is not typeset; without names there are numbers."""
    annotations = [annotation([10, 20, 80, 120], 1), annotation([90, 20, 150, 120], 0, iscrowd=1)]
    found = detections(([10, 20, 80, 120], 1, 0.934), ([90, 20, 150, 110], 2, 1.0), ([0, 0, 9, 9], 0, 0.2))
    ground_truth_beside_detections([{"file_name": str(grey), "annotations": annotations}], [found], NAMES)
    assert labels == ["dog", "cat (crowd)", "dog 93%", r"US\$ or \$ 100%"]
    labels.clear()
    draw_objects(read_rgb(grey), objects_in(found, min_score=0.95), Metadata())
    assert labels == ["2 100%"]


def test_masks_fill_their_objects(grey: Path) -> None:
    """Of detections, polygons and run lengths alike; an object without one is a box beside others with masks."""
    image, box = read_rgb(grey), [40, 40, 100, 120]
    lower_half = np.zeros((160, 200), np.uint8, order="F")
    lower_half[80:120, 40:100] = 1
    polygon = [[40, 80, 100, 80, 100, 120, 40, 120]]
    objects = {
        "detections": objects_in(detections((box, 0, 0.9), masks=True)),
        "polygons": [annotation(box, 0, segmentation=polygon), annotation([120, 40, 180, 120], 0)],
        "run lengths": [annotation(box, 0, segmentation=mask_util.encode(lower_half))],
    }
    for kind, listed in objects.items():
        picture = draw_objects(image, listed, NAMES)
        assert picture.shape == image.shape
        assert (picture[90:112, 48:92] != 128).any(axis=2).all(), kind
        assert (picture[65:74, 48:92] == 128).all(), kind
        if len(listed) == 2:
            assert (picture[110, 118:123] != 128).any()
            assert (picture[80:112, 128:172] == 128).all()
    assert draw_objects(image, objects["polygons"], NAMES, scale=1.5).shape == (240, 300, 3)


def test_more_classes_than_colours(grey: Path) -> None:
    colors = Metadata(thing_colors=[(255, 0, 0), (0, 0, 255)])
    pictures = [draw_objects(read_rgb(grey), [annotation([10, 20, 80, 120], c)], colors) for c in (1, 2, 5)]
    edges = [picture[90, 10].tolist() for picture in pictures]
    assert edges[0] == edges[2] != edges[1]


def test_images_are_read_as_detectron2_reads_them(tmp_path: Path) -> None:
    image = Image.new("RGBA", (40, 20), (200, 10, 30, 77))
    exif = Image.Exif()
    exif[0x0112] = 8  # lies on its side
    image.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_rgb(tmp_path / "a.png"), np.full((40, 20, 3), (200, 10, 30), np.uint8))
    write_picture(tmp_path / "b.png", read_rgb(tmp_path / "a.png"))
    assert np.array_equal(np.asarray(Image.open(tmp_path / "b.png")), read_rgb(tmp_path / "a.png"))
    (tmp_path / "c.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    for name in ("c.png", "none.png"):
        with pytest.raises(InputError, match=f"the image .*{name} cannot be read"):
            read_rgb(tmp_path / name)
