"""Detectors of poisoned rows, and how well they do; how far predictions have collapsed onto few classes."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from hf_unlearnable.batches import Batches, stratified_rows
from hf_unlearnable.defenses.erm import Erm
from hf_unlearnable.keys import Key
from hf_unlearnable.probes import collect
from hf_unlearnable.recipes import Recipe, changed
from hf_unlearnable.victim import train_to_end

EARLY = Recipe(name="early", epochs=1, learning_rate=0.1, schedule="constant")


def roc_auc(scores: Float[Tensor, " n"], truth: Bool[Tensor, " n"]) -> float:
    """The share of pairs (true, false) in which the true row scores higher; ties count one half. Exact: no curve.

    Raises:
        ValueError: NaN, or rows of one kind only.

    Source: the Mann-Whitney U statistic. Deviations: none.
    """
    right, wrong = _both(scores, truth)
    wrong = wrong.sort().values
    below = torch.searchsorted(wrong, right) + torch.searchsorted(wrong, right, right=True)
    return int(below.sum()) / (2 * len(right) * len(wrong))


def fpr_at_tpr(scores: Float[Tensor, " n"], truth: Bool[Tensor, " n"], tpr: float = 0.95) -> float:
    """The share of false rows at or above the highest threshold that at least `tpr` of the true rows reach.

    Raises:
        ValueError: a `tpr` outside (0, 1], NaN, or rows of one kind only.

    Source: METHODS_NEW N42. Deviations: none.
    """
    if not 0 < tpr <= 1:
        raise ValueError(f"tpr lies in (0, 1], got {tpr}")
    right, wrong = _both(scores, truth)
    needed = math.ceil(tpr * len(right) - 1e-9)  # 0.95 * 20 is 19 rows, whatever the float says
    return float((wrong >= right.sort(descending=True).values[needed - 1]).double().mean())


def best_threshold(scores: Float[Tensor, " n"], truth: Bool[Tensor, " n"]) -> float:
    """The highest score t for which "true from t on" has the least half total error, (FPR + FNR) / 2.

    Raises:
        ValueError: NaN, or rows of one kind only.
    """
    right, wrong = (part.sort().values for part in _both(scores, truth))
    candidates = scores.unique().flip(0)
    missed = torch.searchsorted(right, candidates).double() / len(right)
    alarms = 1 - torch.searchsorted(wrong, candidates).double() / len(wrong)
    return float(candidates[(missed + alarms).argmin()])


def _both(scores: Float[Tensor, " n"], truth: Bool[Tensor, " n"]) -> tuple[Tensor, Tensor]:
    if bool(scores.isnan().any()):
        raise ValueError(f"row {int(scores.isnan().nonzero()[0])}: expected a score, got NaN")
    right, wrong = scores[truth], scores[~truth]
    if not len(right) or not len(wrong):
        raise ValueError(f"expected rows of both kinds, got {len(right)} true and {len(wrong)} false ones")
    return right, wrong


@dataclass(frozen=True, kw_only=True, eq=False)
class Detection:
    """How well scores tell poisoned rows from clean ones; 0.5 is chance for `auc` and `half_total_error`.

    A high `auc` breaks nothing by itself: train on what falls below `threshold` and see.

    Args:
        auc: share of pairs in which the poisoned row scores higher.
        fpr_at_95_tpr: share of the clean rows that are taken along when 95 % of the poisoned ones are found.
        half_total_error: (FPR + FNR) / 2 on one half of the rows, at the threshold that is best on the other half.
        threshold: that one; rows from it on are taken for poisoned.
        scores: higher is more suspect; the rows in order.
    """

    auc: float
    fpr_at_95_tpr: float
    half_total_error: float
    threshold: float
    scores: Float[Tensor, " n"]

    @classmethod
    def of(cls, scores: Float[Tensor, " n"], poisoned: Bool[Tensor, " n"], *, seed: Key) -> Self:
        """Measured from scores and truth; the halves are drawn from the seed, each kind in proportion.

        Raises:
            ValueError: NaN, or fewer than two rows of a kind.
        """
        poisoned = poisoned.to(scores.device)
        if min(int(poisoned.sum()), int((~poisoned).sum())) < 2:
            raise ValueError(f"expected two rows of each kind, got {int(poisoned.sum())} poisoned of {len(poisoned)}")
        calibration = torch.zeros(len(scores), dtype=torch.bool)
        calibration[stratified_rows(poisoned.cpu().long(), len(scores) // 2, key=seed)] = True
        calibration = calibration.to(scores.device)
        threshold = best_threshold(scores[calibration], poisoned[calibration])
        right, wrong = _both(scores[~calibration], poisoned[~calibration])
        error = (right < threshold).double().mean() + (wrong >= threshold).double().mean()
        return cls(
            auc=roc_auc(scores, poisoned),
            fpr_at_95_tpr=fpr_at_tpr(scores, poisoned),
            half_total_error=float(error / 2),
            threshold=threshold,
            scores=scores,
        )


def sample_auc(
    network: nn.Module,
    mixed: Batches,
    poisoned: Bool[Tensor, " n"],
    *,
    epochs: int = 1,
    recipe: Recipe = EARLY,
    accelerator: Accelerator,
    seed: int,
    progress: bool = True,
) -> Detection:
    """Poisoned rows are learnt first: score = -CE(f(x), y) after a few epochs on the mixture itself.

    Args:
        network: untrained (ResNet-18 in the sheet); a copy is trained.
        mixed: clean and poisoned rows, half and half in the sheet.
        poisoned: which rows are.
        epochs: 1, 2, 3 and 5 in the sheet; call once for each (at a constant rate the longer training begins as the
            shorter one).
        recipe: of the training, but for its length.

    Raises:
        ValueError: fewer than two rows of a kind, or `poisoned` of another length than `mixed`.

    Source: METHODS_NEW N42 (b); the recipe (SGD 0.1, batches of 128, crop and flip) is this library's.
    Deviations: none.
    """
    if len(poisoned) != len(mixed):
        raise ValueError(f"expected one truth for each of {len(mixed)} rows, got {len(poisoned)}")
    model, mixed = copy.deepcopy(network), mixed.to(accelerator.device)
    _trained(model, mixed, changed(recipe, epochs=epochs), accelerator, seed, progress)
    losses = collect(model, mixed, lambda x, y: F.cross_entropy(model(x).float(), y, reduction="none"))
    return Detection.of(-losses, poisoned, seed=seed)


def supervised_auc(
    network: nn.Module,
    known: tuple[Batches, Batches],
    unknown: tuple[Batches, Batches],
    *,
    recipe: Recipe,
    accelerator: Accelerator,
    seed: int,
    progress: bool = True,
) -> Detection:
    """The worst case: a network that was taught on pairs which clean and poisoned pictures look like.

        score = logit(poisoned) - logit(clean)

    Args:
        network: with two logits (clean, poisoned); a copy is trained.
        known: clean rows, and rows poisoned by the same method under another key.
        unknown: other clean rows, and the published ones, on which it is tested.
        recipe: of the training.

    Raises:
        ValueError: fewer than two rows of a kind, or pictures of different sizes.

    Source: METHODS_NEW N42 (c). Deviations: none.
    """
    taught, tested = (_labelled(pair, accelerator.device) for pair in (known, unknown))
    model = copy.deepcopy(network)
    _trained(model, taught, recipe, accelerator, seed, progress)
    scores = collect(model, tested, lambda x, y: model(x).float() @ torch.tensor([-1.0, 1.0], device=x.device))
    return Detection.of(scores, tested.labels.bool(), seed=seed)


def _labelled(pair: tuple[Batches, Batches], device: torch.device) -> Batches:
    if pair[0].image_size != pair[1].image_size:
        raise ValueError(f"expected pictures of one size, got {pair[0].image_size} and {pair[1].image_size}")
    parts = [part.to(device) for part in pair]
    return Batches(
        pixels=torch.cat([part.pixels for part in parts]),
        labels=torch.cat([torch.full_like(part.labels, kind) for kind, part in enumerate(parts)]),
        classes=("clean", "poisoned"),
    )


def _trained(
    model: nn.Module, rows: Batches, recipe: Recipe, accelerator: Accelerator, seed: int, progress: bool
) -> None:
    train_to_end(
        model,
        rows,
        rows.select(range(1)),
        recipe=recipe,
        defense=Erm(),
        accelerator=accelerator,
        seed=seed,
        progress=progress,
    )


def reliance(confusion: Int[Tensor, "k k"] | Sequence[Sequence[int]]) -> float:
    """R_p: how far the predictions of clean rows have collapsed, class by class, onto few answers.

        R_p = sum_k (n_k / N) (1 / K) ||P_k - 1/K||^2,   P_k[j] the share of class k's rows that are taken for j

    0: every class is spread evenly over all answers (no more than guessing). (K - 1) / K^2: each gets one answer, right
    or wrong: read it beside the accuracy.

    Args:
        confusion: entry (i, j) counts the rows of class i that were taken for class j, as in `Result.confusion`.

    Raises:
        ValueError: not square, a negative count, or no rows.

    Source: MMM, equations 4 and 5 (METHODS, part V). Deviations: none; classes without rows count nothing.
    """
    counts = torch.as_tensor(confusion, dtype=torch.float64)
    if counts.dim() != 2 or counts.shape[0] != counts.shape[1] or bool((counts < 0).any()) or not counts.sum() > 0:
        raise ValueError(f"expected a square matrix of counts with some rows, got {counts.tolist()}")
    rows = counts.sum(1)
    spread = (counts / rows.clamp_min(1)[:, None] - 1 / len(counts)).square().mean(1)
    return float(rows @ spread / rows.sum())


def soft_reliance(model: nn.Module, batches: Batches) -> float:
    """R_s: the mean over rows of (1 / K) ||softmax(f(x)) - 1/K||^2; R_p for the probabilities of single rows.

    Raises:
        ValueError: no rows.

    Source: MMM, equations 4 and 5 (METHODS, part V). Deviations: none.
    """
    if not len(batches):
        raise ValueError("expected at least one row, got none")

    def spread(x: Tensor, y: Tensor) -> Tensor:
        shares = model(x).float().softmax(1)
        return (shares - 1 / shares.shape[1]).square().mean(1)

    return float(collect(model, batches, spread).double().mean())
