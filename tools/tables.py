#!/usr/bin/env python
"""Fill the tables of README.md and docs/*.md from the records in docs/: all between ``<!-- table: NAME -->`` and
``<!-- end -->``.

Example:
    python tools/tables.py

Exit status: 0 done, 2 a page names a table that does not exist.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import nn

from robust_backbones.analysis.experiments import experiments, metric_name
from robust_backbones.analysis.inheritance import summary_table
from robust_backbones.analysis.paper.transfer_figures import best_table
from robust_backbones.analysis.paper.transfer_results import Pretrainings, targets
from robust_backbones.analysis.record_tables import detector_robustness_table
from robust_backbones.analysis.records import RecordedRun, find_primary, find_runs
from robust_backbones.analysis.results import results
from robust_backbones.analysis.statistics import Summary, compare_pairs, summarize
from robust_backbones.analysis.tables import Table
from robust_backbones.checkpoint.families import FAMILIES, SIZES
from robust_backbones.checkpoint.layouts import SOURCES
from robust_backbones.checkpoint.zoo import published_robust
from robust_backbones.classification.recipes import RECIPES
from robust_backbones.commands import cli
from robust_backbones.errors import InputError
from robust_backbones.models import build_backbone, usual_spec
from robust_backbones.runs.files import atomic_path
from robust_backbones.runs.record import RunRecord
from robust_backbones.threat_models import ThreatModel
from robust_backbones.timm_models import build_stages
from robust_backbones.transfer import linear_probe
from robust_backbones.transfer.inheritance.matrix import matrices_of

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"


def main(arguments: list[str]) -> int:
    if arguments:
        print(__doc__)
        return 0 if arguments[0] in ("-h", "--help") else 2
    for page in [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]:
        text = filled(page.read_text())
        if text != page.read_text():
            with atomic_path(page) as temporary:
                temporary.write_text(text)
            print(f"tables written to {page}")
    return 0


def filled(text: str) -> str:
    """A page with its tables as the records give them."""

    def fill(match: re.Match[str]) -> str:
        name = match[2]
        if name not in TABLES:
            raise InputError(f"no table {name!r}: there are {', '.join(TABLES)}")
        return f"{match[1]}\n{TABLES[name]().to_markdown()}\n{match[4]}"

    return re.sub(r"(<!-- table: (\w+) -->)(.*?)(<!-- end -->)", fill, text, flags=re.DOTALL)


def speed() -> Table:
    """What is done, by how much faster than by other software, and on what; the GPU first."""
    gpu = json.loads((DOCS / "gpu.json").read_text())
    rows = [
        [row["work"], row["ours"], row["peer"], f"{row['ours_rate'] / row['peer_rate']:.1f}x", gpu["machine"]]
        for row in gpu["rows"]
    ]
    quoted = {
        "attack": ("ℓ2, ours fp32", "PGD-10 on ResNet-50, ℓ2"),
        "probe-224px-150epochs": ("ours: one pass for all heads, fp32", "Linear probe, 6 heads, 150 epochs"),
        "coco-ap": ("boxes, ours", "Box AP of 5,000 COCO images"),
        "loading": ("ours", "JPEG files to training crops"),
        "mask-rcnn": ("ours, bf16", "Mask R-CNN training step"),
    }
    for name, (way, work) in quoted.items():
        record = json.loads((DOCS / f"benchmarks/{name}.json").read_text())
        reach = next(one for one in record["reaches"] if one["way"] == way)
        rows.append([work, way, reach["than"], f"{reach['found'][0]:.1f}x", "one CPU core"])
    return Table.of(["what", "here", "instead of", "as fast", "on"], rows)


def study() -> Table:
    """A row a result, a column a backbone: means and deviations over seeds, and what the report calls better or worse
    than epsilon 0."""
    runs = find_runs([DOCS / "study"])
    own: dict[tuple[str, str], dict[str, list[float]]] = {}
    for record in (run.record for run in runs if run.record.task == "pretrain"):
        for metric in ("clean_accuracy", "robust_accuracy"):
            values = own.setdefault((f"its own task ({record.dataset})", metric.split("_")[0]), {})
            values.setdefault(str(record.threat_model), []).append(record.metrics[metric] or 0.0)
    cells = {
        key: {model: _mean_and_std(summarize(values)) for model, values in found.items()} for key, found in own.items()
    }
    signs = {"better": " ▲", "worse": " ▼"}
    of_detectors = {"bbox/AP50": "AP50", "attack-classification/bbox/AP50": "robust AP50"}
    detectors = {}
    for result in results(*experiments(runs), primary=find_primary([DOCS / "study"])):
        experiment, metric = result.experiment, result.metric
        found = {
            "as it is" if row.backbone.family[1] == 1000 else row.backbone.trained_at: _mean_and_std(row.summary)
            + signs.get(row.comparison.verdict if row.comparison else "", "")
            for row in result.rows
            if row.summary
        }
        if experiment.task == "transfer" and metric in experiment.headlines:
            fixed = experiment.runs[0].record.config["mode"] == linear_probe.MODE
            mode = "fixed features" if fixed else "full network"
            cells[f"{experiment.dataset}, {mode}", metric.split("_")[0]] = found
        elif metric in of_detectors:
            detectors[f"Faster R-CNN, {experiment.dataset}", of_detectors[metric]] = found
    cells |= detectors
    models = sorted({model for found in cells.values() for model in found} - {"as it is"}, key=_epsilon)
    rows = [[*key, *(found.get(model, "-") for model in ["as it is", *models])] for key, found in cells.items()]
    return Table.of(["after", "result", "as it is", *(f"ε = {_epsilon(model):g}" for model in models)], rows)


def _epsilon(threat_model: str) -> float:
    return ThreatModel.parse(threat_model).epsilon


def _mean_and_std(summary: Summary) -> str:
    return f"{summary.mean:.1f}" + (f" ± {summary.std:.1f}" if summary.std is not None else "")


def fast_step() -> Table:
    """AP of detectors trained by Detectron2's step and by MODEL.FAST_STEP, and the differences of paired seeds."""
    steps: dict[bool, dict[int, RecordedRun]] = {False: {}, True: {}}
    for run in find_runs([DOCS / "fast_step"]):
        steps[run.record.config["MODEL"]["FAST_STEP"]][run.seed] = run
    pairs = {}
    for metric in ("bbox/AP", "bbox/AP50", "segm/AP", "segm/AP50"):
        theirs, ours = (
            {seed: run.record.metrics[metric] or 0.0 for seed, run in found.items()} for found in steps.values()
        )
        pairs[metric] = (theirs, ours)
    rows = []
    for metric, found in compare_pairs(pairs, bounds=(-100, 100)).items():
        means = [_mean_and_std(summarize([*values.values()])) for values in pairs[metric]]
        difference = f"{found.difference:+.1f} ({found.low:+.1f} to {found.high:+.1f})"
        rows.append([metric_name(metric), *means, difference, f"{found.p_holm:.2f}", found.verdict])
    heads = ["Detectron2's step", "`MODEL.FAST_STEP`", "difference (95 %)", "p (Holm)", "in words"]
    return Table.of(["result", *heads], rows)


