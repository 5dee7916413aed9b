"""timm networks as Detectron2 backbones: the stages at strides 4 to 32 under a feature pyramid."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from robust_backbones.errors import InputError, check_choice
from robust_backbones.timm_models import STRIDES, build_stages, is_timm, keep_paths
from robust_backbones.transfer.networks import groups_of_timm

STAGES = ("res2", "res3", "res4", "res5")


class TimmBackbone(Backbone):
    """The stages of a convolutional timm network, with Detectron2's names: ``res2`` at stride 4 to ``res5`` at 32.

    Args:
        norm: type of its batch norms: ``FrozenBN``, ``BN`` or ``SyncBN``, as ``MODEL.RESNETS.NORM``.
        freeze_at: frozen stages, as ``MODEL.BACKBONE.FREEZE_AT``: 1 the stem, 2 ``res2`` too, up to 5.
        drop_path: as ``MODEL.BACKBONE.DROP_PATH``; frozen blocks are never dropped.
        recompute: as ``MODEL.BACKBONE.USE_ACT_CHECKPOINT``; not with trained batch norms, which would count each batch
            twice.

    Raises:
        InputError: another norm; timm has no such network, or it has no such stages; it cannot be recomputed.
    """

    def __init__(
        self,
        arch: str,
        *,
        norm: str = "FrozenBN",
        freeze_at: int = 0,
        drop_path: float = 0.0,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        from timm import layers

        check_choice("norm of a backbone of timm", norm, ("FrozenBN", "BN", "SyncBN"))
        if not is_timm(arch):
            raise InputError(f"timm has no network {arch!r}: give MODEL.BACKBONE.TIMM one of timm.list_models()")
        self.arch = arch
        self.network, self._indices = build_stages(arch, drop_path=drop_path)
        info: Any = self.network.feature_info
        channels = {one["reduction"]: one["num_chs"] for one in info}
        self._out_features = list(STAGES)
        self._out_feature_channels = {name: channels[stride] for name, stride in zip(STAGES, STRIDES, strict=True)}
        self._out_feature_strides = dict(zip(STAGES, STRIDES, strict=True))
        frozen = _first_groups(arch, self.network, freeze_at)
        for module in frozen:
            module.requires_grad_(False)
        keep_paths(self.network, frozen=True)
        for name, module in [*self.network.named_modules()]:
            if isinstance(module, _BatchNorm) and (norm == "FrozenBN" or module in frozen):
                self.network.set_submodule(name, layers.freeze_batch_norm_2d(module))
        if norm == "SyncBN":
            self.network = layers.convert_sync_batchnorm(self.network)
        if recompute:
            _recompute(arch, self.network)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Normalised images (N, 3, H, W), sides multiples of 32 -> stages (N, C, H / stride, W / stride) by name."""
        network: Any = self.network
        try:
            outputs = network.forward_intermediates(images, indices=[*self._indices], intermediates_only=True)
        except AssertionError:
            height, width = images.shape[-2:]
            raise InputError(
                f"timm's {self.arch} takes no images of {width}x{height} pixels, those of a detector have any sides "
                "that 32 divides: give another network"
            ) from None
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise InputError(
                f"batch norms of timm's {self.arch} see one number a channel and image, and a batch of one image has "
                "no statistics: give MODEL.RESNETS.NORM FrozenBN, or two images a process (SOLVER.IMS_PER_BATCH)"
            ) from None
        return dict(zip(STAGES, outputs, strict=True))


def _first_groups(arch: str, network: nn.Module, freeze_at: int) -> list[nn.Module]:
    try:
        return [module for group in (groups_of_timm(network) if freeze_at else [])[:freeze_at] for module in group]
    except StopIteration:
        raise InputError(
            f"timm does not tell where the stages of its {arch} begin: give MODEL.BACKBONE.FREEZE_AT 0"
        ) from None


def _recompute(arch: str, network: Any) -> None:
    """Make the blocks store only their inputs; InputError if they cannot, or if that would change the network."""
    if any(isinstance(module, _BatchNorm) for module in network.modules()):
        raise InputError(
            "MODEL.BACKBONE.USE_ACT_CHECKPOINT would have batch norms count each batch twice: give MODEL.RESNETS.NORM "
            "FrozenBN, or no recomputing"
        )
    try:
        network.set_grad_checkpointing(True)
    except (AttributeError, AssertionError, NotImplementedError):
        raise InputError(f"timm's {arch} recomputes nothing: give MODEL.BACKBONE.USE_ACT_CHECKPOINT False") from None


@BACKBONE_REGISTRY.register()
def build_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """``MODEL.BACKBONE.TIMM`` under a feature pyramid, p2 to p6, as ``build_resnet_fpn_backbone``."""
    network = TimmBackbone(cfg.MODEL.BACKBONE.TIMM, norm=cfg.MODEL.RESNETS.NORM, **options(cfg))
    return pyramid(network, cfg)


def options(cfg: CfgNode) -> dict[str, Any]:
    """The backbone options in the configuration, as arguments of ``TimmBackbone`` and ``SwinBackbone``."""
    asked = cfg.MODEL.BACKBONE
    return {"freeze_at": asked.FREEZE_AT, "drop_path": asked.DROP_PATH, "recompute": asked.USE_ACT_CHECKPOINT}


def pyramid(bottom_up: Backbone, cfg: CfgNode) -> FPN:
    """Levels p2 to p6 on the stages of a backbone, by the configuration's MODEL.FPN."""
    return FPN(
        bottom_up=bottom_up,
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=LastLevelMaxPool(),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
