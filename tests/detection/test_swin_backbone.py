"""Detectron2's Swin from timm's: converted with proof where both compute the same, guarded, frozen."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from PIL import Image
from torch import nn

from robust_backbones.checkpoint.convert import convert, convert_file, read_backbone, write_backbone
from robust_backbones.checkpoint.format import Checkpoint
from robust_backbones.checkpoint.names import of_swin
from robust_backbones.detection.checkpoint import BackboneCheckpointer, backbone_tensors
from robust_backbones.detection.config import load_config
from robust_backbones.detection.swin_backbone import SwinBackbone
from robust_backbones.detection.unproven import differences
from robust_backbones.detection.verify import TOLERANCE, feature_errors, prove
from robust_backbones.errors import InputError, ProofFailedError
from robust_backbones.models import BackboneSpec
from tests.detection.conftest import SHAPES_CONFIG, SMALL, flat_overrides
from tests.detection.tiny_networks import write_timm_file


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return write_timm_file("tiny_swin", tmp_path_factory.mktemp("swin"))


def test_the_stages_are_those_of_the_source_network(source: Checkpoint, tmp_path: Path) -> None:
    path, photograph = tmp_path / "backbone.pkl", tmp_path / "photograph.png"
    convert_file(source, path).check()
    pixels = torch.randint(0, 256, (200, 270, 3), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(photograph)
    errors = prove(source, path, image=photograph)
    assert [error.stage for error in errors] == 4 * ["res2", "res3", "res4", "res5"]
    assert {error.against for error in errors} == {"timm's own network"}
    name = "layers.3.blocks.1.attn.relative_position_bias_table"
    wrong = replace(source, state_dict={**source.state_dict, name: source.state_dict[name].flip(0)})
    with pytest.raises(ProofFailedError, match=r"differ \(res5 by"):
        prove(wrong, path)


def test_where_a_stage_is_one_window_timm_does_not_shift_it(source: Checkpoint, tmp_path: Path) -> None:
    """Which is why the proof is not made at the size of pre-training, and the difference there is said."""
    path = tmp_path / "backbone.pkl"
    convert_file(source, path).check()
    relative = {error.stage: error.relative for error in feature_errors(source, path, size=64)}
    assert max(relative[stage] for stage in ("res2", "res3", "res4")) < TOLERANCE < relative["res5"]
    one_window, *_ = differences(source)
    assert one_window.relative == pytest.approx(relative["res5"], rel=1e-3)
    assert str(one_window).startswith("not proven: at 64 pixels (the last stage is one window, ")


def test_windows_that_do_not_divide_a_stage_are_said_to_differ(tmp_path: Path) -> None:
    source = write_timm_file("tiny_swin_of_windows_4", tmp_path)
    _, not_dividing = differences(source)
    assert str(not_dividing).startswith("not proven: at 160 pixels (windows do not divide the stages, ")
    assert not_dividing.relative > TOLERANCE


def test_an_image_of_one_window_is_too_small_for_the_proof(source: Checkpoint, tmp_path: Path) -> None:
    path, photograph = tmp_path / "backbone.pkl", tmp_path / "photograph.png"
    convert_file(source, path).check()
    Image.new("RGB", (127, 300)).save(photograph)
    with pytest.raises(InputError, match="has 127x300 pixels: give one of 128x128 or more"):
        prove(source, path, image=photograph)


def test_what_no_stage_has_is_left_out(source: Checkpoint) -> None:
    assert {name for name in source.state_dict if of_swin(name) is None} == {
        *("norm.weight", "norm.bias", "head.fc.weight", "head.fc.bias"),
    }


def test_the_guard_refuses_another_and_a_half_filled_one(source: Checkpoint, tmp_path: Path) -> None:
    path, half = tmp_path / "backbone.pkl", tmp_path / "half.pkl"
    convert_file(source, path).check()
    tensors, metadata = read_backbone(path)
    write_backbone(half, {name: t for name, t in tensors.items() if not name.startswith("layers.3.")}, metadata)

    def load(file: Path, *overrides: object) -> nn.Module:
        own = flat_overrides(source.spec)
        cfg = load_config(SHAPES_CONFIG, [*SMALL, *own, "MODEL.DEVICE", "cpu", *overrides])
        detector = build_model(cfg)
        BackboneCheckpointer(detector, cfg=cfg).load(str(file))
        return detector

    detector = load(path)
    held = detector.backbone.bottom_up.state_dict()
    assert all(torch.equal(held[name], tensor) for name, tensor in tensors.items())
    assert sorted(backbone_tensors(detector).values()) == sorted(tensors)
    with pytest.raises(InputError, match=r"fills \d+ of the backbone's \d+ tensors .*layers\.3\.blocks\.0"):
        load(half)
    with pytest.raises(InputError, match=r"MODEL\.PIXEL_MEAN"):
        load(path, "MODEL.PIXEL_MEAN", [0.0, 0.0, 0.0])
    with pytest.raises(InputError, match=r"MODEL\.BACKBONE\.TIMM is tiny_swin_of_windows_4"):
        load(path, "MODEL.BACKBONE.TIMM", "tiny_swin_of_windows_4")
    with pytest.raises(InputError, match=r"MODEL\.BACKBONE\.NAME is build_resnet_fpn_backbone"):
        load(path, "MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone")


@pytest.mark.parametrize(
    ("arch", "message"),
    [("convnext_tiny", "timm has no Swin 'convnext_tiny'"), ("swin_micro", "timm has no Swin 'swin_micro'")],
)
def test_what_is_no_swin_is_refused_by_name(arch: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        SwinBackbone(arch)


def test_windows_of_several_sizes_are_refused_by_name() -> None:
    with pytest.raises(InputError, match="swin_s3_tiny_224 has windows of 7x7 and 14x14 tokens"):
        convert(Checkpoint(BackboneSpec("swin_s3_tiny_224"), {}, None, "timm", "", ""))


@pytest.mark.parametrize("freeze_at", [0, 1, 2, 5])
def test_frozen_stages_are_not_learnt(freeze_at: int) -> None:
    backbone = SwinBackbone("tiny_swin", freeze_at=freeze_at, drop_path=0.5).train()
    sum(stage.square().sum() for stage in backbone(torch.rand(1, 3, 64, 64)).values()).backward()
    learnt = {name.split(".blocks")[0] for name, p in backbone.named_parameters() if p.grad is not None}
    groups = ["patch_embed", "layers.0", "layers.1", "layers.2", "layers.3"]
    frozen = [group for group in groups if not any(name.startswith(group) for name in learnt)]
    assert frozen == groups[:freeze_at]
    assert {"norm0.weight", "norm3.weight"} <= learnt


def test_other_windows_have_their_biases_interpolated_as_timm_does(
    source: Checkpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """At 128 pixels with windows of 4, where all four stages are more than one window but the last, which is one."""
    path, files = tmp_path / "backbone.pkl", tmp_path / "detector"
    convert_file(source, path).check()
    keys = [*SMALL, *flat_overrides(source.spec), "MODEL.DEVICE", "cpu"]
    cfg = load_config(SHAPES_CONFIG, [*keys, "MODEL.SWIN.WINDOW_SIZE", 4])
    checkpointer = BackboneCheckpointer(build_model(cfg).eval(), str(files), cfg=cfg)
    with caplog.at_level("WARNING"):
        checkpointer.load(str(path))
    assert "is not proven" in caplog.text
    assert len(checkpointer.provenance()[0]["interpolated_tensors"]) == 7
    network = source.build()
    network.set_input_size((128, 128), window_size=4)  # type: ignore[operator]
    images = torch.rand(1, 3, 128, 128)
    with torch.no_grad():
        ours = checkpointer.model.backbone.bottom_up(images)
        theirs = network.forward_intermediates(images, intermediates_only=True)  # type: ignore[operator]
    for stage, wanted in zip(("res2", "res3", "res4"), theirs, strict=False):
        wanted = nn.functional.layer_norm(wanted.permute(0, 2, 3, 1), wanted.shape[1:2]).permute(0, 3, 1, 2)
        torch.testing.assert_close(ours[stage], wanted, rtol=1e-4, atol=1e-4)

    # A detector that was trained with them is taken as it is, and still says it.
    checkpointer.save("model_final")
    again = BackboneCheckpointer(build_model(cfg), cfg=cfg)
    with torch.no_grad():
        again.load(str(files / "model_final.pth"))
    assert again.interpolated == checkpointer.interpolated
    state = checkpointer.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.model.state_dict().items())
    with pytest.raises(
        InputError, match=r"MODEL\.SWIN\.WINDOW_SIZE is set, but build_resnet_fpn_backbone makes no Swin"
    ):
        load_config(SHAPES_CONFIG, [*SMALL, "MODEL.SWIN.WINDOW_SIZE", 4])
