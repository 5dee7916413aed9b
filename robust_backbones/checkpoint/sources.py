"""Reads backbone checkpoints of every known layout, recognised by their keys, under torchvision's tensor names."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robust_backbones.checkpoint import hub, zoo
from robust_backbones.checkpoint.convert import metadata_in, torchvision_name
from robust_backbones.checkpoint.format import FORMAT, TRAINING_FORMAT, Checkpoint, sha256
from robust_backbones.checkpoint.untrusted import METADATA, load_tensors
from robust_backbones.checkpoint.urls import fetch_url, is_url
from robust_backbones.errors import InputError, check_choice
from robust_backbones.models import IMAGENET_MEAN, IMAGENET_STD, BackboneSpec, identify
from robust_backbones.threat_models import ThreatModel

HUB = "hub:"
_IMAGENET = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
_STATE_DICTS = ("state_dict", "model", "model_state_dict", "model_state", "net", "network")
_AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
_BATCH_NORM_EPSILON = 1e-5


@dataclass(frozen=True)
class Source:
    """One layout of checkpoints: where it keeps the network's tensors, and what its makers feed the network."""

    description: str
    state_dicts: tuple[str, ...] = ("",)
    """Keys of the file under which the tensors may be; ``""`` is the file itself."""
    prefixes: tuple[str, ...] = ("",)
    """What may stand before torchvision's names; the first that does is taken off."""
    convention: dict[str, Any] | None = None
    """Fields of the spec that its makers always mean; None: the file says them, or the user."""
    sign: str = ""
    """A pattern of tensor names that no other layout has; without one, ``_recognize`` knows it otherwise."""


SOURCES = {
    "robust_backbones": Source("a checkpoint of robust-backbones pretrain", ("state_dict",)),
    "msra": Source(
        "a Caffe2 model of Detectron's zoo",
        ("model", "blobs", ""),
        convention={
            "mean": (103.53 / 255, 116.28 / 255, 123.675 / 255),
            "std": (1 / 255,) * 3,
            "channel_order": "BGR",
            "stride_in_1x1": True,
        },
        sign=r"^res\d_\d+_branch2a_w$",
    ),
    "detectron2": Source("a Detectron2 model", ("model", ""), sign=r"(^|\.)stem\.conv1\.weight$"),
    "moco": Source(
        "a MoCo checkpoint",
        ("state_dict",),
        ("module.encoder_q.", "encoder_q."),
        _IMAGENET,
        sign=r"^(module\.)?encoder_q\.",
    ),
    "robustness": Source(
        "a checkpoint of MadryLab's robustness library",
        ("model", "state_dict"),
        ("module.model.model.", "module.model.", "model.model.", "model."),
        sign=r"^(module\.)?(attacker\.|normalizer\.new_mean$)",
    ),
    "ema": Source("the averaged weights of a training checkpoint", _AVERAGES, ("module.", "")),
    "lightning": Source(
        "a Lightning checkpoint",
        ("state_dict",),
        ("module.model.", "module.", "model.", "net.", "network.", "backbone.", "encoder.", ""),
    ),
    "robustbench": Source(
        "a model of RobustBench",
        ("state_dict", "model", ""),
        ("module.model.", "model.", "module.", ""),
        _IMAGENET,
    ),
    "timm": Source("timm's state dict", ("state_dict", ""), ("module.", "")),
    "training": Source("a training checkpoint", (*_STATE_DICTS, ""), ("module.", "")),
    "torchvision": Source("torchvision's state dict", convention=_IMAGENET),
}

# A Caffe2 ResNeXt of Detectron's zoo is fed and strides otherwise than its ResNets.
_CAFFE2_RESNEXT = {"std": (57.375 / 255, 57.12 / 255, 58.395 / 255), "stride_in_1x1": False}


@dataclass(frozen=True)
class Statement:
    """What the user says about a file; a file that says otherwise is refused, a source's convention gives way."""

    mean: tuple[float, float, float] | None = None
    """Per channel, in [0, 1] pixel units."""
    std: tuple[float, float, float] | None = None
    channel_order: str | None = None
    """``RGB`` or ``BGR``."""
    stride_in_1x1: bool | None = None
    threat_model: str | ThreatModel | None = None
    """What it was trained against, as in ``"L2:3"``."""


