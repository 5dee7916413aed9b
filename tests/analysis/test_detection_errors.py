"""Where a detector's AP goes: by hand, against pycocotools on repaired detections, and against the authors' toolbox."""

from __future__ import annotations

import contextlib
import copy
import csv
import io
import json
import math
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from robust_backbones.analysis.detection_errors import ERRORS, ORACLES, DetectionErrors, detection_errors
from robust_backbones.analysis.error_figures import error_figure, error_table
from robust_backbones.errors import InputError

Truth = dict[str, Any]
Rows = list[dict[str, Any]]
NOTHING = dict.fromkeys(ORACLES, 0)
CAT, DOG = 1, 2


def truth(rows: Rows, *, images: int = 1, classes: tuple[int, ...] = (CAT, DOG)) -> Truth:
    return {
        "images": [{"id": number, "width": 1000, "height": 100} for number in range(images)],
        "categories": [{"id": number, "name": f"class {number}"} for number in classes],
        "annotations": [{"id": n, "iscrowd": 0, "area": 1.0, **row} for n, row in enumerate(rows, 1)],
    }


def at(place: float, category: int, score: float | None = None, *, shift: float = 0, **more: Any) -> dict[str, Any]:
    """A box of 40 px at one of the far-apart places; a shift of 5 px gives IoU 0.78, of 20 px 0.33."""
    row = {"image_id": 0, "category_id": category, "bbox": [100 * place + shift, 10, 40, 40], **more}
    return row if score is None else {**row, "score": score}


def test_each_error_once_by_hand() -> None:
    cats = [at(0, CAT), at(1, CAT), at(2, CAT), at(3, CAT)]
    dogs = [at(4, DOG), at(5, DOG), at(6, DOG)]
    detections = [
        at(0, CAT, 0.9),
        at(0, CAT, 0.85, shift=5),  # duplicate
        at(5, CAT, 0.8),  # classification
        at(8, CAT, 0.7),  # background
        at(1, CAT, 0.6, shift=20),  # localisation
        at(3, CAT, 0.55),
        at(4, DOG, 0.95),
        at(2, DOG, 0.5, shift=20),  # both; the cat at 2 is missed
        at(6, DOG, 0.4),
    ]
    errors = detection_errors(truth(cats + dogs), detections, "bbox")
    assert errors.counts == {**dict.fromkeys(ERRORS, 1), "false positives": 5, "false negatives": 3}
    # Precisions summed over COCO's 101 recalls. Cats: 1 to recall 1/4, 2/6 to 1/2. Dogs: 1 to 1/3, 2/3 to 2/3.
    cat, dog = 26 + 25 * 2 / 6, 34 + 33 * 2 / 3
    repaired = {
        "classification": (26 + 25 * 2 / 5, 67 + 34 * 3 / 4),
        "localisation": (26 + 50 * 3 / 6, dog),
        "background": (26 + 25 * 2 / 5, dog),
        "missed": (34 + 33 * 2 / 6, dog),  # of three cats
        "both": (cat, 67),
        "duplicate": (26 + 25 * 2 / 5, dog),
        "false positives": (51, 67),
        "false negatives": (51 + 50 * 2 / 6, 51 + 50 * 2 / 3),
    }
    assert errors.ap50 == pytest.approx(100 * (cat + dog) / 202, abs=1e-9)
    for name, (cat_after, dog_after) in repaired.items():
        gain = 100 * (cat_after - cat + dog_after - dog) / 202
        assert errors.delta_ap[name] == pytest.approx(gain, abs=1e-9), name


def test_a_perfect_detector_has_no_errors() -> None:
    places = [(place, CAT if place % 3 else DOG) for place in range(9)]
    detections = [at(place, category, 1 - place / 10) for place, category in places]
    errors = detection_errors(truth([at(*place) for place in places]), detections, "bbox")
    assert errors.ap50 == pytest.approx(100, abs=1e-9)
    assert errors.counts == NOTHING
    assert errors.delta_ap == pytest.approx(NOTHING, abs=1e-9)


