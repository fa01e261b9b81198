"""What a result is obtained with: versions, hardware, and how this process holds its memory."""

import contextlib
import ctypes
import os
import platform
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator


def versions(*more: str) -> dict[str, str]:
    """The versions of Python, this library, the libraries below it that decide pixels, and `more` of them."""
    names = ("hf_unlearnable", "torch", "torchvision", "datasets", "pillow", "numpy", *more)
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def hardware(accelerator: Accelerator) -> dict[str, Any]:
    """What a training runs on: the name of the device, processes, threads of each, precision."""
    device = accelerator.device
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        lines: list[str] = []
        with contextlib.suppress(OSError):
            lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {
        "device": name,
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "precision": accelerator.mixed_precision,
    }


@cache
def keep_freed_memory() -> bool:
    """Keep what tensors leave free for the next ones, on a CPU and with glibc: whether that could be arranged.

    By itself glibc hands a large block back to the kernel, which must clear every page of the next one: with tensors
    of some megabytes and more, that is a good part of the time of a training step, or of a map of large pictures. It
    holds for the whole process, from the first training, gradient loop or map on a CPU on, and costs memory: what was
    in use at most is not given back. Where a variable of glibc's own is set (MALLOC_MMAP_THRESHOLD_, MALLOC_ARENA_MAX
    or another MALLOC_...), nothing is changed.
    """
    if platform.libc_ver()[0] != "glibc" or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    trim_threshold, mmap_max, most = -1, -4, 2**31 - 1  # of mallopt(3)
    libc = ctypes.CDLL(None)
    return libc.mallopt(mmap_max, 0) == 1 and libc.mallopt(trim_threshold, most) == 1
