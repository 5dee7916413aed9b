"""C4's ROI heads: our res5 against Detectron2's, the norm after it, and what is frozen."""

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import build_backbone, build_model
from detectron2.modeling.roi_heads import Res5ROIHeads
from detectron2.structures import BitMasks, Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from robust_backbones.detection.checkpoint import backbone_tensors
from robust_backbones.detection.config import CONFIG_DIR, load_config
from robust_backbones.detection.roi_heads import BackboneRes5ROIHeads

SHAPES = CONFIG_DIR / "quick/mask_rcnn_R_50_C4_shapes_instant.yaml"
SIDE = 7  # of res4 for an image of 112 pixels


def config(arch: str = "resnet18", *overrides: object, protocol: str = "") -> CfgNode:
    files = [SHAPES]
    files += [CONFIG_DIR / f"architectures/{arch}.yaml"] if arch != "resnet50" else []
    files += [CONFIG_DIR / f"protocols/{protocol}.yaml"] if protocol else []
    return load_config(files, ["MODEL.DEVICE", "cpu", *overrides])


def heads_of(cfg: CfgNode, kind: type[Res5ROIHeads] = BackboneRes5ROIHeads) -> Res5ROIHeads:
    return kind(cfg, {"res4": ShapeSpec(channels=4 * cfg.MODEL.RESNETS.RES2_OUT_CHANNELS, stride=16)})


