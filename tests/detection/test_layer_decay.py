"""Layer-wise learning rates and stochastic depth: by the rules of the networks' makers."""

from functools import partial

import pytest
import torch
from detectron2.modeling.backbone.swin import SwinTransformer
from detectron2.modeling.backbone.vit import ViT, get_vit_lr_decay_rate
from timm.layers import DropPath
from torch import nn

from robust_backbones.detection.config import load_config
from robust_backbones.detection.layer_decay import FAMILIES, layer_factors
from robust_backbones.detection.timm_backbone import TimmBackbone
from robust_backbones.detection.trainer import Trainer
from robust_backbones.errors import InputError
from tests.detection import tiny_networks  # noqa: F401
from tests.detection.conftest import SHAPES_CONFIG, SMALL

_, layer_of = FAMILIES["ConvNeXt"]
TIMM: list[object] = ["MODEL.BACKBONE.NAME", "build_timm_fpn_backbone", "MODEL.BACKBONE.TIMM"]


@pytest.mark.parametrize(
    ("blocks", "name", "layer"),
    [  # num_layers is 6 of ConvNeXt-T and 12 of the larger ones in its makers' configurations
        ([3, 3, 9, 3], "stem.0.weight", 0),
        ([3, 3, 9, 3], "stages.0.blocks.2.norm.weight", 1),
        ([3, 3, 9, 3], "stages.1.downsample.1.weight", 2),
        ([3, 3, 9, 3], "stages.1.blocks.2.gamma", 2),
        ([3, 3, 9, 3], "stages.2.downsample.0.bias", 3),
        ([3, 3, 9, 3], "stages.2.blocks.8.mlp.fc1.weight", 5),
        ([3, 3, 9, 3], "stages.3.downsample.1.weight", 6),
        ([3, 3, 9, 3], "stages.3.blocks.0.gamma", 6),
        ([3, 3, 9, 3], "", 7),
        ([3, 3, 27, 3], "stages.2.blocks.26.gamma", 11),
        ([3, 3, 27, 3], "stages.3.blocks.2.gamma", 12),
        ([3, 3, 27, 3], "head.norm.weight", 13),
    ],
)
def test_convnext_is_counted_as_its_detectors_are(blocks: list[int], name: str, layer: int) -> None:
    assert layer_of(name, blocks) == layer


def test_vit_is_counted_as_detectron2_counts_it() -> None:
    holder = nn.Module()
    holder.backbone = nn.Module()
    holder.backbone.net = ViT(img_size=32, embed_dim=8, depth=3, num_heads=2, residual_block_indexes=[1])
    factors = layer_factors(holder, 0.7)
    assert len({*factors.values()}) == 5  # a block's convolutions, which no ViT has, are as new as the heads
    for name, factor in factors.items():
        assert factor == get_vit_lr_decay_rate(name, lr_decay_rate=0.7, num_layers=3)


def test_swin_has_a_layer_a_block_and_rates_fall_towards_the_stem() -> None:
    holder = nn.Module()
    holder.swin = SwinTransformer(embed_dim=8, depths=(2, 1, 3, 1), num_heads=(1, 1, 2, 2), window_size=2)
    factors = layer_factors(holder, 0.5)
    powers = [0.5**power for power in range(9)]
    of_block = partial("swin.layers.{}.blocks.{}.attn.qkv.weight".format)
    order = [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1), (2, 2), (3, 0)]
    assert [factors[of_block(*place)] for place in order] == powers[7:0:-1]
    assert factors["swin.patch_embed.proj.weight"] == powers[8]
    assert [factors[f"swin.layers.{stage}.downsample.reduction.weight"] for stage in (0, 1, 2)] == [
        factors[of_block(*place)] for place in ((0, 1), (1, 0), (2, 2))
    ]
    assert factors["swin.norm0.weight"] == 1


