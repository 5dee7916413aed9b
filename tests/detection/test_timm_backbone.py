"""Networks of timm under a feature pyramid: converted with proof, guarded, frozen, and resumed exactly."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from detectron2.modeling import build_model
from torch import Tensor, nn

from robust_backbones.checkpoint.convert import convert_file, read_backbone
from robust_backbones.checkpoint.format import Checkpoint
from robust_backbones.checkpoint.sources import Statement, read_checkpoint
from robust_backbones.detection.checkpoint import BackboneCheckpointer, backbone_tensors
from robust_backbones.detection.config import CONFIG_DIR, load_config
from robust_backbones.detection.swin_backbone import SwinBackbone
from robust_backbones.detection.timm_backbone import TimmBackbone
from robust_backbones.detection.verify import feature_errors, prove
from robust_backbones.errors import InputError, ProofFailedError
from robust_backbones.models import usual_spec
from robust_backbones.runs.identity import flat
from robust_backbones.timm_models import build_stages
from tests.conftest import randomize_batch_norms
from tests.detection.conftest import CASCADE, SHAPES_CONFIG, SMALL, flat_overrides
from tests.detection.test_trainer import run, same, weights
from tests.detection.tiny_networks import write_timm_file

STATED = Statement(mean=(0.5,) * 3, std=(0.5,) * 3, channel_order="RGB")
FAMILIES = ("timm_", "convnext_", "swin_")
"""What the files of their architectures begin with."""


def checkpoint_of(arch: str, folder: Path) -> Checkpoint:
    """A network of timm with random weights and statistics, as timm writes it."""
    network = timm.create_model(arch, num_classes=10)
    randomize_batch_norms(network)
    for name, parameter in network.named_parameters():
        if name.endswith("gamma"):  # ConvNeXt's scales begin at 1e-6, which would hide its blocks
            nn.init.ones_(parameter)
    path = folder / f"{arch}.pth"
    cfg = network.pretrained_cfg | {"architecture": arch}
    torch.save({"pretrained_cfg": cfg, "state_dict": network.state_dict()}, path)
    return read_checkpoint(path, statement=Statement(threat_model="L2:0"))


@pytest.mark.parametrize("arch", ["test_efficientnet", "test_convnext"])
def test_the_stages_are_those_of_the_source_network(arch: str, tmp_path: Path) -> None:
    """In both modes of batch norm; a source with another weight in its last stage is not that of the file."""
    checkpoint, path = checkpoint_of(arch, tmp_path), tmp_path / "backbone.pkl"
    report = convert_file(checkpoint, path, prove=prove)
    assert report.ok
    assert not any("head" in name or "classifier" in name for name in report.renamed)
    errors = feature_errors(checkpoint, path)
    assert {error.against for error in errors} == {"timm's own network"}
    assert {error.batch_norm for error in errors} == {"eval", "train"}
    assert max(error.relative for error in errors) < 1e-4
    name = max(name for name in report.renamed if name.endswith("conv_dw.weight"))
    checkpoint.state_dict[name] += 1
    with pytest.raises(ProofFailedError, match="res5"):
        prove(checkpoint, path)


def test_the_guard_holds_the_configuration_to_the_file(tmp_path: Path) -> None:
    checkpoint, path = checkpoint_of("test_efficientnet", tmp_path), tmp_path / "backbone.pkl"
    convert_file(checkpoint, path).check()
    own = flat_overrides(checkpoint.spec)

    def load(*overrides: object) -> nn.Module:
        cfg = load_config(SHAPES_CONFIG, [*SMALL, *own, "MODEL.DEVICE", "cpu", *overrides])
        detector = build_model(cfg)
        BackboneCheckpointer(detector, cfg=cfg).load(str(path))
        return detector

    tensors, _ = read_backbone(path)
    held = load().backbone.bottom_up.network.state_dict()
    assert all(torch.equal(held[name], tensor) for name, tensor in tensors.items())
    with pytest.raises(InputError, match=r"MODEL\.PIXEL_STD"):
        load("MODEL.PIXEL_STD", [1.0, 1.0, 1.0])
    with pytest.raises(InputError, match=r"MODEL\.BACKBONE\.TIMM is test_byobnet.* add the overrides"):
        load("MODEL.BACKBONE.TIMM", "test_byobnet")
    with pytest.raises(InputError, match=r"MODEL\.BACKBONE\.NAME is build_resnet_fpn_backbone"):
        load("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone")


@pytest.mark.parametrize(
    ("arch", "norm", "message"),
    [
        ("test_vit", "BN", "takes images of one size alone"),
        ("swin_tiny_patch4_window7_224", "BN", "takes images of one size alone"),
        ("resnet51", "BN", "timm has no network"),
        ("test_efficientnet", "GN", "unknown norm of a backbone of timm 'GN'"),
    ],
)
def test_what_cannot_be_a_backbone_is_refused_by_name(arch: str, norm: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        TimmBackbone(arch, norm=norm)


def test_frozen_stages_have_no_gradients_and_frozen_norms() -> None:
    images = torch.rand(2, 3, 64, 64)
    backbone = TimmBackbone("test_efficientnet", norm="BN", freeze_at=2).train()
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    sum(stage.sum() for stage in backbone(images).values()).backward()
    learnt = {name.split(".")[1] for name, tensor in backbone.named_parameters() if tensor.grad is not None}
    assert learnt == {"blocks"}
    stages = {name.split(".")[2] for name, tensor in backbone.named_parameters() if tensor.grad is not None}
    moved = {
        name.split(".")[2] for name, tensor in backbone.state_dict().items() if not torch.equal(tensor, before[name])
    }
    assert stages == moved == {"2", "3", "4"}
    frozen = TimmBackbone("test_efficientnet").train()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in frozen.modules())


NETWORKS = sorted(path for path in CONFIG_DIR.glob("architectures/*.yaml") if path.stem.startswith(FAMILIES))


@pytest.mark.parametrize("path", NETWORKS, ids=lambda path: path.stem)
def test_its_configuration_is_what_the_network_needs(path: Path) -> None:
    cfg = load_config([CONFIG_DIR / "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml", path])
    values = flat(cfg)
    needed = usual_spec(cfg.MODEL.BACKBONE.TIMM).detectron2_overrides()
    assert {key: values[key] for key in needed} == needed
    if path.stem.endswith(("_t", "_lite0")):  # the larger ones take seconds
        assert len(backbone_tensors(build_model(cfg))) > 100


@pytest.mark.parametrize("task", ["mask_rcnn", "cascade_mask_rcnn"])
def test_its_files_are_stacked_in_any_order(task: str) -> None:
    """With the protocol of its makers and that of adversarial training, for detectors with and without masks."""
    base = CONFIG_DIR / f"COCO-InstanceSegmentation/{task}_R_50_FPN_1x.yaml"
    for path in NETWORKS:
        family = path.stem.split("_")[0]
        for protocol in sorted(CONFIG_DIR.glob(f"protocols/{family}*.yaml")):
            on_cpu = ["SOLVER.AMP.DTYPE", "bfloat16"]
            assert load_config([base, protocol, path], on_cpu) == load_config([base, path, protocol], on_cpu)
        load_config([base, path, CONFIG_DIR / "protocols/adversarial_free.yaml"])


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x", r"MODEL\.RPN\.IN_FEATURES asks for res4, and build_swin"),
        ("COCO-InstanceSegmentation/mask_rcnn_R_50_DC5_1x", "asks for a dilated last stage, which build_swin"),
        ("COCO-Detection/retinanet_R_50_FPN_1x", r"MODEL\.RETINANET\.IN_FEATURES asks for p7, and build_swin"),
    ],
)
def test_detectors_without_its_pyramid_are_refused_by_name(task: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_config([CONFIG_DIR / f"{task}.yaml", CONFIG_DIR / "architectures/swin_t.yaml"])


def test_deformable_convolutions_are_refused_by_name() -> None:
    files = [CONFIG_DIR / "Base-RCNN-FPN.yaml", CONFIG_DIR / "architectures/convnext_t.yaml"]
    with pytest.raises(InputError, match="deformable convolutions, which build_timm_fpn_backbone does not have"):
        load_config(files, ["MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False, True, True, True]])


@pytest.mark.parametrize(
    "build",
    [
        partial(SwinBackbone, "tiny_swin"),
        partial(TimmBackbone, "test_convnext"),
        partial(TimmBackbone, "test_efficientnet"),
    ],
    ids=["swin", "convnext", "efficientnet"],
)
def test_recomputing_changes_no_gradient(build: Callable[..., nn.Module]) -> None:
    """Although paths are dropped; and fewer activations are kept."""
    plain, recomputed = (build(drop_path=0.5, recompute=way).train() for way in (False, True))
    recomputed.load_state_dict(plain.state_dict())
    gradients, kept = [], []
    for network in (plain, recomputed):
        torch.manual_seed(0)
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            total = sum(stage.square().sum() for stage in network(torch.rand(2, 3, 64, 64)).values())
        total.backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
        kept.append(sum(sizes.values()))
    assert kept[1] < 0.7 * kept[0]
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_what_cannot_be_recomputed_or_normalised_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="would have batch norms count each batch twice"):
        TimmBackbone("test_efficientnet", norm="BN", recompute=True)
    of_one_number = TimmBackbone("resnest14d", norm="BN").train()
    with pytest.raises(InputError, match="batch norms of timm's resnest14d see one number a channel and image"):
        of_one_number(torch.rand(1, 3, 64, 64))
    assert of_one_number(torch.rand(2, 3, 64, 64)).keys() == {"res2", "res3", "res4", "res5"}
    with pytest.raises(InputError, match="timm's bat_resnext26ts takes no images of 96x64 pixels"):
        TimmBackbone("bat_resnext26ts").eval()(torch.rand(1, 3, 64, 96))


def test_no_block_is_left_out_unless_asked_for() -> None:
    """timm's FocalNet leaves out blocks where nothing is said."""
    for asked in (0.0, 0.2):
        with torch.device("meta"):
            network, _ = build_stages("focalnet_tiny_srf", drop_path=asked)
        rates = {one.drop_prob for one in network.modules() if isinstance(one, timm.layers.DropPath)}
        assert max(rates) == pytest.approx(asked)


