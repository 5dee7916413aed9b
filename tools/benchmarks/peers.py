"""The environment of the software that we measure ourselves against, beside our own."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from robust_backbones.errors import InputError

# eagerpy and requests are foolbox's; the rest is what `robustness` imports. All other requirements (torch, numpy) are
# those of our own environment, so that both sides run on the same PyTorch.
PEERS = ("robustness==1.2.1.post2", "torchattacks==3.5.1", "foolbox==3.3.4")
NEEDED = (
    "cox",
    "dill",
    "eagerpy",
    "gitpython",
    "pandas",
    "py3nvml",
    "requests",
    "seaborn",
    "scikit-learn",
    "tables",
    "tensorboardX",
)


def peers_python(folder: Path) -> Path:
    """The interpreter of the peers' environment in ``folder``, made at the first call.

    It sees our own environment's packages behind its own.

    Raises:
        InputError: the package index does not have them, or cannot be reached.
    """
    python = folder / "bin/python"
    done = folder / "installed.txt"
    wanted = "\n".join((*PEERS, *NEEDED))
    if done.exists() and done.read_text() == wanted:
        return python
    print(f"installing {', '.join(PEERS)} in {folder}", flush=True)
    try:
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        own = subprocess.run(
            [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        shared = sysconfig.get_path("purelib")
        (Path(own) / "robust_backbones_environment.pth").write_text(f"import site; site.addsitedir({shared!r})\n")
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *NEEDED], check=True)
        # Without what they ask for: old versions of what is here, and GPU tools.
        subprocess.run([*pip, "--no-deps", *PEERS], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise InputError(
            f"the peers cannot be installed in {folder} ({error}): mend that, or give --no-peers"
        ) from None
    done.write_text(wanted)
    return python


def without_cuda_calls() -> None:
    """Neutralise what `robustness` takes for granted: a GPU, and a module that torchvision no longer has."""
    import types

    import torch

    if not torch.cuda.is_available():
        torch.Tensor.cuda = lambda self, *_, **__: self
        torch.nn.Module.cuda = lambda self, *_, **__: self
    stub = types.ModuleType("torchvision.models.utils")
    stub.load_state_dict_from_url = torch.hub.load_state_dict_from_url
    sys.modules.setdefault("torchvision.models.utils", stub)
    os.environ.setdefault("MPLBACKEND", "agg")
