"""Detectron2's stream of training batches, continued by a resumed run with the same images and flips.

Detectron2 itself restarts its shuffling and augmentation, so its resumed runs differ from uninterrupted ones.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import detectron2.utils.comm as comm
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, build_detection_train_loader
from detectron2.data.detection_utils import SizeMismatchError
from detectron2.data.transforms import (
    CropTransform,
    FixedSizeCrop,
    HFlipTransform,
    NoOpTransform,
    PadTransform,
    RandomFlip,
    ResizeScale,
    ResizeTransform,
    TransformList,
    VFlipTransform,
)
from numpy.typing import NDArray
from torch.utils.data import get_worker_info

from robust_backbones.errors import InputError, MissingPackageError
from robust_backbones.runs.signals import stop_for_parent_only


class TrainingStream:
    """Batches for ``cfg``: lists of Detectron2's dictionaries, one list per iteration of this process.

    From its start it equals ``build_detection_train_loader(cfg)``, random number by random number.
    """

    def __init__(self, cfg: CfgNode) -> None:
        self._mapper = _SkippingMapper(
            MaskMapper(cfg, True),
            batch_size=cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size(),
            grouped=cfg.DATALOADER.ASPECT_RATIO_GROUPING,
        )
        self._loader = build_detection_train_loader(cfg, mapper=self._mapper)
        self.random_state_at_start: dict[str, Any] = {}
        """What ``resume_from`` needs; available once the first batch has been drawn."""
        self._random_state_now: dict[str, Any] = {}

    def resume_from(self, iteration: int, *, at_start: dict[str, Any], now: dict[str, Any]) -> None:
        """Begin with the batch of ``iteration`` instead, as if all earlier batches had been drawn.

        ``at_start`` is the first run's ``random_state_at_start``, ``now`` the random state of the process when
        ``iteration`` was about to begin. Skipped images are not read: each takes less than a millisecond, in the
        loader's workers.
        """
        self._mapper.skipped_batches = iteration
        self.random_state_at_start, self._random_state_now = at_start, now

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        # What an earlier pass has left: its count, and images that wait for others of their aspect ratio.
        self._mapper.seen = 0
        for bucket in getattr(self._loader, "_buckets", ()):
            bucket.clear()
        if skipped := self._mapper.skipped_batches:
            set_random_state(self.random_state_at_start)
        else:
            self.random_state_at_start = random_state()
        batches = iter(self._loader)
        if skipped:
            for _ in range(skipped):
                next(batches)
            set_random_state(self._random_state_now)
        for batch in batches:
            yield [self._mapper.read(sample) if isinstance(sample, _Skipped) else sample for sample in batch]


class MaskMapper(DatasetMapper):
    """Detectron2's, but it also accepts run-length masks, with any INPUT.MASK_FORMAT.

    In training it has large-scale jitter, like configs/new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ.py of Detectron2.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        found: dict[str, Any] = super().from_config(cfg, is_train)
        if is_train and cfg.INPUT.SCALE_JITTER:
            if cfg.MODEL.MASK_ON and cfg.INPUT.MASK_FORMAT == "polygon":
                _check_shapely()
            least, greatest, side = cfg.INPUT.SCALE_JITTER
            jitter = [ResizeScale(least, greatest, side, side), FixedSizeCrop((side, side))]
            flips = [one for one in found["augmentations"] if isinstance(one, RandomFlip)]
            found |= {"augmentations": [*jitter, *flips], "recompute_boxes": cfg.MODEL.MASK_ON}
        return found

    def _transform_annotations(self, dataset_dict: dict[str, Any], transforms: Any, image_shape: Any) -> None:
        kept = self.instance_mask_format  # type: ignore[has-type]
        # COCO's crowds are run lengths beside objects of polygons; training drops them.
        learnt = [thing for thing in dataset_dict["annotations"] if not thing.get("iscrowd", 0)]
        if any(isinstance(thing.get("segmentation"), dict) for thing in learnt):
            self.instance_mask_format = "bitmask"
        super()._transform_annotations(dataset_dict, transforms, image_shape)
        self.instance_mask_format = kept


