"""What a process is told about its surroundings, and how it holds its memory."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from hf_unlearnable.environment import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def work():
    for _ in range(20):
        torch.ones(16_000_000)
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone is told so")
def test_memory_that_was_freed_is_used_again() -> None:
    """Counted in pages of 4 kB that the kernel had to hand out for 20 tensors of 64 MB, one after the other."""

    def faults(how: str) -> int:
        command = [sys.executable, "-c", FAULTS, how]
        return int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout)

    assert faults("keep") < 100
    assert faults("leave") > 5000