def randomize(module: nn.Module) -> None:
    """Weights and statistics of every norm, too: at their start they would hide one that is left out."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            values = torch.rand(tensor.shape, generator=generator)
            scale = 2 / tensor[0].numel() ** 0.5 if tensor.dim() == 4 else 1
            tensor.copy_(values + 0.5 if name.endswith(("norm.weight", "running_var")) else (values - 0.5) * scale)


def regions(channels: int) -> tuple[list[Tensor], list[Boxes]]:
    features = torch.randn(2, channels, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    corners = torch.tensor([[0.0, 0, 60, 80], [16, 8, 110, 100], [40, 40, 72, 111]])
    return [features], [Boxes(corners), Boxes(corners[:2] / 2)]


@torch.no_grad()
@pytest.mark.parametrize("arch", ["resnet50", "wide_resnet50_2", "resnext50_32x4d"])
def test_res5_of_bottlenecks_is_detectron2s(arch: str) -> None:
    cfg = config(arch)
    ours, theirs = heads_of(cfg), heads_of(cfg, Res5ROIHeads)
    randomize(ours)
    shapes = [{name: tensor.shape for name, tensor in heads.state_dict().items()} for heads in (ours, theirs)]
    assert shapes[0] == shapes[1]
    theirs.load_state_dict(ours.state_dict())
    x, boxes = regions(1024)
    features = ours._shared_roi_transform(x, boxes)
    assert features.shape == (5, 2048, 4, 4)
    assert features.std() > 0.01
    torch.testing.assert_close(features, theirs._shared_roi_transform(x, boxes), rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize(("arch", "blocks"), [("resnet18", 2), ("resnet34", 3)])
def test_res5_of_basic_blocks_is_the_backbones_last_stage(arch: str, blocks: int) -> None:
    """The stage that Detectron2 builds for the same network in an FPN detector, where it does know these depths."""
    res5 = heads_of(config(arch)).res5
    fpn = [CONFIG_DIR / "Base-RCNN-FPN.yaml", CONFIG_DIR / f"architectures/{arch}.yaml"]
    whole = build_backbone(load_config(fpn)).bottom_up
    randomize(whole)
    names = set(res5.state_dict())
    assert {"0.conv1.weight", "0.shortcut.norm.running_var", f"{blocks - 1}.conv2.norm.bias"} <= names
    assert len(names) == 5 * (2 * blocks + 1)
    res5.load_state_dict(whole.res5.state_dict())
    x = torch.randn(3, 256, 8, 8, generator=torch.Generator().manual_seed(1))
    assert res5(x).shape == (3, 512, 4, 4)
    torch.testing.assert_close(res5(x), whole.res5(x), rtol=0, atol=0)


def test_the_norm_is_no_tensor_of_the_backbone() -> None:
    with torch.device("meta"):
        plain, normed = (
            build_model(config("resnet50", "MODEL.DEVICE", "meta", protocol=name)) for name in ("", "syncbn_C4")
        )
    assert backbone_tensors(normed) == backbone_tensors(plain)
    extra = {name for name in normed.state_dict() if "roi_heads" in name and not name.endswith("tracked")}
    extra -= {name for name in plain.state_dict() if "roi_heads" in name}
    assert extra == {f"roi_heads.res5_norm.{name}" for name in ("weight", "bias", "running_mean", "running_var")}
    assert normed.roi_heads.res5_norm.num_features == 2048


@torch.no_grad()
def test_the_norm_is_of_res5s_output() -> None:
    """With the statistics of the batch in training, with the running ones in evaluation: written out."""
    heads = heads_of(config(protocol="syncbn_C4"))
    randomize(heads)
    norm = heads.res5_norm
    x, boxes = regions(256)

    def expected(mean: Tensor, var: Tensor) -> Tensor:
        gain = norm.weight / (var + 1e-5).sqrt()
        return (y - mean[:, None, None]) * gain[:, None, None] + norm.bias[:, None, None]

    heads.eval()
    y = heads.res5(heads.pooler(x, boxes))
    want = expected(norm.running_mean, norm.running_var)
    torch.testing.assert_close(heads._shared_roi_transform(x, boxes), want, rtol=1e-4, atol=1e-4)
    assert (want - y).abs().max() > 0.1

    heads.train()
    y = heads.res5(heads.pooler(x, boxes))
    want = expected(y.mean((0, 2, 3)), y.var((0, 2, 3), unbiased=False))
    torch.testing.assert_close(heads._shared_roi_transform(x, boxes), want, rtol=1e-4, atol=1e-4)


def sample(cfg: CfgNode) -> tuple[ImageList, dict[str, Tensor], list[Instances], list[Instances]]:
    """Images, features, proposals and ground truth for the heads."""
    (x,), boxes = regions(4 * cfg.MODEL.RESNETS.RES2_OUT_CHANNELS)
    x.requires_grad_()
    size = (16 * SIDE, 16 * SIDE)
    proposals, targets = [], []
    for each in boxes:
        masks = torch.zeros(len(each), *size, dtype=torch.bool)
        for mask, (left, top, right, bottom) in zip(masks, each.tensor.int().tolist(), strict=True):
            mask[top:bottom, left:right] = True
        logits = torch.zeros(len(each))
        proposals.append(Instances(size, proposal_boxes=each, objectness_logits=logits))
        classes = torch.arange(len(each)) % 4
        targets.append(Instances(size, gt_boxes=each, gt_classes=classes, gt_masks=BitMasks(masks)))
    return ImageList(torch.zeros(2, 3, *size), [size, size]), {"res4": x}, proposals, targets


def losses(heads: Res5ROIHeads, cfg: CfgNode) -> tuple[dict[str, Tensor], Tensor]:
    images, features, proposals, targets = sample(cfg)
    with EventStorage():
        _, values = heads.train()(images, features, proposals, targets)
    return values, features["res4"]


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_every_parameter_has_a_gradient(arch: str) -> None:
    """Box and mask losses reach res5, the norm after it and the backbone."""
    cfg = config(arch, "INPUT.MASK_FORMAT", "bitmask", protocol="syncbn_C4")
    torch.manual_seed(0)
    heads = heads_of(cfg)
    values, features = losses(heads, cfg)
    assert set(values) == {"loss_cls", "loss_box_reg", "loss_mask"}
    sum(values.values()).backward()
    for name, parameter in heads.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    assert features.grad.abs().sum() > 0


def test_both_heads_see_the_norm() -> None:
    """With a gain of zero, boxes and masks alike depend on the norm's bias alone."""
    cfg = config("resnet18", protocol="syncbn_C4")
    torch.manual_seed(0)
    heads = heads_of(cfg)
    nn.init.zeros_(heads.res5_norm.weight)
    nn.init.normal_(heads.res5_norm.bias)
    values, features = losses(heads, cfg)
    for name in ("loss_cls", "loss_mask"):
        heads.zero_grad()
        features.grad = None
        values[name].backward(retain_graph=True)
        assert heads.res5_norm.bias.grad.abs().sum() > 0, name
        assert features.grad.abs().sum() == 0, name


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_frozen_features_do_not_move_and_the_heads_after_them_train(arch: str) -> None:
    cfg = config(arch, "MODEL.RESNETS.NORM", "SyncBN", "MODEL.ROI_HEADS.RES5_NORM", "SyncBN", protocol="frozen")
    torch.manual_seed(0)
    heads = heads_of(cfg)
    before = {name: tensor.clone() for name, tensor in heads.res5.state_dict().items()}
    assert not any(isinstance(module, nn.SyncBatchNorm) for module in heads.res5.modules())
    assert (
        sum(isinstance(module, FrozenBatchNorm2d) for module in heads.res5.modules())
        == {"resnet18": 5, "resnet50": 10}[arch]
    )
    values, features = losses(heads, cfg)
    sum(values.values()).backward()
    for name, parameter in heads.named_parameters():
        assert (parameter.grad is None) is name.startswith("res5."), name
    assert features.grad.abs().sum() > 0  # of use to nobody in C4, but the graph is whole
    assert all(torch.equal(tensor, before[name]) for name, tensor in heads.res5.state_dict().items())


@pytest.mark.parametrize("freeze_at", [0, 2, 4])
def test_res5_freezes_with_the_fifth_stage_alone(freeze_at: int) -> None:
    heads = heads_of(config("resnet18", "MODEL.RESNETS.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", freeze_at))
    assert all(parameter.requires_grad for parameter in heads.parameters())
    assert not any(isinstance(module, FrozenBatchNorm2d) for module in heads.modules())


@torch.no_grad()
def test_a_c4_detector_finds_boxes_and_masks() -> None:
    """From pixels to instances, in the smallest detector."""
    cfg = config("resnet18", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0)
    torch.manual_seed(0)
    detector = build_model(cfg).eval()
    (output,) = detector([{"image": torch.randint(0, 256, (3, 128, 96), dtype=torch.uint8), "height": 64, "width": 48}])
    instances = output["instances"]
    assert len(instances) == 20
    assert instances.pred_masks.shape == (20, 64, 48)
    assert instances.pred_boxes.tensor[:, 2].max() <= 48
