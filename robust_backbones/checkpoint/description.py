"""What timm, transformers and a training say about a network besides its weights, and no tensor shows."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from robust_backbones.checkpoint.training_options import TrainingOptions
from robust_backbones.checkpoint.untrusted import METADATA, Inert
from robust_backbones.errors import InputError
from robust_backbones.models import BackboneSpec, is_number, is_triple, only_in_timm, usual_spec
from robust_backbones.timm_models import current_name, norm_and_heads

_NAME_KEYS = ("architecture", "arch", "model_name", "model", "backbone", "encoder")

_PATH, _BESIDE, _OPTION = "its path", "config.json beside it", "an option of its training"
_OUTSIDE = (_PATH, _BESIDE)
_ALONE = "save its state_dict alone"

_IS = r"""["']?\s*[=:]\s*"""
"""Between a name and its value in a configuration, which is Python's text or JSON's."""

_Allowed = dict[str, tuple[Any, ...] | None]
"""Settings -> values that do not change the features; None: any."""
_OF_TIMM: _Allowed = {
    **dict.fromkeys(("num_classes", "global_pool", "drop_rate", "drop_path_rate", "drop_block_rate", "pretrained")),
    **{"in_chans": (3,), "output_stride": (32,), "zero_init_last": None, "img_size": None},
}
# What timm, torchvision and others call that which no tensor of a ResNet shows.
_OF_RESNETS: _Allowed = {
    **dict.fromkeys(("bn_eps", "bn_epsilon", "batch_norm_eps", "batch_norm_epsilon"), (None, 1e-5)),
    "bn_tf": (None, False),
    "output_stride": (None, 32),
    "last_stride": (None, 2),
    **dict.fromkeys(("act_layer", "activation_layer", "act_fn", "nonlinearity", "hidden_act"), (None, "relu")),
    # It may be that of the last layer, or whether there is one.
    **dict.fromkeys(
        (
            *("activation", "activation_fn", "activation_function", "activation_type"),
            *("act", "act_func", "act_type", "non_linearity"),
        ),
        (
            *(None, True, False, "", "relu", "none", "identity", "linear", "tanh", "sigmoid"),
            *("softmax", "softmax2d", "logsoftmax", "log_softmax"),
        ),
    ),
    "aa_layer": (None, ""),
    "dilated": (None, False),
    "replace_stride_with_dilation": (None, [False] * 3, (False,) * 3),
}
_GELU: _Allowed = {"hidden_act": ("gelu",)}
_OF_TRANSFORMERS: dict[str, _Allowed] = {
    "resnet": {"hidden_act": ("relu",), "downsample_in_first_stage": (False,)},
    "convnext": _GELU,
    "swin": _GELU | {"use_absolute_embeddings": (False,)},
    "vit": _GELU,
    "timm_backbone": {"output_stride": (None, 32)},
}
# Options that say which stem a ResNet has: no tensor shows a max-pool.
_NO_POOL = re.compile(r"(?i)(no|remove|without|skip)_(first_|stem_)?max_?pool(ing)?\d?")
_POOL = re.compile(r"(?i)((has|keep|use|with)_)?(first_|stem_)?max_?pool(ing)?\d?")
_SMALL_STEM = re.compile(r"(?i)(use_)?(cifar|small|tiny)_(stem|images?|inputs?|conv1?)")
# Of transformers' configurations, which leave out what is the default.
_NORM_EPSILON = {"convnext": 1e-12, "swin": 1e-5, "vit": 1e-12}
# What names begin with, but for a maker's -> their activation.
_ACTIVATIONS = {"res|wide_res": "relu", "convnext|swin|vit|deit": "gelu"}
# A ResNet that has, or may have, the tensors of another one.
_VARIANT = re.compile(
    r"(?<![a-z])(?:legacy_)?(?:s[ek]_?|eca_?)res(?:net|next)\w*\d\w*|res(?:net|next)(?:aa|blur)\d+\w*"
)
# Of act_gelu in ares/model/imagenet_model_zoo.py.
_GELU_OF_ARES = re.compile(r"ARES_(ResNet152|Wide_ResNet50_2)_AT\.pth")


class Description:
    """What is said about a network: in its file, in a safetensors header, in JSON files beside it."""

    def __init__(self, content: dict[Any, Any], path: Path) -> None:
        header, meta, more = (content.get(key) for key in (METADATA, "meta", "hyper_parameters"))
        inside = content | (header if isinstance(header, dict) else {})
        beside = json_object(path.with_name("config.json"))
        self._path = path
        self._beside, part = beside, beside.get("backbone_config")
        self.is_part = isinstance(part, dict)
        """Whether it is the backbone of a detector or segmenter of transformers."""
        found = (one for one in (beside, part) if isinstance(one, dict))
        # A folder may hold the configuration of something else.
        known = (one for one in found if "architecture" in one or one.get("model_type") in _OF_TRANSFORMERS)
        self.config: dict[str, Any] = next(known, {})
        keys = [key for key in ("pretrained_cfg", "default_cfg") if key in inside]
        # Before version 0.8 of timm the whole config.json is its pretrained_cfg.
        flat = self.config if "architecture" in self.config else None
        cfg = inside[keys[0]] if keys else self.config.get("pretrained_cfg", flat)
        self.cfg: dict[str, Any] = {} if cfg is None else _dictionary_of(cfg, "pretrained_cfg")
        self.by_timm = bool(self.cfg) or "architecture" in self.config
        self._processor = json_object(path.with_name("preprocessor_config.json")) if self.config else {}
        self._inside = (more if isinstance(more, dict) else {}) | inside
        self.options = TrainingOptions(content)
        texts = [meta.get(key) for key in ("config", "cfg")] if isinstance(meta, dict) else []
        self._of_mmdetection = "\n".join(text for text in texts if isinstance(text, str))

    def values(self, arch: str) -> dict[str, Any]:
        """What is said about ``READING``; what transformers says of a network of another kind does not count."""
        said = self.options.values() | self._of_pipeline()
        kind = self.config.get("model_type", "timm_backbone")
        of_it = kind == "timm_backbone" or {"resnet": "res"}.get(kind, kind) in arch
        processor = self._processor if of_it else {}
        for where, fields, prefix in (
            ("pretrained_cfg", self.cfg, ""),
            ("preprocessor_config.json", processor, "image_"),
        ):
            for name in ("mean", "std"):
                if (value := fields.get(prefix + name)) is not None:
                    if not is_triple(value):
                        raise InputError(f"{where} says that its {name} is {value!r}: three numbers belong there")
                    said[name] = tuple(value)
        # transformers multiplies pixels of 0 to 255 by a factor first, and may leave out the rest.
        factor: Any = processor.get("rescale_factor")
        scaled = is_number(factor) and factor > 0 and processor.get("do_rescale") is not False
        if scaled and not math.isclose(255 * factor, 1, rel_tol=1e-4):
            said |= {name: tuple(v / (255 * factor) for v in said[name]) for name in ("mean", "std") if name in said}
        if processor.get("do_normalize") is False:
            said |= {"mean": (0.0,) * 3, "std": (1.0,) * 3}
        if processor.get("do_flip_channel_order") is True:
            said["channel_order"] = "BGR"
        if style := re.search(rf"""\bstyle{_IS}["'](caffe|pytorch)["']""", self._of_mmdetection):
            said["stride_in_1x1"] = style[1] == "caffe"
        if of_it and isinstance(stride := self.config.get("downsample_in_bottleneck"), bool):
            said["stride_in_1x1"] = stride
        elif self.by_timm and "architecture" in {**self.cfg, **self.config}:
            said["stride_in_1x1"] = False
        return said

    def _of_pipeline(self) -> dict[str, Any]:
        """What MMDetection's configuration says, if it is unambiguous; its images are in 0-255, and read as BGR."""
        text, three = self._of_mmdetection, r"\s*,\s*".join([r"(\d+\.?\d*)"] * 3)
        found = {name: {*re.findall(rf"\b{name}{_IS}[\[(]\s*{three}", text)} for name in ("mean", "std")}
        orders = {order.title() for order in re.findall(rf"\b(?:bgr_)?to_rgb{_IS}(?i:(true|false))", text)}
        if any(len(values) != 1 for values in (orders, *found.values())):
            return {}
        said = {name: tuple(float(value) / 255 for value in values.pop()) for name, values in found.items()}
        return {**said, "channel_order": "RGB" if orders == {"True"} else "BGR"}

    def named(self) -> BackboneSpec | None:
        """The timm network that it is said to be; None if that is one of ours."""
        names = {current_name(_without_tag(name)) for _, name, exact in self._architectures() if exact}
        names = {name for name in names if only_in_timm(name)}
        return self.evaluated(usual_spec(names.pop())) if len(names) == 1 else None

    def evaluated(self, spec: BackboneSpec) -> BackboneSpec:
        """A network with the sizes and the interpolation of timm's configuration, as far as that has them."""
        size, crop, interpolation = (self.cfg.get(name) for name in ("input_size", "crop_pct", "interpolation"))
        if isinstance(size, list | tuple) and len(size) == 3:
            spec = replace(spec, image_size=size[-1], val_resize=size[-1])
        if isinstance(crop, float) and 0.1 < crop <= 1:
            spec = replace(spec, val_resize=int(spec.image_size / crop))
        return spec if interpolation is None else replace(spec, interpolation=interpolation)

    def check(self, arch: str, stem: str) -> None:
        """Refuse a network whose description contradicts its tensors' shapes.

        Variants with another activation, dilation, blur or stem have the same tensors but different features.
        """
        if _GELU_OF_ARES.fullmatch(self._path.name):
            raise InputError(
                f"ARES trained {self._path.stem} with GELU, which no tensor shows: no {arch} of ours can be it"
            )
        for where, name, exact in self._architectures():
            if _differs(name, arch, exact=exact):
                mend = "move the file to a folder of its own, or rename it" if where in _OUTSIDE else _ALONE
                as_itself = current_name(_without_tag(name)) if exact else ""
                mend += f"; if it is right, give --arch {as_itself}" * bool(as_itself and only_in_timm(as_itself))
                raise InputError(
                    f"{where} says that it is {name}, which has the tensors of {arch} and other features: it cannot be "
                    f"read as one (if that is wrong, {mend})"
                )
        for where, fields, allowed in self._settings(arch, stem):
            for name in fields:
                values = allowed.get(name, ())
                if values is not None and not _is_among(fields[name], values):
                    raise InputError(
                        f"{where} says that its {name} is {fields[name]!r}, which gives other features than {arch}'s: "
                        f"it cannot be read as one{f' (if that is of another network, {_ALONE})' * (where == _OPTION)}"
                    )

    def _settings(self, arch: str, stem: str) -> Iterator[tuple[str, dict[Any, Any], _Allowed]]:
        """Origin, settings that may change the features, and the values that do not."""
        activation = [layer for begin, layer in _ACTIVATIONS.items() if re.search(rf"(^|_)({begin})", arch)]
        of_options = {} if only_in_timm(arch) else _OF_RESNETS
        if activation:
            of_options = of_options | {"act_layer": (None, *activation)}
        if dilated := re.search(rf"\bdilations{_IS}[([]([\d, ]*[2-9][\d, ]*)[)\]]", self._of_mmdetection):
            yield "its meta", {"dilations": dilated[1]}, {}
        for where, arguments in (
            ("config.json", self.config.get("model_args")),
            ("model_args", self._inside.get("model_args")),
            *(("args.model_kwargs", options.get("model_kwargs")) for options in self.options.dictionaries),
        ):
            if isinstance(arguments, dict):
                yield where, arguments, _OF_TIMM | {"act_layer": tuple(activation)}
        if self._beside.get("dilation") is True:  # DETR's
            yield "config.json", {"dilation": True}, {}
        for options in self.options.dictionaries:
            if options.get("dilation") is True:
                yield _OPTION, {"dilation": True}, {}
            if not only_in_timm(arch):
                yield _OPTION, {k: v for k, v in options.items() if _is_of_other_stem(k, v, stem)}, {}
            said = {k: options[k] for k in of_options if k in options}
            known = {k: v for k, v in said.items() if not isinstance(v, Inert) and v is not Inert}
            yield _OPTION, known, of_options
        asked = _OF_TRANSFORMERS.get(self.config.get("model_type", ""), {})
        yield "config.json", {k: self.config[k] for k in asked if k in self.config}, asked

    def check_heads(self, arch: str, layout: str, *, stated: bool) -> None:
        """Refuse a ViT-S that may have 12 heads, like MoCo v3's: no tensor shows their number."""
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
        """The epsilon of transformers' layer norms, which no tensor shows; 0 if it equals timm's."""
        kind, facts = self.config.get("model_type"), norm_and_heads(arch)
        if kind not in _NORM_EPSILON:
            family = arch.split("_")[0]
            mend = "put its config.json beside it"
            if self._beside:
                part = self._beside["backbone_config"] if self.is_part else self._beside
                said = part.get("model_type")
                mend = (
                    f"config.json beside it has the model_type {said!r}: save its {family} by itself, by transformers"
                )
            raise InputError(f"no tensor of transformers' {arch} shows the epsilon of its norms: {mend}")
        heads = self.config.get("num_attention_heads")
        epsilon = self.config.get("layer_norm_eps", _NORM_EPSILON[kind])
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
        """Origin, name, and whether only timm's names can be there."""
        said: list[tuple[str, Any, bool]] = [
            (_BESIDE, self.config.get("architecture"), True),
            (_BESIDE, self.config.get("backbone"), False),
            ("its pretrained_cfg", self.cfg.get("architecture"), True),
            *((f"its entry {key}", self._inside.get(key), key == "architecture") for key in _NAME_KEYS),
        ]
        texts = [(_PATH, str(self._path.absolute()))] + [
            (_OPTION, str(options.get(key))) for options in self.options.dictionaries for key in _NAME_KEYS
        ]
        for where, text in texts:
            said += [(where, name, False) for name in _VARIANT.findall(text)]
        return (one for one in said if isinstance(one[1], str))


def _is_of_other_stem(name: Any, value: Any, stem: str) -> bool:
    """Whether an option says that a ResNet has, or lacks, the max-pool that one of this stem lacks, or has."""
    if not (isinstance(name, str) and isinstance(value, bool)):
        return False
    is_small = stem == "cifar"
    if _POOL.fullmatch(name):
        return value == is_small
    return value != is_small and bool(_NO_POOL.fullmatch(name) or (value and _SMALL_STEM.fullmatch(name)))


def _is_among(value: Any, values: tuple[Any, ...]) -> bool:
    """Whether a setting has one of these values, in any spelling of a string: ``nn.ReLU``, ``{"type": "ReLU"}``."""
    value = value.tolist() if isinstance(value, Tensor) else value
    words = re.findall(r"\w+", str(value).lower())
    return value in values or any(isinstance(one, str) and one in words for one in values)


def _differs(said: str, arch: str, *, exact: bool) -> bool:
    """Whether a name, such as timm's ``tv_resnet50.a1_in1k``, is that of another ResNet than ``arch``."""
    former = _without_tag(said).lower()
    name = re.sub(r"^(tv|gluon|ssl|swsl|ig|wsl)_|_v1b$", "", former)
    if exact:
        differs = re.sub(r"_v1b$", "", name) != arch
    else:
        # Anything may stand there; only what looks like the name of a ResNet counts, without what is appended to it.
        family = r"(?:legacy_)?(?:(?:wide|se|sk|eca)_?)?res(?:net|next)[a-z]*_?\d+[a-z]*"
        names = [found[0].replace("_", "") for one in (name, arch) if (found := re.match(family, one))]
        differs = len(names) == 2 and names[0] != names[1]
    return differs and current_name(former) != arch


def _without_tag(name: str) -> str:
    """timm's name without an owner on the hub and a tag of weights."""
    return name.split("/")[-1].split(".")[0]


def json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file or it contains something else."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path.name} beside it cannot be read ({error}): mend or move it") from None
    return content if isinstance(content, dict) else {}


def _dictionary_of(value: Any, name: str) -> dict[str, Any]:
    """A dictionary, or its JSON in a safetensors header."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise InputError(f"its {name} cannot be read ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"its {name} is a {type(value).__name__}: a dictionary belongs there")
    return value
