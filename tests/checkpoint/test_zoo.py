"""The published backbones: their table, held against the paper and the authors' own; their files, from a hub."""

import hashlib
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event, Timer

import pytest

from robust_backbones.checkpoint.zoo import (
    PublishedBackbone,
    cache_folder,
    fetch,
    find,
    published,
    published_robust,
    table,
)
from robust_backbones.errors import InputError
from robust_backbones.models import ARCHITECTURES
from robust_backbones.threat_models import ThreatModel
from tests.conftest import ROOT
from tests.hub import FOLDER, FakeHub, hub_fixture  # noqa: F401

NAME = "resnet18_l2_eps3"
FILE = "resnet18_l2_eps3.ckpt"
CONTENT = random.Random(0).randbytes(100_000)
UNREACHABLE = "http://127.0.0.1:9"


def test_every_network_at_the_papers_levels() -> None:
    """Salman et al. 2020 and the README of their code: 10 L2 levels, 5 Linf levels, six pairs."""
    l2 = {ThreatModel("L2", epsilon) for epsilon in (0, 0.01, 0.03, 0.05, 0.1, 0.25, 0.5, 1, 3, 5)}
    linf = {ThreatModel("Linf", levels / 255) for levels in (0.5, 1, 2, 4, 8)}
    pair = {ThreatModel("L2", 0), ThreatModel("L2", 3)}
    others = ("densenet161", "mnasnet1_0", "mobilenet_v2", "resnext50_32x4d", "shufflenet_v2_x1_0", "vgg16_bn")
    expected = {
        **dict.fromkeys(("resnet18", "resnet50", "wide_resnet50_2"), l2 | linf),
        "wide_resnet50_4": l2,
        **dict.fromkeys(others, pair),
    }
    found: dict[str, set[ThreatModel]] = {}
    for backbone in published().values():
        found.setdefault(backbone.arch, set()).add(backbone.threat_model)
    assert found == expected
    assert len(published()) == 67


def test_every_architecture_can_be_built() -> None:
    assert {backbone.arch for backbone in published().values()} <= ARCHITECTURES.keys()


def test_names_files_and_threat_models_agree() -> None:
    """The file names are the authors': norm and epsilon stand in them, epsilon in 1/255 for linf."""
    for name, backbone in published().items():
        arch, norm, epsilon = re.fullmatch(r"(\w+)_(l2|linf)_eps([\d.]+)\.ckpt", backbone.file).groups()
        assert name == backbone.name == backbone.file.removesuffix(".ckpt")
        # the authors' short names begin our full ones
        assert backbone.arch.startswith(arch)
        assert backbone.threat_model.norm.lower() == norm
        assert backbone.threat_model.epsilon == pytest.approx(
            float(epsilon) / (255 if norm == "linf" else 1), rel=1e-12
        )


@pytest.mark.parametrize(
    ("name", "accuracy"),
    # from the README of the authors' code
    [
        ("resnet50_l2_eps5", 56.13),
        ("wide_resnet50_2_l2_eps0.03", 77.26),
        ("wide_resnet50_4_l2_eps0.01", 78.02),
        ("densenet_l2_eps3", 66.98),
        ("vgg16_bn_l2_eps0", 73.66),
        ("resnet18_linf_eps8.0", 42.11),
        ("resnet50_linf_eps4.0", 63.86),
        ("wide_resnet50_2_linf_eps4.0", 68.41),
    ],
)
def test_accuracies_are_the_authors(name: str, accuracy: float) -> None:
    assert find(name).imagenet_accuracy == accuracy


def test_robustness_costs_accuracy() -> None:
    """From ε 0.1 on, each level is less accurate than the one before; a slip of a row would show."""
    series: dict[tuple[str, str], list[PublishedBackbone]] = {}
    for backbone in published().values():
        if backbone.threat_model.norm == "Linf" or backbone.threat_model.epsilon >= 0.1:
            series.setdefault((backbone.arch, backbone.threat_model.norm), []).append(backbone)
    for backbones in series.values():
        by_epsilon = sorted(backbones, key=lambda backbone: backbone.threat_model.epsilon)
        accuracies = [backbone.imagenet_accuracy for backbone in by_epsilon]
        assert accuracies == sorted(accuracies, reverse=True)
    assert all(40 < backbone.imagenet_accuracy < 80 for backbone in published().values())


