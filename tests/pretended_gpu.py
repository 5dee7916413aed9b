"""A GPU where there is none: tensors that say they lie on ``cuda:0``, whose numbers the CPU computes.

What a GPU would refuse is refused: tensors of both devices in one operation, and NumPy. What the host would wait for
is noted. Nothing is said of speed, of CUDA's own arithmetic, or of autocast, which leaves these tensors as they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo  # before torch.cuda's functions are others, whose names it looks at
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

CUDA, META, _CPU = torch.device("cuda", 0), torch.device("meta"), torch.device("cpu")
_TAKES_BOTH = ("copy_", "index", "index_put", "index_put_", "_index_put_impl_")  # indices may lie on the CPU
_WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal")


class GpuTensor(Tensor):
    """``held`` has the numbers. PyTorch itself takes it for one of the meta device, which needs no driver."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> GpuTensor:
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        tensor = Tensor._make_wrapper_subclass(cls, held.size(), device=META, **layout)
        tensor.held = held.detach()
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError("a tensor of a pretended GPU has left it")


class PretendedGraph:
    """A CUDA graph: recording computes nothing that lasts, and replaying works on the very tensors of the recording."""

    recording: PretendedGraph | None = None
    replays = 0
    """Of all graphs."""

    def __init__(self) -> None:
        self._operations: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self._before: dict[int, tuple[Tensor, Tensor]] = {}
        self._generators: list[torch.Generator] = [*torch.cuda.default_generators]

    def register_generator_state(self, generator: torch.Generator) -> None:
        self._generators.append(generator)

    @contextlib.contextmanager
    def record(self) -> Iterator[None]:
        states = [generator.get_state() for generator in self._generators]
        PretendedGraph.recording = self
        try:
            yield
        finally:
            PretendedGraph.recording = None
        for whole, content in self._before.values():
            whole.copy_(content)
        for _, _, _, made in self._operations:
            for tensor in made:
                tensor.fill_(-77)  # until a replay nothing has been computed
        for generator, state in zip(self._generators, states, strict=True):
            generator.set_state(state)

    def compute(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The operation, noted; what was there before the recording gets its content back at its end."""
        generator = kwargs.get("generator")
        if generator is not None and not any(
            torch.equal(generator.get_state(), known.get_state()) for known in self._generators
        ):
            raise RuntimeError("a CUDA graph draws from a generator that is not registered")
        # Some write to what their schema does not say: native_batch_norm to its statistics.
        for value in pytree.tree_leaves((args, kwargs)):
            if isinstance(value, Tensor) and (where := value.untyped_storage().data_ptr()) not in self._before:
                whole = torch.empty(0, dtype=torch.uint8).set_(value.untyped_storage())
                self._before[where] = whole, whole.clone()
        result = func(*args, **kwargs)
        found = [value for value in pytree.tree_leaves(result) if isinstance(value, Tensor)]
        made = [tensor for tensor in found if tensor.untyped_storage().data_ptr() not in self._before]
        self._operations.append((func, args, kwargs, made))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        PretendedGraph.replays += 1
        for func, args, kwargs, made in self._operations:
            found = [value for value in pytree.tree_leaves(func(*args, **kwargs)) if isinstance(value, Tensor)]
            for tensor, value in zip(made, found, strict=bool(made)):
                tensor.copy_(value)


class _Operations(TorchDispatchMode):
    def __init__(self, waits: list[str]) -> None:
        super().__init__()
        self._waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        values, form = pytree.tree_flatten((args, kwargs or {}))
        there = [value for value in values if isinstance(value, GpuTensor)]
        here = [value for value in values if isinstance(value, Tensor) and not isinstance(value, GpuTensor)]
        device = (kwargs or {}).get("device")
        if not there and device != META:
            return func(*args, **(kwargs or {}))
        graph = PretendedGraph.recording
        name, to_cpu = func.__name__.split(".")[0], device == torch.device("cpu")
        takes_both = name == "copy_" or (name in _TAKES_BOTH and isinstance(args[0], GpuTensor))
        if there and not takes_both and any(tensor.ndim > 0 for tensor in here):
            raise RuntimeError(f"{func} of tensors on cuda:0 and on the CPU")
        indices = args[1] if name.startswith(("index", "_index_put")) and len(args) > 1 else ()
        by_booleans = isinstance(indices, (list, tuple)) and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in indices
        )
        copied_back = to_cpu or (name == "copy_" and not isinstance(args[0], GpuTensor))
        if name in _WAITING or by_booleans or (there and copied_back):
            self._waits.append(name)
            if graph is not None:
                raise RuntimeError(f"the host would wait for {func} in the recording of a CUDA graph")
        on_cpu = [_CPU if value == META else getattr(value, "held", value) for value in values]
        inner_args, inner_kwargs = pytree.tree_unflatten(on_cpu, form)
        inner_kwargs.pop("pin_memory", None)
        if graph is not None and any(tensor.ndim > 0 for tensor in here):
            raise RuntimeError(f"{func} copies from the host in the recording of a CUDA graph")
        # What works in place gives the tensor that it was given.
        known = {id(tensor.held): tensor for tensor in there} | {id(tensor): tensor for tensor in here}

        def place(found: Tensor) -> Tensor:
            return known[id(found)] if id(found) in known else found if to_cpu else GpuTensor(found)

        compute = func if graph is None else lambda *all_, **named: graph.compute(func, all_, named)
        return pytree.tree_map_only(Tensor, place, compute(*inner_args, **inner_kwargs))


_GETTERS = {Tensor.device: CUDA, Tensor.is_cuda: True, Tensor.is_cpu: False, Tensor.is_meta: False}


class _Functions(TorchFunctionMode):
    """What Python asks of tensors, above their operations."""

    def __init__(self, waits: list[str]) -> None:
        super().__init__()
        self._waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensor, kwargs = args[0] if args else None, dict(kwargs or {})
        if isinstance(tensor, GpuTensor):
            for getter, value in _GETTERS.items():
                if func == getter.__get__:
                    return value
            if func is Tensor.tolist:
                self._waits.append("tolist")
                return tensor.held.tolist()
            if func is Tensor.numpy:
                raise TypeError("can't convert cuda:0 device type tensor to numpy")
            if func is Tensor.__deepcopy__:
                return _copied(tensor, args[1])
            if func is Tensor.new_tensor:
                return GpuTensor(torch.tensor(args[1], dtype=tensor.dtype))
            # These change the shape of the tensor that says it is a GPU's; all callers use what they return.
            func = {Tensor.unsqueeze_: Tensor.unsqueeze, Tensor.squeeze_: Tensor.squeeze}.get(func, func)
        if func is Tensor.pin_memory:
            return tensor
        args, kwargs = pytree.tree_map_only(
            torch.device, lambda each: META if each.type == "cuda" else each, (args, kwargs)
        )
        if func is Tensor.to and isinstance(args[1:2], tuple) and str(args[1:2]).startswith("('cuda"):
            args = (tensor, META, *args[2:])
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = META
        if func in (torch.tensor, torch.as_tensor, torch.from_numpy) and kwargs.get("device") == META:
            if isinstance(tensor, GpuTensor):
                return tensor
            if PretendedGraph.recording is not None:
                raise RuntimeError(f"{func} copies from the host in the recording of a CUDA graph")
            return GpuTensor(func(*args, **kwargs | {"device": _CPU}))
        return func(*args, **kwargs)


def _copied(tensor: GpuTensor, memo: dict[int, Any]) -> Tensor:
    if id(tensor) not in memo:
        with torch.no_grad():
            copy: Tensor = GpuTensor(tensor.held.clone())
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = (
            nn.Parameter(copy, tensor.requires_grad) if is_parameter else copy.requires_grad_(tensor.requires_grad)
        )
    return memo[id(tensor)]


def _saved(content: Any) -> Any:
    """What a file gets: the numbers."""
    if isinstance(content, GpuTensor):
        return content.held
    if isinstance(content, dict):
        copy = content.copy()
        copy.update({key: _saved(value) for key, value in content.items()})
        return copy
    return type(content)(map(_saved, content)) if type(content) in (list, tuple) else content


@contextlib.contextmanager
def pretended_gpu() -> Iterator[list[str]]:
    """In it PyTorch has one GPU; the list gets the name of each operation for which the host would wait."""
    generator = torch.Generator()
    nothing = lambda *_, **__: None  # noqa: E731
    said = {
        **{"is_available": True, "device_count": 1, "current_device": 0, "get_device_name": "pretended"},
        **{"get_device_capability": (9, 0), "is_bf16_supported": True, "max_memory_allocated": 0},
    }
    save, make = torch.save, torch.utils.data.DataLoader.__init__
    waits: list[str] = []
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        for name, value in said.items():
            patch.setattr(torch.cuda, name, lambda *_, value=value, **__: value)
        for name in ("init", "_lazy_init", "set_device", "synchronize", "empty_cache", "reset_peak_memory_stats"):
            patch.setattr(torch.cuda, name, nothing)
        patch.setattr(torch.cuda, "device", lambda *_: contextlib.nullcontext())
        patch.setattr(torch.cuda, "default_generators", (generator,))
        for name in ("manual_seed", "manual_seed_all"):
            patch.setattr(torch.cuda, name, generator.manual_seed)
        patch.setattr(torch.cuda, "get_rng_state", lambda *_: generator.get_state())
        patch.setattr(torch.cuda, "set_rng_state", lambda state, *_: generator.set_state(state))
        patch.setattr(torch.cuda, "CUDAGraph", PretendedGraph)
        patch.setattr(torch.cuda, "graph", lambda graph, **_: graph.record())
        patch.setattr(torch.accelerator, "is_available", lambda: False)
        patch.setattr(torch, "Generator", lambda device="cpu": _Generator())
        patch.setattr(torch, "save", lambda content, *rest, **options: save(_saved(content), *rest, **options))
        patch.setattr(
            torch.utils.data.DataLoader,
            "__init__",
            lambda self, *rest, **options: make(self, *rest, **options | {"pin_memory": False}),
        )
        stack.enter_context(_Operations(waits))
        stack.enter_context(_Functions(waits))
        yield waits


_Generator = torch.Generator
