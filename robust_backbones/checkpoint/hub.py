"""Backbones in the format of timm and the Hugging Face hub (tensors, config.json, model card); upload and download."""

from __future__ import annotations

import json
import math
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from robust_backbones.checkpoint.convert import BackboneMetadata, write_described, write_torchvision
from robust_backbones.checkpoint.format import Checkpoint
from robust_backbones.checkpoint.urls import reason_of
from robust_backbones.checkpoint.zoo import cache_folder, hub_endpoint
from robust_backbones.errors import InputError
from robust_backbones.models import BackboneSpec, only_in_timm
from robust_backbones.runs.files import atomic_path, write_text
from robust_backbones.timm_models import timm_config

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
"""The files of a repository, with the names used by the hub and timm."""
PROCESSOR = "preprocessor_config.json"
"""File with mean and std in repositories of transformers."""


def is_repository(name: str) -> bool:
    """Whether a name is a repository's, ``USER/NAME``; names of published backbones have no slash."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name))


def write_timm(path: Path, checkpoint: Checkpoint) -> None:
    """Write a ``.safetensors`` with timm's tensor names, which for ResNets are torchvision's.

    Raises:
        InputError: timm has no such network.
    """
    spec = checkpoint.in_rgb().spec
    cfg = json.dumps(_pretrained_cfg(spec))
    if only_in_timm(spec.arch):
        if spec.norm_epsilon:
            raise InputError(
                f"timm's {spec.arch} has layer norms of another epsilon than {spec.norm_epsilon:g}, that of this one: "
                "keep its file"
            )
        with atomic_path(path) as temporary:
            write_described(temporary, checkpoint.in_rgb(), pretrained_cfg=cfg)
    elif not spec.resnet_shape:
        raise InputError(f"timm names the tensors of {spec.arch} otherwise: give --to torchvision")
    else:
        write_torchvision(path, checkpoint.in_rgb(), pretrained_cfg=cfg)


def describe(folder: Path, checkpoint: Checkpoint) -> None:
    """Write timm's config.json and a model card beside the ``WEIGHTS`` of ``write_timm``: a repository of the hub.

    ``timm.create_model("local-dir:FOLDER", pretrained=True)`` loads it.
    """
    spec = checkpoint.in_rgb().spec
    config = {"architecture": spec.arch, "num_classes": spec.num_classes, "pretrained_cfg": _pretrained_cfg(spec)}
    texts = {CONFIG: json.dumps(config, indent=2) + "\n", CARD: model_card(BackboneMetadata.of(checkpoint.in_rgb()))}
    for name, text in texts.items():
        write_text(folder / name, text)


def _pretrained_cfg(spec: BackboneSpec) -> dict[str, Any]:
    crop = spec.image_size / spec.val_resize
    if spec.image_size / crop < spec.val_resize:  # timm rounds the quotient down
        crop = math.nextafter(crop, 0)
    cfg = {
        "architecture": spec.arch,
        "num_classes": spec.num_classes,
        "input_size": [3, spec.image_size, spec.image_size],
        "mean": list(spec.mean),
        "std": list(spec.std),
        "crop_pct": crop,
        "interpolation": spec.interpolation,
        "first_conv": "conv1",
        "classifier": "fc",
    }
    if not only_in_timm(spec.arch):
        return cfg
    theirs = timm_config(spec.arch)
    return cfg | {
        "first_conv": theirs.first_conv,
        "classifier": theirs.classifier,
        "fixed_input_size": theirs.fixed_input_size,  # without it timm builds a ViT for 224 pixels
    }


def model_card(metadata: BackboneMetadata) -> str:
    """README.md of a repository, from a converted file's metadata. The user adds the licence."""
    spec = metadata.spec
    rows = {
        "architecture": spec.arch,
        "threat model": metadata.threat_model or "unknown",
        "input": metadata.reading(),
        "classes": spec.num_classes or "none, a backbone alone",
        "source": f"{metadata.source} ({metadata.layout})",
        "sha256 of the source": metadata.source_sha256,
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"""---
library_name: timm
tags:
- adversarial-robustness
- robust-backbones
---

# {spec.arch}, trained against {metadata.threat_model or "an unknown threat model"}

| | |
|---|---|
{table}

Pixels are in [0, 1] before mean and std. A threat model of epsilon 0 is standard training. No licence is given here:
that of the source holds.

## In a detector of Detectron2

```
robust-backbones convert hub:USER/NAME backbone.pkl
robust-backbones train --config-file CONFIG.yaml MODEL.WEIGHTS backbone.pkl
```

## As a classifier or feature extractor

```python
import timm

model = timm.create_model("hf-hub:USER/NAME", pretrained=True)
```
"""


def push(folder: Path, repository: str, *, private: bool = False) -> str:
    """Upload the files of ``write_timm`` and ``describe`` to ``USER/NAME``, created if missing; returns its URL.

    HF_ENDPOINT names another hub; the token is HF_TOKEN or that of ``hf auth login``.

    Raises:
        InputError: the hub refuses them.
    """
    from huggingface_hub import HfApi

    card = folder / CARD
    write_text(card, card.read_text().replace("USER/NAME", repository))
    api = HfApi(endpoint=hub_endpoint())
    try:
        url = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, allow_patterns=[WEIGHTS, CONFIG, CARD])
    except Exception as error:  # a network can fail in any way
        raise InputError(
            f"cannot upload {folder} to {repository} ({reason_of(error)}): log in with `hf auth login` as one who may "
            f"write there, and give the same command again"
        ) from None
    return str(url)


def fetch(repository: str) -> Path:
    """The weights of ``USER/NAME`` in the cache, with their descriptions beside them; downloaded if missing.

    HF_ENDPOINT names another hub, HF_HUB_OFFLINE=1 forbids the network.

    Raises:
        InputError: it cannot be downloaded.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    where: dict[str, Any] = {"endpoint": hub_endpoint(), "cache_dir": cache_folder() / "hub"}
    try:
        path = Path(hf_hub_download(repository, WEIGHTS, **where))
        hf_hub_download(repository, CONFIG, **where)
        with suppress(EntryNotFoundError):
            hf_hub_download(repository, PROCESSOR, **where)
    except EntryNotFoundError as error:
        raise InputError(
            f"{repository} does not hold {WEIGHTS} and {CONFIG} ({reason_of(error)}): download the file that it holds, "
            "and give its path"
        ) from None
    except Exception as error:  # a network can fail in any way
        raise InputError(
            f"cannot download {repository} ({reason_of(error)}): check its name and, if it is private, log in with "
            "`hf auth login`"
        ) from None
    return path
