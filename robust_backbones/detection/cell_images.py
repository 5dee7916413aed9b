"""The images of cells: the data set, or some of its images, and domains (other images of the same categories)."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from detectron2.data import DatasetCatalog, MetadataCatalog

from robust_backbones.data.decoding import visible
from robust_backbones.detection.datasets import evaluator_kind
from robust_backbones.detection.evaluators import ground_truth
from robust_backbones.detection.standard_format import register
from robust_backbones.errors import InputError
from robust_backbones.runs.files import write_text


@dataclass(frozen=True)
class ImageChoice:
    """Which images of a data set are evaluated, and the seed of all random numbers."""

    limit: int | None = None
    """Number of annotated images (of each domain too); a larger limit takes the same ones and more. Classes that they
    do not show count as AP 0 by VOC 2007's metric, leave VOC 2012's undefined if they are detected, and do not count by
    COCO's nor in your own sets in VOC's format."""
    seed: int = 0
    """Determines the corruptions' random numbers and, with a limit, which images are taken."""

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise InputError(f"a limit of {self.limit} leaves no image: give 1 or more")

    def items(self, dataset: str) -> list[dict[str, Any]]:
        """The chosen images of a registered set, in its order."""
        items: list[dict[str, Any]] = DatasetCatalog.get(dataset)
        if self.limit is None:
            return items
        shown = [any(not a.get("iscrowd", 0) for a in item["annotations"]) for item in items]
        annotated = [index for index, shows in enumerate(shown) if shows]
        order = torch.randperm(len(annotated), generator=torch.Generator().manual_seed(self.seed))
        return [items[annotated[place]] for place in sorted(order[: self.limit].tolist())]

    def fingerprint(self, dataset: str) -> str:
        """SHA-256 of the chosen images' names and annotations."""
        items = [{**item, "file_name": Path(item["file_name"]).name} for item in self.items(dataset)]
        return hashlib.sha256(json.dumps(items, default=str).encode()).hexdigest()

    def content(self, dataset: str) -> tuple[str, str]:
        """A row for DATASETS.CONTENT: SHA-256 of the chosen images' files, and of which objects AP ignores."""
        digest, ids = hashlib.sha256(), set()
        for item in self.items(dataset):
            ids.add(item["image_id"])
            digest.update(hashlib.sha256(Path(item["file_name"]).read_bytes()).digest())
        rows = ground_truth(dataset).dataset.get("annotations", [])
        ignored = sorted(
            [str(row["image_id"]), *row["bbox"]] for row in rows if row.get("ignore") and row["image_id"] in ids
        )
        digest.update(json.dumps(ignored).encode())
        return dataset, digest.hexdigest()


def take_images(dataset: str, choice: ImageChoice, folder: Path) -> str:
    """Register the chosen images as a separate set, so that evaluators see only these; returns its name.

    ``folder`` gets its annotation file (COCO) or list of images (VOC). Without a limit it is the set itself.
    """
    if choice.limit is None:
        return dataset
    items, metadata = choice.items(dataset), MetadataCatalog.get(dataset).as_dict()
    name = f"{dataset}_limited"
    path = folder.resolve() / name
    if "json_file" in metadata:
        content = json.loads(Path(metadata["json_file"]).read_bytes())
        ids = {item["image_id"] for item in items}
        content["images"] = [image for image in content["images"] if image["id"] in ids]
        content["annotations"] = [row for row in content["annotations"] if row["image_id"] in ids]
        metadata["json_file"] = f"{path}.json"
        write_text(Path(metadata["json_file"]), json.dumps(content))
    elif evaluator_kind(dataset) == "pascal_voc":
        metadata["split"] = str(path)  # joined to VOC's folder of lists, an absolute path stays alone
        write_text(Path(f"{path}.txt"), "".join(f"{item['image_id']}\n" for item in items))
    register(name, lambda: items, metadata)
    return name


def find_domains(folder: Path) -> list[tuple[str, str, str]]:
    """Rows of (``domain-NAME``, annotation file, image folder) for each folder NAME, sorted.

    The annotation file is the only JSON file in NAME/annotations (as in COCO-O) or NAME; the image folder is NAME or
    the folder in it that contains the first image. InputError if they are missing.
    """
    if not folder.is_dir():
        raise InputError(f"no folder of domains at {folder}: check --domains")
    rows = []
    for domain in filter(Path.is_dir, visible(folder)):
        places = [place for place in (domain / "annotations", domain) if place.is_dir()]
        files = [file for place in places for file in visible(place) if file.suffix == ".json"]
        if len(files) != 1:
            raise InputError(
                f"the domain {domain} has {len(files)} annotation files: leave one .json in it or in its annotations/"
            )
        try:
            first = json.loads(files[0].read_bytes())["images"][0]["file_name"]
        except (OSError, ValueError, LookupError, TypeError):
            raise InputError(f"{files[0]} names no images: give an annotation file in COCO's format") from None
        places = [place for place in (domain, *visible(domain)) if (place / first).is_file()]
        if not places:
            raise InputError(f"the domain {domain} lacks its image {first}: put the images in a folder in it")
        rows.append((f"domain-{domain.name}", str(files[0].resolve()), str(places[0].resolve())))
    if not rows:
        raise InputError(f"no domain in {folder}: give a folder with a folder a domain, as COCO-O has them")
    return rows
