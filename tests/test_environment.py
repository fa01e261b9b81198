"""What a process is told about its surroundings, and how it holds its memory."""

import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import os, resource, sys, torch
from hf_unlearnable.environment import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory() == (not any(name.startswith("MALLOC_") for name in os.environ))
def work():
    for _ in range(20):
        torch.ones(16_000_000)
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's: elsewhere nothing is changed")
def test_memory_that_was_freed_is_used_again() -> None:
    """Counted in pages of 4 kB that the kernel had to hand out for 20 tensors of 64 MB, one after the other."""

    def faults(how: str, **more: str) -> int:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")} | more
        command = [sys.executable, "-c", FAULTS, how]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
        return int(done.stdout)

    assert faults("keep") < 100
    assert faults("leave") > 5000
    assert faults("keep", MALLOC_ARENA_MAX="2") > 5000, "who settles malloc's ways is not overruled"
