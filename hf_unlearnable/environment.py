"""What a result was obtained with: versions and hardware."""

import contextlib
import platform
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
