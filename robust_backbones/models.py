"""Backbones: their description (BackboneSpec), how they are built, and their preprocessing of images in [0, 1].

The ResNets and a few more are torchvision's; every other name is timm's. Both are imported only when a network is
built: the import takes seconds, which code that only reads tensors does not need.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn

from robust_backbones.errors import InputError, check_choice
from robust_backbones.threat_models import ThreatModel
from robust_backbones.timm_models import (
    build_timm,
    is_swin,
    is_timm,
    set_norm_epsilon,
    swin_shape,
    timm_classifier,
    timm_config,
    timm_names,
)
from robust_backbones.timm_vit import is_vit, vit_shape

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
STEMS = ("imagenet", "cifar")
INTERPOLATIONS = ("bilinear", "bicubic")

# depth -> blocks a stage (He et al. 2016, table 1); from 50 layers on they are bottlenecks
_STAGES = {18: [2, 2, 2, 2], 34: [3, 4, 6, 3], 50: [3, 4, 6, 3], 101: [3, 4, 23, 3], 152: [3, 8, 36, 3]}


@dataclass(frozen=True)
class ResNetShape:
    """What distinguishes ResNets, in Detectron2's terms; depth 50 at width 64 is ResNet-50."""

    depth: int
    width_per_group: int = 64
    num_groups: int = 1

    @property
    def has_bottlenecks(self) -> bool:
        return self.depth >= 50


# name (torchvision's where it has one) -> shape, None of what is no ResNet: the networks of Salman et al. 2020, and the
# ResNets that complete the family. A name that is not here is timm's.
ARCHITECTURES: dict[str, ResNetShape | None] = {
    "resnet18": ResNetShape(18),
    "resnet34": ResNetShape(34),
    "resnet50": ResNetShape(50),
    "resnet101": ResNetShape(101),
    "resnet152": ResNetShape(152),
    "wide_resnet50_2": ResNetShape(50, width_per_group=128),
    "wide_resnet50_4": ResNetShape(50, width_per_group=256),
    "wide_resnet101_2": ResNetShape(101, width_per_group=128),
    "resnext50_32x4d": ResNetShape(50, width_per_group=4, num_groups=32),
    "resnext101_64x4d": ResNetShape(101, width_per_group=4, num_groups=64),
    "resnext101_32x8d": ResNetShape(101, width_per_group=8, num_groups=32),
    "densenet161": None,
    "mnasnet1_0": None,
    "mobilenet_v2": None,
    "shufflenet_v2_x1_0": None,
    "vgg16_bn": None,
}


