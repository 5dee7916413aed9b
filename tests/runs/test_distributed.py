"""Several processes learn what one learns: the same batches, the same gradients, the same network."""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robust_backbones.attacks import AttackConfig
from robust_backbones.checkpoint.sources import read_checkpoint
from robust_backbones.checkpoint.untrusted import load_tensors
from robust_backbones.classification import checkpoints
from robust_backbones.classification.engine import train_one_epoch
from robust_backbones.classification.objectives import ObjectiveConfig
from robust_backbones.cpu.batch_norm import synchronize_batch_norms
from robust_backbones.errors import InputError
from robust_backbones.models import BackboneSpec, NormalizedModel, build_backbone
from robust_backbones.runs.distributed import ALONE, join_processes, local_device
from robust_backbones.runs.record import RunRecord
from robust_backbones.threat_models import ThreatModel
from tests.classification.test_engine import batches, learner, noisy_batches, small
from tests.conftest import ROOT, run_in_ranks, start_ranks

CPU = torch.device("cpu")


def found_by_ranks(function: Any, tmp_path: Path, size: int = 2) -> list[Any]:
    """``function(rank, size)`` in processes of their own: what each returned, by rank."""
    start_ranks(lambda rank, size: torch.save(function(rank, size), tmp_path / f"{rank}.pt"), tmp_path, size)
    return [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(size)]


def exchange(rank: int, size: int) -> list[Any]:
    with join_processes(CPU) as processes:
        assert (processes.rank, processes.size, processes.is_main) == (rank, size, rank == 0)
        return [
            processes.sum(torch.tensor([1.0, rank])),
            processes.min(torch.tensor([5 - rank, rank])),
            processes.broadcast({"from": rank}),
            processes.gather(rank * 10),
        ]


@pytest.fixture(scope="module")
def pair(trained: tuple[NormalizedModel, Tensor, Tensor], tmp_path_factory: pytest.TempPathFactory) -> "Pair":
    """The file that ``resumed`` starts from, and what each of two processes found, by function."""
    folder = tmp_path_factory.mktemp("pair")
    model, images, labels = trained
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.save({"model": start, "batches": noisy_batches(images, labels, 4, 16)}, folder / "start.pt")
    return folder / "start.pt", found_by_ranks(functools.partial(everything, start=folder / "start.pt"), folder)


def everything(rank: int, size: int, *, start: Path) -> dict[str, Any]:
    with join_processes(CPU):
        return {
            "exchange": exchange(rank, size),
            "without norms": train_without_norms(rank, size),
            "with norms": train_with_norms(rank, size),
            "normalize": normalize(rank, size),
            "resumed": resumed(rank, size, start=start),
        }


Pair = tuple[Path, list[dict[str, Any]]]


@pytest.mark.slow
def test_processes_add_agree_and_gather(pair: Pair) -> None:
    for total, least, agreed, gathered in (found["exchange"] for found in pair[1]):
        assert total.tolist() == [2, 1]
        assert least.tolist() == [4, 0]
        assert agreed == {"from": 0}
        assert gathered == [0, 10]


def test_one_process_needs_no_group() -> None:
    with join_processes(CPU) as processes:
        assert processes is ALONE
        assert processes.sum(torch.tensor(3.0)) == 3
        assert processes.broadcast("x") == "x"
        assert processes.gather(1) == [1]
    assert local_device("cpu") == CPU


def parted(rank: int, size: int) -> list[tuple[Tensor, Tensor]]:
    """Of each batch of 8 this process's part, in two micro-batches of 2."""
    part = 8 // size
    return [
        (images[start : start + 2], labels[start : start + 2])
        for images, labels in batches(4)
        for start in range(rank * part, (rank + 1) * part, 2)
    ]


