"""Several processes train the detector of one, and evaluate as one; what they are started with is checked."""

import json
import multiprocessing
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import detectron2.utils.comm as comm
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.utils.env import seed_all_rng
from torch import Tensor

from robust_backbones.detection.checkpoint import BackboneCheckpointer
from robust_backbones.detection.config import CONFIG_DIR, load_config
from robust_backbones.detection.datasets import register_datasets
from robust_backbones.detection.launch import launch, scale_to_processes
from robust_backbones.detection.trainer import Trainer
from robust_backbones.errors import InputError
from robust_backbones.runs.record import RunRecord
from tests.conftest import ROOT, start_forks
from tests.detection.conftest import SHAPES_CONFIG, SMALL

Maker = Callable[[str], Path]

# Nothing is drawn at random, every anchor and every proposal counts, and each image has as many of them: then the mean
# over a batch of four is the mean of the means over two batches of two. (Mask R-CNN's mask loss is a mean over the
# objects of a process, so it is another with another number of processes, in Detectron2 as here.)
PLAIN: list[Any] = [
    *("MODEL.MASK_ON", False, "SOLVER.IMS_PER_BATCH", 4, "SOLVER.AMP.ENABLED", False, "SOLVER.WARMUP_ITERS", 0),
    *("SOLVER.MAX_ITER", 2, "SOLVER.STEPS", (), "SOLVER.BASE_LR", 0.005, "SOLVER.CLIP_GRADIENTS.ENABLED", False),
    *("DATALOADER.NUM_WORKERS", 0, "DATALOADER.ASPECT_RATIO_GROUPING", False, "INPUT.RANDOM_FLIP", "none"),
    *("INPUT.MIN_SIZE_TRAIN", (96,), "MODEL.PROPOSAL_GENERATOR.MIN_SIZE", 0),
    *("MODEL.RPN.BATCH_SIZE_PER_IMAGE", 100_000, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 100_000),
    *("MODEL.RPN.NMS_THRESH", 1.0, "MODEL.RPN.PRE_NMS_TOPK_TRAIN", 40, "MODEL.RPN.POST_NMS_TOPK_TRAIN", 30),
    *("MODEL.ROI_HEADS.PROPOSAL_APPEND_GT", False, "TEST.EXPECTED_RESULTS", []),
]
PROTOCOLS = {"d2": [], "syncbn": [CONFIG_DIR / "protocols/syncbn.yaml"]}


def configuration(protocol: str, weights: Path, output: Path) -> CfgNode:
    overrides = [*SMALL, *PLAIN, "MODEL.WEIGHTS", weights, "OUTPUT_DIR", output, "SEED", 11]
    if protocol == "syncbn":
        overrides += ["TEST.PRECISE_BN.ENABLED", False]  # it draws other images with another number of processes
    return load_config([SHAPES_CONFIG, *PROTOCOLS[protocol]], overrides)


def train_and_evaluate(weights: Path, output: Path) -> None:
    """In each process: train by both protocols; the first writes weights and metrics down."""
    torch.set_num_threads(1)
    for protocol in PROTOCOLS:
        cfg = configuration(protocol, weights, output / protocol)
        register_datasets(cfg)
        trainer = Trainer(cfg)
        trainer.resume_or_load(False)
        trainer.train()
        if comm.is_main_process():
            found = {"model": trainer.checkpointer.model.state_dict(), "metrics": trainer.evaluation.results}
            torch.save(found, output / f"{protocol}.pt")
    # One detector, whatever the number of processes that evaluate it.
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    seed_all_rng(12)
    Trainer.test(cfg, Trainer.build_model(cfg))


