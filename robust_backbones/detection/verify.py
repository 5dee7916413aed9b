"""The proof of a conversion: Detectron2's res2-res5 equal the source's layer1-layer4, each with its own preprocessing.

For a ViT, the last block's features are compared, at the size of pre-training, without the class token on both sides.

Also ``MODEL.WEIGHTS robust://NAME``: a published backbone, downloaded, converted and proven at the first use.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from detectron2.data.detection_utils import read_image
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager
from iopath.common.file_io import PathHandler
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.transforms.functional import center_crop, pil_to_tensor

from robust_backbones.checkpoint import zoo
from robust_backbones.checkpoint.convert import convert_file, read_backbone
from robust_backbones.checkpoint.format import Checkpoint, sha256
from robust_backbones.checkpoint.sources import read_published
from robust_backbones.data.decoding import ImageInputError
from robust_backbones.detection.checkpoint import BackboneCheckpointer
from robust_backbones.detection.config import CONFIG_DIR, load_config
from robust_backbones.detection.source_networks import source_network
from robust_backbones.errors import InputError, ProofFailedError
from robust_backbones.models import BackboneSpec, only_in_timm, only_size
from robust_backbones.runs.files import write_text
from robust_backbones.timm_models import is_swin, swin_shape

TOLERANCE = 1e-4
"""Largest relative error that float32 rounding explains; a wrong stride, order or scale gives 0.01 and more."""

_NORMS = {"eval": "FrozenBN", "train": "BN"}
# What comes after the backbone takes no part: as small as it can be.
_SMALL_HEADS = ["MODEL.FPN.OUT_CHANNELS", 8, "MODEL.ROI_BOX_HEAD.FC_DIM", 8, "MODEL.ROI_MASK_HEAD.CONV_DIM", 8]


@dataclass(frozen=True)
class StageError:
    """The error of one stage's features against the source's."""

    image: str
    """``random``, or the image file's name."""
    batch_norm: str
    """``eval``: with the statistics in the file (Detectron2's FrozenBN); ``train``: with those of the image (BN)."""
    stage: str
    largest: float
    """max|difference|, in units of the features."""
    relative: float
    """max|difference| / max|source|."""
    against: str = ""
    """Whose network computed the source's features, such as ``timm's own network``; ``our reading of the file`` if its
    authors' code is not installed, or the file does not say which network it is."""


def prove(checkpoint: Checkpoint, converted: str | Path, *, image: str | Path | None = None) -> list[StageError]:
    """``feature_errors``; ProofFailedError if one is not below ``TOLERANCE``."""
    errors = feature_errors(checkpoint, converted, image=image)
    if wrong := [error for error in errors if not error.relative < TOLERANCE]:
        stages = ", ".join(f"{error.stage} by {error.relative:.1e}" for error in wrong)
        raise ProofFailedError(
            f"the features of {checkpoint.source}, by {errors[0].against}, and of what was made from it differ "
            f"({stages})"
        )
    return errors


@torch.no_grad()
def feature_errors(
    checkpoint: Checkpoint, converted: str | Path, *, image: str | Path | None = None, size: int = 0
) -> list[StageError]:
    """Compare all stages, on random pixels and on the image file if one is given, in both modes of batch norm.

    The converted file is used as in training: configuration, model, checkpoint guard, image reader and the detector's
    own preprocessing of uint8 pixels. The reference is the source's network, from ``source_networks``, on the same
    pixels in [0, 1].

    Args:
        size: of the random image; by default 224 pixels, for a Swin the smallest at which the networks are the same
            function.

    Raises:
        ProofFailedError: the network that the source names has other tensors.
        InputError: the file does not fill the whole backbone or does not fit; the image cannot be read.
    """
    if image is not None:
        image = Path(image)
        _pixels_of(image)
    _, metadata = read_backbone(converted)
    errors = []
    source = source_network(checkpoint)
    for mode, norm in _NORMS.items():
        overrides = ["MODEL.RESNETS.NORM", norm, "MODEL.BACKBONE.FREEZE_AT", 0, "MODEL.DEVICE", "cpu", *_SMALL_HEADS]
        own = [item for pair in metadata.spec.detectron2_overrides().items() for item in pair]
        cfg = load_config(CONFIG_DIR / "Base-RCNN-FPN.yaml", [*own, *overrides])
        with torch.random.fork_rng(devices=[]):  # of the first weights
            detector = build_model(cfg).train(mode == "train")
        BackboneCheckpointer(detector, cfg=cfg).load(str(converted))
        network = detector.backbone.net if hasattr(detector.backbone, "net") else detector.backbone.bottom_up
        reference = source.model.train(mode == "train")
        # Some of timm's batch norms see one number a channel and image: one image has no statistics.
        in_pairs = only_in_timm(checkpoint.spec.arch) and any(isinstance(one, _BatchNorm) for one in network.modules())
        if mode == "train":
            # The statistics of a few pixels, taken layer by layer, multiply float32's rounding a thousandfold, that of
            # mean and std as well.
            detector, reference, spec = detector.double(), reference.double(), checkpoint.spec
            for buffer, values in (
                (detector.pixel_mean, cfg.MODEL.PIXEL_MEAN),
                (detector.pixel_std, cfg.MODEL.PIXEL_STD),
                (reference.mean, spec.mean),
                (reference.std, spec.std),
            ):
                buffer.copy_(torch.tensor(values, dtype=buffer.dtype)[:, None, None])
        for name, *pixels in inputs(cfg.INPUT.FORMAT, checkpoint.spec, image, size):
            for_detector, for_reference = ([one, one.flip(-1)] if in_pairs else [one] for one in pixels)
            features = network(detector.preprocess_image([{"image": one} for one in for_detector]).tensor)
            wanted = source.stages(torch.stack(for_reference).to(reference.mean.dtype) / 255)
            for stage, expected in zip(features, wanted, strict=True):
                if expected.shape != features[stage].shape:
                    raise ProofFailedError(
                        f"{stage} of {checkpoint.source} and of what was made from it differ in size"
                    )
                largest = (features[stage] - expected).abs().max().item()
                scale = expected.abs().max().item()
                # A NaN is no proof, and neither are features that are zero throughout.
                relative = largest / scale if scale else float("nan")
                errors.append(StageError(name, mode, stage, largest, relative, source.whose))
    return errors


