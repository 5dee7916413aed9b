"""One step of training as a configuration has it: the optimiser, the precision, and the images that are learnt from."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode
from detectron2.engine import AMPTrainer, SimpleTrainer
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from torch import nn

from robust_backbones.classification.compute import arithmetic
from robust_backbones.detection.adversarial import AttackedDetector, FreeStream
from robust_backbones.detection.checkpoint import backbone_tensors
from robust_backbones.detection.data_stream import TrainingStream


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Detectron2's, with SOLVER.OPTIMIZER and SOLVER.BACKBONE_MULTIPLIER."""
    solver, backbone = cfg.SOLVER, backbone_tensors(model)
    groups = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
        lr_factor_func=lambda name: solver.BACKBONE_MULTIPLIER if name in backbone else 1.0,
    )
    shared = {"lr": solver.BASE_LR, "weight_decay": solver.WEIGHT_DECAY, "foreach": True}
    if solver.OPTIMIZER == "AdamW":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, **shared)
    else:
        optimizer = torch.optim.SGD(groups, momentum=solver.MOMENTUM, nesterov=solver.NESTEROV, **shared)
    return maybe_add_gradient_clipping(cfg, optimizer)


def build_step(
    cfg: CfgNode, model: nn.Module, stream: TrainingStream, optimizer: torch.optim.Optimizer
) -> SimpleTrainer:
    """Detectron2's step, on the images that ADVERSARIAL makes of those in ``stream``."""
    batches = FreeStream(stream, cfg) if cfg.ADVERSARIAL.KIND == "free" else stream
    trained = AttackedDetector(model, cfg) if cfg.ADVERSARIAL.KIND == "pgd" else model
    if cfg.SOLVER.AMP.ENABLED and cfg.SOLVER.AMP.DTYPE == "float16":
        scaler = torch.amp.GradScaler(torch.device(cfg.MODEL.DEVICE).type)
        return AMPTrainer(trained, batches, optimizer, grad_scaler=scaler)
    return SimpleTrainer(trained, batches, optimizer)


def runs_in_bfloat16(cfg: CfgNode) -> bool:
    """Whether it is asked for, and this device multiplies in bfloat16 no slower than in float32."""
    wanted = cfg.SOLVER.AMP.ENABLED and cfg.SOLVER.AMP.DTYPE == "bfloat16"
    return wanted and arithmetic("bf16", torch.device(cfg.MODEL.DEVICE)) == torch.bfloat16
