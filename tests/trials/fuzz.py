"""Fuzz every reader of files that somebody else made: each file is read or refused in a sentence, whatever is in it.

    python tests/trials/fuzz.py --target all --inputs 10000 [--seed 0] [--record fuzz.json]

Sound and hostile files are damaged (bits flipped, parts cut, doubled or taken from another file; values of another kind
put in place of values) and read in forked processes with 1 GiB of address space beyond what importing takes. An audit
hook notes every command, connection, import and file opened for writing. Exit status: 0 where nothing ran (executed),
died (crashed), raised anything but the project's own errors (traceback), gave a wrong number (wrong), grew by more than
200 MB (grew) or took more than 5 seconds (slow); what did is kept in --keep. ``--target torch.load`` fuzzes what the
reader of checkpoints is not: torch's own, with nothing but ``find_class`` replaced.
"""

from __future__ import annotations

import argparse
import codecs
import collections
import importlib
import io
import json
import multiprocessing
import os
import pickle
import random
import re
import resource
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from robust_backbones.analysis.records import Primary, find_runs
from robust_backbones.checkpoint import sources, untrusted
from robust_backbones.checkpoint.convert import convert, metadata_in
from robust_backbones.configs import CONFIG_DIR, STUDY_DIR
from robust_backbones.data.annotations import Use
from robust_backbones.data.annotations_images import read_header
from robust_backbones.data.annotations_sets import AnnotatedSet
from robust_backbones.data.datasets import open_dataset
from robust_backbones.data.decoding import decode
from robust_backbones.detection.config import load_config
from robust_backbones.errors import InputError
from robust_backbones.runs.files import write_json
from robust_backbones.runs.identity import read_settings
from robust_backbones.runs.record import RunRecord, versions
from robust_backbones.sweep.manifest import read_manifest
from tests.checkpoint import hostile, test_damaged
from tests.data.test_annotations import HOSTILE
from tests.detection import mutations
from tests.detection.conftest import base_config

OUTCOMES = ("executed", "crashed", "traceback", "wrong", "grew", "slow")
_GROWTH, _SECONDS, _HANG = 200, 5, 120
_ACTIONS = ("os.", "subprocess.", "socket.", "exec", "shutil.", "ctypes.", "pty.", "urllib.")
_HARMLESS = ("os.listdir", "os.scandir", "os.walk", "socket.gethostname")
_FILES = (
    "open",
    "os.mkdir",
    "os.remove",
    "os.rmdir",
    "os.rename",
    "os.link",
    "os.chmod",
    "os.utime",
    "os.symlink",
    "shutil.",
)
_DOCS = Path(__file__).resolve().parents[2] / "docs"
Make = Callable[[random.Random], Any]


@dataclass(frozen=True)
class Target:
    """``make`` gives an input, as bytes or a number that stands for it; ``read`` reads it, in a folder of its own."""

    make: Make
    read: Callable[[Any, Path], object]


def damaged(files: list[bytes], atoms: list[bytes]) -> Make:
    """Maker of one of ``files`` with one to three places changed, ``atoms`` among what is put there."""

    def make(generator: random.Random) -> bytes:
        content = bytearray(generator.choice(files))
        for _ in range(generator.randint(1, 3)):
            start = generator.randrange(len(content) + 1)
            other = generator.choice(files)
            cut = generator.randrange(len(other))
            match generator.randrange(6):
                case 0 | 1 if content:
                    content[start % len(content)] ^= 1 << generator.randrange(8)
                case 2:
                    content[start : start + 8] = generator.choice([b"\xff" * 8, bytes(8), b"\x7f" + b"\xff" * 7])
                case 3:
                    content[start:start] = other[cut : cut + generator.randint(1, 64)]
                case 4:
                    content[start : start + generator.randint(1, 64)] = b""
                case _:
                    content[start : start + 1] = generator.choice(atoms)
        return bytes(content) or b"."

    return make


def changed_json(values: list[Any]) -> Make:
    """Maker of JSON in which one value, at any depth, is another, is gone or is new."""

    def make(generator: random.Random) -> bytes:
        return json.dumps(
            test_damaged.mutated(generator.choice(values), generator, top=True), default=repr, skipkeys=True
        ).encode()

    return make


def either(*makers: Make) -> Make:
    return lambda generator: generator.choice(makers)(generator)


# Checkpoints: their bytes, and what they hold


