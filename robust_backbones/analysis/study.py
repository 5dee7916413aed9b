"""From records to comparable results: runs that differ in backbone and seed alone, and one table a metric of them."""

from __future__ import annotations

import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from robust_backbones.analysis.paper import PaperResult, differences_to_paper, paper_result
from robust_backbones.analysis.statistics import Comparison, Summary, compare, p_value, summarize
from robust_backbones.configs import DETECTOR_KEYS
from robust_backbones.data.corruptions import CORRUPTIONS
from robust_backbones.errors import InputError
from robust_backbones.runs.files import atomic_path
from robust_backbones.runs.identity import flat, identity
from robust_backbones.runs.record import RunRecord
from robust_backbones.threat_models import ThreatModel
from robust_backbones.transfer import finetune, linear_probe
from robust_backbones.transfer.protocol import TransferConfig

TASKS = {
    "detection": "Detection",
    "segmentation": "Instance segmentation",
    "transfer": "Classification transfer",
    "detector_robustness": "Robustness of detectors",
}
"""Tasks whose backbones are compared."""
RECORDS = "records.jsonl"
"""Where a report keeps the records that it is of."""
METHOD = (
    "Means, sample standard deviations (n - 1) and 95 % t intervals are over seeds. Tests are two-sided paired t tests "
    "by seed against the standard backbone; p is after Holm's correction over the tests of one table, and below 0.05 a "
    "backbone is called better or worse. Intervals of differences are of one comparison each, not corrected. d_z is "
    "the mean of the paired differences over their standard deviation (Cohen 1988). The seeds needed give 80 % power "
    "at the observed effect and the strictest corrected level; from few seeds that effect is itself uncertain, and so "
    "is their number."
)
METRICS = {"bbox": "box", "segm": "mask", "bbox-area": "box (area)", "bbox-11point": "box (11-point)"}
HEADLINES = ("bbox/AP", "segm/AP", "clean_accuracy", "robust_accuracy")
"""What summary and figures are about."""
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

# What a reader tells experiments apart by, before any other key of their configurations.
_TELLING = (
    "mode",
    "solver",
    "augmentation",
    "views",
    "MODEL.RESNETS.DEPTH",
    "MODEL.RESNETS.NUM_GROUPS",
    "MODEL.RESNETS.WIDTH_PER_GROUP",
    "MODEL.BACKBONE.NAME",
    "MODEL.BACKBONE.FREEZE_AT",
    "MODEL.RESNETS.NORM",
    "MODEL.BACKBONE.FROM_SCRATCH",
    "SOLVER.MAX_ITER",
    "SOLVER.IMS_PER_BATCH",
    "SOLVER.BASE_LR",
    "INPUT.MIN_SIZE_TEST",
    "DATASETS.TRAIN",
)


@cache
def _defaults(mode: str) -> dict[str, Any]:
    """What records mean by a setting that they do not name; only those of transfer trials have a ``mode``."""
    if mode == linear_probe.MODE:
        return linear_probe.ProbeConfig().to_dict()
    if mode == finetune.MODE:
        return {**finetune.FinetuneConfig().to_dict(), **TransferConfig().to_dict()}
    return DETECTOR_KEYS


@dataclass(frozen=True)
class Run:
    """A record and the folder that it lies in."""

    folder: Path
    record: RunRecord

    @property
    def weights(self) -> str:
        """What tells its backbone's file from others: the sha256, or the name where the file does not say."""
        return str(self.record.backbone.get("source_sha256") or self._weights_name)

    @property
    def _weights_name(self) -> str:
        model = self.record.config.get("MODEL", {})
        return Path(model.get("WEIGHTS", "")).stem if isinstance(model, Mapping) else ""

    @property
    def setting(self) -> dict[str, Any]:
        """Its configuration without what may differ within an experiment."""
        config = identity(self.record.config, _defaults(str(self.record.config.get("mode"))))
        return {key: value for key, value in config.items() if key not in _VARIED and not key.startswith(_CHOSEN)}

    @property
    def seed(self) -> int:
        """That of training, also where an evaluation behind it has one of its own."""
        return int(self.record.config.get("SEED", self.record.seed))

    @property
    def is_from_scratch(self) -> bool:
        """Whether its backbone's weights were random."""
        return bool(flat(self.record.config).get("MODEL.BACKBONE.FROM_SCRATCH")) and not self.record.backbone


