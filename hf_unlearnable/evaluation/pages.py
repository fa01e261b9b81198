"""Tables of an evaluation: a summary with the worst first, markdown and CSV."""

import csv
import io
import math
from collections.abc import Sequence
from typing import Any

from hf_unlearnable.card import others, seen_at
from hf_unlearnable.evaluation.findings import Cell, Spread, Verdict

COLUMNS = ("last", "selected", "oracle")
EQUAL_STEPS = "erm, equal steps"


def percent(spread: Spread | None) -> str:
    """`63.3 ± 0.7` in %, with the standard error where there is one; `not measured`."""
    if spread is None:
        return "not measured"
    return f"{100 * spread.mean:.1f}" + ("" if spread.error is None else f" ± {100 * spread.error:.1f}")


def summary(verdicts: Sequence[Verdict], cells: Sequence[Cell], setting: dict[str, Any]) -> str:
    """All of it as markdown: what the best attacker learned from each dataset, the most learnable first."""
    told = sorted(verdicts, key=lambda v: -(v.learnability.mean if v.learnability else 2.0))
    lines = ["# What a trainer still learns", "", _sentence(setting), ""]
    lines += [
        "| protected with | best attacker | learned (test) | the same on clean rows | plain training "
        "| plain training on clean rows | chance | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    by = {(cell.arm, cell.attacker): cell for cell in cells}
    for one in told:
        plain = by.get((one.arm, "erm"))
        figures = [
            f"**{percent(one.learnability)}**",
            "not measured" if one.ceiling is None else f"{100 * one.ceiling:.1f}",
            percent(plain.selected if plain else None),
            "not measured" if one.clean is None else f"{100 * one.clean:.1f}",
            f"{100 * one.chance:.1f}",
        ]
        if one.refused:
            figures[0] = "refused"
        remarks = "; ".join((*(f"REFUSED: {why}" for why in one.refused), *one.notes))
        lines.append(f"| {one.arm} | {one.attacker or 'none'} | {' | '.join(figures)} | {remarks} |")
    lines += [
        "",
        "The best attacker is the one with the highest accuracy on clean validation rows, and its epoch the one",
        "with the best; the figure is its accuracy on test rows that chose nothing. So are the others in this table. ±",
        "is the standard error over poison keys and training seeds.",
        "",
    ]
    for one in verdicts:
        lines += _gains(one.arm, cells)
    for arm in dict.fromkeys(cell.arm for cell in cells):
        lines += [f"## {arm}", "", *_rows([cell for cell in cells if cell.arm == arm]), ""]
    return "\n".join(lines)


def _sentence(setting: dict[str, Any]) -> str:
    hardware, seeds = "; ".join(setting["hardware"]), ", ".join(map(str, setting["seeds"]))
    return (
        f"{setting['dataset']}: {setting['train_rows']:,} training rows, {setting['validation_rows']:,} clean rows to "
        f"choose on, {setting['test_rows']:,} clean test rows{seen_at(setting)}. Victims: {setting['backbone']}, "
        f"recipe {setting['recipe']} ({setting['epochs']}), training seeds {seeds}. {hardware}.{others(setting)}"
    )


def _rows(cells: Sequence[Cell]) -> list[str]:
    lines = [
        "| attacker | last epoch | epoch by validation | best on test (bound) | training rows | trainings | reported |",
        "|---|---|---|---|---|---|---|",
    ]
    for cell in sorted(cells, key=lambda c: -(c.selected.mean if c.selected else -1.0)):
        seen = cell.selected or cell.last
        counted = "" if seen is None else f"{seen.trainings} ({seen.poisons} key{'s' if seen.poisons > 1 else ''})"
        values = [percent(getattr(cell, name)) for name in COLUMNS]
        if cell.failed:
            counted += f" {len(cell.failed)} failed: {cell.failed[0][:120]}"
        paper = cell.reported
        told = "" if paper is None else f"{100 * paper['test_accuracy']:.2f} ({paper['setting']}; {paper['source']})"
        lines.append(f"| {cell.attacker} | {' | '.join(values)} | {percent(cell.train)} | {counted} | {told} |")
    return lines


def _gains(label: str, cells: Sequence[Cell]) -> list[str]:
    """What protected rows add to the clean ones beside them, at every share that was measured."""
    by = {(cell.arm, cell.attacker): cell.last for cell in cells}
    found = [arm.removeprefix(f"{label}, mix ") for arm, _ in by if arm.startswith(f"{label}, mix ")]
    if not found:
        return []
    lines = [
        f"## {label}: a share of the rows protected, the others clean",
        "",
        "| share protected | protected and clean | clean alone, equal epochs | clean alone, equal steps | gain |",
        "|---|---|---|---|---|",
    ]
    for share in sorted(found, key=float):
        rest = f"{label}, remainder {share}"
        mixed, alone, equal = by[f"{label}, mix {share}", "erm"], by.get((rest, "erm")), by.get((rest, EQUAL_STEPS))
        gain = "not measured"
        if mixed is not None and equal is not None:
            known = None not in (mixed.error, equal.error)
            doubt = f" ± {100 * math.hypot(mixed.error or 0, equal.error or 0):.1f}" if known else ""
            gain = f"{100 * (mixed.mean - equal.mean):+.1f}{doubt}"
        lines.append(f"| {share} | {percent(mixed)} | {percent(alone)} | {percent(equal)} | {gain} |")
    return [*lines, "", "Plain training, last epoch. Gain: against equal steps; not above 0: as if withheld.", ""]


def table(cells: Sequence[Cell]) -> str:
    """A CSV file: a line for every cell, accuracies as fractions."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    measures = (*COLUMNS, "validation", "train")
    writer.writerow(
        ["arm", "attacker"]
        + [f"{name}_{what}" for name in measures for what in ("mean", "standard_error")]
        + ["trainings", "poison_keys", "failed", "reported", "reported_source"]
    )
    for cell in cells:
        row: list[Any] = [cell.arm, cell.attacker]
        for name in measures:
            found: Spread | None = getattr(cell, name)
            row += ["", ""] if found is None else [f"{found.mean:.6f}", _number(found.error)]
        paper = cell.reported or {}
        seen = cell.last
        row += [seen.trainings if seen else 0, seen.poisons if seen else 0, len(cell.failed)]
        writer.writerow([*row, paper.get("test_accuracy", ""), paper.get("source", "")])
    return file.getvalue()


def matrix(cells: Sequence[Cell], column: str = "selected") -> str:
    """Arms against attackers as markdown, in %; the highest of a row is bold: what it is worth."""
    arms = list(dict.fromkeys(cell.arm for cell in cells))
    attackers = list(dict.fromkeys(cell.attacker for cell in cells))
    by = {(cell.arm, cell.attacker): cell for cell in cells}
    lines = [f"| | {' | '.join(attackers)} |", "|---|" + "---|" * len(attackers)]
    for arm in arms:
        found = [getattr(cell, column) if (cell := by.get((arm, name))) else None for name in attackers]
        most = max((spread.mean for spread in found if spread), default=None)
        shown = ["" if one is None else percent(one) for one in found]
        marked = [f"**{text}**" if one and one.mean == most else text for one, text in zip(found, shown, strict=True)]
        lines.append(f"| {arm} | {' | '.join(marked)} |")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6f}"
