"""The trials in short: what kills, damaged files and hours do; and that a trial sees what it is there to see."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytest.importorskip("detectron2", reason="Detectron2 is not installed: tools/install_detectron2.py")


def trial(name: str, *options: object) -> str:
    """What it prints; it must end with status 0."""
    command = [sys.executable, f"tests/trials/{name}.py", *map(str, options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


@pytest.mark.slow
def test_kills_at_random_and_inside_writes_lose_nothing(tmp_path: Path) -> None:
    commands = ("pretrain", "train", "evaluate classifier", "convert")
    said = trial("kill", "--random", 4, "--inside", 4, "--keep", tmp_path, "--commands", *commands)
    assert "tried 8, survived 8, lost 0" in said


@pytest.mark.slow
def test_thousands_of_damaged_files_are_read_or_refused(tmp_path: Path) -> None:
    said = trial("fuzz", "--inputs", 1_600, "--keep", tmp_path).splitlines()
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
