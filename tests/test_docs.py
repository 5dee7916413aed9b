"""The README's commands exist: tools, options, configurations, make targets, pictures."""

import re
from collections.abc import Callable

import pytest

from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^\$? ?(?:python|torchrun .*?) (tools/\w+\.py.*(?:\\\n.*)*)", README, flags=re.MULTILINE)


def test_named_files_exist() -> None:
    named = re.findall(r"\b((?:tools|detectron_configs|docs|studies)/[\w/.-]*\w)", README)
    assert len(named) > 5
    assert not [name for name in named if not (ROOT / name).exists()]
    configurations = re.findall(r"`((?:PascalVOC|COCO|quick)[\w/-]+)`", README)
    assert len(configurations) >= 6
    assert not [name for name in configurations if not (ROOT / f"detectron_configs/{name}.yaml").exists()]


def test_named_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`?make (\w+)", README)):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.split()[0])
def test_options_are_known(command: str, run_tool: Callable[..., tuple[int, str, str]]) -> None:
    words = command.replace("\\\n", " ").split()
    tool = words[0].removeprefix("tools/").removesuffix(".py")
    if tool != "install_detectron2":
        subcommand = re.findall(r"^[a-z]+$", words[1])
        _, help_text, _ = run_tool(tool, *subcommand, "--help")
        for option in (word for word in words if word.startswith("--")):
            assert option in help_text, f"{tool} has no {option}"
