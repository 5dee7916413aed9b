"""Faster and Mask R-CNN (Ren et al. 2015, He et al. 2017) with training losses over the whole batch at once.

The losses are Detectron2's. Detectron2 loops over images, and waits for the device several times in each; here the host
only waits for the NMS of each level, for the sampled regions and for those with an object, at any batch size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from detectron2.layers import ROIAlign, cross_entropy
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN
from detectron2.modeling.poolers import ROIPooler, assign_boxes_to_levels
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import FastRCNNOutputLayers, Res5ROIHeads, ROIHeads
from detectron2.structures import Boxes, Instances
from torch import Tensor

from robust_backbones.detection.fast.compiled import compiled_dense, dense
from robust_backbones.detection.fast.matching import iou, match, rows, sample
from robust_backbones.detection.fast.proposals import grid_anchors, propose
from robust_backbones.detection.roi_heads import BackboneRes5ROIHeads

Losses = dict[str, Tensor]


@META_ARCH_REGISTRY.register()
class BatchedRCNN(GeneralizedRCNN):
    """Detectron2's GeneralizedRCNN with another computation of training losses; tensors and detections are the same."""

    sides: tuple[int, ...] = ()
    """Of MODEL.COMPILE, ``fixed_sides``; empty: nothing is compiled."""

    def forward(self, batch: list[dict[str, Any]]) -> Any:
        """In training the losses, with Detectron2's names; else Detectron2's output."""
        if not self.training:
            return super().forward(batch)
        instances = [item["instances"] for item in batch]
        images, corners = self._images([item["image"] for item in batch])
        boxes, classes = (_upload(each, self.device) for each in objects_of(instances))
        # Without gradients precise BN passes through, now and then.
        through = compiled_dense if self.sides and torch.is_grad_enabled() else dense
        features, predictions = through(self.backbone, self.proposal_generator, images)
        (proposals, are_there), losses = propose_and_learn(
            self.proposal_generator, features, predictions, boxes, classes, corners
        )
        regions = sample_regions(self.roi_heads, proposals, are_there, boxes, classes)
        return losses | self._region_losses(features, regions, instances, images.shape[-2:])

    def _images(self, images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Normalised images in a tensor with Detectron2's size, and ``corners`` as in ``propose``.

        With ``sides`` it may be larger: images beside larger ones are padded with zeros anyway.
        """
        constraints = self.backbone.padding_constraints
        step = max(constraints.get("size_divisibility", self.backbone.size_divisibility), 1)
        square = constraints.get("square_size", 0)
        largest = [square or max(image.shape[axis] for image in images) for axis in (1, 2)]
        if not square:
            largest = [next((side for side in self.sides if side >= most), most) for most in largest]
        height, width = (-(-side // step) * step for side in largest)
        whole = [F.pad(image, (0, width - image.shape[2], 0, height - image.shape[1])) for image in images]
        pixels = _upload(torch.stack(whole), self.device)
        sizes = torch.tensor([[*image.shape[:0:-1]] * 2 for image in images], dtype=torch.float32)
        corners = _upload(sizes, self.device)
        right, down = (torch.arange(size, device=self.device) for size in (width, height))
        inside = (down < corners[:, 1:2])[:, None, :, None] & (right < corners[:, :1])[:, None, None, :]
        return torch.where(inside, (pixels - self.pixel_mean) / self.pixel_std, 0), corners

    def _region_losses(
        self, features: dict[str, Tensor], regions: Regions, instances: Sequence[Instances], size: Sequence[int]
    ) -> Losses:
        heads = self.roi_heads
        maps = [features[name] for name in heads.in_features]
        shared: Tensor | None = None
        if isinstance(heads, Res5ROIHeads):
            shared = heads.res5(pool(heads.pooler, maps, regions.rois))
            if isinstance(heads, BackboneRes5ROIHeads):
                shared = heads.res5_norm(shared)
            predictions = heads.box_predictor(shared.mean(dim=[2, 3]))
        else:
            predictions = heads.box_predictor(heads.box_head(pool(heads.box_pooler, maps, regions.rois)))
        losses = box_losses(heads.box_predictor, predictions, regions)
        if not heads.mask_on:
            return losses
        chosen = (regions.classes < heads.num_classes).nonzero()[:, 0]
        rois, classes = regions.rois[chosen], regions.classes[chosen]
        inputs = pool(heads.mask_pooler, maps, rois) if shared is None else shared[chosen]
        logits = heads.mask_head.layers(inputs)
        if len(rois) == 0:
            return losses | {"loss_mask": 0 * logits.sum()}
        targets = mask_targets(instances, regions.objects[chosen], rois, logits.shape[-1], size)
        if logits.shape[1] > 1:
            logits = logits.gather(1, classes[:, None, None, None].expand(-1, 1, *logits.shape[2:]))
        loss = F.binary_cross_entropy_with_logits(logits[:, 0].float(), targets.float())
        return losses | {"loss_mask": loss * heads.mask_head.loss_weight}


def objects_of(instances: Sequence[Instances]) -> tuple[Tensor, Tensor]:
    """Boxes (N, M, 4) and classes (N, M) of the images' objects; class -1 if an image has fewer than M."""
    counts = [len(each) for each in instances]
    most, absent = max(1, *counts), sum(counts)
    places, first = [], 0
    for count in counts:
        places.append([*range(first, first + count), *[absent] * (most - count)])
        first += count
    chosen = torch.tensor(places)
    all_boxes, all_classes = [each.gt_boxes.tensor for each in instances], [each.gt_classes for each in instances]
    boxes = torch.cat([*all_boxes, all_boxes[0].new_zeros(1, 4)])
    classes = torch.cat([*all_classes, all_classes[0].new_tensor([-1])])
    return boxes[chosen], classes[chosen]


class Regions(NamedTuple):
    """R regions of a batch, sampled for the heads."""

    rois: Tensor
    """(R, 5): image, left, top, right, bottom."""
    classes: Tensor
    """(R,); the number of classes for background."""
    boxes: Tensor
    """(R, 4), those of their objects; any for background."""
    objects: Tensor
    """(R,), the number of their object among those of the whole batch."""


def propose_and_learn(
    rpn: RPN,
    features: dict[str, Tensor],
    predictions: tuple[list[Tensor], list[Tensor]],
    boxes: Tensor,
    classes: Tensor,
    corners: Tensor,
) -> tuple[tuple[Tensor, Tensor], Losses]:
    """The RPN's proposals, from ``propose``, and its losses (Ren et al. 2015, equation 1).

    Args:
        features, predictions: from ``dense``.
        boxes, classes: the objects, (N, M, 4) and (N, M); class -1 where there is none.
    """
    anchors = grid_anchors(rpn.anchor_generator, [features[name] for name in rpn.in_features])
    level_logits, level_deltas = predictions
    level_logits = [logits.permute(0, 2, 3, 1).flatten(1) for logits in level_logits]
    level_deltas = [deltas.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3) for deltas in level_deltas]
    with torch.no_grad():
        every = torch.cat(anchors)
        objects, labels = match(iou(boxes, every), classes >= 0, rpn.anchor_matcher)
        chosen, counts = sample(
            labels == 1,
            labels == 0,
            size=rpn.batch_size_per_image,
            positive_fraction=rpn.positive_fraction,
            keys=torch.rand(labels.shape, device=labels.device),
        )
        positive = counts & (labels.gather(1, chosen) == 1)
        sources, targets = every[chosen], rows(boxes, objects.gather(1, chosen))
    logits = torch.cat(level_logits, dim=1).gather(1, chosen)
    deltas = rows(torch.cat(level_deltas, dim=1), chosen)
    objectness = F.binary_cross_entropy_with_logits(logits.float(), positive.float(), counts.float(), reduction="sum")
    localization = regression_loss(
        deltas, sources, targets, positive, rpn.box2box_transform.weights, rpn.smooth_l1_beta
    )
    sampled = rpn.batch_size_per_image * len(boxes)
    losses = {"loss_rpn_cls": objectness / sampled, "loss_rpn_loc": localization / sampled}
    losses = {name: loss * rpn.loss_weight.get(name, 1.0) for name, loss in losses.items()}
    return propose(rpn, anchors, level_logits, level_deltas, corners), losses


