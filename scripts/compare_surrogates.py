"""Draw the training curves of surrogates beside each other, and print what they were trained with.

    for dar in code none; do
        python scripts/train_surrogate.py --method min-max-min --dar $dar --dataset ../shared/data/cifar10 \
            --test-split test --backbone resnet18 --output surrogates/dar-$dar.safetensors
    done
    python scripts/compare_surrogates.py surrogates/dar-code.safetensors surrogates/dar-none.safetensors \
        --output figure-1

With --test-split the curves have the surrogate's accuracy on clean test pictures: Figure 1 of the MMM paper, whose
claim is that the average-randomness constraint (DAR) holds it down. The folder holds curves.png, README.md (the
table that is printed) and curves.json.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from hf_unlearnable import Surrogate, report


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("surrogates", nargs="+", type=Path, help="files that train_surrogate.py made")
    parser.add_argument("--output", required=True, type=Path, help="folder to write to")
    arguments = parser.parse_args(argv)
    try:
        run(arguments.surrogates, arguments.output)
    except (ValueError, OSError, SafetensorError) as error:
        sys.exit(f"compare_surrogates.py: {error}")


def run(files: Sequence[Path], output: Path) -> None:
    names = [file.stem for file in files]
    if len(set(names)) < len(names):
        raise ValueError(f"expected files of different names, which become those of the curves, got {names}")
    known = {name: Surrogate.load(file) for name, file in zip(names, files, strict=True)}
    output.mkdir(parents=True, exist_ok=True)
    report.surrogate_curves(known, output / "curves.png")
    told = {name: facts(surrogate) for name, surrogate in known.items()}
    (output / "curves.json").write_text(json.dumps(told, indent=1) + "\n")
    page = table(told)
    (output / "README.md").write_text(page)
    print(page, end="")


def facts(surrogate: Surrogate) -> dict[str, Any]:
    """What a training was and what it noted, as JSON values; never its seed."""
    names = ("backbone", "steps", "seconds", "hardware", "versions", "data", "recipe", "curve")
    provenance = {name: surrogate.provenance[name] for name in names if name in surrogate.provenance}
    return {"method": surrogate.method, "settings": surrogate.settings, **provenance}


def table(told: Mapping[str, Mapping[str, Any]]) -> str:
    """One line a surrogate: the settings that differ, and every quantity at its last, least and largest."""
    settings = {name: {"method": one["method"], **one["settings"]} for name, one in told.items()}
    every = dict.fromkeys(key for one in settings.values() for key in one)
    differ = [key for key in every if len({json.dumps(one.get(key)) for one in settings.values()}) > 1]
    quantities = [
        key
        for key in dict.fromkeys(key for one in told.values() for point in one["curve"] for key in point)
        if key != "step"
    ]
    head = [
        "surrogate",
        *differ,
        "backbone",
        "rows",
        "steps",
        *(f"{name}: last (least, largest)" for name in quantities),
    ]
    lines = ["# Surrogates beside each other", "", "![curves](curves.png)", "", _line(head), "|" + "---|" * len(head)]
    for name, one in told.items():
        cells = [name, *(str(settings[name].get(key, "")) for key in differ)]
        cells += [one["backbone"], f"{one['data']['rows']:,}", f"{one['steps']:,}"]
        for quantity in quantities:
            values = [point[quantity] for point in one["curve"] if quantity in point]
            cells.append(f"{values[-1]:.3g} ({min(values):.3g}, {max(values):.3g})" if values else "not measured")
        lines.append(_line(cells))
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