def test_without_detections_everything_is_missed() -> None:
    objects = [at(0, CAT), at(1, CAT), at(2, DOG)]
    errors = detection_errors(truth(objects), [], "bbox")
    assert errors.ap50 == 0
    assert errors.counts == {**NOTHING, "missed": 3, "false negatives": 3}
    assert errors.delta_ap == {**NOTHING, "missed": 100, "false negatives": 100}

    # Now all is found but the dog: half of the mean AP.
    errors = detection_errors(truth(objects), [at(0, CAT, 0.9), at(1, CAT, 0.8)], "bbox")
    assert errors.delta_ap == pytest.approx({**NOTHING, "missed": 50, "false negatives": 50}, abs=1e-9)
    # What is taken for a dog is no dog: without any to find, precision is 0 still.
    errors = detection_errors(truth(objects), [at(0, CAT, 0.9), at(1, CAT, 0.8), at(7, DOG, 0.7)], "bbox")
    assert errors.delta_ap == pytest.approx(NOTHING, abs=1e-9)
    assert errors.counts["missed"] == errors.counts["background"] == 1


def test_the_best_of_several_errors_at_one_object_is_repaired() -> None:
    """Each oracle is alone: a better error of another type does not keep it from its repair."""
    objects = [at(0, CAT), at(1, DOG)]
    found = at(1, DOG, 0.9)
    misplaced = [at(0, CAT, 0.5, shift=20), at(0, CAT, 0.6, shift=-20)]
    misnamed = [at(0, DOG, 0.8, shift=1), at(0, DOG, 0.7, shift=2)]
    errors = detection_errors(truth(objects), [found, *misplaced, *misnamed], "bbox")
    assert errors.counts == {
        **NOTHING,
        "localisation": 2,
        "classification": 2,
        "false positives": 4,
        "false negatives": 1,
    }
    assert errors.ap50 == pytest.approx(50, abs=1e-9)
    # The cat is right at once: the wrong detection of lower score would leave precision 1/2.
    assert errors.delta_ap["localisation"] == pytest.approx(50, abs=1e-9)
    # Classified as a cat, the better dog stands before both of the misplaced ones.
    assert errors.delta_ap["classification"] == pytest.approx(50, abs=1e-9)


def test_an_object_that_has_a_match_is_not_repaired_again() -> None:
    objects = [at(0, CAT), at(1, CAT), at(2, DOG)]
    rows = [at(0, CAT, 0.9), at(0, CAT, 0.8, shift=20), at(1, CAT, 0.7), at(2, DOG, 0.6), at(2, CAT, 0.75)]
    errors = detection_errors(truth(objects), rows, "bbox")
    assert errors.counts == {**NOTHING, "localisation": 1, "classification": 1, "false positives": 2}
    # Removed: the second cat comes at precision 2/3, not 2/4.
    gain = 100 * 50 * (2 / 3 - 2 / 4) / 101 / 2
    expected = {"localisation": gain, "classification": gain, "false positives": 100 * 50 * (1 / 2) / 101 / 2}
    assert errors.delta_ap == pytest.approx({**NOTHING, **expected}, abs=1e-9)


def test_what_matches_crowds_and_ignored_objects_is_no_error() -> None:
    crowd = {**at(1, CAT, iscrowd=1), "bbox": [100, 0, 300, 100]}
    rows = [at(0, CAT), crowd, at(5, CAT, ignore=1), at(7, DOG), at(9, 3, iscrowd=1)]
    objects = truth(rows, classes=(CAT, DOG, 3))  # of the third class, there is nothing to find: it has no AP
    right = [at(0, CAT, 0.5), at(7, DOG, 0.5)]
    unjudged = [at(1, CAT, 0.9), at(2, CAT, 0.9), at(3, CAT, 0.9), at(5, CAT, 0.9)]
    errors = detection_errors(objects, right + unjudged, "bbox")
    assert errors.ap50 == pytest.approx(100, abs=1e-9)
    assert errors.counts == NOTHING
    assert errors.delta_ap == pytest.approx(NOTHING, abs=1e-9)

    # A crowd is no object of its class to a dog, and an ignored object has one match, as in COCO's evaluation.
    wrong = [at(2, DOG, 0.9), at(5, CAT, 0.8, shift=5), at(5, DOG, 0.7, shift=20), at(5, DOG, 0.6)]
    errors = detection_errors(objects, right + unjudged + wrong, "bbox")
    once = {"background": 1, "duplicate": 1, "both": 1, "classification": 1, "false positives": 4}
    assert errors.counts == {**NOTHING, **once}
    assert errors.delta_ap["false positives"] == pytest.approx(100 - errors.ap50, abs=1e-9)
    assert errors.delta_ap["duplicate"] == pytest.approx(25, abs=1e-9)


