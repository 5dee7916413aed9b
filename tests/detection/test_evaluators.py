"""COCO's and VOC's numbers: against the reference implementations, against slow ones, and over two processes."""

import copy
import functools
import json
import logging
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.data.datasets.pascal_voc import CLASS_NAMES, load_voc_instances, register_pascal_voc
from detectron2.evaluation import COCOEvaluator, PascalVOCDetectionEvaluator
from detectron2.structures import Boxes, Instances
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.random import Generator, default_rng
from pycocotools import mask as mask_tools
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from robust_backbones.analysis.detection_errors import detection_errors
from robust_backbones.detection.cell_images import ImageChoice, take_images
from robust_backbones.detection.datasets import SHOWN_CLASSES
from robust_backbones.detection.evaluators import CocoEvaluator, VocEvaluator, coco_metrics, ground_truth
from robust_backbones.errors import InputError
from robust_backbones.runs.distributed import join_processes
from tests.runs.test_distributed import found_by_ranks

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # pycocotools under NumPy 2
    pytest.mark.filterwarnings("ignore:invalid value encountered in divide"),  # Detectron2, a class without objects
]

Result = dict[str, Any]
TWELVE = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]
SET = "evaluators_test"
# pycocotools adds 2e-16 to the denominator of each precision (perfect detections have AP 99.99999999999997).
same = functools.partial(pytest.approx, rel=0, abs=1e-10, nan_ok=True)


@contextmanager
def registered(register: Callable[..., None], *arguments: Any, **options: Any) -> Iterator[str]:
    register(SET, *arguments, **options)
    try:
        yield SET
    finally:
        DatasetCatalog.remove(SET)
        MetadataCatalog.remove(SET)


# COCO


def indexed(images: list[Result], annotations: list[Result], categories: Sequence[int] = (1,)) -> COCO:
    truth = COCO()
    named = [{"id": number, "name": f"class{number}"} for number in categories]
    truth.dataset = {"images": images, "annotations": annotations, "categories": named}
    truth.createIndex()
    return truth


def box_mask(image: Result, box: Iterable[float]) -> np.ndarray:
    mask = np.zeros((image["height"], image["width"]), np.uint8, order="F")
    x, y, width, height = (round(side) for side in box)
    mask[max(y, 0) : max(y + height, 0), max(x, 0) : max(x + width, 0)] = 1
    return mask


def rle(mask: np.ndarray) -> Result:
    code = mask_tools.encode(mask)
    return {**code, "counts": code["counts"].decode()}


def random_box(rng: Generator, image: Result) -> np.ndarray:
    """Of any size, whole numbers half of the time, often leaving the image."""
    width = rng.uniform(*[(0, 8), (8, 32), (32, 96), (96, 240)][rng.integers(4)])
    corner = rng.uniform(-10, [image["width"], image["height"]])
    box = np.array([*corner, width, width * rng.uniform(0.5, 2)])
    return box.round() if rng.random() < 0.5 else box


def random_truth(rng: Generator) -> COCO:
    """1 to 5 images with 0 to 8 objects each: crowds, polygons, both kinds of RLE, areas on the sizes' bounds."""
    categories = [int(number) + 1 for number in rng.permutation(90)[: rng.integers(1, 4)]]
    images = [
        {"id": int(number), "height": int(rng.integers(20, 250)), "width": int(rng.integers(20, 250))}
        for number in rng.permutation(50)[: rng.integers(1, 6)]
    ]
    annotations: list[Result] = []
    for image in images:
        for _ in range(rng.choice([0, 1, 3, 8])):
            x, y, width, height = box = random_box(rng, image).tolist()
            mask = box_mask(image, box)
            polygon = [x, y, x + width, y, x + width, y + height, x, y + height]
            changes = np.flatnonzero(np.diff(mask.flatten(order="F"), prepend=0))
            runs = np.diff([0, *changes, mask.size])
            uncompressed = {"size": list(mask.shape), "counts": runs.tolist()}
            forms = [[polygon, [x, y, x + 9, y, x, y + 7]], [polygon], rle(mask), uncompressed]
            annotation = {
                "id": 7 + 2 * len(annotations),
                "image_id": image["id"],
                "category_id": int(rng.choice(categories)),
                "bbox": box,
                "area": float(rng.choice([width * height, mask.sum(), 32**2, 96**2])),
                # A mask that encloses nothing is none, see below.
                "segmentation": forms[rng.integers(4) * int(mask.any() and width * height > 0)],
                "iscrowd": int(rng.random() < 0.2),
            }
            annotations.append(annotation | ({"ignore": 1} if rng.random() < 0.2 else {}))
    return indexed(images, annotations, categories)


