"""What is freed stays with the process: memory that comes again costs no page faults."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PAGES = 8 * 2**20 // 4096  # of a tensor below; each would cost a fault
FAULTS = """
import resource
import torch
from megatron_stable.training.host_memory import keep_freed_memory
assert keep_freed_memory()

def step():
    held = [torch.ones(2**21) for _ in range(12)]  # 8 MB each
    while held:
        held.pop()

for _ in range(4):  # until the process has what it needs
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the switch is glibc's")
def test_steps_find_the_memory_of_those_before() -> None:
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 3 * 12 * PAGES / 10
