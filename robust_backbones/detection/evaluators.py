"""COCO's and PASCAL VOC's average precision: Detectron2's numbers, with more metrics and faster."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import logging
import math
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import detectron2.utils.comm as comm
import faster_coco_eval  # type: ignore[import-untyped]
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data.datasets.coco import convert_to_coco_dict
from detectron2.evaluation import DatasetEvaluator, PascalVOCDetectionEvaluator
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import create_small_table
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from robust_backbones.configs import DETECTOR_KEYS
from robust_backbones.data.annotations_values import box_polygon, usable_mask
from robust_backbones.data.annotations_voc import text_in, voc_names
from robust_backbones.detection.collapse import oddities
from robust_backbones.detection.datasets import SHOWN_CLASSES, annotated_set, categories, evaluator_kind
from robust_backbones.detection.left_out import left_out
from robust_backbones.detection.run_lengths import run_lengths
from robust_backbones.errors import InputError, plural
from robust_backbones.runs.files import write_text

MAX_DETS: tuple[int, ...] = DETECTOR_KEYS["TEST.MAX_DETS"]
_logger = logging.getLogger(__name__)
_REGIONS = {"bbox": "bbox", "segm": "segmentation"}
_VOC_METRICS = {"11point": "11-point AP (VOC 2007)", "area": "area under the curve"}

Result = dict[str, Any]
"""A detection in COCO's result format."""
Array = NDArray[np.float64]


def build_evaluator(cfg: CfgNode, dataset_name: str) -> CocoEvaluator | VocEvaluator:
    """The evaluator of a registered set; without an OUTPUT_DIR it writes nothing; each of several sets has a folder."""
    if evaluator_kind(dataset_name) == "pascal_voc":
        return VocEvaluator(dataset_name)
    folder = Path(cfg.OUTPUT_DIR) / "inference" if cfg.OUTPUT_DIR else None
    if folder and len(cfg.DATASETS.TEST) > 1:
        folder /= dataset_name
    tasks = ("bbox", "segm") if cfg.MODEL.MASK_ON else ("bbox",)
    return CocoEvaluator(
        dataset_name, tasks, output_dir=folder, reference=cfg.TEST.REFERENCE_EVAL, max_dets=cfg.TEST.MAX_DETS
    )


class CocoEvaluator(DatasetEvaluator):
    """Evaluates by ``coco_metrics``; results do not depend on how the images were distributed over processes.

    Args:
        dataset_name: A registered set, in COCO's format or Detectron2's own.
        tasks: ``bbox``, ``segm`` or both.
        output_dir: The folder to write ``coco_instances_results.json`` to.
        reference: Compute with pycocotools instead of faster-coco-eval.
        max_dets: As in ``coco_metrics``.
    """

    results: list[Result]
    """After evaluation: all detections in COCO's result format."""
    oddities: dict[str, int]
    """After evaluation in the first process: what is odd about the detections."""

    def __init__(
        self,
        dataset_name: str,
        tasks: Sequence[str],
        *,
        output_dir: str | Path | None = None,
        reference: bool = False,
        max_dets: Sequence[int] = MAX_DETS,
    ) -> None:
        self._max_dets = max_dets
        self._dataset_name = dataset_name
        self._tasks = tasks
        self._output_dir = output_dir
        self._reference = reference
        self._ground_truth = ground_truth(dataset_name)
        self.reset()

    def reset(self) -> None:
        self._images: list[list[Result]] = []
        self.oddities = {}

    def process(self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]) -> None:
        for image, output in zip(inputs, outputs, strict=True):
            self._images.append(_detections(output["instances"], image["image_id"]))

    def evaluate(self) -> dict[str, dict[str, float]]:
        """``{task: metrics}``; ``{}`` in every process but the first, and for a set without annotations.

        Raises:
            InputError: a detection has a class that the set does not have, or as in ``coco_metrics``.
        """
        comm.synchronize()
        gathered = comm.gather(self._images, dst=0)
        if not comm.is_main_process():
            return {}
        count = sum(map(len, gathered))
        images = [rows for rows in itertools.chain(*gathered) if rows]
        images.sort(key=lambda rows: rows[0]["image_id"])
        # Only now: a set in COCO's format has its categories once it has been loaded.
        ids = [category["id"] for category in categories(self._dataset_name)]
        self.results = [self._with_class_id(row, ids) for row in itertools.chain(*images)]
        self.oddities = oddities(self.results, count)
        if self._output_dir is not None:
            write_text(Path(self._output_dir) / "coco_instances_results.json", json.dumps(self.results))
        most = Counter((row["image_id"], row["category_id"]) for row in self.results)
        if most and max(most.values()) > self._max_dets[-1]:
            _logger.warning(
                f"up to {max(most.values())} objects of a class were found in an image, of which the best "
                f"{self._max_dets[-1]} count: TEST.MAX_DETS (1, 10, {max(most.values())}) counts all"
            )
        metrics = {}
        package = "pycocotools" if self._reference else "faster-coco-eval"
        for task in self._tasks if "annotations" in self._ground_truth.dataset else ():
            numbers = coco_metrics(
                self._ground_truth, self.results, task, reference=self._reference, max_dets=self._max_dets
            )
            table = create_small_table({name: number for name, number in numbers.items() if "-" not in name})
            _logger.info(f"{task} AP of {self._dataset_name}, computed by {package} {version(package)}:\n{table}")
            objects = [a for a in self._ground_truth.dataset["annotations"] if not a.get("iscrowd")]
            masks = sum(task == "segm" and usable_mask(a.get("segmentation")) is not None for a in objects)
            if task == "segm" and masks < len(objects):
                _logger.info(f"segm over {masks:,} of {plural(len(objects), 'object')}: the others have no usable mask")
            metrics[task] = numbers
        return metrics

    def _with_class_id(self, result: Result, ids: Sequence[int]) -> Result:
        """The detection with the set's class id instead of the detector's class index."""
        number, classes = result["category_id"], len(ids)
        if number >= classes:
            raise InputError(
                f"a detection is of class {number} but {self._dataset_name} has the classes 0 to {classes - 1}: "
                f"give MODEL.ROI_HEADS.NUM_CLASSES {classes}"
            )
        return {**result, "category_id": ids[number]}


