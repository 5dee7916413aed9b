"""Vision transformers of timm as Detectron2's ViT: converted with proof, guarded, frozen; others are refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import detectron2
import pytest
import timm
import torch
from detectron2.config import CfgNode, LazyConfig, instantiate
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from timm.layers import DropPath
from torch import Tensor, nn

from robust_backbones.checkpoint.convert import convert_file, read_backbone, write_backbone
from robust_backbones.checkpoint.format import Checkpoint
from robust_backbones.checkpoint.names import of_vit
from robust_backbones.checkpoint.sources import Statement, read_checkpoint
from robust_backbones.detection.checkpoint import BackboneCheckpointer, backbone_tensors
from robust_backbones.detection.config import load_config
from robust_backbones.detection.predictor import build_detector
from robust_backbones.detection.unproven import differences, position_embeddings
from robust_backbones.detection.verify import feature_errors, prove
from robust_backbones.detection.vit_backbone import build_vit, check_keys
from robust_backbones.errors import InputError, ProofFailedError
from robust_backbones.models import build_backbone, usual_spec
from robust_backbones.runs.identity import flat
from robust_backbones.timm_vit import vit_shape
from tests.detection.conftest import CASCADE, SHAPES_CONFIG, SMALL
from tests.detection.test_trainer import run, same, weights

VIT: list[object] = [
    *("MODEL.BACKBONE.NAME", "build_vit_sfp_backbone", "MODEL.BACKBONE.TIMM", "test_vit"),
    *("MODEL.VIT.PRETRAIN_SIZE", 160, "MODEL.BACKBONE.FREEZE_AT", 0, "MODEL.DEVICE", "cpu"),
    *("MODEL.PIXEL_MEAN", [127.5] * 3, "MODEL.PIXEL_STD", [127.5] * 3),
]
"""timm's test_vit: six blocks of width 64, for images of 160 px; after SMALL."""
SQUARE: list[object] = [
    *("MODEL.VIT.SQUARE_SIZE", 128, "MODEL.VIT.WINDOW_SIZE", 3, "MODEL.VIT.GLOBAL_BLOCKS", (1, 3, 5)),
    *("MODEL.VIT.REL_POS", True, "INPUT.MAX_SIZE_TRAIN", 128, "INPUT.MAX_SIZE_TEST", 128, "MODEL.FPN.NORM", "LN"),
]
"""After VIT: as ViTDet has it, in small."""


def configuration(*overrides: object) -> CfgNode:
    return load_config(SHAPES_CONFIG, [*SMALL, *VIT, *overrides])


def vit(*overrides: object) -> Any:
    torch.manual_seed(0)
    return build_vit(configuration(*overrides)).eval()


