"""What the papers claim, as data: measured beside reported, one small JSON file for each claim."""

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hf_unlearnable.evaluation.findings import Cell, Spread, cells
from hf_unlearnable.evaluation.jobs import Outcome
from hf_unlearnable.evaluation.pages import percent
from hf_unlearnable.reported import reported

SCHEMA = 1
SINGLE = 0.05
"""What single trainings may differ by without meaning anything."""


@dataclass(frozen=True, kw_only=True)
class Below:
    """The claim that `lower` is learned less than `higher`, each an (arm, attacker); arms are poisons, or "clean".

    Args:
        margin: by at least this much (a fraction), beyond the standard error of the difference.
    """

    lower: tuple[str, str]
    higher: tuple[str, str]
    margin: float = 0.0

    def words(self) -> str:
        """`em under erm lies below clean under erm by 10.0 points or more`."""
        least = f" by {100 * self.margin:.1f} points or more" if self.margin else ""
        return f"{self.lower[0]} under {self.lower[1]} lies below {self.higher[0]} under {self.higher[1]}{least}"


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A table or statement of a paper, settled before it is measured.

    Args:
        poisons: by the names of `scripts/compare.py`; attackers: of the suites.
        expects: what must come out in the same direction at any size.
    """

    name: str
    says: str
    source: str
    poisons: tuple[str, ...]
    attackers: tuple[str, ...]
    expects: tuple[Below, ...]


CLAIMS = {
    claim.name: claim
    for claim in (
        Claim(
            name="cuda-table-2",
            says="CUDA takes most of what plain training learns, and much of what adversarial training learns",
            source="CUDA Table 2, CIFAR-10 row",
            poisons=("cuda",),
            attackers=("erm", "at-4"),
            expects=(
                Below(lower=("cuda", "erm"), higher=("clean", "erm"), margin=0.2),
                Below(lower=("cuda", "at-4"), higher=("clean", "at-4")),
                Below(lower=("cuda", "erm"), higher=("cuda", "at-4")),
            ),
        ),
        Claim(
            name="mmm-table-3",
            says="MMM protects better than REM, under plain and under adversarial training",
            source="MMM Table 3, CIFAR-10 rows rho 0 and 4/255",
            poisons=("min-max-min", "robust-em"),
            attackers=("erm", "at-4"),
            expects=(
                Below(lower=("min-max-min", "erm"), higher=("robust-em", "erm")),
                Below(lower=("min-max-min", "at-4"), higher=("robust-em", "at-4")),
                Below(lower=("min-max-min", "at-4"), higher=("clean", "at-4")),
            ),
        ),
        Claim(
            name="ueraser-table-2",
            says="UEraser and UEraser-Lite undo EM, LSP and AR",
            source="UEraser Table 2, CIFAR-10",
            poisons=("em", "lsp", "ar"),
            attackers=("erm", "ueraser-lite", "ueraser"),
            expects=tuple(
                Below(lower=(poison, "erm"), higher=(poison, attacker), margin=0.1)
                for poison in ("em", "lsp", "ar")
                for attacker in ("ueraser-lite", "ueraser")
            ),
        ),
        Claim(
            name="rsk-ff-on-cuda",
            says="random sharpening and frequency filtering undo CUDA",
            source="RSK + FF, CIFAR-10",
            poisons=("cuda",),
            attackers=("erm", "rsk-ff"),
            expects=(Below(lower=("cuda", "erm"), higher=("cuda", "rsk-ff"), margin=0.1),),
        ),
        Claim(
            name="cuda-in-text",
            says="grayscale, mixup, cutout, cutmix and smoothing do not undo CUDA",
            source="CUDA section 5.2, CIFAR-10",
            poisons=("cuda",),
            attackers=("erm", "grayscale", "mixup", "cutout", "cutmix", "smoothing", "dat-3", "dat-5"),
            expects=tuple(
                Below(lower=("cuda", attacker), higher=("clean", "erm"), margin=0.1)
                for attacker in ("grayscale", "mixup", "cutout", "cutmix", "smoothing")
            ),
        ),
    )
}


def measured(claim: Claim, outcomes: Iterable[Outcome], setting: dict[str, Any]) -> dict[str, Any]:
    """A claim's record: every cell measured (last epoch) beside what the paper reports, and which directions hold.

    A direction holds if the difference exceeds its margin; it is "unclear" within one standard error of the margin, or
    within five points where single trainings are compared. What was not measured is None.

    Args:
        setting: command, scale, rows, recipe, hardware and versions, as JSON values.

    Raises:
        ValueError: no outcome belongs to the claim.
    """
    found = {(cell.arm, cell.attacker): cell for cell in cells(outcomes)}
    wanted = [(arm, attacker) for arm in ("clean", *claim.poisons) for attacker in claim.attackers]
    if not any(pair in found for pair in wanted):
        raise ValueError(f"{claim.name}: none of {wanted} was measured")
    return {
        "schema": SCHEMA,
        "claim": claim.name,
        "says": claim.says,
        "source": claim.source,
        "setting": setting,
        "cells": [_cell(arm, attacker, found.get((arm, attacker))) for arm, attacker in wanted],
        "expects": [_expectation(below, found) for below in claim.expects],
    }


def _cell(arm: str, attacker: str, cell: Cell | None) -> dict[str, Any]:
    last = cell.last if cell else None
    told = reported("cifar10", arm, attacker)
    return {
        "arm": arm,
        "attacker": attacker,
        "reported": told,
        "measured": asdict(last) if last else None,
        "failed": list(cell.failed) if cell else [],
    }


def _expectation(below: Below, found: dict[tuple[str, str], Cell]) -> dict[str, Any]:
    low, high = (found.get(pair) for pair in (below.lower, below.higher))
    if low is None or high is None or low.last is None or high.last is None:
        return {"says": below.words(), "difference": None, "error": None, "holds": None}
    difference = high.last.mean - low.last.mean
    errors = (low.last.error, high.last.error)
    error = math.hypot(*(e for e in errors if e is not None)) if any(e is not None for e in errors) else None
    holds: bool | str = difference > below.margin
    if abs(difference - below.margin) <= (SINGLE if error is None else error):
        holds = "unclear"
    return {"says": below.words(), "difference": difference, "error": error, "holds": holds}


def save(record: dict[str, Any], folder: Path) -> Path:
    """Write a claim's record as CLAIM-SCALE.json, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{record['claim']}-{record['setting']['scale']}.json"
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    os.replace(partial, path)
    return path


