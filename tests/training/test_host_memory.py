"""What is freed stays with the process: memory that comes again costs no page faults."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import torch
from megatron_stable.training.host_memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()

def step():
    held = [torch.ones(2**21) for _ in range(12)]  # 8 MB each
    while held:
        held.pop()

step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):  # later, this pattern costs none either way
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the switch is glibc's")
def test_steps_find_the_memory_of_those_before() -> None:
    faults = {}
    for how in ("keep", "leave"):
        done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
        faults[how] = int(done.stdout)
    assert faults["keep"] < faults["leave"] / 2