def perturbed(truth: COCO, rng: Generator) -> list[Result]:
    """Detections near the objects and elsewhere, many of equal score, some twice, on some images over a hundred."""
    categories = truth.getCatIds()
    results: list[Result] = []
    for image in truth.imgs.values():
        objects = truth.loadAnns(truth.getAnnIds(imgIds=image["id"]))
        found = [one for one in objects for _ in range(rng.integers(0, 4))]
        if objects and rng.random() < 0.1:
            found += [objects[0]] * 130
        shapes: list[tuple[np.ndarray, np.ndarray, int]] = []
        for one in found:
            box = np.array(one["bbox"]) + rng.normal(0, 0.1, 4) * one["bbox"][2] * (rng.random() < 0.8)
            mask = np.roll(truth.annToMask(one), rng.integers(-5, 6, 2), (0, 1))
            wrong = rng.random() < 0.1
            shapes.append(
                (box.clip([-500, -500, 0, 0]), mask, int(rng.choice(categories)) if wrong else one["category_id"])
            )
        for _ in range(rng.integers(0, 4)):
            box = random_box(rng, image)
            shapes.append((box, box_mask(image, box), int(rng.choice(categories))))
        for box, mask, category in shapes:
            result = {
                "image_id": image["id"],
                "category_id": category,
                "bbox": box.tolist(),
                "score": round(float(rng.random()), int(rng.choice([1, 2, 8]))),
                "segmentation": rle(np.asfortranarray(mask)),
            }
            results += [result] * (1 + (rng.random() < 0.1))
    return results


@given(seed=st.integers(0, 2**32 - 1), task=st.sampled_from(["bbox", "segm"]))
@settings(max_examples=60, deadline=None)
def test_faster_coco_eval_computes_what_pycocotools_computes(seed: int, task: str) -> None:
    rng = default_rng(seed)
    truth = random_truth(rng)
    results = perturbed(truth, rng)
    before = copy.deepcopy((truth.dataset, results))
    metrics = coco_metrics(truth, results, task)
    assert metrics == same(coco_metrics(truth, results, task, reference=True))
    assert list(metrics) == [*TWELVE, *(f"AP-class{number}" for number in sorted(truth.getCatIds()))]
    assert (truth.dataset, results) == before


@given(seed=st.integers(0, 2**32 - 1), task=st.sampled_from(["bbox", "segm"]), most=st.sampled_from([(1, 3), (300,)]))
@settings(max_examples=20, deadline=None)
def test_other_numbers_of_detections_count_as_by_pycocotools(seed: int, task: str, most: tuple[int, ...]) -> None:
    """By COCO's own loop over the same annotations; some images hold 130 detections of a class."""
    rng = default_rng(seed)
    truth = random_truth(rng)
    results = perturbed(truth, rng)
    metrics = coco_metrics(truth, results, task, max_dets=most)
    assert metrics == same(coco_metrics(truth, results, task, max_dets=most, reference=True))
    assert [name for name in metrics if name.startswith("AR") and name[2:].isdigit()] == [f"AR{n}" for n in most]


