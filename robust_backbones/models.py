"""Backbones: what a network is (BackboneSpec), how it is built, and how images in [0, 1] enter it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from robust_backbones.errors import InputError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# depth -> residual block and blocks a stage (He et al. 2016, table 1)
_STAGES = {
    18: (BasicBlock, [2, 2, 2, 2]),
    34: (BasicBlock, [3, 4, 6, 3]),
    50: (Bottleneck, [3, 4, 6, 3]),
    101: (Bottleneck, [3, 4, 23, 3]),
    152: (Bottleneck, [3, 8, 36, 3]),
}


@dataclass(frozen=True)
class ResNetShape:
    """What tells one ResNet from another, in Detectron2's terms; depth 50 at width 64 is ResNet-50."""

    depth: int
    width_per_group: int = 64
    num_groups: int = 1


# name (torchvision's where it has one) -> shape
ARCHITECTURES = {
    "resnet18": ResNetShape(18),
    "resnet34": ResNetShape(34),
    "resnet50": ResNetShape(50),
    "resnet101": ResNetShape(101),
    "resnet152": ResNetShape(152),
    "wide_resnet50_2": ResNetShape(50, width_per_group=128),
    "wide_resnet50_4": ResNetShape(50, width_per_group=256),
    "resnext50_32x4d": ResNetShape(50, width_per_group=4, num_groups=32),
    "resnext101_32x8d": ResNetShape(101, width_per_group=8, num_groups=32),
}


@dataclass(frozen=True)
class BackboneSpec:
    """Everything needed to rebuild a backbone and to feed it; travels inside checkpoints and converted files.

    ``mean`` and ``std`` are per channel, in [0, 1] pixel units, in the order of ``channel_order``.
    ``stride_in_1x1`` tells where a bottleneck strides: in its 3x3 convolution (False, torchvision) or its first 1x1.
    """

    arch: str = "resnet50"
    num_classes: int = 1000
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    channel_order: str = "RGB"
    stride_in_1x1: bool = False

    def __post_init__(self) -> None:
        if self.arch not in ARCHITECTURES:
            raise InputError(f"unknown architecture {self.arch!r}: choose one of {', '.join(ARCHITECTURES)}")
        if self.num_classes < 1:
            raise InputError(f"a backbone needs at least one class, got {self.num_classes}")
        # Lists come back from files; tuples keep the spec hashable and comparable.
        object.__setattr__(self, "mean", tuple(self.mean))
        object.__setattr__(self, "std", tuple(self.std))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, the same before and after a trip through JSON; ``BackboneSpec(**...)`` reads them."""
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}

    def detectron2_overrides(self) -> dict[str, object]:
        """The Detectron2 configuration keys this backbone needs, with their values (pixel units 0 to 255)."""
        shape = ARCHITECTURES[self.arch]
        return {
            "INPUT.FORMAT": self.channel_order,
            "MODEL.PIXEL_MEAN": [round(255 * value, 3) for value in self.mean],
            "MODEL.PIXEL_STD": [round(255 * value, 3) for value in self.std],
            "MODEL.RESNETS.STRIDE_IN_1X1": self.stride_in_1x1,
            "MODEL.RESNETS.DEPTH": shape.depth,
            "MODEL.RESNETS.WIDTH_PER_GROUP": shape.width_per_group,
            "MODEL.RESNETS.NUM_GROUPS": shape.num_groups,
            # A basic block does not expand its channels by 4 as a bottleneck does.
            "MODEL.RESNETS.RES2_OUT_CHANNELS": 64 if _STAGES[shape.depth][0] is BasicBlock else 256,
        }


def build_backbone(spec: BackboneSpec, *, seed: int = 0) -> ResNet:
    """A torchvision ResNet with fresh weights drawn from ``seed``; the global generator is left as it was."""
    if spec.stride_in_1x1:
        raise InputError("torchvision's ResNet strides in the 3x3 convolution: stride_in_1x1 cannot be built")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return _build(ARCHITECTURES[spec.arch], spec.num_classes)


def _build(shape: ResNetShape, num_classes: int) -> ResNet:
    block, stages = _STAGES[shape.depth]
    return ResNet(
        block,
        stages,
        num_classes=num_classes,
        groups=shape.num_groups,
        width_per_group=shape.width_per_group,
    )


def identify(state_dict: dict[str, Tensor]) -> tuple[str, int]:
    """The architecture and the number of classes of a torchvision-named ResNet, told by its tensors' shapes.

    Raises:
        InputError: no known architecture has exactly these tensors.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items() if not _is_optional(name)}
    if "fc.weight" not in state_dict or state_dict["fc.weight"].ndim != 2:
        raise InputError("the file holds no torchvision ResNet (no classifier fc.weight)")
    for arch, shape in ARCHITECTURES.items():
        with torch.device("meta"):
            reference = _build(shape, 1).state_dict()
        if shapes == {name: tuple(tensor.shape) for name, tensor in reference.items() if not _is_optional(name)}:
            return arch, len(state_dict["fc.weight"])
    raise InputError(f"the file holds none of the known architectures ({', '.join(ARCHITECTURES)})")


def _is_optional(name: str) -> bool:
    """Tensors that do not tell architectures apart: the classifier, and a counter that old files lack."""
    return name.startswith("fc.") or name.endswith("num_batches_tracked")


class NormalizedModel(nn.Module):
    """A backbone that takes images in [0, 1] and normalises inside, so that epsilon keeps its pixel units."""

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: ResNet, spec: BackboneSpec) -> None:
        super().__init__()
        self.backbone = backbone
        self.register_buffer("mean", torch.tensor(spec.mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(spec.std)[:, None, None], persistent=False)

    def normalize(self, images: Tensor) -> Tensor:
        """Shape (N, 3, H, W), [0, 1] -> zero mean and unit variance over the training set."""
        return (images - self.mean) / self.std

    def forward(self, images: Tensor) -> Tensor:
        """Images in [0, 1], shape (N, 3, H, W) -> logits (N, classes)."""
        return self.backbone(self.normalize(images))

    def stages(self, images: Tensor) -> dict[str, Tensor]:
        """Images in [0, 1] -> the outputs of layer1 (stride 4) to layer4 (stride 32), by name."""
        net = self.backbone
        x = net.maxpool(net.relu(net.bn1(net.conv1(self.normalize(images)))))
        outputs = {}
        for name in ("layer1", "layer2", "layer3", "layer4"):
            outputs[name] = x = getattr(net, name)(x)
        return outputs
