"""Files appear whole or not at all; records come back as they went."""

from pathlib import Path

import pytest

from robust_backbones.errors import InputError
from robust_backbones.runs.files import atomic_path, write_json
from robust_backbones.runs.record import RunRecord

RECORD = RunRecord("r", "pretrain", {"arch": "resnet50"}, "L2:3", "d", {"clean_accuracy": 1.5, "x": None}, 0, {}, 2.0)


def test_round_trip(tmp_path: Path) -> None:
    RECORD.write(tmp_path / "record.json")
    assert RunRecord.read(tmp_path / "record.json") == RECORD
    assert RECORD.versions["torch"]


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    write_json(path, {"old": 1})
    with pytest.raises(KeyboardInterrupt), atomic_path(path) as temporary:
        temporary.write_text("half a f")
        raise KeyboardInterrupt
    assert path.read_text() == '{\n  "old": 1\n}\n'
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"run_id": 1'])
def test_what_is_no_record_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "record.json"
    with pytest.raises(InputError, match="no record"):
        RunRecord.read(path)
    path.write_text(content)
    with pytest.raises(InputError, match="not a run record"):
        RunRecord.read(path)