@pytest.fixture(scope="module")
def outcomes(shapes: Path, converted: Maker, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """What one process of batch four, and two of batch two, have written."""
    folders = [tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(shapes))
        patch.delenv("WORLD_SIZE", raising=False)
        patch.setattr("torch.multiprocessing.start_processes", start_forks)
        for processes, folder in enumerate(folders, 1):
            arguments = (converted("resnet18"), folder)
            options = {"num_gpus": processes, "num_machines": 1, "machine_rank": 0, "dist_url": "auto"}
            launch(train_and_evaluate, arguments, **options)
    return folders


def differences(folders: list[Path], protocol: str, start: dict[str, Tensor]) -> tuple[float, float]:
    """Largest difference of a weight between the two, and largest change of one by training."""
    one, two = (torch.load(folder / f"{protocol}.pt", weights_only=True)["model"] for folder in folders)
    assert one.keys() == two.keys()
    floats = [name for name, tensor in one.items() if tensor.is_floating_point()]
    moved = [(one[name] - start[name]).abs().max().item() for name in floats if name in start]
    return max((one[name] - two[name]).abs().max().item() for name in floats), max(moved)


# In float32, so up to the order of summation; batch statistics magnify that from step to step.
@pytest.mark.slow
@pytest.mark.parametrize(("protocol", "tolerance"), [("d2", 1e-5), ("syncbn", 1e-3)])
def test_two_processes_of_two_images_are_one_of_four(
    outcomes: list[Path], converted: Maker, tmp_path: Path, protocol: str, tolerance: float
) -> None:
    """With SyncBN too: its statistics are those of the whole batch."""
    cfg = configuration(protocol, converted("resnet18"), tmp_path)
    seed_all_rng(11)
    start = Trainer.build_model(cfg)
    BackboneCheckpointer(start, cfg=cfg).load(cfg.MODEL.WEIGHTS)
    difference, change = differences(outcomes, protocol, start.state_dict())
    assert change > 1e-2
    assert difference < tolerance * change


@pytest.mark.slow
def test_evaluations_merge_exactly(outcomes: list[Path]) -> None:
    """Of what is found, and so of every metric; test_evaluators has these."""
    found = [folder / "syncbn/inference/coco_instances_results.json" for folder in outcomes]
    one, two = (json.loads(path.read_text()) for path in found)
    assert one == two
    assert len(one) > 10


@pytest.mark.parametrize(
    ("batch", "reference", "gpus", "words"),
    [(8, 0, 3, "divided among 3"), (8, 3, 1, "divided among 3"), (8, 0, 0, "no process .* runs on the CPU")],
)
def test_batches_that_cannot_be_divided_are_refused(batch: int, reference: int, gpus: int, words: str) -> None:
    cfg = load_config(SHAPES_CONFIG, ["SOLVER.IMS_PER_BATCH", batch, "SOLVER.REFERENCE_WORLD_SIZE", reference])
    with pytest.raises(InputError, match=words):
        scale_to_processes(cfg, num_gpus=gpus, num_machines=1)


def test_more_processes_than_the_machine_has_places_for_are_refused() -> None:
    with pytest.raises(InputError, match="--num-gpus 1024, but"):
        launch(fail, (), num_gpus=1024, num_machines=1, machine_rank=0, dist_url="auto")


def test_a_recipe_for_eight_is_scaled_to_two_and_sixteen() -> None:
    overrides = ["SOLVER.IMS_PER_BATCH", 16, "SOLVER.BASE_LR", 0.02, "SOLVER.REFERENCE_WORLD_SIZE", 8]
    cfg = load_config(
        SHAPES_CONFIG, [*overrides, "SOLVER.MAX_ITER", 1000, "SOLVER.STEPS", (800,), "MODEL.DEVICE", "cpu"]
    )
    for machines, batch, lr, iterations, step in ((2, 4, 0.005, 4000, 3200), (16, 32, 0.04, 500, 400)):
        scaled = scale_to_processes(cfg, num_gpus=1, num_machines=machines)
        assert (batch, pytest.approx(lr)) == (scaled.SOLVER.IMS_PER_BATCH, scaled.SOLVER.BASE_LR)
        assert (iterations, (step,)) == (scaled.SOLVER.MAX_ITER, scaled.SOLVER.STEPS)
    assert cfg.SOLVER.IMS_PER_BATCH == 16


@pytest.mark.parametrize(("rank", "url"), [(0, "auto"), (2, "tcp://10.0.0.1:1234"), (-1, "tcp://10.0.0.1:1234")])
def test_machines_have_to_know_each_other(rank: int, url: str) -> None:
    with pytest.raises(InputError, match="--dist-url"):
        launch(fail, (), num_gpus=1, num_machines=2, machine_rank=rank, dist_url=url)


def test_one_machine_has_rank_0() -> None:
    with pytest.raises(InputError, match=r"of one machine .* --machine-rank from 0 to 0"):
        launch(fail, (), num_gpus=1, num_machines=1, machine_rank=1, dist_url="auto")


@pytest.mark.slow
def test_torchrun_starts_it_too(shapes: Path, converted: Maker, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["tools/train_net.py", "--config-file", SHAPES_CONFIG, *SMALL, *PLAIN]
    command += [
        "MODEL.WEIGHTS",
        converted("resnet18"),
        "OUTPUT_DIR",
        tmp_path / "run",
        "SOLVER.REFERENCE_WORLD_SIZE",
        1,
    ]
    environment = {**os.environ, "DETECTRON2_DATASETS": str(shapes), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [str(item) for item in command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "batch 8 (processes: 2, images each: 4), learning rate 0.01" in result.stdout
    assert result.stdout.count("results written to") == 1
    assert RunRecord.read(tmp_path / "run/record.json").config["SOLVER"]["IMS_PER_BATCH"] == 8


def fail() -> None:
    raise InputError(f"process {comm.get_rank()} would {multiprocessing.get_start_method()} its data workers")


@pytest.mark.slow
def test_an_error_in_a_process_is_one_sentence_and_its_status(capfd: pytest.CaptureFixture[str]) -> None:
    """Of a process that was spawned; its data workers are forks all the same, which import nothing again."""
    with pytest.raises(SystemExit) as status:
        launch(fail, (), num_gpus=2, num_machines=1, machine_rank=0, dist_url="auto")
    assert status.value.code == 2
    errors = capfd.readouterr().err
    assert re.search("error: process . would fork its data workers", errors)
    assert "Traceback" not in errors
