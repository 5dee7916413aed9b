"""What adversarial training buys: two trainings of one budget, without and with an adversary."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from robust_backbones.analysis.figures import accuracy_curves
from robust_backbones.analysis.record_tables import robustness_table
from robust_backbones.attacks import AttackConfig
from robust_backbones.checkpoint.sources import read_checkpoint
from robust_backbones.classification.config import Execution
from robust_backbones.classification.pretrain import PretrainConfig, pretrain
from robust_backbones.classification.robustness import RobustnessConfig, evaluate_robustness
from robust_backbones.runs.files import atomic_path
from robust_backbones.threat_models import ThreatModel

THREAT_MODEL = ThreatModel("Linf", 8 / 255)
TRAINING = PretrainConfig(
    eval_threat_model=THREAT_MODEL,
    arch="resnet18",
    eval_attack=AttackConfig(steps=20, relative_step_size=0.25, random_start=True),
    epochs=4,
    batch_size=64,
    lr=0.1,
    schedule="one_cycle",
    weight_decay=5e-4,
    augmentation="padded_crop",
    image_size=32,
    val_resize=32,
    precision="bf16",
    eval_images=1000,
)


@dataclass(frozen=True, kw_only=True)
class Robustness:
    """Train with and without an adversary on one budget; a table and the curves of both."""

    data: Path
    """Folder that holds train/ and val/ with images of 32 px."""
    output: Path
    """Folder for both runs, table.md and curves.png."""
    epochs: int = TRAINING.epochs
    batch_size: int = TRAINING.batch_size
    stem: str = TRAINING.stem
    """cifar costs ten times the arithmetic of imagenet, and is what 32 px images deserve."""
    images: int = 2000
    """Validation images of the final measurement; the curves are on 1000."""
    seed: int = 0
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    workers: int = 1

    def measure(self) -> str:
        """The table; goes on where it was cut off."""
        execution = Execution(device=self.device, workers=self.workers)
        folders, records = {}, {}
        for name, trained_at in (("standard", ThreatModel()), ("robust", THREAT_MODEL)):
            print(f"== {name} training ({trained_at})", flush=True)
            folders[name] = self.output / name
            config = replace(
                TRAINING,
                threat_model=trained_at,
                epochs=self.epochs,
                batch_size=self.batch_size,
                stem=self.stem,
                seed=self.seed,
            )
            training = pretrain(config, self.data, folders[name], execution)
            evaluation = evaluate_robustness(
                RobustnessConfig(
                    THREAT_MODEL,
                    TRAINING.eval_attack,
                    autoattack=False,
                    limit=self.images,
                    image_size=32,
                    val_resize=32,
                ),
                read_checkpoint(folders[name] / "checkpoint.pt"),
                self.data / "val",
                self.output / f"{name}_evaluation",
                device=self.device,
                workers=self.workers,
            )
            records[name] = (training, evaluation)
        accuracy_curves(folders, self.output / "curves")
        table = robustness_table(records).to_markdown()
        with atomic_path(self.output / "table.md") as temporary:
            temporary.write_text(table + "\n")
        return table