def test_rates_and_decay_in_the_optimiser() -> None:
    overrides = ["MODEL.DEVICE", "cpu", "SOLVER.OPTIMIZER", "AdamW", "SOLVER.BASE_LR", 1.0, "SOLVER.WEIGHT_DECAY", 0.1]
    overrides += ["SOLVER.LAYER_DECAY", 0.5, "MODEL.BACKBONE.FREEZE_AT", 0, "SOLVER.WEIGHT_DECAY_BIAS", 0.0]
    cfg = load_config(SHAPES_CONFIG, [*SMALL, *TIMM, "test_convnext", *overrides])
    model = Trainer.build_model(cfg)
    optimizer = Trainer.build_optimizer(cfg, model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = {names[p]: group for group in optimizer.param_groups for p in group["params"]}
    assert groups.keys() == {*names.values()}
    blocks = [1, 2, 4, 2]
    for name, group in groups.items():
        inner = name.removeprefix("backbone.bottom_up.network.")
        assert group["lr"] == 0.5 ** (layer_of("", blocks) - layer_of(inner, blocks))
        matrix = model.get_parameter(name).ndim > 1
        assert group["weight_decay"] == (0.1 if matrix else 0.0), name
    with pytest.raises(InputError, match=r"SOLVER\.LAYER_DECAY counts the layers of ConvNeXt"):
        Trainer.build_optimizer(cfg, Trainer.build_model(load_config(SHAPES_CONFIG, SMALL)))


def test_relative_position_biases_of_swin_do_not_decay() -> None:
    keys = ["MODEL.BACKBONE.NAME", "build_swin_fpn_backbone", "MODEL.BACKBONE.TIMM", "tiny_swin", "MODEL.DEVICE", "cpu"]
    cfg = load_config(SHAPES_CONFIG, [*SMALL, *keys, "MODEL.BACKBONE.FREEZE_AT", 0, "SOLVER.WEIGHT_DECAY", 0.1])
    model = Trainer.build_model(cfg)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = Trainer.build_optimizer(cfg, model).param_groups
    still = {names[p] for group in groups for p in group["params"] if group["weight_decay"] == 0}
    assert still == {name for name in names.values() if "norm" in name or name.endswith("bias_table")}


def test_paths_are_dropped_in_training_alone_and_never_in_frozen_stages() -> None:
    images = torch.rand(2, 3, 64, 64)
    backbone = TimmBackbone("test_convnext", drop_path=0.5, freeze_at=3).train()
    for name, parameter in backbone.named_parameters():
        if name.endswith("gamma"):
            nn.init.ones_(parameter)
    rates = {n: m.drop_prob for n, m in backbone.named_modules() if isinstance(m, DropPath)}
    assert {rate for name, rate in rates.items() if "stages.0" in name or "stages.1" in name} == {0.0}
    assert rates["network.stages.3.blocks.1.drop_path"] == 0.5
    one, other = backbone(images), backbone(images)
    assert all(torch.equal(one[stage], other[stage]) for stage in ("res2", "res3"))
    assert not torch.equal(one["res5"], other["res5"])
    backbone.eval()
    plain = TimmBackbone("test_convnext", drop_path=0.0)
    plain.load_state_dict(backbone.state_dict())
    assert all(torch.equal(stage, backbone(images)[name]) for name, stage in plain.train()(images).items())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["MODEL.BACKBONE.DROP_PATH", 0.1], r"MODEL\.BACKBONE\.DROP_PATH is set, but Detectron2's ResNet"),
        (["MODEL.BACKBONE.DROP_PATH", 1.0], r"MODEL\.BACKBONE\.DROP_PATH 1\.0 is not in \[0, 1\)"),
        (["SOLVER.LAYER_DECAY", 0.0], r"SOLVER\.LAYER_DECAY 0\.0 is not in \(0, 1\]"),
    ],
)
def test_values_out_of_range_are_refused(overrides: list[object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_config(SHAPES_CONFIG, [*SMALL, *overrides])


def test_a_network_that_drops_no_path_is_refused() -> None:
    with pytest.raises(InputError, match="leaves out no blocks"):
        TimmBackbone("densenet121", drop_path=0.1)
