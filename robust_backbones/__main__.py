"""The command line: ``robust-backbones VERB ...``, or ``python -m robust_backbones VERB ...``."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable

import robust_backbones

VERBS = {
    "pretrain": "train a backbone adversarially, or normally at epsilon 0",
    "convert": "convert a checkpoint to Detectron2's format, and prove that its features did not change",
    "check-data": "find what is wrong with detection data, and repair it",
    "train": "train and evaluate Faster R-CNN or Mask R-CNN from a converted backbone",
    "evaluate": "measure classifiers and detectors under attack and under common corruptions",
    "predict": "find objects in images with a trained detector",
    "transfer": "transfer backbones to other classification data sets: linear probes and full fine-tuning",
    "inheritance": "measure how much robustness survives fine-tuning (ImageNet-RIB)",
    "visualize": "look at features: activation maximization, inversion, saliency",
    "sweep": "run a whole study from one YAML file, here or on a cluster",
    "report": "make tables, figures and one HTML page of finished runs",
    "demo": "the whole path on synthetic shapes, without a download",
    "doctor": "what is installed here, what is missing, and how to get it",
}


def command(verb: str) -> Callable[[list[str]], int]:
    """The ``main`` of a verb. Only its module is imported, because dependencies of other verbs may be missing."""
    match verb:
        case "pretrain":
            from robust_backbones.commands.pretrain import main
        case "convert":
            from robust_backbones.commands.convert import main
        case "check-data":
            from robust_backbones.commands.check_data import main
        case "train":
            from robust_backbones.commands.train import main
        case "evaluate":
            from robust_backbones.commands.evaluate import main
        case "predict":
            from robust_backbones.commands.predict import main
        case "transfer":
            from robust_backbones.commands.transfer import main
        case "inheritance":
            from robust_backbones.commands.inheritance import main
        case "visualize":
            from robust_backbones.commands.visualize import main
        case "sweep":
            from robust_backbones.sweep.command import main
        case "report":
            from robust_backbones.commands.report import main
        case "demo":
            from robust_backbones.commands.demo import main
        case "doctor":
            from robust_backbones.commands.doctor import main
        case _:
            raise KeyError(verb)
    return main


def unsupported(platform: str) -> str:
    """Why the verbs that write files cannot work on ``sys.platform``, and what to use instead; "" where they do."""
    if platform != "win32":
        return ""
    return (
        "Windows has no POSIX signals, file locks and synced folders, without which no run is kept whole: only doctor "
        "works, and the library's networks and attacks; use WSL 2 (https://learn.microsoft.com/windows/wsl/install)"
    )


def usage() -> str:
    width = max(map(len, VERBS))
    return "\n".join(
        (
            f"{robust_backbones.__doc__}\n\nusage: robust-backbones VERB [OPTIONS]\n",
            *(f"  {verb:<{width}}  {what}" for verb, what in VERBS.items()),
            "\nExample:\n  robust-backbones demo --output demo_output\n",
            "`robust-backbones VERB --help` lists a verb's options, with examples; --version names the version.",
            "Exit status: 0 done, 1 failed, 2 bad input, 75 preempted (give the same command again).",
        )
    )


def main() -> None:
    """Run the verb that the command line names, and exit with its status."""
    verb, *arguments = sys.argv[1:] or [""]
    if verb in VERBS.keys() - {"doctor"} and not {"-h", "--help"} & {*arguments} and (why := unsupported(sys.platform)):
        print(f"error: {why}", file=sys.stderr)
        sys.exit(2)
    if verb in VERBS:
        from robust_backbones.commands import cli

        sys.argv = [f"robust-backbones {verb}", *arguments]  # what the verb's usage line is to say
        try:
            run = command(verb)
        except ImportError as error:
            if "--debug" in arguments:
                raise
            print(f"error: {error}: `robust-backbones doctor` says what is missing and how to get it", file=sys.stderr)
            sys.exit(2)
        cli.run(run)
    if verb in ("-h", "--help", "help", ""):
        print(usage())
        sys.exit(0 if verb else 2)
    if verb == "--version":
        print(robust_backbones.__version__)
        sys.exit(0)
    near = difflib.get_close_matches(verb, VERBS, n=1, cutoff=0)[0]
    print(f"error: no verb {verb!r}: did you mean `robust-backbones {near}`? --help lists all", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
