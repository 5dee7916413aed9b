"""A data set without a download: coloured shapes on cluttered backgrounds, for classification and detection."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from robust_backbones.errors import InputError
from robust_backbones.runs.files import write_json

CLASSES = ("circle", "cross", "square", "triangle")

Image = NDArray[np.uint8]
Polygon = NDArray[np.float64]
"""Shape (vertices, 2), x and y in pixels."""


@dataclass(frozen=True)
class ShapesConfig:
    """Numbers and sizes of images; the same config gives the same files."""

    train_images_per_class: int = 400
    val_images_per_class: int = 50
    train_scenes: int = 600
    val_scenes: int = 80
    image_size: int = 64
    """Side of a classification image, which shows one shape."""
    scene_size: int = 128
    """Side of a detection image, which shows one to four shapes that do not overlap."""
    seed: int = 0


def write_shapes(root: Path, config: ShapesConfig = ShapesConfig()) -> None:
    """Write ``root/shapes_classification`` (ImageFolder) and ``root/shapes`` (COCO format, with polygons).

    Both have a train and a val part. An existing set is kept; sets are written atomically.

    Raises:
        InputError: ``root`` has shapes of another config.
    """
    for name, writer in (("shapes_classification", _write_classification), ("shapes", _write_detection)):
        final = root / name
        if not final.exists():
            temporary = root / f".{name}.{os.getpid()}.tmp"
            try:
                writer(temporary, config)
                write_json(temporary / "config.json", asdict(config))
                temporary.rename(final)
            except OSError:
                if not final.exists():
                    raise  # else another process was sooner
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        if json.loads((final / "config.json").read_text()) != asdict(config):
            raise InputError(f"{final} was made with other settings: choose another folder, or remove it")


def _write_classification(root: Path, config: ShapesConfig) -> None:
    for part, count in (("train", config.train_images_per_class), ("val", config.val_images_per_class)):
        for label, name in enumerate(CLASSES):
            folder = root / part / name
            folder.mkdir(parents=True)
            for index in range(count):
                rng = np.random.default_rng([config.seed, part == "val", label, index])
                image = _background(config.image_size, rng)
                _draw(image, label, _place(label, config.image_size, config.image_size, rng), rng)
                cv2.imwrite(str(folder / f"{index:05d}.jpg"), image)


def _write_detection(root: Path, config: ShapesConfig) -> None:
    for part, count in (("train", config.train_scenes), ("val", config.val_scenes)):
        (root / part).mkdir(parents=True)
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for index in range(1, count + 1):
            rng = np.random.default_rng([config.seed, 2 + (part == "val"), index])
            scene, objects = _scene(config.scene_size, rng)
            file_name = f"{index:06d}.jpg"
            cv2.imwrite(str(root / part / file_name), scene)
            images.append(
                {"id": index, "file_name": file_name, "height": config.scene_size, "width": config.scene_size}
            )
            annotations += [
                {"id": len(annotations) + 1 + offset, "image_id": index, **_annotation(label, polygon)}
                for offset, (label, polygon) in enumerate(objects)
            ]
        categories = [{"id": label + 1, "name": name} for label, name in enumerate(CLASSES)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        write_json(root / "annotations" / f"instances_{part}.json", content)


def _scene(size: int, rng: Generator) -> tuple[Image, list[tuple[int, Polygon]]]:
    """A detection image and its objects as (class index, polygon); bounding boxes never overlap."""
    image = _background(size, rng)
    objects: list[tuple[int, Polygon]] = []
    for _ in range(rng.integers(1, 5)):
        label = int(rng.integers(len(CLASSES)))
        for _ in range(20):  # a place may be taken; after some tries the scene is full enough
            polygon = _place(label, size, 64, rng)
            if not any(_boxes_touch(polygon, other) for _, other in objects):
                _draw(image, label, polygon, rng)
                objects.append((label, polygon))
                break
    return image, objects


def _annotation(label: int, polygon: Polygon) -> dict[str, Any]:
    """COCO's fields of one object: x, y, width, height in pixels; area by the shoelace formula."""
    (x0, y0), (x1, y1) = polygon.min(0), polygon.max(0)
    x, y = polygon.T
    area = abs(float(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1)))) / 2
    return {
        "category_id": label + 1,
        "bbox": [round(float(value), 2) for value in (x0, y0, x1 - x0, y1 - y0)],
        "segmentation": [[round(float(value), 2) for value in polygon.ravel()]],
        "area": round(area, 2),
        "iscrowd": 0,
    }


def _boxes_touch(a: Polygon, b: Polygon) -> bool:
    return bool((a.min(0) <= b.max(0)).all() and (b.min(0) <= a.max(0)).all())


def _place(label: int, canvas: int, reference: int, rng: Generator) -> Polygon:
    """A shape of the class, randomly rotated and scaled (0.35 to 0.8 of ``reference``), completely on the canvas."""
    angle = rng.uniform(0, 2 * np.pi)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    polygon = _OUTLINES[CLASSES[label]] @ rotation.T
    polygon *= rng.uniform(0.35, 0.8) * reference / np.ptp(polygon, axis=0).max()
    low, high = -polygon.min(0) + 1, canvas - 2 - polygon.max(0)
    return polygon + rng.uniform(low, high)


def _regular(vertices: int) -> Polygon:
    angles = 2 * np.pi * np.arange(vertices) / vertices
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


_OUTLINES = {
    "circle": _regular(32),
    "cross": np.array(
        [(1, 3), (1, 1), (3, 1), (3, -1), (1, -1), (1, -3), (-1, -3), (-1, -1), (-3, -1), (-3, 1), (-1, 1), (-1, 3)],
        dtype=float,
    ),
    "square": _regular(4),
    "triangle": _regular(3),
}


def _background(size: int, rng: Generator) -> Image:
    """Soft blobs of dull colour under pixel noise."""
    blobs = rng.uniform(60, 190, (4, 4, 3)).astype(np.float32)
    image = cv2.resize(blobs, (size, size), interpolation=cv2.INTER_CUBIC) + rng.normal(0, 8, (size, size, 3))
    return image.clip(0, 255).astype(np.uint8)


def _draw(image: Image, label: int, polygon: Polygon, rng: Generator) -> None:
    """Fill the polygon with a bright colour whose hue is correlated with the class, like colours of real objects."""
    hue = (180 * label / len(CLASSES) + rng.normal(0, 15)) % 180  # OpenCV counts hues from 0 to 180
    hsv = np.array([[[hue, rng.uniform(150, 255), rng.uniform(180, 255)]]])
    color = cv2.cvtColor(hsv.astype(np.uint8), cv2.COLOR_HSV2BGR)[0, 0]
    mask = np.zeros(image.shape[:2], np.uint8)
    cv2.fillPoly(mask, [np.round(polygon).astype(np.int32)], 1)
    inside = mask.astype(bool)
    image[inside] = (color + rng.normal(0, 8, (int(inside.sum()), 3))).clip(0, 255)