def read_checkpoint(path: str | Path, *, source: str = "", statement: Statement | None = None) -> Checkpoint:
    """Read a backbone of any layout of ``SOURCES``, without running any code that its file may hold.

    Args:
        path: a file, ``hub:NAME`` of a published backbone (``zoo``), ``hub:USER/NAME`` of a repository of the
            Hugging Face hub, or a URL as Detectron2's ``MODEL.WEIGHTS`` names
            one; what is downloaded is kept.
        source: its layout, one of ``SOURCES``, where the file's keys do not tell it.
        statement: what the file does not say about itself.

    Raises:
        InputError: the file is missing, is no checkpoint, or its layout, architecture or normalisation is not known.
    """
    if str(path).startswith(HUB) and hub.is_repository(str(path).removeprefix(HUB)):
        path = hub.fetch(str(path).removeprefix(HUB))
    if str(path).startswith(HUB):
        if source or statement not in (None, Statement()):
            raise InputError("a published backbone says all there is to know: leave out what describes it")
        return read_published(str(path).removeprefix(HUB))
    if is_url(path):
        path = fetch_url(str(path))
    if source:
        check_choice("source", source, SOURCES)
    path, content = Path(path), load_tensors(path)
    try:
        return _read(content, path, source or _recognize(content, path), statement or Statement())
    except InputError as error:
        raise InputError(f"cannot use {path}: {error}") from None
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(f"cannot use {path}: it is damaged ({error!r})") from None


def read_published(name: str, path: Path | None = None) -> Checkpoint:
    """The published backbone ``name``: in the file ``path``, or downloaded at the first use.

    Raises:
        InputError: there is none of this name; it cannot be downloaded; the file is not what the name says.
    """
    published = zoo.find(name)
    checkpoint = read_checkpoint(path or zoo.fetch(name), statement=Statement(threat_model=published.threat_model))
    if checkpoint.spec.arch != published.arch:
        raise InputError(f"{checkpoint.source} holds a {checkpoint.spec.arch}, not the {published.arch} of its name")
    return checkpoint


def _recognize(content: dict[str, Any], path: Path) -> str:
    """The layout of a file, by its keys."""
    if content.get("format") == FORMAT:
        return "robust_backbones"
    if content.get("format") == TRAINING_FORMAT:
        raise InputError("a run resumes from it: give the checkpoint.pt or best.pt of the same run")
    found = [key for key in (*_STATE_DICTS, *_AVERAGES, "blobs") if _tensors(content.get(key))]
    if metadata_in(content) and not found and "conv1.weight" in content:
        return "torchvision"
    averages = [key for key in found if key in _AVERAGES]
    if averages and len(found) > len(averages):
        raise InputError(f"it holds {' and '.join(found)}: give --source training or --source ema to choose")
    names = _tensors(content[found[0]] if found else content)
    if not names:
        keys = ", ".join(str(key) for key in list(content)[:3])
        raise InputError(f"its layout is not known (keys: {keys} ...); known are those of {', '.join(SOURCES)}")
    for layout, source in SOURCES.items():
        if source.sign and any(re.search(source.sign, name) for name in names):
            return layout
    if averages:
        return "ema"
    if "pytorch-lightning_version" in content:
        return "lightning"
    if _normalizer(names):
        return "robustbench"
    if any(name.startswith("model.") for name in names):
        raise InputError(
            "its names begin with model., as RobustBench's, Lightning's and others do: give --source robustbench or "
            "--source lightning"
        )
    if _pretrained_cfg(content, path) or path.suffix == ".safetensors":
        return "timm"
    return "training" if found or any(name.startswith("module.") for name in names) else "torchvision"


