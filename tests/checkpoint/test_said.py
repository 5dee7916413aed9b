"""Nothing about a file is taken for granted: values, variants and second networks are said, chosen or refused."""

import argparse
import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from robust_backbones.checkpoint.convert import convert_file, read_backbone
from robust_backbones.checkpoint.format import ASSUMED, BY_FILE, BY_USER, READING
from robust_backbones.checkpoint.sources import Statement, read_checkpoint
from robust_backbones.commands import convert
from robust_backbones.errors import InputError
from robust_backbones.models import IMAGENET_MEAN, IMAGENET_STD, BackboneSpec, build_backbone

STATED = Statement(mean=IMAGENET_MEAN, std=IMAGENET_STD, channel_order="RGB", stride_in_1x1=False)
UNITS_OF_255 = {"mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375]}
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    return build_backbone(BackboneSpec("resnet18", 3)).half().state_dict()


@pytest.fixture(scope="module")
def bottlenecks() -> Tensors:
    return build_backbone(BackboneSpec("resnet50", 3)).half().state_dict()


def under(prefix: str, tensors: Tensors, more: float = 0) -> Tensors:
    return {prefix + name: tensor + more for name, tensor in tensors.items()}


def options(error: str) -> list[str]:
    """The options that a message tells to give."""
    return shlex.split(error[error.index("--") :].split(",")[0].split(", if")[0])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architecture": "resnetaa18"}, "says that it is resnetaa18"),
        ({"architecture": "resnetblur18.in1k"}, r"says that it is resnetblur18\.in1k"),
        ({"architecture": "resnet18", "model_args": {"output_stride": 8}}, "output_stride is 8"),
        ({"architecture": "resnet18", "model_args": {"act_layer": "silu"}}, "act_layer is 'silu'"),
        ({"model_type": "resnet", "hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"model_type": "resnet", "downsample_in_first_stage": True}, "downsample_in_first_stage is True"),
        ({"model_type": "detr", "backbone": "resnet18", "dilation": True}, "dilation is True"),
        ({"model_type": "timm_backbone", "output_stride": 16}, "output_stride is 16"),
        ({"backbone_config": {"model_type": "timm_backbone", "backbone": "resnetaa18"}}, "says that it is resnetaa18"),
        ({"model_type": "upernet", "backbone_config": {"model_type": "resnet", "hidden_act": "gelu"}}, "is 'gelu'"),
        ({"architecture": "resnet18", "pretrained_cfg": UNITS_OF_255}, "--mean 0.485 0.456 0.406"),
    ],
)
def test_a_variant_without_tensors_of_its_own_is_refused(
    tmp_path: Path, tensors: Tensors, config: dict[str, Any], message: str
) -> None:
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    assert read_checkpoint(tmp_path / "model.safetensors", statement=STATED).spec.arch == "resnet18"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        read_checkpoint(tmp_path / "model.safetensors", statement=None if "pretrained_cfg" in config else STATED)


@pytest.mark.parametrize("architecture", ["resnet18", "resnet18.a1_in1k", "tv_resnet18", "gluon_resnet18_v1b"])
def test_other_names_of_the_same_network_are_known(tmp_path: Path, tensors: Tensors, architecture: str) -> None:
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    cfg = {"mean": [0.5] * 3, "std": [0.5] * 3}
    config = {"architecture": architecture, "model_args": {"num_classes": 3}, "pretrained_cfg": cfg}
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = read_checkpoint(tmp_path / "model.safetensors")
    assert checkpoint.spec.mean == (0.5,) * 3
    assert checkpoint.said == {**dict.fromkeys(READING, BY_FILE), "channel_order": ASSUMED}


@pytest.mark.parametrize(
    "entries",
    [
        {"arch": "resnetblur18"},
        {"pytorch-lightning_version": "2", "hyper_parameters": {"backbone": "resnetaa18"}},
        {"model_args": {"act_layer": "silu"}},
        {"args": argparse.Namespace(bn_eps=1e-3)},
        {"config": {"replace_stride_with_dilation": [False, False, True]}},
        {"hyper_parameters": {"output_stride": 8}},
        {"model_config": {"aa_layer": "blur"}},
        {"hyper_parameters": {"model": {"kwargs": argparse.Namespace(output_stride=16)}}},
        {"cfg": {"stages": [{"activation": "silu"}]}},
        {"cfg": {"activation": "nn.LeakyReLU", "context": {}}},
        {"cfg": {"context": {"activation": {"type": "GELU"}}}},
        {"act_layer": "silu"},
        *({"args": {name: "silu"}} for name in ("activation_fn", "activation_function", "act", "non_linearity")),
        {"args": argparse.Namespace(dilation=True)},  # DETR's
        {"cfg": {"MODEL": {"last_stride": 1}}},
        *({"cfg": {"model": {name: True}}} for name in ("cifar_stem", "no_maxpool", "small_images")),
        {"hyper_parameters": {"maxpool1": False}},  # of Lightning Bolts
        {"hparams": {"batch_norm_epsilon": 1e-3}},
        {"hyper_parameters": {"remove_first_maxpool": True}},
        {"arch": "se_resnet18"},
        {"args": argparse.Namespace(model="skresnet18")},
        {"meta": {"config": "backbone=dict(type='ResNet', dilations=(1, 1, 2, 4))"}},
        {"meta": {"cfg": '{"backbone": {"type": "ResNet", "dilations": [1, 1, 2, 4]}}'}},
    ],
)
def test_a_variant_named_in_the_file_is_refused(tmp_path: Path, tensors: Tensors, entries: dict[str, Any]) -> None:
    path = tmp_path / "file.pth"
    usual = argparse.Namespace(bn_eps=None, output_stride=32, act_layer="relu", replace_stride_with_dilation=None)
    usual.head, usual.activation = {"activation": "gelu"}, "sigmoid"  # of what comes after the network
    meta = {"config": "dict(type='ResNet', dilations=(1, 1, 1, 1), block_dilations=[2, 4])"}
    own = {
        "activation": torch.nn.ReLU,
        "act_fn": "nn.ReLU",
        "act": True,
        "text": {"hidden_act": "gelu"},
        "mlp": {"activation": "gelu"},
        "tokenizer": {"activation": "gelu"},
        "discriminator": {"act_layer": "leaky_relu"},
        "neck": {"activation": "swish"},
        "critic": {"_target_": "models.Discriminator", "activation": "elu"},
    }
    own |= {"cfg": [{"activation": one} for one in ("RELU", {"type": "ReLU"}, torch.nn.ReLU(), "log_softmax", "tanh")]}
    own |= {"maxpool1": True, "no_maxpool": False, "small_images": False, "max_pool": 2}
    own |= {"replace_stride_with_dilation": np.zeros(3, bool), "noise": {"mean": [0.0] * 3, "std": [0.1] * 3}}
    content = {"state_dict": tensors, "arch": "my resnet", "args": usual, "meta": meta, "hyper_parameters": own}
    torch.save(content, path)
    read_checkpoint(path, statement=STATED)
    torch.save({"state_dict": tensors, **entries}, path)
    with pytest.raises(InputError, match="other features") as refused:
        read_checkpoint(path, statement=STATED)
    if "option" in str(refused.value):
        assert "save its state_dict alone" in str(refused.value)


def test_a_normaliser_in_units_of_0_255_is_mended_by_what_the_message_says(tmp_path: Path, tensors: Tensors) -> None:
    layer = {f"0.{name}": torch.tensor(values).view(1, 3, 1, 1) for name, values in UNITS_OF_255.items()}
    path = tmp_path / "file.pth"
    torch.save(layer | under("1.", tensors), path)
    with pytest.raises(InputError, match="divided by 255") as refused:
        read_checkpoint(path, statement=Statement())
    parsed = convert.parse([str(path), "out.pkl", *options(str(refused.value))])
    checkpoint = convert.read(parsed)
    assert (checkpoint.spec.mean, checkpoint.spec.std) == (IMAGENET_MEAN, IMAGENET_STD)
    assert checkpoint.said["mean"] == BY_USER


def test_what_is_assumed_is_marked_in_the_written_file_and_refused_on_demand(
    tmp_path: Path, bottlenecks: Tensors
) -> None:
    path, converted = tmp_path / "file.pth", tmp_path / "out.pkl"
    torch.save(bottlenecks, path)
    checkpoint = read_checkpoint(path, statement=Statement(mean=IMAGENET_MEAN, std=IMAGENET_STD))
    said = {"mean": BY_USER, "std": BY_USER, "channel_order": ASSUMED, "stride_in_1x1": ASSUMED}
    assert checkpoint.said == said
    assert "RGB (assumed)" in convert_file(checkpoint, converted).reading
    assert read_backbone(converted)[1].said == said
    again = read_checkpoint(converted).said
    assert again == {**said, "mean": BY_FILE, "std": BY_FILE}  # an assumption stays one
    with pytest.raises(InputError, match="neither it nor you say") as refused:
        read_checkpoint(path, require_said=True)
    parsed = convert.parse([str(path), "out.pkl", "--require-said", *options(str(refused.value))])
    assert set(convert.read(parsed).said.values()) == {BY_USER}


@pytest.mark.parametrize(
    ("key", "prefix"), [("net", None), ("network", None), (None, "model."), (None, "ema_model"), ("b", "model.")]
)
def test_several_networks_are_listed_and_one_is_chosen(
    tmp_path: Path, tensors: Tensors, key: str | None, prefix: str | None
) -> None:
    path = tmp_path / "file.pth"
    if key in ("net", "network"):
        content: dict[str, Any] = {"net": tensors, "network": under("", tensors, more=1)}
        chosen = content[key]
    else:
        both = under("model.", tensors) | under("ema_model.", tensors, more=1)
        content = both if key is None else {"a": under("model.", tensors, more=2), "b": both}
        chosen = tensors if (prefix or "").startswith("model") else under("", tensors, more=1)
    torch.save(content, path)
    with pytest.raises(InputError, match=r"resnet18, 122 tensors, 21\.3 MB") as refused:
        read_checkpoint(path, statement=STATED)
    assert all(f"--{name} {value}" in str(refused.value) for name, value in (("key", key), ("prefix", prefix)) if value)
    checkpoint = read_checkpoint(path, key=key, prefix=prefix, statement=STATED)
    assert all(torch.equal(tensor, chosen[name]) for name, tensor in checkpoint.state_dict.items())
    with pytest.raises(InputError, match="it holds no network at --key 'other'"):
        read_checkpoint(path, key="other", statement=STATED)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("layer1.0.bn1.running_var", torch.full((64,), -0.5), "a variance of -0.5, below 0"),
        ("layer1.0.conv1.weight", torch.ones(64, 64, 3, 3, dtype=torch.int8), "holds int8, not floats"),
        ("layer1.0.conv1.weight", torch.ones(64, 64, 3, 3, dtype=torch.bool), "holds bool, not floats"),
    ],
)
def test_weights_that_no_network_has_are_refused_by_name(
    tmp_path: Path, tensors: Tensors, name: str, value: Tensor, message: str
) -> None:
    torch.save({**tensors, name: value}, tmp_path / "file.pth")
    with pytest.raises(InputError, match=f"{name} holds .*" if message.startswith("a ") else name) as refused:
        read_checkpoint(tmp_path / "file.pth")
    assert message in str(refused.value)


