"""Detection data: registering COCO-format sets, and checking a configuration's sets before hours are spent on them."""

from __future__ import annotations

import copy
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import ParseError

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.utils.colormap import colormap

from robust_backbones.checkpoint.zoo import cache_folder
from robust_backbones.data.annotations import MISSING, Fault, Use, check_coco, read_json
from robust_backbones.data.annotations_images import UNREADABLE, check_images
from robust_backbones.data.annotations_sets import AnnotatedSet, datasets_root, locate
from robust_backbones.data.annotations_voc import voc_classes
from robust_backbones.data.shared_images import first_shared, shared_images
from robust_backbones.detection.left_out import SHOWN_CLASSES, hold_out, leave_out, left_out, unreadable_rows
from robust_backbones.detection.standard_format import Items, content_of, listed, load_coco, load_voc, register
from robust_backbones.errors import InputError, plural


def register_datasets(cfg: CfgNode) -> None:
    """Register the sets of DATASETS.COCO_FORMAT and VOC_FORMAT, without SKIPPED and without HELD_OUT images;
    registering a name again replaces it.

    Raises:
        InputError: a row is invalid, two have the same name, or a VOC folder has no classes.
    """
    rows = [tuple(row) for row in (*cfg.DATASETS.COCO_FORMAT, *cfg.DATASETS.VOC_FORMAT)]
    if twice := [name for name, count in Counter(row[0] for row in dict.fromkeys(rows) if row).items() if count > 1]:
        raise InputError(f"two different data sets are called {twice[0]!r}: give each a name of its own")
    for row in cfg.DATASETS.COCO_FORMAT:
        if len(row) != 3:
            raise InputError(f"DATASETS.COCO_FORMAT wants rows of (name, annotation file, image folder), got {row}")
        name, annotations, images = row
        file, folder = str(locate(annotations)), str(locate(images))
        _register(name, partial(load_coco, file, folder, name), json_file=file, image_root=folder)
    for row in cfg.DATASETS.VOC_FORMAT:
        if len(row) not in (3, 4):
            raise InputError(f"DATASETS.VOC_FORMAT wants rows of (name, folder, list) or (..., classes), got {row}")
        name, folder, split, *given = row
        folder = str(locate(folder))
        if not (classes := list(*given) or voc_classes(folder)):
            raise InputError(f"{name} has no classes, for no object in an XML file: {_voc_layout(folder, split)}")
        load = partial(load_voc, folder, split, classes)
        # By area under the curve, as VOC since 2010.
        about = {"dirname": folder, "split": split, "year": 2012, "thing_classes": classes}
        _register(name, load, evaluator_type="pascal_voc", **about, **{SHOWN_CLASSES: True})
    for name in dict.fromkeys((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)):
        _load_by_ours(name)
    hold_out(cfg)
    leave_out(cfg)


def _load_by_ours(name: str) -> None:
    """Read a set of Detectron2's own loaders by ours: theirs drop objects without a polygon, including their boxes, and
    cannot read lists with two columns."""
    module = getattr(DatasetCatalog[name], "__module__", "") if name in DatasetCatalog else ""
    metadata = MetadataCatalog.get(name).as_dict() if module else {}
    if module == "detectron2.data.datasets.coco" and "json_file" in metadata:
        load = partial(load_coco, metadata["json_file"], metadata["image_root"], name)
    elif module == "detectron2.data.datasets.pascal_voc":
        load = partial(load_voc, metadata["dirname"], metadata["split"], metadata["thing_classes"])
    else:
        return
    DatasetCatalog.remove(name)
    DatasetCatalog.register(name, load)


def _register(name: str, load: Callable[[], Items], *, evaluator_type: str = "coco", **metadata: Any) -> None:
    # One colour a class in pictures; without it every object gets a random one.
    colors = [tuple(color) for color in colormap(rgb=True, maximum=255).astype(int).tolist()]
    register(name, load, {"evaluator_type": evaluator_type, "thing_colors": colors, **metadata})


