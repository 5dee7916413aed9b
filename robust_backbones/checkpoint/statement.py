"""A network's preprocessing: what the user says, checked against the file and its authors' convention."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from robust_backbones.checkpoint.format import ASSUMED, BY_FILE, BY_USER, READING, Checkpoint
from robust_backbones.errors import InputError
from robust_backbones.models import IMAGENET_MEAN, BackboneSpec, check_normalization, is_number
from robust_backbones.threat_models import ThreatModel

_OPTION = re.compile(r"(?<=[ (])--(mean|std|channel-order|stride-in-1x1|threat-model|arch|key|prefix|source)\b")


@dataclass(frozen=True)
class Statement:
    """What the user says about a file; a contradicting file is refused, a source's convention is overridden."""

    mean: tuple[float, float, float] | None = None
    """Per channel, in [0, 1] pixel units."""
    std: tuple[float, float, float] | None = None
    channel_order: str | None = None
    """``RGB`` or ``BGR``."""
    stride_in_1x1: bool | None = None
    threat_model: str | ThreatModel | None = None
    """What it was trained against, such as ``"L2:3"``."""
    arch: str | None = None
    """timm's name of the network, if its tensors have timm's names and their shapes do not show it."""


def agreed(
    in_file: Mapping[str, Any],
    convention: Mapping[str, Any],
    statement: Statement,
    usual: BackboneSpec,
    of_options: Collection[str] = (),
) -> tuple[dict[str, Any], dict[str, str]]:
    """What the file, the user or the convention says, and the origin of each value of ``READING``.

    Args:
        of_options: names of the file's values that come from the options of its training, which may contain anything.

    Raises:
        InputError: the file contradicts the user; a value is not said; pixels in [0, 1] cannot have it.
    """
    stated = {name: value for name, value in vars(statement).items() if value is not None and name != "arch"}
    if "threat_model" in stated:
        stated["threat_model"] = ThreatModel.parse(stated["threat_model"])
    in_file = dict(in_file)
    for name, value in stated.items():
        said = in_file.get(name, value)
        if _close(said, value):
            continue
        if name not in ("mean", "std") or not _close([v / 255 for v in said], value):
            by_option = name in of_options
            raise InputError(
                f"{'an option of its training' if by_option else 'it'} says that its {name.replace('_', ' ')} is "
                f"{said}, not {value}: leave out {_option(name)}"
                + " or, if that is not of its input, save its state_dict alone"
                * by_option
            )
        del in_file[name]  # in units of 0-255, which the user mends
    values = {**convention, **stated, **in_file}
    if any(name not in values for name in READING):
        unsaid = [name for name in READING if name not in stated and name not in in_file]
        imagenet, own = ({name: getattr(spec, name) for name in unsaid} for spec in (BackboneSpec(), usual))
        timms = {name: value for name, value in own.items() if value != imagenet[name]}
        raise InputError(
            f"it does not say what it was fed with: give {' '.join(map(_option, unsaid))} (ImageNet's usual ones are "
            f"{_options(imagenet)}" + (f"; of timm's own {usual.arch} {_options(timms)}" if timms else "") + ")"
        )
    check_normalization(values["mean"], values["std"])
    who = {name: BY_FILE if name in in_file else BY_USER if name in stated else ASSUMED for name in READING}
    order = values["channel_order"]
    other = "BGR" if order == "RGB" else "RGB"
    usual_mean = IMAGENET_MEAN if other == "RGB" else IMAGENET_MEAN[::-1]
    if who["channel_order"] == ASSUMED and _close(values["mean"], usual_mean, 0.01):
        raise InputError(
            f"its mean is ImageNet's as of {other}, and {order} would be assumed: give --channel-order {other} or, if "
            f"images are {order} all the same, --channel-order {order}"
        )
    return values, who


def check_said(checkpoint: Checkpoint) -> None:
    """Refuse assumed values, with the options to say them."""
    if assumed := [name for name, who in checkpoint.said.items() if who == ASSUMED]:
        options = _options({name: getattr(checkpoint.spec, name) for name in assumed})
        raise InputError(f"neither it nor you say what is assumed: give {options}, if that is how it was trained")


def _options(values: Mapping[str, Any]) -> str:
    """As options of ``convert``, such as ``--mean 0.5 0.5 0.5 --stride-in-1x1 false``."""
    return " ".join(f"{_option(name)} {_argument(value)}" for name, value in values.items())


def _argument(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(f"{number:.6g}" for number in value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def in_python(message: str) -> str:
    """An error's message with the names of arguments in place of options, and the call that takes them."""
    message, *_ = message.split("; these are options of ")
    names = [option.replace("-", "_") for option in dict.fromkeys(_OPTION.findall(message))]
    message = _OPTION.sub(lambda found: found[1].replace("-", "_"), message)
    if not names or "leave out" in message:
        return message
    stated = ", ".join(f"{name}=..." for name in names if name in Statement.__dataclass_fields__)
    arguments = [f"{name}=..." for name in names if name not in Statement.__dataclass_fields__]
    arguments += [f"statement=Statement({stated})"] if stated else []
    return f"{message}; give what read_checkpoint(FILE, {', '.join(arguments)}) returns in place of the file"


def _close(a: Any, b: Any, tolerance: float = 1e-4) -> bool:
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(
            math.isclose(x, y, rel_tol=0, abs_tol=tolerance) if is_number(x) and is_number(y) else x == y
            for x, y in zip(a, b, strict=True)
        )
    return bool(a == b)
