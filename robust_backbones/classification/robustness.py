"""Robustness of a classifier: clean, PGD and AutoAttack accuracy, image by image and resumable at every batch."""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from robust_backbones.attacks import AttackConfig, check_points, frozen_eval, pgd
from robust_backbones.checkpoint.format import Checkpoint
from robust_backbones.classification.compute import Compute
from robust_backbones.data.batches import val_batches
from robust_backbones.data.datasets import mix, open_dataset
from robust_backbones.data.transforms import EvaluationImages
from robust_backbones.errors import InputError, check_choice, check_positive, plural
from robust_backbones.models import BackboneSpec, fed_as
from robust_backbones.runs.folders import claimed
from robust_backbones.runs.identity import FINGERPRINT
from robust_backbones.runs.record import RunRecord
from robust_backbones.threat_models import ThreatModel

ENSEMBLE = ("apgd-ce", "apgd-t", "square")
"""AutoAttack's attacks in its order, without FAB-T: accuracy under these is an upper bound of that under AutoAttack."""
STAGES = ("clean", "pgd", *ENSEMBLE)

MAX_TARGETS = 9
"""Classes that APGD-T aims at, the likeliest first, as AutoAttack has it."""
MIN_CLASSES_TARGETED = 4
"""The targeted DLR loss looks at the four largest logits (Croce & Hein 2020, eq. 7)."""

Attack = Callable[[Tensor, Tensor], Tensor]
"""Images and labels -> adversarial images."""