@dataclass(frozen=True)
class BackboneSpec:
    """Everything needed to rebuild a backbone and prepare its input; stored in checkpoints and converted files.

    ``num_classes`` is 0 for a ResNet or a timm network without a classifier.
    ``mean`` and ``std`` are per channel, in [0, 1] pixel units, in the order of ``channel_order`` (RGB or BGR).
    ``stride_in_1x1`` says which convolution of a bottleneck has the stride: its 3x3 (False, torchvision) or first 1x1.
    ``stem`` of a ResNet is ``imagenet``, a 7x7 convolution of stride 2 and a max-pool, or ``cifar``, a 3x3 convolution
    of stride 1 for images of 32 pixels (He et al. 2016, section 4.2).
    ``image_size``, ``val_resize`` and ``interpolation`` are those of its authors' evaluation: the shorter side is
    resized to ``val_resize`` pixels, ``bilinear`` or ``bicubic``, and the central square of ``image_size`` is cropped.
    ``norm_epsilon`` is that of its layer norms if it differs from timm's (``timm_models.set_norm_epsilon``).

    Raises:
        InputError: unknown architecture, stem or channel order; a mean or std that pixels in [0, 1] cannot have; a
            classifier without classes; the cifar stem or the stride in the 1x1 convolution for a network that cannot
            have it; a value of the wrong type.
    """

    arch: str = "resnet50"
    num_classes: int = 1000
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    channel_order: str = "RGB"
    stride_in_1x1: bool = False
    stem: str = "imagenet"
    image_size: int = 224
    val_resize: int = 256
    interpolation: str = "bilinear"
    norm_epsilon: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.arch, str) or not (self.arch in ARCHITECTURES or is_timm(self.arch)):
            nearest = difflib.get_close_matches(
                str(self.arch), {**dict.fromkeys((*ARCHITECTURES, *timm_names()))}, cutoff=0
            )
            raise InputError(
                f"unknown architecture {self.arch!r}, nearest to {', '.join(nearest)}: choose one of "
                f"{', '.join(ARCHITECTURES)}, or a classifier of timm (timm.list_models() names them)"
            )
        check_choice("interpolation", self.interpolation, INTERPOLATIONS)
        if not all(type(size) is int and size > 0 for size in (self.image_size, self.val_resize)):
            raise InputError(f"images have a whole number of pixels > 0, got {self.image_size!r}, {self.val_resize!r}")
        check_choice("channel order", self.channel_order, ("RGB", "BGR"))
        check_choice("stem", self.stem, STEMS)
        check_normalization(self.mean, self.std)
        if type(self.num_classes) is not int or type(self.stride_in_1x1) is not bool:
            raise InputError(
                "a backbone has a whole number of classes and a stride in the 1x1 convolution that is true or false, "
                f"got {self.num_classes!r} and {self.stride_in_1x1!r}"
            )
        if not is_number(self.norm_epsilon):
            raise InputError(f"norm_epsilon is a number, got {self.norm_epsilon!r}")
        shape = self.resnet_shape
        if self.num_classes < (0 if shape or self.arch not in ARCHITECTURES else 1):
            raise InputError(f"a backbone needs at least one class, got {self.num_classes}")
        if self.stem != "imagenet" and not shape:
            raise InputError(
                f"only a ResNet can have the {self.stem} stem, {self.arch} has its own: leave the stem out"
            )
        if self.stride_in_1x1 and not (shape and shape.has_bottlenecks):
            raise InputError(f"{self.arch} has no bottlenecks, whose 1x1 convolution could stride: leave that out")
        # Lists come back from files; tuples keep the spec hashable and comparable.
        object.__setattr__(self, "mean", tuple(self.mean))
        object.__setattr__(self, "std", tuple(self.std))

    @property
    def resnet_shape(self) -> ResNetShape | None:
        """None if it is not a ResNet."""
        return ARCHITECTURES.get(self.arch)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that survive a round trip through JSON; ``BackboneSpec(**...)`` reads them."""
        values = {**asdict(self), "mean": list(self.mean), "std": list(self.std)}
        usual = {field.name: field.default for field in fields(self)}
        return {name: value for name, value in values.items() if name not in _NEWER or value != usual[name]}

    def detectron2_overrides(self) -> dict[str, object]:
        """The Detectron2 configuration keys this backbone needs, with their values (pixel units 0 to 255).

        Raises:
            InputError: Detectron2's ResNet cannot represent this backbone.
        """
        shape = self.resnet_shape
        fed = {
            "INPUT.FORMAT": self.channel_order,
            "MODEL.PIXEL_MEAN": [round(255 * value, 3) for value in self.mean],
            "MODEL.PIXEL_STD": [round(255 * value, 3) for value in self.std],
        }
        if only_in_timm(self.arch):
            return {**fed, "MODEL.BACKBONE.TIMM": self.arch, **self._timm_overrides()}
        if shape is None:
            resnets = ", ".join(arch for arch, shape in ARCHITECTURES.items() if shape)
            raise InputError(f"Detectron2's ResNet has no such architecture: {self.arch}; it can be {resnets}")
        if self.stem != "imagenet":
            raise InputError(f"Detectron2's ResNet has no {self.stem} stem: train the backbone with the imagenet stem")
        return {
            **fed,
            "MODEL.RESNETS.STRIDE_IN_1X1": self.stride_in_1x1,
            "MODEL.RESNETS.DEPTH": shape.depth,
            "MODEL.RESNETS.WIDTH_PER_GROUP": shape.width_per_group,
            "MODEL.RESNETS.NUM_GROUPS": shape.num_groups,
            # A basic block does not expand its channels by 4 as a bottleneck does.
            "MODEL.RESNETS.RES2_OUT_CHANNELS": 256 if shape.has_bottlenecks else 64,
        }

    def _timm_overrides(self) -> dict[str, object]:
        if is_swin(self.arch):
            swin_shape(self.arch)  # raises
            if self.norm_epsilon:
                raise InputError(f"Detectron2's Swin has norms of epsilon 1e-05, and this one of {self.norm_epsilon:g}")
            return {"MODEL.BACKBONE.NAME": "build_swin_fpn_backbone"}
        if is_vit(self.arch):
            vit_shape(self.arch, self.image_size)  # raises
            own = {"MODEL.VIT.PRETRAIN_SIZE": self.image_size, "MODEL.VIT.NORM_EPSILON": self.norm_epsilon}
            return {"MODEL.BACKBONE.NAME": "build_vit_sfp_backbone", **own}
        return {"MODEL.BACKBONE.NAME": "build_timm_fpn_backbone"}


_EVALUATION = ("image_size", "val_resize", "interpolation")
_NEWER = (*_EVALUATION, "norm_epsilon")
"""Fields that files older than timm support lack; they have the defaults."""


def spec_from(content: Any) -> BackboneSpec:
    """Read what ``BackboneSpec.to_dict`` wrote to a file; ``InputError`` if it is damaged."""
    known = {field.name for field in fields(BackboneSpec)}
    if not isinstance(content, dict) or not content.keys() <= known:
        raise InputError(f"its spec is damaged: it has to hold {', '.join(sorted(known))}, and nothing else")
    spec = BackboneSpec(**content)
    if missing := known - {"stem", *_NEWER} - content.keys():  # files from before there was a choice lack it
        raise InputError(f"its spec is damaged: it lacks {', '.join(sorted(missing))}")
    return spec


def only_in_timm(arch: str) -> bool:
    """Whether a network is timm's and not one of ``ARCHITECTURES``."""
    return arch not in ARCHITECTURES and is_timm(arch)


