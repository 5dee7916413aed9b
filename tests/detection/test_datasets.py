"""What is wrong with a data set is said before hours are spent on it: which file, and how the folder has to look."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json, register_coco_instances
from detectron2.data.datasets.pascal_voc import register_pascal_voc
from detectron2.structures import Boxes, Instances
from PIL import Image
from pycocotools import mask as mask_tools
from pycocotools.coco import COCO

from robust_backbones.configs import CONFIG_DIR
from robust_backbones.data.annotations_voc import voc_classes
from robust_backbones.detection.config import load_config
from robust_backbones.detection.data_stream import MaskMapper
from robust_backbones.detection.datasets import (
    categories,
    check_datasets,
    class_names,
    counted,
    derive_classes,
    match_classes,
    number_of_classes,
    register_datasets,
)
from robust_backbones.detection.evaluators import CocoEvaluator, coco_metrics, ground_truth
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


@pytest.mark.parametrize(("key", "told"), [("MODEL.KEYPOINT_ON", "AP of keypoints"), ("TEST.AUG.ENABLED", "TEST.AUG")])
def test_what_an_evaluation_would_leave_out_is_said_before(cfg: CfgNode, key: str, told: str) -> None:
    cfg.merge_from_list([key, True])
    for eval_only in (False, True):
        assert [told in str(warning) for warning in check_datasets(cfg, eval_only=eval_only)] == [True]


def test_missing_images_are_counted_and_the_first_is_named(cfg: CfgNode, tmp_path: Path) -> None:
    for number in (3, 5):
        (tmp_path / f"shapes/train/{number:06}.jpg").unlink()
    told = refusal(cfg)
    assert "shapes_train lacks 2 of its 12 images" in told
    assert str(tmp_path / "shapes/train/000003.jpg") in told
    assert "shapes/annotations/instances_train.json and shapes/train" in told
    assert "more error" not in told
    change(tmp_path, lambda content: content["annotations"][0].pop("bbox"))
    told = refusal(cfg)  # those that a missing image would hide
    assert "lacks 2 of its 12 images" in told
    assert told.endswith("(1 more error: `robust-backbones check-data --masks` lists them)")
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
        assert "shapes_val are damaged" in refusal(cfg)
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
    warnings = check_datasets(cfg)
    kinds = {"boxes without area": 2, "boxes that leave their image": 1, "masks that do not fit their boxes": 2}
    assert counted(warnings) == {"shapes_train": kinds}
    number = json.loads((tmp_path / "shapes/annotations/instances_train.json").read_text())["annotations"][0]["id"]
    assert "shapes_train: 2 boxes without area, the first: " in str(warnings[0])
    assert f"annotation {number}" in str(warnings[0])


@pytest.mark.parametrize(
    ("box", "words"),
    [
        ([float("nan"), 1, 5, 5], "finite"),
        ([200, 10, 5, 5], "outside its image"),
        ([5, 5, 0, 9], "no box has any area"),
    ],
)
def test_boxes_that_teach_nothing_are_refused(cfg: CfgNode, tmp_path: Path, box: list[float], words: str) -> None:
    change(tmp_path, lambda content: [row.update(bbox=box) for row in content["annotations"]])
    assert words in refusal(cfg)


def test_a_set_without_objects_is_refused(cfg: CfgNode, tmp_path: Path) -> None:
    change(tmp_path, lambda content: content.update(annotations=[]))
    assert "holds no annotated object" in refusal(cfg)
    change(tmp_path, lambda content: content.update(images=[]))
    assert "holds no annotated object" in refusal(cfg)


def test_test_images_that_are_trained_on_are_counted(cfg: CfgNode, tmp_path: Path) -> None:
    name, file, folder = cfg.DATASETS.COCO_FORMAT[0]
    content = json.loads((tmp_path / file).read_text())
    kept = content["images"][:3]
    rows = [row for row in content["annotations"] if row["image_id"] in {row["id"] for row in kept}]
    (tmp_path / "part.json").write_text(json.dumps({**content, "images": kept, "annotations": rows}))
    cfg.DATASETS.COCO_FORMAT = (*cfg.DATASETS.COCO_FORMAT, ("part", "part.json", folder))
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (name,), (name, "part")
    register_datasets(cfg)
    (warning,) = check_datasets(cfg)
    assert counted([warning]) == {"part": {"images of a training set": 3}}
    first = tmp_path / folder / kept[0]["file_name"]
    told = f"part: 3 images of a training set, the first: {first}; AP on them does not tell of others"
    assert str(warning) == told
    assert check_datasets(cfg, eval_only=True) == []


def test_copies_of_training_images_under_other_names_are_counted(cfg: CfgNode, tmp_path: Path) -> None:
    """And links; other images of the same size in bytes are none."""
    train, val = tmp_path / "shapes/train", tmp_path / "shapes/val"
    images = sorted(path.name for path in val.iterdir())
    for name, make in zip(images, (shutil.copy, os.link, os.symlink), strict=False):
        (val / name).unlink()
        make(train / "000007.jpg", val / name)
    (val / images[3]).write_bytes((train / "000008.jpg").read_bytes()[:-3] + b"X\xff\xd9")  # but its end
    (warning,) = check_datasets(cfg)
    assert counted([warning]) == {"shapes_val": {"images of a training set": 3}}
    assert f"the first: {val / images[0]}, the same image as {train / '000007.jpg'}; AP on them" in str(warning)
    assert check_datasets(cfg, eval_only=True) == []


def test_held_out_images_are_training_images_only_by_their_copies(cfg: CfgNode, tmp_path: Path) -> None:
    cfg.DATASETS.HELD_OUT, cfg.DATASETS.TEST = 3, ("shapes_train_held_out",)
    register_datasets(cfg)
    assert check_datasets(cfg) == []
    held, trained = (Path(DatasetCatalog.get(name)[0]["file_name"]) for name in (*cfg.DATASETS.TEST, "shapes_train"))
    shutil.copy(trained, held)
    (warning,) = check_datasets(cfg)
    assert f"1 images of a training set, the first: {held}, the same image as {trained};" in str(warning)


def test_a_copy_in_vocs_format_is_found_in_another_folder(cfg: CfgNode, real_data: Path, tmp_path: Path) -> None:
    source = real_data / "detectron2/VOC2007"
    names = (source / "ImageSets/Main/trainval.txt").read_text().split()[:4]
    for folder, part in (("one", names[:3]), ("two", names[2:])):
        root = tmp_path / folder
        (root / "ImageSets/Main").mkdir(parents=True)
        (root / "ImageSets/Main/all.txt").write_text("\n".join(f"{folder}{name}" for name in part))
        for place, suffix in (("JPEGImages", "jpg"), ("Annotations", "xml")):
            (root / place).mkdir()
            for name in part:
                shutil.copy(source / place / f"{name}.{suffix}", root / place / f"{folder}{name}.{suffix}")
    classes = tuple(voc_classes(source))
    cfg.DATASETS.VOC_FORMAT = tuple((name, str(tmp_path / name), "all", classes) for name in ("one", "two"))
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST, cfg.MODEL.ROI_HEADS.NUM_CLASSES = ("one",), ("two",), len(classes)
    cfg.MODEL.MASK_ON = False
    register_datasets(cfg)
    (warning,) = [warning for warning in check_datasets(cfg) if warning.kind == "images of a training set"]
    copy, original = (tmp_path / name / f"JPEGImages/{name}{names[2]}.jpg" for name in ("two", "one"))
    assert (warning.count, warning.first.split("; ")[0]) == (1, f"{copy}, the same image as {original}")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda items: None, ""),
        (lambda items: items[0]["annotations"][0].pop("segmentation"), "it has no usable mask"),
        (lambda items: items[0]["annotations"][0].update(segmentation=[[1, 2, 3, 4]]), "it has no usable mask"),
        (lambda items: items[0]["annotations"][0].update(bbox=[200, 5, 9, 9]), "lies outside its image"),
        (lambda items: items[1].update(image_id=items[0]["image_id"]), "is that of another row of images"),
        (
            lambda items: [a.update(bbox=[v / 96 for v in a["bbox"]]) for i in items for a in i["annotations"]],
            "fraction",
        ),
        (lambda items: [a.update(bbox_mode=0) for i in items for a in i["annotations"]], "sides of at least 0"),
    ],
)
def test_sets_in_detectron2s_format_are_checked_as_files_are(
    cfg: CfgNode, spoil: Callable[[list[dict[str, Any]]], Any], words: str
) -> None:
    items, name = DatasetCatalog.get("shapes_train"), "by_hand"
    first = next(item["annotations"] for item in items if len(item["annotations"]) > 1)
    size = items[0]["height"], items[0]["width"]
    first[1]["segmentation"] = mask_tools.merge(mask_tools.frPyObjects(first[1]["segmentation"], *size))
    first[1]["category_id"], items[0]["width"] = np.int64(first[1]["category_id"]), np.int64(size[1])
    items.sort(key=lambda item: not item["annotations"])
    spoil(items)
    DatasetCatalog.register(name, lambda: items)
    MetadataCatalog.get(name).thing_classes = MetadataCatalog.get("shapes_train").thing_classes
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (name,)
    try:
        if words:
            assert words in refusal(cfg)
        else:
            assert check_datasets(cfg) == []
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.fixture
def voc(cfg: CfgNode, tmp_path: Path) -> Iterator[Path]:
    """A folder of VOC's layout with one object in each of three images."""
    root = tmp_path / "VOC2007"
    for part in ("ImageSets/Main", "Annotations", "JPEGImages"):
        (root / part).mkdir(parents=True)
    names = ["000001", "000002", "000003"]
    (root / "ImageSets/Main/trainval.txt").write_text("\n".join(names))
    for name in names:
        Image.new("RGB", (100, 80)).save(root / f"JPEGImages/{name}.jpg")
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
        told = refusal(cfg)
        assert "images of voc_of_cats are damaged" in told
        assert f"{annotation}, image 000002" in told
    annotation.unlink()
    told = refusal(cfg)
    assert str(annotation) in told
    assert "VOC2007/ImageSets/Main/trainval.txt, VOC2007/Annotations/*.xml and VOC2007/JPEGImages/*.jpg" in told
    annotation.write_text(whole)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 20
    assert "give MODEL.ROI_HEADS.NUM_CLASSES 1" in refusal(cfg)


