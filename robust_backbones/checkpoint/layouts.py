"""Finds the networks in a checkpoint in any wrapper, and recognises its layout, by a table."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from robust_backbones.checkpoint.families import FAMILIES, joined, renamed, spec_of
from robust_backbones.checkpoint.identify import OF_TIMM, identify
from robust_backbones.checkpoint.names import NAMINGS, of_caffe2, of_efficientnet, translated, without_wrappers
from robust_backbones.checkpoint.untrusted import SAVE_STATE_DICT, Inert
from robust_backbones.errors import InputError
from robust_backbones.models import IMAGENET_MEAN, IMAGENET_STD, BackboneSpec, reference_shapes, usual_spec

_BATCH_NORM_EPSILON = 1e-5
_RGB = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "channel_order": "RGB", "stride_in_1x1": False}
_CAFFE2 = {
    "mean": (103.53 / 255, 116.28 / 255, 123.675 / 255),
    "std": (1 / 255,) * 3,
    "channel_order": "BGR",
    "stride_in_1x1": True,
}


# Lines of what SOURCES' signs are searched in, beside the keys and names of the file.
OWN, NORMALIZER = "our own format", "normalises by itself"
NAMES = "names of "
SEGMENTER = "classifies by convolutions alone, of 3x3"
TIMM, BARE = "described by timm", "names of torchvision and nothing else"

DILATED = "dilated"
"""One of ``SOURCES``: networks with dilated instead of strided last stages, as DeepLab; no tensor shows it."""


@dataclass(frozen=True)
class Source:
    """One layout of checkpoints: how it is recognised, and its authors' preprocessing."""

    description: str
    sign: str = ""
    """A pattern, searched in the file's keys and in KEY/NAME of the tensors beside the network, one per line."""
    convention: dict[str, Any] | None = None
    """The convention of its authors, if the file and the user say nothing; None: the user has to say it."""
    has_classifier: bool = True
    """False: the layer called ``fc`` is a projection."""


_ORDER = {"channel_order": "RGB"}