@pytest.mark.parametrize("name", ["_mean", "normalize.loc", "image_mean", "0.means"])
def test_a_normaliser_by_another_name_is_asked_for(tmp_path: Path, tensors: Tensors, name: str) -> None:
    path = tmp_path / "file.pth"
    torch.save({name: torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)} | tensors, path)
    with pytest.raises(InputError, match=rf"holds {name} \(0\.5 0\.4 0\.3\), which may normalise its input"):
        read_checkpoint(path)
    assert read_checkpoint(path, statement=STATED).said["mean"] == BY_USER


@pytest.mark.parametrize("config", ["backbone=dict(type='ResNet', style='caffe')", '{"backbone": {"style": "caffe"}}'])
def test_mmdetections_style_says_where_it_strides(tmp_path: Path, bottlenecks: Tensors, config: str) -> None:
    path, body = tmp_path / "file.pth", under("backbone.", bottlenecks)
    torch.save({"meta": {"cfg": config}, "state_dict": body}, path)
    with pytest.raises(InputError, match="stride in 1x1 is True, not False"):
        read_checkpoint(path, statement=STATED)
    checkpoint = read_checkpoint(path, statement=replace(STATED, stride_in_1x1=None))
    assert (checkpoint.spec.stride_in_1x1, checkpoint.said["stride_in_1x1"]) == (True, BY_FILE)


