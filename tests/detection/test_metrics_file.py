"""metrics.json: a line an iteration, each written once, whatever joins it later, and nothing lost to a kill."""

import json
from pathlib import Path
from typing import Any

import pytest
from detectron2.utils.events import EventStorage

from robust_backbones.detection import metrics_file
from robust_backbones.detection.metrics_file import MetricsFile
from robust_backbones.errors import InputError


def logged(path: Path, start: int, end: int, evaluated: int = -1) -> None:
    """Iterations from ``start``, each written, and the evaluation of one that joins its line later."""
    with EventStorage(start) as storage:
        writer = MetricsFile(path, start)
        for iteration in range(start, end):
            storage.iter = iteration
            storage.put_scalar("total_loss", float(iteration), smoothing_hint=False)
            writer.write()
            writer.write()
            if iteration == evaluated:
                storage.put_scalars(**{"bbox/AP": 50.0}, smoothing_hint=False, cur_iter=iteration)
                writer.write()


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def expected(end: int, evaluated: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{"iteration": iteration, "total_loss": float(iteration)} for iteration in range(end)]
    found[evaluated]["bbox/AP"] = 50.0
    return found


@pytest.mark.parametrize("line", ["{x}", "{}", '{"iteration": "x"}', "[" * 100_000 + "}"])
def test_a_damaged_line_is_named(line: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text(f"{line}\n")
    with pytest.raises(InputError, match=r"metrics\.json is damaged .*: remove its damaged lines"):
        MetricsFile(tmp_path / "metrics.json", 1)


@pytest.mark.parametrize("cut", [0, 1, 30])
@pytest.mark.parametrize("evaluated", [2, 4])
def test_a_line_an_iteration_over_a_kill(cut: int, evaluated: int, tmp_path: Path) -> None:
    """The checkpoint is of iteration 3; a kill leaves later lines, the last one cut off, and they are logged again."""
    path = tmp_path / "metrics.json"
    logged(path, 0, 6, evaluated=2)
    path.write_text(path.read_text()[: -cut or None])
    if evaluated == 2:
        logged(path, 3, 6)
    else:
        logged(path, 3, 6, evaluated=4)
    wanted = expected(6, 2)
    if evaluated == 4:
        wanted[4]["bbox/AP"] = 50.0
    assert rows(path) == wanted


def test_new_lines_are_added_and_old_ones_are_not_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = []
    original = metrics_file.write_text
    monkeypatch.setattr(metrics_file, "write_text", lambda path, text: whole.append(path) or original(path, text))
    logged(tmp_path / "metrics.json", 0, 50, evaluated=20)
    assert len(whole) == 2  # the first line, and the one that an evaluation joins
    assert rows(tmp_path / "metrics.json") == expected(50, 20)
