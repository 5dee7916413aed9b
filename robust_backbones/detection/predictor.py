"""Trained detectors, read from their files, and predictions for image files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data.catalog import Metadata
from detectron2.modeling import build_model
from detectron2.structures import Instances
from torch import nn

from robust_backbones.checkpoint.untrusted import read_file
from robust_backbones.data.annotations_images import check_image
from robust_backbones.detection.checkpoint import BackboneCheckpointer
from robust_backbones.detection.config import load_config, usable
from robust_backbones.detection.data_stream import undisturbed
from robust_backbones.detection.datasets import categories, class_names, match_classes, number_of_classes
from robust_backbones.detection.fast.frozen_norm import keep_scales
from robust_backbones.detection.fast.rcnn import BatchedRCNN
from robust_backbones.detection.roi_heads import use_float32_boxes
from robust_backbones.errors import InputError, plural


def build_detector(cfg: CfgNode) -> nn.Module:
    """Detectron2's model, with boxes in float32 where features are not, MODEL.FAST_ROI_ALIGN and MODEL.FAST_STEP."""
    if cfg.MODEL.FAST_STEP:
        cfg = cfg.clone()
        cfg.defrost()
        cfg.MODEL.META_ARCHITECTURE = BatchedRCNN.__name__
    with usable("detector"):
        model: nn.Module = build_model(cfg)
    if cfg.MODEL.FAST_STEP:
        keep_scales(model)
    use_float32_boxes(model, fast=cfg.MODEL.FAST_ROI_ALIGN)
    return model


@dataclass(frozen=True)
class TrainedDetector:
    """A trained detector, and what its file says about it."""

    model: nn.Module
    """In eval mode, on MODEL.DEVICE."""
    categories: list[dict[str, Any]]
    """Its classes in COCO's format, in the order of its outputs."""
    backbone: dict[str, Any]
    """As in records."""
    threat_model: str | None
    """The backbone's; None if its source did not say."""

    def match_classes(self, datasets: Sequence[str]) -> None:
        """As ``datasets.match_classes``, with the names of its own classes; if its file has none, only their number is
        checked."""
        names = [category["name"] for category in self.categories]
        if names != nameless(len(names)):
            match_classes(datasets, names)
            return
        for dataset in datasets:
            if (count := len(class_names(dataset))) != len(names):
                raise InputError(
                    f"{dataset} has {plural(count, 'class')} but the detector {len(names)}, whose names its file does "
                    "not say: evaluate it on a set of its own classes"
                )


def nameless(count: int) -> list[str]:
    """Names for the classes of a detector whose file does not say them."""
    return [f"class {number}" for number in range(count)]


def load_detector(cfg: CfgNode, weights: str | Path) -> TrainedDetector:
    """The detector in a .pth file of a training run; InputError if the file lacks a tensor of this configuration."""
    with torch.random.fork_rng(devices=[]):  # of the weights that are then replaced
        model = build_detector(cfg).eval()
    checkpointer = BackboneCheckpointer(model, cfg=cfg, whole_detector=True)
    content = checkpointer.load(str(weights))
    return TrainedDetector(checkpointer.model, categories_of(content, cfg, weights), *checkpointer.provenance())