OF_MMDETECTION = (
    "img_norm_cfg = dict(\n    mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0], to_rgb=False)\n"
    "coder=dict(target_means=[0.0, 0.0, 0.0, 0.0])\ndict(\n    type='Normalize',\n"
    "    mean=[103.53, 116.28, 123.675],\n    std=[1.0, 1.0, 1.0],\n    to_rgb=False)",
    "dict(\n    bgr_to_rgb=False,\n    mean=[\n        103.53,\n        116.28,\n        123.675,\n    ],\n"
    "    pad_mask=True,\n    std=[\n        1.0,\n        1.0,\n        1.0,\n    ])",
    '{"backbone": {"style": "caffe"}, "bgr_to_rgb": false, "mean": [103.53, 116.28, 123.675], "std": [1.0, 1.0, 1.0]}',
    "{'style': 'caffe', 'to_rgb': False, 'mean': (103.53, 116.28, 123.675), 'std': (1.0, 1.0, 1.0)}",
)


@pytest.mark.parametrize("config", OF_MMDETECTION)
def test_mmdetections_configuration_says_what_it_was_fed(tmp_path: Path, tensors: Tensors, config: str) -> None:
    path, body = tmp_path / "file.pth", under("backbone.", tensors)
    torch.save({"meta": {"config": config}, "state_dict": body}, path)
    checkpoint = read_checkpoint(path)
    assert checkpoint.spec.mean == pytest.approx((103.53 / 255, 116.28 / 255, 123.675 / 255))
    assert (checkpoint.spec.std, checkpoint.spec.channel_order) == (pytest.approx((1 / 255,) * 3), "BGR")
    assert {*checkpoint.said.values()} == {BY_FILE}
    with pytest.raises(InputError, match="leave out --mean"):
        read_checkpoint(path, statement=STATED)
    torch.save({"meta": {"config": config + "\nmean=[0.0, 0.0, 0.0]"}, "state_dict": body}, path)
    assert read_checkpoint(path, statement=STATED).said["mean"] == BY_USER  # it says two things