def _detections(instances: Instances, image_id: Any) -> list[Result]:
    """An image's detections in COCO's result format; masks on a GPU are encoded there, on a CPU by pycocotools."""
    if len(instances) == 0 or not instances.has("pred_masks") or instances.pred_masks.device.type == "cpu":
        return instances_to_coco_json(instances.to("cpu"), image_id)
    masks = run_lengths(instances.pred_masks)
    boxes = Instances(instances.image_size, **instances.get_fields())
    boxes.remove("pred_masks")
    rows = instances_to_coco_json(boxes.to("cpu"), image_id)
    return [row | {"segmentation": mask} for row, mask in zip(rows, masks, strict=True)]


def ground_truth(dataset_name: str) -> COCO:
    """A registered set's annotations, with the ids of ``categories``; VOC's difficult objects have ``ignore``.

    COCO's AP disregards it, in pycocotools and in faster-coco-eval.
    """
    metadata = MetadataCatalog.get(dataset_name)
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        if "json_file" in metadata.as_dict():
            # COCO(file) reads no byte order mark.
            coco = _indexed(COCO, json.loads(Path(PathManager.get_local_path(metadata.json_file)).read_bytes()))
            if images := left_out(dataset_name):
                coco = without_images(coco, images)
            # Those that ``match_classes`` added have no ground truth.
            added = [row for row in categories(dataset_name) if row["id"] not in coco.cats]
            coco.dataset["categories"] = [*coco.dataset.get("categories", []), *added]
            coco.cats |= {row["id"]: row for row in added}
            return coco
        dataset = convert_to_coco_dict(dataset_name)
        if "thing_dataset_id_to_contiguous_id" not in metadata.as_dict():  # then Detectron2 counts from 0
            for row in dataset.get("annotations", []):
                row["category_id"] += 1
            dataset["categories"] = categories(dataset_name)
        if (voc := annotated_set(dataset_name)) and voc.split:
            difficult = {_place(row) for row in voc.read()[0]["annotations"] if row["difficult"]}
            for row in dataset.get("annotations", []):
                row["ignore"] = int(_place(row) in difficult)
        return _indexed(COCO, dataset)


