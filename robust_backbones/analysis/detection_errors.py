"""Types of detection errors: AP50 lost to each of TIDE's error types (Bolya et al. 2020, arXiv 2008.08115)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask

from robust_backbones.data.annotations_values import run_lengths
from robust_backbones.errors import InputError

ERRORS = ("classification", "localisation", "background", "missed", "both", "duplicate")
"""TIDE's Cls, Loc, Bkg, Miss, Both (wrong class and wrong localisation) and Dupe."""
ORACLES = (*ERRORS, "false positives", "false negatives")
"""What an oracle fixes: one type of error, all wrong detections, or all missed objects."""
FOREGROUND_IOU = 0.5
BACKGROUND_IOU = 0.1
MOST_DETECTIONS = 100
"""Number of detections per image and class that count, those with the best scores: COCO's."""

_REGIONS = {"bbox": "bbox", "segm": "segmentation"}
_KINDS = (*ERRORS, "right", "ignored")

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class DetectionErrors:
    """A detector's errors on one test set, as plain numbers that survive ``asdict`` and JSON."""

    ap50: float
    """COCO's, 0 to 100."""
    delta_ap: dict[str, float]
    """By ORACLES, the AP50 points that this fix alone would give: they need not add up to ``100 - ap50``."""
    counts: dict[str, int]
    """By ORACLES, the number of wrong detections; for ``missed`` and ``false negatives``, of objects."""


def detection_errors(
    ground_truth: Any, detections: Iterable[Mapping[str, Any]], task: str, *, most: int = MOST_DETECTIONS
) -> DetectionErrors:
    """The errors of a detector, and what each type costs (TIDE, sections 2.2 to 2.4).

    Detections are matched with objects as in COCO's evaluation at IoU 0.5. An unmatched one is the first of these that
    applies, in the order of the authors' toolbox; IoU is its highest with any object of that class:

    - ``localisation``: 0.1 <= IoU < 0.5 with its own class. The oracle moves it onto the object.
    - ``classification``: IoU >= 0.5 with another class. The oracle gives it the object's class.
    - ``duplicate``: IoU >= 0.5 with its own class, but another detection matches the object. The oracle removes it.
    - ``background``: IoU < 0.1 with every class. The oracle removes it.
    - ``both``: 0.1 <= IoU < 0.5 with another class. The oracle removes it.

    ``missed`` is an object without a match that no localisation or classification error refers to; its oracle reduces
    the number of objects. If several errors refer to one object, an oracle fixes the one with the best score and
    removes the others; it removes all of them if the object has a match.

    Crowds, and objects with a true ``ignore`` (VOC's difficult ones), need not be found, and detections that match them
    are not errors. pycocotools itself disregards ``ignore``: ``ap50`` is its AP50 if only crowds have it. A class
    without an object to find after an oracle has AP 100 if nothing is wrongly detected as it, else 0.

    Args:
        ground_truth: In COCO's format, as a dict or a COCO API.
        detections: In COCO's result format, with the ids of ``ground_truth``.
        task: ``bbox`` or ``segm``.
        most: how many detections of a class in an image count, the best.

    Raises:
        InputError: the task is neither; a detection or annotation does not fit; there is no object to find.
    """
    if task not in _REGIONS:
        raise InputError(f"unknown task {task!r}: choose one of {', '.join(_REGIONS)}")
    dataset = getattr(ground_truth, "dataset", ground_truth)
    classes = {theirs: ours for ours, theirs in enumerate(sorted(c["id"] for c in dataset["categories"]))}
    images = {image["id"]: _Image(image, [], []) for image in sorted(dataset["images"], key=lambda image: image["id"])}
    for name, rows in (("annotation", dataset["annotations"]), ("detection", detections)):
        for row in rows:
            if row["image_id"] not in images or row["category_id"] not in classes:
                if name == "annotation":
                    continue  # COCO's evaluation passes over it, too
                raise InputError(
                    f"a detection is of image {row['image_id']} and class {row['category_id']}, which the ground truth "
                    "does not have: give the detections of this test set, with its ids"
                )
            if _REGIONS[task] not in row:
                raise InputError(f"an {name} has no {_REGIONS[task]!r}: give another task than {task}")
            image = images[row["image_id"]]
            (image.objects if name == "annotation" else image.detections).append(row)

    found, objects = _judge_all(images.values(), classes, _REGIONS[task], most)
    if not objects.wanted.any():
        raise InputError("the ground truth has no object to find: without one, AP is not defined")
    ap50 = _ap50(found, objects)
    wrong = {name: found.kinds == place for place, name in enumerate(ERRORS)}
    wrong["missed"] = objects.missed
    wrong["false positives"] = found.kinds < len(ERRORS)
    wrong["false negatives"] = objects.wanted & ~objects.matched
    return DetectionErrors(
        ap50,
        {name: _ap50(found, objects, name) - ap50 for name in ORACLES},
        {name: int(np.count_nonzero(wrong[name])) for name in ORACLES},
    )


