"""Networks made ready for another task: their groups by depth, features, classifiers, and what is frozen."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust_backbones.checkpoint.format import Checkpoint
from robust_backbones.checkpoint.zoo import published
from robust_backbones.models import ARCHITECTURES, BackboneSpec, NormalizedModel, ResNetShape, build_backbone
from robust_backbones.transfer.networks import (
    DEPTH,
    FineTunedModel,
    classifier_weights,
    depth_groups,
    feature_extractor,
    layer_wise_rates,
    new_classifier,
    transferred_spec,
    with_classifier,
)
from tests.conftest import randomize_batch_norms

OTHERS = [arch for arch, shape in ARCHITECTURES.items() if not isinstance(shape, ResNetShape)]
PAPER = sorted({backbone.arch for backbone in published().values()})
SMALL = ["resnet18", "mnasnet1_0", "mobilenet_v2", "shufflenet_v2_x1_0"]
CLASSES = 5
# Where each architecture of torchvision keeps its last layer.
CLASSIFIERS = {
    "densenet161": "classifier",
    "mnasnet1_0": "classifier.1",
    "mobilenet_v2": "classifier.1",
    "vgg16_bn": "classifier.6",
}
BGR = {"channel_order": "BGR", "mean": (0.4, 0.5, 0.6), "std": (0.1, 0.2, 0.4)}


def three_images() -> Tensor:
    """In [0, 1]; no channel is like another."""
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    return images * torch.tensor([0.2, 0.6, 1.0])[:, None, None]


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return three_images()


def network_of(spec: BackboneSpec) -> nn.Module:
    """A network whose output depends on the image, as a trained one's does; the batch norms of a fresh one drown it."""
    backbone = build_backbone(spec, seed=1)
    randomize_batch_norms(backbone)
    norms = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1
    with torch.no_grad(), torch.random.fork_rng(devices=[]):  # for dropout
        backbone.train()(three_images())
    return backbone.eval()


def as_checkpoint(network: nn.Module, spec: BackboneSpec) -> Checkpoint:
    return Checkpoint(spec, network.state_dict(), None, "robust_backbones", "file.pt", "0" * 64)


def checkpoint_of(spec: BackboneSpec) -> Checkpoint:
    return as_checkpoint(network_of(spec), spec)


def classifier_of(arch: str) -> str:
    return CLASSIFIERS.get(arch, "fc")


def tensors(modules: list[nn.Module]) -> list[Tensor]:
    return [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]


def on_meta(arch: str) -> nn.Module:
    """A network without memory for its numbers."""
    with torch.device("meta"):
        return build_backbone(BackboneSpec(arch, CLASSES)).eval()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_tensor_but_the_classifiers_is_in_one_group(arch: str) -> None:
    backbone = on_meta(arch)
    groups = depth_groups(backbone, BackboneSpec(arch, CLASSES))
    assert len(groups) == DEPTH
    assert all(tensors(group) for group in groups)
    grouped = [id(tensor) for group in groups for tensor in tensors(group)]
    prefix = f"{classifier_of(arch)}."
    named = [*backbone.named_parameters(), *backbone.named_buffers()]
    body = [id(tensor) for name, tensor in named if not name.startswith(prefix)]
    assert len(named) - len(body) == 2  # its weight and bias
    assert sorted(grouped) == sorted(body)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_groups_are_in_the_order_of_the_forward_pass(arch: str) -> None:
    """Which layer ran, and how much smaller than the image its output is."""
    backbone = on_meta(arch)
    groups = depth_groups(backbone, BackboneSpec(arch, CLASSES))
    group_of = {
        layer: depth for depth, group in enumerate(groups) for module in group for layer in module.modules()
    } | {backbone.get_submodule(classifier_of(arch)): DEPTH}
    passed: list[int] = []
    strides: dict[int, list[int]] = {depth: [] for depth in range(DEPTH)}

    def note(layer: nn.Module, inputs: Any, output: Tensor) -> None:
        depth = group_of[layer]
        passed.append(depth)
        if isinstance(layer, nn.Conv2d):
            strides[depth].append(256 // output.shape[-1])

    for layer in backbone.modules():
        if next(layer.parameters(recurse=False), None) is not None:
            layer.register_forward_hook(note)
    backbone(torch.empty(1, 3, 256, 256, device="meta"))
    assert passed == sorted(passed)
    assert set(passed) == set(range(DEPTH + 1))
    # A stage begins where the resolution halves, be it by a pooling between two groups.
    finest = [min(strides[depth]) for depth in range(DEPTH)]
    assert finest == sorted(finest)
    assert max(strides[DEPTH - 1]) in (16, 32)


@pytest.mark.parametrize(
    "arch",
    [
        pytest.param(arch, marks=[pytest.mark.slow] * (arch not in ("resnet50", *SMALL)))
        for arch in PAPER
        if arch != "wide_resnet50_4"  # the modules of wide_resnet50_2, and four times the weights
    ],
)
def test_features_under_the_old_classifier_are_the_networks_logits(arch: str, pixels: Tensor) -> None:
    spec = BackboneSpec(arch, CLASSES, mean=(0.1, 0.3, 0.5), std=(0.1, 0.2, 0.4))
    network = network_of(spec)
    checkpoint = as_checkpoint(network, spec)
    extractor = feature_extractor(checkpoint)
    assert not any(module.training for module in extractor.modules())
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (checkpoint.spec.mean, checkpoint.spec.std))
    with torch.no_grad():
        features, logits = extractor(pixels), network((pixels - mean) / std)
    weight, bias = (checkpoint.state_dict[f"{classifier_of(arch)}.{name}"] for name in ("weight", "bias"))
    assert features.shape == (len(pixels), weight.shape[1])
    difference = (F.linear(features, weight, bias) - logits).abs().max()
    assert difference < 1e-5 * logits.abs().max()
    assert logits.std(0).max() > 1e-2 * logits.abs().max()  # what differs between images is compared as well


