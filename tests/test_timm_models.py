"""timm's networks in the place of ours: how they are fed, the attack's twin, files, freezing, low-rank updates."""

from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_backbones.checkpoint.format import write_checkpoint
from robust_backbones.checkpoint.hub import write_timm
from robust_backbones.checkpoint.sources import read_checkpoint
from robust_backbones.classification.config import TrainingConfig
from robust_backbones.classification.folding import FoldedTwin, Unfolded, twin_of
from robust_backbones.errors import InputError
from robust_backbones.models import BackboneSpec, NormalizedModel, build_backbone, fed_as, usual_spec
from robust_backbones.threat_models import ThreatModel
from robust_backbones.transfer.inheritance.adapters import LowRankModel
from robust_backbones.transfer.networks import DEPTH, FineTunedModel, depth_groups, layer_wise_rates
from tests.conftest import randomize_batch_norms

# architecture -> norms that its folded twin keeps, None where nothing can be folded
NORMS_LEFT = {
    "test_efficientnet": 0,
    "test_byobnet": 0,
    "tf_efficientnet_lite0": 0,  # TensorFlow's padding
    "test_convnext": None,
    "test_vit": None,
    "test_nfnet": None,
}


def network(arch: str, **changes: int) -> NormalizedModel:
    spec = usual_spec(arch, 4) if not changes else BackboneSpec(arch, 4, **changes)  # type: ignore[arg-type]
    model = NormalizedModel(build_backbone(spec), spec)
    randomize_batch_norms(model)
    return model


@pytest.fixture(scope="module")
def batch() -> Tensor:
    return torch.rand(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))


def test_the_configuration_is_timm_s_own() -> None:
    spec = usual_spec("efficientnet_b1")
    data = timm.data.resolve_data_config({}, model=timm.create_model("efficientnet_b1"))
    assert spec == BackboneSpec(
        "efficientnet_b1", mean=data["mean"], std=data["std"], image_size=240, val_resize=266, interpolation="bicubic"
    )
    assert data["input_size"] == (3, 240, 240)
    assert int(240 / data["crop_pct"]) == 266
    config = fed_as(TrainingConfig(), spec)
    assert (config.image_size, config.val_resize, config.interpolation) == (240, 266, "bicubic")
    assert fed_as(TrainingConfig(image_size=64), spec).image_size == 64
    usual = fed_as(TrainingConfig(), BackboneSpec())
    assert (usual.image_size, usual.val_resize, usual.interpolation) == (224, 256, "bilinear")


