"""Untrusted files: what they hold is read rightly, and whatever they try, nothing runs and little memory is taken."""

from __future__ import annotations

import argparse
import collections
import contextlib
import copyreg
import functools
import gzip
import inspect
import math
import multiprocessing
import pickle
import re
import resource
import shlex
import struct
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import dill
import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from robust_backbones.checkpoint import untrusted
from robust_backbones.checkpoint.format import sha256
from robust_backbones.checkpoint.untrusted import METADATA, Inert, read_file
from robust_backbones.errors import InputError
from tests.checkpoint.hostile import (
    CALLS,
    HARMLESS,
    KINDS,
    MAKERS,
    PROGRAMS,
    REFUSED,
    archive,
    array,
    call,
    evil_file,
    healthy,
    legacy,
    name,
    program,
    push,
    stack_global,
    storage,
)

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
]
ARRAY_DTYPES = ["f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "b1", "c8", "c16"]
FORMATS = pytest.mark.parametrize(
    ("zipped", "pickle_module"),
    [(True, pickle), (True, dill), (False, pickle), (False, dill)],
    ids=["zip", "zip-dill", "legacy", "legacy-dill"],
)
property_test = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=25)


def read_bytes(folder: Path, content: bytes) -> Any:
    path = folder / "file"
    path.write_bytes(content)
    return read_file(path)


def assert_refused(path: Path, message: str = ".") -> None:
    with pytest.raises(InputError, match=message) as error:
        read_file(path)
    assert str(path) in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def assert_same(actual: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert type(actual) is dict
        assert list(actual) == list(expected)
        for key in expected:
            assert_same(actual[key], expected[key])
    elif isinstance(expected, Tensor):
        assert type(actual) is Tensor
        assert actual.data_ptr() % actual.itemsize == 0
        torch.testing.assert_close(actual, expected.detach(), rtol=0, atol=0)
    else:
        assert actual == expected


# What is read is right.


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    values = torch.randint(-100, 100, shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 9))))
    made = (values / 7 if dtype.is_floating_point else values).to(dtype)
    layouts = {
        "plain": lambda: made,
        "transposed": lambda: made.movedim(0, -1) if shape else made,
        "sliced": lambda: made[1:] if shape else made,
        "strided": lambda: made[..., ::2] if shape else made,
        "parameter": lambda: nn.Parameter(made, requires_grad=dtype.is_floating_point),
    }
    return layouts[draw(st.sampled_from(sorted(layouts)))]()