def robustness() -> Table:
    runs = [run for run in find_runs([DOCS / "detector_robustness"]) if "records" in run.folder.parts]
    return detector_robustness_table([run.record for run in runs])


def inheritance() -> Table:
    by_label: dict[str, dict[str, RunRecord]] = {}
    for run in _runs("inheritance", "inheritance"):
        by_label.setdefault(run.record.backbone["label"], {})[run.place] = run.record
    return summary_table([matrix for label, own in by_label.items() for matrix in matrices_of(label, own)])


def transfer_best() -> Table:
    pretrainings = Pretrainings(_runs("transfer_figures", "pretrain"))
    trials = [run for run in _runs("transfer_figures", "transfer") if run.record.config["mode"] == "linear_probe"]
    found = targets([run for run in trials if not run.record.config.get("downscale")], pretrainings)
    return best_table("linear_probe", found)


def visualization() -> Table:
    """Means over images, and paired differences with their intervals."""
    measures = {"inversion": ("ssim", "pixel_correlation"), "saliency": ("cosine",)}
    records = {run.record.config["command"]: run.record for run in find_runs([DOCS / "visualization"])}
    rows = []
    for command, names in measures.items():
        metrics = records[command].metrics
        for who in dict.fromkeys(key.rpartition("/")[0] for key in sorted(metrics)):
            for name in names:
                key = f"{who}/{name}"
                if key in metrics:
                    low, high = metrics.get(f"{key}_low"), metrics.get(f"{key}_high")
                    interval = "-" if low is None or high is None else f"{low:+.3f} to {high:+.3f}"
                    rows.append([command, who, name.replace("_", " "), f"{metrics[key]:.3f}", interval])
    return Table.of(["command", "backbone", "measure", "mean", "95 % interval"], rows)


def layouts() -> Table:
    """The layouts of checkpoints, by their names for ``--source``, and what their makers feed their networks."""
    rows = []
    for name, source in SOURCES.items():
        convention = source.convention or {}
        words = [str(convention["channel_order"])] if "channel_order" in convention else []
        for key in ("mean", "std"):
            if key in convention:
                words.append(f"{key} {' '.join(f'{value:.4g}' for value in convention[key])}")
        if "stride_in_1x1" in convention:
            words.append(f"stride in the {'1x1' if convention['stride_in_1x1'] else '3x3'}")
        rows.append([f"`{name}`", source.description, ", ".join(words) or "nothing"])
    return Table.of(["source", "what it is", "assumed where neither the file nor you say it"], rows)


def families() -> Table:
    """Whose ConvNeXt, Swin and ViT are read, and which sizes are known by their shapes."""
    rows = []
    for family in dict.fromkeys(row.family for row in FAMILIES):
        libraries = dict.fromkeys(row.library for row in FAMILIES if row.family == family)
        rows.append(
            [family, ", ".join(libraries), ", ".join(name for (kind, *_), name in SIZES.items() if kind == family)]
        )
    return Table.of(["family", "by the names of", "sizes"], rows)


