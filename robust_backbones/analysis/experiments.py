"""Sorts runs into experiments: runs that differ only in backbone and seed are compared."""

from __future__ import annotations

import math
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

from robust_backbones.analysis.records import RecordedRun
from robust_backbones.analysis.statistics import Summary, summarize
from robust_backbones.configs import DETECTOR_KEYS
from robust_backbones.data.corruptions import CORRUPTIONS
from robust_backbones.errors import InputError
from robust_backbones.runs.identity import DIGESTS, flat, identity
from robust_backbones.runs.record import RunRecord
from robust_backbones.threat_models import ThreatModel
from robust_backbones.transfer import finetune, linear_probe
from robust_backbones.transfer.config import TransferConfig

TASKS = {
    "detection": "Detection",
    "segmentation": "Instance segmentation",
    "transfer": "Classification transfer",
    "detector_robustness": "Robustness of detectors",
}
"""Tasks whose backbones are compared."""
METRICS = {"bbox": "box", "segm": "mask", "bbox-area": "box (area)", "bbox-11point": "box (11-point)"}
HEADLINES = ("bbox/AP", "segm/AP", "clean_accuracy", "robust_accuracy")
"""The metrics of summary and figures."""
# What is varied within an experiment: backbone and seed, and of a transfer trial what its grid chose.
_VARIED = {
    "SEED",
    "MODEL.WEIGHTS",
    "MODEL.BACKBONE.FROM_SCRATCH",
    "weights_sha256",
    "seed",
    "seeds",
    "run",
    "lr",
    "weight_decay",
}
_CHOSEN = ("selection.", "warnings.")
_SCRATCH = "from scratch"

# The keys that name experiments of one task and data set, before any other key of their configurations.
_NAMING = (
    "mode",
    "solver",
    "augmentation",
    "views",
    "MODEL.RESNETS.DEPTH",
    "MODEL.RESNETS.NUM_GROUPS",
    "MODEL.RESNETS.WIDTH_PER_GROUP",
    "MODEL.BACKBONE.NAME",
    "MODEL.BACKBONE.TIMM",
    "MODEL.BACKBONE.FREEZE_AT",
    "MODEL.RESNETS.NORM",
    "MODEL.BACKBONE.FROM_SCRATCH",
    "SOLVER.MAX_ITER",
    "SOLVER.IMS_PER_BATCH",
    "SOLVER.BASE_LR",
    "INPUT.MIN_SIZE_TEST",
    "DATASETS.TRAIN",
)


@dataclass(frozen=True)
class BackboneRuns:
    """One backbone's runs in an experiment, by seed."""

    name: str
    threat_model: ThreatModel | None
    runs: Mapping[int, RecordedRun]

    @property
    def is_standard(self) -> bool:
        is_clean = self.threat_model is not None and self.threat_model.epsilon == 0
        return is_clean and not is_stylized(self.name)

    @property
    def family(self) -> tuple[Any, ...]:
        """Architecture and pre-training, shared with the standard backbone that it is compared with."""
        return family(next(iter(self.runs.values())).record)

    @property
    def label(self) -> str:
        """Name and threat model, without repetition."""
        return self.name if self.name == self.trained_at else f"{self.name} {self.trained_at}"

    @property
    def is_from_scratch(self) -> bool:
        return self.name == _SCRATCH

    @property
    def trained_at(self) -> str:
        if self.threat_model is None:
            return _SCRATCH if self.is_from_scratch else "unknown"
        return str(self.threat_model)

    def values(self, metric: str) -> dict[int, float]:
        """Seed -> result (0-100), if there is one."""
        found = {seed: run.record.metrics.get(metric) for seed, run in self.runs.items()}
        return {seed: value for seed, value in found.items() if value is not None and math.isfinite(value)}

    def summary(self, metric: str) -> Summary | None:
        """Over the seeds, within the metric's bounds; None if no seed has a result."""
        values = list(self.values(metric).values())
        return summarize(values, bounds=bounds(metric)) if values else None


