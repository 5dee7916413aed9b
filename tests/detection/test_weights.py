"""MODEL.WEIGHTS of every kind: what Detectron2 takes is taken, and the advice for the rest, followed, trains."""

import pickle
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import Tensor

from robust_backbones.checkpoint.convert import convert
from robust_backbones.checkpoint.format import write_checkpoint
from robust_backbones.checkpoint.sources import read_checkpoint
from robust_backbones.detection.checkpoint import BackboneCheckpointer, backbone_tensors
from robust_backbones.detection.config import CONFIG_DIR, load_config
from robust_backbones.errors import InputError
from robust_backbones.models import BackboneSpec, build_backbone
from robust_backbones.threat_models import ThreatModel
from tests.detection.conftest import SHAPES_CONFIG, SMALL
from tests.detection.test_sources import caffe2_blobs

Maker = Callable[[str], Path]
RunTool = Callable[..., tuple[int, str, str]]


def load(cfg: CfgNode, weights: object) -> dict[str, Tensor]:
    """The tensors of a detector's backbone, by the file's names."""
    detector = build_model(cfg)
    BackboneCheckpointer(detector, cfg=cfg).load(str(weights))
    state = detector.state_dict()
    return {short: state[name] for name, short in backbone_tensors(detector).items()}


@pytest.fixture
def r50(torchvision_file: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Detectron2's default backbone in its cache, as Detectron2 has downloaded it."""
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    path = tmp_path / "detectron2/ImageNetPretrained/MSRA/R-50.pkl"
    path.parent.mkdir(parents=True)
    tensors, _ = convert(read_checkpoint(torchvision_file("resnet50")))
    path.write_bytes(pickle.dumps(caffe2_blobs(tensors, bias=False), 2))
    return path


@pytest.mark.slow
def test_detectron2_s_default_backbone_trains_as_it_is(r50: Path) -> None:
    """By its URL and its path, each tensor as plain Detectron2 loads it; the configuration is held to its feeding."""
    small = ["MODEL.DEVICE", "cpu", "MODEL.FPN.OUT_CHANNELS", 8, "MODEL.ROI_BOX_HEAD.FC_DIM", 8]
    caffe2 = ["INPUT.FORMAT", "BGR", "MODEL.PIXEL_MEAN", [103.53, 116.28, 123.675], "MODEL.PIXEL_STD", [1.0, 1.0, 1.0]]
    base = CONFIG_DIR / "Base-RCNN-FPN.yaml"
    cfg = load_config(base, [*small, *caffe2, "MODEL.RESNETS.STRIDE_IN_1X1", True])
    theirs = build_model(cfg)
    DetectionCheckpointer(theirs).load(str(r50))
    for weights in ("detectron2://ImageNetPretrained/MSRA/R-50.pkl", r50):
        loaded = load(cfg, weights)
        for name, short in backbone_tensors(theirs).items():
            # Detectron2 fills in a variance of 1, to which the norm adds epsilon; a scale and a shift alone are meant.
            expected = theirs.state_dict()[name] - (1e-5 if name.endswith("running_var") else 0)
            torch.testing.assert_close(loaded[short], expected, rtol=0, atol=0)

    with pytest.raises(InputError, match=r"STRIDE_IN_1X1 is False.*: add the overrides ") as refused:
        load(load_config(base, small), r50)
    mend = shlex.split(str(refused.value).partition("add the overrides ")[2])
    load(load_config(base, [*small, *mend]), r50)


def a_torchvision_file(make: Maker, folder: Path) -> str:
    return str(make("resnet18"))


def our_own_checkpoint(make: Maker, folder: Path) -> str:
    spec, path = BackboneSpec("resnet18", 4), folder / "checkpoint.pt"
    write_checkpoint(path, spec=spec, state_dict=build_backbone(spec).state_dict(), threat_model=ThreatModel())
    return str(path)


def a_folder(make: Maker, folder: Path) -> str:
    our_own_checkpoint(make, folder)
    return str(folder)


def another_architecture(make: Maker, folder: Path) -> str:
    return str(make("resnet34"))


def follow(sentence: str, folder: Path, run_tool: RunTool) -> list[str]:
    """The overrides that the advice in an error leads to, after running the command that it names."""
    if command := re.search(r"`robust-backbones (convert .*) (\S+)`", sentence):
        target = folder / command[2]
        status, _, error = run_tool(*shlex.split(command[1]), target, "--no-verify")
        assert status == 0, error
        return ["MODEL.WEIGHTS", str(target)]
    if overrides := re.search(r"add the overrides (.*)", sentence):
        return shlex.split(overrides[1])
    (given,) = re.findall(r"give MODEL\.WEIGHTS (\S+)", sentence)
    return ["MODEL.WEIGHTS", given]


@pytest.mark.parametrize(
    ("make", "steps"),
    [
        (a_torchvision_file, 1),
        (our_own_checkpoint, 1),
        (a_folder, 2),
        (another_architecture, 2),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_advice_for_weights_that_do_not_fit_ends_in_ones_that_do(
    make: Callable[[Maker, Path], str],
    steps: int,
    torchvision_file: Maker,
    run_tool: RunTool,
    small_cfg: CfgNode,
    tmp_path: Path,
) -> None:
    overrides = ["MODEL.WEIGHTS", make(torchvision_file, tmp_path)]
    for _ in range(steps):
        cfg = load_config(SHAPES_CONFIG, [*SMALL, "MODEL.DEVICE", "cpu", *overrides])
        with pytest.raises(InputError) as refused:
            load(cfg, cfg.MODEL.WEIGHTS)
        overrides += follow(str(refused.value), tmp_path, run_tool)
    cfg = load_config(SHAPES_CONFIG, [*SMALL, "MODEL.DEVICE", "cpu", *overrides])
    load(cfg, cfg.MODEL.WEIGHTS)


def test_the_converter_s_name_of_a_published_backbone_is_mended(small_cfg: CfgNode) -> None:
    with pytest.raises(InputError, match=r"give MODEL\.WEIGHTS robust://resnet18_l2_eps3$"):
        load(small_cfg, "hub:resnet18_l2_eps3")
