"""Run a whole study: tasks x backbones x protocols x seeds, with the pre-training and conversions that they need.

Examples:
    robust-backbones sweep setup studies/small.yaml
    robust-backbones sweep launch studies/small.yaml --executor local --jobs 2
    robust-backbones sweep launch studies/figure4.yaml --executor slurm
    robust-backbones sweep status studies/small.yaml --watch
    robust-backbones sweep collect studies/small.yaml --to records
    robust-backbones sweep launch studies/small.yaml --minutes 9
    robust-backbones sweep pack studies/small.yaml --to bundle
    robust-backbones sweep unpack studies/small.yaml --bundle bundle

A manifest says what is compared; studies/ has those of the paper. `setup` checks everything that it names, says what
the seeds can find (a primary comparison with less than 80 % power is refused), and writes the plan; `launch` does so
too, and starts every run that is not done: one after the other (here), several at once (local), or as jobs (slurm). A
run's folder is named by its settings and weights: a changed setting is another run, a finished run is never run again,
and one that failed or was interrupted is resumed at the next launch. Two launches of one study are kept apart. With
`--minutes`, a launch starts only what ends in time; `pack` and `unpack` take the study to another machine. Exit status:
0 done, 1 runs failed, 2 bad input, 75 stopped by a signal or out of time (the runs have written their states).
`--debug` shows tracebacks.
"""

import math
import os
import signal
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import tyro

from robust_backbones.analysis.records import PRIMARY, Primary, find_runs
from robust_backbones.analysis.report import write_report
from robust_backbones.analysis.tables import Table
from robust_backbones.commands import cli
from robust_backbones.errors import InputError, check_not_negative, plural
from robust_backbones.runs.clock import duration
from robust_backbones.runs.files import atomic_path, remove_leftovers
from robust_backbones.runs.locks import lock, owner_of
from robust_backbones.runs.signals import STOP_SIGNALS, stop_on_signals
from robust_backbones.sweep.bundle import pack, unpack
from robust_backbones.sweep.expand import expand, imagenet_folder, missing_data
from robust_backbones.sweep.launcher import ClusterExecutor, LocalExecutor, launch
from robust_backbones.sweep.manifest import Manifest, read_manifest
from robust_backbones.sweep.plan import STATES, Plan, count
from robust_backbones.sweep.power import check_power, primary_of


@dataclass
class StudyOptions:
    """Options of every verb."""

    manifest: tyro.conf.Positional[Path]
    """The study, a YAML file; one of the package's where there is none of this name."""
    output: Path | None = None
    """Folder of all its runs, instead of the manifest's."""


@dataclass
class SetupOptions(StudyOptions):
    """Check everything that the manifest names, and write the plan."""

    pilot: tuple[Path, ...] = ()
    """Folders with records of a pilot, whose difference and spread are used to plan the primary comparison."""
    allow_underpowered: bool = False
    """Accept a primary comparison with less than 80 % power."""


@dataclass
class LaunchOptions(SetupOptions):
    """Set up, and start every run that is not done."""

    executor: Literal["here", "local", "slurm"] = "here"
    """here: one run after the other; local: --jobs runs at once; slurm: jobs of the cluster."""
    jobs: int = 0
    """Runs at once; 0: one (or --share) for each --processes GPUs, or cores where there is no GPU; on Slurm 256."""
    processes: int = 0
    """Processes of each run, one a GPU; 0: the manifest's, or 1."""
    share: int = 1
    """Runs of one process that share a GPU, for those that leave it idle most of the time."""
    gpus: bool = True
    """--no-gpus: jobs of the cluster ask for none."""
    minutes: float = math.inf
    """Start only runs that end within so many minutes, as far as earlier ones tell, and end by then; not with slurm."""

    def __post_init__(self) -> None:
        check_not_negative(self, "jobs", "processes")
        if self.share < 1:
            raise InputError(f"--share {self.share} is no number of runs: give 1 or more")
        on_cluster = self.executor == "slurm"
        if not self.minutes > 0 or (on_cluster and self.minutes < math.inf):
            raise InputError(
                f"--minutes {self.minutes:g} is for runs of this machine, and above 0: leave it out, on Slurm set "
                "hours under cluster: of the manifest"
            )
        if self.executor == "here" and self.jobs > 1:
            raise InputError(f"--jobs {self.jobs} needs --executor local or slurm")
        if self.executor != "local" and self.share != 1:
            raise InputError(f"--share {self.share} is for runs side by side on this machine: give --executor local")
        if not on_cluster and not self.gpus:
            raise InputError("--no-gpus is for jobs of a cluster: give --executor slurm, or CUDA_VISIBLE_DEVICES= here")