@pytest.mark.parametrize("arch", SMALL)
def test_a_new_classifier_is_that_of_a_fresh_network(arch: str) -> None:
    spec = BackboneSpec(arch, CLASSES)
    fresh = build_backbone(BackboneSpec(arch, 7), seed=3).get_submodule(classifier_of(arch))
    layer = new_classifier(spec, 7, seed=3)
    assert torch.equal(layer.weight, fresh.weight)
    assert torch.equal(layer.bias, fresh.bias)
    assert not torch.equal(layer.weight, new_classifier(spec, 7, seed=4).weight)


@pytest.mark.parametrize("arch", SMALL)
def test_everything_but_the_classifier_is_taken_over(arch: str) -> None:
    checkpoint = checkpoint_of(BackboneSpec(arch, CLASSES))
    classifier = new_classifier(checkpoint.spec, 7, seed=0)
    model = with_classifier(checkpoint, classifier)
    prefix = f"{classifier_of(arch)}."
    names = {f"{prefix}weight": classifier.weight, f"{prefix}bias": classifier.bias}
    for name, tensor in model.backbone.state_dict().items():
        assert torch.equal(tensor, names[name] if name in names else checkpoint.state_dict[name])
    assert classifier_weights(checkpoint.spec, classifier).keys() == names.keys()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_backbone_without_a_classifier_gets_one(pixels: Tensor) -> None:
    checkpoint = checkpoint_of(BackboneSpec("resnet18", 0))
    model = with_classifier(checkpoint, new_classifier(checkpoint.spec, 7, seed=0)).eval()
    with torch.no_grad():
        features = feature_extractor(checkpoint)(pixels)
        assert torch.equal(model(pixels), model.backbone.fc(features))
        assert torch.equal(features, checkpoint.build()(model.normalize(pixels)))


def test_images_are_normalised_or_fed_as_they_are(pixels: Tensor) -> None:
    checkpoint = checkpoint_of(BackboneSpec("resnet18", CLASSES, mean=(0.1, 0.3, 0.5), std=(0.1, 0.2, 0.4)))
    network = checkpoint.build()
    by_hand = torch.stack([(pixels[:, c] - (0.1, 0.3, 0.5)[c]) / (0.1, 0.2, 0.4)[c] for c in range(3)], dim=1)
    classifier = new_classifier(checkpoint.spec, CLASSES, seed=0)
    for normalize, inputs in ((True, by_hand), (False, pixels)):
        model = with_classifier(checkpoint, classifier, normalize=normalize).eval()
        spec = transferred_spec(checkpoint, 7, normalize=normalize)
        assert (spec.mean, spec.std) == ((0.1, 0.3, 0.5), (0.1, 0.2, 0.4)) if normalize else ((0,) * 3, (1,) * 3)
        assert (spec.num_classes, spec.arch) == (7, "resnet18")
        with torch.no_grad():
            features = feature_extractor(checkpoint, normalize=normalize)(pixels)
            torch.testing.assert_close(network.fc(features), network(inputs))
            torch.testing.assert_close(classifier(features), model(pixels))


def step(model: NormalizedModel, images: Tensor, groups: list[dict[str, Any]]) -> None:
    """One step of SGD with all that moves a parameter: gradient, momentum, weight decay."""
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(images), torch.tensor([0, 1, 2])).backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("arch", "freeze"),
    [
        *(("resnet18", freeze) for freeze in (0, 2, DEPTH)),
        *((arch, 2) for arch in SMALL[1:]),
        pytest.param("densenet161", 3, marks=pytest.mark.slow),
    ],
)
def test_frozen_groups_do_not_move_and_the_others_do(arch: str, freeze: int, pixels: Tensor) -> None:
    checkpoint = checkpoint_of(BackboneSpec(arch, CLASSES))
    classifier = new_classifier(checkpoint.spec, CLASSES, seed=0)
    model = with_classifier(checkpoint, classifier, freeze=freeze).eval().train()
    before = copy.deepcopy(model.backbone)
    step(model, pixels, layer_wise_rates(model, checkpoint.spec, lr=0.1, decay=1))
    old, new = (
        [*depth_groups(net, checkpoint.spec), [net.get_submodule(classifier_of(arch))]]
        for net in (before, model.backbone)
    )
    for depth, (were, are) in enumerate(zip(old, new, strict=True)):
        equal = [torch.equal(one, other) for one, other in zip(tensors(were), tensors(are), strict=True)]
        if depth < freeze:
            assert all(equal)
            assert not any(module.training for part in are for module in part.modules())
        else:
            assert not any(equal)  # statistics and counters of batch norms among them
            assert all(module.training for part in are for module in part.modules())
    model.eval()
    assert not any(module.training for module in model.modules())