def test_lists_of_two_columns_are_read_for_sets_of_detectron2s_loader(voc: Path, cfg: CfgNode) -> None:
    whole = DatasetCatalog.get("voc_of_cats")
    assert [item["image_id"] for item in whole] == ["000001", "000002", "000003"]
    (voc / "ImageSets/Main/trainval.txt").write_text("000001  1\n000002 -1\n000003  0\n")
    register_datasets(cfg)
    assert DatasetCatalog.get("voc_of_cats") == [whole[0], whole[2]]


def test_a_byte_order_mark_changes_nothing(cfg: CfgNode, tmp_path: Path) -> None:
    """As Windows' editors write one; pycocotools reads no file that has it."""
    truth = ground_truth("shapes_val").dataset
    file = tmp_path / "shapes/annotations/instances_val.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert check_datasets(cfg) == []
    assert ground_truth("shapes_val").dataset == truth


def test_two_sets_of_one_name_are_refused(cfg: CfgNode) -> None:
    """Else the later would be read for both."""
    name, file, folder = cfg.DATASETS.COCO_FORMAT[0]
    cfg.DATASETS.COCO_FORMAT = ((name, file, folder), (name, file, folder))
    register_datasets(cfg)
    cfg.DATASETS.COCO_FORMAT = ((name, file, folder), (name, cfg.DATASETS.COCO_FORMAT[0][1], "elsewhere"))
    with pytest.raises(InputError, match=f"two different data sets are called '{name}'"):
        register_datasets(cfg)


