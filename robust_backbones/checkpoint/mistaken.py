"""What people give in place of a checkpoint by mistake, called by its name with the mend."""

from __future__ import annotations

from pathlib import Path

from robust_backbones.errors import InputError

_KINDS = (
    (
        b"version https://git-lfs",
        "is a pointer of Git LFS, not the file itself: run `git lfs pull` in its repository, or download the file",
    ),
    (
        b"<!doctype html|<html",
        "is a web page, not a file of tensors: download the file itself, by the link that says download or raw",
    ),
    (b"<?xml", "is a server's answer in XML, likely an error, not a file of tensors: download the file again"),
    (b"\x1f\x8b", "is compressed by gzip: unpack it with `gunzip` or `tar xzf`, and give the file in it"),
    (b"BZh", "is compressed by bzip2: unpack it with `bunzip2` or `tar xjf`, and give the file in it"),
    (b"\xfd7zXZ", "is compressed by xz: unpack it with `unxz` or `tar xJf`, and give the file in it"),
    (b"\x28\xb5\x2f\xfd", "is compressed by Zstandard: unpack it with `unzstd`, and give the file in it"),
    (b"\x89HDF", "is an HDF5 file, of Keras or h5py: give the checkpoint of the PyTorch model"),
)
"""How a file begins, in lower case and after white space -> what it is, and what to do."""


def refuse_mistaken(path: Path) -> None:
    """Raise ``InputError`` where ``path`` is no file of any tensors, by what it is."""
    if path.is_dir():
        raise InputError(f"{path} is a folder: {_advice_in(path)}")
    if not path.is_file():
        raise InputError(f"no file at {path}: check the path")
    with open(path, "rb") as file:
        start = file.read(64).lstrip().lower()
    if path.stat().st_size == 0:
        raise InputError(f"{path} is empty: download or save it again")
    for beginnings, sentence in _KINDS:
        if start.startswith(tuple(beginnings.lower().split(b"|"))):
            raise InputError(f"{path} {sentence}")


def _advice_in(folder: Path) -> str:
    if (folder / ".metadata").is_file():
        return (
            "a distributed checkpoint of torch; make a file of it, and give that: "
            f"`python -m torch.distributed.checkpoint.format_utils dcp_to_torch {folder} {folder}.pth`"
        )
    if any(folder.glob("*.index.json")):
        return "its tensors are in several files; load it with its library and save one state_dict()"
    suffixes = (".pt", ".pth", ".pkl", ".ckpt", ".bin", ".safetensors", ".tar")
    files = sorted(path for path in folder.iterdir() if path.suffix in suffixes)
    return f"give the file in it, such as {files[0]}" if files else "give a file, it holds no checkpoint"
