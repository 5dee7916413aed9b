"""Backbones: recognised by their shapes, built from their spec, fed in [0, 1]."""

import json
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from robust_backbones.checkpoint.identify import identify
from robust_backbones.classification.robustness import RobustnessConfig
from robust_backbones.errors import InputError
from robust_backbones.models import (
    ARCHITECTURES,
    IMAGENET_MEAN,
    STEMS,
    BackboneSpec,
    NormalizedModel,
    ResNetShape,
    build_backbone,
    fed_as,
    reference_shapes,
    usual_spec,
)
from robust_backbones.threat_models import ThreatModel
from tests.conftest import resnet_stages

RESNETS = [arch for arch, shape in ARCHITECTURES.items() if isinstance(shape, ResNetShape)]
OTHERS = [arch for arch in ARCHITECTURES if arch not in RESNETS]
# torchvision's documented sizes, with 1000 classes
PARAMETERS = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "wide_resnet50_2": 68_883_240,
    "resnext50_32x4d": 25_028_904,
    "wide_resnet101_2": 126_886_696,
    "resnext101_64x4d": 83_455_272,
    "resnext101_32x8d": 88_791_336,
    "densenet161": 28_681_000,
    "mnasnet1_0": 4_383_312,
    "mobilenet_v2": 3_504_872,
    "shufflenet_v2_x1_0": 2_278_604,
    "vgg16_bn": 138_365_992,
}


@cache
def on_meta(spec: BackboneSpec) -> nn.Module:
    """The network without memory for its tensors."""
    with torch.device("meta"):
        return build_backbone(spec)


def parameters(spec: BackboneSpec) -> int:
    return sum(parameter.numel() for parameter in on_meta(spec).parameters())


@pytest.mark.parametrize(
    ("arch", "stem", "num_classes"),
    [(arch, "imagenet", 1) for arch in ARCHITECTURES]
    + [(arch, "cifar", 1) for arch in RESNETS]
    + [("resnet18", "imagenet", 7), ("mobilenet_v2", "imagenet", 7)],
)
def test_a_network_is_recognised_by_its_shapes(arch: str, stem: str, num_classes: int) -> None:
    spec = usual_spec(arch, num_classes, stem=stem)
    state_dict = on_meta(spec).state_dict()
    assert identify(state_dict) == spec
    without_counters = {name: t for name, t in state_dict.items() if not name.endswith("num_batches_tracked")}
    assert identify(without_counters) == spec


@pytest.mark.parametrize(("arch", "classifier"), [("resnet18", "fc"), ("mobilenet_v2", "classifier.1")])
def test_a_network_that_lacks_or_bends_a_tensor_is_not_recognised(arch: str, classifier: str) -> None:
    state_dict = on_meta(BackboneSpec(arch, 7)).state_dict()
    spoiled = {name: {k: t for k, t in state_dict.items() if k != name} for name in state_dict if "tracked" not in name}
    weight, bias = f"{classifier}.weight", f"{classifier}.bias"
    spoiled["wide"] = state_dict | {weight: torch.ones(7, 99)}
    spoiled["odd"] = state_dict | {bias: torch.ones(6)}
    spoiled["scalar"] = state_dict | {weight: torch.ones(())}
    spoiled["more"] = state_dict | {"attention.weight": torch.ones(1)}
    for content in spoiled.values():
        with pytest.raises(InputError, match=f"it comes nearest to {arch}, but "):
            identify(content)


def test_what_differs_is_named() -> None:
    state_dict = on_meta(BackboneSpec("resnet50", 7)).state_dict()
    del state_dict["layer3.2.bn1.bias"]
    state_dict["layer2.0.conv2.weight"] = torch.ones(1)
    state_dict["attention"] = torch.ones(1)
    with pytest.raises(InputError) as error:
        identify(state_dict)
    assert str(error.value) == (
        "it comes nearest to resnet50, but lacks layer3.2.bn1.bias and has no place for attention and differs in the "
        "shape of layer2.0.conv2.weight; of another network of timm, give its name (--arch NAME, --mean, --std, "
        "--channel-order)"
    )


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("arch", RESNETS)
def test_a_resnet_s_shapes_are_those_of_torchvision_s_network(arch: str, stem: str) -> None:
    built = on_meta(BackboneSpec(arch, 1, stem=stem)).state_dict()
    shapes, classifier = reference_shapes(arch, stem)
    expected = {name: tuple(tensor.shape) for name, tensor in built.items() if "num_batches" not in name}
    assert [*shapes.items()] == [*expected.items()]
    assert classifier == "fc"


@pytest.mark.parametrize("arch", RESNETS)
def test_a_resnet_without_a_classifier(arch: str) -> None:
    spec = BackboneSpec(arch, 0)
    state_dict = on_meta(spec).state_dict()
    assert not [name for name in state_dict if name.startswith("fc.")]
    assert identify(state_dict) == spec


