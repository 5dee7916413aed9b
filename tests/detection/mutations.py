"""Random damage to a sound annotated set, and what has to come of it: the meant number, or a refusal with the place."""

from __future__ import annotations

import copy
import json
import math
import random
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.pascal_voc import register_pascal_voc
from detectron2.evaluation import PascalVOCDetectionEvaluator, pascal_voc_evaluation
from detectron2.structures import BoxMode, Instances
from PIL import Image
from pycocotools import mask as mask_tools
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from robust_backbones.data.annotations import Fault, Use
from robust_backbones.data.annotations_repair import repair
from robust_backbones.data.annotations_sets import AnnotatedSet
from robust_backbones.detection.data_stream import MaskMapper
from robust_backbones.detection.datasets import SHOWN_CLASSES, register_datasets
from robust_backbones.detection.evaluators import CocoEvaluator, VocEvaluator
from robust_backbones.errors import InputError
from tests.data.test_annotations import HOSTILE, sound

Content = dict[str, Any]
Outcome = str
"""``same``: the number of the sound set; ``meant``: that of the data as they are now; ``refused``."""
NAME = "mutated"
TWELVE = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
VALUES = [*HOSTILE, 0, 1, 2, 3, 0.0, 1.5, -3, 59, 60, 61, 1e6, 1e9, "1", "cat", "1.png", "../1.png", True, False,
          [0, 0, 0, 0], [4, 5, 12, 20], [59, 39, 5, 5], [-5, -5, 9, 9], [[]], [[1, 2, 3, 4]],
          [[1, 1, 9, 1, 9, 9]], [[1, 1, 9, 1, 9, 9], []], [[1, 1, 9, 1, 9, 9, 1]], [1, 1, 9, 1, 9, 9], {"counts": []},
          {"size": [40, 60], "counts": [0, 2400]}, {"size": [40, 60], "counts": [2400]}, "\x00", "é", " "]  # fmt: skip


def write_images(folder: Path) -> None:
    for number in (1, 2, 3):
        for suffix in ("png", "jpg"):
            Image.new("RGB", (60, 40), (number, 0, 0)).save(folder / f"{number}.{suffix}")


def detections() -> list[tuple[str, str, list[float], float]]:
    """(image's stem, class, box, score): near the sound set's objects, boxes of quarters of pixels, no score twice."""
    rng, found = np.random.default_rng(3), []
    for row in sound()["annotations"]:
        for _ in range(2):
            box = np.array(row["bbox"]) + rng.integers(-8, 9, 4) / 4
            name = "cat" if row["category_id"] == 3 else "dog"
            found.append((str(row["image_id"]), name, box.tolist(), (len(found) * 7 % 19 + 1) / 32))
    return found


def mask_of(box: list[float]) -> np.ndarray:
    mask = np.zeros((40, 60), np.uint8, order="F")
    x, y, width, height = (round(side) for side in box)
    mask[max(y, 0) : y + height, max(x, 0) : x + width] = 1
    return mask


# COCO


def harmless(content: Content, rng: random.Random) -> None:
    """Another file that means the same for boxes and masks."""
    rows = content["annotations"]

    def renumber(name: str, key: str, refers: str, new: Callable[[int], Any]) -> None:
        ids = {row["id"]: new(number) for number, row in enumerate(content[name])}
        for row in content[name]:
            row["id"] = ids[row["id"]]
        for row in rows:
            row[key] = ids[row[key]] if refers else row[key]

    def close(row: Content) -> None:
        if isinstance(row["segmentation"], list):
            row["segmentation"][0] += row["segmentation"][0][:2]

    choices: list[Callable[[], Any]] = [
        lambda: rng.shuffle(rows),
        lambda: rng.shuffle(content["images"]),
        lambda: rng.shuffle(content["categories"]),
        lambda: renumber("categories", "category_id", "x", lambda number: 90 - 7 * number),
        lambda: renumber("images", "image_id", "x", lambda number: 2**64 - 1 - number),
        lambda: renumber("images", "image_id", "x", lambda number: f"photo {number}"),
        lambda: renumber("images", "image_id", "x", lambda number: number - 1),
        lambda: renumber("annotations", "id", "", lambda number: number),
        lambda: renumber("annotations", "id", "", lambda number: f"a{number}"),
        lambda: [row.update(iscrowd=bool(row.get("iscrowd"))) for row in rows],
        lambda: [row.pop("iscrowd") for row in rows if not row.get("iscrowd")],
        lambda: [row.update(bbox=[float(value) for value in row["bbox"]]) for row in rows],
        lambda: [row.update(extra={"a": [None]}, attributes="x") for row in rows + content["images"]],
        lambda: content.update(info=None, licenses=7),
        lambda: [close(row) for row in rows],
        lambda: content["categories"][0].update(supercategory=None),
        lambda: [row.update(ignore=0, score=0.5) for row in rows],
    ]
    for choice in rng.sample(choices, rng.randint(1, 3)):
        choice()


