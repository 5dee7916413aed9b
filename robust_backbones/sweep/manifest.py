"""Reads the manifest of a study and expands it: tasks x backbones x protocols x seeds, and the runs behind them."""

from __future__ import annotations

import difflib
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from robust_backbones.checkpoint import zoo
from robust_backbones.checkpoint.format import sha256
from robust_backbones.checkpoint.sources import HUB, Statement, read_checkpoint
from robust_backbones.commands import evaluate, pretrain, transfer
from robust_backbones.configs import CONFIG_DIR, DETECTOR_KEYS
from robust_backbones.errors import InputError
from robust_backbones.models import BackboneSpec
from robust_backbones.runs.cluster import ClusterConfig
from robust_backbones.runs.identity import digest, flat
from robust_backbones.sweep.plan import Plan, Run
from robust_backbones.threat_models import ThreatModel
from robust_backbones.transfer.protocol import labels_of

TOOLS = Path(__file__).resolve().parents[2] / "tools"
TRANSFER_MODES = ("probe", "finetune")
SCRATCH = CONFIG_DIR / "protocols/scratch.yaml"
_BACKBONES = ("pretrain", "file", "published", "scratch")
_STATEMENTS = ("source", "mean", "std", "channel_order", "stride_in_1x1", "threat_model")
Options = Mapping[str, Any]


@dataclass(frozen=True)
class Backbone:
    """Where a backbone comes from: exactly one of ``pretrain``, ``file``, ``published`` and ``scratch``."""

    name: str
    pretrain: str = ""
    """A name under ``pretraining``."""
    file: str = ""
    """A checkpoint of any source that conversion knows, converted ones too."""
    published: str = ""
    """One of the published robust backbones, as ``resnet50_l2_eps3``; ``robust://`` may stand before it."""
    scratch: str = ""
    """Nowhere: an architecture, as ``resnet50``, with random weights; the floor of detectors, and no transfer's."""
    options: Options = field(default_factory=dict)
    """What ``file`` does not say itself: options of tools/convert_backbone.py."""


@dataclass(frozen=True)
class Task:
    """What backbones are compared on: a detector, by ``config_files``, or classification, by ``transfer``."""

    name: str
    config_files: tuple[str, ...] = ()
    overrides: Options = field(default_factory=dict)
    """Detectron2's keys."""
    protocols: tuple[str, ...] = ()
    """Names under the manifest's ``protocols``; all of them when none is given."""
    transfer: str = ""
    """One of ``TRANSFER_MODES``."""
    dataset: str = ""
    options: Options = field(default_factory=dict)
    """Of tools/transfer.py; the manifest's seeds are its trials."""
    robustness: Options = field(default_factory=dict)
    """Options of ``tools/evaluate.py detector``, which then measures every detector of the task; none: it does not."""
    backbones: tuple[str, ...] = ()
    """All when none is given."""


@dataclass(frozen=True)
class Manifest:
    """A study, as its file says it."""

    path: Path
    name: str
    output: Path
    cost: str
    seeds: tuple[int, ...]
    pretraining: Mapping[str, Options]
    """Options of tools/pretrain.py by the runs' names."""
    backbones: tuple[Backbone, ...]
    protocols: Mapping[str, tuple[str, ...]]
    """Configuration files on top of a task's."""
    tasks: tuple[Task, ...]
    cluster: ClusterConfig


_KEYS = tuple(field.name for field in fields(Manifest) if field.name != "path")
_CLUSTER_KEYS = ("processes", "partition", "hours", "restarts")


