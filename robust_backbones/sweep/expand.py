"""Expands a manifest to a plan: tasks x backbones x protocols x seeds, and the runs that they need."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, fields, replace
from functools import cache
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from robust_backbones.checkpoint import zoo
from robust_backbones.checkpoint.format import Checkpoint, sha256
from robust_backbones.checkpoint.sources import HUB, Statement, read_checkpoint
from robust_backbones.classification.pretrain import read_start
from robust_backbones.commands import evaluate, pretrain, transfer
from robust_backbones.commands.evaluate import EXPECTED
from robust_backbones.configs import DETECTOR_KEYS
from robust_backbones.data.transfer_datasets import TRANSFER_DATASETS, check
from robust_backbones.errors import InputError
from robust_backbones.models import BackboneSpec, usual_spec
from robust_backbones.runs.identity import digest, flat
from robust_backbones.runs.record import RunRecord
from robust_backbones.sweep.manifest import BackboneEntry, Choice, Manifest, Options, Task
from robust_backbones.sweep.plan import Plan, Run
from robust_backbones.threat_models import ThreatModel
from robust_backbones.transfer.protocol import labels_of

CHOSEN = "SOLVER.CHOSEN"
EACH = "each"
"""The ``seed`` of a pre-training that is run once for each seed of the study."""
SCRATCH = "protocols/scratch.yaml"
"""The configuration of detectors with a random backbone; it sets MODEL.WEIGHTS to ""."""


def expand(manifest: Manifest) -> Plan:
    """The runs of a study, each after those that it needs; nothing is written.

    A task that chooses its backbones is pending until all runs of the task that it chooses by are done.

    Raises:
        InputError: a file is missing or cannot be used, an option or a configuration key is unknown, two backbones
            are the same, or what is to be chosen has no results.
    """
    expansion = _Expansion(manifest)
    try:
        runs = expansion.runs()
    except InputError as error:
        raise InputError(f"{manifest.path}: {error}") from None
    path = str(manifest.path.absolute())
    return Plan(manifest.name, path, manifest.output, runs, manifest.cost, expansion.choices, expansion.pending)


@dataclass(frozen=True)
class _Source:
    """A backbone's checkpoint."""

    path: str
    """As an argument of the verbs ``convert`` and ``transfer``; empty if there is none."""
    weights: Any
    """Identifies the weights: sha256 of a file, name of a published backbone, key of the run that makes them, or an
    architecture with random weights."""
    spec: BackboneSpec
    needs: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    checks: tuple[str, ...] = ()
    """Keys of the runs that it must pass before it is used."""


