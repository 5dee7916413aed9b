"""Importing, building a config and calling the library change nothing in the process that was not asked for."""

import subprocess
import sys

import pytest

WATCH = """
import atexit, logging, multiprocessing, os, random, resource, signal, sys, warnings
import cv2, numpy, torch, torchvision
from tqdm import tqdm
tqdm([])  # the first bar of a process starts tqdm's monitor, which has an exit handler

def state():
    return {
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads(), cv2.getNumThreads()),
        "random": (hash(random.getstate()), numpy.random.get_state()[1].sum(), torch.get_rng_state().sum().item()),
        "gradients": torch.is_grad_enabled(),
        "defaults": (torch.get_default_dtype(), torch.get_default_device(), torch.get_float32_matmul_precision()),
        "determinism": (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark),
        "mkldnn": torch.backends.mkldnn.enabled,
        "function modes": torch.overrides._get_current_function_mode(),
        "signals": [signal.getsignal(number) for number in (1, 2, 10, 13, 15, 17)],
        "exit handlers": atexit._ncallbacks(),
        "hooks": (sys.excepthook, sys.unraisablehook),
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "path": list(sys.path),
        "warnings": list(warnings.filters),
        "logging": (logging.root.level, list(logging.root.handlers)),
        "children": multiprocessing.active_children(),
        "convolution": (torch.conv2d, torch.nn.functional.conv2d, torch.nn.Conv2d.forward),
    }

def share_of_new_pages():
    '''Of a tensor of 64 MB: the share whose pages the kernel brings again after one before it was freed.'''
    torch.ones(2**24)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(2**24)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize() / 20 / 2**26

before = state()
"""

COMPARE = """
after = state()
changed = [name for name in before if before[name] != after[name]]
assert not changed, {name: (before[name], after[name]) for name in changed}
if sys.platform == "linux":
    assert share_of_new_pages() > 0.9, "mallopt: freed memory is kept"
"""

CALLS = """
from robust_backbones.attacks import AttackConfig, pgd
from robust_backbones.classification.compute import Compute
from robust_backbones.classification.engine import Learner, evaluate
from robust_backbones.classification.objectives import ObjectiveConfig
from robust_backbones.classification.pretrain import PretrainConfig
from robust_backbones.models import BackboneSpec, NormalizedModel, build_backbone
from robust_backbones.threat_models import ThreatModel
from robust_backbones.transfer.finetune import FinetuneConfig
PretrainConfig(), FinetuneConfig()
spec = BackboneSpec("resnet18", 3)
model = NormalizedModel(build_backbone(spec, seed=0), spec)
types, names = [type(module) for module in model.modules()], list(model.state_dict())
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
l2, attack, cpu = ThreatModel("L2", 1), AttackConfig(steps=1), Compute(torch.device("cpu"))
learner = Learner(model, optimizer, scheduler, ObjectiveConfig().build(attack), l2, cpu)
batch = [(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.tensor([0, 1]))]
learner.step(batch)
evaluate(model, batch, l2, attack, cpu)
assert types == [type(module) for module in model.modules()]
assert names == list(model.state_dict())
"""


@pytest.mark.slow
def test_nothing_changes_unasked() -> None:
    script = WATCH + CALLS + COMPARE
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
