"""The gradients of a training step as one CUDA graph: one launch instead of some thousand kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from robust_backbones.threat_models import ThreatModel

Parts = Sequence[tuple[Tensor, Tensor]]
"""Images and labels of each micro-batch, on the GPU."""
Gradients = Callable[[Parts, ThreatModel], Parts]
"""Adds up the micro-batches' gradients; gives the loss and the logits of each."""


class GraphedGradients:
    """``add_gradients``, recorded once and replayed from then on.

    The first steps of each shape and threat model run without a graph, because PyTorch chooses its kernels in them; so
    do all steps in which epsilon grows. The graph keeps the memory of one step.

    Args:
        add_gradients: must not make the host wait, and change nothing but gradients and, in place, buffers.
        parameters: those whose gradients it computes, starting from none.
        generator: the generator it uses, besides PyTorch's own.
    """

    WARM_UP = 3

    def __init__(
        self, add_gradients: Gradients, parameters: Sequence[nn.Parameter], generator: torch.Generator
    ) -> None:
        self._add, self._parameters, self._generator = add_gradients, parameters, generator
        self._replay: Gradients | None = None
        self._recorded_for: object = None
        self._seen = 0

    def __call__(self, parts: Parts, threat_model: ThreatModel) -> Parts:
        wanted = threat_model, [(tensor.shape, tensor.dtype) for part in parts for tensor in part]
        if wanted != self._recorded_for:
            self._recorded_for, self._seen, self._replay = wanted, 0, None
        self._seen += 1
        if self._seen <= self.WARM_UP:
            return self._add(parts, threat_model)
        if self._replay is None:
            self._replay = self._record(parts, threat_model)
        return self._replay(parts, threat_model)

    def _record(self, parts: Parts, threat_model: ThreatModel) -> Gradients:
        own = [(images.clone(), labels.clone()) for images, labels in parts]
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self._generator)
        # Of this thread: that which pins the loader's memory calls CUDA meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            found = self._add(own, threat_model)
        gradients = [parameter.grad for parameter in self._parameters]

        def replay(parts: Parts, threat_model: ThreatModel) -> Parts:
            for mine, given in zip(own, parts, strict=True):
                for into, tensor in zip(mine, given, strict=True):
                    into.copy_(tensor)
            graph.replay()
            for parameter, gradient in zip(self._parameters, gradients, strict=True):
                parameter.grad = gradient
            return found

        return replay