# Classes are matched by name


def rotated(content: dict[str, Any]) -> None:
    """The same classes under other ids, in another order; every object stays of its class."""
    ids = {row["id"]: 90 - 7 * row["id"] for row in content["categories"]}
    for row in content["categories"]:
        row["id"] = ids[row["id"]]
    for row in content["annotations"]:
        row["category_id"] = ids[row["category_id"]]


def named_objects(name: str) -> list[list[tuple[str, Any]]]:
    items = DatasetCatalog.get(name)  # which tells the classes
    classes = MetadataCatalog.get(name).thing_classes
    return [[(classes[row["category_id"]], row["bbox"]) for row in item["annotations"]] for item in items]


def test_ids_and_order_of_classes_do_not_matter(cfg: CfgNode, tmp_path: Path) -> None:
    before, classes = named_objects("shapes_val"), MetadataCatalog.get("shapes_val").thing_classes
    named_objects("shapes_train")
    change(tmp_path, rotated, "val")
    register_datasets(cfg)
    assert check_datasets(cfg) == []
    match_classes(["shapes_train", "shapes_val"], classes)
    assert MetadataCatalog.get("shapes_val").thing_classes == classes
    assert named_objects("shapes_val") == before
    content = json.loads((tmp_path / "shapes/annotations/instances_val.json").read_text())
    assert {row["id"]: row["name"] for row in categories("shapes_val")} == {
        row["id"]: row["name"] for row in content["categories"]
    }


