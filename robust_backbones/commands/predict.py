"""Find objects in images with a trained detector: pictures of them, and COCO's result format.

Example, the detector of `robust-backbones demo` on the images it was evaluated on:
    robust-backbones predict demo_output/data/shapes/val --weights demo_output/robust/detector --output predictions

RUN is the OUTPUT_DIR of `robust-backbones train`, with config.yaml and model_final.pth, or another .pth file in it;
with --allow-unverified-detector also one of plain Detectron2, or --config-file and a file of its model zoo.
OUTPUT gets NAME.jpg for each image, with boxes, masks and class names of detections that score at least --min-score,
and coco_results.json with all detections, in pixels of the image, for pycocotools' COCO.loadRes. Its image_id is the
number in an image's name, as in COCO; if some name is not a number, images are numbered from 1 in the given order.
Exit status: 0 done, 2 bad input.
"""

import argparse
import os
import sys
from pathlib import Path

from tqdm import tqdm

from robust_backbones.classification.compute import available
from robust_backbones.commands import cli
from robust_backbones.commands.options import DEVICE
from robust_backbones.data.decoding import image_suffixes, visible
from robust_backbones.errors import InputError, check_not_negative, plural
from robust_backbones.runs.files import write_json

RESULTS = "coco_results.json"


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    found = find_images(options.images)
    name_pictures(found, options.output)  # refused before the detector is read

    from robust_backbones.detection.predictor import Predictor
    from robust_backbones.detection.visualize import draw_objects, objects_in, read_rgb, write_picture

    predictor = Predictor(
        options.weights,
        config_file=options.config_file,
        device=options.device,
        allow_unverified=options.allow_unverified_detector,
    )
    hidden = None if len(found) > 1 else True  # tqdm shows itself in a terminal when None
    images, left_out = [], []
    for image in tqdm(found, "checking images", unit="img", disable=hidden, leave=False):
        try:
            read_rgb(image)  # a broken one is found before the first is written
        except InputError as error:
            if not options.skip_unreadable:
                raise InputError(f"{error}, or give --skip-unreadable to leave it out") from None
            left_out.append(error)
        else:
            images.append(image)
    if not images:
        raise InputError(f"no image can be read, the first: {left_out[0]}")
    for reason in left_out:
        print(f"warning: left out: {reason}", file=sys.stderr)
    pictures, rows, drawn = name_pictures(images, options.output), [], []
    detecting = tqdm(images, "detecting", unit="img", disable=hidden, leave=False)
    for image, number in zip(detecting, image_ids(images), strict=True):
        objects = objects_in(predictor(image))
        drawn.append([item for item in objects if item["score"] >= options.min_score])
        for item in objects:
            category = predictor.categories[item["category_id"]]["id"]
            row = {"image_id": number, "file_name": str(image), "category_id": category}
            rows.append(row | {key: item[key] for key in ("bbox", "score", "segmentation") if key in item})
    write_json(options.output / RESULTS, rows)  # before the pictures, which it says are ours
    for image, picture, objects in zip(images, pictures, drawn, strict=True):
        write_picture(picture, draw_objects(read_rgb(image), objects, predictor.metadata))
    told = f"{plural(len(rows), 'detection')} in {plural(len(images), 'image')}"
    if rows and not any(drawn):
        best = max(row["score"] for row in rows)
        told += f", of which none scores {options.min_score:g} (--min-score), the best {best:.3f}: nothing is drawn"
    print(f"{told}: pictures and {RESULTS} are in {options.output}")
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="image file, or folder of such files")
    parser.add_argument("--weights", type=Path, required=True, metavar="RUN", help="the detector, see above")
    parser.add_argument("--config-file", type=Path, help="the detector's (default: config.yaml beside its weights)")
    parser.add_argument("--allow-unverified-detector", action="store_true", help="accept plain Detectron2 detectors")
    parser.add_argument("--output", type=Path, default=Path("predictions"), help="folder for the results")
    parser.add_argument("--min-score", type=float, default=0.5, help="of drawn detections, in [0, 1] (default 0.5)")
    parser.add_argument("--skip-unreadable", action="store_true", help="leave out images that cannot be read")
    parser.add_argument("--device", choices=("cuda", "cpu"), default=DEVICE)
    options = parser.parse_args(arguments)
    available(options.device)
    check_not_negative(options, "min_score")
    if options.output.exists() and not options.output.is_dir():
        raise InputError(f"{options.output} is not a folder: choose another --output")
    return options


def find_images(paths: list[Path]) -> list[Path]:
    """The files, and the image files in the folders, sorted, without duplicates."""
    found: dict[str, Path] = {}
    suffixes = image_suffixes()
    for path in paths:
        if not os.path.exists(path):  # unlike Path's, never raises
            raise InputError(f"no image and no folder at {path}: check the path")
        files = [path]
        if path.is_dir():
            files = [file for file in visible(path) if file.suffix.lower() in suffixes]
        if not files:
            raise InputError(f"no image (.jpg, .png or another format of Pillow's) in {path}: give a folder with some")
        for file in files:
            found.setdefault(os.path.abspath(file), file)
    return list(found.values())


def name_pictures(images: list[Path], output: Path) -> list[Path]:
    """A file in ``output`` for each image, with its name, and a number from the second of the same name on."""
    inputs, taken = {image.resolve() for image in images}, dict[str, Path]()
    is_ours = (output / RESULTS).exists()
    for image in images:
        name, count = image.stem, 1
        while name.casefold() in taken:  # some file systems do not tell case apart
            count += 1
            name = f"{image.stem}_{count}"
        picture = taken[name.casefold()] = output / f"{name}.jpg"
        if picture.resolve() in inputs or (picture.exists() and not is_ours):
            raise InputError(f"{picture} exists and is not of an earlier run: choose another --output, or remove it")
    return list(taken.values())


def image_ids(images: list[Path]) -> list[int]:
    """The numbers in the files' names, if they are unique; else 1, 2, ..."""
    stems = [image.stem for image in images]
    numbers = [int(stem) for stem in stems if stem.isascii() and stem.isdigit()]
    return numbers if len(set(numbers)) == len(stems) else list(range(1, len(stems) + 1))
