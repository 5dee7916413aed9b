"""ConvNeXt and ViT with a stem of several convolutions: the ConvStem of Singh et al. 2023, in timm's registry.

"Revisiting Adversarial Training for ImageNet" (arXiv 2303.01870, section 3) finds them more robust than those whose
stem is one convolution. Names and shapes are those of its authors' files, which RobustBench has as
``Singh2023Revisiting_*`` (robustbench/model_zoo/architectures/convstem_models.py). All but ViT-S take images in [0, 1]
unchanged: their authors train without normalisation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.layers import LayerNorm2d
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.convnext import ConvNeXt
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

__all__: list[str] = []  # timm adds the names that it registers

_FED = {"input_size": (3, 224, 224), "pool_size": (7, 7), "crop_pct": 0.875, "interpolation": "bicubic"}
_AS_THEY_ARE = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_OF_CONVNEXT = {**_FED, **_AS_THEY_ARE, "first_conv": "stem.stem.0", "classifier": "head.fc"}
_OF_VIT = {**_FED, "first_conv": "patch_embed.proj.stem.0", "classifier": "head", "fixed_input_size": True}

default_cfgs = generate_default_cfgs(
    {
        **{f"convnext_{size}_convstem.untrained": _OF_CONVNEXT for size in ("tiny", "small", "base", "large")},
        "vit_small_patch16_224_convstem.untrained": {**_OF_VIT, **_IMAGENET},
        "vit_base_patch16_224_convstem.untrained": {**_OF_VIT, **_AS_THEY_ARE},
    }
)


class ConvStem(nn.Module):
    """Convolutions of 3 x 3, each with a layer norm over channels and a GELU; a 1 x 1 to ``last`` channels if given."""

    def __init__(self, channels: Sequence[int], strides: Sequence[int], last: int = 0) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs, stride in zip((3, *channels), channels, strides, strict=False):
            layers += [nn.Conv2d(inputs, outputs, 3, stride, padding=1), LayerNorm2d(outputs), nn.GELU()]
        if last:
            layers.append(nn.Conv2d(channels[-1], last, 1))
        self.stem = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, C, H / stride, W / stride), the product of the strides."""
        return self.stem(images)


class ConvNeXtConvStem(ConvNeXt):
    """timm's ConvNeXt with a ConvStem of stride 4."""

    def __init__(self, *, channels: Sequence[int], strides: Sequence[int], **arguments: Any) -> None:
        super().__init__(**arguments)
        self.stem = ConvStem(channels, strides)


class VisionTransformerConvStem(VisionTransformer):
    """timm's ViT with a ConvStem as the embedding of its 16 x 16 patches."""

    def __init__(self, *, embed_dim: int, **arguments: Any) -> None:
        super().__init__(embed_dim=embed_dim, **arguments)
        self.patch_embed.proj = ConvStem((48, 96, 192, 384), (2, 2, 2, 2), embed_dim)


_SMALL, _LARGE = {"channels": (48, 96), "strides": (2, 2)}, {"strides": (2, 2, 1)}
_SIZES: dict[str, dict[str, Any]] = {
    "convnext_tiny_convstem": {"depths": (3, 3, 9, 3), "dims": (96, 192, 384, 768), **_SMALL},
    "convnext_small_convstem": {"depths": (3, 3, 27, 3), "dims": (96, 192, 384, 768), **_SMALL},
    "convnext_base_convstem": {
        **{"depths": (3, 3, 27, 3), "dims": (128, 256, 512, 1024), "channels": (64, 96, 128), **_LARGE}
    },
    "convnext_large_convstem": {
        **{"depths": (3, 3, 27, 3), "dims": (192, 384, 768, 1536), "channels": (96, 144, 192), **_LARGE}
    },
    "vit_small_patch16_224_convstem": {"depth": 12, "embed_dim": 384, "num_heads": 6},
    "vit_base_patch16_224_convstem": {"depth": 12, "embed_dim": 768, "num_heads": 12},
}


def _register(name: str, sizes: dict[str, Any]) -> None:
    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        kind = ConvNeXtConvStem if name.startswith("convnext") else VisionTransformerConvStem
        if kind is ConvNeXtConvStem:
            kwargs["feature_cfg"] = {"out_indices": (0, 1, 2, 3), "flatten_sequential": True}
        return build_model_with_cfg(kind, name, pretrained, **{**sizes, **kwargs})

    build.__name__ = name
    register_model(build)


for _name, _of_size in _SIZES.items():
    _register(_name, _of_size)
