"""Curves: what is in the files is what was written, once, also over a resume."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from robust_backbones.data.datasets import skip_list
from robust_backbones.errors import InputError
from robust_backbones.runs.clock import RunClock
from robust_backbones.runs.logs import RunLog, read_rows

ROWS = [{"step": step, "epoch": 1, "loss": 1 / step} for step in (1, 2, 3)]


def test_rows_and_curves_say_the_same_and_resuming_takes_back_what_comes_again(tmp_path: Path) -> None:
    first = RunLog(tmp_path, {"steps": []})
    for row in ROWS:
        first.write("steps", row)
    first.close()
    again = RunLog(tmp_path, {"steps": ROWS[:2]})  # the third step was not in the checkpoint
    again.write("steps", {**ROWS[2], "loss": 0.25})
    again.close()
    rows = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert rows == [*ROWS[:2], {"step": 3, "epoch": 1, "loss": 0.25}]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    curve = [(event.step, event.value) for event in events.Scalars("steps/loss")]
    assert curve == [(1, 1.0), (2, 0.5), (3, 0.25)]
    assert events.Tags()["scalars"] == ["steps/loss"]


@pytest.mark.parametrize("content", ["{", "[]", "null", "{}", "\0", "[" * 100_000, '{"seconds": "x", "step": "x"}'])
def test_a_damaged_file_of_a_resumed_run_is_named(content: str, tmp_path: Path) -> None:
    for name in ("seconds.json", "steps.jsonl", "skipped.json"):
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=r"seconds\.json is damaged .*: remove it"):
        RunClock(tmp_path).resume()
    with pytest.raises(InputError, match=r"steps\.jsonl is damaged .*: remove its damaged lines"):
        read_rows(tmp_path, "steps", lambda row: row["step"] <= 1)
    with pytest.raises(InputError, match=r"skipped\.json is damaged .*: remove it"):
        skip_list(tmp_path / "skipped.json", {"train": None}, workers=0)  # type: ignore[dict-item]


def test_nothing_but_rows_without_tensorboard(tmp_path: Path) -> None:
    log = RunLog(tmp_path, {"metrics": []}, tensorboard=False)
    log.write("metrics", ROWS[0])
    log.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_weights_and_biases_gets_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a stand-in that notes what it is given: the service is on the network."""
    calls: list[Any] = []
    run = SimpleNamespace(log=lambda values, step: calls.append((values, step)), finish=lambda: calls.append("finish"))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **given: calls.append(given) or run))
    log = RunLog(tmp_path, {"steps": []}, tensorboard=False, wandb_project="backbones", config={"lr": 0.1})
    log.write("steps", ROWS[1])
    log.close()
    assert calls[0] == {
        "project": "backbones", "name": tmp_path.name, "id": tmp_path.name, "resume": "allow", "config": {"lr": 0.1}
    }  # fmt: skip
    assert calls[1:] == [({"steps/loss": 0.5, "epoch": 1}, 2), "finish"]


def test_weights_and_biases_that_is_not_installed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match="pip install wandb"):
        RunLog(tmp_path, {"steps": []}, tensorboard=False, wandb_project="backbones")