@dataclass
class StatusOptions(StudyOptions):
    """How far the runs are, and when all will be done."""

    watch: bool = False
    """Refresh until nothing is left to wait for: all is done, or no run is at work and nobody launches."""


@dataclass
class CollectOptions(StudyOptions):
    """Name the records of the runs that are done."""

    to: Path | None = None
    """Folder to copy them to, as KEY/record.json: records alone, no weights."""


@dataclass
class PackOptions(StudyOptions):
    """Write what another machine needs to continue: results, and the weights that the next runs start from."""

    to: Path = field(kw_only=True)
    """Folder of the bundle; an earlier bundle of the study there is replaced."""
    part_mib: int = 16
    """No file of it is larger."""


@dataclass
class UnpackOptions(StudyOptions):
    """Set up, and add a bundle to the study's folder."""

    bundle: Path = field(kw_only=True)
    """What `pack` wrote on the other machine."""


COMMANDS = {
    "setup": SetupOptions,
    "launch": LaunchOptions,
    "status": StatusOptions,
    "collect": CollectOptions,
    "pack": PackOptions,
    "unpack": UnpackOptions,
}


def main(arguments: list[str]) -> int:
    options: SetupOptions | LaunchOptions | StatusOptions | CollectOptions | PackOptions | UnpackOptions
    options = cli.parse(COMMANDS, arguments, description=__doc__)
    manifest = read_manifest(options.manifest, options.output)
    if isinstance(options, StatusOptions):
        return show(manifest.output, watch=options.watch)
    if isinstance(options, CollectOptions):
        return collect(Plan.read(manifest.output), options.to)
    if isinstance(options, PackOptions):
        return pack_study(Plan.read(manifest.output), options)
    plan = expand(manifest)
    if isinstance(options, UnpackOptions):
        with lock(plan.output / "lock.json"):
            plan.set_up()
            further = unpack(plan, options.bundle)
        done = count(plan.states().values())["done"]
        print(f"{plural(len(further), 'run')} further than before; {done} of {len(plan.runs)} done in {plan.output}")
        return 0
    told = check_power(manifest, pilot=options.pilot, allow_underpowered=options.allow_underpowered)
    with stop_on_signals((*STOP_SIGNALS, signal.SIGINT)) as stop, lock(plan.output / "lock.json") as dead:
        if dead:
            print(f"taking over from {dead}, which ended without giving its lock back")
        remove_leftovers((plan.output / "jobs").rglob("*.tmp*"))
        missing = set_up(plan, manifest)
        print("\n".join(told))
        start = time.monotonic()
        while isinstance(options, LaunchOptions):
            print(", ".join(f"{number} {state}" for state, number in count(plan.states().values()).items() if number))
            executor = executor_for(plan, manifest, options)
            minutes = options.minutes - (time.monotonic() - start) / 60
            say = partial(print, flush=True)
            if status := launch(plan, executor, minutes=minutes, stop=lambda: bool(stop), say=say):
                return status
            if not plan.pending:
                return make_report(plan, manifest) if manifest.report else 0
            plan = expand(manifest)
            set_up(plan, manifest)
    where = f" --output {options.output}" * bool(options.output)
    lacks = f"; first get the data that is missing here ({plural(len(missing), 'warning')} above)" * bool(missing)
    print(f"nothing is started: `robust-backbones sweep launch {options.manifest}{where}` does{lacks}")
    return 0


