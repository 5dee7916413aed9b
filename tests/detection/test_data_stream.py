"""A stream resumed in the middle gives what the unbroken one gives, and the same random state after it."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_train_loader
from detectron2.utils.env import seed_all_rng

from robust_backbones.detection.data_stream import TrainingStream, random_state, set_random_state, undisturbed

NAME = "pictures_of_all_shapes"


@pytest.fixture
def cfg(small_cfg: CfgNode, tmp_path: Path) -> Iterator[CfgNode]:
    """17 upright and lying pictures, flipped, resized and cropped at random."""
    generator = np.random.default_rng(0)
    items = []
    for index in range(17):
        height, width = generator.integers(40, 90, 2).tolist()
        path = tmp_path / f"{index}.png"
        cv2.imwrite(str(path), generator.integers(0, 255, (height, width, 3), np.uint8))
        box = {"bbox": [5.0, 5.0, 30.0, 30.0], "bbox_mode": 0, "category_id": 0}
        row = {"file_name": str(path), "image_id": index, "height": height, "width": width, "annotations": [box]}
        items.append(row)
    DatasetCatalog.register(NAME, lambda: items)
    MetadataCatalog.get(NAME).thing_classes = ["thing"]
    small_cfg.merge_from_list(["DATASETS.TRAIN", (NAME,), "MODEL.MASK_ON", False, "SOLVER.IMS_PER_BATCH", 3])
    small_cfg.merge_from_list(["INPUT.MIN_SIZE_TRAIN", (32, 40, 48, 56), "INPUT.CROP.ENABLED", True])
    yield small_cfg
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


def content(batches: list[list[dict[str, Any]]]) -> list[Any]:
    return [
        (sample["image_id"], sample["image"].tolist(), sample["instances"].gt_boxes.tensor.tolist())
        for batch in batches
        for sample in batch
    ]


def start(cfg: CfgNode) -> TrainingStream:
    seed_all_rng(7)
    return TrainingStream(cfg)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("grouped", "workers"),
    [(True, 0), (False, 0), (True, 2), *(pytest.param(*x, marks=SLOW) for x in [(True, 1), (False, 1), (False, 2)])],
)
def test_a_resumed_stream_is_the_unbroken_one(cfg: CfgNode, workers: int, grouped: bool) -> None:
    cfg.merge_from_list(["DATALOADER.NUM_WORKERS", workers, "DATALOADER.ASPECT_RATIO_GROUPING", grouped])
    unbroken = start(cfg)
    batches, states = [], []
    for batch in unbroken:
        torch.rand(5)  # as training draws, to sample proposals
        batches.append(batch)
        states.append(random_state())
        if len(batches) == 12:
            break
    assert len({tuple(sample["image"].shape) for batch in batches for sample in batch}) > 5

    for iteration in (1, 5):
        seed_all_rng(7)
        resumed = TrainingStream(cfg)
        resumed.resume_from(iteration, at_start=unbroken.random_state_at_start, now=states[iteration - 1])
        np.random.rand(3)
        torch.rand(3)
        iterator = iter(resumed)
        first = next(iterator)
        assert torch.equal(random_state()["torch"], states[iteration - 1]["torch"])
        again = [first] + [next(iterator) for _ in range(iteration + 1, 12)]
        assert content(again) == content(batches[iteration:])


@pytest.mark.parametrize("workers", [0, 2])
def test_from_its_start_it_is_detectron2s_loader(cfg: CfgNode, workers: int) -> None:
    cfg.merge_from_list(["DATALOADER.NUM_WORKERS", workers])
    ours = [batch for batch, _ in zip(start(cfg), range(6), strict=False)]
    seed_all_rng(7)
    theirs = [batch for batch, _ in zip(build_detection_train_loader(cfg), range(6), strict=False)]
    assert content(ours) == content(theirs)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=SLOW)])
def test_every_pass_begins_anew(cfg: CfgNode, workers: int) -> None:
    cfg.merge_from_list(["DATALOADER.NUM_WORKERS", workers])
    stream = start(cfg)
    passes = []
    for _ in range(2):
        seed_all_rng(3)
        passes.append(content([batch for batch, _ in zip(stream, range(2), strict=False)]))
    assert passes[0] == passes[1]


def test_skipped_images_are_not_read(cfg: CfgNode, tmp_path: Path) -> None:
    cfg.merge_from_list(["DATALOADER.NUM_WORKERS", 0, "DATALOADER.ASPECT_RATIO_GROUPING", False])
    stream = start(cfg)
    iter_ = iter(stream)
    seen = {sample["image_id"] for _ in range(3) for sample in next(iter_)}
    state = random_state()
    for image_id in seen:
        (tmp_path / f"{image_id}.png").unlink()
    seed_all_rng(7)
    resumed = TrainingStream(cfg)
    resumed.resume_from(3, at_start=stream.random_state_at_start, now=state)
    assert not {sample["image_id"] for sample in next(iter(resumed))} & seen


def test_random_states_come_back() -> None:
    def draws() -> list[float]:
        return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(1).item()]

    np.random.randn()  # keeps the other of a pair of normal numbers
    state = random_state()
    expected = draws()
    set_random_state(state)
    assert draws() == expected
    set_random_state(state)
    with undisturbed():
        draws()
    assert draws() == expected