@dataclass(frozen=True)
class Backbone:
    """One backbone's runs in an experiment, by seed."""

    name: str
    threat_model: ThreatModel | None
    runs: Mapping[int, Run]

    @property
    def is_standard(self) -> bool:
        return self.threat_model is not None and self.threat_model.epsilon == 0

    @property
    def is_from_scratch(self) -> bool:
        return self.name == _SCRATCH

    @property
    def trained_at(self) -> str:
        if self.threat_model is None:
            return _SCRATCH if self.is_from_scratch else "unknown"
        return str(self.threat_model)

    def values(self, metric: str) -> dict[int, float]:
        """Seed -> result (0-100), where there is one."""
        found = {seed: run.record.metrics.get(metric) for seed, run in self.runs.items()}
        return {seed: value for seed, value in found.items() if value is not None and math.isfinite(value)}


@dataclass(frozen=True)
class Experiment:
    """Runs that differ in backbone and seed alone: what is compared is what was varied."""

    task: str
    dataset: str
    setting: str
    """What tells it from the other experiments of its task and data set; empty where there is none."""
    backbones: tuple[Backbone, ...]
    """The standard ones first, then by norm and epsilon."""
    notes: tuple[str, ...]

    @property
    def title(self) -> str:
        return f"{TASKS[self.task]} on {self.dataset}" + (f" ({self.setting})" if self.setting else "")

    @property
    def slug(self) -> str:
        """The title as the beginning of file names, short enough for one."""
        name = re.sub(r"[^a-z0-9]+", "_", f"{self.task} {self.dataset} {self.setting}".lower()).strip("_")
        return name if len(name) <= 100 else f"{name[:90]}_{zlib.crc32(name.encode()):08x}"

    @property
    def runs(self) -> list[Run]:
        return [run for backbone in self.backbones for run in backbone.runs.values()]

    @property
    def standard(self) -> Backbone | None:
        """The backbone to compare with; None where there is none, or more than one."""
        standards = [backbone for backbone in self.backbones if backbone.is_standard]
        return standards[0] if len(standards) == 1 else None

    @property
    def metrics(self) -> list[str]:
        """Those that get a table, and that some run has a value of."""
        names = dict.fromkeys(name for run in self.runs for name in run.record.metrics)
        # Without an adversary, robust accuracy is the clean one once more.
        adversary = str(self.runs[0].record.config.get("eval_threat_model") or "L2:0")
        return [
            n
            for n in names
            if is_reported(n)
            and any(b.values(n) for b in self.backbones)
            and not (n == "robust_accuracy" and adversary.endswith(":0"))
        ]

    @property
    def headlines(self) -> list[str]:
        """AP of boxes and masks, or accuracy; of several test sets each."""
        return [name for name in self.metrics if f"/{name}".endswith(tuple(f"/{headline}" for headline in HEADLINES))]

    @cached_property
    def mixed_versions(self) -> dict[str, dict[str, list[Path]]]:
        """Package -> version -> folders of runs, for packages that not all runs have in one version."""
        packages = sorted({package for run in self.runs for package in run.record.versions})
        found: dict[str, dict[str, list[Path]]] = {package: {} for package in packages}
        for run in self.runs:
            for package in packages:
                found[package].setdefault(run.record.versions.get(package, "none"), []).append(run.folder)
        return {package: versions for package, versions in found.items() if len(versions) > 1}

    def is_odd(self, backbone: Backbone) -> bool:
        """Whether a run of it has another version of some library than most runs of the experiment."""
        odd = set()
        for versions in self.mixed_versions.values():
            usual = max(versions, key=lambda version: len(versions[version]))
            odd |= {folder for version, folders in versions.items() if version != usual for folder in folders}
        return any(run.folder in odd for run in backbone.runs.values())

    @property
    def remarks(self) -> list[str]:
        """What holds for every table of the experiment."""
        remarks = list(self.notes)
        repeated = [backbone for backbone in self.backbones if len(backbone.runs) > 1]
        if self.task != "transfer" and any(len({r.weights for r in b.runs.values()}) == 1 for b in repeated):
            remarks.append(
                "The seeds of a backbone start from one pre-trained file: spread and tests are about fine-tuning, and "
                "what another pre-training would change is not in them."
            )
        if self.mixed_versions:
            told = "; ".join(
                f"{package} " + ", ".join(f"{version} in {len(folders)}" for version, folders in versions.items())
                for package, versions in self.mixed_versions.items()
            )
            remarks.append(f"† Library versions are mixed ({told} runs): a difference may be theirs.")
        return remarks


@dataclass(frozen=True)
class Row:
    """A backbone in a table; ``comparison`` is with the standard backbone, None for that itself and without one."""

    backbone: Backbone
    summary: Summary | None
    comparison: Comparison | None
    sentence: str


