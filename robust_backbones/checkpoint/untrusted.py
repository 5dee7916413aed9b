"""Reads files of tensors from strangers: pickles, torch.save files old and new, safetensors. Runs nothing in them.

A pickle is a program that may call any function of any installed package. The reader here knows tensors, arrays and
plain containers; every other class or function that a file names becomes an ``Inert`` object, which does nothing. So
files made with dill, or with classes of packages that are not installed, open without them. Tensors are views of the
file mapped into memory, and what a file claims to hold is checked against its size before anything is allocated.
"""

from __future__ import annotations

import io
import math
import mmap
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from robust_backbones.errors import InputError

METADATA = "__metadata__"
"""Key of a safetensors file's own strings in what ``read_file`` returns; the name that its header gives them."""

# Checkpoints of large networks, optimiser included, take some tens of thousands.
_MAX_OPCODES = 500_000
_MAX_ZIP_ENTRIES = 100_000
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # opens the files of torch.save before version 1.6
_LEGACY_VERSION = 1001

_STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}
_NUMPY_DTYPES = {
    "f8": torch.float64,
    "f4": torch.float32,
    "f2": torch.float16,
    "i8": torch.int64,
    "i4": torch.int32,
    "i2": torch.int16,
    "i1": torch.int8,
    "u8": torch.uint64,
    "u4": torch.uint32,
    "u2": torch.uint16,
    "u1": torch.uint8,
    "b1": torch.bool,
    "c8": torch.complex64,
    "c16": torch.complex128,
}