def mappings(leaves: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    keys = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
    return st.dictionaries(keys, st.recursive(leaves, lambda inner: st.dictionaries(keys, inner, max_size=3)))


@FORMATS
@given(content=mappings(tensors() | st.none() | st.booleans() | st.floats(allow_nan=False) | st.text()), base=tensors())
@property_test
def test_what_torch_saves_comes_back(
    tmp_path: Path, zipped: bool, pickle_module: Any, content: dict[str, Any], base: Tensor
) -> None:
    content |= {"base": base, "part": base.detach().flatten()[1:], "again": base}
    path = tmp_path / "file.pt"
    torch.save(content, path, pickle_module=pickle_module, _use_new_zipfile_serialization=zipped)
    assert_same(read_file(path), content)


@FORMATS
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_torch_saves_with_any_protocol(tmp_path: Path, zipped: bool, pickle_module: Any, protocol: int) -> None:
    content = {"a": torch.ones(2, 3), "b": {"c": torch.zeros(4, dtype=torch.int16)}}
    path = tmp_path / "file.pt"
    options = {"pickle_module": pickle_module, "pickle_protocol": protocol}
    torch.save(content, path, **options, _use_new_zipfile_serialization=zipped)
    assert_same(read_file(path), content)


@FORMATS
def test_views_of_a_storage_still_share_it(tmp_path: Path, zipped: bool, pickle_module: Any) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    path = tmp_path / "file.pt"
    content = {"whole": whole, "column": whole[:, 1]}
    torch.save(content, path, pickle_module=pickle_module, _use_new_zipfile_serialization=zipped)
    content = read_file(path)
    content["whole"][:, 1] = -1
    assert content["column"].tolist() == [-1, -1, -1]


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@given(content=mappings(tensors()))
@settings(property_test, max_examples=10)
def test_tensors_in_a_pickle_that_torch_had_no_part_in(tmp_path: Path, protocol: int, content: dict[str, Any]) -> None:
    assert_same(read_bytes(tmp_path, pickle.dumps(content, protocol)), content)


def test_ordered_dictionaries_come_as_dictionaries(tmp_path: Path) -> None:
    state_dict = nn.BatchNorm2d(3).state_dict()
    content = collections.OrderedDict(model=state_dict, order=collections.OrderedDict(b=1, a=2))
    torch.save(content, tmp_path / "file.pt")
    assert_same(read_file(tmp_path / "file.pt"), {"model": dict(state_dict), "order": {"b": 1, "a": 2}})


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_come_as_tensors(tmp_path: Path, protocol: int, order: Any) -> None:
    arrays: dict[str, Any] = {}
    for dtype in ARRAY_DTYPES:
        for shape in ((2, 3), (2, 3, 4), (5,), (), (0, 3)):
            values = (np.arange(math.prod(shape)) * 37 % 251).reshape(shape).astype(dtype)
            arrays[f"{dtype} {shape}"] = np.asarray(values, order=order)
    arrays |= {"column": arrays["f4 (2, 3)"][:, 1], "every other": arrays["i2 (2, 3, 4)"][..., ::2]}
    arrays["transposed"] = arrays["c8 (2, 3, 4)"].transpose(1, 0, 2)
    content = read_bytes(tmp_path, pickle.dumps({**arrays, "nested": arrays}, protocol))
    for key, expected in arrays.items():
        for actual in (content[key], content["nested"][key]):
            assert type(actual) is Tensor
            assert actual.numpy().dtype == expected.dtype
            np.testing.assert_array_equal(actual.numpy(), expected)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_numpy_scalars_come_as_numbers(tmp_path: Path, protocol: int) -> None:
    scalars = {dtype: np.dtype(dtype).type(1.5) for dtype in ARRAY_DTYPES}
    numbers = read_bytes(tmp_path, pickle.dumps(scalars, protocol))
    assert numbers == scalars
    assert {key: type(number) for key, number in numbers.items()} == {k: type(s.item()) for k, s in scalars.items()}


def test_an_array_alone(tmp_path: Path) -> None:
    np.testing.assert_array_equal(read_bytes(tmp_path, pickle.dumps(np.arange(3.0))).numpy(), np.arange(3.0))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "other",
    [np.array(["a"]), np.array([None, 1]), np.zeros(2, [("x", "f4")]), np.array(["2020-01-01"], "M8[D]"), np.str_("a")],
    ids=["strings", "objects", "records", "dates", "string"],
)
def test_arrays_that_no_tensor_can_hold_are_inert(tmp_path: Path, protocol: int, other: Any) -> None:
    content = read_bytes(tmp_path, pickle.dumps({"a": other, "b": 1}, protocol))
    assert type(content["a"]) is Inert
    assert content["b"] == 1


@pytest.mark.parametrize("protocol", [0, 2])
def test_arrays_of_python_2(tmp_path: Path, protocol: int) -> None:
    values = np.array([[1.5, -200.25], [3e-9, np.pi]], "<f4")

    def string(content: bytes) -> bytes:
        return b"S" + repr(content)[1:].encode() + b"\n" if protocol == 0 else b"U" + bytes([len(content)]) + content

    dtype = call(name("numpy", "dtype"), string(b"f4"), b"I0\nI1\n")
    dtype += b"(I3\n" + string(b"<") + b"NNNI-1\nI-1\nI0\ntb"
    made = call(name("numpy.core.multiarray", "_reconstruct"), name("numpy", "ndarray"), b"(I0\nt", string(b"b"))
    made += b"(I1\n(I2\nI2\nt" + dtype + b"I00\n" + string(values.tobytes()) + b"tb"
    content = read_bytes(tmp_path, b"(d" + string(b"weight") + made + b"s.")
    np.testing.assert_array_equal(content["weight"].numpy(), values)


def test_many_numbers_by_name(tmp_path: Path) -> None:
    content = {f"n{i:06d}": i / 7 for i in range(260_000)}
    assert read_bytes(tmp_path, pickle.dumps(content)) == content


