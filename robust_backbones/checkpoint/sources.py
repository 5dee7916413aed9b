"""Reads backbone checkpoints of every known layout, under torchvision's names; notes who says how they are fed."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from robust_backbones.checkpoint import hub, zoo
from robust_backbones.checkpoint.beside import check_left_out, check_normalizers, is_triple, normalizer_of
from robust_backbones.checkpoint.convert import metadata_in
from robust_backbones.checkpoint.format import (
    ASSUMED,
    BY_FILE,
    BY_USER,
    FORMAT,
    READING,
    TRAINING_FORMAT,
    Checkpoint,
    sha256,
)
from robust_backbones.checkpoint.layouts import (
    BARE,
    CAFFE2_RESNEXT,
    DILATED,
    NAMES,
    NORMALIZER,
    OWN,
    SOURCES,
    TIMM,
    Network,
    find_network,
    layout_of,
)
from robust_backbones.checkpoint.readback import network_of
from robust_backbones.checkpoint.untrusted import METADATA, Options, load_tensors
from robust_backbones.checkpoint.urls import as_url, fetch_url
from robust_backbones.errors import InputError, check_choice
from robust_backbones.models import BackboneSpec, check_normalization, is_foreign, is_number, spec_from, usual_spec
from robust_backbones.threat_models import ThreatModel
from robust_backbones.timm_models import norm_and_heads

HUB = "hub:"


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
    arch: str | None = None
    """timm's name of the network, where its tensors have timm's names and none of the file's shapes tell it."""