# The first whose sign is found. A network's own code must read RGB, stride and normalise in one way to be given a
# convention; frameworks that train any network have none.
SOURCES = {
    "robust_backbones": Source("a checkpoint of robust-backbones pretrain", f"^{OWN}$"),
    "msra": Source("a Caffe2 model of Detectron's zoo", r"/res2_0_branch2a_w$", _CAFFE2),
    "detectron2": Source("a Detectron2 model", rf"[/.]stem\.conv1\.weight$|^{NAMES}detectron2$"),
    "transformers": Source(
        "a network of transformers",
        rf"[/.]embedder\.embedder\.convolution\.weight$|^{NAMES}transformers$",
        _ORDER,
    ),
    "convstem": Source(
        "a network with a ConvStem, as RobustBench's Singh2023Revisiting",
        r"[/.](stem|patch_embed\.proj)\.stem\.0\.weight$",
        _ORDER,
    ),
    # Before what wraps any network, as Lightning.
    DILATED: Source(
        "a segmenter with dilated convolutions",
        r"/(\S*\.)?(classifier|decoder)\.[\d.]*convs\.|/\S*(?i:aspp|atrous)|/(\S*\.)?aux_classifier\."
        r"|/(\S*\.)?decoder\.fpa\."  # PAN
        rf"|^{SEGMENTER}$",
    ),
    # ares/model/imagenet_model_zoo.py: of all that they trained adversarially, also of ViTs.
    "ares": Source("a file of ARES", r"^file ARES_(ConvNext|Swin|ViT)_\w+_AT\.pth$", _RGB),
    "convnext": Source("a ConvNeXt of its authors", f"^{NAMES}the authors of ConvNeXt$", _RGB),
    "robustness": Source(
        "a checkpoint of MadryLab's robustness library", r"/(module\.)?(attacker\.|normalizer\.new_mean$)", _RGB
    ),
    "moco": Source("a MoCo checkpoint", r"[/.]encoder_q\.", _RGB, has_classifier=False),
    "lightning": Source("a Lightning checkpoint", r"^pytorch-lightning_version$"),
    "moco_v3": Source("a MoCo v3 checkpoint", r"[/.]base_encoder\.", _RGB),
    "dino": Source("a DINO checkpoint", r"^(student|teacher)/(module\.)?backbone\.", _RGB),
    "swav": Source("a SwAV checkpoint", r"/(module\.)?prototypes\.", _RGB),
    "vicreg": Source("a VICReg or Barlow Twins checkpoint", r"^model/(module\.)?projector\.\d", _RGB),
    "pixpro": Source("a PixPro checkpoint", r"^model/(module\.)?encoder_k\.", _RGB),
    "simsiam": Source("a SimSiam checkpoint", r"(?s)^state_dict/module\.encoder\..*/module\.predictor\.", _RGB),
    "vissl": Source("a VISSL checkpoint", r"^classy_state_dict", _RGB),
    "torchvision_detector": Source(
        "a detector of torchvision (norms of epsilon 1e-5, of 0 where its name is that of COCO_V1 weights)",
        r"/(module\.)?backbone\.body\.",
        _RGB,
    ),
    "mmdetection": Source("a checkpoint of MMDetection or MMPretrain", r"(?s)^meta$.*/(module\.)?backbone\."),
    "ema": Source("the averaged weights of a training checkpoint", r"^(\w+_ema|ema\w*)[/.]"),
    "deepspeed": Source("a DeepSpeed checkpoint", r"^ds_(version|config)$"),
    "composer": Source("a Composer checkpoint", r"^state\.model/"),
    "robustbench": Source("a network behind its normalisation, as RobustBench's", f"^{NORMALIZER}$", _RGB),
    "timm": Source("timm's state dict", f"^{TIMM}$", _ORDER | {"stride_in_1x1": False}),
    "efficientnet_pytorch": Source("an EfficientNet-Lite of EfficientNet-PyTorch", r"[/.]_conv_stem\.weight$", _ORDER),
    "torchvision": Source("torchvision's state dict", f"^{BARE}$", _RGB),
    "training": Source("a training checkpoint"),
}
# A Caffe2 ResNeXt of Detectron's zoo is fed and strides otherwise than its ResNets.
CAFFE2_RESNEXT = {"std": (57.375 / 255, 57.12 / 255, 58.395 / 255), "stride_in_1x1": False}

COCO_V1 = re.compile(
    r"(fasterrcnn_resnet50_fpn_coco-258fb6c6|maskrcnn_resnet50_fpn_coco-bf2d0c1e|keypointrcnn_resnet50_fpn_coco-fc266e95"
    r"|retinanet_resnet50_fpn_coco-eeacb38b)\.pth"
)
"""Files of torchvision's detectors whose frozen batch norms have epsilon 0 (``overwrite_eps`` in its source)."""

_LITE = tuple(f"tf_efficientnet_lite{number}" for number in range(5))

_ANY = ("robustbench", "timm", "torchvision", "training")
"""Any file may have one of these layouts."""

# A network's second copy, which its makers leave where it is: an attacker's, or an average that only trains the first.
_SECOND = r"(^|\.)(attacker|encoder_k|momentum_encoder|momentum_backbone|backbone_momentum|target_encoder)\."
# Other networks than ResNets, by the first of their tensors.
_OTHERS = ("features.conv0.weight", "layers.0.weight", "features.0.0.weight", "conv1.0.weight", "features.0.weight")