def damage(content: Content, rng: random.Random) -> tuple[str, int]:
    """Damage one row; its list, and its place there."""
    name = rng.choice(["annotations"] * 6 + ["images"] * 2 + ["categories"])
    place = rng.randrange(len(content[name]))
    row = content[name][place]
    value = copy.deepcopy(rng.choice(VALUES))
    key = rng.choice([*row, "segmentation", "bbox"] if name == "annotations" else [*row])

    def inside(thing: Any) -> None:
        """Change something in a list or an object, however deep."""
        while isinstance(thing, list | dict) and thing:
            spot = rng.choice([*range(len(thing))] if isinstance(thing, list) else [*thing])
            if not isinstance(thing[spot], list | dict) or rng.random() < 0.3:
                act = rng.randrange(4)
                if act == 0 or not isinstance(thing, list):
                    thing[spot] = value
                elif act == 1:
                    del thing[spot]
                elif act == 2:
                    thing.insert(spot, value)
                else:
                    thing.insert(spot, copy.deepcopy(thing[spot]))
                return
            thing = thing[spot]

    def number() -> None:
        if isinstance(row[key], int | float):
            row[key] = rng.choice([row[key] + rng.randint(-3, 3), row[key] * rng.uniform(-1, 3), float(row[key])])
        elif key == "bbox":
            row[key] = [side + rng.randint(-9, 9) * rng.choice([0, 1, 0.5]) for side in row[key]]

    acts: list[Callable[[], Any]] = [
        lambda: row.__setitem__(key, value),
        lambda: row.pop(key),
        lambda: inside(row[key]),
        number,
        lambda: row.__setitem__(key, copy.deepcopy(rng.choice(content[name]).get(key))),
        lambda: content[name].__setitem__(place, value),
        lambda: content[name].append(copy.deepcopy(row)),
        lambda: content[name].pop(place),
    ]
    act = rng.choices(acts, [6, 3, 6, 4, 4, 1, 1, 1])[0]
    if act is not number or key in row:
        act() if key in row or act in acts[5:] or act is acts[0] else row.__setitem__(key, value)
    return name, place


def reference(content: Content, task: str) -> dict[str, float]:
    """pycocotools' numbers on the data as they are; objects without a mask are crowds that fill their boxes."""
    names = {row["name"]: row["id"] for row in content["categories"]}
    files = [(Path(row["file_name"]).stem, row["id"]) for row in content["images"]]
    rows = []
    for number, row in enumerate(content["annotations"], 1):
        row = {**row, "id": number, "iscrowd": int(row.get("iscrowd", 0))}
        if task == "segm":
            mask, (x, y, width, height) = row.get("segmentation"), row["bbox"]
            if isinstance(mask, list):
                mask = [polygon for polygon in mask if isinstance(polygon, list) and len(polygon) >= 6]
                mask = [
                    polygon
                    for polygon in mask
                    if np.linalg.matrix_rank(np.diff(np.reshape(polygon, (-1, 2)), axis=0)) > 1
                ]
            elif mask and not sum(
                mask["counts"][1::2] if isinstance(mask["counts"], list) else [mask_tools.area(mask)]
            ):
                mask = None  # no pixel
            if not mask:
                mask, row["iscrowd"] = [[x, y, x + width, y, x + width, y + height, x, y + height]], 1
            row["segmentation"] = mask
        rows.append(row)
    results = [
        {"image_id": number, "category_id": names[title], "score": score}
        | ({"bbox": box} if task == "bbox" else {"segmentation": mask_tools.encode(mask_of(box))})
        for stem, title, box, score in detections()
        for file, number in files
        if stem == file and title in names
    ]
    with redirect_stdout(StringIO()):
        truth = COCO()
        truth.dataset = {**content, "annotations": rows}
        truth.createIndex()
        evaluator = COCOeval(truth, truth.loadRes(results), task)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    numbers = zip(TWELVE, (100 * evaluator.stats).tolist(), strict=True)
    return {name: math.nan if number < 0 else number for name, number in numbers}


