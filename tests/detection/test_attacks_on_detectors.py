"""Attacks on detectors: the losses are Detectron2's, the points are in the ball, and nothing else moves."""

import copy
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import detectron2.data.transforms as T
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data.datasets import load_coco_json
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import GeneralizedRCNN, build_model
from detectron2.structures import BitMasks, Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from robust_backbones.detection.attacks import (
    DetectorAttack,
    attack_image,
    frozen_losses,
    loss_function,
    sanity_check,
    sanity_warnings,
)
from robust_backbones.detection.checkpoint import BackboneCheckpointer
from robust_backbones.detection.config import CONFIG_DIR, load_config
from robust_backbones.errors import InputError
from robust_backbones.threat_models import NORMS, ThreatModel
from tests.benchmarks.test_benchmarks import WorkerHere
from tests.detection.conftest import CASCADE, RETINANET, SHAPES_CONFIG, SMALL

C4_CONFIG = CONFIG_DIR / "quick/mask_rcnn_R_50_C4_shapes_instant.yaml"
LINF = ThreatModel("Linf", 4 / 255)
PARTS = {
    "classification": ["loss_cls"],
    "localization": ["loss_box_reg", "loss_rpn_loc"],
    "objectness": ["loss_rpn_cls"],
    "mask": ["loss_mask"],
    "total": ["loss_cls", "loss_box_reg", "loss_mask", "loss_rpn_cls", "loss_rpn_loc"],
}
Sample = dict[str, Any]


def config(*overrides: object, c4: bool = False, protocol: str = "") -> CfgNode:
    files = [C4_CONFIG if c4 else SHAPES_CONFIG]
    files += [CONFIG_DIR / f"protocols/{protocol}.yaml"] if protocol else []
    own = ["MODEL.ROI_HEADS.NAME", "BackboneRes5ROIHeads"] if c4 else []
    return load_config(files, [*SMALL, "MODEL.DEVICE", "cpu", *own, *overrides])


def read(cfg: CfgNode, shapes: Path, part: str) -> list[Sample]:
    """Detectron2's input dicts, resized to 64 pixels, with ground truth of that size."""
    mapper = DatasetMapper(cfg, True, augmentations=[T.ResizeShortestEdge(64)])
    rows = load_coco_json(str(shapes / f"shapes/annotations/instances_{part}.json"), str(shapes / "shapes" / part))
    for row in rows:
        for annotation in row["annotations"]:
            annotation["category_id"] -= 1  # the file counts from 1
    return [mapper(row) for row in rows]


@pytest.fixture(scope="session")
def samples(shapes: Path) -> list[Sample]:
    """Three held-out images with objects, 64 px; some pixels of each are 0 and 255."""
    chosen = [sample for sample in read(config(), shapes, "val") if len(sample["instances"]) > 1][:3]
    for sample in chosen:
        sample["image"][:, :2, :2], sample["image"][:, :2, 2:4] = 0, 255
    return chosen


@pytest.fixture(scope="session")
def trained_detector(shapes: Path, converted: Callable[[str], Path]) -> GeneralizedRCNN:
    """A Mask R-CNN with frozen norms that has learnt for 40 iterations; in eval mode."""
    cfg = config()
    data = read(cfg, shapes, "train")
    torch.manual_seed(0)
    model = build_model(cfg)
    BackboneCheckpointer(model, cfg=cfg).load(str(converted("resnet18")))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01, momentum=0.9)
    with EventStorage():
        for iteration in range(40):
            loss = sum(model([data[(2 * iteration + k) % len(data)] for k in (0, 1)]).values())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
    return model.eval()


@pytest.fixture
def detector(trained_detector: GeneralizedRCNN) -> Iterator[GeneralizedRCNN]:
    """The trained one; the test fails that changes it."""
    before = state_of(trained_detector)
    yield trained_detector
    assert state_of(trained_detector) == before