@dataclass(frozen=True, eq=False)
class Network:
    """A network in a file."""

    key: str
    """Key of the dictionary with it, such as ``state.model``; "" is the file itself."""
    prefix: str
    """The prefix of its names, without the wrappers of torch.compile and the like."""
    names: dict[str, str]
    """The file's name of each of its tensors -> torchvision's."""
    tensors: dict[str, Tensor]
    """All tensors of the dictionary, by the file's names."""
    named: BackboneSpec | None = None
    """The timm network that the file says it is; ``names`` then has timm's names."""
    library: str = ""
    """The library by whose names it was found, as in ``families.FAMILIES``; ``named`` is then by shapes or metadata."""

    @cached_property
    def state_dict(self) -> dict[str, Tensor]:
        """The file's tensors, by torchvision's names."""
        state_dict = {short: self.tensors[name] for name, short in self.names.items()}
        if any(name.startswith("res2_0_branch") for name in self.names):
            _add_statistics(state_dict, self.tensors.get("conv1_b"))
        return joined(state_dict) if self.library else state_dict

    @cached_property
    def spec(self) -> BackboneSpec:
        """The spec shown by its tensors; InputError if they do not belong to a known architecture."""
        return identify(self.state_dict, self.named)

    @property
    def segments(self) -> bool:
        """Whether its classifier has only convolutions, one of them larger than a pixel, or a head is torchvision's of
        a DeepLab or an FCN, by any name."""
        beside = {name: tuple(t.shape) for name, t in self.tensors.items() if name not in self.names}
        for name, shape in beside.items():
            if "convs.0.0.weight" in name and name.replace("convs.0.0.", "project.0.") in beside:
                return True
            # An FCN's goes by 3x3 to a quarter of the channels, and by 1x1 from these to the classes.
            last = beside.get(re.sub(r"(?<![^.])0\.weight$", "4.weight", name), ())
            if any([shape[1:], last[1:]] == [(4 * channels, 3, 3), (channels, 1, 1)] for channels in shape[:1]):
                return True
        classifier = [shape for name, shape in beside.items() if re.search(r"(^|\.)classifier\.\d+\.weight$", name)]
        has_linear = any(len(shape) == 2 for shape in classifier)  # one answer for an image
        return not has_linear and any(len(shape) == 4 and shape[-1] > 1 for shape in classifier)

    def shared_levels(self, levels: list[str]) -> int:
        """How many leading parts of a name are also in the network's prefix."""
        pairs = zip(levels, self.prefix.split("."), strict=False)
        return len([*takewhile(lambda pair: pair[0] == pair[1], pairs)])

    def differs_in(self, other: Network) -> str:
        """The first tensor in which the two differ, by torchvision's name; "" if they are equal."""
        mine, theirs = self.state_dict, other.state_dict
        for name in mine | theirs:
            if name not in mine or name not in theirs or mine[name].shape != theirs[name].shape:
                return name
            if not torch.allclose(mine[name], theirs[name].to(mine[name].dtype), rtol=0, atol=0, equal_nan=True):
                return name
        return ""

    def __str__(self) -> str:
        try:
            arch = self.spec.arch
        except InputError:
            arch = "no architecture that is known"
        size = sum(tensor.numel() * tensor.element_size() for tensor in self.state_dict.values())
        return f"{arch}, {len(self.names)} tensors, {size / 2**20:.1f} MB"


def tensors_of(content: Any) -> dict[str, Tensor]:
    """The tensors and their names; empty if ``content`` is not a dictionary."""
    items = content.items() if isinstance(content, dict) else ()
    return {name: value for name, value in items if isinstance(name, str) and isinstance(value, Tensor)}