@pytest.mark.parametrize("std", [0.25, 0.5])
def test_an_input_that_is_normalised_twice_is_refused(tmp_path: Path, tensors: Tensors, std: float) -> None:
    layers = {f"{layer}.{name}": torch.full((1, 3, 1, 1), 0.5) for layer in ("0", "1.0") for name in ("mean", "std")}
    layers["0.std"] = torch.tensor(std)  # one number for all channels
    torch.save(layers | under("1.1.", tensors), tmp_path / "file.pth")
    with pytest.raises(InputError, match=r"by 0 and by 1\.0: save it with one"):
        read_checkpoint(tmp_path / "file.pth")


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1), (1, 3, 1, 1)])
def test_a_normaliser_may_have_one_number(tmp_path: Path, tensors: Tensors, shape: tuple[int, ...]) -> None:
    layer = {"normalize.mean": torch.full(shape, 0.5), "normalize.std": torch.full(shape, 0.25)}
    torch.save(layer | under("model.", tensors), tmp_path / "file.pth")
    checkpoint = read_checkpoint(tmp_path / "file.pth")
    assert (checkpoint.spec.mean, checkpoint.spec.std) == ((0.5,) * 3, (0.25,) * 3)
    assert checkpoint.said["mean"] == BY_FILE


@pytest.mark.parametrize(
    ("mean", "std", "fed"),
    [(123.675, 58.395, (0.485, 0.229)), (103.53, 1.0, (0.406, 1 / 255)), (0.0, 255.0, (0.0, 1.0)), (0.0, 1.0, ())],
)
def test_detectron2s_pixels_are_of_0_255_where_they_cannot_be_others(
    tmp_path: Path, tensors: Tensors, mean: float, std: float, fed: tuple[float, ...]
) -> None:
    path = tmp_path / "file.pth"
    torch.save({n: torch.full((3, 1, 1), v) for n, v in (("pixel_mean", mean), ("pixel_std", std))} | tensors, path)
    if fed:
        spec = read_checkpoint(path).spec
        assert (spec.mean, spec.std) == tuple(pytest.approx((value,) * 3, abs=1e-6) for value in fed)
    else:
        with pytest.raises(InputError, match=r"pixel_mean \(0 0 0\), which may normalise .* give --mean and --std"):
            read_checkpoint(path)
        assert read_checkpoint(path, statement=STATED).said["mean"] == BY_USER