def page(records: Sequence[dict[str, Any]]) -> str:
    """All records as markdown."""
    lines = [
        "# What the papers claim, and what was measured here",
        "",
        "Test accuracy in % after the last epoch, mean and standard error over keys and training seeds. The papers'",
        "figures are for CIFAR-10 with ResNet-18 at full length: beside a small setting they are for comparing",
        "directions, not values. A direction is *unclear* within one standard error of its margin, or within five",
        "points where single trainings are compared.",
        "",
    ]
    for record in records:
        setting = record["setting"]
        lines += [
            f"## {record['claim']} ({setting['scale']})",
            "",
            f"{record['source']}: {record['says']}.",
            "",
            f"{setting['dataset']}, {setting['train_rows']:,} rows, {setting['backbone']}, recipe {setting['recipe']}; "
            f"{'; '.join(setting['hardware'])}. `{setting['command']}`",
            "",
            "| trained on | attacker | measured | keys, trainings | reported |",
            "|---|---|---|---|---|",
        ]
        for cell in record["cells"]:
            told, got = cell["reported"], cell["measured"]
            spread = Spread(**got) if got else None
            counted = f"{got['poisons']}, {got['trainings']}" if got else ""
            paper = f"{100 * told['test_accuracy']:.2f}" if told else ""
            lines.append(f"| {cell['arm']} | {cell['attacker']} | {percent(spread)} | {counted} | {paper} |")
        lines += ["", "| expected | difference, points | holds |", "|---|---|---|"]
        for one in record["expects"]:
            error = "" if one["error"] is None else f" ± {100 * one['error']:.1f}"
            difference = "not measured" if one["difference"] is None else f"{100 * one['difference']:.1f}{error}"
            holds = {True: "yes", False: "**no**", None: "not measured"}.get(one["holds"], one["holds"])
            lines.append(f"| {one['says']} | {difference} | {holds} |")
        lines.append("")
    return "\n".join(lines)
