"""Common parts of all command lines: reading options, and errors as one sentence."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import re
import sys
import textwrap
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Union

import tyro

from robust_backbones.errors import InputError, disk_error
from robust_backbones.runs.signals import end_on_signals

_registry = tyro.constructors.ConstructorRegistry()


@_registry.primitive_rule
def _threat_model(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec | None:
    """Threat models are one argument on the command line: ``L2:3``, ``Linf:4/255``."""
    from robust_backbones.threat_models import ThreatModel

    if info.type not in (ThreatModel, ThreatModel | None):
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="NORM:EPSILON",
        instance_from_str=lambda arguments: ThreatModel.parse(arguments[0]),
        is_instance=lambda value: value is None or isinstance(value, ThreatModel),
        str_from_instance=lambda value: [str(value)],
    )


def parse(options_type: Any, arguments: Sequence[str], *, description: str | None, default: Any = None) -> Any:
    """Read an ``options_type``, a dataclass or one for each command's name; unknown names exit with status 2.

    ``default`` has the values of options that are not given, if they differ from the dataclass's.
    """
    if isinstance(options_type, Mapping):
        named = (Annotated[kind, tyro.conf.subcommand(name)] for name, kind in options_type.items())
        options_type = Union[tuple(named)]  # noqa: UP007  # of a tuple
    defaults = {} if default is None else {"default": default}
    help_text = _Help()
    try:
        with _registry, contextlib.redirect_stdout(help_text):
            return tyro.cli(options_type, args=list(arguments), description=description, **defaults)
    finally:
        sys.stdout.write(_with_examples(_wrapped(help_text.getvalue()), description, arguments))


class _Help(io.StringIO):
    """What tyro prints, which looks at standard output for colours and for the letters that boxes are drawn with."""

    encoding = property(lambda self: getattr(sys.__stdout__, "encoding", None))

    def isatty(self) -> bool:
        return sys.__stdout__ is not None and sys.__stdout__.isatty()


def _wrapped(help_text: str) -> str:
    """``help_text`` with the paragraphs, which tyro makes one line each, and the blank lines, which it doubles."""
    lines = re.sub(r"\n{3,}", "\n\n", help_text).split("\n")
    prose = [line[:1] not in (" ", "\x1b", "│", "╭", "╰") and not line.startswith("usage: ") for line in lines]
    wrap = textwrap.TextWrapper(120, break_on_hyphens=False).fill
    return "\n".join(wrap(line) if is_prose else line for line, is_prose in zip(lines, prose, strict=True))


def _with_examples(help_text: str, description: str | None, arguments: Sequence[str]) -> str:
    """The help of a subcommand with those examples in its verb's ``description`` that are of it."""
    name = re.escape(arguments[0] if arguments else "")
    found = re.findall(rf"^    robust-backbones \S+ {name} .*(?:\n {{5,}}\S.*)*", description or "", re.MULTILINE)
    if not help_text or not found:
        return help_text
    box = re.search(r"^.*╭", help_text, re.MULTILINE)
    place = box.start() if box else len(help_text)
    return "\n".join((help_text[:place] + "Examples:", *found, "", help_text[place:]))


def parser(description: str | None) -> argparse.ArgumentParser:
    """For commands with few options; its help shows ``description`` unchanged."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return made


def run(main: Callable[[list[str]], int]) -> None:
    """Call ``main`` with the arguments and exit with its status: 0 done, 1 failed, 2 bad input, 75 preempted."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    # Of PyTorch to Detectron2's code: nothing that a user could mend.
    warnings.filterwarnings("ignore", message="torch.meshgrid", category=UserWarning)
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
    try:
        with end_on_signals():
            status = main(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads the output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except (InputError, OSError) as problem:
        error = problem if isinstance(problem, InputError) else disk_error(problem)
        if error is None:
            raise
        if len(arguments) < len(sys.argv) - 1:  # --debug was given
            traceback.print_exc()
        else:
            print(f"error: {error}", file=sys.stderr)
        status = error.exit_status
    except RuntimeError as problem:
        # Of several processes one has ended; the others' next collective call then fails, in gloo's or NCCL's words.
        lost = re.search("connection (closed|reset) by peer", str(problem), re.IGNORECASE)
        if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not lost:
            raise
        print("error: another process of this run has ended, and its message says why", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        print("interrupted: the same command continues from what was saved, `train` with --resume", file=sys.stderr)
        status = 130
    except SystemExit as error:
        if not isinstance(error.code, int):
            raise
        status = error.code
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from robust_backbones.runs.distributed import end_process

        end_process(status)
    sys.exit(status)