def _place(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Where an object is."""
    return row["image_id"], *(round(float(number), 1) for number in row["bbox"])


def without_images(truth: COCO, images: Container[Any]) -> COCO:
    """The same annotations without those of some images, by their ids."""
    rows = {
        "images": [row for row in truth.dataset["images"] if row["id"] not in images],
        "annotations": [row for row in truth.dataset.get("annotations", []) if row["image_id"] not in images],
    }
    return _indexed(COCO, {**truth.dataset, **{name: rows[name] for name in rows if name in truth.dataset}})


def coco_metrics(
    ground_truth: COCO,
    results: Iterable[Mapping[str, Any]],
    task: str,
    *,
    reference: bool = False,
    max_dets: Sequence[int] = MAX_DETS,
) -> dict[str, float]:
    """COCO's AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100, ARs, ARm, ARl and ``AP-<class name>``, each 0 to 100.

    A number is NaN if no ground truth of the class or size exists, and 0 if it does and nothing is found.

    Args:
        ground_truth: Ids of images and annotations may be anything, including 0; not changed.
        results: Detections in COCO's result format, with the class ids of ``ground_truth``; not changed.
        task: ``bbox``, or ``segm``, for which an object's size is its mask's area; it ignores objects without a usable
            mask as COCO ignores crowds, with the size of their boxes.
        reference: Compute with pycocotools instead of faster-coco-eval.
        max_dets: How many of the best detections of a class in an image count; increasing. AP is by the last one, and
            each has its AR: ``AR300`` for 300.

    Raises:
        InputError: an annotation has no area, which faster-coco-eval would treat as area 0.
    """
    # COCO's code takes annotation 0 for "no match", and faster-coco-eval reads image ids as integers: number afresh.
    image_ids = {theirs: ours for ours, theirs in enumerate(sorted(ground_truth.imgs))}
    annotations = [a for a in ground_truth.dataset["annotations"] if a["image_id"] in image_ids]
    if task == "segm":
        annotations = [_with_mask(a) for a in annotations]
    for annotation in annotations:
        if "area" not in annotation:
            raise InputError(f"annotation {annotation['id']} has no area: add it, COCO's AP is not defined without")
    dataset = {
        "images": [{**ground_truth.imgs[theirs], "id": ours} for theirs, ours in image_ids.items()],
        "categories": sorted(ground_truth.dataset["categories"], key=lambda category: category["id"]),
        "annotations": [
            {
                **annotation,
                "iscrowd": int(annotation.get("iscrowd", 0)),  # JSON may say false
                "id": number,
                "image_id": image_ids[annotation["image_id"]],
            }
            for number, annotation in enumerate(annotations, 1)
        ],
    }
    # Only the task's region: a box beside the mask would decide which size the detection counts as.
    keys = ("category_id", "score", _REGIONS[task])
    rows = [{**{key: r[key] for key in keys}, "image_id": image_ids[r["image_id"]]} for r in results]

    api, evaluation = COCO, COCOeval
    if not reference:
        api, evaluation = faster_coco_eval.COCO, faster_coco_eval.COCOeval_faster
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        truth = _indexed(api, dataset)
        # pycocotools cannot load an empty list.
        detections = truth.loadRes(rows) if rows else _indexed(api, {**dataset, "annotations": []})
        evaluator = evaluation(truth, detections, task)
        evaluator.params.maxDets = list(max_dets)
        evaluator.evaluate()
        evaluator.accumulate()

    # precision: (IoU thresholds, recall thresholds, classes, sizes, most detections); recall: without the second.
    precision, recall = evaluator.eval["precision"], evaluator.eval["recall"]
    metrics = {"AP": precision[..., 0, -1], "AP50": precision[0, ..., 0, -1], "AP75": precision[5, ..., 0, -1]}
    metrics |= {f"AP{size}": precision[..., row, -1] for row, size in enumerate("sml", 1)}
    metrics |= {f"AR{most}": recall[..., 0, column] for column, most in enumerate(max_dets)}
    metrics |= {f"AR{size}": recall[..., row, -1] for row, size in enumerate("sml", 1)}
    metrics |= {f"AP-{c['name']}": precision[:, :, row, 0, -1] for row, c in enumerate(dataset["categories"])}
    return {name: _percent(values) for name, values in metrics.items()}


def _with_mask(annotation: Result) -> Result:
    """The annotation itself if it has a mask; otherwise a crowd that fills its box: neither found nor missed."""
    if (mask := usable_mask(annotation.get("segmentation"))) is not None:
        return annotation if mask is annotation["segmentation"] else {**annotation, "segmentation": mask}
    return {**annotation, "iscrowd": 1, "segmentation": box_polygon(annotation["bbox"])}


def _indexed(api: Any, dataset: dict[str, Any]) -> Any:
    coco = api()
    coco.dataset = dataset
    coco.createIndex()
    return coco


def _percent(values: Array) -> float:
    defined = values[values > -1]  # -1 is COCO's mark of what has no ground truth
    return float(np.mean(defined) * 100) if defined.size else math.nan


class VocEvaluator(PascalVOCDetectionEvaluator):
    """Detectron2's AP, AP50 and AP75 by the metric of the set's year and by the other one, and each class's AP."""

    results: list[Result]
    """All detections of this process in COCO's result format, classes from 1."""
    oddities: dict[str, int]
    """As a CocoEvaluator's."""

    def __init__(self, dataset_name: str) -> None:
        super().__init__(dataset_name)
        self._leaves_out = MetadataCatalog.get(dataset_name).get(SHOWN_CLASSES, False)
        self.reset()

    def reset(self) -> None:
        self.results = []
        self.oddities = {}

    def process(self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]) -> None:
        for image, output in zip(inputs, outputs, strict=True):
            self.results += _voc_results(output["instances"], image["image_id"])

    def evaluate(self) -> dict[str, dict[str, float]]:
        """``{"bbox": metrics, other: metrics}``; ``{}`` in every process but the first.

        ``bbox`` is by 11 points for VOC 2007, with ``bbox-area`` as the other, and by area for later years, with
        ``bbox-11point``. ``AP-<class name>`` is the mean over the ten IoU thresholds; all are 0 to 100. For a class
        without ground truth Detectron2 has 0 by 11 points, and by area NaN, or 0 if nothing is detected either. For
        sets with ``SHOWN_CLASSES`` the means leave such a class out, and its AP is NaN.
        """
        gathered = comm.gather(self.results, dst=0)
        if not comm.is_main_process():
            return {}
        names = voc_names(Path(self._image_set_path), Path(self._anno_file_template).parent)
        order = {image: place for place, image in enumerate(names) if image not in left_out(self._dataset_name)}
        objects = {image: self._objects(image) for image in order}
        found = defaultdict[int, list[Result]](list)
        # Which of two equal scores counts first depends on the order.
        rows = sorted(itertools.chain(*gathered), key=lambda row: order[row["image_id"]])
        for row in rows:
            found[row["category_id"]].append(row)
        self.oddities = oddities(rows, len(order))
        aps = []
        for number, name in enumerate(self._class_names, 1):
            shown = {image: rows[name] for image, rows in objects.items() if name in rows}
            aps.append(_class_aps(found[number], shown))
            if self._leaves_out and not any((rows[:, 4] == 0).any() for rows in shown.values()):
                aps[-1] = [(math.nan, math.nan)] * len(aps[-1])

        metrics = {}
        for column, (metric, title) in enumerate(_VOC_METRICS.items()):
            task = "bbox" if self._is_2007 == (metric == "11point") else f"bbox-{metric}"
            metrics[task] = self._summary(np.array(aps)[..., column])
            table = create_small_table({key: metrics[task][key] for key in ("AP", "AP50", "AP75")})
            self._logger.info(f"{task} of {self._dataset_name}, {title}:\n{table}")
        return dict(sorted(metrics.items()))

    def _objects(self, image: str) -> dict[str, Array]:
        """The image's objects by class: rows of (x1, y1, x2, y2, 1 if difficult), in pixels from 1."""
        with PathManager.open(self._anno_file_template.format(image), "rb") as file:  # XML says its encoding itself
            tree = ElementTree.parse(file)
        objects: dict[str, list[list[float]]] = {}
        for item in tree.iter("object"):
            row = [float(item.findtext(f"bndbox/{side}", "")) for side in ("xmin", "ymin", "xmax", "ymax")]
            objects.setdefault(text_in(item, "name"), []).append([*row, float(text_in(item, "difficult", "0"))])
        return {name: np.array(rows) for name, rows in objects.items()}

    def _summary(self, aps: Array) -> dict[str, float]:
        """``aps``: (classes, IoU thresholds), 0 to 100."""
        counted = aps[~np.isnan(aps).all(1)] if self._leaves_out else aps
        means = [np.mean(column) for column in counted.T]
        metrics = {"AP": np.mean(means), "AP50": means[0], "AP75": means[5]}
        metrics |= {f"AP-{name}": np.mean(row) for name, row in zip(self._class_names, aps, strict=True)}
        return {name: float(value) for name, value in metrics.items()}