@pytest.mark.parametrize(
    ("inside", "name"), [("bn1", "ca.fc1.weight"), ("layer2", "denoise2.conv.weight"), ("layer3", "swish.beta")]
)
def test_what_stands_between_the_layers_is_no_head(tmp_path: Path, tensors: Tensors, inside: str, name: str) -> None:
    after = max(place for place, key in enumerate(tensors) if key.startswith(f"{inside}."))
    names = [*tensors]
    path = tmp_path / "file.pth"
    more = tensors | {name: torch.ones(1)}
    torch.save({key: more[key] for key in [*names[: after + 1], name, *names[after + 1 :]]}, path)
    with pytest.raises(InputError, match=f"has no place for {name}"):
        read_checkpoint(path)
    torch.save({key.replace(name, "fc.0.weight"): more[key] for key in [*names[:6], name, *names[6:-2]]}, path)
    assert read_checkpoint(path).left_out == ("fc.0.weight",)
    for content in (more, dict(sorted(more.items()))):  # after the classifier, and in no order that tells
        torch.save(content, path)
        with pytest.raises(InputError, match=f"{name}, which by its name .* give --arch resnet18"):
            read_checkpoint(path)
        assert read_checkpoint(path, statement=Statement(arch="resnet18")).left_out == (name,)


@pytest.mark.parametrize("options", [dict, lambda **values: argparse.Namespace(**values)])
def test_the_options_of_the_training_count(tmp_path: Path, tensors: Tensors, options: Any) -> None:
    path = tmp_path / "file.pth"
    own = options(model="resnet18", backbone="resnet50", mean=[0.5] * 3, std=[0.25] * 3, lr=None)
    torch.save({"state_dict": tensors, "args": own}, path)
    checkpoint = read_checkpoint(path, statement=Statement(channel_order="RGB"))
    assert (checkpoint.spec.mean, checkpoint.said["std"]) == ((0.5,) * 3, BY_FILE)
    with pytest.raises(
        InputError, match=r"an option of its training says that its mean is .* save its state_dict alone"
    ):
        read_checkpoint(path, statement=STATED)
    torch.save(torch.load(path, weights_only=False)["state_dict"], path)
    assert read_checkpoint(path, statement=STATED).said["mean"] == BY_USER
    torch.save({"state_dict": tensors, "config": options(model="resnetblur18.a1_in1k", mean=None)}, path)
    with pytest.raises(InputError, match="option of its training says that it is resnetblur18"):
        read_checkpoint(path, statement=STATED)