def read_checkpoint(
    path: str | Path,
    *,
    source: str = "",
    key: str | None = None,
    prefix: str | None = None,
    statement: Statement | None = None,
    require_said: bool = False,
) -> Checkpoint:
    """Read a backbone of any layout of ``SOURCES``, without running any code that its file may hold.

    Args:
        path: a file, ``hub:NAME`` of a published backbone (``zoo``), ``hub:USER/NAME`` of a repository of the
            Hugging Face hub, or a URL as Detectron2's ``MODEL.WEIGHTS`` names
            one; what is downloaded is kept.
        source: its layout, one of ``SOURCES``, where the file's keys do not tell it.
        key: which of several networks: that in this dictionary of the file, as in ``teacher`` or ``state.model``.
        prefix: which of several networks: that whose names begin so, as in ``module.encoder_q.``.
        statement: what the file does not say about itself.
        require_said: refuse values that neither the file nor ``statement`` says.

    Raises:
        InputError: the file is missing, is no checkpoint, or its layout, architecture or normalisation is not known;
            it holds several networks, and none is chosen.
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
            _check_said(checkpoint)
    except InputError as error:  # in one line, whatever a damaged file gives to show
        raise InputError(f"cannot use {path}: {' '.join(str(error).split())[:2000]}") from None
    except (LookupError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise InputError(f"cannot use {path}: it is damaged ({error!r})") from None
    return checkpoint


def read_published(name: str, path: Path | None = None) -> Checkpoint:
    """The published backbone ``name``: in the file ``path``, or downloaded at the first use.

    Raises:
        InputError: there is none of this name; it cannot be downloaded; the file is not what the name says.
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
    if content.get("format") == TRAINING_FORMAT:
        raise InputError("a run resumes from it: give the checkpoint.pt or best.pt of the same run")
    own = spec_from(content.get("spec")) if content.get("format") == FORMAT else None
    metadata, described = metadata_in(content), _Description(content, path)
    named = own if own and is_foreign(own.arch) else described.named()
    stated = statement.arch if statement.arch and is_foreign(statement.arch) else ""
    if metadata and is_foreign(metadata.spec.arch) and not described.by_timm:
        network = network_of(content, metadata.spec)
    else:
        network = _find(content, key, prefix, named, stated)
    normalizer = normalizer_of(network, content)
    as_named = all(name == short for name, short in network.names.items())
    signs = {
        OWN: own,
        NORMALIZER: normalizer,
        TIMM: (described.by_timm or network.library == "timm") and not metadata,
        BARE: not network.key and (network.library == "torchvision" or (not network.library and as_named)),
        f"{NAMES}{network.library}": network.library,
        f"file {path.name}": True,
    }
    if path.suffix == ".safetensors" and not metadata:  # whose they are, nobody says
        signs[BARE] = False
    layout = layout_of(content, network, source=source, signs=[sign for sign, found in signs.items() if found])
    parts = {".".join(name.split(".")[:2]) for name in network.tensors}
    of_dc5 = layout == "detectron2" and not metadata and {"backbone.res5", "roi_heads.box_head"} <= parts
    if layout == DILATED or of_dc5:
        raise InputError(
            f"it is a {'detector with DC5' if of_dc5 else 'segmenter, as DeepLab'}, whose last stages dilate in place "
            "of striding, which gives other features than Detectron2's ResNet: give the backbone that it was made from "
            "(or --source training, if it strides)"
        )
    if not SOURCES[layout].has_classifier:
        names = {name: short for name, short in network.names.items() if not short.startswith("fc.")}
        network = replace(network, names=names)
    _check_values(network)
    if statement.arch and statement.arch != network.spec.arch:
        raise InputError(f"its tensors are those of {network.spec.arch}, not of {statement.arch}: leave out --arch")

    tensors_say, convention = network.spec, SOURCES[layout].convention or {}
    classes: tuple[str, ...] = ()
    if own:
        if any(getattr(own, name) != getattr(tensors_say, name) for name in ("arch", "num_classes", "stem")):
            raise InputError(
                f"its tensors are not those of {own.arch} with {own.num_classes} classes and the {own.stem} stem"
            )
        tensors_say, in_file = own, _said_by(own, content.get("threat_model"))
        classes = tuple(map(str, content.get("classes", ())))
        if len(classes) not in (0, own.num_classes):
            raise InputError(f"it names {len(classes)} classes and has {own.num_classes}: it is damaged")
    elif metadata:
        in_file = _said_by(metadata.spec, metadata.threat_model)
        shapes = {name: getattr(tensors_say, name) for name in ("arch", "num_classes", "stem")}
        tensors_say = replace(metadata.spec, **shapes)
    else:
        if layout != "msra" and not statement.arch:  # which keeps all blobs side by side
            check_left_out(network)
        described.check(tensors_say.arch)
        described.check_heads(tensors_say.arch, layout, stated=bool(statement.arch))
        if network.library == "transformers":
            tensors_say = replace(tensors_say, norm_epsilon=described.norm_epsilon(tensors_say.arch))
        elif not is_foreign(tensors_say.arch):
            tensors_say = described.evaluated(tensors_say)
        in_file = described.values() | (normalizer or {})
    if not (tensors_say.resnet_shape and tensors_say.resnet_shape.has_bottlenecks):
        in_file = {"stride_in_1x1": False, **in_file}  # without a 1x1 convolution that could stride
    if network.named and (
        not network.library or layout == "convstem"
    ):  # what its makers feed it with, where the file does not say it
        convention = {"mean": network.named.mean, "std": network.named.std} | convention
    if layout == "msra" and tensors_say.arch.startswith("resnext"):
        convention = convention | CAFFE2_RESNEXT
    if not ("mean" in in_file or (statement.mean and statement.std)):
        check_normalizers(network)
    values, said = _agreed(in_file, convention, statement, tensors_say)
    if metadata:  # an assumption stays one
        said |= {name: ASSUMED for name, who in metadata.said.items() if who == ASSUMED}
    threat_model = values.pop("threat_model", None)
    return Checkpoint(
        spec=replace(tensors_say, **values),
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
    content: dict[str, Any], key: str | None, prefix: str | None, named: BackboneSpec | None, stated: str
) -> Network:
    """The network that the tensors or the file tell; that of timm which the user states where they do not."""
    try:
        network = find_network(content, key=key, prefix=prefix, named=named)
        if not stated or network.spec.arch == stated:
            return network
    except InputError:
        if not stated:
            raise
    network = find_network(content, key=key, prefix=prefix, named=usual_spec(stated))
    return replace(network, library=network.library or "timm")