def _voc_results(instances: Instances, image_id: str) -> list[Result]:
    """Detections in COCO's result format; in float64, so that the float32 boxes are preserved exactly."""
    corners = instances.pred_boxes.tensor.cpu().double()
    boxes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1).tolist()
    scores, classes = instances.scores.tolist(), instances.pred_classes.tolist()
    return [
        {"image_id": image_id, "category_id": number + 1, "bbox": box, "score": score}
        for box, score, number in zip(boxes, scores, classes, strict=True)
    ]


def _corners(result: Result) -> list[float]:
    """x1, y1, x2, y2 in pixels from 1, rounded to the decimal that Detectron2 writes, in float32 as there."""
    x, y, width, height = result["bbox"]
    return [float(f"{side:.1f}") for side in (np.float32(x) + 1, np.float32(y) + 1, x + width, y + height)]


def _class_aps(results: Sequence[Result], objects: Mapping[str, Array]) -> list[tuple[float, float]]:
    """One class's AP by 11 points and by area, 0 to 100, at the IoU thresholds 0.5, 0.55, ..., 0.95.

    Args:
        results: All of one image are consecutive.
        objects: By image, rows of (x1, y1, x2, y2, difficult).
    """
    first = dict(zip(objects, np.cumsum([0, *map(len, objects.values())]).tolist(), strict=False))
    difficult = np.concatenate([np.empty(0), *(rows[:, 4] for rows in objects.values())]) > 0
    overlaps, matches = [np.empty(0)], [np.empty(0, int)]  # each detection's best object
    for image, group in itertools.groupby(results, key=lambda row: row["image_id"]):
        boxes = np.array([_corners(row) for row in group])
        overlap = _overlaps(boxes, objects[image]) if image in objects else np.full((len(boxes), 1), -np.inf)
        overlaps.append(overlap.max(axis=1))
        matches.append(overlap.argmax(axis=1) + first.get(image, 0))
    # Detectron2's sort: a stable one would order equal scores differently, and change the AP.
    order = np.argsort(-np.array([float(f"{row['score']:.3f}") for row in results]))
    overlap, match = np.concatenate(overlaps)[order], np.concatenate(matches)[order]

    aps = []
    for threshold in range(50, 100, 5):
        hit = np.flatnonzero(overlap > threshold / 100.0)
        counted = hit[~difficult[match[hit]]]  # a hit on a difficult object is neither right nor wrong
        right, wrong = np.zeros(len(overlap)), np.ones(len(overlap))
        right[counted[np.unique(match[counted], return_index=True)[1]]] = 1  # an object's first hit
        wrong[hit] = 0
        wrong[counted] = 1 - right[counted]
        aps.append(_average_precisions(np.cumsum(right), np.cumsum(wrong), int(np.count_nonzero(~difficult))))
    return aps