def test_detections_beyond_the_hundredth_count_where_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """150 objects, all found: COCO's own 100 hold AP near two thirds; pycocotools by hand for 150."""
    image = {"id": 1, "height": 200, "width": 200, "file_name": "1.jpg"}
    boxes = [[float(12 * (n % 15)), float(12 * (n // 15)), 9.0, 9.0] for n in range(150)]
    things = [
        {"id": n, "image_id": 1, "category_id": 1, "bbox": box, "area": 81.0, "iscrowd": 0}
        for n, box in enumerate(boxes, 1)
    ]
    results: list[Result] = [
        {"image_id": 1, "category_id": 1, "bbox": box, "score": 1 - n / 200, "segmentation": rle(box_mask(image, box))}
        for n, box in enumerate(boxes)
    ]
    truth = indexed([image], things)
    for most in ((1, 10, 100), (1, 10, 150)):
        by_hand = COCOeval(truth, truth.loadRes([dict(row) for row in results]), "bbox")
        by_hand.params.maxDets = list(most)
        by_hand.evaluate()
        by_hand.accumulate()
        found = coco_metrics(truth, results, "bbox", max_dets=most)
        assert found["AP"] == same(100 * by_hand.eval["precision"][..., 0, 2].mean())
        assert found[f"AR{most[2]}"] == same(100 * most[2] / 150)
        with coco_set(tmp_path, truth) as name:
            evaluator = CocoEvaluator(name, ["bbox"], max_dets=most)
            feed_coco(evaluator, truth, results, [1])
            with caplog.at_level(logging.WARNING):
                caplog.clear()
                assert evaluator.evaluate()["bbox"]["AP"] == found["AP"]
            assert ("TEST.MAX_DETS (1, 10, 150) counts all" in caplog.text) == (most[2] == 100)


@given(seed=st.integers(0, 2**32 - 1), share=st.sampled_from([0.3, 1.0]), reference=st.booleans())
@settings(max_examples=40, deadline=None)
def test_objects_without_a_mask_are_crowds_that_fill_their_boxes(seed: int, share: float, reference: bool) -> None:
    """For masks alone, and equal to pycocotools on data that say so; boxes count them as ever."""
    rng = default_rng(seed)
    truth = random_truth(rng)
    results = perturbed(truth, rng)
    lacking, meant = copy.deepcopy(truth.dataset), copy.deepcopy(truth.dataset)
    for row, crowd in zip(lacking["annotations"], meant["annotations"], strict=True):
        if rng.random() < share:
            x, y, width, height = row["bbox"]
            image = truth.imgs[row["image_id"]]
            size = [image["height"], image["width"]]
            forms: list[Any] = [None, [], [row["bbox"]], row["bbox"], [[x, y]]]
            forms += [{"size": size, "counts": [size[0] * size[1]]}, [[x, y, x + 9, y, x + 5, y], [x, y] * 3]]
            row["segmentation"] = forms[rng.integers(7)]
            corners = [x, y, x + width, y, x + width, y + height, x, y + height]
            crowd |= {"iscrowd": 1, "segmentation": [corners]}
    without = indexed(lacking["images"], lacking["annotations"], [row["id"] for row in lacking["categories"]])
    crowds = indexed(meant["images"], meant["annotations"], [row["id"] for row in meant["categories"]])
    found = coco_metrics(without, results, "segm", reference=reference)
    assert found == same(coco_metrics(crowds, results, "segm", reference=True))
    assert coco_metrics(without, results, "bbox") == same(coco_metrics(truth, results, "bbox"))


@pytest.mark.slow
@pytest.mark.real_data
@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_both_agree_on_photographs(real_data: Path, task: str) -> None:
    truth = COCO(real_data / "detectron2/coco/annotations/instances_val2017.json")
    results = perturbed(truth, default_rng(0))
    metrics = coco_metrics(truth, results, task)
    assert metrics == same(coco_metrics(truth, results, task, reference=True))
    assert all(1 < metrics[name] < 99 for name in TWELVE)


def slow_iou(a: Sequence[float], b: Sequence[float]) -> float:
    sides = [min(a[i] + a[i + 2], b[i] + b[i + 2]) - max(a[i], b[i]) for i in (0, 1)]
    shared = max(sides[0], 0) * max(sides[1], 0)
    return shared / (a[2] * a[3] + b[2] * b[3] - shared)


def slow_precision_and_recall(
    truth: list[Result], results: list[Result], threshold: float, most: int
) -> tuple[float, float]:
    """One class's AP and recall at one IoU threshold, by the definitions, with the ``most`` best of each image."""
    ranked = sorted(results, key=lambda r: -r["score"])
    ranked = [r for n, r in enumerate(ranked) if sum(r["image_id"] == s["image_id"] for s in ranked[:n]) < most]
    free, right = list(truth), []
    for result in ranked:
        near = [a for a in free if a["image_id"] == result["image_id"]]
        best = max(near, key=lambda a: slow_iou(a["bbox"], result["bbox"]), default=None)
        right.append(best is not None and slow_iou(best["bbox"], result["bbox"]) >= threshold)
        if right[-1]:
            free.remove(best)
    curve = [(sum(right[:n]) / len(truth), sum(right[:n]) / n) for n in range(1, len(right) + 1)]
    precisions = [max((p for r, p in curve if r >= point / 100), default=0) for point in range(101)]
    return sum(precisions) / 101, sum(right) / len(truth)


@pytest.mark.parametrize("seed", range(8))
def test_ap_is_the_area_under_the_interpolated_precision(seed: int) -> None:
    """Seven objects of one class and eleven of the other, for no recall but 0 and 1 lies on one of the 101 points."""
    rng = default_rng(seed)
    images = [{"id": number, "height": 200, "width": 200} for number in range(3)]
    annotations = [
        {
            "id": number,
            "image_id": int(rng.integers(3)),
            "category_id": 1 + (number < 11),
            "bbox": rng.uniform(20, 100, 4).tolist(),
            "area": 5000,
        }
        for number in range(18)
    ]
    results = [
        {**one, "bbox": (np.array(one["bbox"]) + rng.normal(0, 8, 4)).tolist(), "score": rng.random()}
        for one in annotations * 3
    ]
    metrics = coco_metrics(indexed(images, annotations, [1, 2]), results, "bbox")

    def mean(part: int, thresholds: Iterable[int], classes: Iterable[int] = (1, 2), most: int = 100) -> Any:
        of_class = [[[r for r in rows if r["category_id"] == k] for rows in (annotations, results)] for k in classes]
        return same(
            100 * np.mean([slow_precision_and_recall(*c, t / 100, most)[part] for t in thresholds for c in of_class])
        )

    thresholds = range(50, 100, 5)
    assert 1 < metrics["AP"] < metrics["AP50"] < 99
    assert metrics["AP"] == mean(0, thresholds)
    assert metrics["AP50"] == mean(0, [50])
    assert metrics["AP75"] == mean(0, [75])
    assert [metrics["AP-class1"], metrics["AP-class2"]] == [mean(0, thresholds, [number]) for number in (1, 2)]
    assert [metrics[f"AR{most}"] for most in (1, 10, 100)] == [mean(1, thresholds, most=most) for most in (1, 10, 100)]


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_who_finds_nothing_has_zero_where_there_is_something_to_find(task: str, reference: bool) -> None:
    image = {"id": 1, "height": 100, "width": 100}
    small = {"id": 1, "image_id": 1, "category_id": 2, "bbox": [5, 5, 9, 9], "area": 81}
    small["segmentation"] = [[5, 5, 14, 5, 14, 14, 5, 14]]
    metrics = coco_metrics(indexed([image], [small], [1, 2]), [], task, reference=reference)
    undefined = {"APm", "APl", "ARm", "ARl", "AP-class1"}
    assert metrics == same(
        {name: math.nan if name in undefined else 0.0 for name in [*TWELVE, "AP-class1", "AP-class2"]}
    )


def test_a_mask_counts_by_its_own_area() -> None:
    """A wrong detection counts against small objects as its mask is small, however large its box."""
    image = {"id": 1, "height": 200, "width": 200}
    thing = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 20, 20], "area": 400}
    thing["segmentation"] = rle(box_mask(image, thing["bbox"]))
    found = {key: thing[key] for key in ("image_id", "category_id", "bbox", "segmentation")} | {"score": 0.5}
    wrong = found | {"bbox": [50, 50, 150, 150], "segmentation": rle(box_mask(image, [50, 50, 20, 20])), "score": 0.9}
    truth = indexed([image], [thing])
    assert coco_metrics(truth, [wrong, found], "segm")["APs"] == same(50)
    assert coco_metrics(truth, [wrong, found], "bbox")["APs"] == same(100)


@pytest.mark.parametrize("reference", [False, True])
def test_ids_may_be_anything(reference: bool) -> None:
    """COCO's own code counts a match with annotation 0 as none, and annotations of other images are left over."""
    images = [{"id": name, "height": 100, "width": 100} for name in ("b", "a")]
    thing = {"category_id": 1, "bbox": [0, 0, 50, 50], "area": 2500}
    things = [{**thing, "id": 0, "image_id": name} for name in ("a", "b", "not in the set")]
    results = [{**thing, "image_id": name, "score": 0.5} for name in ("a", "b")]
    assert coco_metrics(indexed(images, things), results, "bbox", reference=reference)["AP"] == same(100)


def test_an_annotation_without_area_is_the_users_to_mend() -> None:
    annotation = {"id": 3, "image_id": 1, "category_id": 1, "bbox": [0, 0, 50, 50]}
    with pytest.raises(InputError, match="annotation 3 has no area"):
        coco_metrics(indexed([{"id": 1, "height": 9, "width": 9}], [annotation]), [], "bbox")


@contextmanager
def coco_set(folder: Path, truth: COCO) -> Iterator[str]:
    path = folder / "truth.json"
    path.write_text(json.dumps(truth.dataset))
    classes = {theirs: ours for ours, theirs in enumerate(sorted(truth.getCatIds()))}
    metadata = {
        "thing_dataset_id_to_contiguous_id": classes,
        "thing_classes": [f"class{number}" for number in classes],
    }
    with registered(register_coco_instances, metadata, str(path), str(folder)) as name:
        yield name


def feed_coco(evaluator: COCOEvaluator, truth: COCO, results: list[Result], images: Iterable[int]) -> None:
    """The results as a detector's, with class ids from 0."""
    categories = sorted(truth.getCatIds())
    evaluator.reset()
    for image in images:
        rows = [r for r in results if r["image_id"] == image]
        boxes = torch.tensor([r["bbox"] for r in rows]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        size = (truth.imgs[image]["height"], truth.imgs[image]["width"])
        found = Instances(
            size,
            pred_boxes=Boxes(boxes),
            scores=torch.tensor([r["score"] for r in rows]),
            pred_classes=torch.tensor([categories.index(r["category_id"]) for r in rows], dtype=torch.long),
            pred_masks=torch.tensor(np.array([mask_tools.decode(r["segmentation"]) for r in rows])).reshape(-1, *size),
        )
        evaluator.process([{"image_id": image}], [{"instances": found}])


def example() -> tuple[COCO, list[Result]]:
    rng = default_rng(279)
    truth = random_truth(rng)
    return truth, perturbed(truth, rng)


def test_detectron2_computes_the_same_and_writes_the_same_file(tmp_path: Path) -> None:
    truth, results = example()
    tasks = ("bbox", "segm")
    with coco_set(tmp_path, truth) as name:
        stock = COCOEvaluator(name, tasks, output_dir=str(tmp_path / "stock"), use_fast_impl=False)
        slow = CocoEvaluator(name, tasks, output_dir=tmp_path / "slow", reference=True)
        fast = CocoEvaluator(name, tasks, output_dir=tmp_path / "fast")
        for evaluator in (stock, slow, fast):
            feed_coco(evaluator, truth, results, sorted(truth.imgs))
        expected, reference, metrics = stock.evaluate(), slow.evaluate(), fast.evaluate()
    for task in tasks:
        np.testing.assert_equal({key: reference[task][key] for key in expected[task]}, dict(expected[task]))
        assert metrics[task] == same(reference[task])
        assert 0 < metrics[task]["AP"] < 100
    assert [path.name for path in (tmp_path / "fast").iterdir()] == ["coco_instances_results.json"]
    files = [json.loads((tmp_path / who / "coco_instances_results.json").read_text()) for who in ("stock", "fast")]
    assert files[0] == files[1]


@pytest.mark.parametrize(("reference", "package"), [(False, "faster-coco-eval 1."), (True, "pycocotools 2.")])
def test_the_log_says_who_computed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, reference: bool, package: str
) -> None:
    truth, results = example()
    with coco_set(tmp_path, truth) as name, logged("robust_backbones.detection.evaluators", caplog):
        evaluator = CocoEvaluator(name, ["bbox"], output_dir=tmp_path, reference=reference)
        feed_coco(evaluator, truth, results, truth.imgs)
        evaluator.evaluate()
    assert f"bbox AP of {SET}, computed by {package}" in caplog.text


@contextmanager
def logged(module: str, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """What a module logs, whether or not another test has set up Detectron2's logging."""
    logger = logging.getLogger(module)
    logger.addHandler(caplog.handler)
    with caplog.at_level(logging.INFO, logger.name):
        yield
    logger.removeHandler(caplog.handler)


def test_a_class_that_the_set_lacks_is_the_users_to_mend(tmp_path: Path) -> None:
    truth, _ = example()
    with coco_set(tmp_path, truth) as name:
        evaluator = CocoEvaluator(name, ["bbox"], output_dir=tmp_path)
        evaluator.reset()
        found = Instances(
            (9, 9), pred_boxes=Boxes([[1, 1, 5, 5]]), scores=torch.ones(1), pred_classes=torch.tensor([80])
        )
        evaluator.process([{"image_id": next(iter(truth.imgs))}], [{"instances": found}])
        with pytest.raises(InputError, match=r"class 80 but .* 0 to 2: give .*NUM_CLASSES 3"):
            evaluator.evaluate()


def test_without_annotations_detections_are_written_alone(tmp_path: Path) -> None:
    truth, results = example()
    images = list(truth.imgs)
    with coco_set(tmp_path, truth) as name:
        del truth.dataset["annotations"]
        (tmp_path / "truth.json").write_text(json.dumps(truth.dataset))
        evaluator = CocoEvaluator(name, ["bbox"], output_dir=tmp_path)
        feed_coco(evaluator, truth, results, images)
        assert evaluator.evaluate() == {}
    assert len(json.loads((tmp_path / "coco_instances_results.json").read_text())) == len(results)


# PASCAL VOC

Found = tuple[str, int, float, Sequence[float]]
"""Image, class, score, (x1, y1, x2, y2) in VOC's pixels from 1."""


def write_voc(folder: Path, objects: dict[str, list[tuple[str, Sequence[int], int]]]) -> None:
    """``objects``: by image, (class name, (x1, y1, x2, y2), difficult)."""
    for name in ("Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    (folder / "ImageSets/Main/test.txt").write_text("".join(f"{image}\n" for image in objects))
    for image, rows in objects.items():
        text = "".join(
            f"<object><name>{name}</name><pose>Left</pose><truncated>0</truncated><difficult>{difficult}</difficult>"
            "<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>".format(*box)
            for name, box, difficult in rows
        )
        size = "<size><width>300</width><height>300</height></size>"
        (folder / f"Annotations/{image}.xml").write_text(f"<annotation>{size}{text}</annotation>")


def evaluate_voc(
    kind: type[PascalVOCDetectionEvaluator],
    folder: Path,
    year: int,
    found: list[Found],
    *,
    classes: Sequence[str] = CLASS_NAMES,
    images: Sequence[str] | None = None,
) -> dict[str, dict[str, float]]:
    with registered(register_pascal_voc, str(folder), "test", year, classes) as name:
        evaluator = kind(name)
        feed_voc(evaluator, folder, found, images)
        return evaluator.evaluate()


def feed_voc(
    evaluator: PascalVOCDetectionEvaluator, folder: Path, found: list[Found], images: Sequence[str] | None = None
) -> None:
    evaluator.reset()
    for image in images or (folder / "ImageSets/Main/test.txt").read_text().split():
        rows = [row for row in found if row[0] == image]
        boxes = torch.tensor([row[3] for row in rows], dtype=torch.float32).reshape(-1, 4)
        boxes[:, :2] -= 1
        instances = Instances(
            (300, 300),
            pred_boxes=Boxes(boxes),
            scores=torch.tensor([row[2] for row in rows]),
            pred_classes=torch.tensor([row[1] for row in rows], dtype=torch.long),
        )
        evaluator.process([{"image_id": image}], [{"instances": instances}])


def random_voc(folder: Path, rng: Generator) -> list[Found]:
    """Twenty images in no order; a detection for every object, 0 to 4 for some, difficult ones among them."""
    objects: dict[str, list[tuple[str, Sequence[int], int]]] = {}
    for number in rng.permutation(20):
        corners = rng.integers(1, 200, (rng.integers(0, 5), 2))
        boxes = np.hstack([corners, corners + rng.integers(0, 99, corners.shape)]).tolist()
        rows = [(["bird", "cat", "dog"][rng.integers(3)], box, int(rng.random() < 0.3)) for box in boxes]
        objects[f"{number:06}"] = rows
    write_voc(folder, objects)
    return found_in_voc(folder, rng, ("bird", "cat", "dog"))


@pytest.mark.parametrize("year", [2007, 2012])
@pytest.mark.parametrize("seed", range(3))
def test_voc_sets_of_ones_own_leave_out_what_they_do_not_show(tmp_path: Path, year: int, seed: int) -> None:
    found = random_voc(tmp_path, default_rng(seed))
    found += [(image, 3, score, box) for image, _, score, box in found[::2]]
    shown = ["bird", "cat", "dog"]
    expected = evaluate_voc(
        PascalVOCDetectionEvaluator, tmp_path, year, [row for row in found if row[1] < 3], classes=shown
    )
    with registered(register_pascal_voc, str(tmp_path), "test", year, [*shown, "unicorn"]) as name:
        MetadataCatalog.get(name).set(**{SHOWN_CLASSES: True})
        evaluator = VocEvaluator(name)
        feed_voc(evaluator, tmp_path, found)
        metrics = evaluator.evaluate()["bbox"]
    assert {key: metrics[key] for key in ("AP", "AP50", "AP75")} == same(dict(expected["bbox"]))
    assert math.isnan(metrics["AP-unicorn"])


@pytest.mark.parametrize("limit", [None, 1])
def test_error_types_do_not_count_difficult_objects_as_missed(tmp_path: Path, limit: int | None) -> None:
    """As VOC's AP does not; the cat is missed, the difficult dog is not, and the bird is found."""
    boxes = {"cat": (9, 9, 60, 50), "dog": (70, 80, 120, 140), "bird": (150, 20, 200, 90)}
    objects = [(name, box, int(name == "dog")) for name, box in boxes.items()]
    write_voc(tmp_path, {"000001": objects, "000002": []})  # Detectron2 reads no list of one image
    with registered(register_pascal_voc, str(tmp_path), "test", 2012, list(boxes)) as name:
        MetadataCatalog.get(name).set(evaluator_type="pascal_voc")
        truth = ground_truth(take_images(name, ImageChoice(limit=limit, seed=0), tmp_path))
        (bird,) = [row for row in truth.dataset["annotations"] if truth.cats[row["category_id"]]["name"] == "bird"]
        found = [{key: bird[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.9}]
        assert detection_errors(truth, found, "bbox").counts["missed"] == 1


def found_in_voc(folder: Path, rng: Generator, classes: Sequence[str]) -> list[Found]:
    found: list[Found] = []
    for item in load_voc_instances(str(folder), "test", classes):
        for thing in item["annotations"]:
            for _ in range(rng.integers(0, 4)):
                x1, y1, x2, y2 = thing["bbox"]
                box = np.array([x1 + 1, y1 + 1, x2, y2]) + rng.normal(0, 0.08, 4) * (x2 - x1)
                category = int(rng.integers(len(classes))) if rng.random() < 0.1 else thing["category_id"]
                found.append((str(item["image_id"]), category, round(float(rng.random()), 1), box.tolist()))
        found.append((str(item["image_id"]), 0, float(rng.random()), [1, 1, 20, 20]))
    return found


def same_as_detectron2(folder: Path, found: list[Found], **options: Any) -> dict[str, dict[str, float]]:
    by_points, by_area = (
        evaluate_voc(PascalVOCDetectionEvaluator, folder, year, found, **options)["bbox"] for year in (2007, 2012)
    )
    metrics = evaluate_voc(VocEvaluator, folder, 2007, found, **options)
    for task, expected in {"bbox": by_points, "bbox-area": by_area}.items():
        np.testing.assert_equal({name: metrics[task][name] for name in expected}, dict(expected))
    later = evaluate_voc(VocEvaluator, folder, 2012, found, **options)
    np.testing.assert_equal(later, {"bbox": metrics["bbox-area"], "bbox-11point": metrics["bbox"]})
    return metrics


@pytest.mark.parametrize("seed", range(6))
def test_voc_is_detectron2s_on_a_random_set(tmp_path: Path, seed: int) -> None:
    found = random_voc(tmp_path, default_rng(seed))
    metrics = same_as_detectron2(tmp_path, found, classes=("bird", "cat", "dog"))
    assert 1 < metrics["bbox"]["AP"] < metrics["bbox"]["AP50"] < 99


@pytest.mark.slow
@pytest.mark.real_data
def test_voc_is_detectron2s_on_photographs(real_data: Path) -> None:
    folder = real_data / "detectron2/VOC2007"
    metrics = same_as_detectron2(folder, found_in_voc(folder, default_rng(0), CLASS_NAMES))
    assert 1 < metrics["bbox"]["AP"] < metrics["bbox"]["AP50"] < 99
    assert metrics["bbox"]["AP"] == pytest.approx(np.mean([metrics["bbox"][f"AP-{name}"] for name in CLASS_NAMES]))


@pytest.mark.parametrize("found", [[], [("1", 0, 0.9, (1, 1, 50, 50))], [("1", 1, 0.9, (1, 1, 50, 50))]])
def test_voc_is_detectron2s_where_there_is_nothing(tmp_path: Path, found: list[Found]) -> None:
    """Nothing found; found, of a class that is there, and of one that is not."""
    write_voc(tmp_path, {"1": [("cat", (1, 1, 50, 50), 0)], "2": []})
    same_as_detectron2(tmp_path, found, classes=("cat", "ghost"))


def test_names_of_images_may_have_spaces(tmp_path: Path) -> None:
    found = random_voc(tmp_path / "plain", default_rng(7))
    shutil.copytree(tmp_path / "plain", tmp_path / "spaced")
    for path in (tmp_path / "spaced/Annotations").iterdir():
        path.rename(path.with_stem(f"my {path.stem} 1"))
    listed = tmp_path / "spaced/ImageSets/Main/test.txt"
    names = listed.read_text().split()
    listed.write_text("".join(f"my {name} 1\n" for name in names))
    spaced = [(f"my {image} 1", *rest) for image, *rest in found]
    options = {"classes": ("bird", "cat", "dog")}
    np.testing.assert_equal(
        evaluate_voc(VocEvaluator, tmp_path / "spaced", 2012, spaced, images=[f"my {n} 1" for n in names], **options),
        evaluate_voc(VocEvaluator, tmp_path / "plain", 2012, found, **options),
    )


def test_voc_by_hand(tmp_path: Path) -> None:
    """Cat: of three objects, right at 0.9 and 0.7, wrong at 0.8 and, a second time, 0.6; a difficult one at 0.85.

    So precision is 1 up to recall 1/3 and 2/3 up to 2/3: four of eleven points and three. Dog: IoU 0.52, once.
    """
    box, other, elsewhere = (1, 1, 100, 100), (151, 151, 250, 250), (1, 201, 60, 260)
    write_voc(
        tmp_path,
        {"1": [("cat", box, 0), ("cat", other, 1)], "2": [("cat", box, 0)], "3": [("cat", box, 0), ("dog", box, 0)]},
    )
    found = [
        ("1", 0, 0.9, box),
        ("1", 0, 0.85, other),
        ("1", 0, 0.8, elsewhere),
        ("2", 0, 0.7, box),
        ("2", 0, 0.6, box),
        ("3", 1, 0.5, (1, 1, 100, 52)),
    ]
    metrics = evaluate_voc(VocEvaluator, tmp_path, 2007, found, classes=("cat", "dog"))
    by_points, by_area = 100 * (4 + 3 * 2 / 3) / 11, 100 * (1 / 3 + 1 / 3 * 2 / 3)
    for task, cat in {"bbox": by_points, "bbox-area": by_area}.items():
        expected = {"AP": (cat + 10) / 2, "AP50": (cat + 100) / 2, "AP75": cat / 2, "AP-cat": cat, "AP-dog": 10}
        assert metrics[task] == pytest.approx(expected)


def test_the_log_names_vocs_metrics(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_voc(tmp_path, {"1": [("cat", (1, 1, 50, 50), 0)]})
    with logged("detectron2.evaluation.pascal_voc_evaluation", caplog):
        evaluate_voc(VocEvaluator, tmp_path, 2012, [], classes=["cat"])
    assert f"bbox of {SET}, area under the curve" in caplog.text
    assert f"bbox-11point of {SET}, 11-point AP (VOC 2007)" in caplog.text


# Several processes


def evaluate_part(rank: int, size: int, *, folder: Path) -> dict[str, Any]:
    """Every ``size``-th image is this process's: not in one piece, so that the order of what comes together counts."""
    folder = folder / f"{rank}of{size}"
    folder.mkdir()
    truth, results = example()
    found = random_voc(folder / "voc", default_rng(3))
    voc_images = (folder / "voc/ImageSets/Main/test.txt").read_text().split()[rank::size]
    with join_processes(torch.device("cpu")):
        with coco_set(folder, truth) as name:
            evaluator = CocoEvaluator(name, ("bbox", "segm"), output_dir=folder)
            feed_coco(evaluator, truth, results, sorted(truth.imgs)[rank::size])
            coco = evaluator.evaluate()
        classes = ("bird", "cat", "dog")
        voc = evaluate_voc(VocEvaluator, folder / "voc", 2007, found, classes=classes, images=voc_images)
    return {"coco": coco, "voc": voc}


@pytest.mark.slow
def test_two_processes_have_the_numbers_and_the_file_of_one(tmp_path: Path) -> None:
    worker = functools.partial(evaluate_part, folder=tmp_path)
    one, (two, other) = worker(0, 1), found_by_ranks(worker, tmp_path)
    np.testing.assert_equal(two, one)
    assert 1 < one["coco"]["bbox"]["AP"] < 99
    assert 1 < one["voc"]["bbox"]["AP"] < 99
    assert other == {"coco": {}, "voc": {}}
    files = [(tmp_path / part / "coco_instances_results.json").read_bytes() for part in ("0of1", "0of2")]
    assert files[0] == files[1]
    assert not (tmp_path / "1of2/coco_instances_results.json").exists()