def test_boundaries_of_overlap() -> None:
    """IoU 0.5 is foreground, IoU 0.1 is not background."""
    objects = truth([{**at(0, CAT), "bbox": [0, 0, 10, 10]}], images=1)

    def kind(box: list[float], category: int) -> str:
        rows = [{**at(0, category, 0.5), "bbox": box}]
        counts = detection_errors(objects, rows, "bbox").counts
        return next((name for name in ERRORS if counts[name] and name != "missed"), "right")

    half, less = [0, 0, 5, 10], [0, 0, 4.999, 10]
    tenth, little = [0, 0, 1, 10], [0, 0, 0.999, 10]
    assert [kind(box, CAT) for box in (half, less, tenth, little)] == [
        "right",
        "localisation",
        "localisation",
        "background",
    ]
    assert [kind(box, DOG) for box in (half, less, tenth, little)] == ["classification", "both", "both", "background"]


def evaluated(ground_truth: Truth, detections: Rows, task: str = "bbox", most: int = 100) -> COCOeval:
    """pycocotools at IoU 0.5, taught to heed ``ignore``."""

    class Heeding(COCOeval):  # type: ignore[misc]
        def _prepare(self) -> None:
            super()._prepare()
            for objects in self._gts.values():
                for row in objects:
                    row["ignore"] = int(row["iscrowd"] or row["difficult"])

    dataset = copy.deepcopy(ground_truth)
    for row in dataset["annotations"]:
        row["difficult"] = row.get("ignore", 0)
    rows = copy.deepcopy(detections)
    if task == "segm":
        for row in rows:
            row.pop("bbox", None)
    with contextlib.redirect_stdout(io.StringIO()):
        api, empty = COCO(), COCO()
        api.dataset, empty.dataset = dataset, {**dataset, "annotations": []}
        api.createIndex()
        empty.createIndex()
        evaluator = Heeding(api, api.loadRes(rows) if rows else empty, task)
        evaluator.params.iouThrs = np.array([0.5])
        evaluator.params.areaRng, evaluator.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluator.params.maxDets = [most]
        evaluator.evaluate()
        evaluator.accumulate()
    return evaluator


def coco_aps(evaluator: COCOeval) -> list[float]:
    """AP50 of each class, 0-100; NaN where there is nothing to find."""
    precision = evaluator.eval["precision"][0, :, :, 0, 0]
    return [100 * column.mean() if (column > -1).all() else math.nan for column in precision.T]


def coco_ap50(ground_truth: Truth, detections: Rows, task: str = "bbox", most: int = 100) -> float:
    return float(np.nanmean(coco_aps(evaluated(ground_truth, detections, task, most))))


# Few places, sizes and scores: overlaps and scores are often equal.
BOXES = st.tuples(*[st.integers(0, 6)] * 2, *[st.integers(2, 6)] * 2).map(list)
PLACED = st.fixed_dictionaries(
    {"image_id": st.integers(0, 2), "category_id": st.integers(1, 3), "bbox": BOXES},
)
OBJECTS = st.tuples(PLACED, st.sampled_from(("plain", "plain", "iscrowd", "ignore")))
DETECTIONS = st.tuples(PLACED, st.integers(1, 4))


@settings(max_examples=80, deadline=None)
@given(st.lists(OBJECTS, max_size=14), st.lists(DETECTIONS, max_size=30), st.sampled_from((1, 2, 100)))
def test_ap50_is_that_of_pycocotools(placed: list[Any], scored: list[Any], most: int) -> None:
    objects = [{**row, flag: 1} for row, flag in placed] + [
        {"image_id": 1, "category_id": 2, "bbox": [30, 30, 5, 5]},  # something to find
    ]
    detections = [{**row, "score": score / 4} for row, score in scored]
    ground_truth = truth(objects, images=4, classes=(3, 1, 2))
    before = copy.deepcopy((ground_truth, detections))
    errors = detection_errors(ground_truth, detections, "bbox", most=most)
    assert errors.ap50 == pytest.approx(coco_ap50(ground_truth, detections, most=most), abs=1e-9)
    assert min(errors.delta_ap.values()) >= -1e-9  # no oracle harms
    assert errors.counts["false positives"] == sum(errors.counts[name] for name in ERRORS) - errors.counts["missed"]
    assert (ground_truth, detections) == before


