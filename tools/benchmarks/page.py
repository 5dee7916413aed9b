"""docs/benchmarks.md and its figure, from the records alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from math import exp, log
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.figure import Figure

from benchmarks.work import ratios
from robust_backbones.analysis.figures import save
from robust_backbones.analysis.records import find_runs
from robust_backbones.analysis.statistics import LinearFit, compare, linear_fit, summarize
from robust_backbones.analysis.tables import Table
from robust_backbones.errors import InputError
from robust_backbones.runs.files import atomic_path

Record = Mapping[str, Any]
NOT_MEASURED = "not measured"
ORDER = (
    "training-step",
    "attack",
    "memory",
    "probe",
    "coco-ap",
    "loading",
    "mask-rcnn",
    "mask-rcnn-modern",
    "detector-training",
    "inference",
    "detector-attack",
    "conversion",
    "growth",
)
# What only a GPU of the Hopper class can show: (work, what was to be reached). Filled by the same commands there.
ON_A_GPU = {
    "training-step": "PGD-3 of ResNet-50, 224 px, bf16: 2,400 img/s, 4x robustness at its defaults",
    "attack": "PGD-10 in both norms",
    "mask-rcnn": "Mask R-CNN, 8 images of 800 x 1216 px in bf16: 2.5x Detectron2's AMP with MODEL.FAST_STEP",
    "detector-training": "Faster R-CNN at 192 px, loading included: 40 iterations a second",
    "inference": "Mask R-CNN at 800 px with COCO evaluation: 2x Detectron2's",
    "mask-rcnn-modern": "ConvNeXt-T and ViT-B, 16 images of 1024 px on 80 GB",
    "growth": "growth of cost with steps, batch, resolution and width",
}
INTRODUCTION = """# Benchmarks

Made by `python tools/benchmark.py page` from the records in `docs/benchmarks`, which `make bench` writes.

Several ways to do the same work take turns, each in a separate process with the same PyTorch; each round starts with
another way. Their results are compared before any timing, and a benchmark whose ways differ prints no time.
On CPUs, seconds are processor seconds; these do not include other processes, which still take caches and memory from
both sides. Ratios are medians over rounds, with the smallest and the largest round in brackets. Other software runs in
a separate environment, which the tool installs. A GPU is idle for as long as a turn exceeds the time of its kernels.
"""


def write_page(records: Path, page: Path, *, bfloat16: Path | None = None) -> None:
    """Write the page, and the figure of growth into ``records``.

    Args:
        records: folder of NAME.json (CPU) and NAME-cuda.json; NAME-ANYTHING.json is the same on another machine.
        bfloat16: folder of the records of studies/bfloat16.yaml.

    Raises:
        InputError: there are no records.
    """
    found = {path.stem: json.loads(path.read_text()) for path in sorted(records.glob("*.json"))}
    if not found:
        raise InputError(f"no records in {records}: run tools/benchmark.py first")
    ordered = [found[name] for name in _in_order(found)]
    parts = [INTRODUCTION, _machines(ordered)]
    for record in ordered:
        heading = f"## {_title(record, ordered)}"
        parts.append("\n\n".join([heading, record["remark"], _body(record, records), _checks(record)]).strip())
    if bfloat16 is not None and bfloat16.is_dir():
        parts.append(_bfloat16(bfloat16))
    parts.append("## Our own targets\n\n" + _reaches(ordered, found))
    with atomic_path(page) as temporary:
        temporary.write_text("\n\n".join(part.strip() for part in parts) + "\n")


def _in_order(found: Mapping[str, Record]) -> list[str]:
    return sorted(found, key=lambda name: (ORDER.index(found[name]["name"]), name))


def _title(record: Record, ordered: Sequence[Record]) -> str:
    """Of one of the page's records; it names the processor where the same was measured on several."""
    title = _work_of(record)
    alike = sum(_work_of(other) == title for other in ordered)
    return f"{title}, on {record['machine']['processor']}" if alike > 1 else title


def _work_of(record: Record) -> str:
    options = record["options"]
    of_a_probe = f", {options['epochs']} epochs at {options['image_size']} px" if "epochs" in options else ""
    return f"{record['title']}{of_a_probe}{' (GPU)' if options['device'] == 'cuda' else ''}"


def summary(record: Record) -> str:
    """A record's table, and what of it was to be reached: what the tool prints."""
    table = _table(record)
    reached = _reach_rows(record)
    return table if not reached else f"{table}\n\n{Table.of(REACH_HEADS, reached).to_markdown()}"


REACH_HEADS = ["what", "against", "to be reached", "found", ""]


