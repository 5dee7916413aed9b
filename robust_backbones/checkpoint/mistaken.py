"""Files given instead of a checkpoint by mistake: what they are, and what to do."""

from __future__ import annotations

import re
from itertools import islice
from pathlib import Path

from robust_backbones.checkpoint.zoo import published, published_robust
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
    (b"7z\xbc\xaf|Rar!", "is a compressed archive: unpack it, and give the file in it"),
    (b"\x89HDF", "is an HDF5 file, of Keras or h5py: give the checkpoint of the PyTorch model"),
    (b"GGUF", "is a GGUF file, of llama.cpp: give the checkpoint of the PyTorch model"),
    (b"\x93NUMPY", "is one array of NumPy, not a network: give a file of all its tensors"),
    (b"\xff\xd8\xff|\x89PNG", "is an image, not a file of tensors: give the checkpoint"),
)
"""Start of a file, in lower case and after white space -> what it is, and what to do."""
_FRAMEWORKS = {
    **{
        "ONNX": r"\.onnx",
        "TensorFlow": r"\.pb|\.tflite|\.index|\.meta|\.data-\d{5}-of-\d{5}",
        "Keras": r"\.keras|\.h5",
    },
    **{"Flax": r"\.msgpack", "MXNet": r"\.params", "Caffe": r"\.caffemodel", "TensorRT": r"\.engine|\.plan|\.trt"},
}
"""Frameworks -> suffixes of their files, which cannot be read here."""
_WHOLE = "load it with its library, and save one state_dict()"
_SUFFIXES = (".pt", ".pth", ".pkl", ".ckpt", ".bin", ".safetensors", ".tar")


def refuse_mistaken(path: Path) -> None:
    """Raise ``InputError`` if ``path`` is not a file of tensors, and say what it is."""
    if path.is_dir():
        raise InputError(f"{path} is a folder: {_advice_in(path)}")
    if not path.is_file():
        hub = f", or give hub:{path.stem} to download that" if path.stem in published() | published_robust() else ""
        raise InputError(f"no file at {path}: check the path{hub}")
    with open(path, "rb") as file:
        start = file.read(64).lstrip().lower()
    if path.stat().st_size == 0:
        raise InputError(f"{path} is empty: download or save it again")
    if re.search(r"-\d{5}-of-(?!00001)\d{5}\.", path.name):
        raise InputError(f"{path} is one of the several files of a network: {_WHOLE}")
    for beginnings, sentence in _KINDS:
        if start.startswith(tuple(beginnings.lower().split(b"|"))):
            raise InputError(f"{path} {sentence}")


def mistaken_for(path: Path) -> str:
    """What an unreadable file seems to be, with the fix; "" if unknown."""
    for framework, suffix in _FRAMEWORKS.items():
        if re.search(f"(?:{suffix})$", path.name.lower()):
            return f"seems to be a model of {framework}: give the checkpoint of the PyTorch model"
    with open(path, "rb") as file:
        start = file.read(512)
    if start[257:262] == b"ustar":
        return "is a tar archive: unpack it with `tar xf`, and give the file in it"
    if start.isascii() and all(byte >= 32 or byte in b"\t\r\n" for byte in start):
        words = " ".join(start.decode().split())[:40]
        return f"is text ({words} ...), not a file of tensors: give the file of tensors itself, or download it again"
    return ""


def mistaken_archive(names: list[str]) -> str:
    """What a zip archive of these files is, if not from ``torch.save``, with the fix."""
    if any(name.endswith("/constants.pkl") for name in names):
        return (
            "is a TorchScript program: save its tensors by "
            "`torch.save(torch.jit.load(FILE, map_location='cpu').state_dict(), 'tensors.pth')`, and give that file"
        )
    if names and all(name.endswith(".npy") for name in names):
        return (
            "is an archive of NumPy arrays: save them by "
            "`torch.save({name: torch.tensor(array) for name, array in numpy.load(FILE).items()}, 'tensors.pth')`, and "
            "give that file"
        )
    if any("model.weights.h5" in name for name in names):
        return "is a model of Keras: give the checkpoint of the PyTorch model"
    if any(name.endswith("/archive_format") for name in names):
        return (
            "is a program of torch.export: save its tensors by "
            "`torch.save(dict(torch.export.load(FILE).state_dict), 'tensors.pth')`, and give that file"
        )
    if any(Path(name).suffix in _SUFFIXES and Path(name).name != "data.pkl" for name in names):
        return "is a zip archive of files: unpack it with `unzip`, and give the checkpoint in it"
    return ""


def _advice_in(folder: Path) -> str:
    if (folder / ".metadata").is_file():
        return (
            "a distributed checkpoint of torch; make a file of it, and give that: "
            f"`python -m torch.distributed.checkpoint.format_utils dcp_to_torch {folder} {folder}.pth`"
        )
    if (folder / "zero_to_fp32.py").is_file():
        return f"a checkpoint of DeepSpeed; run `python {folder}/zero_to_fp32.py {folder} OUT` and give the file in OUT"
    if (folder / "saved_model.pb").is_file():
        return "a model of TensorFlow: give the checkpoint of the PyTorch model"
    if any(folder.glob("*.index.json")):
        return f"its tensors are in several files; {_WHOLE}"
    files = sorted(path for path in islice(folder.rglob("*"), 10_000) if path.suffix in _SUFFIXES)
    nearest = min(files, key=lambda path: len(path.parts), default=None)
    return f"give the file in it, such as {nearest}" if nearest else "give a file, it holds no checkpoint"