@pytest.mark.parametrize(
    ("arch", "size", "message"),
    [
        ("resnet51", 0, "unknown architecture 'resnet51'.*timm"),
        ("tv_resnet50", 0, "unknown architecture 'tv_resnet50', nearest to .*resnet50"),  # a former name
        ("deit_tiny_distilled_patch16_224", 0, "classifier .* is not one linear layer"),
        ("test_vit", 64, "takes images of 160 pixels alone, not 64"),
        ("test_convnext", 16, "takes no images of 16 pixels .*: give another --image-size"),
        ("vgg16_bn", 16, "takes no images of 16 pixels .*: give another --image-size"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(arch: str, size: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        spec = usual_spec(arch)
        fed_as(TrainingConfig(image_size=size), spec)
        LowRankModel(nn.Module(), spec, rank=1, alpha=1.0, seed=0)


def test_a_vision_transformer_is_built_for_other_images(batch: Tensor) -> None:
    model = network("test_vit", image_size=64).eval()
    assert model(batch[..., :64, :64]).shape == (2, 4)


@pytest.mark.parametrize("arch", NORMS_LEFT)
def test_the_twin_is_the_network_in_eval_mode(arch: str, batch: Tensor) -> None:
    model, labels = network(arch).eval(), torch.tensor([1, 2])
    twin = twin_of(model)
    assert isinstance(twin, Unfolded if NORMS_LEFT[arch] is None else FoldedTwin)
    if isinstance(twin, FoldedTwin):
        assert sum(isinstance(module, nn.BatchNorm2d) for module in twin.modules()) == NORMS_LEFT[arch]
        for parameter in model.parameters():
            parameter.data.mul_(0.99)
        twin.refresh()
    gradients = []
    for one in (model, twin):
        images = batch.clone().requires_grad_()
        logits = one(images)
        F.cross_entropy(logits, labels).backward()
        assert images.grad is not None
        gradients.append((logits.detach(), images.grad))
    (expected, slope), (found, slope_found) = gradients
    # Float32 through fifty layers; and a rounding at a ReLU6's 0 or 6 turns a gradient off or on.
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
    assert F.cosine_similarity(slope_found.flatten().double(), slope.flatten().double(), dim=0) > 0.999


@pytest.mark.parametrize("arch", ["test_convnext", "test_vit"])
def test_files_of_ours_and_of_timm_s_come_back(arch: str, tmp_path: Path, batch: Tensor) -> None:
    model = network(arch).eval()
    ours, theirs = tmp_path / "ours.pt", tmp_path / "theirs.pth"
    weights, threat_model = model.backbone.state_dict(), ThreatModel("Linf", 4 / 255)
    write_checkpoint(ours, spec=model.spec, state_dict=weights, threat_model=threat_model)
    cfg = model.backbone.pretrained_cfg | {"architecture": arch}
    torch.save({"pretrained_cfg": cfg, "state_dict": {f"module.{name}": t for name, t in weights.items()}}, theirs)
    for path, layout in ((ours, "robust_backbones"), (theirs, "timm")):
        checkpoint = read_checkpoint(path)
        assert (checkpoint.layout, checkpoint.spec) == (layout, model.spec)
        assert torch.equal(checkpoint.model()(batch), model(batch))
    del cfg["mean"]
    torch.save({"pretrained_cfg": cfg, "state_dict": weights | {"more.weight": torch.ones(1)}}, theirs)
    with pytest.raises(InputError, match=r"comes nearest to .* has no place for more\.weight"):
        read_checkpoint(theirs)


def test_a_resnet_of_timm_with_the_tensors_of_ours_comes_back(tmp_path: Path, batch: Tensor) -> None:
    model = network("resnetblur18").eval()
    ours, theirs = tmp_path / "ours.pt", tmp_path / "theirs.safetensors"
    write_checkpoint(ours, spec=model.spec, state_dict=model.backbone.state_dict(), threat_model=None)
    write_timm(theirs, read_checkpoint(ours))
    for path in (ours, theirs):
        assert torch.equal(read_checkpoint(path).model()(batch), model(batch))


@pytest.mark.parametrize("arch", ["test_efficientnet", "test_convnext", "test_vit", "test_byobnet"])
def test_its_groups_hold_every_parameter_but_the_classifier_s_once(arch: str, batch: Tensor) -> None:
    model = network(arch)
    groups = depth_groups(model.backbone, model.spec)
    found = [id(parameter) for group in groups for module in group for parameter in module.parameters()]
    classifier = model.backbone.get_classifier()  # type: ignore[operator]
    expected = {id(parameter) for parameter in model.parameters()} - {id(p) for p in classifier.parameters()}
    assert len(groups) == DEPTH
    assert all(groups)
    assert sorted(found) == sorted(expected)
    rates = layer_wise_rates(model, model.spec, lr=1.0, decay=0.5)
    assert [group["lr"] for group in rates] == [0.5**depth for depth in range(1 + DEPTH)]

    frozen = FineTunedModel(model.backbone, model.spec, 2).train()
    before = {name: tensor.clone() for name, tensor in frozen.backbone.state_dict().items()}
    learnt = [parameter for parameter in frozen.parameters() if parameter.requires_grad]
    F.cross_entropy(frozen(batch), torch.tensor([1, 2])).backward()
    torch.optim.SGD(learnt, lr=1.0).step()
    changed = {name for name, tensor in frozen.backbone.state_dict().items() if not torch.equal(tensor, before[name])}
    kept = {id(parameter) for group in groups[:2] for module in group for parameter in module.parameters()}
    names = {name for name, parameter in frozen.backbone.named_parameters() if id(parameter) in kept}
    assert changed
    assert not changed & names
    assert not any(name.startswith(("stem.", "conv_stem.", "bn1.")) for name in changed)  # statistics too


@torch.no_grad()
def test_low_rank_updates_reach_attention_and_merge(batch: Tensor) -> None:
    model = network("test_vit").eval()
    expected = model(batch)
    adapted = LowRankModel(model.backbone, model.spec, rank=2, alpha=4.0, seed=0).eval()
    learnt = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert any("attn.qkv" in name for name in learnt)
    assert not any(".head." in name for name in learnt)
    assert torch.equal(adapted(batch), expected)
    for name, parameter in adapted.named_parameters():
        if name.endswith("up.weight"):
            parameter.normal_(0, 0.05, generator=torch.Generator().manual_seed(0))
    apart = adapted(batch)
    adapted.merge()
    torch.testing.assert_close(adapted(batch), apart, rtol=1e-3, atol=1e-3)
    assert (apart - expected).abs().max() > 0.01
