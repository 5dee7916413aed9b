"""Ground truth and detections of several detectors side by side on the same images."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils.visualizer import ColorMode, Visualizer
from numpy.typing import NDArray

from robust_backbones.errors import InputError
from robust_backbones.records import atomic_path


def draw_comparison(
    dataset_name: str, results: Mapping[str, Path], output: Path, *, images: int = 4, min_score: float = 0.5
) -> None:
    """Write a picture with a row an image: ground truth, then each detector's boxes and masks.

    Args:
        dataset_name: a registered data set; its first ``images`` annotated images are drawn.
        results: detector's name -> the ``coco_instances_results.json`` that its evaluation wrote.
        output: a ``.png`` or ``.jpg`` file.
        min_score: detections below it are left out.
    """
    metadata = MetadataCatalog.get(dataset_name)
    items: list[dict[str, Any]] = DatasetCatalog.get(dataset_name)
    detections = {name: json.loads(path.read_text()) for name, path in results.items()}
    rows = []
    for item in [item for item in items if item["annotations"]][:images]:
        found = {
            name: [
                {
                    "category_id": metadata.thing_dataset_id_to_contiguous_id[row["category_id"]],
                    "bbox": row["bbox"],
                    "bbox_mode": BoxMode.XYWH_ABS,
                    **({"segmentation": row["segmentation"]} if "segmentation" in row else {}),
                }
                for row in detector
                if row["image_id"] == item["image_id"] and row["score"] >= min_score
            ]
            for name, detector in detections.items()
        }
        columns = {"ground truth": item["annotations"], **found}
        rows.append(
            np.hstack([_panel(item["file_name"], title, objects, metadata) for title, objects in columns.items()])
        )
    width = max(row.shape[1] for row in rows)
    padded = [np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0))) for row in rows]
    with atomic_path(output) as temporary:
        temporary.write_bytes(cv2.imencode(output.suffix, np.vstack(padded))[1].tobytes())


def _panel(file_name: str, title: str, objects: list[dict[str, Any]], metadata: Any) -> NDArray[np.uint8]:
    """One image with its objects under a title; BGR, about 400 pixels wide."""
    image = cv2.imread(file_name)
    if image is None:
        raise InputError(f"cannot read the image {file_name}: mend or remove it")
    # In this mode the colour tells the class, where the data set has colours.
    visualizer = Visualizer(image[:, :, ::-1], metadata, 400 / image.shape[1], ColorMode.SEGMENTATION)
    drawn = visualizer.draw_dataset_dict({"annotations": objects})
    strip = np.full((28, drawn.get_image().shape[1], 3), 255, np.uint8)
    cv2.putText(strip, title, (8, 20), cv2.FONT_HERSHEY_SIMPLEX, 0.6, (0, 0, 0), 1, cv2.LINE_AA)
    return np.vstack([strip, drawn.get_image()[:, :, ::-1]])