def test_a_set_that_is_a_part_of_another_is_matched_too(cfg: CfgNode, tmp_path: Path) -> None:
    named_objects("shapes_train")
    classes = MetadataCatalog.get("shapes_train").thing_classes
    change(tmp_path, rotated, "val")
    cfg.merge_from_list(["DATASETS.TRAIN", ("shapes_train", "shapes_val"), "DATASETS.HELD_OUT", 2])
    cfg.merge_from_list(["DATASETS.TEST", ("shapes_val_held_out",)])
    register_datasets(cfg)
    names = ["shapes_val", "shapes_val_held_out"]
    before = {name: named_objects(name) for name in names}
    match_classes(["shapes_train", *names], classes)
    assert {name: named_objects(name) for name in names} == before


def test_what_cannot_be_matched_is_refused_with_both_lists(cfg: CfgNode, tmp_path: Path) -> None:
    change(tmp_path, lambda content: content["categories"][1].update(name="unicorn"), "val")
    told = refusal(cfg)
    names = [
        row["name"]
        for row in json.loads((tmp_path / "shapes/annotations/instances_train.json").read_text())["categories"]
    ]
    assert "'unicorn'" in told
    assert all(repr(name) in told for name in names)


def without(name: str) -> Change:
    def edit(content: dict[str, Any]) -> None:
        (gone,) = (row["id"] for row in content["categories"] if row["name"] == name)
        content["categories"] = [row for row in content["categories"] if row["id"] != gone]
        content["annotations"] = [row for row in content["annotations"] if row["category_id"] != gone]

    return edit


@pytest.mark.parametrize("place", range(4))
def test_a_class_that_the_test_set_lacks_has_no_ground_truth(cfg: CfgNode, tmp_path: Path, place: int) -> None:
    """AP over the other classes, equal to pycocotools on a file that lists the class without an object."""
    named_objects("shapes_train")
    classes = MetadataCatalog.get("shapes_train").thing_classes
    change(tmp_path, rotated, "val")
    change(tmp_path, without(classes[place]), "val")
    register_datasets(cfg)
    assert check_datasets(cfg) == []
    match_classes(["shapes_train", "shapes_val"], classes)
    assert [row["name"] for row in categories("shapes_val")] == classes
    evaluator = CocoEvaluator("shapes_val", ["bbox"])
    truth = json.loads((tmp_path / "shapes/annotations/instances_val.json").read_text())
    truth["categories"].append({"id": 999, "name": classes[place]})
    ids = {row["name"]: row["id"] for row in truth["categories"]}
    results, rng = [], np.random.default_rng(0)
    for image in truth["images"]:
        rows = [row for row in truth["annotations"] if row["image_id"] == image["id"]]
        boxes = np.array([row["bbox"] for row in rows]).reshape(-1, 4) + rng.normal(0, 2, (len(rows), 4))
        numbers = rng.integers(0, 4, len(rows))
        found = Instances((image["height"], image["width"]))
        found.pred_boxes = Boxes(torch.tensor(np.hstack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]])).float())
        found.scores, found.pred_classes = torch.tensor(rng.random(len(rows))), torch.tensor(numbers)
        evaluator.process([{"image_id": image["id"]}], [{"instances": found}])
        results += [
            {"image_id": image["id"], "category_id": ids[classes[number]], "bbox": box.tolist(), "score": float(score)}
            for number, box, score in zip(numbers, boxes, found.scores, strict=True)
        ]
    meant = COCO()
    meant.dataset = truth
    meant.createIndex()
    metrics = evaluator.evaluate()["bbox"]
    expected = coco_metrics(meant, results, "bbox", reference=True)
    assert 0 < expected["AP50"] < 100
    assert metrics == pytest.approx(expected, abs=1e-4, nan_ok=True)  # boxes are float32
    assert np.isnan(metrics[f"AP-{classes[place]}"])


