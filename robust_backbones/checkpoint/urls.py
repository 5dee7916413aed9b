"""Weights named by a URL, as in Detectron2's configurations: the file in its cache, downloaded at the first use."""

from __future__ import annotations

import hashlib
import os
import shutil
import urllib.request
from pathlib import Path
from urllib.parse import urlparse

from robust_backbones.errors import InputError
from robust_backbones.runs.files import atomic_path

_DETECTRON2 = "https://dl.fbaipublicfiles.com/detectron2/"  # what detectron2:// stands for there
_SECONDS = 60  # that a server may be silent


def as_url(path: str | Path) -> str:
    """The URL in ``path``, in which a Path keeps only one of two slashes; "" if it is not a URL."""
    scheme, slash, rest = str(path).partition(":/")
    return f"{scheme}://{rest.lstrip('/')}" if slash and scheme in ("https", "http", "detectron2") else ""


def fetch_url(url: str) -> Path:
    """The file of a URL in Detectron2's cache (FVCORE_CACHE, else ~/.torch/iopath_cache), downloaded at the first use.

    Files of Detectron2's own server are in its usual place; others in a folder of their server, because two may have
    files of the same name. HF_HUB_OFFLINE=1 forbids network access.

    Raises:
        InputError: it cannot be downloaded; the message says which file to put where.
    """
    address = url.replace("detectron2://", _DETECTRON2, 1)
    parts = urlparse(address)
    name = parts.path.lstrip("/")
    if not address.startswith(_DETECTRON2):
        query = [hashlib.sha256(parts.query.encode()).hexdigest()[:16]] if parts.query else []
        name = "/".join([parts.netloc.rpartition("@")[2], *query, name])  # no password becomes a name
    own = os.environ.get("FVCORE_CACHE", "")
    folders = (
        [Path(own).expanduser()] if own else [Path.home() / ".torch" / f"{who}_cache" for who in ("iopath", "fvcore")]
    )
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    path = folders[0] / name
    try:
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
            raise OSError("HF_HUB_OFFLINE forbids the network")
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(address, timeout=_SECONDS) as response, atomic_path(path) as temporary:
            if response.headers.get_content_type() == "text/html":
                raise OSError("what answered is a web page")
            with open(temporary, "wb") as file:
                shutil.copyfileobj(response, file)
            size = response.headers.get("Content-Length")
            if size is not None and int(size) != temporary.stat().st_size:
                raise OSError("it was cut off")
    except (OSError, ValueError) as error:
        raise InputError(
            f"cannot download {address} ({reason_of(error)}): download it yourself and put it at {path}"
        ) from None
    return path


def reason_of(error: Exception) -> str:
    """The reason in one line."""
    return (" ".join(str(error).split()) or type(error).__name__)[:300]
