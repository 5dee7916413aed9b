"""Device and arithmetic of networks."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from robust_backbones.errors import InputError, check_choice

M = TypeVar("M", bound=nn.Module)
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
COMPILE_MODES = {"default": "default", "cuda-graphs": "reduce-overhead"}


def available(device: torch.device | str) -> torch.device:
    """The device of this name; ``InputError`` if it is a GPU, and there is none."""
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda, but no CUDA device was found: give --device cpu")
    return device


@dataclass(frozen=True)
class Compute:
    """Device and arithmetic of networks. Weights, images, perturbations and losses are always float32."""

    device: torch.device
    precision: str = "fp32"
    """Of the network's passes: fp32, bf16, or fp16 (with loss scaling; not used in evaluation)."""
    attack_precision: str = ""
    """Of the attack's passes in training; as ``precision`` when empty."""
    compile_mode: str = ""
    """torch.compile, for GPUs: default, or cuda-graphs, which also launches kernels together; empty is off."""

    def __post_init__(self) -> None:
        for precision in (self.precision, self.attack_precision or self.precision):
            check_choice("precision", precision, PRECISIONS)
        if self.compile_mode:
            check_choice("compile mode", self.compile_mode, COMPILE_MODES)

    @property
    def dtype(self) -> torch.dtype:
        return arithmetic(self.precision, self.device)

    @property
    def attack_dtype(self) -> torch.dtype:
        return arithmetic(self.attack_precision or self.precision, self.device)

    def autocast(self) -> torch.autocast:
        return autocast(self.device, self.dtype)

    def place(self, model: M) -> M:
        """``model`` on the device, its weights channels last."""
        model.to(device=self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return model

    def compile(self, model: nn.Module) -> nn.Module:
        """``model``, compiled when the mode says so."""
        if not self.compile_mode:
            return model
        return cast(nn.Module, torch.compile(model, mode=COMPILE_MODES[self.compile_mode]))

    def to_unit_range(self, images: Tensor) -> Tensor:
        """uint8 (N, 3, H, W) -> float32 in [0, 1] on the device; channels last, the fastest layout for convolutions."""
        images = images.to(self.device, non_blocking=True).float() / 255
        return images.contiguous(memory_format=torch.channels_last)


@contextmanager
def single_values_refused() -> Iterator[None]:
    """Batch norms in train mode that get one value a channel raise ``InputError``."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise InputError(
            "a batch norm got one value a channel, of a single small image, and cannot train on it: give a larger "
            "--batch-size (or --micro-batch-size), or larger images; with --keep-last the last batch counts too"
        ) from None


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Off for float32."""
    enabled = dtype != torch.float32
    return torch.autocast(device.type, dtype if enabled else torch.bfloat16, enabled=enabled)


def arithmetic(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of one of PRECISIONS; float32 for bf16 on CPUs that compute it in software, which is far slower."""
    if precision == "bf16" and device.type == "cpu" and not computes_bfloat16():
        _say_once_float32()
        return torch.float32
    return PRECISIONS[precision]


def computes_bfloat16() -> bool:
    """Whether this machine's CPU has instructions that multiply in bfloat16: on x86, AVX512-BF16 or AMX.

    With plain AVX-512 oneDNN computes it too, in software: a step of a detector then takes 2.6 times as long.
    """
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    if platform.machine() not in ("x86_64", "AMD64"):
        return True
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


@cache
def _say_once_float32() -> None:
    """On stderr, because stdout may be a document."""
    said = "this processor has no instructions for bfloat16: computing in float32, which is faster on it"
    print(said, file=sys.stderr, flush=True)