def test_batch_norms_stay_frozen_where_others_take_their_place() -> None:
    """Synchronised ones do, on several GPUs: they are other modules of the same names."""
    checkpoint = checkpoint_of(BackboneSpec("resnet18", CLASSES))
    model = with_classifier(checkpoint, new_classifier(checkpoint.spec, CLASSES, seed=0), freeze=2)
    nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.train()
    modes = {name: m.training for name, m in model.backbone.named_modules() if isinstance(m, nn.SyncBatchNorm)}
    assert {name for name, training in modes.items() if not training} == {
        "bn1",
        *(f"layer1.{block}.bn{number}" for block in (0, 1) for number in (1, 2)),
    }


def test_a_copy_of_a_network_is_frozen_as_well() -> None:
    """As an average of its weights is."""
    checkpoint = checkpoint_of(BackboneSpec("resnet18", CLASSES))
    model = copy.deepcopy(with_classifier(checkpoint, new_classifier(checkpoint.spec, CLASSES, seed=0), freeze=1))
    model.train()
    assert isinstance(model, FineTunedModel)
    assert not model.backbone.bn1.training
    assert model.backbone.layer1.training


@pytest.mark.parametrize("arch", [*SMALL, "densenet161", "vgg16_bn"])
@pytest.mark.parametrize("freeze", [0, 2, DEPTH])
def test_the_rate_falls_with_the_distance_from_the_output(arch: str, freeze: int) -> None:
    spec, lr, decay = BackboneSpec(arch, CLASSES), 0.3, 0.5
    model = FineTunedModel(on_meta(arch), spec, freeze)
    rows = layer_wise_rates(model, spec, lr=lr, decay=decay)
    rates: dict[int, float] = {}
    for row in rows:
        for parameter in row["params"]:
            assert id(parameter) not in rates
            rates[id(parameter)] = row["lr"]
    expected = {id(parameter): lr for parameter in model.backbone.get_submodule(classifier_of(arch)).parameters()}
    for depth, group in enumerate(depth_groups(model.backbone, spec)):
        if depth >= freeze:
            parameters = [parameter for module in group for parameter in module.parameters()]
            expected |= {id(parameter): lr * decay ** (DEPTH - depth) for parameter in parameters}
    assert rates == pytest.approx(expected)
    assert rates.keys() == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert rows[0]["lr"] == lr  # what a log shows


@pytest.mark.parametrize(
    ("arch", "change"),
    [
        ("mobilenet_v2", {}),
        ("resnet18", {"stem": "cifar"}),
        pytest.param("resnet50", {"stride_in_1x1": True}, marks=pytest.mark.slow),  # as Detectron's own networks
    ],
)
def test_a_bgr_network_is_the_same_function_of_rgb_images(arch: str, change: dict[str, Any], pixels: Tensor) -> None:
    checkpoint = checkpoint_of(BackboneSpec(arch, CLASSES, **BGR, **change))
    rgb = checkpoint.in_rgb()
    assert (rgb.spec.channel_order, rgb.spec.mean, rgb.spec.std) == ("RGB", (0.6, 0.5, 0.4), (0.4, 0.2, 0.1))
    assert rgb.spec == replace(checkpoint.spec, channel_order="RGB", mean=rgb.spec.mean, std=rgb.spec.std)
    changed = [name for name, tensor in rgb.state_dict.items() if not torch.equal(tensor, checkpoint.state_dict[name])]
    assert len(changed) == 1
    assert rgb.in_rgb() is rgb
    with torch.no_grad():
        expected = NormalizedModel(checkpoint.build(), checkpoint.spec)(pixels.flip(1))
        logits = NormalizedModel(rgb.build(), rgb.spec)(pixels)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
        # What is made of the checkpoint takes RGB images by itself.
        features = feature_extractor(checkpoint)(pixels)
        weight, bias = (checkpoint.state_dict[f"{classifier_of(arch)}.{name}"] for name in ("weight", "bias"))
        torch.testing.assert_close(F.linear(features, weight, bias), logits, rtol=1e-4, atol=1e-4)
        old = nn.Linear(weight.shape[1], CLASSES)
        old.load_state_dict({"weight": weight, "bias": bias})
        torch.testing.assert_close(with_classifier(checkpoint, old).eval()(pixels), logits, rtol=1e-4, atol=1e-4)
        # The order of the channels is not all the same to it.
        wrong = NormalizedModel(checkpoint.build(), checkpoint.spec)(pixels)
        assert (wrong - expected).abs().max() > 1e-2 * expected.abs().max()
