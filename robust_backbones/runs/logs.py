"""A run's curves while it runs: JSON lines, TensorBoard, and optionally Weights & Biases."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from robust_backbones.errors import InputError
from robust_backbones.runs.files import refuse_damaged, write_jsonl


def read_rows(folder: Path, name: str, covered: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """The rows of ``folder/name.jsonl`` that are ``covered`` by the checkpoint of a resumed run."""
    path = folder / f"{name}.jsonl"
    with refuse_damaged(path, "remove its damaged lines"):
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [row for row in rows if covered(row)]


class RunLog:
    """Rows of numbers, each with its ``step``, written to ``folder`` and shown by TensorBoard.

    ``rows`` are those of a resumed run's past: other rows in the files are of steps that will be repeated.

    Args:
        wandb_project: the Weights & Biases project to log to as well; empty is none.
        config: what to show beside the curves there.
    """

    def __init__(
        self,
        folder: Path,
        rows: Mapping[str, list[dict[str, Any]]],
        *,
        tensorboard: bool = True,
        wandb_project: str = "",
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = folder
        self.rows = {name: list(past) for name, past in rows.items()}
        last_step = max((row["step"] for past in self.rows.values() for row in past), default=0)
        self._writer, self._wandb = None, None
        if tensorboard:
            # Imported here: it takes a second, and not every command logs.
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=last_step + 1)
        if wandb_project:
            try:
                import wandb
            except ImportError:
                raise InputError("--wandb needs the package wandb: pip install wandb, or leave it out") from None
            self._wandb = wandb.init(
                project=wandb_project, name=folder.name, id=folder.name, resume="allow", config=dict(config or {})
            )

    def write(self, name: str, row: dict[str, Any]) -> None:
        """Add ``row`` to ``folder/name.jsonl``; its ``step`` and ``epoch`` are its position on the curves."""
        self.rows[name].append(row)
        write_jsonl(self.folder / f"{name}.jsonl", self.rows[name])
        curves = {f"{name}/{key}": value for key, value in row.items() if key not in ("step", "epoch")}
        if self._writer is not None:
            for key, value in curves.items():
                self._writer.add_scalar(key, value, row["step"])
            self._writer.flush()
        if self._wandb is not None:
            self._wandb.log({**curves, "epoch": row["epoch"]}, step=row["step"])

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        if self._wandb is not None:
            self._wandb.finish()
