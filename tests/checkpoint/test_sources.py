"""Every layout of backbones: recognised by its keys, read to the same tensors, fed as it was trained or refused."""

import argparse
import json
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import dill
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from robust_backbones.checkpoint.convert import (
    BackboneMetadata,
    convert,
    convert_file,
    write_backbone,
    write_torchvision,
)
from robust_backbones.checkpoint.format import Checkpoint, write_checkpoint
from robust_backbones.checkpoint.hub import write_timm
from robust_backbones.checkpoint.sources import SOURCES, Statement, read_checkpoint
from robust_backbones.errors import InputError
from robust_backbones.models import IMAGENET_MEAN, IMAGENET_STD, BackboneSpec, build_backbone
from robust_backbones.threat_models import ThreatModel
from tests.conftest import randomize_batch_norms

MEAN, STD = (0.4717, 0.4499, 0.3837), (0.2600, 0.2516, 0.2575)
TWO = Statement(mean=MEAN, std=STD)
STATED = Statement(mean=MEAN, std=STD, channel_order="RGB", stride_in_1x1=False)
SLOW = pytest.mark.slow
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    """A ResNet-18 with seven classes, by torchvision's names."""
    net = build_backbone(BackboneSpec("resnet18", 7), seed=3)
    randomize_batch_norms(net)
    return net.state_dict()


def prefixed(prefix: str, tensors: Tensors) -> Tensors:
    return OrderedDict((prefix + name, tensor) for name, tensor in tensors.items())


def body(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("fc.")}


def column(values: tuple[float, ...], *shape: int) -> Tensor:
    return torch.tensor(values).view(*shape)