class _Expansion:
    """Collects the runs of a manifest, each once."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._runs: dict[str, Run] = {}
        self._detectors: dict[tuple[str, str], dict[tuple[tuple[str, Any], ...], list[Run]]] = {}
        """(task, backbone) -> values of the task's grid -> one run per seed."""
        self.choices: dict[str, Any] = {}
        self.pending: dict[str, str] = {}

    def runs(self) -> tuple[Run, ...]:
        sources = {backbone.name: self._sources(backbone) for backbone in self._manifest.backbones}
        for name, own in sources.items():
            weights = [source.weights for source in own.values()]
            others = {other: found.values() for other, found in sources.items() if other != name}
            if same := [other for other, found in others.items() if any(one.weights in weights for one in found)]:
                raise InputError(f"backbones {name} and {', '.join(same)} are the same weights: keep one")
        for task in self._manifest.tasks:
            chosen: dict[str, Options] = {name: {} for name in task.backbones or sources}
            if task.choose:
                chosen = self._choose(task, task.choose)
            for name, values in chosen.items():
                own = {seed: sources[name][seed] for seed in self._manifest.seeds_of(task)}
                if not task.transfer:
                    self._detect(task, name, own, values)
                elif all(source.path for source in own.values()):
                    self._transfer(task, name, own)
                elif task.backbones:
                    raise InputError(f"task {task.name} is a transfer, and backbone {name} has nothing to transfer")
        return tuple(self._runs.values())

    def _add(self, kind: str, name: str, argv: Sequence[str], config: Options, defaults: Options, **rest: Any) -> Run:
        """The run with these settings; ``argv``, for a verb, may contain {folder}, the run's own."""
        key = f"{name}-{digest({'kind': kind, **config}, defaults)}"
        words = ("robust_backbones", *(word.replace("{folder}", self._folder(key)) for word in argv))
        return self._runs.setdefault(key, Run(key, kind, argv=words, **{"group": name, **rest}))

    def _folder(self, key: str) -> str:
        return str(self._manifest.output / "runs" / key)

    def _sources(self, backbone: BackboneEntry) -> dict[int, _Source]:
        """The checkpoints of a backbone by the seeds of the runs that use it: one, or a pre-training for each seed."""
        manifest = self._manifest
        tasks = [task for task in manifest.tasks if backbone.name in (task.backbones or (backbone.name,))]
        seeds = sorted({seed for task in tasks for seed in manifest.seeds_of(task)}) or manifest.seeds
        if manifest.pretraining.get(backbone.pretrain, {}).get("seed") == EACH:
            return {seed: self._source(backbone, seed) for seed in seeds}
        return dict.fromkeys(seeds, self._source(backbone))

    def _source(self, backbone: BackboneEntry, seed: int | None = None) -> _Source:
        """The checkpoint of a backbone, before its conversion; ``seed`` is that of a pre-training for one seed."""
        if backbone.pretrain:
            run, spec = self._pretrain(backbone.pretrain, seed)
            return _Source(f"{self._folder(run.key)}/checkpoint.pt", run.key, spec, (run.key,))
        if backbone.published:
            published = zoo.find(backbone.published)
            source = _Source(HUB + published.name, f"published:{published.name}", BackboneSpec(published.arch))
            return replace(source, checks=self._checks(backbone.name, source, published.imagenet_accuracy))
        if backbone.scratch:
            return _Source("", f"scratch:{backbone.scratch}", BackboneSpec(backbone.scratch))
        path, spec = Path(backbone.file), read_file(backbone).spec
        texts = {
            key: str(value).lower() if isinstance(value, bool) else value for key, value in backbone.options.items()
        }
        return _Source(str(path), [sha256(path), texts], spec, options=_words(texts))

    def _pretrain(self, name: str, seed: int | None) -> tuple[Run, BackboneSpec]:
        argv, parsed = pretraining(self._manifest, name, seed)
        config, spec = parsed.config, usual_spec(parsed.config.arch, stem=parsed.config.stem)
        settings = {**config.to_dict(), "data": parsed.data.name}
        if parsed.start_from:
            start = read_start(parsed.start_from, config)
            settings["start_sha256"], spec = start.source_sha256, start.spec
        defaults = type(config)().to_dict()
        title, rest = f"pretrain-{name}", {"group": f"pretrain-{name}", "work": config.epochs}
        title += "" if seed is None else f"-seed{seed}"
        return self._add("pretrain", title, argv, settings, defaults, **rest), spec

    def _checks(self, name: str, source: _Source, accuracy: float) -> tuple[str, ...]:
        """Runs that check a published backbone's accuracy against the published one, if ImageNet is there.

        After its conversion, which downloads it, because machines of a cluster often cannot.
        """
        if not (folder := imagenet_folder(self._manifest)):
            return ()
        expected = ("--expected", str(accuracy), "--threat-model", "L2:0", "--no-autoattack")
        argv = ("evaluate", "classifier", source.path, "--data", str(folder), "--output", "{folder}", *expected)
        settings = {"weights": source.weights, "expected": accuracy}
        rest = {"group": "check", "needs": (self._convert(name, source).key,), "results": (EXPECTED,)}
        return (self._add("evaluate", f"check-{name}", argv, settings, {}, **rest).key,)

    def _choose(self, task: Task, choice: Choice) -> dict[str, Options]:
        """The chosen backbones, the best first, each with its best values of the earlier task's grid.

        Empty until all runs of that task are done.

        Raises:
            InputError: one of them has no such result, or both tasks have the same test images.
        """
        source = self._manifest.task(choice.task)
        own, earlier = (self._settings(one) for one in (task, source))
        if shared := sorted({*own["DATASETS.TEST"]} & {*earlier["DATASETS.TEST"]}):
            raise InputError(
                f"task {task.name} is tested on {shared[0]}, by which it chooses: have task {source.name} tested on "
                "other images, as DATASETS.HELD_OUT of training ones"
            )
        means: dict[str, dict[tuple[tuple[str, Any], ...], float]] = {}
        for name in source.backbones or (backbone.name for backbone in self._manifest.backbones):
            for values, runs in self._detectors[source.name, name].items():
                paths = [Path(self._folder(run.key)) / "record.json" for run in runs]
                if not all(path.exists() for path in paths):
                    self.pending[task.name] = source.name
                    return {}
                found = [RunRecord.read(path).metrics.get(choice.metric) for path in paths]
                if any(value is None for value in found):
                    raise InputError(f"{paths[found.index(None)]} has no {choice.metric}, by which {task.name} chooses")
                means.setdefault(name, {})[values] = fmean(value for value in found if value is not None)
        values_of = {name: max(cells, key=cells.__getitem__) for name, cells in means.items()}
        order = sorted(means, key=lambda name: -means[name][values_of[name]])
        best = [name for name in order if name not in choice.keep][: choice.best or None]
        seeds = ", ".join(map(str, self._manifest.seeds_of(source)))
        self.choices[task.name] = {
            "by": f"mean {choice.metric} of task {source.name}, seeds {seeds}",
            "chosen": [[name, dict(values_of[name])] for name in (*best, *choice.keep)],
            "means": [[name, dict(values), mean] for name in order for values, mean in means[name].items()],
        }
        return {name: dict(values_of[name]) for name in (*best, *choice.keep)}

    def _settings(self, task: Task) -> dict[str, Any]:
        return task_settings(task, self._manifest.protocols.get(self._manifest.protocols_of(task)[0], ()))

    def _convert(self, name: str, source: _Source) -> Run:
        argv = ("convert", source.path, "{folder}/backbone.pkl", *source.options)
        results = ("backbone.pkl",)  # it gets its name once it is proven
        settings = {"weights": source.weights}
        rest = {"group": "convert", "needs": source.needs, "results": results}
        return self._add("convert", f"convert-{name}", argv, settings, {}, **rest)

    def _detect(self, task: Task, name: str, sources: Mapping[int, _Source], chosen: Options) -> None:
        """One run per seed, protocol and combination of the task's grid.

        Args:
            sources: by seed.
            chosen: values of keys chosen for this backbone.
        """
        _refuse_own(f"task {task.name}", (*task.overrides, *task.grid), ("OUTPUT_DIR", "SEED", "MODEL.WEIGHTS"))
        manifest, source = self._manifest, next(iter(sources.values()))
        needed = source.spec.detectron2_overrides()
        converts = {seed: self._convert(name, own) if own.path else None for seed, own in sources.items()}
        for protocol in manifest.protocols_of(task):
            files = (*task.config_files, *manifest.protocols.get(protocol, ()), *(() if source.path else (SCRATCH,)))
            overrides = as_texts({**task.overrides, **chosen, **({CHOSEN: tuple(chosen)} if chosen else {})})
            settings = detector_settings(files, tuple(overrides.items()))
            if task.robustness and len(settings["DATASETS.TEST"]) != 1:
                raise InputError(f"robustness of task {task.name} is on one set: leave one in DATASETS.TEST")
            # Of what the backbone needs, that which the files do not have: a ResNet-50's is in all of them.
            overrides |= {key: str(value) for key, value in needed.items() if settings.get(key) != value}
            group = "-".join(filter(None, (task.name, protocol)))
            for values in product(*([(key, value) for value in found] for key, found in task.grid.items())):
                own = overrides | as_texts(dict(values))
                settings = detector_settings(files, tuple(own.items()))
                named = (f"{key.rsplit('.')[-1]}{value}".replace("/", "_") for key, value in values)
                title = "-".join((group, name, *named))
                for seed, own_source in sources.items():
                    convert = converts[seed]
                    weights = ("MODEL.WEIGHTS", f"{self._folder(convert.key)}/backbone.pkl") if convert else ()
                    words = [word for file in files for word in ("--config-file", file)]
                    words += [word for pair in (*own.items(), ("SEED", str(seed))) for word in pair]
                    run = self._add(
                        "detect",
                        f"{title}-seed{seed}",
                        ("train", "--resume", *words, *weights, "OUTPUT_DIR", "{folder}"),
                        {**settings, "SEED": seed, "MODEL.WEIGHTS": convert.key if convert else own_source.weights},
                        DETECTOR_KEYS,
                        group=group,
                        task=task.name,
                        needs=(convert.key, *own_source.checks) if convert else (),
                        work=settings["SOLVER.MAX_ITER"],
                    )
                    self._detectors.setdefault((task.name, name), {}).setdefault(values, []).append(run)
                    if task.robustness:
                        self._evaluate(task, f"{title}-seed{seed}", group, run)

    def _evaluate(self, task: Task, name: str, group: str, detector: Run) -> None:
        """The evaluation of the robustness of a detector of the study."""
        _refuse_own(f"robustness of task {task.name}", task.robustness, ("output",))
        folder = self._folder(detector.key)
        paths = (f"{folder}/config.yaml", f"{folder}/model_final.pth", "--output", "{folder}")
        argv = ("evaluate", "detector", *paths, *_words(task.robustness))
        parsed = _parsed(evaluate.parse, argv, f"robustness of task {task.name}")
        settings = {field.name: str(getattr(parsed, field.name)) for field in fields(parsed)}
        settings |= {"config": "", "weights": detector.key}
        defaults = {field.name: str(field.default) for field in fields(parsed)}
        rest = {"group": f"robustness-{group}", "task": task.name, "needs": (detector.key,)}
        self._add("evaluate", f"robustness-{name}", argv, settings, defaults, **rest)

    def _transfer(self, task: Task, name: str, sources: Mapping[int, _Source]) -> None:
        """One run for all seeds, or for each seed with its own backbone; the study's own networks keep their names."""
        sources = {seed: self._stated(name, source) for seed, source in sources.items()}
        first = next(iter(sources.values()))
        label = name if first.needs else ""
        if len({source.path for source in sources.values()}) > 1:
            for seed, source in sources.items():
                self._transfer_one(task, f"{name}-seed{seed}", source, [seed], label)
        else:
            self._transfer_one(task, name, first, [*sources], label)

    def _stated(self, name: str, source: _Source) -> _Source:
        """A file that itself says what the manifest's options say of it, which the verb ``transfer`` does not take."""
        if not source.options:
            return source
        run = self._convert(name, source)
        path = f"{self._folder(run.key)}/backbone.pkl"
        return replace(source, path=path, weights=run.key, needs=(run.key,), options=())

    def _transfer_one(self, task: Task, name: str, source: _Source, seeds: Sequence[int], label: str) -> None:
        _refuse_own(f"task {task.name}", task.options, ("output", "seeds", "labels"))
        argv = ("transfer", task.transfer, task.dataset, source.path, "--output", "{folder}")
        argv = (*argv, "--seeds", *map(str, seeds), *(("--labels", label) if label else ()), *_words(task.options))
        parsed = _parsed(transfer.parse, argv, f"task {task.name}")
        settings: dict[str, Any] = {}
        defaults: dict[str, Any] = {}
        for config in (parsed.config, *([parsed.grid] if hasattr(parsed, "grid") else [])):
            settings |= config.to_dict()
            defaults |= type(config)().to_dict()
        settings |= {"mode": task.transfer, "dataset": Path(task.dataset).name, "weights": source.weights}
        settings |= {"metric": parsed.metric, "split": parsed.split}
        defaults["split"] = "drawn"
        label = label or labels_of([Path(source.path)])[0]
        trials = seeds[:1] if settings.get("solver") == "lbfgs" else seeds  # its optimum is no matter of seeds
        results = tuple(f"{label}/seed_{seed}/record.json" for seed in trials)
        needs = (*source.needs, *source.checks)
        rest = {"group": task.name, "task": task.name, "needs": needs, "results": results}
        self._add("transfer", f"{task.name}-{name}", argv, settings, defaults, **rest)