def measured(cfg: CfgNode, annotations: Path, images: Path, *, train: bool) -> dict[str, dict[str, float]]:
    """What the product measures on the file, after its loader and, to train, its mapper have read it."""
    cfg.DATASETS.COCO_FORMAT = ((NAME, str(annotations), str(images)),)
    cfg.INPUT.MIN_SIZE_TRAIN = (40,)  # the images' own
    register_datasets(cfg)
    items = DatasetCatalog.get(NAME)
    classes = MetadataCatalog.get(NAME).thing_classes
    evaluator = CocoEvaluator(NAME, ["bbox", "segm"] if cfg.MODEL.MASK_ON else ["bbox"])
    mapper = MaskMapper(cfg, True)
    for item in items:
        if train:
            mapper(copy.deepcopy(item))
        evaluator.process([item], [{"instances": instances(item["file_name"], classes, masks=cfg.MODEL.MASK_ON)}])
    return evaluator.evaluate()


def instances(file_name: str, classes: list[str], *, masks: bool) -> Instances:
    found = [row for row in detections() if row[0] == Path(file_name).stem and row[1] in classes]
    result = Instances((40, 60))
    boxes = torch.tensor([row[2] for row in found], dtype=torch.float32).reshape(-1, 4)
    result.pred_boxes = _boxes(boxes)
    result.scores = torch.tensor([row[3] for row in found])
    result.pred_classes = torch.tensor([classes.index(row[1]) for row in found], dtype=torch.int64)
    if masks:
        result.pred_masks = torch.tensor(np.array([mask_of(row[2]) for row in found])).reshape(-1, 40, 60).bool()
    return result


def _boxes(boxes: torch.Tensor) -> Any:
    from detectron2.structures import Boxes

    return Boxes(BoxMode.convert(boxes, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS))


def check_coco_mutation(cfg: CfgNode, folder: Path, images: Path, seed: int) -> Outcome:
    """One mutation of the sound COCO set; AssertionError where it is accepted with another number, or badly refused."""
    rng = random.Random(seed)
    before = sound()
    content = copy.deepcopy(before)
    same = rng.random() < 0.3
    cfg.MODEL.MASK_ON = masks = rng.random() < 0.6
    where = None
    if same:
        harmless(content, rng)
    else:
        where = damage(content, rng)
    file = folder / "truth.json"
    file.write_text(json.dumps(content))
    use = Use(training=rng.random() < 0.3, masks=masks)
    dataset = AnnotatedSet(file, images)
    faults = [fault for fault in dataset.check(use)[0] if fault.severity == "error"]
    if faults:
        assert not same, faults[0]
        check_places(faults, file, images, content, before, where)
        check_repaired(dataset, use, folder / "fixed")
        return "refused"
    found = measured(cfg, file, images, train=use.training)
    for task in ("bbox", "segm") if masks else ("bbox",):
        expected = reference(before if same else content, task)
        for name in TWELVE:
            gap = abs(found[task][name] - expected[name])
            both = math.isnan(found[task][name]) and math.isnan(expected[name])
            assert both or gap < 1e-9, (task, name, found[task][name], expected[name])
    return "same" if same else "meant"