def class_names(name: str) -> list[str]:
    """A registered set's classes, in its order.

    Raises:
        InputError: its annotation file is missing or damaged.
    """
    dataset = annotated_set(name)
    if dataset is not None and not dataset.split and "thing_classes" not in MetadataCatalog.get(name).as_dict():
        try:
            content, faults = read_json(dataset.annotations)
        except FileNotFoundError as error:
            raise InputError(f"{name} lacks {error.filename}: {_layout(name)}") from None
        if content:
            alone = {**content, "images": [], "annotations": []}
            faults += [fault for fault in check_coco(dataset.annotations, alone) if fault.place]
        if faults:
            raise InputError(f"the annotations or images of {name} are damaged: {faults[0]}")
        return [row["name"] for row in sorted(content["categories"], key=lambda row: row["id"])]
    return list(MetadataCatalog.get(name).get("thing_classes", []))


def classes_key(cfg: CfgNode) -> str:
    """The key that holds the detector's number of classes."""
    part = "RETINANET" if cfg.MODEL.META_ARCHITECTURE == "RetinaNet" else "ROI_HEADS"
    return f"MODEL.{part}.NUM_CLASSES"


def number_of_classes(cfg: CfgNode) -> int:
    """The detector's number of classes."""
    return int(cfg.MODEL[classes_key(cfg).split(".")[1]].NUM_CLASSES)


def derive_classes(cfg: CfgNode, *, eval_only: bool = False, known: int = 0) -> None:
    """Set NUM_CLASSES, if it is 0 because it was not given, to ``known`` or that of the first data set."""
    names = [*(() if eval_only else cfg.DATASETS.TRAIN), *cfg.DATASETS.TEST]
    for part in ("ROI_HEADS", "RETINANET"):
        node = cfg.MODEL[part]
        if node.NUM_CLASSES == 0:
            used = f"MODEL.{part}.NUM_CLASSES" == classes_key(cfg) and names
            node.NUM_CLASSES = (known or len(class_names(names[0]))) if used else 80


def match_classes(names: Sequence[str], wanted: Sequence[str]) -> None:
    """Register sets again with the classes ``wanted``, in this order, if theirs differ; ids do not matter.

    A class that is missing in a set has no objects there, and its AP is undefined.

    Raises:
        InputError: a set has other classes.
    """
    found_in = {name: class_names(name) for name in names}
    for name, found in found_in.items():
        check_names(name, found, wanted, all_of_them=False)
    others = [name for name, found in found_in.items() if found != list(wanted)]
    # All are read before one changes: a set may be a part of another.
    read: dict[str, Items] = {name: copy.deepcopy(DatasetCatalog.get(name)) for name in others}
    for name, items in read.items():
        metadata, found = MetadataCatalog.get(name).as_dict(), found_in[name]
        places = [list(wanted).index(title) for title in found]
        for item in items:
            for thing in item["annotations"]:
                thing["category_id"] = places[thing["category_id"]]
        if numbers := metadata.get("thing_dataset_id_to_contiguous_id"):
            metadata["thing_dataset_id_to_contiguous_id"] = {key: places[place] for key, place in numbers.items()}
        metadata["thing_classes"] = list(wanted)
        metadata[SHOWN_CLASSES] = metadata.get(SHOWN_CLASSES, False) or len(found) < len(wanted)
        register(name, partial(list, items), metadata)


def check_names(name: str, found: Sequence[str], wanted: Sequence[str], *, all_of_them: bool) -> None:
    """Refuse a set whose classes are not ``wanted``, or not among them, whatever their order."""
    if twice := [title for title, count in Counter(found).items() if count > 1]:
        raise InputError(f"{name} has two classes called {twice[0]!r}: rename one of them")
    if unknown := [title for title in found if title not in wanted]:
        mend = f"{listed(unknown)} cannot be matched; rename or remove what differs (ids and order do not matter)"
    elif missing := [title for title in wanted if all_of_them and title not in found]:
        mend = f"its objects of {listed(missing)} would be background in training; annotate them, or leave it out"
    else:
        return
    raise InputError(f"{name} has the classes {listed(found)}, but {listed(wanted)} are wanted: {mend}")


