"""What the outcomes of an evaluation say: the attacker chosen on validation, spreads over both seeds, guards."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from hf_unlearnable.evaluation.jobs import Outcome
from hf_unlearnable.result import Result

CONTROL_LOSS = 0.02
CHANCE_MARGIN = 0.03


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A mean over poison seeds and training seeds.

    Args:
        mean: of all trainings.
        error: standard error of the mean over both kinds of seeds; None for a single training.
        poisons, trainings: how many of each.
        least, most: of single trainings.
    """

    mean: float
    error: float | None
    poisons: int
    trainings: int
    least: float
    most: float


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One attacker on one arm. Accuracies are fractions of clean test rows.

    Args:
        last: after the last step: a trainer without clean pictures.
        selected: at the epoch that clean validation rows chose.
        oracle: the best epoch on the test rows themselves: a bound that no trainer can choose.
        validation: best validation accuracy, what attackers are chosen by.
        train: accuracy on the training rows, as the defense showed them; None where it showed none.
        failed: errors of the trainings that gave no result.
    """

    arm: str
    attacker: str
    last: Spread | None
    selected: Spread | None
    oracle: Spread | None
    validation: Spread | None
    train: Spread | None
    failed: tuple[str, ...] = ()
    reported: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What is claimed about one protected dataset: what the best of all attackers learned from it.

    Args:
        attacker: the one with the best validation accuracy.
        learnability: its test accuracy at the epochs that validation chose.
        ceiling: the same attacker's on clean rows; `clean`: that of plain training on clean rows.
        normalized: (learnability - chance) / (ceiling - chance).
        refused: the guards that failed; where there are any, nothing is claimed.
        notes: what else must be said beside the figure.
    """

    arm: str
    attacker: str | None
    learnability: Spread | None
    ceiling: float | None
    clean: float | None
    chance: float
    normalized: float | None
    refused: tuple[str, ...]
    notes: tuple[str, ...]


def spread(grid: dict[int, list[float]]) -> Spread:
    """The mean over {poison seed: values of its training seeds}, and its standard error.

        s2_train = mean_p var_t,   s2_poison = max(0, var_p(mean_t) - s2_train / T)
        SE = sqrt(s2_poison / P + s2_train / (P T))

    With one training for each poison, SE = sqrt(var_p / P): the two kinds cannot be told apart.

    Source: METHODS_NEW P3. Deviations: T is the harmonic mean of unequal numbers of trainings.
    """
    values = [value for found in grid.values() for value in found]
    mean, poisons = statistics.fmean(values), len(grid)
    inner = [statistics.variance(found) for found in grid.values() if len(found) > 1]
    per = statistics.harmonic_mean([len(found) for found in grid.values()])
    error = None
    if len(values) > 1:
        train = statistics.fmean(inner) if inner else 0.0
        means = [statistics.fmean(found) for found in grid.values()]
        between = max(0.0, statistics.variance(means) - train / per) if poisons > 1 else 0.0
        error = math.sqrt(between / poisons + train / (poisons * per))
    return Spread(mean=mean, error=error, poisons=poisons, trainings=len(values), least=min(values), most=max(values))


def cells(outcomes: Iterable[Outcome]) -> list[Cell]:
    """One for every attacker on every arm, in the order of the outcomes."""
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault((arm_of(outcome), attacker_of(outcome)), []).append(outcome)
    return [_cell(arm, attacker, group) for (arm, attacker), group in groups.items()]


def arm_of(outcome: Outcome) -> str:
    """How the arm is called in tables."""
    arm = outcome.job["arm"]
    if arm["kind"] in ("mix", "remainder"):
        return f"{arm['label']}, {arm['kind']} {arm['fraction']:g}"
    return arm["label"]


def attacker_of(outcome: Outcome) -> str:
    """How the attacker is called in tables."""
    return outcome.job["attacker"]["name"] + ("" if outcome.job["steps"] is None else ", equal steps")


