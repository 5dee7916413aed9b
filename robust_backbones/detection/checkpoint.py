"""The checkpoint guard: no detector starts from a backbone that is not, tensor by tensor, the one it was given.

Detectron2 itself loads 0 of 265 backbone tensors, or a backbone with the wrong stride, channel order or pixel
scale, without an error.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.modeling.backbone.resnet import ResNet
from torch import nn

from robust_backbones.convert import BackboneMetadata, metadata_in
from robust_backbones.detection.published import PREFIX
from robust_backbones.errors import InputError
from robust_backbones.models import BackboneSpec
from robust_backbones.records import atomic_path
from robust_backbones.safe_files import METADATA, read_file

_METADATA = "backbone_metadata"
_HOW_TO_CONVERT = "convert it with `python tools/convert_backbone.py SRC DST.pkl --verify` and give the .pkl"


class BackboneCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer that accepts a file only if it fills the whole backbone and fits the configuration.

    Files are read without running code that they may hold. Checkpoints it saves carry the backbone's metadata on.
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
        """``whole_detector``: for evaluation; every tensor must come from the file, not the backbone's alone."""
        super().__init__(model, save_dir, **checkpointables)
        self.cfg = cfg
        self.whole_detector = whole_detector
        self.metadata: BackboneMetadata | None = None
        self._path = Path()

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load ``path``, or raise ``InputError`` saying what does not fit and how to mend it."""
        if path:
            path = self.path_manager.get_local_path(path) if path.startswith(PREFIX) else path
            self._path = Path(path)
            if not self._path.is_file():
                raise InputError(
                    f"no weights at {path}: check MODEL.WEIGHTS, or make them with tools/convert_backbone.py"
                )
        elif self.whole_detector:
            raise InputError("--eval-only needs a trained detector: give MODEL.WEIGHTS OUTPUT_DIR/model_final.pth")
        elif not self.cfg.MODEL.BACKBONE.FROM_SCRATCH:
            raise InputError(
                "MODEL.WEIGHTS is empty, so the backbone would be random: give a converted backbone, "
                "or MODEL.BACKBONE.FROM_SCRATCH True if random is what you want"
            )
        return super().load(path, *args, **kwargs)

    def save(self, name: str, **kwargs: Any) -> None:
        """Write ``name``.pth whole or not at all; fvcore's own ``save`` can leave half a file behind a kill."""
        if not self.save_dir or not self.save_to_disk:
            return
        content = {"model": self.model.state_dict(), **kwargs}
        content |= {key: checkpointable.state_dict() for key, checkpointable in self.checkpointables.items()}
        if self.metadata is not None:
            content[_METADATA] = self.metadata.to_dict()
        with atomic_path(Path(self.save_dir) / f"{name}.pth") as temporary:
            torch.save(content, temporary)
        self.tag_last_checkpoint(f"{name}.pth")

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        with atomic_path(Path(self.save_dir) / "last_checkpoint") as temporary:
            temporary.write_text(last_filename_basename)

    def _load_file(self, filename: str) -> dict[str, Any]:
        content = read_file(Path(filename))
        try:
            self.metadata = metadata_in(content)
        except InputError as error:
            raise InputError(f"{self._path}: {error}; {_HOW_TO_CONVERT}") from None
        if filename.endswith(".safetensors") and self.metadata is not None:
            tensors = {name: tensor for name, tensor in content.items() if name != METADATA}
            content = {"model": tensors, "matching_heuristics": True}
        if not (isinstance(content, dict) and isinstance(content.get("model"), dict)):
            raise InputError(f"{self._path} holds no Detectron2 weights: {_HOW_TO_CONVERT}")
        if self.metadata is None and not self.cfg.MODEL.BACKBONE.FROM_SCRATCH:
            raise InputError(f"{self._path} does not say what backbone it holds: {_HOW_TO_CONVERT}")
        return content

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        if self.metadata is not None:
            check_config(self.cfg, self.metadata.spec, self._path)
        in_file = dict(checkpoint["model"])
        incompatible = super()._load_model(checkpoint)
        names = backbone_tensors(self.model)
        state = self.model.state_dict()
        unfilled = [
            name
            for name, short_name in names.items()
            if not _equal(state[name], in_file.get(name, in_file.get(short_name)))
        ]
        if unfilled:
            raise InputError(
                f"{self._path} fills {len(names) - len(unfilled)} of the backbone's {len(names)} tensors "
                f"(not {_some(unfilled)}): {_HOW_TO_CONVERT}"
            )
        absent = [*incompatible.missing_keys, *(key for key, *_ in incompatible.incorrect_shapes)]
        if self.whole_detector and absent:
            raise InputError(
                f"{self._path} lacks {len(absent)} of the detector's tensors ({_some(absent)}): --eval-only needs a "
                "detector trained with this configuration, as OUTPUT_DIR/model_final.pth"
            )
        source = f" ({self.metadata.source}, threat model {self.metadata.threat_model})" if self.metadata else ""
        self.logger.info(
            f"backbone: {len(names)} of {len(names)} tensors filled from {self._path}{source}; "
            f"{len(absent)} tensors of the rest of the detector are new"
        )
        return incompatible

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        """Nothing: the same warning for a right and for a wrong backbone is what hid the wrong ones."""


def check_config(cfg: CfgNode, spec: BackboneSpec, path: Path) -> None:
    """Refuse a configuration that would feed or build the backbone otherwise than it was trained.

    Raises:
        InputError: naming each key that differs, and the overrides that mend it.
    """
    differing = {}
    for key, wanted in spec.detectron2_overrides().items():
        held = cfg
        for part in key.split("."):
            held = held[part]
        if not _agree(held, wanted):
            differing[key] = (held, wanted)
    if differing:
        found = ", ".join(f"{key} is {held}" for key, (held, _) in differing.items())
        mend = " ".join(f'{key} "{wanted}"' for key, (_, wanted) in differing.items())
        raise InputError(f"the configuration does not fit the backbone in {path} ({found}): add the overrides {mend}")


def backbone_tensors(model: nn.Module) -> dict[str, str]:
    """Each tensor that a backbone file must fill: its name in the detector -> its name in the file.

    These are the ResNet's (under whatever prefix the detector gives it) and, in C4 detectors, res5 in the ROI heads.
    Batch norm's counters are not part of a backbone.
    """
    prefixes = {f"{name}." if name else "": "" for name, module in model.named_modules() if isinstance(module, ResNet)}
    prefixes |= {f"{name}.": "res5." for name, _ in model.named_modules() if name.endswith("roi_heads.res5")}
    names = {}
    for name in model.state_dict():
        for prefix, short_prefix in prefixes.items():
            if name.startswith(prefix) and not name.endswith("num_batches_tracked"):
                names[name] = short_prefix + name.removeprefix(prefix)
    return names


def _agree(held: Any, wanted: Any) -> bool:
    if isinstance(wanted, (list, tuple)):
        # Published means and stds are rounded to a few decimals of 0-255 units.
        return len(held) == len(wanted) and all(
            math.isclose(a, b, abs_tol=0.01) for a, b in zip(held, wanted, strict=True)
        )
    return held == wanted


def _equal(loaded: torch.Tensor, stored: Any) -> bool:
    if isinstance(stored, np.ndarray):
        stored = torch.from_numpy(stored)
    return stored is not None and loaded.shape == stored.shape and torch.equal(loaded.cpu(), stored.to(loaded.dtype))


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