@pytest.mark.parametrize("protocol", [4, 5])
def test_sets(tmp_path: Path, protocol: int) -> None:
    content = {"a": {1, "x"}, "b": frozenset({2, (3, 4)}), "c": [frozenset()], "d": 5}
    assert_same(read_bytes(tmp_path, pickle.dumps(content, protocol)), content)


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt", "note": "ünïcode"}])
@given(content=st.dictionaries(st.text(min_size=1, max_size=5), tensors()))
@property_test
def test_safetensors(tmp_path: Path, metadata: dict[str, str] | None, content: dict[str, Tensor]) -> None:
    content = {key: made.detach().clone().contiguous() for key, made in content.items()} | {"w": torch.ones(2)}
    content = {key: made for key, made in content.items() if made.dtype != torch.complex128}  # it has no name for it
    safetensors.torch.save_file(content, tmp_path / "file", metadata)
    read = read_file(tmp_path / "file")
    assert read.pop(METADATA, None) == (metadata or None)
    assert_same(dict(sorted(read.items())), dict(sorted(content.items())))


# Unknown objects are stood for.


class Own:
    """A class that the reader cannot know."""

    def __init__(self) -> None:
        self.weights = torch.ones(2)


def strange_objects() -> dict[str, Any]:
    class Local(Own):
        def double(self) -> Tensor:
            return self.weights * 2

    return {
        "lambda": lambda value: value + 1,
        "closure": functools.partial(Local.double, Local()),
        "local class": Local,
        "local object": Local(),
        "object": Own(),
        "counter": collections.Counter("aab"),
        "namespace": argparse.Namespace(lr=0.1, nested=argparse.Namespace(arch="resnet18")),
        "path": Path("a/b"),
        "device": torch.device("cpu"),
    }


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_unknown_objects_are_inert(tmp_path: Path, zipped: bool) -> None:
    strange, weights = strange_objects(), torch.arange(4.0).reshape(2, 2)
    content = {"before": weights, **strange, "after": weights.t()}
    torch.save(content, tmp_path / "file", pickle_module=dill, _use_new_zipfile_serialization=zipped)
    content = read_file(tmp_path / "file")
    torch.testing.assert_close((content["before"], content["after"]), (weights, weights.t()))
    assert all(isinstance(content[key], Inert) for key in strange)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_options_of_a_training_are_read(tmp_path: Path, zipped: bool) -> None:
    options = argparse.Namespace(lr=0.1, model_kwargs={"a": [1]}, nested=argparse.Namespace(arch="resnet18"))
    torch.save({"args": options}, tmp_path / "file", _use_new_zipfile_serialization=zipped)
    values = read_file(tmp_path / "file")["args"].values
    assert (values["lr"], values["model_kwargs"], values["nested"].values) == (0.1, {"a": [1]}, {"arch": "resnet18"})


@pytest.mark.parametrize("pairs", [{}, {"a": [1]}])
def test_a_defaultdict_is_a_dictionary(tmp_path: Path, pairs: dict[str, list[int]]) -> None:
    torch.save({"found": collections.defaultdict(list, pairs)}, tmp_path / "file")
    assert read_file(tmp_path / "file") == {"found": pairs}


def test_dill_alone(tmp_path: Path) -> None:
    strange = strange_objects()
    content = read_bytes(tmp_path, dill.dumps({"before": [1.5], **strange, "set": {1, 2}, "after": ("x", b"y")}))
    assert (content["before"], content["set"], content["after"]) == ([1.5], {1, 2}, ("x", b"y"))
    assert all(isinstance(content[key], Inert) for key in strange)


