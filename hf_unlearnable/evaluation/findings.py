"""What the outcomes of an evaluation say: the attacker chosen on validation, spreads over both seeds, guards."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
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
        measured: the attackers that were.
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
    measured: tuple[str, ...]
    refused: tuple[str, ...]
    notes: tuple[str, ...]


def spread(grid: Mapping[Any, list[float]]) -> Spread:
    """The mean over {poison key: values of its training seeds}, and its standard error.

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
    return arm["label"] if arm["epsilon"] is None else noise_of(arm["epsilon"])


def noise_of(epsilon: float) -> str:
    """How the control with random noise of this radius is called in tables."""
    return f"random noise {255 * epsilon:g}/255"


def attacker_of(outcome: Outcome) -> str:
    """How the attacker is called in tables."""
    return outcome.job["attacker"]["name"] + ("" if outcome.job["steps"] is None else ", equal steps")


def _cell(arm: str, attacker: str, group: Sequence[Outcome]) -> Cell:
    def over(value: Any) -> Spread | None:
        grid: dict[str, list[float]] = {}
        for outcome in group:
            found = None if outcome.result is None else value(outcome.result)
            if found is not None:
                grid.setdefault(outcome.job["arm"]["digest"], []).append(found)
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
    arm: str,
    found: Sequence[Cell],
    *,
    chance: float,
    planned: Sequence[str],
    test_rows: int,
    epsilon: float | None = None,
    least_train_accuracy: float | None = None,
    anchor: float | None = None,
) -> Verdict:
    """What may be claimed about one protected dataset, or why nothing may.

    Args:
        found: all cells, those of the controls among them.
        planned: the attackers of the suite; plain training alone is no evaluation.
        epsilon: the L-inf radius that the dataset keeps; None where it has none (its control is noise of 8/255).
        least_train_accuracy: see `attackers.Suite`.
        anchor: what plain training on clean rows must reach; None for twice the chance level, or half way from chance
            to 1 where that is less.
    """
    by = {(cell.arm, cell.attacker): cell for cell in found}
    own = [cell for cell in found if cell.arm == arm]
    clean, plain = by.get(("clean", "erm")), by.get((arm, "erm"))
    clean_mean = clean.selected.mean if clean and clean.selected else None
    refused = [
        *_anchor_guard(clean_mean, min(2 * chance, (1 + chance) / 2) if anchor is None else anchor),
        *_training_guard(plain, clean, least_train_accuracy),
    ]
    notes: list[str] = []
    noise = by.get((noise_of(8 / 255 if epsilon is None else epsilon), "erm"))
    if noise and noise.selected and clean and clean.selected:
        lost = clean.selected.mean - noise.selected.mean
        doubt = 2 * math.hypot(noise.selected.error or 0.0, clean.selected.error or 0.0)
        if lost - doubt > CONTROL_LOSS:
            refused.append(f"{noise.arm} costs {lost:.3f}: the victim is too fragile")
    else:
        notes.append("random noise as a control: not measured")
    shuffled = by.get(("shuffled labels", "erm"))
    if shuffled and shuffled.last:
        above = chance + CHANCE_MARGIN + 2 * math.sqrt(chance * (1 - chance) / test_rows)
        if shuffled.last.mean > above:
            refused.append(f"shuffled labels give {shuffled.last.mean:.3f}, chance is {chance:.3f}: something leaks")
    else:
        notes.append("shuffled labels: not measured")
    judged = [cell for cell in own if cell.validation and cell.selected]
    measured = {cell.attacker for cell in judged}
    missing = [name for name in planned if name not in measured]
    if missing:
        notes.append(f"{len(planned) - len(missing)} of {len(planned)} attackers: without {', '.join(missing)}")
    if failed := [cell.attacker for cell in own if cell.failed]:
        notes.append(f"failed and not counted: {', '.join(failed)}")
    best = max(judged, key=lambda cell: cell.validation.mean if cell.validation else 0.0, default=None)
    ceiling = normalized = None
    if best is None or best.selected is None:
        refused.append("no attacker is measured")
    else:
        if measured == {"erm"}:
            refused.append("plain training alone is no evaluation")
        same = by.get(("clean", best.attacker))
        ceiling = same.selected.mean if same and same.selected else None
        if ceiling is not None and ceiling > chance:
            normalized = (best.selected.mean - chance) / (ceiling - chance)
        if best.selected.poisons == 1:
            notes.append("a single poison key")
        if best.selected.trainings == 1:
            notes.append("a single training: no spread")
    return Verdict(
        arm=arm,
        attacker=best.attacker if best else None,
        learnability=best.selected if best else None,
        ceiling=ceiling,
        clean=clean_mean,
        chance=chance,
        normalized=normalized,
        measured=tuple(name for name in planned if name in measured),
        refused=tuple(refused),
        notes=tuple(notes),
    )


def _anchor_guard(clean: float | None, anchor: float) -> list[str]:
    if clean is None:
        return ["plain training on the clean rows is not measured"]
    if clean < anchor:
        return [f"plain training on the clean rows reaches {clean:.3f}, its anchor is {anchor:.3f}"]
    return []


def _training_guard(plain: Cell | None, clean: Cell | None, least: float | None) -> list[str]:
    if plain is None or plain.train is None:
        return ["plain training on the published rows is not measured"]
    told = "trained too little to call anything unlearnable"
    if least is not None and plain.train.mean < least:
        return [f"plain training fits {plain.train.mean:.3f} of the published rows, less than {least}: {told}"]
    if least is None and clean and clean.train and plain.train.mean < clean.train.mean - CONTROL_LOSS:
        fits = f"{plain.train.mean:.3f} of the published and {clean.train.mean:.3f} of the clean rows"
        return [f"plain training fits {fits}: {told}"]
    return []