class Inert:
    """Stands for an object of a class that the reader does not know; accepts all that a pickle may do to it."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __call__(self, *_: Any, **__: Any) -> Inert:
        return Inert()

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def _ignore(self, _: Any) -> None:
        pass

    append = extend = add = _ignore


def read_file(path: Path) -> Any:
    """The content of a ``.pt`` / ``.pth`` / ``.ckpt``, ``.pkl`` or ``.safetensors`` file; its suffix does not matter.

    Tensors and arrays come as tensors on the CPU, dictionaries of any kind as ``dict``, unknown objects as ``Inert``.
    A safetensors file gives its tensors by name, and its strings under ``METADATA`` where it has some.

    Raises:
        InputError: the file is missing, damaged, of another kind, or claims more than it can hold.
    """
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except OSError as error:  # a name too long, a folder that may not be entered
        raise InputError(f"{path} cannot be read ({error.strerror}): check the path") from error
    if is_folder:
        raise InputError(f"{path} is a folder: give the file in it")
    if not is_file:
        raise InputError(f"no file at {path}: check the path")
    try:
        size = path.stat().st_size
        if size == 0:
            raise ValueError("it is empty")
        with open(path, "rb") as file:
            start = file.read(9)
            if start[8:] == b"{" and struct.unpack("<Q", start[:8])[0] < size:
                return _read_safetensors(path)
            # Copy on write: tensors can be changed, the file cannot.
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            is_archive = start.startswith(b"PK\x03\x04")
            return _with_tensors(
                _read_archive(content, file) if is_archive else _read_pickles(content, memoryview(content))
            )
    except Exception as error:  # a damaged or hostile file can fail in any way
        reason = "".join(filter(str.isprintable, " ".join(str(error).split())))[:200] or type(error).__name__
        raise InputError(
            f"{path} cannot be read safely ({reason}): give a file of tensors saved by torch.save, safetensors "
            "or Detectron2"
        ) from error


def _read_safetensors(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        content: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
        if metadata := file.metadata():
            content[METADATA] = metadata
    return content


def _read_archive(content: mmap.mmap, file: BinaryIO) -> Any:
    """torch.save since 1.6: a zip archive of one pickle and one uncompressed record for each storage."""
    position = entries = 0
    while (position := content.find(b"PK\x01\x02", position) + 1) > 0:
        entries += 1
        if entries > _MAX_ZIP_ENTRIES:  # zipfile would make an object of each
            raise ValueError("it holds too many records")
    archive = zipfile.ZipFile(file)
    records: dict[str, memoryview] = {}
    if any(entry.filename.endswith("/constants.pkl") for entry in archive.infolist()):
        raise ValueError("it is a TorchScript program, not a state_dict()")
    if sum(entry.file_size for entry in archive.infolist()) > len(content):
        raise ValueError("its records overlap")
    for entry in archive.infolist():
        if entry.compress_type != zipfile.ZIP_STORED or entry.filename in records:
            raise ValueError("its records are compressed or doubled, which torch.save never does")
        local = content[entry.header_offset : entry.header_offset + 30]
        name_length, extra_length = struct.unpack("<HH", local[26:30])
        start = entry.header_offset + 30 + name_length + extra_length
        if start + entry.file_size > len(content):
            raise ValueError("it is cut off")
        records[entry.filename] = memoryview(content)[start : start + entry.file_size]
    pickles = [name for name in records if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError("it is a zip archive of something else")
    folder = pickles[0].removesuffix("data.pkl")
    if bytes(records.get(f"{folder}byteorder", b"little")) != b"little":
        raise ValueError("it is from a big-endian machine")

    def storage(dtype: torch.dtype, key: str, numel: int) -> Tensor:
        return _flat(records[f"{folder}data/{key}"], dtype, numel)

    return _unpickle(io.BytesIO(records[pickles[0]]), storage)


def _read_pickles(stream: _Stream, data: memoryview, *, nested: bool = False) -> Any:
    """One pickle, or torch.save before 1.6: five pickles, then the storages, each behind its number of elements.

    ``data`` is all that the stream is of.
    """
    first = _unpickle(stream, nested=nested)
    if not isinstance(first, int) or first != _LEGACY_MAGIC:
        return first
    version, system = _unpickle(stream), _unpickle(stream)
    if version != _LEGACY_VERSION or not system.get("little_endian"):
        raise ValueError("it is of an unknown version of torch.save")
    start, dtypes = stream.tell(), {}

    # The storages lie behind the pickle that says how wide their elements are: read it twice.
    def note(dtype: torch.dtype, key: str, numel: int) -> None:
        dtypes[key] = dtype

    _unpickle(stream, note)
    keys = _unpickle(stream)
    position, storages = stream.tell(), {}
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise ValueError("it names its storages in an unknown way")
    for key in keys:
        (numel,) = struct.unpack("<q", data[position : position + 8])
        end = position + 8 + numel * dtypes[key].itemsize
        if numel < 0 or end > len(data):
            raise ValueError("it is cut off")
        storages[key] = data[position + 8 : end]
        position = end
    stream.seek(start)
    return _unpickle(stream, lambda dtype, key, numel: _flat(storages[key], dtype, numel))


def _read_storage(data: bytes) -> Any:
    """A storage in a pickle that torch.save had no part in: a file of torch.save in the pickle."""
    return _read_pickles(io.BytesIO(data), memoryview(data), nested=True)


class _Stream(Protocol):
    def read(self, size: int, /) -> bytes: ...
    def readline(self) -> bytes: ...
    def seek(self, position: int, /) -> Any: ...
    def tell(self) -> int: ...


Storage = Callable[[torch.dtype, str, int], Tensor | None]
"""Finds a storage: (element type, key, number of elements) -> all its elements; None while they are not known."""


def _unpickle(stream: _Stream, storage: Storage | None = None, *, nested: bool = True) -> Any:
    """Read one pickle from where the stream stands, and leave it behind that pickle; ``nested`` ones hold no files."""
    start = stream.tell()
    # Lengths are checked here against what there is, before the unpickler would allocate them.
    for _ in range(_MAX_OPCODES):
        operation = pickletools.code2op.get(stream.read(1).decode("latin1"))  # type: ignore[attr-defined]
        if operation is None:
            raise ValueError("it is cut off, or of something else")
        if operation.name == "STRING":  # pickletools takes it for ASCII; arrays of Python 2 are not
            stream.readline()
        elif operation.arg is not None:
            operation.arg.reader(stream)
        if operation.name == "STOP":
            break
    else:
        raise ValueError("its pickle is longer than that of any checkpoint")
    size = stream.tell() - start
    stream.seek(start)
    return _Unpickler(stream, storage, nested=nested, size=size).load()


@dataclass(frozen=True)
class _StorageType:
    dtype: torch.dtype


class _NumpyType:
    """A simple numpy dtype: the two characters of its kind and width."""

    def __init__(self, code: str, *_: Any) -> None:
        self.code = code.lstrip("<=|")

    def set_state(self, state: Any) -> None:
        if state[1] not in ("<", "=", "|"):
            raise ValueError("it holds big-endian arrays")

    def tensor(self, data: Any, shape: Any, *, fortran: bool) -> Any:
        dtype, sizes = _NUMPY_DTYPES.get(self.code), list(shape)
        if dtype is None:  # of strings, objects, records
            return Inert()
        if isinstance(data, str):  # bytes in a pickle of Python 2
            data = data.encode("latin1")
        flat = _flat(memoryview(data), dtype, _count(sizes))
        return flat.reshape(sizes[::-1]).permute(*range(len(sizes))[::-1]) if fortran else flat.reshape(sizes)


class _NumpyArray:
    """An array in the making: a pickle first creates it, then gives it its content."""

    def __init__(self, *_: Any) -> None:
        self.tensor = torch.empty(0)

    def set_state(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        self.tensor = dtype.tensor(data, shape, fortran=bool(fortran))


def _numpy_from_buffer(buffer: Any, dtype: _NumpyType, shape: Any, order: str, axes: Any = None) -> Any:
    array = dtype.tensor(buffer, shape, fortran=order == "F")
    return array.permute(axes) if order == "K" and isinstance(array, Tensor) else array


def _numpy_scalar(dtype: _NumpyType, data: Any) -> Any:
    scalar = dtype.tensor(data, (), fortran=False)
    return scalar.item() if isinstance(scalar, Tensor) else scalar


def _dill_array(function: Any, arguments: Any, state: Any, *_: Any) -> Any:
    if function is not _NumpyArray:
        return Inert()
    array = _NumpyArray()
    array.set_state(state)
    return array


def _flat(data: memoryview, dtype: torch.dtype, numel: int) -> Tensor:
    """The elements of a storage, shape (numel,)."""
    if numel < 0 or numel * dtype.itemsize > len(data):
        raise ValueError("it claims tensors larger than the file")
    if numel == 0:
        return torch.empty(0, dtype=dtype)
    raw = torch.frombuffer(data if not data.readonly else bytearray(data), dtype=torch.uint8)
    raw = raw[: numel * dtype.itemsize]
    return (raw if raw.data_ptr() % dtype.itemsize == 0 else raw.clone()).view(dtype)


def _tensor(storage: Tensor | None, offset: int, size: Any, stride: Any, *_: Any) -> Any:
    if not isinstance(storage, Tensor):  # not known yet, or of an unknown type
        return Inert()
    for numbers in ((offset,), stride):
        _count(numbers)  # raises where they are none
    if _count(size) > len(storage):
        raise ValueError("it claims tensors larger than the file")
    return storage.as_strided(tuple(size), tuple(stride), offset)  # raises where it leaves the storage


def _count(sizes: Any) -> int:
    """The number of elements of a tensor of these sizes, which must be such."""
    if not isinstance(sizes, (tuple, list)) or len(sizes) > 64:
        raise ValueError("it holds tensors of an unknown shape")
    if not all(isinstance(size, int) and 0 <= size < 2**63 for size in sizes):
        raise ValueError("it holds tensors of an unknown shape")
    return math.prod(sizes)


def _parameter(data: Any, *_: Any) -> Any:
    return data


def _from_type(function: Any, _: Any, arguments: Any, *__: Any) -> Any:
    known = function in (_tensor, _parameter) and isinstance(arguments, tuple)
    return function(*arguments) if known else Inert()


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise ValueError("it encodes bytes in an unknown way")
    return text.encode("latin1")


def _bytes(*content: Any) -> bytes:
    if content:  # a number would ask for as many zeros
        raise ValueError("it makes bytes of something else")
    return b""


def _dictionary(pairs: Any = ()) -> dict[Any, Any]:
    return {_key(key): value for key, value in pairs} if isinstance(pairs, (list, tuple)) else {}


def _size(sizes: Any = ()) -> tuple[Any, ...]:
    _count(sizes)
    return tuple(sizes)


# Whatever a file may name; nothing here acts on anything but its arguments.
_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _dictionary,
    ("_codecs", "encode"): _encode,
    ("builtins", "bytes"): _bytes,
    ("__builtin__", "bytes"): _bytes,
    ("torch", "Size"): _size,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _from_type,
    ("numpy", "dtype"): _NumpyType,
    ("dill._dill", "_create_array"): _dill_array,
    **{
        (module, name): _StorageType(dtype)
        for name, dtype in _STORAGE_DTYPES.items()
        for module in ("torch", "torch.storage")
    },
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _NumpyArray for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _numpy_scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _numpy_from_buffer for core in ("core", "_core")},
}


class _Unpickler(pickle._Unpickler):
    """Python's own unpickler, in Python, with the operations replaced by which an object could act."""

    dispatch: ClassVar[dict[int, Callable[..., None]]] = dict(pickle._Unpickler.dispatch)
    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, stream: _Stream, storage: Storage | None, *, nested: bool, size: int) -> None:
        super().__init__(stream, encoding="latin1")
        self._storage, self._nested = storage, nested
        self._allowance = 16 * size + 2**24
        self._storages: dict[str, Tensor | None] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch.storage", "_load_from_bytes") and not self._nested:
            return _read_storage
        return _KNOWN.get((module, name), Inert)

    def get_extension(self, code: int) -> None:
        raise ValueError("it uses a registry of this process")

    def persistent_load(self, identifier: Any) -> Any:
        """A storage, as torch.save notes it: ("storage", type, key, device, number of elements, view or None)."""
        if not isinstance(identifier, tuple) or self._storage is None:
            raise ValueError("it refers to something outside itself")
        if identifier[0] == "module":  # a class beside its source code
            return Inert
        kind, storage_type, key, _, numel, *view = identifier
        if kind != "storage" or not isinstance(key, str) or any(part is not None for part in view):
            raise ValueError("it refers to something outside itself")
        if not isinstance(storage_type, _StorageType) or not isinstance(numel, int):
            raise ValueError("it holds tensors of an unknown type")
        if key not in self._storages:
            self._storages[key] = self._storage(storage_type.dtype, key, numel)
        return self._storages[key]

    def load_build(self) -> None:
        """Only arrays and their types have a state that matters."""
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, (_NumpyArray, _NumpyType)):
            if not isinstance(state, tuple):
                raise ValueError("it holds an array of an unknown kind")
            self._spend(state)
            target.set_state(state)

    def load_reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        self._call(function, arguments, {})

    load_newobj = load_reduce

    def load_newobj_ex(self) -> None:
        keywords, arguments, cls = self.stack.pop(), self.stack.pop(), self.stack.pop()
        self._call(cls, arguments, keywords)

    def _call(self, function: Any, arguments: Any, keywords: Any) -> None:
        if not isinstance(arguments, tuple) or not isinstance(keywords, dict):  # to unpack a tensor takes much memory
            raise ValueError("it calls something in an unknown way")
        self._spend((*arguments, *keywords.values()))
        self.append(function(*arguments, **keywords))

    def _instantiate(self, klass: Any, arguments: Any) -> None:
        self._call(klass, tuple(arguments), {})

    def _spend(self, parts: tuple[Any, ...]) -> None:
        """Count what a function could copy: parts named again and again grow to far more than the file."""
        inner = (part for outer in parts if isinstance(outer, tuple) for part in outer)
        for part in (*parts, *inner):
            if isinstance(part, (str, bytes, bytearray)):
                self._allowance -= len(part)
            elif isinstance(part, (list, tuple, dict)):
                self._allowance -= 32 * len(part)
        if self._allowance < 0:
            raise ValueError("it unfolds to far more than it holds")

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({_key(items[i]): items[i + 1] for i in range(0, len(items), 2)})

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.stack[-1][_key(key)] = value

    def load_setitems(self) -> None:
        items = self.pop_mark()
        for i in range(0, len(items), 2):
            self.stack[-1][_key(items[i])] = items[i + 1]

    def load_additems(self) -> None:
        items = self.pop_mark()
        for item in items:
            self.stack[-1].add(_key(item))

    def load_frozenset(self) -> None:
        items = self.pop_mark()  # first: it changes what append is
        self.append(frozenset(map(_key, items)))

    dispatch.update(
        {
            pickle.BUILD[0]: load_build,
            pickle.REDUCE[0]: load_reduce,
            pickle.NEWOBJ[0]: load_newobj,
            pickle.NEWOBJ_EX[0]: load_newobj_ex,
            pickle.DICT[0]: load_dict,
            pickle.SETITEM[0]: load_setitem,
            pickle.SETITEMS[0]: load_setitems,
            pickle.ADDITEMS[0]: load_additems,
            pickle.FROZENSET[0]: load_frozenset,
        }
    )


def _key(key: Any) -> Any:
    """``key``, if hashing it takes no recursion: a million tuples in each other would overflow the stack."""
    for part in key if isinstance(key, tuple) else (key,):
        if not (part is None or isinstance(part, (str, bytes, int, float, Inert, type(Inert), Tensor))):
            raise ValueError(f"it has a {type(part).__name__} for a key")
    return key


def _with_tensors(content: Any) -> Any:
    """Replace the arrays in nested dictionaries by tensors, in place."""
    if isinstance(content, _NumpyArray):
        return content.tensor
    pending, seen = [content], set()
    while pending:
        mapping = pending.pop()
        if not isinstance(mapping, dict) or id(mapping) in seen:
            continue
        seen.add(id(mapping))
        for key, value in mapping.items():
            if isinstance(value, _NumpyArray):
                mapping[key] = value.tensor
            else:
                pending.append(value)
    return content
