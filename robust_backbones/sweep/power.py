"""What the seeds of a study can detect: the power of its primary comparison for an expected effect."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from robust_backbones.analysis.experiments import experiments
from robust_backbones.analysis.paper.values import PAPER, PaperResult
from robust_backbones.analysis.records import Primary, find_runs
from robust_backbones.analysis.results import results
from robust_backbones.analysis.statistics import ALPHA, MOST_SEEDS, POWER, power, seeds_needed
from robust_backbones.checkpoint import zoo
from robust_backbones.errors import InputError, plural
from robust_backbones.sweep.expand import pretraining, read_file, task_settings
from robust_backbones.sweep.manifest import Manifest, PrimaryComparison, Task
from robust_backbones.sweep.plan import Plan
from robust_backbones.threat_models import ThreatModel


@dataclass(frozen=True)
class Expected:
    """An effect to plan for, in points of a metric."""

    difference: float
    std: float
    """Of the paired differences over seeds."""
    source: str

    def power(self, seeds: int, alpha: float = ALPHA) -> float:
        """The probability of detecting it with a two-sided paired t test."""
        return power(self.difference / self.std, seeds, alpha) if seeds > 1 else 0.0

    def seeds(self, alpha: float = ALPHA) -> int | None:
        """How many seeds give a power of 80 %."""
        return seeds_needed(self.difference / self.std, alpha)


def check_power(manifest: Manifest, *, pilot: Sequence[Path] = (), allow_underpowered: bool = False) -> list[str]:
    """What the study can detect, in sentences.

    The expected effect of the primary comparison is the pilot's, else the manifest's, else the paper's. Without a
    primary comparison the whole study is exploratory; the sentences then say which of the paper's effects it could
    detect.

    Args:
        pilot: folders of records of a smaller study with the same backbones.

    Raises:
        InputError: the primary comparison is against a robust backbone; it has less than 80 % power, unless
            ``allow_underpowered``; the pilot does not have it; reports have no table of its metric.
    """
    if manifest.primary is None:
        if pilot:
            raise InputError(f"{manifest.path} has no primary comparison that a pilot could plan: add primary to it")
        return _exploratory(manifest)
    primary = manifest.primary
    task = manifest.task(primary.task)
    if primary.metric not in (metrics := _reported(task)):
        raise InputError(
            f"{manifest.path}: reports have no {primary.metric} of task {task.name}: give primary one of "
            f"{', '.join(metrics)}"
        )
    count, name = len(manifest.seeds_of(task)), primary.backbone or "the best backbone"
    standard = _threat_model(manifest, primary.standard)
    if standard is None or standard.epsilon > 0:
        trained = "is not said to be trained without an adversary" if standard is None else f"was trained at {standard}"
        raise InputError(
            f"{manifest.path}: the standard of primary, {primary.standard}, {trained}; reports compare with the "
            "standard backbone: give that, with options threat_model L2:0 if its file does not say it"
        )
    told = [f"primary: {primary.metric} of {name} against {primary.standard}, task {primary.task}"]
    chosen = (
        f"by mean {task.choose.metric} of task {task.choose.task}, on other images and seeds" if task.choose else ""
    )
    told += [f"its backbone is chosen: {chosen or primary.chosen}"] if chosen or primary.chosen else []
    told.append("all other comparisons are exploratory")
    expected = _expected(manifest, primary, pilot)
    if expected is None:
        return [
            *told,
            "power: not known without an expected effect: give --pilot, or difference and std in primary",
        ]
    found, needed = expected.power(count), expected.seeds()
    enough = f"{POWER:.0%} need {f'{needed:,}' if needed else f'more than {MOST_SEEDS:,}'} seeds"
    told.append(
        f"expected: {expected.difference:+.2f}, std of paired differences {expected.std:.2f} ({expected.source})"
    )
    told.append(f"power: {found:.2f} with {plural(count, 'seed')}, two-sided paired t test at {ALPHA}; {enough}")
    if found < POWER and not allow_underpowered:
        raise InputError(
            f"{manifest.path}: its primary comparison ({primary.metric} of {name}) has a power of "
            f"{found:.2f} with {plural(count, 'seed')} for {expected.difference:+.2f} with a std of "
            f"{expected.std:.2f} ({expected.source}): {enough}; give more seeds, or --allow-underpowered"
        )
    return told


def primary_of(manifest: Manifest, plan: Plan) -> Primary | None:
    """The declared comparison, as read by reports."""
    primary = manifest.primary
    if primary is None:
        return None
    task = manifest.task(primary.task)
    backbone = primary.backbone
    if task.choose and task.name in plan.choices:
        backbone = plan.choices[task.name]["chosen"][0][0]
    protocol = primary.protocol or manifest.protocols_of(task)[0]
    title = f"{'-'.join(filter(None, (primary.task, protocol)))}-{backbone}"
    names = [f"{title}-seed{seed}" for seed in manifest.seeds_of(task)] if backbone else []
    own = (run.key for run in plan.runs if run.task == task.name)
    return Primary(primary.metric, tuple(key for key in own if key.rsplit("-", 1)[0] in names))


def _expected(manifest: Manifest, primary: PrimaryComparison, pilot: Sequence[Path]) -> Expected | None:
    if pilot:
        return _of_pilot(manifest, primary, pilot)
    if primary.difference is not None and primary.std is not None:
        return Expected(primary.difference, primary.std, "the manifest's")
    return next((of_paper(one) for one in _paper(manifest.task(primary.task)) if one.metric == primary.metric), None)


def of_paper(paper: PaperResult) -> Expected | None:
    """The effect with its means and stds taken as true, and the two runs of a pair independent; None without stds."""
    standard, robust = paper.standard, paper.robust
    if standard.std is None or robust.std is None:
        return None
    source = (
        "the paper's means and stds of unpaired runs; its robust backbone is the best of several by the same images"
    )
    return Expected(robust.mean - standard.mean, math.hypot(standard.std, robust.std), source)


def _of_pilot(manifest: Manifest, primary: PrimaryComparison, pilot: Sequence[Path]) -> Expected:
    wanted = _threat_model(manifest, primary.backbone) if primary.backbone else None
    rows = [
        row
        for result in results(*experiments(find_runs(pilot)))
        for row in result.rows
        if result.metric == primary.metric and row.comparison and row.comparison.effect
    ]
    own = [row for row in rows if wanted is None or row.backbone.threat_model == wanted]
    if len(own) != 1:
        there = ", ".join(dict.fromkeys(row.backbone.trained_at for row in rows)) or "none"
        name = primary.backbone or "the one to be chosen"
        raise InputError(
            f"the pilot in {' '.join(map(str, pilot))} has {plural(len(own), 'tested comparison')} of {primary.metric} "
            f"for {name} ({wanted or 'trained at unknown'}; tested are {there}): give folders with one, of two "
            "or more seeds"
        )
    comparison = own[0].comparison
    assert comparison is not None
    assert comparison.difference is not None
    assert comparison.effect
    std = comparison.difference / comparison.effect
    return Expected(comparison.difference, std, f"a pilot of {plural(len(comparison.seeds), 'seed')}, itself uncertain")


def _threat_model(manifest: Manifest, name: str) -> ThreatModel | None:
    """The threat model of a backbone's training; None from scratch, and if neither file nor manifest says it."""
    (entry,) = (backbone for backbone in manifest.backbones if backbone.name == name)
    if entry.published:
        return zoo.find(entry.published).threat_model
    if entry.pretrain:
        _, options = pretraining(manifest, entry.pretrain, seed=0)
        return ThreatModel.parse(options.config.threat_model)
    return read_file(entry).threat_model if entry.file else None


