"""The house's rules: imports go downward, Detectron2 stays in its room, nothing heavy happens at import."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "robust_backbones"
FLOORS = {
    **dict.fromkeys(
        ("errors", "threat_models", "records", "cli", "distributed", "logs", "safe_files", "metrics", "locks"), 0
    ),
    **dict.fromkeys(("convolutions", "memory"), 0),
    **dict.fromkeys(("models", "attacks", "checkpoints", "zoo", "folding", "data"), 1),
    **dict.fromkeys(("objectives", "engine", "training", "pretrain", "robustness", "cluster", "convert", "sources"), 2),
    **dict.fromkeys(("transfer", "visualization", "inheritance"), 2),
    **dict.fromkeys(("detection", "analysis", "sweep"), 3),
}
MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: import by full name"
            names.add(node.module or "")
    return names


def room(module: Path) -> str:
    return module.parts[0].removesuffix(".py")


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_go_downward(module: Path) -> None:
    for name in imports(PACKAGE / module):
        if name.startswith("robust_backbones."):
            assert FLOORS[name.split(".")[1]] <= FLOORS[room(module)], f"{module} imports {name}"


def test_only_detection_imports_detectron2() -> None:
    importers = {
        room(module) for module in MODULES if any(n.startswith("detectron2") for n in imports(PACKAGE / module))
    }
    assert importers == {"detection"}


def test_reading_tensors_does_not_wait_for_torchvision() -> None:
    code = "import sys, robust_backbones.sources; sys.exit('torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_model_zoo_is_never_imported() -> None:
    """It needs pkg_resources, which setuptools no longer has."""
    paths = [*PACKAGE.rglob("*.py"), *(ROOT / "tools").glob("*.py"), *(ROOT / "tests").rglob("*.py")]
    assert not [path for path in paths if any(n.startswith("detectron2.model_zoo") for n in imports(path))]


def test_the_rest_works_without_detectron2() -> None:
    names = [
        ".".join(("robust_backbones", *module.with_suffix("").parts))
        for module in MODULES
        if room(module) != "detection"
    ]
    code = (
        "import sys; sys.modules['detectron2'] = None\n"
        + "".join(f"import {name.removesuffix('.__init__')}\n" for name in names)
        + "from robust_backbones.errors import InputError\n"
        "try:\n    import robust_backbones.detection\n"
        "except InputError as error:\n    print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "install_detectron2.py" in result.stdout