@dataclass(frozen=True)
class Sides:
    """Sides of images for the proof, in pixels: the random one's, and smallest, step and largest of a file's."""

    random: int = 224
    least: int = 64
    step: int = 32
    """The detector would pad other sizes, and the source would not."""
    largest: int = 512


def sides(spec: BackboneSpec) -> Sides:
    """The windows of a Swin must divide the feature maps, with more than one a side: only then does Detectron2 shift
    them as timm does. A ViT accepts only one square size."""
    if only_in_timm(spec.arch) and is_swin(spec.arch):
        step = 32 * swin_shape(spec.arch).window_size
        return Sides(2 * step, 2 * step, step, max(2 * step, 512))
    only = only_size(spec)
    return Sides(only, only, only, only) if only else Sides()


def inputs(
    in_format: str, spec: BackboneSpec, image: Path | None = None, size: int = 0
) -> Iterable[tuple[str, Tensor, Tensor]]:
    """The same pixels for the detector and for the source, each in its own channel order: uint8, (3, H, W)."""
    source_order, size = spec.channel_order, size or sides(spec).random
    pixels = torch.randint(0, 256, (3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    yield "random", _in_order(pixels, in_format), _in_order(pixels, source_order)
    if image is not None:
        for_detector = torch.from_numpy(read_image(str(image), in_format).copy()).permute(2, 0, 1)
        crops = (_central_crop(pixels, sides(spec)) for pixels in (for_detector, _pixels_of(image)))
        yield image.name, next(crops), _in_order(next(crops), source_order)


def _pixels_of(image: Path) -> Tensor:
    """By Pillow alone, as a reference for Detectron2's reader."""
    try:
        with Image.open(image) as file:
            return pil_to_tensor(ImageOps.exif_transpose(file).convert("RGB"))
    except (OSError, ValueError) as error:
        reason = ImageInputError.of(image.name, error).reason
        raise InputError(f"cannot read the image {image} ({reason}): give a JPEG or PNG file") from None


def _central_crop(image: Tensor, sides: Sides) -> Tensor:
    if min(image.shape[1:]) < sides.least:
        found, least = f"{image.shape[2]}x{image.shape[1]}", sides.least
        raise InputError(f"the image has {found} pixels: give one of {least}x{least} or more")
    return center_crop(image, [min(side, sides.largest) // sides.step * sides.step for side in image.shape[1:]])


def _in_order(rgb: Tensor, order: str) -> Tensor:
    return rgb if order == "RGB" else rgb.flip(0)


def converted_backbone(name: str) -> Path:
    """The published backbone ``name`` in Detectron2's format, in the cache; made and proven at the first use."""
    source = zoo.fetch(name)
    path = zoo.cache_folder() / "detectron2" / f"{name}.pkl"
    note = path.with_name(f"{path.name}.sha256")
    if _is_made_of(path, note, sha256(source)):
        return path
    convert_file(read_published(name), path, prove=prove).check()
    write_text(note, sha256(path) + "\n")
    return path


def _is_made_of(path: Path, note: Path, source_sha256: str) -> bool:
    """Whether ``path`` is unchanged, from that source, and in this version of the format."""
    try:
        return note.read_text().strip() == sha256(path) and read_backbone(path)[1].source_sha256 == source_sha256
    except (OSError, InputError):
        return False


class RobustPathHandler(PathHandler):
    """Registers ``robust://NAME`` as a path for all of Detectron2."""

    def _get_supported_prefixes(self) -> list[str]:
        return [zoo.PREFIX]

    def _get_local_path(self, path: str, force: bool = False, **_: Any) -> str:
        return str(converted_backbone(path.removeprefix(zoo.PREFIX)))


PathManager.register_handler(RobustPathHandler(), allow_override=True)