def test_dill_and_arrays(tmp_path: Path) -> None:
    arrays = {"a": np.arange(6.0).reshape(2, 3), "b": np.ones((2, 3), "i4", order="F"), "local": strange_objects()}
    content = read_bytes(tmp_path, dill.dumps(arrays))
    np.testing.assert_array_equal(content["a"].numpy(), arrays["a"])
    np.testing.assert_array_equal(content["b"].numpy(), arrays["b"])


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_whole_objects_beside_tensors(tmp_path: Path, zipped: bool) -> None:
    network = nn.Linear(2, 3)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    network(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    content = {"model": network, "optimizer": optimizer, "random": np.random.default_rng(0), "class": nn.Linear}
    state_dict = network.state_dict()
    torch.save(content | {"state_dict": state_dict}, tmp_path / "file", _use_new_zipfile_serialization=zipped)
    read = read_file(tmp_path / "file")
    assert [type(read[key]) for key in ("model", "optimizer", "random")] == [Inert] * 3
    assert read["class"] is Inert
    assert_same(read["state_dict"], dict(state_dict))


def test_inert_objects_take_whatever_a_pickle_does_to_them(tmp_path: Path) -> None:
    unknown = call(name("a", "B"), push(1))
    steps = [push({"append": 1}) + b"b", b"K\x01a", b"(K\x01K\x02e", b"K\x01K\x02s", b"(K\x01K\x02u", b"(K\x01\x90"]
    content = read_bytes(tmp_path, program(unknown + b"".join(steps) + b")R"))
    assert type(content) is Inert
    assert vars(content) == {}


# Nothing is executed.


def assert_nothing_runs(marker: Path, attack: bytes, *, refused: bool = False) -> None:
    """Neither alone nor inside what torch.save writes; that Python's own unpickler does run it shows it is loaded."""
    path = marker.with_suffix(".pkl")
    for content in (attack, archive(attack), legacy(attack)):
        path.write_bytes(content)
        if refused:
            assert_refused(path)
        else:
            assert type(read_file(path)) is Inert
        assert not marker.exists()
    with contextlib.suppress(Exception):
        pickle.loads(attack)
    assert marker.exists()


@pytest.mark.parametrize("opcode", CALLS)
@pytest.mark.parametrize(("module", "attribute"), MAKERS)
def test_nothing_is_called(tmp_path: Path, opcode: str, module: str, attribute: str) -> None:
    arguments = MAKERS[module, attribute](tmp_path / "marker")
    assert_nothing_runs(tmp_path / "marker", program(CALLS[opcode](module, attribute, arguments)))


@pytest.mark.parametrize("opcode", ["NEWOBJ", "NEWOBJ_EX"])
def test_nothing_is_made(tmp_path: Path, opcode: str) -> None:
    arguments = push(MAKERS["numpy", "memmap"](tmp_path / "marker"))
    end = b"\x81" if opcode == "NEWOBJ" else b"}\x92"
    assert_nothing_runs(tmp_path / "marker", program(name("numpy", "memmap") + arguments + end))


def test_no_attribute_is_fetched(tmp_path: Path) -> None:
    module = call(name("builtins", "__import__"), push("os"))
    function = call(name("builtins", "getattr"), module, push("mkdir"))
    assert_nothing_runs(tmp_path / "marker", program(call(function, push(str(tmp_path / "marker")))))


def test_no_function_is_built(tmp_path: Path) -> None:
    """A partial of torch.load that asks for the unsafe reading."""
    load = name("torch", "load")
    state = b"(" + load + push(()) + push({"weights_only": False}) + b"Nt"
    partial = call(name("functools", "partial"), load) + state + b"b"
    assert_nothing_runs(tmp_path / "marker", program(call(partial, push(evil_file(tmp_path / "marker")))))


@pytest.mark.parametrize(
    "opcode", [b"\x82\xf0", b"\x83\xf0\x00", b"\x84\xf0\x00\x00\x00"], ids=["EXT1", "EXT2", "EXT4"]
)
def test_registered_extensions_are_refused(tmp_path: Path, opcode: bytes) -> None:
    copyreg.add_extension("os", "mkdir", 0xF0)
    try:
        attack = program(call(opcode, push(str(tmp_path / "marker"))))
        assert_nothing_runs(tmp_path / "marker", attack, refused=True)
    finally:
        copyreg.remove_extension("os", "mkdir", 0xF0)


@pytest.mark.parametrize("attribute", ["OrderedDict.fromkeys", "OrderedDict.__init__.__globals__", "abc.sys.modules"])
def test_no_attribute_of_what_is_known_is_reached(tmp_path: Path, attribute: str) -> None:
    assert read_bytes(tmp_path, program(stack_global("collections", attribute))) is Inert


@pytest.mark.parametrize(
    "content",
    [
        b"Pos.mkdir\n.",
        program(push("0") + b"Q"),
        program(storage(4)),
        archive(program(b"(" + push("storage") + name("os", "mkdir") + push("0") + push("cpu") + push(4) + b"tQ")),
        archive(program(storage(4, key="../data.pkl"))),
        archive(program(storage(4)[:-2] + push(("view", 0, 4)) + b"tQ")),
    ],
    ids=["PERSID", "BINPERSID", "storage in a pickle", "type that acts", "another record", "view"],
)
def test_references_to_what_is_elsewhere_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    assert_refused(tmp_path / "file")


def behaviour() -> dict[str, Any]:
    """All by which a pickle could change what the reader's functions and classes do."""
    found: dict[str, Any] = {}
    owners = [untrusted, *(value for _, value in inspect.getmembers(untrusted, inspect.isclass))]
    for owner in owners:
        for key, value in vars(owner).items():
            found[f"{owner.__name__}.{key}"] = value
            if inspect.isfunction(value):
                details = value.__code__, value.__defaults__, value.__kwdefaults__, dict(vars(value))
                found[f"{owner.__name__}.{key}()"] = details
    return {key: repr(value) for key, value in found.items() if not key.startswith("untrusted.__")}


HOSTILE_STATE = {"__defaults__": (7,), "__kwdefaults__": {"fortran": 7}, "dtype": 7, "code": "f8", "tensor": 7}


@pytest.mark.parametrize("known", sorted(untrusted._KNOWN), ids=".".join)
def test_no_state_changes_the_reader(tmp_path: Path, known: tuple[str, str]) -> None:
    before = behaviour()
    hostile = [(None, HOSTILE_STATE), HOSTILE_STATE, [("__defaults__", 7)], "state"]
    for target in (name(*known), name(*known) + b")R"):
        for state in map(push, hostile):
            for end in (b"b", b"\x81b", push("__defaults__") + b"Ns"):
                with contextlib.suppress(InputError):
                    read_bytes(tmp_path, program(target + state + end))
    assert behaviour() == before


# Nothing is imported, and little memory is taken.


@dataclass
class Reading:
    """What came of reading a file in a process of its own."""

    outcome: str
    cause: str
    growth: int  # of the memory, in MB
    imported: list[str]


def measure(path: Path, results: Connection) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 2**30  # so that what gets through fails the test and not the machine
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    modules, before = set(sys.modules), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcome = cause = ""
    threading.stack_size(2**19)

    def read() -> None:
        nonlocal outcome, cause
        try:
            outcome = type(read_file(path)).__name__
        except InputError as error:
            outcome, cause = str(error), repr(error.__cause__)

    thread = threading.Thread(target=read)
    thread.start()
    thread.join()
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    results.send(Reading(outcome, cause, growth, sorted(set(sys.modules) - modules)))


def reading(path: Path) -> Reading | None:
    """Read a file in a process of its own; None if the process does not live to tell."""
    read_file(ordinary(path.with_suffix(".ordinary")))  # imports what reading takes
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(path, sender))
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(20) else None
    except EOFError:
        return None
    finally:
        process.kill()
        process.join()


