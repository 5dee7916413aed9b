"""Adversarial training: the mathematics of both kinds, what they leave alone, and that they resume and distribute."""

import os
import signal
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import detectron2.utils.comm as comm
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_train_loader
from detectron2.engine.train_loop import HookBase
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler, build_optimizer
from detectron2.structures import ImageList
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from torchvision.ops import boxes as box_ops

from robust_backbones.detection.adversarial import AttackedDetector, Batch, FreeStream
from robust_backbones.detection.checkpoint import BackboneCheckpointer, backbone_tensors
from robust_backbones.detection.config import CONFIG_DIR, load_config
from robust_backbones.detection.data_stream import TrainingStream
from robust_backbones.detection.datasets import register_datasets
from robust_backbones.detection.launch import launch
from robust_backbones.detection.trainer import Trainer
from robust_backbones.errors import InputError, PreemptedError
from robust_backbones.threat_models import ThreatModel
from tests.conftest import randomize_batch_norms, start_forks
from tests.detection.conftest import RETINANET, SHAPES_CONFIG, SMALL

Maker = Callable[[str], Path]
PROTOCOLS = {kind: CONFIG_DIR / f"protocols/adversarial_{kind}.yaml" for kind in ("free", "pgd")}
ROUNDING = 2**-15
"""Of float32 near 255, in levels: attacks climb in [0, 1]."""
TRAINED_NORMS = ["MODEL.RESNETS.NORM", "BN", "MODEL.FPN.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", 0]


@pytest.fixture
def cfg(small_cfg: CfgNode, shapes: Path, converted: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CfgNode:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(shapes))
    register_datasets(small_cfg)
    small_cfg.merge_from_list(["MODEL.WEIGHTS", str(converted("resnet18")), "OUTPUT_DIR", str(tmp_path / "run")])
    small_cfg.merge_from_list(["SOLVER.AMP.ENABLED", False, "SOLVER.IMS_PER_BATCH", 2, "SOLVER.WARMUP_ITERS", 2])
    small_cfg.merge_from_list(["SOLVER.MAX_ITER", 2, "SOLVER.STEPS", (1,), "DATALOADER.NUM_WORKERS", 0])
    small_cfg.merge_from_list(["INPUT.MIN_SIZE_TRAIN", (64, 96), "SEED", 5])
    return small_cfg


class Losses(HookBase):
    """Every loss of every iteration; calls ``at`` after iteration ``last``."""

    def __init__(self, last: int | None, at: Callable[[], None]) -> None:
        self.rows: dict[int, dict[str, float]] = {}
        self.last, self.at = last, at

    def after_step(self) -> None:
        latest = self.trainer.storage.latest()
        self.rows[self.trainer.iter] = {name: value for name, (value, _) in latest.items() if "loss" in name}
        if self.trainer.iter == self.last:
            self.at()


def killed() -> None:
    raise KeyboardInterrupt


def terminated() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def train(
    cfg: CfgNode,
    overrides: list[Any],
    name: str,
    *,
    resume: bool = False,
    last: int | None = None,
    at: Callable[[], None] = killed,
) -> tuple[Trainer, Losses]:
    """Train in a folder of that name, until ``at`` ends it after iteration ``last``; evaluations take no time here."""
    cfg = cfg.clone()
    cfg.merge_from_list([*overrides, "OUTPUT_DIR", str(Path(cfg.OUTPUT_DIR).parent / name)])
    Path(cfg.OUTPUT_DIR).mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "test", lambda *_: {"segm": {"AP": 1.0}})
        trainer, losses = Trainer(cfg), Losses(last, at)
        trainer.register_hooks([losses])
        trainer.resume_or_load(resume)
        if last is None:
            trainer.train()
        else:
            with pytest.raises((KeyboardInterrupt, PreemptedError)):
                trainer.train()
    return trainer, losses


def same(a: nn.Module, b: nn.Module) -> bool:
    own, other = a.state_dict(), b.state_dict()
    return own.keys() == other.keys() and all(torch.equal(own[name], other[name]) for name in own)


def detector_of(trainer: Trainer) -> nn.Module:
    return trainer.checkpointer.model


def some_batches(cfg: CfgNode, count: int) -> list[Batch]:
    seed_all_rng(7)
    return list(islice(iter(TrainingStream(cfg)), count))


