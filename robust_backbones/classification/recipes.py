"""How published robust networks were trained, as configs of this package: a table of their authors' settings."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from robust_backbones.attacks import AttackConfig
from robust_backbones.checkpoint import zoo
from robust_backbones.classification.objectives import ObjectiveConfig
from robust_backbones.classification.pretrain import PretrainConfig
from robust_backbones.threat_models import ThreatModel

FINE_TUNING = "robust_fine_tuning"
"""The recipe for a clean pre-trained network of any architecture, by ``--arch`` and ``--start-from``."""


@dataclass(frozen=True)
class Recipe:
    """The settings that published networks share."""

    source: str
    """Where their authors published them."""
    differs: str
    """What differs here from theirs, or is missing here."""
    settings: dict[str, Any]
    starts: bool = False
    """Whether it starts from a clean network's weights (``--start-from``)."""


_SMOOTHED = ObjectiveConfig(label_smoothing=0.1)
_TIMM = {"optimizer": "adamw", "schedule": "cosine", "objective": _SMOOTHED, "interpolation": "bicubic"}
_HEAVY = {"augmentation": "heavy", "mixup": 0.8, "cutmix": 1.0}

# What a published network's name begins with -> how it was trained.
RECIPES = {
    # heavy augmentation, EMA and label smoothing, their README's standard setting, from a clean network's weights
    "Singh2023Revisiting": Recipe(
        "nmndeep/revisiting-at: main.py, run_train.sh, parserr.py; arXiv 2303.01870",
        "their attack is APGD of 2 steps, here PGD of 2 steps of epsilon; the batch of all their GPUs is not said",
        _TIMM
        | _HEAVY
        | {"epochs": 300, "warmup_epochs": 20.0, "lr": 1e-3, "beta2": 0.95, "weight_decay": 0.05, "ema_decay": 0.9999}
        | {"attack": AttackConfig(steps=2, relative_step_size=1.0)},
        starts=True,
    ),
    "Liu2023Comprehensive": (
        _ares := Recipe(
            "thu-ml/ares: robust_training/train_configs, adversarial_training.py; arXiv 2302.14301",
            "their step size grows over the first 5 epochs, here epsilon does; their rate ends at 1e-5, here at 0",
            _TIMM
            | _HEAVY
            | {"epochs": 300, "warmup_epochs": 5.0, "epsilon_warmup_epochs": 5.0, "lr": 5e-4, "lr_scaling": "linear"}
            | {"weight_decay": 0.05, "ema_decay": 0.9998},
        )
    ),
    "ARES": _ares,
    # no heavy augmentation, a large weight decay and epsilon warm-up
    "Debenedetti2022Light": Recipe(
        "dedeswim/vits-robustness-torch: configs/xcit-adv-training.yaml; arXiv 2209.07399",
        "their drop path of 0.05 and 10 epochs at the lowest rate are not here; their step size is not in the file; "
        "they do not normalise images, which timm's mean and std do here",
        _TIMM
        | {"augmentation": "color_jitter", "epochs": 100, "warmup_epochs": 10.0, "epsilon_warmup_epochs": 10.0}
        | {"lr": 5e-4, "lr_scaling": "linear", "weight_decay": 0.5}
        | {"attack": AttackConfig(steps=1, relative_step_size=1.0)},
    ),
    FINE_TUNING: Recipe(
        "this package",
        "nobody's: the settings of Liu2023Comprehensive for a tenth of its epochs, at a fifth of its rate",
        _ares.settings | {"epochs": 30, "warmup_epochs": 2.0, "epsilon_warmup_epochs": 2.0, "lr": 1e-4},
        starts=True,
    ),
}


def recipe(name: str) -> PretrainConfig:
    """The config that reproduces a published backbone, by its name in ``zoo``, or that of ``FINE_TUNING``.

    Those of Salman et al. are the defaults with an architecture, a threat model, and the augmentation of the paper's
    library.

    Raises:
        InputError: no backbone of that name was published.
    """
    if name == FINE_TUNING:
        found = RECIPES[FINE_TUNING].settings
        return PretrainConfig(arch="convnext_tiny", threat_model=ThreatModel("Linf", 4 / 255), **found)
    backbone = zoo.find(name)
    own = PretrainConfig(threat_model=backbone.threat_model, arch=backbone.arch, augmentation="robustness")
    shared = recipe_of(name)
    return own if shared is None else replace(own, **(shared.settings | backbone.evaluated))


def recipe_of(name: str) -> Recipe | None:
    """The table's recipe for a published backbone's name; None for those of Salman et al."""
    return next((row for begin, row in RECIPES.items() if name.startswith(begin)), None)


def table() -> str:
    """The published backbones with a recipe, each with its authors' reported results; then the recipes' sources."""
    lines = [
        f"{begin}: {row.source}{' (--start-from a clean network)' * row.starts}; {row.differs}"
        for begin, row in RECIPES.items()
    ]
    return "\n\n".join([zoo.table(), zoo.robust_table(), "\n".join(lines)])
