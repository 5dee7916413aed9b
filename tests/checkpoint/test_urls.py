"""Weights named by a URL: the cached file is read, another is downloaded once, and a failure says what to put where."""

import io
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import IO

import pytest

from robust_backbones.checkpoint.sources import read_checkpoint
from robust_backbones.checkpoint.urls import fetch_url
from robust_backbones.errors import InputError

Maker = Callable[[str], Path]
R50 = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"


class _Handler(SimpleHTTPRequestHandler):
    def copyfile(self, source: IO[bytes], output: IO[bytes]) -> None:
        content = source.read()
        cut = "cut" in self.path
        super().copyfile(io.BytesIO(content[: len(content) // 2 if cut else None]), output)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Serves the folder ``files``; Detectron2's cache is ``cache``."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    (tmp_path / "files").mkdir()
    handler = partial(_Handler, directory=str(tmp_path / "files"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_file_is_downloaded_once(server: str, tmp_path: Path, torchvision_file: Maker) -> None:
    shutil.copy(torchvision_file("resnet18"), tmp_path / "files/resnet18.pth")
    checkpoint = read_checkpoint(f"{server}/resnet18.pth")
    (tmp_path / "files/resnet18.pth").unlink()
    again = read_checkpoint(Path(f"{server}/resnet18.pth"))  # as a command line's options have it
    assert checkpoint.spec == again.spec == read_checkpoint(torchvision_file("resnet18")).spec
    assert [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()] == ["resnet18.pth"]


@pytest.mark.parametrize("other", ["/download?id=b", "/download", "/folder/download?id=a"])
def test_each_address_has_a_file_of_its_own(server: str, tmp_path: Path, other: str) -> None:
    """Of two that end alike the second must not be the first one's weights; nor of two servers."""
    (tmp_path / "files/folder").mkdir()
    for file in ("download", "folder/download"):
        (tmp_path / "files" / file).write_text(file)
    first = fetch_url(f"{server}/download?id=a")
    assert fetch_url(server + other) != first == fetch_url(f"{server}/download?id=a")
    assert fetch_url(server.replace("127.0.0.1", "localhost") + "/download?id=a") != first


def test_detectron2_s_own_cache_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("FVCORE_CACHE", raising=False)
    for cache in ("fvcore_cache", "iopath_cache"):
        path = tmp_path / ".torch" / cache / "detectron2/ImageNetPretrained/MSRA/R-50.pkl"
        path.parent.mkdir(parents=True)
        path.touch()
        assert fetch_url(R50) == path


@pytest.mark.parametrize(
    ("name", "reason"), [("cut.pkl", "cut off"), ("none.pkl", "404"), ("page.html", "web page"), ("", "forbids")]
)
def test_what_cannot_be_had_is_named_with_its_place(
    server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, reason: str
) -> None:
    for file in ("cut.pkl", "page.html"):
        (tmp_path / "files" / file).write_bytes(b"<html>" * 20)
    url, cache = f"{server}/{name}", tmp_path / "cache"
    if not name:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        url, name = R50, "detectron2/ImageNetPretrained/MSRA/R-50.pkl"
    with pytest.raises(InputError, match=reason) as refused:
        fetch_url(url)
    address = url.replace("detectron2://", "https://dl.fbaipublicfiles.com/detectron2/")
    assert str(refused.value).startswith(f"cannot download {address} (")
    place = Path(str(refused.value).partition("put it at ")[2])
    assert place == (cache / name if url == R50 else cache / server.partition("//")[2] / name)
    # The advice, followed.
    place.parent.mkdir(parents=True, exist_ok=True)
    assert not list(place.parent.iterdir())
    place.touch()
    assert fetch_url(url) == place
