"""Detectors that find nothing, or score everything alike: noticed when they are evaluated, with the usual cause."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

NOTHING = "images, and no detection on any"
ALIKE = "detections, all of the same score"
_SAYS = {
    NOTHING: "no detection above SCORE_THRESH_TEST on the {} images of {}",
    ALIKE: "all {} detections on {} have the same score",
}
Warnings = Mapping[str, Mapping[str, int]]
"""Data set -> kind -> count."""
_SPREAD = 1e-4
"""Scores of one value differ by rounding."""
_FAR = 2.0
"""A loss of so many times the first one is far above it."""


def oddities(rows: Sequence[Mapping[str, Any]], images: int) -> dict[str, int]:
    """By kind, what is odd about all detections on ``images`` images; as in a record's ``data_warnings``."""
    if not rows:
        return {NOTHING: images} if images else {}
    scores = [row["score"] for row in rows]
    # A few detections may have one score by chance.
    return {ALIKE: len(rows)} if len(rows) > images > 1 and max(scores) - min(scores) < _SPREAD else {}


def merged(warnings: Warnings, others: Warnings) -> dict[str, dict[str, int]]:
    """The warnings of both, by set and kind."""
    return {name: {**warnings.get(name, {}), **others.get(name, {})} for name in dict.fromkeys([*warnings, *others])}


def sentences(warnings: Warnings, run: Path) -> Iterator[str]:
    """A sentence for each oddity in a record's ``data_warnings``; ``run`` is the folder that the detector is from."""
    for name, kinds in warnings.items():
        for kind in kinds.keys() & _SAYS.keys():
            yield (
                f"{_SAYS[kind].format(kinds[kind], name)}: the detector was hardly trained, or its training collapsed, "
                f"usually because the learning rate was too high{_highest_loss(run / 'metrics.json')}; train longer, "
                "lower SOLVER.BASE_LR or lengthen SOLVER.WARMUP_ITERS"
            )


def _highest_loss(path: Path) -> str:
    """Where a run's loss was far above its start, in brackets; nothing if it never was, or its file cannot be read."""
    losses = {}
    with suppress(OSError, ValueError, LookupError, TypeError):
        for line in path.read_text().splitlines():
            if "total_loss" in (row := json.loads(line)):
                losses[row["iteration"]] = row["total_loss"]
    first, highest = next(iter(losses.values()), 0), max(losses, key=losses.__getitem__, default=0)
    if not losses or losses[highest] < _FAR * first:
        return ""
    return f" (its loss was {losses[highest]:.3g} at iteration {highest}, and {first:.3g} at first)"