def checkpoint_files() -> list[bytes]:
    """Sound and hostile ones, without the largest."""
    bombs = [make() for make in (hostile.REFUSED | hostile.HARMLESS).values()]
    marker = Path(tempfile.gettempdir()) / "robust_backbones_marker"
    attacks = [
        hostile.program(write(module, name, hostile.MAKERS[module, name](marker)))
        for module, name in hostile.MAKERS
        for write in hostile.CALLS.values()
    ]
    files = [*map(hostile.healthy, hostile.KINDS * 8), *bombs, *attacks, *map(hostile.archive, attacks)]
    return [content for content in files if len(content) < 300_000]


def read_untrusted(content: bytes, folder: Path) -> None:
    touch(untrusted.read_file(file_of(content, folder / "file.pth")))


def touch(content: Any) -> None:
    """Read every element, which ends the process if it lies outside the file."""
    for value in content.values() if isinstance(content, dict) else [content]:
        if isinstance(value, torch.Tensor):
            value.clone()


_SAFE = {("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter"), ("collections", "OrderedDict")}


class _FindClassAlone(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return super().find_class(module, name) if (module, name) in _SAFE else untrusted.Inert


def read_by_torch(content: bytes, folder: Path) -> None:
    module = ModuleType("find_class_alone")
    vars(module).update(Unpickler=_FindClassAlone, load=lambda file, **_: _FindClassAlone(file).load())
    try:
        touch(torch.load(file_of(content, folder / "file.pth"), pickle_module=module, weights_only=False))
    except Exception as error:
        raise InputError(str(error)) from error


def contents() -> Target:
    """As ``sources`` reads and ``convert`` converts them, once they have been read from a file."""
    patch, path = pytest.MonkeyPatch(), Path(tempfile.mkdtemp()) / "file.pth"
    path.write_bytes(b"its sha256 alone is asked for")
    whole = test_damaged.contents(path, patch)

    def read(seed: int, _: Path) -> None:
        choose = random.Random(seed)
        content = test_damaged.mutated(choose.choice(whole), choose, top=True)
        patch.setattr(sources, "load_tensors", lambda _: content)
        metadata_in(content)
        convert(sources.read_checkpoint(path, statement=choose.choice([test_damaged.STATED, None])))

    return Target(lambda generator: generator.getrandbits(48), read)


# Annotations: damaged text; and other values, with the number that has to come of it


def annotations(kind: str) -> Target:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        mutations.write_images(folder)
        pictures = {path.name: path.read_bytes() for path in folder.iterdir()}
        mutations.write_voc(folder / "VOC", folder)
        xml = [path.read_bytes() for path in sorted((folder / "VOC/Annotations").iterdir())]
    files = xml if kind == "voc" else [json.dumps(mutations.sound()).encode()]
    values = [json.dumps(value, default=repr).encode() for value in HOSTILE] + [
        text.encode() for text in mutations.TEXTS
    ]
    check = mutations.check_voc_mutation if kind == "voc" else mutations.check_coco_mutation
    text, cfg = damaged(files, [*values, b"<!DOCTYPE a [<!ENTITY b 'c'>]>", b"&b;", b"{", b"]"]), base_config()

    def make(generator: random.Random) -> bytes | int:
        return text(generator) if generator.random() < 0.8 else generator.getrandbits(32)

    def read(content: bytes | int, folder: Path) -> None:
        if not (folder / "1.jpg").exists():
            for name, data in pictures.items():
                file_of(data, folder / name)
        if isinstance(content, int):
            check(cfg, folder, folder, content)
        elif kind == "coco":
            AnnotatedSet(file_of(content, folder / "truth.json"), folder).check(Use(masks=True), workers=1)
        else:
            mutations.write_voc(folder / "VOC", folder)
            file_of(content, folder / "VOC/Annotations/2.xml")
            AnnotatedSet(folder / "VOC", folder / "VOC/JPEGImages", "test").check(Use(), workers=1)

    return Target(make, read)


# Configurations and manifests

_YAML = """
!!python/object/apply:os.system ['true']|!!python/name:os.system|!!binary aGk=|&a [*a]|*a|{a: b}|[1, 2]|~|.nan|1e400
_BASE_: http://localhost/a.yaml|_BASE_: /etc/passwd|_BASE_: [a.yaml]|"\\ud800"|- |? |: |2026-01-01|0x7fffffffffffffff
eval('1')|(1, 2)|()|((((|-1|9999999999999999999999|!!set {a}|%YAML 1.1|---|\t|<<: *a
"""


def yaml_text() -> Target:
    files = sorted(path.read_bytes() for folder in (CONFIG_DIR, STUDY_DIR) for path in folder.rglob("*.yaml"))

    def read(content: bytes, folder: Path) -> None:
        read_by(file_of(content, folder / "file.yaml"), load_config, read_manifest, read_settings)

    lines = [line for file in files for line in file.splitlines(keepends=True)]
    atoms = [text.encode("utf-8", "surrogatepass") for text in re.split(r"[|\n]", _YAML.strip("\n"))]
    return Target(damaged(files, [*atoms, *lines]), read)


# Images and shards


def pictures() -> list[bytes]:
    generator, files = np.random.default_rng(0), []
    for mode, suffixes in {"RGB": "jpeg png webp bmp gif tiff ppm", "L": "jpeg png tiff", "CMYK": "jpeg tiff"}.items():
        pixels = generator.integers(0, 256, (20, 24, Image.getmodebands(mode)), dtype=np.uint8)
        for suffix in suffixes.split():
            file = io.BytesIO()
            image = (
                Image.fromarray(pixels.squeeze(), mode)
                if mode == "L"
                else Image.frombytes(mode, (24, 20), pixels.tobytes())
            )
            image.save(file, suffix)
            files.append(file.getvalue())
    file = io.BytesIO()
    image = Image.frombytes("RGB", (24, 20), bytes(range(240)) * 6)
    image.save(
        file, "jpeg", progressive=True, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    )
    deep = cv2.imencode(".png", generator.integers(0, 65536, (20, 24), dtype=np.uint16))[1].tobytes()
    return [*files, file.getvalue(), deep]


def read_image(content: bytes, folder: Path) -> None:
    read_header(file_of(content, folder / "file.jpg"))
    decode(content, "file.jpg")


def shard_files() -> list[bytes]:
    images, files = pictures(), []
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=form) as tar:
            for number, image in enumerate(images[:3]):
                long = "a" * 120 * (number == 1 and form != tarfile.USTAR_FORMAT)
                for name, data in ((f"{long}{number}.jpg", image), (f"{long}{number}.cls", b"%d" % (number % 2))):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        files.append(file.getvalue())
    return files


