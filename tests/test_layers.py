"""The package's rules: imports go downward, Detectron2 stays in its module, nothing heavy happens at import."""

import ast
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "robust_backbones"
FLOORS = (
    "errors",
    "threat_models",
    "attacks",
    "convstem",
    "timm_models",
    "timm_vit",
    "models",
    "configs",
    "runs",
    "checkpoint",
    "cpu",
    "data",
    "classification",
    "transfer",
    "transfer.inheritance",
    "detection",
    "analysis",
    "api",
    "commands",
    "sweep",
    "__main__",
)
"""From the ground up: a room imports from those before it alone."""
MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@cache
def nodes(path: Path) -> list[ast.AST]:
    """The syntax of a file."""
    return list(ast.walk(ast.parse(path.read_text())))


@cache
def imports(path: Path) -> set[str]:
    names = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: import by full name"
            names.add(node.module or "")
    return names


def dotted(module: Path) -> str:
    """``transfer/heads.py`` -> ``transfer.heads``."""
    return ".".join(module.with_suffix("").parts).removesuffix(".__init__")


def room(name: str) -> str:
    """The room of a module: the longest of FLOORS that its name begins with."""
    return max((floor for floor in FLOORS if f"{name}.".startswith(f"{floor}.")), key=len)


@cache
def own_imports(module: Path) -> set[str]:
    """The modules of the package that one imports, wherever in it, ``from PACKAGE import MODULE`` included."""
    found = set()
    for node in nodes(PACKAGE / module):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    names = {name.removeprefix("robust_backbones.") for name in found if name.startswith("robust_backbones.")}
    return {name for name in names if name in NAMES}


NAMES = {dotted(module) for module in MODULES}


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_go_downward(module: Path) -> None:
    own = room(dotted(module))
    for name in own_imports(module):
        if room(name) != own:
            assert FLOORS.index(room(name)) < FLOORS.index(own), f"{module} imports {name}"


def test_modules_do_not_import_in_circles() -> None:
    """Within a room too: ``engine`` importing ``pretrain`` raises CycleError."""
    graph = {dotted(module): own_imports(module) for module in MODULES}
    TopologicalSorter(graph).prepare()


def test_no_two_public_classes_have_one_name() -> None:
    places: dict[str, list[Path]] = {}
    for module in MODULES:
        for node in nodes(PACKAGE / module):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(module)
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_every_import_can_be_seen(module: Path) -> None:
    """The tests above read import statements; nothing of the package may be loaded past them."""
    for node in nodes(PACKAGE / module):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        loaders = ("spec_from_file_location", "exec_module", "__import__", "import_module")
        assert name not in loaders, f"{module} calls {name}"


def test_only_detection_imports_detectron2() -> None:
    importers = {
        room(dotted(module)) for module in MODULES if any(n.startswith("detectron2") for n in imports(PACKAGE / module))
    }
    assert importers == {"detection"}


def test_whatever_registers_itself_is_imported_with_detection() -> None:
    """Detectron2 finds a backbone by its name in the configuration, once the module has been imported."""
    reached, left = set(), ["detection"]
    while left:
        if (name := left.pop()) not in reached:
            reached.add(name)
            left += own_imports(next(module for module in MODULES if dotted(module) == name))
    registering = {dotted(module) for module in MODULES if "_REGISTRY.register()" in (PACKAGE / module).read_text()}
    assert "detection.vit_backbone" in registering
    assert registering <= reached


def test_the_model_zoo_is_never_imported() -> None:
    """It needs pkg_resources, which setuptools no longer has."""
    paths = [*PACKAGE.rglob("*.py"), *(ROOT / "tools").glob("*.py"), *(ROOT / "tests").rglob("*.py")]
    assert not [path for path in paths if any(n.startswith("detectron2.model_zoo") for n in imports(path))]


IMPORTS = """
import sys
sys.modules["detectron2"] = None

def absent(*names):
    assert not {*names} & sys.modules.keys(), sys.modules.keys()

import robust_backbones
absent("torch", "numpy")
import robust_backbones.__main__
robust_backbones.__main__.usage()
import robust_backbones.runs.identity
absent("torch")
import robust_backbones.checkpoint.sources
absent("torchvision")
"""
WITHOUT_DETECTRON2 = """
import pytest
try:
    import robust_backbones.detection
except ImportError as error:
    print(error)
try:
    pytest.importorskip("robust_backbones.detection")
except pytest.skip.Exception:
    print("skipped")
from robust_backbones.commands import cli
cli.run(lambda arguments: __import__("robust_backbones.detection"))
"""


def test_an_import_brings_what_it_needs_and_detectron2_is_needed_by_detection_alone() -> None:
    """The package itself brings nothing, a list of verbs and the rule of a run no torch, tensors no torchvision.

    Without Detectron2 everything else works, and its own import fails as Python expects it, in one sentence.
    """
    rest = (dotted(module) for module in MODULES if room(dotted(module)) != "detection")
    code = IMPORTS + "".join(f"import robust_backbones.{name}\n" for name in rest) + WITHOUT_DETECTRON2
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 2, result.stderr
    sentence = "Detectron2 is not installed: run `robust-backbones doctor --install-detectron2`"
    assert result.stdout.splitlines() == [sentence, "skipped"]
    assert result.stderr.strip() == f"error: {sentence}"
