"""MODEL.FAST_STEP: with the same boxes drawn, the losses and gradients of Detectron2's step."""

import copy
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.step_counts import DETECTORS, count, detector_step
from benchmarks.step_counts import FAST as FAST_WAY
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.proposal_generator import rpn as detectron2_rpn
from detectron2.modeling.roi_heads import roi_heads as detectron2_heads
from detectron2.structures import Boxes, Instances, pairwise_iou
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from robust_backbones.detection.config import load_config
from robust_backbones.detection.data_stream import MaskMapper
from robust_backbones.detection.datasets import register_datasets
from robust_backbones.detection.fast import compiled, rcnn
from robust_backbones.detection.fast.frozen_norm import keep_scales
from robust_backbones.detection.fast.matching import iou, match, sample
from robust_backbones.detection.fast.rcnn import objects_of
from robust_backbones.detection.predictor import build_detector
from robust_backbones.detection.trainer import Trainer
from robust_backbones.errors import DivergedError, InputError
from tests.detection.conftest import CASCADE, RETINANET, SHAPES_CONFIG, SMALL
from tests.detection.test_trainer import configuration, run, same

FAST = ["MODEL.FAST_STEP", True, "INPUT.MASK_FORMAT", "bitmask"]


# --- the parts ---


def some_boxes(*shape: int, seed: int) -> Tensor:
    corners = torch.randint(0, 20, (*shape, 2, 2), generator=torch.Generator().manual_seed(seed)).float()
    return torch.cat([corners.amin(-2), corners.amax(-2) + 1], dim=-1)


@pytest.mark.parametrize(
    ("thresholds", "labels"), [([0.3, 0.7], [0, -1, 1]), ([0.5], [0, 1]), ([0.1, 0.5], [-1, 0, 1])]
)
@pytest.mark.parametrize("low_quality", [False, True])
def test_matching_is_detectron2s(thresholds: list[float], labels: list[int], low_quality: bool) -> None:
    """Corners are whole numbers, so that many overlaps are equal; images have 0 to 5 objects."""
    matcher = Matcher(thresholds, labels, allow_low_quality_matches=low_quality)
    objects, boxes = some_boxes(6, 5, seed=0), some_boxes(6, 300, seed=1)
    exists = torch.arange(5) < torch.arange(6)[:, None]
    found, found_labels = match(iou(objects, boxes), exists, matcher)
    for image in range(6):
        overlaps = pairwise_iou(Boxes(objects[image][exists[image]]), Boxes(boxes[image]))
        wanted, wanted_labels = matcher(overlaps)
        assert torch.equal(found_labels[image], wanted_labels.long())
        assert image == 0 or torch.equal(found[image], wanted)


@pytest.mark.parametrize("size", [1, 8, 50])
@pytest.mark.parametrize("positive_fraction", [0.0, 0.25, 1.0])
def test_a_sample_is_that_of_the_largest_keys(size: int, positive_fraction: float) -> None:
    labels = torch.stack([torch.arange(40) % 3 - 1, -torch.ones(40), torch.ones(40), torch.zeros(40)])
    keys = torch.rand(labels.shape, generator=torch.Generator().manual_seed(0))
    indices, counts = sample(labels == 1, labels == 0, size=size, positive_fraction=positive_fraction, keys=keys)
    for image in range(4):
        chosen = indices[image][counts[image]].tolist()
        ranked = sorted(range(40), key=lambda box, image=image: -keys[image, box])
        positive = [box for box in ranked if labels[image, box] == 1][: int(size * positive_fraction)]
        negative = [box for box in ranked if labels[image, box] == 0][: size - len(positive)]
        assert chosen == positive + negative


def test_kept_scales_are_those_of_the_buffers_whatever_happens_to_them() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), FrozenBatchNorm2d(4))
    keep_scales(net)
    kept, images = net[1], torch.rand(2, 3, 5, 5, requires_grad=True)
    theirs = FrozenBatchNorm2d(4)

    def check(module: nn.Module, dtype: torch.dtype = torch.float32) -> None:
        theirs.load_state_dict(module.state_dict())
        features = net[0](images).to(dtype)
        for _ in range(2):
            assert torch.equal(module(features), theirs(features))
        assert torch.equal(module(features.detach()), theirs(features.detach()))

    check(kept)
    kept.load_state_dict({name: torch.rand(4) + 0.5 for name in theirs.state_dict()})
    check(kept)
    check(kept, torch.bfloat16)
    kept.running_var.mul_(2)
    check(kept)
    kept.weight = torch.rand(4)
    check(kept)
    other = copy.deepcopy(kept)
    other.bias.add_(1)
    check(other)
    check(kept)


