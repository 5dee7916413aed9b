"""The notebooks of examples/ run, on data of their layouts."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from robust_backbones.models import BackboneSpec, build_backbone
from tests.conftest import ROOT, randomize_batch_norms
from tests.hub import robustness_file

catalog = pytest.importorskip("detectron2.data", reason="Detectron2 is not installed: robust-backbones doctor")


def code_of(notebook: str) -> list[str]:
    cells = json.loads((ROOT / "examples" / notebook).read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.slow
def test_own_file_and_own_data(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its first cell says what is the user's: here a ResNet-18 and synthetic shapes for two iterations."""
    first, *cells = code_of("own_file_own_data.ipynb")
    assert sum(bool(line.strip()) for cell in [first, *cells] for line in cell.splitlines()) <= 25
    monkeypatch.chdir(tmp_path)
    network = build_backbone(BackboneSpec("resnet18", 10), seed=1)
    randomize_batch_norms(network)
    Path("my_file.pt").write_bytes(robustness_file(network))
    variables: dict[str, Any] = {}
    exec(first, variables)
    variables |= {"checkpoint": "my_file.pt", "images": str(shapes / "shapes/val")}
    variables |= {"annotations": str(shapes / "shapes/annotations/instances_val.json")}
    variables |= {"photo": str(next((shapes / "shapes/val").iterdir()))}
    variables["settings"] += ["SOLVER.MAX_ITER", 2, "SOLVER.STEPS", (), "SOLVER.AMP.ENABLED", False]
    variables["settings"] += ["INPUT.MIN_SIZE_TRAIN", (96,), "INPUT.MIN_SIZE_TEST", 96, "MODEL.DEVICE", "cpu"]
    variables["settings"] += ["DATALOADER.NUM_WORKERS", 0, "MODEL.RPN.POST_NMS_TOPK_TRAIN", 50]
    variables["settings"] += ["MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 16, "MODEL.RPN.POST_NMS_TOPK_TEST", 50]
    try:
        for cell in cells:
            exec(cell, variables)
    finally:
        catalog.DatasetCatalog.pop("my_data", None)
        catalog.MetadataCatalog.pop("my_data", None)
    assert "resnet18" in capsys.readouterr().out
    assert variables["error"] < 1e-4
    assert all(math.isfinite(variables["metrics"][f"{task}/AP"]) for task in ("bbox", "segm"))
    assert variables["objects"].has("pred_masks")
    assert Path("runs/my_detector/record.json").is_file()