def test_of_equal_overlaps_the_last_object_is_matched() -> None:
    """As in COCOeval: then the other object is free for the second detection, or is not."""
    left, right = ({"image_id": 0, "category_id": CAT, "bbox": [x, 0, 10, 10]} for x in (4, 8))
    detections = [{**left, "bbox": [x, 0, 10, 10], "score": score} for x, score in ((6, 0.9), (2, 0.8))]
    for objects, expected in (([left, right], 100), ([right, left], 100 * 51 / 101)):
        assert detection_errors(truth(objects), detections, "bbox").ap50 == pytest.approx(expected, abs=1e-9)
        assert coco_ap50(truth(objects), detections) == pytest.approx(expected, abs=1e-9)


def scene(seed: int, *, special: bool = True) -> tuple[Truth, Rows]:
    """Three images of jumbled objects of three classes, each found once for sure, and detections near and far.

    Args:
        special: with crowds and ignored objects.
    """
    rng = np.random.default_rng(seed)
    objects: Rows = []
    detections: Rows = []
    for category in (1, 2, 3):
        bbox = [200.0 + 50 * category, 0.0, 20.0, 20.0]
        objects.append({"image_id": 0, "category_id": category, "bbox": bbox})
        detections.append({**objects[-1], "score": rng.uniform()})
    for image in range(3):
        here: Rows = []
        for _ in range(rng.integers(7)):
            box = [*rng.uniform(0, 50, 2), *rng.uniform(8, 24, 2)]
            here.append({"image_id": image, "category_id": int(rng.integers(1, 4)), "bbox": box})
            if special and rng.uniform() < 0.2:
                here[-1][rng.choice(["iscrowd", "ignore"])] = 1
        for _ in range(rng.integers(16)):
            box = np.array([*rng.uniform(0, 50, 2), *rng.uniform(8, 24, 2)])
            category = int(rng.integers(1, 4))
            if here and rng.uniform() < 0.7:
                near = here[rng.integers(len(here))]
                box = near["bbox"] + rng.normal(0, rng.choice([1, 4]), 4)
                category = near["category_id"] if rng.uniform() < 0.6 else category
            bbox = [*box[:2].tolist(), *np.maximum(box[2:], 1).tolist()]
            row = {"image_id": image, "category_id": category, "bbox": bbox}
            detections.append({**row, "score": round(float(rng.uniform()), 2)})
        objects += here
    rng.shuffle(detections)  # type: ignore[arg-type]
    return truth(objects, images=3, classes=(1, 2, 3)), detections


def slow_iou(a: list[float], b: list[float]) -> float:
    sides = [min(a[i] + a[i + 2], b[i] + b[i + 2]) - max(a[i], b[i]) for i in (0, 1)]
    shared = max(sides[0], 0) * max(sides[1], 0)
    return shared / (a[2] * a[3] + b[2] * b[3] - shared)


