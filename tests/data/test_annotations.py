"""Detection data as people have it: every fault is found, and named with its file, image and annotation."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as mask_tools
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from robust_backbones.data import annotations_images
from robust_backbones.data.annotations import MISSING, Fault, Use, check_coco, read_json
from robust_backbones.data.annotations_images import check_images, read_header
from robust_backbones.data.annotations_repair import repair
from robust_backbones.data.annotations_sets import AnnotatedSet
from robust_backbones.data.annotations_values import _runs_of, mask_extent
from robust_backbones.data.annotations_voc import read_voc, voc_classes, voc_images
from robust_backbones.errors import InputError

Content = dict[str, Any]
Run = Callable[..., tuple[int, str, str]]
MASKS = Use(training=False, masks=True)


def sound() -> Content:
    """Two classes; three images of 60 x 40 with three objects each, one of them a crowd."""
    crowd = mask_tools.encode(np.asfortranarray(np.eye(40, 60, dtype=np.uint8)))
    return {
        "categories": [{"id": 3, "name": "cat"}, {"id": 8, "name": "dog"}],
        "images": [{"id": i, "file_name": f"{i}.png", "width": 60, "height": 40} for i in (1, 2, 3)],
        "annotations": [
            {
                "id": 10 * image + number,
                "image_id": image,
                "category_id": (3, 8)[number % 2],
                "bbox": [4 + 9 * number, 5, 12, 20],
                "area": 240,
                "iscrowd": int(number == 2),
                "segmentation": {"size": [40, 60], "counts": crowd["counts"].decode()}
                if number == 2
                else [[4 + 9 * number, 5, 16 + 9 * number, 5, 16 + 9 * number, 25, 4 + 9 * number, 25]],
            }
            for image in (1, 2, 3)
            for number in range(3)
        ],
    }


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for number in (1, 2, 3):
        Image.new("RGB", (60, 40), (number, 0, 0)).save(folder / f"{number}.png")
    return folder


def coco_set(folder: Path, images: Path, content: Content) -> AnnotatedSet:
    (folder / "truth.json").write_text(json.dumps(content))
    return AnnotatedSet(folder / "truth.json", images)


def errors(faults: list[Fault]) -> list[Fault]:
    return [fault for fault in faults if fault.severity == "error"]


def test_a_sound_set_has_no_fault(tmp_path: Path, images: Path) -> None:
    for use in (Use(), MASKS, Use(masks=True)):
        assert coco_set(tmp_path, images, sound()).check(use)[0] == []


@pytest.mark.real_data
def test_real_sets_have_no_error(real_data: Path) -> None:
    root = real_data / "detectron2"
    coco = AnnotatedSet(root / "coco/annotations/instances_val2017.json", root / "coco/val2017")
    assert errors(coco.check(Use(masks=True))[0]) == []
    assert errors(AnnotatedSet.parse(f"{root / 'VOC2007'}:test").check()[0]) == []


HOSTILE: list[Any] = [
    None, "x", "", [], {}, math.nan, math.inf, 1e308, 10**400, -1, -0.5, [1, 2, 3, 4, 5], [math.nan] * 4, ["1"] * 4,
    [1, 2, -3, 4], [[1, 2]], {"size": [40, 60], "counts": "x"}, {"size": [60, 40], "counts": [2400]},
]  # fmt: skip
"""Values that no key of a sound set can have."""
KEYS = {
    "categories": ("id", "name"),
    "images": ("id", "file_name", "width", "height"),
    "annotations": ("id", "image_id", "category_id", "bbox", "area", "iscrowd"),
}


def spoil(content: Content, name: str, place: int, key: str, value: Any) -> None:
    if value == "missing":
        del content[name][place][key]
    else:
        content[name][place][key] = value


def check_mutation(images: Path, folder: Path, name: str, place: int, key: str, value: Any) -> None:
    """An error names the place, or what was meant is still what is there."""
    content = sound()
    number = content[name][place]["id"]
    spoil(content, name, place, key, value)
    faults = errors(coco_set(folder, images, content).check(Use(masks=True))[0])
    legal = (name, key, value) in (
        ("annotations", "iscrowd", "missing"),
        ("annotations", "id", "x"),
        ("annotations", "id", -1),
        ("categories", "name", "x"),  # a name like others: classes are matched by it
    )
    if legal:
        assert faults == []
        return
    assert faults, (name, key, value)
    ids = {"images": "image", "annotations": "annotation"}
    if (name == "annotations" and key != "id") or (name == "images" and key not in ("id",)):
        assert number in {getattr(fault, ids[name]) for fault in faults}, faults
    assert all("\n" not in str(fault) and len(str(fault)) < 600 for fault in faults)


mutations = st.sampled_from([(name, key) for name, keys in KEYS.items() for key in keys])


@given(where=mutations, place=st.integers(0, 8), value=st.sampled_from([*HOSTILE, "missing"]))
@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_broken_value_is_named_with_its_place(
    images: Path, tmp_path: Path, where: tuple[str, str], place: int, value: Any
) -> None:
    name, key = where
    check_mutation(images, tmp_path, name, place % len(sound()[name]), key, value)


@pytest.mark.slow
def test_every_broken_value_at_every_place(images: Path, tmp_path: Path) -> None:
    for name, keys in KEYS.items():
        for key in keys:
            for place in range(len(sound()[name])):
                for value in [*HOSTILE, "missing"]:
                    check_mutation(images, tmp_path, name, place, key, value)


POLYGON = [5, 5, 20, 5, 20, 20]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        *[(value, "no usable mask") for value in (None, [], {}, [4, 5, 12, 20], [[4, 5, 12, 20]], [[1, 2]])],
        ({"size": [40, 60], "counts": [2400]}, "no usable mask"),
        ([[*POLYGON, 5]], "7 numbers, no pairs"),
        ([POLYGON, [*POLYGON[:5], math.nan]], "polygon 1 of its segmentation has numbers that are not finite"),
        ([[*POLYGON[:5], 1e308]], "not finite or far outside"),
        ([[*POLYGON[:5], 10**400]], "not finite or far outside"),
        ([[*POLYGON[:5], "5"]], "polygon 0 of its segmentation is"),
        ([[[1, 2], [3, 4], [5, 6]]], "polygon 0 of its segmentation is"),
        (POLYGON, "one list of numbers"),
        ([[x + 100 for x in POLYGON]], "lies outside its image"),
        ("mask", 'segmentation is "mask"'),
        ({"size": [60, 40], "counts": [2400]}, "size [60, 40]"),
        ({"size": [40.0, 60], "counts": [2400]}, "size [40.0, 60]"),
        ({"size": [40, 60], "counts": [2399]}, "does not cover"),
        ({"size": [40, 60], "counts": [2500, -100]}, "does not cover"),
        ({"size": [40, 60], "counts": "zzz"}, "does not cover"),
        ({"size": [40, 60]}, "counts null"),
    ],
)
def test_masks_without_meaning(value: Any, words: str) -> None:
    content = sound()
    content["annotations"][4]["segmentation"] = value
    for use in (MASKS, Use(masks=True)):
        (fault,) = check_coco("a.json", content, use)
        assert words in fault.what
        assert (fault.image, fault.annotation) == (2, 21)
        assert fault.severity == ("warning" if "usable" in words and not use.training else "error")
    assert check_coco("a.json", content, Use()) == []  # boxes alone


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_compressed_runs_are_read_as_pycocotools_writes_them(seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = (rng.random((rng.integers(1, 50), rng.integers(1, 50))) < rng.random()).astype(np.uint8)
    text = mask_tools.encode(np.asfortranarray(mask))["counts"].decode()
    changes = np.flatnonzero(np.diff(mask.flatten(order="F"), prepend=0))
    runs = np.diff([0, *changes, mask.size]).tolist()
    assert _runs_of(text) == runs
    x, y, width, height = mask_tools.toBbox({"size": mask.shape, "counts": text})
    for counts in (text, runs):
        extent = mask_extent({"size": list(mask.shape), "counts": counts})
        assert extent == (x, y, x + width, y + height) if mask.any() else np.isnan(extent).all()


def change_all(key: str, change: Callable[[Any], Any]) -> Content:
    content = sound()
    for row in content["annotations"]:
        row[key] = change(row[key])
    return content


def mostly_corners() -> Content:
    """Sixty boxes as (x1, y1, x2, y2); of the seven that leave their image as they are, two do as corners too."""
    content = sound()
    rows = [{**content["annotations"][0], "id": number, "bbox": [2, 3, 20, 30]} for number in range(60)]
    for row, box in zip(rows, [[30, 20, 55, 35]] * 5 + [[1, 2, 70, 30]] * 2, strict=False):
        row["bbox"] = box
    return content | {"annotations": rows}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (change_all("bbox", lambda b: [b[0], b[1], b[0] + 38, b[1] + 35]), "none does as (x1, y1, x2, y2)"),
        (mostly_corners(), "7 of 60 boxes leave their image, and 2 do as (x1, y1, x2, y2)"),
        (change_all("bbox", lambda _: [50, 5, 12, 20]), "upper left corner"),
        (change_all("bbox", lambda b: [b[0] + 30, 15, *b[2:]]), "none does as (x of the center, y of the center"),
        (change_all("image_id", str), 'image_id "1" does not exist in the file: write 1, as the id is there'),
        (change_all("segmentation", lambda _: POLYGON), "one list of numbers"),
        (change_all("bbox", lambda b: [b[0] / 60, b[1] / 40, b[2] / 60, b[3] / 40]), "fractions"),
        (change_all("bbox", lambda b: [0.95, 0.9, 0.1, 0.2]), "fractions"),  # x and y of the center, as YOLO's
        (change_all("iscrowd", lambda _: 1), "not a crowd"),
        (sound() | {"annotations": []}, "not a crowd"),
        (sound() | {"images": sound()["images"] + sound()["images"][:1]}, "id 1 is that of another row"),
        (sound() | {"categories": [{"id": 3, "name": "cat"}, {"id": 8, "name": "cat"}]}, 'name "cat" is that of'),
        (sound() | {"annotations": [7]}, "is 7"),
        *[
            (sound() | {"images": [{**row, "file_name": name} for row in sound()["images"]]}, "without line breaks")
            for name in ("a\nb", "a\0b", "\ud800", "x" * 5000)
        ],
    ],
)
def test_what_no_row_shows_alone(content: Content, words: str) -> None:
    assert any(words in str(fault) for fault in errors(check_coco("a.json", content, Use(masks=True))))


@pytest.mark.parametrize("content", [change_all("area", lambda _: None), change_all("bbox", lambda _: ["1"] * 4)])
def test_objects_that_are_all_broken_are_not_called_crowds(content: Content) -> None:
    assert not any("crowd" in str(fault) for fault in errors(check_coco("a.json", content, Use())))


def test_masks_elsewhere_than_their_boxes_are_told() -> None:
    """As fractions of the image, or with x and y exchanged."""
    content = sound()
    (mask,), (other,) = (content["annotations"][place]["segmentation"] for place in (0, 3))
    mask[:] = [value / 60 for value in mask]
    other[::2], other[1::2] = other[1::2], other[::2]
    content["annotations"][4]["segmentation"][0][0] += 3
    for use in (MASKS, Use(masks=True)):
        found = check_coco("a.json", content, use)
        assert [(fault.severity, fault.annotation) for fault in found] == [("warning", 10), ("warning", 20)]
    assert "share less than half" in found[0].what
    assert check_coco("a.json", content, Use()) == []  # boxes alone


def test_run_lengths_elsewhere_than_their_boxes_are_told() -> None:
    """As in another image's place; crowds say where nothing counts, whatever their boxes."""
    content, mask = sound(), np.zeros((40, 60), np.uint8, order="F")
    mask[5:25, 40:52] = 1
    counts = mask_tools.encode(mask)["counts"].decode()
    for place in (0, 2):
        content["annotations"][place]["segmentation"] = {"size": [40, 60], "counts": counts}
    found = check_coco("a.json", content, MASKS)
    assert [(fault.severity, fault.annotation) for fault in found] == [("warning", 10)]
    assert check_coco("a.json", content, Use()) == []  # boxes alone


