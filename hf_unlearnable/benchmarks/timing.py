"""Timing variants against each other, and what their ratios are compared with."""

import statistics
import time
from collections.abc import Callable

import torch

SEED = 7


def seconds(function: Callable[[], object]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def compare(
    variants: dict[str, Callable[[], object]], rows: dict[str, int], rounds: int
) -> dict[str, dict[str, float]]:
    """Pictures per second of every variant (best round), and the median ratio of its time a picture to the first's."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, function in variants.items():
            times[name].append(seconds(function) / rows[name])
    base = times[next(iter(variants))]
    return {
        name: {
            "pictures_per_second": 1 / min(spent),
            "time_over_first": statistics.median(a / b for a, b in zip(spent, base, strict=True)),
        }
        for name, spent in times.items()
    }


def in_steps(function: Callable[[], object], step: Callable[[], object], rounds: int, *, around: int = 5) -> float:
    """How many short steps a long call takes: the median over rounds, each against the median of steps timed right
    before and right after it, so that a machine that slows down meanwhile slows both."""
    ratios = []
    for _ in range(rounds):
        before = [seconds(step) for _ in range(around)]
        spent = seconds(function)
        after = [seconds(step) for _ in range(around)]
        ratios.append(spent / statistics.median(before + after))
    return statistics.median(ratios)


def beside(ratio: float, ideal: float | None) -> dict[str, float]:
    """A ratio, its ideal and how many times the ideal it is."""
    return {"plain_steps": ratio} | ({} if ideal is None else {"ideal": ideal, "over_ideal": ratio / ideal})


def wait(device: str) -> None:
    """Until the device has done what it was told."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
