"""What a training step asks of the host, whatever the machine: how often it waits for the device, how many aten calls.

A GPU idles while the host waits for it and then launches one call after the other. Both are counted on any machine.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from benchmarks.detectors import CONFIG, random_detector
from benchmarks.training_step import plain_step
from robust_backbones.attacks import AttackConfig
from robust_backbones.classification.compute import Compute
from robust_backbones.classification.engine import Learner
from robust_backbones.classification.objectives import ObjectiveConfig
from robust_backbones.errors import check_choice
from robust_backbones.models import BackboneSpec, NormalizedModel, build_backbone
from robust_backbones.threat_models import ThreatModel

DETECTORS = {
    "faster-rcnn-fpn": "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml",
    "faster-rcnn-c4": "COCO-Detection/faster_rcnn_R_50_C4_1x.yaml",
    "mask-rcnn-fpn": "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
    "mask-rcnn-c4": "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x.yaml",
}
DETECTRON2, OURS, FAST, PLAIN = "Detectron2", "ours", "ours, MODEL.FAST_STEP True", "plain PyTorch"
READS_LOSSES_AT = 19
"""The iteration that is counted: the one of 20 at which losses are read, if they are not read at each."""
# How many boxes there are, and of how many pixels, changes no count. Random weights must not move far.
_OPTIONS: tuple[object, ...] = (
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 4, "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 4),
    *("INPUT.MASK_FORMAT", "bitmask", "SOLVER.BASE_LR", 1e-9),
)
# Operators whose result, or its shape, the host needs before it can continue.
_WAITING = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::equal",
    "aten::_unique2",
    "aten::unique_dim",
    "torchvision::nms",
}
_READING = {Tensor.tolist, Tensor.numpy, Tensor.cpu}


@dataclass(frozen=True, kw_only=True)
class StepCounts:
    """Host waits and aten calls of training steps; the last line is JSON."""

    steps: tuple[str, ...] = ("pgd-3", *DETECTORS)
    """Of which kinds."""
    batches: tuple[int, ...] = (2, 8, 16)
    size: int = 64
    """Pixels of the images' sides; no count depends on it."""
    device: Literal["cpu", "cuda"] = "cpu"

    def count(self) -> list[dict[str, Any]]:
        """Rows of ``step``, ``way``, ``batch``, ``waits`` and ``calls``, of the second step of each kind."""
        ways = []
        for step in self.steps:
            check_choice("step", step, ("pgd-3", *DETECTORS))
            ways += [(step, way) for way in ((PLAIN, OURS) if step == "pgd-3" else (DETECTRON2, OURS, FAST))]
        rows = []
        for (name, way), batch in tqdm([*itertools.product(ways, self.batches)], unit="step", leave=False):
            make = pgd_step if name == "pgd-3" else detector_step
            counts = count(make(name, way, batch=batch, size=self.size, device=self.device))
            rows.append({"step": name, "way": way, "batch": batch, **asdict(counts)})
        return rows


@dataclass
class Counts:
    waits: int = 0
    calls: int = 0


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| step | way | batch | host waits | aten calls |", "| --- | --- | ---: | ---: | ---: |"]
    return "\n".join([*lines, *("| " + " | ".join(f"{value}" for value in row.values()) + " |" for row in rows)])


def last_line(rows: list[dict[str, Any]]) -> str:
    return json.dumps({"step_counts": rows})


def count(step: Callable[[], object]) -> Counts:
    """What the second call of ``step`` takes: the first makes what is kept, such as momentum."""
    step()
    with counting() as counts:
        step()
    return counts


@contextmanager
def counting() -> Iterator[Counts]:
    """Count what runs inside, backward passes included.

    A wait is an operator whose result the host needs (``item``, ``nonzero``, indexing with booleans, ``unique``,
    torchvision's NMS) or a tensor that Python reads. Copies to a device are none: on a CPU there are none to count.
    """
    counts = Counts()
    with _Reads(counts), _Calls(counts):
        yield counts


class _Calls(TorchDispatchMode):
    """Counts every operator below autograd."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self._counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        by_booleans = name.startswith("aten::index") and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
            for indices in args[1:2]
            if isinstance(indices, list | tuple)
            for index in indices
        )
        self._counts.calls += 1
        self._counts.waits += by_booleans or name in _WAITING or _is_sized_by_values(name, kwargs or {})
        return func(*args, **(kwargs or {}))


def _is_sized_by_values(name: str, kwargs: dict[str, Any]) -> bool:
    return name == "aten::repeat_interleave" and kwargs.get("output_size") is None


class _Reads(TorchFunctionMode):
    """Counts what Python reads of tensors, which is no operator."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self._counts = counts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._counts.waits += func in _READING
        return func(*args, **(kwargs or {}))


def pgd_step(name: str, way: str, *, batch: int, size: int, device: str) -> Callable[[], object]:
    """A step of PGD-3 training of a ResNet-50 with random weights."""
    spec = BackboneSpec("resnet50", 10)
    model = NormalizedModel(build_backbone(spec), spec).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9, weight_decay=1e-4)
    pixels = torch.randint(256, (batch, 3, size, size), dtype=torch.uint8, device=device)
    labels = torch.arange(batch, device=device) % 10
    if way == PLAIN:
        return lambda: plain_step(model, optimizer, pixels / 255, labels, 1.0)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    objective = ObjectiveConfig().build(AttackConfig())
    learner = Learner(model, optimizer, scheduler, objective, ThreatModel("L2", 1.0), Compute(torch.device(device)))
    return lambda: learner.step([(pixels, labels)])


def detector_step(name: str, way: str, *, batch: int, size: int, device: str) -> Callable[[], object]:
    """A step of the trainer's, its metrics and its update included, with random weights."""
    import robust_backbones.detection  # noqa: F401  # first: it says so when Detectron2 is missing

    # isort: split
    from detectron2.solver import build_optimizer
    from detectron2.utils.events import EventStorage

    from robust_backbones.detection.trainer import Trainer, build_steps

    # On a GPU ROIAlign is torchvision's; on a CPU the other one would be counted.
    cfg, model, samples = random_detector(
        (size, size),
        images=batch,
        device=device,
        config=CONFIG.parents[1] / DETECTORS[name],
        fast_roi_align=None if way == DETECTRON2 else False,
        overrides=[*_OPTIONS, "MODEL.FAST_STEP", way == FAST],
    )
    optimizer = (build_optimizer if way == DETECTRON2 else Trainer.build_optimizer)(cfg, model)
    trainer = build_steps(cfg, model, itertools.repeat(samples), optimizer)
    trainer.iter = READS_LOSSES_AT

    def step() -> None:
        with EventStorage(trainer.iter):
            trainer.run_step()

    return step
