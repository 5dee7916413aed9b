"""Moves a study to another machine: its results, and the weights that its next runs need, in files of limited size."""

from __future__ import annotations

import json
import re
import shutil
import tarfile
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from robust_backbones.analysis.records import PRIMARY
from robust_backbones.checkpoint.format import sha256
from robust_backbones.errors import InputError
from robust_backbones.runs.files import DAMAGED, write_json
from robust_backbones.runs.locks import owner_of
from robust_backbones.sweep.plan import Attempt, Plan, Run

INDEX = "study.json"
"""Lists a bundle's other files and their contents; written last."""
_ALWAYS = 1 << 20
"""Files of finished runs up to this size are always included: records, metrics, configurations."""


def pack(plan: Plan, folder: Path, *, part_bytes: int = 16 << 20) -> list[Path]:
    """Write what another machine needs to continue; returns the bundle's files. An earlier bundle there is replaced.

    It has the results and small files of finished runs, all files of interrupted ones, and everything that the commands
    of remaining runs name: backbones unchanged, in float32, so that all seeds start from the same weights.

    Args:
        part_bytes: largest size of a file.

    Raises:
        InputError: ``folder`` holds something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    old = sorted(folder.iterdir(), key=lambda path: path.name != INDEX)  # without its index it is no bundle
    if others := [path.name for path in old if not re.fullmatch(rf"{INDEX}|study\.\d{{3}}", path.name)]:
        raise InputError(f"{folder} holds {others[0]}, which is of no bundle: give another --to")
    if (folder / INDEX).exists() and (name := _index(folder)["study"]) != plan.name:
        raise InputError(f"{folder} holds the bundle of the study {name}: give another --to")
    for path in old:
        path.unlink()
    parts: list[Path] = []
    with tempfile.TemporaryFile(dir=folder) as whole:
        with tarfile.open(fileobj=whole, mode="w:gz") as archive:
            for path in _contents(plan):
                archive.add(path, str(path.relative_to(plan.output)), recursive=False)
        whole.seek(0)
        while data := whole.read(part_bytes):
            parts.append(folder / f"study.{len(parts):03d}")
            parts[-1].write_bytes(data)
    write_json(folder / INDEX, {"study": plan.name, "parts": {path.name: sha256(path) for path in parts}})
    return [*parts, folder / INDEX]


def unpack(plan: Plan, folder: Path) -> list[str]:
    """Add a bundle to the study's folder; returns the keys of the runs that are further than they were here.

    A run that is as far or further here does not change, except that missing files are added.

    Raises:
        InputError: no bundle, an incomplete one, or one of another study; a run is at work here.
    """
    index = _index(folder)
    if index["study"] != plan.name:
        raise InputError(f"{folder} is the bundle of the study {index['study']}, not of {plan.name}: give its manifest")
    if busy := [run.key for run in plan.runs if owner_of(plan.job(run) / "lock.json")]:  # its launcher was killed
        raise InputError(f"{busy[0]} is at work in {plan.output}: unpack once it has ended")
    paths = [folder / name for name in index["parts"]]
    for path in paths:
        if not path.is_file() or sha256(path) != index["parts"][path.name]:
            raise InputError(f"{path} is missing or damaged: copy the whole folder again")
    with tempfile.TemporaryDirectory(dir=plan.output, prefix=".unpacked-") as scratch:
        with tempfile.TemporaryFile(dir=plan.output) as whole:
            for path in paths:
                whole.write(path.read_bytes())
            whole.seek(0)
            with tarfile.open(fileobj=whole, mode="r:gz") as archive:
                archive.extractall(scratch, filter="data")
        there = replace(plan, output=Path(scratch))
        further = [run for run in plan.runs if _is_further(there, plan, run)]
        for run in further:
            for own in (plan.folder(run), plan.job(run)):
                shutil.rmtree(own, ignore_errors=True)
        for path in sorted(Path(scratch).rglob("*")):
            target = plan.output / path.relative_to(scratch)
            if path.is_file() and not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                path.rename(target)
    return [run.key for run in further]


def _is_further(there: Plan, here: Plan, run: Run) -> bool:
    if here.is_done(run) or there.is_done(run):
        return there.is_done(run) and not here.is_done(run)
    return there.progress(run) > here.progress(run)


def _contents(plan: Plan) -> list[Path]:
    states = plan.states()
    found = {plan.output / PRIMARY}
    for run in plan.runs:
        files = [path for path in plan.folder(run).rglob("*") if path.is_file()]
        if plan.is_done(run):
            results = {plan.folder(run) / result for result in run.results if result.endswith(".json")}
            found |= results | {path for path in files if path.stat().st_size <= _ALWAYS}
        elif states[run.key] in ("preempted", "failed"):
            found |= {*files}
        if states[run.key] not in ("done", "running"):
            found |= {Path(word) for word in run.argv if plan.output in Path(word).parents}
        if Attempt.read(plan.job(run)):
            found.add(plan.job(run) / "attempt.json")
    return sorted(path for path in found if path.is_file() and path.name[0] != "." and path.name != "lock.json")


def _index(folder: Path) -> dict[str, Any]:
    try:
        index = json.loads((folder / INDEX).read_text())
        parts = dict(index["parts"])
        if isinstance(index["study"], str) and parts and all(Path(name).name == name for name in parts):
            return dict(index)
    except (OSError, *DAMAGED):
        pass
    raise InputError(f"{folder} holds no whole bundle of a study: make one with `robust-backbones sweep pack`")