# --- training ---


ADAMW = ["SOLVER.OPTIMIZER", "AdamW", "SOLVER.BASE_LR", 1e-3, "MODEL.BACKBONE.FREEZE_AT", 0]
ADAMW += ["SOLVER.LAYER_DECAY", 0.8, "MODEL.BACKBONE.DROP_PATH", 0.5]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "overrides"),
    [
        ("tiny_swin", ["MODEL.MASK_ON", False, "SOLVER.EMA_DECAY", 0.9]),
        ("test_convnext", ["MODEL.FAST_STEP", True, "INPUT.MASK_FORMAT", "bitmask"]),
        ("test_convnext", ["MODEL.BACKBONE.USE_ACT_CHECKPOINT", True]),
        ("tiny_swin", ["MODEL.BACKBONE.USE_ACT_CHECKPOINT", True]),
        ("tiny_swin", ["ADVERSARIAL.KIND", "pgd", "ADVERSARIAL.STEPS", 1]),
        ("test_convnext", ["ADVERSARIAL.KIND", "free", "ADVERSARIAL.REPLAYS", 2]),
        ("test_convnext", [*CASCADE, "SOLVER.AMP.ENABLED", True]),
        ("tiny_swin", ["INPUT.SCALE_JITTER", (0.1, 2.0, 128)]),
    ],
    ids=["average", "fast_step", "recomputed", "recomputed_swin", "pgd", "free", "cascade_bfloat16", "jitter"],
)
def test_a_killed_run_resumes_as_the_unbroken_one(
    arch: str, overrides: list[object], shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also which blocks are left out; and every part of the backbone has learnt."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(shapes))
    write = write_timm_file if arch == "tiny_swin" else checkpoint_of
    checkpoint, path = write(arch, tmp_path), tmp_path / "backbone.pkl"
    convert_file(checkpoint, path).check()
    run_of = ["MODEL.WEIGHTS", path, "OUTPUT_DIR", tmp_path / "run", "SOLVER.MAX_ITER", 3, "SOLVER.STEPS", ()]
    run_of += ["SOLVER.CHECKPOINT_PERIOD", 1, "SOLVER.IMS_PER_BATCH", 2, "DATALOADER.NUM_WORKERS", 0]
    run_of += ["TEST.EXPECTED_RESULTS", [], "TEST.VISUALIZE", 0, "MODEL.DEVICE", "cpu", "SOLVER.AMP.ENABLED", False]
    own = flat_overrides(checkpoint.spec)
    cfg = load_config(CONFIG_DIR / SHAPES_CONFIG, [*SMALL, *own, *run_of, *ADAMW, *overrides])
    unbroken, losses = run(cfg)
    cfg.OUTPUT_DIR += "_killed"
    run(cfg, last=1)
    resumed, again = run(cfg, resume=True)
    assert again.rows == {iteration: losses.rows[iteration] for iteration in again.rows}
    assert same(weights(resumed.model), weights(unbroken.model))
    assert same(weights(resumed.evaluated_model), weights(unbroken.evaluated_model))
    start, _ = read_backbone(path)
    state = unbroken.model.state_dict()
    held = {own: state[name] for name, own in backbone_tensors(unbroken.model).items()}
    moved = [name for name, tensor in start.items() if not torch.equal(held[name], tensor)]
    assert len(moved) > 0.8 * len(start)


@pytest.mark.parametrize("arch", ["test_vit", "test_convnext", pytest.param("resnest14d", marks=pytest.mark.slow)])
def test_files_of_halves_are_proven(arch: str, tmp_path: Path) -> None:
    """By our reading too, where nobody's code builds the network."""
    torch.manual_seed(0)
    tensors = timm.create_model(arch, num_classes=3).half().state_dict()
    torch.save({"state_dict": tensors, "architecture": arch}, tmp_path / "half.pth")
    checkpoint = read_checkpoint(tmp_path / "half.pth", statement=STATED)
    convert_file(checkpoint, tmp_path / "backbone.pkl", prove=prove)
    held, _ = read_backbone(tmp_path / "backbone.pkl")
    assert {tensor.dtype for tensor in held.values()} == {torch.float32}
