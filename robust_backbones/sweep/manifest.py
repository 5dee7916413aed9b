"""The manifest of a study, a YAML file: which backbones are compared on which tasks, protocols and seeds."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from robust_backbones.checkpoint import zoo
from robust_backbones.configs import STUDY_DIR, StrictLoader, find_file, nearest_names
from robust_backbones.errors import InputError
from robust_backbones.runs.cluster import ClusterConfig

TRANSFER_MODES = ("probe", "finetune")
_BACKBONES = ("pretrain", "file", "published", "scratch")
_STATEMENTS = ("source", "key", "prefix", "mean", "std", "channel_order", "stride_in_1x1", "threat_model")
_CLUSTER_KEYS = ("nodes", "processes", "partition", "hours", "restarts")
Options = Mapping[str, Any]
T = TypeVar("T", bound="BackboneEntry | Task")


@dataclass(frozen=True)
class BackboneEntry:
    """The source of a backbone: exactly one of ``pretrain``, ``file``, ``published`` and ``scratch``."""

    name: str
    pretrain: str = ""
    """A name under ``pretraining``."""
    file: str = ""
    """A checkpoint of any source that ``convert`` reads, including converted ones."""
    published: str = ""
    """One of the published robust backbones, such as ``resnet50_l2_eps3``, with or without ``robust://``."""
    scratch: str = ""
    """An architecture, such as ``resnet50``, with random weights: a baseline for detectors, not for transfer."""
    options: Options = field(default_factory=dict)
    """What ``file`` does not say itself: options of the verb ``convert``."""


@dataclass(frozen=True)
class Choice:
    """The backbones of a task: the best of an earlier task, which has other images and seeds.

    If that task has a ``grid``, each backbone takes the values that were best for it.
    """

    task: str
    metric: str
    """As in records, such as ``bbox/AP``; means over seeds are compared."""
    best: int = 0
    """Number of backbones, in addition to ``keep``; 0: all."""
    keep: tuple[str, ...] = ()
    """Taken whatever their results, such as the standard one."""


@dataclass(frozen=True)
class Task:
    """What backbones are compared on: a detector, by ``config_files``, or classification, by ``transfer``."""

    name: str
    config_files: tuple[str, ...] = ()
    """Files that exist, or configurations of the package, as ``quick/mask_rcnn_R_50_FPN_coco_instant.yaml``."""
    overrides: Options = field(default_factory=dict)
    """Detectron2's keys."""
    protocols: tuple[str, ...] = ()
    """Names under the manifest's ``protocols``; all if none is given."""
    transfer: str = ""
    """One of ``TRANSFER_MODES``."""
    dataset: str = ""
    options: Options = field(default_factory=dict)
    """Of the verb ``transfer``; the manifest's seeds are its trials."""
    robustness: Options = field(default_factory=dict)
    """Options of the verb ``evaluate detector``, run for every detector of the task; without any it is not run."""
    backbones: tuple[str, ...] = ()
    """All if none is given."""
    seeds: tuple[int, ...] = ()
    """The manifest's if none is given."""
    grid: Options = field(default_factory=dict)
    """Detectron2's keys, each with a list of values; a run for each combination."""
    choose: Choice | None = None


@dataclass(frozen=True)
class PrimaryComparison:
    """What the study is to find out, declared before its runs: one robust backbone against the standard one."""

    task: str
    """A detector."""
    metric: str
    """As in records: ``bbox/AP``, ``segm/AP``."""
    backbone: str = ""
    """None for a task that chooses: then it is the best one of its choice."""
    standard: str = "standard"
    """The backbone to compare with."""
    protocol: str = ""
    """Where the task has several."""
    difference: float | None = None
    """Expected, in points; if not given, a pilot's or the paper's."""
    std: float | None = None
    """Expected standard deviation of the paired differences over seeds, in points."""
    chosen: str = ""
    """How the backbone was chosen, in words: on which data and seeds."""


