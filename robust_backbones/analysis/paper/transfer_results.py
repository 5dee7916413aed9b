"""Results of classification transfer as the paper groups them: backbones with known pre-training, and their trials."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from robust_backbones.analysis.experiments import BackboneRuns, experiments, is_stylized, networks, setting
from robust_backbones.analysis.figures import NAMES, NORMS
from robust_backbones.analysis.paper.values import PaperTransfer, paper_transfer
from robust_backbones.analysis.records import RecordedRun
from robust_backbones.analysis.statistics import LinearFit, linear_fit
from robust_backbones.checkpoint import zoo
from robust_backbones.checkpoint.format import sha256
from robust_backbones.models import ARCHITECTURES
from robust_backbones.runs.record import RunRecord
from robust_backbones.threat_models import ThreatModel

METRIC = "clean_accuracy"


STAND_IN = "amplitude-mixed (stand-in for Stylized ImageNet)"
"""The name of ``pretrain --stylize`` in every table and figure."""
_NOTE = f", {STAND_IN}"


@dataclass(frozen=True)
class Pretraining:
    """What is known about the training of a backbone."""

    accuracy: float
    """On the clean validation images of ``dataset``, 0-100."""
    dataset: str
    stylized: bool
    stand_in: bool = False
    """Stylized by mixing amplitude spectra (``pretrain --stylize``), instead of Stylized ImageNet."""


@dataclass(frozen=True)
class Trials:
    """Accuracies (0-100) of one or more trials."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return fmean(self.values)

    @property
    def low(self) -> float:
        return min(self.values)

    @property
    def high(self) -> float:
        return max(self.values)

    @property
    def numbers(self) -> dict[str, Any]:
        """As in a CSV."""
        numbers = {"n": len(self.values), "mean": self.mean, "min": self.low, "max": self.high}
        return {**numbers, "trials": " ".join(map(repr, self.values))}

    def __str__(self) -> str:
        return f"{self.mean:.1f} ({self.low:.1f} to {self.high:.1f})"


@dataclass(frozen=True)
class TransferSource:
    """A backbone, and its trials on one data set."""

    name: str
    arch: str
    """With what distinguishes it from others of the target, as in ``networks``."""
    threat_model: ThreatModel | None
    pretraining: Pretraining | None
    trials: Trials

    @property
    def kind(self) -> str:
        """``standard``, ``robust``, ``stylized`` or, for an unknown threat model, ``unknown``.

        Stylized means trained on stylised images, according to its pre-training or, if that is unknown, its name.
        """
        if self.pretraining.stylized if self.pretraining else is_stylized(self.name):
            return "stylized"
        if self.threat_model is None:
            return "unknown"
        return "robust" if self.threat_model.epsilon else "standard"


@dataclass(frozen=True)
class Target:
    """A data set in one setting of transfer, and the backbones transferred to it."""

    mode: str
    dataset: str
    setting: str
    """The settings that differ in others of its mode and data set; empty if there are none."""
    record: RunRecord
    """One of the trials."""
    sources: tuple[TransferSource, ...]

    @property
    def downscale(self) -> int:
        return int(self.record.config.get("downscale", 0))

    @property
    def archs(self) -> list[str]:
        return in_order({source.arch for source in self.sources})

    @property
    def threat_models(self) -> list[ThreatModel]:
        """Threat models of the standard and robust backbones, the standard one first."""
        found = {s.threat_model for s in self.sources if s.threat_model and s.kind in ("standard", "robust")}
        return sorted(found, key=lambda model: (model.epsilon > 0, model.norm, model.epsilon))

    def of_kind(self, arch: str, kind: str) -> list[TransferSource]:
        """Its backbones of an architecture and a kind, the one with the highest mean first."""
        found = [source for source in self.sources if (source.arch, source.kind) == (arch, kind)]
        return sorted(found, key=lambda source: -source.trials.mean)

    def trials(self, arch: str, threat_model: ThreatModel) -> Trials | None:
        """The trials of all standard or robust backbones of one architecture and threat model together."""
        values = [
            value
            for source in self.sources
            if (source.arch, source.threat_model) == (arch, threat_model) and source.kind in ("standard", "robust")
            for value in source.trials.values
        ]
        return Trials(tuple(values)) if values else None

    @property
    def paper_name(self) -> str:
        """The name of the paper's data set that this is, or a subset of; empty if there is none."""
        return next((paper.dataset for arch in NAMES if (paper := self.paper(arch))), "")

    def paper(self, arch: str, *, downscale: int = 0) -> PaperTransfer | None:
        """The paper's accuracies for the same, or for images downscaled to ``downscale`` pixels: it has 32."""
        return paper_transfer(self.dataset, arch, self.mode, downscale=downscale)


