"""Recipes of published networks, and what only they use: AdamW, the cosine, mixing, heavy augmentation."""

import math

import pytest
import torch
from torch import nn

from robust_backbones.checkpoint.zoo import published_robust
from robust_backbones.classification.config import TrainingConfig
from robust_backbones.classification.recipes import FINE_TUNING, RECIPES, recipe, recipe_of, table
from robust_backbones.classification.train import _optimizer, _scheduler
from robust_backbones.data.transforms import AUGMENTATIONS, augmentation, mixing
from robust_backbones.errors import InputError
from robust_backbones.threat_models import ThreatModel


def test_every_published_network_of_today_has_its_makers_recipe() -> None:
    for name, one in published_robust().items():
        config = recipe(name)
        assert recipe_of(name) is not None
        assert (config.arch, config.threat_model) == (one.arch, one.threat_model)
        assert (config.optimizer, config.schedule, config.objective.label_smoothing) == ("adamw", "cosine", 0.1)
        assert name in table()


def test_the_recipes_are_their_makers() -> None:
    """main.py and parserr.py of revisiting-at; the YAMLs of ARES and of vits-robustness-torch."""
    singh = recipe("Singh2023Revisiting_ConvNeXt-B-ConvStem")
    assert (singh.epochs, singh.warmup_epochs, singh.learning_rate, singh.weight_decay) == (300, 20, 1e-3, 0.05)
    assert (singh.ema_decay, singh.mixup, singh.cutmix, singh.beta2) == (0.9999, 0.8, 1.0, 0.95)
    ares = recipe("Liu2023Comprehensive_Swin-B")
    assert (ares.learning_rate, ares.ema_decay, ares.warmup_epochs) == (5e-4, 0.9998, 5)
    assert ares.attack.steps * ares.attack.relative_step_size == 2  # 3 steps of 8/255/3 at 4/255
    light = recipe("Debenedetti2022Light_XCiT-S12")
    assert (light.epochs, light.weight_decay, light.epsilon_warmup_epochs, light.attack.steps) == (100, 0.5, 10, 1)
    assert (light.mixup, light.cutmix, light.ema_decay, light.augmentation) == (0, 0, 0, "color_jitter")


def test_fine_tuning_costs_a_tenth() -> None:
    tuned, whole = recipe(FINE_TUNING), recipe("Liu2023Comprehensive_ConvNeXt-B")
    assert RECIPES[FINE_TUNING].starts
    assert whole.epochs == 10 * tuned.epochs
    assert tuned.attack == whole.attack
    assert tuned.threat_model == ThreatModel("Linf", 4 / 255)
    with pytest.raises(InputError, match="no published backbone"):
        recipe("robust_training")


def test_the_cosine_warms_up_and_ends_at_nothing() -> None:
    config = TrainingConfig(schedule="cosine", epochs=5, warmup_epochs=1, lr=2.0)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    scheduler = _scheduler(config, optimizer, 10)
    rates = []
    for _ in range(50):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates[:10] == pytest.approx([2 * step / 11 for step in range(1, 11)])
    assert rates[10:] == pytest.approx([2 * math.cos(math.pi / 2 * step / 40) ** 2 for step in range(40)])
    assert scheduler.get_last_lr()[0] == pytest.approx(0, abs=1e-12)


def test_adamw_decays_matrices_alone() -> None:
    """Without a gradient a step multiplies them by 1 - rate x decay (Loshchilov and Hutter 2019, algorithm 2)."""
    layer = nn.Sequential(nn.Conv2d(3, 2, 1), nn.LayerNorm(2))
    before = [parameter.detach().clone() for parameter in layer.parameters()]
    config = TrainingConfig(optimizer="adamw", lr=0.1, weight_decay=0.5)
    optimizer = _optimizer(config, [{"params": [*layer.parameters()]}])
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for parameter, old in zip(layer.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.detach(), old * (0.95 if old.ndim > 1 else 1))


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0)])
def test_labels_say_how_much_of_each_image_is_there(mixup: float, cutmix: float) -> None:
    """Each image is of one colour, by which its share of the mixed one is seen."""
    colours = torch.tensor([0.0, 1.0])
    images, labels = colours[:, None, None, None].expand(2, 3, 16, 16), torch.tensor([0, 1])
    mix = mixing(mixup, cutmix, 2)
    assert mix is not None
    torch.manual_seed(0)
    for _ in range(5):
        mixed, shares = mix(images, labels)
        torch.testing.assert_close(mixed.mean((1, 2, 3)), shares[:, 1])
        torch.testing.assert_close(shares.sum(1), torch.ones(2))
    assert mixing(0.0, 0.0, 2) is None


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_augmented_images_are_bytes_of_one_size(name: str) -> None:
    image = torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8)
    for _ in range(8):
        found = augmentation(name, 32, min_crop_scale=0.5, interpolation="bicubic")(image)
        assert (found.dtype, found.shape) == (torch.uint8, (3, 32, 32))
