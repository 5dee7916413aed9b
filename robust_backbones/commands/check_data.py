"""Check detection data: annotations in COCO's or VOC's format, and their images.

Examples:
    robust-backbones check-data mine/train.json:mine/images mine/val.json:mine/images --masks
    robust-backbones check-data VOC2007:trainval coco_2017_val
    robust-backbones check-data mine/train.json:mine/images --fix repaired
    robust-backbones check-data mine/VOC:trainval --fix repaired --classes "traffic light,car" --rename auto=car

A SET is annotations.json:IMAGE_FOLDER, VOC_FOLDER:LIST, or a name that Detectron2 knows. Relative paths are looked up
in the folder that DETECTRON2_DATASETS names, then in the working folder. Every fault is one line: file, image id,
annotation id, what is wrong, and how to fix it. Images that two of the sets share, links and copies too, are warnings.
`robust-backbones train` runs the same check before it starts. Headers of images are cached until a file changes.
Exit status: 0 no error (warnings do not count) or, with --fix, none left in the copy, 1 errors, 2 bad input.
"""

import argparse
import os
from collections import Counter
from pathlib import Path

from robust_backbones.checkpoint.zoo import cache_folder
from robust_backbones.commands import cli
from robust_backbones.data.annotations import Fault, Use
from robust_backbones.data.annotations_repair import renaming, repair
from robust_backbones.data.annotations_sets import AnnotatedSet
from robust_backbones.data.shared_images import shared_images
from robust_backbones.errors import InputError, check_not_negative, check_positive, plural


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    use = Use(masks=options.masks)
    classes = tuple(name.strip() for name in (options.classes or "").split(",") if name.strip())
    if broken := [pair for pair in options.rename if not all(pair.partition("="))]:
        raise InputError(f"--rename {broken[0]} renames nothing: give OLD=NEW")
    if (classes or options.rename) and not options.fix:
        raise InputError("--classes and --rename are of the repaired copy: give --fix OUT too")
    check_positive(options, "workers")
    check_not_negative(options, "most")
    rename = renaming(classes, dict(pair.split("=", 1) for pair in options.rename))
    errors, files = 0, dict[str, list[str]]()
    datasets = [find_set(name) for name in options.sets]
    places = ["-".join(filter(None, (one.annotations.stem, one.split))) for one in datasets]
    if options.fix and (
        same := [name for name, place in zip(options.sets, places, strict=True) if places.count(place) > 1]
    ):
        raise InputError(f"{' and '.join(same)} would be repaired in one folder: give --fix with one of them at a time")
    for name, dataset, place in zip(options.sets, datasets, places, strict=True):
        try:
            faults, content = dataset.check(use, workers=options.workers, cache=cache_folder() / "headers")
        except OSError as error:
            raise InputError(f"{name} lacks {error.filename}: check the path") from None
        rows = dict(dataset.image_files(content))
        twice: list[Fault] = []
        for other, paths in files.items():
            shared = shared_images(rows, paths)
            if len(shared) == min(len(rows), len(paths)) > 1 and all(path == its for path, its in shared.items()):
                # One set as two, or two sets of annotations of the same images.
                what = f"{len(shared)} of its images, all of one set, are also images of {other}"
                twice.append(
                    Fault("warning", str(dataset.annotations), what, "do not train on one and test on the other")
                )
                continue
            for path, original in shared.items():
                what = f"is also an image of {other}" + f", there as {original}" * (path != original)
                mend = "leave it out of one, if you train on one and test on the other"
                twice.append(Fault("warning", path, what, mend, rows[path]["id"]))
        # Next to errors these matter most, and only the first --most faults are listed.
        faults = sorted([*twice, *faults], key=lambda fault: fault.severity)
        files[name] = list(rows)
        counts = Counter(fault.severity for fault in faults)
        for fault in faults[: options.most]:
            print(f"{fault.severity}: {fault}")
        if len(faults) > options.most:
            print(f"... and {len(faults) - options.most} more: give --most {len(faults)} to see them")
        found = {"image": len(content.get("images", [])), "object": len(content.get("annotations", []))}
        found |= {kind: counts[kind] for kind in ("error", "warning")}
        print(f"{name}: {', '.join(plural(count, what) for what, count in found.items())}")
        left = counts["error"]
        if options.fix:
            folder = options.fix if len(options.sets) == 1 else options.fix / place
            repaired, done = repair(dataset, use, folder, rename)
            print(f"repaired copy in {folder}: " + ("; ".join(done) or "nothing had to be changed"))
            kept = repaired.check(use)[0]
            faults = [fault for fault in kept if fault.severity == "error"] or kept
            left = sum(fault.severity == "error" for fault in faults)
            if not left:
                print("the copy was checked: no error is left there")
            if faults:
                what = plural(len(faults), faults[0].severity)
                print(f"left there, for a decision of yours: {what}, the first: {faults[0]}")
        errors += left
    return 1 if errors else 0


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("sets", nargs="+", metavar="SET", help="see above")
    add("--masks", action="store_true", help="check masks too, for Mask R-CNN")
    add("--fix", type=Path, metavar="OUT", help="write a repaired copy of the annotations, and changes.txt, to OUT")
    names = "with --fix: classes that differ from these only in case, spaces, - and _ get these names"
    add("--classes", metavar="NAME,NAME,...", help=names)
    add("--rename", action="append", default=[], metavar="OLD=NEW", help="with --fix; may be given several times")
    add("--most", type=int, default=50, help="faults of a set to list (default 50); all are counted")
    add("--workers", type=int, default=8, help="images to read at once (default 8)")
    return parser.parse_args(arguments)


def find_set(text: str) -> AnnotatedSet:
    """The set for a path, or for a name that Detectron2 knows."""
    if ":" in text:
        return AnnotatedSet.parse(text)
    if os.path.exists(text):
        raise InputError(f"{text} alone is no data set: give annotations.json:IMAGES, or VOC_FOLDER:LIST")
    from robust_backbones.detection.datasets import annotated_set

    if (found := annotated_set(text)) is None:
        raise InputError(f"{text} has no annotation files: give a set in COCO's or VOC's format")
    return found