# --- the whole step, on photographs ---

TASKS: dict[str, list[object]] = {
    "box_FPN": ["MODEL.MASK_ON", False],
    "mask_FPN": ["MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 64],
    "box_FPN_agnostic": [
        *("MODEL.MASK_ON", False, "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True),
        *("MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA", 0.5, "MODEL.RPN.SMOOTH_L1_BETA", 0.2),
        *("MODEL.ROI_HEADS.PROPOSAL_APPEND_GT", False, "MODEL.PROPOSAL_GENERATOR.MIN_SIZE", 4),
        *("MODEL.ROI_HEADS.IOU_THRESHOLDS", [0.2], "MODEL.RPN.LOSS_WEIGHT", 0.5),
    ],
    "mask_FPN_syncbn": [
        *("MODEL.BACKBONE.FREEZE_AT", 0, "MODEL.RESNETS.NORM", "SyncBN", "MODEL.FPN.NORM", "SyncBN"),
        *("MODEL.ROI_MASK_HEAD.NORM", "SyncBN", "MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK", True),
        # Few proposals: images sample fewer regions than they may, and norms see those alone.
        *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 64),
    ],
}
C4: list[object] = [
    *("MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.RESNETS.OUT_FEATURES", ["res4"]),
    *("MODEL.ROI_HEADS.NAME", "BackboneRes5ROIHeads", "MODEL.ROI_HEADS.IN_FEATURES", ["res4"]),
    *("MODEL.RPN.IN_FEATURES", ["res4"], "MODEL.ANCHOR_GENERATOR.SIZES", [[32, 64, 128]]),
    *("MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 6, "MODEL.ROI_MASK_HEAD.NUM_CONV", 0, "MODEL.FPN.NORM", ""),
]
TASKS["box_C4"] = [*C4, "MODEL.MASK_ON", False]
TASKS["mask_C4_syncbn"] = [
    *(*C4, "MODEL.ROI_HEADS.RES5_NORM", "SyncBN", "MODEL.RESNETS.NORM", "SyncBN", "MODEL.BACKBONE.FREEZE_AT", 0),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 64),
]


def task_config(task: str, *more: object) -> CfgNode:
    device = ["MODEL.DEVICE", "cpu", "TEST.EXPECTED_RESULTS", [], "MODEL.FAST_ROI_ALIGN", False]
    return load_config(SHAPES_CONFIG, [*SMALL, *device, *TASKS[task], "INPUT.MASK_FORMAT", "bitmask", *more])


@pytest.fixture(scope="module")
def photographs(real_data: Path) -> dict[str, list[dict[str, Any]]]:
    """Of COCO, with crowds, and of VOC, with difficult objects: five images each, one without objects."""
    root, found = real_data / "detectron2", {}
    for name in ("coco", "voc"):
        coco = (name, root / "coco/annotations/instances_val2017.json", root / "coco/val2017")
        sets = {"coco": ["DATASETS.COCO_FORMAT", (tuple(map(str, coco)),)]}
        sets["voc"] = ["DATASETS.VOC_FORMAT", ((name, str(root / "VOC2007"), "trainval"),)]
        cfg = task_config("mask_FPN" if name == "coco" else "box_FPN", *sets[name], "DATASETS.TRAIN", (name,))
        cfg.INPUT.MIN_SIZE_TRAIN = (96, 128, 160)
        register_datasets(cfg)
        items = DatasetCatalog.get(name)
        crowds = [item for item in items if any(thing.get("iscrowd") for thing in item["annotations"])][:2]
        seed_all_rng(0)
        mapper: DatasetMapper = MaskMapper(cfg, True)
        found[name] = [mapper(item) for item in [*crowds, *items[: 5 - len(crowds)]]]
        found[name][1]["instances"] = found[name][1]["instances"][:0]
    return found


class SameKeys:
    """Detectron2's ``subsample_labels`` by the keys that the fast step has drawn: an image after the other."""

    def __init__(self, keys: list[Tensor], objects: list[int], *, appended: bool) -> None:
        anchors, regions = keys
        self._keys: list[Callable[[int], Tensor]] = [lambda count, row=row: row for row in anchors]
        if not appended:
            objects = [0] * len(objects)
        proposals = regions.shape[1] - (max(1, *objects) if appended else 0)
        for row, own in zip(regions, objects, strict=True):
            # Proposals fill the first columns, objects those from ``proposals`` on.
            self._keys.append(lambda count, row=row, own=own: torch.cat([row[: count - own], row[proposals:][:own]]))
        self._next: Iterator[Callable[[int], Tensor]] = iter(self._keys)

    def __call__(
        self, labels: Tensor, num_samples: int, positive_fraction: float, bg_label: int
    ) -> tuple[Tensor, Tensor]:
        keys = next(self._next)(len(labels))
        ranked = keys.argsort(descending=True)
        ranked = ranked[labels[ranked] != -1]
        is_background = labels[ranked] == bg_label
        positive = ranked[~is_background][: int(num_samples * positive_fraction)]
        return positive, ranked[is_background][: num_samples - len(positive)]


def losses_and_gradients(model: nn.Module, samples: list[dict[str, Any]]) -> tuple[dict[str, float], dict[str, Tensor]]:
    with EventStorage():
        losses = model(samples)
    sum(losses.values()).backward()
    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    return {name: loss.item() for name, loss in losses.items()}, gradients


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("coco", "box_FPN"),
        *(pytest.param("coco", task, marks=pytest.mark.slow) for task in TASKS if task != "box_FPN"),
        *(pytest.param("voc", task, marks=pytest.mark.slow) for task in ("box_FPN", "box_C4")),
    ],
)
def test_losses_and_gradients_are_detectron2s(
    photographs: dict[str, list[dict[str, Any]]], name: str, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = photographs[name]
    cfg = task_config(task, "MODEL.ROI_HEADS.NUM_CLASSES", 80, "MODEL.FAST_STEP", True)
    torch.manual_seed(0)
    fast = build_detector(cfg).train()
    with torch.no_grad():  # a new RPN's proposals are its anchors
        for parameter in fast.proposal_generator.rpn_head.parameters():
            parameter.mul_(5)
        for parameter in fast.roi_heads.box_predictor.parameters():
            parameter.mul_(5)
    theirs = build_model(task_config(task, "MODEL.ROI_HEADS.NUM_CLASSES", 80)).train()
    theirs.load_state_dict(fast.state_dict())

    keys: list[Tensor] = []
    rand = torch.rand
    with monkeypatch.context() as patch:
        patch.setattr(torch, "rand", lambda *shape, **options: (keys.append(rand(*shape, **options)), keys[-1])[1])
        found, gradients = losses_and_gradients(fast, samples)
    objects = [len(item["instances"]) for item in samples]
    sampler = SameKeys(keys, objects, appended=cfg.MODEL.ROI_HEADS.PROPOSAL_APPEND_GT)
    monkeypatch.setattr(detectron2_rpn, "subsample_labels", sampler)
    monkeypatch.setattr(detectron2_heads, "subsample_labels", sampler)
    wanted, their_gradients = losses_and_gradients(theirs, samples)

    assert found == pytest.approx(wanted, rel=1e-5)
    assert min(found.values()) > 0
    assert gradients.keys() == their_gradients.keys()
    for part in gradients:
        far = (gradients[part] - their_gradients[part]).norm() / their_gradients[part].norm()
        assert far < 1e-5, part


def test_objects_may_lie_on_the_device_as_attacks_have_them() -> None:
    """A device without memory stands for a GPU."""
    boxes, classes = torch.zeros(2, 4, device="meta"), torch.zeros(2, dtype=torch.int64, device="meta")
    found = objects_of([Instances((9, 9), gt_boxes=Boxes(boxes), gt_classes=classes)])
    assert [(tuple(each.shape), each.device.type) for each in found] == [((1, 2, 4), "meta"), ((1, 2), "meta")]


# --- MODEL.COMPILE ---

COMPILED = [*FAST, "MODEL.COMPILE", True]


@pytest.mark.parametrize(
    ("sizes", "most"),
    [
        # As of COCO, of VOC with the sides of COCO, with one shorter side that divides, where the longer one is not
        # limited, and where it is by little.
        (["INPUT.MIN_SIZE_TRAIN", (640, 672, 704, 736, 768, 800)], 7),
        (["INPUT.MIN_SIZE_TRAIN", (480, 640, 800), "INPUT.MAX_SIZE_TRAIN", 1333], 7),
        (["INPUT.MIN_SIZE_TRAIN", (192,), "INPUT.MAX_SIZE_TRAIN", 384], 9),
        (["INPUT.MIN_SIZE_TRAIN", (64, 96), "INPUT.MAX_SIZE_TRAIN", 1333], 9),
        (["INPUT.MIN_SIZE_TRAIN", (800,), "INPUT.MAX_SIZE_TRAIN", 600], 1),
        (["INPUT.SCALE_JITTER", (0.1, 2.0, 1000)], 1),
    ],
)
def test_batches_have_few_shapes_that_hold_their_images(sizes: list[object], most: int) -> None:
    """Of landscapes, or of portraits, as Detectron2 groups them, of sides of 100 to 1000 pixels."""
    cfg = load_config(SHAPES_CONFIG, [*SMALL, *COMPILED, *sizes, "MODEL.DEVICE", "meta"])
    model, rng = Trainer.build_model(cfg), random.Random(0)
    shapes = set()
    for batch in range(200):
        images = []
        for _ in range(3):
            height, width = sorted(rng.randint(100, 1000) for _ in range(2))[:: 1 if batch % 2 else -1]
            short = rng.choice(cfg.INPUT.MIN_SIZE_TRAIN)
            size = ResizeShortestEdge.get_output_shape(height, width, short, cfg.INPUT.MAX_SIZE_TRAIN)
            images.append(torch.empty(3, *((1000, 1000) if cfg.INPUT.SCALE_JITTER else size), device="meta"))
        padded = model._images(images)[0].shape[2:]
        for side, axis in zip(padded, (1, 2), strict=True):
            assert side >= max(image.shape[axis] for image in images)
            assert side % 32 == 0
        shapes.add(padded)
    assert len(shapes) <= most


# Of a weight that five levels share, gradients are added up in bfloat16 without a graph.
@pytest.mark.parametrize(("bfloat16", "tolerance"), [(False, 1e-5), (True, 1e-2)])
def test_compiled_maps_give_the_same_losses_and_gradients(
    bfloat16: bool, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same padded images; also those of a copy with other weights, as weight averages are.

    By graphs as PyTorch captures them. Inductor's code for them is PyTorch's, and takes a minute to compile.
    """
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    sizes = ["INPUT.MAX_SIZE_TRAIN", 96, "MODEL.MASK_ON", False, "MODEL.DEVICE", "cpu"]
    cfg = load_config(SHAPES_CONFIG, [*SMALL, *COMPILED, *sizes])
    torch.manual_seed(0)
    model = Trainer.build_model(cfg).train()
    usual = {name: value.clone() for name, value in build_detector(cfg).state_dict().items()}
    samples = []
    for size in ((64, 80), (70, 60)):
        objects = Instances(size, gt_boxes=Boxes(some_boxes(2, seed=size[0]) * 2.5), gt_classes=torch.tensor([0, 2]))
        samples.append({"image": torch.randint(256, (3, *size), dtype=torch.uint8), "instances": objects})

    def step(one: nn.Module, through: Any) -> tuple[dict[str, float], dict[str, Tensor]]:
        monkeypatch.setattr(rcnn, "compiled_dense", through)
        torch.manual_seed(1)
        one.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            losses, gradients = losses_and_gradients(one, samples)
        return losses, {name: gradient.clone() for name, gradient in gradients.items()}

    other = copy.deepcopy(model)
    for one in (model, other):
        found, gradients = step(one, compiled.compiled_dense)
        wanted, plain = step(one, compiled.dense)
        assert found == pytest.approx(wanted, rel=1e-5)
        assert gradients.keys() == plain.keys()
        for name, gradient in plain.items():
            assert (gradients[name] - gradient).norm() <= tolerance * gradient.norm(), name
        assert one.state_dict().keys() == usual.keys()
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(1.1)


def test_more_shapes_than_pytorchs_limit_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    class Maps(nn.Module):
        in_features = ("p2",)

        def forward(self, images: Tensor) -> dict[str, Tensor]:
            return {"p2": images.sin()}

        def rpn_head(self, maps: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
            return maps, maps

    graphs = CompileCounter()
    monkeypatch.setattr(compiled, "BACKEND", graphs)
    torch._dynamo.reset()
    limit, maps = torch._dynamo.config.recompile_limit, Maps()
    for _ in range(2):
        for width in range(1, limit + 3):
            compiled.compiled_dense(maps, maps, torch.zeros(1, 3, 1, width))
    assert graphs.frame_count == limit + 2
    assert torch._dynamo.config.recompile_limit == limit


# --- what the host waits for ---


@pytest.mark.slow
@pytest.mark.parametrize("detector", DETECTORS)
def test_waits_and_calls_hardly_grow_with_the_batch(detector: str) -> None:
    """Losses are read in the step that is counted, which is one of twenty."""
    small, large = (count(detector_step(detector, FAST_WAY, batch=batch, size=32, device="cpu")) for batch in (2, 16))
    assert small.waits == large.waits <= 8
    assert large.calls <= 1.1 * small.calls
    assert large.calls <= 4000


# --- training ---


@pytest.fixture
def cfg(shapes: Path, converted: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CfgNode:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(shapes))
    cfg = configuration(converted("resnet18"), tmp_path / "run")
    cfg.merge_from_list(FAST)
    return cfg


def read_losses(trainer: Trainer) -> dict[int, float]:
    """The losses that have been read, by their iterations."""
    return {iteration: loss for loss, iteration in trainer.storage.history("total_loss").values()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ["MODEL.MASK_ON", False],
        ["SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "bfloat16"],
        ["ADVERSARIAL.KIND", "pgd", "ADVERSARIAL.STEPS", 1],
        ["ADVERSARIAL.KIND", "free", "ADVERSARIAL.REPLAYS", 2],
        ["MODEL.COMPILE", True, "ADVERSARIAL.KIND", "pgd", "ADVERSARIAL.STEPS", 1, "SOLVER.EMA_DECAY", 0.5],
    ],
    ids=["box", "mask_bfloat16", "pgd", "free", "compiled_pgd"],
)
def test_a_killed_run_resumes_as_the_unbroken_one(
    cfg: CfgNode, overrides: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    cfg.merge_from_list(overrides)
    unbroken, _ = run(cfg)
    losses = read_losses(unbroken)
    assert sorted(losses) == [0, 1, 2, 3, 4]
    cfg.OUTPUT_DIR += "_killed"
    run(cfg, last=2)
    resumed, _ = run(cfg, resume=True)
    assert read_losses(resumed) == {iteration: losses[iteration] for iteration in (2, 3, 4)}
    assert same(resumed.model.state_dict(), unbroken.model.state_dict())
    assert unbroken.evaluation.results == resumed.evaluation.results


def test_a_loss_that_is_not_finite_ends_the_run_before_weights_are_written(cfg: CfgNode) -> None:
    cfg.merge_from_list(["MODEL.MASK_ON", False, "SOLVER.BASE_LR", 1e8, "SOLVER.WARMUP_ITERS", 0])
    cfg.merge_from_list(["SOLVER.CLIP_GRADIENTS.ENABLED", False])
    with pytest.raises(DivergedError, match=r"at iteration=[1-4]"):
        run(cfg)
    for path in Path(cfg.OUTPUT_DIR).glob("model_*.pth"):
        weights = torch.load(path, weights_only=True)["model"]
        assert all(value.isfinite().all() for value in weights.values()), path


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (RETINANET, "MODEL.META_ARCHITECTURE 'RetinaNet'"),
        (CASCADE, "MODEL.ROI_HEADS.NAME 'CascadeROIHeads'"),
        (["MODEL.RPN.BBOX_REG_LOSS_TYPE", "giou"], "MODEL.RPN.BBOX_REG_LOSS_TYPE 'giou'"),
        (["INPUT.MASK_FORMAT", "polygon"], "INPUT.MASK_FORMAT 'polygon': give INPUT.MASK_FORMAT 'bitmask'"),
        (["VIS_PERIOD", 10], "VIS_PERIOD 10"),
    ],
)
def test_what_it_does_not_know_is_refused_by_name(overrides: list[object], key: str) -> None:
    with pytest.raises(InputError, match=r"MODEL\.FAST_STEP does not know") as refused:
        load_config(SHAPES_CONFIG, [*SMALL, *FAST, *overrides])
    assert key in str(refused.value)
    load_config(SHAPES_CONFIG, [*SMALL, *FAST, *overrides, "MODEL.FAST_STEP", False])
