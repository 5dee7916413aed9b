import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from robust_backbones.classification.engine import Compute
Compute(torch.device("cpu"), keep_memory=sys.argv[1] == "keep")
torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(100):
    torch.ones(2**24)
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize() / 100 / 2**26)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="about glibc")
def test_freed_memory_is_used_again() -> None:
    """Of a tensor of 64 MB: the share whose pages the kernel has to bring again, when one before it was freed."""
    shares = {
        what: float(subprocess.run([sys.executable, "-c", FAULTS, what], capture_output=True, check=True).stdout)
        for what in ("give back", "keep")
    }
    assert shares["give back"] > 0.9
    assert shares["keep"] < 0.5
