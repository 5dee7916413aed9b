"""ConvNeXt, Swin and ViT by the names of torchvision, transformers, RobustBench, ARES and their authors, as timm's.

The networks are those of the libraries, built here with random weights; what is read has to give their logits.
"""

import argparse
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
import transformers
from timm.models import convnext as timm_convnext
from timm.models import swin_transformer as timm_swin
from timm.models._hub import save_for_hf
from torch import Tensor, nn
from torchvision import models

from robust_backbones.attacks import AttackConfig, pgd
from robust_backbones.checkpoint.families import FAMILIES
from robust_backbones.checkpoint.format import BY_FILE
from robust_backbones.checkpoint.layouts import find_network
from robust_backbones.checkpoint.sources import Statement, read_checkpoint
from robust_backbones.errors import InputError
from robust_backbones.models import IMAGENET_MEAN, IMAGENET_STD, BackboneSpec, backbone_with, spec_from
from robust_backbones.threat_models import ThreatModel

STATED = Statement(mean=IMAGENET_MEAN, std=IMAGENET_STD)


def shaken(network: nn.Module) -> nn.Module:
    """With weights that leave no layer without effect: ConvNeXt's scales begin at 1e-6."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        if "scale" in name or name.endswith("gamma"):
            parameter.data.uniform_(0.3, 0.6, generator=generator)
        elif parameter.ndim == 1 or "bias_table" in name or "pos" in name:
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network.eval()


@torch.no_grad()
def logits_differ(source: Callable[[Tensor], Any], network: nn.Module, size: int = 224) -> float:
    """The largest difference on random pixels, in units of the largest logit."""
    images = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(1))
    expected = source(images)
    expected = getattr(expected, "logits", expected)
    return ((network(images) - expected).abs().max() / expected.abs().max()).item()


def save(path: Path, state_dict: dict[str, Tensor]) -> Path:
    torch.save(state_dict, path)
    return path


@pytest.mark.parametrize(
    ("name", "arch", "sizes"),
    [
        ("convnext_tiny", "convnext_tiny", (236, "bilinear")),
        ("swin_t", "swin_tiny_patch4_window7_224", (232, "bicubic")),
        pytest.param("vit_b_16", "vit_base_patch16_224", (256, "bilinear"), marks=pytest.mark.slow),
    ],
)
def test_torchvision_s_are_read(name: str, arch: str, sizes: tuple[int, str], tmp_path: Path) -> None:
    source = shaken(getattr(models, name)(num_classes=5))
    checkpoint = read_checkpoint(save(tmp_path / "source.pth", source.state_dict()))
    spec = BackboneSpec(arch, 5, val_resize=sizes[0], interpolation=sizes[1])
    assert (checkpoint.layout, checkpoint.spec) == ("torchvision", spec)
    assert logits_differ(source, checkpoint.build()) < 1e-5


def test_a_small_vit_of_torchvision_s_is_read(tmp_path: Path) -> None:
    sizes = {"num_layers": 12, "num_heads": 3, "hidden_dim": 192, "mlp_dim": 768}
    source = shaken(models.VisionTransformer(image_size=64, patch_size=16, num_classes=5, **sizes))
    checkpoint = read_checkpoint(save(tmp_path / "source.pth", source.state_dict()))
    assert (checkpoint.spec.arch, checkpoint.spec.image_size) == ("vit_tiny_patch16_224", 64)
    assert logits_differ(source, checkpoint.build(), 64) < 1e-5


@pytest.mark.parametrize(
    ("name", "arch"),
    [(f"convnext_{size}", f"convnext_{size}") for size in ("small", "base", "large")]
    + [("swin_s", "swin_small_patch4_window7_224"), ("swin_b", "swin_base_patch4_window7_224")]
    + [
        ("vit_b_16", "vit_base_patch16_224"),
        ("vit_b_32", "vit_base_patch32_224"),
        ("vit_l_16", "vit_large_patch16_224"),
    ]
    + [("vit_l_32", "vit_large_patch32_224")],
)
def test_every_size_of_torchvision_s_is_recognised(name: str, arch: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        network = find_network(dict(getattr(models, name)().state_dict()))
    assert (network.library, network.spec.arch, network.spec.num_classes) == ("torchvision", arch, 1000)


Transformers = tuple[Any, Any, dict[str, Any], str, float]
SMALL: dict[str, Transformers] = {
    "convnext": (transformers.ConvNextConfig, transformers.ConvNextForImageClassification, {}, "convnext_tiny", 1e-12),
    "swin": (transformers.SwinConfig, transformers.SwinForImageClassification, {}, "swin_tiny_patch4_window7_224", 0.0),
    "vit": (
        transformers.ViTConfig,
        transformers.ViTForImageClassification,
        {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768},
        "vit_tiny_patch16_224",
        1e-12,
    ),
}


def of_transformers(kind: str, folder: Path, **changes: Any) -> Any:
    """A network of theirs, which is saved in the folder by their own code."""
    config, network, sizes, *_ = SMALL[kind]
    source = shaken(network(config(**sizes, **changes, num_labels=3)))
    source.save_pretrained(folder)
    processor = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return source


@pytest.mark.parametrize("kind", SMALL)
def test_files_of_transformers_are_read_with_their_epsilon(kind: str, tmp_path: Path) -> None:
    source = of_transformers(kind, tmp_path)
    *_, arch, epsilon = SMALL[kind]
    checkpoint = read_checkpoint(tmp_path / "model.safetensors")
    spec = checkpoint.spec
    assert (checkpoint.layout, spec.arch, spec.num_classes, spec.mean) == ("transformers", arch, 3, (0.5, 0.5, 0.5))
    assert spec.norm_epsilon == epsilon
    assert spec_from(spec.to_dict()) == spec
    assert logits_differ(source, checkpoint.build()) < 1e-5
    # By the names that transformers has in memory, too.
    again = tmp_path / "model.safetensors"
    safetensors.torch.save_file(source.state_dict(), again)
    assert logits_differ(source, read_checkpoint(again).build()) < 1e-5


def test_a_small_epsilon_is_not_timm_s(tmp_path: Path) -> None:
    """Where a norm's input is small, the two give other logits: what the spec's number is for."""
    source = of_transformers("vit", tmp_path)
    with torch.no_grad():
        source.vit.embeddings.patch_embeddings.projection.weight.mul_(1e-4)
        for tensor in (
            source.vit.embeddings.patch_embeddings.projection.bias,
            source.vit.embeddings.position_embeddings,
        ):
            tensor.mul_(1e-3)
    source.save_pretrained(tmp_path)
    checkpoint = read_checkpoint(tmp_path / "model.safetensors")
    assert logits_differ(source, checkpoint.build()) < 1e-4
    as_timm = timm.create_model("vit_tiny_patch16_224", num_classes=3).eval()
    as_timm.load_state_dict(checkpoint.state_dict)
    assert logits_differ(source, as_timm) > 1e-2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "quick_gelu"}, "hidden_act is 'quick_gelu'"),
        ({"num_attention_heads": 6}, "6 heads, timm's vit_tiny_patch16_224 has 3"),
        ({"layer_norm_eps": "small"}, "layer_norm_eps is 'small'"),
        ({"model_type": "deit"}, r"config\.json beside it has the model_type 'deit': save its vit by itself"),
        (
            {"backbone_config": {"model_type": "vit_mae"}, "model_type": "x"},
            r"config\.json beside it has the model_type 'vit_mae'",
        ),
        (None, r"put its config\.json beside it"),
    ],
)
def test_what_no_tensor_shows_is_asked_of_the_configuration(change: Any, message: str, tmp_path: Path) -> None:
    of_transformers("vit", tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change)) if change else path.unlink()
    with pytest.raises(InputError, match=message):
        read_checkpoint(tmp_path / "model.safetensors")


def in_old_names(network: nn.Module) -> dict[str, Tensor]:
    """timm before 0.9: a stage of Swin ends with its reduction, and buffers are in the file."""
    tensors = {}
    for name, tensor in network.state_dict().items():
        parts = name.replace("head.fc.", "head.").split(".")
        if parts[2:3] == ["downsample"]:
            parts[1] = str(int(parts[1]) - 1)
        tensors[".".join(parts)] = tensor
    index = torch.zeros(49, 49, dtype=torch.int64)
    return {
        **tensors,
        "layers.0.blocks.0.attn.relative_position_index": index,
        "layers.0.blocks.1.attn_mask": index + 0.0,
    }


def test_robustbench_s_swin_of_old_timm_is_read(tmp_path: Path) -> None:
    """Liu2023Comprehensive_Swin-B and the like: behind their normalisation, saved by a timm before 0.9."""
    source = shaken(timm.create_model("swin_tiny_patch4_window7_224", num_classes=4))
    old = in_old_names(source)
    # timm's own converter agrees with what we call its old names.
    converted = timm_swin.checkpoint_filter_fn(dict(old), source)
    assert all(torch.equal(tensor, converted[name]) for name, tensor in source.state_dict().items())
    normalizer = {"normalize.mean": torch.full((1, 3, 1, 1), 0.25), "normalize.std": torch.full((1, 3, 1, 1), 0.125)}
    path = save(tmp_path / "swin.pt", {**normalizer, **{f"model.{name}": tensor for name, tensor in old.items()}})
    checkpoint = read_checkpoint(path)
    assert (checkpoint.layout, checkpoint.spec.arch) == ("robustbench", "swin_tiny_patch4_window7_224")
    assert checkpoint.spec.mean == (0.25, 0.25, 0.25)
    assert logits_differ(source, checkpoint.build()) == 0


@pytest.mark.parametrize(
    ("said", "arch"),
    [
        *((name, name) for name in ("resnet10t", "resnet18d", "legacy_seresnet18", "ecaresnet26t")),
        ("seresnext26tn_32x4d", "seresnext26t_32x4d"),
        ("vit_tiny_patch16_224_in21k", "vit_tiny_patch16_224"),
        ("tf_efficientnet_b0_ns", "tf_efficientnet_b0"),
    ],
)
def test_a_folder_of_timm_says_what_it_holds(said: str, arch: str, tmp_path: Path) -> None:
    """Also a ResNet that is none of ours, in a folder of its name, and a network by the name of earlier versions."""
    source = shaken(timm.create_model(arch, num_classes=4))
    save_for_hf(source, tmp_path / said, safe_serialization="both")
    config = json.loads((tmp_path / said / "config.json").read_text())
    for content in (config | {"architecture": said}, config["pretrained_cfg"] | {"architecture": said}):
        content = content | {"mean": [0.25] * 3} if "mean" in content else content
        (tmp_path / said / "config.json").write_text(json.dumps(content))  # in its present form, and timm 0.5's
        for name in ("model.safetensors", "pytorch_model.bin"):
            checkpoint = read_checkpoint(tmp_path / said / name)
            assert (checkpoint.layout, checkpoint.spec.arch, checkpoint.said["mean"]) == ("timm", arch, BY_FILE)
            assert checkpoint.spec.mean == tuple(content.get("mean", source.pretrained_cfg["mean"]))
    assert logits_differ(source, checkpoint.build()) == 0


def test_a_folder_of_timm_may_have_the_names_of_old_timm(tmp_path: Path) -> None:
    source = shaken(timm.create_model("swin_tiny_patch4_window7_224", num_classes=4))
    path = save(tmp_path / "pytorch_model.bin", in_old_names(source))
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "swin_tiny_patch4_window7_224"}))
    assert logits_differ(source, read_checkpoint(path, statement=STATED).build()) == 0


def test_a_resnet_with_the_tensors_of_ours_is_read_by_the_option_that_the_refusal_names(tmp_path: Path) -> None:
    source = shaken(timm.create_model("resnetblur18", num_classes=4))
    save_for_hf(source, tmp_path, safe_serialization=True)
    with pytest.raises(InputError, match="has the tensors of resnet18 and other features") as refused:
        read_checkpoint(tmp_path / "model.safetensors")
    (arch,) = re.findall(r"if it is right, give --arch (\w+)", str(refused.value))
    read = read_checkpoint(tmp_path / "model.safetensors", statement=Statement(arch=arch))
    assert logits_differ(source, read.build()) == 0
    assert logits_differ(source, backbone_with(BackboneSpec("resnet18", 4), read.state_dict).eval()) > 1e-4


@pytest.mark.parametrize("arch", ["resnet18d", "resnet10t", "seresnext26t_32x4d"])
def test_a_resnet_of_timm_that_nothing_describes_is_asked_for(arch: str, tmp_path: Path) -> None:
    path = of_timm(arch, tmp_path / "net.pth", dict)
    with pytest.raises(InputError, match=r"of another network of timm, give its name \(--arch NAME"):
        read_checkpoint(path)
    assert read_checkpoint(path, statement=replace(STATED, channel_order="RGB", arch=arch)).spec.arch == arch


def test_ares_says_by_its_file_s_name_how_it_is_fed(tmp_path: Path) -> None:
    """timm's ViT takes 0.5 as mean; those of ARES do not, and a file by another name says nothing of it."""
    tensors = timm.create_model("vit_tiny_patch16_224", num_classes=4).state_dict()
    checkpoint = read_checkpoint(save(tmp_path / "ARES_ViT_tiny_patch16_224_AT.pth", tensors))
    assert (checkpoint.layout, checkpoint.spec.mean) == ("ares", IMAGENET_MEAN)
    with pytest.raises(InputError, match="does not say what it was fed with: give --mean"):
        read_checkpoint(save(tmp_path / "vit.pth", tensors))
    assert read_checkpoint(tmp_path / "vit.pth", statement=STATED).spec.arch == "vit_tiny_patch16_224"