def support() -> Table:
    """What a network of each kind can be here, as the code answers for one of its kind."""
    rows = []
    for arch in _KINDS:
        spec = usual_spec(arch)
        with torch.device("meta"):
            norms = any(isinstance(module, nn.BatchNorm2d) for module in build_backbone(spec).modules())
        try:
            builder = spec.detectron2_overrides().get("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone")
            if builder == "build_timm_fpn_backbone":
                build_stages(arch)  # raises
            detector = f"`{builder}`"
        except InputError as error:
            detector = f"no: {str(error).partition('; ')[0]}"
        rows.append([f"`{arch}`", "folded twin" if norms else "itself", detector])
    return Table.of(["for example", "attacks run on", "backbone of a detector"], rows)


_KINDS = (
    *("resnet50", "densenet161", "tf_efficientnet_lite0", "convnext_tiny", "convnext_tiny_convstem"),
    *("swin_tiny_patch4_window7_224", "vit_base_patch16_224", "vit_base_patch16_224_convstem"),
    *("vit_base_patch32_224", "xcit_small_12_p16_224"),
)


def published_robust_table() -> Table:
    rows = [
        [f"`{one.name}`", one.arch, f"{one.imagenet_accuracy:.2f}", f"{one.robust_accuracy:.2f}", one.source]
        for one in published_robust().values()
    ]
    return Table.of(["name", "network", "clean", "AutoAttack, 4/255", "reported by"], rows)


def recipes() -> Table:
    rows = [
        [f"`{begin}`", row.source, "a clean network" if row.starts else "random weights", row.differs]
        for begin, row in RECIPES.items()
    ]
    return Table.of(["names that begin with", "settings of", "starts from", "what differs"], rows)


def _runs(folder: str, task: str) -> list[RecordedRun]:
    return [run for run in find_runs([DOCS / folder]) if run.record.task == task]


def kills() -> Table:
    """Of each command: how often it was broken in each way, and how often it survived."""
    ways = {"random": "killed at random", "inside": "inside a write", "disk": "disk full", "writers": "several at once"}
    ways |= {"rank": "one rank", "world": "two resumed by one"}
    counts: dict[str, Counter[str]] = {}
    for path in sorted((DOCS / "reliability").glob("kills-*.json")):
        for row in json.loads(path.read_text())["rows"]:
            found = counts.setdefault(row["command"], Counter())
            found.update({row["way"]: row["tried"], f"{row['way']} lost": row["lost"]})
    rows = [
        [name, *(f"{found[way] - found[f'{way} lost']} of {found[way]}" if found[way] else "-" for way in ways)]
        for name, found in counts.items()
    ]
    total = sum(counts.values(), Counter[str]())
    rows.append(["all", *(f"{total[way] - total[f'{way} lost']} of {total[way]}" for way in ways)])
    return Table.of(["survived", *ways.values()], rows)


def fuzz() -> Table:
    """Of each reader: the inputs, what was read and refused, and all that was neither."""
    rows = []
    for path in sorted((DOCS / "reliability").glob("fuzz-*.json")):
        for row in json.loads(path.read_text())["rows"]:
            read, refused = row.get("read", 0), row.get("refused", 0)
            rows.append([row["target"], row["seed"], row["inputs"], read, refused, row["inputs"] - read - refused])
    return Table.of(["reader", "seed", "inputs", "read", "refused", "bad"], rows)


def soak() -> Table:
    """The length of the trial, and the medians of the second and the last quarter."""
    record = json.loads((DOCS / "reliability/soak.json").read_text())
    samples, end = record["samples"], record["samples"][-1]["minutes"]
    rows = []
    for name, unit in {"memory": "memory, MB", "files": "files", "threads": "threads", "children": "children"}.items():
        quarters = [
            median(sample[name] for sample in samples if low * end <= sample["minutes"] <= high * end)
            for low, high in ((0.25, 0.5), (0.75, 1))
        ]
        rows.append([unit, *(f"{value:.0f}" for value in quarters), f"{quarters[1] - quarters[0]:+.0f}"])
    of = f"{end:.0f} minutes, {len(samples)} rounds, {record['resumed']} runs resumed"
    return Table.of([of, "second quarter", "last quarter", "growth"], rows)


TABLES: dict[str, Callable[[], Table]] = {
    "speed": speed,
    "study": study,
    "fast_step": fast_step,
    "detector_robustness": robustness,
    "inheritance": inheritance,
    "transfer_best": transfer_best,
    "visualization": visualization,
    "kills": kills,
    "fuzz": fuzz,
    "soak": soak,
    "layouts": layouts,
    "families": families,
    "support": support,
    "published_robust": published_robust_table,
    "recipes": recipes,
}


if __name__ == "__main__":
    cli.run(main)