class Pretrainings:
    """Finds the pre-training of a backbone in a record of transfer.

    By the sha256 of the weights, in the records of pre-training or from the files beside them; without either by the
    name of the run, if architecture, classes and threat model agree; else among the published backbones.
    """

    def __init__(self, runs: Sequence[RecordedRun]) -> None:
        self._by_weights: dict[str, Pretraining] = {}
        self._by_name: dict[str, list[RecordedRun]] = {}
        for run in runs:
            found = {"": _weights(run, "checkpoint"), "best/": _weights(run, "best")}
            for prefix, weights in found.items():
                if weights and (pretraining := _pretraining(run.record, prefix)):
                    self._by_weights[weights] = pretraining
            if not any(found.values()):
                self._by_name.setdefault(run.record.run_id, []).append(run)

    def of(self, record: RunRecord) -> Pretraining | None:
        """The pre-training of the backbone of one trial; None if unknown."""
        if found := self._by_weights.get(str(record.backbone.get("source_sha256"))):
            return found
        label = str(record.backbone.get("label")).removesuffix(_NOTE)
        same = [run for run in self._by_name.get(label, []) if _identity(run.record) == _identity(record)]
        if len(same) == 1:
            return _pretraining(same[0].record, "")
        published = zoo.published().get(label)
        if published and _identity(record)[:3] == (published.arch, 1000, str(published.threat_model)):
            return Pretraining(published.imagenet_accuracy, "ImageNet", stylized=False)
        return None


def name_stand_ins(runs: Sequence[RecordedRun]) -> list[RecordedRun]:
    """The runs with STAND_IN in the names of those whose backbone it made, which all tables and figures use.

    For a pre-training it is in the data set's name, elsewhere in the backbone's label and the run's name.
    """
    trained = [run for run in runs if run.record.task == "pretrain"]
    if not any(run.record.config.get("stylize", 0) > 0 for run in trained):
        return [*runs]
    pretrainings = Pretrainings(trained)
    return [_name_stand_in(run, pretrainings) for run in runs]


def _name_stand_in(run: RecordedRun, pretrainings: Pretrainings) -> RecordedRun:
    record = run.record
    if record.task == "pretrain":
        mixed = record.config.get("stylize", 0) > 0
        return replace(run, record=replace(record, dataset=record.dataset + _NOTE)) if mixed else run
    found = pretrainings.of(record)
    if found is None or not found.stand_in:
        return run
    label = str(record.backbone.get("label") or record.backbone.get("arch"))
    backbone = {**record.backbone, "label": label + _NOTE}
    return replace(run, record=replace(record, run_id=record.run_id + _NOTE, backbone=backbone))


def _weights(run: RecordedRun, name: str) -> str:
    """The sha256 of a file of a pre-training; empty if unknown."""
    path, noted = run.folder / f"{name}.pt", run.record.backbone.get(f"{name}_sha256")
    return str(noted) if noted else sha256(path) if path.is_file() else ""


def _identity(record: RunRecord) -> tuple[Any, ...]:
    backbone = record.backbone
    return (backbone.get("arch"), backbone.get("num_classes"), record.threat_model, backbone.get("stem", "imagenet"))


def _pretraining(record: RunRecord, prefix: str) -> Pretraining | None:
    accuracy = record.metrics.get(f"{prefix}{METRIC}")
    if accuracy is None:
        return None
    mixed = record.config.get("stylize", 0) > 0
    return Pretraining(accuracy, record.dataset, mixed or is_stylized(record.dataset), stand_in=mixed)


def targets(runs: Sequence[RecordedRun], pretrainings: Pretrainings) -> list[Target]:
    """The experiments among runs of one mode, with the backbones that have a result."""
    found = []
    for experiment in experiments(runs):
        measured = [backbone for backbone in experiment.backbones if backbone.values(METRIC)]
        names = networks([backbone.family for backbone in measured])
        sources = tuple(_source(one, names[one.family], pretrainings) for one in measured)
        if sources:
            record = experiment.runs[0].record
            mode = str(record.config.get("mode"))
            found.append(Target(mode, experiment.dataset, experiment.setting, record, sources))
    return found


def _source(backbone: BackboneRuns, arch: str, pretrainings: Pretrainings) -> TransferSource:
    records = [run.record for run in backbone.runs.values()]
    # There may be a pre-training a seed: the source accuracy is then their mean.
    known = [found for record in records if (found := pretrainings.of(record))]
    pretraining = None
    if len(known) == len(records):
        pretraining = known[0]
        if len(set(known)) > 1:
            pretraining = replace(pretraining, accuracy=fmean(found.accuracy for found in known))
    model = backbone.threat_model
    standard = ThreatModel() if model and model.epsilon == 0 else model  # whatever its norm
    return TransferSource(backbone.name, arch, standard, pretraining, Trials(tuple(backbone.values(METRIC).values())))


