"""robust-backbones doctor: it finds what is there, and names the mend of what is missing."""

import hashlib
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

from robust_backbones.checkpoint.zoo import PublishedBackbone
from robust_backbones.commands import doctor, install_detectron2
from robust_backbones.models import BackboneSpec, build_backbone
from robust_backbones.threat_models import ThreatModel
from tests.hub import robustness_file

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Detectron2 is there, whether or not it is."""
    monkeypatch.setattr(install_detectron2, "installed_state", lambda: "0.6 without compiled operators")


@pytest.mark.slow
def test_it_names_versions_and_folders(run_tool: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for part in ("Annotations", "ImageSets", "JPEGImages"):
        (tmp_path / "VOC2007" / part).mkdir(parents=True)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.setenv("ROBUST_BACKBONES_CACHE", str(tmp_path / "cache"))
    status, out, _ = run_tool("doctor", "--json")
    report = json.loads(out)
    found = {finding["name"]: finding for finding in report["findings"]}
    assert (status, report["usable"]) == (0, True)
    assert found["torch"]["found"] == version("torch")
    assert found["Detectron2"]["found"] == "0.6 without compiled operators"
    assert found["DETECTRON2_DATASETS"] == {
        "name": "DETECTRON2_DATASETS", "found": f"{tmp_path}: VOC 2007", "mend": "", "needed": False,
    }  # fmt: skip
    assert found["downloads"]["found"].startswith(f"{tmp_path / 'cache'}, ")


@pytest.mark.slow
def test_what_training_needs_is_missing(run_tool: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install_detectron2, "installed_state", lambda: "")
    monkeypatch.setattr(doctor, "NEEDED", {"torch": "torch", "fvcore": "fvcore.no_such_module"})
    monkeypatch.setattr(doctor, "OPTIONAL", {})
    status, out, _ = run_tool("doctor")
    assert status == 1
    lines = out.splitlines()
    assert lines[-1] == "detectors cannot be trained here yet: fvcore, Detectron2"
    for name, mend in (("fvcore", "pip install"), ("Detectron2", "robust-backbones doctor --install-detectron2")):
        (place,) = (place for place, line in enumerate(lines) if line.startswith(f"MISSING {name} "))
        assert mend in lines[place + 1]


@pytest.mark.parametrize(
    ("there", "problem", "mend"),
    [
        (["opencv-python"], "", ""),
        (["opencv-python", "opencv-python-headless"], "", "pip uninstall -y opencv-python opencv-python-headless &&"),
        (["opencv-python"], "cannot be imported: libGL.so.1: no such file", "pip install opencv-python-headless"),
        ([], "cannot be imported: No module named 'cv2'", "pip install --force-reinstall opencv-python"),
    ],
)
def test_the_packages_of_cv2(there: list[str], problem: str, mend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "version", lambda name: "5.0" if name in there else "")
    finding = doctor.opencv(problem)
    assert mend in finding.mend
    assert bool(finding.mend) == bool(mend)
    assert finding.needed


def test_detectron2_is_installed_first(run_tool: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install_detectron2, "install", lambda: 1)
    assert run_tool("doctor", "--install-detectron2")[:2] == (1, "")


def test_published_files_are_checked_without_a_network(
    run_tool: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def row(arch: str, sha256: str = "") -> PublishedBackbone:
        return PublishedBackbone(f"{arch}_l2_eps3", arch, ThreatModel("L2", 3), 50, f"{arch}_l2_eps3.ckpt", sha256)

    def check() -> tuple[int, dict[str, tuple[str, str]]]:
        status, out, _ = run_tool("doctor", "--published", tmp_path, "--json")
        return status, {file["file"]: (file["state"], file["detail"]) for file in json.loads(out)["files"]}

    content = robustness_file(build_backbone(BackboneSpec("resnet18", 10)))
    digest = hashlib.sha256(content).hexdigest()
    rows = [row("resnet18"), row("resnet50", digest)]
    monkeypatch.setattr(doctor, "published", lambda: {backbone.name: backbone for backbone in rows})
    (tmp_path / rows[0].file).write_bytes(content)
    status, files = check()
    assert status == 1
    assert files[rows[0].file] == ("right", f"resnet18, sha256 {digest} (first use)")
    assert files[rows[1].file] == (
        "missing",
        f"put madrylab/robust-imagenet-models/{rows[1].file} of huggingface.co at {tmp_path / rows[1].file}",
    )

    (tmp_path / rows[1].file).write_bytes(content)
    status, files = check()
    assert (status, files[rows[1].file][0]) == (1, "wrong")
    assert "holds a resnet18, not the resnet50" in files[rows[1].file][1]

    rows[1] = row("resnet18", digest)
    assert check() == (0, {rows[0].file: ("right", f"resnet18, sha256 {digest} (pinned)")})

    rows[:] = rows[:1]
    another = robustness_file(build_backbone(BackboneSpec("resnet18", 10), seed=1))
    (tmp_path / rows[0].file).write_bytes(another)
    status, files = check()
    assert (status, files[rows[0].file][0]) == (1, "wrong")
    assert "is not the file that it was" in files[rows[0].file][1]
    rows[0] = row("resnet18", digest)
    assert f"whose sha256 is {digest}" in check()[1][rows[0].file][1]
    assert run_tool("doctor", "--published", tmp_path / "none")[0] == 2