def average_precision(right: Bools, objects: int) -> float:
    """COCO's AP of one class at one IoU threshold: the envelope of precision at 101 recalls, 0 to 1.

    Args:
        right: shape (detections,), best score first: whether each is correct.
        objects: Number of objects to find. For none, AP is 1 without and 0 with detections.
    """
    if objects == 0:
        return float(right.size == 0)
    hits = np.cumsum(right, dtype=np.float64)
    precision = hits / (np.arange(1, right.size + 1) + np.spacing(1))
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    places = np.searchsorted(hits / objects, np.linspace(0, 1, 101))
    return float(np.append(envelope, 0.0)[places].mean())  # no precision at a recall that is not reached


@dataclass(frozen=True)
class _Image:
    info: Mapping[str, Any]
    objects: list[Mapping[str, Any]]
    detections: list[Mapping[str, Any]]


@dataclass(frozen=True)
class _Detections:
    """The detections of all images, best score first; each array is (detections,)."""

    classes: Ints
    kinds: Ints
    """Indices into _KINDS."""
    targets: Ints
    """For localisation and classification errors, the object that the oracle moves them to; else -1."""


@dataclass(frozen=True)
class _Objects:
    """The objects of all images; each array is (objects,)."""

    classes: Ints
    wanted: Bools
    """Whether neither crowd nor ignored."""
    matched: Bools
    missed: Bools


def _judge_all(
    images: Iterable[_Image], classes: Mapping[Any, int], region: str, most: int
) -> tuple[_Detections, _Objects]:
    scores, found, objects, first = [np.empty(0)], [], [], 0
    for image in images:
        object_classes = np.array([classes[row["category_id"]] for row in image.objects], int)
        crowd = np.array([bool(row.get("iscrowd")) for row in image.objects], bool)
        wanted = ~crowd & ~np.array([bool(row.get("ignore")) for row in image.objects], bool)
        best, best_scores, best_classes = _best_detections(image.detections, classes, most)
        overlaps = _overlaps(best, image.objects, region, image.info)
        same_class = best_classes[:, None] == object_classes
        matches = _match(np.where(same_class, overlaps, -1), wanted, crowd)
        kinds, targets = _kinds(overlaps, same_class, matches, wanted, crowd)

        matched = np.isin(np.arange(len(crowd)), matches)
        missed = wanted & ~matched & ~np.isin(np.arange(len(crowd)), targets)
        scores.append(best_scores)
        found.append((best_classes, kinds, np.where(targets < 0, -1, targets + first)))
        objects.append((object_classes, wanted, matched, missed))
        first += len(crowd)
    order = np.argsort(-np.concatenate(scores), kind="stable")  # equal scores: COCO's order is that of the image ids
    nothing = np.empty(0, int)
    of_detections = [np.concatenate([nothing, *column])[order] for column in zip(*found, strict=True)]
    return _Detections(*of_detections), _Objects(*(np.concatenate(column) for column in zip(*objects, strict=True)))


def _best_detections(
    rows: Sequence[Mapping[str, Any]], classes: Mapping[Any, int], most: int
) -> tuple[list[Mapping[str, Any]], Floats, Ints]:
    """An image's detections that count, best score first, with their scores and classes."""
    scores = np.array([row["score"] for row in rows], float)
    order = np.argsort(-scores, kind="stable")
    own = np.array([classes[row["category_id"]] for row in rows], int)[order]
    if len(rows) > most:
        kept = np.sort(np.concatenate([np.flatnonzero(own == c)[:most] for c in np.unique(own)]))
        order, own = order[kept], own[kept]
    return [rows[place] for place in order], scores[order], own