def state_of(model: nn.Module) -> list[object]:
    """Every tensor, gradient, mode and flag, and the global generators, as values that compare."""
    tensors = [tensor.numpy().tobytes() for tensor in model.state_dict().values()]
    generators = [torch.get_rng_state().numpy().tobytes(), random.getstate(), str(np.random.get_state())]
    gradients = [p.grad is not None and p.grad.numpy().tobytes() for p in model.parameters()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    return [tensors, [module.training for module in model.modules()], flags, gradients, generators]


def untrained(cfg: CfgNode, seed: int = 0) -> GeneralizedRCNN:
    """As built, with norms that have seen a network's statistics."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build_model(cfg)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d | FrozenBatchNorm2d):
                module.running_mean.uniform_(-0.2, 0.2)
                module.running_var.uniform_(0.5, 1.5)
    return model


def unit(sample: Sample) -> Tensor:
    """The image in [0, 1], shape (1, 3, H, W)."""
    return sample["image"].float()[None] / 255


def background(sample: Sample) -> Sample:
    """The image as if it had no objects."""
    size = sample["instances"].image_size
    empty = Instances(size, gt_boxes=Boxes(torch.zeros(0, 4)), gt_classes=torch.zeros(0, dtype=torch.long))
    empty.gt_masks = BitMasks(torch.zeros(0, *size))
    return {**sample, "instances": empty}


def loss_of(model: GeneralizedRCNN, sample: Sample, loss: str, seed: int = 0) -> float:
    """A loss by Detectron2 alone: its model in training mode and the global generator; norms must be frozen."""
    twin = copy.deepcopy(model).train()
    with torch.random.fork_rng(), EventStorage():
        torch.manual_seed(seed)
        values = twin([{**sample, "image": sample["image"].float().requires_grad_()}])
    return sum(values[name] for name in values if name in PARTS[loss]).item()


# --- the losses ---


@pytest.mark.parametrize(
    ("c4", "overrides"), [(False, []), (False, ["MODEL.MASK_ON", False]), (True, []), (True, ["MODEL.MASK_ON", False])]
)
def test_losses_are_those_of_training(samples: list[Sample], c4: bool, overrides: list[object]) -> None:
    """With frozen norms, to the last bit, from Detectron2's model in training mode and the same random numbers."""
    cfg = config(*overrides, c4=c4)
    model, sample = untrained(cfg), samples[0]
    twin = copy.deepcopy(model).train()
    with EventStorage():
        torch.manual_seed(3)
        theirs = twin([{**sample, "image": sample["image"].float().requires_grad_()}])  # as FrozenBN rounds then
    assert set(theirs) == {name for name in PARTS["total"] if cfg.MODEL.MASK_ON or name != "loss_mask"}
    with frozen_losses(model):
        for loss in PARTS if cfg.MODEL.MASK_ON else set(PARTS) - {"mask"}:
            function = loss_function(model, sample, DetectorAttack(threat_model=LINF, loss=loss), seed=3)
            ours = function(unit(sample).requires_grad_())
            assert ours.shape == (1,)
            assert ours.item() == sum(theirs[name] for name in theirs if name in PARTS[loss]).item(), loss
            other = loss_function(model, sample, DetectorAttack(threat_model=LINF, loss=loss), seed=4)
            if loss in ("objectness", "total"):  # the seed decides which anchors are sampled
                assert other(unit(sample)) != function(unit(sample))


def test_the_loss_depends_on_the_image_alone(detector: GeneralizedRCNN, samples: list[Sample]) -> None:
    with frozen_losses(detector):
        losses = loss_function(detector, samples[0], DetectorAttack(threat_model=LINF))
        first = losses(unit(samples[0]))
        state = torch.get_rng_state()
        torch.rand(7)
        assert torch.equal(losses(unit(samples[0])), first)
        torch.set_rng_state(state)


@pytest.mark.parametrize("loss", ["classification", "localization", "objectness", "mask"])
def test_gradients_are_finite_differences(
    trained_detector: GeneralizedRCNN, samples: list[Sample], loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, at the pixels where the gradient is largest.

    The regions are the ground truth's: Detectron2 passes no gradient through the coordinates of proposals. Its targets
    in float32 would round two of the losses.
    """
    entropy = F.binary_cross_entropy_with_logits
    in_float64 = lambda logits, targets, **options: entropy(logits, targets.double(), **options)  # noqa: E731
    monkeypatch.setattr(F, "binary_cross_entropy_with_logits", in_float64)
    model = copy.deepcopy(trained_detector).double()
    none = Instances(samples[0]["instances"].image_size, proposal_boxes=Boxes(torch.zeros(0, 4)))
    none.objectness_logits = torch.zeros(0)
    model.proposal_generator.predict_proposals = lambda *_: [none]
    point = unit(samples[0]).double().requires_grad_()
    with frozen_losses(model):
        losses = loss_function(model, samples[0], DetectorAttack(threat_model=LINF, loss=loss))
        (gradient,) = torch.autograd.grad(losses(point).sum(), point)
        for index in gradient.flatten().abs().topk(4).indices:
            step = torch.zeros_like(point).flatten()
            step[index] = 1e-6
            difference = (losses(point + step.view_as(point)) - losses(point - step.view_as(point))).item() / 2e-6
            assert gradient.flatten()[index].item() == pytest.approx(difference, rel=1e-4), loss


# --- the points ---


@settings(max_examples=8, deadline=None)
@given(norm=st.sampled_from(NORMS), epsilon=st.floats(0, 1), schedule=st.sampled_from(["fixed", "apgd"]))
def test_points_are_in_the_ball_and_in_the_image(
    trained_detector: GeneralizedRCNN, samples: list[Sample], norm: str, epsilon: float, schedule: str
) -> None:
    """By the definition, in float64; the tolerance is float32's rounding of 255 x + δ."""
    threat_model = ThreatModel(norm, epsilon if norm == "Linf" else 20 * epsilon)
    attack = DetectorAttack(threat_model=threat_model, steps=2, random_start=True, schedule=schedule)
    attacked = attack_image(trained_detector, samples[0], attack).sample["image"]
    assert attacked.dtype == torch.float32
    assert attacked.min() >= 0
    assert attacked.max() <= 255
    assert not attacked.requires_grad
    delta = (attacked.double() - samples[0]["image"].double()) / 255
    size = delta.abs().max() if norm == "Linf" else delta.norm()
    rounding = 2**-23 * (1 if norm == "Linf" else delta.numel() ** 0.5)
    assert size <= threat_model.epsilon * (1 + 1e-5) + rounding


def test_epsilon_zero_changes_no_bit(detector: GeneralizedRCNN, samples: list[Sample]) -> None:
    noise = torch.rand(samples[0]["image"].shape, generator=torch.Generator().manual_seed(0))
    for image in (samples[0]["image"], (samples[0]["image"] + noise).clamp(0, 255)):
        attack = DetectorAttack(threat_model=ThreatModel("L2", 0), steps=3, random_start=True)
        attacked = attack_image(detector, {**samples[0], "image": image}, attack)
        assert torch.equal(attacked.sample["image"], image.float())
        seen = {**samples[0], "image": 255 * (image / 255)}  # which rounds values between two levels
        assert attacked.loss == attacked.clean_loss == loss_of(detector, seen, "total")


def test_every_level_survives_the_unit_range() -> None:
    """uint8 -> [0, 1] -> 0-255 in float32: a point that no attack moved is the original."""
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(255 * (levels.float() / 255), levels.float())


def test_the_rest_of_the_dict_is_passed_on(detector: GeneralizedRCNN, samples: list[Sample]) -> None:
    sample = {**samples[0], "image_id": 17}
    before = sample["image"].clone()
    classes = sample["instances"].gt_classes.clone()
    attack = DetectorAttack(threat_model=LINF, loss="classification", steps=1, target=0)
    attacked = attack_image(detector, sample, attack).sample
    assert attacked.keys() == sample.keys()
    assert all(attacked[name] is sample[name] for name in sample if name != "image")
    assert torch.equal(sample["image"], before)
    assert torch.equal(sample["instances"].gt_classes, classes)


# --- the attack ---


@pytest.mark.parametrize("overrides", [{}, {"random_start": True, "restarts": 2}])
def test_more_steps_never_lower_the_loss(
    detector: GeneralizedRCNN, samples: list[Sample], overrides: dict[str, Any]
) -> None:
    """Exactly, with steps so long that the last point is seldom the best."""
    last = -float("inf")
    for steps in range(1, 6 if not overrides else 4):
        attack = DetectorAttack(threat_model=LINF, steps=steps, relative_step_size=2, **overrides)
        attacked = attack_image(detector, samples[1], attack)
        assert attacked.loss >= max(last, attacked.clean_loss)
        last = attacked.loss
    assert last > attacked.clean_loss


@pytest.mark.parametrize("loss", PARTS)
@pytest.mark.parametrize("schedule", ["fixed", "apgd"])
def test_an_attack_raises_its_loss(detector: GeneralizedRCNN, samples: list[Sample], loss: str, schedule: str) -> None:
    """By Detectron2's own measure of the image that it returns."""
    attack = DetectorAttack(threat_model=LINF, loss=loss, steps=4, schedule=schedule)
    attacked = attack_image(detector, samples[0], attack, seed=5)
    assert attacked.loss > attacked.clean_loss
    assert attacked.clean_loss == loss_of(detector, samples[0], loss, seed=5)
    assert attacked.loss == pytest.approx(loss_of(detector, attacked.sample, loss, seed=5), rel=1e-5)


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        (RETINANET, {"classification": ["loss_cls"], "localization": ["loss_box_reg"]}),
        (
            CASCADE,
            {
                "classification": [f"loss_cls_stage{stage}" for stage in range(3)],
                "localization": [*(f"loss_box_reg_stage{stage}" for stage in range(3)), "loss_rpn_loc"],
                "mask": ["loss_mask"],
            },
        ),
    ],
    ids=["retinanet", "cascade"],
)
def test_other_detectors_are_attacked_through_their_own_losses(
    samples: list[Sample], overrides: list[object], names: dict[str, list[str]]
) -> None:
    """By Detectron2's values in training mode; a RetinaNet's running number of anchors stays what it was."""
    model = untrained(config(*overrides)).eval()
    if overrides is RETINANET:
        model.loss_normalizer = 7.5
    for loss, parts in names.items():
        attack = DetectorAttack(threat_model=LINF, loss=loss, steps=3)
        with frozen_losses(model):
            losses = loss_function(model, samples[0], attack)
            values = [float(losses(unit(samples[0]))) for _ in range(2)]
        assert values[0] == values[1] > 0
        model.train()
        torch.manual_seed(0)
        with EventStorage(1), torch.no_grad():
            theirs = model([samples[0]])
        assert values[0] == pytest.approx(sum(float(theirs[name]) for name in parts), rel=1e-5)
        if overrides is RETINANET:
            model.loss_normalizer = 7.5
        model.eval()
        attacked = attack_image(model, samples[0], attack)
        assert attacked.loss > attacked.clean_loss
        assert attacked.clean_loss == pytest.approx(values[0], rel=1e-5)
    assert getattr(model, "loss_normalizer", 7.5) == 7.5
    if overrides is RETINANET:
        for loss in ("mask", "objectness"):
            with pytest.raises(InputError, match=loss):
                attack_image(model, samples[0], DetectorAttack(threat_model=LINF, loss=loss))