def _paper(task: Task) -> list[PaperResult]:
    """The paper's results for a task's data and kind of detector."""
    settings = task_settings(task)
    kind = "segmentation" if settings["MODEL.MASK_ON"] else "detection"
    return [
        paper
        for paper in PAPER
        if paper.task == kind
        and {*settings["DATASETS.TRAIN"]} == {*paper.train}
        and paper.test in settings["DATASETS.TEST"]
    ]


def _reported(task: Task) -> list[str]:
    """The metrics of a task's detectors that have a table in reports."""
    from robust_backbones.detection.datasets import evaluator_kind

    settings = task_settings(task)
    tests, own_voc = settings["DATASETS.TEST"], [row[0] for row in settings["DATASETS.VOC_FORMAT"]]
    metrics = []
    for test in tests:
        name = test.removesuffix("_held_out")
        kinds = ["bbox", *(["segm"] if settings["MODEL.MASK_ON"] else [])]
        if name in own_voc:
            kinds = ["bbox", "bbox-11point"]
        elif evaluator_kind(name) == "pascal_voc":
            kinds = ["bbox", "bbox-area" if "2007" in name else "bbox-11point"]
        where = f"{test}/" if len(tests) > 1 else ""
        metrics += [f"{where}{kind}/{ap}" for kind in kinds for ap in ("AP", "AP50", "AP75")]
    return metrics


def _exploratory(manifest: Manifest) -> list[str]:
    """Which of the paper's effects a study without a primary comparison could detect, at Holm's first step."""
    found = []
    tests = 0  # of each metric that reports have, but for those of corruptions and attacks
    for task in manifest.tasks:
        backbones = (task.choose and task.choose.best) or len(task.backbones or manifest.backbones) - 1
        if task.transfer:
            tests += backbones
        else:
            settings = len(manifest.protocols_of(task)) * math.prod(map(len, task.grid.values()))
            tests += backbones * settings * len(_reported(task))
            found += [(task, paper.metric, one) for paper in _paper(task) if (one := of_paper(paper))]
    if not found:
        return ["no primary comparison is declared: all comparisons are exploratory"]
    alpha = ALPHA / max(1, tests)
    powers = [one.power(len(manifest.seeds_of(task)), alpha) for task, _, one in found]
    told = [
        f"{task.name} {metric}, {one.difference:+.2f} ± {one.std:.2f} (the paper's): power {power:.2f} with "
        f"{plural(len(manifest.seeds_of(task)), 'seed')} at 0.05 / {tests} (the first step of Holm); {POWER:.0%} need "
        f"{one.seeds(alpha)} seeds"
        for power, (task, metric, one) in zip(powers, found, strict=True)
    ]
    weak = any(power < POWER for power in powers)
    advice = "warning: too few seeds to tell; declare one comparison as primary, or give more seeds" if weak else ""
    return ["no primary comparison is declared: all comparisons are exploratory", *told, *filter(None, [advice])]
