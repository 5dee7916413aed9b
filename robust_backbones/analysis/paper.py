"""Detection and segmentation results of Salman et al. 2020, to stand beside ours, and why the two may not compare."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from robust_backbones.records import RunRecord

SOURCE = "Salman et al. 2020, arXiv 2007.08489, section 4"


@dataclass(frozen=True)
class PaperValue:
    """A mean in AP points (0-100); ``std`` and ``n`` (runs) where the paper gives them."""

    trained_at: str
    mean: float
    std: float | None = None
    n: int | None = None


@dataclass(frozen=True)
class PaperResult:
    """A ResNet-50's AP from the standard and from the best robust backbone, with Detectron2's default FPN models."""

    dataset: str
    """``voc`` or ``coco``."""
    task: str
    metric: str
    train: tuple[str, ...]
    test: str
    images_seen: int
    """Iterations x batch."""
    schedule: str
    """Where ``images_seen`` is from. COCO's values fit Detectron2's 3x schedule (its model zoo has box AP 40.2, with
    masks 41.0 and mask AP 37.2) and not 1x (37.9; 38.6 and 35.2)."""
    standard: PaperValue
    robust: PaperValue
    source: str = SOURCE


_VOC = (
    *("voc", "detection", "bbox/AP", ("voc_2007_trainval", "voc_2012_trainval"), "voc_2007_test", 18_000 * 16),
    "Detectron2's default",
)
_COCO = (("coco_2017_train",), "coco_2017_val", 270_000 * 16, "3x, inferred from its values")


def _coco(task: str, metric: str, standard: tuple[float, float], robust: tuple[float, float]) -> PaperResult:
    """COCO's values are means and standard deviations of four runs."""
    values = (PaperValue("L2:0", *standard, n=4), PaperValue("best robust", *robust, n=4))
    return PaperResult("coco", task, metric, *_COCO, *values)


PAPER = (
    PaperResult(*_VOC, PaperValue("L2:0", 52.80), PaperValue("best robust", 53.87)),
    _coco("detection", "bbox/AP", (39.80, 0.08), (40.07, 0.10)),
    _coco("segmentation", "bbox/AP", (40.67, 0.06), (40.91, 0.15)),
    _coco("segmentation", "segm/AP", (36.92, 0.08), (37.08, 0.10)),
)


def paper_result(record: RunRecord, metric: str) -> PaperResult | None:
    """The paper's result for a run's task, kind of data and metric, if it has one."""
    if record.task not in ("detection", "segmentation"):
        return None
    datasets = _get(record.config, "DATASETS")
    rows = [row for row in datasets.get("COCO_FORMAT", []) if row and row[0] == record.dataset]
    named = json.dumps([record.dataset, rows]).lower()
    for result in PAPER:
        if result.dataset in named and (result.task, result.metric) == (record.task, metric):
            return result
    return None


def differences_to_paper(record: RunRecord, paper: PaperResult) -> list[str]:
    """What a run did otherwise than the paper, in words; empty where nothing is known to differ."""
    datasets, solver = _get(record.config, "DATASETS"), _get(record.config, "SOLVER")
    backbone, model, images = record.backbone, _get(record.config, "MODEL"), _get(record.config, "INPUT")
    found = []
    if (arch := backbone.get("arch")) != "resnet50":
        found.append(f"the backbone is {arch or 'unknown'}, not resnet50")
    if (classes := backbone.get("num_classes")) != 1000:
        found.append(f"it was pre-trained on {classes or 'an unknown number of'} classes, not ImageNet's 1000")
    if set(train := datasets.get("TRAIN", [])) != set(paper.train):
        found.append(f"trained on {', '.join(train) or 'unknown data'}, not {' and '.join(paper.train)}")
    if record.dataset != paper.test:
        found.append(f"tested on {record.dataset}, not {paper.test}")
    seen = solver.get("MAX_ITER", 0) * solver.get("IMS_PER_BATCH", 0)
    if seen != paper.images_seen:
        found.append(f"{seen:,} training images seen, not {paper.images_seen:,} ({paper.schedule})")
    if (size := images.get("MIN_SIZE_TEST")) != 800:
        found.append(f"images of {size} px, not 800")
    if (name := _get(model, "BACKBONE").get("NAME")) != "build_resnet_fpn_backbone":
        found.append(f"the detector is built on {name}, not on FPN")
    if (frozen := _get(model, "BACKBONE").get("FREEZE_AT")) != 2:
        found.append(f"{frozen} stages of the backbone frozen, not 2")
    return found


def _get(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = config.get(key)
    return value if isinstance(value, Mapping) else {}
