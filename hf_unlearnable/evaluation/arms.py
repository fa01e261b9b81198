"""Arms: the training sets that victims are compared on, from published bytes and from the clean rows behind them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset, Image

from hf_unlearnable import columns, sources
from hf_unlearnable.batches import Batches, stratified_rows
from hf_unlearnable.digests import split_digest
from hf_unlearnable.draws import Draws
from hf_unlearnable.images import decode_many, digest, to_float, to_uint8
from hf_unlearnable.keys import torch_generator
from hf_unlearnable.poisons.noise import RandomNoisePoison
from hf_unlearnable.record import Record
from hf_unlearnable.sizes import at_once

MOST_OVERLAP = 0.01
_AT_ONCE = 1024
ArmKind = Literal["protected", "clean", "noise", "shuffled", "mix", "remainder"]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One training set.

    Args:
        label: what it is called; protected datasets of one label are one method under several keys.
        kind: "protected"; "clean"; "noise", the clean rows under random noise (a control); "shuffled", the clean rows
            with shuffled labels (a control); "mix", a share of protected rows and the other rows clean; "remainder",
            these other rows alone.
        path: the folder of the protected dataset; of the other kinds: of one that was made of the same clean rows.
        digest: of the pictures in the folder, published or clean, as its record says.
        fraction: of "mix" and "remainder": the share of protected rows.
        epsilon: of "noise": its L-inf radius.
    """

    label: str
    kind: ArmKind
    path: str
    digest: str = ""
    fraction: float = 1.0
    epsilon: float | None = None

    @property
    def name(self) -> str:
        """For file names: other pictures, another name."""
        share = "" if self.fraction == 1.0 else f"-{self.kind}-{self.fraction:g}"
        bound = "" if self.epsilon is None else f"-{255 * self.epsilon:g}"
        return f"{self.label}{share}{bound}-{self.digest[:8]}".replace(" ", "-")


