"""Pictures of an evaluation: heat map, curves, confusion matrices."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hf_unlearnable.evaluation.findings import Cell, attacker_of
from hf_unlearnable.evaluation.jobs import Outcome
from hf_unlearnable.report import save
from hf_unlearnable.result import Result


def heat_map(cells: Sequence[Cell], path: Path, *, title: str, chance: float) -> None:
    """Test accuracy of every attacker (columns) on every arm (rows), the most learnable arm at the top.

    Colours begin at chance; the highest figure of a row is bold.
    """
    attackers = list(dict.fromkeys(cell.attacker for cell in cells))
    by = {(cell.arm, cell.attacker): cell for cell in cells}
    worth: dict[str, float] = {}
    for cell in cells:
        if cell.selected:
            worth[cell.arm] = max(worth.get(cell.arm, 0.0), cell.selected.mean)
    arms = sorted(worth, key=lambda arm: -worth[arm])
    values = np.full((len(arms), len(attackers)), np.nan)
    for i, arm in enumerate(arms):
        for j, attacker in enumerate(attackers):
            found = by.get((arm, attacker))
            if found and found.selected:
                values[i, j] = 100 * found.selected.mean
    figure = Figure(figsize=(2.6 + 0.72 * len(attackers), 1.9 + 0.36 * len(arms)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    top = max(float(np.nanmax(values)), 100 * chance + 1)
    image = axes.imshow(values, cmap="viridis", vmin=100 * chance, vmax=top, aspect="auto")
    axes.set_xticks(range(len(attackers)), attackers, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(arms)), arms)
    middle = (100 * chance + top) / 2
    for i, j in np.argwhere(~np.isnan(values)):
        most = values[i, j] == np.nanmax(values[i])
        axes.text(
            j,
            i,
            f"{values[i, j]:.0f}",
            ha="center",
            va="center",
            fontsize=8,
            color="white" if values[i, j] < middle else "black",
            fontweight="bold" if most else "normal",
        )
    axes.set_title(title, fontsize="medium", loc="left")
    figure.colorbar(image, label="test accuracy, %")
    save(figure, path)


def curves(outcomes: Sequence[Outcome], path: Path, *, title: str) -> None:
    """Clean test accuracy over the training, one line an attacker: the mean of its trainings."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    groups: dict[str, list[Result]] = {}
    for outcome in outcomes:
        if outcome.result is not None:
            groups.setdefault(attacker_of(outcome), []).append(outcome.result)
    chance = None
    for number, (attacker, results) in enumerate(groups.items()):
        points = [[p.test_accuracy for p in r.curve if p.test_accuracy is not None] for r in results]
        epochs = [p.epoch for p in results[0].curve if p.test_accuracy is not None]
        length = min(len(epochs), *(len(found) for found in points))
        mean = np.mean([found[:length] for found in points], axis=0)
        style = ("-", "--", ":")[number // 10 % 3]
        axes.plot(epochs[:length], mean, style, color=f"C{number % 10}", marker=".", label=attacker)
        chance = results[0].chance
    if chance is not None:
        axes.axhline(chance, color="0.4", linestyle="--", linewidth=1, label=f"chance ({chance:.2f})")
    most = max((float(np.max(line.get_ydata())) for line in axes.get_lines()), default=1.0)
    axes.set(xlabel="epoch", ylabel="clean test accuracy", ylim=(0, 1.1 * most))
    axes.set_title(title, fontsize="medium", loc="left")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small", ncols=2)
    save(figure, path)


def confusions(shown: Sequence[tuple[str, Result]], path: Path, *, title: str) -> None:
    """Confusion matrices beside each other, every row in % of its true class."""
    figure = Figure(figsize=(5 * len(shown) + 0.5, 5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize="medium")
    for axes, (name, result) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        counts = np.asarray(result.confusion, dtype=float)
        share = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
        axes.imshow(share, cmap="Blues", vmin=0, vmax=100)
        places = range(len(result.classes))
        if len(result.classes) <= 20:
            axes.set_xticks(places, result.classes, rotation=60, ha="right", rotation_mode="anchor", fontsize=7)
            axes.set_yticks(places, result.classes, fontsize=7)
            for i in places:
                for j in places:
                    if share[i, j] >= 1:
                        colour = "white" if share[i, j] > 50 else "black"
                        axes.text(j, i, f"{share[i, j]:.0f}", ha="center", va="center", fontsize=6, color=colour)
        axes.set(xlabel="taken for", ylabel="is")
        axes.set_title(f"{name}: {100 * result.test_accuracy:.1f} % after the last step", fontsize="small")
    save(figure, path)