def robustness_content(tensors: Tensors, outer: str = "module.", inner: str = "") -> dict[str, Any]:
    """What robustness.train saves: the network and the attacker's copy of it, each after a normaliser."""
    state_dict = OrderedDict(
        {
            f"{outer}normalizer.new_mean": column(MEAN, 3, 1, 1),
            f"{outer}normalizer.new_std": column(STD, 3, 1, 1),
            **prefixed(f"{outer}model.{inner}", tensors),
            f"{outer}attacker.normalize.new_mean": column(MEAN, 3, 1, 1),
            f"{outer}attacker.normalize.new_std": column(STD, 3, 1, 1),
            **prefixed(f"{outer}attacker.model.{inner}", tensors),
        }
    )
    optimizer = torch.optim.SGD([nn.Parameter(tensor) for tensor in tensors.values() if tensor.dim() > 1], 0.1, 0.9)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.1 ** (epoch // 30))
    return {
        "model": state_dict,
        "optimizer": optimizer.state_dict(),
        "schedule": {**schedule.state_dict(), "lr_lambdas": [lambda epoch: 0.1 ** (epoch // 30)]},
        "epoch": 90,
        "amp": None,
        "nat_prec1": torch.tensor(57.9),
    }


def assert_reads(
    path: Path,
    layout: str,
    tensors: Tensors,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
    evaluated: dict[str, Any] | None = None,
    **options: Any,
) -> Checkpoint:
    checkpoint = read_checkpoint(path, **options)
    assert checkpoint.layout == layout
    assert checkpoint.state_dict.keys() == tensors.keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in checkpoint.state_dict.items())
    classes = 7 if "fc.weight" in tensors else 0
    assert checkpoint.spec == BackboneSpec("resnet18", classes, mean=mean, std=std, **(evaluated or {}))
    return checkpoint


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before-1.6"])
@pytest.mark.parametrize("inner", ["", "model."])
@pytest.mark.parametrize("outer", ["module.", ""])
def test_a_file_of_the_robustness_library(
    tmp_path: Path, tensors: Tensors, outer: str, inner: str, legacy: bool
) -> None:
    path = tmp_path / "resnet18_l2_eps3.ckpt"
    content = robustness_content(tensors, outer, inner)
    torch.save(content, path, pickle_module=dill, _use_new_zipfile_serialization=not legacy)
    checkpoint = assert_reads(path, "robustness", tensors, MEAN, STD)
    assert checkpoint.said == {
        "mean": "said by the file",
        "std": "said by the file",
        "channel_order": "assumed",
        "stride_in_1x1": "said by the file",  # it has no bottlenecks
    }
    assert checkpoint.prefix == f"{outer}model.{inner}"
    assert len(checkpoint.left_out) == len(tensors) + 4  # the copy, and both normalisers


def test_an_older_file_of_the_robustness_library_keeps_it_elsewhere(tmp_path: Path, tensors: Tensors) -> None:
    content = robustness_content(tensors)
    content["state_dict"] = content.pop("model")
    torch.save(content, tmp_path / "old.pt", pickle_module=dill)
    assert_reads(tmp_path / "old.pt", "robustness", tensors, MEAN, STD)


def test_two_copies_that_differ_are_refused(tmp_path: Path, tensors: Tensors) -> None:
    content = robustness_content(tensors)
    content["model"]["module.attacker.model.layer2.0.bn1.bias"] = torch.zeros(128)
    torch.save(content, tmp_path / "file.pt", pickle_module=dill)
    with pytest.raises(InputError, match=r"two copies of the network differ .*layer2\.0\.bn1\.bias"):
        read_checkpoint(tmp_path / "file.pt")


@pytest.mark.parametrize("names", [("normalize.mean", "normalize.std"), ("mu", "sigma")])
@pytest.mark.parametrize("prefix", ["model.", "module.model."])
def test_a_robustbench_model_with_its_normaliser(
    tmp_path: Path, tensors: Tensors, prefix: str, names: tuple[str, str]
) -> None:
    layers = {names[0]: column(MEAN, 1, 3, 1, 1), names[1]: column(STD, 1, 3, 1, 1)}
    outer = prefix.removesuffix("model.")
    torch.save(
        {"state_dict": {**prefixed(outer, layers), **prefixed(prefix, tensors)}}, tmp_path / "Salman2020Do_R18.pt"
    )
    assert_reads(tmp_path / "Salman2020Do_R18.pt", "robustbench", tensors, MEAN, STD)


def test_a_stride_is_asked_for_where_there_is_a_choice(tmp_path: Path) -> None:
    tensors = build_backbone(BackboneSpec("resnet50", 2)).state_dict()
    torch.save({"state_dict": prefixed("model.", tensors)}, tmp_path / "file.pt")
    with pytest.raises(InputError, match=r"--stride-in-1x1 \(ImageNet's usual .* --stride-in-1x1 false\)"):
        read_checkpoint(tmp_path / "file.pt", statement=TWO)
    assert (
        "stride in the 3x3 convolution (said by you)"
        in read_checkpoint(tmp_path / "file.pt", statement=STATED).reading()
    )


def test_a_wrapped_network_that_nothing_tells_needs_all_or_its_source(tmp_path: Path, tensors: Tensors) -> None:
    path = tmp_path / "file.pt"
    torch.save(prefixed("model.", tensors), path)
    with pytest.raises(InputError, match=r"give --mean --std --channel-order \("):
        read_checkpoint(path)
    assert_reads(path, "robustbench", tensors, source="robustbench")
    torch.save({"state_dict": prefixed("model.", tensors)}, path)
    with pytest.raises(InputError, match=r"give --channel-order \("):
        read_checkpoint(path, statement=TWO)
    assert_reads(path, "training", tensors, MEAN, STD, statement=STATED)


def test_torchvision(tmp_path: Path, tensors: Tensors) -> None:
    torch.save(tensors, tmp_path / "resnet18-f37072fd.pth")
    checkpoint = assert_reads(tmp_path / "resnet18-f37072fd.pth", "torchvision", tensors)
    assert [checkpoint.said[name] for name in ("mean", "std", "channel_order")] == ["assumed"] * 3
    assert_reads(tmp_path / "resnet18-f37072fd.pth", "torchvision", tensors, MEAN, STD, statement=STATED)


def test_timm_says_what_it_was_fed_with(tmp_path: Path, tensors: Tensors) -> None:
    cfg = {
        "mean": list(MEAN),
        "std": list(STD),
        "input_size": [3, 288, 288],
        "crop_pct": 0.9,
        "interpolation": "bicubic",
    }
    said = {"evaluated": {"image_size": 288, "val_resize": 320, "interpolation": "bicubic"}}
    hub = tmp_path / "resnet18.a1_in1k"
    hub.mkdir()
    safetensors.torch.save_file(tensors, hub / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="give --mean --std"):
        read_checkpoint(hub / "model.safetensors")
    (hub / "config.json").write_text(json.dumps({"architecture": "resnet18", "pretrained_cfg": cfg}))
    assert_reads(hub / "model.safetensors", "timm", tensors, MEAN, STD, **said)
    safetensors.torch.save_file(tensors, tmp_path / "own.safetensors", {"pretrained_cfg": json.dumps(cfg)})
    assert_reads(tmp_path / "own.safetensors", "timm", tensors, MEAN, STD, **said)
    torch.save({"state_dict": tensors, "arch": "resnet18", "pretrained_cfg": cfg}, tmp_path / "own.pth")
    assert_reads(tmp_path / "own.pth", "timm", tensors, MEAN, STD, **said)


@pytest.mark.parametrize("written", ["detectron2.pkl", "detectron2.pth", "torchvision.safetensors", "timm.safetensors"])
def test_how_a_resnet_is_evaluated_outlasts_its_conversion(tmp_path: Path, tensors: Tensors, written: str) -> None:
    spec = BackboneSpec("resnet18", 7, image_size=192, val_resize=240, interpolation="bicubic")
    write_checkpoint(tmp_path / "own.pt", spec=spec, state_dict=tensors, threat_model=None)
    source, path = read_checkpoint(tmp_path / "own.pt"), tmp_path / written
    if path.stem == "detectron2":
        convert_file(source, path).check()
    else:
        (write_timm if path.stem == "timm" else write_torchvision)(path, source)
    assert read_checkpoint(path).spec == replace(spec, num_classes=0 if path.stem == "detectron2" else 7)
    if path.stem == "timm":  # and without what only this package reads
        with safetensors.safe_open(path, "pt") as file:
            cfg = file.metadata()["pretrained_cfg"]
        safetensors.torch.save_file(tensors, path, {"pretrained_cfg": cfg})
        assert read_checkpoint(path).spec == spec


def test_moco_keeps_its_query_encoder_without_the_projection(tmp_path: Path, tensors: Tensors) -> None:
    head = {"fc.0.weight": torch.ones(512, 512), "fc.0.bias": torch.ones(512), "fc.2.weight": torch.ones(128, 512)}
    other = {name: tensor + 1 for name, tensor in tensors.items()}
    for projection in (head, {"fc.weight": torch.ones(128, 512), "fc.bias": torch.ones(128)}):
        state_dict = {
            **prefixed("module.encoder_q.", body(tensors) | projection),
            **prefixed("module.encoder_k.", other),
            "module.queue": torch.zeros(128, 4),
        }
        torch.save({"epoch": 200, "arch": "resnet18", "state_dict": state_dict}, tmp_path / "moco.pth.tar")
        assert_reads(tmp_path / "moco.pth.tar", "moco", body(tensors))


@pytest.mark.parametrize("prefix", ["model.", "net.", "backbone.", ""])
def test_lightning(tmp_path: Path, tensors: Tensors, prefix: str) -> None:
    path = tmp_path / "epoch=3.ckpt"
    content = {
        "pytorch-lightning_version": "2.5",
        "state_dict": {**prefixed(prefix, tensors), **({"loss.weight": torch.ones(2)} if prefix else {})},
        "hyper_parameters": argparse.Namespace(lr=0.1, path=Path("data")),
        "callbacks": defaultdict(dict),
    }
    torch.save(content, path)
    with pytest.raises(InputError, match=r"give --mean --std --channel-order \("):
        read_checkpoint(path)
    checkpoint = assert_reads(path, "lightning", tensors, MEAN, STD, statement=STATED)
    assert {who for name, who in checkpoint.said.items() if name != "stride_in_1x1"} == {"said by you"}


@pytest.mark.parametrize("key", ["", "state_dict", "model", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["module.", ""])
def test_training_checkpoints(tmp_path: Path, tensors: Tensors, prefix: str, key: str) -> None:
    if not key and not prefix:
        return  # torchvision's own
    path, state_dict = tmp_path / "file.pth", prefixed(prefix, tensors)
    torch.save({key: state_dict, "epoch": 3} if key else state_dict, path)
    with pytest.raises(InputError, match="give --mean --std"):
        read_checkpoint(path)
    assert_reads(path, "training", tensors, MEAN, STD, statement=STATED)


def test_averaged_weights_have_to_be_chosen(tmp_path: Path, tensors: Tensors) -> None:
    path, averaged = tmp_path / "file.pth", {name: tensor * 2 for name, tensor in tensors.items()}
    torch.save({"state_dict": prefixed("module.", tensors), "state_dict_ema": prefixed("module.", averaged)}, path)
    with pytest.raises(InputError, match=r"--key state_dict \(resnet18.*--key state_dict_ema \(resnet18"):
        read_checkpoint(path, statement=STATED)
    assert_reads(path, "ema", averaged, MEAN, STD, key="state_dict_ema", statement=STATED)
    assert_reads(path, "training", tensors, MEAN, STD, key="state_dict", statement=STATED)
    torch.save({"state_dict_ema": averaged}, path)
    assert_reads(path, "ema", averaged, MEAN, STD, statement=STATED)


def weights(tensors: Tensors) -> Tensors:
    """Without counters, as Detectron2's names have none."""
    return {name: tensor for name, tensor in body(tensors).items() if not name.endswith("num_batches_tracked")}


@pytest.mark.parametrize("suffix", [".pkl", ".pth", ".safetensors"])
def test_a_converted_file_is_a_source_that_says_everything(tmp_path: Path, tensors: Tensors, suffix: str) -> None:
    spec = BackboneSpec("resnet18", 7, mean=MEAN, std=STD)
    ours = tmp_path / "checkpoint.pt"
    write_checkpoint(ours, spec=spec, state_dict=tensors, threat_model=ThreatModel("L2", 3))
    original = read_checkpoint(ours)
    path = tmp_path / f"backbone{suffix}"
    write_backbone(path, convert(original)[0], BackboneMetadata.of(original))
    checkpoint = assert_reads(path, "detectron2", weights(tensors), MEAN, STD)
    assert checkpoint.threat_model == ThreatModel("L2", 3)
    if suffix == ".safetensors":
        write_torchvision(path, original)
        assert_reads(path, "torchvision", tensors, MEAN, STD)


def test_somebody_elses_detectron2_file_needs_all_that_it_does_not_say(tmp_path: Path, tensors: Tensors) -> None:
    import pickle

    torch.save(tensors, tmp_path / "source.pth")
    converted, _ = convert(read_checkpoint(tmp_path / "source.pth"))
    arrays = {name: tensor.numpy() for name, tensor in converted.items()}
    arrays["stem.fc.weight"] = tensors["fc.weight"].numpy()
    path = tmp_path / "r18.pkl"
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "third_party", "matching_heuristics": True}))
    with pytest.raises(InputError, match=r"give --mean --std --channel-order \("):
        read_checkpoint(path)
    with pytest.raises(InputError, match=r"give --channel-order \("):
        read_checkpoint(path, statement=TWO)
    assert_reads(path, "detectron2", weights(tensors), MEAN, STD, statement=STATED)


@pytest.mark.parametrize("arch", ["mobilenet_v2", *(pytest.param(a, marks=SLOW) for a in ("densenet161", "vgg16_bn"))])
def test_published_networks_that_are_no_resnets_are_read_too(tmp_path: Path, arch: str) -> None:
    """Classification can use them; a detector cannot, and says so."""
    net = build_backbone(BackboneSpec(arch, 5))
    path = tmp_path / "file.ckpt"
    torch.save(robustness_content(net.state_dict(), inner="model."), path, pickle_module=dill)
    checkpoint = read_checkpoint(path)
    assert checkpoint.spec == BackboneSpec(arch, 5, mean=MEAN, std=STD)
    images = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(checkpoint.build()(images), net.eval()(images))
    with pytest.raises(InputError, match="Detectron2's ResNet has no such architecture"):
        convert(checkpoint)


def test_a_deep_stem_is_no_resnet_of_detectron2(tmp_path: Path, tensors: Tensors) -> None:
    """timm's resnet18d: three convolutions in the stem, and a pooling before each shortcut's convolution."""
    deep = {
        name.replace("downsample.1", "downsample.2"): t for name, t in tensors.items() if not name.startswith("conv1.")
    }
    deep |= {f"conv1.{i}.weight": torch.ones(32, 3, 3, 3) for i in (0, 3, 6)}
    safetensors.torch.save_file(deep, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="Detectron2's ResNet has no such architecture"):
        read_checkpoint(tmp_path / "model.safetensors", statement=STATED)


def test_a_file_that_says_otherwise_than_the_user_is_refused(tmp_path: Path, tensors: Tensors) -> None:
    torch.save(robustness_content(tensors), tmp_path / "file.pt", pickle_module=dill)
    with pytest.raises(InputError, match="it says that its mean is"):
        read_checkpoint(tmp_path / "file.pt", statement=Statement(mean=IMAGENET_MEAN))
    read_checkpoint(tmp_path / "file.pt", statement=STATED)
    ours = tmp_path / "checkpoint.pt"
    spec = BackboneSpec("resnet18", 7)
    write_checkpoint(ours, spec=spec, state_dict=tensors, threat_model=ThreatModel("L2", 3))
    with pytest.raises(InputError, match="its threat model is L2:3, not L2:1"):
        read_checkpoint(ours, statement=Statement(threat_model=ThreatModel("L2", 1)))


def test_what_the_user_says_of_the_training_is_kept(tmp_path: Path, tensors: Tensors) -> None:
    torch.save(tensors, tmp_path / "file.pth")
    statement = Statement(threat_model=ThreatModel("Linf", 4 / 255))
    assert read_checkpoint(tmp_path / "file.pth", statement=statement).threat_model == ThreatModel("Linf", 4 / 255)


@pytest.mark.parametrize(
    "source", [source for source in SOURCES if source not in ("torchvision", "timm", "training", "robustbench")]
)
def test_a_source_that_it_is_not_is_refused(tmp_path: Path, tensors: Tensors, source: str) -> None:
    torch.save(tensors, tmp_path / "file.pth")
    with pytest.raises(InputError, match=r"cannot use .*file\.pth"):
        read_checkpoint(tmp_path / "file.pth", source=source, statement=STATED)


def test_an_unknown_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown source 'keras': choose one of robust_backbones"):
        read_checkpoint(tmp_path / "file.pth", source="keras")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(tmp_path: Path, tensors: Tensors, dtype: torch.dtype) -> None:
    torch.save(
        {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}, tmp_path / "file.pth"
    )
    converted, report = convert(read_checkpoint(tmp_path / "file.pth"))
    assert report.ok
    assert {tensor.dtype for tensor in converted.values()} == {torch.float32}
    assert torch.equal(converted["stem.conv1.weight"], tensors["conv1.weight"].to(dtype).float())


@pytest.mark.parametrize("twice", [False, True])
def test_tensors_that_are_not_finite_are_reported(tmp_path: Path, tensors: Tensors, twice: bool) -> None:
    spoiled = dict(tensors)
    spoiled["layer1.0.bn1.bias"] = torch.full((64,), torch.nan)
    torch.save(robustness_content(spoiled) if twice else spoiled, tmp_path / "file.pth", pickle_module=dill)
    _, report = convert(read_checkpoint(tmp_path / "file.pth"))
    assert report.not_finite == ("layer1.0.bn1.bias",)
    with pytest.raises(InputError, match=r"not finite: layer1\.0\.bn1\.bias"):
        report.check()


def test_the_tool_names_the_source(
    run_tool: Callable[..., tuple[int, str, str]], tmp_path: Path, tensors: Tensors
) -> None:
    path = tmp_path / "file.pth"
    torch.save({"state_dict": prefixed("module.", tensors)}, path)
    status, _, err = run_tool("convert", path, tmp_path / "out.pkl")
    assert status == 2
    assert "give --mean --std" in err
    stated = ("--mean", *MEAN, "--std", *STD, "--channel-order", "RGB", "--stride-in-1x1", "false")
    status, out, _ = run_tool(
        *("convert", path, tmp_path / "out.pkl", "--no-verify", "--require-said"),
        *(*stated, "--threat-model", "L2:3"),
    )
    assert status == 0
    assert f"{path}: a training checkpoint, resnet18, threat model L2:3" in out
    assert "input: mean 0.4717 0.4499 0.3837 (said by you)" in out