@pytest.mark.parametrize("target", [2, "derangement"])
def test_a_targeted_attack_lowers_the_targets_loss(
    detector: GeneralizedRCNN, samples: list[Sample], target: int | str
) -> None:
    """By Detectron2's own measure of an image whose objects are of the target classes."""
    threat_model = ThreatModel("Linf", 16 / 255)
    attack = DetectorAttack(threat_model=threat_model, loss="classification", target=target, target_seed=1)
    targets = attack.target_classes(4)
    for sample in samples[:2]:
        attacked = attack_image(detector, sample, attack, seed=5)
        assert attacked.loss > attacked.clean_loss
        aimed = copy.deepcopy(sample["instances"])
        aimed.gt_classes = targets[aimed.gt_classes]
        for image, loss in ((sample["image"], attacked.clean_loss), (attacked.sample["image"], attacked.loss)):
            expected = loss_of(detector, {**sample, "image": image, "instances": aimed}, "classification", seed=5)
            assert loss == pytest.approx(-expected, rel=1e-5)


@given(st.integers(2, 90), st.integers(0, 2**32))
def test_a_derangement_is_a_permutation_without_fixed_points(classes: int, seed: int) -> None:
    attack = DetectorAttack(threat_model=LINF, loss="classification", target="derangement", target_seed=seed)
    targets = attack.target_classes(classes)
    assert sorted(targets.tolist()) == list(range(classes))
    assert (targets != torch.arange(classes)).all()
    assert torch.equal(targets, attack.target_classes(classes))


