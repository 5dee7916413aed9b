"""What every command line shares: reading dataclasses from arguments, and errors as one sentence."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import TypeVar

import tyro

from robust_backbones.errors import InputError
from robust_backbones.threat_models import ThreatModel

T = TypeVar("T")
_registry = tyro.constructors.ConstructorRegistry()


@_registry.primitive_rule
def _threat_model(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec | None:
    """Threat models are one argument on the command line: ``L2:3``, ``Linf:4/255``."""
    if info.type not in (ThreatModel, ThreatModel | None):
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="NORM:EPSILON",
        instance_from_str=lambda arguments: ThreatModel.parse(arguments[0]),
        is_instance=lambda value: value is None or isinstance(value, ThreatModel),
        str_from_instance=lambda value: [str(value)],
    )


def parse(
    arguments_type: Callable[..., T], arguments: Sequence[str], *, description: str, default: T | None = None
) -> T:
    """Read a (nested) dataclass from command-line arguments; unknown names exit with status 2.

    ``default`` holds the values of the options that are not given, where they are not the dataclass's own.
    """
    options = {} if default is None else {"default": default}
    with _registry:
        return tyro.cli(arguments_type, args=list(arguments), description=description, **options)  # type: ignore[call-overload]


def run(main: Callable[[list[str]], int]) -> None:
    """Call ``main`` with the arguments and exit with its status: 0 done, 1 failed, 2 bad input, 75 preempted."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        status = main(arguments)
    except InputError as error:
        if len(arguments) < len(sys.argv) - 1:  # --debug was given
            traceback.print_exc()
        else:
            print(f"error: {error}", file=sys.stderr)
        status = error.exit_status
    except KeyboardInterrupt:
        status = 130
    except SystemExit as error:
        if not isinstance(error.code, int):
            raise
        status = error.code
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from robust_backbones.runs.distributed import leave

        leave(status)
    sys.exit(status)