def check_places(
    faults: list[Fault], file: Path, images: Path, content: Content, before: Content, where: tuple[str, int] | None
) -> None:
    """Errors are one sentence each that names the file; some names the row that was damaged, or an id in it."""
    texts = [str(fault) for fault in faults]
    assert all("\n" not in text and len(text) < 700 and (str(file) in text or str(images) in text) for text in texts)
    assert where is not None
    name, place = where
    rows = [rows[name][place] for rows in (before, content) if place < len(rows[name])]
    ids = [str(row.get("id")) for row in rows if isinstance(row, dict)]
    ids += [str(row.get("image_id")) for row in rows if isinstance(row, dict)]
    named = [f"row {place} of {name}", *(f" {number}" for number in ids)]
    whole = ("holds no annotated object", "some ids of images", "usable mask", "no box has", "is that of another row")
    assert any(word in text for text in texts for word in (*named, *whole)), (where, texts[:3])


def check_repaired(dataset: AnnotatedSet, use: Use, output: Path) -> None:
    shutil.rmtree(output, ignore_errors=True)
    try:
        repaired, _ = repair(dataset, use, output)
    except InputError:  # of a file or list that is none
        return
    left = [fault for fault in repaired.check(use)[0] if fault.severity == "error"]
    decisions = ("holds no", "lists no", "others texts", "in the annotations")
    assert not left or any(words in str(left[0]) for words in decisions), left[0]


# VOC


def write_voc(folder: Path, images: Path) -> None:
    """The sound set's objects, the crowds as difficult ones."""
    shutil.rmtree(folder, ignore_errors=True)
    for part in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (folder / part).mkdir(parents=True)
    (folder / "ImageSets/Main/test.txt").write_text("1\n2\n3\n")
    for number in (1, 2, 3):
        shutil.copy(images / f"{number}.jpg", folder / "JPEGImages")
        things = ""
        for row in sound()["annotations"]:
            if row["image_id"] == number:
                x, y, width, height = row["bbox"]
                name = "cat" if row["category_id"] == 3 else "dog"
                box = f"<xmin>{x + 1}</xmin><ymin>{y + 1}</ymin><xmax>{x + width}</xmax><ymax>{y + height}</ymax>"
                known = f"<name>{name}</name><pose/><truncated>0</truncated><difficult>{row['iscrowd']}</difficult>"
                things += f"<object>{known}<bndbox>{box}</bndbox></object>"
        size = "<size><width>60</width><height>40</height><depth>3</depth></size>"
        (folder / f"Annotations/{number}.xml").write_text(f"<annotation>{size}{things}</annotation>")


TEXTS = ["", " ", "0", "1", "2", "-1", "nan", "inf", "1e308", "1e400", "9" * 400, "x", "cat", "dog", " cat ",
         "Unspecified", "true", "1.5", "60", "61", "100", "１２", "0x10", "1_0", "<a/>", "&amp;", "\n5\n"]  # fmt: skip


def damage_voc(folder: Path, rng: random.Random) -> bool:
    """Change a file of the set; whether it means the same."""
    file = folder / f"Annotations/{rng.choice('123')}.xml"
    text = file.read_text()
    tags = ["name", "difficult", "xmin", "ymin", "xmax", "ymax", "width", "height", "object", "bndbox", "size"]
    tag = rng.choice(tags)
    parts = text.split(f"<{tag}>")
    place = rng.randrange(1, len(parts))
    inner, rest = parts[place].split(f"</{tag}>", 1)
    head, new = f"<{tag}>".join(parts[:place]), rng.choice(TEXTS)
    listed = folder / "ImageSets/Main/test.txt"
    lists = ["1\n2\n3\n3\n", "1\n4\n", "", "1 2\n", "1\x00\n", "1\n2 -1\n3\n"]
    acts: list[tuple[int, bool, Callable[[], Any]]] = [
        (8, False, lambda: file.write_text(f"{head}<{tag}>{new}</{tag}>{rest}")),
        (3, False, lambda: file.write_text(f"{head}{rest}")),
        (3, False, lambda: file.write_text(f"{head}<{tag}>{inner}</{tag}><{tag}>{inner}</{tag}>{rest}")),
        (2, False, lambda: file.write_text(f"{head}<{tag.upper()}>{inner}</{tag.upper()}>{rest}")),
        (1, False, lambda: file.write_text(text[: rng.randrange(len(text))])),
        (1, False, file.unlink),
        (1, False, (folder / f"JPEGImages/{rng.choice('123')}.jpg").unlink),
        (2, False, lambda: listed.write_text(rng.choice(lists))),
        (1, False, lambda: file.write_bytes(text.encode("utf-16") if rng.random() < 0.5 else b"\xff" + text.encode())),
        (2, True, lambda: listed.write_text("3\n\n1  \n\t2\r\n")),
        (2, True, lambda: listed.write_text("1  1\n2 0\n3\t1\n" if rng.random() < 0.5 else "1  1\n2  0\n3 1\n4 -1\n")),
        (2, True, lambda: file.write_text(text.replace("><", ">\n\t<").replace("<object>", "<!-- a --><object>"))),
        (1, True, lambda: file.write_text(f'<?xml version="1.0" encoding="utf-8"?>\n{text}')),
        (1, True, lambda: file.write_bytes(b"\xef\xbb\xbf" + text.encode())),
        (1, True, lambda: file.write_text(text.replace("<difficult>0</difficult>", ""))),
        (1, True, lambda: file.write_text(text.replace("</bndbox>", "</bndbox><part><bndbox/></part>"))),
    ]  # fmt: skip
    _, same, act = rng.choices(acts, [weight for weight, *_ in acts])[0]
    act()
    return same