@pytest.mark.parametrize("loss", PARTS)
def test_an_image_without_objects(detector: GeneralizedRCNN, samples: list[Sample], loss: str) -> None:
    """Its background is attacked, where a loss tells of the background."""
    empty = background(samples[0])
    attacked = attack_image(detector, empty, DetectorAttack(threat_model=LINF, loss=loss, steps=5))
    if loss in ("localization", "mask"):
        assert attacked.clean_loss == attacked.loss == 0
        assert torch.equal(attacked.sample["image"], empty["image"].float())
        c4 = untrained(config(c4=True))
        assert attack_image(c4, empty, DetectorAttack(threat_model=LINF, loss=loss, steps=1)).loss == 0
    else:
        assert attacked.loss > attacked.clean_loss
    if loss == "classification":
        attack = DetectorAttack(threat_model=LINF, loss=loss, steps=2, target="derangement")
        assert torch.equal(attack_image(detector, empty, attack).sample["image"], empty["image"].float())


# --- the model ---


@pytest.mark.parametrize(
    ("c4", "protocol", "overrides"),
    [
        (False, "", []),
        (False, "syncbn", []),
        (True, "syncbn_C4", []),
        (True, "", ["MODEL.RESNETS.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", 0, "MODEL.MASK_ON", False]),
    ],
    ids=["FPN", "FPN-SyncBN", "C4-SyncBN", "C4-BN"],
)
def test_the_model_comes_back_as_it_was(
    samples: list[Sample], c4: bool, protocol: str, overrides: list[object]
) -> None:
    """In training mode too, with a mix of flags, and after an exception; the generators likewise."""
    model = untrained(config(*overrides, c4=c4, protocol=protocol)).train()
    model.backbone.eval()
    next(model.roi_heads.parameters()).requires_grad_(False)
    before = state_of(model)
    attack = DetectorAttack(threat_model=LINF, steps=2, random_start=True)
    attack_image(model, samples[0], attack)
    assert state_of(model) == before
    broken = copy.deepcopy(samples[0])
    broken["instances"].remove("gt_classes")
    with pytest.raises(AttributeError):
        attack_image(model, broken, attack)
    assert state_of(model) == before
    with frozen_losses(model):
        norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._NormBase)]
        assert bool(norms) == bool(protocol or overrides)
        assert not any(norm.training for norm in norms)
        assert not any(parameter.requires_grad for parameter in model.parameters())