def ordinary(path: Path) -> Path:
    torch.save({"weight": torch.ones(2)}, path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSED | HARMLESS)
def test_memory_is_bounded(tmp_path: Path, case: str) -> None:
    path = tmp_path / "file"
    path.write_bytes((REFUSED | HARMLESS)[case]())
    result = reading(path)
    assert result is not None, "the reader crashed or hung"
    assert result.growth < 200
    assert result.cause or case in HARMLESS
    assert len(result.outcome.splitlines()) == 1
    assert "MemoryError" not in result.cause
    assert "allocate" not in result.cause


@pytest.mark.parametrize("module", ["turtle", "this", "wave"])
def test_no_module_is_imported(tmp_path: Path, module: str) -> None:
    assert module not in sys.modules
    attribute = {"turtle": "Turtle", "this": "s", "wave": "open"}[module]
    for opcode in CALLS.values():
        (tmp_path / "file").write_bytes(program(opcode(module, attribute, ())))
        assert reading(tmp_path / "file") == Reading("Inert", "", pytest.approx(0, abs=50), [])


# Damaged files, and files of something else.


def touch(content: Any) -> None:
    """Read every element, which ends the process if it lies outside the file."""
    for value in content.values() if isinstance(content, dict) else [content]:
        if isinstance(value, dict):
            touch(value)
        elif isinstance(value, Tensor):
            value.clone()