def read_file(backbone: BackboneEntry) -> Checkpoint:
    """The checkpoint of a backbone with a ``file``, read with its options."""
    stated = dict(backbone.options)
    choice = {name: stated.pop(name) for name in ("source", "key", "prefix") if name in stated}
    if "threat_model" in stated:
        stated["threat_model"] = ThreatModel.parse(str(stated["threat_model"]))
    return read_checkpoint(Path(backbone.file), **choice, statement=Statement(**stated))


def pretraining(manifest: Manifest, name: str, seed: int | None = None) -> tuple[tuple[str, ...], Any]:
    """The command of a pre-training, with this seed instead of its own, and the options that the verb reads there."""
    options = {**manifest.pretraining[name], **({} if seed is None else {"seed": seed})}
    _refuse_own(f"pretraining {name}", options, ("output", "list_recipes"))
    argv = ("pretrain", "--output", "{folder}", *_words(options))
    return argv, _parsed(pretrain.parse, argv, f"pretraining {name}")


def _refuse_own(where: str, names: Iterable[str], own: Sequence[str]) -> None:
    """Raise InputError for options or keys that the study sets itself, so that given values would be ignored."""
    if taken := [name for name in names if name in own or name.startswith("cluster.")]:
        raise InputError(f"{where} gives {taken[0]}, which the study sets itself: leave it out")