def _check_values(network: Network) -> None:
    """Refuse, by name, weights that are no numbers of a network's: integers, and variances below zero."""
    for name, tensor in network.state_dict.items():
        if name.endswith("num_batches_tracked"):
            continue
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise InputError(f"{name} holds {kind}, not floats: save the weights before they are quantised")
        if name.endswith("running_var") and tensor.numel() and (lowest := tensor.min().item()) < 0:
            raise InputError(f"{name} holds a variance of {lowest:g}, below 0: it is damaged, get the file again")


class _Description:
    """What timm and transformers say of a network: in the file, in its safetensors header, in JSON files beside it."""

    def __init__(self, content: dict[str, Any], path: Path) -> None:
        header = content.get(METADATA)
        inside = content | (header if isinstance(header, dict) else {})
        beside = json_object(path.with_name("config.json"))
        # A folder may hold the configuration of something else.
        self._config = beside if "architecture" in beside or beside.get("model_type") in _OF_TRANSFORMERS else {}
        cfg: Any = next((inside[key] for key in ("pretrained_cfg", "default_cfg") if key in inside), None)
        cfg = self._config.get("pretrained_cfg") if cfg is None else cfg
        self._cfg: dict[str, Any] = dictionary_of(cfg, "pretrained_cfg") if cfg is not None else {}
        self._processor = json_object(path.with_name("preprocessor_config.json")) if self._config else {}
        entries = [content.get(key) for key in _OPTION_KEYS]
        options = [one.values if isinstance(one, Options) else one for one in entries]
        self._options: list[dict[Any, Any]] = [one for one in options if isinstance(one, dict)]
        meta: Any = content.get("meta")
        texts = [meta.get(key) for key in ("config", "cfg")] if isinstance(meta, dict) else []
        self._of_mmdetection = "\n".join(text for text in texts if isinstance(text, str))
        more = content.get("hyper_parameters")
        self._inside = (more if isinstance(more, dict) else {}) | inside
        self._path = path
        self.by_timm = bool(self._cfg) or "architecture" in self._config

    def values(self) -> dict[str, Any]:
        """What is said of ``READING``."""
        said: dict[str, Any] = {}
        for options in self._options:  # of a training, where anything may stand
            if is_triple(options.get("mean")) and is_triple(options.get("std")):
                said |= {name: tuple(options[name]) for name in ("mean", "std")}
        for where, fields, names in (
            ("pretrained_cfg", self._cfg, ("mean", "std")),
            ("preprocessor_config.json", self._processor, ("image_mean", "image_std")),
        ):
            for name, value in zip(("mean", "std"), (fields.get(name) for name in names), strict=True):
                if value is not None:
                    if not is_triple(value):
                        raise InputError(f"{where} says that its {name} is {value!r}: three numbers belong there")
                    said[name] = tuple(value)
        # transformers multiplies pixels of 0 to 255 by a factor first, and may leave out the rest.
        factor: Any = self._processor.get("rescale_factor")
        scaled = is_number(factor) and factor > 0 and self._processor.get("do_rescale") is not False
        if scaled and not math.isclose(255 * factor, 1, rel_tol=1e-4):
            said |= {name: tuple(v / (255 * factor) for v in said[name]) for name in ("mean", "std") if name in said}
        if self._processor.get("do_normalize") is False:
            said |= {"mean": (0.0,) * 3, "std": (1.0,) * 3}
        if self._processor.get("do_flip_channel_order") is True:
            said["channel_order"] = "BGR"
        if style := re.search(r"""\bstyle\s*[=:]\s*["'](caffe|pytorch)["']""", self._of_mmdetection):
            said["stride_in_1x1"] = style[1] == "caffe"
        if isinstance(stride := self._config.get("downsample_in_bottleneck"), bool):
            said["stride_in_1x1"] = stride
        elif self.by_timm and "architecture" in {**self._cfg, **self._config}:
            said["stride_in_1x1"] = False
        return said

    def named(self) -> BackboneSpec | None:
        """The network of timm that it is said to be; None of a ResNet, which is ours or refused."""
        names = {name.split("/")[-1].split(".")[0] for _, name, exact in self._architectures() if exact}
        names = {name for name in names if not re.search("res(net|next)", name) and is_foreign(name)}
        if len(names) != 1:
            return None
        return self.evaluated(usual_spec(names.pop()))

    def evaluated(self, spec: BackboneSpec) -> BackboneSpec:
        """A network with the sizes and the interpolation of timm's configuration, as far as that has them."""
        size, crop, interpolation = (self._cfg.get(name) for name in ("input_size", "crop_pct", "interpolation"))
        if isinstance(size, list | tuple) and len(size) == 3:
            spec = replace(spec, image_size=size[-1], val_resize=size[-1])
        if isinstance(crop, float) and 0.1 < crop <= 1:
            spec = replace(spec, val_resize=int(spec.image_size / crop))
        return spec if interpolation is None else replace(spec, interpolation=interpolation)

    def check(self, arch: str) -> None:
        """Refuse a network that is said to be another than its tensors' shapes tell.

        Variants by activation, dilation or blur have no tensors of their own, and other features.
        """
        if _GELU_OF_ARES.fullmatch(self._path.name):
            raise InputError(
                f"ARES trained {self._path.stem} with GELU, which no tensor shows: no {arch} of ours can be it"
            )
        asked: dict[str, Any] = _OF_TRANSFORMERS.get(self._config.get("model_type", ""), {})
        usual = (layer for begin, layer in _ACTIVATIONS.items() if re.search(rf"(^|_)({begin})", arch))
        harmless = _HARMLESS | {"act_layer": next(usual, _UNKNOWN)}
        for where, name, exact in self._architectures():
            if _differs(name, arch, exact=exact):
                raise InputError(
                    f"{where} says that it is {name}, which has the tensors of {arch} and other features: it cannot be "
                    f"read as one (if that is wrong, move the file to a folder of its own, or rename it)"
                )
        known = {} if is_foreign(arch) else _OF_RESNETS
        if harmless["act_layer"] is not _UNKNOWN:
            known = known | {"act_layer": (None, harmless["act_layer"])}
        other = [
            (f"an option of its training says that its {name}", options[name])
            for options in self._options
            for name in known.keys() & options.keys()
            if options[name] not in known[name]
        ]
        if dilated := re.search(r"\bdilations\s*=\s*[([]([\d, ]*[2-9][\d, ]*)[)\]]", self._of_mmdetection):
            other.append(("its meta says that its dilations", dilated[1]))
        for what, value in other:
            raise InputError(f"{what} is {value!r}, which gives other features than {arch}'s: it cannot be read as one")
        for where, fields, allowed in (
            ("config.json", self._config.get("model_args"), harmless),
            ("model_args", self._inside.get("model_args"), harmless),
            *(("args.model_kwargs", options.get("model_kwargs"), harmless) for options in self._options),  # timm's
            ("config.json", {k: v for k, v in self._config.items() if k in asked}, asked),
        ):
            for name, value in fields.items() if isinstance(fields, dict) else ():
                if name not in allowed or (allowed[name] is not None and value != allowed[name]):
                    raise InputError(
                        f"{where} says that its {name} is {value!r}, which gives other features than {arch}'s: it "
                        "cannot be read as one"
                    )

    def check_heads(self, arch: str, layout: str, *, stated: bool) -> None:
        """Refuse a ViT-S that may have 12 heads, as MoCo v3's: no tensor shows how many there are."""
        if not arch.startswith("vit_small_") or self.by_timm:
            return
        if layout == "moco_v3":
            raise InputError(f"MoCo v3's ViT-S has 12 heads, and timm's {arch} has 6: it cannot be read as one")
        if self._inside.get("arch") in ("vit_small", "vit_conv_small") and not stated:
            raise InputError(
                f"its entry arch says {self._inside['arch']}, which has 12 heads in MoCo v3 and 6 elsewhere, and no "
                f"tensor shows it: give --arch {arch} if it has 6; one with 12 cannot be read"
            )

    def norm_epsilon(self, arch: str) -> float:
        """That of transformers' layer norms, which no tensor shows; 0 where it is timm's too."""
        kind = self._config.get("model_type")
        if kind not in _NORM_EPSILON:
            raise InputError(
                f"no tensor of transformers' {arch} shows the epsilon of its norms: put its config.json beside it"
            )
        heads, epsilon = (
            self._config.get("num_attention_heads"),
            self._config.get("layer_norm_eps", _NORM_EPSILON[kind]),
        )
        facts = norm_and_heads(arch)
        if kind == "vit" and heads not in (None, facts.heads):
            raise InputError(
                f"config.json says that it has {heads} heads, timm's {arch} has {facts.heads}: it cannot be it"
            )
        if not (isinstance(epsilon, float) and 0 < epsilon < 1e-2):
            raise InputError(
                f"config.json says that its layer_norm_eps is {epsilon!r}: a number such as 1e-12 belongs there"
            )
        return 0.0 if epsilon == facts.norm_epsilon else epsilon

    def _architectures(self) -> Iterator[tuple[str, str, bool]]:
        """Who says it, the name, and whether nothing else than timm's names can stand there."""
        said = [
            ("config.json beside it", self._config.get("architecture"), True),
            ("its pretrained_cfg", self._cfg.get("architecture"), True),
            *((f"its entry {key}", self._inside.get(key), key == "architecture") for key in _NAME_KEYS),
            *(
                (where, name, False)
                for where, text in (
                    ("its path", str(self._path.absolute())),
                    *(
                        ("an option of its training", str(options.get(key)))
                        for options in self._options
                        for key in _NAME_KEYS
                    ),
                )
                for name in re.findall(r"res(?:net|next)(?:aa|blur)\d+", text)
            ),
        ]
        return (one for one in said if isinstance(one[1], str))


