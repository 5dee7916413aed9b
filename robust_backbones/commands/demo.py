"""The whole pipeline on synthetic shapes, without a download: two backbones, two Mask R-CNNs, one table, one picture.

Example:
    robust-backbones demo --output demo_output

Runs the project's own commands and prints each: PGD pre-training of a ResNet-18 (standard, and robust at L2 0.5),
conversion with proof, Mask R-CNN fine-tuning and evaluation. 4 to 14 minutes on two CPU cores; steps that are done
are not run again. Exit status: 0 done, 1 a step failed or a detector did not learn as it should, 2 bad input.
"""

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from robust_backbones.analysis.record_tables import transfer_table
from robust_backbones.commands import cli
from robust_backbones.configs import CONFIG_DIR
from robust_backbones.data.synthetic import write_shapes
from robust_backbones.errors import InputError
from robust_backbones.runs.record import RunRecord

CONFIG = CONFIG_DIR / "quick/mask_rcnn_R_18_FPN_shapes_instant.yaml"
BACKBONES = {"standard": "L2:0", "robust": "L2:0.5"}
RECIPE = (
    "--arch resnet18 --eval-threat-model L2:0.5 --epochs 1 --batch-size 32 --lr 0.02 "
    "--schedule one_cycle --image-size 64 --val-resize 64 --min-crop-scale 0.5 --precision bf16 "
    "--attack.steps 1 --attack.relative-step-size 1 "  # as robust here as three steps, in two thirds of the time
    "--eval-attack.steps 5"
)


def main(arguments: list[str]) -> int:
    parser = cli.parser(__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder for data and results")
    output = parser.parse_args(arguments).output

    # Set before Detectron2 is imported, here and in the commands: it looks for data sets there.
    os.environ["DETECTRON2_DATASETS"] = str((output / "data").resolve())
    from robust_backbones.detection.visualize import draw_side_by_side

    start = time.perf_counter()
    print(f"writing synthetic shapes to {output / 'data'}")
    write_shapes(output / "data")
    records = []
    for name, threat_model in BACKBONES.items():
        print(f"\n== {name} backbone (trained at {threat_model})")
        records.append(prepare_and_train(output / name, output / "data/shapes_classification", threat_model))

    picture = output / "detections.jpg"
    draw_side_by_side({name: output / name / "detector" for name in BACKBONES}, picture, images=3)
    table = transfer_table(records).to_markdown()
    (output / "table.md").write_text(table + "\n")

    print(f"\n{table}\n\none seed each: a difference between the rows is not evidence")
    print(f"took {time.perf_counter() - start:.0f} s; the picture with boxes and masks is {picture}, the table")
    print(f"{output / 'table.md'}; checkpoints, backbones, detectors and records are in {output}/{{standard,robust}}")
    return 0


def prepare_and_train(folder: Path, data: Path, threat_model: str) -> tuple[RunRecord, RunRecord]:
    """Pre-train, convert with proof, fine-tune; the records of the classifier and of the detector."""
    classifier, backbone, detector = folder / "pretrain", folder / "backbone.pkl", folder / "detector"
    if not (classifier / "record.json").exists():
        run("pretrain", "--data", data, "--output", classifier, "--threat-model", threat_model, *RECIPE.split())
    if not backbone.exists():
        run("convert", classifier / "checkpoint.pt", backbone)
    if not (detector / "record.json").exists():
        resume = ["--resume"] if (detector / "metrics.json").exists() else []
        overrides = ["MODEL.WEIGHTS", backbone, "OUTPUT_DIR", detector]
        run("train", "--config-file", CONFIG, *resume, *overrides, log=folder / "train.log")
    return RunRecord.read(classifier / "record.json"), RunRecord.read(detector / "record.json")


def run(verb: str, *arguments: object, log: Path | None = None) -> None:
    """Run one of our commands; with a log, show only its progress."""
    command = [sys.executable, "-m", "robust_backbones", verb, *map(str, arguments)]
    print(f"$ robust-backbones {shlex.join(command[3:])}", flush=True)
    if log is None:
        status = subprocess.run(command).returncode
    else:
        with (
            open(log, "w") as file,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process,
        ):
            assert process.stdout is not None
            for line in process.stdout:
                file.write(line)
                if " iter: " in line or "backbone: " in line or line.startswith("error: "):
                    print("  " + " ".join(line.split("]: ", 1)[-1].split())[:110], flush=True)
        status = process.returncode
    if status == 2:
        raise InputError(f"{verb} did not accept its input, see above; if the folder is of an older demo, remove it")
    if status:
        print(f"error: {verb} failed" + (f", see {log}" if log else ""), file=sys.stderr)
        sys.exit(1)
