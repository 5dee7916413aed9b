"""Heads are left out; what may act between a network's layers is refused, by its name or by what it takes."""

from functools import cache
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from robust_backbones.checkpoint.beside import check_left_out
from robust_backbones.checkpoint.layouts import find_network
from robust_backbones.errors import InputError
from robust_backbones.models import BackboneSpec, build_backbone

Modules = dict[str, nn.Module | Tensor]


def mlp(*widths: int) -> nn.Module:
    return nn.Sequential(*(nn.Sequential(nn.Linear(*pair), nn.BatchNorm1d(pair[1])) for pair in pairwise(widths)))


def conv(inputs: int, outputs: int, window: int = 1) -> nn.Module:
    return nn.Conv2d(inputs, outputs, window)


@cache
def body(arch: str) -> dict[str, Tensor]:
    with torch.device("meta"):
        return build_backbone(BackboneSpec(arch, 0)).state_dict()


def check(arch: str, prefix: str, modules: Modules, *, in_order: bool = True) -> None:
    tensors = {f"{prefix}{name}": tensor for name, tensor in body(arch).items()}
    for name, module in modules.items():
        parts = {name: module} if isinstance(module, Tensor) else module.state_dict(prefix=f"{name}.")
        tensors |= dict(parts)
    check_left_out(find_network({"state_dict": tensors if in_order else dict(sorted(tensors.items()))}))


@pytest.mark.parametrize(
    ("arch", "prefix", "modules"),
    [
        ("resnet50", "", {"classifier": nn.Linear(2048, 5), "fc_rot": nn.Linear(2048, 4)}),
        ("resnet50", "net.", {"net.fc": mlp(2048, 512, 128), "queue": torch.ones(128, 64), "queue_ptr": torch.ones(1)}),
        ("resnet18", "", {"projection_head": mlp(512, 512, 128), "predictor": mlp(128, 512, 128)}),
        ("resnet50", "", {"l1": mlp(2048, 512), "l2": mlp(512, 256), "l3": mlp(256, 64), "centers": torch.ones(5, 64)}),
        ("resnet50", "online.", {"predictor": mlp(256, 4096, 256), "logit_scale": torch.tensor(1.0)}),
        ("resnet50", "0.", {"1": conv(2048, 256), "2": conv(256, 20)}),
        ("resnet50", "", {"attention_pool": nn.MultiheadAttention(2048, 8), "gem.p": torch.ones(1)}),
        ("resnet50", "", {"aux1": conv(1024, 256), "classifier.1": nn.Linear(2048, 5)}),
        # pytorch-retinanet, an FPN in one class with its network, and DETR
        (
            "resnet50",
            "",
            {"fpn.P4_1": conv(1024, 256), "fpn.P5_1": conv(2048, 256), "regressionModel": conv(256, 36, 3)},
        ),
        ("resnet50", "", {"toplayer": conv(2048, 256), "smooth1": conv(256, 256, 3), "latlayer1": conv(1024, 256)}),
        ("resnet50", "backbone.0.body.", {"transformer.encoder.layers.0": nn.MultiheadAttention(256, 8)}),
        (
            "resnet50",
            "backbone.body.",
            {"backbone.fpn.inner_blocks.0.0": conv(256, 256), "rpn.head.conv": conv(256, 3)},
        ),
        # pose estimation, whose convolutions are transposed, and attention over what a projection gives
        ("resnet18", "", {"deconv_layers.0": nn.ConvTranspose2d(512, 256, 4), "final_layer": conv(256, 17)}),
        ("resnet18", "body.", {"fc1": mlp(512, 256), "attention": mlp(256, 128, 1), "attention_weights": mlp(128, 1)}),
        (
            "resnet50",
            "",
            {"proj1": nn.Linear(2048, 512), "proj2": nn.Linear(512, 128), "criterion.weight": torch.ones(3)},
        ),
        ("resnet50", "module.model.", {"module.attacker.normalize.new_mean": torch.ones(3, 1, 1)}),
    ],
)
def test_what_comes_after_a_network_is_left_out(arch: str, prefix: str, modules: Modules) -> None:
    check(arch, prefix, modules)
    check(arch, prefix, modules, in_order=False)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
@pytest.mark.parametrize("prefix", ["", "backbone."])
@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("att2", mlp(128, 8, 128)),
        ("layer2_attn", conv(128, 128)),
        ("cbam.spatial", conv(2, 1, 7)),
        ("layer3_se.fc", mlp(256, 16, 256)),
        ("attention.0", conv(64, 64)),
        ("multihead_attn", nn.MultiheadAttention(128, 8)),
        ("eca_3", nn.Conv1d(1, 1, 3)),
        ("prompt", torch.ones(1, 3, 8, 8)),
        ("border", torch.ones(3, 4, 8)),
        ("colours", conv(3, 3)),
        ("purifier", nn.Sequential(conv(3, 8, 3), conv(8, 3, 3))),
        # what a norm does to images may be known from elsewhere, and such names are no heads'
        ("input_norm", nn.BatchNorm2d(3)),
        ("centre", nn.BatchNorm2d(3, affine=False)),
        ("instance", nn.InstanceNorm2d(3, affine=True)),
        ("fc_attn2", mlp(128, 8, 128)),
        ("classwise_gate", conv(64, 64)),
        ("exit_gate", conv(128, 1)),
    ],
)
def test_what_may_act_within_a_network_is_refused(
    arch: str, prefix: str, name: str, module: nn.Module | Tensor
) -> None:
    for whole in (name, f"{prefix}{name}"):
        with pytest.raises(InputError, match=f"it holds {whole}.* give --arch {arch}"):
            check(arch, prefix, {whole: module, "head": nn.Linear(512, 5)})


@pytest.mark.parametrize(
    ("name", "module"),
    [("refine", conv(512, 512)), ("mix", conv(1024, 8)), ("proj2", conv(512, 64)), ("scale", torch.ones(1, 512, 1, 1))],
)
def test_what_takes_the_channels_of_an_inner_stage_is_refused(name: str, module: nn.Module | Tensor) -> None:
    with pytest.raises(InputError, match=rf"{name}.*, which as it takes the \d+ channels of an inner stage may be"):
        check("resnet50", "", {name: module})
    check("resnet50", "", {"project": mlp(2048, 512, 1024), name: module})  # a head gives these


def test_all_channels_of_a_vit_are_those_of_its_last_block() -> None:
    arch = "vit_tiny_patch16_224"
    check(arch, "backbone.", {"classifier": nn.Linear(192, 5)})
    with pytest.raises(InputError, match=r"adapters\.0\.weight, which by its name"):
        check(arch, "backbone.", {"adapters.0": nn.Linear(192, 8)})
