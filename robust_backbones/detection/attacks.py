"""White-box attacks on R-CNNs and RetinaNets through their own training losses, and checks for gradient masking."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from detectron2.modeling import GeneralizedRCNN, PanopticFPN, RetinaNet, ROIHeads
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.proposal_generator.rrpn import RRPN
from detectron2.modeling.roi_heads import BaseKeypointRCNNHead, BaseMaskRCNNHead
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from robust_backbones.attacks import (
    AttackConfig,
    Losses,
    check_points,
    frozen_eval,
    loss_values,
    random_point,
    strongest_points,
)
from robust_backbones.errors import InputError, check_choice, plural
from robust_backbones.threat_models import ThreatModel

LOSSES = {
    "classification": ("loss_cls",),
    "localization": ("loss_box_reg", "loss_rpn_loc"),
    "objectness": ("loss_rpn_cls",),
    "mask": ("loss_mask",),
    "total": ("loss_cls", "loss_box_reg", "loss_mask", "loss_rpn_cls", "loss_rpn_loc"),
}
"""The losses that an attack can maximise, as sums of Detectron2's training losses; ``total`` is the training loss."""
LARGER_BALLS = (2, 4)
"""The multiples of epsilon at which ``sanity_check`` attacks again."""
TOLERATED_SHARE = 0.25
"""Share of images that may fail a sanity check without a warning: an attack with few steps can overshoot in a larger
ball, where its steps are longer. If gradients are masked, most images fail."""
_SIGNS = {
    "random_is_stronger": "random noise is stronger than the white-box attack",
    "larger_is_not_stronger": "a larger epsilon is not stronger",
}

# Their ``training`` flag chooses between losses and detections; layers within keep the flags of evaluation.
_LOSS_MODULES = (GeneralizedRCNN, DenseDetector, RPN, ROIHeads, BaseMaskRCNNHead, BaseKeypointRCNNHead)
Detector: TypeAlias = GeneralizedRCNN | DenseDetector


@dataclass(frozen=True, kw_only=True)
class DetectorAttack(AttackConfig):
    """An adversary of detectors: its loss, its ball and its effort.

    The ball is around the image as the detector sees it: after resizing, before normalisation, in [0, 1] pixel units.
    The result is the strongest of all points that an attack visits, including the image itself.
    """

    threat_model: ThreatModel
    """At epsilon 0 images do not change."""
    loss: str = "total"
    """One of LOSSES: classification, localization, objectness, mask, total."""
    steps: int = 10
    """1 to 100."""
    relative_step_size: float = 0.25
    """Step size as a fraction of epsilon; ignored by the schedule ``apgd``."""
    schedule: Literal["fixed", "apgd"] = "fixed"
    """fixed: projected gradient ascent with a fixed step size (Madry et al. 2018); apgd: step sizes that halve when the
    loss stalls (Croce & Hein 2020)."""
    target: int | Literal["derangement"] | None = None
    """Targeted attack: every object is to be classified as this class (from 0); ``derangement`` draws from
    ``target_seed`` one target for each class, never itself. The attack then lowers the classification loss of the
    targets. None: no target, the attack raises ``loss``."""
    target_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps > 100:
            raise InputError(f"an attack has at most 100 steps, got {self.steps}")
        check_choice("loss", self.loss, LOSSES)
        check_choice("schedule", self.schedule, ("fixed", "apgd"))
        if isinstance(self.target, str) and self.target != "derangement":
            raise InputError(f"unknown target {self.target!r}: give a class from 0, or derangement")
        if self.target is not None and self.loss != "classification":
            raise InputError(f"a target needs the classification loss, got {self.loss}: give loss classification")

    def check(self, model: Detector) -> None:
        """Raise InputError if a detector lacks the loss, the target class, or a part that attacks need."""
        if missing := missing_part(model):
            raise InputError(
                f"{type(model).__name__} cannot be attacked: {missing}; attacks are of Faster, Mask and Cascade R-CNN "
                "and of RetinaNet"
            )
        one_stage = isinstance(model, DenseDetector)
        if self.loss == "mask" and (one_stage or not model.roi_heads.mask_on):
            raise InputError("the mask loss needs a detector with masks: choose another loss, or a Mask R-CNN")
        if self.loss == "objectness" and one_stage:
            raise InputError("a detector of one stage has no objectness loss: choose classification or localization")
        self.target_classes(_number_of_classes(model))

    def target_classes(self, num_classes: int) -> Tensor | None:
        """The target of each class, shape (num_classes,); InputError if there is no such class or only one."""
        if self.target is None:
            return None
        if isinstance(self.target, int):
            if not 0 <= self.target < num_classes:
                raise InputError(f"target {self.target} is no class of the detector: choose one of 0-{num_classes - 1}")
            return torch.full((num_classes,), self.target)
        if num_classes < 2:
            raise InputError("a detector of one class has no other to aim at: leave the target out")
        # One cycle through all classes: none is its own successor.
        cycle = torch.randperm(num_classes, generator=torch.Generator().manual_seed(self.target_seed))
        return torch.empty_like(cycle).scatter_(0, cycle, cycle.roll(-1))


