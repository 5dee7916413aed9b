"""Show what is installed, what is missing, and the command that fixes it.

Examples:
    robust-backbones doctor
    robust-backbones doctor --install-detectron2
    robust-backbones doctor --published ~/.cache/robust_backbones/published

Exit status: 0 if detectors can be trained here, 1 if something needed for it is missing. With --published, 0 if FOLDER
has every published backbone unchanged, 1 if one is missing or is another file, 2 without FOLDER.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import robust_backbones
from robust_backbones.checkpoint.convert import convert
from robust_backbones.checkpoint.sources import read_published
from robust_backbones.checkpoint.zoo import REPOSITORY, PublishedBackbone, cache_folder, published
from robust_backbones.commands import cli, install_detectron2
from robust_backbones.errors import InputError

NEEDED = {
    "torch": "torch",
    "torchvision": "torchvision.ops",
    "numpy": "numpy",
    "pycocotools": "pycocotools.mask",
    "faster-coco-eval": "faster_coco_eval",
    "fvcore": "fvcore",
    "pyautoattack": "pyautoattack",
    "timm": "timm",
}
"""Package -> the module to import."""
OPTIONAL = {
    "imagecorruptions-imaug": ("common corruptions", "pip install 'robust-backbones[corruptions]'"),
    "POT": ("distances between data sets (inheritance)", "pip install 'robust-backbones[inheritance]'"),
    "submitit": ("jobs of a Slurm cluster", "pip install 'robust-backbones[slurm]'"),
}
"""Package -> its purpose, and how to install it."""
DATA_SETS = {
    "COCO 2017": ("coco/annotations/instances_train2017.json", "coco/train2017", "coco/val2017"),
    "VOC 2007": ("VOC2007/Annotations", "VOC2007/ImageSets", "VOC2007/JPEGImages"),
    "VOC 2012": ("VOC2012/Annotations", "VOC2012/ImageSets", "VOC2012/JPEGImages"),
}
"""Title -> the files that Detectron2 reads in DETECTRON2_DATASETS."""


@dataclass(frozen=True)
class Finding:
    """The result of one check; ``mend`` is empty if there is nothing to do."""

    name: str
    found: str
    mend: str = ""
    needed: bool = False


@dataclass(frozen=True)
class PublishedFile:
    """One published backbone's file in a folder."""

    file: str
    state: str
    """``right``, ``missing`` or ``wrong``."""
    detail: str
    """Description, or what to do."""