def make_report(plan: Plan, manifest: Manifest) -> int:
    """The report of the plan's runs; other folders beside them are of earlier settings."""
    paths = [path for run in plan.runs for path in sorted(plan.folder(run).rglob("record.json"))]
    primary = primary_of(manifest, plan)
    page = write_report(find_runs(paths), plan.output / "report", title=manifest.report, primary=primary)
    print(f"report of {plural(len(paths), 'record')}: {page}; tables and figures are beside it")
    return 0


def set_up(plan: Plan, manifest: Manifest) -> list[str]:
    """Write the plan and print it; returns what is missing of its data on this machine."""
    primary = primary_of(manifest, plan)
    check_declared(plan, primary)
    written = plan.set_up()
    if primary:
        primary.write(plan.output / PRIMARY)
    else:
        (plan.output / PRIMARY).unlink(missing_ok=True)
    kinds = ", ".join(f"{number} {kind}" for kind, number in Counter(run.kind for run in plan.runs).items())
    print(f"{plan.name}: {plural(len(plan.runs), 'run')} ({kinds}) in {plan.output}{'' if written else ', as before'}")
    data = dict.fromkeys(str(options["data"]) for options in manifest.pretraining.values())
    missing = [f"pre-training will need its data, {folder}" for folder in data if not Path(folder).is_dir()]
    for task, choice in plan.choices.items():
        names = ", ".join(
            " ".join([name, *(f"{k} {v}" for k, v in values.items())]) for name, values in choice["chosen"]
        )
        print(f"task {task} has, by {choice['by']}: {names}")
    for task, by in plan.pending.items():
        print(f"task {task} will choose its backbones once task {by} is done")
    images, checks = imagenet_folder(manifest), sum(run.group == "check" for run in plan.runs)
    if images and checks:
        print(f"the ImageNet accuracy of {plural(checks, 'published backbone')} is checked on {images.absolute()}")
    if manifest.imagenet and not images:
        print(f"not checked: the ImageNet accuracy of published backbones, because there is no {manifest.imagenet}/val")
    missing += [f"tasks will need their data: {line}" for line in missing_data(manifest)]
    for line in missing:
        print(f"warning: {line}", file=sys.stderr)
    earlier = {path.name for path in (plan.output / "runs").glob("*")} - {run.key for run in plan.runs}
    if earlier:
        print(f"of other settings, left as before: {plural(len(earlier), 'folder')} in {plan.output / 'runs'}")
    if plan.cost:
        print(f"cost: {plan.cost}")
    return missing


def check_declared(plan: Plan, primary: Primary | None) -> None:
    """Refuse to declare, change or drop the primary comparison once a run of it is done; more seeds may join it."""
    path = plan.output / PRIMARY
    held = Primary.read(path) if path.exists() else None
    before, after = (frozenset(one.runs if one else ()) for one in (held, primary))
    if held and primary and held.metric == primary.metric and before <= after:
        return
    done = [key for key in sorted(before | after) if (plan.output / "runs" / key / "record.json").exists()]
    if done:
        mend = f"leave `primary` in {plan.manifest} as it was" if held else f"leave `primary` out of {plan.manifest}"
        raise InputError(
            f"{plan.output} has results of {done[0]}, and a primary comparison is declared before them: {mend}, or "
            "give another --output"
        )