@torch.no_grad()
def sample_regions(heads: ROIHeads, proposals: Tensor, are_there: Tensor, boxes: Tensor, classes: Tensor) -> Regions:
    """The regions for training the heads, sampled from proposals and objects, with a share of positives per image."""
    exists = classes >= 0
    if heads.proposal_append_gt:
        proposals, are_there = torch.cat([proposals, boxes], dim=1), torch.cat([are_there, exists], dim=1)
    objects, labels = match(iou(boxes, proposals), exists, heads.proposal_matcher)
    chosen, counts = sample(
        are_there & (labels == 1),
        are_there & (labels == 0),
        size=heads.batch_size_per_image,
        positive_fraction=heads.positive_fraction,
        keys=torch.rand(labels.shape, device=labels.device),
    )
    objects = objects.gather(1, chosen)
    theirs = torch.where(labels.gather(1, chosen) == 1, classes.gather(1, objects), heads.num_classes)
    images = torch.arange(len(boxes), device=boxes.device)[:, None, None].expand(-1, chosen.shape[1], 1)
    rois = torch.cat([images.float(), rows(proposals, chosen)], dim=2)
    there = exists.sum(dim=1)
    numbers = objects + (there.cumsum(0) - there)[:, None]
    # A batch norm in the heads must see these regions and no others: here the host waits.
    flat = counts.flatten().nonzero()[:, 0]
    every = (rois, theirs, rows(boxes, objects), numbers)
    return Regions(*(values.flatten(0, 1)[flat] for values in every))


