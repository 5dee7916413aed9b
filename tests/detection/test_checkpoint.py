"""The guard: what Detectron2 accepts without a word is refused here with the words that mend it."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from robust_backbones.checkpoint.convert import BackboneMetadata, convert, read_backbone, write_backbone
from robust_backbones.checkpoint.format import write_checkpoint
from robust_backbones.checkpoint.sources import read_checkpoint
from robust_backbones.detection import checkpoint as module
from robust_backbones.detection.checkpoint import BackboneCheckpointer, backbone_tensors, newest_checkpoint
from robust_backbones.errors import InputError
from robust_backbones.models import BackboneSpec, build_backbone
from robust_backbones.runs.distributed import join_processes
from robust_backbones.threat_models import ThreatModel
from tests.conftest import start_ranks
from tests.detection.conftest import base_config

Maker = Callable[[str], Path]


@pytest.fixture
def detector(small_cfg: CfgNode) -> nn.Module:
    return build_model(small_cfg)


def load(detector: nn.Module, cfg: CfgNode, path: Path | str, **options: bool) -> BackboneCheckpointer:
    checkpointer = BackboneCheckpointer(detector, cfg=cfg, **options)
    checkpointer.load(str(path))
    return checkpointer


def test_a_converted_backbone_fills_every_tensor(detector: nn.Module, small_cfg: CfgNode, converted: Maker) -> None:
    load(detector, small_cfg, converted("resnet18"))
    tensors, _ = read_backbone(converted("resnet18"))
    state = detector.state_dict()
    names = backbone_tensors(detector)
    assert set(names.values()) == set(tensors)
    for name, short_name in names.items():
        np.testing.assert_array_equal(state[name].numpy(), tensors[short_name])


def test_a_c4_detector_is_filled_up_to_res5_in_its_heads(converted: Maker) -> None:
    cfg = base_config()
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.ROI_HEADS.NAME", "Res5ROIHeads"])
    cfg.merge_from_list([item for pair in BackboneSpec().detectron2_overrides().items() for item in pair])
    detector = build_model(cfg)
    names = backbone_tensors(detector)
    assert len(names) == 265
    assert names["roi_heads.res5.2.conv3.norm.bias"] == "res5.2.conv3.norm.bias"
    load(detector, cfg, converted("resnet50"))


def test_detectron2_alone_loads_nothing_in_silence(detector: nn.Module, torchvision_file: Maker) -> None:
    """The reason for all of this; should Detectron2 mend it, the guard can go."""
    before = {name: tensor.clone() for name, tensor in detector.named_parameters()}
    DetectionCheckpointer(detector).load(str(torchvision_file("resnet18")))
    assert all(torch.equal(tensor, before[name]) for name, tensor in detector.named_parameters())


def test_files_of_other_layouts_are_refused(
    detector: nn.Module, small_cfg: CfgNode, torchvision_file: Maker, tmp_path: Path
) -> None:
    ours = tmp_path / "checkpoint.pt"
    spec = BackboneSpec("resnet18", 4)
    write_checkpoint(ours, spec=spec, state_dict=build_backbone(spec).state_dict(), threat_model=ThreatModel())
    for path in (torchvision_file("resnet18"), ours):
        with pytest.raises(InputError, match=r"robust-backbones convert"):
            load(detector, small_cfg, path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("INPUT.FORMAT", "BGR"),
        ("MODEL.PIXEL_MEAN", [103.53, 116.28, 123.675]),
        ("MODEL.PIXEL_STD", [1.0, 1.0, 1.0]),
        ("MODEL.RESNETS.STRIDE_IN_1X1", True),
        ("MODEL.RESNETS.DEPTH", 34),
        ("MODEL.RESNETS.WIDTH_PER_GROUP", 128),
        ("MODEL.RESNETS.STEM_OUT_CHANNELS", 32),
        ("MODEL.RESNETS.NORM", "GN"),
        ("MODEL.RESNETS.NORM", ""),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused_with_its_mend(
    detector: nn.Module, small_cfg: CfgNode, converted: Maker, key: str, value: object
) -> None:
    others = {"MODEL.RESNETS.NORM": "FrozenBN", "MODEL.RESNETS.STEM_OUT_CHANNELS": 64}
    wanted = (BackboneSpec("resnet18").detectron2_overrides() | others)[key]
    small_cfg.merge_from_list([key, value])
    with pytest.raises(InputError) as error:
        load(detector, small_cfg, converted("resnet18"))
    assert f'{key} "{wanted}"' in str(error.value)
    small_cfg.merge_from_list([key, str(wanted)])  # the mend, as it would be typed
    load(detector, small_cfg, converted("resnet18"))


@pytest.mark.parametrize("damage", ["missing", "shape", "name"])
def test_one_wrong_tensor_is_enough(
    detector: nn.Module, small_cfg: CfgNode, torchvision_file: Maker, tmp_path: Path, damage: str
) -> None:
    checkpoint = read_checkpoint(torchvision_file("resnet18"))
    tensors, _ = convert(checkpoint)
    tensor = tensors.pop("res4.1.conv2.weight")
    if damage == "shape":
        tensors["res4.1.conv2.weight"] = tensor[:, :, :1, :1]
    elif damage == "name":
        tensors["res4.7.conv2.weight"] = tensor
    write_backbone(tmp_path / "damaged.pkl", tensors, BackboneMetadata.of(checkpoint))
    with pytest.raises(InputError, match=r"fills 99 of the backbone's 100 tensors .*res4\.1\.conv2\.weight"):
        load(detector, small_cfg, tmp_path / "damaged.pkl")


@pytest.mark.parametrize("norm", ["BN", "SyncBN", "naiveSyncBN"])
def test_every_batch_norm_takes_the_file_s(small_cfg: CfgNode, converted: Maker, norm: str) -> None:
    small_cfg.MODEL.RESNETS.NORM = norm
    load(build_model(small_cfg), small_cfg, converted("resnet18"))


def test_parts_may_be_missing_where_that_is_asked_for(
    small_cfg: CfgNode, torchvision_file: Maker, tmp_path: Path
) -> None:
    checkpoint = read_checkpoint(torchvision_file("resnet18"))
    tensors, _ = convert(checkpoint)
    part = {name: tensor for name, tensor in tensors.items() if not name.startswith("res5.")}
    write_backbone(tmp_path / "part.pkl", part, BackboneMetadata.of(checkpoint))
    write_backbone(tmp_path / "none.pkl", {"fc.bias": tensors["stem.conv1.weight"]}, BackboneMetadata.of(checkpoint))
    with pytest.raises(InputError, match="--allow-partial-backbone"):
        load(build_model(small_cfg), small_cfg, tmp_path / "part.pkl")
    small_cfg.MODEL.BACKBONE.ALLOW_PARTIAL = True
    saver = BackboneCheckpointer(build_model(small_cfg), str(tmp_path), cfg=small_cfg)
    saver.load(str(tmp_path / "part.pkl"))
    assert {name.split("bottom_up.")[1] for name in saver.unfilled} == tensors.keys() - part.keys()
    assert saver.unfilled
    # It is whole from now on, and still known for what it is.
    saver.save("detector")
    small_cfg.MODEL.BACKBONE.ALLOW_PARTIAL = False
    assert load(build_model(small_cfg), small_cfg, tmp_path / "detector.pth").unfilled == saver.unfilled
    # But a file that fits nothing is still a mistake.
    small_cfg.MODEL.BACKBONE.ALLOW_PARTIAL = True
    with pytest.raises(InputError, match="fills 0 of"):
        load(build_model(small_cfg), small_cfg, tmp_path / "none.pkl")


def test_the_newest_checkpoint_is_found_without_a_note(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    for name in ("model_best", "backbone"):
        (tmp_path / f"{name}.pth").touch()
    assert newest_checkpoint(tmp_path) is None
    for name in ("model_0000099", "model_0000199"):
        (tmp_path / f"{name}.pth").touch()
    assert newest_checkpoint(tmp_path) == tmp_path / "model_0000199.pth"
    (tmp_path / "last_checkpoint").write_text("model_0000299.pth")  # which a user has removed
    assert newest_checkpoint(tmp_path) == tmp_path / "model_0000199.pth"
    (tmp_path / "last_checkpoint").write_text("model_0000099.pth\n")  # who wants to go back
    assert newest_checkpoint(tmp_path) == tmp_path / "model_0000099.pth"
    (tmp_path / "last_checkpoint").unlink()
    (tmp_path / "model_final.pth").touch()
    assert newest_checkpoint(tmp_path) == tmp_path / "model_final.pth"


def test_all_processes_resume_from_the_main_ones_newest_checkpoint(small_cfg: CfgNode, tmp_path: Path) -> None:
    """Another may see the folder later."""
    for name in ("model_0000099", "model_0000199"):
        (tmp_path / f"{name}.pth").touch()

    def resume(rank: int, size: int) -> None:
        with join_processes(torch.device("cpu")), pytest.MonkeyPatch.context() as patch:
            if rank:
                patch.setattr(module, "newest_checkpoint", lambda folder: folder / "model_0000099.pth")
            checkpointer = BackboneCheckpointer(nn.Linear(1, 1), str(tmp_path), cfg=small_cfg)
            assert checkpointer.has_checkpoint()
            assert checkpointer.get_checkpoint_file() == str(tmp_path / "model_0000199.pth")

    start_ranks(resume, tmp_path / "said")


def test_a_file_that_does_not_say_what_it_holds_is_refused(
    detector: nn.Module, small_cfg: CfgNode, converted: Maker, tmp_path: Path
) -> None:
    tensors, _ = read_backbone(converted("resnet18"))
    path = tmp_path / "anonymous.pkl"
    path.write_bytes(pickle.dumps({"model": tensors, "__author__": "someone", "matching_heuristics": True}))
    with pytest.raises(InputError, match="does not say"):
        load(detector, small_cfg, path)


def test_a_random_backbone_has_to_be_asked_for(detector: nn.Module, small_cfg: CfgNode) -> None:
    with pytest.raises(InputError, match="FROM_SCRATCH"):
        load(detector, small_cfg, "")
    small_cfg.MODEL.BACKBONE.FROM_SCRATCH = True
    load(detector, small_cfg, "")


def test_evaluation_needs_the_whole_detector(
    detector: nn.Module, small_cfg: CfgNode, converted: Maker, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="trained detector is needed"):
        load(detector, small_cfg, "", whole_detector=True)
    with pytest.raises(InputError, match=r"lacks .* of the detector's tensors"):
        load(detector, small_cfg, converted("resnet18"), whole_detector=True)

    saver = BackboneCheckpointer(detector, str(tmp_path), cfg=small_cfg)
    saver.load(str(converted("resnet18")))
    saver.save("detector")
    again = build_model(small_cfg)
    loaded = load(again, small_cfg, tmp_path / "detector.pth", whole_detector=True)
    assert loaded.metadata == saver.metadata  # what the backbone was is carried on
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in detector.state_dict().items())


def test_a_save_that_is_cut_off_leaves_the_last_one(
    detector: nn.Module, small_cfg: CfgNode, converted: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = BackboneCheckpointer(detector, str(tmp_path), cfg=small_cfg)
    saver.load(str(converted("resnet18")))
    saver.save("model", iteration=7)
    whole = (tmp_path / "model.pth").read_bytes()

    def cut_off(content: object, file: BinaryIO) -> None:
        file.write(whole[:1000])
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", cut_off)
    for name in ("model", "model_next"):
        with pytest.raises(KeyboardInterrupt):
            saver.save(name)
    assert (tmp_path / "model.pth").read_bytes() == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last_checkpoint", "model.pth"]
    assert saver.resume_or_load("", resume=True)["iteration"] == 7


def test_a_missing_file_is_named(detector: nn.Module, small_cfg: CfgNode, tmp_path: Path) -> None:
    for name in ("none.pkl", "none.pth"):
        with pytest.raises(InputError, match=name):
            load(detector, small_cfg, tmp_path / name)
