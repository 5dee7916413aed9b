r"""Train a backbone adversarially, or normally at epsilon 0, on folders of images or WebDataset shards.

Examples:
    robust-backbones pretrain --recipe resnet50_l2_eps3 --data imagenet --output runs/r50_l2_eps3
    torchrun --nproc-per-node 8 -m robust_backbones pretrain --recipe wide_resnet50_4_l2_eps5 --micro-batch-size 32 \
        --data imagenet --output runs/wrn50_4_l2_eps5 --precision bf16
    robust-backbones pretrain --recipe resnet50_l2_eps3 --data imagenet --output runs/r50_l2_eps3 \
        --cluster.executor slurm --cluster.nodes 2 --cluster.partition gpu
    robust-backbones pretrain --arch convnext_tiny --start-from clean.safetensors --threat-model Linf:4/255 --epochs 5 \
        --data imagenet --output runs/convnext_tiny_linf4
    robust-backbones pretrain --recipe robust_fine_tuning --arch convnext_tiny --start-from clean.safetensors \
        --data imagenet --output runs/convnext_tiny_tuned

DATA/train and DATA/val hold one folder of images per class, or shards (*.tar). A recipe is that of a published backbone
(--list-recipes shows them); without one, the options' defaults are those of the paper's ResNet-50. OUTPUT gets
checkpoint.pt, best.pt, metrics.jsonl (a row per epoch), steps.jsonl, tensorboard/ and record.json; the same command
resumes an interrupted run. Exit status: 0 done, 1 the training failed, 2 bad input, 75 preempted (give the
command again). --debug shows tracebacks.
"""

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from robust_backbones import cpu
from robust_backbones.classification import recipes
from robust_backbones.classification.config import Execution
from robust_backbones.classification.pretrain import PretrainConfig, pretrain
from robust_backbones.commands import cli
from robust_backbones.errors import InputError
from robust_backbones.runs.cluster import ClusterConfig, log_folder, open_executor, scheduler_errors
from robust_backbones.runs.distributed import is_first_process


@dataclass
class PretrainOptions:
    data: Path
    """Folder that holds train/ and val/."""
    output: Path
    """Folder for this run's results."""
    start_from: Path | None = None
    """Checkpoint of --arch with the initial weights; without it they are random."""
    recipe: str = ""
    """Published backbone whose recipe gives the options' defaults, or robust_fine_tuning, for a clean network."""
    list_recipes: bool = False
    """Show the recipes with the ImageNet accuracy to expect, and stop."""
    config: Annotated[PretrainConfig, tyro.conf.arg(name="")] = field(default_factory=PretrainConfig)
    execution: Annotated[Execution, tyro.conf.arg(name="")] = field(default_factory=Execution)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)


@dataclass(frozen=True)
class PretrainJob:
    """One process's part in a submitted run; called by submitit, and again after an interruption."""

    config: PretrainConfig
    data: Path
    output: Path
    execution: Execution
    start_from: Path | None = None

    def __call__(self) -> dict[str, float | None]:
        import submitit

        if submitit.JobEnvironment().num_tasks > 1:
            # Each process keeps all GPUs in sight and takes the one of its local rank.
            submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        with cpu.fast(self.execution.device):
            return pretrain(self.config, self.data, self.output, self.execution, start_from=self.start_from).metrics

    def checkpoint(self) -> Any:
        """What to submit when the scheduler takes the machine away: the same job, which resumes."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def submit(job: PretrainJob, cluster: ClusterConfig) -> Any:
    """Hand ``job`` to the cluster; the submitit job has its ``job_id`` and ``result()``.

    Logs go to a folder beside the run's output, with ``_jobs`` after its name.
    """
    processes = cluster.processes
    executor = open_executor(
        cluster,
        log_folder(job.output),
        name=job.output.name,
        tasks=processes,
        gpus=processes if job.execution.device == "cuda" else 0,
        cpus_per_task=1 + job.execution.workers,
    )
    with scheduler_errors(cluster):
        return executor.submit(job)


def main(arguments: list[str]) -> int:
    if "--list-recipes" in arguments:
        print(recipes.table())
        return 0
    options = parse(arguments)
    if not options.data.is_dir():
        raise InputError(f"no data folder {options.data}: give one that holds train/ and val/")
    start = options.start_from
    if options.cluster != ClusterConfig() and not options.cluster.executor:
        raise InputError("--cluster options are of a run that is submitted: give --cluster.executor too")
    if options.cluster.executor:
        paths = (options.data.absolute(), options.output.absolute())
        job = PretrainJob(
            options.config, *paths, options.execution, start and (start.absolute() if start.exists() else start)
        )
        submitted = submit(job, options.cluster)
        print(f"submitted as job {submitted.job_id}; its logs are in {log_folder(job.output)}, its results will be in")
        print(options.output)
        return 0
    with cpu.fast(options.execution.device):
        record = pretrain(options.config, options.data, options.output, options.execution, start_from=start)
    if not is_first_process():
        return 0
    clean, robust = record.metrics["clean_accuracy"], record.metrics["robust_accuracy"]
    print(f"accuracy: clean {clean:.1f} %, robust {robust:.1f} % ({record.config['eval_threat_model']})")
    print(f"checkpoint and record written to {options.output}")
    return 0


def parse(arguments: list[str]) -> PretrainOptions:
    # The recipe's values come first: an option may fit them, and not the defaults.
    named = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    named.add_argument("--recipe", default="")
    name = named.parse_known_args(arguments)[0].recipe
    data: Any = tyro.MISSING
    default = PretrainOptions(data, data, config=recipes.recipe(name)) if name else None
    return cli.parse(PretrainOptions, arguments, description=__doc__, default=default)