def _read(content: dict[str, Any], path: Path, layout: str, statement: Statement) -> Checkpoint:
    source = SOURCES[layout]
    candidates = (_tensors(content.get(key) if key else content) for key in source.state_dicts)
    tensors = next(filter(None, candidates), {})
    if not (tensors or layout == "robust_backbones"):
        raise InputError(f"it is not {source.description}: leave out --source {layout}")
    prefix = ""
    if layout == "msra":
        names = _names_in_caffe2(tensors)
    elif layout == "detectron2":
        names = _names_in_detectron2(tensors)
    else:
        prefix = next((prefix for prefix in source.prefixes if any(name.startswith(prefix) for name in tensors)), "")
        names = {name: name.removeprefix(prefix) for name in tensors if name.startswith(prefix)}
        names = _without_other_heads(names, always=layout == "moco")
    if layout == "robustness":
        _check_copies(tensors, prefix)
    state_dict = {short: tensors[name] for name, short in names.items()}
    if layout == "msra":
        _add_statistics(state_dict, tensors.get("conv1_b"))

    convention, metadata = source.convention or {}, metadata_in(content)
    if layout == "robust_backbones":
        own = BackboneSpec(**content["spec"])
        spec = BackboneSpec(own.arch, own.num_classes, stem=own.stem)
        in_file = _said_by(own, content["threat_model"])
        if identify(state_dict) != spec:
            raise InputError(
                f"its tensors are not those of {spec.arch} with {spec.num_classes} classes and the {spec.stem} stem"
            )
    else:
        spec = identify(state_dict)
        in_file = _said_by(metadata.spec, metadata.threat_model) if metadata else _normalization(content, tensors, path)
    if layout == "msra" and spec.arch.startswith("resnext"):
        convention = convention | _CAFFE2_RESNEXT
    if layout == "detectron2" and metadata is None:
        _demand(statement, ("mean", "std", "channel_order", "stride_in_1x1"))
    elif not (in_file or convention):
        _demand(statement, ("mean", "std"))
    fields, who = _agreed(in_file, convention, statement)
    threat_model = fields.pop("threat_model", None)
    return Checkpoint(
        spec=replace(spec, **fields),
        state_dict=state_dict,
        threat_model=threat_model,
        layout=layout,
        source=path.name,
        source_sha256=sha256(path),
        normalization=who,
        prefix=prefix,
        left_out=tuple(name for name in tensors if name not in names),
        path=path,
    )


def _tensors(content: Any) -> dict[str, Tensor]:
    """The tensors and their names; nothing where ``content`` is no dictionary."""
    items = content.items() if isinstance(content, dict) else ()
    return {name: value for name, value in items if isinstance(name, str) and isinstance(value, Tensor)}


def _check_copies(tensors: dict[str, Tensor], prefix: str) -> None:
    """The robustness library saves the network twice; two that differ are no backbone at all."""
    copy_prefix = prefix.replace("model.", "attacker.model.", 1)
    for name, tensor in tensors.items():
        if name.startswith(copy_prefix):
            original = tensors.get(prefix + name.removeprefix(copy_prefix))
            if original is None or not torch.equal(original.nan_to_num(), tensor.nan_to_num()):
                raise InputError(f"its two copies of the network differ ({name}): it is damaged")


def _without_other_heads(names: dict[str, str], *, always: bool) -> dict[str, str]:
    """Leave out what a ResNet carries in place of a linear classifier, such as a projection of several layers."""
    short_names = set(names.values())
    head = {name for name in short_names if name.startswith("fc.")}
    if "layer1.0.conv1.weight" in short_names and (always or head != {"fc.weight", "fc.bias"}):
        return {name: short for name, short in names.items() if short not in head}
    return names


def _names_in_detectron2(tensors: dict[str, Tensor]) -> dict[str, str]:
    """torchvision's names for a backbone alone or in a whole detector, where a C4 model keeps res5 in its heads."""
    prefixes = [name.removesuffix("stem.conv1.weight") for name in tensors if name.endswith("stem.conv1.weight")]
    if len(prefixes) != 1:
        raise InputError(f"it holds {len(prefixes)} backbones of Detectron2, not one")
    pattern = re.compile(rf"(?:{re.escape(prefixes[0])}|roi_heads\.)((?:stem\.conv1|res\d)\..*)")
    shorts = {name: match[1] for name in tensors if (match := pattern.fullmatch(name))}
    try:
        return {name: torchvision_name(short) for name, short in shorts.items()}
    except KeyError as error:
        raise InputError(f"Detectron2's ResNet has no tensor {error.args[0]}") from None


def _names_in_caffe2(blobs: dict[str, Tensor]) -> dict[str, str]:
    """torchvision's names for Caffe2's, as Detectron's model zoo has them."""
    layers = {"1": "shortcut", "2a": "conv1", "2b": "conv2", "2c": "conv3"}
    endings = {"w": "weight", "bn_s": "norm.weight", "bn_b": "norm.bias"}
    names = {}
    for name in blobs:
        if match := re.fullmatch(r"res(\d)_(\d+)_branch(1|2[abc])_(w|bn_s|bn_b)", name):
            stage, block, layer, ending = match.groups()
            names[name] = torchvision_name(f"res{stage}.{block}.{layers[layer]}.{endings[ending]}")
        elif match := re.fullmatch(r"(?:res_)?conv1_(w|bn_s|bn_b)", name):
            names[name] = torchvision_name(f"stem.conv1.{endings[match[1]]}")
    return names