def checkpoint_of(arch: str, folder: Path, **options: Any) -> Checkpoint:
    """A network of timm with random weights, large enough that no part is nearly linear, as timm writes it."""
    torch.manual_seed(0)
    network = timm.create_model(arch, num_classes=10, **options)
    for parameter in network.parameters():
        nn.init.normal_(parameter, 1 if parameter.ndim == 1 else 0, 0.1)
    path = folder / f"{arch}.pth"
    cfg = network.pretrained_cfg | {"architecture": arch}
    torch.save({"pretrained_cfg": cfg, "state_dict": network.state_dict()}, path)
    return read_checkpoint(path, statement=Statement(threat_model="L2:0"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return checkpoint_of("test_vit", tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="module")
def backbone_file(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("converted") / "backbone.pkl"
    convert_file(checkpoint, path).check()
    return path


def test_the_features_are_those_of_the_source_without_its_class_token(
    checkpoint: Checkpoint, tmp_path: Path, backbone_file: Path
) -> None:
    report = convert_file(checkpoint, tmp_path / "backbone.pkl", prove=prove)
    assert report.ok
    assert {*report.dropped} == {"cls_token", "norm.weight", "norm.bias", "head.weight", "head.bias"}
    errors = feature_errors(checkpoint, backbone_file)
    assert {(error.stage, error.batch_norm) for error in errors} == {("last_feat", "eval"), ("last_feat", "train")}
    assert {error.against for error in errors} == {"timm's own network without its class token"}
    assert max(error.relative for error in errors) < 1e-4
    other = dict(checkpoint.state_dict)
    other["blocks.2.mlp.fc1.bias"] = other["blocks.2.mlp.fc1.bias"] + 1
    checkpoint = replace(checkpoint, state_dict=other)
    with pytest.raises(ProofFailedError, match="last_feat"):
        prove(checkpoint, backbone_file)


@pytest.mark.parametrize(
    ("arch", "norm_epsilon"),
    [("test_vit", 0.1), pytest.param("vit_small_patch16_224_convstem", 0.0, marks=pytest.mark.slow)],
)
def test_other_epsilons_and_stems_are_the_sources_too(arch: str, norm_epsilon: float, tmp_path: Path) -> None:
    """As transformers has the first, and Singh et al. 2023 the second; a file that hides the epsilon is refused."""
    spec = replace(usual_spec(arch, 3), image_size=64, norm_epsilon=norm_epsilon)
    network = build_backbone(spec)
    for parameter in network.parameters():
        nn.init.normal_(parameter, 1 if parameter.ndim == 1 else 0, 0.1)
    source = Checkpoint(spec, network.state_dict(), None, "robust_backbones", "own.pt", "0")
    report = convert_file(source, tmp_path / "backbone.pkl", prove=prove)
    assert len(report.renamed) == len(source.state_dict) - 5
    if norm_epsilon:
        with pytest.raises(ProofFailedError, match="last_feat"):
            prove(replace(source, spec=replace(spec, norm_epsilon=0.0)), tmp_path / "backbone.pkl")
    else:
        assert sum("patch_embed.proj.stem." in name for name in report.renamed) == 18


def test_every_tensor_of_the_vit_is_one_of_timms() -> None:
    names = timm.create_model("test_vit").state_dict()
    converted = {new for name in names if (new := of_vit(name))}
    assert converted == {*vit().state_dict()}
    assert of_vit("blocks.0.ls1.gamma") is None


def test_without_mixing_of_tokens_the_class_token_changes_nothing(checkpoint: Checkpoint) -> None:
    """And with it something; both are reported with the interpolation of position embeddings."""
    effect, interpolation = differences(checkpoint)
    assert "class token" in effect.what
    assert effect.image == "random"
    assert effect.relative > 1e-3
    assert "position embeddings at 1024 pixels" in interpolation.what
    tensors = {n: torch.zeros_like(t) if ".attn.proj." in n else t for n, t in checkpoint.state_dict.items()}
    unmixed, _ = differences(replace(checkpoint, state_dict=tensors))
    assert unmixed.relative < 1e-6


def test_position_embeddings_are_interpolated_elsewhere_than_at_their_own_size(checkpoint: Checkpoint) -> None:
    """Two bicubic kernels agree where nothing is interpolated and on constants; else they do not."""
    of_timm, ours = position_embeddings(checkpoint, 10)
    assert torch.equal(of_timm, ours)
    assert torch.equal(ours.flatten(1, 2), checkpoint.state_dict["pos_embed"][:, 1:])
    of_timm, ours = position_embeddings(checkpoint, 16)
    assert (of_timm - ours).abs().max() > 1e-3
    tensors = {**checkpoint.state_dict, "pos_embed": torch.full_like(checkpoint.state_dict["pos_embed"], 0.5)}
    of_timm, ours = position_embeddings(replace(checkpoint, state_dict=tensors), 16)
    torch.testing.assert_close(of_timm, ours)


def test_relative_positions_begin_at_nothing_and_windows_do_not() -> None:
    images = torch.rand(2, 3, 128, 128)
    plain = vit(*SQUARE, "MODEL.VIT.WINDOW_SIZE", 0, "MODEL.VIT.REL_POS", False)
    wanted = plain(images)["last_feat"]

    def features(*overrides: object) -> Tensor:
        network = vit(*SQUARE, *overrides)
        incompatible = network.load_state_dict(plain.state_dict(), strict=False)
        assert not incompatible.unexpected_keys
        assert all("rel_pos" in name for name in incompatible.missing_keys)
        return network(images)["last_feat"]

    torch.testing.assert_close(features("MODEL.VIT.WINDOW_SIZE", 0), wanted)
    torch.testing.assert_close(features("MODEL.VIT.WINDOW_SIZE", 8), wanted)  # as large as the map
    torch.testing.assert_close(features("MODEL.VIT.GLOBAL_BLOCKS", tuple(range(6))), wanted)
    assert (features() - wanted).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("vit_base_patch16_clip_224", "a norm before its blocks"),
        ("vit_base_patch16_clip_quickgelu_224", "an activation other than GELU"),
        ("vit_base_patch14_dinov2", "patches of other than 16 pixels, layer scale"),
        ("vit_base_patch16_reg4_gap_256", "register tokens"),
        ("test_vit4", "norms other than layer norms"),
        ("deit3_small_patch16_224", "layer scale"),
        ("deit_tiny_distilled_patch16_224", "a distillation token"),
        ("vit_base_r50_s16_224", "a patch embedding that is neither a ConvStem nor a convolution"),
        ("vit_small_patch16_18x2_224", "blocks of another kind"),
        ("vit_dlittle_patch16_reg1_gap_256", "attention of another kind"),
        ("resnet51q", "is no plain vision transformer"),
    ],
)
def test_what_detectron2s_vit_cannot_be_is_refused_by_name(arch: str, message: str) -> None:
    with pytest.raises(InputError, match=rf"{arch}.*{message}"):
        vit_shape(arch, usual_spec(arch).image_size)


@pytest.mark.parametrize(
    ("arch", "heads", "embeds_class"),
    [("vit_base_patch16_gap_224", 16, False), ("deit_base_patch16_384", 12, True)],
)
def test_the_shape_is_that_of_the_network(arch: str, heads: int, embeds_class: bool) -> None:
    shape = vit_shape(arch, 224)
    assert (shape.width, shape.depth, shape.heads, shape.mlp_ratio) == (768, 12, heads, 4)
    assert (shape.embeds_class, shape.epsilon, shape.qkv_bias) == (embeds_class, 1e-6, True)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["MODEL.BACKBONE.TIMM", "vit_tiny"], "timm has no network 'vit_tiny'"),
        (["MODEL.VIT.SQUARE_SIZE", 144], r"MODEL\.VIT\.SQUARE_SIZE 144 is no multiple of 32"),
        (["MODEL.VIT.WINDOW_SIZE", 9], r"MODEL\.VIT\.WINDOW_SIZE 9 does not fit into the 8 patches"),
        (["MODEL.VIT.GLOBAL_BLOCKS", (1, 6)], r"MODEL\.VIT\.GLOBAL_BLOCKS has 6, .* blocks 0 to 5"),
        (["MODEL.VIT.SQUARE_SIZE", 0], r"MODEL\.VIT\.REL_POS needs images of one size"),
        (["INPUT.MAX_SIZE_TRAIN", 129], r"INPUT\.MAX_SIZE_TRAIN lets images have 129 pixels .* cut off"),
        (["INPUT.MAX_SIZE_TEST", 160], r"INPUT\.MAX_SIZE_TEST lets images have 160 pixels"),
        (["INPUT.SCALE_JITTER", (0.1, 2.0, 192)], r"INPUT\.SCALE_JITTER lets images have 192 pixels"),
        (["INPUT.MIN_SIZE_TEST", 0], r"INPUT\.MIN_SIZE_TEST 0 leaves images as large as they are"),
    ],
)
def test_keys_that_do_not_fit_are_refused_by_name(overrides: list[object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        vit(*SQUARE, *overrides)


def test_keys_of_a_vit_are_refused_without_one() -> None:
    with pytest.raises(InputError, match=r"MODEL\.VIT\.REL_POS is set, but build_resnet_fpn_backbone makes no ViT"):
        load_config(["COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml", "protocols/vitdet.yaml"])


def test_images_are_padded_to_what_the_vit_needs() -> None:
    batch = [{"image": torch.full((3, *size), 255.0)} for size in ((70, 90), (40, 50))]
    for overrides, size in (([], (96, 96)), (SQUARE, (128, 128))):
        detector = build_model(configuration(*overrides)).eval()
        images = detector.preprocess_image(batch).tensor
        assert images.shape[2:] == size
        assert images.sum() == 3 * (70 * 90 + 40 * 50)  # white is 1, and what is padded 0
        assert [*detector.backbone(images)] == ["p2", "p3", "p4", "p5", "p6"]
        fast = build_detector(configuration(*overrides, "MODEL.FAST_STEP", True, "MODEL.MASK_ON", False))
        assert torch.equal(fast._images([item["image"] for item in batch])[0], images)


def test_the_guard_holds_configuration_and_tensors_to_the_file(backbone_file: Path, tmp_path: Path) -> None:
    def load(*overrides: object, path: Path = backbone_file) -> nn.Module:
        cfg = configuration(*SQUARE, *overrides)
        detector = build_model(cfg)
        BackboneCheckpointer(detector, cfg=cfg).load(str(path))
        return detector

    tensors, _ = read_backbone(backbone_file)
    detector = load()
    held = detector.backbone.net.state_dict()
    assert all(torch.equal(held[name], tensor) for name, tensor in tensors.items())
    assert {*backbone_tensors(detector).values()} == {*tensors}
    assert {name.rpartition(".")[2] for name in held.keys() - tensors.keys()} == {"rel_pos_h", "rel_pos_w"}
    for key, value in {
        "MODEL.PIXEL_STD": [1.0] * 3,
        "MODEL.VIT.PRETRAIN_SIZE": 192,
        "MODEL.BACKBONE.TIMM": "deit_tiny_patch16_224",
    }.items():
        with pytest.raises(InputError, match=rf"{key} is .* add the overrides"):
            load(key, value)
    tensors, metadata = read_backbone(backbone_file)
    del tensors["blocks.4.attn.qkv.weight"]
    write_backbone(tmp_path / "half.pkl", tensors, metadata)
    with pytest.raises(InputError, match=r"fills 74 of the backbone's 75 tensors \(not .*blocks\.4\.attn\.qkv\.weight"):
        load(path=tmp_path / "half.pkl")


def test_a_detector_gives_the_network_back(checkpoint: Checkpoint, backbone_file: Path, tmp_path: Path) -> None:
    """But for its relative positions, which are listed as left out."""
    cfg = configuration(*SQUARE)
    checkpointer = BackboneCheckpointer(build_model(cfg), str(tmp_path), cfg=cfg)
    checkpointer.load(str(backbone_file))
    checkpointer.save("model_final")
    back = read_checkpoint(tmp_path / "model_final.pth")
    bare = {name for name in checkpoint.state_dict if not name.startswith("head.")}
    assert back.spec == replace(checkpoint.spec, num_classes=0)
    assert back.state_dict.keys() == bare
    assert all(torch.equal(back.state_dict[name], checkpoint.state_dict[name]) for name in bare)
    assert sum("rel_pos" in name for name in back.left_out) == 2 * 6

    with torch.no_grad():
        checkpointer.model.backbone.net.blocks[2].attn.rel_pos_w[3] += 1
    checkpointer.save("learnt")
    with pytest.raises(
        InputError, match=r"1 relative position embeddings \(.*blocks\.2\.attn\.rel_pos_w .*REL_POS False"
    ):
        read_checkpoint(tmp_path / "learnt.pth")
    other = configuration(*SQUARE, "MODEL.VIT.REL_POS", False)
    with pytest.raises(
        InputError, match=r"12 tensors of a backbone that the configuration's does not have \(.*rel_pos"
    ):
        BackboneCheckpointer(build_model(other), cfg=other).load(str(tmp_path / "learnt.pth"))


def test_frozen_parts_have_no_gradients_and_drop_no_paths() -> None:
    images = torch.rand(2, 3, 128, 128)
    network = vit(*SQUARE, "MODEL.BACKBONE.FREEZE_AT", 3, "MODEL.BACKBONE.DROP_PATH", 0.5).train()
    network(images)["last_feat"].sum().backward()
    learnt = {name for name, parameter in network.named_parameters() if parameter.grad is not None}
    frozen = {name for name, _ in network.named_parameters()} - learnt
    assert {name.split(".")[1] for name in frozen if name.startswith("blocks.")} == {"0", "1", "2"}
    assert frozen >= {"pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    assert {name for name in learnt if name.startswith(("blocks.0.", "blocks.1.", "blocks.2."))} == {
        f"blocks.{block}.attn.rel_pos_{axis}" for block in (0, 1, 2) for axis in "hw"
    }
    dropping = [name for name, module in network.named_modules() if isinstance(module, DropPath)]
    assert dropping == [f"blocks.{block}.drop_path" for block in (3, 4, 5)]


def test_recomputed_activations_give_the_same_gradients() -> None:
    """With the same paths dropped."""
    images = torch.rand(4, 3, 128, 128)
    gradients, kept = [], []
    for recomputed in (False, True):
        network = vit(*SQUARE, "MODEL.BACKBONE.DROP_PATH", 0.5, "MODEL.BACKBONE.USE_ACT_CHECKPOINT", recomputed).train()
        torch.manual_seed(1)
        stored: list[int] = []

        def note(tensor: Tensor, stored: list[int] = stored) -> Tensor:
            stored.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = network(images)["last_feat"].square().sum()
        kept.append(sum(stored))
        loss.backward()
        gradients.append({name: parameter.grad for name, parameter in network.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    assert kept[1] < kept[0] / 5


SIZES = ("s", "b", "l")


@pytest.mark.parametrize("size", SIZES)
def test_its_configurations_are_what_the_network_needs(size: str) -> None:
    cfg = load_config(
        [
            "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
            "protocols/vitdet.yaml",
            f"architectures/vit_{size}.yaml",
        ],
        ["MODEL.DEVICE", "meta"],
    )
    values = flat(cfg)
    needed = usual_spec(cfg.MODEL.BACKBONE.TIMM).detectron2_overrides()
    assert {key: values[key] for key in needed} == needed
    depth = vit_shape(cfg.MODEL.BACKBONE.TIMM, 224).depth
    assert tuple(quarter * depth // 4 - 1 for quarter in (1, 2, 3, 4)) == cfg.MODEL.VIT.GLOBAL_BLOCKS
    check_keys(cfg, vit_shape(cfg.MODEL.BACKBONE.TIMM, 224))


LAZY = Path(detectron2.__file__).parent / "model_zoo/configs/common/models"


def lazy_detector(task: str) -> nn.Module:
    """The detector of Detectron2's ViTDet by its own LazyConfig objects, with the small ViT and few regions."""
    model = LazyConfig.load(str(LAZY / "mask_rcnn_vitdet.py")).model
    net = model.backbone.net
    net.update(img_size=128, embed_dim=64, depth=6, num_heads=2, mlp_ratio=3, pretrain_img_size=160, window_size=3)
    net.window_block_indexes = [0, 2, 4]
    model.backbone.square_pad = 128
    model.pixel_mean = model.pixel_std = [127.5] * 3
    if task == "cascade":
        masks = {name: value for name, value in model.roi_heads.items() if name.startswith("mask_")}
        model.roi_heads = LazyConfig.load(str(LAZY / "cascade_rcnn.py")).model.roi_heads
        model.roi_heads.update(masks)
        for head in model.roi_heads.box_heads:
            head.update(conv_dims=[256] * 4, fc_dims=[1024], conv_norm="LN")
    if task == "faster":
        for name in ("mask_in_features", "mask_pooler", "mask_head"):
            model.roi_heads.pop(name)
    model.roi_heads.update(num_classes=4, batch_size_per_image=32)
    return instantiate(model)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "file"),
    [
        ("mask", "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"),
        ("cascade", "COCO-InstanceSegmentation/cascade_mask_rcnn_R_50_FPN_1x.yaml"),
        ("faster", "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"),
    ],
)
def test_losses_are_those_of_detectron2s_vitdet(task: str, file: str) -> None:
    """The same weights, batch and draws: losses and gradients of one iteration, paths dropped as well."""
    sizes = ["MODEL.VIT.SQUARE_SIZE", 128, "MODEL.VIT.WINDOW_SIZE", 3, "MODEL.VIT.GLOBAL_BLOCKS", (1, 3, 5)]
    sizes += ["INPUT.SCALE_JITTER", (0.1, 2.0, 128), "INPUT.MAX_SIZE_TEST", 128, "SOLVER.AMP.ENABLED", False]
    sizes += ["MODEL.ROI_HEADS.NUM_CLASSES", 4, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 32]
    sizes += ["MODEL.FAST_ROI_ALIGN", False]
    files = [file, "protocols/vitdet.yaml", "architectures/vit_b.yaml"]
    torch.manual_seed(0)
    ours = build_detector(load_config(files, [*VIT, *sizes])).train()
    theirs = lazy_detector(task).train()
    theirs.load_state_dict(ours.state_dict())
    batch = []
    for height, width in ((128, 96), (100, 128)):
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.tensor([[10.0, 10.0, 60.0, 70.0], [30.0, 20.0, 90.0, 95.0]]))
        instances.gt_classes = torch.tensor([1, 3])
        instances.gt_masks = BitMasks(torch.rand(2, height, width) > 0.5)
        batch.append({"image": 255 * torch.rand(3, height, width), "instances": instances})
    found = []
    for detector in (ours, theirs):
        torch.manual_seed(1)
        with EventStorage():
            losses = detector(batch)
        sum(losses.values()).backward()
        gradients = {name: parameter.grad for name, parameter in detector.named_parameters()}
        found.append(({name: loss.item() for name, loss in losses.items()}, gradients))
    assert len(found[0][0]) == {"mask": 5, "cascade": 9, "faster": 4}[task]
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert min(found[0][0].values()) > 0
    for name, gradient in found[0][1].items():
        assert (gradient - found[1][1][name]).norm() <= 1e-5 * gradient.norm(), name


# --- training ---


@pytest.fixture
def run_cfg(shapes: Path, backbone_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CfgNode:
    """Two iterations of ViTDet in small, from the converted file, with AdamW, layer decay and dropped paths."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(shapes))
    overrides = ["MODEL.WEIGHTS", backbone_file, "OUTPUT_DIR", tmp_path / "run", "TEST.EXPECTED_RESULTS", []]
    overrides += ["SOLVER.MAX_ITER", 2, "SOLVER.STEPS", (), "SOLVER.CHECKPOINT_PERIOD", 1, "SOLVER.IMS_PER_BATCH", 2]
    overrides += ["SOLVER.OPTIMIZER", "AdamW", "SOLVER.LAYER_DECAY", 0.7, "MODEL.BACKBONE.DROP_PATH", 0.5]
    overrides += ["DATALOADER.NUM_WORKERS", 0, "TEST.VISUALIZE", 0, "SOLVER.AMP.ENABLED", False]
    return configuration(*SQUARE, *overrides)


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ["MODEL.BACKBONE.USE_ACT_CHECKPOINT", True, "SOLVER.EMA_DECAY", 0.9],
        ["MODEL.FAST_STEP", True, "MODEL.MASK_ON", False],
        ["ADVERSARIAL.KIND", "pgd", "ADVERSARIAL.STEPS", 1],
        ["ADVERSARIAL.KIND", "free", "ADVERSARIAL.REPLAYS", 1],
        [*CASCADE, "SOLVER.AMP.ENABLED", True],
        ["INPUT.SCALE_JITTER", (0.1, 2.0, 128)],
    ],
    ids=["recomputed", "fast_step", "pgd", "free", "cascade_bfloat16", "jitter"],
)
def test_a_killed_run_resumes_as_the_unbroken_one(run_cfg: CfgNode, overrides: list[object]) -> None:
    run_cfg.merge_from_list(overrides)
    unbroken, _ = run(run_cfg)
    run_cfg.OUTPUT_DIR += "_killed"
    run(run_cfg, last=0)
    resumed, _ = run(run_cfg, resume=True)
    assert same(weights(resumed.model), weights(unbroken.model))
    assert same(weights(resumed.evaluated_model), weights(unbroken.evaluated_model))
    assert unbroken.evaluation.results == resumed.evaluation.results
    start, _ = read_backbone(run_cfg.MODEL.WEIGHTS)
    held = unbroken.checkpointer.model.backbone.net.state_dict()
    assert not any(torch.equal(held[name], start[name]) for name in start if "blocks.0." in name or "embed" in name)
    assert held["blocks.0.attn.rel_pos_h"].abs().max() > 0