@dataclass(frozen=True)
class Result:
    """One metric of an experiment: a row a backbone, the paper's values where it has some, and what to know of both."""

    experiment: Experiment
    metric: str
    rows: tuple[Row, ...]
    paper: PaperResult | None
    paper_differences: tuple[str, ...]
    """Why the paper's values do not compare with ours; empty where nothing is known to differ."""

    @property
    def notes(self) -> list[str]:
        """What to know beside ``experiment.remarks``: values that are missing, and how the paper's were made."""
        notes = []
        for row in self.rows:
            missing = sorted(row.backbone.runs.keys() - row.backbone.values(self.metric).keys())
            if missing:
                notes.append(
                    f"{row.backbone.name} trained at {row.backbone.trained_at} has no {metric_name(self.metric)} for "
                    f"seed{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}: these count nowhere."
                )
        if self.paper and self.paper_differences:
            differences = "; ".join(self.paper_differences)
            notes.append(f"The paper's values ({self.paper.source}) are not comparable with ours: {differences}.")
        elif self.paper:
            notes.append(
                f"The paper's values ({self.paper.source}) are of the same data, architecture and schedule "
                f"({self.paper.schedule}), as far as is known."
            )
        return notes

    @property
    def title(self) -> str:
        return f"{self.experiment.title}: {metric_name(self.metric)}"

    @property
    def slug(self) -> str:
        return f"{self.experiment.slug}_{re.sub(r'[^a-zA-Z0-9]+', '_', self.metric)}"


def find_runs(folders: Sequence[Path]) -> list[Run]:
    """Every record.json in these folders, however deep, and every record in a report's records.jsonl, each once.

    Raises:
        InputError: a folder is missing or holds no record; a file is no record.
    """
    found: dict[Path, Run] = {}
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"no folder {folder}: give folders of runs")
        paths, collected = sorted(folder.rglob("record.json")), sorted(folder.rglob(RECORDS))
        if not paths and not collected:
            raise InputError(f"no record.json in {folder}: give folders of finished runs")
        for path in paths:
            if path.resolve() not in found:
                found[path.resolve()] = Run(path.parent, _checked(RunRecord.read(path), path))
        for path in collected:
            for run in _read_records(path):
                found.setdefault(run.folder.resolve(), run)
    return list(found.values())