def train_without_norms(rank: int, size: int) -> list[Tensor]:
    with join_processes(CPU) as processes:
        one = learner(small(norm=False), processes=processes)
        train_one_epoch(one, parted(rank, size), steps=4, accumulate=4 // size)
        return [parameter.detach() for parameter in one.model.parameters()]


def train_with_norms(rank: int, size: int) -> dict[str, Tensor]:
    with join_processes(CPU) as processes:
        one = learner(small(), objective=ObjectiveConfig("trades"), processes=processes)
        train_one_epoch(one, parted(rank, size), steps=4, accumulate=2)
        return {name: tensor.clone() for name, tensor in one.model.state_dict().items()}


@pytest.mark.slow
def test_gradients_are_those_of_the_global_batch(pair: Pair) -> None:
    """Two processes with two micro-batches each, against one with four and one with the batch in one piece."""
    one = learner(small(norm=False))
    train_one_epoch(one, batches(4), steps=4)
    expected = list(one.model.parameters())
    for parameters in [*(found["without norms"] for found in pair[1]), train_without_norms(0, 1)]:
        for ours, reference in zip(parameters, expected, strict=True):
            torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_processes_end_with_the_same_network(pair: Pair) -> None:
    """Batch statistics are each process's own, and their running averages are averaged after every step.

    With TRADES, whose loss takes two passes through the network.
    """
    first, second = (found["with norms"] for found in pair[1])
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def normalize(rank: int, size: int) -> list[Tensor]:
    with join_processes(CPU):
        module = synchronize_batch_norms(nn.Sequential(nn.BatchNorm2d(3)), CPU)
        images = inputs()[rank::size].requires_grad_()
        output = module(images)
        (output**3).sum().backward()
        assert images.grad is not None
        return [output.detach(), images.grad, module[0].running_mean, module[0].running_var]


def inputs() -> Tensor:
    return 2 + torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))


def test_the_callers_norms_keep_their_class_and_share_their_tensors() -> None:
    norm = nn.BatchNorm2d(3, eps=1e-3, momentum=0.3).eval()
    model = synchronize_batch_norms(nn.Sequential(norm), CPU)
    assert type(norm) is nn.BatchNorm2d
    assert type(model[0]) is not nn.BatchNorm2d
    assert (model[0].eps, model[0].momentum, model[0].training) == (1e-3, 0.3, False)
    for name, tensor in norm.state_dict(keep_vars=True).items():
        assert model[0].state_dict(keep_vars=True)[name] is tensor