def refusal(path: Path) -> str:
    """Why the file is refused; empty if it is read."""
    try:
        touch(read_file(path))
    except InputError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path, kind: str) -> None:
    content, path = healthy(kind), tmp_path / "cut off"
    touch(read_bytes(tmp_path, content))
    for length in {len(content) * part // 60 for part in range(60)} | {len(content) - 1}:
        path.write_bytes(content[:length])
        assert_refused(path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:invalid escape sequence")
@given(changes=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1, max_size=4))
@settings(property_test, max_examples=50)
def test_a_damaged_file_is_read_or_refused(tmp_path: Path, kind: str, changes: list[tuple[int, int]]) -> None:
    content, path = bytearray(healthy(kind)), tmp_path / "damaged"
    for position, flip in changes:
        content[position % len(content)] ^= flip
    path.write_bytes(content)
    message = refusal(path)
    assert not message or str(path) in message
    assert len(message.splitlines()) <= 1


@given(operations=PROGRAMS)
@settings(property_test, max_examples=100)
def test_any_pickle_is_read_or_refused(tmp_path: Path, operations: bytes) -> None:
    path = tmp_path / "file"
    attack = program(
        b"".join(push(value) + b"q" + bytes([key]) + b"0" for key, value in enumerate((1, "x", []))) + operations
    )
    for content in (attack, archive(attack), legacy(attack, keys=["0"], storages=struct.pack("<q", 4) + bytes(16))):
        path.write_bytes(content)
        assert len(refusal(path).splitlines()) <= 1


def test_an_array_keeps_its_memory(tmp_path: Path) -> None:
    """A pickle may not resize the bytes that a tensor is a view of."""
    buffer = b"\x96" + struct.pack("<Q", 64) + bytes(64) + b"q\x00"
    made = program(b"(" + array(buffer, (16,)) + b"h\x00(" + b"K\x01" * 1000 + b"el")
    (tmp_path / "file").write_bytes(made)
    made, _ = read_file(tmp_path / "file")
    assert made.tolist() == [0] * 16


@pytest.mark.parametrize(
    "content",
    [
        program(call(name("_codecs", "encode"), push("a"), push("\x1b[31mred\x07"))),
        program(call(name("_codecs", "encode"), push("a"), push("\udc80"))),
        archive(program(storage(4, key="x" * 100_000))),
        archive(program(storage(4, key="\x1b[31mred\x07"))),
    ],
    ids=["colour", "surrogate", "long", "colour of a key"],
)
def test_what_a_file_says_is_not_printed_as_it_is(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(InputError) as error:
        read_file(tmp_path / "file")
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 600


def test_a_name_too_long(tmp_path: Path) -> None:
    assert_refused(tmp_path / ("x" * 300))


def write_tar(path: Path) -> None:
    with tarfile.open(path, "w") as parts:
        parts.add(__file__, "storages")


def write_zip(path: Path, name: str = "notes.txt") -> None:
    with zipfile.ZipFile(path, "w") as parts:
        parts.writestr(name, "nothing")


def write_quantised(path: Path) -> None:
    torch.save({"weight": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)}, path)


def write_compressed(path: Path) -> None:
    path.write_bytes(archive(program(storage(1)), {"0": bytes(range(256))}, zipfile.ZIP_DEFLATED))


def write_doubled(path: Path) -> None:
    path.write_bytes(archive(program(storage(4))))
    with zipfile.ZipFile(path, "a") as parts:
        parts.writestr("archive/data/0", bytes(16))


def write_torchscript(path: Path) -> None:
    class Double(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    torch.jit.trace(Double(), torch.ones(1)).save(path)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "no file at"),
        (lambda path: path.mkdir(), "is a folder"),
        (lambda path: path.symlink_to("nowhere"), "no file at"),
        (lambda path: path.touch(), "empty"),
        (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "git lfs pull"),
        (lambda path: path.write_text("\n<!DOCTYPE HTML>\n<title>Log in</title>"), "is a web page"),
        (lambda path: path.write_bytes(gzip.compress(bytes(100))), "compressed by gzip"),
        (lambda path: path.write_bytes(healthy("zip")[:-100]), "is cut off: download or save it again"),
        (lambda path: path.write_bytes(healthy("legacy")[:-1]), "is cut off: download or save it again"),
        (lambda path: path.write_bytes(healthy("safetensors")[:-1]), "is cut off: download or save it again"),
        (lambda path: path.write_text("Some notes on the weights.\n"), r"is text \(Some notes on the weights\. "),
        (lambda path: path.write_bytes(bytes(1000)), "cannot be read safely"),
        (write_tar, "is a tar archive: unpack it"),
        (write_zip, "zip archive of something else"),
        (lambda path: write_zip(path, "run/model.pth"), "is a zip archive of files: unpack it with `unzip`"),
        (lambda path: write_zip(path, "model.weights.h5"), "is a model of Keras"),
        (lambda path: path.write_bytes(b"\x93NUMPY\1\0"), "one array of NumPy"),
        (write_quantised, "such as quantised ones"),
        (write_compressed, "compressed or doubled"),
        (write_doubled, "compressed or doubled"),
        (write_torchscript, "TorchScript"),
        (lambda path: path.write_bytes(pickle.dumps({"a": np.ones(2, ">f4")})), "big-endian"),
    ],
    ids=[
        *("missing", "folder", "broken link", "empty"),
        *(
            "LFS pointer",
            "web page",
            "gzip",
            "cut-off zip",
            "cut-off legacy",
            "cut-off safetensors",
            "text",
            "zeros",
            "tar",
        ),
        *("zip", "zip of a checkpoint", "Keras", "npy", "quantised"),
        *("compressed", "doubled", "TorchScript", "big-endian array"),
    ],
)
@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore:Duplicate name")
def test_what_holds_no_tensors_is_refused(tmp_path: Path, write: Callable[[Path], Any], message: str) -> None:
    write(tmp_path / "file")
    assert_refused(tmp_path / "file", message)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch, on saving without a process group
