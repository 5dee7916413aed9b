"""Reads backbone checkpoints of every known layout, under torchvision's names; notes who says their preprocessing."""

from __future__ import annotations

import re
import shlex
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from robust_backbones.checkpoint import hub, zoo
from robust_backbones.checkpoint.beside import check_left_out
from robust_backbones.checkpoint.convert import metadata_in
from robust_backbones.checkpoint.description import Description
from robust_backbones.checkpoint.format import ASSUMED, BY_FILE, FORMAT, READING, TRAINING_FORMAT, Checkpoint, sha256
from robust_backbones.checkpoint.layouts import (
    BARE,
    CAFFE2_RESNEXT,
    COCO_V1,
    DILATED,
    NAMES,
    NORMALIZER,
    OWN,
    SEGMENTER,
    SOURCES,
    TIMM,
    Network,
    find_network,
    layout_of,
    without_epsilon,
)
from robust_backbones.checkpoint.names import without_wrappers
from robust_backbones.checkpoint.normalizers import check_normalizers, normalizer_of
from robust_backbones.checkpoint.readback import network_of
from robust_backbones.checkpoint.statement import Statement, agreed, check_said
from robust_backbones.checkpoint.untrusted import load_tensors
from robust_backbones.checkpoint.urls import as_url, fetch_url
from robust_backbones.errors import InputError, check_choice
from robust_backbones.models import BackboneSpec, only_in_timm, spec_from, usual_spec
from robust_backbones.threat_models import ThreatModel

HUB = "hub:"
_OPTIONS = re.compile(r" [('\"]?--(mean|std|channel-order|stride-in-1x1|arch|key|prefix|source)\b")

# As detr-r50-dc5-f0fb7ef5.pth, but no part of a hash.
_DC5 = re.compile(r"(?i)(?<![0-9a-z])(r(es)?(net)?_?\d+)?_?dc5(?![0-9a-z])")


