"""Pictures from results."""

import os
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hf_unlearnable.result import Result
from hf_unlearnable.surrogate import Surrogate

COLOURS = {"train": "#0072B2", "validation": "#E69F00", "test": "#D55E00"}


def curves(result: Result, path: str | Path) -> None:
    """Draw the loss and the accuracies over the epochs, with the chance level, as a PNG."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(
        f"{result.backbone}, defense {result.defense['name']}, recipe {result.recipe.name}, seed {result.seed}: "
        f"test accuracy {result.test_accuracy:.4f} after the last step",
        fontsize="medium",
    )
    loss, accuracy = figure.subplots(1, 2)
    loss.plot(
        [point.epoch for point in result.curve],
        [point.train_loss for point in result.curve],
        color=COLOURS["train"],
        marker=_marker(len(result.curve)),
        markersize=4,
        label="training loss",
    )
    loss.set(xlabel="epoch", ylabel="loss", ylim=(0, 1.05 * max(point.train_loss for point in result.curve) or 1))
    for name, colour in COLOURS.items():
        known = [(p.epoch, value) for p in result.curve if (value := getattr(p, f"{name}_accuracy")) is not None]
        if known:
            rows = getattr(result, f"{name}_rows")
            label = f"{name} ({rows:,} rows{', augmented' if name == 'train' else ''})"
            accuracy.plot(
                *zip(*known, strict=True), color=colour, marker=_marker(len(known)), markersize=4, label=label
            )
    accuracy.axhline(result.chance, color="0.4", linestyle="--", linewidth=1, label=f"chance ({result.chance:.2f})")
    if result.best_epoch is not None:
        accuracy.axvline(result.best_epoch, color="0.7", linestyle=":", linewidth=1, label="best by validation")
    accuracy.set(xlabel="epoch", ylabel="accuracy", ylim=(0, 1.02))
    for axes in (loss, accuracy):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    save(figure, Path(path))


def surrogate_curves(surrogate: Surrogate, path: str | Path) -> None:
    """Draw what a surrogate's training noted, one panel a quantity, as a PNG."""
    points = surrogate.provenance["curve"]
    names = list(dict.fromkeys(name for point in points for name in point if name != "step"))
    figure = Figure(figsize=(5 * max(1, len(names)), 4), layout="constrained")
    FigureCanvasAgg(figure)
    known = surrogate.provenance
    figure.suptitle(
        f"{surrogate.method}: surrogate {known['backbone']}, {known['data']['rows']:,} rows, {known['steps']:,} steps",
        fontsize="medium",
    )
    for axes, name in zip(figure.subplots(1, max(1, len(names)), squeeze=False)[0], names, strict=False):
        found = [(point["step"], point[name]) for point in points if name in point]
        axes.plot(*zip(*found, strict=True), color=COLOURS["train"], marker=_marker(len(found)), markersize=4)
        axes.set(xlabel="step", ylabel=name)
        lowest, highest = min(value for _, value in found), max(value for _, value in found)
        axes.set_ylim(min(0, 1.05 * lowest), max(0, 1.05 * highest) or 1)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    save(figure, Path(path))


def save(figure: Figure, path: Path) -> None:
    """As a PNG, whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, dpi=120, format="png")
    os.replace(partial, path)


def _marker(points: int) -> str:
    return "o" if points <= 30 else ""