def read_shard(content: bytes, folder: Path) -> None:
    file_of(content, folder / "shards/0.tar")
    dataset = open_dataset(folder / "shards", v2.Identity())
    for position in range(len(dataset)):
        dataset[position]


# Records


def records() -> Target:
    lines = [line for path in sorted(_DOCS.rglob("records.jsonl")) for line in path.read_text().splitlines()[:8]]
    values = [{name: value for name, value in json.loads(line).items() if name != "folder"} for line in lines]
    files = [json.dumps(value).encode() for value in values]

    def read(content: bytes, folder: Path) -> None:
        path = file_of(content, folder / "run/record.json")
        read_by(path, RunRecord.read, read_settings, Primary.read, lambda path: find_runs([path.parent]))

    garbage = [b"NaN", b"1e999", b"{", b"null", b'"\\ud800"', b"[" * 99]
    return Target(either(changed_json(values), damaged(files, garbage)), read)


TARGETS: dict[str, Callable[[], Target]] = {
    "checkpoints": lambda: Target(damaged(checkpoint_files(), hostile.ATOMS), read_untrusted),
    "contents": contents,
    "coco": lambda: annotations("coco"),
    "voc": lambda: annotations("voc"),
    "yaml": yaml_text,
    "shards": lambda: Target(
        damaged(shard_files(), [b"0" * 11 + b"\0", b"7" * 11 + b" ", b"\x80" + b"\xff" * 11]), read_shard
    ),
    "images": lambda: Target(damaged(pictures(), [b"\xff\xd8", b"IHDR", b"\xff\xff\xff\xff", bytes(4)]), read_image),
    "records": records,
}
READERS = TARGETS | {
    "torch.load": lambda: Target(damaged(checkpoint_files(), hostile.ATOMS), read_by_torch),
}