def check_voc_mutation(cfg: CfgNode, folder: Path, images: Path, seed: int) -> Outcome:
    """One mutation of the sound set in VOC's format, as ``check_coco_mutation``."""
    rng = random.Random(seed)
    root, classes = folder / "VOC", ("cat", "dog")
    write_voc(root, images)
    with detectron2_voc(root, classes) as expected:
        before = expected
    same = damage_voc(root, rng)
    dataset = AnnotatedSet(root, root / "JPEGImages", "test", classes)
    faults = [fault for fault in dataset.check(Use())[0] if fault.severity == "error"]
    if faults:
        assert not same, faults[0]
        assert all("\n" not in str(fault) and str(root) in str(fault) for fault in faults)
        check_repaired(dataset, Use(), folder / "fixed")
        return "refused"
    cfg.DATASETS.COCO_FORMAT, cfg.DATASETS.VOC_FORMAT = (), ((NAME, str(root), "test", classes),)
    register_datasets(cfg)
    MetadataCatalog.get(NAME).set(**{})
    evaluator = VocEvaluator(NAME)
    for item in DatasetCatalog.get(NAME):
        evaluator.process([item], [{"instances": instances(item["file_name"], [*classes], masks=False)}])
    found = evaluator.evaluate()["bbox"]
    assert MetadataCatalog.get(NAME).get(SHOWN_CLASSES)
    if same:
        meant = before
    else:
        try:
            with detectron2_voc(root, classes) as expected:
                meant = expected
        except (OSError, ValueError, AttributeError):  # whose reader takes whole numbers and a ``difficult`` alone
            return "meant"
    shown = [title for title in classes if not math.isnan(found[f"AP-{title}"])]
    if len(shown) == len(classes):
        for name in ("AP", "AP50", "AP75"):
            assert abs(found[name] - meant[name]) < 1e-9, (name, found[name], meant[name])
    return "same" if same else "meant"


@contextmanager
def detectron2_voc(root: Path, classes: tuple[str, ...]) -> Iterator[dict[str, float]]:
    """Detectron2's own numbers of the detections; it takes blanks for a part of a name."""
    name = "mutated_by_detectron2"
    for file in (root / "Annotations").glob("*.xml"):
        file.write_bytes(re.sub(rb"<name>\s*(\S.*?)\s*</name>", rb"<name>\1</name>", file.read_bytes()))
    pascal_voc_evaluation.parse_rec.cache_clear()
    register_pascal_voc(name, str(root), "test", 2012, classes)
    try:
        evaluator = PascalVOCDetectionEvaluator(name)
        evaluator.reset()
        for number in "123":
            found = instances(f"{number}.jpg", [*classes], masks=False)
            evaluator.process([{"image_id": number}], [{"instances": found}])
        yield evaluator.evaluate()["bbox"]
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
