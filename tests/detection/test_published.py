"""Published backbones in a detector: hub:NAME for the converter, robust://NAME for MODEL.WEIGHTS."""

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import Tensor, nn

from robust_backbones.checkpoint.convert import read_backbone
from robust_backbones.checkpoint.names import translated
from robust_backbones.checkpoint.sources import read_published
from robust_backbones.checkpoint.zoo import cache_folder
from robust_backbones.detection.checkpoint import BackboneCheckpointer, backbone_tensors
from robust_backbones.detection.verify import converted_backbone
from robust_backbones.errors import InputError, ProofFailedError
from robust_backbones.models import BackboneSpec, build_backbone
from robust_backbones.runs.record import RunRecord
from robust_backbones.threat_models import ThreatModel
from tests.conftest import randomize_batch_norms
from tests.detection.conftest import SHAPES_CONFIG, SMALL
from tests.detection.test_train_net import TINY, train_net
from tests.hub import FakeHub, hub_fixture, robustness_file  # noqa: F401

RunTool = Callable[..., tuple[int, str, str]]
NAME = "resnet18_l2_eps3"
FILE = "resnet18_l2_eps3.ckpt"
MEAN, STD = (0.4717, 0.4499, 0.3837), (0.26, 0.257, 0.274)


def network(arch: str = "resnet18", seed: int = 1) -> nn.Module:
    backbone = build_backbone(BackboneSpec(arch, 10), seed=seed)
    randomize_batch_norms(backbone, seed)
    return backbone


@cache
def resnet18_file() -> bytes:
    return robustness_file(network())


def load(cfg: CfgNode, name: str = NAME) -> dict[str, Tensor]:
    """The backbone of a detector with robust://NAME, by torchvision's names."""
    detector = build_model(cfg)
    BackboneCheckpointer(detector, cfg=cfg).load(f"robust://{name}")
    state = detector.state_dict()
    names = backbone_tensors(detector).items()
    return {translated(short, "detectron2", "torchvision"): state[full] for full, short in names}


def assert_holds(loaded: dict[str, Tensor], published: nn.Module) -> None:
    expected = published.state_dict()
    assert loaded.keys() == {name for name in expected if not name.startswith("fc.") and "num_batches" not in name}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.items())


def test_the_tool_converts_and_proves_a_published_backbone(hub: FakeHub, run_tool: RunTool, tmp_path: Path) -> None:
    hub.files[FILE] = robustness_file(network(), mean=MEAN, std=STD)
    status, output, errors = run_tool("convert", f"hub:{NAME}", tmp_path / "out.pkl")
    assert status == 0, errors
    assert "MadryLab's robustness library, resnet18, threat model L2:3" in output
    for name, values in (("mean", MEAN), ("std", STD)):
        assert f"{name} {' '.join(f'{value:g}' for value in values)} (said by the file)" in output
    assert "features are equal" in output
    tensors, metadata = read_backbone(tmp_path / "out.pkl")
    assert len(tensors) == 100
    assert metadata.spec == BackboneSpec("resnet18", 10, mean=MEAN, std=STD)
    assert (metadata.threat_model, metadata.layout, metadata.source) == ("L2:3", "robustness", FILE)
    assert metadata.source_sha256 == hashlib.sha256(hub.files[FILE]).hexdigest()


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("hub:resnet18_l2_eps3.0", [], "no published backbone is called 'resnet18_l2_eps3.0': the nearest names are"),
        ("hub:", [], "no published backbone is called ''"),
        (f"hub:{NAME}", ["--source", "robustness"], "leave out what describes"),
        (f"hub:{NAME}", ["--threat-model", "L2:3"], "leave out what describes"),
        (f"hub:{NAME}", ["--mean", 0, 0, 0], "leave out what describes"),
        (f"hub:{NAME}", ["--stride-in-1x1", "false"], "leave out what describes"),
    ],
)
def test_what_cannot_be_asked_of_the_hub_is_refused_before_it_is_asked(
    hub: FakeHub, run_tool: RunTool, tmp_path: Path, source: str, options: list[object], message: str
) -> None:
    status, _, errors = run_tool("convert", source, tmp_path / "out.pkl", *options)
    assert status == 2
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert message in errors
    assert hub.requests == []
    assert not list(tmp_path.iterdir())


def test_a_published_network_that_is_no_resnet_is_refused(hub: FakeHub, run_tool: RunTool, tmp_path: Path) -> None:
    hub.files["densenet_l2_eps3.ckpt"] = robustness_file(network("densenet161"), wrapper="model.")
    status, output, errors = run_tool("convert", "hub:densenet_l2_eps3", tmp_path / "out.pkl")
    assert status == 2
    assert "densenet161, threat model L2:3" in output
    assert errors.splitlines()[-1].startswith("error: Detectron2's ResNet has no such architecture: densenet161;")
    assert not (tmp_path / "out.pkl").exists()


@pytest.mark.parametrize(
    ("name", "threat_model"),
    [(NAME, ThreatModel("L2", 3)), ("resnet18_linf_eps4.0", ThreatModel("Linf", 4 / 255))],
)
def test_the_name_says_the_threat_model(hub: FakeHub, name: str, threat_model: ThreatModel) -> None:
    hub.files[f"{name}.ckpt"] = resnet18_file()
    checkpoint = read_published(name)
    assert checkpoint.threat_model == threat_model
    assert (checkpoint.prefix, checkpoint.said["mean"]) == ("module.model.", "said by the file")


