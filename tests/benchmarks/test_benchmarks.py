"""Benchmarks: what must be equal is compared before any time counts, and the page says what the records say."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks.inference import Inference
from benchmarks.memory import MEGABYTE, held
from benchmarks.networks import equal_losses, judged
from benchmarks.page import ON_A_GPU, summary, write_page
from benchmarks.peers import NEEDED, PEERS, peers_python
from benchmarks.turns import Arrays, Side, Way, take_turns
from benchmarks.work import Check, Reach, Work, ratios, require
from benchmarks.worker import kernel_seconds
from torch import Tensor, nn

from robust_backbones.checkpoint.format import write_checkpoint
from robust_backbones.classification.compute import computes_bfloat16
from robust_backbones.classification.folding import FoldedTwin
from robust_backbones.errors import InputError, ProofFailedError, TrainingFailedError
from robust_backbones.models import BackboneSpec, NormalizedModel, build_backbone

Run = Callable[..., tuple[int, str, str]]


def no_peers() -> Path:
    raise AssertionError("no way is a peer's")


def turns_of(ways: list[Way], check: Callable[[Mapping[str, Arrays]], None], rounds: int = 2) -> dict:
    return take_turns(ways, check, rounds=rounds, warm_up=1, threads=1, device="cpu", peers_python=no_peers)


class WorkerHere:
    """A worker of ``turns`` in this process: the same Side, without a new Python for each way."""

    def __init__(self, way: Way, python: Path, *, threads: int, device: str) -> None:
        module, _, function = way.make.partition(":")
        make = getattr(importlib.import_module(f"benchmarks.{module}"), function)
        self._side: Side = make(**way.options, device=device)

    def run(self) -> tuple[float, float]:
        self._side.run()
        return 1.0, 1.0

    def result(self) -> Arrays:
        return self._side.result()

    def __enter__(self) -> WorkerHere:
        return self

    def __exit__(self, *error: object) -> None:
        pass


HEADS = [Way("few", "growth:heads", {"count": 3}), Way("many", "growth:heads", {"count": 6})]


def test_every_way_gets_its_turns_and_is_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.turns.Worker", WorkerHere)
    seen: list[set[str]] = []
    times = turns_of(HEADS, lambda results: seen.append(set(results)))
    assert seen == [{"few", "many"}]
    assert {name: (len(t.seconds), len(t.wall)) for name, t in times.items()} == {"few": (2, 2), "many": (2, 2)}
    assert all(value > 0 for t in times.values() for value in t.seconds + t.wall)


def test_kernels_are_those_of_one_turn_and_leave_the_gpu_idle_for_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU has none, but the profiler's names."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert kernel_seconds(Side(lambda: torch.ones(9).sum(), dict)) == 0
    record = record_of("training-step", **rows_of(slow=[2.0], fast=[1.0]))
    assert "idle" not in summary(record)
    for row in record["rows"]:
        row["kernels"] = 0.9
    assert [line.split("|")[-2].strip() for line in summary(record).splitlines()[2:]] == ["55 %", "10 %"]


@pytest.mark.slow
def test_a_way_that_fails_is_named_with_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    broken = [Way("broken", "growth:heads", {"count": 3, "colour": "red"})]
    with pytest.raises(TrainingFailedError, match=r"'broken' ended with status 1: TypeError.*'colour'"):
        turns_of(broken, lambda results: None)
    assert "Traceback" in capsys.readouterr().err


@dataclass(frozen=True, kw_only=True)
class Unequal(Work):
    """Two ways whose results are said to differ."""

    name = "unequal"
    title = "Unequal"

    def ways(self) -> list[Way]:
        return HEADS

    def check(self, results: Mapping[str, Arrays]) -> list[Check]:
        return [Check("the same", 0.0, 0.0), Check("gap", 2.0, 1.0)]


def test_ways_that_differ_leave_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.turns.Worker", WorkerHere)
    work = Unequal(output=tmp_path, device="cpu")
    with pytest.raises(ProofFailedError, match="gap: 2, and 1 is allowed"):
        work.measure()
    assert not work.record.exists()


def test_not_a_number_is_no_equality() -> None:
    require([Check("at the limit", 1.0, 1.0)])
    with pytest.raises(ProofFailedError):
        require([Check("gap", float("nan"), 1.0)])


def test_ratios_are_those_of_each_turn() -> None:
    """The second turn was slow for both: the ratio does not move, that of the sums would."""
    assert ratios([1.0, 10.0, 1.0], [2.0, 20.0, 3.0]) == (2.0, 2.0, 3.0)


# --- what is measured ---


@pytest.mark.slow
def test_loading_compares_pixels_and_times(run_tool: Run, shapes: Path, tmp_path: Path) -> None:
    photographs = shapes / "shapes_classification/val/circle"
    arguments = ["--data", photographs, "--output", tmp_path, "--images", "6", "--rounds", "1", "--image-size", "32"]
    status, out, _ = run_tool("benchmark", "loading", *arguments, "--device", "cpu")
    assert status == 0
    assert str(tmp_path / "loading.json") in out.splitlines()[-1]
    record = json.loads((tmp_path / "loading.json").read_text())
    assert record["checks"] == [{"what": "decoded pixels that differ from Pillow's", "found": 0.0, "limit": 0.0}]
    assert [len(row["seconds"]) for row in record["rows"]] == [1, 1, 1]
    assert summary(record) in out


@pytest.mark.slow
def test_a_training_step_of_ours_is_the_plain_one(
    run_tool: Run, trained: tuple[NormalizedModel, Tensor, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Times are no test's business, and processes that of ``loading``; the equality that the benchmark demands is."""
    monkeypatch.setattr("benchmarks.turns.Worker", WorkerHere)
    model = trained[0]
    run = tmp_path / "networks/resnet18"
    run.mkdir(parents=True)
    weights = model.backbone.state_dict()
    write_checkpoint(run / "checkpoint.pt", spec=BackboneSpec("resnet18", 4), state_dict=weights, threat_model=None)
    (run / "record.json").write_text("{}")
    size = ["--arch", "resnet18", "--image-size", "32", "--batch-size", "4", "--rounds", "1", "--epsilon", "0.2"]
    status, out, err = run_tool(
        "benchmark", "training-step", "--output", tmp_path, "--device", "cpu", "--no-peers", *size
    )
    assert status == 0, err
    record = json.loads((tmp_path / "training-step.json").read_text())
    in_bf16 = [check for check in record["checks"] if "bf16" in check["what"]]
    assert len(record["checks"]) - len(in_bf16) == 12
    assert len(in_bf16) == (2 if computes_bfloat16() else 0)
    assert not [row["way"] for row in record["rows"] if row["peer"]]
    # What refers to the peer, or to bfloat16 in software, was not measured, and is not said to be anything else.
    assert [reach["found"] is None for reach in record["reaches"]] == [True, True, False, not computes_bfloat16()]
    assert "not measured" in out


