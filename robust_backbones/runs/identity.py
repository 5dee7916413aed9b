"""What a run is, and who may write its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from robust_backbones.errors import InputError
from robust_backbones.runs.files import write_json


def claim(output: Path, identity: dict[str, Any]) -> bool:
    """Make ``output`` the folder of the run that ``identity`` tells; True when that run has already finished there.

    Raises:
        InputError: the folder holds something else.
    """
    path = output / "config.json"
    if path.exists():
        held = json.loads(path.read_text())
        if different := sorted(key for key in identity.keys() | held.keys() if identity.get(key) != held.get(key)):
            raise InputError(
                f"{output} holds another run (it differs in {', '.join(different)}): choose another --output"
            )
        return (output / "record.json").exists()
    if output.exists() and any(output.iterdir()):
        raise InputError(f"{output} is not empty and holds no run of ours: choose another --output")
    write_json(path, identity)
    return False