class Rows:
    """The clean rows of an evaluation, its validation and test rows, and the training set of every arm.

    Args:
        training, test: clean splits. Validation rows are taken from `test`, class by class; the rest is reported on.
        rows: keep so many training rows of every arm, drawn class by class; None for all.
        image_column, label_column: of both clean splits; None finds them.
        validation_rows: how many; None for a fifth of the split, or five a class where that is more.
        image_size: victims see all pictures resized and cut to squares of this side (as `Batches.load` does it); None:
            as they are, and then they must be of one size.

    Raises:
        ValueError: too few rows to choose on, test pictures of another size, or more than one in a hundred that are
            among the training rows (fewer are left out: `left_out` counts them).
    """

    def __init__(
        self,
        training: Dataset,
        test: Dataset,
        *,
        rows: int | None,
        validation_rows: int | None = None,
        image_size: int | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
        device: str | torch.device = "cpu",
        progress: bool = True,
    ) -> None:
        self._how: dict[str, Any] = {"device": device, "progress": progress, "image_size": image_size}
        which = {"image_column": image_column, "label_column": label_column}
        self.clean, self._clean_digests = _load(training, **which, **self._how)
        held, digests = _load(test, **which, **self._how)
        kept = _apart(digests, self._clean_digests)
        self.left_out = len(held) - len(kept)
        held = held.relabel(self.clean.classes).select(kept)
        if held.image_size != self.clean.image_size:
            raise ValueError(f"expected test pictures of {self.clean.image_size} pixels, got {held.image_size}")
        least = 5 * len(self.clean.classes)
        validation_rows = max(least, len(held) // 5) if validation_rows is None else validation_rows
        if not least <= validation_rows <= len(held) // 2:
            raise ValueError(
                f"validation: expected at least 5 rows a class ({least}) and at most half of the {len(held)} test rows "
                f"to choose on, got {validation_rows}"
            )
        chosen = torch.zeros(len(held), dtype=torch.bool)
        chosen[stratified_rows(held.labels.cpu(), validation_rows, key=0)] = True
        self.validation, self.test = held.select(chosen.nonzero()[:, 0]), held.select((~chosen).nonzero()[:, 0])
        self.rows = rows
        self._test_rows: dict[bytes, int] = {}
        for row, place in enumerate(kept):
            self._test_rows.setdefault(digests[place], row)

    def training(self, arm: Arm) -> Batches:
        """The training rows of an arm.

        Raises:
            ValueError: a protected dataset that is not what its record says, whose clean rows are not among those given
                here, or that is not fit to be reported on; names the row.
        """
        published, clean = (self._few(split) for split in self.protected(arm.path))
        if arm.kind == "protected":
            return published
        if arm.kind == "clean":
            return clean
        if arm.kind == "noise":
            noise = RandomNoisePoison(seed=0, epsilon=arm.epsilon or 8 / 255)
            parts = []
            for pixels in clean.pixels.split(1000):
                parts.append(to_uint8(noise.perturb(to_float(pixels), None, Draws(0, "control", pixels))))
            return replace(clean, pixels=torch.cat(parts))
        if arm.kind == "shuffled":
            order = torch.randperm(len(clean), generator=torch_generator(0, "shuffled labels"))
            return replace(clean, labels=clean.labels[order.to(clean.device)])
        keep = _first(len(clean), arm.fraction).to(clean.device)
        if arm.kind == "remainder":
            return clean.select((~keep).nonzero()[:, 0])
        return replace(clean, pixels=torch.where(keep[:, None, None, None], published.pixels, clean.pixels))

    def behind(self, arm: Arm) -> Batches:
        """The clean rows behind those of a protected arm, and of the clean one."""
        return self._few(self.protected(arm.path)[1])

    def source(self, arm: Arm) -> str:
        """The name of the dataset that an arm's folder says it was made of."""
        return Record.load(Path(arm.path) / "record.json").source["dataset"]

    @lru_cache(maxsize=2)  # noqa: B019  (one object a process)
    def protected(self, folder: str) -> tuple[Batches, Batches]:
        """All published rows of a folder, and the clean rows they were made of, checked against each other."""
        path = Path(folder)
        record = Record.load(path / "record.json")
        split, source = record.source["split"], record.source
        dataset = sources.load_split(path, split)
        which = {"image_column": source["image_column"], "label_column": source["label_column"]}
        published, digests = _load(dataset, **which, **self._how)
        found = split_digest(digests)
        if found != record.published["pixels_sha256"]:
            raise ValueError(
                f"{path}: the pictures are not those of its record ({found[:12]}... in place of "
                f"{record.published['pixels_sha256'][:12]}...): it was changed after it was protected"
            )
        clean = self._behind(record, len(published), path)
        _check_pair(published, clean, path)
        for row, known in enumerate(digests):
            if (same := self._test_rows.get(known)) is not None:
                raise ValueError(f"row {row} of {path} is also test row {same}: a test on trained rows says nothing")
        return published, clean

    def _few(self, split: Batches) -> Batches:
        if self.rows is None or self.rows >= len(split):
            return split
        return split.select(stratified_rows(split.labels.cpu(), self.rows, key=0))

    def _behind(self, record: Record, count: int, path: Path) -> Batches:
        """The clean rows that a protected dataset was made of: all, the first, or those that --rows draws."""
        wanted = record.source["pixels_sha256"]
        if count > len(self.clean):
            raise ValueError(f"{path} has {count} rows, the clean dataset {len(self.clean)}")
        for candidate in (torch.arange(count), stratified_rows(self.clean.labels.cpu(), count, key=0)):
            if split_digest(self._clean_digests[row] for row in candidate.tolist()) == wanted:
                return self.clean.select(candidate)
        raise ValueError(
            f"{path}: its {count} rows were not made of the first, nor of evenly drawn, rows of this clean dataset: "
            "give the one that was protected (--clean)"
        )


def _load(
    dataset: Dataset, *, image_column: str | None, label_column: str | None, image_size: int | None, **how: Any
) -> tuple[Batches, list[bytes]]:
    """A split, and the digests of its pictures as they are stored, whatever size they are then seen at."""
    found = Batches.load(dataset, image_column=image_column, label_column=label_column, image_size=image_size, **how)
    if image_size is None:
        return found, [digest(plane) for plane in found.pixels.cpu()]
    column = columns.image_column(dataset.features, image_column)
    stored = dataset.with_format(None).select_columns(column).cast_column(column, Image(decode=False))
    digests: list[bytes] = []
    step = at_once(stored, column, _AT_ONCE)
    for start in range(0, len(stored), step):
        digests += [digest(picture.pixels) for picture in decode_many(stored[start : start + step][column])]
    return found, digests


def _apart(test: Sequence[bytes], training: Sequence[bytes]) -> list[int]:
    """The test rows that are not training rows too.

    Raises:
        ValueError: there are none, or more than one in a hundred are.
    """
    if not test:
        raise ValueError("expected test rows, got none")
    known = set(training)
    same = [row for row, own in enumerate(test) if own in known]
    if len(same) > MOST_OVERLAP * len(test):
        raise ValueError(
            f"{len(same)} of {len(test)} test rows (the first is row {same[0]}) are among the training rows: a test on "
            "trained rows says nothing"
        )
    left = set(same)
    return [row for row in range(len(test)) if row not in left]


def _first(count: int, fraction: float) -> torch.Tensor:
    """Which rows are protected at this share: nested, those at 0.2 are among those at 0.5."""
    order = torch.randperm(count, generator=torch_generator(0, "protected share"))
    keep = torch.zeros(count, dtype=torch.bool)
    keep[order[: math.floor(fraction * count + 0.5)]] = True
    return keep


def _check_pair(published: Batches, clean: Batches, path: Path) -> None:
    if published.classes != clean.classes:
        raise ValueError(f"{path}: expected the classes {clean.classes}, got {published.classes}")
    if published.image_size != clean.image_size:
        raise ValueError(f"{path}: expected pictures of {clean.image_size}, got {published.image_size}")
    if len(wrong := (published.labels != clean.labels).nonzero()):
        raise ValueError(f"{path}: row {int(wrong[0])} has another label than its clean row ({len(wrong)} rows)")
    flat = published.pixels.flatten(1)
    blank = (flat == flat[:, :1]).all(1) & ~(clean.pixels.flatten(1) == clean.pixels.flatten(1)[:, :1]).all(1)
    if len(rows := blank.nonzero()):
        raise ValueError(f"{path}: row {int(rows[0])} is one colour, its clean row is not ({len(rows)} rows)")
