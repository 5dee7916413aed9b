"""What the options of a training, saved beside its weights, say about how the network is fed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from robust_backbones.checkpoint.untrusted import Options
from robust_backbones.errors import InputError
from robust_backbones.models import is_number, is_triple

_OPTION_KEYS = (
    *("args", "opt", "options", "config", "cfg", "model_config", "hparams", "hyper_parameters"),
    *("normalize", "transform"),
)
"""Entries of a file with the options of a training, as a dictionary or an ``argparse.Namespace``."""
_OF_OTHERS = re.compile(
    "(?i)head|decod|class|proj|loss|aux|teacher|target|optim|sched|noise|(?<!con)text|lang|bert|transformer|mlp"
    "|tokeniz|discrimin|critic|(?<!bottle)neck|depth|thermal|infrared|lidar|audio|(^|_)init(?!_args)"
)
"""Names of options that do not concern the network, or only its weights before training."""
_OTHER_TYPE = re.compile("(?i)noise|discriminator|normal_?$")
"""What such options are of, by their ``type``, Hydra's ``_target_`` or Lightning's ``class_path``."""
_ORDER_KEYS = ("input_space", "channel_order", "color_order", "input_format", "FORMAT")
_NORMALIZES = re.compile("(no_|without_)?(do_|use_|input_|image_)?normali[sz](e|ation)(_(inputs?|images?))?")
_MEAN = re.compile("(?i)((ima?ge?|pixel|rgb|norm(ali[sz](e|ation))?|data(set)?|input)_)?means?")


class TrainingOptions:
    """The dictionaries of options in a file, except those of other networks; they may contain anything."""

    def __init__(self, content: dict[Any, Any]) -> None:
        plain = {key: value for key, value in content.items() if not isinstance(value, dict | Tensor)}
        self.dictionaries = [*_options_in([content.get(key) for key in _OPTION_KEYS], set()), plain]

    def values(self) -> dict[str, Any]:
        """What they say about mean, std and channel order."""
        fed = self._fed()
        said: dict[str, Any] = fed[0] if fed and not self._doubt() else {}
        for options in self.dictionaries:
            if orders := [options[key] for key in _ORDER_KEYS if options.get(key) in ("RGB", "BGR")]:
                said["channel_order"] = orders[0]
        return said

    def _fed(self) -> list[dict[str, Any]]:
        """Each mean, with the std beside it."""
        found = []
        for options in self.dictionaries:
            for name in filter(lambda name: isinstance(name, str) and _MEAN.fullmatch(name), options):
                mean, std = options[name], options.get(re.sub("(?i)mean", "STD" if name.isupper() else "std", name))
                three, deviations = _three(mean), _three(std)
                if three and (not is_number(mean) or _is_of_pixels(name, mean, deviations)):
                    found.append({"mean": three, "std": deviations})
        return found

    def _doubt(self) -> str:
        """What in them speaks against reading or assuming any mean and std."""
        fed = self._fed()
        for options in self.dictionaries:
            for name, value in options.items():
                match = _NORMALIZES.fullmatch(name) if isinstance(name, str) else None
                offs = ("true", "1") if match and match[1] else ("false", "0", "none")
                off = match and isinstance(value, int | str | None) and str(value).lower() in offs
                off = off and not (value is None and fed)  # where it may be a default
                in_units = name == "input_range" and value not in (None, [0, 1], (0, 1))
                if off or (in_units and not any(max(one["mean"]) > 1 for one in fed)):
                    return f"an option of its training says that its {name} is {value!r}"
        if any(not one["std"] for one in fed):
            return "options of its training say a mean without a std"
        return "options of its training say means or stds that differ" if any(one != fed[0] for one in fed) else ""

    def check_assumed(self) -> None:
        """Refuse to assume a mean if they speak against it."""
        if doubt := self._doubt():
            raise InputError(
                f"{doubt}: give --mean and --std, which are 0 0 0 and 1 1 1 where pixels in [0, 1] enter it"
            )


def _options_in(value: Any, seen: set[int]) -> Iterator[dict[Any, Any]]:
    """The dictionaries in options of a training, except those of other networks; each once."""
    value = value.values if isinstance(value, Options) else value
    if not isinstance(value, dict | list | tuple) or id(value) in seen:
        return
    seen.add(id(value))
    parts = value
    if isinstance(value, dict):
        kinds = [kind for key in ("type", "_target_", "class_path") if isinstance(kind := value.get(key), str)]
        if any(_OTHER_TYPE.search(kind.split(".")[-1]) for kind in kinds):
            return
        yield value
        parts = [part for name, part in value.items() if not _OF_OTHERS.search(str(name))]
    for part in parts:
        yield from _options_in(part, seen)


def _is_of_pixels(name: str, mean: float, std: tuple[float, ...]) -> bool:
    """Whether one number may be the mean of all channels; called no more than mean, it may be of weights or noise."""
    return min(std, default=0) > 0 and (0 < mean <= 1 if re.fullmatch("(?i)means?", name) else mean >= 0)


def _three(value: Any) -> tuple[float, ...]:
    """The three numbers of a list, tensor or text; three times a number, or the one of a list; or none."""
    value = value.flatten()[:4].tolist() if isinstance(value, Tensor) else [value] if is_number(value) else value
    value = value * 3 if isinstance(value, list | tuple) and len(value) == 1 else value
    if isinstance(value, str) and len(words := re.split(r"[\s,]+", value[:200].strip("[]() "))) == 3:
        value = [float(word) for word in words if re.fullmatch(r"-?\d*\.?\d+", word)]
    return tuple(value) if is_triple(value) else ()