def read_checkpoint(
    path: str | Path,
    *,
    source: str = "",
    key: str | None = None,
    prefix: str | None = None,
    statement: Statement | None = None,
    require_said: bool = False,
) -> Checkpoint:
    """Read a backbone of any layout in ``SOURCES``, without running any code that its file may contain.

    Args:
        path: a file, ``hub:NAME`` of a published backbone (``zoo``), ``hub:USER/NAME`` of a Hugging Face hub
            repository, or a URL as in Detectron2's ``MODEL.WEIGHTS``; downloads are kept.
        source: its layout, one of ``SOURCES``, if the file's keys do not show it.
        key: which of several networks: the key of its dictionary, such as ``teacher`` or ``state.model``.
        prefix: which of several networks: the prefix of its tensor names, such as ``module.encoder_q.``.
        statement: what the file does not say about itself; None for a command without options for it.
        require_said: refuse values that neither the file nor ``statement`` gives.

    Raises:
        InputError: the file is missing, is not a checkpoint, or its layout, architecture or normalisation is unknown;
            it holds several networks and none is chosen.
    """
    if str(path).startswith(zoo.PREFIX):
        path = str(path).replace(zoo.PREFIX, HUB, 1)
    if str(path).startswith(HUB) and hub.is_repository(str(path).removeprefix(HUB)):
        path = hub.fetch(str(path).removeprefix(HUB))
    if str(path).startswith(HUB):
        if source or key or prefix or statement not in (None, Statement()):
            raise InputError("a published backbone says all there is to know: leave out what describes it")
        return read_published(str(path).removeprefix(HUB))
    if url := as_url(path):
        path = fetch_url(url)
    if source:
        check_choice("source", source, SOURCES)
    if statement and statement.arch:
        usual_spec(statement.arch)  # refuses what it does not know
    if not Path(path).exists() and str(path) in zoo.published() | zoo.published_robust():
        raise InputError(f"no file at {path}: did you mean {HUB}{path}, the published backbone?")
    path, content = Path(path), load_tensors(path)
    try:
        checkpoint = _read(content, path, source, key, prefix, statement or Statement())
        if require_said:
            check_said(checkpoint)
    except InputError as error:  # short, whatever a damaged file gives to show
        reason = str(error)[:2000]
        if statement is None and _OPTIONS.search(reason):
            command = f"robust-backbones convert {shlex.quote(str(path))} DST.safetensors --to timm"
            reason += f"; these are options of `{command}`: run it with them, and give what it writes"
        raise InputError(f"cannot use {path}: {reason}") from None
    except (LookupError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise InputError(f"cannot use {path}: it is damaged ({error!r})") from None
    return checkpoint


def read_published(name: str, path: Path | None = None) -> Checkpoint:
    """The published backbone ``name``: in the file ``path``, or downloaded at the first use.

    Raises:
        InputError: the name is unknown; it cannot be downloaded; the file does not match the name.
    """
    published = zoo.find(name)
    statement = Statement(threat_model=published.threat_model, **published.fed)
    if published.source:
        statement = replace(statement, arch=published.arch)
    checkpoint = read_checkpoint(path or zoo.fetch(name), statement=statement)
    if checkpoint.spec.arch != published.arch:
        raise InputError(f"{checkpoint.source} holds a {checkpoint.spec.arch}, not the {published.arch} of its name")
    # Its authors say the rest: RGB, and the stride of torchvision.
    spec = replace(checkpoint.spec, **published.evaluated)
    return replace(checkpoint, spec=spec, said=dict.fromkeys(READING, BY_FILE))


def _read(
    content: dict[str, Any], path: Path, source: str, key: str | None, prefix: str | None, statement: Statement
) -> Checkpoint:
    """The network in a file's content, the layout of the file, and what is said about preprocessing."""
    if content.get("format") == TRAINING_FORMAT:
        raise InputError("a run resumes from it: give the checkpoint.pt or best.pt of the same run")
    own = spec_from(content.get("spec")) if content.get("format") == FORMAT else None
    metadata, description = metadata_in(content), Description(content, path)
    if metadata and only_in_timm(metadata.spec.arch) and not description.by_timm:
        network = network_of(content, metadata.spec)
    else:
        ours = own or (metadata.spec if metadata else None)
        certain = ours if ours and only_in_timm(ours.arch) else None
        network = _find(content, key, prefix, certain, description.named(), statement)
    normalizer = normalizer_of(network, content)
    named = {
        OWN: own,
        NORMALIZER: normalizer,
        SEGMENTER: network.segments,
        TIMM: (description.by_timm or network.library == "timm") and not metadata,
        BARE: not network.key and _is_bare(network) and (metadata or path.suffix != ".safetensors"),
        f"{NAMES}{network.library}": network.library,
        f"file {path.name}": True,
    }
    layout = layout_of(content, network, source=source, signs=[sign for sign, found in named.items() if found])
    if source != "training":
        _refuse_dilated(network, layout, path.name, described=bool(own or metadata))
    if not SOURCES[layout].has_classifier:
        names = {name: short for name, short in network.names.items() if not short.startswith("fc.")}
        network = replace(network, names=names)
    if layout == "torchvision_detector" and COCO_V1.fullmatch(path.name):
        network = without_epsilon(network)
    _check_values(network)
    spec = network.spec  # raises
    if statement.arch and statement.arch != spec.arch:
        raise InputError(f"its tensors are those of {spec.arch}, not of {statement.arch}: leave out --arch")

    classes: tuple[str, ...] = ()
    if own:
        if _shape(own) != _shape(spec):
            raise InputError(
                f"its tensors are not those of {own.arch} with {own.num_classes} classes and the {own.stem} stem"
            )
        classes = tuple(map(str, content.get("classes", ())))
        if len(classes) not in (0, own.num_classes):
            raise InputError(f"it names {len(classes)} classes and has {own.num_classes}: it is damaged")
        spec, in_file = own, _said_by(own, content.get("threat_model"))
    elif metadata:
        spec, in_file = replace(metadata.spec, **_shape(spec)), _said_by(metadata.spec, metadata.threat_model)
    else:
        if layout != "msra" and not statement.arch:  # which keeps all blobs side by side
            check_left_out(network)
        description.check(spec.arch, spec.stem)
        description.check_heads(spec.arch, layout, stated=bool(statement.arch))
        if network.library == "transformers":
            spec = replace(spec, norm_epsilon=description.norm_epsilon(spec.arch))
        elif not only_in_timm(spec.arch):
            spec = description.evaluated(spec)
        in_file = description.values(spec.arch) | (normalizer or {})
    if not (spec.resnet_shape and spec.resnet_shape.has_bottlenecks):
        in_file["stride_in_1x1"] = False  # without a 1x1 convolution that could stride, whatever an option says
    if not ("mean" in in_file or (statement.mean and statement.std)):
        check_normalizers(network)
        if not (own or metadata):
            description.options.check_assumed()
    of_options = [name for name, value in description.options.values().items() if value == in_file.get(name)]
    values, said = agreed(in_file, _convention(network, layout), statement, spec, of_options)
    if metadata:  # an assumption stays one
        said |= {name: ASSUMED for name, who in metadata.said.items() if who == ASSUMED}
    threat_model = values.pop("threat_model", None)
    return Checkpoint(
        spec=replace(spec, **values),
        state_dict=network.state_dict,
        threat_model=threat_model,
        layout=layout,
        source=path.name,
        source_sha256=sha256(path),
        said=said,
        key=network.key,
        prefix=network.prefix,
        left_out=tuple(name for name in network.tensors if name not in network.names),
        classes=classes,
        path=path,
    )


def _find(
    content: dict[str, Any],
    key: str | None,
    prefix: str | None,
    certain: BackboneSpec | None,
    described: BackboneSpec | None,
    statement: Statement,
) -> Network:
    """The network recognised from the tensors or the file; otherwise timm's network that the user names."""
    stated = statement.arch if statement.arch and only_in_timm(statement.arch) else ""
    find = partial(find_network, content, key=key, prefix=prefix)
    # What timm calls a ResNet may have the tensors of one of ours and other features, which a description that is of
    # another file would not show: it is one only where no tensor is ours. Other networks may have timm's former names.
    is_resnet = described and re.search("res(net|next)", described.arch)
    tries = (certain,) if certain else (None, described) if is_resnet else (described, None)
    for one in dict.fromkeys(tries):
        with suppress(InputError):
            network = find(named=one)
            if network.spec.arch == stated or not stated:
                return network
    if not stated:
        return find(named=certain or described)  # whose reason is said in its place
    network = find(named=usual_spec(stated))
    return replace(network, library=network.library or "timm")


def _is_bare(network: Network) -> bool:
    """Whether its tensors have torchvision's names without a prefix."""
    as_named = all(name == short for name, short in network.names.items())
    return network.library == "torchvision" or (not network.library and as_named)


def _refuse_dilated(network: Network, layout: str, file: str, *, described: bool) -> None:
    above = network.prefix.removesuffix("backbone.")
    has_both = all(
        any(without_wrappers(name).startswith(part) for name in network.tensors)
        for part in (f"{above}backbone.res5.", f"{above}roi_heads.box_head.")
    )
    of_dc5 = not described and (has_both or bool(_DC5.search(file)))
    if layout == DILATED or of_dc5:
        what = "detector with DC5" if of_dc5 else "segmenter, as DeepLab"
        raise InputError(
            f"by its names it is a {what}, whose last stages dilate in place of striding, which gives other features "
            "than Detectron2's ResNet: give the backbone that it was made from (or --source training, if it strides)"
        )


def _check_values(network: Network) -> None:
    """Refuse, by name, weights that cannot belong to a network: integers, and variances below zero."""
    for name, tensor in network.state_dict.items():
        if name.endswith("num_batches_tracked"):
            continue
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise InputError(f"{name} holds {kind}, not floats: save the weights before they are quantised")
        if name.endswith("running_var") and tensor.numel() and (lowest := tensor.min().item()) < 0:
            raise InputError(f"{name} holds a variance of {lowest:g}, below 0: it is damaged, get the file again")


def _shape(spec: BackboneSpec) -> dict[str, Any]:
    """The part of a spec that the tensors show."""
    return {name: getattr(spec, name) for name in ("arch", "num_classes", "stem")}


def _said_by(spec: BackboneSpec, threat_model: Any) -> dict[str, Any]:
    """What a file of ours says, keyed by the fields of ``Statement``."""
    fields = {name: getattr(spec, name) for name in READING}
    if not isinstance(threat_model, str | None):
        raise InputError(f"its threat model is {threat_model!r}: a text such as L2:3 belongs there")
    return fields if threat_model is None else {**fields, "threat_model": ThreatModel.parse(threat_model)}


def _convention(network: Network, layout: str) -> dict[str, Any]:
    """The preprocessing of the network's authors, where the file does not say it."""
    convention = SOURCES[layout].convention or {}
    if network.named and (not network.library or layout == "convstem"):
        convention = {"mean": network.named.mean, "std": network.named.std} | convention
    if layout == "msra" and network.spec.arch.startswith("resnext"):
        convention = convention | CAFFE2_RESNEXT
    return convention
