"""The settings of a run of the ImageNet-RIB protocol."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from robust_backbones.data.transforms import EvaluationImages
from robust_backbones.errors import InputError, check_choice, check_not_negative, check_positive

PRETRAINED = "pretrained"
"""The name of the network before fine-tuning, among methods."""
PRETRAINING = "pretraining"
"""The name of the pre-training validation set, among sets."""
DISTANCE_NAMES = {
    "w2": "2-Wasserstein distance",
    "otdd": "OTDD, classes by exact transport,",
    "otdd_gaussian": "OTDD, classes as normal distributions,",
}
"""Distances between data sets, and their names in figures."""


@dataclass(frozen=True)
class InheritanceConfig(EvaluationImages):
    """How a backbone is fine-tuned on each set and evaluated on all, with the preprocessing of evaluation.

    The defaults are ImageNet-RIB's.
    """

    epochs: int = 10
    batch_size: int = 64
    lr: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 0.0
    warmup_steps: int = 196
    """Steps over which the rate grows to ``lr`` before its cosine to 0; at most a fifth of all steps."""
    keep_last: bool = False
    """Train on the incomplete last batch of an epoch too, as the public code does."""
    precision: str = "fp32"
    """fp32 or bf16 (images, losses and weights stay float32)."""
    limit: int = 0
    """Only so many images of each set and of the validation set, drawn by ``data_seed``; 0: all, as in the protocol."""
    data_seed: int = 0
    """Draws the images of --limit, those of the Fisher information and of the distances, and the held-out ones."""
    lwf_weight: float = 1.0
    """LwF: the weight of the distillation loss."""
    lwf_temperature: float = 2.0
    ewc_strength: float = 1000.0
    """EWC: lambda in lambda / 2 sum F (theta - theta_0)^2."""
    fisher_images: int = 1000
    """EWC: training images of pre-training that the Fisher information is averaged over."""
    fisher_labels: int = 1
    """EWC: labels drawn for each of them from the network's own prediction, an estimate without bias;
    0: the exact expectation over all labels, which takes a backward pass for each."""
    l2_init_strength: float = 1.0
    """l2_init: the factor of ||theta - theta_0||^2; the public code, which calls this EWC, has 1."""
    l2_sp_strength: float = 0.1
    """L2-SP: alpha in alpha / 2 ||theta - theta_0||^2."""
    lora_rank: int = 8
    lora_alpha: float = 8.0
    """LoRA: the update of a weight is alpha / rank x B A."""
    prompt_width: int = 0
    """Visual prompt: pixels of the learnt frame; 0: 30 of 224, and in proportion for other image sizes."""
    prompt_lr: float = 1.0
    """Visual prompt: the learning rate, instead of ``lr``, which would be too small for pixels."""
    soup: tuple[str, ...] = ("pretrained", "fine_tuning", "l2_init", "lwf")
    """What both soups are made of: ``pretrained`` and methods that train the whole network.
    The default is the public code's, for its EWC is l2_init."""
    held_out: float = 0.2
    """Greedy soup: the share of each class's images that its members are not trained on, and that chooses them."""

    distance: str = "w2"
    """w2: between features without labels, exactly and by Sinkhorn;
    otdd: with labels, classes compared by exact optimal transport (Alvarez-Melis & Fusi 2020);
    otdd_gaussian: classes compared as normal distributions."""
    distance_images: int = 1000
    """Images of each set, and of pre-training, that the distances are between; at most the smallest set's. 0: none."""
    sinkhorn_regularization: float = 0.05
    """Of the entropy in the Sinkhorn distance, as a share of the mean cost."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "soup", tuple(self.soup))  # a list comes from a file
        check_positive(self, "epochs", "batch_size", "lr", "lora_rank", "fisher_images")
        check_positive(self, "lwf_temperature", "sinkhorn_regularization")
        check_not_negative(self, "momentum", "weight_decay", "warmup_steps", "limit", "lwf_weight", "ewc_strength")
        check_not_negative(self, "fisher_labels", "l2_init_strength", "l2_sp_strength", "prompt_width", "prompt_lr")
        check_not_negative(self, "distance_images")
        check_choice("precision", self.precision, ("fp32", "bf16"))
        check_choice("distance", self.distance, DISTANCE_NAMES)
        if self.image_size and 2 * self.frame >= self.image_size:
            raise InputError(f"a prompt of {self.frame} pixels covers the whole image of {self.image_size}")
        if not 0 < self.held_out < 1:
            raise InputError(f"held_out is a share of a set's images, in (0, 1), got {self.held_out:g}")
        if not self.soup or len(set(self.soup)) < len(self.soup):
            raise InputError(f"a soup is made of one or more different members, got {self.soup}")

    @property
    def frame(self) -> int:
        """Width in pixels of the visual prompt."""
        return self.prompt_width or max(1, round(30 / 224 * self.image_size))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, the same before and after a trip through JSON."""
        return dict(json.loads(json.dumps(asdict(self))))
