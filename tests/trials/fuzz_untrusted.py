"""Fuzz the reader of untrusted files: mutated files, each of which is read or refused; none runs, crashes or grows.

    python tests/trials/fuzz_untrusted.py --files 20000 [--seed 0] [--reader torch.load]

Sound files, hostile files and random pickles are damaged (bits flipped, parts cut, doubled or taken from another file)
and read in processes with 1 GiB of address space beyond what importing takes. An audit hook notes every command,
import and file for writing. Exit status: 0 where nothing ran, crashed, hung or grew by more than 200 MB.
``--reader torch.load`` fuzzes what the reader is not: torch's own, with nothing but ``find_class`` replaced.
"""

import argparse
import codecs
import collections
import contextlib
import multiprocessing
import os
import pickle
import random
import resource
import sys
import tempfile
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from robust_backbones.checkpoint import untrusted
from robust_backbones.errors import InputError
from tests.checkpoint import hostile

_GROWTH, _SECONDS = 200, 20
_ACTIONS = ("os.", "subprocess.", "socket.", "exec", "shutil.", "ctypes.", "pty.", "urllib.")
_SAFE = {("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter"), ("collections", "OrderedDict")}


class _FindClassAlone(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return super().find_class(module, name) if (module, name) in _SAFE else untrusted.Inert


def _torch_load(path: Path) -> Any:
    module = ModuleType("find_class_alone")
    vars(module).update(Unpickler=_FindClassAlone, load=lambda file, **_: _FindClassAlone(file).load())
    try:
        return torch.load(path, pickle_module=module, weights_only=False)
    except Exception as error:
        raise InputError(str(error)) from error


READERS: dict[str, Callable[[Path], Any]] = {"ours": untrusted.read_file, "torch.load": _torch_load}


def seeds() -> list[bytes]:
    """Sound and hostile files to damage, without the largest."""
    bombs = [make() for make in (hostile.REFUSED | hostile.HARMLESS).values()]
    marker = Path(tempfile.gettempdir()) / "robust_backbones_marker"
    attacks = [
        hostile.program(write(module, name, hostile.MAKERS[module, name](marker)))
        for module, name in hostile.MAKERS
        for write in hostile.CALLS.values()
    ]
    files = [*map(hostile.healthy, hostile.KINDS * 8), *bombs, *attacks, *map(hostile.archive, attacks)]
    return [content for content in files if len(content) < 300_000]


def mutated(files: list[bytes], generator: random.Random) -> bytes:
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
                content[start : start + 1] = generator.choice(hostile.ATOMS)
    return bytes(content) or b"."


def read_all(reader: str, seed: int, number: int, folder: Path, results: Connection) -> None:
    """Read mutated files one after another; send each file before, and what came of it after."""
    limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + 2**30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    warnings.simplefilter("ignore")
    files, generator, path = seeds(), random.Random(seed), folder / f"{seed}"
    reading, ran = False, list[str]()

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        imports = event == "import" and not arguments[0].startswith("encodings")
        if reading and (writes or imports or event.startswith(_ACTIONS)):
            ran.append(f"{event}{arguments}"[:200])

    for sound in map(hostile.healthy, hostile.KINDS):  # imports what reading takes
        path.write_bytes(sound)
        with contextlib.suppress(InputError):
            touch(READERS[reader](path))
    for encoding in ("cp437", "raw_unicode_escape"):  # of names in zip archives, of text in pickles
        codecs.lookup(encoding)
    sys.addaudithook(audit)
    for _ in range(number):
        content = mutated(files, generator)
        path.write_bytes(content)
        results.send(content)
        before, outcome = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, "read"
        reading = True
        try:
            touch(READERS[reader](path))
        except InputError as error:
            outcome = "grew" if "memory" in repr(error.__cause__).lower() else "refused"
        except MemoryError:
            outcome = "grew"
        reading = False
        growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
        results.send(("executed" if ran else "grew" if growth > _GROWTH else outcome, f"{growth} MB {ran[:3]}"))
        ran.clear()


def touch(content: Any) -> None:
    """Read every element, which ends the process if it lies outside the file."""
    for value in content.values() if isinstance(content, dict) else [content]:
        if isinstance(value, torch.Tensor):
            value.clone()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", choices=READERS, default="ours")
    options = parser.parse_args()
    counts, seed = collections.Counter[str](), options.seed
    with tempfile.TemporaryDirectory() as folder:
        while (left := options.files - counts.total()) > 0:
            receiver, sender = multiprocessing.get_context("fork").Pipe(duplex=False)
            process = multiprocessing.get_context("fork").Process(
                target=read_all, args=(options.reader, seed, left, Path(folder), sender)
            )
            process.start()
            sender.close()
            content, outcome, seed = b"", "crashed", seed + 1_000_003
            try:
                while True:
                    content = receiver.recv()
                    outcome, detail = receiver.recv() if receiver.poll(_SECONDS) else ("hung", "")
                    counts[outcome] += 1
                    if outcome not in ("read", "refused") and counts[outcome] < 10:
                        keep(content, f"{options.reader}-{outcome}-{counts[outcome]}", detail)
                    if outcome == "hung":
                        break
                    content = b""
            except EOFError:
                if content:
                    counts["crashed"] += 1
                    keep(content, f"{options.reader}-crashed-{counts['crashed']}", "")
            process.kill()
            process.join()
    print(f"{options.reader}, seed {options.seed}: {dict(counts)}")
    return int(bool(counts.keys() - {"read", "refused"}))


def keep(content: bytes, name: str, detail: str) -> None:
    path = Path(tempfile.gettempdir()) / f"fuzz-{name}"
    path.write_bytes(content)
    print(f"{path} {detail}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