def slow_errors(ground_truth: Truth, detections: Rows) -> tuple[dict[str, int], dict[str, float], bool]:
    """Counts and AP50 after each oracle, by editing the detections and objects and evaluating them with pycocotools.

    And whether a localisation and a classification error aim at the same object.
    """
    evaluator = evaluated(ground_truth, detections)
    found: dict[int, int] = {}  # detection -> annotation; both count from 1
    ignored: set[int] = set()
    for image in filter(None, evaluator.evalImgs):
        for number, match, skipped in zip(image["dtIds"], image["dtMatches"][0], image["dtIgnore"][0], strict=True):
            if match:
                found[number] = int(match)
            if skipped:
                ignored.add(number)
    annotations = {row["id"]: row for row in ground_truth["annotations"]}
    wanted = {n for n, row in annotations.items() if not row["iscrowd"] and not row.get("ignore")}
    free = wanted - set(found.values())

    kinds: dict[int, str] = {}
    aims: dict[int, int] = {}
    for number, row in enumerate(detections, 1):
        if number in found:
            continue
        best = {True: (-1.0, 0), False: (-1.0, 0)}
        for other in annotations.values():
            if other["image_id"] == row["image_id"] and not other["iscrowd"]:
                same = other["category_id"] == row["category_id"]
                best[same] = max(best[same], (slow_iou(row["bbox"], other["bbox"]), other["id"]))
        (own, own_object), (foreign, foreign_object) = best[True], best[False]
        if 0.1 <= own < 0.5:
            kinds[number], aims[number] = "localisation", own_object
        elif foreign >= 0.5:
            kinds[number], aims[number] = "classification", foreign_object
        elif own >= 0.5:
            kinds[number] = "duplicate"
        elif own < 0.1 and foreign < 0.1:
            kinds[number] = "background"
        else:
            kinds[number] = "both"
    missed = free - set(aims.values())

    def ap50(gone: set[int], spared: set[int], edited: dict[int, dict[str, Any]]) -> float:
        rows = [{**row, **edited.get(n, {})} for n, row in enumerate(detections, 1) if n not in gone]
        left = [row for row in ground_truth["annotations"] if row["id"] not in spared]
        aps = []
        after = evaluated({**ground_truth, "annotations": left}, rows)
        for place, ap in enumerate(coco_aps(after)):
            category = after.params.catIds[place]
            if not any(annotations[n]["category_id"] == category for n in wanted):
                continue
            if math.isnan(ap):  # nothing left to find
                images = [image for image in after.evalImgs if image and image["category_id"] == category]
                ap = 100.0 * all(image["dtIgnore"].all() for image in images)
            aps.append(ap)
        return sum(aps) / len(aps)

    repaired = {"missed": ap50(set(), missed, {}), "false negatives": ap50(set(), free, {})}
    repaired["false positives"] = ap50(set(kinds), set(), {})
    for name in ("localisation", "background", "both", "duplicate", "classification"):
        wrong = [n for n, kind in kinds.items() if kind == name]
        edits: dict[int, dict[str, Any]] = {}
        taken: set[int] = set()
        for number in sorted(wrong, key=lambda n: (-detections[n - 1]["score"], detections[n - 1]["image_id"], n)):
            if number in aims and aims[number] in free - taken:
                key = "bbox" if name == "localisation" else "category_id"
                edits[number] = {key: annotations[aims[number]][key]}
                taken.add(aims[number])
        repaired[name] = ap50(set(wrong) - set(edits), set(), edits)
    counts = dict(Counter(kinds.values()))
    counts |= {"missed": len(missed), "false positives": len(kinds), "false negatives": len(free)}
    by_kind = [{aims[n] for n in aims if kinds[n] == name} for name in ("localisation", "classification")]
    return {name: counts.get(name, 0) for name in ORACLES}, repaired, bool(free & by_kind[0] & by_kind[1])


def test_oracles_are_what_pycocotools_says_of_repaired_detections() -> None:
    seen: Counter[str] = Counter()
    for seed in range(30):
        ground_truth, detections = scene(seed)
        counts, repaired, _ = slow_errors(ground_truth, detections)
        errors = detection_errors(ground_truth, detections, "bbox")
        assert errors.counts == counts, seed
        assert errors.ap50 == pytest.approx(coco_ap50(ground_truth, detections), abs=1e-9)
        for name in ORACLES:
            assert errors.ap50 + errors.delta_ap[name] == pytest.approx(repaired[name], abs=1e-9), (seed, name)
            seen[name] += errors.delta_ap[name] > 0.01
    assert min(seen[name] for name in ORACLES) > 5, seen  # of every type there is something to repair