def _cell(arm: str, attacker: str, group: Sequence[Outcome]) -> Cell:
    def over(value: Any) -> Spread | None:
        grid: dict[int, list[float]] = {}
        for outcome in group:
            found = None if outcome.result is None else value(outcome.result)
            if found is not None:
                grid.setdefault(outcome.job["arm"]["number"], []).append(found)
        return spread(grid) if grid else None

    return Cell(
        arm=arm,
        attacker=attacker,
        last=over(lambda r: r.test_accuracy),
        selected=over(lambda r: r.best_test_accuracy),
        oracle=over(_oracle),
        validation=over(lambda r: r.best_validation_accuracy),
        train=over(lambda r: r.curve[-1].train_accuracy),
        failed=tuple(outcome.failed for outcome in group if outcome.failed is not None),
        reported=group[0].reported,
    )


def _oracle(result: Result) -> float:
    return max(point.test_accuracy for point in result.curve if point.test_accuracy is not None)


def verdict(
    arm: str, found: Sequence[Cell], *, chance: float, least_train_accuracy: float | None, anchor: float | None
) -> Verdict:
    """What may be claimed about one protected dataset, or why nothing may.

    Args:
        found: all cells, those of the controls among them.
        least_train_accuracy: see `attackers.Suite`.
        anchor: what plain training on clean rows must reach; None for twice the chance level.
    """
    by = {(cell.arm, cell.attacker): cell for cell in found}
    own = [cell for cell in found if cell.arm == arm]
    clean, plain = by.get(("clean", "erm")), by.get((arm, "erm"))
    refused, notes = [], []
    clean_mean = clean.selected.mean if clean and clean.selected else None
    needed = 2 * chance if anchor is None else anchor
    if clean_mean is None:
        refused.append("plain training on the clean rows is not measured")
    elif clean_mean < needed:
        refused.append(f"plain training on the clean rows reaches {clean_mean:.3f}, its anchor is {needed:.3f}")
    if plain is None or plain.train is None:
        refused.append("plain training on the published rows is not measured")
    elif least_train_accuracy is not None and plain.train.mean < least_train_accuracy:
        refused.append(
            f"plain training fits {plain.train.mean:.3f} of the published rows, less than {least_train_accuracy}: "
            "trained too little to call anything unlearnable"
        )
    elif least_train_accuracy is None and clean and clean.train and plain.train.mean < clean.train.mean - CONTROL_LOSS:
        refused.append(
            f"plain training fits {plain.train.mean:.3f} of the published and {clean.train.mean:.3f} of the clean "
            "rows: trained too little to call anything unlearnable"
        )
    noise, shuffled = by.get(("random noise", "erm")), by.get(("shuffled labels", "erm"))
    if noise and noise.selected and clean_mean is not None:
        lost, doubt = clean_mean - noise.selected.mean, 2 * (noise.selected.error or 0.0)
        if lost - doubt > CONTROL_LOSS:
            refused.append(f"random noise of the same budget costs {lost:.3f}: the victim is too fragile")
    else:
        notes.append("random noise of the same budget: not measured")
    if shuffled and shuffled.last:
        if abs(shuffled.last.mean - chance) > CHANCE_MARGIN:
            refused.append(f"shuffled labels give {shuffled.last.mean:.3f}, chance is {chance:.3f}")
    else:
        notes.append("shuffled labels: not measured")
    judged = [cell for cell in own if cell.validation and cell.selected]
    missing = [cell.attacker for cell in own if cell.failed]
    if missing:
        notes.append(f"failed and not counted: {', '.join(missing)}")
    if not judged:
        return Verdict(
            arm=arm,
            attacker=None,
            learnability=None,
            ceiling=None,
            clean=clean_mean,
            chance=chance,
            normalized=None,
            refused=(*refused, "no attacker is measured"),
            notes=tuple(notes),
        )
    best = max(judged, key=lambda cell: cell.validation.mean if cell.validation else 0.0)
    assert best.selected is not None
    same = by.get(("clean", best.attacker))
    ceiling = same.selected.mean if same and same.selected else None
    if best.selected.poisons == 1:
        notes.append("a single poison key")
    if best.selected.trainings == 1:
        notes.append("a single training: no spread")
    normalized = None
    if ceiling is not None and ceiling > chance:
        normalized = (best.selected.mean - chance) / (ceiling - chance)
    return Verdict(
        arm=arm,
        attacker=best.attacker,
        learnability=best.selected,
        ceiling=ceiling,
        clean=clean_mean,
        chance=chance,
        normalized=normalized,
        refused=tuple(refused),
        notes=tuple(notes),
    )