@pytest.mark.parametrize(
    ("options", "doubt"),
    [
        ({"data": {"normalize": False}}, "its normalize is False"),
        ({"no_normalization": True, "mean": [0.5] * 3, "std": [0.25] * 3}, "its no_normalization is True"),
        ({"input_range": [-1, 1], "mean": [0.5] * 3, "std": [0.25] * 3}, r"its input_range is \[-1, 1\]"),
        ([{"mean": [mean] * 3, "std": [0.25] * 3} for mean in (0.5, 0.4)], "means or stds that differ"),
        ([{f"{name}mean": [0.5] * 3, f"{name}std": [std] * 3} for name, std in (("img_", 0.1), ("", 0.2))], "differ"),
        ({"normalize": 0}, "its normalize is 0"),
        ({"normalization": "none"}, "its normalization is 'none'"),
        ({"mean": [0.4, 0.45, 0.5], "std": None}, "a mean without a std"),
        *(({name: None}, f"its {name} is None") for name in ("normalize", "input_normalization")),
        ({"normalize": "false"}, "its normalize is 'false'"),
    ],
)
def test_nothing_is_assumed_against_the_options_of_the_training(
    tmp_path: Path, tensors: Tensors, options: Any, doubt: str
) -> None:
    path = tmp_path / "file.pth"
    swav = under("module.", {name: tensor for name, tensor in tensors.items() if not name.startswith("fc.")})
    torch.save({"state_dict": swav | {"module.prototypes.weight": torch.ones(3, 4)}, "config": {"of": options}}, path)
    with pytest.raises(InputError, match=f"{doubt}: give --mean and --std"):
        read_checkpoint(path)
    assert read_checkpoint(path, statement=Statement(mean=(0.0,) * 3, std=(1.0,) * 3)).spec.mean == (0.0,) * 3


@pytest.mark.parametrize(
    "name",
    ["mean", "MEAN", "img_mean", "image_mean", "pixel_mean", "normalize_mean", "dataset_mean", "means", "PIXEL_MEANS"],
)
def test_options_may_call_the_mean_by_what_it_is_of(tmp_path: Path, tensors: Tensors, name: str) -> None:
    std = name.replace("mean", "std").replace("MEAN", "STD")
    torch.save({"state_dict": tensors, "config": {"data": {name: [0.5] * 3, std: [0.25] * 3}}}, tmp_path / "file.pth")
    assert read_checkpoint(tmp_path / "file.pth", statement=Statement(channel_order="RGB")).spec.mean == (0.5,) * 3


@pytest.mark.parametrize("of", [list, tuple, torch.tensor, np.array, str, lambda values: " ".join(map(str, values))])
def test_options_may_have_the_mean_in_any_form(tmp_path: Path, tensors: Tensors, of: Any) -> None:
    options = {"mean": of([0.4, 0.45, 0.5]), "std": of([0.25] * 3), "channel_order": "RGB"}
    torch.save({"state_dict": tensors, "config": options}, tmp_path / "file.pth")
    assert read_checkpoint(tmp_path / "file.pth").spec.mean == pytest.approx((0.4, 0.45, 0.5))
    for text in ("1" * 10**5, "of imagenet 1"):
        torch.save({"state_dict": tensors, "config": options | {"mean": text}}, tmp_path / "file.pth")
        with pytest.raises(InputError, match="give --mean --std"):
            read_checkpoint(tmp_path / "file.pth")


@pytest.mark.parametrize(("mean", "std"), [([0.0] * 3, [0.1] * 3), (0.0, 0.02), (0.5, 0.1)])
@pytest.mark.parametrize(
    "other",
    [
        *({"_target_": "a.GaussNoise"}, {"type": "GaussianNoise"}, "depth", "thermal"),
        *("init", "weight_init", "init_cfg", {"_target_": "torch.nn.init.normal_"}, {"class_path": "TruncNormal"}),
    ],
)
def test_the_mean_of_noise_depth_or_weights_is_not_of_the_image(
    tmp_path: Path, tensors: Tensors, other: Any, mean: Any, std: Any
) -> None:
    values = {"mean": mean, "std": std}
    options = {other: values} if isinstance(other, str) else {"transforms": [other | values]}
    torch.save({"state_dict": tensors, "config": options}, tmp_path / "file.pth")
    assert read_checkpoint(tmp_path / "file.pth", statement=STATED).spec.mean == STATED.mean