@dataclass(frozen=True)
class Experiment:
    """Runs that differ only in backbone and seed, so that only these are compared."""

    task: str
    dataset: str
    setting: str
    """The settings that differ in other experiments of its task and data set; empty if there are none."""
    backbones: tuple[BackboneRuns, ...]
    """The standard ones first, then by norm and epsilon."""
    notes: tuple[str, ...]
    number: int = 1
    """Number among experiments whose titles give the same file name."""

    @property
    def title(self) -> str:
        return f"{TASKS[self.task]} on {self.dataset}" + (f" ({self.setting})" if self.setting else "")

    @property
    def slug(self) -> str:
        """The title as a prefix of file names, short enough for them."""
        name = re.sub(r"[^a-z0-9]+", "_", f"{self.task} {self.dataset} {self.setting}".lower()).strip("_")
        name = name if len(name) <= 100 else f"{name[:90]}_{zlib.crc32(name.encode()):08x}"
        return name if self.number == 1 else f"{name}_{self.number}"

    @property
    def runs(self) -> list[RecordedRun]:
        return [run for backbone in self.backbones for run in backbone.runs.values()]

    def standards(self, backbone: BackboneRuns) -> list[BackboneRuns]:
        """The standard backbones of its architecture and pre-training, as far as both are known: one to compare with.

        A backbone trained from scratch is compared with the only standard one.
        """
        return [
            one
            for one in self.backbones
            if one.is_standard
            and all(None in pair or len({*pair}) == 1 for pair in zip(one.family, backbone.family, strict=True))
        ]

    def reference(self, backbone: BackboneRuns) -> BackboneRuns | None:
        """The backbone that this one is compared with; None for standard ones, or if there is not exactly one."""
        standards = [] if backbone.is_standard else self.standards(backbone)
        return standards[0] if len(standards) == 1 else None

    @property
    def robust(self) -> list[BackboneRuns]:
        """Backbones to compare with a standard one, with known or unknown training."""
        return [b for b in self.backbones if not b.is_standard and not b.is_from_scratch]

    @property
    def metrics(self) -> list[str]:
        """Metrics that get a table and have a value in some run."""
        names = dict.fromkeys(name for run in self.runs for name in run.record.metrics)
        # Without an adversary, robust accuracy is the clean one once more.
        if str(self.runs[0].record.config.get("eval_threat_model") or "L2:0").endswith(":0"):
            names.pop("robust_accuracy", None)
        if self.task == "detector_robustness":  # of single corruptions none has a table; elsewhere such are test sets
            names = {name: None for name in names if name.split("/")[0].split("-")[0] not in CORRUPTIONS}
        found = [name for name in names if is_reported(name) and any(b.values(name) for b in self.backbones)]
        # Over all corruptions this is mPC, and a second test of the same numbers would only make Holm's level stricter.
        return [name for name in found if name.replace("corrupted/", "mPC/") not in {*found} - {name}]

    @property
    def headlines(self) -> list[str]:
        """AP of boxes and masks, or accuracy, for each of several test sets."""
        return [name for name in self.metrics if f"/{name}".endswith(tuple(f"/{headline}" for headline in HEADLINES))]

    @cached_property
    def mixed_versions(self) -> dict[str, Counter[str]]:
        """Package -> number of runs by version, for packages whose version differs among runs."""
        packages = sorted({package for run in self.runs for package in run.record.versions})
        found = {name: Counter(run.record.versions.get(name, "none") for run in self.runs) for name in packages}
        return {package: versions for package, versions in found.items() if len(versions) > 1}

    def is_odd(self, backbone: BackboneRuns) -> bool:
        """Whether one of its runs has another version of some library than most runs of the experiment."""
        usual = {package: versions.most_common(1)[0][0] for package, versions in self.mixed_versions.items()}
        own = [{name: run.record.versions.get(name, "none") for name in usual} for run in backbone.runs.values()]
        return any(versions != usual for versions in own)

    @property
    def remarks(self) -> list[str]:
        """Remarks on every table of the experiment."""
        remarks = list(self.notes)
        repeated = [backbone for backbone in self.backbones if len(backbone.runs) > 1]
        of_one_file = [b.label for b in repeated if len({run.weights for run in b.runs.values()}) == 1]
        if self.task != "transfer" and of_one_file:
            whose = "a backbone" if len(of_one_file) == len(repeated) else " and ".join(of_one_file)
            remarks.append(
                f"The seeds of {whose} start from one pre-trained file: spread and tests are about fine-tuning, and "
                "what another pre-training would change is not in them."
            )
        if self.mixed_versions:
            listed = "; ".join(
                f"{package} " + ", ".join(f"{version} in {count}" for version, count in versions.items())
                for package, versions in self.mixed_versions.items()
            )
            remarks.append(f"† Library versions are mixed ({listed} runs): a difference may be theirs.")
        return remarks


