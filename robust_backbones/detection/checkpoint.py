"""The checkpoint guard: no detector starts from a backbone that is not, tensor by tensor, the one it was given.

Detectron2 loads 0 of 265 tensors, or a backbone with another stride, channel order or pixel scale, without an error.
"""

from __future__ import annotations

import math
import re
import shlex
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.modeling.backbone.resnet import ResNet
from detectron2.modeling.backbone.vit import ViT
from detectron2.utils import comm
from torch import Tensor, nn

from robust_backbones.checkpoint.convert import REST, BackboneMetadata, apart, convert, metadata_in
from robust_backbones.checkpoint.format import save_tensors, sha256
from robust_backbones.checkpoint.hub import is_repository
from robust_backbones.checkpoint.mistaken import refuse_mistaken
from robust_backbones.checkpoint.sources import HUB, read_checkpoint
from robust_backbones.checkpoint.untrusted import METADATA, read_file
from robust_backbones.checkpoint.urls import as_url, fetch_url
from robust_backbones.checkpoint.zoo import PREFIX
from robust_backbones.configs import as_arguments
from robust_backbones.detection.swin_backbone import SwinBackbone, resized_biases
from robust_backbones.detection.timm_backbone import TimmBackbone
from robust_backbones.errors import InputError, plural
from robust_backbones.models import BackboneSpec
from robust_backbones.runs.files import write_text
from robust_backbones.runs.identity import flat

_METADATA = "backbone_metadata"
_UNFILLED = "unfilled_backbone_tensors"
_INTERPOLATED = "interpolated_backbone_tensors"
_UNVERIFIED = "unverified_detector"
# These use the file's four tensors as they are; with GN or LN the shapes fit too, and the features are others.
_BATCH_NORMS = ("FrozenBN", "SyncBN", "BN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N")
_IN_FOLDERS = ("model_final.pth", "backbone.pkl", "checkpoint.pt")
_COUNTERS = r"num_batches_tracked$"
_NO_WEIGHTS = ("num_batches_tracked", "relative_position_index")
_NETWORKS: dict[type[nn.Module], tuple[str, str]] = {
    ResNet: ("", _COUNTERS),
    TimmBackbone: ("network.", _COUNTERS),
    SwinBackbone: ("", r"^norm\d\.|relative_position_index$"),  # the norms after stages
    ViT: ("", r"rel_pos_[hw]$"),
}
"""Class of a backbone -> the prefix of the names in files, and the tensors that no source has."""
_AGAIN = "convert its source again with `robust-backbones convert SRC DST.pkl` and give the .pkl"


class BackboneCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer that accepts a file only if it fills the whole backbone and fits the configuration.

    Reading runs no code from a file; saved files keep the backbone's metadata.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        cfg: CfgNode,
        whole_detector: bool = False,
        **checkpointables: Any,
    ) -> None:
        """``whole_detector``: for evaluation; every tensor must come from the file, not only the backbone's."""
        super().__init__(model, save_dir, **checkpointables)
        self.cfg = cfg
        self.whole_detector = whole_detector
        self.metadata: BackboneMetadata | None = None
        self.unfilled: list[str] = []
        """Backbone tensors that no file filled, allowed by MODEL.BACKBONE.ALLOW_PARTIAL; they are random."""
        self.rest: dict[str, Tensor] = {}
        """What the backbone's file has besides its tensors (``convert.rest_of``), for the saved files."""
        self.interpolated: list[str] = []
        """Backbone tensors that were interpolated to MODEL.SWIN.WINDOW_SIZE; they are not proven."""
        self.unverified: dict[str, str] | None = None
        """The plain detector allowed by MODEL.ALLOW_UNVERIFIED: its ``source`` and ``source_sha256``."""
        self._path = Path()

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load ``path``, or raise ``InputError`` that says what does not fit and how to fix it."""
        if path:
            self._path = self._file_of(path)
        elif self.whole_detector:
            raise InputError("a trained detector is needed here: give MODEL.WEIGHTS OUTPUT_DIR/model_final.pth")
        elif not self.cfg.MODEL.BACKBONE.FROM_SCRATCH:
            raise InputError(
                "MODEL.WEIGHTS is empty, so the backbone would be random: give a converted backbone, "
                "or MODEL.BACKBONE.FROM_SCRATCH True if random is what you want"
            )
        return super().load(str(self._path) if path else "", *args, **kwargs)

    def _file_of(self, weights: str) -> Path:
        """The file that MODEL.WEIGHTS names, downloaded if it is a URL or a published backbone."""
        if weights.startswith(PREFIX):
            return Path(self.path_manager.get_local_path(weights))
        if weights.startswith(HUB):
            name = weights.removeprefix(HUB)
            if is_repository(name):
                raise InputError(f"{weights} is a repository: {_how_to_convert(weights)}")
            raise InputError(f"{weights} is a name for the converter: give MODEL.WEIGHTS {PREFIX}{name}")
        path = fetch_url(url) if (url := as_url(weights)) else Path(weights)
        if path.is_dir():
            for name in _IN_FOLDERS:
                if (path / name).is_file():
                    raise InputError(f"{path} is a folder: give MODEL.WEIGHTS {path / name}")
            refuse_mistaken(path)
        if not path.is_file():
            raise InputError(f"no weights at {path}: check MODEL.WEIGHTS, or make them with `robust-backbones convert`")
        return path

    def save(self, name: str, *, model: nn.Module | None = None, resumable: bool = True, **content: Any) -> None:
        """Write ``name``.pth atomically, with further entries ``content``.

        Args:
            model: the model to save instead of the trained one, such as its average.
            resumable: write the optimiser's and the trainer's state too, and make it the last checkpoint.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        content = {"model": (model or self.model).state_dict(), **content}
        if self.metadata is not None:
            content[_METADATA] = self.metadata.to_dict()
        kept = {REST: self.rest, _UNFILLED: self.unfilled, _INTERPOLATED: self.interpolated}
        content |= {key: value for key, value in {**kept, _UNVERIFIED: self.unverified}.items() if value}
        if resumable:
            content |= {key: checkpointable.state_dict() for key, checkpointable in self.checkpointables.items()}
        save_tensors(Path(self.save_dir) / f"{name}.pth", content)
        if resumable:
            self.tag_last_checkpoint(f"{name}.pth")

    def provenance(self) -> tuple[dict[str, Any], str | None]:
        """What records say about the backbone, and its threat model; None if its source did not say."""
        backbone: dict[str, Any] = {"unfilled_tensors": self.unfilled} if self.unfilled else {}
        backbone |= {"interpolated_tensors": self.interpolated} if self.interpolated else {}
        backbone |= {_UNVERIFIED: self.unverified} if self.unverified else {}
        if self.metadata is None:
            return backbone, None
        origin = {"source": self.metadata.source, "source_sha256": self.metadata.source_sha256}
        return {**self.metadata.spec.to_dict(), **origin, **backbone}, self.metadata.threat_model

    def has_checkpoint(self) -> bool:
        return bool(self.get_checkpoint_file())

    def get_checkpoint_file(self) -> str:
        """The one that the main process sees: another may see the folder later."""
        return str(comm.all_gather(str(newest_checkpoint(Path(self.save_dir)) or ""))[0])

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        write_text(Path(self.save_dir) / "last_checkpoint", last_filename_basename)

    def _load_file(self, filename: str) -> dict[str, Any]:
        content = read_file(Path(filename))
        try:
            self.metadata = metadata_in(content)
        except InputError as error:
            raise InputError(f"{self._path}: {error}; {_AGAIN}") from None
        if filename.endswith(".safetensors") and self.metadata is not None:
            tensors, rest = apart(content)
            tensors.pop(METADATA, None)
            content = {"model": tensors, "matching_heuristics": True, REST: rest}
        if isinstance(content, dict) and content and all(isinstance(value, Tensor) for value in content.values()):
            content = {"model": content}  # a state_dict() alone
        if self.metadata is None and _is_caffe2(content):
            checkpoint = read_checkpoint(self._path)
            tensors, report = convert(checkpoint)
            report.check()
            self.metadata = BackboneMetadata.of(checkpoint)
            assumed = ", ".join(f"{key} {value}" for key, value in checkpoint.spec.detectron2_overrides().items())
            self.logger.warning(f"{self._path} does not say how it was fed; assumed is its makers' way: {assumed}")
            content = {"model": tensors, "matching_heuristics": True}
        if not (isinstance(content, dict) and isinstance(content.get("model"), dict)):
            raise InputError(f"{self._path} holds no Detectron2 weights: {_how_to_convert(self._path)}")
        self.unfilled = list(content.pop(_UNFILLED, []))
        self.interpolated = list(content.pop(_INTERPOLATED, []))
        self.rest = content.pop(REST, {})
        self.unverified = content.pop(_UNVERIFIED, None)
        if self.metadata is None and not self.cfg.MODEL.BACKBONE.FROM_SCRATCH:
            self._check_unverified(content["model"])
        return content

    def _check_unverified(self, tensors: dict[str, Any]) -> None:
        """Note a detector of plain Detectron2; InputError unless it is one and is allowed."""
        rest = [name for name in tensors if not name.startswith(("backbone.", "pixel_"))]
        if not rest or len(rest) == len(tensors):
            raise InputError(f"{self._path} does not say what backbone it holds: {_how_to_convert(self._path)}")
        feeding = "the configuration's PIXEL_MEAN, PIXEL_STD and INPUT.FORMAT"
        if not self.cfg.MODEL.ALLOW_UNVERIFIED:
            raise InputError(
                f"{self._path} is a detector that does not name its backbone: give --allow-unverified-detector "
                f"(MODEL.ALLOW_UNVERIFIED True) if {feeding} are those that it was trained with"
            )
        self.unverified = self.unverified or {"source": self._path.name, "source_sha256": sha256(self._path)}
        self.logger.warning(f"{self._path} is an unverified detector: nothing shows that {feeding} are its own")

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        if self.metadata is not None:
            check_config(self.cfg, self.metadata.spec, self._path)
        if self.cfg.MODEL.SWIN.WINDOW_SIZE and (resized := resized_biases(checkpoint["model"], self.model)):
            checkpoint["model"] = {**checkpoint["model"], **resized}
            self.interpolated = sorted(resized)
            self.logger.warning(
                f"{self._path}: interpolated to MODEL.SWIN.WINDOW_SIZE {self.cfg.MODEL.SWIN.WINDOW_SIZE} as timm does: "
                f"{plural(len(resized), 'table')} of relative position biases; what that changes is not proven"
            )
        in_file = dict(checkpoint["model"])
        incompatible = super()._load_model(checkpoint)
        names, state = backbone_tensors(self.model), self.model.state_dict()
        unfilled = []
        for name, short_name in names.items():
            stored = in_file.get(name, in_file.get(short_name))
            if stored is None or not torch.equal(state[name].cpu(), stored.to(state[name].dtype)):
                unfilled.append(name)
        filled = f"{len(names) - len(unfilled)} of the backbone's {len(names)} tensors"
        if unfilled and not (self.cfg.MODEL.BACKBONE.ALLOW_PARTIAL and len(unfilled) < len(names)):
            mend = _how_to_convert(self._path) if self.metadata is None else _AGAIN
            raise InputError(
                f"{self._path} fills {filled} (not {_some(unfilled)}): {mend}"
                + (", or --allow-partial-backbone to leave the rest random" if len(unfilled) < len(names) else "")
            )
        if unfilled:
            self.unfilled = unfilled
            self.logger.warning(f"{self._path} fills only {filled}; random, as allowed: {', '.join(unfilled)}")
        unknown = [
            name
            for name in incompatible.unexpected_keys
            if name.startswith("backbone.") and not name.endswith(_NO_WEIGHTS)
        ]
        if unknown and not self.cfg.MODEL.BACKBONE.ALLOW_PARTIAL:
            raise InputError(
                f"{self._path} holds {plural(len(unknown), 'tensor')} of a backbone that the configuration's does not "
                f"have ({_some(unknown)}): give the configuration that it was trained with, as config.yaml beside it"
            )
        absent = [*incompatible.missing_keys, *(key for key, *_ in incompatible.incorrect_shapes)]
        if self.whole_detector and absent:
            raise InputError(
                f"{self._path} lacks {len(absent)} of the detector's tensors ({_some(absent)}): give a detector that "
                "was trained with this configuration, such as OUTPUT_DIR/model_final.pth"
            )
        source = f" ({self.metadata.source}, threat model {self.metadata.threat_model})" if self.metadata else ""
        self.logger.info(
            f"backbone: {len(names) - len(unfilled)} of {len(names)} tensors filled from {self._path}{source}; "
            f"new in the rest of the detector: {plural(len(absent), 'tensor')}"
        )
        return incompatible

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        """Logs nothing: Detectron2 has the same warning for right and wrong backbones, which hid the wrong ones."""


