"""Networks of the families that timm has in large sizes alone, small enough for tests; importing it tells timm."""

from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.swin_transformer import SwinTransformer

from robust_backbones.checkpoint.format import Checkpoint
from robust_backbones.checkpoint.sources import Statement, read_checkpoint

_FED = {"num_classes": 10, "fixed_input_size": True, "crop_pct": 1.0, "interpolation": "bicubic"}
_FED |= {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "input_size": (3, 64, 64)}
_SWIN = {**_FED, "classifier": "head.fc", "first_conv": "patch_embed.proj"}

default_cfgs = generate_default_cfgs(
    {"tiny_swin": _SWIN, "tiny_swin_of_windows_4": {**_SWIN, "input_size": (3, 128, 128)}}
)


def _swin(name: str, **given: Any) -> SwinTransformer:
    shape = {"img_size": 64, "embed_dim": 8, "depths": (2, 1, 2, 2), "num_heads": (1, 2, 2, 4)}
    network: SwinTransformer = build_model_with_cfg(SwinTransformer, name, **{**shape, **given})
    return network


@register_model
def tiny_swin(pretrained: bool = False, **given: Any) -> SwinTransformer:
    """As Swin-T at 224 pixels, at 64: the last of four stages is one window, and has no shift."""
    return _swin("tiny_swin", **{"pretrained": pretrained, "window_size": 2, **given})


@register_model
def tiny_swin_of_windows_4(pretrained: bool = False, **given: Any) -> SwinTransformer:
    return _swin("tiny_swin_of_windows_4", **{"pretrained": pretrained, "window_size": 4, "img_size": 128, **given})


def write_timm_file(arch: str, folder: Path) -> Checkpoint:
    """A network of timm with random weights, also where they would begin at 0 or 1, as timm writes it; read again."""
    torch.manual_seed(0)
    network = timm.create_model(arch, num_classes=10)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim == 1 or name.endswith("relative_position_bias_table"):
                parameter += 0.3 * torch.randn_like(parameter)
    path = folder / f"{arch}.pth"
    cfg = network.pretrained_cfg | {"architecture": arch}
    torch.save({"pretrained_cfg": cfg, "state_dict": network.state_dict()}, path)
    return read_checkpoint(path, statement=Statement(threat_model="L2:0"))
