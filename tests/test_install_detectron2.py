"""Installing Detectron2: the repacked wheel, and when a build from git is tried."""

import csv
import hashlib
import io
import shutil
import subprocess
import sys
import zipfile
from base64 import urlsafe_b64encode
from pathlib import Path

import pytest

from robust_backbones.commands import install_detectron2 as installer
from tests.conftest import ROOT


@pytest.fixture
def foreign_wheel(tmp_path: Path) -> Path:
    """Like the redistribution: another Python's compiled part, a stray package `tools`, needs that clash."""
    path = tmp_path / "sal_detectron2-0.7.2-cp310-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("detectron2/__init__.py", "__version__ = '0.7.2'\n")
        wheel.writestr("detectron2/config/defaults.yaml", "a: 1\n")
        wheel.writestr("detectron2/_C.cpython-310-x86_64-linux-gnu.so", b"\x7fELF")
        wheel.writestr("tools/__init__.py", "")
        info = "sal_detectron2-0.7.2.dist-info"
        metadata = "Metadata-Version: 2.1\nName: sal-detectron2\nVersion: 0.7.2\nRequires-Dist: numpy<2\n\nText\n"
        wheel.writestr(f"{info}/METADATA", metadata)
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: cp310-cp310-linux_x86_64\n")
        wheel.writestr(f"{info}/top_level.txt", "detectron2\ntools\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


def test_repacking_keeps_the_pure_python_package_alone(foreign_wheel: Path) -> None:
    with zipfile.ZipFile(installer.repack(foreign_wheel)) as wheel:
        names = set(wheel.namelist())
        assert {name for name in names if not name.startswith("sal_")} == {
            "detectron2/__init__.py",
            "detectron2/config/defaults.yaml",
        }
        rows = list(csv.reader(io.StringIO(wheel.read("sal_detectron2-0.7.2.dist-info/RECORD").decode())))
        assert {row[0] for row in rows} == names
        for name, digest, size in rows:
            if digest:
                content = wheel.read(name)
                expected = urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
                assert (digest, int(size)) == (f"sha256={expected}", len(content))
        assert b"Requires-Dist" not in wheel.read("sal_detectron2-0.7.2.dist-info/METADATA")


def test_pip_installs_the_repacked_wheel(foreign_wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*command, str(installer.repack(foreign_wheel))], check=True, capture_output=True)
    assert (target / "detectron2/__init__.py").exists()
    assert not (target / "tools").exists()
    assert not list(target.rglob("*.so"))


def test_another_file_than_the_tested_one_is_refused(foreign_wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*arguments: str) -> int:
        assert arguments[0] == "download"  # nothing may be installed
        folder = Path(arguments[arguments.index("--dest") + 1])
        (folder / foreign_wheel.name).write_bytes(foreign_wheel.read_bytes())
        return 0

    monkeypatch.setattr(installer, "pip", download)
    assert "not the tested file" in installer.install_wheel()


def test_git_is_tried_only_when_it_can_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "repository"
    subprocess.run(["git", "init", "--quiet", str(repository)], check=True)
    identity = ["-c", "user.name=n", "-c", "user.email=e"]
    commit = ["git", "-C", str(repository), *identity, "commit", "--quiet", "--allow-empty", "-m", "m"]
    subprocess.run(commit, check=True)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert installer.why_not_git(repository.as_uri()) == ""
    assert "does not answer" in installer.why_not_git((tmp_path / "none").as_uri())
    monkeypatch.setattr(shutil, "which", lambda name: None if name != "git" else "/usr/bin/git")
    assert installer.why_not_git(repository.as_uri()) == "no C++ compiler"


@pytest.mark.slow
def test_an_installed_detectron2_is_left_alone() -> None:
    pytest.importorskip("detectron2")
    command = [sys.executable, str(ROOT / "tools/install_detectron2.py")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "is already installed" in result.stdout


def test_help_has_an_example() -> None:
    command = [sys.executable, str(ROOT / "tools/install_detectron2.py"), "--help"]
    assert "Example" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