def _how_to_convert(source: str | Path) -> str:
    return f"convert it with `robust-backbones convert {shlex.quote(str(source))} DST.pkl` and give the .pkl"


def _is_caffe2(content: Any) -> bool:
    """Whether a file is from Detectron's zoo, whose networks all have the same preprocessing and architecture."""
    places = (content, content.get("model"), content.get("blobs")) if isinstance(content, dict) else ()
    return any(isinstance(names, dict) and "res2_0_branch2a_w" in names for names in places)


def check_config(cfg: CfgNode, spec: BackboneSpec, path: Path) -> None:
    """Raise InputError, with the overrides that fix it, if ``cfg`` has another preprocessing or architecture."""
    held = flat(cfg)
    wanted = {**spec.detectron2_overrides(), "MODEL.RESNETS.STEM_OUT_CHANNELS": 64}
    differing = {key: value for key, value in wanted.items() if not _agree(held[key], value)}
    if cfg.MODEL.RESNETS.NORM not in _BATCH_NORMS:
        differing["MODEL.RESNETS.NORM"] = "FrozenBN"
    if differing:
        found = ", ".join(f"{key} is {held[key]}" for key in differing)
        raise InputError(
            f"the configuration does not fit the backbone in {path} ({found}): add the overrides "
            f"{as_arguments(differing)}"
        )


