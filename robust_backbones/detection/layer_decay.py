"""Layer-wise learning rates: the depth of the backbone's parameters, as the authors of each family count layers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from robust_backbones.errors import InputError


def layer_factors(model: nn.Module, decay: float) -> dict[str, float]:
    """The learning rate factor of each parameter of the backbone: ``decay`` once for every layer above it.

    Raises:
        InputError: the model's backbone is of a family without a definition of layers.
    """
    for prefix, module in model.named_modules():
        for kind in type(module).__mro__:
            if kind.__name__ in FAMILIES:
                stages, layer_of = FAMILIES[kind.__name__]
                blocks = [len(stage) for stage in stages(module)]
                names, top = [name for name, _ in module.named_parameters()], layer_of("", blocks)
                return {f"{prefix}.{name}": decay ** (top - layer_of(name, blocks)) for name in names}
    raise InputError(
        f"SOLVER.LAYER_DECAY counts the layers of {', '.join(FAMILIES)}, and the backbone is none of them: give 1.0"
    )


def _convnext(name: str, blocks: Sequence[int]) -> int:
    """The detectors of Liu et al. 2022: three blocks of the third stage are a layer, each other stage is one."""
    last = 3 + math.ceil(blocks[2] / 3)
    if name.startswith("stem."):
        return 0
    if match := re.match(r"stages\.(\d+)\.(?:blocks\.(\d+)|downsample)\.", name):
        stage, block = int(match[1]), int(match[2] or 0)
        return (1, 2, 3 + block // 3, last)[stage]
    return last + 1


def _swin(name: str, blocks: Sequence[int]) -> int:
    """SimMIM (Xie et al. 2022): a block is a layer; the merging of patches that ends a stage is in its last block's."""
    if name.startswith(("patch_embed.", "absolute_pos_embed")):
        return 0
    if match := re.match(r"layers\.(\d+)\.(?:blocks\.(\d+)|downsample)\.", name):
        stage = int(match[1])
        return sum(blocks[:stage]) + (int(match[2]) + 1 if match[2] else blocks[stage])
    return sum(blocks) + 1


def _vit(name: str, blocks: Sequence[int]) -> int:
    """ViTDet (Li et al. 2022), as Detectron2's ``get_vit_lr_decay_rate``: a block is a layer."""
    if name.startswith(("patch_embed.", "pos_embed")):
        return 0
    if (match := re.match(r"blocks\.(\d+)\.", name)) and ".residual." not in name:
        return int(match[1]) + 1
    return sum(blocks) + 1


_Stages = Callable[[Any], list[Any]]
FAMILIES: dict[str, tuple[_Stages, Callable[[str, Sequence[int]], int]]] = {
    "ConvNeXt": (lambda network: [stage.blocks for stage in network.stages], _convnext),
    "SwinTransformer": (lambda network: [stage.blocks for stage in network.layers], _swin),
    "ViT": (lambda network: [network.blocks], _vit),
}
"""Class (timm's ConvNeXt, Detectron2's others) -> its stages, and the layer of a parameter by its name and the number
of blocks of each stage: 0 is the stem; parameters in no layer, such as a norm after the last, are above all."""