@dataclass(frozen=True)
class Manifest:
    """A study, as its file describes it."""

    path: Path
    name: str
    output: Path
    cost: str
    seeds: tuple[int, ...]
    pretraining: Mapping[str, Options]
    """Options of the verb ``pretrain`` by the runs' names."""
    backbones: tuple[BackboneEntry, ...]
    protocols: Mapping[str, tuple[str, ...]]
    """Configuration files on top of a task's."""
    tasks: tuple[Task, ...]
    primary: PrimaryComparison | None
    cluster: ClusterConfig
    imagenet: str = ""
    """A folder with val/; if it exists, published backbones are first checked on it."""
    report: str = ""
    """The title of the report that is made once all runs are done; empty: no report."""

    def seeds_of(self, task: Task) -> tuple[int, ...]:
        return task.seeds or self.seeds

    def protocols_of(self, task: Task) -> tuple[str, ...]:
        """Names under ``protocols``; an empty name if there are none."""
        return task.protocols or tuple(self.protocols) or ("",)

    def task(self, name: str) -> Task:
        return next(task for task in self.tasks if task.name == name)


def read_manifest(path: str | Path, output: str | Path | None = None) -> Manifest:
    """Read a manifest: an existing file, or one of the package's, such as ``small.yaml`` or ``studies/small.yaml``.

    Args:
        output: replaces the manifest's folder (``runs/NAME`` if it has none).

    Raises:
        InputError: no such file, not YAML, an unknown key (the message names the valid ones), an undefined name.
    """
    path = find_file(path, STUDY_DIR)
    try:
        return _manifest(path, yaml.load(path.read_text(), StrictLoader), output)
    except OSError as error:
        raise InputError(
            f"cannot read the manifest {path} ({error.strerror}): of the package's, the nearest names are "
            f"{nearest_names(path.name, STUDY_DIR)}"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no YAML: {error}") from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _manifest(path: Path, content: Any, output: str | Path | None) -> Manifest:
    content = _mapping("the manifest", content, [one.name for one in fields(Manifest) if one.name != "path"])
    sections = {
        section: {_name(key): entry for key, entry in _mapping(section, content.get(section)).items()}
        for section in ("pretraining", "protocols", "backbones", "tasks")
    }
    for section in ("backbones", "tasks"):
        if not sections[section]:
            raise InputError(f"it has no {section}: give at least one")
    manifest = Manifest(
        path=path,
        name=(name := _name(content.get("name", path.stem))),
        output=Path(output or content.get("output") or f"runs/{name}"),
        cost=str(content.get("cost") or "").strip(),
        seeds=_seeds(content.get("seeds", [0])),
        pretraining={run: _options(run, options) for run, options in sections["pretraining"].items()},
        backbones=tuple(_backbone(key, entry) for key, entry in sections["backbones"].items()),
        protocols={protocol: _texts(protocol, files) for protocol, files in sections["protocols"].items()},
        tasks=tuple(_task(key, entry) for key, entry in sections["tasks"].items()),
        primary=_primary(content["primary"]) if content.get("primary") is not None else None,
        cluster=_cluster(content.get("cluster")),
        imagenet=str(content.get("imagenet") or ""),
        report=str(content.get("report") or ""),
    )
    used = {backbone.pretrain for backbone in manifest.backbones} - {""}
    for backbone in manifest.backbones:
        if backbone.pretrain:
            _known(f"the pretraining of backbone {backbone.name}", backbone.pretrain, manifest.pretraining)
    for task in manifest.tasks:
        for protocol in task.protocols:
            _known(f"a protocol of task {task.name}", protocol, manifest.protocols)
        for name in task.backbones:
            _known(f"a backbone of task {task.name}", name, sections["backbones"])
        if task.choose:
            _check_choice(task, task.choose, manifest)
    if primary := manifest.primary:
        _check_primary(primary, manifest)
    if unused := manifest.pretraining.keys() - used:
        raise InputError(f"no backbone uses the pretraining {', '.join(sorted(unused))}: leave it out, or add one")
    return manifest


def _primary(content: Any) -> PrimaryComparison:
    values = _mapping("primary", content, [one.name for one in fields(PrimaryComparison)])
    if missing := [name for name in ("task", "metric") if not values.get(name)]:
        raise InputError(f"primary needs {', '.join(missing)}: it is one comparison, declared before the runs")
    for name in ("difference", "std"):
        value = values.get(name)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (is_number and 0 < abs(value) < math.inf):
            raise InputError(f"{name} of primary must be a number of points, not 0, got {value!r}")
    if (values.get("std") or 1) < 0 or ("difference" in values) != ("std" in values):
        raise InputError("primary has both difference and std (above 0), of paired differences over seeds, or neither")
    texts = {name: str(value) for name, value in values.items() if name not in ("difference", "std")}
    return PrimaryComparison(**{**values, **texts})


def _check_primary(primary: PrimaryComparison, manifest: Manifest) -> None:
    tasks = {task.name: task for task in manifest.tasks}
    _known("the task of primary", primary.task, tasks)
    task = tasks[primary.task]
    if task.transfer or task.grid:
        kind = "is a transfer" if task.transfer else "has a grid"
        raise InputError(f"the task of primary, {task.name}, {kind}: give a detector's without one")
    compared = _compared(task, manifest)
    if bool(primary.backbone) == (task.choose is not None):
        mend = "leave backbone out: it is the best of the choice" if task.choose else "give it a backbone"
        raise InputError(f"primary is of task {task.name}: {mend}")
    for name in ("backbone", "standard") if primary.backbone else ("standard",):
        _known(f"the {name} of primary", getattr(primary, name), task.choose.keep if task.choose else compared)
    if primary.backbone == primary.standard:
        raise InputError(f"primary compares {primary.backbone} with itself: give another backbone or standard")
    protocols = manifest.protocols_of(task)
    if len(protocols) > 1 or primary.protocol:
        _known("the protocol of primary", primary.protocol, protocols)


def _compared(task: Task, manifest: Manifest) -> list[str]:
    """The names of the backbones that a task has, or chooses among."""
    task = manifest.task(task.choose.task) if task.choose else task
    return [*(task.backbones or (backbone.name for backbone in manifest.backbones))]


def _check_choice(task: Task, choice: Choice, manifest: Manifest) -> None:
    earlier = [other.name for other in manifest.tasks[: manifest.tasks.index(task)]]
    _known(f"the task that {task.name} chooses by, which is to stand before it", choice.task, earlier)
    source = manifest.task(choice.task)
    if source.transfer or task.transfer or source.choose or task.backbones:
        raise InputError(
            f"task {task.name} cannot choose by task {source.name}: both are detectors, the latter chooses nothing "
            "itself, and the former names no backbones"
        )
    if len(manifest.protocols_of(source)) > 1:
        raise InputError(f"task {task.name} chooses by task {source.name}, which has several protocols: give it one")
    if shared := sorted({*manifest.seeds_of(task)} & {*manifest.seeds_of(source)}):
        raise InputError(f"task {task.name} has seeds {shared} of task {source.name}, by which it chooses: give others")
    for name in choice.keep:
        _known(f"what task {task.name} keeps", name, _compared(task, manifest))


def _seeds(seeds: Any) -> tuple[int, ...]:
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int and 0 <= seed < 4e9 for seed in seeds):
        raise InputError(f"seeds must be a list of whole numbers >= 0 and below 4 billion, got {seeds!r}")
    if len(set(seeds)) < len(seeds):
        raise InputError(f"seeds must differ, got {seeds}")
    return tuple(seeds)