def test_a_class_that_training_lacks_is_refused_with_both_lists(cfg: CfgNode, tmp_path: Path) -> None:
    whole = (tmp_path / "shapes/annotations/instances_train.json").read_text()
    name = json.loads(whole)["categories"][1]["name"]
    change(tmp_path, without(name))
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3
    told = refusal(cfg)
    assert f"shapes_val has the classes {', '.join(map(repr, class_names('shapes_val')))}, but" in told
    assert f"{name!r} cannot be matched" in told
    (tmp_path / "shapes/annotations/instances_more.json").write_text(whole)
    row = ("shapes_more", "shapes/annotations/instances_more.json", "shapes/train")
    cfg.DATASETS.COCO_FORMAT = (*cfg.DATASETS.COCO_FORMAT, row)
    cfg.DATASETS.TRAIN = ("shapes_more", "shapes_train")
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 4
    register_datasets(cfg)
    assert f"objects of {name!r} would be background" in refusal(cfg)


def test_two_classes_of_one_name_are_refused_by_name(cfg: CfgNode, tmp_path: Path) -> None:
    change(tmp_path, lambda content: content["categories"][1].update(name=content["categories"][0]["name"]), "val")
    register_datasets(cfg)
    name = class_names("shapes_train")[0]
    for eval_only in (True, False):
        with pytest.raises(InputError, match=f'instances_val.json.*name "{name}" is that of another row'):
            check_datasets(cfg, eval_only=eval_only)


@pytest.mark.parametrize("architecture", ["GeneralizedRCNN", "RetinaNet"])
def test_the_number_of_classes_is_that_of_the_data(cfg: CfgNode, architecture: str) -> None:
    overrides = ["MODEL.META_ARCHITECTURE", architecture, "DATASETS.COCO_FORMAT", cfg.DATASETS.COCO_FORMAT]
    overrides += ["DATASETS.TRAIN", cfg.DATASETS.TRAIN, "DATASETS.TEST", cfg.DATASETS.TEST, "MODEL.MASK_ON", False]
    base = CONFIG_DIR / "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
    derived = load_config(base, overrides, classes=0)
    derive_classes(derived)
    assert number_of_classes(derived) == 4
    assert {derived.MODEL.ROI_HEADS.NUM_CLASSES, derived.MODEL.RETINANET.NUM_CLASSES} == {4, 80}
    assert check_datasets(derived) == []
    for number in (3, 80):
        key = "MODEL.RETINANET.NUM_CLASSES" if architecture == "RetinaNet" else "MODEL.ROI_HEADS.NUM_CLASSES"
        given = load_config(base, [*overrides, key, number], classes=0)
        derive_classes(given)
        assert f"{key} is {number}: give {key} 4" in refusal(given)


# Objects and masks


@pytest.mark.real_data
def test_coco_files_are_read_as_detectron2_reads_them(cfg: CfgNode, real_data: Path) -> None:
    root = real_data / "detectron2/coco"
    file, folder = root / "annotations/instances_val2017.json", root / "val2017"
    cfg.DATASETS.COCO_FORMAT = (("loaded_by_us", str(file), str(folder)),)
    register_datasets(cfg)
    ours = DatasetCatalog.get("loaded_by_us")
    theirs = load_coco_json(str(file), str(folder), "loaded_by_detectron2")
    assert ours == theirs
    for key in ("thing_classes", "thing_dataset_id_to_contiguous_id"):
        assert getattr(MetadataCatalog.get("loaded_by_us"), key) == getattr(
            MetadataCatalog.get("loaded_by_detectron2"), key
        )


