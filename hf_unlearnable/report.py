"""Pictures from results."""

import os
from collections.abc import Mapping
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


def surrogate_curves(surrogates: Mapping[str, Surrogate], path: str | Path) -> None:
    """Draw what the trainings of surrogates noted, one panel a quantity, as a PNG; their names tell several apart."""
    points = {name: surrogate.provenance["curve"] for name, surrogate in surrogates.items()}
    quantities = dict.fromkeys(key for curve in points.values() for point in curve for key in point if key != "step")
    figure = Figure(figsize=(5 * max(1, len(quantities)), 4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle("\n".join(dict.fromkeys(map(_title, surrogates.values()))), fontsize="medium")
    panels = figure.subplots(1, max(1, len(quantities)), squeeze=False)[0]
    for axes, quantity in zip(panels, quantities, strict=False):
        shown: list[float] = []
        for i, (name, curve) in enumerate(points.items()):
            found = [(point["step"], point[quantity]) for point in curve if quantity in point]
            if found:
                colour = COLOURS["train"] if len(points) == 1 else f"C{i}"
                marker = _marker(len(found))
                axes.plot(*zip(*found, strict=True), color=colour, marker=marker, markersize=4, label=name)
                shown += [value for _, value in found]
        axes.set(xlabel="step", ylabel=quantity)
        axes.set_ylim(min(0, 1.05 * min(shown)), max(0, 1.05 * max(shown)) or 1)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    if len(points) > 1:
        panels[0].legend(fontsize="small")
    save(figure, Path(path))


def _title(surrogate: Surrogate) -> str:
    known = surrogate.provenance
    rows, steps = known["data"]["rows"], known["steps"]
    return f"{surrogate.method}: surrogate {known['backbone']}, {rows:,} rows, {steps:,} steps"


def save(figure: Figure, path: Path) -> None:
    """As a PNG, whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, dpi=120, format="png")
    os.replace(partial, path)


def _marker(points: int) -> str:
    return "o" if points <= 30 else ""
