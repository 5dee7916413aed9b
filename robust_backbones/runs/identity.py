"""The identity of a run: the settings that its results depend on.

Two runs are the same if their settings are the same, except for those in ``FREE``. A setting that is not in a file has
its default, so folders written before an option existed keep their identity.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from robust_backbones.errors import InputError
from robust_backbones.runs.files import DAMAGED

FREE = frozenset(
    {
        # Detectron2's keys: where a run works, what it shows, how often it saves. The number of data workers changes
        # which random augmentation an image gets, never how it is drawn.
        "OUTPUT_DIR",
        "VIS_PERIOD",
        "CUDNN_BENCHMARK",
        "DATALOADER.NUM_WORKERS",
        "MODEL.DEVICE",
        "SOLVER.CHECKPOINT_PERIOD",
        "TEST.REFERENCE_EVAL",
        "TEST.VISUALIZE",
        # Our commands' options.
        "output",
        "device",
        "workers",
        "jobs",
        "processes",
        "micro_batch_size",
        "errors",
    }
)
"""Settings that do not belong to a run's identity."""
FINGERPRINT = "data_fingerprint"
"""The setting, or those below it, that identifies data by content: from ``ClassificationDataset.fingerprint``."""
DIGESTS = "DATASETS.CONTENT"
"""The setting that identifies a detector's annotations by content: rows of (set, SHA-256)."""
Settings = Mapping[str, Any]


def flat(config: Settings, prefix: str = "") -> dict[str, Any]:
    """Values by their full names, tuples as lists: ``{"TEST": {"SIZES": (4, 5)}}`` -> ``{"TEST.SIZES": [4, 5]}``."""
    values: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            values |= flat(value, f"{prefix}{name}.")
        else:
            values[f"{prefix}{name}"] = _plain(value)  # YAML has names that are no texts
    return values


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def identity(config: Settings, defaults: Settings | None = None) -> dict[str, Any]:
    """The settings that distinguish a run, by their full names; those with the value in ``defaults`` are left out."""
    return {name: value for name, value in (flat(defaults or {}) | flat(config)).items() if name not in FREE}


def differences(held: Settings, own: Settings, defaults: Settings | None = None) -> list[str]:
    """Names of the settings in which two runs differ; empty if they are the same run."""
    one, other = identity(held, defaults), identity(own, defaults)
    return sorted(name for name in one.keys() | other.keys() if not _is_same(name, one.get(name), other.get(name)))


def _is_same(name: str, held: Any, own: Any) -> bool:
    """Whether values are equal; of fingerprints, three of four images, as unreadable ones may be repaired or removed.

    A folder from before fingerprints existed may have any data, and so may a set whose digest only one of two has.
    """
    if name == DIGESTS:
        one, other = dict(held or ()), dict(own or ())
        return all(one[data] == other[data] for data in one.keys() & other.keys())
    if name.partition(".")[0] != FINGERPRINT:
        return bool(held == own)
    if not (held and own):
        return True
    images, others = ({text[place : place + 4] for place in range(0, len(text), 4)} for text in (held, own))
    return 4 * len(images & others) >= 3 * max(len(images), len(others))


def digest(config: Settings, defaults: Settings | None = None) -> str:
    """Ten hexadecimal digits, the same for the same run, even after an option with a default has been added."""
    usual = identity(defaults or {})
    telling = {name: value for name, value in identity(config).items() if value != usual.get(name)}
    return hashlib.sha256(json.dumps(telling, sort_keys=True).encode()).hexdigest()[:10]


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a run's ``config.json`` or ``config.yaml``, by their full names.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        text = path.read_text()
        return flat(json.loads(text) if path.suffix == ".json" else yaml.safe_load(text))
    except (OSError, yaml.YAMLError, *DAMAGED):
        raise InputError(f"cannot read {path}: remove its folder, or choose another one") from None


def _difference(name: str, held: Any, own: Any) -> str:
    if name == DIGESTS:
        changed = [data for data, digest in own if dict(held).get(data, digest) != digest]
        return f"the files of {', '.join(changed)} have changed"
    short = [value[:10] if re.fullmatch("[0-9a-f]{64}", str(value)) else value for value in (held, own)]  # of a sha256
    held, own = short if short[0] != short[1] else (held, own)  # fingerprints may begin alike
    return f"{name} is {held} there and {own} here"


def check_same(folder: Path, held: Settings, own: Settings, defaults: Settings | None = None) -> None:
    """Refuse a folder that holds a run other than ``own``.

    Raises:
        InputError: it does; the message names the settings that differ.
    """
    if not (names := differences(held, own, defaults)):
        return
    one, other = identity(held, defaults), identity(own, defaults)
    names.sort(key=DIGESTS.__eq__)  # last, as other images have other content
    shown = ", ".join(_difference(name, one.get(name), other.get(name)) for name in names[:3])
    shown += f", and {len(names) - 3} more" * (len(names) > 3)
    raise InputError(f"{folder} holds another run ({shown}): choose another output folder")