def read_manifest(path: Path, output: Path | None = None) -> Manifest:
    """Read a manifest; ``output`` replaces the folder that it names (``runs/NAME`` when it names none).

    Raises:
        InputError: no such file, no YAML, an unknown key (the message names the valid ones), a name that stands for
            nothing.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise InputError(f"cannot read the manifest {path} ({error.strerror}): see studies/ for examples") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    try:
        return _manifest(path, content, output)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _manifest(path: Path, content: Any, output: Path | None) -> Manifest:
    content = _mapping("the manifest", content, _KEYS)
    name = _name(content.get("name", path.stem))
    pretraining = {_name(run): _mapping(run, options) for run, options in _section(content, "pretraining")}
    protocols = {_name(protocol): _texts(protocol, files) for protocol, files in _section(content, "protocols")}
    backbones = tuple(_backbone(_name(key), entry, pretraining) for key, entry in _section(content, "backbones"))
    tasks = tuple(
        _task(_name(key), entry, protocols, [backbone.name for backbone in backbones])
        for key, entry in _section(content, "tasks")
    )
    for section, entries in (("backbones", backbones), ("tasks", tasks)):
        if not entries:
            raise InputError(f"it has no {section}: give at least one")
    seeds = content.get("seeds", [0])
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise InputError(f"seeds must be a list of whole numbers >= 0, got {seeds!r}")
    if len(set(seeds)) < len(seeds):
        raise InputError(f"seeds must differ, got {seeds}")
    if unused := pretraining.keys() - {backbone.pretrain for backbone in backbones}:
        raise InputError(f"no backbone uses the pretraining {', '.join(sorted(unused))}: leave it out, or add one")
    return Manifest(
        path,
        name,
        output or Path(content.get("output") or f"runs/{name}"),
        str(content.get("cost", "")).strip(),
        tuple(seeds),
        pretraining,
        backbones,
        protocols,
        tasks,
        _cluster(content.get("cluster", {})),
    )


def _cluster(content: Any) -> ClusterConfig:
    try:
        return ClusterConfig(**{"processes": 1, **_mapping("cluster", content, _CLUSTER_KEYS)})
    except TypeError as error:
        raise InputError(f"cluster cannot be used ({error})") from None


def _backbone(name: str, content: Any, pretraining: Mapping[str, Options]) -> Backbone:
    content = _mapping(f"backbone {name}", content, (*_BACKBONES, "options"))
    if len(content.keys() & set(_BACKBONES)) != 1:
        raise InputError(f"backbone {name} must have exactly one of {', '.join(_BACKBONES)}")
    options = _mapping(f"options of backbone {name}", content.get("options", {}), _STATEMENTS)
    if options and "file" not in content:
        raise InputError(f"backbone {name} says itself what it is: options are for a file")
    backbone = Backbone(name, **{key: str(content[key]) for key in content.keys() & set(_BACKBONES)}, options=options)
    if backbone.pretrain:
        _known(f"the pretraining of backbone {name}", backbone.pretrain, pretraining)
    if backbone.published:
        backbone = replace(backbone, published=zoo.find(backbone.published.removeprefix(zoo.PREFIX)).name)
    return backbone


def _task(name: str, content: Any, protocols: Mapping[str, Sequence[str]], backbones: Sequence[str]) -> Task:
    keys = tuple(field.name for field in fields(Task) if field.name != "name")
    content = _mapping(f"task {name}", content, keys)
    task = Task(
        name,
        config_files=_texts(f"config_files of task {name}", content.get("config_files", [])),
        overrides=_mapping(f"overrides of task {name}", content.get("overrides", {})),
        protocols=_texts(f"protocols of task {name}", content.get("protocols", [])),
        transfer=str(content.get("transfer", "")),
        dataset=str(content.get("dataset", "")),
        options=_mapping(f"options of task {name}", content.get("options", {})),
        robustness=_mapping(f"robustness of task {name}", content.get("robustness", {})),
        backbones=_texts(f"backbones of task {name}", content.get("backbones", [])),
    )
    for protocol in task.protocols:
        _known(f"a protocol of task {name}", protocol, protocols)
    for backbone in task.backbones:
        _known(f"a backbone of task {name}", backbone, backbones)
    if bool(task.transfer) == bool(task.config_files):
        raise InputError(f"task {name} needs either config_files, of a detector, or transfer, with a dataset")
    if task.transfer:
        _known(f"transfer of task {name}", task.transfer, TRANSFER_MODES)
        if not task.dataset or task.overrides or task.protocols or task.robustness:
            raise InputError(
                f"task {name} is a transfer: it has a dataset and options, no overrides, protocols and robustness "
                "(its options have eval_threat_model)"
            )
    elif task.dataset or task.options:
        raise InputError(f"task {name} is a detector: it has overrides and protocols, no dataset and options")
    return task


def expand(manifest: Manifest) -> Plan:
    """The runs of a study, each behind those that it needs; nothing is written.

    Raises:
        InputError: a file is missing or cannot be used, an option or a configuration key is unknown, or two backbones
            are the same.
    """
    try:
        runs = _Expansion(manifest).runs()
    except InputError as error:
        raise InputError(f"{manifest.path}: {error}") from None
    return Plan(manifest.name, str(manifest.path.absolute()), manifest.output, runs, manifest.cost)


def settle(plan: Plan) -> bool:
    """Write a plan into its folder, unless it is there; True where it was written. The caller holds the folder's lock.

    Raises:
        InputError: the folder is that of another manifest, or holds something else.
    """
    if (plan.output / "plan.json").exists():
        held = Plan.read(plan.output)
        if held.manifest != plan.manifest and Path(held.manifest).exists():
            raise InputError(
                f"{plan.output} is the folder of another manifest, {held.manifest}: give another output, or --output"
            )
        if held == plan:
            return False
    elif {path.name for path in plan.output.iterdir()} - {"lock.json", ".lock.json.guard"}:
        raise InputError(f"{plan.output} is not empty and holds no study: give another output, or --output")
    plan.write()
    return True


class _Expansion:
    """The runs of a manifest as they are found, each once."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._runs: dict[str, Run] = {}

    def runs(self) -> tuple[Run, ...]:
        manifest = self._manifest
        sources = {backbone.name: self._source(backbone) for backbone in manifest.backbones}
        identities = {name: source.identity for name, source in sources.items()}
        for name, identity in identities.items():
            if same := [other for other in identities if other != name and identities[other] == identity]:
                raise InputError(f"backbones {name} and {', '.join(same)} are the same weights: keep one")
        for task in manifest.tasks:
            for name in task.backbones or sources:
                source = sources[name]
                if task.transfer and source.path:
                    self._transfer(task, name, source)
                elif not task.transfer:
                    self._detect(task, name, source)
                elif task.backbones:
                    raise InputError(f"task {task.name} is a transfer, and backbone {name} has nothing to transfer")
        return tuple(self._runs.values())

    def _add(self, kind: str, name: str, group: str, config: Options, defaults: Options, **rest: Any) -> Run:
        """The run of these settings; ``argv`` and ``results`` may hold {folder}, the run's own."""
        key = f"{name}-{digest({'kind': kind, **config}, defaults)}"
        argv = rest.pop("argv")
        run = Run(key, kind, group, argv=tuple(word.replace("{folder}", self._folder(key)) for word in argv), **rest)
        return self._runs.setdefault(key, run)

    def _folder(self, key: str) -> str:
        return str(self._manifest.output / "runs" / key)

    def _source(self, backbone: Backbone) -> _Source:
        """The checkpoint of a backbone, before its conversion."""
        if backbone.pretrain:
            run, spec = self._pretrain(backbone.pretrain)
            return _Source(f"{self._folder(run.key)}/checkpoint.pt", run.key, spec, (run.key,))
        if backbone.published:
            spec = BackboneSpec(zoo.find(backbone.published).arch)
            return _Source(HUB + backbone.published, f"published:{backbone.published}", spec)
        if backbone.scratch:
            return _Source("", f"scratch:{backbone.scratch}", BackboneSpec(backbone.scratch))
        path, said = Path(backbone.file), dict(backbone.options)
        source = said.pop("source", "")
        if "threat_model" in said:
            said["threat_model"] = ThreatModel.parse(str(said["threat_model"]))
        spec = read_checkpoint(path, source=source, statement=Statement(**said)).spec
        texts = {
            key: str(value).lower() if isinstance(value, bool) else value for key, value in backbone.options.items()
        }
        return _Source(str(path), [sha256(path), texts], spec, options=_words(texts))

    def _pretrain(self, name: str) -> tuple[Run, BackboneSpec]:
        options = self._manifest.pretraining[name]
        words = ("--output", "{folder}", *_words(options))
        parsed = _parsed("pretrain", words, f"pretraining {name}")
        config = parsed.config
        run = self._add(
            "pretrain",
            f"pretrain-{name}",
            f"pretrain-{name}",
            {**config.to_dict(), "data": parsed.data.name},
            type(config)().to_dict(),
            argv=(str(TOOLS / "pretrain.py"), *words),
            work=config.epochs,
        )
        return run, BackboneSpec(config.arch, stem=config.stem)

    def _convert(self, name: str, source: _Source) -> Run:
        return self._add(
            "convert",
            f"convert-{name}",
            "convert",
            {"weights": source.identity},
            {},
            argv=(
                str(TOOLS / "convert_backbone.py"),
                source.path,
                "{folder}/backbone.pkl",
                "--verify",
                *source.options,
            ),
            needs=source.needs,
            results=("backbone.pkl",),  # it gets its name once it is proven
        )

    def _detect(self, task: Task, name: str, source: _Source) -> None:
        manifest = self._manifest
        needed = source.spec.detectron2_overrides()
        # Without a checkpoint there is nothing to convert, and the file of random backbones empties MODEL.WEIGHTS.
        convert = self._convert(name, source) if source.path else None
        weights = ("MODEL.WEIGHTS", f"{self._folder(convert.key)}/backbone.pkl") if convert else ()
        for protocol in task.protocols or manifest.protocols or ("",):
            files = (*task.config_files, *manifest.protocols.get(protocol, ()), *(() if convert else (str(SCRATCH),)))
            overrides = {key: _value(value) for key, value in task.overrides.items()}
            settings = _settings(files, tuple(overrides.items()))
            # Of what the backbone needs, that which the files do not have: a ResNet-50's is in all of them.
            overrides |= {key: _value(value) for key, value in needed.items() if settings.get(key) != value}
            settings = _settings(files, tuple(overrides.items()))
            group = "-".join(filter(None, (task.name, protocol)))
            for seed in manifest.seeds:
                setting = {**settings, "SEED": seed}
                words = [word for file in files for word in ("--config-file", file)]
                for key, value in (*overrides.items(), ("SEED", str(seed))):
                    words += [key, value]
                run = self._add(
                    "detect",
                    f"{group}-{name}-seed{seed}",
                    group,
                    {**setting, "MODEL.WEIGHTS": convert.key if convert else source.identity},
                    DETECTOR_KEYS,
                    argv=(
                        str(TOOLS / "train_net.py"),
                        "--resume",
                        *words,
                        *(*weights, "OUTPUT_DIR", "{folder}"),
                    ),
                    needs=(convert.key,) if convert else (),
                    work=setting["SOLVER.MAX_ITER"],
                )
                if task.robustness:
                    self._evaluate(task, f"{group}-{name}-seed{seed}", group, run)

    def _evaluate(self, task: Task, name: str, group: str, detector: Run) -> None:
        """How robust a detector of the study is."""
        folder = self._folder(detector.key)
        paths = (f"{folder}/config.yaml", f"{folder}/model_final.pth", "--output", "{folder}")
        words = ("detector", *paths, *_words(task.robustness))
        parsed = _parsed("evaluate", words, f"robustness of task {task.name}")
        settings = {field.name: str(getattr(parsed, field.name)) for field in fields(parsed)}
        self._add(
            "evaluate",
            f"robustness-{name}",
            f"robustness-{group}",
            {**settings, "config": "", "weights": detector.key},
            {field.name: str(field.default) for field in fields(parsed)},
            argv=(str(TOOLS / "evaluate.py"), *words),
            needs=(detector.key,),
        )

    def _transfer(self, task: Task, name: str, source: _Source) -> None:
        seeds = [str(seed) for seed in self._manifest.seeds]
        words = (task.transfer, task.dataset, source.path, "--output", "{folder}", "--seeds", *seeds)
        words = (*words, *_words(task.options))
        parsed = _parsed("transfer", words, f"task {task.name}")
        parts = [parsed.grid, parsed.config] if hasattr(parsed, "grid") else [parsed.config]
        config = {key: value for part in parts for key, value in part.to_dict().items()}
        defaults = {key: value for part in parts for key, value in type(part)().to_dict().items()}
        label = labels_of([Path(source.path)])[0]
        self._add(
            "transfer",
            f"{task.name}-{name}",
            task.name,
            {
                **config,
                "mode": task.transfer,
                "dataset": Path(task.dataset).name,
                "metric": parsed.metric,
                "weights": source.identity,
            },
            defaults,
            argv=(str(TOOLS / "transfer.py"), *words),
            needs=source.needs,
            results=tuple(f"{label}/seed_{seed}/record.json" for seed in seeds),
        )