def test_names_of_files_as_windows_writes_them_are_mended(tmp_path: Path, images: Path) -> None:
    content = sound()
    content["images"][1]["file_name"] = f"..\\{images.name}\\2.png"
    content["images"][2]["file_name"] = "gone\\3.png"
    for number, name in ((4, "%33.PNG"), (5, "2.jpg")):
        content["images"].append({**content["images"][0], "id": number, "file_name": name})
    repaired, done = repair(coco_set(tmp_path, images, content), Use(), tmp_path / "fixed")
    assert "names of files written as the files are called: 2" in done
    names = [row["file_name"] for row in repaired.read()[0]["images"]]
    assert names == ["1.png", f"../{images.name}/2.png", "3.png"]  # 2.png may be another image than 2.jpg


@pytest.mark.parametrize(
    "before", ["images/", "/", "https://example.org/data/", "C:\\data\\", "images/0a1b2c3d-", "images\\0a1b2c3d-"]
)
def test_what_stands_before_names_and_is_not_there_is_left_out(tmp_path: Path, images: Path, before: str) -> None:
    """As exporters write them; of two names that end alike neither is known."""
    content = sound()
    for row in content["images"]:
        row["file_name"] = before + row["file_name"]
    repaired, done = repair(coco_set(tmp_path, images, content), Use(), tmp_path / "fixed")
    assert done == ["names of files written as the files are called: 3"]
    assert repaired.read()[0] == sound()
    if before == "images/0a1b2c3d-":
        fault, *_ = coco_set(tmp_path, images, content).check()[0]
        assert str(fault).endswith(
            f"{images} has '1.png', without what Label Studio puts before it: write file_name so"
        )
    content["images"][0]["file_name"] = "b/2.png"
    repaired, done = repair(coco_set(tmp_path, images, content), Use(), tmp_path / "again")
    assert [row["id"] for row in repaired.read()[0]["images"]] == [3]


def test_what_exporters_write_of_turned_objects_and_masks_is_told() -> None:
    """CVAT keeps the box of before and an angle, and calls every mask a crowd."""
    content = grid()
    for row, angle in zip(content["annotations"], (0, 360, 0.0, None, 30, -15.5), strict=False):
        row["attributes"] = {"occluded": False, "rotation": angle}
    (fault,) = check_coco("a.json", content)
    assert (fault.severity, fault.what[:40]) == ("warning", "2 of its 12 objects have a rotation amon")
    (fault,) = check_coco("a.json", change_all("iscrowd", lambda _: 1))
    assert (fault.severity, "some programs write 1 for every mask" in fault.mend) == ("error", True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda content: [row.update(iscrowd=1) for row in content["annotations"][:4]],
            "6 of its 9 objects are crowds",
        ),
        (
            lambda content: content["images"].append({**content["images"][0], "id": 9, "file_name": "./1.png"}),
            "./1.png",
        ),
        (
            lambda content: (
                [row.update(width=600, height=400) for row in content["images"]],
                content["annotations"].append({**content["annotations"][3], "id": 9, "bbox": [88, 60, 12, 20]}),
            ),
            "all its 10 boxes lie in the upper left quarter",
        ),
        (
            lambda content: [
                row.update(name=name) for row, name in zip(content["categories"], ("é", "e\u0301"), strict=True)
            ],
            'name "e\\u0301" is "\\u00e9" but for case',
        ),
    ],
)
def test_what_a_whole_set_shows(change: Callable[[Content], Any], words: str) -> None:
    """Masks that a program calls crowds, a file under two names, and percents, or boxes of smaller images."""
    content = sound()
    change(content)
    (fault,) = check_coco("a.json", content)
    assert fault.severity == "warning"
    assert words in fault.what


