"""What autograd holds between the forward and the backward pass of one attack step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.work import Work
from robust_backbones.classification.compute import PRECISIONS
from robust_backbones.classification.folding import FoldedTwin
from robust_backbones.models import BackboneSpec, NormalizedModel, build_backbone

MEGABYTE = 1e6
AT_MOST = {"fp32": 41.0, "bf16": 21.0}


@dataclass(frozen=True, kw_only=True)
class Memory(Work):
    """Memory held by one attack step, an image."""

    name: ClassVar[str] = "memory"
    title: ClassVar[str] = "Memory that one attack step holds"

    arch: str = "resnet50"
    image_size: int = 224
    batch_size: int = 4

    @property
    def remark(self) -> str:
        return (
            f"{self.arch} at {self.image_size} px: bytes of all tensors that autograd keeps from the forward to the "
            "backward pass, each storage once, without the network's own; counted, not timed, and the same on every "
            "machine."
        )

    def measure(self) -> dict[str, Any]:
        spec = BackboneSpec(self.arch, 1000)
        model = NormalizedModel(build_backbone(spec), spec).eval()
        images = torch.rand(self.batch_size, 3, self.image_size, self.image_size)
        labels = torch.zeros(self.batch_size, dtype=torch.long)
        rows = [{"way": "eager PyTorch, eval mode", "megabytes": held(model, images, labels), "at_most": None}]
        for precision, at_most in AT_MOST.items():
            twin = FoldedTwin(model, PRECISIONS[precision])
            row = {"way": f"ours {precision}", "megabytes": held(twin, images, labels), "at_most": at_most}
            rows.append(row)
        return self.write({"memory": rows})


def held(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Megabytes an image."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    points = images.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = F.cross_entropy(model(points), labels)
    # The graph keeps every one of them alive until here, so no address was used twice.
    total = sum(size for address, size in storages.items() if address not in own)
    del loss
    return total / MEGABYTE / len(images)