@pytest.fixture
def detector(cfg: CfgNode) -> nn.Module:
    """In train mode, with its backbone."""
    seed_all_rng(3)
    model = build_model(cfg)
    BackboneCheckpointer(model, cfg=cfg).load(cfg.MODEL.WEIGHTS)
    return model.train()


def total_loss(model: nn.Module, batch: Batch, seed: int = 0) -> Tensor:
    """The sum of all losses; the seed decides which anchors and regions they are taken over."""
    seed_all_rng(seed)
    with EventStorage():
        return sum(model(batch).values())


def perturbations(batch: Batch, clean: Batch) -> list[Tensor]:
    """In levels, shape (3, H, W) each."""
    return [item["image"].detach() - other["image"] for item, other in zip(batch, clean, strict=True)]


FREE, PGD = ["ADVERSARIAL.KIND", "free"], ["ADVERSARIAL.KIND", "pgd"]
EPSILON_0 = ["ADVERSARIAL.THREAT_MODEL", "Linf:0"]


@pytest.mark.slow
def test_without_epsilon_and_replays_it_is_standard_training(cfg: CfgNode) -> None:
    """Not a bit differs, random starts or not; nor does free training with one replay, which is of the clean images.

    Its gradients reach the images, so all is trained: Detectron2's FrozenBN has another formula where nothing is.
    """
    standard, losses = train(cfg, [], "standard")
    once = ["ADVERSARIAL.REPLAYS", 1]
    for number, adversary in enumerate(
        [[*FREE, *EPSILON_0, *once], [*PGD, *EPSILON_0, "ADVERSARIAL.RANDOM_START", True]]
    ):
        trainer, own = train(cfg, adversary, f"adversarial_{number}")
        assert own.rows == losses.rows
        assert same(detector_of(trainer), detector_of(standard))
    whole = ["MODEL.BACKBONE.FREEZE_AT", 0]
    standard, _ = train(cfg, whole, "whole")
    trainer, _ = train(cfg, [*whole, *FREE, *once], "whole_free")
    assert same(detector_of(trainer), detector_of(standard))


@pytest.mark.slow
def test_free_without_epsilon_is_each_batch_several_times(cfg: CfgNode) -> None:
    """Against a loop over Detectron2's own parts; the third batch is cut short by MAX_ITER."""
    cfg.merge_from_list(["SOLVER.MAX_ITER", 5, "SOLVER.STEPS", (4,), "MODEL.FAST_ROI_ALIGN", False])
    trainer, losses = train(cfg, [*FREE, *EPSILON_0, "ADVERSARIAL.REPLAYS", 2], "free")
    seed_all_rng(5)
    model = build_model(cfg)
    optimizer = build_optimizer(cfg, model)
    batches = iter(build_detection_train_loader(cfg))
    scheduler = build_lr_scheduler(cfg, optimizer)
    BackboneCheckpointer(model, cfg=cfg).load(cfg.MODEL.WEIGHTS)
    model.train()
    with EventStorage():
        for iteration in range(5):
            if iteration % 2 == 0:
                batch = next(batches)
            found = model(batch)
            optimizer.zero_grad()
            sum(found.values()).backward()
            optimizer.step()
            scheduler.step()
            assert losses.rows[iteration] == pytest.approx(
                {**{name: loss.item() for name, loss in found.items()}, "total_loss": sum(found.values()).item()}
            )
    assert same(model, detector_of(trainer))


def gradients_by_hand(model: nn.Module, batch: Batch, seed: int) -> list[Tensor]:
    """Of the total loss with respect to the normalised images, through the detector's parts."""
    inputs = [((item["image"] - model.pixel_mean) / model.pixel_std).requires_grad_() for item in batch]
    truth = [item["instances"] for item in batch]
    seed_all_rng(seed)
    with EventStorage():
        images = ImageList.from_tensors(inputs, model.backbone.size_divisibility)
        features = model.backbone(images.tensor)
        proposals, losses = model.proposal_generator(images, features, truth)
        _, more = model.roi_heads(images, features, proposals, truth)
    return list(torch.autograd.grad(sum([*losses.values(), *more.values()]), inputs))


def replays_of(batch: Batch, cfg: CfgNode, model: nn.Module) -> Iterator[Batch]:
    """What free training sees of a batch; the weights stay as they are."""
    for seed, replay in enumerate(FreeStream([batch], cfg)):
        yield [{**item, "image": item["image"].detach().clone()} for item in replay]
        total_loss(model, replay, seed).backward()