@dataclass(frozen=True)
class AttackedImage:
    """Detectron2's input dict with the attacked image, and the loss before and after."""

    sample: dict[str, Any]
    """``image`` is float32 in 0-255, on the device of the original; the rest is the original's."""
    clean_loss: float
    """Loss of the original that the attack maximises; with a target, minus the classification loss of the targets."""
    loss: float
    """The same for the attacked image; not below ``clean_loss``."""


def attack_image(model: Detector, sample: Mapping[str, Any], attack: DetectorAttack, *, seed: int = 0) -> AttackedImage:
    """The image near that of ``sample`` which maximises the detector's own training loss.

    On an image without objects, the attack maximises the background's classification and objectness losses;
    localisation and mask losses are zero there, and with a target the image does not change. The states of the model
    and the global random generators are restored.

    Args:
        model: a Faster, Mask or Cascade R-CNN, or a RetinaNet, on any device.
        sample: Detectron2's input dict: ``image``, shape (C, H, W), uint8 or float in 0-255, resized and not
            normalised; ``instances``, its ground truth at this size (``gt_boxes``, ``gt_classes``, and ``gt_masks``
            for a Mask R-CNN). Anything else is passed on.
        seed: of the random starts and the sampling of anchors and proposals.

    Raises:
        InputError: as ``DetectorAttack.check``; image and ground truth differ in size; the ball contains every image.
        RuntimeError: the result is outside the ball or 0-255.
    """
    attack.check(model)
    original = sample["image"]
    pixels = original.to(model.device, torch.float32)
    images = pixels[None] / 255
    threat_model = attack.threat_model
    threat_model.check_radius(pixels.shape)
    with frozen_losses(model):
        losses = loss_function(model, sample, attack, seed=seed)
        if threat_model.epsilon == 0 or (attack.target is not None and len(sample["instances"]) == 0):
            loss = loss_values(losses, images).item()
            return AttackedImage({**sample, "image": original.float()}, loss, loss)
        generator = torch.Generator(images.device).manual_seed(seed)
        best = strongest_points(losses, images, threat_model, attack, schedule=attack.schedule, generator=generator)
    attacked = 255 * best.points
    check_points(attacked / 255, images, threat_model)
    return AttackedImage(
        {**sample, "image": attacked[0].to(original.device)}, best.first_losses.item(), best.losses.item()
    )


@contextmanager
def frozen_losses(model: Detector) -> Iterator[None]:
    """Make ``model(samples)`` return Detectron2's training losses, with all layers in eval mode and without gradients.

    The mode of every module is restored, even after an exception.
    """
    with frozen_eval(model):
        for module in model.modules():
            if isinstance(module, _LOSS_MODULES):
                module.training = True  # not .train(), which would reach the layers within
        yield


def loss_function(model: Detector, sample: Mapping[str, Any], attack: DetectorAttack, *, seed: int = 0) -> Losses:
    """The loss that the attack maximises: images in [0, 1], shape (1, C, H, W) -> shape (1,).

    For use within ``frozen_losses``. Each call samples anchors and proposals with the same random numbers, and does not
    change the global generators.

    Raises:
        InputError: ground truth and image differ in size.
    """
    instances = sample["instances"].to(model.device)
    if instances.image_size != tuple(sample["image"].shape[-2:]):
        height, width = sample["image"].shape[-2:]
        raise InputError(
            f"an image of {height}x{width} pixels has ground truth for {instances.image_size[0]}x"
            f"{instances.image_size[1]}: resize both alike, as Detectron2's DatasetMapper does"
        )
    targets = attack.target_classes(_number_of_classes(model))
    if targets is not None:
        instances.gt_classes = targets.to(model.device)[instances.gt_classes]
    sign = 1 if targets is None else -1

    def losses(points: Tensor) -> Tensor:
        # A storage of its own: training's must not log an attack. Its iteration is not 0, at which VIS_PERIOD draws.
        with _same_draws(seed, model.device), same_normalizer(model), EventStorage(1):
            values = model([{**sample, "image": 255 * points[0], "instances": instances}])
        # Cascade R-CNN has a loss for each stage: loss_cls_stage0, ...
        loss = sum(value for name, value in values.items() if name.partition("_stage")[0] in LOSSES[attack.loss])
        return sign * loss[None]

    return losses


