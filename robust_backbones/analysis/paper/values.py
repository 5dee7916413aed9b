"""Results of Salman et al. 2020, to show beside ours, and why the two may not be comparable."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from robust_backbones.runs.record import RunRecord

SOURCE = "Salman et al. 2020, arXiv 2007.08489, section 4"
TRANSFER_SOURCE = "Salman et al. 2020, appendix F, means of three trials, from the tables of the authors' submission"
# github.com/anonymousNeuripsAuthor/paper-8887, latex/small_datasets_*.tex (_linf_models for l-infinity) and
# downsampling_LogisticRegression.tex. The
# best trials are the authors' list of best settings, github.com/microsoft/robust-models-transfer; those of WRN-50-4
# are from more epsilons than the submission has.


@dataclass(frozen=True)
class PaperValue:
    """A mean in AP points (0-100); ``std`` and ``n`` (runs) if the paper gives them."""

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
    """Source of ``images_seen``. COCO's values fit Detectron2's 3x schedule (its model zoo has box AP 40.2, with
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
    rows = [row for row in _get(record.config, "DATASETS").get("COCO_FORMAT", []) if row and row[0] == record.dataset]
    named = json.dumps([record.dataset, rows]).lower()
    for result in PAPER:
        if result.dataset in named and (result.task, result.metric) == (record.task, metric):
            return result
    return None


def differences_to_paper(record: RunRecord, paper: PaperResult) -> list[str]:
    """What a run did differently from the paper, in words; empty if no difference is known."""
    solver, model = _get(record.config, "SOLVER"), _get(record.config, "MODEL")
    arch, classes = record.backbone.get("arch"), record.backbone.get("num_classes")
    train = _get(record.config, "DATASETS").get("TRAIN", [])
    seen = solver.get("MAX_ITER", 0) * solver.get("IMS_PER_BATCH", 0)
    size = _get(record.config, "INPUT").get("MIN_SIZE_TEST")
    name, frozen = (_get(model, "BACKBONE").get(key) for key in ("NAME", "FREEZE_AT"))
    differences = {
        f"the backbone is {arch or 'unknown'}, not resnet50": arch != "resnet50",
        f"it was {_pretraining(classes)}": classes != 1000,
        f"trained on {', '.join(train) or 'unknown data'}, not {' and '.join(paper.train)}": {*train} != {*paper.train},
        f"tested on {record.dataset}, not {paper.test}": record.dataset != paper.test,
        f"{seen:,} training images seen, not {paper.images_seen:,} ({paper.schedule})": seen != paper.images_seen,
        f"images of {size} px, not 800": size != 800,
        f"the detector is built on {name}, not on FPN": name != "build_resnet_fpn_backbone",
        f"{frozen} stages of the backbone frozen, not 2": frozen != 2,
    }
    return [words for words, differs in differences.items() if differs]


@dataclass(frozen=True)
class PaperTransfer:
    """Accuracies (0-100) of one architecture, pre-trained on ImageNet, on one data set."""

    dataset: str
    """One of ``data.transfer_datasets.TRANSFER_DATASETS``."""
    means: Mapping[float, float]
    """l2 epsilon of pre-training, in [0, 1] pixel units -> mean of three trials."""
    best_trial: tuple[float, float] | None
    """(epsilon, accuracy) of the best single trial."""


@cache
def _transfer_table() -> dict[tuple[str, str, str, int], PaperTransfer]:
    found = {}
    for row in _read("salman2020_transfer.csv"):
        keys = ("dataset", "arch", "mode", "downscale", "best_trial_epsilon", "best_trial")
        dataset, arch, mode, downscale, best_epsilon, best = (row.pop(key) for key in keys)
        means = {float(epsilon): float(value) for epsilon, value in row.items() if value}
        trial = (float(best_epsilon), float(best)) if best else None
        found[dataset, arch, mode, int(downscale)] = PaperTransfer(dataset, means, trial)
    return found


@cache
def paper_transfer_linf(dataset: str, arch: str, mode: str) -> Mapping[float, float]:
    """Means of the paper's trials from backbones pre-trained at an l-infinity epsilon, with 0 the standard one.

    Args:
        dataset, arch, mode: as ``paper_transfer``; the paper has CIFAR-10 and CIFAR-100, ResNet-18 and ResNet-50.

    Returns:
        Epsilon in 1/255 -> accuracy (0-100); empty if there is none.
    """
    for row in _read("salman2020_transfer_linf.csv"):
        name, *rest = (row.pop(key) for key in ("dataset", "arch", "mode"))
        if rest == [arch, mode] and re.match(rf"{name}(?![a-z0-9])", dataset.lower()):
            return {float(epsilon): float(value) for epsilon, value in row.items()}
    return {}


def table_2() -> dict[str, dict[str, tuple[float, float]]]:
    """Full-network transfer to CIFAR-10: trained at -> architecture -> accuracies (0-100) on ImageNet and on CIFAR-10.

    The paper calls the architectures A to F; the submission's tables name them.
    """
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for row in _read("salman2020_table_2.csv"):
        found.setdefault(row["trained_at"], {})[row["arch"]] = (float(row["imagenet"]), float(row["cifar10"]))
    return found


def _read(name: str) -> list[dict[str, str]]:
    return list(csv.DictReader(Path(__file__).with_name(name).read_text().splitlines()))


def paper_transfer(dataset: str, arch: str, mode: str, *, downscale: int = 0) -> PaperTransfer | None:
    """The paper's accuracies for a data set, or for the one that a subset's name starts with (``cifar10_small``).

    Args:
        arch: one of ``models.ARCHITECTURES``.
        mode: ``linear_probe`` or ``full_network``.
        downscale: 32 for images that were downscaled to that and enlarged again.
    """
    for (name, *rest), result in _transfer_table().items():
        if rest == [arch, mode, downscale] and re.match(rf"{name}(?![a-z0-9])", dataset.lower()):
            return result
    return None


def differences_to_paper_transfer(record: RunRecord) -> list[str]:
    """What a classification transfer did differently from the paper, in words; empty if no difference is known."""
    config, classes = record.config, record.backbone.get("num_classes")
    count, epochs, size = (config.get(key) for key in ("images_per_class", "epochs", "image_size"))
    is_subset, is_regression = (count or 0) > 0, config.get("solver") == "lbfgs"
    is_known = any(record.dataset in (name, f"{name}_first") for name, *_ in _transfer_table())
    on = config.get("selection", {}).get("on")
    differences = {
        _pretraining(classes): classes != 1000,
        f"{record.dataset} has {count} training images a class": is_subset,
        f"{record.dataset} is not the paper's data set": not is_subset and not is_known,
        "logistic regression by L-BFGS, not SGD": is_regression,
        f"{epochs} epochs, not 150": not is_regression and epochs != 150,
        "features computed once, not in every epoch": config.get("augmentation") == "none" or config.get("views", 0),
        f"images of {size} px, not 224": size != 224,
        "the setting chosen on held-out images, not on test images": on == "held_out",
        "one setting, not the best of several": on not in ("held_out", "test"),
    }
    return [words for words, differs in differences.items() if differs]


def _pretraining(classes: int | None) -> str:
    return f"pre-trained on {classes or 'an unknown number of'} classes, not ImageNet's 1000"


def _get(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = config.get(key)
    return value if isinstance(value, Mapping) else {}
