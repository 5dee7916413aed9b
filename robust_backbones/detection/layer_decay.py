"""Layer-wise learning rates: the depth of the backbone's parameters, as the authors of each family count layers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from robust_backbones.errors import InputError


def layer_of(family: str, name: str, blocks: Sequence[int]) -> int:
    """The layer of a parameter: 0 is the stem; parameters in no layer, such as FPN and heads, are above the last one.

    Args:
        family: a class of ``FAMILIES``.
        name: within the network, such as ``stages.2.blocks.4.conv_dw.weight``; ``""`` gives the layer above the last.
        blocks: number of blocks of each stage, such as [3, 3, 9, 3]; [12] for a single stage.
    """
    return FAMILIES[family][1](name, blocks)


def layer_factors(model: nn.Module, decay: float) -> dict[str, float]:
    """The learning rate factor of each parameter of the backbone: ``decay`` once for every layer above it.

    Raises:
        InputError: the model's backbone is of a family without a definition of layers.
    """
    for prefix, module in model.named_modules():
        for kind in type(module).__mro__:
            if kind.__name__ in FAMILIES:
                blocks = [len(stage) for stage in FAMILIES[kind.__name__][0](module)]
                top = layer_of(kind.__name__, "", blocks)
                layers = {name: layer_of(kind.__name__, name, blocks) for name, _ in module.named_parameters()}
                return {f"{prefix}.{name}": decay ** (top - layer) for name, layer in layers.items()}
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
"""Class (timm's ConvNeXt, Detectron2's others) -> its stages, and the layer of a name."""