def newest_checkpoint(folder: Path) -> Path | None:
    """The training checkpoint to resume from: the one in ``last_checkpoint`` if it exists, else the latest one."""
    note = folder / "last_checkpoint"
    if note.is_file() and (named := folder / note.read_text().strip()).is_file():
        return named
    # model_final sorts after model_0000099, which is when it was written.
    return max(folder.glob("model_[0-9f]*.pth"), default=None)


def backbone_tensors(model: nn.Module) -> dict[str, str]:
    """Each tensor that a backbone file must fill: its name in the detector -> its name in the file.

    Those of the network and, in C4 detectors, of res5 in the ROI heads; without those that no source has
    (``_NETWORKS``).
    """
    prefixes = {
        (f"{name}." if name else "") + inner: ("", absent)
        for name, module in model.named_modules()
        for kind, (inner, absent) in _NETWORKS.items()
        if isinstance(module, kind)
    }
    prefixes |= {
        f"{name}.": ("res5.", _COUNTERS) for name, _ in model.named_modules() if name.endswith("roi_heads.res5")
    }
    return {
        name: before + own
        for name in model.state_dict()
        for prefix, (before, absent) in prefixes.items()
        if name.startswith(prefix) and not re.search(absent, own := name.removeprefix(prefix))
    }


def _agree(held: Any, wanted: Any) -> bool:
    if isinstance(wanted, (list, tuple)):
        # Published means and stds are rounded to a few decimals of 0-255 units.
        return len(held) == len(wanted) and all(
            math.isclose(a, b, abs_tol=0.01) for a, b in zip(held, wanted, strict=True)
        )
    return held == wanted


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