def categories(dataset: str) -> list[dict[str, Any]]:
    """COCO's categories of a registered set, in the order of a detector's classes: ``[{"id": 1, "name": "cat"}, ...]``.

    A class without an id gets an unused one, from 1; a set that is not registered has no classes.
    """
    metadata = MetadataCatalog.get(dataset) if dataset in DatasetCatalog else Metadata()
    ids = {place: number for number, place in metadata.get("thing_dataset_id_to_contiguous_id", {}).items()}
    unused = itertools.count(max(ids.values(), default=0) + 1)
    names = enumerate(metadata.get("thing_classes", []))
    return [{"id": ids[place] if place in ids else next(unused), "name": name} for place, name in names]


def annotated_set(name: str) -> AnnotatedSet | None:
    """The files of a registered set; None if it has no known files.

    Raises:
        InputError: there is no such set.
    """
    if name not in DatasetCatalog:
        raise InputError(
            f"unknown data set {name!r}: use one of Detectron2's own (coco_2017_train, voc_2007_trainval, ...) "
            "or give yours as annotations.json:IMAGES, which `train` takes as --train NAME=annotations.json:IMAGES"
        )
    metadata = MetadataCatalog.get(name).as_dict()
    if "json_file" in metadata:
        return AnnotatedSet(Path(metadata["json_file"]), Path(metadata.get("image_root", "")))
    if "dirname" in metadata:
        folder = Path(metadata["dirname"])
        return AnnotatedSet(folder, folder / "JPEGImages", metadata["split"], tuple(metadata["thing_classes"]))
    return None


