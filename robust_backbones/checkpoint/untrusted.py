"""Reads untrusted files of tensors (pickles, torch.save's, safetensors) without running any code in them.

A pickle is a program that may call any function of any installed package. Here a separate loop executes the operations
of a pickle. It only calls the functions in ``_KNOWN``, which rebuild tensors, arrays and containers; every other class
or function that a file names becomes ``Inert``, so files made with dill, or with classes of packages that are not
installed, can be read without them. Tensors are views of the memory-mapped file, and the sizes that a file claims are
checked against its own before anything is allocated.

``torch.load`` with another ``find_class`` does not suffice. torch runs TorchScript that it finds in a file, inflates
compressed records, allocates storages by the claimed size, and grows a storage to fit a tensor; Python's unpicklers set
attributes of anything that a file names, and the one in C allocates by the index of a memo.
"""

from __future__ import annotations

import codecs
import io
import math
import mmap
import pickletools
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import FunctionType, NoneType
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from robust_backbones.checkpoint.mistaken import mistaken_archive, mistaken_for, refuse_mistaken
from robust_backbones.errors import InputError

METADATA = "__metadata__"
"""Key of a safetensors file's own strings in the result of ``read_file``, named as in its header."""

SAVE_STATE_DICT = "load it where its code is installed, and save its state_dict()"

# Checkpoints of large networks, optimiser included, take some tens of thousands. Numbers and strings count apart: many
# lie beside the weights, such as the loss of every image of ImageNet by its name; 5 million take 0.3 GB.
_MAX_OPERATIONS = 500_000
_MAX_VALUES = 5_000_000
_VALUES = {
    *("BINFLOAT", "BININT", "BININT1", "BININT2", "LONG1", "NONE", "NEWTRUE", "NEWFALSE", "BINUNICODE"),
    *("SHORT_BINUNICODE", "BINPUT", "LONG_BINPUT", "MEMOIZE", "BINGET", "LONG_BINGET"),
}
_MAX_ZIP_ENTRIES = 100_000
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # opens the files of torch.save before version 1.6
_LEGACY_VERSION = 1001


class _CutOffError(Exception):
    """A file is shorter than its own content claims."""


class _MistakenError(Exception):
    """A file is something other than tensors; says what, with the fix."""


class Inert:
    """Replaces an object of an unknown class; whatever a file does to it has no effect."""


class Options(Inert):
    """An ``argparse.Namespace``: a training's options, stored beside the weights."""

    def __init__(self) -> None:
        self.values: dict[Any, Any] = {}


class _Array(Inert):
    """A numpy array before it gets its content, and its position in the pickle's memo."""

    def __init__(self) -> None:
        self.memo_keys: list[int] = []


def read_file(path: str | Path) -> Any:
    """The content of a ``.pt`` / ``.pth`` / ``.ckpt``, ``.pkl`` or ``.safetensors`` file; its suffix does not matter.

    Tensors and arrays become tensors on the CPU, dictionaries of any kind ``dict``, unknown objects ``Inert``. A
    safetensors file gives its tensors by name, and its strings, if any, under ``METADATA``.

    Raises:
        InputError: the file is missing, damaged, of another kind, or claims more than it can contain.
    """
    path = Path(path)
    try:
        refuse_mistaken(path)
        with open(path, "rb") as file:
            # Copy on write: tensors can be changed, the file cannot.
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            if content[8:9] == b"{" and struct.unpack_from("<Q", content)[0] < len(content):
                return _read_safetensors(path)
            is_archive = content[:4] == b"PK\x03\x04"
            return _read_archive(content, file) if is_archive else _read_pickles(content, memoryview(content))
    except InputError:
        raise
    except _CutOffError:
        raise InputError(f"{path} is cut off: download or save it again") from None
    except Exception as error:  # a damaged or hostile file can fail in any way
        mend = str(error) if isinstance(error, _MistakenError) else ""
        if not isinstance(error, OSError):  # the file itself can be read
            mend = mend or mistaken_for(path)
        mend = mend or f"cannot be read safely ({error}): give a file of tensors saved by torch.save or safetensors"
        raise InputError(f"{path} {''.join(filter(str.isprintable, ' '.join(mend.split())))[:400]}") from error


