"""Files that try what a reader must not do: pickles by hand, and files that claim more than they hold."""

from __future__ import annotations

import copy
import functools
import io
import math
import pickle
import struct
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from hypothesis import strategies as st

from robust_backbones.checkpoint import untrusted

# Pickles by hand: each function gives the operations that leave one object on the stack.


def push(value: Any) -> bytes:
    """A plain object, nothing of it in the memo."""
    file = io.BytesIO()
    pickler = pickle.Pickler(file, 3)
    pickler.fast = True
    pickler.dump(value)
    return file.getvalue()[2:-1]


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + b"(" + b"".join(arguments) + b"tR"


DTYPE = call(name("numpy", "dtype"), push("f4"))


def storage(numel: int, key: str = "0", kind: str = "FloatStorage") -> bytes:
    return b"(" + push("storage") + name("torch", kind) + push(key) + push("cpu") + push(numel) + b"tQ"


def tensor(numel: int, size: Any, stride: Any, offset: int = 0) -> bytes:
    """A view of the storage "0", which is said to have ``numel`` elements."""
    rebuild = name("torch._utils", "_rebuild_tensor_v2")
    return call(rebuild, storage(numel), push(offset), push(size), push(stride), push(False), push({}))


def array(data: bytes, shape: Any, dtype: bytes = DTYPE) -> bytes:
    return call(name("numpy._core.numeric", "_frombuffer"), data, dtype, push(shape), push("C"))


def program(operations: bytes) -> bytes:
    return b"\x80\x04" + operations + b"."


