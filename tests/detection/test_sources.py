"""Detectron2's own readers as the reference: its conversion rules, its Caffe2 loader, its detectors' checkpoints."""

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import Tensor

from robust_backbones.checkpoint.convert import BackboneMetadata, convert, read_backbone, write_backbone
from robust_backbones.checkpoint.sources import Statement, read_checkpoint
from robust_backbones.detection.checkpoint import BackboneCheckpointer, backbone_tensors
from robust_backbones.detection.config import CONFIG_DIR, load_config
from robust_backbones.models import BackboneSpec
from tests.detection.conftest import flat_overrides

Maker = Callable[[str], Path]
MSRA = {"mean": (103.53 / 255, 116.28 / 255, 123.675 / 255), "channel_order": "BGR"}


def test_resnet50_is_what_detectron2s_own_rules_give(torchvision_file: Maker) -> None:
    """The replacements that its tools/convert-torchvision-to-d2.py makes, one after the other, on every name."""
    expected = {}
    for name, tensor in torch.load(torchvision_file("resnet50"), weights_only=True).items():
        new_name = name if "layer" in name else f"stem.{name}"
        for old, new in (
            *((f"layer{i}", f"res{i + 1}") for i in (1, 2, 3, 4)),
            *((f"bn{i}", f"conv{i}.norm") for i in (1, 2, 3)),
            ("downsample.0", "shortcut"),
            ("downsample.1", "shortcut.norm"),
        ):
            new_name = new_name.replace(old, new)
        expected[new_name] = tensor.numpy()
    converted, _ = convert(read_checkpoint(torchvision_file("resnet50")))
    ignored = {name for name in expected if name.startswith("stem.fc.") or name.endswith("num_batches_tracked")}
    assert converted.keys() == expected.keys() - ignored
    for name, tensor in converted.items():
        np.testing.assert_array_equal(tensor.numpy(), expected[name])


@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
def test_detectron2_alone_loads_what_was_converted(
    torchvision_file: Maker, small_cfg: CfgNode, tmp_path: Path, suffix: str
) -> None:
    checkpoint, path = read_checkpoint(torchvision_file("resnet18")), tmp_path / f"backbone{suffix}"
    tensors, _ = convert(checkpoint)
    write_backbone(path, tensors, BackboneMetadata.of(checkpoint))
    detector = build_model(small_cfg)
    DetectionCheckpointer(detector).load(str(path))
    for name, short_name in backbone_tensors(detector).items():
        assert torch.equal(detector.state_dict()[name], tensors[short_name])


def caffe2_blobs(state: dict[str, Tensor], *, bias: bool) -> dict[str, np.ndarray]:
    """A backbone's tensors under Caffe2's names, each batch norm as the scale and the shift that it amounts to."""
    blobs = {}
    for name, tensor in state.items():
        part, *rest = name.split(".")
        if part == "stem":
            blob = "res_conv1" if "norm" in name else "conv1"
        else:
            branch = {"shortcut": "1", "conv1": "2a", "conv2": "2b", "conv3": "2c"}[rest[1]]
            blob = f"{part}_{rest[0]}_branch{branch}"
        if name.endswith("norm.weight"):
            blobs[f"{blob}_bn_s"] = tensor.numpy()
        elif name.endswith("norm.bias"):
            blobs[f"{blob}_bn_b"] = tensor.numpy()
        elif "norm" not in name:
            blobs[f"{blob}_w"] = tensor.numpy()
    if bias:
        blobs["conv1_b"] = np.linspace(-1, 1, 64, dtype=np.float32)
    return blobs | {"fc1000_w": np.ones((5, 2048), np.float32), "fc1000_b": np.ones(5, np.float32)}


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["resnet50", "resnext50_32x4d"])
def test_a_caffe2_file_is_read_as_detectron2_reads_it(torchvision_file: Maker, tmp_path: Path, arch: str) -> None:
    converted, _ = convert(read_checkpoint(torchvision_file(arch)))
    path = tmp_path / "R-50.pkl"
    path.write_bytes(pickle.dumps(caffe2_blobs(converted, bias=False), 2))
    checkpoint = read_checkpoint(path)
    grouped = arch.startswith("resnext")
    assert checkpoint.layout == "msra"
    assert checkpoint.spec == BackboneSpec(
        arch,
        0,
        std=(57.375 / 255, 57.12 / 255, 58.395 / 255) if grouped else (1 / 255,) * 3,
        stride_in_1x1=not grouped,
        **MSRA,
    )

    cfg = load_config(CONFIG_DIR / "Base-RCNN-FPN.yaml", [*flat_overrides(checkpoint.spec), "MODEL.DEVICE", "cpu"])
    theirs, ours = build_model(cfg).eval(), build_model(cfg).eval()
    DetectionCheckpointer(theirs).load(str(path))
    tensors, report = convert(checkpoint)
    assert report.ok
    write_backbone(tmp_path / "ours.pkl", tensors, BackboneMetadata.of(checkpoint))
    BackboneCheckpointer(ours, cfg=cfg).load(str(tmp_path / "ours.pkl"))
    for name in backbone_tensors(theirs):
        # Detectron2 fills in a variance of 1, to which the norm adds epsilon; a scale and a shift alone are meant.
        expected = theirs.state_dict()[name] - (1e-5 if name.endswith("running_var") else 0)
        torch.testing.assert_close(ours.state_dict()[name], expected, rtol=0, atol=0)


