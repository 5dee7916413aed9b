"""The accuracies of ImageNet-RIB's protocol: its cells, each with a record, and RI and mRI of the resulting matrix."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from robust_backbones.errors import InputError, check_choice
from robust_backbones.runs.identity import differences, identity
from robust_backbones.runs.record import RunRecord
from robust_backbones.transfer.inheritance.config import DISTANCE_NAMES, PRETRAINED, PRETRAINING, InheritanceConfig

DISTANCES = "distances"


@dataclass(frozen=True)
class MatrixCell:
    """What one record is about: a backbone before fine-tuning, after it, or its distances."""

    label: str
    """Of the backbone."""
    method: str
    """One of ``methods.METHODS``, PRETRAINED or DISTANCES."""
    target: str = ""
    """The set that it is fine-tuned on; empty for the last two."""
    seed: int = 0

    @property
    def folder(self) -> Path:
        """Relative to the output."""
        parts = (self.target, f"seed_{self.seed}") if self.target else ()
        return Path(self.label, self.method, *parts)

    def __str__(self) -> str:
        what = f"{self.label}: {self.method}"
        return f"{what} on {self.target}, seed {self.seed}" if self.target else what


@dataclass(frozen=True)
class Matrix:
    """Accuracies (0-100) of one backbone with one method and seed, before and after fine-tuning on each set."""

    label: str
    method: str
    seed: int
    sets: tuple[str, ...]
    """The related sets by name; ``before`` and each row have PRETRAINING too."""
    before: Mapping[str, float]
    after: Mapping[str, Mapping[str, float]]
    """Set fine-tuned on -> accuracy by set; rows of cells that have not run are missing."""
    distances: Mapping[str, float]
    """Set -> its distance to pre-training, if measured."""
    distance: str = "w2"
    """Which distance: one of ``config.DISTANCE_NAMES``."""

    def robustness_improvement(self, target: str) -> float:
        """RI_i = mean over j ≠ i of (accuracy on j after fine-tuning on i - accuracy on j before)."""
        return fmean(self.change(target, name) for name in self.sets if name != target)

    @property
    def mean_robustness_improvement(self) -> float | None:
        """mRI, the mean of RI_i over all sets; None while a row is missing."""
        if set(self.after) != set(self.sets):
            return None
        return fmean(self.robustness_improvement(name) for name in self.sets)

    def change(self, target: str, name: str) -> float:
        """Accuracy on ``name`` after fine-tuning on ``target`` minus that before."""
        return self.after[target][name] - self.before[name]


_MEASURED = ("image_size", "val_resize", "interpolation", "precision", "limit", "data_seed")
"""The settings that affect a network's accuracy before fine-tuning."""


def read_matrices(folders: Sequence[str | Path]) -> list[Matrix]:
    """The matrices of finished cells in outputs of ``run_protocol``, by label, method and seed.

    Raises:
        InputError: there is no output, or one without its ``pretrained`` cell; two have the same cells, or the same
            label and method with different settings; a record is incomplete.
    """
    matrices: list[Matrix] = []
    known: dict[tuple[str, str], tuple[Path, dict[str, Any]]] = {}
    for folder in folders:
        found = sorted(Path(folder).glob(f"*/{PRETRAINED}/record.json"))
        if not found:
            raise InputError(f"no finished cells in {folder}: give the --output of `run`")
        for path in found:
            own = path.parents[1]
            paths = [path, own / DISTANCES / "record.json", *sorted(own.glob("*/*/seed_*/record.json"))]
            records = {path: RunRecord.read(path) for path in paths if path.exists()}
            for place, record in records.items():
                if not all(isinstance(record.config.get(key), str) for key in ("method", "target")):
                    raise InputError(f"{place} says no method and target: remove it, or make its run again")
                settings = {**setting(record), "weights": record.backbone.get("source_sha256")}
                if not record.config["target"]:  # before fine-tuning; methods may each have settings of their own
                    settings = {name: settings[name] for name in ("weights", *_MEASURED) if name in settings}
                other, held = known.setdefault((own.name, record.config["method"]), (place, settings))
                if names := differences(held, settings):
                    told = f"{other} and {place} are both called {own.name}, and differ in {', '.join(names)}"
                    raise InputError(f"{told}: make a table of each")
            matrices += matrices_of(own.name, records)
    for (label, method, seed), count in Counter((one.label, one.method, one.seed) for one in matrices).items():
        if count > 1:
            raise InputError(f"{label}, {method}, seed {seed} is in {count} of these folders: give one of them")
    return matrices


def matrices_of(label: str, records: Mapping[str, RunRecord] | Mapping[Path, RunRecord]) -> list[Matrix]:
    """Those of one backbone's records of task ``inheritance``, by method and seed; none before its ``pretrained``.

    Args:
        records: by their locations.

    Raises:
        InputError: two records of one cell have different results; one lacks an accuracy that another has.
    """
    cells: dict[tuple[str, str, int], tuple[str | Path, RunRecord]] = {}
    for place, record in records.items():
        key = (record.config["method"], record.config["target"], record.seed)
        other, twin = cells.setdefault(key, (place, record))
        if twin.metrics != record.metrics:
            told = f"{other} and {place}, two records of {record.run_id}, have different results"
            raise InputError(f"{told}: leave one of them out")
    single = {method: found for (method, target, _), found in cells.items() if not target}
    if PRETRAINED not in single:
        return []
    first, pretrained = single[PRETRAINED]
    before = _values(pretrained, "accuracy")
    sets = tuple(sorted(before.keys() - {PRETRAINING}))
    _, measured = single.get(DISTANCES, (None, None))
    distance = str(measured.config.get("distance", "w2")) if measured else "w2"
    check_choice("distance", distance, DISTANCE_NAMES)
    distances = _values(measured, "wasserstein" if distance == "w2" else distance) if measured else {}
    rows: dict[tuple[str, int], dict[str, dict[str, float]]] = {}
    for method, target, seed in sorted(cells):
        if target:
            place, record = cells[method, target, seed]
            row = rows.setdefault((method, seed), {})[target] = _values(record, "accuracy")
            if len(sets) < 2 or not before.keys() == row.keys() >= {PRETRAINING, target}:
                what = f"the records in {first} and {place} have accuracies on different sets"
                raise InputError(f"{what}, or on none: make one of these runs again")
    known = (distances, distance)
    return [Matrix(label, method, seed, sets, before, after, *known) for (method, seed), after in rows.items()]


def setting(record: RunRecord) -> dict[str, Any]:
    """The configuration of a cell without the keys that say which cell it is, and without those of distances."""
    config = identity(record.config, InheritanceConfig().to_dict())
    own = ("method", "target", "images")
    return {k: v for k, v in config.items() if k not in own and not k.startswith(("distance", "sinkhorn"))}


def _values(record: RunRecord, kind: str) -> dict[str, float]:
    """The metrics ``kind/SET`` of a cell's record, by set."""
    return {
        name.removeprefix(f"{kind}/"): value
        for name, value in record.metrics.items()
        if name.startswith(f"{kind}/") and value is not None
    }