def grid() -> Content:
    """Twelve objects with masks that fill their boxes, over all of three images."""
    content = sound()
    boxes = [[16 * (number % 4), 14 * (number // 4), 12, 12] for number in range(12)]
    content["annotations"] = [
        {"id": number + 1, "image_id": number % 3 + 1, "category_id": (3, 8)[number % 2], "bbox": box, "area": 144}
        | {"segmentation": [[*box[:2], box[0] + 12, box[1], box[0] + 12, box[1] + 12, box[0], box[1] + 12]]}
        for number, box in enumerate(boxes)
    ]
    return content


@pytest.mark.parametrize(
    ("change", "words", "severity"),
    [
        (lambda row: None, "", ""),
        (lambda row: row.update(segmentation=[[value / 2 for value in row["segmentation"][0]]]), "masks", "warning"),
        (lambda row: row.update(area=48), "12 of 12 areas looked at are less than half of their masks", "warning"),
        (lambda row: row.update(area=320), "12 of its 12 areas are larger than their boxes", "warning"),
        (lambda row: row.update(bbox=[value + (value < 50) * (place < 2) for place, value in enumerate(row["bbox"])]),
         "6 of its 12 boxes end a pixel beyond their image, and none begins in the first", "warning"),
        (lambda row: row.update(bbox=[value * 1.2 for value in row["bbox"]], segmentation=[]),
         "as boxes of larger images", "error"),
        (lambda row: row.update(bbox=[*row["bbox"][1::-1], 12, 12], segmentation=[]),
         "none does as (y, x, height, width)", "error"),
        (lambda row: row.update(bbox=[side + more for more in (0, 12) for side in row["bbox"][1::-1]], segmentation=[]),
         "none does as (y1, x1, y2, x2)", "error"),
        (lambda row: row.update(image_id=1), "2 of its 3 images have no object", "warning"),
    ],
)  # fmt: skip
def test_what_most_objects_show(change: Callable[[Any], Any], words: str, severity: str) -> None:
    """Boxes of images of another size, counted from 1, areas of another unit, and images that nobody annotated."""
    content = grid()
    for row in content["annotations"]:
        change(row)
    found = [(words in fault.what, fault.severity) for fault in check_coco("a.json", content) if not fault.annotation]
    assert found == [(True, severity)] if words else found == []


@pytest.mark.parametrize(
    ("box", "corrected"), [([40, 5, 18, 20], True), ([5, 5, 12, 52], False), ([4, 5, 12, 20], False)]
)
def test_a_size_is_corrected_where_the_boxes_are_of_the_file(
    tmp_path: Path, images: Path, box: list[int], corrected: bool
) -> None:
    """Of an image that was turned they are not, and a corrected size would hide it."""
    content = sound()
    for row in content["images"]:
        row |= {"width": 40, "height": 60}
    content["annotations"][0]["bbox"] = box
    repaired, done = repair(coco_set(tmp_path, images, content), Use(), tmp_path / "fixed")
    assert ("sizes of images corrected: 3" in done) == corrected
    assert (errors(repaired.check()[0]) == []) == corrected


def test_a_box_that_is_not_there_is_that_of_its_mask(tmp_path: Path, images: Path) -> None:
    content = sound()
    rows = content["annotations"]
    del rows[0]["bbox"]
    rows[1]["bbox"], rows[2]["bbox"], rows[3]["bbox"] = [math.nan, 1, 2, 3], None, []
    rows[4] |= {"bbox": None, "segmentation": []}
    rows[6]["bbox"], rows[7]["bbox"], rows[8]["bbox"] = [1, 2, 3], ["a", 1, 2, 3], [0, 0, 0, 0]
    repaired, done = repair(coco_set(tmp_path, images, content), Use(), tmp_path / "fixed")
    assert "boxes filled in from masks: 7" in done
    assert errors(repaired.check(Use(masks=True))[0]) == []
    meant = {row["id"]: row["bbox"] for row in sound()["annotations"]} | {12: [0, 0, 40, 40], 32: [0, 0, 40, 40]}
    del meant[21]  # without a mask nothing says where it is
    assert {row["id"]: row["bbox"] for row in repaired.read()[0]["annotations"]} == meant


def test_what_is_written_in_another_way_and_has_one_meaning(tmp_path: Path, images: Path) -> None:
    """As programs write it that know numbers as texts, floats alone, or polygons as points."""
    content = sound()
    rows = content["annotations"]
    (mask,), (other,) = rows[0]["segmentation"], rows[1]["segmentation"]
    rows[0] |= {"segmentation": mask, "bbox": list(map(str, rows[0]["bbox"]))}
    rows[1] |= {"segmentation": [[*map(list, zip(other[::2], other[1::2], strict=True))]], "area": "240"}
    runs = mask_tools.frPyObjects([[0, 0, 9, 0, 9, 9]], 40, 60)[0]
    whole = _runs_of(runs["counts"].decode())
    for row, change in zip(content["annotations"][2::3], (float, int, str), strict=True):
        row["segmentation"] = {"size": [40, 60], "counts": whole}
        if change is float:
            row["segmentation"] = {"size": [40.0, 60.0], "counts": [*map(float, whole or ())]}
        row["iscrowd"] = str(row["iscrowd"]) if change is str else 1
    rows[3]["iscrowd"] = None
    rows[4] |= {"ignore": 1}
    for row in content["images"][:1]:
        row["id"] = str(row["id"])
    for row in content["categories"]:
        row["name"] = len(row["name"]) + row["id"]
    assert errors(coco_set(tmp_path, images, content).check(Use(masks=True))[0])
    repaired, _ = repair(coco_set(tmp_path, images, content), Use(masks=True), tmp_path / "fixed")
    assert errors(repaired.check(Use(masks=True))[0]) == []
    found = repaired.read()[0]
    meant = sound()["annotations"]
    for row in meant[2::3]:
        row["segmentation"] = {"size": [40, 60], "counts": whole}
    meant[4] |= {"ignore": 0, "iscrowd": 1}
    assert found["annotations"] == meant
    assert all(isinstance(value, int) for value in found["annotations"][2]["segmentation"]["size"])
    assert [row["name"] for row in found["categories"]] == ["6", "11"]


def test_sides_of_run_lengths_in_another_order_are_put_in_order_where_the_box_says_so(
    tmp_path: Path, images: Path
) -> None:
    """Of masks that were written turned they are not: those become boxes, as what says nothing else does."""
    content = sound()
    (thing, other, *_) = content["annotations"]
    for row, turned in ((thing, False), (other, True)):
        x, y, width, height = row["bbox"]
        mask = np.zeros((40, 60), np.uint8, order="F")
        mask[y : y + height, x : x + width // 2] = 1
        runs = mask_tools.encode(np.asfortranarray(mask.T) if turned else mask)
        row["segmentation"] = {"size": [60, 40], "counts": runs["counts"].decode()}
    runs = thing["segmentation"]["counts"]
    repaired, done = repair(coco_set(tmp_path, images, content), Use(masks=True), tmp_path / "fixed")
    found = repaired.read()[0]["annotations"]
    assert found[0]["segmentation"] == {"size": [40, 60], "counts": runs}
    assert found[1]["segmentation"] == sound()["annotations"][1]["segmentation"]
    assert done == ["run lengths whose size was (width, height): 1", "masks filled in from boxes: 1"]


@pytest.mark.parametrize("box", [[0, 0, 60, 40], [5, 5, 0, 0]])
def test_run_lengths_of_a_turned_image_are_not_taken_for_others(tmp_path: Path, images: Path, box: list[int]) -> None:
    """Read by the other size they are scattered over a large box, and an empty box says nothing of either."""
    content = sound()
    mask = np.zeros((40, 60), np.uint8, order="F")
    mask[::39], mask[:, ::59], mask[5:9, 5:50] = 1, 1, 1
    runs = mask_tools.encode(np.asfortranarray(mask.T))
    content["annotations"][0] |= {"bbox": box, "segmentation": {"size": [60, 40], "counts": runs["counts"].decode()}}
    _, done = repair(coco_set(tmp_path, images, content), Use(masks=True), tmp_path / "fixed")
    assert not [line for line in done if "run lengths" in line]


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("area", [None, "x", math.nan, -1, 0.001, 1e9])
def test_an_area_is_that_of_the_mask(tmp_path: Path, images: Path, masks: bool, area: Any) -> None:
    """AP by size uses it; of an object without a mask it is the box's."""
    content = sound()
    rows = content["annotations"]
    rows[0] |= {"area": area, "segmentation": [[4, 5, 16, 5, 16, 25]]}
    rows[1] |= {"area": area, "segmentation": []}
    dataset = coco_set(tmp_path, images, content)
    found = repair(dataset, Use(masks=masks), tmp_path / "fixed")[0].read()[0]["annotations"]
    pixels = mask_tools.area(mask_tools.frPyObjects(rows[0]["segmentation"], 40, 60))[0]
    assert [row["area"] for row in found] == [pixels] + [240] * 8


def test_what_is_odd_and_may_be_meant() -> None:
    content = sound()
    content["categories"] += [{"id": 9, "name": "Cat"}, {"id": 10, "name": "b ird"}]
    content["annotations"].append({**content["annotations"][0], "id": 99})
    content["annotations"][1] |= {"category_id": 9, "area": 280}
    content["annotations"][3]["area"] = 0.1  # a fraction of its image
    content["annotations"][4]["area"] = 270  # masks are whole pixels
    assert [str(fault) for fault in check_coco("a.json", content)] == [
        'a.json, row 2 of categories: name "Cat" is "cat" but for case, spaces, - and _: if both are one class, give '
        "check-data --fix OUT --rename OLD=NEW",
        "a.json, image 1, annotation 99: its box and class are those of another object of the image: leave one of "
        "them: AP counts the other as missed",
        *[
            f"a.json, image {number // 10}, annotation {number}: its area is less than a pixel, or larger than its "
            "box: write it in pixels; AP by size uses it"
            for number in (11, 20)
        ],
        'a.json, row 3 of categories: no object is of the class "b ird": training cannot learn it; annotate some',
    ]
    assert len(check_coco("a.json", content, Use(training=False))) == 4


def test_an_object_that_is_there_twice_is_counted_as_missed_by_ap() -> None:
    """One detection finds one of the two: of ten objects with one twice, a perfect detector has AP 91."""
    content = grid()
    content["annotations"] = [{**row, "category_id": 3, "iscrowd": 0} for row in content["annotations"][:10]]
    found = [{**row, "score": 1.0} for row in content["annotations"]]
    aps = []
    for more in ([], [{**content["annotations"][0], "id": 99}]):
        truth = COCO()
        truth.dataset = {**content, "annotations": [*content["annotations"], *more]}
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(found), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        precision = evaluation.eval["precision"][:, :, 0, 0, 2]
        aps.append(float(precision.mean()))
    assert aps == [1.0, pytest.approx(91 / 101)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (json.dumps({"images": [], "annotations": [{"category_id": 1}] * 40, "categories": []}), "has no classes"),
        ('{"images": [], "annotations": [{"id": 1, ', "cannot be read .* copy or export it again"),
    ],
)
def test_a_file_as_a_whole_has_one_fault(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    content, faults = read_json(tmp_path / "a.json")
    assert content == {}
    assert len(faults) == 1
    assert re.search(words, str(faults[0]))


TWICE = '{"images": [1], "images": [], "annotations": [], "categories": []}'


@pytest.mark.parametrize(
    "text",
    [TWICE, '{"images": [', "[1, 2]", "{}", "[" * 100_000, '{"images": 1' + "0" * 5000 + "}", "\x00", '{"images": {}}'],
)
def test_files_that_are_no_coco_files(tmp_path: Path, images: Path, text: str) -> None:
    (tmp_path / "truth.json").write_text(text)
    faults, content = AnnotatedSet(tmp_path / "truth.json", images).check()
    assert errors(faults)
    assert content == {}


def test_images(tmp_path: Path) -> None:
    """Right pixels, or the file's name: as headers tell."""
    rng = np.random.default_rng(0)
    plain = Image.fromarray(rng.integers(0, 255, (40, 60, 3), np.uint8))
    for mode in ("RGB", "L", "LA", "P", "RGBA", "1"):
        plain.convert(mode).save(tmp_path / f"{mode}.png")
    plain.convert("CMYK").save(tmp_path / "CMYK.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    plain.save(tmp_path / "turned.jpg", exif=exif)
    sound_names = sorted(path.name for path in tmp_path.iterdir())
    Image.fromarray(rng.integers(0, 60000, (40, 60), np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray(rng.random((40, 60), np.float32)).save(tmp_path / "float.tiff")
    whole = (tmp_path / "CMYK.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.jpg").write_text("no image")
    rows = [(name, str(tmp_path / name), 60, 40) for name in [*sound_names, "deep.png", "float.tiff", "cut.jpg"]]
    rows += [("text.jpg", str(tmp_path / "text.jpg"), 60, 40), ("gone.jpg", str(tmp_path / "gone.jpg"), 60, 40)]
    found = {fault.image: str(fault) for fault in check_images(rows, cache=tmp_path / "cache")}
    assert set(found) == {"turned.jpg", "deep.png", "float.tiff", "cut.jpg", "text.jpg", "gone.jpg"}
    assert "is 40 x 60, and 60 x 40 in the annotations; its EXIF tag turns it" in found["turned.jpg"]
    assert "more than 8 bits" in found["deep.png"]
    assert "more than 8 bits" in found["float.tiff"]
    assert "cannot be read" in found["cut.jpg"]
    # What is remembered is of the file as it was.
    plain.save(tmp_path / "text.jpg")
    again = {fault.image for fault in check_images(rows, cache=tmp_path / "cache")}
    assert again == set(found) - {"text.jpg"}
    (tmp_path / "text.jpg").rename(tmp_path / "tëxt.JPG")
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere")
    for name in ("TE\u0308XT.jpg", "te\u0308xt.png"):
        (fault,) = check_images([(1, str(tmp_path / name), 60, 40)])
        assert str(fault).endswith("its folder has 'tëxt.JPG': write file_name as the file is called")
    (tmp_path / "train").mkdir()
    plain.save(tmp_path / "train/inside.jpg")
    names = ("gone.jpg", "a\\b.jpg", "images/sub/deep.png", "inside.jpg", "images/no.jpg")
    missing = [tmp_path / name for name in names]
    (link, other, above, inside, nowhere) = check_images([(name.name, str(name), 1, 1) for name in missing])
    assert f"it is in {tmp_path}: give another image folder" in above.mend
    assert f"it is in {tmp_path / 'train'}: give another image folder" in inside.mend
    assert f"there is no folder {tmp_path / 'images'}: check the image folder" in nowhere.mend
    assert link.what == MISSING
    assert "write / between folders" in other.mend
    (tmp_path / "tëxt.JPG").rename(tmp_path / "text.jpg")
    for store in (tmp_path / "cache").iterdir():
        store.write_text("damaged")
    assert {fault.image for fault in check_images(rows, cache=tmp_path / "cache")} == again
    assert read_header(tmp_path / "turned.jpg")[:2] == (40, 60)


def test_sizes_do_not_tell_of_every_orientation(tmp_path: Path) -> None:
    for name, tag, side in (("a", 3, 60), ("b", 6, 40), ("c", 6, 60), ("d", 1, 60)):
        exif = Image.Exif()
        exif[0x0112] = tag
        Image.new("RGB", (side, 40)).save(tmp_path / f"{name}.jpg", exif=exif)
    sizes = {"a": (60, 40), "b": (40, 40), "c": (40, 60), "d": (60, 40)}
    found = check_images([(name, str(tmp_path / f"{name}.jpg"), *size) for name, size in sizes.items()])
    assert [(fault.severity, fault.image) for fault in found] == [("warning", "a"), ("warning", "b")]


def test_sets_that_share_a_folder_share_what_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    for name in "abcd":
        Image.new("RGB", (60, 40)).save(tmp_path / f"{name}.png")
        rows.append((name, str(tmp_path / f"{name}.png"), 60, 40))
    for part in (rows[:2], rows[2:]):
        assert check_images(part, cache=tmp_path / "cache") == []
    monkeypatch.setattr(annotations_images, "read_header", None)
    for part in (rows[:2], rows[2:], rows):
        assert check_images(part, cache=tmp_path / "cache") == []


def test_images_of_one_file_are_each_compared_with_it(tmp_path: Path, images: Path) -> None:
    content = sound()
    content["images"][1] |= {"file_name": "1.png", "width": 80}
    (fault,) = errors(coco_set(tmp_path, images, content).check()[0])
    assert (fault.image, fault.what) == (2, "is 60 x 40, and 80 x 40 in the annotations")


def voc(folder: Path) -> None:
    for part in ("ImageSets/Main", "Annotations", "JPEGImages"):
        (folder / part).mkdir(parents=True)
    (folder / "ImageSets/Main/test.txt").write_text("a\nb\n")
    for name in "ab":
        Image.new("RGB", (100, 80)).save(folder / f"JPEGImages/{name}.jpg")
        (folder / f"Annotations/{name}.xml").write_text(
            "<annotation><size><width>100</width><height>80</height></size><object><name>cat</name>"
            "<difficult>0</difficult><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>100</xmax><ymax>80</ymax></bndbox>"
            "</object></annotation>"
        )


def test_a_sound_voc_set(tmp_path: Path) -> None:
    voc(tmp_path / "VOC")
    faults, content = AnnotatedSet.parse(f"{tmp_path / 'VOC'}:test").check()
    assert faults == []
    assert content["categories"] == [{"id": 1, "name": "cat"}]
    assert [row["bbox"] for row in content["annotations"]] == [[0, 0, 100, 80]] * 2


def test_x_and_y_exchanged_in_vocs_files_are_told_in_vocs_words(tmp_path: Path) -> None:
    voc(tmp_path / "VOC")
    for name in "ab":
        file = tmp_path / f"VOC/Annotations/{name}.xml"
        text = re.sub("([xy])(m(in|ax)>)", lambda found: {"x": "y", "y": "x"}[found[1]] + found[2], file.read_text())
        start, thing, end = re.split("(<object>.*</object>)", text)
        file.write_text(start + "".join(thing.replace(">1<", f">{place}<") for place in range(1, 7)) + end)
    fault, *_ = AnnotatedSet.parse(f"{tmp_path / 'VOC'}:test").check()[0]
    assert fault.what == "12 of 12 boxes leave their image, and none does as (y, x, height, width)"
    assert fault.mend.startswith("write xmin, ymin, xmax and ymax in pixels of the image")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("<difficult>0<", "<difficult>\n 0 <"),
        ("<name>cat<", "<name>\n\t cat\n<"),
        ("<object>", "<objects><object>"),
    ],
)
def test_blanks_and_groups_in_xml_change_nothing(tmp_path: Path, old: str, new: str) -> None:
    """As programs write it that indent, and those that keep the objects in an element of their own."""
    voc(tmp_path)
    meant = read_voc(tmp_path, "test")
    file = tmp_path / "Annotations/b.xml"
    end = ("</object>", "</object></objects>" if "objects" in new else "</object>")
    file.write_text(file.read_text().replace(old, new).replace(*end))
    dataset = AnnotatedSet(tmp_path, tmp_path / "JPEGImages", "test")
    repaired, done = repair(dataset, Use(), tmp_path / "fixed")
    assert done == []
    assert dataset.read() == repaired.read() == meant
    assert voc_classes(tmp_path) == ["cat"]


@pytest.mark.parametrize(
    ("old", "new"), [("<annotation>", '<annotation xmlns="x">'), ("object>", "Object>"), ("name>", "NAME>")]
)
def test_tags_in_capitals_or_a_namespace_are_repaired(tmp_path: Path, old: str, new: str) -> None:
    """Unread they would leave the image without objects."""
    voc(tmp_path)
    meant = read_voc(tmp_path, "test")
    file = tmp_path / "Annotations/b.xml"
    file.write_text(file.read_text().replace(old, new))
    dataset = AnnotatedSet(tmp_path, tmp_path / "JPEGImages", "test")
    assert errors(dataset.check()[0])
    assert repair(dataset, Use(), tmp_path / "fixed")[0].read() == meant


def test_boxes_that_may_count_from_zero_are_told(tmp_path: Path) -> None:
    """A box of the first pixel is a sign that all are read a pixel too far left and up."""
    voc(tmp_path)
    file = tmp_path / "Annotations/b.xml"
    file.write_text(file.read_text().replace("<ymin>1<", "<ymin>0<"))
    (fault,) = AnnotatedSet(tmp_path, tmp_path / "JPEGImages", "test").check()[0]
    assert (fault.severity, fault.image, fault.annotation) == ("warning", "b", "b/0")
    assert "below 1" in fault.what


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("<difficult>0", "<difficult>", "difficult is"),
        ("<difficult>0", "<difficult>Unspecified", "difficult is"),
        ("<difficult>0", "<difficult>1</difficult><difficult>0", "it has several of <difficult>"),
        ("<name>cat", "<name>dog", 'name is "dog"'),
        ("<name>cat</name>", "", "name is"),
        ("<xmin>1</xmin>", "", "bndbox is"),
        ("<xmin>1", "<xmin>nan", "bndbox is"),
        ("<xmin>1", "<xmin>1e308", "bndbox is"),
        ("<xmin>1<", "<xmin>101<", "bndbox is"),
        ("<xmax>100", "<xmax>160", "leaves its image"),
        ("<width>100", "<width>", "size/width is"),
        ("<width>100", "<width>80", "is 100 x 80, and 80 x 80"),
        ("</annotation>", "", "is no XML"),
        ("<size>", "<size>" + "<a>" * 100_000, "is no XML"),
        ("object>", "OBJECT>", "holds <OBJECT>"),
        ("difficult>", "Difficult>", "holds <Difficult>"),
        ("<annotation>", '<annotation xmlns="x">', "holds <{x}size>"),
    ],
)
def test_faults_of_voc_sets(tmp_path: Path, old: str, new: str, words: str) -> None:
    voc(tmp_path)
    file = tmp_path / "Annotations/b.xml"
    file.write_text(file.read_text().replace(old, new))
    faults, _ = AnnotatedSet(tmp_path, tmp_path / "JPEGImages", "test", ("cat",)).check()
    assert any(words in fault.what and fault.image == "b" for fault in faults), faults


@pytest.mark.parametrize(
    ("lines", "words", "status"),
    [
        (b"a\nb\na\n", "twice", 0),
        (b"a -1\nb -1\n", "no image", 1),
        (b"", "no image", 1),
        (b"a\nb.jpg\n", "without the suffix", 0),
        (b"a\n./JPEGImages/b.png\n", "and without JPEGImages", 0),
        ("a\nb\n".encode("utf-16"), "no text in UTF-8", 2),
    ],
)
def test_faults_of_voc_lists(tmp_path: Path, lines: bytes, words: str, status: int, run_tool: Run) -> None:
    voc(tmp_path)
    (tmp_path / "ImageSets/Main/test.txt").write_bytes(lines)
    (fault,) = read_voc(tmp_path, "test")[1]
    assert words in str(fault)
    assert run_tool("check-data", f"{tmp_path}:test", "--fix", tmp_path / "fixed")[0] == status


@pytest.mark.parametrize("line", ["b.jpg", "JPEGImages/b.png", "/data/VOC/JPEGImages/b", "..\\images\\b.jpg"])
def test_a_list_of_files_is_written_as_names(tmp_path: Path, line: str) -> None:
    """No image is lost; an annotation of the name that is listed comes first."""
    voc(tmp_path)
    meant = read_voc(tmp_path, "test")
    (tmp_path / "ImageSets/Main/test.txt").write_text(f"a\n{line}\n")
    repaired, done = repair(AnnotatedSet(tmp_path, tmp_path / "JPEGImages", "test"), Use(), tmp_path / "fixed")
    assert done == ["names of the list written without folder and suffix: 1"]
    assert repaired.read() == meant
    # What is listed so is looked at as the others are: boxes of another layout stay refused.
    file = tmp_path / "Annotations/b.xml"
    file.write_text(file.read_text().replace("<xmax>100<", "<xmax>0<"))
    with pytest.raises(InputError, match="write corners"):
        repair(AnnotatedSet(tmp_path, tmp_path / "JPEGImages", "test"), Use(), tmp_path / "again")


def test_an_annotation_that_names_another_image_is_told(tmp_path: Path) -> None:
    """As one that was copied; what names no image of the set was renamed, and means nothing."""
    voc(tmp_path)
    for name, said in (("a", "C:\\\\old\\\\x.jpg"), ("b", "VOC/JPEGImages/a.png")):
        file = tmp_path / f"Annotations/{name}.xml"
        file.write_text(file.read_text().replace("<annotation>", f"<annotation><filename>{said}</filename>"))
    (fault,) = AnnotatedSet(tmp_path, tmp_path / "JPEGImages", "test").check()[0]
    assert (fault.severity, fault.image) == ("warning", "b")
    assert "its <filename> is of another image, a" in fault.what


def test_turned_objects_of_a_voc_set_are_told(tmp_path: Path) -> None:
    voc(tmp_path)
    file = tmp_path / "Annotations/b.xml"
    for value, words in (("0.0", []), ("x", []), ("30.0", ["1 of its 2 objects have a rotation"])):
        said = f"<attributes><attribute><name>rotation</name><value>{value}</value></attribute></attributes></object>"
        file.write_text((tmp_path / "Annotations/a.xml").read_text().replace("</object>", said))
        faults = AnnotatedSet(tmp_path, tmp_path / "JPEGImages", "test").check()[0]
        assert [fault.what.split(" among")[0] for fault in faults] == words


def test_a_voc_set_of_difficult_objects_alone_measures_nothing(tmp_path: Path) -> None:
    voc(tmp_path)
    for file in (tmp_path / "Annotations").iterdir():
        file.write_text(file.read_text().replace("<difficult>0", "<difficult>1"))
    dataset = AnnotatedSet(tmp_path, tmp_path / "JPEGImages", "test")
    (fault,) = dataset.check()[0]
    assert "all its 2 objects are difficult" in fault.what
    assert dataset.check(Use(evaluation=False))[0] == []


def test_voc_lists_of_one_class_names_with_spaces_folders_and_any_format_of_image(tmp_path: Path) -> None:
    voc(tmp_path)
    whole, _ = read_voc(tmp_path, "test")
    for part in ("Annotations", "JPEGImages"):
        (tmp_path / part / "more").mkdir()
    (tmp_path / "Annotations/b.xml").rename(tmp_path / "Annotations/more/b 1 -1.xml")
    Image.open(tmp_path / "JPEGImages/b.jpg").save(tmp_path / "JPEGImages/more/b 1 -1.png")
    text = "\ufeffa  1\r\nmore\\b 1 -1\r\nc -1\r\n\r\n"  # as Windows writes it
    (tmp_path / "ImageSets/Main/cat_test.txt").write_bytes(text.encode())
    for folder in (tmp_path, tmp_path / "fixed"):
        content, faults = read_voc(folder, "cat_test")
        assert not faults
        assert [row["file_name"] for row in content["images"]] == ["a.jpg", "more/b 1 -1.png"]
        assert [row["bbox"] for row in content["annotations"]] == [row["bbox"] for row in whole["annotations"]]
        assert voc_classes(folder) == ["cat"]
        if folder == tmp_path:
            repair(AnnotatedSet(folder, folder / "JPEGImages", "cat_test"), Use(), folder / "fixed")


@pytest.mark.parametrize(("suffix", "others"), [("JPG", "png xml"), ("jpeg", "bmp"), ("png", "json xml")])
def test_other_files_beside_the_images_of_a_voc_set_are_not_taken_for_them(
    tmp_path: Path, suffix: str, others: str
) -> None:
    """Masks and annotations of other programs; whatever order the file system lists them in."""
    for name in "abcdefgh":
        for other in (suffix, *others.split()):
            (tmp_path / f"{name}.{other}").touch()
    assert voc_images(tmp_path) == {name: f"{name}.{suffix}" for name in "abcdefgh"}


def test_a_list_that_names_files_elsewhere_is_not_repaired(tmp_path: Path) -> None:
    """The copy's annotations would be written over the originals."""
    voc(tmp_path / "VOC")
    voc(tmp_path / "else")
    (tmp_path / "else/Annotations/sub.xml").mkdir()
    assert voc_classes(tmp_path / "else") == ["cat"]
    for name in (tmp_path / "else/Annotations/a", "../Annotations/a"):
        (tmp_path / "VOC/ImageSets/Main/test.txt").write_text(f"{name}\n")
        with pytest.raises(InputError, match="list images by their names"):
            repair(AnnotatedSet.parse(f"{tmp_path / 'VOC'}:test"), Use(), tmp_path / "fixed")


# The command


def test_check_data_lists_counts_and_repairs(tmp_path: Path, images: Path, run_tool: Run) -> None:
    content = sound()
    coco_set(tmp_path, images, content)
    where = f"{tmp_path / 'truth.json'}:{images}"
    status, out, _ = run_tool("check-data", where, "--masks")
    assert status == 0
    assert "3 images, 9 objects, 0 errors, 0 warnings" in out
    alone = {name: rows[:1] for name, rows in sound().items()}
    (tmp_path / "alone.json").write_text(json.dumps(alone))
    out_of_one = run_tool("check-data", f"{tmp_path / 'alone.json'}:{images}")[1]
    assert "1 image, 1 object, 0 errors, 0 warnings" in out_of_one
    assert run_tool("check-data", f"mine={where}", "--masks")[1] == out.replace(where, f"mine={where}")  # as in train
    rows = content["annotations"]
    rows[0] |= {"bbox": [1, 2, 3, 4, 5], "segmentation": None}
    rows[1]["segmentation"] = []
    rows[3]["bbox"] = [4, 5, 90, 20]
    rows[4]["area"] = None
    for number, row in enumerate(rows):
        row |= {"image_id": str(row["image_id"]), "category_id": (float, str)[number % 2](row["category_id"])}
    for row in content["categories"]:
        row["id"] = str(row["id"])
    content["images"][2]["width"] = 61
    rows.append({**rows[6], "id": 99, "image_id": "7"})
    coco_set(tmp_path, images, content)
    status, out, _ = run_tool("check-data", where, "--masks", "--fix", tmp_path / "fixed")
    assert status == 0
    assert "no error is left there" in out
    for words in ("image 1, annotation 10: bbox is [1, 2, 3, 4, 5]", 'category_id is "8": it has to be a whole number'):
        assert words in out
    status, out, _ = run_tool("check-data", f"{tmp_path / 'fixed/truth.json'}:{images}", "--masks")
    assert status == 0
    mended = json.loads((tmp_path / "fixed/truth.json").read_text())
    expected = sound()
    kept = {row["id"]: row for row in expected["annotations"] if row["id"] != 10}
    kept[20] |= {"bbox": [4, 5, 56, 20]}
    assert {row["id"]: row for row in mended["annotations"]} == kept
    assert mended["images"] == expected["images"]
    changes = (tmp_path / "fixed/changes.txt").read_text()
    assert "masks filled in from boxes: 1\n    11\n" in changes
    assert (
        "annotations left out in all: 2\n    10: bbox is [1, 2, 3, 4, 5]\n    99: image_id 7 does not exist" in changes
    )
    assert run_tool("check-data", where, "--fix", tmp_path / "fixed")[0] == 2


def test_check_data_lists_the_images_that_sets_share(tmp_path: Path, images: Path, run_tool: Run) -> None:
    shutil.copytree(images, tmp_path / "copies")
    (tmp_path / "copies/2.png").rename(tmp_path / "copies/photo.png")
    Image.new("RGB", (60, 40), (0, 9, 0)).save(tmp_path / "copies/3.png")
    coco_set(tmp_path, images, sound())
    other = sound()
    other["images"][1]["file_name"] = "photo.png"
    (tmp_path / "other.json").write_text(json.dumps(other))
    one, two = f"{tmp_path / 'truth.json'}:{images}", f"{tmp_path / 'other.json'}:{tmp_path / 'copies'}"
    status, out, _ = run_tool("check-data", one, two)
    mend = "leave it out of one, if you train on one and test on the other"
    told = [
        f"warning: {tmp_path / 'copies' / copy}, image {image}: is also an image of {one}, there as "
        f"{images / original}: {mend}"
        for copy, image, original in (("1.png", 1, "1.png"), ("photo.png", 2, "2.png"))
    ]
    counts = "3 images, 9 objects, 0 errors"
    assert (status, out.splitlines()) == (0, [f"{one}: {counts}, 0 warnings", *told, f"{two}: {counts}, 2 warnings"])
    # They come before the warnings of single objects, of which there may be many.
    other["annotations"][0]["bbox"] = [50, 30, 20, 20]
    (tmp_path / "other.json").write_text(json.dumps(other))
    lines = run_tool("check-data", one, two, "--most", 2)[1].splitlines()
    assert lines[1:4] == [*told, "... and 1 more: give --most 3 to see them"]
    # Of one set and a part of it, or of two sets of annotations of the same images, nobody reads a line an image.
    other["images"] = sound()["images"][:2]
    other["annotations"] = sound()["annotations"][:6]
    (tmp_path / "part.json").write_text(json.dumps(other))
    part = f"{tmp_path / 'part.json'}:{images}"
    for sets, count in (((one, one), 3), ((one, part), 2), ((part, one), 2)):
        (warning, total) = run_tool("check-data", *sets)[1].splitlines()[1:]
        assert f"{count} of its images, all of one set, are also images of {sets[0]}: do not train on one" in warning
        assert total.endswith(" 1 warning")


def test_fix_says_which_warnings_are_left(tmp_path: Path, images: Path, run_tool: Run) -> None:
    """Two spellings of a class are two classes in training: what repairs nothing of them has to say so last."""
    content = sound()
    content["categories"][1]["name"] = "Cat"
    coco_set(tmp_path, images, content)
    where = f"{tmp_path / 'truth.json'}:{images}"
    status, out, _ = run_tool("check-data", where, "--fix", tmp_path / "fixed")
    assert status == 0
    assert "no error is left there" in out
    last = out.splitlines()[-1]
    assert "1 warning, the first: " in last
    assert '"Cat" is "cat" but for case' in last


@pytest.mark.parametrize("spoil", [lambda row: row.pop("id"), lambda row: row.update(id=row["id"] % 10)])
def test_annotations_are_numbered_anew(tmp_path: Path, images: Path, spoil: Callable[[Any], Any]) -> None:
    """Files of images put together count from 0 in each: no object is lost."""
    content = sound()
    for row in content["annotations"]:
        spoil(row)
    content["annotations"][1]["area"] = 0
    repaired, done = repair(coco_set(tmp_path, images, content), Use(masks=True), tmp_path / "fixed")
    meant = [{**row, "id": number} for number, row in enumerate(sound()["annotations"], 1)]
    assert json.loads((tmp_path / "fixed/truth.json").read_text())["annotations"] == meant
    assert done == ["annotations numbered anew: 9", "areas filled in from masks: 1"]
    changes = (tmp_path / "fixed/changes.txt").read_text()
    label = json.dumps(content["annotations"][1].get("id"))  # the file's own
    assert changes.endswith(f"areas filled in from masks: 1\n    {label} (2 now)\n")
    assert repaired.check(Use(masks=True))[0] == []


def test_classes_by_true_and_false_are_1_and_0(tmp_path: Path, images: Path) -> None:
    content, meant = sound(), sound()
    for one, (no, yes) in ((content, (False, True)), (meant, (0, 1))):
        for row in one["annotations"]:
            row["category_id"] = yes if row["category_id"] == 8 else no
        for row, number in zip(one["categories"], (0, 1), strict=True):
            row["id"] = number
    repaired, done = repair(coco_set(tmp_path, images, content), Use(), tmp_path / "fixed")
    assert done == ["ids made whole numbers: 9"]
    assert json.dumps(repaired.read()[0]) == json.dumps(meant)


@pytest.mark.parametrize(("name", "words"), [("images", '"1.png" and "2.png"'), ("categories", '"cat" and "dog"')])
def test_what_shares_an_id_is_not_repaired(tmp_path: Path, images: Path, name: str, words: str) -> None:
    """The objects of one would become those of the other."""
    content = sound()
    for row in (content[name][1], *content["annotations"]):
        row |= {"id": content[name][0]["id"]} if row is content[name][1] else {"image_id": 1, "category_id": 3}
    with pytest.raises(InputError, match=words):
        repair(coco_set(tmp_path, images, content), Use(), tmp_path / "fixed")
    content = sound()
    content[name].append(content[name][0])  # the same twice is one
    repaired, _ = repair(coco_set(tmp_path, images, content), Use(), tmp_path / "fixed")
    assert repaired.check()[0] == []


def test_boxes_of_another_layout_are_not_repaired(tmp_path: Path, images: Path) -> None:
    """Clipped, or with their corners put in order, they would pass for sound."""
    corners = change_all("bbox", lambda b: [b[0], b[1], b[0] + 38, b[1] + 35])
    for others in ({}, {"area": None}, {"iscrowd": None}):
        corners["annotations"] = [{**row, **others} for row in corners["annotations"]]
        with pytest.raises(InputError, match="write bbox as"):
            repair(coco_set(tmp_path, images, corners), Use(), tmp_path / "fixed")
    voc(tmp_path / "VOC")
    dataset = AnnotatedSet.parse(f"{tmp_path / 'VOC'}:test")
    whole = {file: file.read_text() for file in (tmp_path / "VOC/Annotations").iterdir()}
    sides = "<xmin>1</xmin><ymin>1</ymin><xmax>100</xmax><ymax>80</ymax>"
    for box, words in (((50, 40, 20, 60), "as of \\(x, y, width, height"), ((0.1, 0.2, 0.5, 0.9), "fractions")):
        new = "".join(
            f"<{side}>{value}</{side}>" for side, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
        )
        for file, text in whole.items():
            file.write_text(text.replace(sides, new))
        with pytest.raises(InputError, match=words):
            repair(dataset, Use(), tmp_path / "fixed")
    assert not (tmp_path / "fixed").exists()


def test_a_set_without_any_image_is_not_repaired(tmp_path: Path, images: Path) -> None:
    """Its folder is wrong, not the set."""
    voc(tmp_path / "VOC")
    shutil.rmtree(tmp_path / "VOC/JPEGImages")
    dataset = coco_set(tmp_path, images, sound())
    for one in (replace(dataset, images=tmp_path), AnnotatedSet.parse(f"{tmp_path / 'VOC'}:test")):
        with pytest.raises(InputError, match=f"no image of .* is in {one.images}, or can be read: check the path"):
            repair(one, Use(), tmp_path / "fixed")


@pytest.mark.parametrize("factor", [0.5, 2])
def test_boxes_of_resized_images_are_not_repaired(tmp_path: Path, images: Path, factor: float) -> None:
    """With the size alone corrected they would pass for sound, and lie elsewhere."""
    content = sound()
    content["images"][1] |= {"width": 60 * factor, "height": 40 * factor}
    content["images"] = json.loads(json.dumps(content["images"]).replace(".0", ""))
    repaired, done = repair(coco_set(tmp_path, images, content), Use(), tmp_path / "fixed")
    assert not any("sizes" in line for line in done)
    assert any("is 60 x 40, and" in fault.what for fault in repaired.check()[0])


def test_classes_are_renamed_and_made_one(tmp_path: Path, images: Path, run_tool: Run) -> None:
    """Box AP of the repaired file is that of the file that was meant."""
    meant, content = sound(), sound()
    content["categories"] = [
        {"id": 3, "name": " Cat"}, {"id": 4, "name": "kitten"}, {"id": 5, "name": "c-a t"}, {"id": 8, "name": "dog"}
    ]  # fmt: skip
    for row, number in zip(content["annotations"], (3, 8, 4, 5, 8, 3, 4, 8, 5), strict=True):
        row["category_id"] = number
    coco_set(tmp_path, images, content)
    where = f"{tmp_path / 'truth.json'}:{images}"
    options = ("--fix", tmp_path / "fixed", "--classes", "cat,dog", "--rename", "kitten=cat")
    status, out, _ = run_tool("check-data", where, *options)
    assert status == 0
    assert "classes renamed: 3; classes of one name made one: 2" in out
    mended = json.loads((tmp_path / "fixed/truth.json").read_text())
    assert mended["categories"] == meant["categories"]
    assert mended["annotations"] == meant["annotations"]
    for wrong in (
        ("--rename", "a=b"),
        ("--fix", tmp_path / "x", "--rename", "a"),
        ("--fix", "x", "--classes", "a b,A-B"),
    ):
        assert run_tool("check-data", where, *wrong)[0] == 2


def test_a_voc_set_is_repaired(tmp_path: Path, run_tool: Run) -> None:
    """What is left has the objects that were meant; the original is not touched."""
    voc(tmp_path / "VOC")
    annotation = tmp_path / "VOC/Annotations/b.xml"
    whole = annotation.read_text()
    start, rest = whole.split("<object>")
    thing, end = rest.split("</object>")
    spoilt = (
        thing.replace("cat", "Big Cat"),
        thing.replace(">0<", "><").replace("<xmin>1<", "<xmin>100<").replace("<xmax>100<", "<xmax>11<"),
        thing.replace("<xmax>100<", "<xmax>160<").replace("<ymax>80<", "<ymax>40.5<"),
        thing.replace("<xmin>1<", "<xmin>nan<"),
        thing.replace("<xmin>1<", "<xmin>131<").replace("<xmax>100<", "<xmax>160<"),
        thing.replace("<name>cat</name>", ""),
        thing.replace("<name>cat", "<name>cat</name><name>dog"),
        thing.replace("<xmin>1<", "<xmin>131<"),  # not in another order, but wrong
        *(thing.replace("<xmax>100<", f"<xmax>{side}<") for side in (50, 60)),
    )
    start = start.replace("<width>100", "<width>80")
    annotation.write_text(start + "".join(f"<object>{text}</object>" for text in spoilt) + end)
    (tmp_path / "VOC/Annotations/c.xml").write_text("<annotation>")
    Image.new("RGB", (5, 5)).save(tmp_path / "VOC/JPEGImages/c.jpg")
    (tmp_path / "VOC/ImageSets/Main/test.txt").write_text("a 1\nb  -1\nb 1\nc 1\nb 1\na 1\ngone 1\n")
    before = annotation.read_text()
    options = ("--fix", tmp_path / "fixed", "--classes", "big_cat", "--rename", "cat=big_cat")
    status, out, _ = run_tool("check-data", f"{tmp_path / 'VOC'}:test", *options)
    assert status == 0, out
    assert "no error is left there" in out
    assert annotation.read_text() == before
    faults, content = AnnotatedSet.parse(f"{tmp_path / 'fixed'}:test").check()
    assert faults == []
    assert [row["id"] for row in content["images"]] == ["a", "b"]
    assert [row["name"] for row in content["categories"]] == ["big_cat"]
    assert [(row["image_id"], row["bbox"]) for row in content["annotations"]] == [
        ("a", [0, 0, 100, 80]), ("b", [0, 0, 100, 80]), ("b", [10, 0, 90, 80]), ("b", [0, 0, 100, 40.5]),
        ("b", [0, 0, 50, 80]), ("b", [0, 0, 60, 80])
    ]  # fmt: skip
    changes = (tmp_path / "fixed/changes.txt").read_text()
    for words in (
        "sizes of images corrected: 1",
        "objects left out: 5",
        "lines of the list that were there twice left out: 2",
        "boxes clipped to their images: 1",
    ):
        assert words in changes


@pytest.mark.parametrize(
    "text", ["nowhere.json:images", "folder:split", "nothing", ":", "x:", "images:a.json", "data.yaml:images"]
)
def test_sets_that_are_not_there(text: str, run_tool: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.yaml").touch()
    (tmp_path / "images").mkdir()
    status, _, err = run_tool("check-data", text)
    assert status == 2
    assert err.startswith("error: ")
    assert "Traceback" not in err