def load_tensors(path: str | Path) -> dict[Any, Any]:
    """The content of a file with a dictionary, like every checkpoint, from ``read_file``.

    Raises:
        InputError: as ``read_file``; or the file contains something else.
    """
    content = read_file(path)
    if isinstance(content, Inert):
        raise InputError(f"{path} holds a whole object, which is not unpickled: {SAVE_STATE_DICT}")
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors: save a state_dict()")
    return content


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        opened = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise _CutOffError if "not fully covered" in str(error) else error from None
    with opened as file:
        content: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
        if metadata := file.metadata():
            content[METADATA] = metadata
    return content


def _read_archive(content: mmap.mmap, file: BinaryIO) -> Any:
    """torch.save since 1.6: a zip archive of one pickle and one uncompressed record for each storage."""
    if sum(1 for _ in re.finditer(b"PK\x01\x02", content)) > _MAX_ZIP_ENTRIES:  # zipfile makes an object of each
        raise ValueError("it holds too many records")
    try:
        entries, records = zipfile.ZipFile(file).infolist(), dict[str, memoryview]()
    except zipfile.BadZipFile:  # the list of an archive's records is its end
        raise _CutOffError from None
    if what := mistaken_archive([entry.filename for entry in entries]):
        raise _MistakenError(what)
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.filename in records:
            raise ValueError("its records are compressed or doubled, which torch.save never does")
        name_length, extra_length = struct.unpack_from("<HH", content, entry.header_offset + 26)
        start = entry.header_offset + 30 + name_length + extra_length
        if start + entry.file_size > len(content):
            raise _CutOffError
        records[entry.filename] = memoryview(content)[start : start + entry.file_size]
    if sum(map(len, records.values())) > len(content):
        raise ValueError("its records overlap")
    pickles = [name for name in records if f"/{name}".endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError("it is a zip archive of something else")
    folder = pickles[0].removesuffix("data.pkl")
    if records.get(f"{folder}byteorder", b"little") != b"little":
        raise ValueError("it is from a big-endian machine")

    def storage(dtype: torch.dtype, key: str, numel: int) -> Tensor:
        return _flat(records[f"{folder}data/{key}"], dtype, numel)

    return _Unpickler(io.BytesIO(records[pickles[0]]), storage).load()


def _read_pickles(stream: _Stream, data: memoryview, *, nested: bool = False) -> Any:
    """One pickle, or torch.save before 1.6: five pickles, then the storages, each after its number of elements."""
    first = _Unpickler(stream, nested=nested).load()
    if not isinstance(first, int) or first != _LEGACY_MAGIC:
        return first
    version, system = _Unpickler(stream).load(), _Unpickler(stream).load()
    if version != _LEGACY_VERSION or not system.get("little_endian"):
        raise ValueError("it is of an unknown version of torch.save")
    start, dtypes = stream.tell(), {}

    # The storages lie after the pickle that says how wide their elements are: read it twice.
    def note(dtype: torch.dtype, key: str, numel: int) -> None:
        dtypes[key] = dtype

    _Unpickler(stream, note).load()
    keys = _Unpickler(stream).load()
    position, storages = stream.tell(), {}
    for key in keys:
        (numel,) = struct.unpack_from("<Q", data, position)
        end = position + 8 + numel * dtypes[_key(key)].itemsize
        if end > len(data):
            raise _CutOffError
        storages[key] = data[position + 8 : end]
        position = end
    stream.seek(start)
    return _Unpickler(stream, lambda dtype, key, numel: _flat(storages[key], dtype, numel)).load()


def _read_storage(data: bytes) -> Any:
    """A storage in a pickle not written by torch.save: it contains a file of torch.save."""
    return _read_pickles(io.BytesIO(data), memoryview(data), nested=True)


_Stream = io.BytesIO | mmap.mmap


Storage = Callable[[torch.dtype, str, int], Tensor | None]
"""Finds a storage: (element type, key, number of elements) -> all its elements; None while they are not known."""


def _flat(data: Any, dtype: torch.dtype, numel: int) -> Tensor:
    """The first elements of a buffer, shape (numel,)."""
    if numel < 0 or numel * dtype.itemsize > len(data):
        raise ValueError("it claims tensors larger than the file")
    if numel == 0:
        return torch.empty(0, dtype=dtype)
    raw = torch.frombuffer(bytearray(data) if memoryview(data).readonly else data, dtype=torch.uint8)
    raw = raw[: numel * dtype.itemsize]
    return (raw if raw.data_ptr() % dtype.itemsize == 0 else raw.clone()).view(dtype)


def _count(sizes: Any) -> int:
    """The number of elements of a tensor of these sizes, which are checked."""
    if not isinstance(sizes, (tuple, list)) or len(sizes) > 64:
        raise ValueError("it holds tensors of an unknown shape")
    if not all(isinstance(size, int) and 0 <= size < 2**63 for size in sizes):
        raise ValueError("it holds tensors of an unknown shape")
    return math.prod(sizes)


# The functions that a file may call. None acts on anything but its arguments.


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Any:
    if not isinstance(storage, Tensor):  # not known yet, or of an unknown type
        return Inert()
    for numbers in ((offset,), stride):
        _count(numbers)  # raises where they are none
    if _count(size) > len(storage):
        raise ValueError("it claims tensors larger than the file")
    return storage.as_strided(tuple(size), tuple(stride), offset)  # raises where it leaves the storage


def _first(value: Any, *_: Any) -> Any:
    return value


def _from_type(function: Any, _: Any, arguments: Any, *__: Any) -> Any:
    return function(*arguments) if function in (_tensor, _first) and isinstance(arguments, tuple) else Inert()


def _new_array(*_: Any) -> _Array:
    return _Array()


def _array(_: Any, shape: Any, dtype: Any, fortran: Any, data: Any) -> Any:
    """A numpy array from its pickled state."""
    if not isinstance(dtype, torch.dtype):  # of strings, objects, records
        return Inert()
    if isinstance(data, str):  # bytes in a pickle of Python 2
        data = data.encode("latin1")
    flat = _flat(data, dtype, _count(shape))
    return flat.reshape(shape[::-1]).permute(*range(len(shape))[::-1]) if fortran else flat.reshape(shape)


def _array_of_dill(function: Any, _: Any, state: Any, *__: Any) -> Any:
    return _array(*state) if function is _new_array and isinstance(state, tuple) else Inert()


def _array_from_buffer(buffer: Any, dtype: Any, shape: Any, order: str, axes: Any = None) -> Any:
    array = _array(0, shape, dtype, order == "F", buffer)
    return array.permute(axes) if order == "K" and isinstance(array, Tensor) else array


def _scalar(dtype: Any, data: Any) -> Any:
    scalar = _array(0, (), dtype, False, data)
    return scalar.item() if isinstance(scalar, Tensor) else scalar


def _numpy_dtype(code: Any, *_: Any) -> Any:
    return (_NUMPY_DTYPES.get(code) if isinstance(code, str) else None) or Inert()


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise ValueError("it encodes bytes in an unknown way")
    return text.encode("latin1")


def _dictionary(pairs: Any = ()) -> Any:
    return {_key(key): value for key, value in pairs} if isinstance(pairs, (list, tuple)) else Inert()


_NUMPY_DTYPES = {
    **{"f8": torch.float64, "f4": torch.float32, "f2": torch.float16, "c8": torch.complex64, "c16": torch.complex128},
    **{"i8": torch.int64, "i4": torch.int32, "i2": torch.int16, "i1": torch.int8, "b1": torch.bool},
    **{"u8": torch.uint64, "u4": torch.uint32, "u2": torch.uint16, "u1": torch.uint8},
}
_STORAGE_DTYPES = {
    **{"Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16},
    **{"Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8},
    **{"Bool": torch.bool, "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128, "Untyped": torch.uint8},
}
_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _dictionary,
    ("collections", "defaultdict"): lambda _=None, pairs=(): _dictionary(pairs),
    ("argparse", "Namespace"): lambda: Options(),
    ("_codecs", "encode"): _encode,
    ("builtins", "bytes"): lambda: b"",
    ("__builtin__", "bytes"): lambda: b"",
    ("torch", "Size"): _first,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _first,
    ("torch._utils", "_rebuild_parameter_with_state"): _first,
    ("torch._tensor", "_rebuild_from_type_v2"): _from_type,
    ("torch.storage", "_load_from_bytes"): _read_storage,
    ("numpy", "dtype"): _numpy_dtype,
    ("dill._dill", "_create_array"): _array_of_dill,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _new_array for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _array_from_buffer for core in ("core", "_core")},
    **{
        (module, f"{kind}Storage"): dtype
        for kind, dtype in _STORAGE_DTYPES.items()
        for module in ("torch", "torch.storage")
    },
}
"""All that a file may name: functions, which it may call, and the element types of storages."""


class _Unpickler:
    """Executes one pickle from the stream's position, and leaves the stream after it."""

    def __init__(self, stream: _Stream, storage: Storage | None = None, *, nested: bool = True) -> None:
        self._stream, self._storage, self._nested = stream, storage, nested
        self._start, self._spent = stream.tell(), 0
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._storages: dict[str, Tensor | None] = {}

    def load(self) -> Any:
        stack, marks = self._stack, list[int]()
        operations = values = 0
        while operations < _MAX_OPERATIONS and values < _MAX_VALUES:
            operation = pickletools.code2op.get(self._stream.read(1).decode("latin1"))  # type: ignore[attr-defined]
            if operation is None:
                raise ValueError("it is cut off, or of something else")
            if operation.name in _VALUES:
                values += 1
            else:
                operations += 1
            if operation.name == "STRING":  # pickletools takes it for ASCII; arrays of Python 2 are not
                argument: Any = codecs.escape_decode(self._stream.readline().strip()[1:-1])[0].decode("latin1")
            else:  # raises where its length is beyond the end
                argument = operation.arg.reader(self._stream) if operation.arg is not None else None
            # What it takes from the stack: as many as pickletools says, or all since the last mark and what is below.
            takes = operation.stack_before
            marked = pickletools.markobject in takes
            start = marks.pop() - takes.index(pickletools.markobject) if marked else len(stack) - len(takes)
            if start < 0:
                raise ValueError("its pickle takes more than there is")
            taken = stack[start:]
            del stack[start:]
            if operation.name == "STOP":
                return taken[0]
            if operation.name == "MARK":
                marks.append(len(stack))
            else:
                stack += self._results(operation.name, argument, taken)
        raise ValueError("its pickle is longer than that of any checkpoint")

    def _results(self, operation: str, argument: Any, taken: list[Any]) -> list[Any]:
        """The results that an operation puts on the stack for its inputs."""
        match operation:
            case "PROTO" | "FRAME" | "POP" | "POP_MARK":
                return []
            case "GET" | "BINGET" | "LONG_BINGET":
                return [self._memo[argument]]
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                return self._memorize(argument, self._stack[-1:], [])
            case "MEMOIZE":
                return self._memorize(len(self._memo), taken, taken)
            case "DUP":
                return taken * 2
            case "NONE" | "NEWTRUE" | "NEWFALSE" | "EMPTY_TUPLE":
                return [{"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}[operation]]
            case "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                return [tuple(taken)]
            case "EMPTY_LIST" | "LIST":
                return [taken]
            case "EMPTY_DICT" | "DICT":
                return [_with_items({}, taken)]
            case "EMPTY_SET":
                return [set()]
            case "FROZENSET":
                return [frozenset(map(_key, taken))]
            case "SETITEM" | "SETITEMS":
                return [_with_items(taken[0], taken[1:])]
            case "APPEND" | "APPENDS" if isinstance(taken[0], list):
                taken[0].extend(taken[1:])
            case "ADDITEMS" if isinstance(taken[0], set):
                taken[0].update(map(_key, taken[1:]))
            case "BUILD":
                return [self._built(*taken)]
            case "GLOBAL":
                return [self._named(*argument.split(" ", 1))]
            case "STACK_GLOBAL":
                return [self._named(*taken)]
            case "REDUCE" | "NEWOBJ":
                return [self._called(*taken)]
            case "OBJ":
                return [self._called(taken[0], tuple(taken[1:]))]
            case "INST":
                return [self._called(self._named(*argument.split(" ", 1)), tuple(taken))]
            case "NEWOBJ_EX":
                return [Inert()]
            case "PERSID" | "BINPERSID":
                return [self._found(*taken, argument)]
            case "EXT1" | "EXT2" | "EXT4" | "NEXT_BUFFER" | "READONLY_BUFFER":
                raise ValueError("it refers to something outside itself")
            case _ if not taken:  # numbers and strings
                return [argument]
        return taken[:1]

    def _memorize(self, key: int, values: list[Any], results: list[Any]) -> list[Any]:
        (self._memo[key],) = values
        if isinstance(values[0], _Array):
            values[0].memo_keys.append(key)
        return results

    def _named(self, module: Any, name: Any) -> Any:
        known = _KNOWN.get((module, name), Inert) if isinstance(module, str) and isinstance(name, str) else Inert
        return Inert if known is _read_storage and self._nested else known

    def _called(self, function: Any, arguments: Any) -> Any:
        if not isinstance(arguments, tuple):
            raise ValueError("it calls something in an unknown way")
        # Count what a function could copy: parts named again and again grow to far more than the file.
        inner = (part for outer in arguments if isinstance(outer, tuple) for part in outer)
        for part in (arguments, *arguments, *inner):
            if isinstance(part, (str, bytes, bytearray)):
                self._spent += len(part)
            elif isinstance(part, (list, tuple, dict)):
                self._spent += 32 * len(part)
        if self._spent > 16 * (self._stream.tell() - self._start) + 2**24:
            raise ValueError("it unfolds to far more than it holds")
        return function(*arguments) if isinstance(function, FunctionType) else Inert()

    def _built(self, target: Any, state: Any) -> Any:
        """``target`` with this state; it only matters for arrays, their types and options."""
        if isinstance(target, Options) and isinstance(state, dict):
            target.values = state
        if isinstance(target, torch.dtype) and state[1] not in ("<", "=", "|"):
            raise ValueError("it holds big-endian arrays")
        if not isinstance(target, _Array):
            return target
        array = self._called(_array, state)
        self._memo.update(dict.fromkeys(target.memo_keys, array))
        return array

    def _found(self, identifier: Any, *_: Any) -> Any:
        """A storage, as written by torch.save: ("storage", type, key, device, number of elements, view or None)."""
        match identifier:
            case ("module", *_):  # a class beside its source code
                return Inert
            case ("storage", torch.dtype() as dtype, str(key), _, int(numel), *view) if self._storage:
                if view in ([], [None]):
                    if key not in self._storages:
                        self._storages[key] = self._storage(dtype, key, numel)
                    return self._storages[key]
            case ("storage", kind, *_) if kind is Inert:
                raise ValueError("it holds tensors of an unknown type, such as quantised ones")
        raise ValueError("it refers to something outside itself")


def _with_items(target: Any, items: list[Any]) -> Any:
    if isinstance(target, dict):
        target.update((_key(key), value) for key, value in zip(items[::2], items[1::2], strict=True))
    return target


def _key(key: Any) -> Any:
    """``key``, if hashing it is cheap: a million nested tuples would overflow the stack."""
    for part in key if isinstance(key, tuple) and len(key) < 9 else (key,):
        if not isinstance(part, (NoneType, str, bytes, int, float, type, Inert, Tensor)):
            raise ValueError(f"it has a {type(part).__name__} for a key")
    return key