def executor_for(plan: Plan, manifest: Manifest, options: LaunchOptions) -> LocalExecutor | ClusterExecutor:
    processes = options.processes or manifest.cluster.processes
    if options.executor == "slurm":
        cluster = replace(manifest.cluster, executor="slurm", processes=processes)
        return ClusterExecutor(plan, cluster, jobs=options.jobs or 256, gpus=options.gpus)
    found = torch.cuda.device_count()
    gpus = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(found)))).split(",")[:found]
    if options.share > 1 < processes:
        raise InputError(f"--share {options.share} is for runs of one process, not of {processes}: give 1 or more")
    gpus *= options.share
    side_by_side = max(1, (len(gpus) or os.cpu_count() or 1) // processes)
    jobs = 1 if options.executor == "here" else options.jobs or side_by_side
    return LocalExecutor(plan, jobs=jobs, processes=processes, gpus=gpus)


def pack_study(plan: Plan, options: PackOptions) -> int:
    if options.part_mib < 1:
        raise InputError(f"--part-mib {options.part_mib} is no size: give 1 or more")
    with lock(plan.output / "lock.json"):
        files = pack(plan, options.to, part_bytes=options.part_mib << 20)
    size = sum(path.stat().st_size for path in files) / 2**20
    print(f"next: robust-backbones sweep unpack {options.manifest} --bundle {options.to}, on the other machine")
    print(f"{plural(len(files), 'file')} of {size:.1f} MiB in all: {options.to}")
    return 0


def show(output: Path, *, watch: bool) -> int:
    with suppress(KeyboardInterrupt):
        while True:
            plan = Plan.read(output)
            text = status_text(plan)
            if not watch:
                print(text)
                return 0
            print(f"\x1b[2J\x1b[H{time.strftime('%H:%M:%S')}\n{text}", flush=True)
            states = plan.states()
            if not plan.pending and all(state == "done" for state in states.values()):
                return 0
            queued = [run for run in plan.runs if states[run.key] not in ("failed", "done") and plan.note(run).exists()]
            if not (queued or "running" in states.values() or owner_of(output / "lock.json")):
                print("no run is at work, and nobody is launching: `robust-backbones sweep launch` continues")
                return 0
            time.sleep(5)
    return 0


def status_text(plan: Plan) -> str:
    """Runs by group and state; then each run that is at work, was interrupted or failed."""
    states = plan.states()
    left, total = plan.seconds_left(states), plan.time_left(states)
    groups = list(dict.fromkeys(run.group for run in plan.runs))
    counts = {group: count(states[run.key] for run in plan.runs if run.group == group) for group in groups}
    counts["total"] = count(states.values())
    rows = [{"": group, **{state: own[state] or None for state in STATES}} for group, own in counts.items()]
    lines = [Table("", rows, dict.fromkeys(("", *STATES), ":")).to_text(), ""]
    for run in plan.runs:
        state = states[run.key]
        if state in ("running", "preempted"):
            seconds = left[run.key] if state == "running" else None
            time_left = "" if seconds is None else f", {duration(seconds)} to go"
            lines.append(f"{state}: {run.key}: {100 * plan.progress(run):.0f} %{time_left}")
        elif state == "failed":
            lines.append(f"failed: {run.key}: {plan.last_line(run)} (see {plan.log(run)})")
    owner = owner_of(plan.output / "lock.json")
    lines.append(f"launched by {owner}" if owner else "nobody is launching")
    if plan.pending:
        lines.append(f"to come: {', '.join(plan.pending)}, whose backbones are chosen by these runs")
    if any(state != "done" for state in states.values()):
        lines.append("time left: " + ("not known yet" if total is None else duration(total)))
    return "\n".join(lines)


def collect(plan: Plan, folder: Path | None) -> int:
    paths = [path for run in plan.runs for path in plan.records(run)]
    for path in paths:
        if folder is None:
            print(path)
            continue
        with atomic_path(folder / path.relative_to(plan.output / "runs")) as temporary:
            temporary.write_bytes(path.read_bytes())
    if folder and (plan.output / PRIMARY).exists():
        with atomic_path(folder / PRIMARY) as temporary:
            temporary.write_bytes((plan.output / PRIMARY).read_bytes())
    left = sum(state != "done" for state in plan.states().values())
    copied, rest = f" copied to {folder}" * bool(folder), f"; {plural(left, 'run')} not done" * bool(left)
    print(f"{plural(len(paths), 'record')}{copied}{rest}", file=sys.stderr)
    return 0