def _table(record: Record) -> str:
    if "memory" in record:
        first = record["memory"][0]["megabytes"]
        rows = [[r["way"], f"{r['megabytes']:.1f}", f"{first / r['megabytes']:.2f}x"] for r in record["memory"]]
        return Table.of(["way", "MB an image", "less by"], rows).to_markdown()
    if "processes" in record:
        rows = [
            [r["way"], *(f"{median(r[key]):.1f}" for key in ("wall", "seconds")), f"{median(r['megabytes']):.0f}"]
            for r in record["processes"]
        ]
        return Table.of(["process", "seconds by the clock", "processor seconds", "MB at most"], rows).to_markdown()
    if "growth" in record:
        rows = [
            [
                series["series"],
                ", ".join(f"{p['x']}: {median(p['seconds']):.2f}" for p in series["points"]),
                *_exponent(_fit(series)),
            ]
            for series in record["growth"]
        ]
        return Table.of(["with", "seconds", "exponent p", "R²"], rows).to_markdown()
    count, unit = record["count"], record["unit"]
    first = record["rows"][0]["seconds"]
    rows = []
    for row in record["rows"]:
        middle, least, greatest = ratios(row["seconds"], first)
        spread = f" ({least:.2f} to {greatest:.2f})" if len(first) > 1 else ""
        seconds = median(row["seconds"])
        rows.append([row["way"], f"{seconds:.3g}", f"{count / seconds:.3g}", f"{middle:.2f}x{spread}"])
        if "kernels" in row:
            rows[-1].append(f"{100 * (1 - row['kernels'] / seconds):.0f} %")
    heads = ["way", "seconds a turn", f"{unit}s a second", "to the first"]
    return Table.of([*heads, "GPU idle"][: len(rows[0])], rows).to_markdown()


def _reach_rows(record: Record) -> list[list[str]]:
    if "memory" in record:
        return [
            [f"{r['way']}, MB an image", "", f"<= {r['at_most']:g}", f"{r['megabytes']:.1f}", _verdict(r)]
            for r in record["memory"]
            if r["at_most"] is not None
        ]
    if "processes" in record:
        conversion, most = record["processes"][-1], record["at_most"]
        values = {"seconds by the clock": conversion["wall"], "MB": conversion["megabytes"]}
        limits = (most["seconds"], most["megabytes"])
        return [
            [f"conversion, {name}", "", f"< {limit:g}", f"{median(v):.1f}", _said(median(v) < limit)]
            for (name, v), limit in zip(values.items(), limits, strict=True)
        ]
    rows = []
    for reach in record.get("reaches", []):
        at_most = bool(reach["at_most"])
        bound = f"<= {reach['at_most']:g}x its cost" if at_most else f">= {reach['at_least']:g}x"
        if reach["found"] is None:
            rows.append([reach["way"], reach["than"], bound, NOT_MEASURED, ""])
            continue
        middle, least, greatest = reach["found"]
        spread = f" ({least:.2f} to {greatest:.2f})" if least < greatest else ""
        fine = middle <= reach["at_most"] if at_most else middle >= reach["at_least"]
        rows.append([reach["way"], reach["than"], bound, f"{middle:.2f}x{spread}", _said(fine)])
    return rows


def _verdict(row: Record) -> str:
    return _said(row["megabytes"] <= row["at_most"])


def _said(fine: bool) -> str:
    return "reached" if fine else "**not reached**"


def _reaches(ordered: Sequence[Record], found: Mapping[str, Record]) -> str:
    rows = [[_title(record, ordered), *row] for record in ordered for row in _reach_rows(record)]
    measured = {record["name"] for record in ordered if record["options"]["device"] == "cpu"}
    unbound = ("growth", "detector-attack", "mask-rcnn-modern")
    missing = [name for name in ORDER if name not in measured and name not in unbound]
    rows += [[name, "", "", "", NOT_MEASURED, ""] for name in missing]
    rows += [
        [f"{name}, on a GPU of the Hopper class", "", "", said, NOT_MEASURED, ""]
        for name, said in ON_A_GPU.items()
        if f"{name}-cuda" not in found
    ]
    text = Table.of(["work", *REACH_HEADS], rows).to_markdown()
    rates: dict[str, list[float]] = {}
    for record in ordered:
        in_bf16 = any("bf16" in reach["way"] and reach["found"] for reach in record.get("reaches", []))
        if record["options"]["device"] == "cpu" and in_bf16:
            rates.setdefault(record["machine"]["processor"], []).append(record["machine"]["bf16_over_fp32"])
    for processor, found_rates in rates.items():
        rate = median(found_rates)
        text += f"\n\nOn the {processor} a matrix product in bfloat16 runs at {rate:.2f} times the speed of float32"
        slow = ": the target for bf16 needs hardware that is fast at it (AVX512-BF16, AMX, or a GPU)."
        text += slow if rate < 1 else "."
    return text