def _parsed(parse: Callable[[list[str]], Any], argv: Sequence[str], where: str) -> Any:
    """The options of a verb, read by its own command line; InputError if it does not accept them."""
    verb, *words = argv
    printed = io.StringIO()
    try:
        with redirect_stdout(printed), redirect_stderr(printed):
            return parse(words)
    except SystemExit:
        lines = (re.sub(r"[\u2500-\u257f]", "", line).strip() for line in printed.getvalue().split("\n"))
        text = " ".join(line for line in lines if line)
        raise InputError(f"{where} cannot be given to `robust-backbones {verb}`: {text}") from None
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def missing_data(manifest: Manifest) -> list[str]:
    """What is missing of the tasks' data sets on this machine, which need not be the one that trains."""
    from robust_backbones.detection.datasets import missing_files

    lines = []
    for task in manifest.tasks:
        if not task.transfer:
            lines += missing_files(_config(tuple(task.config_files), tuple(as_texts(task.overrides).items())))
        elif row := TRANSFER_DATASETS.get(task.dataset):
            if "data_root" not in task.options:
                raise InputError(f"task {task.name} names the data set {task.dataset}: give the options data_root")
            state, detail = check(row, Path(str(task.options["data_root"])))
            lines += [] if state == "present" else [detail]
        elif not Path(task.dataset).is_dir():
            lines.append(f"no folder {task.dataset}, with train/ and test/")
    return list(dict.fromkeys(lines))


