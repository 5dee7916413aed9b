"""The trials in short: what kills, damaged files and hours do; and that a trial sees what it is there to see."""

import importlib
import sys
from pathlib import Path

import pytest

from tests.conftest import start_fork

pytest.importorskip("detectron2", reason="Detectron2 is not installed: tools/install_detectron2.py")


def trial(folder: Path, name: str, *options: object) -> str:
    """What it prints in a fork of this process; it must end with status 0."""
    main = importlib.import_module(f"tests.trials.{name}").main

    def run() -> None:
        sys.argv = [f"{name}.py", *map(str, options)]
        sys.exit(main())

    process = start_fork(run, folder)
    process.join()
    said = (folder / "out").read_text()
    assert process.exitcode == 0, said[-3000:] + (folder / "err").read_text()[-3000:]
    return said


@pytest.mark.slow
def test_kills_at_random_and_inside_writes_lose_nothing(tmp_path: Path) -> None:
    commands = ("pretrain", "train", "convert")
    said = trial(tmp_path, "kill", "--random", 3, "--inside", 3, "--keep", tmp_path, "--commands", *commands)
    assert "tried 6, survived 6, lost 0" in said


@pytest.mark.slow
def test_hundreds_of_damaged_files_are_read_or_refused(tmp_path: Path) -> None:
    said = trial(tmp_path, "fuzz", "--inputs", 400, "--keep", tmp_path).splitlines()
    assert len(said) == 8
    assert all("'read': " in line and "'refused': " in line for line in said if not line.startswith(("coco", "voc")))


def test_the_soak_sees_what_grows() -> None:
    from tests.trials.soak import judge

    def samples(per_minute: float) -> list[dict[str, float]]:
        level = [{"minutes": float(minute), "memory": 1000.0, "files": 11, "threads": 2} for minute in range(1, 41)]
        return [row | {"memory": row["memory"] + per_minute * row["minutes"]} for row in level]

    assert judge(samples(0)) == {"memory": 0, "files": 0, "threads": 0}
    assert judge(samples(1))["memory"] == pytest.approx(2, abs=0.1)  # 20 minutes lie between the quarters' middles
    assert judge([row | {"files": 11 + row["minutes"] // 10} for row in samples(0)])["files"] > 0