def test_a_free_replay_is_one_signed_step_of_epsilon(cfg: CfgNode, detector: nn.Module) -> None:
    cfg.merge_from_list([*FREE, "ADVERSARIAL.THREAT_MODEL", "Linf:4/255", "SOLVER.IMS_PER_BATCH", 1])
    (batch,) = some_batches(cfg, 1)
    first, second, *_ = replays_of(batch, cfg, detector)
    (start,), (delta,) = perturbations(first, batch), perturbations(second, batch)
    (gradient,) = gradients_by_hand(detector, batch, seed=0)
    assert not start.any()
    # Around 0 the sign hangs on the order of summation.
    clear = gradient.abs() > 1e-4 * gradient.abs().max()
    expected = (batch[0]["image"] + 4 * gradient.sign()).clamp(0, 255) - batch[0]["image"]
    assert clear.float().mean() > 0.5
    torch.testing.assert_close(delta[clear], expected[clear], rtol=0, atol=ROUNDING)
    assert ((delta.abs() - 4).abs() <= ROUNDING).float().mean() > 0.9


def test_the_second_replay_climbs_from_where_the_first_came(cfg: CfgNode, detector: nn.Module) -> None:
    """ℓ2: the point of the ball nearest to the last perturbation and one more step of size epsilon."""
    cfg.merge_from_list([*FREE, "ADVERSARIAL.THREAT_MODEL", "L2:2", "SOLVER.IMS_PER_BATCH", 1])
    (batch,) = some_batches(cfg, 1)
    batch[0]["image"] = batch[0]["image"] // 2 + 64  # nothing is clipped
    _, second, third, _ = replays_of(batch, cfg, detector)
    (delta,), (found,) = perturbations(second, batch), perturbations(third, batch)
    (gradient,) = gradients_by_hand(detector, second, seed=1)
    gradient = gradient / detector.pixel_std
    expected = delta + 510 * gradient / gradient.norm()
    expected *= min(1.0, 510 / expected.norm().item())
    assert expected.norm() > 400
    assert (found - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize(
    ("kind", "random_start", "norm"),
    [("free", False, "Linf"), ("free", True, "L2"), ("pgd", True, "Linf"), ("pgd", False, "L2")],
)
def test_every_image_stays_in_its_ball_and_range(
    cfg: CfgNode, detector: nn.Module, kind: str, random_start: bool, norm: str
) -> None:
    """Of each image of a batch on its own; images of different sizes, some pixels 0 and 255."""
    epsilon = {"Linf": 8 / 255, "L2": 3.0}[norm]
    cfg.merge_from_list(["ADVERSARIAL.KIND", kind, "ADVERSARIAL.RANDOM_START", random_start])
    cfg.merge_from_list(["ADVERSARIAL.THREAT_MODEL", f"{norm}:{epsilon}", "ADVERSARIAL.STEPS", 2])
    batch = some_batches(cfg, 1)[0]
    batch[0]["image"][:, :20] = 255
    batch[1]["image"][:, :20] = 0
    batch[1]["image"] = batch[1]["image"][:, :-1].clone()
    if kind == "free":
        first, *attacked = replays_of(batch, cfg, detector)
        assert any(delta.any() for delta in perturbations(first, batch)) == random_start
    else:
        attacked = [AttackedDetector(detector, cfg).attack(batch)]
    assert len(attacked) == {"free": 3, "pgd": 1}[kind]
    for found in attacked:
        for item, delta in zip(found, perturbations(found, batch), strict=True):
            size = ThreatModel(norm).size(delta[None]).item()
            rounding = ROUNDING * (delta.numel() ** 0.5 if norm == "L2" else 1)
            assert 0.5 * 255 * epsilon < size <= 255 * epsilon * (1 + 1e-6) + rounding
            assert item["image"].min() >= 0
            assert item["image"].max() <= 255
    assert all(item["image"].dtype == torch.uint8 for item in batch)


@pytest.mark.slow
def test_pgd_raises_the_loss(cfg: CfgNode, detector: nn.Module) -> None:
    """And two steps raise it more than a step of half the ball does; means over batches and regions drawn."""
    cfg.merge_from_list([*PGD, "ADVERSARIAL.RELATIVE_STEP_SIZE", 0.5, "ADVERSARIAL.THREAT_MODEL", "Linf:16/255"])
    batches = some_batches(cfg, 2)

    def loss(model: nn.Module) -> float:
        return sum(total_loss(model, batch, seed).item() for batch in batches for seed in range(3))

    losses = [loss(detector)]
    for steps in (1, 3):
        cfg.merge_from_list(["ADVERSARIAL.STEPS", steps])
        losses.append(loss(AttackedDetector(detector, cfg)))
    assert losses[0] < losses[1] < losses[2]


def test_pgd_leaves_weights_norms_gradients_and_counts_alone(cfg: CfgNode) -> None:
    cfg.merge_from_list([*TRAINED_NORMS, *PGD, "MODEL.BACKBONE.FREEZE_AT", 2])
    model = build_model(cfg).train()
    randomize_batch_norms(model)
    model.roi_heads.box_predictor.eval()  # what somebody has put in eval mode stays there
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = {name: module.training for name, module in model.named_modules()}
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert len(set(trainable.values())) == 2
    batch = some_batches(cfg, 1)[0]
    with EventStorage() as storage:
        attacked = AttackedDetector(model, cfg).attack(batch)
    assert not storage.latest()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert trainable == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(item["image"].requires_grad for item in attacked)


def test_pgd_leaves_the_normalizer_of_a_retinanet_alone(cfg: CfgNode) -> None:
    """Each call in train mode moves Detectron2's running count of positive anchors, which divides the losses."""
    cfg.merge_from_list([*RETINANET, *PGD])
    model = build_model(cfg).train()
    model.loss_normalizer = 7.0
    AttackedDetector(model, cfg).attack(some_batches(cfg, 1)[0])
    assert model.loss_normalizer == 7.0


@pytest.mark.parametrize("kind", ["free", "pgd"])
def test_batch_norms_see_what_the_weights_learn_from_and_see_it_once(
    cfg: CfgNode, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The statistics after two steps are those of two forward passes of the images that were trained on."""
    cfg.merge_from_list([*TRAINED_NORMS, "ADVERSARIAL.KIND", kind, "SOLVER.BASE_LR", 0.0])
    model = build_model(cfg).train()
    randomize_batch_norms(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seen: list[Batch] = []
    forward = model.forward

    def watched(batch: Batch) -> Any:
        if next(iter(model.parameters())).requires_grad:  # not under attack
            seen.append([{**item, "image": item["image"].detach().clone()} for item in batch])
        return forward(batch)

    monkeypatch.setattr(model, "forward", watched)
    batches = some_batches(cfg, 2)
    with EventStorage():
        if kind == "free":
            for batch in islice(FreeStream(batches, cfg), 2):
                sum(model(batch).values()).backward()
        else:
            attacked = AttackedDetector(model, cfg)
            for batch in batches:
                sum(attacked(batch).values()).backward()
        assert len(seen) == 2
        assert any(delta.any() for delta in perturbations(seen[1], batches[0 if kind == "free" else 1]))
        plain = build_model(cfg).train()
        plain.load_state_dict(state)
        for batch in seen:
            plain(batch)
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    for name, buffer in plain.named_buffers():
        assert torch.allclose(model.get_buffer(name), buffer, rtol=1e-4, atol=1e-6), name
        assert not name.endswith("running_mean") or not torch.allclose(buffer, state[name])


RESUMED = [
    # Saved after six iterations, the last replay of the batch that the fourth belongs to.
    [*FREE, "ADVERSARIAL.REPLAYS", 3, "ADVERSARIAL.RANDOM_START", True, "SOLVER.EMA_DECAY", 0.9],
    [*FREE, "ADVERSARIAL.REPLAYS", 3, *TRAINED_NORMS, "SOLVER.AMP.ENABLED", True, "DATALOADER.NUM_WORKERS", 1],
    [*PGD, "ADVERSARIAL.STEPS", 1, "ADVERSARIAL.RANDOM_START", True, "SOLVER.AMP.ENABLED", True],
]


@pytest.mark.slow
@pytest.mark.parametrize("overrides", RESUMED, ids=["free", "free_norms_bfloat16", "pgd_bfloat16"])
def test_a_run_that_is_killed_or_stopped_resumes_as_the_unbroken_one(cfg: CfgNode, overrides: list[Any]) -> None:
    cfg.merge_from_list(["SOLVER.MAX_ITER", 8, "SOLVER.CHECKPOINT_PERIOD", 4, "SOLVER.STEPS", (7,)])
    free = "free" in overrides
    unbroken, losses = train(cfg, overrides, "unbroken")
    saved = {path.stem for path in Path(unbroken.cfg.OUTPUT_DIR).glob("model_0*.pth")}
    # With an average, which is the final file, the last one is what a longer run would continue from.
    last = {"model_0000007"} if "SOLVER.EMA_DECAY" in overrides else set()
    assert saved == ({"model_0000005"} if free else {"model_0000003"}) | last
    train(cfg, overrides, "killed", last=6)
    resumed, again = train(cfg, overrides, "killed", resume=True)
    assert min(again.rows) == (6 if free else 4)
    ends = [(resumed, again)]
    if last:  # a signal in the middle of a batch's replays is heeded after their last
        _, stopped = train(cfg, overrides, "stopped", last=1, at=terminated)
        assert max(stopped.rows) == 2
        ends.append(train(cfg, overrides, "stopped", resume=True))
    for trainer, rows in ends:
        assert rows.rows == {iteration: losses.rows[iteration] for iteration in rows.rows}
        assert max(rows.rows) == 7
        assert same(detector_of(trainer), detector_of(unbroken))
        assert same(trainer.evaluated_model, unbroken.evaluated_model)


def test_an_overflow_in_float16_moves_no_pixel(cfg: CfgNode) -> None:
    """Those of images whose gradients are finite move on."""
    for norm, finite in (("Linf", 4.0), ("L2", 4 / 12**0.5)):
        cfg.merge_from_list([*FREE, "ADVERSARIAL.THREAT_MODEL", f"{norm}:4/255"])
        batch = [{"image": torch.full((3, 2, 2), 100, dtype=torch.uint8)} for _ in range(3)]
        replays = iter(FreeStream([batch], cfg))
        for item, gradient in zip(next(replays), (1.0, float("nan"), float("inf")), strict=True):
            item["image"].grad = torch.full((3, 2, 2), gradient)
        moved = perturbations(next(replays), batch)
        assert torch.allclose(moved[0], torch.full((3, 2, 2), finite))
        assert not moved[1].any()
        assert not moved[2].any()


# As in test_launch: nothing is drawn at random, so that two processes of two images are one of four. ℓ2, since a sign
# near 0 hangs on the order of summation.
PLAIN: list[Any] = [
    *("MODEL.MASK_ON", False, "SOLVER.IMS_PER_BATCH", 4, "SOLVER.AMP.ENABLED", False, "SOLVER.WARMUP_ITERS", 0),
    *("SOLVER.MAX_ITER", 2, "SOLVER.STEPS", (), "SOLVER.BASE_LR", 0.005, "SOLVER.CLIP_GRADIENTS.ENABLED", False),
    *("DATALOADER.NUM_WORKERS", 0, "DATALOADER.ASPECT_RATIO_GROUPING", False, "INPUT.RANDOM_FLIP", "none"),
    *("INPUT.MIN_SIZE_TRAIN", (96,), "MODEL.PROPOSAL_GENERATOR.MIN_SIZE", 0),
    *("MODEL.RPN.BATCH_SIZE_PER_IMAGE", 100_000, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 100_000),
    *("MODEL.RPN.NMS_THRESH", 1.0, "MODEL.RPN.PRE_NMS_TOPK_TRAIN", 40, "MODEL.RPN.POST_NMS_TOPK_TRAIN", 30),
    *("MODEL.ROI_HEADS.PROPOSAL_APPEND_GT", False, "ADVERSARIAL.THREAT_MODEL", "L2:2", "MODEL.DEVICE", "cpu"),
]


def train_by_both(output: Path) -> None:
    """In each process; the first writes the weights down.

    In float64, since float32's rounding chooses between proposals of nearly equal scores.
    """
    nms = box_ops.batched_nms
    with pytest.MonkeyPatch.context() as patch:
        # Detectron2 makes float32 of the boxes, and torchvision wants the type of the scores.
        patch.setattr(
            box_ops, "batched_nms", lambda boxes, scores, *others: nms(boxes.to(scores.dtype), scores, *others)
        )
        torch.set_default_dtype(torch.float64)
        try:
            _train_by_both(output)
        finally:
            torch.set_default_dtype(torch.float32)


def _train_by_both(output: Path) -> None:
    torch.set_num_threads(1)
    for kind in PROTOCOLS:
        cfg = load_config(
            SHAPES_CONFIG,
            [*SMALL, *PLAIN, "MODEL.BACKBONE.FROM_SCRATCH", True, "OUTPUT_DIR", output / kind, "SEED", 11],
        )
        cfg.merge_from_list(["ADVERSARIAL.KIND", kind, "ADVERSARIAL.REPLAYS", 2])
        register_datasets(cfg)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Trainer, "test", lambda *_: {"bbox": {"AP": 1.0}})
            trainer = Trainer(cfg)
            trainer.resume_or_load(False)
            if comm.is_main_process():
                (output / kind).mkdir()
                torch.save(trainer.checkpointer.model.state_dict(), output / f"{kind}_start.pt")
            comm.synchronize()
            trainer.train()
        if comm.is_main_process():
            torch.save(trainer.checkpointer.model.state_dict(), output / f"{kind}.pt")


@pytest.mark.slow
def test_two_processes_of_two_images_are_one_of_four(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(shapes))
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr("torch.multiprocessing.start_processes", start_forks)
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        options = {"num_gpus": processes, "num_machines": 1, "machine_rank": 0, "dist_url": "auto"}
        launch(train_by_both, (folder,), **options)
    for kind in PROTOCOLS:
        one, two, start = (
            torch.load(tmp_path / f"{name}.pt", weights_only=True)
            for name in (f"1/{kind}", f"2/{kind}", f"1/{kind}_start")
        )
        change = max((one[name] - start[name]).abs().max().item() for name in one)
        difference = max((one[name] - two[name]).abs().max().item() for name in one)
        assert change > 1e-3
        assert difference < 1e-12 * change


def settings(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [{**group, "params": [id(parameter) for parameter in group["params"]]} for group in optimizer.param_groups]


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["SOLVER.CLIP_GRADIENTS.ENABLED", False, *TRAINED_NORMS],
        ["SOLVER.BIAS_LR_FACTOR", 2.0, "SOLVER.WEIGHT_DECAY_NORM", 0.01, "SOLVER.NESTEROV", True],
    ],
)
def test_the_default_optimizer_is_detectron2s(small_cfg: CfgNode, overrides: list[Any]) -> None:
    small_cfg.merge_from_list(overrides)
    model = build_model(small_cfg)
    ours, theirs = Trainer.build_optimizer(small_cfg, model), build_optimizer(small_cfg, model)
    assert type(ours).__name__ == type(theirs).__name__
    assert isinstance(ours, torch.optim.SGD)
    assert ours.defaults == theirs.defaults
    assert settings(ours) == settings(theirs)


@pytest.mark.parametrize("family", ["FPN", "C4"])
def test_adamw_trains_the_backbone_at_a_tenth(family: str) -> None:
    """Its res5 in C4's heads, too, but not the FPN; norms decay as WEIGHT_DECAY_NORM says."""
    task = CONFIG_DIR / f"quick/mask_rcnn_R_50_{family}_shapes_instant.yaml"
    overrides = [*SMALL, "MODEL.RESNETS.NORM", "BN", "MODEL.DEVICE", "cpu"]
    cfg = load_config([task, PROTOCOLS["free"]], overrides)
    model = build_model(cfg)
    optimizer = Trainer.build_optimizer(cfg, model)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert type(optimizer).__name__ == "AdamWWithGradientClip"
    assert all(group["betas"] == (0.9, 0.999) for group in optimizer.param_groups)
    found = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    backbone = backbone_tensors(model).keys()
    kinds = set()
    for name, parameter in model.named_parameters():
        norm = isinstance(model.get_submodule(name.rsplit(".", 1)[0]), nn.BatchNorm2d)
        if parameter.requires_grad:
            assert found.pop(id(parameter)) == (1e-4 * (0.1 if name in backbone else 1.0), 0.0 if norm else 0.1)
            kinds.add((name in backbone, norm, "res5" in name))
    assert not found
    assert {(True, False, True), (True, True, True), (False, False, False)} <= kinds


def test_the_rate_of_biases_multiplies_that_of_the_backbone(small_cfg: CfgNode) -> None:
    """Detectron2 gives it in place of the others: a frozen backbone (multiplier 0) would have moving biases."""
    small_cfg.merge_from_list([*TRAINED_NORMS, "SOLVER.BIAS_LR_FACTOR", 2.0, "SOLVER.BACKBONE_MULTIPLIER", 0.1])
    model = build_model(small_cfg)
    groups = Trainer.build_optimizer(small_cfg, model).param_groups
    found = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        factor = (0.1 if name in backbone_tensors(model) else 1.0) * (2.0 if name.endswith(".bias") else 1.0)
        assert found[id(parameter)] == pytest.approx(factor * small_cfg.SOLVER.BASE_LR)


def test_gradients_are_clipped_before_adamw(small_cfg: CfgNode) -> None:
    """It hands on no more than norm 100 of each tensor: its first moment after one step is a tenth of the gradient."""
    small_cfg.merge_from_file(str(PROTOCOLS["free"]))
    model = build_model(small_cfg)
    optimizer = Trainer.build_optimizer(small_cfg, model)
    parameter = model.roi_heads.box_predictor.cls_score.weight
    parameter.grad = torch.full_like(parameter, 1e4)
    optimizer.step()
    assert optimizer.state[parameter]["exp_avg"].norm().item() == pytest.approx(10, rel=1e-4)


@pytest.mark.parametrize("kind", ["free", "pgd"])
def test_a_protocol_is_the_recipe_of_its_paper(kind: str) -> None:
    """Li et al. 2023, section on the recipe, as numbers; the schedule is the task's."""
    task = CONFIG_DIR / "COCO-Detection/faster_rcnn_R_50_FPN_2x.yaml"
    plain, cfg = load_config(task), load_config([task, PROTOCOLS[kind]])
    solver, adversary = cfg.SOLVER, cfg.ADVERSARIAL
    assert (solver.OPTIMIZER, solver.BASE_LR, solver.WEIGHT_DECAY) == ("AdamW", 1e-4, 0.1)
    assert (solver.BACKBONE_MULTIPLIER, solver.WEIGHT_DECAY_NORM) == (0.1, 0.0)
    clip = solver.CLIP_GRADIENTS
    assert (clip.ENABLED, clip.CLIP_TYPE, clip.CLIP_VALUE, clip.NORM_TYPE) == (True, "norm", 100.0, 2.0)
    assert (kind, "Linf:4/255", 4) == (adversary.KIND, adversary.THREAT_MODEL, adversary.REPLAYS)
    assert solver.MAX_ITER == plain.SOLVER.MAX_ITER == 180_000
    assert (plain.ADVERSARIAL.KIND, plain.SOLVER.OPTIMIZER, plain.SOLVER.BACKBONE_MULTIPLIER) == ("", "SGD", 1.0)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["ADVERSARIAL.KIND", "trades"], "ADVERSARIAL.KIND 'trades' is not one of free, pgd"),
        (["ADVERSARIAL.THREAT_MODEL", "L1:4/255"], "unknown norm 'L1'"),
        (["ADVERSARIAL.THREAT_MODEL", "four"], "cannot read the threat model"),
        (["ADVERSARIAL.REPLAYS", 0], r"ADVERSARIAL\.REPLAYS 0"),
        (["ADVERSARIAL.STEPS", 0], "steps"),
        (["ADVERSARIAL.RELATIVE_STEP_SIZE", 0.0], "relative_step_size"),
        ([*PGD, "VIS_PERIOD", 10], "VIS_PERIOD 0"),
        (["ADVERSARIAL.EPSILON", 1], "unknown configuration key"),
        (["SOLVER.OPTIMIZER", "Adam"], "SOLVER.OPTIMIZER 'Adam' is not one of SGD, AdamW"),
        (["SOLVER.BACKBONE_MULTIPLIER", -0.1], "SOLVER.BACKBONE_MULTIPLIER"),
        (["SOLVER.BACKBONE_MULTIPLIER", float("nan")], "SOLVER.BACKBONE_MULTIPLIER"),
    ],
)
def test_wrong_values_are_refused(overrides: list[Any], words: str) -> None:
    with pytest.raises(InputError, match=words) as error:
        load_config(SHAPES_CONFIG, overrides)
    assert "\n" not in str(error.value)