def imagenet_folder(manifest: Manifest) -> Path | None:
    """The validation images that published backbones are checked on; None if they are not there."""
    folder = Path(manifest.imagenet) / "val"
    return folder if manifest.imagenet and folder.is_dir() else None


def as_texts(overrides: Options) -> dict[str, str]:
    """Values as arguments of load_config."""
    return {key: value if isinstance(value, str) else repr(value) for key, value in overrides.items()}


def task_settings(task: Task, files: tuple[str, ...] = ()) -> dict[str, Any]:
    """All keys of the configuration of a task's detectors; ``files`` are those of a protocol."""
    return detector_settings((*task.config_files, *files), tuple(as_texts(task.overrides).items()))


@cache
def detector_settings(files: tuple[str, ...], overrides: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    """All keys of a detector's configuration; needs Detectron2, whose defaults are part of it."""
    return flat(_config(files, overrides))


def _config(files: tuple[str, ...], overrides: tuple[tuple[str, str], ...]) -> Any:
    from robust_backbones.detection.config import load_config

    # The machine that sets up need not be the one that trains: "meta" stands for neither CUDA nor its absence.
    words = [word for pair in overrides for word in pair]
    return load_config([Path(file) for file in files], [*words, "MODEL.DEVICE", "meta"])


def _words(options: Options) -> tuple[str, ...]:
    """A manifest's options as command-line words: true is a flag, false its --no- form, a list several values."""
    words: list[str] = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]
    return tuple(words)