def _check_shapely() -> None:
    try:
        import shapely  # noqa: F401
    except ImportError:
        raise MissingPackageError("cropped polygons (INPUT.SCALE_JITTER) need shapely: pip install shapely") from None


class WorkerMapper:
    """A mapper whose worker processes leave stop signals to the main process."""

    def __init__(self, mapper: DatasetMapper) -> None:
        self.mapper = mapper

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        if get_worker_info() is not None:
            stop_for_parent_only()
        try:
            return self.mapper(item)
        except (OSError, SyntaxError, ValueError, SizeMismatchError) as error:
            raise InputError(f"cannot read {item['file_name']}: {error}") from None


class _Skipped(dict[str, Any]):
    """A data set's dictionary whose image was not read; ``random_state`` is NumPy's at its augmentation."""

    random_state: Any


class _SkippingMapper(WorkerMapper):
    """A mapper that draws its first random numbers without reading the images they are for.

    Every loader worker has its own copy, and knows which of the stream's samples it gets.
    """

    def __init__(self, mapper: DatasetMapper, *, batch_size: int, grouped: bool) -> None:
        super().__init__(mapper)
        self.batch_size, self.grouped = batch_size, grouped
        self.skipped_batches = self.seen = 0

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        skipped = self._batch() < self.skipped_batches
        self.seen += 1
        if not skipped:
            return super().__call__(item)
        sample = _Skipped(item)
        sample.random_state = np.random.get_state()
        self.mapper.augmentations(_ShapeOnly(item["height"], item["width"]))
        return sample

    def read(self, sample: _Skipped) -> dict[str, Any]:
        """The sample as it would have been, because grouping by aspect ratio keeps some images for a later batch."""
        state = np.random.get_state()
        np.random.set_state(sample.random_state)
        try:
            return self.mapper(dict(sample))
        finally:
            np.random.set_state(state)

    def _batch(self) -> int:
        """The batch that this sample belongs to; approximate if grouping by aspect ratio may delay it."""
        worker = get_worker_info()
        workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
        if self.grouped:  # workers hand over sample by sample, in turn
            return (self.seen * workers + number) // self.batch_size
        return self.seen // self.batch_size * workers + number  # batch by batch


class _ShapeOnly:
    """Replaces Detectron2's AugInput: augmentations only need and change an image's shape, at no cost."""

    def __init__(self, height: int, width: int) -> None:
        self.image = _blank(height, width)

    def transform(self, transform: Any) -> None:
        if isinstance(transform, TransformList):
            for one in transform.transforms:
                self.transform(one)
        elif isinstance(transform, ResizeTransform):
            self.image = _blank(transform.new_h, transform.new_w)
        elif isinstance(transform, CropTransform):
            height, width = self.image.shape[:2]
            self.image = _blank(min(transform.h, height - transform.y0), min(transform.w, width - transform.x0))
        elif isinstance(transform, PadTransform):
            height, width = self.image.shape[:2]
            self.image = _blank(transform.y0 + height + transform.y1, transform.x0 + width + transform.x1)
        elif not isinstance(transform, (HFlipTransform, VFlipTransform, NoOpTransform)):
            self.image = transform.apply_image(np.ascontiguousarray(self.image))


def _blank(height: int, width: int) -> NDArray[np.uint8]:
    return np.broadcast_to(np.uint8(0), (height, width, 3))


def random_state() -> dict[str, Any]:
    """Python's, NumPy's and PyTorch's global generators, as plain values and tensors that a checkpoint can hold."""
    numpy: dict[str, Any] = np.random.get_state(legacy=False)
    version, values, gauss = random.getstate()
    return {
        "python": [version, list(values), gauss],
        "numpy": {
            **numpy,
            "state": {**numpy["state"], "key": torch.from_numpy(numpy["state"]["key"].astype(np.int64))},
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Undo every draw since ``random_state`` gave ``state``."""
    version, values, gauss = state["python"]
    random.setstate((version, tuple(values), gauss))
    numpy = state["numpy"]
    np.random.set_state({**numpy, "state": {**numpy["state"], "key": numpy["state"]["key"].numpy().astype(np.uint32)}})
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextmanager
def undisturbed() -> Iterator[None]:
    """Restore the global generators afterwards, so that the block does not affect training."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)