def test_where_a_bottleneck_strides(images: Tensor) -> None:
    """The same tensors, another function: a stride in the 1x1 convolution passes over three positions of four."""
    torchvision_net, msra_net = (build_backbone(BackboneSpec(stride_in_1x1=flag)) for flag in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(torchvision_net.parameters(), msra_net.parameters(), strict=True))
    strides = [(block.conv1.stride[0], block.conv2.stride[0]) for block in (msra_net.layer1[0], msra_net.layer2[0])]
    assert strides == [(1, 1), (2, 1)]
    assert (torchvision_net.layer2[0].conv1.stride[0], torchvision_net.layer2[0].conv2.stride[0]) == (1, 2)
    x = torch.rand(1, 256, 8, 8)
    first, second = (net.eval().layer2[0](x) for net in (torchvision_net, msra_net))
    assert first.shape == second.shape
    assert not torch.allclose(first, second, atol=0.01)


@pytest.mark.parametrize(("arch", "size"), PARAMETERS.items())
def test_sizes_are_the_published_ones(arch: str, size: int) -> None:
    assert parameters(BackboneSpec(arch)) == size


@pytest.mark.parametrize(("arch", "width"), [("resnet50", 64), ("wide_resnet50_2", 128), ("wide_resnet50_4", 256)])
def test_a_wide_resnet_widens_its_3x3_convolutions_alone(arch: str, width: int) -> None:
    """Zagoruyko & Komodakis 2016, counted by hand; 223.4 million parameters for the 4 of Salman et al. 2020."""
    total = 3 * 64 * 7 * 7 + 2 * 64  # the stem and its norm
    channels = 64
    for stage, blocks in enumerate([3, 4, 6, 3]):
        inner, outer = width * 2**stage, 256 * 2**stage
        total += channels * outer + 2 * outer  # the shortcut of the first block
        for _ in range(blocks):
            total += channels * inner + inner * inner * 3 * 3 + inner * outer + 2 * (inner + inner + outer)
            channels = outer
    total += 2048 * 1000 + 1000
    assert parameters(BackboneSpec(arch)) == total
    if width == 256:
        assert round(total / 1e6, 1) == 223.4


@pytest.mark.parametrize("arch", ["resnet18", "mobilenet_v2", "shufflenet_v2_x1_0", "mnasnet1_0"])
def test_a_built_network_classifies(arch: str, images: Tensor) -> None:
    spec = BackboneSpec(arch, 4)
    assert NormalizedModel(build_backbone(spec), spec).eval()(images).shape == (4, 4)


def test_mnasnet_loads_a_plain_dictionary_of_tensors() -> None:
    """As files hold it; torchvision's own wants the state dict's metadata too."""
    spec = BackboneSpec("mnasnet1_0", 4)
    source, target = build_backbone(spec, seed=1), build_backbone(spec)
    target.load_state_dict(dict(source.state_dict()))
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in target.state_dict().items())


def test_a_cifar_stem_keeps_the_resolution(images: Tensor) -> None:
    """He et al. 2016, section 4.2: 32-pixel images enter the first stage as they are."""
    spec = BackboneSpec("resnet18", 4, stem="cifar")
    model = NormalizedModel(build_backbone(spec), spec).eval()
    stages = resnet_stages(model, images)
    assert [tuple(stage.shape) for stage in stages.values()] == [
        (4, 64, 32, 32),
        (4, 128, 16, 16),
        (4, 256, 8, 8),
        (4, 512, 4, 4),
    ]
    torch.testing.assert_close(model.backbone.fc(stages["layer4"].mean(dim=(2, 3))), model(images))
    # Kaiming initialisation over 64 outputs of 3x3: variance 2 / 576.
    assert model.backbone.conv1.weight.std().item() == pytest.approx((2 / 576) ** 0.5, rel=0.1)


def test_images_for_a_cifar_stem_are_cifars_whole() -> None:
    """At 224 pixels the same ball around an image is another adversary."""
    spec = usual_spec("resnet18", 4, stem="cifar")
    assert identify(build_backbone(spec).state_dict()) == spec
    for size, given in ((32, {}), (64, {"image_size": 64})):  # a network of larger ones, whose file does not say it
        image = torch.randint(256, (3, size, size), dtype=torch.uint8)
        config = fed_as(RobustnessConfig(ThreatModel("L2", 0.5), **given), spec)
        assert torch.equal(config.val_transform()(image), image)


def test_a_stem_changes_nothing_after_it() -> None:
    of_imagenet, of_cifar = (
        dict(on_meta(BackboneSpec(stem=stem)).named_parameters()) for stem in ("imagenet", "cifar")
    )
    different = [name for name, parameter in of_imagenet.items() if parameter.shape != of_cifar[name].shape]
    assert of_imagenet.keys() == of_cifar.keys()
    assert different == ["conv1.weight"]
    assert of_cifar["conv1.weight"].shape == (64, 3, 3, 3)