def archive(pickled: bytes, records: dict[str, bytes] | None = None, compression: int = zipfile.ZIP_STORED) -> bytes:
    """A file as torch.save writes it."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression, compresslevel=1) as parts:
        parts.writestr("archive/data.pkl", pickled)
        for key, content in (records or {"0": bytes(16)}).items():
            parts.writestr(f"archive/data/{key}", content)
    return file.getvalue()


def legacy(pickled: bytes, *, keys: Sequence[str] = (), storages: bytes = b"") -> bytes:
    """A file as torch.save wrote it before version 1.6."""
    header = b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    return header + pickled + pickle.dumps(list(keys), 2) + storages


def safetensors_file(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


# What a pickle could run.

MAKERS: dict[tuple[str, str], Callable[[Path], tuple[Any, ...]]] = {
    ("os", "mkdir"): lambda marker: (str(marker),),
    ("os", "system"): lambda marker: (f"mkdir {marker}",),
    ("builtins", "eval"): lambda marker: (f"__import__('os').mkdir({str(marker)!r})",),
    ("builtins", "exec"): lambda marker: (f"import os; os.mkdir({str(marker)!r})",),
    ("builtins", "open"): lambda marker: (str(marker), "w"),
    ("subprocess", "check_call"): lambda marker: (["mkdir", str(marker)],),
    ("pickle", "loads"): lambda marker: (evil(marker),),
    ("numpy", "load"): lambda marker: (evil_file(marker), None, True),
    ("torch.storage", "_load_from_bytes"): lambda marker: (evil(marker),),
    ("numpy", "memmap"): lambda marker: (str(marker), "uint8", "w+", 0, 4),
}
"""What makes a marker, with its arguments, when a pickle calls it."""


def evil(marker: Path) -> bytes:
    return program(call(name("os", "mkdir"), push(str(marker))))


def evil_file(marker: Path) -> str:
    path = marker.with_suffix(".evil")
    path.write_bytes(evil(marker))
    return str(path)


def stack_global(module: str, attribute: str) -> bytes:
    return push(module) + push(attribute) + b"\x93"


CALLS: dict[str, Callable[[str, str, tuple[Any, ...]], bytes]] = {
    "REDUCE": lambda module, attribute, arguments: name(module, attribute) + push(arguments) + b"R",
    "STACK_GLOBAL": lambda module, attribute, arguments: stack_global(module, attribute) + push(arguments) + b"R",
    "INST": lambda module, attribute, arguments: (
        b"(" + b"".join(map(push, arguments)) + b"i" + name(module, attribute)[1:]
    ),
    "OBJ": lambda module, attribute, arguments: b"(" + name(module, attribute) + b"".join(map(push, arguments)) + b"o",
}


# What could take memory.

HUGE = 2**40
LONG = struct.pack("<Q", HUGE)
F32 = b'{"a":{"dtype":"F32","shape":[%d],"data_offsets":[0,%d]}}'
DEEP = b")" + b"\x85" * 20_000
"""Tuples in each other, to hash which overflows a stack of 512 KB."""


def bomb() -> bytes:
    """300 MB of zeros in a small file."""
    return archive(program(storage(75 * 10**6)), {"0": bytes(300 * 10**6)}, zipfile.ZIP_DEFLATED)


def archive_of_many_records() -> bytes:
    central = struct.pack("<4s4B4HL2L5H2L", b"PK\1\2", *[0] * 4, *[0] * 4, 0, 0, 0, 1, *[0] * 4, 0, 0) + b"a"
    directory = central * 600_000
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0, 0, len(directory), 4, 0)
    return b"PK\3\4" + directory + end


def archive_of_a_large_record() -> bytes:
    pickled = program(storage(4))
    content = archive(pickled)
    before, after = content.rsplit(struct.pack("<2L", 16, 16), 1)
    return before + struct.pack("<2L", *[len(content) - len(pickled)] * 2) + after


def with_storage(numel: int, claimed: int, operations: bytes = b"") -> bytes:
    """A legacy file that claims so many elements of the storage, and has four."""
    pickled = program(operations or storage(numel))
    return legacy(pickled, keys=["0"], storages=struct.pack("<q", claimed) + bytes(16))


def again_and_again(part: bytes, function: bytes, *arguments: bytes, times: int = 2000) -> bytes:
    """Call a function with one large part many times, and keep what it makes."""
    reference = b"h\x00" + b"".join(arguments)
    return program(b"(" + part + b"q\x00" + function + b"q\x01" + (b"h\x01(" + reference + b"tR") * times + b"l")


def archive_of_overlapping_records() -> bytes:
    """Many names of one record that begins at an odd place, where no tensor can be a view of it."""
    keys = [f"{key:04d}" for key in range(2000)]
    pickled = program(b"(" + b"".join(storage(2**18, key) for key in keys) + b"l")
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as parts:
        parts.writestr("odd/data.pkl", pickled + b"." * (len(pickled) % 2))
        parts.writestr("odd/data/0000", bytes(2**20))
        for key in keys[1:]:
            parts.filelist.append(copy.copy(parts.filelist[1]))
            parts.filelist[-1].filename = f"odd/data/{key}"
    return file.getvalue()


def archive_read_by_no_number() -> bytes:
    """Storages whose key is not a number, of which no two are the same."""
    key = b"(" + push("storage") + name("torch", "FloatStorage") + b"Fnan\n" + push("cpu") + push(2**18) + b"tQ"
    pickled = program(b"(" + key * 2000 + b"l")
    return archive(pickled + b"." * (len(pickled) % 2), {"nan": bytes(2**20)})


MANY = 2 * 10**6
BYTES = storage(MANY, kind="ByteStorage")


def archive_of_bytes(operations: bytes) -> bytes:
    """Where a pickle may use ``BYTES``, a tensor with as many elements as the file has bytes."""
    return archive(program(operations), {"0": bytes(MANY)})


LARGE = 2**20
DOUBLING = b")" + b"2\x86" * 40
"""Tuples of twice the last one: small, and endless to compare or to print."""
STORAGE_OF = b"(" + push("storage") + name("torch", "FloatStorage")

REFUSED: dict[str, Callable[[], bytes]] = {
    "compressed storage": bomb,
    "many records": archive_of_many_records,
    "large record": archive_of_a_large_record,
    "large storage": lambda: archive(program(storage(HUGE))),
    "storage of less than nothing": lambda: archive(program(storage(-HUGE))),
    "large tensor": lambda: archive(program(tensor(4, (HUGE,), (1,)))),
    "expanded tensor": lambda: archive(program(tensor(4, (HUGE,), (0,)))),
    "expanded in two dimensions": lambda: archive(program(tensor(4, (2**20, 2**20), (0, 0)))),
    "tensor that starts behind its storage": lambda: archive(program(tensor(4, (4,), (1,), HUGE))),
    "tensor that starts before its storage": lambda: archive(program(tensor(4, (4,), (1,), -4))),
    "tensor that runs backwards": lambda: archive(program(tensor(4, (2,), (-1,), 1))),
    "tensor with gaps": lambda: archive(program(tensor(4, (3,), (2,)))),
    "strides that overflow": lambda: archive(program(tensor(16, (2, 2, 2, 2), (2**62,) * 4)), {"0": bytes(64)}),
    "BINBYTES": lambda: program(b"B" + struct.pack("<L", 2**32 - 1)),
    "BINBYTES8": lambda: program(b"\x8e" + LONG),
    "BYTEARRAY8": lambda: program(b"\x96" + LONG),
    "BYTEARRAY8 in a frame": lambda: program(b"\x95" + LONG + b"\x96" + LONG),
    "BINUNICODE8": lambda: program(b"\x8d" + LONG),
    "BINSTRING": lambda: program(b"T" + struct.pack("<l", 2**31 - 1)),
    "LONG4": lambda: program(b"\x8b" + struct.pack("<l", 2**31 - 1)),
    "empty FRAME": lambda: program(b"\x95" + LONG),
    "legacy storage": lambda: with_storage(4, HUGE),
    "legacy storage of less than nothing": lambda: with_storage(0, -1),
    "legacy storage shorter than its use": lambda: with_storage(HUGE, 4),
    "legacy tensor": lambda: with_storage(4, 4, tensor(4, (HUGE,), (1,))),
    "safetensors header": lambda: safetensors_file(F32 % (1, 4), bytes(4), HUGE),
    "safetensors shape": lambda: safetensors_file(F32 % (HUGE // 4, HUGE), bytes(4)),
    "safetensors shape without data": lambda: safetensors_file(F32 % (HUGE, 4), bytes(4)),
    "bytes": lambda: program(call(name("builtins", "bytes"), push(10**12))),
    "bytes of Python 2": lambda: program(call(name("__builtin__", "bytes"), push(10**12))),
    "array": lambda: program(array(push(bytes(4)), (HUGE,))),
    "array of many dimensions": lambda: program(array(push(bytes(4)), (2**20,) * 9)),
    "array of less than nothing": lambda: program(array(push(bytes(4)), (-(2**20), -(2**20)))),
    "array of less than nothing in one dimension": lambda: program(array(push(bytes(4)), (-1,))),
    "sets": lambda: program(b"\x8f" * 3_000_000),
    "nested tuples for a key": lambda: program(b"}" + DEEP + b"Ns"),
    "nested tuples among keys": lambda: program(b"}(" + DEEP + b"Nu"),
    "nested tuples for a key of DICT": lambda: program(b"(" + DEEP + b"Nd"),
    "nested tuples for a key of OrderedDict": lambda: program(
        call(name("collections", "OrderedDict"), b"]" + DEEP + b"N\x86a")
    ),
    "one tuple for a key again and again": lambda: program(
        b"(" + b"K\x01" * 100_000 + b"tq\x00}" + b"h\x00Ns" * 100_000
    ),
    "one tuple for arguments again and again": lambda: program(
        name("a", "B") + b"q\x00(" + b"K\x01" * 100_000 + b"tq\x01" + b"h\x00h\x01R" * 80_000
    ),
    "nested tuples in a set": lambda: program(b"\x8f(" + DEEP + b"\x90"),
    "nested tuples in a frozenset": lambda: program(b"(" + DEEP + b"\x91"),
    "one string encoded again and again": lambda: again_and_again(
        push("a" * LARGE), name("_codecs", "encode"), push("latin1")
    ),
    "one array again and again": lambda: again_and_again(
        push(bytes(LARGE)), name("numpy._core.numeric", "_frombuffer"), DTYPE, push((LARGE // 4,)), push("C")
    ),
    "one name of a type again and again": lambda: again_and_again(push("f" * LARGE), name("numpy", "dtype")),
    "one dictionary again and again": lambda: again_and_again(
        push([(key, None) for key in range(20_000)]), name("collections", "OrderedDict")
    ),
    "one size again and again": lambda: again_and_again(push([0] * 100_000), name("torch", "Size")),
    "one storage again and again": lambda: again_and_again(
        push(legacy(program(storage(2**18)), keys=["0"], storages=struct.pack("<q", 2**18) + bytes(LARGE))),
        name("torch.storage", "_load_from_bytes"),
    ),
    "one array of dill again and again": lambda: again_and_again(
        b"(K\x01" + push((LARGE // 4,)) + DTYPE + push(False) + push(bytes(LARGE)) + b"t",
        b"cdill._dill\n_create_array\n",
    ).replace(b"h\x01(h\x00", b"h\x01(" + name("numpy.core.multiarray", "_reconstruct") + b")h\x00"),
    "records in each other": archive_of_overlapping_records,
    "storages that are not numbers": archive_read_by_no_number,
    "tensor for arguments": lambda: archive_of_bytes(name("a", "B") + BYTES + b"R"),
    "tensor for arguments of NEWOBJ": lambda: archive_of_bytes(name("a", "B") + BYTES + b"\x81"),
    "tensor for sizes": lambda: archive_of_bytes(
        call(name("torch._utils", "_rebuild_tensor"), BYTES, push(0), BYTES, BYTES)
    ),
    "tensor for a storage": lambda: archive_of_bytes(BYTES + b"Q"),
    "nested tuples for a storage": lambda: archive(program(STORAGE_OF + DEEP + push("cpu") + push(4) + b"tQ")),
    "nested tuples for a legacy storage": lambda: legacy(program(STORAGE_OF + DEEP + push("cpu") + push(4) + b"tQ")),
    "nested tuples among legacy storages": lambda: legacy(program(b"N"))[:-3] + b"(" + DEEP + b"l." + bytes(16),
    "some nested tuples among legacy storages": lambda: (
        legacy(program(b"N"))[:-3] + b"()" + b"\x85" * 3000 + b"l." + bytes(16)
    ),
    "doubling tuples for a storage": lambda: archive(program(STORAGE_OF + DOUBLING + push("cpu") + push(4) + b"tQ")),
    "doubling tuples for an encoding": lambda: program(call(name("_codecs", "encode"), push("a"), DOUBLING)),
    "product of long numbers": lambda: program(
        push(2 ** (8 * LARGE)) + b"q\x00" + array(push(b""), ()).replace(push(()), b"(" + b"h\x00" * 1000 + b"t")
    ),
}
"""Files that claim, or would take, far more than they are."""

HARMLESS: dict[str, Callable[[], bytes]] = {
    "memo": lambda: program(b"Nr" + struct.pack("<L", 2**31 - 1)),
    "memo in text": lambda: b"Np999999999999\n.",
    "FRAME": lambda: b"\x80\x04\x95" + LONG + b"N.",
    "bytearray": lambda: program(call(name("builtins", "bytearray"), push(10**12))),
    "new array": lambda: program(
        call(name("numpy.core.multiarray", "_reconstruct"), name("numpy", "ndarray"), push((HUGE,)), push(b"b"))
    ),
    "new arrays": lambda: program(name("numpy.core.multiarray", "_reconstruct") + b"q\x00" + b"h\x00)R" * 20_000),
    "empty tensor": lambda: archive(program(tensor(4, (0, HUGE), (1, 1)))),
    "nested tuples": lambda: program(DEEP),
    "nested lists": lambda: program(b"]" * 20_000 + b"a" * 19_999),
    "nested dictionaries": lambda: program(b"}" + b"K\x00}" * 20_000 + b"s" * 20_000),
    "nested calls": lambda: program(b"".join([name("a", "B")] * 20_000) + b")R" + b"\x85R" * 19_999),
    "calls in each other": lambda: program(
        name("torch._tensor", "_rebuild_from_type_v2") + b"q\x00]q\x01(h\x00Nh\x01e0h\x00Nh\x01\x87R"
    ),
    "tensor for a size": lambda: archive_of_bytes(call(name("torch", "Size"), BYTES)),
    "list in itself": lambda: program(b"]q\x00h\x00a"),
    "dictionary in itself": lambda: program(b"}q\x00K\x00h\x00s"),
}
"""Files that could make a reader allocate or recurse, which it may read."""


# Sound files, and random programs.


@functools.cache
def healthy(kind: str) -> bytes:
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.int64), "c": torch.ones(1).half()}
    arrays = {"a": np.arange(6.0).reshape(2, 3), "b": {"c": [1, "x", (2.5, None)]}, "d": np.float32(1)}
    file = io.BytesIO()
    match kind:
        case "zip":
            torch.save(tensors, file)
        case "legacy":
            torch.save(tensors, file, _use_new_zipfile_serialization=False)
        case "pickle 2" | "pickle 5":
            pickle.dump(arrays, file, int(kind[-1]))
        case "safetensors":
            file.write(safetensors.torch.save(tensors, {"note": "x"}))
    return file.getvalue()


KINDS = ["zip", "legacy", "pickle 2", "pickle 5", "safetensors"]


ATOMS = [
    *map(push, [None, 0, 4, -1, 2**62, 2**70, True, math.nan, "storage", "0", "f4", "<", "F", "latin1", "é", b"", ()]),
    *map(push, [(2,), (2, 2), (1,), [], {}, bytes(16)]),
    *(name(*known) for known in untrusted._KNOWN),
    *(storage(4), storage(16, kind="ByteStorage"), tensor(16, (4, 4), (4, 1)), tensor(4, (), ())),
    *(b"h" + bytes([key]) for key in range(3)),
    DTYPE,
    call(name("numpy.core.multiarray", "_reconstruct")),
    b"\x96" + struct.pack("<Q", 16) + bytes(16),
]
PROGRAMS = st.recursive(
    st.sampled_from(ATOMS),
    lambda parts: st.one_of(
        st.lists(parts, max_size=6).map(lambda inner: b"(" + b"".join(inner) + b"t"),
        st.lists(parts, max_size=6).map(lambda inner: b"(" + b"".join(inner) + b"l"),
        st.tuples(parts, st.lists(parts, max_size=6)).map(lambda inner: call(inner[0], *inner[1])),
        st.tuples(parts, parts, st.sampled_from([b"R", b"b", b"\x81", b"}\x92"])).map(b"".join),
        st.tuples(parts, parts, parts, st.just(b"s")).map(b"".join),
        st.tuples(parts, st.just(b"("), parts, parts, st.sampled_from([b"e", b"u", b"\x90"])).map(b"".join),
        st.tuples(parts, st.sampled_from([b"q\x00", b"q\x01", b"q\x02", b"Q"])).map(b"".join),
    ),
    max_leaves=12,
)