def test_random_numbers_of_training_are_not_touched(samples: list[Sample]) -> None:
    """Training continues as if there had been no attack, and its log shows none of it."""
    model = untrained(config()).train()

    def losses(*, attacked: bool) -> tuple[float, dict[str, list[Any]]]:
        torch.manual_seed(0)
        with EventStorage() as storage:
            if attacked:
                attack_image(model, samples[1], DetectorAttack(threat_model=LINF, steps=1))
            loss = sum(model([samples[0]]).values()).item()
            return loss, {name: history.values() for name, history in storage.histories().items()}

    assert losses(attacked=True) == losses(attacked=False)


# --- sanity checks ---


class Rounding(GeneralizedRCNN):
    """A detector that hides its gradients: it sees few levels of each pixel, between which nothing changes."""

    def preprocess_image(self, batched_inputs: list[Sample]) -> ImageList:
        levels = [{**sample, "image": 24 * (sample["image"] / 24).round()} for sample in batched_inputs]
        return super().preprocess_image(levels)


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
def test_masked_gradients_are_exposed_and_honest_ones_are_not(
    trained_detector: GeneralizedRCNN, samples: list[Sample], norm: str
) -> None:
    threat_model = LINF if norm == "Linf" else ThreatModel("L2", 3)
    attack = DetectorAttack(threat_model=threat_model, steps=5)
    honest = sanity_check(trained_detector, [*samples[:2], background(samples[2])], attack)
    counts = ("images", "random_is_stronger", "larger_is_not_stronger")
    assert [honest[f"sanity/{name}"] for name in counts] == [2, 0, 0]
    assert sanity_warnings(honest) == sanity_warnings({"bbox/AP": 1.0}) == []
    losses = {name.removeprefix("sanity/loss/"): value for name, value in honest.items()}
    assert losses["clean"] < losses["attack"] < losses["attack x2"] < losses["attack x4"]
    assert losses["random"] < losses["attack"]

    model = copy.deepcopy(trained_detector)
    model.__class__ = Rounding
    masked = sanity_check(model, samples[:2], attack)
    assert [warning.partition(":")[0] for warning in sanity_warnings(masked)] == [
        f"random noise is stronger than the white-box attack on {masked['sanity/random_is_stronger']:g} of 2 images",
        "a larger epsilon is not stronger on 2 of 2 images",
    ]


