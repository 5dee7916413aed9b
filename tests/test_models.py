"""Backbones: recognised by their shapes, built from their spec, fed in [0, 1]."""

import pytest
import torch
from torch import Tensor

from robust_backbones.errors import InputError
from robust_backbones.models import ARCHITECTURES, BackboneSpec, NormalizedModel, build_backbone, identify


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_an_architecture_is_told_by_its_shapes(arch: str) -> None:
    with torch.device("meta"):
        state_dict = build_backbone(BackboneSpec(arch, 7)).state_dict()
    assert identify(state_dict) == (arch, 7)
    without_counters = {name: t for name, t in state_dict.items() if not name.endswith("num_batches_tracked")}
    assert identify(without_counters) == (arch, 7)


def test_a_backbone_with_a_tensor_missing_is_not_recognised() -> None:
    state_dict = build_backbone(BackboneSpec("resnet18", 7)).state_dict()
    del state_dict["layer3.0.bn1.weight"]
    with pytest.raises(InputError, match="none of the known architectures"):
        identify(state_dict)


@pytest.mark.parametrize(
    ("arch", "parameters"),
    # torchvision's documented sizes
    [
        ("resnet18", 11_689_512),
        ("resnet50", 25_557_032),
        ("wide_resnet50_2", 68_883_240),
        ("resnext50_32x4d", 25_028_904),
    ],
)
def test_sizes_are_the_published_ones(arch: str, parameters: int) -> None:
    with torch.device("meta"):
        backbone = build_backbone(BackboneSpec(arch))
    assert sum(parameter.numel() for parameter in backbone.parameters()) == parameters


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


def test_stages_are_those_of_the_forward_pass(small_model: NormalizedModel, images: Tensor) -> None:
    model = small_model.eval()
    stages = model.stages(images)
    assert [tuple(stage.shape) for stage in stages.values()] == [
        (4, 64, 8, 8),
        (4, 128, 4, 4),
        (4, 256, 2, 2),
        (4, 512, 1, 1),
    ]
    logits = model.backbone.fc(stages["layer4"].mean(dim=(2, 3)))
    torch.testing.assert_close(logits, model(images))


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


def test_an_unknown_architecture_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"unknown architecture 'resnet5'.*resnet50"):
        BackboneSpec("resnet5")