class ChannelsFirst(nn.Module):
    """A layer norm over channels, as Singh et al. write it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(1, keepdim=True)
        normal = centred / (centred.pow(2).mean(1, keepdim=True) + 1e-6).sqrt()
        return self.weight[:, None, None] * normal + self.bias[:, None, None]


class Stem(nn.Module):
    """RobustBench's ConvBlock and its like."""

    def __init__(self, channels: tuple[int, ...], strides: tuple[int, ...], last: int = 0) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs, stride in zip((3, *channels[:-1]), channels, strides, strict=True):
            layers += [nn.Conv2d(inputs, outputs, 3, stride, 1), ChannelsFirst(outputs), nn.GELU()]
        self.stem = nn.Sequential(*layers, *([nn.Conv2d(channels[-1], last, 1)] if last else []))

    def forward(self, x: Tensor) -> Tensor:
        return self.stem(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("normalizes", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_robustbench_s_convnext_with_a_conv_stem_is_read(normalizes: bool, tmp_path: Path) -> None:
    """Singh2023Revisiting_*: timm's ConvNeXt with its stem replaced, fed with images as they are."""
    source: Any = timm.create_model("convnext_tiny", num_classes=4)
    source.stem = Stem((48, 96), (2, 2))
    shaken(source)
    tensors = {f"model.{name}": tensor for name, tensor in source.state_dict().items()}
    if normalizes:
        tensors |= {f"normalize.{name}": torch.full((1, 3, 1, 1), 0.5) for name in ("mean", "std")}
    checkpoint = read_checkpoint(save(tmp_path / "convstem.pt", {"state_dict": tensors}))
    assert (checkpoint.layout, checkpoint.spec.arch) == ("convstem", "convnext_tiny_convstem")
    assert (checkpoint.spec.mean, checkpoint.spec.std) == (
        ((0.5,) * 3,) * 2 if normalizes else ((0.0,) * 3, (1.0,) * 3)
    )
    assert logits_differ(source, checkpoint.build(), 64) < 1e-5
    # It can be attacked: the ball holds, and the loss rises.
    model, images, labels = checkpoint.model(), torch.rand(2, 3, 64, 64), torch.tensor([0, 1])
    attacked = pgd(model, images, labels, ThreatModel("Linf", 4 / 255), AttackConfig(steps=2))
    assert (attacked - images).abs().max() <= 4 / 255 + 1e-6
    with torch.no_grad():
        assert F.cross_entropy(model(attacked), labels) > F.cross_entropy(model(images), labels)


def test_robustbench_s_vit_with_a_conv_stem_is_read(tmp_path: Path) -> None:
    source: Any = timm.create_model("deit_small_patch16_224", num_classes=4)
    source.patch_embed.proj = Stem((48, 96, 192, 384), (2, 2, 2, 2), 384)
    shaken(source)
    tensors = {f"module.base_model.{name}": tensor for name, tensor in source.state_dict().items()}
    checkpoint = read_checkpoint(save(tmp_path / "convstem.pt", tensors))
    assert (checkpoint.layout, checkpoint.spec.arch) == ("convstem", "vit_small_patch16_224_convstem")
    assert checkpoint.spec.mean == IMAGENET_MEAN  # RobustBench puts a normalisation before this one, not into its file
    assert logits_differ(source, checkpoint.build()) < 1e-5


@pytest.mark.parametrize(
    ("size", "dims", "depths", "channels"),
    [
        ("small", (96, 192, 384, 768), (3, 3, 27, 3), (48, 96)),
        ("base", (128, 256, 512, 1024), (3, 3, 27, 3), (64, 96, 128)),
        ("large", (192, 384, 768, 1536), (3, 3, 27, 3), (96, 144, 192)),
    ],
)
def test_every_conv_stem_has_its_shapes(size: str, dims: Any, depths: Any, channels: tuple[int, ...]) -> None:
    with torch.device("meta"):
        source: Any = timm.models.ConvNeXt(dims=dims, depths=depths)
        source.stem = Stem(channels, (2, 2, 1)[: len(channels)])
        network = find_network(dict(source.state_dict()))
    assert network.spec.arch == f"convnext_{size}_convstem"


def test_a_resnet_of_ares_with_another_activation_is_refused(tmp_path: Path) -> None:
    """act_gelu of ares/model/imagenet_model_zoo.py; the tensors are those of the one with ReLU."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in models.wide_resnet50_2(num_classes=2).state_dict().items()}
    tensors = {name: torch.zeros(shape, dtype=torch.float16) for name, shape in shapes.items()}
    with pytest.raises(InputError, match="trained ARES_Wide_ResNet50_2_AT with GELU"):
        read_checkpoint(save(tmp_path / "ARES_Wide_ResNet50_2_AT.pth", tensors))


def test_the_authors_names_of_convnext_are_read(tmp_path: Path) -> None:
    source = shaken(timm.create_model("convnext_tiny", num_classes=4))
    new = {"stem": "downsample_layers.0", "head.norm": "norm", "head.fc": "head"}
    old = {}
    for name, tensor in source.state_dict().items():
        for mine, theirs in new.items():
            name = f"{theirs}{name.removeprefix(mine)}" if name.startswith(f"{mine}.") else name
        for mine, theirs in ((".blocks.", "."), ("conv_dw", "dwconv"), ("mlp.fc", "pwconv")):
            name = name.replace(mine, theirs)
        parts = name.split(".")
        old[".".join(["downsample_layers", parts[1], *parts[3:]] if parts[2:3] == ["downsample"] else parts)] = tensor
    converted = timm_convnext.checkpoint_filter_fn(dict(old), source)
    assert all(torch.equal(tensor, converted[name]) for name, tensor in source.state_dict().items())
    checkpoint = read_checkpoint(save(tmp_path / "convnext.pth", {"model": old}))
    assert (checkpoint.layout, checkpoint.spec.arch, checkpoint.spec.mean) == (
        "convnext",
        "convnext_tiny",
        IMAGENET_MEAN,
    )
    assert logits_differ(source, checkpoint.build()) == 0


def test_position_embeddings_tell_the_size(tmp_path: Path) -> None:
    source = timm.create_model("vit_tiny_patch16_224", num_classes=4, img_size=384).eval()
    checkpoint = read_checkpoint(save(tmp_path / "vit.pth", source.state_dict()), statement=STATED)
    assert (checkpoint.spec.arch, checkpoint.spec.image_size) == ("vit_tiny_patch16_224", 384)
    assert logits_differ(source, checkpoint.build(), 384) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: {k: v for k, v in t.items() if ".k_proj." not in k and ".key." not in k},
            "query, key and value belong",
        ),
        (
            lambda t: {k: v[..., :100] if v.shape[-1] == 192 else v for k, v in t.items()},
            "timm has no vit of 100 channels",
        ),
        (
            lambda t: {**t, "vit.layers.0.attention.more.weight": torch.ones(1)},
            r"has no place for blocks|no place for .*more",
        ),
    ],
)
def test_what_is_no_such_network_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    source = of_transformers("vit", tmp_path)
    safetensors.torch.save_file(
        {name: tensor.contiguous() for name, tensor in change(source.state_dict()).items()},
        tmp_path / "model.safetensors",
    )
    with pytest.raises(InputError, match=message):
        read_checkpoint(tmp_path / "model.safetensors")


def test_a_clip_s_activation_has_to_be_said(tmp_path: Path) -> None:
    path = save(tmp_path / "clip.pt", {"visual.positional_embedding": torch.ones(50, 8)})
    with pytest.raises(InputError, match="no tensor of a CLIP tells its activation"):
        read_checkpoint(path)


def test_no_name_leads_to_two() -> None:
    """Of a library and a family, one tensor of timm's has one name, or one that transformers renamed."""
    for row in FAMILIES:
        assert len(set(row.names)) == len(row.names)
        assert row.library in ("torchvision", "transformers", "timm", "the authors of ConvNeXt")


def of_timm(arch: str, path: Path, wrap: Callable[[dict[str, Tensor]], Any], **options: Any) -> Path:
    torch.manual_seed(0)
    torch.save(wrap(timm.create_model(arch, num_classes=3, **options).state_dict()), path)
    return path


@pytest.mark.parametrize("arch", ["vit_tiny_patch16_224", "test_convnext", "test_efficientnet"])
def test_another_activation_is_refused_wherever_timm_says_it(arch: str, tmp_path: Path) -> None:
    """No tensor shows it; what is the family's own is no reason."""
    args = {"args": argparse.Namespace(model_kwargs={"act_layer": "relu"}), "arch": arch}
    path = of_timm(arch, tmp_path / "training.pth.tar", lambda tensors: {"state_dict": tensors} | args)
    fed = Statement(mean=(0.5,) * 3, std=(0.5,) * 3, arch=arch)
    with pytest.raises(InputError, match=r"args\.model_kwargs says that its act_layer is 'relu'"):
        read_checkpoint(path, statement=fed)
    path = of_timm(arch, tmp_path / "pytorch_model.bin", dict)
    said = {"architecture": arch, "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (tmp_path / "config.json").write_text(json.dumps(said | {"model_args": {"act_layer": "relu"}}))
    with pytest.raises(InputError, match=r"config\.json says that its act_layer is 'relu'"):
        read_checkpoint(path)
    (tmp_path / "config.json").write_text(json.dumps(said | {"model_args": {"act_layer": "gelu"}}))
    if arch == "test_efficientnet":
        with pytest.raises(InputError, match="act_layer is 'gelu'"):
            read_checkpoint(path)
    else:
        assert read_checkpoint(path).spec.arch == arch


def test_heads_that_no_tensor_shows_are_asked_for(tmp_path: Path) -> None:
    """MoCo v3's ViT-S has 12, all others 6."""

    def moco(prefix: str) -> Callable[[dict[str, Tensor]], Any]:
        return lambda tensors: {"arch": "vit_small", "state_dict": {prefix + name: t for name, t in tensors.items()}}

    fed = Statement(mean=(0.5,) * 3, std=(0.5,) * 3, channel_order="RGB")
    path = of_timm("vit_small_patch16_224", tmp_path / "linear.pth.tar", moco("module."), num_heads=12, depth=12)
    with pytest.raises(InputError, match=r"12 heads in MoCo v3 and 6 elsewhere.*give --arch vit_small_patch16_224"):
        read_checkpoint(path, statement=fed)
    assert read_checkpoint(path, statement=replace(fed, arch="vit_small_patch16_224")).spec.num_classes == 3
    path = of_timm("vit_small_patch16_224", tmp_path / "moco.pth.tar", moco("module.base_encoder."), num_heads=12)
    with pytest.raises(InputError, match="MoCo v3's ViT-S has 12 heads"):
        read_checkpoint(path)