def _add_statistics(state_dict: dict[str, Tensor], stem_bias: Tensor | None) -> None:
    """Caffe2's batch norms are a scale and a shift: give them the statistics that change nothing."""
    if stem_bias is not None:  # s (w x + c) + b
        state_dict["bn1.bias"] = state_dict["bn1.bias"] + state_dict["bn1.weight"] * stem_bias
    for name in [name for name in state_dict if name.endswith(".bias")]:
        norm = name.removesuffix("bias")
        state_dict[f"{norm}running_mean"] = torch.zeros_like(state_dict[name])
        state_dict[f"{norm}running_var"] = torch.ones_like(state_dict[name]) - _BATCH_NORM_EPSILON


def _normalization(content: dict[str, Any], tensors: dict[str, Tensor], path: Path) -> dict[str, Any]:
    """Mean and std that the file carries: in a layer before the network, or as timm's pretrained_cfg."""
    if layer := _normalizer(tensors):
        mean, std = (tuple(round(value, 6) for value in tensors[name].double().flatten().tolist()) for name in layer)
        return {"mean": mean, "std": std}
    if cfg := _pretrained_cfg(content, path):
        return {"mean": tuple(cfg["mean"]), "std": tuple(cfg["std"])}
    return {}


def _normalizer(tensors: dict[str, Tensor]) -> tuple[str, str] | None:
    """Names of the mean and the std of a layer that normalises the input."""
    partners = {"new_mean": "new_std", "mean": "std", "mu": "sigma"}
    for name, tensor in tensors.items():
        *layers, last = name.split(".")
        partner = ".".join([*layers, partners.get(last, "")])
        if last in partners and "attacker" not in layers and tensor.numel() == 3 and partner in tensors:
            return name, partner
    return None


def _pretrained_cfg(content: dict[str, Any], path: Path) -> dict[str, Any] | None:
    """timm's description of a model: in the file, in a safetensors file's header, or in config.json beside it."""
    for key in ("pretrained_cfg", "default_cfg"):
        if isinstance(content.get(key), dict):
            return content[key]
        if text := content.get(METADATA, {}).get(key):
            return json.loads(text)
    config = path.with_name("config.json")
    if path.stem in ("model", "pytorch_model") and config.is_file():  # the files' names on the hub
        return json.loads(config.read_text()).get("pretrained_cfg")
    return None


def _said_by(spec: BackboneSpec, threat_model: str | None) -> dict[str, Any]:
    """What a file of ours says, by the names of ``Statement``."""
    fields = {name: getattr(spec, name) for name in ("mean", "std", "channel_order", "stride_in_1x1")}
    return fields if threat_model is None else {**fields, "threat_model": ThreatModel.parse(threat_model)}


def _agreed(in_file: dict[str, Any], convention: dict[str, Any], statement: Statement) -> tuple[dict[str, Any], str]:
    """What the file, the user or the convention says, and which of them says mean and std."""
    stated = {name: value for name, value in vars(statement).items() if value is not None}
    if "threat_model" in stated:
        stated["threat_model"] = ThreatModel.parse(stated["threat_model"])
    for name, value in stated.items():
        if name in in_file and not _close(in_file[name], value):
            raise InputError(
                f"it says that its {name.replace('_', ' ')} is {in_file[name]}, not {value}: leave out that option"
            )
    who = (
        "the file" if "mean" in in_file else "the command line" if "mean" in stated else "the convention of its source"
    )
    return {**convention, **stated, **in_file}, who


def _demand(statement: Statement, names: Iterable[str]) -> None:
    if missing := [name for name in names if getattr(statement, name) is None]:
        options = " ".join(f"--{name.replace('_', '-')}" for name in missing)
        raise InputError(
            f"it does not say what it was fed with: give {options} "
            "(ImageNet's usual ones are --mean 0.485 0.456 0.406 --std 0.229 0.224 0.225)"
        )


def _close(a: Any, b: Any) -> bool:
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(abs(x - y) < 1e-4 for x, y in zip(a, b, strict=True))
    return bool(a == b)
