"""CUDA's theory as a picture: what the Bayes rule of blurred data is worth on clean data, blur by blur.

    python scripts/theory.py --output theory.png
    python scripts/theory.py --output theory.png --dimension 50 --mean 2 --points 41 --draws 50000

Two Gaussian classes N(y mu, I), y = -1 and +1; class y is blurred by T(d; a_y, 1, a_y) with a_y in [0, 1/2]. The left
panel is the clean accuracy of the blurred data's Bayes rule by Monte Carlo, the right one an upper bound on it
(theorem 2 of the paper, corrected: see `hf_unlearnable.theory`). Its Figure 3, redrawn: the paper's main text states
neither the dimension d nor the mean mu of that figure, so that the colours can be compared with it in kind only. Here
mu has equal coordinates and the norm --mean.

The figures lie beside the picture, in a JSON file of the same name: rows are a_-1, columns a_1.

Exit status: 0 finished, 1 error, 2 wrong command line, 130 interrupted.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.contour import QuadContourSet
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from hf_unlearnable import report
from hf_unlearnable.theory import Mixture, bayes_accuracy

LEVELS = [0.5 + 0.05 * i for i in range(11)]  # of the lines


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    try:
        run(arguments)
    except (ValueError, TypeError, OSError, ArithmeticError) as error:
        print(f"theory.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted")
        return 130
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output", required=True, type=Path, help="the picture, a .png; its figures go beside it")
    parser.add_argument("--dimension", type=int, default=10, help="d (default: 10)")
    parser.add_argument("--mean", type=float, default=1.0, help="the norm of mu (default: 1.0)")
    parser.add_argument("--points", type=int, default=26, help="blurs on each axis (default: 26)")
    parser.add_argument("--draws", type=int, default=20_000, help="clean points of each class (default: 20000)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")
    parser.add_argument("--progress", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> None:
    if arguments.output.suffix != ".png":
        raise ValueError(f"--output: expected the name of a .png, got {arguments.output}")
    if not arguments.output.parent.is_dir():
        raise ValueError(f"--output: there is no folder {arguments.output.parent}")
    for name, least in (("dimension", 1), ("points", 2), ("draws", 2), ("seed", 0)):
        if (value := getattr(arguments, name)) < least:
            raise ValueError(f"--{name}: expected at least {least}, got {value}")
    if not 0 < arguments.mean < math.inf:
        raise ValueError(f"--mean: expected a positive number, got {arguments.mean}")
    figures = compute(arguments)
    path = arguments.output.with_suffix(".json")
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(figures, allow_nan=False) + "\n")
    os.replace(partial, path)
    report.save(draw(figures), arguments.output)
    accuracy, bound = lowest(figures, "accuracy"), lowest(figures, "bound")
    print(f"clean Bayes rule: accuracy {figures['bayes_accuracy']:.4f}")
    print(f"blurred data's:   least accuracy {accuracy[0]:.4f} at a_-1 = {accuracy[1]:g}, a_1 = {accuracy[2]:g}")
    print(f"                  least bound    {bound[0]:.4f} at a_-1 = {bound[1]:g}, a_1 = {bound[2]:g}")
    print(f"see {arguments.output} and {path}")


def compute(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that the picture shows, as plain numbers."""
    mu = (arguments.mean / math.sqrt(arguments.dimension),) * arguments.dimension
    blurs = np.linspace(0, 0.5, arguments.points).tolist()
    names = ("accuracy", "accuracy_minus", "accuracy_plus", "standard_error", "bound")
    tables: dict[str, list[list[float]]] = {name: [] for name in names}
    with tqdm(total=len(blurs) ** 2, desc="mixtures", unit="mixture", disable=not arguments.progress) as bar:
        for minus in blurs:
            rows: list[tuple[float, ...]] = []
            for plus in blurs:
                mixture = Mixture(mu, a_minus=minus, a_plus=plus)
                found = mixture.accuracy(arguments.draws, arguments.seed)
                rows.append((found.mean, found.minus, found.plus, found.standard_error, mixture.bound()))
                bar.update()
            for name, values in zip(names, zip(*rows, strict=True), strict=True):
                tables[name].append(list(values))
    settings = {name: getattr(arguments, name) for name in ("dimension", "mean", "points", "draws", "seed")}
    return {"settings": settings, "bayes_accuracy": bayes_accuracy(mu), "blurs": blurs, **tables}


def lowest(figures: dict[str, Any], name: str) -> tuple[float, float, float]:
    blurs, values = figures["blurs"], figures[name]
    return min((value, blurs[i], blurs[j]) for i, row in enumerate(values) for j, value in enumerate(row))


def draw(figures: dict[str, Any]) -> Figure:
    """Two panels on one scale, from 1/2 (a coin) to 1."""
    settings, clean = figures["settings"], figures["bayes_accuracy"]
    figure = Figure(figsize=(10.5, 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(
        f"Bayes rule of blurred data, on clean data (the clean Bayes rule: accuracy {clean:.4f})", fontsize="large"
    )
    figure.supxlabel(
        f"d = {settings['dimension']}, mu with equal coordinates and norm {settings['mean']:g}; "
        f"{settings['draws']:,} draws a class, seed {settings['seed']}. "
        "The paper's main text states neither d nor mu of its Figure 3.",
        fontsize="small",
        color="0.35",
    )
    left, right = figure.subplots(1, 2, sharey=True)
    panel(left, figures, "accuracy", "clean accuracy (Monte Carlo)")
    colours = panel(right, figures, "bound", "upper bound on it (theorem 2, corrected)", mark=clean)
    left.set_ylabel("$a_1$, blur of class +1")
    bar = figure.colorbar(colours, ax=[left, right], ticks=LEVELS, pad=0.02)
    bar.ax.axhline(clean, color="white", linewidth=1.5, linestyle="--")
    bar.set_label("clean accuracy; dashed: of the clean Bayes rule")
    return figure


def panel(axes: Axes, figures: dict[str, Any], name: str, title: str, mark: float | None = None) -> ScalarMappable:
    """One table as coloured cells, a_-1 to the right and a_1 upwards, with contours on both sides of the diagonal.

    Equal blurs are a ridge of one cell's width, through which a contour between cells would mean nothing.
    """
    blurs = figures["blurs"]
    values = np.array(figures[name]).T
    cells = axes.pcolormesh(blurs, blurs, values, shading="nearest", vmin=0.5, vmax=1, cmap="viridis")
    beside = np.ma.array(values, mask=np.eye(len(blurs), dtype=bool))
    drawn = contours(axes, blurs, beside, LEVELS[1:-1], colors="black", linewidths=0.6, alpha=0.7)
    if drawn is not None:
        axes.clabel(drawn, fmt="%.2f", fontsize="x-small")
    if mark is not None:
        contours(axes, blurs, beside, [mark], colors="white", linewidths=1.5, linestyles="--")
    axes.set_title(title, fontsize="medium")
    axes.set(xlabel="$a_{-1}$, blur of class −1", aspect="equal")  # noqa: RUF001
    return cells


def contours(
    axes: Axes, blurs: list[float], values: np.ndarray, levels: list[float], **style: Any
) -> QuadContourSet | None:
    """Lines at those levels that the values reach; None where they reach none."""
    reached = [level for level in levels if values.min() < level < values.max()]
    return axes.contour(blurs, blurs, values, levels=reached, **style) if reached else None


if __name__ == "__main__":
    sys.exit(main())