def _cluster(content: Any) -> ClusterConfig:
    try:
        return ClusterConfig(**{"processes": 1, **_mapping("cluster", content, _CLUSTER_KEYS)})
    except TypeError as error:
        raise InputError(f"cluster cannot be used ({error})") from None


def _backbone(name: str, content: Any) -> BackboneEntry:
    backbone = _entry(BackboneEntry, f"backbone {name}", name, content)
    if sum(bool(getattr(backbone, origin)) for origin in _BACKBONES) != 1:
        raise InputError(f"backbone {name} must have exactly one of {', '.join(_BACKBONES)}")
    _mapping(f"options of backbone {name}", backbone.options, _STATEMENTS)
    if backbone.options and not backbone.file:
        raise InputError(f"backbone {name} says itself what it is: options are for a file")
    if backbone.published:
        return replace(backbone, published=zoo.find(backbone.published.removeprefix(zoo.PREFIX)).name)
    return backbone


def _task(name: str, content: Any) -> Task:
    content = _mapping(f"task {name}", content)
    own = {key: content[key] for key in ("seeds", "choose") if key in content}
    task = _entry(Task, f"task {name}", name, {key: value for key, value in content.items() if key not in own})
    if "seeds" in own:
        task = replace(task, seeds=_seeds(own["seeds"]))
    if "choose" in own:
        task = replace(task, choose=_choice(name, own["choose"]))
    for key, values in task.grid.items():
        if not isinstance(values, list) or not values or any(isinstance(value, list | dict) for value in values):
            raise InputError(f"grid of task {name} has a list of numbers or texts for each key, got {key}: {values!r}")
    if bool(task.transfer) == bool(task.config_files):
        raise InputError(f"task {name} needs either config_files, of a detector, or transfer, with a dataset")
    if task.transfer:
        _known(f"transfer of task {name}", task.transfer, TRANSFER_MODES)
        if not task.dataset or task.overrides or task.protocols or task.robustness or task.grid or task.choose:
            raise InputError(
                f"task {name} is a transfer: it has a dataset and options, no overrides, protocols, robustness, grid "
                "and choose (its options have eval_threat_model, lrs and weight_decays)"
            )
    elif task.dataset or task.options:
        raise InputError(f"task {name} is a detector: it has overrides and protocols, no dataset and options")
    return task