def test_the_authors_toolbox_finds_the_same() -> None:
    """Where it does the same: without ignored objects, and without two types of errors that aim at one object."""
    tidecv = pytest.importorskip("tidecv", reason="TIDE's own toolbox, tidecv, is not installed")
    names = {"Cls": "classification", "Loc": "localisation", "Both": "both", "Dupe": "duplicate"}
    names |= {"Bkg": "background", "Miss": "missed"}
    compared = 0
    for seed in range(60):
        ground_truth, detections = scene(seed, special=False)
        for number, row in enumerate(detections):
            row["score"] += number * 1e-6  # it orders equal scores otherwise
        errors = detection_errors(ground_truth, detections, "bbox")
        theirs = {"truth": tidecv.Data("truth"), "found": tidecv.Data("found")}
        for image in ground_truth["images"]:
            theirs["truth"].add_image(image["id"], "")
        for row in ground_truth["annotations"]:
            theirs["truth"].add_ground_truth(row["image_id"], row["category_id"], row["bbox"])
        for row in detections:
            theirs["found"].add_detection(row["image_id"], row["category_id"], row["score"], row["bbox"])
        tide = tidecv.TIDE()
        run = tide.evaluate(theirs["truth"], theirs["found"], mode=tidecv.TIDE.BOX)
        counts = {names[kind.short_name]: len(found) for kind, found in run.error_dict.items()}
        assert counts == {name: errors.counts[name] for name in ERRORS}, seed
        gains = {names[name]: gain for name, gain in tide.get_main_errors()["found"].items()}
        special = tide.get_special_errors()["found"]
        gains |= {"false positives": special["FalsePos"], "false negatives": special["FalseNeg"]}
        contested = slow_errors(ground_truth, detections)[2]
        for name in ORACLES:
            if not (contested and name in ("classification", "localisation")):
                assert errors.delta_ap[name] == pytest.approx(gains[name], abs=1e-9), (seed, name)
        compared += not contested
    assert compared > 20


def test_the_order_of_images_objects_and_detections_does_not_matter() -> None:
    for seed in range(10):
        ground_truth, detections = scene(seed)
        rng = np.random.default_rng(seed)
        for number, row in enumerate(detections):
            row["score"] += number * 1e-6  # no two are equal
        expected = detection_errors(ground_truth, detections, "bbox")
        for rows in (*ground_truth.values(), detections):
            rng.shuffle(rows)
        found = detection_errors(ground_truth, detections, "bbox")
        assert found.counts == expected.counts
        assert found.delta_ap == pytest.approx(expected.delta_ap, abs=1e-9)


def test_of_an_image_and_class_a_hundred_detections_count() -> None:
    best = [at(0, CAT, 0.9), at(1, DOG, 0.9)]
    wrong = [at(5 + n / 100, CAT, 0.8) for n in range(100)]
    late = [at(2, CAT, 0.1), at(3, DOG, 0.1)]
    errors = detection_errors(truth([at(n, CAT if n != 1 else DOG) for n in range(3)]), wrong + late + best, "bbox")
    assert errors.counts["background"] == 99 + 1  # the dog at 3 counts
    assert errors.counts["missed"] == 1


def masked(row: dict[str, Any], polygon: list[float], form: str) -> dict[str, Any]:
    encoded = mask.frPyObjects([polygon], 100, 1000)[0]
    counts: Any = encoded["counts"].decode()
    if form == "numbers":  # uncompressed run lengths
        pixels = mask.decode([encoded])[..., 0].T.ravel()
        edges = np.flatnonzero(np.diff(pixels)) + 1
        counts = np.diff([0, *edges, pixels.size]).tolist()
        counts = [0, *counts] if pixels[0] else counts
    return {**row, "segmentation": [polygon] if form == "polygon" else {"size": [100, 1000], "counts": counts}}


def triangle(box: list[float], upper: bool) -> list[float]:
    x, y, width, height = box
    third = (x + width, y) if upper else (x, y + height)
    return [x, y, x + width, y + height, *third]


def test_masks_are_judged_by_their_own_overlap() -> None:
    cat = at(0, CAT)
    polygons = [triangle(cat["bbox"], upper) for upper in (True, False)]
    for form in ("polygon", "numbers", "text"):
        ground_truth = truth([masked(cat, polygons[0], form)])
        same, opposite = (masked(at(0, CAT, 0.5), polygon, "text") for polygon in polygons)
        assert detection_errors(ground_truth, [same], "segm").counts == NOTHING
        # The same box, but the masks share their diagonal at most.
        assert detection_errors(ground_truth, [opposite], "bbox").counts == NOTHING
        counts = detection_errors(ground_truth, [opposite], "segm").counts
        assert counts == {**NOTHING, "background": 1, "missed": 1, "false positives": 1, "false negatives": 1}


def test_mask_ap50_is_that_of_pycocotools() -> None:
    for seed in range(30):
        ground_truth, detections = scene(seed)
        upper = np.random.default_rng(seed).uniform(size=1000) < 0.7
        forms = ("polygon", "numbers", "text")
        for n, row in enumerate(ground_truth["annotations"]):
            row.update(masked(row, triangle(row["bbox"], bool(upper[n])), forms[n % 3]))
        rows = [masked(row, triangle(row["bbox"], bool(upper[-1 - n])), "text") for n, row in enumerate(detections)]
        expected = coco_ap50(ground_truth, rows, "segm")
        assert detection_errors(ground_truth, rows, "segm").ap50 == pytest.approx(expected, abs=1e-9)