@dataclass(frozen=True)
class RobustnessConfig(EvaluationImages):
    """The identity of an evaluation: same config, same checkpoint, same images, same outcome for every image."""

    threat_model: ThreatModel
    """Adversary to measure against, as NORM:EPSILON in [0, 1] pixel units; at epsilon 0 every accuracy is clean."""
    attack: AttackConfig = field(
        default_factory=lambda: AttackConfig(steps=20, relative_step_size=0.25, random_start=True)
    )
    """PGD's effort; an image is robust only if every one of the restarts fails."""
    autoattack: bool = True
    """Also run APGD-CE, APGD-T and Square (Croce & Hein 2020), each on images still classified correctly before it."""
    apgd_steps: int = 100
    square_queries: int = 5000
    limit: int | None = None
    """Evaluate this many images, drawn from all classes by ``seed``; a larger limit includes a smaller one's images."""
    batch_size: int = 128
    """Images attacked together; part of the identity, since an attack's random numbers depend on it."""
    precision: str = "fp32"
    """fp32 or bf16 (autocast; images, perturbations and losses stay float32)."""
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "apgd_steps", "square_queries", "limit", "batch_size")
        # float16 loses small gradients: a network would look robust
        check_choice("precision for attacks", self.precision, ("fp32", "bf16"))
        self.threat_model.check_radius((3, self.image_size or 224, self.image_size or 224))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; the threat model as NORM:EPSILON."""
        return {**asdict(self), "threat_model": str(self.threat_model)}

    def skipped(self, num_classes: int) -> dict[str, str]:
        """The stages that are skipped for such a classifier, with the reason."""
        if not self.autoattack:
            return dict.fromkeys(ENSEMBLE, "not asked for")
        if num_classes < MIN_CLASSES_TARGETED:
            return {"apgd-t": f"its loss needs {MIN_CLASSES_TARGETED} classes, the classifier has {num_classes}"}
        return {}


def evaluate_robustness(
    config: RobustnessConfig,
    checkpoint: Checkpoint,
    data: str | Path,
    output: str | Path,
    *,
    device: torch.device | str = "cpu",
    workers: int = 2,
) -> RunRecord:
    """Attack the classifier on the images of ``data``, class folders or shards; writes outcomes.jsonl and record.json.

    A row of outcomes.jsonl says which stages one image survived; null stands for a skipped stage, and
    ``config["skipped"]`` of the record says why. An interrupted evaluation resumes after its last whole batch and ends
    with the same outcomes; a finished one is returned unchanged.

    Returns:
        A record of task ``robustness`` whose metrics are, 0-100: ``<stage>_accuracy`` of each of STAGES, with the ends
        of its 95 % interval as ``<stage>_accuracy_low`` and ``_high``; ``autoattack_accuracy`` is the accuracy after
        the last attack of the ensemble. Skipped stages are None.

    Raises:
        InputError: data that cannot be used or has other classes, by number or name; ``output`` holds another
            evaluation; pyautoattack is missing.
    """
    data, output, spec = Path(data), Path(output), checkpoint.spec
    compute = Compute(torch.device(device), config.precision)
    if config.autoattack:
        try:
            import pyautoattack.autopgd_base  # noqa: F401
        except ImportError:
            message = "AutoAttack needs its authors' package: pip install pyautoattack, or --no-autoattack"
            raise InputError(message) from None
    config = fed_as(config, spec)
    print("".join(f"{warning}\n" for warning in config.crop_warnings()), end="", flush=True)
    images = open_dataset(data, config.val_transform())
    images = images.sample(config.limit or len(images), seed=config.seed)
    check_classes(images.classes, data, checkpoint)
    skipped = config.skipped(spec.num_classes)
    if config.autoattack:
        for stage, reason in skipped.items():
            print(f"{stage} is skipped: {reason}")
    settings = {
        **config.to_dict(),
        "data": data.name,
        "images": len(images),
        FINGERPRINT: images.fingerprint(),
        "checkpoint_sha256": checkpoint.source_sha256,
    }
    with claimed(output, settings, fed_as(type(config)(config.threat_model), BackboneSpec()).to_dict()) as finished:
        places = [
            {"index": index, "name": name, "label": label}
            for index, name, label in zip(images.indices, images.names, images.labels, strict=True)
        ]
        path, total = output / "outcomes.jsonl", len(images)
        rows = _resume(path, places, config.batch_size)
        if finished:
            return RunRecord.read(output / "record.json")

        model = compute.place(checkpoint.in_rgb().model())
        if 0 < len(rows) < total:
            print(f"resuming at image {len(rows) + 1} of {total}")
        rest = val_batches(images.take(range(len(rows), total)), config.batch_size, workers=workers)
        with tqdm(total=total, initial=len(rows), desc="attack", unit="img", disable=None, leave=False) as bar:
            for pixels, labels in rest:
                start = time.perf_counter()
                outcomes = attack_batch(
                    model,
                    compute.to_unit_range(pixels),
                    labels.to(compute.device),
                    config,
                    compute,
                    seed=mix(config.seed, 0, len(rows) // config.batch_size),
                )
                lists = {stage: None if right is None else right.tolist() for stage, right in outcomes.items()}
                seconds = round((time.perf_counter() - start) / len(labels), 6)
                batch = [
                    {**place, **{stage: right and right[row] for stage, right in lists.items()}, "seconds": seconds}
                    for row, place in enumerate(places[len(rows) : len(rows) + len(labels)])
                ]
                with open(path, "a") as file:
                    file.write("".join(json.dumps(row) + "\n" for row in batch))
                    file.flush()
                    os.fsync(file.fileno())
                rows += batch
                bar.update(len(labels))

        record = RunRecord(
            run_id=output.name,
            task="robustness",
            **checkpoint.record_fields(),
            dataset=data.name,
            metrics=summarize(rows),
            seed=config.seed,
            config={**settings, "skipped": skipped},
            seconds=sum(row["seconds"] for row in rows),
        )
        record.write(output / "record.json")
        return record


def check_classes(names: Sequence[str], data: Path, checkpoint: Checkpoint) -> None:
    """Raise InputError where the class folders of ``data`` cannot be the classes that a classifier knows."""
    if not checkpoint.spec.num_classes:
        raise InputError(f"{checkpoint.source} has no classifier: give the checkpoint that it was made from")
    if {name.lower() for name in names} <= {"train", "val", "valid", "validation", "test"}:
        raise InputError(f"{data} holds {' and '.join(names)}, parts of a data set and no classes: give one of them")
    known, numbers = [*checkpoint.classes], [str(label) for label in range(len(names))]
    if len(names) != (total := len(known) or checkpoint.spec.num_classes):  # more outputs than classes have no names
        raise InputError(
            f"{data} holds {plural(len(names), 'class')}, but {checkpoint.source} knows {total}: give data with the "
            "classes that it was trained on"
        )
    # A classifier of other numbered folders was most likely trained on them as they sort.
    if not known and len(names) == 1000 and [*names] != numbers and {*names} == {*numbers}:
        raise InputError(
            f"{data} numbers ImageNet's classes, and sorts 10 before 2: name the folders so that they sort as the "
            f"outputs of {checkpoint.source}, such as 0002 for the third"
        )
    unnamed = numbers in (known, names) and {*known} != {*names}  # as in shards without classes.txt
    if others := [pair for pair in zip(names, known, strict=False) if pair[0] != pair[1] and not unnamed]:
        raise InputError(
            f"{data} has the class {others[0][0]} where {checkpoint.source} knows {others[0][1]} ({len(others)} of "
            f"{len(names)} differ): name its classes as those that it was trained on"
        )


def _resume(path: Path, places: Sequence[dict[str, Any]], batch_size: int) -> list[dict[str, Any]]:
    """The rows of whole batches that an earlier run wrote; anything after them, such as a partial line, is removed."""
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = []
    ends = [0]
    for place, line in zip(places, path.read_bytes().splitlines(keepends=True), strict=False):
        try:
            row = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            row = None
        if not isinstance(row, dict):
            break
        if {name: row.get(name) for name in place} != place:
            raise InputError(f"{path} is about other images than the data folder now holds: choose another --output")
        rows.append(row)
        ends.append(ends[-1] + len(line))
    whole = len(rows) if len(rows) == len(places) else len(rows) // batch_size * batch_size
    if ends[whole] < path.stat().st_size:  # a finished evaluation is only read
        os.truncate(path, ends[whole])
    return rows[:whole]


def attack_batch(
    model: nn.Module, images: Tensor, labels: Tensor, config: RobustnessConfig, compute: Compute, *, seed: int
) -> dict[str, Tensor | None]:
    """Which images of a batch are still classified correctly after each of STAGES, bool of shape (N,); None if skipped.

    An image that is misclassified when clean is not attacked. PGD stands alone; each attack of the ensemble runs on the
    images that its predecessors left correct, so the accuracies never rise. ``seed`` determines every random number;
    the global generator is not changed.

    Raises:
        RuntimeError: an attack returned an image outside the threat model or outside [0, 1].
    """
    images = images.contiguous()  # the attacks of the library fail on channels_last images
    generator = torch.Generator(images.device).manual_seed(seed)
    pgd_once = partial(pgd, model, threat_model=config.threat_model, attack=replace(config.attack, restarts=1))

    def logits(points: Tensor) -> Tensor:
        return model(points).float()

    def survivors(attack: Attack, standing: Tensor) -> Tensor:
        """The standing images that are still correct after the attack, by our own forward pass."""
        if config.threat_model.epsilon == 0 or not standing.any():
            return standing
        adversarial = attack(images[standing], labels[standing]).detach()
        check_points(adversarial, images[standing], config.threat_model)
        still_standing = standing.clone()
        still_standing[standing] = logits(adversarial).argmax(1) == labels[standing]
        return still_standing

    outcomes: dict[str, Tensor | None] = dict.fromkeys(STAGES)
    with frozen_eval(model), compute.autocast(), torch.no_grad():
        clean_logits = logits(images)
        outcomes["clean"] = right = clean_logits.argmax(1) == labels
        standing = right
        for _ in range(config.attack.restarts):
            standing = survivors(partial(pgd_once, generator=generator, check=False), standing)
        outcomes["pgd"] = standing
        num_classes = clean_logits.shape[1]
        for stage in ENSEMBLE:
            if stage not in config.skipped(num_classes):
                right = outcomes[stage] = survivors(_library_attack(stage, logits, num_classes, config, seed), right)
    return outcomes


def summarize(rows: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Rows of outcomes.jsonl -> the metrics of ``evaluate_robustness``."""
    metrics: dict[str, float | None] = {}
    for name, stage in (*((stage, stage) for stage in STAGES), ("autoattack", ENSEMBLE[-1])):
        right = [row[stage] for row in rows if row[stage] is not None]
        low, high = wilson_interval(sum(right), len(right)) if right else (None, None)
        metrics[f"{name}_accuracy"] = 100 * sum(right) / len(right) if right else None
        metrics |= {f"{name}_accuracy_low": low, f"{name}_accuracy_high": high}
    return metrics