def annotation_digests(names: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Rows for DATASETS.CONTENT of the registered sets among ``names`` whose annotations are in files."""
    sets = {name: annotated_set(name) for name in dict.fromkeys(names) if name in DatasetCatalog}
    rows = [(name, dataset.digest()) for name, dataset in sets.items() if dataset]
    return tuple((name, digest) for name, digest in rows if digest)


def missing_files(cfg: CfgNode) -> list[str]:
    """A sentence for each set of a configuration whose annotations or images are missing, judging by paths only."""
    try:
        register_datasets(cfg)
        sets = {name: annotated_set(name) for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)}
    except InputError as error:
        return [str(error)]
    paths = {name: (dataset.annotations, dataset.images) for name, dataset in sets.items() if dataset}
    lacking = {name: next((path for path in both if not path.exists()), None) for name, both in paths.items()}
    return [f"{name} lacks {path}: {_layout(name)}" for name, path in lacking.items() if path]


def evaluator_kind(dataset: str) -> str:
    """The average precision by which a registered set is evaluated: ``pascal_voc`` or ``coco`` (the default).

    Raises:
        InputError: by another one.
    """
    kind = MetadataCatalog.get(dataset).get("evaluator_type") or "coco"
    if kind not in ("coco", "pascal_voc"):
        raise InputError(f"no evaluator for {dataset} of kind {kind}: choose a COCO- or VOC-format data set")
    return str(kind)


@dataclass(frozen=True)
class DataWarning:
    """A problem of a data set that does not stop the run; its text is a sentence."""

    dataset: str
    kind: str
    """Such as ``boxes without area``."""
    count: int
    first: str
    """The location of the first one, what is wrong there, and how to fix it."""

    def __str__(self) -> str:
        return f"{self.dataset}: {self.count} {self.kind}, the first: {self.first}"


def counted(warnings: Iterable[DataWarning]) -> dict[str, dict[str, int]]:
    """Data set -> kind -> count, as in records."""
    counts: dict[str, dict[str, int]] = {}
    for warning in warnings:
        counts.setdefault(warning.dataset, {})[warning.kind] = warning.count
    return counts


def skip_unreadable(cfg: CfgNode, *, eval_only: bool = False) -> None:
    """Leave out the images that cannot be read, by DATASETS.SKIPPED; all images are decoded for it.

    Raises:
        InputError: an unknown set, or one whose annotation file is missing.
    """
    rows = []
    for name in dict.fromkeys([*(() if eval_only else cfg.DATASETS.TRAIN), *cfg.DATASETS.TEST]):
        try:
            if dataset := annotated_set(name):
                rows += unreadable_rows(name, dataset)
        except FileNotFoundError as error:
            raise InputError(f"{name} lacks {error.filename}: {_layout(name)}") from None
    cfg.DATASETS.SKIPPED = tuple(rows)
    leave_out(cfg)


def check_datasets(cfg: CfgNode, *, eval_only: bool = False) -> list[DataWarning]:
    """Load every annotation and look for every image that the run will read.

    Returns:
        The warnings, such as boxes without area, or test images that are also training images.

    Raises:
        InputError: an unknown or missing set, a missing image, a set without objects or with boxes that are not
            numbers, or a number of classes other than MODEL.ROI_HEADS.NUM_CLASSES.
    """
    names = list(cfg.DATASETS.TEST) if eval_only else [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]
    if not names:
        raise InputError(f"the configuration names no data set: set DATASETS.{'TEST' if eval_only else 'TRAIN'}")
    names = list(dict.fromkeys(names))
    images: dict[str, set[str]] = {}
    warnings = [warning for name in names for warning in _check(name, cfg, images, eval_only=eval_only)]
    trained = () if eval_only else cfg.DATASETS.TRAIN
    tested = {name: images[name] for name in names if name not in trained}
    originals = shared_images(itertools.chain(*tested.values()), itertools.chain(*(images[name] for name in trained)))
    for name, paths in tested.items():
        if shared := {path: original for path, original in originals.items() if path in paths}:
            told = f"{first_shared(shared)}; AP on them does not tell of others"
            warnings.append(DataWarning(name, "images of a training set", len(shared), told))
    for asked, kind, told in (
        (cfg.MODEL.KEYPOINT_ON, "measure left out", "AP of keypoints, which Detectron2's COCOEvaluator has"),
        (cfg.TEST.AUG.ENABLED, "augmentation left out", "TEST.AUG, which Detectron2's GeneralizedRCNNWithTTA does"),
    ):
        warnings += [DataWarning(name, kind, 1, told) for name in cfg.DATASETS.TEST if asked]
    wanted = class_names(names[0])
    for name in names:
        found = class_names(name)
        # A detector that is only evaluated has classes of its own, with which TrainedDetector compares.
        check_names(name, found, found if eval_only else wanted, all_of_them=name in cfg.DATASETS.TRAIN)
    if not eval_only and len(wanted) != number_of_classes(cfg):
        key, count = classes_key(cfg), len(wanted)
        raise InputError(
            f"{names[0]} has {plural(count, 'class')} but {key} is {number_of_classes(cfg)}: give {key} {count}"
        )
    return warnings


def _warnings(name: str, faults: Sequence[Fault], images: int, use: Use) -> Iterator[DataWarning]:
    """The warnings among a set's faults; raises ``InputError`` for an error."""
    _refuse_errors(name, faults, images, masks=use.masks)
    for kind, count in Counter(fault.kind for fault in faults).items():
        yield DataWarning(name, kind, count, str(next(fault for fault in faults if fault.kind == kind)))


def _refuse_errors(name: str, faults: Sequence[Fault], images: int, *, masks: bool = False) -> None:
    """InputError with the first of the errors; missing files come first, as the path is then probably wrong."""
    errors = [fault for fault in faults if fault.severity == "error"]
    command = f"`robust-backbones check-data{' --masks' * masks}` lists them"
    if missing := sorted((fault.file, fault.mend) for fault in errors if fault.what == MISSING):
        without = sum(file.endswith(".xml") for file, _ in missing)  # whose images are not in the content
        kind, total = "annotation" if without else "image", images + without
        others = len(errors) - len(missing)
        more = f" ({plural(others, 'more error')}: {command})" if others else ""
        raise InputError(
            f"{name} lacks {len(missing)} of its {plural(total, kind)}, {missing[0][0]} the first: {missing[0][1]}; "
            f"{_layout(name)}{more}"
        )
    if errors:
        if len(unreadable := [error for error in errors if error.kind == UNREADABLE]) == len(errors):
            mend = "or give --skip-unreadable to leave it out"
            more = f" ({len(unreadable) - 1} more)" if len(unreadable) > 1 else ""
            raise InputError(f"{name} has images that cannot be used: {errors[0]}, {mend}{more}")
        lists = command if annotated_set(name) else "mend all of this kind"
        more = f" ({len(errors) - 1} more: {lists})" if len(errors) > 1 else ""
        raise InputError(f"the annotations or images of {name} are damaged: {errors[0]}{more}")


def _check(name: str, cfg: CfgNode, images: dict[str, set[str]], *, eval_only: bool) -> Iterator[DataWarning]:
    """The warnings about a set; the files of its images become ``images[name]``."""
    dataset, headers = annotated_set(name), cache_folder() / "headers"
    use = Use(name in cfg.DATASETS.TRAIN and not eval_only, name in cfg.DATASETS.TEST, cfg.MODEL.MASK_ON)
    try:
        if dataset is not None:  # as `robust-backbones check-data` does
            faults, content = dataset.check(use, cache=headers)
            faults = [fault for fault in faults if fault.image not in left_out(name)]
            yield from _warnings(name, faults, len(content.get("images", [])), use)
        items: Items = DatasetCatalog.get(name)
        images[name] = {os.path.abspath(item["file_name"]) for item in items}
        numbers = {a["category_id"] for item in items for a in item["annotations"]}
        classes = class_names(name)
        if use.evaluation:
            evaluator_kind(name)
        content = {} if dataset else content_of(items, classes, use)
    except FileNotFoundError as error:
        raise InputError(f"{name} lacks {error.filename}: {_layout(name)}") from None
    except (OSError, LookupError, ValueError, TypeError, AttributeError, AssertionError, ParseError) as error:
        told = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"the annotations of {name} are damaged ({told}): {_layout(name)}") from None
    if not numbers:
        raise InputError(f"{name} holds no annotated object: nothing can be learnt from or measured on it")
    if not classes:
        raise InputError(f"{name} has no classes: name them in MetadataCatalog.get({name!r}).thing_classes")
    if wrong := numbers - set(range(len(classes))):
        raise InputError(f"{name} has objects of class {min(wrong)}: its classes are 0 to {len(classes) - 1}")
    if dataset is None:
        rows = [(row["id"], row["file_name"], row["width"], row["height"]) for row in content["images"]]
        faults = [*check_images(rows, cache=headers), *check_coco(name, content, use)]
        yield from _warnings(name, faults, len(items), use)


