"""Configs of transfer experiments: the grid, how a setting is chosen from it, and the recipe of a linear probe."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from robust_backbones.attacks import AttackConfig
from robust_backbones.data.transforms import AUGMENTATIONS, EvaluationImages
from robust_backbones.errors import InputError, check_choice, check_not_negative, check_positive, check_seeds
from robust_backbones.threat_models import ThreatModel


@dataclass(frozen=True)
class Setting:
    """One point of a grid."""

    lr: float
    weight_decay: float

    def __str__(self) -> str:
        return f"lr{self.lr:g}_wd{self.weight_decay:g}"


@dataclass(frozen=True)
class Penalty:
    """One point of a grid of logistic regressions."""

    value: float

    def __str__(self) -> str:
        return f"penalty{self.value:g}"


@dataclass(frozen=True)
class TransferConfig:
    """The grid, how one setting is chosen from it, and how often the chosen one is trained.

    The defaults are the paper's grid and number of trials (Salman et al. 2020, appendix A); selection is not: the
    public code selects on the test images.
    """

    lrs: tuple[float, ...] = (0.01, 0.001)
    weight_decays: tuple[float, ...] = (5e-4,)
    seeds: tuple[int, ...] = (0, 1, 2)
    """One trial each: the seed determines the new classifier's initial weights and the order of the images."""
    select_on: str = "held_out"
    """held_out: a part of the training images selects, and the chosen setting is then trained on all of them.
    test: the test images select, as in the public code; tables say so."""
    held_out: float = 0.2
    """Share of each class's training images that selects; a class of one image keeps it for training."""
    data_seed: int = 0
    """Draws the held-out images, and the augmentation that the trials of a linear probe share."""
    images_per_class: int = 0
    """Train on this many images a class, or all of a smaller one, drawn by ``data_seed``; 0: on all."""
    num_outputs: int = 0
    """Outputs of the new classifier; 0: one a class. (The public code has 57 for DTD's 47 classes.)"""
    normalize: bool = True
    """False feeds images in [0, 1] as they are to a network that was trained on normalised ones.
    The public code does so on most data sets."""
    downscale: int = 0
    """Reduce the shorter side of every image to this many pixels before its transform enlarges it again; 0 is off.
    With 32 all data sets have CIFAR's detail (Salman et al. 2020, section 4.3)."""

    def __post_init__(self) -> None:
        check_choice("select_on", self.select_on, ("held_out", "test"))
        check_not_negative(self, "images_per_class", "num_outputs", "downscale")
        check_seeds(self)
        for name in ("lrs", "weight_decays", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise InputError(f"{name} must be one or more different numbers, got {values}")
            object.__setattr__(self, name, tuple(values))  # lists come from files
        if not all(math.isfinite(lr) and lr > 0 for lr in self.lrs):
            raise InputError(f"every learning rate must be > 0, got {self.lrs}")
        if not all(math.isfinite(decay) and decay >= 0 for decay in self.weight_decays):
            raise InputError(f"every weight decay must be >= 0, got {self.weight_decays}")
        if len({str(setting) for setting in self.settings}) < len(self.settings):
            raise InputError("two settings of the grid are the same in six digits: leave one out")
        if not 0 < self.held_out < 1:
            raise InputError(f"held_out is a share of the training images, in (0, 1), got {self.held_out:g}")

    @property
    def settings(self) -> list[Setting]:
        return [Setting(lr, decay) for lr in self.lrs for decay in self.weight_decays]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, the same before and after a trip through JSON."""
        return dict(json.loads(json.dumps(asdict(self))))


@dataclass(frozen=True)
class ProbeConfig(EvaluationImages, TransferConfig):
    """The identity of a linear probe. The defaults are the paper's fixed-feature recipe, except for the selection."""

    solver: str = "sgd"
    """sgd: the paper's; lbfgs: logistic regression on features without augmentation, for each of ``penalties``."""
    penalties: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    """Grid of lbfgs: lambda in cross-entropy + lambda / 2 ‖W‖², for features of root mean square 1."""
    epochs: int = 150
    batch_size: int = 64
    lr_step: int = 50
    """The learning rate drops to a tenth every this many epochs."""
    momentum: float = 0.9
    augmentation: str = "resized_crop"
    """resized_crop; padded_crop; none: every epoch sees the features of the evaluation's crop, computed once."""
    views: int = 0
    """0: a fresh augmentation of each image in every epoch, as in the paper.
    K > 0: features of K augmentations are computed once, and epochs take them in turn: faster and less accurate."""
    batch_norm: str = "eval"
    """eval: the backbone is frozen.
    train: as in the public code its batch norms go by each batch's statistics and keep updating their own;
    they do so over the held-out images too, and seeds then share the order of the images."""
    min_crop_scale: float = 0.08
    """Least share of an image's area that a resized crop keeps."""
    precision: str = "fp32"
    """Of the backbone: fp32 or bf16. Features and heads are float32."""
    eval_threat_model: ThreatModel | None = None
    """Adversary for the robust accuracy of every trial; without one it is not measured."""
    eval_attack: AttackConfig = field(
        default_factory=lambda: AttackConfig(steps=10, relative_step_size=0.25, random_start=True)
    )
    """Adversary's effort."""
    eval_images: int = 0
    """Robust accuracy is that of this many test images, drawn by ``data_seed``; 0: of all."""

    def __post_init__(self) -> None:
        EvaluationImages.__post_init__(self)
        TransferConfig.__post_init__(self)
        check_positive(self, "epochs", "batch_size", "lr_step")
        check_not_negative(self, "views", "eval_images", "momentum")
        check_choice("solver", self.solver, ("sgd", "lbfgs"))
        check_choice("batch_norm", self.batch_norm, ("eval", "train"))
        check_choice("augmentation", self.augmentation, (*AUGMENTATIONS, "none"))
        check_choice("precision", self.precision, ("fp32", "bf16"))
        object.__setattr__(self, "penalties", tuple(self.penalties))
        if not self.penalties or not all(math.isfinite(value) and value > 0 for value in self.penalties):
            raise InputError(f"penalties must be one or more numbers > 0, got {self.penalties}")
        if not 0 < self.min_crop_scale <= 1:
            raise InputError(f"min_crop_scale is a share of the area, in (0, 1], got {self.min_crop_scale:g}")
        if self.batch_norm == "train" and (self.views or self.augmentation == "none" or self.solver == "lbfgs"):
            raise InputError(
                "batch_norm train changes the features at every step: it goes with fresh views and sgd only"
            )

    def to_dict(self) -> dict[str, Any]:
        """As of any transfer; the threat model as text."""
        return {**super().to_dict(), "eval_threat_model": self.eval_threat_model and str(self.eval_threat_model)}

    @property
    def grid(self) -> Sequence[Setting | Penalty]:
        """The settings that the solver tries."""
        return self.settings if self.solver == "sgd" else [Penalty(value) for value in self.penalties]

    @property
    def fixed_views(self) -> int:
        """Number of views of each image that are computed once; 0 if every epoch has its own."""
        return 1 if self.augmentation == "none" or self.solver == "lbfgs" else self.views