def wilson_interval(successes: int, count: int) -> tuple[float, float]:
    """The 95 % confidence interval of a proportion, 0-100 (Wilson 1927; Newcombe 1998, method 3)."""

    def low(successes: int) -> float:
        z2 = 1.959964**2  # the square of the normal distribution's 97.5 % quantile
        share = successes / count
        half = math.sqrt(z2 * share * (1 - share) / count + (z2 / (2 * count)) ** 2)
        return 100 * (share + z2 / (2 * count) - half) / (1 + z2 / count)

    return low(successes), 100 - low(count - successes)


def _library_attack(
    stage: str, logits: Callable[[Tensor], Tensor], num_classes: int, config: RobustnessConfig, seed: int
) -> Attack:
    """One attack of the ensemble with AutoAttack's standard settings, by its authors' code."""
    # AutoAttack's own class would also trace, log and read the clock as a seed.
    from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
    from pyautoattack.square import SquareAttack

    norm, epsilon = config.threat_model.norm, config.threat_model.epsilon
    shared = {"norm": norm, "eps": epsilon, "seed": seed, "n_restarts": 1}

    def run(images: Tensor, labels: Tensor) -> Tensor:
        on_device = {**shared, "device": images.device}
        if stage == "apgd-ce":
            attack = APGDAttack(logits, n_iter=config.apgd_steps, loss="ce", **on_device)
        elif stage == "apgd-t":
            targets = min(MAX_TARGETS, num_classes - 1)  # one more would be an index out of range
            attack = APGDAttack_targeted(logits, n_iter=config.apgd_steps, n_target_classes=targets, **on_device)
        else:
            # AutoAttack keeps the schedule of 10000 queries; the class by itself would rescale it.
            attack = SquareAttack(logits, n_queries=config.square_queries, p_init=0.8, resc_schedule=False, **on_device)
        # The library seeds the global generators. Its warnings of zero gradients come once a batch and target; what
        # they would mean shows in the result, as Square, which needs no gradient, then lowers the accuracy.
        cuda = [images.device] if images.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return attack.perturb(images, labels)

    return run
