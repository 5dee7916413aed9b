"""A Swin goes through every command of detection, from its converted file to a report."""

from collections.abc import Callable
from pathlib import Path

import pytest

from robust_backbones.configs import CONFIG_DIR
from robust_backbones.runs.record import RunRecord
from tests.detection.conftest import SHAPES_CONFIG, SMALL
from tests.detection.tiny_networks import write_timm_file


@pytest.mark.slow
def test_from_the_file_to_the_report(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_tool: Callable[..., tuple[int, str, str]]
) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(shapes))
    images = sorted((shapes / "shapes/val").iterdir())

    def run(verb: str, *arguments: object) -> str:
        status, out, err = run_tool(verb, *arguments)
        assert status == 0, err
        return out

    source, runs = write_timm_file("tiny_swin", tmp_path), tmp_path / "runs"
    said = run("convert", source.path, tmp_path / "swin.pkl", "--threat-model", "Linf:4/255")
    assert "features are equal" in said
    assert said.count("not proven: at ") == 1  # at the other size the difference is rounding
    keys = [*SMALL, "MODEL.BACKBONE.NAME", "build_swin_fpn_backbone", "MODEL.BACKBONE.TIMM", "tiny_swin"]
    keys += ["MODEL.PIXEL_MEAN", [127.5] * 3, "MODEL.PIXEL_STD", [127.5] * 3, "SOLVER.AMP.DTYPE", "bfloat16"]
    keys += ["MODEL.WEIGHTS", tmp_path / "swin.pkl", "OUTPUT_DIR", runs / "swin", "TEST.EXPECTED_RESULTS", []]
    keys += ["SOLVER.MAX_ITER", 3, "SOLVER.STEPS", (), "SOLVER.IMS_PER_BATCH", 2, "DATALOADER.NUM_WORKERS", 0]
    files = ["--config-file", SHAPES_CONFIG, "--config-file", CONFIG_DIR / "protocols/swin.yaml"]
    run("train", *files, *keys, "INPUT.MIN_SIZE_TRAIN", (64,), "MODEL.DEVICE", "cpu")
    record = RunRecord.read(runs / "swin/record.json")
    assert (record.backbone["arch"], record.threat_model) == ("tiny_swin", "Linf:4/255")

    detector = [
        runs / "swin/config.yaml",
        runs / "swin/model_final.pth",
        "--output",
        tmp_path / "robust",
        "--workers",
        0,
    ]
    attack = ["--threat-model", "Linf:4/255", "--attack-steps", 1, "--attacks", "total", "--limit", 2]
    corrupted = ["--corruptions", "contrast", "--severities", 3, "--device", "cpu"]
    run("evaluate", "detector", *detector, *attack, *corrupted)
    attacked = RunRecord.read(tmp_path / "robust/cells/attack-total/record.json").metrics
    assert attacked["loss"] > attacked["clean_loss"]  # type: ignore[operator]

    run("predict", images[0], "--weights", runs / "swin", "--output", tmp_path / "found", "--device", "cpu")
    both = [f"before={tmp_path / 'swin.pkl'}", f"after={runs / 'swin/model_final.pth'}"]
    options = ["--image-size", 64, "--val-resize", 64, "--images", 2, "--device", "cpu", "--steps", 2]
    run("visualize", "inversion", *both, "--data", images[0].parent, *options, "--output", tmp_path / "inverted")
    run("report", runs, "--output", tmp_path / "report")
    assert "tiny_swin" in (tmp_path / "report/report.html").read_text()