@pytest.mark.slow
def test_synchronized_batch_norm_is_batch_norm_of_the_whole_batch(pair: Pair) -> None:
    images, reference = inputs().requires_grad_(), nn.BatchNorm2d(3)
    output = reference(images)
    (output**3).sum().backward()
    assert images.grad is not None
    for rank, (ours, gradient, mean, variance) in enumerate(found["normalize"] for found in pair[1]):
        torch.testing.assert_close(ours, output[rank::2].detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gradient, images.grad[rank::2], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(mean, reference.running_mean)
        torch.testing.assert_close(variance, reference.running_var)


ENDS_IN_A_COLLECTIVE = """
import atexit, sys
import torch
import torch.distributed as dist
from robust_backbones.commands import cli
def main(arguments):
    dist.init_process_group("gloo")
    print(f"before {dist.get_rank()}")
    for _ in range(20):
        tensor = torch.randn(100_000)
        tensor.held = object()
        dist.all_reduce(tensor, async_op=True)
    return 0
atexit.register(print, "handler")
cli.run(main)
"""


@pytest.mark.slow
def test_threads_of_gloo_do_not_abort_a_process_that_ends(tmp_path: Path) -> None:
    """They let go of tensors while Python ends; handlers run all the same, and nothing printed is lost."""
    script = tmp_path / "script.py"
    script.write_text(ENDS_IN_A_COLLECTIVE)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    assert [result.stdout.count(said) for said in ("before 0", "before 1", "handler")] == [1, 1, 2]


def resumed(rank: int, size: int, *, start: Path) -> dict[str, Tensor]:
    """Four steps of the recipe, with synchronised batch norms, from the trained network in ``start``."""
    content = torch.load(start, weights_only=True)
    spec = BackboneSpec("resnet18", 4)
    model = NormalizedModel(build_backbone(spec), spec)
    model.load_state_dict(content["model"])
    data = [(x.chunk(size)[rank], y.chunk(size)[rank]) for x, y in content["batches"]]
    with join_processes(CPU) as processes:
        synchronize_batch_norms(model, CPU)
        one = learner(model, ThreatModel("L2", 0.1), lr=0.001, attack=AttackConfig(), processes=processes)
        train_one_epoch(one, data, steps=len(data))
        return {name: tensor.detach().double() for name, tensor in model.state_dict().items()}


@pytest.mark.slow
def test_two_processes_are_one_process_of_the_same_batch(pair: Pair) -> None:
    """In float32, sums in another order: the weights' way over four steps differs by less than a thousandth of it.

    From a trained network, for on random weights each step multiplies any rounding a hundredfold, in plain PyTorch too.
    """
    start = torch.load(pair[0], weights_only=True)["model"]
    one, (two, other) = resumed(0, 1, start=pair[0]), (found["resumed"] for found in pair[1])
    assert all(torch.equal(tensor, other[name]) for name, tensor in two.items())

    def length(difference: dict[str, Tensor]) -> float:
        return sum(float(tensor.square().sum()) for tensor in difference.values()) ** 0.5

    way = length({name: tensor - start[name].double() for name, tensor in one.items() if "num_batches" not in name})
    apart = length({name: tensor - two[name] for name, tensor in one.items()})
    assert way > 0
    assert apart < 1e-3 * way


def train(output: Path, data: Path, processes: int) -> RunRecord:
    """The command itself."""
    recipe = (
        "--arch resnet18 --threat-model L2:0.5 --attack.steps 2 --eval-attack.steps 1 --attack.random-start "
        "--epochs 2 --batch-size 16 --lr 0.005 --image-size 32 --val-resize 32 --sync-batch-norm "
        "--device cpu --workers 0 --no-tensorboard --keep-checkpoints 9"
    )
    where = ("--data", data, "--output", output)
    out = run_in_ranks(output.with_name(f"{output.name}_said"), processes, "pretrain", *where, *recipe.split())
    assert f"batch 16 = {processes} process" in out
    assert out.count("record written to") == 1
    assert out.count("started by 2 processes and is resumed by 1") == (processes == 1)
    return RunRecord.read(output / "record.json")


def newest(rank: int, size: int, *, folder: Path) -> list[str]:
    """The steps that are resumed, where the second process does not see the newest file yet."""
    with join_processes(CPU) as processes, pytest.MonkeyPatch.context() as patch:
        if rank:
            path = folder / "later"
            patch.setattr(checkpoints, "load_tensors", lambda file: load_tensors(path if "2" in file.name else file))
        try:
            found = checkpoints.CheckpointFolder(folder, 2).newest(processes)
        except InputError:
            return []
        return [] if found is None else [found[0].stem[-1]]


def test_no_process_resumes_from_another_checkpoint_than_the_main_one(tmp_path: Path) -> None:
    """It ended, or went on with other weights."""
    folder = checkpoints.CheckpointFolder(tmp_path / "checkpoints", 2)
    for step in (1, 2):
        folder.write(step, {"step": step})
    found = found_by_ranks(functools.partial(newest, folder=folder.folder), tmp_path)
    assert found == [["2"], []]
    (folder.path(2)).unlink()
    assert found_by_ranks(functools.partial(newest, folder=folder.folder), tmp_path) == [["1"], ["1"]]


@pytest.mark.slow
def test_a_run_of_two_processes_resumes_as_two_or_as_one(shapes: Path, tmp_path: Path) -> None:
    """From its first epoch: as two again, bit for bit, random starts included; as one, it finishes all the same."""
    data = shapes / "shapes_classification"
    assert train(tmp_path / "two", data, 2).config["processes"] == 2
    for name, processes in (("again", 2), ("alone", 1)):
        shutil.copytree(tmp_path / "two", tmp_path / name)
        (tmp_path / name / "record.json").unlink()
        (tmp_path / name / "checkpoints/step_000000004.pt").unlink()
        assert train(tmp_path / name, data, processes).config["processes"] == processes
    two, again, alone = (
        read_checkpoint(tmp_path / name / "checkpoint.pt").state_dict for name in ("two", "again", "alone")
    )
    assert all(torch.equal(tensor, again[name]) for name, tensor in two.items())
    assert not all(torch.equal(tensor, alone[name]) for name, tensor in two.items())
