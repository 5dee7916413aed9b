"""A pre-trained network prepared for another task: as a feature extractor, or with a new classifier."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

from torch import Tensor, nn
from torchvision.models.resnet import ResNet

from robust_backbones.checkpoint.format import Checkpoint
from robust_backbones.models import (
    BackboneSpec,
    NormalizedModel,
    backbone_with,
    build_backbone,
    only_in_timm,
    reference_shapes,
)


def _numbered(name: str, *ends: int) -> list[tuple[str, ...]]:
    """The layers ``name.0``, ``name.1``, ... in groups that end before these numbers."""
    return [tuple(f"{name}.{index}" for index in range(*pair)) for pair in pairwise((0, *ends))]


# Modules from the input on, in groups that end where the resolution halves: stem, then four stages, as a ResNet has
# them (Detectron2's FREEZE_AT counts the same way). What comes between the last group and the classifier belongs to it.
_RESNET = [("conv1", "bn1"), ("layer1",), ("layer2",), ("layer3",), ("layer4",)]
_GROUPS: dict[str, list[tuple[str, ...]]] = {
    "densenet161": [
        ("features.conv0", "features.norm0"),
        *((f"features.denseblock{block}", f"features.transition{block}") for block in (1, 2, 3)),
        ("features.denseblock4", "features.norm5"),
    ],
    "mnasnet1_0": _numbered("layers", 8, 9, 10, 12, 16),
    "mobilenet_v2": _numbered("features", 2, 4, 7, 14, 19),
    "shufflenet_v2_x1_0": [("conv1",), ("stage2",), ("stage3",), ("stage4",), ("conv5",)],
    "vgg16_bn": _numbered("features", 7, 14, 24, 34, 44),
}
_BEFORE_CLASSIFIER = {"vgg16_bn": ("classifier.0", "classifier.3")}
DEPTH = 5
"""Number of groups in every architecture."""


def feature_extractor(checkpoint: Checkpoint, *, normalize: bool = True) -> NormalizedModel:
    """The network without its classifier: images in [0, 1] -> features (N, D), the classifier's input; in eval mode.

    Args:
        normalize: False passes images in [0, 1] to the network without the normalisation that it was trained with.
    """
    backbone = checkpoint.in_rgb().build()
    backbone.set_submodule(classifier_name(checkpoint.spec), nn.Identity())
    spec = transferred_spec(checkpoint, checkpoint.spec.num_classes, normalize=normalize)
    return NormalizedModel(backbone, spec).eval()


def new_classifier(spec: BackboneSpec, num_outputs: int, *, seed: int) -> nn.Linear:
    """A new classifier for the features of such a network, with ``build_backbone``'s random weights from ``seed``."""
    return copy.deepcopy(_drawn_classifier(replace(spec, num_classes=num_outputs), seed))


@lru_cache(maxsize=8)
def _drawn_classifier(spec: BackboneSpec, seed: int) -> nn.Linear:
    """Cached, because the whole network is drawn for it, and trials and grids use the same few."""
    classifier = build_backbone(spec, seed=seed).get_submodule(classifier_name(spec))
    assert isinstance(classifier, nn.Linear)
    return classifier


def with_classifier(
    checkpoint: Checkpoint, classifier: nn.Linear, *, normalize: bool = True, freeze: int = 0
) -> FineTunedModel:
    """The pre-trained network with another classifier; the first ``freeze`` groups, 0 to DEPTH, are frozen."""
    spec = transferred_spec(checkpoint, classifier.out_features, normalize=normalize)
    weights = {**checkpoint.in_rgb().state_dict, **classifier_weights(spec, classifier)}
    return FineTunedModel(backbone_with(spec, weights), spec, freeze)


def classifier_weights(spec: BackboneSpec, classifier: nn.Linear) -> dict[str, Tensor]:
    """The classifier's tensors, under their names in the whole network."""
    return {f"{classifier_name(spec)}.{key}": tensor for key, tensor in classifier.state_dict().items()}