_OPTION_KEYS = (
    *("args", "opt", "options", "config", "cfg", "model_config", "hparams", "hyper_parameters"),
    *("normalize", "transform"),
)
"""Of a file's entries: how the training was run, as a dictionary or an ``argparse.Namespace``."""
_NAME_KEYS = ("architecture", "arch", "model_name", "model", "backbone", "encoder")
# Arguments of timm's networks, and settings of transformers', with the value that leaves the features as they are;
# None: any.
_HARMLESS = {
    **dict.fromkeys(("num_classes", "global_pool", "drop_rate", "drop_path_rate", "drop_block_rate", "pretrained")),
    **{"in_chans": 3, "output_stride": 32, "zero_init_last": None, "img_size": None},
}
# What timm, torchvision and others call that which no tensor of a ResNet shows -> values that change nothing.
_OF_RESNETS: dict[str, tuple[Any, ...]] = {
    "bn_eps": (None, 1e-5),
    "bn_tf": (None, False),
    "output_stride": (None, 32),
    "act_layer": (None, "relu", "ReLU"),
    "aa_layer": (None, ""),
    "dilated": (None, False),
    "replace_stride_with_dilation": (None, [False] * 3, (False,) * 3),
}
# What names begin with, but for a maker's -> their activation.
_ACTIVATIONS = {"res|wide_res": "relu", "convnext|swin|vit|deit": "gelu"}
_UNKNOWN = object()
# Of act_gelu in ares/model/imagenet_model_zoo.py.
_GELU_OF_ARES = re.compile(r"ARES_(ResNet152|Wide_ResNet50_2)_AT\.pth")
_GELU = {"hidden_act": "gelu"}
_OF_TRANSFORMERS: dict[str, dict[str, Any]] = {
    "resnet": {"hidden_act": "relu", "downsample_in_first_stage": False},
    "convnext": _GELU,
    "swin": _GELU | {"use_absolute_embeddings": False},
    "vit": _GELU,
}
# Of transformers' configurations, which leave out what is the default.
_NORM_EPSILON = {"convnext": 1e-12, "swin": 1e-5, "vit": 1e-12}