def _machines(ordered: Sequence[Record]) -> str:
    rows = []
    key = lambda record: (record["machine"]["processor"], record["machine"].get("instructions", "CUDA"))  # noqa: E731
    for (processor, instructions), group in groupby(sorted(ordered, key=key), key):
        members = list(group)
        threads = sorted({record["options"]["threads"] for record in members})
        versions = sorted({record["versions"]["torch"] for record in members})
        names = sorted({record["name"] for record in members})
        rows.append([processor, instructions, ", ".join(map(str, threads)), ", ".join(versions), ", ".join(names)])
    return Table.of(["processor", "instructions", "threads of a way", "torch", "benchmarks"], rows).to_markdown()


def _body(record: Record, folder: Path) -> str:
    text = _table(record)
    if "growth" not in record:
        return text
    name = "growth-cuda" if record["options"]["device"] == "cuda" else "growth"
    picture = _growth_figure(record, folder / name)
    return f"{text}\n\n![{picture.alt}]({folder.name}/{name}.png)"


def _checks(record: Record) -> str:
    checks = record.get("checks", [])
    if not checks:
        return ""
    rows = [[c["what"], f"{c['found']:.2g}", f"{c['limit']:g}"] for c in checks]
    return "Compared before timing:\n\n" + Table.of(["what", "found", "allowed"], rows).to_markdown()


def _fit(series: Record) -> LinearFit | None:
    x = [log(point["x"]) for point in series["points"]]
    return linear_fit(x, [log(median(point["seconds"])) for point in series["points"]])


def _exponent(fit: LinearFit | None) -> tuple[str, str]:
    return ("-", "-") if fit is None else (f"{fit.slope:.2f}", f"{fit.r_squared:.3f}")


def _growth_figure(record: Record, path: Path) -> Any:
    shown = record["growth"]
    figure = Figure(figsize=(10, 5.6), layout="constrained")
    rows = []
    for axes, series in zip(figure.subplots(2, 3).flat, shown, strict=True):
        x = [point["x"] for point in series["points"]]
        middle = [median(point["seconds"]) for point in series["points"]]
        low, high = ([end(point["seconds"]) for point in series["points"]] for end in (min, max))
        bars = [[m - a for m, a in zip(middle, low, strict=True)], [b - m for m, b in zip(middle, high, strict=True)]]
        axes.errorbar(x, middle, yerr=bars, fmt="o", color="#0072B2", capsize=3)
        fit = _fit(series)
        if fit is not None:
            axes.plot(x, [exp(fit.intercept) * value**fit.slope for value in x], "--", color="#000000")
        axes.set(xscale="log", yscale="log", xlabel=series["series"], ylabel="seconds")
        axes.set_xticks(x, [str(value) for value in x])
        ends = [middle[0], middle[-1]]
        axes.set_yticks(ends, [f"{value:.2g}" for value in ends])
        axes.minorticks_off()
        axes.set_title("" if fit is None else f"p = {fit.slope:.2f}", fontsize=10)
        names = ("x", "seconds (median)", "least", "greatest")
        rows += [
            {"series": series["series"], **dict(zip(names, values, strict=True))}
            for values in zip(x, middle, low, high, strict=True)
        ]
    alt = "Seconds against what grows, on logarithmic axes, with the fitted power laws"
    return save(figure, path, rows, "How cost grows", alt)


def _bfloat16(folder: Path) -> str:
    """AP of detectors that were trained in float32 and in bfloat16, seed by seed."""
    values: dict[str, dict[str, dict[int, float]]] = {}
    for run in find_runs([folder]):
        record = run.record
        if record.task != "segmentation":
            continue
        precision = "bf16" if record.config["SOLVER"]["AMP"]["ENABLED"] else "fp32"
        for metric in ("bbox/AP", "segm/AP"):
            value = record.metrics[metric]
            assert value is not None
            values.setdefault(metric, {}).setdefault(precision, {})[record.seed] = value
    rows = []
    for metric, by_precision in values.items():
        cells = []
        for precision in ("fp32", "bf16"):
            found = summarize([*by_precision[precision].values()])
            cells.append(f"{found.mean:.2f} ± {found.std or 0:.2f} ({found.n})")
        comparison = compare(by_precision["fp32"], {"bf16": by_precision["bf16"]})["bf16"]
        said = comparison.sentence.replace("standard", "float32")
        rows.append([metric, *cells, said])
    table = Table.of(["metric", "fp32, mean ± std (seeds)", "bf16", "difference"], rows).to_markdown()
    return (
        "## Mask R-CNN trained in bfloat16: its AP\n\n`studies/bfloat16.yaml`: a short training of Mask R-CNN on the "
        f"COCO person subset in both precisions, from one backbone.\n\n{table}"
    )