def write_records(runs: Sequence[Run], path: Path) -> None:
    """All records in one file, from which ``find_runs`` reads them again: a line each, with its folder's name."""
    lines = [json.dumps({"folder": run.folder.name, **asdict(run.record)}, sort_keys=True) for run in runs]
    with atomic_path(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n")


def _read_records(path: Path) -> list[Run]:
    runs = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            values = json.loads(line)
            folder, record = values.pop("folder"), RunRecord(**values)
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise InputError(f"{path} holds no record in line {number} ({error}): make the report again") from None
        runs.append(Run(path.parent / f"{number:04d}" / folder, _checked(record, path)))
    return runs


def experiments(runs: Sequence[Run]) -> list[Experiment]:
    """The runs of TASKS, sorted into what can be compared.

    Raises:
        InputError: two runs are the same by all they say, with different results.
    """
    groups: dict[tuple[str, str], list[tuple[dict[str, Any], list[Run]]]] = {}
    for run in runs:
        if run.record.task in TASKS and "cell" not in run.record.config:
            alternatives = groups.setdefault((run.record.task, run.record.dataset), [])
            setting = run.setting
            for known, members in alternatives:
                if known == setting:
                    members.append(run)
                    break
            else:
                alternatives.append((setting, [run]))
    order = list(TASKS)
    found = []
    for (task, dataset), alternatives in sorted(groups.items(), key=lambda item: (order.index(item[0][0]), item[0][1])):
        names = _tell_apart([setting for setting, _ in alternatives])
        for name, (_, members) in zip(names, alternatives, strict=True):
            backbones, notes = _backbones(members)
            found.append(Experiment(task, dataset, name, backbones, notes))
    return found


def results(experiment: Experiment) -> list[Result]:
    """A table's content for each metric of an experiment."""
    return [_result(experiment, metric) for metric in experiment.metrics]


def is_reported(metric: str) -> bool:
    """Whether a metric gets a table of its own: AP, AP50 and AP75 of boxes and masks, clean and robust accuracy.

    Of single corruptions none has one, of their mean and of attacks each.
    """
    # The best of several evaluations on the test images is no result.
    is_average = re.search(rf"(^|/)({'|'.join(METRICS)})/AP(50|75)?$", metric) and not metric.startswith("best/")
    is_corruption = metric.split("/")[0].split("-")[0] in CORRUPTIONS
    return metric in ("clean_accuracy", "robust_accuracy") or (bool(is_average) and not is_corruption)


def metric_name(metric: str) -> str:
    """``segm/AP50`` -> ``mask AP50``, with the test set in front where a run has several."""
    *dataset, kind, name = ["", *metric.split("/")][-3:]
    text = f"{METRICS[kind]} {name}" if kind in METRICS else name.replace("_", " ")
    return " ".join([*filter(None, dataset), text])


def display_rows(result: Result) -> tuple[list[str], list[list[str]]]:
    """Heads and cells of a result's table, for readers; ``-`` is what does not exist."""
    heads = ["backbone", "trained at", "n", "mean ± std", "95 % interval", "difference (95 %)", "p (Holm)", "d_z"]
    heads.append("in words")
    rows = []
    for row in result.rows:
        mark = "†" if result.experiment.is_odd(row.backbone) else ""
        cells = [row.backbone.name + mark, row.backbone.trained_at, *_summary_cells(row.summary)]
        rows.append([*cells, *_comparison_cells(row.comparison), row.sentence])
    if result.paper:
        told = "The paper's value, not ours" + ("; not comparable, see the notes." if result.paper_differences else ".")
        for name, value in (("standard", result.paper.standard), ("best robust", result.paper.robust)):
            mean = f"{value.mean:.2f}" + ("" if value.std is None else f" ± {value.std:.2f}")
            n = "-" if value.n is None else str(value.n)
            rows.append([f"paper: {name}", value.trained_at, n, mean, "-", "-", "-", "-", told])
    return heads, rows


def exact_rows(result: Result) -> tuple[list[str], list[list[str]]]:
    """The same for programs: one number a cell, unrounded; empty is what does not exist."""
    heads = ["origin", "backbone", "trained_at", "n", "seeds", "values", "mean", "std", "low", "high"]
    heads += ["paired_seeds", "difference", "difference_low", "difference_high", "p", "p_holm", "d_z", "seeds_needed"]
    heads += ["verdict", "sentence"]
    rows = []
    for row in result.rows:
        values, s, c = row.backbone.values(result.metric), row.summary, row.comparison
        cells: list[Any] = ["ours", row.backbone.name, row.backbone.trained_at, len(values)]
        cells += [" ".join(map(str, values)), " ".join(map(repr, values.values()))]
        cells += [s.mean, s.std, s.low, s.high] if s else [None] * 4
        if c:
            cells += [" ".join(map(str, c.seeds)), c.difference, c.low, c.high, c.p, c.p_holm, c.effect]
            cells += [c.seeds_needed, c.verdict]
        else:
            cells += [None] * 9
        rows.append(["" if cell is None else str(cell) for cell in [*cells, row.sentence]])
    if result.paper:
        for value in (result.paper.standard, result.paper.robust):
            cells = ["paper", "resnet50", value.trained_at, value.n, None, None, value.mean, value.std, *[None] * 11]
            rows.append(["" if cell is None else str(cell) for cell in [*cells, result.paper.source]])
    return heads, rows


def _result(experiment: Experiment, metric: str) -> Result:
    standard = experiment.standard
    found = {index: backbone.values(metric) for index, backbone in enumerate(experiment.backbones)}
    comparisons: dict[int, Comparison] = {}
    if standard is not None:
        own = standard.values(metric)
        comparisons = compare(own, {i: v for i, v in found.items() if experiment.backbones[i] is not standard})
    rows = []
    for index, backbone in enumerate(experiment.backbones):
        comparison = comparisons.get(index)
        if backbone is standard:
            sentence = "The standard backbone, with which the others are compared."
        elif comparison is None:
            several = any(b.is_standard for b in experiment.backbones)
            sentence = f"Not compared: there is {'more than one' if several else 'no'} standard backbone."
        else:
            sentence = comparison.sentence
        rows.append(
            Row(backbone, summarize(list(found[index].values())) if found[index] else None, comparison, sentence)
        )
    record = experiment.runs[0].record
    paper = paper_result(record, metric)
    return Result(experiment, metric, tuple(rows), paper, tuple(differences_to_paper(record, paper) if paper else ()))


def _backbones(runs: Sequence[Run]) -> tuple[tuple[Backbone, ...], tuple[str, ...]]:
    """The runs of one experiment by backbone, and what had to be left out."""
    families: dict[tuple[str, str | None], list[Run]] = {}
    for run in runs:
        name = _SCRATCH if run.is_from_scratch else _backbone_name(run)
        families.setdefault((name, run.record.threat_model), []).append(run)
    backbones, notes = [], []
    for (name, trained_at), members in families.items():
        threat_model = None if trained_at is None else ThreatModel.parse(trained_at)
        # Seeds may come with a pre-training of their own each; two files with one seed are two backbones.
        files = Counter((run.seed, run.weights) for run in members)
        split = len({seed for seed, _ in files}) < len(files)
        for part in sorted({run.weights for run in members}) if split else [None]:
            chosen: dict[int, Run] = {}
            own = [run for run in members if part is None or run.weights == part]
            for run in sorted(own, key=lambda run: run.seed):
                twin = chosen.setdefault(run.seed, run)
                if twin is run:
                    continue
                if twin.record.metrics != run.record.metrics:
                    raise InputError(
                        f"{twin.folder} and {run.folder} are the same run (data, configuration, backbone, seed) with "
                        "different results: leave one of them out"
                    )
                notes.append(f"{run.folder.name} repeats {twin.folder.name} to the last digit and is counted once.")
            label = f"{name} ({own[0]._weights_name or own[0].weights[:8]})" if split else name
            backbones.append(Backbone(label, threat_model, chosen))
    return tuple(sorted(backbones, key=_order)), tuple(notes)


def _backbone_name(run: Run) -> str:
    backbone = run.record.backbone
    return str(backbone.get("label") or backbone.get("arch") or run._weights_name or "unknown")


def _order(backbone: Backbone) -> tuple[Any, ...]:
    model = backbone.threat_model
    if model is None:
        return (2, "", 0.0, backbone.name)
    return (0 if model.epsilon == 0 else 1, model.norm, model.epsilon, backbone.name)


def _tell_apart(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """For each setting the few keys that tell it from the others; nothing where there is one setting."""
    order = {key: place for place, key in enumerate(_TELLING)}
    keys = sorted({key for s in settings for key in s}, key=lambda key: (order.get(key, len(order)), key))
    names: list[list[str]] = [[] for _ in settings]

    def split(group: Sequence[int]) -> None:
        """By the first key whose values differ; what then still is alike, by the next one."""
        for key in keys if len(group) > 1 else ():
            parts: dict[str, list[int]] = {}
            for index in group:
                parts.setdefault(repr(settings[index].get(key, _ABSENT)), []).append(index)
            if len(parts) > 1:
                for part in parts.values():
                    for index in part:
                        names[index].append(_told(key, settings[index]))
                    split(part)
                return

    split(range(len(settings)))
    told = [", ".join(name) for name in names]
    return [name if told.count(name) == 1 else f"{name}, {i}" for i, name in enumerate(told, 1)]  # "1" beside 1


_ABSENT = object()


def _told(key: str, setting: Mapping[str, Any]) -> str:
    if key not in setting:
        return f"without {key}"
    return str(setting[key]).replace("_", " ") if key == "mode" else f"{key} {setting[key]}"


def _summary_cells(summary: Summary | None) -> list[str]:
    if summary is None:
        return ["0", "-", "-"]
    if summary.std is None:
        return ["1", f"{summary.mean:.2f}", "-"]
    return [str(summary.n), f"{summary.mean:.2f} ± {summary.std:.2f}", f"{summary.low:.2f} to {summary.high:.2f}"]


def _comparison_cells(comparison: Comparison | None) -> list[str]:
    if comparison is None or comparison.difference is None:
        return ["-"] * 3
    difference = f"{comparison.difference:+.2f}"
    if comparison.p_holm is None or comparison.effect is None:
        return [difference, "-", "-"]
    difference += f" ({comparison.low:+.2f} to {comparison.high:+.2f})"
    return [difference, p_value(comparison.p_holm), f"{comparison.effect:+.2f}"]


def _checked(record: RunRecord, path: Path) -> RunRecord:
    """JSON can hold anything under a record's names."""
    kinds = {"run_id": str, "task": str, "backbone": dict, "dataset": str, "metrics": dict, "seed": int, "config": dict}
    kinds["versions"] = dict
    wrong = [name for name, kind in kinds.items() if not isinstance(getattr(record, name), kind)]
    if not wrong and not all(value is None or isinstance(value, int | float) for value in record.metrics.values()):
        wrong = ["metrics"]
    if not wrong and record.threat_model is not None:
        try:
            ThreatModel.parse(record.threat_model)
        except (InputError, TypeError, AttributeError):
            wrong = ["threat_model"]
    if wrong:
        raise InputError(f"{path} is not a run record ({', '.join(wrong)}): remove it, or make its run again")
    return record