def _choice(name: str, content: Any) -> Choice:
    values = _mapping(f"choose of task {name}", content, [one.name for one in fields(Choice)])
    best, keep = values.get("best", 0), _texts(f"keep of task {name}", values.get("keep"))
    if not values.get("task") or not values.get("metric") or type(best) is not int or best < 0:
        raise InputError(f"choose of task {name} needs task and metric, and best is a number of backbones (0: all)")
    return Choice(str(values["task"]), str(values["metric"]), best, keep)


def _entry(kind: type[T], what: str, name: str, content: Any) -> T:
    """A dataclass of strings, lists of strings and mappings, from a mapping with some of its fields."""
    known = {one.name: one for one in fields(kind) if one.name != "name"}
    values: dict[str, Any] = {}
    for key, value in _mapping(what, content, known).items():
        if known[key].default_factory is not MISSING:
            values[key] = _options(f"{key} of {what}", value)
        else:
            values[key] = str(value) if known[key].default == "" else _texts(f"{key} of {what}", value)
    return kind(name, **values)


def _mapping(what: str, content: Any, keys: Iterable[str] | None = None) -> dict[str, Any]:
    content = {} if content is None else content
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise InputError(f"{what} must be a mapping of names to values, got {content!r}")
    for key in content:
        if keys is not None and key not in (keys := tuple(keys)):
            raise InputError(f"{what} has an unknown key {key!r}: valid are {', '.join(keys)}")
    return content


def _options(what: str, content: Any) -> dict[str, Any]:
    """Options of a verb may be written as on its command line, ``data-root`` for ``data_root``."""
    return {name.replace("-", "_"): value for name, value in _mapping(what, content).items()}


def _texts(what: str, content: Any) -> tuple[str, ...]:
    content = [] if content is None else content
    if not isinstance(content, list) or not all(isinstance(item, str) for item in content):
        raise InputError(f"{what} must be a list of texts, got {content!r}")
    return tuple(content)


def _known(what: str, name: str, valid: Iterable[str]) -> None:
    valid = list(valid)
    if name not in valid:
        near = difflib.get_close_matches(name, valid, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(valid) or 'none'}"
        raise InputError(f"{what}, {name!r}, is not there: {hint}")


def _name(name: Any) -> str:
    """A name that can be part of a folder's name."""
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name):
        raise InputError(f"{name!r} cannot be part of a folder's name: use letters, digits, and . _ -")
    return name