def check_weights(cfg: CfgNode, *, resume: bool, whole_detector: bool) -> None:
    """Load the run's weights into a throwaway detector: a wrong file is refused before anything is written."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    checkpointer = BackboneCheckpointer(build_detector(cfg), cfg.OUTPUT_DIR, cfg=cfg, whole_detector=whole_detector)
    content = checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume and not whole_detector)
    if whole_detector:
        known = categories_of(content, cfg, cfg.MODEL.WEIGHTS)
        TrainedDetector(checkpointer.model, known, {}, None).match_classes(cfg.DATASETS.TEST)


def classes_in(weights: str) -> int:
    """How many classes a detector's file names; 0 if it names none or is not a detector, which loading it will
    report."""
    try:
        content = read_file(Path(weights))
    except InputError:
        return 0
    named = content.get("categories") if isinstance(content, dict) else None
    return len(named) if isinstance(named, list) else 0


def read_run(
    run: str | Path,
    *,
    config_file: str | Path | None = None,
    device: str | None = None,
    allow_unverified: bool = False,
) -> tuple[CfgNode, Path]:
    """The configuration of a training run, with its present OUTPUT_DIR and ``device``, and its weights.

    Arguments as in ``Predictor``; InputError if there is no configuration or no weights.
    """
    run = Path(run)
    if not run.exists():
        raise InputError(f"no run at {run}: give the OUTPUT_DIR of a training run, or a .pth file in it")
    folder, weights = (run, run / "model_final.pth") if run.is_dir() else (run.parent, run)
    if not (config_file or (folder / "config.yaml").is_file()):
        raise InputError(
            f"no config.yaml in {folder}: give the OUTPUT_DIR of a training run, or a .pth file in it, or the "
            "detector's configuration (--config-file)"
        )
    if not weights.is_file():
        raise InputError(f"no model_final.pth in {folder}: finish its training, or give another .pth file in it")
    # Mixed precision is for training; in float16 the configuration would be refused on a CPU.
    overrides = ["OUTPUT_DIR", folder, "SOLVER.AMP.ENABLED", False]
    overrides += ["MODEL.DEVICE", device] if device else []
    overrides += ["MODEL.ALLOW_UNVERIFIED", True] if allow_unverified else []
    return load_config(config_file or folder / "config.yaml", overrides), weights


class Predictor:
    """Calls a detector on one image file at a time, read and resized as in its run's evaluation.

    ``categories`` are its classes in COCO's format, ``metadata`` the same for ``visualize.draw_objects``.

    Args:
        run: The OUTPUT_DIR of a training run (its model_final.pth is used), or a .pth or .pkl file.
        config_file: The detector's configuration; by default config.yaml in the folder of its file.
        device: ``cpu`` or ``cuda``; by default the run's, or the CPU if there is no GPU.
        allow_unverified: Accept a detector of plain Detectron2, which does not say what its backbone is.

    Raises:
        InputError: there is no configuration or no weights, or they do not fit each other.
    """

    def __init__(
        self,
        run: str | Path,
        *,
        config_file: str | Path | None = None,
        device: str | None = None,
        allow_unverified: bool = False,
    ) -> None:
        self.cfg, weights = read_run(run, config_file=config_file, device=device, allow_unverified=allow_unverified)
        detector = load_detector(self.cfg, weights)
        self.model, self.categories = detector.model, detector.categories
        self.class_names = [category["name"] for category in self.categories]
        self.metadata = Metadata(thing_classes=self.class_names)
        self._mapper = DatasetMapper(self.cfg, is_train=False)

    @undisturbed()  # Detectron2's mapper draws a size where there is one
    @torch.no_grad()
    def __call__(self, image: str | Path) -> Instances:
        """The detections in an image file, on the CPU and in pixels of the image as read by ``visualize.read_rgb``.

        Every detection that scores at least MODEL.ROI_HEADS.SCORE_THRESH_TEST: ``pred_boxes``, ``scores``,
        ``pred_classes`` (from 0, as ``categories``) and, from a Mask R-CNN, ``pred_masks`` (N, H, W).
        """
        # One image a call: in a batch, the padding to a common size would change the results.
        check_image(image)
        (output,) = self.model([self._mapper({"file_name": str(image)})])
        return output["instances"].to("cpu")


def categories_of(content: Mapping[str, Any], cfg: CfgNode, path: str | Path) -> list[dict[str, Any]]:
    """A detector's classes in the order of its outputs, in COCO's format: ``[{"id": 1, "name": "person"}, ...]``.

    They come from ``content``, the file at ``path`` without its weights; else from what Detectron2 knows about the data
    sets that it was trained or evaluated on; else they have no names and count from 1.

    Raises:
        InputError: the file's categories are invalid, or differ in number from the detector's.
    """
    count = number_of_classes(cfg)
    if "categories" in content:
        try:
            rows = [{"id": row["id"], "name": row["name"]} for row in content["categories"]]
        except (TypeError, LookupError):
            rows = [{}]
        if not all(isinstance(row.get("id"), int) and isinstance(row.get("name"), str) for row in rows):
            raise InputError(f'{path} holds "categories" that are not COCO\'s: give a .pth file of a training run')
        if len(rows) != count or len({row["id"] for row in rows}) != count:
            raise InputError(
                f"{path} names {plural(len(rows), 'class')}, but its detector tells {count} apart: "
                "give a .pth file of the same run as its config.yaml"
            )
        return rows
    for dataset in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        if len(known := categories(dataset)) == count:
            return known
    return [{"id": number, "name": name} for number, name in enumerate(nameless(count), 1)]
