"""What several trained detectors find in the same test images, in one picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog

from robust_backbones.detection.datasets import check_datasets, register_datasets
from robust_backbones.detection.predictor import Predictor
from robust_backbones.detection.visualize import draw_rows, objects_in


def draw_side_by_side(
    runs: Mapping[str, Path], output: Path, *, images: int, min_score: float = 0.5, device: str = "cpu"
) -> None:
    """Write a picture with a row an image of the first run's test set: ground truth, then each detector's objects.

    Args:
        runs: detector's name -> OUTPUT_DIR of its training, with model_final.pth.
        output: a ``.png`` or ``.jpg`` file.
        images: the first so many annotated ones.
        min_score: detections below it are left out.

    Raises:
        InputError: a run has no weights, or the data set is not there.
    """
    predictors = {name: Predictor(folder, device=device) for name, folder in runs.items()}
    cfg = next(iter(predictors.values())).cfg
    register_datasets(cfg)
    check_datasets(cfg, eval_only=True)
    dataset = cfg.DATASETS.TEST[0]
    rows = {}
    for item in [item for item in DatasetCatalog.get(dataset) if item["annotations"]][:images]:
        file = item["file_name"]
        found = {name: objects_in(find(Path(file)), min_score=min_score) for name, find in predictors.items()}
        rows[file] = {"ground truth": item["annotations"], **found}
    draw_rows(rows, output, MetadataCatalog.get(dataset))
