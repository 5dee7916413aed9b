"""The advice about files that hold no checkpoint themselves, followed, gives one."""

import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from robust_backbones.checkpoint.format import TRAINING_FORMAT, save_tensors, write_checkpoint
from robust_backbones.checkpoint.sources import read_checkpoint
from robust_backbones.errors import InputError
from robust_backbones.models import BackboneSpec, build_backbone
from robust_backbones.threat_models import ThreatModel

Maker = Callable[[str], Path]


@pytest.mark.parametrize(
    ("pack", "packed", "unpacked"),
    [
        ("gzip robust.pth", "robust.pth.gz", "robust.pth"),
        ("bzip2 robust.pth", "robust.pth.bz2", "robust.pth"),
        ("xz -0 robust.pth", "robust.pth.xz", "robust.pth"),
        ("zstd -q --rm robust.pth", "robust.pth.zst", "robust.pth"),
        ("tar czf run.tgz run", "run.tgz", "run/robust.pth"),
        ("tar cjf run.tbz run", "run.tbz", "run/robust.pth"),
        ("tar cf run.tar run", "run.tar", "run/robust.pth"),
        ("zip -qr run.zip run", "run.zip", "run/robust.pth"),
    ],
    ids=lambda value: value.split()[0] if " " in value else "",
)
def test_archives(pack: str, packed: str, unpacked: str, torchvision_file: Maker, tmp_path: Path) -> None:
    """The command that the sentence names is run; of two, the one of tar for archives of folders."""
    if not shutil.which(pack.split()[0]):
        pytest.skip(f"{pack.split()[0]} is not installed")
    (tmp_path / "run").mkdir()
    for path in (tmp_path / "robust.pth", tmp_path / "run/robust.pth"):
        shutil.copy(torchvision_file("shufflenet_v2_x1_0"), path)
    subprocess.run(shlex.split(pack), cwd=tmp_path, check=True)
    if "tar" in pack or "zip -" in pack:
        shutil.rmtree(tmp_path / "run")
    with pytest.raises(InputError, match=r"and give the (file|checkpoint) in it$") as refused:
        read_checkpoint(tmp_path / packed)
    commands = re.findall("`([^`]+)`", str(refused.value))
    command = commands[-1] if pack.startswith("tar") else commands[0]
    subprocess.run([*shlex.split(command), packed], cwd=tmp_path, check=True)
    assert read_checkpoint(tmp_path / unpacked).spec.arch == "shufflenet_v2_x1_0"


def test_the_file_that_the_advice_for_a_folder_names(torchvision_file: Maker, tmp_path: Path) -> None:
    (tmp_path / "a folder/deep").mkdir(parents=True)
    shutil.copy(torchvision_file("resnet18"), tmp_path / "a folder/deep/robust.pth")
    with pytest.raises(InputError, match="such as ") as refused:
        read_checkpoint(tmp_path / "a folder")
    assert read_checkpoint(str(refused.value).partition("such as ")[2]).spec.arch == "resnet18"


def test_one_of_several_files_is_called_so(tmp_path: Path) -> None:
    for name, refused in {"model-00001-of-00002.bin": True, "model-00001-of-00001.bin": False}.items():
        torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / name)
        with pytest.raises(InputError) as error:
            read_checkpoint(tmp_path / name)
        assert ("several files of a network: load it" in str(error.value)) == refused


def test_a_file_of_two_networks_that_says_nothing(
    torchvision_file: Maker, tmp_path: Path, run_tool: Callable[..., tuple[int, str, str]]
) -> None:
    """First one of the keys is to be given, then what it was fed with; each sentence's options, added, are enough."""
    content = torch.load(torchvision_file("resnet18"), weights_only=True)
    both = {"teacher": content, "student": {name: 2 * tensor for name, tensor in content.items()}}
    torch.save(both, tmp_path / "both.pth")
    convert = ("convert", tmp_path / "both.pth", tmp_path / "robust.pth", "--to", "torchvision")
    status, _, error = run_tool(*convert)
    keys = re.findall(r"--key (\w+)", error)
    assert (status, {*keys}) == (2, {*both})
    for key in keys:
        status, _, error = run_tool(*convert, "--key", key)
        (usual,) = re.findall(r"usual ones are ([^)]*)\)", error)
        assert status == 2
        assert run_tool(*convert, "--key", key, *usual.split())[0] == 0
        written = torch.load(tmp_path / "robust.pth", weights_only=True)
        assert torch.equal(written["fc.bias"], both[key]["fc.bias"])


def test_a_command_without_options_for_what_a_file_does_not_say(
    torchvision_file: Maker, tmp_path: Path, run_tool: Callable[..., tuple[int, str, str]]
) -> None:
    """As evaluate, visualize and transfer read it: the command that is named, with the usual values, gives another."""
    path = tmp_path / "a b.pth"
    torch.save({"state_dict": torch.load(torchvision_file("resnet18"), weights_only=True)}, path)
    with pytest.raises(InputError, match="give --mean") as refused:
        read_checkpoint(path)
    (usual,) = re.findall(r"usual ones are ([^)]*)\)", str(refused.value))
    (command,) = re.findall("`(robust-backbones [^`]+)`", str(refused.value))
    _, *convert = shlex.split(command.replace("DST", str(tmp_path / "DST")))
    assert run_tool(*convert, *usual.split())[0] == 0
    assert read_checkpoint(tmp_path / "DST.safetensors").spec == read_checkpoint(torchvision_file("resnet18")).spec


def test_a_file_whose_neighbour_is_about_another_one(torchvision_file: Maker, tmp_path: Path) -> None:
    shutil.copy(torchvision_file("resnet18"), tmp_path / "robust.pth")
    (tmp_path / "config.json").write_text('{"architecture": "resnetblur18"}')
    with pytest.raises(InputError, match="move the file to a folder of its own"):
        read_checkpoint(tmp_path / "robust.pth")
    (tmp_path / "own").mkdir()
    moved = (tmp_path / "robust.pth").rename(tmp_path / "own/robust.pth")
    assert read_checkpoint(moved).spec.arch == "resnet18"


def test_a_file_that_a_run_resumes_from(tmp_path: Path) -> None:
    spec = BackboneSpec("resnet18", 4)
    weights = build_backbone(spec).state_dict()
    write_checkpoint(tmp_path / "checkpoint.pt", spec=spec, state_dict=weights, threat_model=ThreatModel())
    save_tensors(tmp_path / "checkpoints/step_000000001.pt", {"format": TRAINING_FORMAT, "learner": {}})
    with pytest.raises(InputError, match=r"give the checkpoint\.pt or best\.pt of the same run"):
        read_checkpoint(tmp_path / "checkpoints/step_000000001.pt")
    assert read_checkpoint(tmp_path / "checkpoint.pt").spec == spec