def test_a_bias_in_the_stem_becomes_part_of_its_shift(torchvision_file: Maker, tmp_path: Path) -> None:
    converted, _ = convert(read_checkpoint(torchvision_file("resnet50")))
    stems = {}
    for bias in (False, True):
        path = tmp_path / f"{bias}.pkl"
        path.write_bytes(pickle.dumps({"blobs": caffe2_blobs(converted, bias=bias)}))
        net = read_checkpoint(path).build()
        stems[bias] = net.bn1(
            net.conv1(torch.ones(1, 3, 32, 32)) + (0 if bias else torch.linspace(-1, 1, 64)[:, None, None])
        )
    torch.testing.assert_close(stems[True], stems[False], rtol=1e-5, atol=1e-5)


def test_the_backbone_comes_back_out_of_a_detector(
    converted: Maker, torchvision_file: Maker, small_cfg: CfgNode, tmp_path: Path
) -> None:
    """From an FPN and from a C4 detector, whose res5 is in the heads."""
    source = read_checkpoint(torchvision_file("resnet18")).state_dict
    fpn = build_model(small_cfg)
    saver = BackboneCheckpointer(fpn, str(tmp_path), cfg=small_cfg)
    saver.load(str(converted("resnet18")))
    saver.save("fpn")
    back = read_checkpoint(tmp_path / "fpn.pth")
    assert back.layout == "detectron2"
    assert back.spec.arch == "resnet18"
    assert all(torch.equal(tensor, source[name]) for name, tensor in back.state_dict.items())

    c4 = {
        "backbone." + name: tensor for name, tensor in convert(read_checkpoint(torchvision_file("resnet18")))[0].items()
    }
    c4 = {name.replace("backbone.res5", "roi_heads.res5"): tensor for name, tensor in c4.items()}
    torch.save({"model": c4 | {"roi_heads.box_predictor.cls_score.weight": torch.ones(3, 3)}}, tmp_path / "c4.pth")
    spec = BackboneSpec()
    statement = Statement(mean=spec.mean, std=spec.std, channel_order="RGB", stride_in_1x1=False)
    back = read_checkpoint(tmp_path / "c4.pth", statement=statement)
    assert back.left_out == ("roi_heads.box_predictor.cls_score.weight",)
    assert back.state_dict.keys() == {name for name in source if "fc." not in name and "tracked" not in name}


def test_a_written_configuration_is_the_base_with_the_backbone(
    run_tool: Callable[..., tuple[int, str, str]], torchvision_file: Maker, tmp_path: Path
) -> None:
    config, target = tmp_path / "configs/wide.yaml", tmp_path / "wide.pkl"
    base = CONFIG_DIR / "PascalVOC-Detection/faster_rcnn_R_50_FPN.yaml"
    options = ("--no-verify", "--write-config", config, "--base-config", base)
    status, out, _ = run_tool("convert", torchvision_file("wide_resnet50_2"), target, *options)
    assert status == 0
    assert f"configuration written to {config}" in out
    expected = load_config(base, [*flat_overrides(BackboneSpec("wide_resnet50_2")), "MODEL.WEIGHTS", str(target)])
    assert load_config(config).dump() == expected.dump()
    assert expected.MODEL.RESNETS.WIDTH_PER_GROUP == 128


@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
def test_a_fine_tuned_backbone_goes_to_torchvision_and_timm_and_back_bit_for_bit(
    run_tool: Callable[..., tuple[int, str, str]], converted: Maker, small_cfg: CfgNode, tmp_path: Path, norm: str
) -> None:
    small_cfg.MODEL.RESNETS.NORM = norm
    detector = build_model(small_cfg)
    run = BackboneCheckpointer(detector, str(tmp_path), cfg=small_cfg)
    run.load(str(converted("resnet18")))
    generator = torch.Generator().manual_seed(0)
    names = backbone_tensors(detector)
    with torch.no_grad():
        for name in names:  # what fine-tuning does to each of them
            tensor = detector.state_dict()[name]
            tensor += 0.01 * torch.rand(tensor.shape, generator=generator)
    run.save("model_final")

    source = tmp_path / "model_final.pth"
    for way in ("robust.pth --to torchvision", "robust.safetensors --to torchvision", "robust --to timm"):
        target, *options = way.split()
        status, _, error = run_tool("convert", source, tmp_path / target, *options)
        assert status == 0, error
        source = tmp_path / target / "model.safetensors" if target == "robust" else tmp_path / target
    assert run_tool("convert", source, tmp_path / "back.pkl", "--no-verify")[0] == 0
    tensors, _ = read_backbone(tmp_path / "back.pkl")
    assert set(tensors) == set(names.values())
    for name, short in names.items():
        assert torch.equal(tensors[short], detector.state_dict()[name]), short
    load = BackboneCheckpointer(build_model(small_cfg), cfg=small_cfg).load
    load(str(tmp_path / "back.pkl"))
