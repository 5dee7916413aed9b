"""Signs of gradient masking: what no attack that follows useful gradients shows.

Both are from Athalye et al. 2018, "Obfuscated gradients give a false sense of security", section 3.1; an attack that
fails one says nothing of how robust the detector is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from detectron2.modeling import GeneralizedRCNN

from robust_backbones.attacks import loss_values, random_point
from robust_backbones.detection.attacks import DetectorAttack, attack_image, frozen_losses, loss_function
from robust_backbones.errors import InputError

LARGER_BALLS = (2, 4)
"""The multiples of epsilon at which ``sanity_check`` attacks again."""
TOLERATED_SHARE = 0.25
"""Of images that may fail a sanity check without a warning: an attack of few steps can overshoot in a larger ball,
where its steps are longer. Where gradients are masked, most images fail."""
_SIGNS = {
    "random_is_stronger": "random noise is stronger than the white-box attack",
    "larger_is_not_stronger": "a larger epsilon is not stronger",
}


def sanity_check(
    model: GeneralizedRCNN, samples: Sequence[Mapping[str, Any]], attack: DetectorAttack, *, seed: int = 0
) -> dict[str, float]:
    """Hold an attack against random noise, and against itself in larger balls.

    Takes about 3.5 times as long as the attack. Images without objects are left out: some losses are constant there.

    Args:
        samples: as ``attack_image`` takes them.

    Returns:
        Metrics of a record: how many ``sanity/images`` were attacked; of how many of them one of as many random points
        of the ball as the attack has steps has a higher loss, ``sanity/random_is_stronger``; for how many no attack in
        a larger ball reaches a higher loss, ``sanity/larger_is_not_stronger``; and the mean of what the attack raises,
        as ``sanity/loss/NAME``: ``clean``, ``random``, ``attack``, ``attack x2`` and ``attack x4`` epsilon.

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
        attacked = attack_image(model, sample, attack, seed=seed)
        row = {"clean": attacked.clean_loss, "attack": attacked.loss}
        row["random"] = _strongest_noise(model, sample, attack, seed=seed)
        for name, ball in larger.items():
            row[name] = attack_image(model, sample, replace(attack, threat_model=ball), seed=seed).loss
        rows.append(row)
    return {
        "sanity/images": float(len(rows)),
        "sanity/random_is_stronger": float(sum(row["random"] > row["attack"] for row in rows)),
        "sanity/larger_is_not_stronger": float(sum(max(row[n] for n in larger) <= row["attack"] for row in rows)),
        **{f"sanity/loss/{name}": sum(row[name] for row in rows) / len(rows) for name in rows[0]},
    }


def sanity_warnings(metrics: Mapping[str, float | None]) -> list[str]:
    """A sentence for every sign that more than TOLERATED_SHARE of the images show; none is good news.

    Args:
        metrics: a record's; those without ``sanity_check`` give none.
    """
    images = metrics.get("sanity/images") or 0
    counts = {sentence: metrics.get(f"sanity/{name}") or 0 for name, sentence in _SIGNS.items()}
    return [
        f"{sentence} on {count:g} of {images:g} images: a sign of masked gradients, attacked AP says nothing"
        for sentence, count in counts.items()
        if count > TOLERATED_SHARE * images
    ]


def _strongest_noise(model: GeneralizedRCNN, sample: Mapping[str, Any], attack: DetectorAttack, *, seed: int) -> float:
    """The highest loss of as many random points of the ball as the attack has steps."""
    images = sample["image"].to(model.device, torch.float32)[None] / 255
    generator = torch.Generator(images.device).manual_seed(seed + 1)  # not the attack's own starts
    with frozen_losses(model):
        losses = loss_function(model, sample, attack, seed=seed)
        noise = (random_point(images, attack.threat_model, generator) for _ in range(attack.steps * attack.restarts))
        return max(loss_values(losses, points).item() for points in noise)
