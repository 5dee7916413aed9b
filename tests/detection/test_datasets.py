"""What is wrong with a data set is said before hours are spent on it: which file, and how the folder has to look."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.pascal_voc import register_pascal_voc

from robust_backbones.detection.datasets import check_datasets, register_datasets
from robust_backbones.errors import InputError

Change = Callable[[dict[str, Any]], None]


@pytest.fixture
def cfg(small_cfg: CfgNode, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CfgNode:
    """The shapes, in a folder that may be spoiled."""
    shutil.copytree(shapes / "shapes", tmp_path / "shapes")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    register_datasets(small_cfg)
    return small_cfg


def change(root: Path, edit: Change, part: str = "train") -> None:
    path = root / f"shapes/annotations/instances_{part}.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def refusal(cfg: CfgNode) -> str:
    with pytest.raises(InputError) as error:
        check_datasets(cfg)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_sound_set_is_passed_in_silence(cfg: CfgNode) -> None:
    assert check_datasets(cfg) == []


def test_missing_images_are_counted_and_the_first_is_named(cfg: CfgNode, tmp_path: Path) -> None:
    for number in (3, 5):
        (tmp_path / f"shapes/train/{number:06}.jpg").unlink()
    told = refusal(cfg)
    assert "shapes_train lacks 2 of its 12 images" in told
    assert str(tmp_path / "shapes/train/000003.jpg") in told
    assert "shapes/annotations/instances_train.json and shapes/train" in told
    shutil.rmtree(tmp_path / "shapes/train")
    assert "lacks 12 of its 12 images" in refusal(cfg)
    cfg.DATASETS.TRAIN = ()
    assert check_datasets(cfg) == []


def test_a_missing_or_damaged_annotation_file_is_named(cfg: CfgNode, tmp_path: Path) -> None:
    path = tmp_path / "shapes/annotations/instances_val.json"
    for spoil in (
        lambda: path.write_text('{"images": ['),
        lambda: path.write_text("{}"),
        lambda: path.write_text("[1, 2]"),
        lambda: change(tmp_path, lambda content: content["annotations"][0].pop("bbox"), "val"),
        lambda: change(tmp_path, lambda content: content["annotations"][-1].pop("area"), "val"),
        lambda: change(tmp_path, lambda content: content["images"][0].pop("file_name"), "val"),
    ):
        whole = path.read_text()
        spoil()
        assert "the annotations of shapes_val are damaged" in refusal(cfg)
        path.write_text(whole)
    path.unlink()
    assert f"shapes_val lacks {path}" in refusal(cfg)


def test_boxes_without_area_or_outside_are_counted(cfg: CfgNode, tmp_path: Path) -> None:
    def spoil(content: dict[str, Any]) -> None:
        rows = content["annotations"]
        rows[0]["bbox"][2] = 0
        rows[1]["bbox"][3] = 0
        rows[2]["bbox"] = [90, 10, 30, 20]  # images are 96 pixels wide
        rows[3]["bbox"] = [-0.5, 10, 30, 20]  # the rounding of annotations

    change(tmp_path, spoil)
    (told,) = check_datasets(cfg)
    count = len(json.loads((tmp_path / "shapes/annotations/instances_train.json").read_text())["annotations"])
    assert f"shapes_train: 2 of {count} boxes have no area and 1 leave their image" in told


@pytest.mark.parametrize(
    ("box", "words"),
    [([float("nan"), 1, 5, 5], "no numbers"), ([200, 10, 5, 5], "none of the"), ([5, 5, 0, 9], "none of the")],
)
def test_boxes_that_teach_nothing_are_refused(cfg: CfgNode, tmp_path: Path, box: list[float], words: str) -> None:
    change(tmp_path, lambda content: [row.update(bbox=box) for row in content["annotations"]])
    assert words in refusal(cfg)


def test_a_set_without_objects_is_refused(cfg: CfgNode, tmp_path: Path) -> None:
    change(tmp_path, lambda content: content.update(annotations=[]))
    assert "holds no annotated object" in refusal(cfg)


@pytest.fixture
def voc(cfg: CfgNode, tmp_path: Path) -> Iterator[Path]:
    """A folder of VOC's layout with one object in each of three images."""
    root = tmp_path / "VOC2007"
    for part in ("ImageSets/Main", "Annotations", "JPEGImages"):
        (root / part).mkdir(parents=True)
    names = ["000001", "000002", "000003"]
    (root / "ImageSets/Main/trainval.txt").write_text("\n".join(names))
    for name in names:
        (root / f"JPEGImages/{name}.jpg").touch()
        (root / f"Annotations/{name}.xml").write_text(
            "<annotation><size><width>100</width><height>80</height></size><object><name>cat</name><bndbox>"
            "<xmin>1</xmin><ymin>1</ymin><xmax>100</xmax><ymax>80</ymax></bndbox></object></annotation>"
        )
    register_pascal_voc("voc_of_cats", str(root), "trainval", 2007, class_names=["cat"])
    cfg.merge_from_list(["DATASETS.TRAIN", ("voc_of_cats",), "DATASETS.TEST", ("voc_of_cats",)])
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 1
    yield root
    DatasetCatalog.remove("voc_of_cats")
    MetadataCatalog.remove("voc_of_cats")


def test_voc_folders_are_checked_alike(voc: Path, cfg: CfgNode) -> None:
    cfg.MODEL.MASK_ON = False
    assert check_datasets(cfg) == []
    annotation = voc / "Annotations/000002.xml"
    whole = annotation.read_text()
    for text in (whole[:-20], whole.replace("cat", "dog"), whole.replace("<xmin>1</xmin>", "")):
        annotation.write_text(text)
        assert "the annotations of voc_of_cats are damaged" in refusal(cfg)
    annotation.unlink()
    told = refusal(cfg)
    assert str(annotation) in told
    assert "VOC2007/ImageSets/Main/trainval.txt, VOC2007/Annotations/*.xml and VOC2007/JPEGImages/*.jpg" in told
    annotation.write_text(whole)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 20
    assert "give MODEL.ROI_HEADS.NUM_CLASSES 1" in refusal(cfg)