def test_weights_depend_on_the_seed_alone() -> None:
    state = torch.random.get_rng_state()
    one, same, other = (build_backbone(BackboneSpec("resnet18", 4), seed=seed).fc.weight for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_images_are_normalised_inside(small_model: NormalizedModel, images: Tensor) -> None:
    model = small_model.eval()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    by_hand = torch.stack([(images[:, c] - mean[c]) / std[c] for c in range(3)], dim=1)
    torch.testing.assert_close(model(images), model.backbone(by_hand))


def test_detectron2_overrides_of_resnet50() -> None:
    assert BackboneSpec().detectron2_overrides() == {
        "INPUT.FORMAT": "RGB",
        "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
        "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
        "MODEL.RESNETS.STRIDE_IN_1X1": False,
        "MODEL.RESNETS.DEPTH": 50,
        "MODEL.RESNETS.WIDTH_PER_GROUP": 64,
        "MODEL.RESNETS.NUM_GROUPS": 1,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": 256,
    }


@pytest.mark.parametrize("arch", OTHERS)
def test_detectron2_cannot_be_what_is_no_resnet(arch: str) -> None:
    with pytest.raises(InputError, match=f"no such architecture: {arch}; it can be resnet18, .*resnext101_32x8d$"):
        BackboneSpec(arch).detectron2_overrides()


def test_detectron2_has_no_cifar_stem() -> None:
    with pytest.raises(InputError, match="Detectron2's ResNet has no cifar stem"):
        BackboneSpec("resnet18", stem="cifar").detectron2_overrides()


def test_a_spec_goes_through_a_file_and_old_ones_are_read() -> None:
    spec = BackboneSpec("resnet18", 5, mean=(0.1, 0.2, 0.3), stem="cifar")
    content = json.loads(json.dumps(spec.to_dict()))
    assert BackboneSpec(**content) == spec
    del content["stem"]  # as written before there was a choice
    assert BackboneSpec(**content) == replace(spec, stem="imagenet")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"arch": "resnet5"}, r"unknown architecture 'resnet5'.*resnet50.*vgg16_bn"),
        ({"num_classes": -1}, "at least one class"),
        ({"arch": "vgg16_bn", "num_classes": 0}, "at least one class"),
        ({"channel_order": "GRB"}, "unknown channel order 'GRB': choose one of RGB, BGR"),
        ({"arch": "resnet18", "stride_in_1x1": True}, "resnet18 has no bottlenecks"),
        ({"stem": "tinyimagenet"}, "unknown stem 'tinyimagenet': choose one of imagenet, cifar"),
        ({"arch": "vgg16_bn", "stem": "cifar"}, "only a ResNet can have the cifar stem, vgg16_bn has its own"),
        ({"arch": ["resnet50"]}, "unknown architecture"),
        ({"num_classes": True}, "whole number of classes"),
        ({"num_classes": "10"}, "whole number of classes"),
        ({"stride_in_1x1": 0}, "true or false"),
        ({"mean": ("0.4", 0.4, 0.4)}, "the mean of the input is three numbers"),
        ({"mean": (True, 0.4, 0.4)}, "the mean of the input is three numbers"),
        ({"std": (0.2, 0.2)}, "the std of the input is three numbers"),
        ({"std": (0.2, 0.2, torch.tensor(0.2))}, "the std of the input is three numbers"),
        ({"std": (0, 0.2, 0.2)}, "a std above 0"),
        ({"std": (-1, 0.2, 0.2)}, "a std above 0"),
        ({"std": (float("nan"), 0.2, 0.2)}, "a std above 0"),
        ({"mean": (300, 300, 300)}, "a mean lies from 0 to 1"),
    ],
)
def test_what_is_no_backbone_is_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        BackboneSpec(**wrong)


@pytest.mark.parametrize(
    ("mean", "std", "mend"),
    [
        ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375), "--mean 0.485 0.456 0.406 --std 0.229 0.224 0.225"),
        (IMAGENET_MEAN, (58.395, 57.12, 57.375), "--mean 0.485 0.456 0.406 --std 0.229 0.224 0.225"),
        ((103.53, 116.28, 123.675), (1.0, 1.0, 1.0), "--std 0.00392157 0.00392157 0.00392157"),
    ],
)
def test_values_in_units_of_0_255_are_refused_with_those_in_units_of_1(
    mean: tuple[float, ...], std: tuple[float, ...], mend: str
) -> None:
    with pytest.raises(InputError, match=mend) as refused:
        BackboneSpec(mean=mean, std=std)
    mean_words, std_words = str(refused.value).split("--mean ")[1].split(" --std ")
    mended = BackboneSpec(mean=tuple(map(float, mean_words.split())), std=tuple(map(float, std_words.split())))
    assert mended.detectron2_overrides()["MODEL.PIXEL_STD"] == pytest.approx(
        [255 * s if max(std) < 1 else s for s in std], abs=1e-3
    )