def _overlaps(
    detections: Sequence[Mapping[str, Any]], objects: Sequence[Mapping[str, Any]], region: str, image: Mapping[str, Any]
) -> Floats:
    """IoU as (detections, objects); for a crowd, the share of the detection inside it."""
    if not detections or not objects:
        return np.zeros((len(detections), len(objects)))
    sides = [[row[region] for row in rows] for rows in (detections, objects)]
    if region == "segmentation":
        sides = [[run_lengths(one, image["width"], image["height"]) for one in side] for side in sides]
    return np.asarray(mask.iou(*sides, [int(bool(row.get("iscrowd"))) for row in objects]))


def _match(overlaps: Floats, wanted: Bools, crowd: Bools) -> Ints:
    """COCOeval's greedy matching in an image: each detection's object, or -1.

    Args:
        overlaps: shape (detections, objects), best score first; -1 if the classes differ.
        wanted, crowd: shape (objects,).
    """
    matches = np.full(len(overlaps), -1)
    free = np.ones(len(crowd), bool)
    for row in np.flatnonzero((overlaps >= FOREGROUND_IOU).any(axis=1)):
        near = free & (overlaps[row] >= FOREGROUND_IOU)
        # What need not be found is for those that match nothing else; of equal overlaps COCOeval takes the last.
        for places in (np.flatnonzero(near & wanted), np.flatnonzero(near & ~wanted)):
            if places.size:
                matches[row] = places[::-1][overlaps[row, places[::-1]].argmax()]
                free[matches[row]] = crowd[matches[row]]
                break
    return matches


def _kinds(overlaps: Floats, same_class: Bools, matches: Ints, wanted: Bools, crowd: Bools) -> tuple[Ints, Ints]:
    """Each detection's index into _KINDS, and the object of localisation and classification errors; else -1."""
    own = np.where(same_class & ~crowd, overlaps, -1)
    other = np.where(~same_class & ~crowd, overlaps, -1)
    own_best, other_best = (side.max(axis=1, initial=-1) for side in (own, other))
    rules = {
        "right": (matches >= 0) & np.append(wanted, False)[matches],
        "ignored": matches >= 0,
        "localisation": (own_best >= BACKGROUND_IOU) & (own_best < FOREGROUND_IOU),
        "classification": other_best >= FOREGROUND_IOU,
        "duplicate": own_best >= FOREGROUND_IOU,
        "background": np.maximum(own_best, other_best) < BACKGROUND_IOU,
    }
    kinds = np.select(list(rules.values()), [_KINDS.index(name) for name in rules], _KINDS.index("both"))
    targets = np.full(len(kinds), -1)
    for name, side in (("localisation", own), ("classification", other)):
        rows = np.flatnonzero(kinds == _KINDS.index(name))
        if rows.size:
            targets[rows] = side[rows].argmax(axis=1)
    return kinds, targets


def _ap50(found: _Detections, objects: _Objects, oracle: str = "") -> float:
    """AP50, 0 to 100, with or without one of ORACLES."""
    classes, wanted = found.classes.copy(), objects.wanted
    right, ignored = (found.kinds == _KINDS.index(kind) for kind in ("right", "ignored"))
    removed = np.zeros(len(classes), bool)
    if oracle == "missed":
        wanted = wanted & ~objects.missed
    elif oracle == "false negatives":
        wanted = wanted & objects.matched
    elif oracle == "false positives":
        removed = ~right
    elif oracle:
        removed = found.kinds == _KINDS.index(oracle)
        rows = np.flatnonzero(removed & (found.targets >= 0))
        rows = rows[(objects.wanted & ~objects.matched)[found.targets[rows]]]
        repaired = rows[np.unique(found.targets[rows], return_index=True)[1]]  # of an object, the best score
        classes[repaired] = objects.classes[found.targets[repaired]]
        right[repaired], removed[repaired] = True, False

    kept = ~ignored & ~removed
    aps = [
        average_precision(right[kept & (classes == c)], int(np.sum(wanted & (objects.classes == c))))
        for c in np.unique(objects.classes[objects.wanted])
    ]
    return 100 * float(np.mean(aps))
