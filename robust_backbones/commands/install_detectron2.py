"""Install Detectron2, which is not on PyPI: build the pinned commit, or else unpack a redistribution without `_C`.

Example:
    robust-backbones doctor --install-detectron2

Needs torch to be installed already. In order:
  1. Detectron2 can be imported: nothing to do.
  2. There is a C++ compiler and the git host answers: build the pinned upstream commit against the installed torch.
  3. Else: the pure-Python part of the PyPI redistribution sal-detectron2 0.7.2, checked by its sha256. Its compiled
     part is for Python 3.10 only and is left out, and so is its stray top-level package `tools`.

Without the compiled part `_C`, Faster and Mask R-CNN (FPN and C4), their training and COCO / VOC evaluation work;
deformable convolution, rotated boxes and the C++ COCOeval do not.
"""

from __future__ import annotations

import argparse
import base64
import csv
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

GIT_URL = "https://github.com/facebookresearch/detectron2.git"
COMMIT = "a1ce2f956a1d2212ad672e3c47d53405c2fe4312"
WHEEL = "sal-detectron2==0.7.2"
WHEEL_SHA256 = "491af0c7f79bdb2d178e46f6cb16a97c4ac968d45c41ea3f6b6435d59bbee561"
# What Detectron2 imports beside this package's own requirements. Its own list adds black (a formatter) and, in the
# redistribution, numpy<2, which its code does not need.
DEPENDENCIES = ("omegaconf>=2.1,<2.4", "hydra-core>=1.1", "iopath>=0.1.7,<0.1.11", "cloudpickle")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", choices=("auto", "git", "wheel"), default="auto", help="where to take it from")
    parser.add_argument("--git-url", default=GIT_URL, help="repository to build from (default: upstream)")
    parser.add_argument("--commit", default=COMMIT, help="commit to build (default: the tested one)")
    parser.add_argument("--constraint", default="", metavar="FILE", help="version constraints for pip")
    options = parser.parse_args(arguments)
    return install(options.source, git_url=options.git_url, commit=options.commit, constraint=options.constraint)


def install(source: str = "auto", *, git_url: str = GIT_URL, commit: str = COMMIT, constraint: str = "") -> int:
    """Install Detectron2 into this Python unless it can be imported; the exit status: 0 done, 1 failed, 2 no torch.

    Args:
        source: ``git``, ``wheel``, or ``auto``, which tries one after the other.
        constraint: file of version constraints for pip; empty for none.
    """
    if state := installed_state():
        print(f"Detectron2 {state} is already installed")
        return 0
    if run_python("import torch").returncode:
        print("error: torch must be installed first: pip install torch torchvision", file=sys.stderr)
        return 2
    constraints = ("--constraint", constraint) if constraint else ()
    if pip("install", *constraints, *DEPENDENCIES):
        print("error: Detectron2's dependencies could not be installed; pip says why above", file=sys.stderr)
        return 1

    reason = "--source wheel" if source == "wheel" else why_not_git(git_url)
    if not reason:
        print(f"building Detectron2 {commit[:12]} from {git_url} (some minutes)", flush=True)
        if pip("install", "--no-build-isolation", "--no-deps", f"git+{git_url}@{commit}"):
            reason = "the build failed"
    if reason and source == "git":
        print(f"error: cannot build from git: {reason}", file=sys.stderr)
        return 1
    if reason:
        print(f"not building from git ({reason}); taking the pure-Python part of {WHEEL} from PyPI", flush=True)
        if problem := install_wheel():
            print(f"error: {problem}", file=sys.stderr)
            return 1

    if not (state := installed_state()):
        print(f"error: installed, but cannot be imported: {import_detectron2().stderr.strip()}", file=sys.stderr)
        return 1
    print(f"Detectron2 {state} is installed")
    return 0


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter, outside the folder that this was started in."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tempfile.gettempdir())


def import_detectron2() -> subprocess.CompletedProcess[str]:
    return run_python(
        "import detectron2, detectron2.modeling, importlib.util as u;"
        "print(detectron2.__version__, 'with' if u.find_spec('detectron2._C') else 'without', 'compiled operators')"
    )


def installed_state() -> str:
    """Version and whether `_C` exists; empty if Detectron2 cannot be imported."""
    result = import_detectron2()
    return result.stdout.strip() if result.returncode == 0 else ""


def pip(*arguments: str) -> int:
    return subprocess.run([sys.executable, "-m", "pip", *arguments, "--quiet"]).returncode


def why_not_git(url: str) -> str:
    """Empty if a build from git can be tried, else what is missing for it."""
    if not shutil.which("git"):
        return "git is not installed"
    if not any(shutil.which(compiler) for compiler in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        return "no C++ compiler"
    try:
        environment = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}
        command = ["git", "ls-remote", "--exit-code", url, "HEAD"]
        if subprocess.run(command, capture_output=True, timeout=30, env=environment).returncode == 0:
            return ""
    except subprocess.TimeoutExpired:
        pass
    return "the git host does not answer"


def install_wheel() -> str:
    """Download, check, repack and install the redistribution; returns what went wrong, or nothing."""
    with tempfile.TemporaryDirectory() as folder:
        # The wheel is tagged for Python 3.10 alone: ask for it under that name.
        target = ("--no-deps", "--only-binary=:all:", "--python-version", "3.10", "--implementation", "cp")
        if pip("download", *target, "--abi", "none", "--dest", folder, WHEEL):
            return f"{WHEEL} could not be downloaded; pip says why above"
        (wheel,) = Path(folder).glob("*.whl")
        found = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if found != WHEEL_SHA256:
            return f"{wheel.name} is not the tested file (sha256 {found}, expected {WHEEL_SHA256})"
        if pip("install", "--no-deps", str(repack(wheel))):
            return "the repacked wheel could not be installed; pip says why above"
    return ""


def repack(wheel: Path) -> Path:
    """A wheel for any Python 3 that holds only the pure-Python package `detectron2`, beside the given one."""
    name, version = wheel.name.split("-")[:2]
    info = f"{name}-{version}.dist-info"
    repacked = wheel.with_name(f"{name}-{version}-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(repacked, "w", zipfile.ZIP_DEFLATED) as target:
        files = {entry: source.read(entry) for entry in source.namelist() if is_wanted(entry, info)}
        files[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: repack\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        metadata = files[f"{info}/METADATA"].decode().splitlines(keepends=True)
        kept = (line for line in metadata if not line.startswith(("Requires-Dist:", "Provides-Extra:")))
        files[f"{info}/METADATA"] = "".join(kept).encode()
        files[f"{info}/top_level.txt"] = b"detectron2\n"
        files[f"{info}/RECORD"] = record(files, info)
        for entry, content in files.items():
            target.writestr(entry, content)
    return repacked


def is_wanted(entry: str, info: str) -> bool:
    return entry.startswith(("detectron2/", f"{info}/")) and not entry.endswith((".so", "/", "RECORD"))


def record(files: dict[str, bytes], info: str) -> bytes:
    """The wheel's list of its files, with hash and size (Python packaging's "Recording installed projects")."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    for entry, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        rows.writerow((entry, f"sha256={digest}", len(content)))
    rows.writerow((f"{info}/RECORD", "", ""))
    return text.getvalue().encode()