def _differs(said: str, arch: str, *, exact: bool) -> bool:
    """Whether a name, such as timm's ``tv_resnet50.a1_in1k``, is that of another ResNet than ``arch``."""
    name = re.sub(r"^(tv|gluon|ssl|swsl|ig|wsl)_|_v1b$", "", said.split("/")[-1].split(".")[0].lower())
    if exact:
        return re.sub(r"_v1b$", "", name) != arch
    # Elsewhere anything may stand; only what looks like the name of a ResNet counts, without what is appended to it.
    family = r"(?:wide_?|se|sk|eca)?res(?:net|next)[a-z]*_?\d+[a-z]*"
    names = [found[0].replace("_", "") for one in (name, arch) if (found := re.match(family, one))]
    return len(names) == 2 and names[0] != names[1]


def json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no such file or it holds something else."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path.name} beside it cannot be read ({error}): mend or move it") from None
    return content if isinstance(content, dict) else {}


def dictionary_of(value: Any, name: str) -> dict[str, Any]:
    """A dictionary, or its JSON as a safetensors header has it."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise InputError(f"its {name} cannot be read ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"its {name} is a {type(value).__name__}: a dictionary belongs there")
    return value


def _said_by(spec: BackboneSpec, threat_model: Any) -> dict[str, Any]:
    """What a file of ours says, by the names of ``Statement``."""
    fields = {name: getattr(spec, name) for name in READING}
    if not isinstance(threat_model, str | None):
        raise InputError(f"its threat model is {threat_model!r}: a text such as L2:3 belongs there")
    return fields if threat_model is None else {**fields, "threat_model": ThreatModel.parse(threat_model)}


def _agreed(
    in_file: dict[str, Any], convention: dict[str, Any], statement: Statement, usual: BackboneSpec
) -> tuple[dict[str, Any], dict[str, str]]:
    """What the file, the user or the convention says, and which of them says each value of ``READING``."""
    stated = {name: value for name, value in vars(statement).items() if value is not None and name != "arch"}
    if "threat_model" in stated:
        stated["threat_model"] = ThreatModel.parse(stated["threat_model"])
    in_file = dict(in_file)
    for name, value in stated.items():
        if name in in_file and not _close(in_file[name], value):
            if name in ("mean", "std") and _close([v / 255 for v in in_file[name]], value):
                del in_file[name]  # in units of 0-255, which the user mends
                continue
            raise InputError(
                f"it says that its {name.replace('_', ' ')} is {in_file[name]}, not {value}: leave out that option"
            )
    values = {**convention, **stated, **in_file}
    if any(name not in values for name in READING):
        unsaid = [name for name in READING if name not in stated and name not in in_file]
        options = " ".join(map(_option, unsaid))
        imagenet = " ".join(f"{_option(name)} {_USUAL[name]}" for name in unsaid)
        of_timm = {name: " ".join(f"{value:.6g}" for value in getattr(usual, name)) for name in ("mean", "std")}
        other = [
            f"{_option(name)} {of_timm[name]}" for name in unsaid if of_timm.get(name, _USUAL[name]) != _USUAL[name]
        ]
        raise InputError(
            f"it does not say what it was fed with: give {options} (ImageNet's usual ones are {imagenet}"
            + (f"; of timm's own {usual.arch} {' '.join(other)}" if other else "")
            + ")"
        )
    check_normalization(values["mean"], values["std"])
    who = {name: BY_FILE if name in in_file else BY_USER if name in stated else ASSUMED for name in READING}
    return values, who


_USUAL = {
    "mean": "0.485 0.456 0.406",
    "std": "0.229 0.224 0.225",
    "channel_order": "RGB",
    "stride_in_1x1": "false",
}


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _check_said(checkpoint: Checkpoint) -> None:
    """Refuse what is assumed, with the options that say it."""
    if assumed := [name for name, who in checkpoint.said.items() if who == ASSUMED]:
        values = checkpoint.spec.to_dict()
        words = {
            name: " ".join(f"{v:.6g}" for v in values[name]) if name in ("mean", "std") else str(values[name])
            for name in assumed
        }
        if "stride_in_1x1" in words:
            words["stride_in_1x1"] = words["stride_in_1x1"].lower()
        options = " ".join(f"{_option(name)} {value}" for name, value in words.items())
        raise InputError(f"neither it nor you say what is assumed: give {options}, if that is how it was trained")


def _close(a: Any, b: Any) -> bool:
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(
            math.isclose(x, y, rel_tol=0, abs_tol=1e-4) if is_number(x) and is_number(y) else x == y
            for x, y in zip(a, b, strict=True)
        )
    return bool(a == b)