def test_find() -> None:
    assert find("shufflenet_l2_eps3") == PublishedBackbone(
        name="shufflenet_l2_eps3",
        arch="shufflenet_v2_x1_0",
        threat_model=ThreatModel("L2", 3),
        imagenet_accuracy=43.32,
        file="shufflenet_l2_eps3.ckpt",
    )


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("resnet50_l2_eps3.0", "resnet50_l2_eps3"),
        ("densenet161_l2_eps3", "densenet_l2_eps3"),
        ("resnet50_linf_eps4", "resnet50_linf_eps4.0"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(wrong: str, nearest: str) -> None:
    with pytest.raises(InputError, match=rf"'{re.escape(wrong)}': the nearest names are .*{re.escape(nearest)}(,|$)"):
        find(wrong)


@pytest.mark.parametrize("wrong", ["", "7", "../../etc/passwd"])
def test_whatever_is_asked_for_some_names_are_offered(wrong: str) -> None:
    with pytest.raises(InputError) as error:
        find(wrong)
    assert sum(name in str(error.value) for name in published() | published_robust()) >= 4


def test_the_table_is_aligned_and_whole() -> None:
    header, *rows = table().splitlines()
    assert len({len(line) for line in (header, *rows)}) == 1
    starts = [header.index(head) for head in ("name", "architecture", "threat model", "ImageNet accuracy")]
    for row, backbone in zip(rows, published().values(), strict=True):
        cells = [row[start:end].strip() for start, end in zip(starts, [*starts[1:], None], strict=True)]
        accuracy = f"{backbone.imagenet_accuracy:.2f}"
        assert cells == [backbone.name, backbone.arch, str(backbone.threat_model), accuracy]
    assert "resnet50_linf_eps4.0         resnet50            Linf:4/255                63.86" in rows


def files_in(folder: Path) -> set[str]:
    """Names of the files that are whole."""
    return {path.name for path in folder.glob("[!.]*")}


def refused(name: str = NAME) -> str:
    with pytest.raises(InputError) as error:
        fetch(name)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_first_use_downloads_and_the_next_asks_for_nothing(hub: FakeHub) -> None:
    hub.files[FILE] = CONTENT
    path = fetch(NAME)
    assert path == cache_folder() / "published" / FILE
    assert path.read_bytes() == CONTENT
    assert path.with_name(f"{FILE}.sha256").read_text() == hashlib.sha256(CONTENT).hexdigest() + "\n"
    assert hub.downloads == [FILE]
    hub.requests.clear()
    assert fetch(NAME) == path
    assert hub.requests == []


def test_a_connection_that_is_cut_off_goes_on_where_it_was(hub: FakeHub) -> None:
    hub.files[FILE] = random.Random(0).randbytes(30_000_000)  # huggingface_hub keeps whole parts of 10 MiB
    hub.accidents = ["cut", "cut"]
    assert fetch(NAME).read_bytes() == hub.files[FILE]
    first, *others = hub.downloads
    assert first == FILE
    assert others == [f"{FILE} bytes={10 * 2**20}-"] * 2


def test_a_download_that_was_killed_goes_on_where_it_was(hub: FakeHub) -> None:
    hub.files[FILE] = random.Random(0).randbytes(30_000_000)
    hub.accidents = ["reset"]
    assert refused().startswith(f"cannot download {FILE} (")
    assert files_in(cache_folder() / "published") == set()
    assert fetch(NAME).read_bytes() == hub.files[FILE]
    assert hub.downloads == [FILE, f"{FILE} bytes={10 * 2**20}-"]


def test_what_was_begun_of_another_version_is_left_alone(hub: FakeHub) -> None:
    hub.files[FILE] = random.Random(0).randbytes(30_000_000)
    hub.accidents = ["reset"]
    refused()
    hub.files[FILE] = CONTENT
    assert fetch(NAME).read_bytes() == CONTENT
    assert hub.downloads == [FILE, FILE]


@pytest.mark.parametrize("accidents", [["damaged"], ["cut", "damaged"]], ids=["at once", "on the second try"])
def test_a_file_damaged_on_the_way_is_refused_and_deleted(hub: FakeHub, accidents: list[str]) -> None:
    hub.files[FILE] = CONTENT
    hub.accidents = accidents
    assert f"sent a damaged {FILE}" in refused()
    assert not files_in(cache_folder() / "published")
    assert fetch(NAME).read_bytes() == CONTENT


def test_a_file_whose_sha256_the_hub_does_not_know_is_noted_as_it_comes(hub: FakeHub) -> None:
    """Small files are told apart by git's hash, which is not that of their bytes alone."""
    hub.files[FILE] = CONTENT
    hub.etag = hashlib.sha1(CONTENT).hexdigest()
    assert fetch(NAME).with_name(f"{FILE}.sha256").read_text().strip() == hashlib.sha256(CONTENT).hexdigest()


@pytest.mark.parametrize("changed", [FILE, f"{FILE}.sha256"])
def test_a_file_that_is_not_what_it_was_is_refused_and_kept(hub: FakeHub, changed: str) -> None:
    hub.files[FILE] = CONTENT
    path = fetch(NAME)
    path.with_name(changed).write_bytes(b"something else")
    hub.requests.clear()
    for _ in range(2):
        assert f"{path} is not the file that it was (see {FILE}.sha256): delete both" in refused()
    assert hub.requests == []
    assert path.with_name(changed).read_bytes() == b"something else"
    for name in (FILE, f"{FILE}.sha256"):
        path.with_name(name).unlink()
    assert fetch(NAME).read_bytes() == CONTENT


def test_a_file_put_there_by_hand_needs_no_hub(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", UNREACHABLE)
    path = cache_folder() / "published" / FILE
    assert f"put {UNREACHABLE}{FOLDER}{FILE} at {path} yourself" in refused()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(CONTENT)
    assert fetch(NAME) == path
    path.write_bytes(CONTENT[:-1])
    assert "not the file that it was" in refused()


@pytest.mark.parametrize(
    ("error", "reason"),
    [(None, "404"), ((401, "RepoNotFound"), "401"), ((429, ""), "429"), ((503, ""), "503")],
    ids=["no such file", "no such repository", "too many requests", "out of order"],
)
def test_what_the_hub_does_not_give_is_an_error_of_one_line(
    hub: FakeHub, run_tool: Callable[..., tuple[int, str, str]], tmp_path: Path, error: tuple[int, str], reason: str
) -> None:
    hub.error = error
    status, _, message = run_tool("convert", f"hub:{NAME}", tmp_path / "out.pkl")
    assert status == 2
    assert message.startswith(f"error: cannot download {FILE} (")
    assert message.count("\n") == 1
    assert reason in message
    assert f"put {hub.url}{FOLDER}{FILE} at {cache_folder() / 'published' / FILE} yourself" in message
    assert not (tmp_path / "out.pkl").exists()


def run_python(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name not in ("HF_HOME", "HF_ENDPOINT")}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=inherited | environment)


@pytest.mark.slow
def test_without_the_network_the_tool_says_what_to_put_where(tmp_path: Path) -> None:
    output = tmp_path / "out.pkl"
    environment = {"HF_HUB_OFFLINE": "1", "ROBUST_BACKBONES_CACHE": str(tmp_path / "cache")}
    result = run_python("tools/convert_backbone.py", f"hub:{NAME}", output, **environment)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: cannot download {FILE} (")
    assert result.stderr.count("\n") == 1
    path = tmp_path / "cache/published" / FILE
    assert f"put https://huggingface.co{FOLDER}{FILE} at {path} yourself" in result.stderr
    assert not output.exists()


@pytest.mark.slow
def test_by_default_all_is_kept_in_one_folder_of_the_home(hub: FakeHub, tmp_path: Path) -> None:
    """And huggingface_hub, which takes a second, is imported only to download."""
    hub.files[FILE] = CONTENT
    code = (
        "import sys; from robust_backbones.checkpoint import sources, zoo; zoo.table()\n"
        f"assert 'huggingface_hub' not in sys.modules; print(zoo.fetch({NAME!r}))"
    )
    home = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / ".cache"), "ROBUST_BACKBONES_CACHE": ""}
    result = run_python("-c", code, HF_ENDPOINT=hub.url, **home)
    assert result.stdout.strip() == str(tmp_path / ".cache/robust_backbones/published" / FILE), result.stderr
    assert [path.name for path in tmp_path.iterdir()] == [".cache"]
    assert [path.name for path in (tmp_path / ".cache").iterdir()] == ["robust_backbones"]