def test_the_advice_for_a_folder_of_torch_s_distributed_checkpoints_gives_its_tensors(tmp_path: Path) -> None:
    folder = tmp_path / "step_100"
    torch.distributed.checkpoint.save({"model": {"weight": torch.arange(3.0)}}, checkpoint_id=folder)
    command = re.search("`python (.*)`", refusal(folder))
    assert command
    subprocess.run([sys.executable, *shlex.split(command[1])], check=True, capture_output=True)
    assert read_file(command[1].split()[-1])["model"]["weight"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", ["model.onnx", "saved.pb", "model.ckpt-9.data-00000-of-00001", "flax_model.msgpack"])
def test_models_of_other_frameworks_are_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(bytes(range(8, 40)))
    assert_refused(tmp_path / name, "seems to be a model of")


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("kind", ["TorchScript", "npz", "export"])
def test_the_command_for_what_holds_tensors_in_another_way_gives_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    path, net = tmp_path / "file.pt2", nn.Linear(3, 2)
    if kind == "TorchScript":
        torch.jit.script(net).save(path)
    elif kind == "npz":
        np.savez(path.open("wb"), **{name: tensor.numpy() for name, tensor in net.state_dict().items()})
    else:
        torch.export.save(torch.export.export(net, (torch.ones(1, 3),)), path)
    command = re.search("`(.*)`", refusal(path))
    assert command
    monkeypatch.chdir(tmp_path)
    exec(command[1], {"torch": torch, "numpy": np, "FILE": path})
    content = read_file("tensors.pth")
    assert content.keys() == net.state_dict().keys()
    assert all(torch.equal(content[name], tensor) for name, tensor in net.state_dict().items())


def test_the_folders_of_other_programs_are_named(tmp_path: Path) -> None:
    for file, message in (
        ("zero_to_fp32.py", "zero_to_fp32.py {0} OUT` and give"),
        ("saved_model.pb", "of TensorFlow"),
    ):
        folder = tmp_path / file.partition(".")[0]
        (folder / "global_step7").mkdir(parents=True)
        (folder / file).touch()
        assert_refused(folder, message.format(folder))


def test_the_file_in_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    torch.save({"weight": torch.ones(1)}, tmp_path / "checkpoints/model.pth")
    assert read_file(refusal(tmp_path).rpartition(" ")[2])["weight"] == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_change_to_a_tensor_does_not_reach_the_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(healthy(kind))
    before = sha256(path)
    content = read_file(path)
    content["a"] += 1
    assert content["a"].flatten().tolist() == [1, 2, 3, 4, 5, 6]
    assert sha256(path) == before
    assert read_file(path)["a"].flatten().tolist() == [0, 1, 2, 3, 4, 5]


def test_the_name_of_a_published_file_that_is_not_there_can_be_downloaded(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="hub:resnet50_l2_eps3 "):
        read_file(tmp_path / "resnet50_l2_eps3.pt")
    with pytest.raises(InputError, match=r"check the path$"):
        read_file(tmp_path / "own.pt")
