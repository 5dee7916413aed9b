"""Fixtures: small real networks and images, made once a session."""

from __future__ import annotations

import atexit
import fcntl
import importlib
import multiprocessing
import os
import random
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import torch.multiprocessing
import torch.nn.functional as F
from hypothesis import HealthCheck, settings
from torch import Tensor

from robust_backbones.attacks import AttackConfig, pgd
from robust_backbones.data.datasets import open_dataset
from robust_backbones.data.synthetic import ShapesConfig, write_shapes
from robust_backbones.data.transforms import val_transform
from robust_backbones.models import BackboneSpec, NormalizedModel, build_backbone
from robust_backbones.threat_models import ThreatModel

# On a loaded machine inputs are slow, and no test is about time.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

# Small networks gain nothing from threads, and threads of several processes on two cores wait for each other.
torch.set_num_threads(1)

_start_processes = torch.multiprocessing.start_processes  # tests replace it
ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tools"))  # as a script of tools/ finds its package
TINY_SHAPES = ShapesConfig(
    train_images_per_class=8, val_images_per_class=4, train_scenes=12, val_scenes=6, image_size=32, scene_size=96
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: at the end every core has short ones to share."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``shapes_classification`` and ``shapes``, both tiny."""
    root = tmp_path_factory.mktemp("shapes")
    write_shapes(root, TINY_SHAPES)
    return root


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[NormalizedModel, Tensor, Tensor]:
    """A ResNet-18 in eval mode that has learnt the four shapes, at last under attack; 80 held-out images, their labels.

    The first of the test processes trains it, the others read it.
    """
    own = tmp_path_factory.getbasetemp()
    folder = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    path = folder / "trained.pt"
    with open(folder / "trained.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            torch.save(train_on_shapes(folder / "trained"), path)
    state, held_out, labels = torch.load(path, weights_only=True)
    spec = BackboneSpec("resnet18", 4)
    model = NormalizedModel(build_backbone(spec), spec)
    model.load_state_dict(state)
    return model.eval(), held_out, labels


def train_on_shapes(root: Path) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The trained network's state; held-out images in [0, 1], shape (80, 3, 32, 32), and their labels."""
    counts = {"train_images_per_class": 100, "val_images_per_class": 20, "train_scenes": 1, "val_scenes": 1}
    write_shapes(root, ShapesConfig(image_size=32, **counts))
    columns = []
    for part in ("train", "val"):
        dataset = open_dataset(root / "shapes_classification" / part, val_transform(32, resize=32))
        columns.append(torch.stack([image for image, _ in dataset]).float() / 255)
        columns.append(torch.tensor(dataset.labels))
    images, labels, held_out, held_out_labels = columns
    spec = BackboneSpec("resnet18", 4)
    model = NormalizedModel(build_backbone(spec), spec).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    for epoch in range(6):
        for rows in torch.randperm(len(images), generator=generator).split(25):
            inputs = images[rows]
            if epoch >= 3:
                inputs = pgd(model, inputs, labels[rows], ThreatModel("L2", 0.25), AttackConfig(steps=1))
            loss = F.cross_entropy(model(inputs), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.state_dict(), held_out, held_out_labels


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real images that ROBUST_BACKBONES_DATA names."""
    folder = os.environ.get("ROBUST_BACKBONES_DATA", "")
    if not folder or not (Path(folder) / "detectron2").is_dir():
        pytest.skip(
            "ROBUST_BACKBONES_DATA names no folder with the real images (detectron2/, tiny_imagenet_100.tar.gz)"
        )
    return Path(folder)


@pytest.fixture
def small_model() -> NormalizedModel:
    """ResNet-18 with four classes, in train mode."""
    spec = BackboneSpec("resnet18", 4)
    return NormalizedModel(build_backbone(spec), spec).train()


@pytest.fixture
def images() -> Tensor:
    """Four images in [0, 1], some pixels exactly 0 and 1; shape (4, 3, 32, 32)."""
    return (torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 1.2 - 0.1).clamp(0, 1)


@pytest.fixture
def labels() -> Tensor:
    return torch.tensor([0, 1, 2, 3])


def randomize_batch_norms(module: torch.nn.Module, seed: int = 0) -> None:
    """Give batch norms the varied statistics of a trained network; at their initial values they hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):
                layer.weight.uniform_(0.5, 1.5, generator=generator)
                layer.bias.uniform_(-0.2, 0.2, generator=generator)
                layer.running_mean.uniform_(-0.2, 0.2, generator=generator)
                layer.running_var.uniform_(0.5, 1.5, generator=generator)


def resnet_stages(model: NormalizedModel, images: Tensor) -> dict[str, Tensor]:
    """The outputs of a ResNet's layer1 to layer4, by the forward pass written out."""
    net = model.backbone
    x = net.maxpool(net.relu(net.bn1(net.conv1(model.normalize(images)))))
    return {name: (x := getattr(net, name)(x)) for name in ("layer1", "layer2", "layer3", "layer4")}


@pytest.fixture(scope="session")
def torchvision_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Maker of torchvision-style files with trained-looking batch norms, one an architecture."""
    folder = tmp_path_factory.mktemp("torchvision")

    def make(arch: str) -> Path:
        path = folder / f"{arch}.pth"
        if not path.exists():
            backbone = build_backbone(BackboneSpec(arch, 10), seed=1)
            randomize_batch_norms(backbone)
            torch.save(backbone.state_dict(), path)
        return path

    return make


@pytest.fixture
def run_tool(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run a verb (or ``benchmark``, of tools/) as its command line does, in this process: (status, stdout, stderr)."""
    from robust_backbones.__main__ import command
    from robust_backbones.commands import cli

    def run(verb: str, *arguments: object) -> tuple[int, str, str]:
        main = importlib.import_module(verb).main if verb == "benchmark" else command(verb)
        monkeypatch.setattr(sys, "argv", [f"robust-backbones {verb}", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_info:
            cli.run(main)
        captured = capsys.readouterr()
        return int(exit_info.value.code or 0), captured.out, captured.err

    return run


def start_forks(function: Callable[..., None], args: tuple[Any, ...], nprocs: int, **options: Any) -> object:
    """torch's ``start_processes`` with forks: they have imported what takes a new Python seconds."""
    return _start_processes(_fork, (function, *args), nprocs, **{**options, "start_method": "fork"})


def _fork(rank: int, function: Callable[..., None], *arguments: Any) -> None:
    atexit._clear()  # what the parent is to do when it ends
    function(rank, *arguments)


def start_fork(function: Callable[[], object], output: Path) -> BaseProcess:
    """``function`` in a fork of this process, which has imported what takes a new Python seconds.

    It is the first of a session of its own, ends with the status of a command, and prints to ``out`` and ``err`` of
    the folder ``output``.
    """

    def enter() -> None:
        os.setsid()
        atexit._clear()  # what the parent is to do when it ends
        for descriptor, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(output / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        sys.stdout, sys.stderr = (open(descriptor, "w", buffering=1, closefd=False) for descriptor in (1, 2))  # noqa: SIM115
        function()

    output.mkdir(exist_ok=True)
    process = multiprocessing.get_context("fork").Process(target=enter)
    process.start()
    return process


def call_verb(verb: str, *arguments: object) -> None:
    """As a command line does; it ends with SystemExit."""
    from robust_backbones.__main__ import command
    from robust_backbones.commands import cli

    sys.argv = [f"robust-backbones {verb}", *map(str, arguments)]
    cli.run(command(verb))


def start_ranks(function: Callable[[int, int], object], folder: Path, size: int = 2) -> str:
    """Call ``function(rank, size)`` in forks of this process, which find each other as torchrun's do: what they print.

    All must end with status 0.
    """
    folder.mkdir(exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with open(folder / "output", "w+") as output:
        try:
            start_forks(_enter, (function, size, port, output.fileno()), size)
        finally:
            output.seek(0)
            print(said := output.read())
    return said


def _enter(rank: int, function: Callable[[int, int], object], size: int, port: int, output: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    sys.stdout, sys.stderr = (open(output, "a", buffering=1, closefd=False) for _ in range(2))  # noqa: SIM115
    function(rank, size)


def run_in_ranks(folder: Path, size: int, verb: str, *arguments: object) -> str:
    """What ``size`` processes of a verb print, started as torchrun's are."""
    return start_ranks(lambda rank, size: call_verb(verb, *arguments), folder, size)


def negatives(folder: Path, place: Path) -> Path:
    """A folder of the same name in ``place``, with the same files of other images."""
    copied = Path(shutil.copytree(folder, place / folder.name))
    for path in [*copied.rglob("*.png"), *copied.rglob("*.jpg")]:
        assert cv2.imwrite(str(path), 255 - cv2.imread(str(path)))
    return copied


@contextmanager
def disk_of(options: str, place: Path) -> Iterator[Path]:
    """A file system in memory with the options of mount, such as ``size=64k``; the test is skipped without one."""
    place.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], check=False).returncode:
        pytest.skip("only root makes file systems, and not everywhere")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def global_generators() -> str:
    """Where Python's, NumPy's and PyTorch's stand."""
    return str((random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state().tolist()))