def only_size(spec: BackboneSpec) -> int:
    """The side of the square images if a network accepts only one size, else 0."""
    return spec.image_size if only_in_timm(spec.arch) and timm_config(spec.arch).fixed_input_size else 0


def usual_spec(arch: str, num_classes: int = 1000, *, stem: str = "imagenet") -> BackboneSpec:
    """The network with its authors' preprocessing; for timm's, mean, std, sizes and interpolation of its configuration.

    A ResNet with the cifar stem takes images of 32 pixels whole.

    Raises:
        InputError: as ``BackboneSpec``.
    """
    if not only_in_timm(arch):
        spec = BackboneSpec(arch, num_classes, stem=stem)
        return replace(spec, image_size=32, val_resize=32) if stem == "cifar" else spec
    cfg = timm_config(arch)
    size = cfg.input_size[-1]
    fed = {"mean": cfg.mean, "std": cfg.std, "image_size": size, "interpolation": cfg.interpolation}
    return BackboneSpec(arch, num_classes, stem=stem, val_resize=int(size / cfg.crop_pct), **fed)


Config = TypeVar("Config")


def fed_as(config: Config, *specs: BackboneSpec) -> Config:
    """A config in which sizes of 0 and an empty interpolation are replaced by the networks' own.

    Raises:
        InputError: the networks have different ones; one of them only accepts images of another size, or larger ones.
    """
    given = {name: getattr(config, name) for name in _EVALUATION}
    for name in (name for name, value in given.items() if not value):
        found = {getattr(spec, name) for spec in specs}
        if len(found) > 1:
            values = " and ".join(str(getattr(spec, name)) + f" ({spec.arch})" for spec in specs)
            raise InputError(f"the networks were made for different {name}, {values}: give --{name.replace('_', '-')}")
        given[name] = found.pop()
    if not config.val_resize:  # type: ignore[attr-defined]
        given["val_resize"] = max(given["val_resize"], given["image_size"])  # of a larger image_size that is given
    check_choice("interpolation", given["interpolation"], INTERPOLATIONS)
    for spec in specs:
        if given["image_size"] != (only_size(spec) or given["image_size"]):
            raise InputError(
                f"{spec.arch} takes images of {spec.image_size} pixels alone, not {given['image_size']}: leave out "
                "--image-size"
            )
        usual, size = usual_spec(spec.arch).image_size, given["image_size"]
        # Where the usual size fails too, the network cannot be asked without weights.
        if size != usual and (problem := _size_problem(spec.arch, size)) and not _size_problem(spec.arch, usual):
            raise InputError(f"{spec.arch} takes no images of {size} pixels ({problem}): give another --image-size")
    return replace(config, **given)  # type: ignore[type-var]