def experiments(runs: Sequence[RecordedRun]) -> list[Experiment]:
    """The runs of TASKS, sorted into comparable groups.

    Raises:
        InputError: two runs have the same settings but different results.
    """
    groups: dict[tuple[str, str], list[tuple[dict[str, Any], list[RecordedRun]]]] = {}
    for run in sorted(runs, key=lambda run: not flat(run.record.config).get(DIGESTS)):
        if run.record.task in TASKS and "cell" not in run.record.config:
            alternatives = groups.setdefault((run.record.task, run.record.dataset), [])
            own = setting(run.record)
            alike = [members for known, members in alternatives if known == own]
            if not (alike or own.get(DIGESTS)):
                # A record of before annotations were noted is taken to be of those that all others have.
                unsaid = {DIGESTS: None}
                alike = [members for known, members in alternatives if known | unsaid == own | unsaid]
            if len(alike) == 1:
                alike[0].append(run)
            else:
                alternatives.append((own, [run]))
    order = list(TASKS)
    # What a sweep calls a backbone tells two of one family apart. Of one, the files of some seeds may have no name yet.
    called: dict[tuple[Any, ...], set[str]] = {}
    for run in runs:
        if run.named:
            called.setdefault((run.record.threat_model, family(run.record)), set()).add(run.named)
    several = {kind for kind, names in called.items() if len(names) > 1}
    named = {
        run.weights: run.named for run in runs if run.named and (run.record.threat_model, family(run.record)) in several
    }
    found: list[Experiment] = []
    for (task, dataset), alternatives in sorted(groups.items(), key=lambda item: (order.index(item[0][0]), item[0][1])):
        names = setting_names([own for own, _ in alternatives])
        for name, (_, members) in zip(names, alternatives, strict=True):
            one, taken = Experiment(task, dataset, name, *_backbones(members, named)), {other.slug for other in found}
            while one.slug in taken:
                one = replace(one, number=one.number + 1)
            found.append(one)
    return found


def setting(record: RunRecord) -> dict[str, Any]:
    """A run's configuration without the keys that may differ within an experiment."""
    config = identity(record.config, _defaults(str(record.config.get("mode"))))
    varied = {*_VARIED, "SOLVER.CHOSEN", *config.get("SOLVER.CHOSEN", ())}
    return {key: value for key, value in config.items() if key not in varied and not key.startswith(_CHOSEN)}


@cache
def _defaults(mode: str) -> dict[str, Any]:
    """Defaults of settings that records do not name; only those of transfer trials have a ``mode``."""
    if mode == linear_probe.MODE:
        return linear_probe.ProbeConfig().to_dict()
    if mode == finetune.MODE:
        return {**finetune.FinetuneConfig().to_dict(), **TransferConfig().to_dict()}
    return DETECTOR_KEYS


def is_reported(metric: str) -> bool:
    """Whether a metric gets a table of its own: AP, AP50 and AP75 of boxes and masks, clean and robust accuracy.

    For corruptions and attacks, those of their cells.
    """
    # The best of several evaluations on the test images is no result.
    is_average = re.search(rf"(^|/)({'|'.join(METRICS)})/AP(50|75)?$", metric) and not metric.startswith("best/")
    return metric in ("clean_accuracy", "robust_accuracy") or bool(is_average)


def bounds(metric: str) -> tuple[float, float]:
    """The range of a metric: AP and accuracies are in [0, 100]; rPC is a ratio."""
    return (0.0, math.inf if metric.startswith("rPC/") else 100.0)


def is_stylized(name: str) -> bool:
    """Whether a backbone or data set, by its name, is of stylised images."""
    return re.search(r"styli[sz]e", name.lower()) is not None


def metric_name(metric: str) -> str:
    """``segm/AP50`` -> ``mask AP50``, preceded by the test set if a run has several."""
    *dataset, kind, name = ["", *metric.split("/")][-3:]
    text = f"{METRICS[kind]} {name}" if kind in METRICS else name.replace("_", " ")
    return " ".join([*filter(None, dataset), text])


def _backbones(
    runs: Sequence[RecordedRun], named: Mapping[str, str]
) -> tuple[tuple[BackboneRuns, ...], tuple[str, ...]]:
    """The runs of one experiment by backbone, and those that had to be left out.

    Args:
        named: weights -> their name in a sweep, which shows which pre-trainings for each seed belong together.
    """
    families: dict[tuple[str, str | None, tuple[Any, ...], str], list[RecordedRun]] = {}
    for run in runs:
        backbone = run.record.backbone
        name = str(backbone.get("label") or backbone.get("arch") or run.weights_name or "unknown")
        name = _SCRATCH if run.is_from_scratch else name
        key = (name, run.record.threat_model, family(run.record), named.get(run.weights, ""))
        families.setdefault(key, []).append(run)
    backbones, notes = [], []
    same = Counter(key[:3] for key in families)
    alike = Counter(key[:2] for key in same)
    for (name, trained_at, kind, own_name), members in families.items():
        several = own_name and same[name, trained_at, kind] > 1
        if alike[name, trained_at] > 1:  # of one architecture and threat model, pre-trained on other classes
            name = f"{name} of {kind[1] or 'no'} classes"
        name = f"{name} ({own_name})" if several else name
        threat_model = None if trained_at is None else ThreatModel.parse(trained_at)
        # Seeds may come with a pre-training of their own each; two files with one seed are two backbones.
        files = Counter((run.seed, run.weights) for run in members)
        split = len({seed for seed, _ in files}) < len(files)
        parts = {run.weights: run.weights_name for run in members} if split else {"": ""}
        differ = all(parts.values()) and len({*parts.values()}) == len(parts)  # a study's are all called backbone.pkl
        for weights, file in sorted(parts.items()):
            chosen: dict[int, RecordedRun] = {}
            own = [run for run in members if not split or run.weights == weights]
            for run in sorted(own, key=lambda run: run.seed):
                twin = chosen.setdefault(run.seed, run)
                if twin is run:
                    continue
                if twin.record.metrics != run.record.metrics:
                    raise InputError(
                        f"{twin.place} and {run.place} are the same run (data, configuration, backbone, seed) with "
                        "different results: leave one of them out"
                    )
                notes.append(f"{run.folder.name} repeats {twin.folder.name} to the last digit and is counted once.")
            label = f"{name} ({file if differ else weights[:8]})" if split else name
            backbones.append(BackboneRuns(label, threat_model, chosen))
    return tuple(sorted(backbones, key=_order)), tuple(notes)