class FineTunedModel(NormalizedModel):
    """A network whose first ``freeze`` groups are frozen: no gradients, batch norms in eval mode."""

    def __init__(self, backbone: nn.Module, spec: BackboneSpec, freeze: int) -> None:
        super().__init__(backbone, spec)
        self._freeze = freeze
        for module in self._frozen():
            module.requires_grad_(False)

    def train(self, mode: bool = True) -> FineTunedModel:
        super().train(mode)
        for module in self._frozen():
            module.eval()
        return self

    def _frozen(self) -> list[nn.Module]:
        # Looked up anew each time: synchronised batch norms take the places of the first ones.
        return [module for group in depth_groups(self.backbone, self.spec)[: self._freeze] for module in group]


def depth_groups(backbone: nn.Module, spec: BackboneSpec) -> list[list[nn.Module]]:
    """The modules of the stem and the four stages, starting at the input; all but the classifier are in one of them."""
    if only_in_timm(spec.arch):
        return groups_of_timm(backbone, classifier_name(spec))
    groups = _RESNET if isinstance(backbone, ResNet) else _GROUPS[spec.arch]
    found = [[backbone.get_submodule(name) for name in names] for names in groups]
    found[-1] += [backbone.get_submodule(name) for name in _BEFORE_CLASSIFIER.get(spec.arch, ())]
    return found


def groups_of_timm(backbone: Any, classifier: str = "") -> list[list[nn.Module]]:
    """Groups by timm's stages: those at strides 4 to 32, or four of equally many blocks if there is one stride."""
    owners = [(name, module) for name, module in backbone.named_modules() if [*module.parameters(recurse=False)]]
    owners = [(name, module) for name, module in owners if name != classifier]
    stages = [(one["reduction"], one["module"]) for one in getattr(backbone, "feature_info", [])]
    stages = stages or [(0, name) for name, _ in owners]
    last = dict(stages)
    if last.keys() >= {4, 8, 16, 32}:
        first, ends = next(module for stride, module in stages if stride >= 4), [last[stride] for stride in (4, 8, 16)]
    else:
        first, ends = stages[0][1], [stages[len(stages) * quarter // 4 - 1][1] for quarter in (1, 2, 3)]
    names = [f"{name}." for name, _ in owners]
    cuts = [next(place for place, name in enumerate(names) if name.startswith(f"{first}."))]
    cuts += [1 + max(place for place, name in enumerate(names) if name.startswith(f"{end}.")) for end in ends]
    # What has parameters beside those of its layers, as a scale or an embedding, stands for them alone.
    parts = [
        nn.ParameterList(module.parameters(recurse=False))
        if any([*child.parameters()] for child in module.children())
        else module
        for _, module in owners
    ]
    return [parts[begin:end] for begin, end in pairwise((0, *cuts, len(parts)))]


def layer_wise_rates(model: NormalizedModel, spec: BackboneSpec, *, lr: float, decay: float) -> list[dict[str, Any]]:
    """The optimiser's groups: the classifier at ``lr``, and every group before it at ``decay`` times the next one's.

    Frozen parameters are in no group (Clark et al. 2020, section 3.1, with a group as a layer).
    """
    groups = [[model.backbone.get_submodule(classifier_name(spec))], *reversed(depth_groups(model.backbone, spec))]
    learnt = [[p for module in group for p in module.parameters() if p.requires_grad] for group in groups]
    return [{"params": found, "lr": lr * decay**depth} for depth, found in enumerate(learnt) if found]


def transferred_spec(checkpoint: Checkpoint, num_outputs: int, *, normalize: bool = True) -> BackboneSpec:
    """The spec of the network with another classifier and RGB input, normalised or not."""
    spec = replace(checkpoint.in_rgb().spec, num_classes=num_outputs)
    return spec if normalize else replace(spec, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def classifier_name(spec: BackboneSpec) -> str:
    """The name of the classifier's layer in the whole network."""
    return reference_shapes(spec.arch, spec.stem, spec.image_size)[1]