def test_a_file_of_another_architecture_than_its_names_is_refused(
    hub: FakeHub, run_tool: RunTool, tmp_path: Path
) -> None:
    hub.files["resnet50_l2_eps3.ckpt"] = resnet18_file()
    status, _, errors = run_tool("convert", "hub:resnet50_l2_eps3", tmp_path / "out.pkl")
    assert status == 2
    message = "error: resnet50_l2_eps3.ckpt holds a resnet18, not the resnet50 of its name"
    assert errors.splitlines()[-1] == message
    with pytest.raises(InputError, match="holds a resnet18, not the resnet50"):
        converted_backbone("resnet50_l2_eps3")
    assert not (cache_folder() / "detectron2").exists()


@pytest.mark.slow
def test_a_detector_starts_from_a_published_backbone(hub: FakeHub, small_cfg: CfgNode) -> None:
    hub.files[FILE] = resnet18_file()
    assert_holds(load(small_cfg), network())
    path = converted_backbone(NAME)
    assert path == cache_folder() / "detectron2" / f"{NAME}.pkl"
    made = path.stat().st_mtime_ns

    # Neither downloaded nor converted again.
    hub.requests.clear()
    assert_holds(load(small_cfg), network())
    assert hub.requests == []
    assert path.stat().st_mtime_ns == made

    # Converted anew once it is another file.
    another = network(seed=2)
    hub.files[FILE] = robustness_file(another)
    for suffix in ("", ".sha256"):
        (cache_folder() / "published" / f"{FILE}{suffix}").unlink()
    assert_holds(load(small_cfg), another)
    assert read_backbone(path)[1].source_sha256 == hashlib.sha256(hub.files[FILE]).hexdigest()


def test_detectron2_itself_finds_a_published_backbone(hub: FakeHub, small_cfg: CfgNode) -> None:
    hub.files[FILE] = resnet18_file()
    detector = build_model(small_cfg)
    DetectionCheckpointer(detector).load(f"robust://{NAME}")
    expected = network().state_dict()["layer4.1.conv2.weight"]
    assert torch.equal(detector.state_dict()["backbone.bottom_up.res5.1.conv2.weight"], expected)


@pytest.mark.slow
def test_a_converted_file_that_is_not_what_it_was_is_made_anew(hub: FakeHub) -> None:
    hub.files[FILE] = resnet18_file()
    path = converted_backbone(NAME)
    content, note = path.read_bytes(), path.with_name(f"{path.name}.sha256")
    middle = len(content) // 2
    path.write_bytes(content[:middle] + b"another" + content[middle + 7 :])
    assert converted_backbone(NAME) == path
    assert path.read_bytes() == content

    # An older version of this package wrote it as it is.
    path.write_bytes(content.replace(b"robust_backbones.backbone/1", b"robust_backbones.backbone/0"))
    note.write_text(hashlib.sha256(path.read_bytes()).hexdigest())
    assert converted_backbone(NAME) == path
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [(0.0, ProofFailedError, "features of .* differ"), (float("inf"), InputError, "not finite: layer4")],
)
def test_what_is_not_proven_is_not_kept(hub: FakeHub, value: float, error: type[Exception], message: str) -> None:
    broken = network()
    for parameter in broken.layer4.parameters():
        nn.init.constant_(parameter, value)
    hub.files[FILE] = robustness_file(broken)
    with pytest.raises(error, match=message):
        converted_backbone(NAME)
    assert not list((cache_folder() / "detectron2").glob("*"))


@pytest.mark.slow
def test_train_net_from_a_published_backbone(hub: FakeHub, shapes: Path, tmp_path: Path) -> None:
    hub.files[FILE] = resnet18_file()
    overrides = [*SMALL, *TINY, "MODEL.WEIGHTS", f"robust://{NAME}", "SOLVER.MAX_ITER", 2]
    out, _ = train_net(shapes, *overrides, "OUTPUT_DIR", tmp_path / "run")
    assert "backbone: 100 of 100 tensors filled" in out
    assert hub.downloads == [FILE]
    record = RunRecord.read(tmp_path / "run/record.json")
    assert record.threat_model == "L2:3"
    assert record.backbone["source"] == FILE
    assert record.backbone["source_sha256"] == hashlib.sha256(hub.files[FILE]).hexdigest()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet18_l2_eps3.0", ["the nearest names are resnet18_l2_eps3"]),
        (NAME, ["cannot download", "404", f"cache/published/{FILE} yourself"]),
    ],
)
def test_train_net_says_what_it_cannot_have(
    hub: FakeHub,
    run_tool: RunTool,
    monkeypatch: pytest.MonkeyPatch,
    shapes: Path,
    tmp_path: Path,
    name: str,
    words: list[str],
) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(shapes))
    overrides = [*SMALL, "MODEL.WEIGHTS", f"robust://{name}", "OUTPUT_DIR", tmp_path / "run"]
    status, _, errors = run_tool("train", "--config-file", SHAPES_CONFIG, *overrides)
    assert status == 2
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert all(word in errors for word in words)
    assert not (tmp_path / "run").exists()