def missing_part(model: nn.Module) -> str:
    """What an attack on this detector would need and is missing; "" for nothing."""
    if isinstance(model, RetinaNet):
        return ""
    if isinstance(model, PanopticFPN):
        return "the ground truth has no semantic segmentation for its second head"
    if not isinstance(model, GeneralizedRCNN):
        return f"its training losses are none of {', '.join(LOSSES['total'])}"
    if not isinstance(model.proposal_generator, RPN) or isinstance(model.proposal_generator, RRPN):
        return f"its proposals are those of {type(model.proposal_generator).__name__}, not of an RPN"
    if not isinstance(model.roi_heads, ROIHeads):
        return f"its heads, {type(model.roi_heads).__name__}, are no ROIHeads"
    if getattr(model.roi_heads, "keypoint_on", False):
        return "the ground truth has no keypoints for its keypoint head"
    return ""


def _number_of_classes(model: Detector) -> int:
    return int(model.num_classes if isinstance(model, DenseDetector) else model.roi_heads.num_classes)


@contextmanager
def same_normalizer(model: Detector) -> Iterator[None]:
    """Restore the running number of positive anchors by which a RetinaNet divides its losses; each call changes it."""
    before = model.__dict__.get("loss_normalizer")
    try:
        yield
    finally:
        if before is not None:
            model.loss_normalizer = before
        elif "loss_normalizer" in model.__dict__:
            del model.loss_normalizer


@contextmanager
def _same_draws(seed: int, device: torch.device) -> Iterator[None]:
    """Global random numbers from ``seed``; the generators are restored afterwards."""
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(seed)
        if cuda:
            torch.cuda.default_generators[device.index].manual_seed(seed)
        yield


def sanity_check(model: Detector, samples: Sequence[Mapping[str, Any]], attack: DetectorAttack) -> dict[str, float]:
    """Compare an attack with random noise, and with itself in larger balls: two checks for gradient masking.

    Both are from Athalye et al. 2018, "Obfuscated gradients give a false sense of security", section 3.1.

    Takes about 3.5 times as long as the attack. Images without objects are left out, as some losses are constant there.

    Args:
        samples: as ``attack_image`` takes them.

    Returns:
        Metrics of a record: ``sanity/images``, the number of attacked images; ``sanity/random_is_stronger``, the number
        for which a random point of the ball (of as many as the attack has steps) has a higher loss;
        ``sanity/larger_is_not_stronger``, the number for which no attack in a larger ball reaches a higher loss; and
        the mean of the attacked loss as ``sanity/loss/NAME``: ``clean``, ``random``, ``attack``, ``attack x2`` and
        ``attack x4`` epsilon.

    Raises:
        InputError: there is no image with objects, epsilon is 0, or as ``attack_image``.
    """
    samples = [sample for sample in samples if len(sample["instances"]) > 0]
    threat_model = attack.threat_model
    if not samples or threat_model.epsilon == 0:
        raise InputError("a sanity check needs images with objects and epsilon > 0: there is nothing to attack")
    largest = 1.0 if threat_model.norm == "Linf" else float("inf")  # linf's ball of radius 1 holds every image
    larger = {
        f"attack x{factor}": replace(threat_model, epsilon=min(factor * threat_model.epsilon, largest))
        for factor in LARGER_BALLS
    }
    rows = []
    for sample in samples:
        attacked = attack_image(model, sample, attack)
        row = {"clean": attacked.clean_loss, "attack": attacked.loss}
        row["random"] = _strongest_noise(model, sample, attack)
        for name, ball in larger.items():
            row[name] = attack_image(model, sample, replace(attack, threat_model=ball)).loss
        rows.append(row)
    return {
        "sanity/images": float(len(rows)),
        "sanity/random_is_stronger": float(sum(row["random"] > row["attack"] for row in rows)),
        "sanity/larger_is_not_stronger": float(sum(max(row[n] for n in larger) <= row["attack"] for row in rows)),
        **{f"sanity/loss/{name}": sum(row[name] for row in rows) / len(rows) for name in rows[0]},
    }


def sanity_warnings(metrics: Mapping[str, float | None]) -> list[str]:
    """A sentence for every check that more than TOLERATED_SHARE of the images fail; ``metrics`` are a record's."""
    images = metrics.get("sanity/images") or 0
    counts = {sentence: metrics.get(f"sanity/{name}") or 0 for name, sentence in _SIGNS.items()}
    return [
        f"{sentence} on {count:g} of {plural(int(images), 'image')}: a sign of masked gradients, attacked AP says "
        "nothing"
        for sentence, count in counts.items()
        if count > TOLERATED_SHARE * images
    ]


def _strongest_noise(model: Detector, sample: Mapping[str, Any], attack: DetectorAttack) -> float:
    """The highest loss of as many random points of the ball as the attack has steps."""
    images = sample["image"].to(model.device, torch.float32)[None] / 255
    generator = torch.Generator(images.device).manual_seed(1)  # not the attack's own starts
    with frozen_losses(model):
        losses = loss_function(model, sample, attack)
        noise = (random_point(images, attack.threat_model, generator) for _ in range(attack.steps * attack.restarts))
        return max(loss_values(losses, points).item() for points in noise)
