"""README and pages: commands, options, links, configurations and tables are true. Sentences are not tested."""

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import pytest
import tables
from benchmarks.page import write_page

from robust_backbones.__main__ import VERBS
from robust_backbones.configs import CONFIG_DIR, STUDY_DIR
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
IDS = [path.stem for path in PAGES]
Run = Callable[..., tuple[int, str, str]]


def commands(page: Path) -> list[list[str]]:
    """The words of every ``robust-backbones VERB ...`` in the page's code blocks, without comments."""
    found = []
    for block in re.findall(r"^```\w*\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            _, command, rest = line.partition("robust-backbones ")
            _, module, as_module = line.partition("-m robust_backbones ")
            if (command and line.startswith("robust-backbones ")) or module:
                found.append(shlex.split((as_module or rest).split(" || ")[0], comments=True))
    return found


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_verbs_and_options_exist(page: Path, run_tool: Run) -> None:
    for verb, *words in commands(page):
        assert verb in VERBS, verb
        subcommand = [word for word in words[:1] if re.fullmatch(r"[a-z][a-z-]*", word) and verb != "convert"]
        status, text, _ = run_tool(verb, *subcommand, "--help")
        assert status == 0
        for option in (word for word in words if word.startswith("--")):
            assert re.search(rf"{option}\b", text), f"{verb} {' '.join(subcommand)} has no {option}"


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_pictures_and_configurations_exist(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http:", "https:")):
            assert (page.parent / target.partition("#")[0]).exists(), target
    for name in re.findall(r"[` ]((?:PascalVOC-|COCO-|quick|protocols|architectures)[\w/-]*/\w+)(?:\.yaml)?", text):
        assert (CONFIG_DIR / f"{name}.yaml").exists(), name
    for name in re.findall(r"studies/(\w+\.yaml)", text):
        assert (STUDY_DIR / name).exists(), name
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)|`make (\w+)`", text, flags=re.MULTILINE):
        assert re.search(rf"^{''.join(target)}:", makefile, flags=re.MULTILINE), target


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_tables_are_those_of_the_records(page: Path) -> None:
    assert tables.filled(page.read_text()) == page.read_text()


def test_the_page_of_benchmarks_is_made_of_its_records(tmp_path: Path) -> None:
    records = tmp_path / "benchmarks"
    shutil.copytree(ROOT / "docs/benchmarks", records)
    write_page(records, tmp_path / "benchmarks.md", bfloat16=records / "bfloat16")
    assert (tmp_path / "benchmarks.md").read_text() == (ROOT / "docs/benchmarks.md").read_text()
    # Nothing was timed whose ways do not compute the same.
    checks = [check for path in records.glob("*.json") for check in json.loads(path.read_text()).get("checks", [])]
    assert checks
    assert all(check["found"] <= check["limit"] for check in checks)


def test_mri_of_the_docs_is_that_of_their_raw_accuracies() -> None:
    lines = (ROOT / "docs/inheritance/records.jsonl").read_text().splitlines()
    metrics = {row["folder"]: row["metrics"] for row in map(json.loads, lines)}
    cells = [folder.split("/")[1:] for folder in metrics if folder.endswith("/seed_0")]
    for row in tables.inheritance().rows:
        own = {target: f"records/{label}/{method}/{target}/seed_0" for label, method, target, _ in cells}
        own = {target: f"records/{row['backbone']}/{row['method']}/{target}/seed_0" for target in own}
        before = metrics[f"records/{row['backbone']}/pretrained"]
        gains = [
            fmean(metrics[own[i]][f"accuracy/{j}"] - before[f"accuracy/{j}"] for j in sorted(own) if j != i)
            for i in sorted(own)
        ]
        assert row["mRI"] == pytest.approx(fmean(gains), abs=1e-12)


def test_the_documentation_stays_small() -> None:
    files = [path for path in (ROOT / "docs").rglob("*") if path.is_file()]
    assert len(files) <= 120
    assert sum(path.stat().st_size for path in files) < 3_000_000
    assert (ROOT / "README.md").stat().st_size <= 8_000