def test_a_coco_api_is_ground_truth_too() -> None:
    ground_truth, detections = scene(0)
    api = evaluated(ground_truth, detections).cocoGt
    assert detection_errors(api, detections, "bbox") == detection_errors(ground_truth, detections, "bbox")


def test_input_that_does_not_fit_is_refused() -> None:
    ground_truth = truth([at(0, CAT)])
    found = at(0, CAT, 0.5)
    with pytest.raises(InputError, match="choose one of bbox, segm"):
        detection_errors(ground_truth, [found], "keypoints")
    with pytest.raises(InputError, match="image 7 and class 1"):
        detection_errors(ground_truth, [{**found, "image_id": 7}], "bbox")
    with pytest.raises(InputError, match="image 0 and class 0"):
        detection_errors(ground_truth, [{**found, "category_id": 0}], "bbox")
    with pytest.raises(InputError, match="annotation has no 'segmentation'"):
        detection_errors(ground_truth, [found], "segm")
    with pytest.raises(InputError, match="no object to find"):
        detection_errors(truth([at(0, CAT, iscrowd=1)]), [found], "bbox")


@pytest.fixture
def conditions() -> dict[str, DetectionErrors]:
    """Nothing wrong; one object of two missed; another mistaken."""
    objects = truth([at(0, CAT), at(1, DOG)])
    rows = [at(0, CAT, 0.9), at(1, DOG, 0.8)]
    cases = {"clean": rows, "fog 3": rows[:1], "PGD-10": [rows[0], at(1, CAT, 0.95)]}
    return {name: detection_errors(objects, found, "bbox") for name, found in cases.items()}


def test_the_table_puts_conditions_below_each_other(conditions: dict[str, DetectionErrors]) -> None:
    table = error_table(conditions)
    heads, rows = list(table.columns), table.cells
    assert heads[:6] == ["condition", "AP50", "classification", "localisation", "background", "missed"]
    assert [row[:6] for row in rows] == [
        ["clean", "100.0", "0.0", "0.0", "0.0", "0.0"],
        ["fog 3", "50.0", "0.0", "0.0", "0.0", "50.0"],
        ["PGD-10", "25.0", "75.0", "0.0", "0.0", "0.0"],
    ]
    assert {len(row) for row in rows} == {len(heads)}
    assert table.to_markdown().count("\n") == 4


def test_the_figure_says_its_numbers_and_needs_no_colour(
    conditions: dict[str, DetectionErrors], tmp_path: Path
) -> None:
    picture = error_figure(conditions, "Two animals", tmp_path / "errors")
    assert {path.name for path in tmp_path.iterdir()} == {"errors.svg", "errors.png", "errors.csv"}
    rows = list(csv.DictReader(io.StringIO((tmp_path / "errors.csv").read_text())))
    for row, (condition, errors) in zip(rows, conditions.items(), strict=True):
        assert (row["condition"], float(row["AP50"])) == (condition, errors.ap50)
        assert {name: float(row[f"{name} dAP50"]) for name in ORACLES} == errors.delta_ap
        assert {name: int(row[f"{name} count"]) for name in ORACLES} == errors.counts
    svg = picture.file.read_text()
    ElementTree.fromstring(svg)
    patterns = svg.count("<pattern ")
    assert patterns == 2  # a hatch of its own for all but the first
    assert "fog 3: AP50 50.0" in picture.alt
    assert "classification 75.0" in picture.alt
    assert "Two animals" in picture.caption

    picture = error_figure(conditions, "Two animals", tmp_path / "again")
    assert picture.file.read_text() == svg
    for wrong in ({}, {str(number): conditions["clean"] for number in range(8)}):
        with pytest.raises(InputError, match="1 to 7 conditions"):
            error_figure(wrong, "Two animals", tmp_path / "errors")


def test_errors_survive_json(conditions: dict[str, DetectionErrors]) -> None:
    for errors in conditions.values():
        assert DetectionErrors(**json.loads(json.dumps(asdict(errors)))) == errors