def family(record: RunRecord) -> tuple[Any, ...]:
    """Architecture and pre-training of a run's backbone: (architecture, classes, stem), each None if unknown.

    Files without a classifier, as converted ones, do not say on how many classes they were trained.
    """
    return tuple(record.backbone.get(key) or None for key in ("arch", "num_classes", "stem"))


def networks(families: Iterable[tuple[Any, ...]]) -> dict[tuple[Any, ...], str]:
    """Family -> the name of its architecture, with its stem, and with its classes if they differ among families.

    Networks pre-trained on ImageNet's 1000 classes keep the plain name.
    """
    names = {
        (arch, classes, stem): (arch or "unknown") + (f" ({stem} stem)" if stem not in (None, "imagenet") else "")
        for arch, classes, stem in families
    }
    shared = Counter(names.values())
    return {
        family: name if shared[name] == 1 or family[1] == 1000 else f"{name} of {family[1] or 'no'} classes"
        for family, name in names.items()
    }


def _order(backbone: BackboneRuns) -> tuple[Any, ...]:
    model = backbone.threat_model
    if model is None:
        return (2, "", 0.0, backbone.name)
    return (0 if model.epsilon == 0 else 1, model.norm, model.epsilon, backbone.name)


def setting_names(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """For each setting the few keys in which it differs from the others; nothing if there is only one."""
    order = {key: place for place, key in enumerate(_NAMING)}
    keys = sorted({key for s in settings for key in s}, key=lambda key: (order.get(key, len(order)), key))
    names: list[list[str]] = [[] for _ in settings]

    def split(group: Sequence[int]) -> None:
        """Split by the first key whose values differ; equal ones by the next key."""
        for key in keys if len(group) > 1 else ():
            parts: dict[str, list[int]] = {}
            for index in group:
                parts.setdefault(repr(settings[index].get(key, _ABSENT)), []).append(index)
            if len(parts) > 1:
                for part in parts.values():
                    for index in part:
                        names[index].append(_key_and_value(key, settings[index]))
                    split(part)
                return

    split(range(len(settings)))
    joined = [", ".join(name) for name in names]
    return [name if joined.count(name) == 1 else f"{name}, {i}" for i, name in enumerate(joined, 1)]  # "1" beside 1


_ABSENT = object()


def _key_and_value(key: str, setting: Mapping[str, Any]) -> str:
    if attack := re.fullmatch(r"attacks\.attack-(\w+)\.(.+)", key):
        if key not in setting:
            return f"without the {attack[1]} attack"
        what, value = attack[2].removeprefix("threat_model."), setting[key]
        return f"with a {attack[1]} attack" if what == "loss" else f"{attack[1]} attack's {what} {_fraction(value)}"
    if key == DIGESTS:
        noted = ", ".join(f"{name} {digest[:8]}" for name, digest in setting.get(key, ()))
        return f"annotations {noted or 'not noted'}"
    if key == "adversarial_training":
        return f"fine-tuned adversarially, {setting[key]}" if setting.get(key) else "fine-tuned as usual"
    if key not in setting:
        return f"without {key}"
    return str(setting[key]).replace("_", " ") if key == "mode" else f"{key} {setting[key]}"


def _fraction(value: Any) -> str:
    """An epsilon in units of 1/255 if it is a multiple."""
    if isinstance(value, float) and abs(value * 255 - round(value * 255)) < 1e-6 and 0 < value < 0.25:
        return f"{round(value * 255)}/255"
    return str(value)