# --- what is refused ---


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"loss": "boxes"}, "classification, localization, objectness, mask, total"),
        ({"steps": 0}, "steps"),
        ({"steps": 101}, "at most 100"),
        ({"relative_step_size": 0.0}, "step_size"),
        ({"restarts": 2}, "random_start"),
        ({"schedule": "cosine"}, "fixed, apgd"),
        ({"target": 1}, "classification"),
        ({"target": "nearest", "loss": "classification"}, "derangement"),
    ],
)
def test_what_is_no_attack_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        DetectorAttack(threat_model=LINF, **wrong)


@pytest.mark.parametrize(
    ("overrides", "missing"),
    [
        (["MODEL.META_ARCHITECTURE", "PanopticFPN"], "no semantic segmentation"),
        (["MODEL.META_ARCHITECTURE", "SemanticSegmentor"], "none of loss_cls, "),
        (["MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals"], "not of an RPN"),
        (["MODEL.PROPOSAL_GENERATOR.NAME", "RRPN", "MODEL.ANCHOR_GENERATOR.NAME", "RotatedAnchorGenerator"], "RRPN"),
        (["MODEL.KEYPOINT_ON", True], "no keypoints"),
    ],
)
def test_parts_that_cannot_be_attacked_are_named(overrides: list[Any], missing: str) -> None:
    attack = DetectorAttack(threat_model=LINF)
    attack.check(build_model(config()))
    with pytest.raises(InputError, match=f"{missing}.*attacks are of Faster, Mask and Cascade R-CNN"):
        attack.check(build_model(config(*overrides)))


def test_what_does_not_go_with_the_detector_is_refused(samples: list[Sample]) -> None:
    boxes = untrained(config("MODEL.MASK_ON", False, "MODEL.ROI_HEADS.NUM_CLASSES", 1))
    for overrides, message in [
        ({"loss": "mask"}, "masks"),
        ({"loss": "classification", "target": 1}, "no class"),
        ({"loss": "classification", "target": -1}, "no class"),
        ({"loss": "classification", "target": "derangement"}, "one class"),
    ]:
        attack = DetectorAttack(threat_model=LINF, **overrides)
        for refuse in (attack.check, lambda model, attack=attack: attack_image(model, samples[0], attack)):
            with pytest.raises(InputError, match=message):
                refuse(boxes)
    larger = {**samples[0], "image": torch.zeros(3, 96, 96, dtype=torch.uint8)}
    with pytest.raises(InputError, match="96x96 pixels has ground truth for 64x64"):
        attack_image(boxes, larger, DetectorAttack(threat_model=LINF))
    for nothing, epsilon in ([background(samples[0])], 0.1), (samples, 0.0):
        with pytest.raises(InputError, match="nothing to attack"):
            sanity_check(boxes, nothing, DetectorAttack(threat_model=ThreatModel("L2", epsilon)))


# --- what attacks cost ---


@pytest.mark.slow
def test_the_cost_of_attacks_is_measured_in_turns(
    run_tool: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Times are no test's business."""
    monkeypatch.setattr("benchmarks.turns.Worker", WorkerHere)
    size = ["--height", "64", "--width", "96", "--steps", "1", "--rounds", "1"]
    status, out, err = run_tool("benchmark", "detector-attack", *size, "--device", "cpu", "--output", tmp_path)
    assert status == 0, err
    rows = json.loads((tmp_path / "detector-attack.json").read_text())["rows"]
    assert [row["way"].split(", ")[-1] for row in rows] == [
        "forward and backward",
        *(f"{loss} loss" for loss in ("classification", "localization", "objectness", "total", "mask")),
    ]
    assert all(len(row["seconds"]) == 1 and row["way"] in out for row in rows)