@cache
def _size_problem(arch: str, size: int) -> str:
    """Why a network's forward pass would fail on square images of ``size`` pixels, without running it; else ""."""
    if ARCHITECTURES.get(arch):  # a ResNet takes any
        return ""
    with torch.device("meta"):
        net = build_timm(arch, 1, size) if only_in_timm(arch) else _build(arch, 1, "imagenet")
        try:
            net.eval()(torch.empty(1, 3, size, size))
        except (RuntimeError, AssertionError) as error:
            return str(error).splitlines()[0]
    return ""


def check_normalization(mean: Any, std: Any) -> None:
    """Raise ``InputError``, with the values that were probably meant, unless pixels in [0, 1] can have them."""
    for name, values in (("mean", mean), ("std", std)):
        if not is_triple(values):
            raise InputError(f"the {name} of the input is three numbers, one a channel, got {values!r}")
    in_range = all(0 <= value <= 1 for value in mean), all(0 < value <= 1 for value in std)
    if all(in_range):
        return
    found = f"mean {_numbers(mean)} and std {_numbers(std)} are not those of pixels in [0, 1]"
    raise InputError(f"{found}: {_mend(tuple(mean), tuple(std), *in_range)}")


def _mend(mean: tuple[float, ...], std: tuple[float, ...], mean_fits: bool, std_fits: bool) -> str:
    # With a mean in 0-255 units, a std of 1 is in these units as well: Caffe's way.
    if not mean_fits and all(value == 1 for value in std):
        std_fits = False
    new_mean = mean if mean_fits else tuple(value / 255 for value in mean)
    new_std = std if std_fits else tuple(value / 255 for value in std)
    if all(0 <= value <= 1 for value in new_mean) and all(1e-3 < value <= 1 for value in new_std):
        return f"divided by 255, from units of 0-255, they are --mean {_numbers(new_mean)} --std {_numbers(new_std)}"
    return "a mean lies from 0 to 1, a std above 0 and up to 1"


def _numbers(values: Any) -> str:
    return " ".join(f"{value:.6g}" for value in values)


def is_number(value: Any) -> bool:
    """Whether it is an int or a float: not True, a string, a tensor, or an int too large for a float."""
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**53)


def is_triple(value: Any) -> TypeGuard[Sequence[float]]:
    return isinstance(value, (list, tuple)) and len(value) == 3 and all(map(is_number, value))


def build_backbone(spec: BackboneSpec, *, seed: int = 0) -> nn.Module:
    """The network with random weights drawn from ``seed``; the global generator is not changed.

    Unlike torchvision's, it may have no classifier, and bottlenecks with the stride in their first 1x1. A timm network
    that accepts only one size is built for ``spec.image_size``.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if only_in_timm(spec.arch):
            net = build_timm(spec.arch, spec.num_classes, spec.image_size)
            set_norm_epsilon(net, spec.norm_epsilon)
            return net
        net = _build(spec.arch, spec.num_classes, spec.stem)
    if spec.stride_in_1x1:
        from torchvision.models.resnet import Bottleneck

        for block in net.modules():
            if isinstance(block, Bottleneck):
                block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
    return net


def backbone_with(spec: BackboneSpec, state_dict: Mapping[str, Tensor]) -> nn.Module:
    """The network with copies of these weights, in float32 whatever the file has, and in train mode.

    No random weights are drawn first, except by timm.

    Raises:
        RuntimeError: these are not the tensors of this network.
    """
    # timm's have buffers that no state dict holds, such as Swin's indices.
    with nullcontext() if only_in_timm(spec.arch) else torch.device("meta"):
        net = build_backbone(spec)
    # A file's strides would choose the kernel of a 1 x 1 convolution, and with it the roundings.
    tensors = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state_dict.items()}
    net.load_state_dict(tensors, assign=True)
    return net.float()


def _build(arch: str, num_classes: int, stem: str) -> nn.Module:
    from torchvision import models
    from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

    shape = ARCHITECTURES[arch]
    if shape is None:
        return _mnasnet1_0(num_classes) if arch == "mnasnet1_0" else getattr(models, arch)(num_classes=num_classes)
    net = ResNet(
        Bottleneck if shape.has_bottlenecks else BasicBlock,
        _STAGES[shape.depth],
        num_classes=num_classes or 1,
        groups=shape.num_groups,
        width_per_group=shape.width_per_group,
    )
    if not num_classes:
        net.fc = nn.Identity()
    if stem == "cifar":
        net.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")  # as the layers after it
        net.maxpool = nn.Identity()
    return net


def _mnasnet1_0(num_classes: int) -> nn.Module:
    from torchvision.models import MNASNet

    class PlainMNASNet(MNASNet):
        """torchvision's, which also loads a plain dictionary of tensors, as files hold it."""

        def _load_from_state_dict(
            self, state_dict: dict[str, Tensor], prefix: str, local_metadata: dict[str, Any], *arguments: Any
        ) -> None:
            # torchvision asks which of its two definitions the tensors are from; at width 1.0 the two are the same.
            super()._load_from_state_dict(state_dict, prefix, {**local_metadata, "version": 2}, *arguments)

    return PlainMNASNet(1.0, num_classes)