@pytest.mark.slow
def test_a_probe_in_one_pass_gives_the_weights_of_single_runs(
    run_tool: Run, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Times are no test's business; the equality that the benchmark demands is."""
    monkeypatch.setattr("benchmarks.turns.Worker", WorkerHere)
    size = ["--arch", "resnet18", "--image-size", "32", "--images", "16", "--epochs", "2"]
    arguments = ["--data", shapes / "shapes_classification", "--output", tmp_path, "--device", "cpu", *size]
    status, _, err = run_tool("benchmark", "probe", *arguments)
    assert status == 0, err
    record = json.loads((tmp_path / "probe-32px-2epochs.json").read_text())
    (check,) = record["checks"]
    assert 0 <= check["found"] < 1e-5
    ways = 3 if computes_bfloat16() else 2
    assert [len(row["seconds"]) for row in record["rows"]] == [1] * ways


@pytest.mark.slow
@pytest.mark.real_data
def test_detections_of_both_evaluations_have_the_same_masks(
    run_tool: Run, real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.turns.Worker", WorkerHere)
    arguments = ["--coco", real_data / "detectron2/coco", "--images", 1, "--short-side", 64, "--rounds", 1]
    status, _, err = run_tool("benchmark", "inference", *arguments, "--device", "cpu", "--output", tmp_path)
    assert status == 0, err
    different, missing = json.loads((tmp_path / "inference.json").read_text())["checks"]
    assert (different["found"], missing["found"]) == (0, 0)


def test_masks_are_compared_whatever_their_order(tmp_path: Path) -> None:
    work = Inference(coco=tmp_path, device="cpu")
    ours, theirs = ({"masks": np.array(masks)} for masks in ([1, 2, 2], [2, 3, 1]))
    assert [check.found for check in work.check({"ours": ours, "Detectron2": theirs})] == [pytest.approx(100 / 3), 0]


def test_what_autograd_holds_is_counted() -> None:
    """Convolution and ReLU in place: the input, for the convolution, and the output, for both."""
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True), nn.Flatten())
    images, labels = torch.rand(2, 3, 8, 8), torch.tensor([0, 1])
    logits = 4 * 8 * 8
    # Cross-entropy holds the log-probabilities, the labels and a total weight.
    expected = 4 * (3 * 64 + logits + logits) + 8 + 4 / 2
    assert held(network, images, labels) * MEGABYTE == pytest.approx(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_twin_holds_half_of_what_the_network_does(dtype: torch.dtype) -> None:
    spec = BackboneSpec("resnet18", 4)
    model = NormalizedModel(build_backbone(spec), spec).eval()
    images, labels = torch.rand(2, 3, 64, 64), torch.tensor([0, 1])
    most = {torch.float32: 0.5, torch.bfloat16: 0.25}[dtype]
    assert held(FoldedTwin(model, dtype), images, labels) <= most * held(model, images, labels)


def test_examples_are_judged_by_losses_and_accuracy() -> None:
    """A network that says its input: the losses by hand."""
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
    labels = torch.tensor([0, 1, 1])
    losses, accuracy = judged(nn.Identity(), logits.numpy(), labels)
    by_hand = [np.log(1 + np.exp(-2.0)), np.log(1 + np.exp(-1.0)), np.log(1 + np.exp(3.0))]
    assert losses == pytest.approx(by_hand, abs=1e-6)
    assert accuracy == pytest.approx(200 / 3, abs=1e-4)


@pytest.mark.parametrize(
    ("gaps", "holds"),
    [
        ([0.0] * 99 + [0.03], [True, True]),  # one image at a kink
        ([0.0] * 98 + [0.03] * 2, [False, True]),
        ([0.0] * 99 + [0.2], [True, False]),
        ([2e-4] * 100, [False, True]),  # another attack, if a similar one
        ([-2e-4, 2e-4] * 50, [False, True]),
        ([float("nan")] + [0.0] * 99, [True, False]),
        ([0.0] * 15 + [0.01], [True, True]),
        ([0.0] * 14 + [0.003] * 2, [False, True]),
    ],
)
def test_equal_losses_forgive_one_image_and_no_other_attack(gaps: list[float], holds: list[bool]) -> None:
    reference = {"losses": np.linspace(0, 3, len(gaps))}
    checks = equal_losses("x", {"losses": reference["losses"] + np.array(gaps)}, reference)
    assert [check.found <= check.limit for check in checks] == holds


# --- the page ---


def record_of(name: str, **content: object) -> dict:
    machine = {"processor": "P", "instructions": "AVX512, no AMX", "bf16_over_fp32": 0.5}
    options = {"device": "cpu", "threads": 1}
    shared = {"name": name, "title": f"The work {name}", "remark": "", "options": options, "machine": machine}
    return {**shared, "versions": {"torch": "2"}, **content}


def rows_of(**seconds: list[float]) -> dict:
    rows = [{"way": way, "peer": "", "seconds": values, "wall": values} for way, values in seconds.items()]
    return {"rows": rows, "count": 10, "unit": "image", "checks": []}


@pytest.mark.parametrize(("found", "verdict"), [(2.0, "reached"), (1.99, "not reached")])
def test_what_was_to_be_reached_is_said_to_be_or_not(found: float, verdict: str) -> None:
    reach = {**vars(Reach("ours", "theirs", at_least=2)), "found": [found, found, found]}
    record = record_of("loading", **rows_of(theirs=[found], ours=[1.0]), reaches=[reach])
    line = summary(record).splitlines()[-1]
    assert f"{found:.2f}x" in line
    assert re.search(r"[|*] *(\**(?:not )?reached\**) *\|$", line)[1].strip("*") == verdict  # type: ignore[index]


def test_a_power_law_is_found(tmp_path: Path) -> None:
    points = [{"x": x, "seconds": [0.5 * x**1.5] * 3} for x in (1, 2, 4, 8)]
    series = [{"series": f"s{number}", "points": points} for number in range(6)]
    (tmp_path / "records").mkdir()
    (tmp_path / "records/growth.json").write_text(json.dumps(record_of("growth", growth=series)))
    write_page(tmp_path / "records", tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert "| s0 | 1: 0.50, 2: 1.41, 4: 4.00, 8: 11.31 | 1.50 | 1.000 |" in text
    assert (tmp_path / "records/growth.png").exists()
    # What has no record says so, and nothing else.
    assert "| training-step |  |  |  | not measured |  |" in text
    assert text.count("of the Hopper class") == len(ON_A_GPU)


def test_the_same_work_on_two_processors_stands_twice(tmp_path: Path) -> None:
    reach = {**vars(Reach("ours", "theirs", at_least=2)), "found": [3.0, 3.0, 3.0]}
    record = record_of("attack", **rows_of(theirs=[3.0], ours=[1.0]), reaches=[reach])
    slower = {**record, "machine": {**record["machine"], "processor": "Q"}, "reaches": [{**reach, "found": [1.0] * 3}]}
    for name, content in (("attack", record), ("attack-q", slower)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    write_page(tmp_path, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert "| The work attack, on P | ours | theirs | >= 2x | 3.00x | reached |" in text
    assert "| The work attack, on Q | ours | theirs | >= 2x | 1.00x | **not reached** |" in text


def test_a_page_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no records"):
        write_page(tmp_path, tmp_path / "page.md")


def test_peers_are_installed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subprocess.run", lambda *_, **__: pytest.fail("it installs again"))
    (tmp_path / "installed.txt").write_text("\n".join((*PEERS, *NEEDED)))
    assert peers_python(tmp_path) == tmp_path / "bin/python"


def test_peers_that_cannot_be_had_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise OSError("no route")

    monkeypatch.setattr("subprocess.run", no_network)
    with pytest.raises(InputError, match=r"no route.*--no-peers"):
        peers_python(tmp_path / "peers")
    assert not (tmp_path / "peers/installed.txt").exists()