def dictionaries_in(
    content: Any, key: str = "", seen: set[int] | None = None
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every dictionary of tensors in a file's content and its key, ``""`` for the content itself; each once."""
    seen = set() if seen is None else seen
    if not isinstance(content, dict) or id(content) in seen or key.count(".") > 5:
        return
    seen.add(id(content))
    if tensors := tensors_of(content):
        yield key, tensors
    for name, value in content.items():
        if isinstance(name, str):
            yield from dictionaries_in(value, f"{key}.{name}" if key else name, seen)


def find_network(
    content: dict[str, Any], *, key: str | None = None, prefix: str | None = None, named: BackboneSpec | None = None
) -> Network:
    """The only network in a file's content, or the one that ``key`` and ``prefix`` choose.

    ``named`` is the timm network that the file says it is.

    Raises:
        InputError: there is none; or there are several that differ, which the message lists.
    """
    networks = [network for name, tensors in dictionaries_in(content) for network in _networks_of(name, tensors, named)]
    if not networks:
        raise InputError(_nothing_known(content))
    if prefix is not None:
        prefix = without_wrappers(prefix and prefix.rstrip(".") + ".")
    chosen = [n for n in networks if key in (None, n.key) and prefix in (None, n.prefix)]
    if not chosen:
        options = " ".join(
            f"--{name} {value!r}" for name, value in (("key", key), ("prefix", prefix)) if value is not None
        )
        raise InputError(f"it holds no network at {options}, but {_listed(networks)}")
    if prefix is None:
        copies = [network for network in chosen if re.search(_SECOND, network.prefix)]
        chosen = [network for network in chosen if network not in copies] or chosen
        for copy in copies:  # the robustness library saves the network twice; two that differ are no backbone at all
            if "attacker." in copy.prefix and len(chosen) == 1 and (name := copy.differs_in(chosen[0])):
                raise InputError(f"its two copies of the network differ ({name}): it is damaged")
    first, *others = chosen
    if any(other.differs_in(first) for other in others):
        raise InputError(f"it holds {len(chosen)} networks that differ, {_listed(chosen)}: give one of these options")
    return first


def _listed(networks: list[Network]) -> str:
    """How to choose each of them, and a description of it."""
    keys, options = [network.key for network in networks], []
    for network in networks:
        by_prefix = keys.count(network.key) > 1
        choice = [f"--key {network.key or repr('')}"] if not by_prefix or len({*keys}) > 1 else []
        choice += [f"--prefix {network.prefix or repr('')}"] if by_prefix else []
        options.append(f"{' '.join(choice)} ({network})")
    return " and ".join([", ".join(options[:-1]), options[-1]]) if len(options) > 1 else options[0]


def _nothing_known(content: dict[str, Any]) -> str:
    inert = _inert_in(content)
    for _, tensors in dictionaries_in(content):
        names = ", ".join(list(tensors)[:3])
        return (
            f"its tensors ({names} ...) are those of none of the known architectures by the names of torchvision, "
            f"Detectron2, transformers or nn.Sequential{_in_parts(tensors)}{_of_clip(tensors)}"
            + OF_TIMM
            + (f"; {inert[0]} cannot be read: save plain floats" if inert else "")
        )
    if inert:
        return f"it holds whole objects ({', '.join(inert[:3])}), which are not unpickled: {SAVE_STATE_DICT}"
    keys = ", ".join(str(key) for key in list(content)[:3])
    return f"its layout is not known (keys: {keys} ...): it holds no tensors"


def _inert_in(content: dict[Any, Any]) -> list[str]:
    """Keys of objects of unknown classes, at the top or among tensors."""
    inner = [value for value in content.values() if isinstance(value, dict)]
    return [str(key) for part in (content, *inner) for key, value in part.items() if isinstance(value, Inert)]


def _of_clip(names: Collection[str]) -> str:
    """Why the tower of a CLIP is not read: no tensor distinguishes GELU from OpenAI's QuickGELU."""
    if not any(name.endswith("visual.positional_embedding") for name in names):
        return ""
    return (
        "; no tensor of a CLIP tells its activation: load it in timm as vit_base_patch16_clip_224, or "
        "vit_base_patch16_clip_quickgelu_224 where it is OpenAI's, and save that with its pretrained_cfg"
    )


_IN_PARTS = {
    r"\.weight_u$": "torch.nn.utils.remove_spectral_norm",
    r"\.weight_(orig|mask)$": "torch.nn.utils.prune.remove",
    r"\.weight_[gv]$": "torch.nn.utils.remove_weight_norm",
    r"\.parametrizations\.": "torch.nn.utils.parametrize.remove_parametrizations",
    r"lora_[AB]": "its library's merge, such as peft's merge_and_unload",
    r"flat_param$": "FSDP's StateDictType.FULL_STATE_DICT",
}
"""Names of weights stored in parts -> how to merge them."""


def _in_parts(names: Collection[str]) -> str:
    """The fix if weights are stored in parts, or nothing."""
    for part, whole in _IN_PARTS.items():
        if name := next(filter(re.compile(part).search, names), ""):
            return f"; {name} is a part of a weight: make it whole by {whole}, and save the state_dict() again"
    return ""


def _networks_of(key: str, tensors: dict[str, Tensor], named: BackboneSpec | None) -> list[Network]:
    """The networks in one dictionary."""
    plain = {name: without_wrappers(name) for name in tensors}
    if named is not None:
        first, *_ = reference_shapes(named.arch, named.stem, named.image_size)[0]
        return _networks_from((first,), key, plain, tensors, named)
    blobs = {name: short for name in tensors if (short := of_caffe2(name))}
    if any(name.startswith("res2_0_branch") for name in blobs):
        return [Network(key, "", blobs, tensors)]
    _check_once(plain, tensors)
    found = []
    for naming, row in NAMINGS.items():
        for prefix in (name.removesuffix(row.anchor) for name in plain.values() if name.endswith(row.anchor)):
            if prefix == "" or prefix.endswith("."):
                found.append(Network(key, prefix, _names_of_resnet(plain, prefix, naming), tensors))
    found = found or _efficientnets(key, plain, tensors) or _of_families(key, plain, tensors)
    return found or _networks_from(_OTHERS, key, plain, tensors)


def _efficientnets(key: str, plain: dict[str, str], tensors: dict[str, Tensor]) -> list[Network]:
    """EfficientNet-Lite 0 to 4 under EfficientNet-PyTorch's names, recognised by their blocks and widths."""
    found = []
    for network in _networks_from(("_conv_stem.weight",), key, plain, tensors):
        candidates = []
        for arch in _LITE:
            reference = reference_shapes(arch, "imagenet")[0]
            short = of_efficientnet(network.names.values(), reference)
            names = {name: short[own] for name, own in network.names.items()}
            equal = sum(tuple(tensors[name].shape) == reference.get(own) for name, own in names.items())
            candidates.append((equal, replace(network, names=names, named=usual_spec(arch))))
        found.append(max(candidates, key=lambda pair: pair[0])[1])
    return found


def _of_families(key: str, plain: dict[str, str], tensors: dict[str, Tensor]) -> list[Network]:
    """ConvNeXt, Swin and ViT under the names of their libraries."""
    found: list[Network] = []
    problems = []
    for row in FAMILIES:
        begins = [name.removesuffix(row.anchor) for name in plain.values() if f".{name}".endswith(f".{row.anchor}")]
        for prefix in (begin.removesuffix(row.inside) for begin in begins):
            if any(prefix.startswith(other.prefix) for other in found):
                continue
            own = {name: full.removeprefix(prefix) for name, full in plain.items() if full.startswith(prefix)}
            short = renamed(own.values(), row)
            names = {name: short[one] for name, one in own.items() if one in short}
            try:
                spec = spec_of(row, {one: tensors[name] for name, one in names.items()})
            except InputError as problem:
                problems.append(problem)
            else:
                found.append(Network(key, prefix, names, tensors, spec, row.library))
    if problems and not found:
        raise problems[0]
    return found


def _networks_from(
    firsts: tuple[str, ...],
    key: str,
    plain: dict[str, str],
    tensors: dict[str, Tensor],
    named: BackboneSpec | None = None,
) -> list[Network]:
    """The networks that start with one of these tensors, and are not part of another one."""
    prefixes = {
        name.removesuffix(first) for first in firsts for name in plain.values() if f".{name}".endswith(f".{first}")
    }
    found = []
    for prefix in sorted(p for p in prefixes if not any(p != q and p.startswith(q) for q in prefixes)):
        names = {name: short.removeprefix(prefix) for name, short in plain.items() if short.startswith(prefix)}
        found.append(Network(key, prefix, names, tensors, named))
    return found


def _names_of_resnet(plain: dict[str, str], prefix: str, naming: str) -> dict[str, str]:
    """torchvision's names of the tensors after ``prefix``, without heads and projections."""
    names = {}
    for name, full in plain.items():
        # A C4 detector of Detectron2 keeps res5 in its heads.
        in_heads = naming == "detectron2" and full.startswith("roi_heads.res5.")
        short = full.removeprefix("roi_heads." if in_heads else prefix)
        if (in_heads or full.startswith(prefix)) and re.match(NAMINGS[naming].parts, short):
            try:
                names[name] = translated(short, naming, "torchvision")
            except KeyError:  # no ResNet has it; what the network then is not, its shapes tell
                names[name] = short
    names |= _between(plain, prefix, names)
    head = {name: full.removeprefix(prefix) for name, full in plain.items() if full.startswith(f"{prefix}fc.")}
    return names | head if set(head.values()) == {"fc.weight", "fc.bias"} else names


def _between(plain: dict[str, str], prefix: str, names: dict[str, str]) -> dict[str, str]:
    """Other modules between a network's layers, such as attention or a trained activation: they are not heads.

    A state dict has the order in which its modules were created; a sorted one does not start with a stem.
    """
    if next(iter(names.values()), "") != "conv1.weight":
        return {}
    places = [place for place, name in enumerate(plain) if name in names]
    inside = [(name, full) for name, full in [*plain.items()][places[0] : places[-1]] if name not in names]
    own = re.compile(re.escape(prefix) + r"(?!fc\.)")
    return {name: full.removeprefix(prefix) for name, full in inside if own.match(full)}


def _check_once(plain: dict[str, str], tensors: dict[str, Tensor]) -> None:
    """Refuse two tensors whose names differ only in wrappers."""
    first: dict[str, str] = {}
    for name, short in plain.items():
        if first.setdefault(short, name) != name and not torch.equal(tensors[first[short]], tensors[name]):
            raise InputError(
                f"it holds {short} twice, as {first[short]} and as {name}: save one network's state_dict()"
            )


def _add_statistics(state_dict: dict[str, Tensor], stem_bias: Tensor | None) -> None:
    """Most of Caffe2's batch norms are a scale and a shift: give them neutral statistics."""
    for name in [name for name in state_dict if name.endswith(".bias")]:
        norm = name.removesuffix("bias")
        state_dict.setdefault(f"{norm}running_mean", torch.zeros_like(state_dict[name]))
        state_dict.setdefault(f"{norm}running_var", torch.ones_like(state_dict[name]) - _BATCH_NORM_EPSILON)
    if stem_bias is not None:  # (w x + c) - mean
        state_dict["bn1.running_mean"] = state_dict["bn1.running_mean"] - stem_bias


def without_epsilon(network: Network) -> Network:
    """The network with weights that undo the epsilon of its batch norms, which its authors do not use."""
    tensors, own = dict(network.tensors), {short: name for name, short in network.names.items()}
    for short in (short for short in own if short.endswith("running_var")):
        weight, variance = own[short.replace("running_var", "weight")], tensors[own[short]].double()
        tensors[weight] = (tensors[weight] * (1 + _BATCH_NORM_EPSILON / variance).sqrt()).to(tensors[weight].dtype)
    return replace(network, tensors=tensors)


def layout_of(content: dict[str, Any], network: Network, *, source: str = "", signs: Iterable[str] = ()) -> str:
    """The layout of the file: one of ``SOURCES``; ``source`` if it is given and fits. ``signs`` are further lines.

    Raises:
        InputError: it is not from that source.
    """
    keys = [key for key in content if isinstance(key, str)]
    names = [f"{network.key}/{without_wrappers(name)}" for name in network.tensors]
    lines = "\n".join([*keys, *names, *signs])
    if source and not (source in _ANY or re.search(SOURCES[source].sign, lines, re.MULTILINE)):
        raise InputError(f"it is not {SOURCES[source].description}: leave out --source {source}")
    return source or next(name for name, row in SOURCES.items() if re.search(row.sign, lines, re.MULTILINE))