def file_of(content: bytes, path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path


def read_by(path: Path, *readers: Callable[[Path], object]) -> None:
    """Read by each; InputError where every one refuses it."""
    problems = []
    for reader in readers:
        try:
            reader(path)
        except InputError as error:
            problems.append(error)
    if len(problems) == len(readers):
        raise problems[0]


def read_all(target: Target, seed: int, number: int, folder: Path, results: Connection) -> None:
    """Read inputs one after another; send each before, and what came of it after."""
    limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + 2**30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for descriptor in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    warnings.simplefilter("ignore")
    Image.init()  # imports Pillow's formats; below is what converting imports
    for module in ("torch._subclasses.schema_check_mode", "timm", "robust_backbones.convstem"):
        importlib.import_module(module)
    # Of names in zip archives, of text in pickles, of JSON.
    for encoding in (
        "cp437",
        "raw_unicode_escape",
        *(f"utf_{bits}{end}" for bits in (16, 32) for end in ("", "_le", "_be")),
    ):
        codecs.lookup(encoding)
    generator, reading, ran = random.Random(seed), False, list[str]()
    os.chdir(folder)
    tempfile.tempdir = str(folder)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if not reading:
            return
        place = os.fsdecode(arguments[0]) if arguments and isinstance(arguments[0], str | bytes | os.PathLike) else ""
        inside = event.startswith(_FILES) and (place.startswith(str(folder)) or not place.startswith("/"))
        writes = event == "open" and isinstance(arguments[1], str) and bool(set(arguments[1]) & set("wax+"))
        imports = event == "import" and not place.startswith("encodings")
        acts = event.startswith(_ACTIONS) and event not in _HARMLESS
        if imports or ((writes or acts) and not inside):
            ran.append(f"{event}{arguments}"[:200])

    def outcome_of(content: Any) -> tuple[str, str]:
        nonlocal reading
        before, start, told = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time(), ""
        reading, outcome = True, "read"
        try:
            target.read(content, folder)
        except InputError as error:
            outcome = "grew" if "memory" in repr(error.__cause__).lower() else "refused"
        except AssertionError as error:
            outcome, told = "wrong", repr(error)[:300]
        except MemoryError:
            outcome = "grew"
        except BaseException as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            outcome, told = "traceback", f"{error!r} at {place.filename}:{place.lineno}"[:400]
        reading = False
        growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
        seconds = time.process_time() - start
        if ran:
            outcome = "executed"
        elif outcome in ("read", "refused") and (growth > _GROWTH or seconds > _SECONDS):
            outcome = "grew" if growth > _GROWTH else "slow"
        told = f"{told} {ran[:3]} {growth} MB {seconds:.1f} s"
        ran.clear()
        return outcome, told

    warm = random.Random("warm")
    for _ in range(50):  # what reading takes is imported
        outcome_of(target.make(warm))
    sys.addaudithook(audit)
    for _ in range(number):
        content = target.make(generator)
        results.send(content)
        results.send(outcome_of(content))


def fuzz(name: str, inputs: int, seed: int, keep: Path) -> collections.Counter[str]:
    counts, target = collections.Counter[str](), READERS[name]()
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        while (left := inputs - counts.total()) > 0:
            receiver, sender = fork.Pipe(duplex=False)
            process = fork.Process(target=read_all, args=(target, seed, left, Path(folder), sender))
            process.start()
            sender.close()
            content, seed = None, seed + 1_000_003
            try:
                while True:
                    content = receiver.recv()
                    outcome, told = receiver.recv() if receiver.poll(_HANG) else ("slow", "hung")
                    counts[outcome] += 1
                    if outcome in OUTCOMES and counts[outcome] < 10:
                        save(content, keep / f"{name}-{outcome}-{counts[outcome]}", told)
                    if told == "hung":
                        break
                    content = None
            except EOFError:
                if content is not None:
                    counts["crashed"] += 1
                    save(content, keep / f"{name}-crashed-{counts['crashed']}", "")
            process.kill()
            process.join()
            if process.exitcode and content is None and counts.total() < inputs:
                raise SystemExit(f"the reader of {name} could not be set up: status {process.exitcode}")
    return counts


def save(content: Any, path: Path, told: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else str(content).encode())
    print(f"{path} {told}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", nargs="+", choices=[*READERS, "all"], default=["all"])
    parser.add_argument("--inputs", type=int, default=10_000, help="in all, in equal parts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir()) / "fuzz")
    parser.add_argument("--record", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    names, rows, bad = [*TARGETS] if "all" in options.target else options.target, [], 0
    for name in names:
        start = time.monotonic()
        counts = fuzz(name, -(-options.inputs // len(names)), options.seed, options.keep)
        bad += sum(counts[outcome] for outcome in OUTCOMES)
        rows.append({"target": name, "seed": options.seed, "inputs": counts.total(), **counts})
        print(f"{name}, seed {options.seed}: {dict(counts)} in {time.monotonic() - start:.0f} s", flush=True)
        if options.record:
            write_json(options.record, {"rows": rows, "versions": versions()})
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
