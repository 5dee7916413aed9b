"""Finds the records of runs, checks them, and keeps them in one file from which a report can be made again."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from robust_backbones.errors import InputError
from robust_backbones.runs.files import DAMAGED, write_text
from robust_backbones.runs.identity import flat
from robust_backbones.runs.record import RunRecord
from robust_backbones.threat_models import ThreatModel

RECORDS = "records.jsonl"
"""File in which a report keeps its records."""
PRIMARY = "primary.json"
"""File in which a study keeps the comparison that it declared before its runs."""


@dataclass(frozen=True)
class RecordedRun:
    """A record and its folder."""

    folder: Path
    record: RunRecord
    line: str = ""
    """For a records.jsonl: the file and the line."""

    @property
    def place(self) -> str:
        """The location of the record, for messages."""
        return self.line or str(self.folder)

    @property
    def weights(self) -> str:
        """Identifies its backbone's file: the sha256, or the file's name if the record has none."""
        return str(self.record.backbone.get("source_sha256") or self.weights_name)

    @property
    def weights_name(self) -> str:
        return self._weights_path.stem

    @property
    def named(self) -> str:
        """The name of its backbone in a sweep, by the folder of the conversion; empty if there was none."""
        found = re.fullmatch(r"convert-(.+)-[0-9a-f]{10}", self._weights_path.parent.name)
        return found[1] if found else ""

    @property
    def _weights_path(self) -> Path:
        model = self.record.config.get("MODEL", {})
        return Path(model.get("WEIGHTS", "") if isinstance(model, Mapping) else "")

    @property
    def seed(self) -> int:
        """The seed of training, even if a later evaluation has its own."""
        return int(self.record.config.get("SEED", self.record.seed))

    @property
    def is_from_scratch(self) -> bool:
        """Whether its backbone's weights were random."""
        return bool(flat(self.record.config).get("MODEL.BACKBONE.FROM_SCRATCH")) and not self.record.backbone


@dataclass(frozen=True)
class Primary:
    """The comparison that a study declared before its runs; its test is not corrected for others."""

    metric: str
    """As in records, such as ``segm/AP``."""
    runs: tuple[str, ...]
    """Folder names of the backbone's runs; it is compared with the standard one."""

    def names(self, metric: str, runs: Iterable[RecordedRun]) -> bool:
        """Whether it is about this metric of a backbone with these runs."""
        return metric == self.metric and any(run.folder.name in self.runs for run in runs)

    def write(self, path: Path) -> None:
        write_text(path, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Primary:
        """Read what ``write`` wrote; InputError if it is not such a file."""
        try:
            values = json.loads(path.read_text())
            return cls(str(values["metric"]), tuple(map(str, values["runs"])))
        except DAMAGED as error:
            raise InputError(
                f"{path} declares no comparison ({error!r}): remove it, and set its study up again"
            ) from None


def find_primary(folders: Sequence[str | Path]) -> Primary | None:
    """The declared comparison of the only study in these folders that has one.

    Raises:
        InputError: there are several, or a file is invalid.
    """
    found: dict[Primary, Path] = {}
    for path in (path for folder in map(Path, folders) for path in sorted(folder.rglob(PRIMARY))):
        found.setdefault(Primary.read(path), path)
    if len(found) > 1:
        raise InputError(
            f"{' and '.join(map(str, found.values()))} each declare a primary comparison, and a report has one: report "
            "the studies one by one"
        )
    return next(iter(found), None)


def find_runs(folders: Sequence[str | Path]) -> list[RecordedRun]:
    """Every record.json in these folders and their subfolders, and every record in a report's records.jsonl.

    Such a file may also be given itself. Runs that also occur in a report among them count once.

    Raises:
        InputError: a folder is missing or has no record; a file is not a record.
    """
    found: dict[Path, RecordedRun] = {}
    reports: dict[Path, list[RecordedRun]] = {}
    for folder in map(Path, folders):
        if folder.is_file() and folder.name in ("record.json", RECORDS):
            paths, collected = ([], [folder]) if folder.name == RECORDS else ([folder], [])
        elif folder.is_dir():
            paths, collected = sorted(folder.rglob("record.json")), sorted(folder.rglob(RECORDS))
        else:
            raise InputError(f"no folder {folder}: give folders of runs, or their record.json or {RECORDS}")
        if not paths and not collected:
            raise InputError(f"no record.json in {folder}: give folders of finished runs")
        for path in paths:
            if path.resolve() not in found:
                found[path.resolve()] = RecordedRun(path.parent, _checked(RunRecord.read(path), str(path)))
        for path in collected:
            if path.resolve() not in reports:
                reports[path.resolve()] = _read_records(path)
    runs, known = list(found.values()), {_line(run) for run in found.values()}
    for own in reports.values():
        runs += [run for run in own if _line(run) not in known]
        known |= {_line(run) for run in own}
    return runs


def write_records(runs: Sequence[RecordedRun], path: Path) -> None:
    """Write all records to one file that ``find_runs`` can read: one line each, with its folder's name."""
    write_text(path, "".join(f"{_line(run)}\n" for run in runs))


def _line(run: RecordedRun) -> str:
    return json.dumps({"folder": run.folder.name, **asdict(run.record)}, sort_keys=True)


def _read_records(path: Path) -> list[RecordedRun]:
    runs = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            folder, record = Path(values.pop("folder")), RunRecord.of(values)
        except DAMAGED as error:
            raise InputError(f"{path} holds no record in line {number} ({error}): make the report again") from None
        where = f"{path}, line {number}"
        runs.append(RecordedRun(path.parent / f"{number:04d}" / folder, _checked(record, where), where))
    return runs


def _checked(record: RunRecord, where: str) -> RunRecord:
    try:
        if record.threat_model is not None:
            ThreatModel.parse(record.threat_model)
    except InputError:
        raise InputError(f"{where} is not a run record (threat_model): remove it, or make its run again") from None
    return record
