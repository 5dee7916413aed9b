"""What only a GPU would tell of devices: where tensors lie, and what the host waits for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.pretended_gpu import pretended_gpu

Run = Callable[..., tuple[int, str, str]]


def test_what_a_gpu_refuses_is_refused_and_waits_are_seen() -> None:
    with pretended_gpu() as waits:
        values, here = torch.arange(3.0, device="cuda"), torch.ones(3)
        assert (values.device.type, values.is_cuda, (values + 1).device.index) == ("cuda", True, 0)
        with pytest.raises(RuntimeError, match="on cuda:0 and on the CPU"):
            values + here
        with pytest.raises(RuntimeError, match="on cuda:0 and on the CPU"):
            here[values.long()]
        with pytest.raises(TypeError, match="numpy"):
            values.numpy()
        leaf = values.clone().requires_grad_()
        (leaf * here.to("cuda") + here.sum()).sum().backward()
        values.mul_(2).add_(1)
        assert waits == []
        assert leaf.grad.device.type == "cuda"
        assert (values.sum().item(), values.tolist(), values.cpu()[1].item()) == (9, [1, 3, 5], 3)
        assert waits == ["_local_scalar_dense", "tolist", "_to_copy"]
        values[values > 2]
        assert waits[3:] == ["index"]


@pytest.mark.slow
def test_pretraining_and_attacks_are_those_of_a_cpu(shapes: Path, run_tool: Run, tmp_path: Path) -> None:
    shape = ["--image-size", 32, "--val-resize", 32, "--threat-model", "L2:0.5", "--precision", "fp32", "--workers", 0]
    data = shapes / "shapes_classification"
    training = [
        "--arch",
        "resnet18",
        "--data",
        data,
        "--epochs",
        1,
        "--batch-size",
        16,
        "--lr",
        0.01,
        "--attack.steps",
        2,
    ]
    attacks = ["--data", data / "val", "--limit", 2, "--apgd-steps", 2, "--square-queries", 2]
    metrics = {}
    for device in ("cpu", "cuda"):
        run, found = tmp_path / device, tmp_path / f"{device}_attacked"
        with pretended_gpu() as waits:
            result = run_tool("pretrain", *training, *shape, "--device", device, "--output", run)
            assert result[0] == 0, result
            # Both steps of the epoch are over before anything is read.
            assert device == "cpu" or waits[:3] == ["tolist", "_local_scalar_dense", "_to_copy"]
            network = run / "checkpoint.pt"
            result = run_tool(
                "evaluate", "classifier", network, *attacks, *shape, "--device", device, "--output", found
            )
            assert result[0] == 0, result
        rows = [json.loads((folder / "record.json").read_text())["metrics"] for folder in (run, found)]
        metrics[device] = {name: value for row in rows for name, value in row.items() if "second" not in name}
    assert metrics["cuda"] == pytest.approx(metrics["cpu"], abs=1e-4)


@pytest.mark.slow
def test_a_detector_learns_and_is_attacked_and_its_masks_are_encoded(
    shapes: Path, run_tool: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the step that hardly waits; the detections of the same weights are those of a CPU."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(shapes))
    run = tmp_path / "run"
    options = ["--config-file", "quick/mask_rcnn_R_18_FPN_shapes_instant.yaml", "MODEL.BACKBONE.FROM_SCRATCH", True]
    options += ["MODEL.WEIGHTS", "", "MODEL.FAST_STEP", True, "INPUT.MASK_FORMAT", "bitmask", "SOLVER.MAX_ITER", 2]
    options += ["SOLVER.STEPS", "()", "SOLVER.IMS_PER_BATCH", 2, "DATALOADER.NUM_WORKERS", 0, "TEST.VISUALIZE", 0]
    options += ["SOLVER.AMP.ENABLED", False, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "TEST.EXPECTED_RESULTS", "[]"]
    with pretended_gpu():
        result = run_tool("train", "--num-gpus", 1, *options, "OUTPUT_DIR", run, "MODEL.DEVICE", "cuda")
        assert result[0] == 0, result
        found = json.loads((run / "inference/coco_instances_results.json").read_text())
        files = (run / "config.yaml", run / "model_final.pth")
        attack = [
            "--corruptions",
            "none",
            "--attacks",
            "classification",
            "--threat-model",
            "L2:0.5",
            "--attack-steps",
            1,
        ]
        result = run_tool(
            *(
                "evaluate",
                "detector",
                *files,
                *attack,
                "--limit",
                1,
                "--device",
                "cuda",
                "--output",
                tmp_path / "attacked",
            )
        )
        assert result[0] == 0, result
    again = ["--eval-only", "--config-file", run / "config.yaml", "MODEL.WEIGHTS", run / "model_final.pth"]
    result = run_tool("train", *again, "MODEL.DEVICE", "cpu", "OUTPUT_DIR", tmp_path / "cpu")
    assert result[0] == 0, result
    on_cpu = json.loads((tmp_path / "cpu/inference/coco_instances_results.json").read_text())
    assert len(found) > 0
    assert [row["segmentation"] for row in found] == [row["segmentation"] for row in on_cpu]