def pool(pooler: ROIPooler, features: Sequence[Tensor], rois: Tensor) -> Tensor:
    """Regions (R, 5) -> (R, C, H, W), each from its level of the pyramid (Lin et al. 2017, equation 1).

    All regions are passed to every level; those of other levels are outside it without area, and cost no sample.
    """
    if len(features) == 1:
        return pooler.level_poolers[0](features[0], rois)
    levels = assign_boxes_to_levels(
        [Boxes(rois[:, 1:])],
        pooler.min_level,
        pooler.max_level,
        pooler.canonical_box_size,
        pooler.canonical_level,
    )
    images, boxes = rois.split((1, 4), dim=1)
    parts = []
    for level, (align, feature) in enumerate(zip(pooler.level_poolers, features, strict=True)):
        own = torch.where((levels == level)[:, None], boxes, -1e4)
        parts.append(align(feature, torch.cat([images, own], dim=1)))
    return sum(parts[1:], parts[0])


def box_losses(predictor: FastRCNNOutputLayers, predictions: tuple[Tensor, Tensor], regions: Regions) -> Losses:
    """Classification and regression of the boxes (Girshick 2015, equation 1)."""
    scores, deltas = predictions
    count, positive = max(len(regions.classes), 1), regions.classes < predictor.num_classes
    if deltas.shape[1] > 4:  # a regression for each class
        own = regions.classes.clamp(max=predictor.num_classes - 1)
        deltas = rows(deltas.view(len(deltas), -1, 4), own[:, None])[:, 0]
    localization = regression_loss(
        deltas,
        regions.rois[:, 1:],
        regions.boxes,
        positive,
        predictor.box2box_transform.weights,
        predictor.smooth_l1_beta,
    )
    losses = {
        "loss_cls": cross_entropy(scores, regions.classes, reduction="mean"),
        "loss_box_reg": localization / count,
    }
    return {name: loss * predictor.loss_weight.get(name, 1.0) for name, loss in losses.items()}


def regression_loss(
    deltas: Tensor, sources: Tensor, targets: Tensor, positive: Tensor, weights: Sequence[float], beta: float
) -> Tensor:
    """Smooth L1 between the predicted deltas and those from ``sources`` to ``targets``, summed over the positive.

    Boxes and deltas are (..., 4); deltas are of the centre, in units of the source's size, and of the log of the size.
    """
    targets = torch.where(positive[..., None], targets, sources)  # for the others any box will do, but one with area
    size, target_size = (boxes[..., 2:] - boxes[..., :2] for boxes in (sources, targets))
    shift = (targets[..., :2] + 0.5 * target_size - sources[..., :2] - 0.5 * size) / size
    columns = (*shift.unbind(-1), *(target_size / size).log().unbind(-1))
    wanted = torch.stack([weight * column for weight, column in zip(weights, columns, strict=True)], dim=-1)
    losses = F.smooth_l1_loss(deltas.float(), wanted, reduction="none", beta=beta)
    return torch.where(positive[..., None], losses, 0).sum()


@torch.no_grad()
def mask_targets(
    instances: Sequence[Instances], objects: Tensor, rois: Tensor, side: int, size: Sequence[int]
) -> Tensor:
    """The objects' bit masks within the regions: bool, (R, side, side), as Detectron2's BitMasks crops them."""
    canvases = []
    down, right = (torch.arange(full, device=rois.device) for full in size)
    for each in instances:
        if len(each) > 0:
            masks = _upload(each.gt_masks.tensor, rois.device)
            # Beyond the image its last pixels go on, as they do where ROIAlign meets the end of a map.
            height, width = masks.shape[1:]
            canvases.append(masks[:, down.clamp(max=height - 1)[:, None], right.clamp(max=width - 1)])
    canvas = torch.cat(canvases)[:, None].float()
    return (
        ROIAlign((side, side), 1.0, 0, aligned=True)(canvas, torch.cat([objects[:, None], rois[:, 1:]], dim=1))[:, 0]
        >= 0.5
    )


def _upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to the device, without waiting for its pending work."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