@pytest.mark.parametrize("key", ["segmentation", "keypoints"])
@pytest.mark.parametrize("value", ["x", 5, [None] * 51, [["a"] * 6], [[None] * 8], {"a": 1}])
def test_what_boxes_do_without_may_be_broken(cfg: CfgNode, tmp_path: Path, key: str, value: Any) -> None:
    """The object is kept, without it: neither training nor its pictures meet it."""
    whole = DatasetCatalog.get("shapes_train")
    change(tmp_path, lambda content: content["annotations"][0].update({key: value}))
    cfg.MODEL.MASK_ON = False
    assert check_datasets(cfg) == []
    found = DatasetCatalog.get("shapes_train")
    assert "keypoints" not in found[0]["annotations"][0]
    if key == "segmentation":
        del whole[0]["annotations"][0][key]
    assert found == whole


@pytest.mark.parametrize("value", [None, [], [3, 4, 5, 6], [[3, 4, 5, 6]], {"size": [96, 96], "counts": [96 * 96]}])
def test_an_object_without_a_mask_is_kept_for_boxes_and_refused_for_masks(
    cfg: CfgNode, tmp_path: Path, value: Any
) -> None:
    count = sum(map(len, named_objects("shapes_train")))
    change(tmp_path, lambda content: content["annotations"][2].update(segmentation=value))
    number = json.loads((tmp_path / "shapes/annotations/instances_train.json").read_text())["annotations"][2]["id"]
    told = refusal(cfg)
    assert f"annotation {number}: it has no usable mask" in told
    cfg.MODEL.MASK_ON = False
    assert check_datasets(cfg) == []
    assert sum(map(len, named_objects("shapes_train"))) == count


def test_sets_of_detectron2s_loader_keep_objects_without_a_polygon(cfg: CfgNode, tmp_path: Path) -> None:
    """Whose boxes it drops with the polygon."""
    file, name = tmp_path / "shapes/annotations/instances_train.json", "registered_by_detectron2"
    register_coco_instances(name, {}, str(file), str(tmp_path / "shapes/train"))
    try:
        sound = sum(map(len, named_objects(name)))
        change(tmp_path, lambda content: content["annotations"][2].update(segmentation=[[3, 4, 5, 6]]))
        assert sum(map(len, named_objects(name))) < sound
        cfg.DATASETS.TRAIN = (name,)
        register_datasets(cfg)
        assert named_objects(name) == named_objects("shapes_train")
        assert sum(map(len, named_objects(name))) == sound
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_polygons_that_enclose_nothing_train_as_in_detectron2(cfg: CfgNode, tmp_path: Path) -> None:
    """COCO's training set has such: they are told, and stop nothing."""
    change(tmp_path, lambda content: content["annotations"][0].update(segmentation=[[5, 5, 20, 5, 9, 5]]))
    assert counted(check_datasets(cfg)) == {"shapes_train": {"objects without a usable mask": 1}}
    item = next(item for item in DatasetCatalog.get("shapes_train") if item["annotations"])
    assert item["annotations"][0]["segmentation"] == [[5, 5, 20, 5, 9, 5]]
    assert len(MaskMapper(cfg, True)(item)["instances"]) == len(item["annotations"])


def test_masks_of_run_lengths_train_without_an_override(cfg: CfgNode) -> None:
    """The same image with the one mask in both forms."""
    item = next(item for item in DatasetCatalog.get("shapes_train") if item["annotations"])
    item["annotations"] = item["annotations"][:1]
    (thing,) = item["annotations"]
    size = item["height"], item["width"]
    code = mask_tools.merge(mask_tools.frPyObjects(thing["segmentation"], *size))
    masks = []
    for segmentation in (thing["segmentation"], code):
        np.random.seed(0)
        thing["segmentation"] = segmentation
        sample = MaskMapper(cfg, True)(item)
        boxes = sample["instances"].gt_boxes.tensor
        masks.append(sample["instances"].gt_masks.crop_and_resize(boxes, 28).float())
    assert masks[0].mean() > 0.2
    assert (masks[0] != masks[1]).float().mean() < 0.1