def main(arguments: list[str]) -> int:
    parser = cli.parser(__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--install-detectron2", action="store_true", help="install Detectron2, which is not on PyPI")
    parser.add_argument("--published", type=Path, metavar="FOLDER", help="check the published backbones in a folder")
    options = parser.parse_args(arguments)
    if options.install_detectron2 and (options.json or options.published):
        raise InputError("--install-detectron2 installs, which is no part of a --json document or of --published")
    if options.published:
        return check_published(options.published, in_json=options.json)
    if options.install_detectron2 and (status := install_detectron2.install()):
        return status
    findings = list(examine())
    missing = [finding for finding in findings if finding.mend and finding.needed]
    if options.json:
        print(json.dumps({"usable": not missing, "findings": [asdict(finding) for finding in findings]}, indent=2))
        return int(bool(missing))
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        mark = "MISSING" if finding in missing else "   -   " if finding.mend else "  ok   "
        print(f"{mark} {finding.name:<{width}}  {finding.found}")
        if finding.mend:
            print(f"{'':{width + 10}}{finding.mend}")
    print(f"detectors cannot be trained here yet: {', '.join(m.name for m in missing)}" if missing else "ready")
    return int(bool(missing))


def check_published(folder: Path, *, in_json: bool) -> int:
    """Check every published backbone's file in ``folder``, offline."""
    if not folder.is_dir():
        raise InputError(f"no folder at {folder}: give the one that holds the published files")
    files = [published_file(folder / backbone.file, backbone) for backbone in published().values()]
    counts = {state: sum(file.state == state for file in files) for state in ("right", "missing", "wrong")}
    complete = counts["right"] == len(files)
    if in_json:
        print(json.dumps({"complete": complete, "files": [asdict(file) for file in files]}, indent=2))
        return int(not complete)
    width = max(len(file.file) for file in files)
    for file in files:
        print(f"{file.state:7} {file.file:{width}}  {file.detail}")
    print(", ".join(f"{count} {state}" for state, count in counts.items()))
    return int(not complete)


def published_file(path: Path, backbone: PublishedBackbone) -> PublishedFile:
    """Whether ``path`` is the file of its name: complete, with its architecture and its sha256."""
    if not path.is_file():
        return PublishedFile(path.name, "missing", f"put {REPOSITORY}/{path.name} of huggingface.co at {path}")
    try:
        checkpoint = read_published(backbone.name, path)
        if checkpoint.spec.resnet_shape:
            convert(checkpoint)[1].check()
        backbone.hold(path)
    except InputError as error:
        return PublishedFile(path.name, "wrong", str(error))
    detail = f"{checkpoint.spec.arch}, sha256 {checkpoint.source_sha256} ({backbone.pinning})"
    return PublishedFile(path.name, "right", detail)


def examine() -> Iterator[Finding]:
    """The results of all checks, in the order in which to fix them."""
    yield Finding("robust-backbones", f"{robust_backbones.__version__} in {Path(robust_backbones.__file__).parent}")
    yield Finding("Python", platform.python_version())
    problems = import_problems((*NEEDED.values(), "cv2"))
    for package, module in NEEDED.items():
        mend = f"pip install --force-reinstall {package}" if problems[module] else ""
        yield Finding(package, problems[module] or version(package), mend, needed=True)
    yield opencv(problems["cv2"])
    if problems["torch"]:
        return
    from robust_backbones.classification.compute import computes_bfloat16

    yield gpu()
    yield Finding("bfloat16 on the CPU", "fast" if computes_bfloat16() else "not supported: float32 is used")
    state = install_detectron2.installed_state()
    install = "" if state else "robust-backbones doctor --install-detectron2"
    yield Finding("Detectron2", state or "cannot be imported", install, needed=True)
    for package, (purpose, mend) in OPTIONAL.items():
        found = version(package)
        yield Finding(package, found or f"not there; for {purpose}", "" if found else mend)
    yield from data_folders()
    folder = cache_folder()
    parent = next(path for path in (folder, *folder.parents) if path.exists())
    mend = "" if os.access(parent, os.W_OK) else "export ROBUST_BACKBONES_CACHE=FOLDER  # one that can be written"
    yield Finding("downloads", f"{folder}, {shutil.disk_usage(parent).free / 2**30:.0f} GiB free", mend)


def import_problems(modules: Sequence[str]) -> dict[str, str]:
    """Module -> why it cannot be imported; empty if it can. Tried in another process, which may crash."""
    code = f"""import importlib, json
for name in {modules!r}:
    try:
        importlib.import_module(name)
        problem = ""
    except Exception as error:
        problem = f"cannot be imported: {{error}}".splitlines()[0]
    print(json.dumps([name, problem]), flush=True)"""
    lines = install_detectron2.run_python(code).stdout.splitlines()
    return dict.fromkeys(modules, "crashes when it is imported") | dict(map(json.loads, lines))


def version(package: str) -> str:
    """The version of an installed package; empty if it is missing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def opencv(problem: str) -> Finding:
    """Check for conflicting packages with the module ``cv2``: each overwrites the files of the others."""
    names = ("opencv-python", "opencv-python-headless", "opencv-contrib-python", "opencv-contrib-python-headless")
    there = [f"{name} {version(name)}" for name in names if version(name)]
    found, mend = " and ".join(there), ""
    if len(there) > 1:
        found += ", which overwrite each other's files"
        removed = " ".join(name.partition(" ")[0] for name in there)
        mend = f"pip uninstall -y {removed} && pip install opencv-python"
    elif problem:
        found = f"{found or 'none'}: {problem}"
        mend = "pip install --force-reinstall opencv-python"
        if ".so" in problem:  # a server without a screen's libraries
            mend = "apt-get install libgl1 libglib2.0-0, or pip uninstall -y opencv-python && "
            mend += "pip install opencv-python-headless"
    return Finding("cv2", found, mend, needed=True)


def gpu() -> Finding:
    import torch

    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        driver = ""
    built_for = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built for CPUs"
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return Finding("GPU", f"{len(names)} x {names[0]}, driver {driver or 'unknown'}; {built_for}")
    if driver:
        mend = "pip install --force-reinstall torch torchvision --index-url of the driver's CUDA, see pytorch.org"
        return Finding("GPU", f"not usable with driver {driver}; {built_for}", mend)
    return Finding("GPU", f"none, everything runs on the CPU; {built_for}")


def data_folders() -> Iterator[Finding]:
    """The built-in data sets in DETECTRON2_DATASETS, and the folder of the tests' and benchmarks' images."""
    root = Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser()
    there = [title for title, parts in DATA_SETS.items() if all((root / part).exists() for part in parts)]
    mend = "" if there else "export DETECTRON2_DATASETS=FOLDER  # that holds coco/ or VOC2007/ and VOC2012/"
    yield Finding("DETECTRON2_DATASETS", f"{root}: {', '.join(there) or 'no built-in data set'}", mend)
    images = os.environ.get("ROBUST_BACKBONES_DATA", "")
    state = "" if images and Path(images).is_dir() else ", no folder; only benchmarks and some tests need it"
    yield Finding("ROBUST_BACKBONES_DATA", (images or "not set") + state)