def _layout(name: str) -> str:
    """The expected layout of the folder of data sets."""
    metadata, root = MetadataCatalog.get(name), datasets_root()
    if "dirname" in metadata.as_dict():
        if not Path(metadata.dirname).absolute().is_relative_to(root.absolute()):
            return _voc_layout(metadata.dirname, metadata.split)
        year = os.path.relpath(metadata.dirname, root)
        parts = f"{year}/ImageSets/Main/{metadata.split}.txt, {year}/Annotations/*.xml and {year}/JPEGImages/*.jpg"
    elif "json_file" in metadata.as_dict():
        paths = [path for path in (metadata.json_file, metadata.get("image_root")) if path]
        if not all(Path(path).absolute().is_relative_to(root.absolute()) for path in paths):
            return f"check the path; relative to DETECTRON2_DATASETS (now {root}) or the working folder, or absolute"
        parts = " and ".join(os.path.relpath(path, root) for path in paths)
    else:
        return "register it in Detectron2's standard format, which its tutorial on custom data sets describes"
    return f"DETECTRON2_DATASETS (now {root}) must name a folder with {parts}"


def _voc_layout(folder: str, split: str) -> str:
    return f"{folder} must hold ImageSets/Main/{split}.txt, an image a line, Annotations/*.xml and JPEGImages"