@dataclass(frozen=True)
class _Source:
    """A backbone's checkpoint."""

    path: str
    """As tools/convert_backbone.py and tools/transfer.py take it; empty where there is none."""
    identity: Any
    """The weights: sha256 of a file, name of a published backbone, key of the run that makes them, or an architecture
    whose weights are random."""
    spec: BackboneSpec
    needs: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


def _parsed(tool: str, words: Sequence[str], where: str) -> Any:
    """The arguments of a tool, as its own command line reads them.

    Raises:
        InputError: it does not take them.
    """
    said = io.StringIO()
    try:
        with redirect_stdout(said), redirect_stderr(said):
            return _parser(tool)([str(word) for word in words])
    except SystemExit:
        lines = (re.sub(r"[\u2500-\u257f]", "", line).strip() for line in said.getvalue().split("\n"))
        text = " ".join(line for line in lines if line)
        raise InputError(f"{where} cannot be given to tools/{tool}.py: {text}") from None
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


@cache
def _parser(tool: str) -> Any:
    return {"pretrain": pretrain.parse, "transfer": transfer.parse, "evaluate": evaluate.parse}[tool]


@cache
def _settings(files: tuple[str, ...], overrides: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    """Every key of a detector's configuration; needs Detectron2, whose defaults are part of it."""
    from robust_backbones.detection.config import load_config

    # The machine that sets up need not be the one that trains: "meta" stands for neither CUDA nor its absence.
    words = [word for pair in overrides for word in pair]
    cfg = load_config([Path(file) for file in files], [*words, "MODEL.DEVICE", "meta"])
    return flat(cfg)


def _words(options: Options) -> tuple[str, ...]:
    """Options of a manifest as words of a command line: true is a flag, false its --no- form, a list several values."""
    words: list[str] = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]
    return tuple(words)


def _value(value: Any) -> str:
    """A value of a manifest as an override of Detectron2's configuration."""
    return value if isinstance(value, str) else repr(value)


def _mapping(what: str, content: Any, keys: Iterable[str] | None = None) -> dict[str, Any]:
    content = {} if content is None else content
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise InputError(f"{what} must be a mapping of names to values, got {content!r}")
    for key in content:
        if keys is not None and key not in (keys := tuple(keys)):
            raise InputError(f"{what} has an unknown key {key!r}: valid are {', '.join(keys)}")
    return content


def _section(content: Mapping[str, Any], name: str) -> Iterable[tuple[str, Any]]:
    return _mapping(name, content.get(name)).items()


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
    """A name that can be part of a folder's."""
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name):
        raise InputError(f"{name!r} cannot be part of a folder's name: use letters, digits, and . _ -")
    return name
