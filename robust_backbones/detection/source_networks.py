"""The source network for the proof, built by its authors' own code, or by our reading of the file if that is missing.

A reading that misses what no tensor shows (anti-aliasing, another activation or stride) makes the same mistake on both
sides of a comparison with itself. The authors' code is independent of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from robust_backbones.checkpoint.description import Description
from robust_backbones.checkpoint.families import TORCHVISION
from robust_backbones.checkpoint.format import Checkpoint
from robust_backbones.checkpoint.layouts import tensors_of
from robust_backbones.checkpoint.names import without_wrappers
from robust_backbones.checkpoint.untrusted import load_tensors
from robust_backbones.errors import InputError, ProofFailedError
from robust_backbones.models import NormalizedModel, only_in_timm
from robust_backbones.timm_models import STRIDES, build_timm, is_swin, keep_paths, stage_layers, swin_shape
from robust_backbones.timm_vit import PATCH_SIZE, is_vit, vit_shape, without_class_token


@dataclass(frozen=True)
class SourceNetwork:
    """A network that normalises inside, and whose code it is."""

    model: NormalizedModel
    layers: tuple[str, ...]
    """The modules whose outputs are the stages res2 to res5; for a ViT, its last block."""
    whose: str
    """Such as ``timm's own network``."""
    strides: tuple[int, ...] = STRIDES

    def stages(self, images: Tensor) -> list[Tensor]:
        """Images in [0, 1], shape (N, 3, H, W) -> outputs of ``layers`` at their strides, (N, C, H / s, W / s)."""
        outputs: list[Tensor] = []
        try:
            modules = [self.model.backbone.get_submodule(layer) for layer in self.layers]
        except AttributeError:
            raise self._no_stages() from None
        hooks = [module.register_forward_hook(lambda *call: outputs.append(_first(call[2]))) for module in modules]
        try:
            self.model(images)
        finally:
            for hook in hooks:
                hook.remove()
        heights = [images.shape[-2] // stride for stride in self.strides]
        return [self._as_map(output, height) for output, height in zip(outputs, heights, strict=True)]

    def _as_map(self, output: Tensor, height: int) -> Tensor:
        if not isinstance(output, Tensor):
            raise self._no_stages()
        return output if output.ndim == 4 else _from_tokens(output, height)

    def _no_stages(self) -> InputError:
        return InputError(
            f"timm's {self.model.spec.arch} does not show its stages: `convert --no-verify` leaves out the proof"
        )


class _OfSwin(SourceNetwork):
    """A Swin, whose stages are compared after a layer norm without parameters, as Detectron2's are initially."""

    def stages(self, images: Tensor) -> list[Tensor]:
        network: Any = self.model.backbone
        if hasattr(network, "set_input_size"):  # timm's is of one size
            network.set_input_size(images.shape[-2:], window_size=swin_shape(self.model.spec.arch).window_size)
        return super().stages(images)

    def _as_map(self, output: Tensor, height: int) -> Tensor:
        return _from_tokens(F.layer_norm(output, output.shape[-1:]), height)


def _from_tokens(tokens: Tensor, height: int) -> Tensor:
    """(N, H, W, C) or (N, H * W, C) -> (N, C, H, W)."""
    return (tokens if tokens.ndim == 4 else tokens.unflatten(1, (height, -1))).permute(0, 3, 1, 2)


class _Patches(nn.Module):
    """A vision transformer of torchvision or transformers whose blocks see only patches, as in a detector."""

    def __init__(self, network: nn.Module, blocks: str) -> None:
        super().__init__()
        self.network, self.blocks = network, blocks

    def forward(self, images: Tensor) -> Tensor:
        network: Any = self.network
        if hasattr(network, "_process_input"):  # torchvision's
            tokens, positions = network._process_input(images), network.encoder.pos_embedding
        else:
            tokens, positions = network.embeddings.patch_embeddings(images), network.embeddings.position_embeddings
        tokens = tokens + positions[:, 1:]
        for block in network.get_submodule(self.blocks).children():
            tokens = _first(block(tokens))
        return tokens


def _first(output: Any) -> Tensor:
    """The output of a block for the next one: in some releases of transformers the first item of a tuple."""
    return output[0] if isinstance(output, tuple) else output


@dataclass(frozen=True)
class _Own:
    """The authors' network for a checkpoint, and its own tensors."""

    network: nn.Module
    state_dict: Mapping[str, Tensor]
    backbone: str = ""
    """The submodule that takes normalised images."""
    layers: tuple[str, ...] = ()
    """The modules of its stages, if they are not layer1 to layer4, or timm's."""
    blocks: str = ""
    """The module that holds the blocks of a ViT that is not timm's."""

    def load(self) -> set[str]:
        """Fill the network; returns the names in which the two differ, in which case it is not changed."""
        wanted, found = _shapes(self.network.state_dict()), _shapes(self.state_dict)
        other = {name for name in wanted | found if wanted.get(name) != found.get(name)}
        if not other:
            self.network.load_state_dict(self.state_dict, strict=False)  # batch norm's counters may be absent
        return other


@dataclass(frozen=True)
class _OfTransformers(_Own):
    """Filled by transformers, whose releases name modules differently from the tensors in their files."""

    report: Mapping[str, Any] = field(default_factory=dict)

    def load(self) -> set[str]:
        mismatched = {name for name, *_ in self.report["mismatched_keys"]}
        # It may have been saved without its classifier; a pooler is of another kind of head.
        missing = {name for name in self.report["missing_keys"] if not name.startswith("classifier.")}
        unexpected = {name for name in self.report["unexpected_keys"] if "pooler." not in name}
        return mismatched | missing | unexpected


class _NotKnownError(Exception):
    """Why the authors' network cannot be built."""


def source_network(checkpoint: Checkpoint) -> SourceNetwork:
    """Built by its authors' code if that is installed and the file says which network it is; else by our reading.

    Raises:
        ProofFailedError: the authors' network has other tensors than the file.
    """
    title, build = _MAKERS.get(checkpoint.layout, ("", None))
    try:
        if build is None:
            raise _NotKnownError
        own = build(checkpoint)
    except (_NotKnownError, ImportError) as error:
        reason = f"{title} cannot be imported" if isinstance(error, ImportError) else str(error)
        whose = f"our reading of the file{f' ({reason})' * bool(reason)}"
        return _with_stages(checkpoint, _Own(checkpoint.build(), {}), whose)
    whose = f"{title}'{'' if title.endswith('s') else 's'} own network"
    if other := own.load():
        raise ProofFailedError(f"{whose} and {checkpoint.source} differ in {', '.join(sorted(other)[:3])}")
    return _with_stages(checkpoint, own, whose)


def _with_stages(checkpoint: Checkpoint, own: _Own, whose: str) -> SourceNetwork:
    # In float32, as the detector: the file may have halves.
    model = NormalizedModel(own.network.float().get_submodule(own.backbone), checkpoint.spec).eval()
    arch = checkpoint.spec.arch
    if not only_in_timm(arch):
        return SourceNetwork(model, own.layers or ("layer1", "layer2", "layer3", "layer4"), whose)
    keep_paths(model)
    if is_vit(arch):
        last = f"blocks.{vit_shape(arch, checkpoint.spec.image_size).depth - 1}"
        if own.blocks:
            model.backbone, last = _Patches(model.backbone, own.blocks), ""
        else:
            without_class_token(own.network)
        return SourceNetwork(model, (last,), f"{whose} without its class token", strides=(PATCH_SIZE,))
    kind = _OfSwin if is_swin(arch) else SourceNetwork
    return kind(model, own.layers or stage_layers(own.network), whose)


def _shapes(state_dict: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in state_dict.items() if not name.endswith("num_batches_tracked")}


def _torchvision(checkpoint: Checkpoint) -> _Own:
    from torchvision.models import get_model

    spec = checkpoint.spec
    if spec.stride_in_1x1 or not spec.num_classes:
        raise _NotKnownError("torchvision has no such network")
    if spec.arch in TORCHVISION:
        return _modern_torchvision(checkpoint)
    try:
        network = get_model(spec.arch, weights=None, num_classes=spec.num_classes)
    except ValueError:
        raise _NotKnownError(f"torchvision has no {spec.arch}") from None
    return _Own(network, checkpoint.state_dict)


def _modern_torchvision(checkpoint: Checkpoint) -> _Own:
    """A ConvNeXt, Swin or ViT, by the names that the file has, without stochastic depth."""
    from torchvision.models import get_model
    from torchvision.ops import StochasticDepth

    spec = checkpoint.spec
    square = {"image_size": spec.image_size} if is_vit(spec.arch) else {}
    network = get_model(TORCHVISION[spec.arch], weights=None, num_classes=spec.num_classes, **square)
    for module in network.modules():
        if isinstance(module, StochasticDepth):
            module.p = 0.0
    plain = {without_wrappers(name): tensor for name, tensor in tensors_of(_content(checkpoint)[0]).items()}
    tensors = {
        name.removeprefix(checkpoint.prefix): tensor
        for name, tensor in plain.items()
        if name.startswith(checkpoint.prefix)
    }
    if square:
        return _Own(network, tensors, blocks="encoder.layers")
    return _Own(network, tensors, layers=tuple(f"features.{place}" for place in (1, 3, 5, 7)))


def _timm(checkpoint: Checkpoint) -> _Own:
    import timm

    content, description = _content(checkpoint)
    # On the hub config.json says it, in a training run's checkpoint "arch".
    said = (description.config.get("architecture"), content.get("arch"), description.cfg.get("architecture"))
    arch = next((name for name in said if isinstance(name, str)), "")
    if not timm.is_model(arch):
        raise _NotKnownError(f"timm has no {arch}" if arch else "it does not say its architecture")
    return _Own(build_timm(arch, checkpoint.spec.num_classes, checkpoint.spec.image_size), checkpoint.state_dict)


def _transformers(checkpoint: Checkpoint) -> _Own:
    import transformers

    content, description = _content(checkpoint)
    config, tensors = description.config, tensors_of(content)
    kind = str(config.get("model_type", ""))
    name = {"resnet": "ResNet", "convnext": "ConvNext", "swin": "Swin", "vit": "ViT"}.get(kind)
    if not name or description.is_part:
        raise _NotKnownError("" if kind else "no config.json of transformers beside it")
    # What leaves out or rounds is not of the proof.
    zero = dict.fromkeys(("drop_path_rate", "hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
    said = {key: value for key, value in {**config, **zero}.items() if key not in ("dtype", "torch_dtype")}
    classifier = getattr(transformers, f"{name}ForImageClassification")
    try:
        with _without_reports(transformers):
            network, report = classifier.from_pretrained(
                None,
                config=getattr(transformers, f"{name}Config").from_dict(said),
                state_dict=tensors,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except Exception as error:  # a value that it does not take, each release in its own way
        reason = str(error)[:200]
        raise InputError(f"transformers builds no network of {checkpoint.source} by config.json ({reason})") from None
    if kind == "vit":
        blocks = "layers" if hasattr(network.vit, "layers") else "encoder.layer"
        return _OfTransformers(network, {}, backbone="vit", blocks=blocks, report=report)
    if kind == "swin":  # the output of a whole stage comes after its reduction
        depths = enumerate(network.config.depths)
        layers = [f"swin.encoder.layers.{stage}.blocks.{depth - 1}" for stage, depth in depths]
    else:
        layers = [f"{kind}.encoder.stages.{stage}" for stage in range(4)]
    return _OfTransformers(network, {}, layers=tuple(layers), report=report)


@contextmanager
def _without_reports(transformers: Any) -> Iterator[None]:
    """Suppress its progress bar and its table of missing tensors."""
    logging = transformers.logging
    verbosity, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()


def _robustness(checkpoint: Checkpoint) -> _Own:
    from robustness import imagenet_models

    try:
        network = getattr(imagenet_models, checkpoint.spec.arch)(num_classes=checkpoint.spec.num_classes)
    except (AttributeError, TypeError):
        raise _NotKnownError(f"robustness has no {checkpoint.spec.arch}") from None
    return _Own(network, checkpoint.state_dict)


_MAKERS: dict[str, tuple[str, Callable[[Checkpoint], _Own]]] = {
    "robust_backbones": ("pretrain", lambda checkpoint: _Own(checkpoint.build(), checkpoint.state_dict)),
    "torchvision": ("torchvision", _torchvision),
    "moco": ("torchvision", _torchvision),  # which is what MoCo trains
    "timm": ("timm", _timm),
    "transformers": ("transformers", _transformers),
    "robustness": ("robustness", _robustness),
}
"""Layout -> whose code it is, and the function that builds the network."""


def _content(checkpoint: Checkpoint) -> tuple[dict[Any, Any], Description]:
    if checkpoint.path is None or not checkpoint.path.is_file():
        raise _NotKnownError("its file is gone")
    content = load_tensors(checkpoint.path)
    return content, Description(content, checkpoint.path)