@cache
def reference_shapes(arch: str, stem: str, image_size: int = 224) -> tuple[dict[str, tuple[int, ...]], str]:
    """The shapes of an architecture's tensors with one class, without counters, and its classifier layer's name.

    Raises:
        InputError: a timm network whose classifier is not one linear layer.
    """
    shape = ARCHITECTURES.get(arch)
    if shape is not None:
        return _resnet_shapes(shape, stem), "fc"
    with torch.device("meta"):
        net = build_timm(arch, 1, image_size) if only_in_timm(arch) else _build(arch, 1, stem)
    shapes = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items() if not is_counter(name)}
    if only_in_timm(arch):
        return shapes, timm_classifier(arch, net)
    *_, classifier = (name for name, module in net.named_modules() if isinstance(module, nn.Linear))
    return shapes, classifier


def _resnet_shapes(shape: ResNetShape, stem: str) -> dict[str, tuple[int, ...]]:
    """The shapes in torchvision's network, without building it (He et al. 2016, table 1)."""
    shapes: dict[str, tuple[int, ...]] = {}

    def convolution(name: str, norm: str, inputs: int, outputs: int, window: int, groups: int = 1) -> None:
        shapes[f"{name}.weight"] = (outputs, inputs // groups, window, window)
        shapes.update({f"{norm}.{tensor}": (outputs,) for tensor in ("weight", "bias", "running_mean", "running_var")})

    convolution("conv1", "bn1", 3, 64, 3 if stem == "cifar" else 7)
    inputs = 64
    for stage, blocks in enumerate(_STAGES[shape.depth], start=1):
        planes = 64 << (stage - 1)
        width = planes * shape.width_per_group // 64 * shape.num_groups
        outputs = 4 * planes if shape.has_bottlenecks else planes
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            if shape.has_bottlenecks:
                convolution(f"{name}.conv1", f"{name}.bn1", inputs, width, 1)
                convolution(f"{name}.conv2", f"{name}.bn2", width, width, 3, shape.num_groups)
                convolution(f"{name}.conv3", f"{name}.bn3", width, outputs, 1)
            else:
                convolution(f"{name}.conv1", f"{name}.bn1", inputs, outputs, 3)
                convolution(f"{name}.conv2", f"{name}.bn2", outputs, outputs, 3)
            if inputs != outputs:
                convolution(f"{name}.downsample.0", f"{name}.downsample.1", inputs, outputs, 1)
            inputs = outputs
    return {**shapes, "fc.weight": (1, inputs), "fc.bias": (1,)}


def is_counter(name: str) -> bool:
    """Whether it is a counter of a batch norm, which old files lack."""
    return name.endswith("num_batches_tracked")


class NormalizedModel(nn.Module):
    """A backbone that takes images in [0, 1] and normalises inside, so that epsilon is in pixel units."""

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: nn.Module, spec: BackboneSpec, threat_model: ThreatModel | None = None) -> None:
        """``threat_model``: what it was trained against, if known."""
        super().__init__()
        self.backbone, self.spec, self.threat_model = backbone, spec, threat_model
        self.register_buffer("mean", torch.tensor(spec.mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(spec.std)[:, None, None], persistent=False)

    def normalize(self, images: Tensor) -> Tensor:
        """Shape (N, 3, H, W), [0, 1] -> zero mean and unit variance over the training set."""
        return (images - self.mean) / self.std

    def forward(self, images: Tensor) -> Tensor:
        """Images in [0, 1], shape (N, 3, H, W) -> logits (N, classes)."""
        return self.backbone(self.normalize(images))