Point = tuple[float, Trials, str]
"""Source accuracy (0-100), trials of transfer, and a label."""


@dataclass(frozen=True)
class Series:
    """Backbones with a common property."""

    label: str
    points: tuple[Point, ...]

    @property
    def fit(self) -> LinearFit | None:
        """Fit of the means to the source accuracies."""
        return linear_fit([x for x, _, _ in self.points], [trials.mean for _, trials, _ in self.points])

    @property
    def fit_text(self) -> str:
        n = len(self.points)
        return f"R² {self.fit.r_squared:.2f}, n = {n}" if self.fit else f"no fit, n = {n}"


def over_epsilons(target: Target) -> list[Series]:
    """One series per architecture and norm, by epsilon; each norm starts at the standard backbone."""
    norms = sorted({model.norm for model in target.threat_models if model.epsilon}) or ["L2"]
    return _series(
        (f"{name(arch)}, {NORMS[norm]}", model.epsilon, (accuracy, trials, epsilon_text(model)))
        for model, arch, accuracy, trials in _known(target)
        for norm in ([model.norm] if model.epsilon else norms)
    )


def over_architectures(target: Target) -> list[Series]:
    """One series per threat model, by source accuracy."""
    return _series(
        (str(model), accuracy, (accuracy, trials, name(arch))) for model, arch, accuracy, trials in _known(target)
    )


def _known(target: Target) -> Iterator[tuple[ThreatModel, str, float, Trials]]:
    """The standard and robust backbones with known source accuracy: (trained at, architecture, accuracy, trials)."""
    for model in target.threat_models:
        for source in target.sources:
            if source.threat_model == model and source.pretraining and source.kind != "stylized":
                yield model, source.arch, source.pretraining.accuracy, source.trials


def _series(members: Iterable[tuple[str, float, Point]]) -> list[Series]:
    """Series from (its label, position in it, point), with at least two differently labelled points each."""
    groups: dict[str, list[tuple[float, Point]]] = {}
    for label, place, point in members:
        groups.setdefault(label, []).append((place, point))
    ordered = {k: tuple(p for _, p in sorted(group, key=lambda member: member[0])) for k, group in groups.items()}
    return [Series(k, points) for k, points in ordered.items() if len({text for *_, text in points}) > 1]


@dataclass(frozen=True)
class Curve:
    """Transfer over the epsilon of pre-training, for one architecture and norm."""

    points: tuple[tuple[float, Trials], ...]
    """(epsilon, trials), by epsilon."""

    @property
    def best(self) -> tuple[float, Trials]:
        """The point with the highest mean; the first of equal ones."""
        return max(self.points, key=lambda point: point[1].mean)

    @property
    def rivals(self) -> list[float]:
        """Other epsilons whose best trial reaches the worst trial of the best one."""
        epsilon, best = self.best
        return [other for other, trials in self.points if other != epsilon and trials.high >= best.low]


def curves(target: Target, arch: str) -> dict[str, Curve]:
    """Norm -> curve of two epsilons or more; each starts at the standard backbone."""
    found = {}
    for norm in sorted({model.norm for model in target.threat_models if model.epsilon}):
        models = [model for model in target.threat_models if model.norm == norm or model.epsilon == 0]
        points = [(model.epsilon, trials) for model in models if (trials := target.trials(arch, model))]
        if len(points) > 1:
            found[norm] = Curve(tuple(points))
    return found


def pairs(originals: Sequence[Target], reduced: Sequence[Target]) -> list[tuple[Target, Target]]:
    """Data sets used at full and at lower resolution, with otherwise equal settings."""

    def full_size(target: Target) -> dict[str, Any]:
        return {**setting(target.record), "downscale": 0}

    return [
        (one, other)
        for one in originals
        for other in reduced
        if one.dataset == other.dataset and full_size(one) == full_size(other)
    ]


def name(arch: str) -> str:
    """As in figures."""
    return NAMES.get(arch, arch)


def in_order(archs: Iterable[str]) -> list[str]:
    """By depth and width, as ``models.ARCHITECTURES`` is."""
    order = list(ARCHITECTURES)
    return sorted(archs, key=lambda arch: (order.index(arch) if arch in order else len(order), arch))


def epsilon_text(model: ThreatModel) -> str:
    """Epsilon alone, in 1/255 if the norm is linf."""
    return f"{255 * model.epsilon:g}/255" if model.norm == "Linf" else f"{model.epsilon:g}"