@pytest.mark.parametrize(
    ("options", "fed"),
    [
        ({"mean": 0.5, "std": 0.25}, (0.5, 0.25)),
        ({"means": 0.5, "stds": [0.25] * 3}, (0.5, 0.25)),
        ({"mean": [0.5] * 3, "std": 0.25}, (0.5, 0.25)),
        ({"pixel_mean": 0, "pixel_std": 1.0, "normalize": None}, (0, 1)),
        ({"class_path": "Normalize", "init_args": {"mean": 0.5, "std": 0.25}}, (0.5, 0.25)),  # of LightningCLI
        *(({"mean": mean, "std": std}, ()) for mean, std in ((0, 0.02), (-4.3, 4.6), (38.0, 12.0), (0.5, None))),
        ({"mean": True, "std": True}, ()),
    ],
)
def test_one_number_is_that_of_all_channels(
    tmp_path: Path, tensors: Tensors, options: dict[str, Any], fed: tuple[float, float]
) -> None:
    torch.save({"state_dict": tensors, "config": {"data": options}}, tmp_path / "file.pth")
    if fed:
        spec = read_checkpoint(tmp_path / "file.pth", statement=Statement(channel_order="RGB")).spec
        assert (spec.mean, spec.std) == tuple((number,) * 3 for number in fed)
    else:
        assert read_checkpoint(tmp_path / "file.pth", statement=STATED).spec.mean == STATED.mean


def test_a_small_stem_agrees_with_options_that_say_so(tmp_path: Path) -> None:
    small, path = build_backbone(BackboneSpec("resnet18", 2, stem="cifar")).half().state_dict(), tmp_path / "file.pth"
    options = {"remove_first_maxpool": True, "cifar_stem": True, "maxpool1": False, "no_maxpool": True}
    torch.save({"state_dict": small, "hyper_parameters": options | {"small_images": False}}, path)
    assert read_checkpoint(path, statement=STATED).spec.stem == "cifar"
    for name, value in {"remove_first_maxpool": False, "maxpool1": True}.items():
        torch.save({"state_dict": small, "hyper_parameters": {name: value}}, path)
        with pytest.raises(InputError, match=f"its {name} is {value}, which gives other features"):
            read_checkpoint(path, statement=STATED)


@pytest.mark.parametrize(("kind", "mean"), [("vit", 0.4), ("resnet", 0.5)])
def test_a_processor_of_another_network_beside_it_does_not_count(
    tmp_path: Path, tensors: Tensors, kind: str, mean: float
) -> None:
    torch.save({"state_dict": tensors}, tmp_path / "file.pth")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    processor = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    stated = replace(STATED, mean=(mean,) * 3, std=(0.5,) * 3)
    assert read_checkpoint(tmp_path / "file.pth", statement=stated).spec.mean == (mean,) * 3


def test_options_in_options_count(tmp_path: Path, tensors: Tensors) -> None:
    path, own = tmp_path / "file.pth", {"mean": [0.5] * 3, "std": [0.25] * 3, "input_range": [0, 1]}
    config: dict[str, Any] = {"data": {"transform": [own | {"input_space": "BGR"}]}, "teacher": {"mean": [0.1] * 3}}
    config["self"] = config
    torch.save({"state_dict": tensors, "config": config}, path)
    checkpoint = read_checkpoint(path)
    assert (checkpoint.spec.mean, checkpoint.spec.std, checkpoint.spec.channel_order) == (
        (0.5,) * 3,
        (0.25,) * 3,
        "BGR",
    )
    assert {*checkpoint.said.values()} == {BY_FILE}


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("resnet34", "those of resnet18, not of resnet34"),
        ("resnet19", "unknown architecture 'resnet19', nearest to resnet18, (?!resnet18,)"),
        ("convnext_tny", "unknown architecture 'convnext_tny', nearest to convnext_tiny, "),
    ],
)
def test_another_network_than_the_stated_one_is_refused(
    tmp_path: Path, tensors: Tensors, arch: str, message: str
) -> None:
    torch.save(tensors, tmp_path / "file.pth")
    assert read_checkpoint(tmp_path / "file.pth", statement=Statement(arch="resnet18")).spec.arch == "resnet18"
    with pytest.raises(InputError, match=message):
        read_checkpoint(tmp_path / "file.pth", statement=Statement(arch=arch))
