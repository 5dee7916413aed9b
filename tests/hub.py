"""A Hugging Face hub on this machine, with files as MadryLab publishes them."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import socket
import struct
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread

import pytest
import torch
from torch import nn

from robust_backbones.checkpoint.zoo import REPOSITORY
from robust_backbones.models import IMAGENET_MEAN, IMAGENET_STD

FOLDER = f"/{REPOSITORY}/resolve/main/"


class FakeHub(ThreadingHTTPServer):
    """Takes uploads, and serves ``files`` as the hub large ones: HEAD tells sha256 and size, GET goes on anywhere."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.requests: list[str] = []
        """Method, path and, where it asks for one, range of each."""
        self.accidents: list[str] = []
        """What befalls the next downloads, one each: ``cut`` and ``reset`` halfway, or ``damaged``."""
        self.gates: list[Event] = []
        """Each download waits for one of its own, if there is one."""
        self.error: tuple[int, str] | None = None
        """Status and X-Error-Code with which every request is answered."""
        self.is_hub = True
        """Otherwise what answers knows nothing but the content, as a log-in page or a file server does."""
        self.etag = ""
        """Told in place of the files' sha256."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def downloads(self) -> list[str]:
        """The requests for the content of a file: its name and range."""
        start = f"GET {FOLDER}"
        return [request.removeprefix(start) for request in self.requests if request.startswith(start)]


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        if not (body := self._answer()):
            return
        if self.server.gates:
            self.server.gates.pop(0).wait()
        accident = self.server.accidents.pop(0) if self.server.accidents else ""
        if accident == "damaged":
            body = body[:-1] + bytes([body[-1] ^ 1])
        self.wfile.write(body if accident in ("", "damaged") else body[: len(body) // 2])
        if accident == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())

    def do_POST(self) -> None:
        """What HfApi.upload_folder asks for: small files come in the request itself, one a line."""
        self.server.requests.append(f"POST {self.path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.server.error:
            self._send(self.server.error[0], {"X-Error-Code": self.server.error[1], "Content-Length": "0"})
            return
        repository = self.path.removeprefix("/api/models/").rpartition("/")[0].rpartition("/")[0]
        if self.path.endswith("/create"):
            answer = {"url": f"{self.server.url}/{json.loads(body)['organization']}/{json.loads(body)['name']}"}
        elif "/preupload/" in self.path:
            kinds = {"uploadMode": "regular", "shouldIgnore": False}
            answer = {"files": [{"path": file["path"], **kinds} for file in json.loads(body)["files"]]}
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    path, content = line["value"]["path"], base64.b64decode(line["value"]["content"])
                    self.server.files[f"/{repository}/resolve/main/{path}"] = content
            answer = {"success": True, "commitOid": "0" * 40, "commitUrl": f"{self.server.url}/{repository}"}
        else:
            answer = {}
        text = json.dumps(answer).encode()
        self._send(200, {"Content-Type": "application/json", "Content-Length": str(len(text))})
        self.wfile.write(text)

    def _answer(self) -> bytes:
        """Send status and headers; returns the body of a GET."""
        asked = self.headers.get("Range", "")
        self.server.requests.append(f"{self.command} {self.path} {asked}".strip())
        content = self.server.files.get(self.path.removeprefix(FOLDER))
        if self.server.error or content is None:
            status, code = self.server.error or (404, "EntryNotFound")
            self._send(status, {"X-Error-Code": code, "Content-Length": "0"})
            return b""
        if not self.server.is_hub:
            self._send(200, {"Content-Length": str(len(content))})
            return content
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked else 0
        if start >= len(content):
            self._send(416, {"Content-Range": f"bytes */{len(content)}", "Content-Length": "0"})
            return b""
        etag = self.server.etag or hashlib.sha256(content).hexdigest()
        headers = {
            "X-Repo-Commit": "0123456789abcdef" * 2 + "01234567",
            "ETag": f'"{etag}"',
            "X-Linked-Etag": f'"{etag}"',
            "X-Linked-Size": str(len(content)),
            "Accept-Ranges": "bytes",
            "Content-Length": str(len(content) - start),
        }
        if asked:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._send(206 if asked else 200, headers)
        return content[start:]

    def _send(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(name="hub")
def hub_fixture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """A hub without files, which is the one that is asked, and a new cache for what comes from it."""
    for name in ("HF_HUB_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))
    monkeypatch.setenv("ROBUST_BACKBONES_CACHE", str(tmp_path / "cache"))
    with FakeHub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield hub
        hub.shutdown()


def robustness_file(
    network: nn.Module,
    *,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
    wrapper: str = "",
) -> bytes:
    """``network`` as a checkpoint of the robustness library: all of it twice, around it what training needs.

    ``wrapper`` stands before the network's own names, as ``model.`` in the files of other networks than ResNets.
    """
    import dill

    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=30)
    tensors = {f"{wrapper}{name}": tensor for name, tensor in network.state_dict().items()}
    new_mean, new_std = (torch.tensor(values)[:, None, None] for values in (mean, std))
    content = {
        "model": {
            "module.normalizer.new_mean": new_mean,
            "module.normalizer.new_std": new_std,
            **{f"module.model.{name}": tensor for name, tensor in tensors.items()},
            "module.attacker.normalize.new_mean": new_mean,
            "module.attacker.normalize.new_std": new_std,
            **{f"module.attacker.model.{name}": tensor for name, tensor in tensors.items()},
        },
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "epoch": 90,
        "amp": None,
    }
    file = io.BytesIO()
    torch.save(content, file, pickle_module=dill, _use_new_zipfile_serialization=False)
    return file.getvalue()
