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
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog, build_detection_train_loader
from detectron2.data import transforms as T
from detectron2.structures import PolygonMasks
from detectron2.utils.env import seed_all_rng
from pycocotools import mask as mask_tools

from robust_backbones.detection.config import load_config
from robust_backbones.detection.data_stream import TrainingStream, random_state, set_random_state, undisturbed
from robust_backbones.detection.datasets import register_datasets
from robust_backbones.errors import InputError
from tests.detection.conftest import SHAPES_CONFIG

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


@pytest.mark.parametrize("jitter", [(), pytest.param((0.1, 2.0, 48), marks=SLOW)])
@pytest.mark.parametrize(
    ("grouped", "workers"),
    [(True, 0), (False, 0), (True, 2), *(pytest.param(*x, marks=SLOW) for x in [(True, 1), (False, 1), (False, 2)])],
)
def test_a_resumed_stream_is_the_unbroken_one(
    cfg: CfgNode, workers: int, grouped: bool, jitter: tuple[float, ...]
) -> None:
    cfg.merge_from_list(["DATALOADER.NUM_WORKERS", workers, "DATALOADER.ASPECT_RATIO_GROUPING", grouped])
    cfg.INPUT.SCALE_JITTER = jitter
    unbroken = start(cfg)
    batches, states = [], []
    for batch in unbroken:
        torch.rand(5)  # as training draws, to sample proposals
        batches.append(batch)
        states.append(random_state())
        if len(batches) == 12:
            break
    shapes = {tuple(sample["image"].shape) for batch in batches for sample in batch}
    assert len(shapes) > 5 or (jitter and shapes == {(3, 48, 48)})

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


@pytest.mark.parametrize("masks", ["polygon", "run lengths", "none"])
def test_large_scale_jitter_is_detectron2s(masks: str, shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own transforms, as its new baselines list them, on the same random numbers; also past skipped images."""
    if masks == "polygon":
        pytest.importorskip("shapely")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(shapes))
    overrides = ["INPUT.SCALE_JITTER", (0.1, 2.0, 96), "MODEL.MASK_ON", masks != "none", "DATALOADER.NUM_WORKERS", 0]
    overrides += ["DATASETS.TRAIN", ("shapes_train",), "SOLVER.IMS_PER_BATCH", 4]
    overrides += ["INPUT.MASK_FORMAT", "bitmask" if masks == "run lengths" else "polygon"]
    cfg = load_config(SHAPES_CONFIG, overrides, classes=4)
    register_datasets(cfg)
    items = DatasetCatalog.get("shapes_train")
    if masks == "run lengths":
        for item in items:
            for thing in item["annotations"]:
                rows = mask_tools.frPyObjects(thing["segmentation"], item["height"], item["width"])
                thing["segmentation"] = mask_tools.merge(rows)
    theirs = DatasetMapper(
        is_train=True,
        augmentations=[
            T.ResizeScale(min_scale=0.1, max_scale=2.0, target_height=96, target_width=96),
            T.FixedSizeCrop(crop_size=(96, 96)),
            T.RandomFlip(horizontal=True),
        ],
        image_format="RGB",
        use_instance_mask=masks != "none",
        instance_mask_format="bitmask" if masks == "run lengths" else "polygon",
        recompute_boxes=masks != "none",
    )
    ours = TrainingStream(cfg)._mapper
    sizes = set()
    for seed, item in enumerate(items * 2):
        found = []
        for mapper in (ours, theirs):
            np.random.seed(seed)
            found.append(mapper(item))
        one, other = found
        assert torch.equal(one["image"], other["image"])
        assert one["image"].shape == (3, 96, 96)
        assert torch.equal(one["instances"].gt_boxes.tensor, other["instances"].gt_boxes.tensor)
        sizes |= {box.round().tolist()[2] - box.round().tolist()[0] for box in one["instances"].gt_boxes.tensor}
        if masks == "run lengths":
            assert torch.equal(one["instances"].gt_masks.tensor, other["instances"].gt_masks.tensor)
        # A stream that skips the image draws as many random numbers.
        np.random.seed(seed)
        ours.skipped_batches, ours.seen = 1, 0
        ours(item)
        state = np.random.rand()
        ours.skipped_batches = 0
        np.random.seed(seed)
        theirs(item)
        assert np.random.rand() == state
    assert max(sizes) > 3 * min(sizes)


def test_its_recipe_has_detectron2s_values() -> None:
    """Those of configs/new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ.py in its repository (2a36564)."""
    cfg = load_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_100ep_LSJ.yaml", ["MODEL.DEVICE", "meta"])
    solver, model = cfg.SOLVER, cfg.MODEL
    assert (solver.MAX_ITER, solver.STEPS, solver.IMS_PER_BATCH) == (184_375, (163_889, 177_546), 64)
    assert (solver.BASE_LR, solver.WEIGHT_DECAY, solver.WEIGHT_DECAY_NORM, solver.MOMENTUM) == (0.1, 4e-5, 0.0, 0.9)
    assert (solver.WARMUP_ITERS, solver.WARMUP_FACTOR, solver.GAMMA, solver.AMP.ENABLED) == (500, 0.067, 0.1, True)
    assert cfg.INPUT.SCALE_JITTER == (0.1, 2.0, 1024)
    assert (model.BACKBONE.FREEZE_AT, model.RESNETS.NORM, model.FPN.NORM) == (0, "SyncBN", "SyncBN")
    assert model.RPN.CONV_DIMS == [-1, -1]
    box = model.ROI_BOX_HEAD
    assert (box.NUM_CONV, box.CONV_DIM, box.NUM_FC, box.FC_DIM, box.NORM) == (4, 256, 1, 1024, "naiveSyncBN_N")
    assert model.ROI_MASK_HEAD.NORM == "naiveSyncBN_N"
    for wrong in ((0.1, 2.0), (2.0, 0.1, 64), (0.1, 2.0, 0)):
        with pytest.raises(InputError, match="SCALE_JITTER"):
            load_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml", ["INPUT.SCALE_JITTER", wrong])
    with pytest.raises(InputError, match=r"give INPUT\.CROP\.ENABLED False"):
        load_config(
            "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_100ep_LSJ.yaml",
            ["INPUT.CROP.ENABLED", True, "MODEL.DEVICE", "meta"],
        )


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


def test_an_image_with_a_crowd_keeps_its_polygons(shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """COCO's crowds are run lengths, which training drops: the masks beside them are those that Detectron2 makes."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(shapes))
    cfg = load_config(SHAPES_CONFIG, ["DATALOADER.NUM_WORKERS", 0, "SOLVER.IMS_PER_BATCH", 1], classes=4)
    register_datasets(cfg)
    item = DatasetCatalog.get("shapes_train")[0]
    first = item["annotations"][0]
    rows = mask_tools.frPyObjects(first["segmentation"], item["height"], item["width"])
    crowd = {**first, "iscrowd": 1, "segmentation": mask_tools.merge(rows)}
    cfg.DATASETS.TRAIN = (NAME,)
    DatasetCatalog.register(NAME, lambda: [{**item, "annotations": [*item["annotations"], crowd]}])
    try:
        sample = next(iter(TrainingStream(cfg)))[0]
    finally:
        DatasetCatalog.remove(NAME)
        MetadataCatalog.remove(NAME)
    assert len(sample["instances"]) == len(item["annotations"])
    assert isinstance(sample["instances"].gt_masks, PolygonMasks)