def test_what_answers_without_being_a_hub_is_not_believed(hub: FakeHub) -> None:
    hub.files[FILE] = b"<html>Log in to this network</html>"
    hub.is_hub = False
    assert "no hub" in refused()
    assert files_in(cache_folder() / "published") == set()
    hub.files[FILE], hub.is_hub = CONTENT, True
    assert fetch(NAME).read_bytes() == CONTENT


@pytest.mark.parametrize("excess", [0, 1])
def test_what_was_begun_does_not_stop_a_download(hub: FakeHub, excess: int) -> None:
    """A whole file that a kill left without its name is taken; one that is too long, for whatever reason, is not."""
    hub.files[FILE] = CONTENT
    path = cache_folder() / "published" / FILE
    path.parent.mkdir(parents=True)
    start = hashlib.sha256(CONTENT).hexdigest()[:16]
    path.with_name(f".{FILE}.{start}.part").write_bytes(CONTENT + bytes(excess))
    assert fetch(NAME).read_bytes() == CONTENT
    assert hub.downloads == [FILE] * excess


def test_a_cache_that_cannot_be_made_is_an_error_of_one_line(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ROBUST_BACKBONES_CACHE", str(tmp_path / "file"))
    assert "set ROBUST_BACKBONES_CACHE" in refused()


def test_of_two_that_download_at_once_one_waits_for_the_other(hub: FakeHub) -> None:
    hub.files[FILE] = CONTENT
    gate = Event()
    hub.gates = [gate]
    with ThreadPoolExecutor() as pool:
        fetches = [pool.submit(fetch, NAME) for _ in range(2)]
        Timer(0.5, gate.set).start()
        assert [fetched.result().read_bytes() for fetched in fetches] == [CONTENT] * 2
    assert hub.downloads == [FILE]


def test_a_slash_after_the_hubs_address_changes_nothing(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"{UNREACHABLE}/")
    assert f"put {UNREACHABLE}{FOLDER}{FILE} at" in refused()


def test_without_huggingface_hub_the_error_says_what_to_install(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install huggingface_hub" in refused()