def _overlaps(boxes: Array, objects: Array) -> Array:
    """IoU of (n, 4) boxes with (m, 4 or more) objects, as (n, m); the last pixel of a box belongs to it."""
    boxes = boxes[:, None]
    sides = np.minimum(boxes[..., 2:4], objects[:, 2:4]) - np.maximum(boxes[..., :2], objects[:, :2]) + 1
    shared = np.maximum(sides, 0).prod(axis=-1)
    box_area, object_area = ((rows[..., 2:4] - rows[..., :2] + 1).prod(axis=-1) for rows in (boxes, objects))
    return shared / (box_area + object_area - shared)


def _average_precisions(right: Array, wrong: Array, objects: int) -> tuple[float, float]:
    """11-point AP and area under the precision envelope, 0 to 100, from running counts of right and wrong ones."""
    with np.errstate(invalid="ignore"):  # no object: 0 / 0
        recall = np.concatenate([[0.0], right / np.float64(objects), [1.0]])
    precision = np.concatenate([[0.0], right / np.maximum(right + wrong, np.finfo(float).eps), [0.0]])
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    points = envelope[1:][np.searchsorted(recall[1:-1], np.arange(0.0, 1.1, 0.1))]
    steps = np.flatnonzero(recall[1:] != recall[:-1])
    area = np.sum((recall[steps + 1] - recall[steps]) * envelope[steps + 1])
    return float(np.cumsum(points / 11.0)[-1] * 100), float(area * 100)
