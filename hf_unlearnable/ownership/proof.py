"""Do published pictures carry this key's perturbation? An exact test that takes no clean pictures."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from hf_unlearnable.images import Picture
from hf_unlearnable.keys import Key, numpy_generator
from hf_unlearnable.ownership.evidence import Evidence, Rank, Unprovable, combined
from hf_unlearnable.ownership.patches import PatchEvidence
from hf_unlearnable.ownership.processes import ProcessEvidence
from hf_unlearnable.ownership.spectra import FilterEvidence
from hf_unlearnable.poisons.ar import ArPoison
from hf_unlearnable.poisons.base import Poison
from hf_unlearnable.poisons.cuda import CudaPoison
from hf_unlearnable.poisons.lsp import LspPoison
from hf_unlearnable.poisons.ops import OpsPoison

_LEAST_DECOYS = 100

__all__ = ["Proof", "Reading", "Unprovable", "prove", "read"]


@dataclass(frozen=True, kw_only=True)
class Proof:
    """The outcome of a test of ownership.

    Args:
        method: the poison's name.
        p_value: the probability that a key that has nothing to do with the pictures does as well; see `prove`.
        decoys: how many parameters were drawn beside the key's, over all classes.
        statistic: mean over the classes of the key's score.
        decoys_best: mean over the classes of the highest score of a decoy.
        rows: pictures that counted.
        classes: classes that counted.
        class_p_values: of every class, in the order of the labels.
        notes: what a reader of the p-value should know.
    """

    method: str
    p_value: float
    decoys: int
    statistic: float
    decoys_best: float
    rows: int
    classes: int
    class_p_values: tuple[float, ...]
    notes: tuple[str, ...]


def prove(
    pictures: Iterable[tuple[list[Picture], list[int]]],
    poison: Poison,
    *,
    decoys: int = 1_000_000,
    original_size: tuple[int, int] | None = None,
    decoy_key: Key,
    progress: bool = True,
) -> Proof:
    """Test whether pictures carry the perturbation of this key, without the clean ones: CUDA, LSP and AR.

    What the key gives to a class (CUDA: its filter; LSP: its vertex; AR: its process) is ranked among m decoys drawn
    afresh from the same law, by how well they fit the pictures of that class:

        p_y = (1 + #{decoys that score as high as the key}) / (1 + m),    p = Pr[U_1 ... U_n <= p_1 ... p_n]

    Args:
        pictures: batches of published pictures and their labels; read once, in flat memory.
        poison: the poison as its record describes it, with the claimed key.
        decoys: how many over all classes, divided evenly (fewer than 100 a class are refused). The least possible p
            with a million is 1e-10 for two classes and 1e-37 for ten. AR's decoys come from its search: it looks at
            5000 candidates a class at most, for six classes, and keeps fewer for later ones (half a minute).
        original_size: height and width of the pictures when they were published, where they were resized after that.
        decoy_key: the decoys' own, to be drawn after the pictures were fixed, as `verify` does it: who knows it
            beforehand can make pictures that fit any key better than these decoys.

    Returns:
        The p-value. Pictures of the commonest kind of size count, and classes that the poison changed.

    Raises:
        Unprovable: a method or setting without a test of this kind; pictures of fewer than two classes of use.
        ValueError: too few decoys; a label below 0.

    Guarantee: let a key be claimed that was drawn independently of the pictures. Then for each alpha, p <= alpha has a
        probability of at most alpha, whatever the pictures are, if the decoys are drawn after them: what the key gives
        to a class, given what it gave to the classes before, is exchangeable with its decoys, so that the p_y are
        independent of each other and at least as large as uniform numbers. Nothing is estimated, and no natural picture
        is assumed.
    Slack: one claim, of a key settled before the pictures were looked at. Who tries n keys finds p <= alpha among them
        with probability n alpha: a claim is worth something if the commitment to its key was made known before, and an
        int seed has been tried by anyone who cares to count. HMAC-SHA256 and numpy's generators are taken as random.
        The weights of CUDA are rounded to 14 bits in pictures, not in the test. The converse is not shown: a large p
        says that nothing was recognised, not that nothing is there.

    Source: this project itself. Rank tests against draws of the null law: Barnard (1963). Deviations:
        none.
    """
    reading = read(pictures, poison, original_size=original_size, progress=progress)
    return reading.judge(poison, decoys=decoys, decoy_key=decoy_key, progress=progress)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What pictures add up to, for claims of any keys of a poison with the settings it was read for.

    Args:
        settings: of the poison.
        seen: pictures of protected classes.
        left: pictures of other classes.
    """

    evidence: Evidence
    settings: tuple[str, dict[str, Any]]
    seen: int
    left: int

    def judge(self, poison: Poison, *, decoy_key: Key, decoys: int = 1_000_000, progress: bool = True) -> Proof:
        """The test of one key: see `prove`.

        Raises:
            Unprovable, ValueError: as `prove`; a poison with other settings than the pictures were read for.
        """
        if (poison.name, poison.settings()) != self.settings:
            raise ValueError(f"expected the settings {self.settings}, got {(poison.name, poison.settings())}")
        settled = self.evidence.settle(poison)
        count = len(settled.labels)
        if count < 2:
            raise Unprovable(f"expected pictures of two protected classes or more, large enough to read, got {count}")
        each = decoys // count
        if each < _LEAST_DECOYS:
            raise ValueError(f"expected {_LEAST_DECOYS} decoys a class, {_LEAST_DECOYS * count} or more, got {decoys}")
        each = min(each, settled.most_decoys)
        found: list[Rank] = []
        with tqdm(total=each * count, desc="decoys", unit="decoy", unit_scale=True, disable=not progress) as bar:
            for test in settled.tests:
                generator = numpy_generator(decoy_key, "ownership", poison.name, "decoys", test.label)
                found.append(test.rank(each, generator, bar))
        p_values = tuple(rank.p_value for rank in found)
        return Proof(
            method=poison.name,
            p_value=combined(p_values),
            decoys=sum(rank.decoys for rank in found),
            statistic=float(np.mean([rank.own for rank in found])),
            decoys_best=float(np.mean([rank.best for rank in found])),
            rows=settled.rows,
            classes=count,
            class_p_values=p_values,
            notes=tuple(
                _notes(poison, self.seen - settled.rows, self.left, combined([1 / (1 + rank.decoys) for rank in found]))
            ),
        )


def read(
    pictures: Iterable[tuple[list[Picture], list[int]]],
    poison: Poison,
    *,
    original_size: tuple[int, int] | None = None,
    progress: bool = True,
) -> Reading:
    """The first half of `prove`, which does not look at the key: several keys may be judged by it."""
    evidence = _evidence(poison, original_size)
    seen = left = 0
    sizes: set[tuple[int, int]] = set()
    for batch, labels in tqdm(pictures, desc="reading pictures", unit=" batches", disable=not progress):
        if len(batch) != len(labels):
            raise ValueError(f"expected a label for each of {len(batch)} pictures, got {len(labels)}")
        if any(label < 0 for label in labels):
            raise ValueError(f"expected labels of 0 or more, got {min(labels)}")
        if poison.num_classes is not None and max(labels, default=0) >= poison.num_classes:
            raise ValueError(f"expected labels below {poison.num_classes} (num_classes), got {max(labels)}")
        own = [row for row, label in enumerate(labels) if poison.classes is None or label in poison.classes]
        seen, left = seen + len(own), left + len(batch) - len(own)
        if original_size is not None:
            sizes |= {(batch[row].pixels.shape[1], batch[row].pixels.shape[2]) for row in own}
            if len(sizes) > 1:
                raise Unprovable(f"original_size={original_size} is for pictures of one size, got {sorted(sizes)}")
        if own:
            evidence.add([batch[row] for row in own], [int(labels[row]) for row in own])
    return Reading(evidence=evidence, settings=(poison.name, poison.settings()), seen=seen, left=left)


def _evidence(poison: Poison, original_size: tuple[int, int] | None) -> Evidence:
    if original_size is not None and min(original_size) < 1:
        raise ValueError(f"original_size is a height and a width in pixels, got {original_size}")
    if poison.poison_rate == 0:
        raise Unprovable("poison_rate=0 changes no picture")
    if isinstance(poison, CudaPoison):
        return FilterEvidence(poison, original_size)
    if isinstance(poison, LspPoison):
        return PatchEvidence(poison, original_size)
    if isinstance(poison, ArPoison):
        return ProcessEvidence(original_size)
    if isinstance(poison, OpsPoison):
        why = "its pixels come from the clean pictures, not from the key"
    else:
        why = "its noise follows from each clean picture or from a surrogate, not from the key and the class alone"
    raise Unprovable(f"{poison.name} cannot be proved without the clean pictures: {why}; with them it is recomputed")


def _notes(poison: Poison, unread: int, left: int, least: float) -> Iterator[str]:
    yield "holds for one claim, of a key that was settled before these pictures were looked at"
    if isinstance(poison.seed, int):
        yield "the key is an int seed: anyone can try them all, so this proves nothing about an owner"
    if unread:
        yield f"{unread} pictures did not count: of other sizes than most, or too small"
    if left:
        yield f"{left} pictures of unprotected classes did not count"
    if least > 1e-6:
        yield f"with so few classes or decoys no p is below {least:.1g}"
