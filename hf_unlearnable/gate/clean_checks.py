"""A protected folder beside the clean rows it was made of, batch by batch."""

import hashlib
import math
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, Features, Image

from hf_unlearnable.budget import Budget
from hf_unlearnable.gate.finding import Problems
from hf_unlearnable.images import Picture, Pixels, decode, decode_many, digest
from hf_unlearnable.metrics import PixelReport
from hf_unlearnable.record import Record

_CLOSE = 1e-4


def without_left_out(clean: Dataset, record: Record) -> Dataset:
    """The clean rows that were published, where the record tells of rows that were left out."""
    left_out = {one["row"] for one in record.source.get("left_out", [])}
    if not left_out or len(clean) != record.source["rows"] + len(left_out):
        return clean
    return clean.select([row for row in range(len(clean)) if row not in left_out])


def incomparable(clean: Dataset, published: Features, record: Record) -> str:
    """Why clean rows cannot stand beside published ones; empty if they can."""
    source = record.source
    image = source["image_column"]
    if not isinstance(clean.features.get(image), Image):
        return f"expected clean pictures in the column {image!r}, got the columns {clean.column_names}"
    if len(clean) != source["rows"]:
        return f"expected the {source['rows']} clean rows of {source['dataset']} ({source['split']}), got {len(clean)}"
    if list(published) != clean.column_names:
        return f"expected the columns of the clean rows, {clean.column_names}, got {list(published)}"
    for name, feature in published.items():
        if name != image and feature != clean.features[name]:
            return f"column {name!r}: expected {clean.features[name]} as in the clean rows, got {feature}"
    return ""


class Beside:
    """What differs between published and clean rows; to be believed if `digest` is that of the record's source."""

    def __init__(self, clean: Dataset, record: Record) -> None:
        self.image = record.source["image_column"]
        self.clean = clean.with_format("arrow").cast_column(self.image, Image(decode=False))
        self.every = record.settings["poison_rate"] == 1
        self.budgets = budgets_of(record)
        self.problems = Problems()
        self.compared = self.changed = 0
        self.report = PixelReport(perceptual_every=math.ceil(len(clean) / max(1, record.pixels["perceptual_rows"])))
        self._sizes: list[np.ndarray] = []
        self._digests = hashlib.sha256()

    @property
    def digest(self) -> str:
        return self._digests.hexdigest()

    def update(self, others: pa.Table, pictures: list[Picture | str], eligible: np.ndarray, first: int) -> None:
        """Compare one batch, whose first row is `first` of the split; `eligible` rows are those that may be changed."""
        table = cast(pa.Table, self.clean[first : first + len(pictures)])
        for name in others.column_names:
            if not table[name].equals(others[name]):
                pairs = zip(table[name].to_pylist(), others[name].to_pylist(), strict=True)
                for row, (old, new) in enumerate(pairs, first):
                    if old != new and repr(old) != repr(new):
                        self.problems.add("source", f"column {name!r} differs from the clean rows", row)
        before = decoded(table[self.image].to_pylist())
        sizes: dict[torch.Size, list[int]] = {}
        for i, (old, new) in enumerate(zip(before, pictures, strict=True)):
            self._digests.update(b"unreadable" if isinstance(old, str) else digest(old.pixels))
            if isinstance(old, str) or isinstance(new, str):
                continue
            if old.pixels.shape != new.pixels.shape:
                told = f"{tuple(new.pixels.shape[1:])} in place of {tuple(old.pixels.shape[1:])}"
                self.problems.add("source", "a picture of another size than the clean one", first + i, told)
                continue
            if not _same(old.alpha, new.alpha):
                self.problems.add("source", "other transparency than in the clean picture", first + i)
            sizes.setdefault(new.pixels.shape, []).append(i)
        for places in sizes.values():
            old = torch.stack([cast(Picture, before[i]).pixels for i in places])
            new = torch.stack([cast(Picture, pictures[i]).pixels for i in places])
            self._compare(old, new, eligible[places], [first + i for i in places])

    def _compare(self, old: Pixels, new: Pixels, eligible: np.ndarray, rows: list[int]) -> None:
        difference = new.to(torch.int16) - old.to(torch.int16)
        changed = (difference != 0).flatten(1).any(1).numpy()
        for i in np.flatnonzero(constant(new) & ~constant(old)):
            self.problems.add("blank", "one colour all over, and the clean picture is not", rows[i])
        for i in np.flatnonzero(changed & ~eligible):
            self.problems.add("unchanged", "changed, though of a class that was to stay as it is", rows[i])
        for i in np.flatnonzero(~changed & eligible & self.every):
            self.problems.add("unchanged", "the clean picture as it was, though it was to be changed", rows[i])
        if self.budgets:
            self._measure(difference, rows)
        self.report.update(list(old), list(new), rows)
        self.compared += len(rows)
        self.changed += int(changed.sum())

    def _measure(self, difference: torch.Tensor, rows: list[int]) -> None:
        largest = self.budgets[-1][0]
        found = largest.distance(difference.double() / 255).numpy() - largest.slack(difference[:1].numel())
        if len(self.budgets) > 1:
            self._sizes.append(found.astype(np.float32))
        unit, name = (255, "/255") if largest.norm == "linf" else (1, " pixels" if largest.norm == "l0" else "")
        for i in np.flatnonzero(found > largest.epsilon + 1e-6):
            told = f"{largest.norm} {unit * found[i]:g}{name} in place of {unit * largest.epsilon:g}{name}"
            self.problems.add("budget", "over the budget of the record", rows[i], told)

    def misreported(self, record: Record) -> Iterator[str]:
        """Figures of the record that these pixels do not give; of PSNR and SSIM on some of the rows, which may be
        others than here, the mean alone, within ten standard errors."""
        told, found = record.pixels, self.report.summary()
        whole = told["perceptual_rows"] == told["rows"]
        for name in ("values_changed", "values_clipped"):
            if not math.isclose(told[name], found[name], rel_tol=_CLOSE, abs_tol=_CLOSE):
                yield f"the record says {name} {told[name]:g}, beside the clean rows it is {found[name]:g}"
        for name in ("linf_levels", "l2", "l0_pixels", "mean_shift_levels", "psnr_db", "ssim"):
            said, got = told[name], found[name]
            if said is None or got is None:
                if said is not got:
                    yield f"the record says {name} {said}, beside the clean rows it is {got}"
                continue
            some = name in ("psnr_db", "ssim") and not whole
            slack = 10 * got["sd"] * math.sqrt(2 / told["perceptual_rows"]) if some else 0.0
            for part in ("mean",) if some else got:
                if not math.isclose(said[part], got[part], rel_tol=_CLOSE, abs_tol=_CLOSE + slack):
                    yield f"the record says {name} {part} {said[part]:g}, beside the clean rows it is {got[part]:g}"
                    break

    def beyond_their_number(self) -> int:
        """Of budgets that depend on the size of a picture: how many changes do not fit into so many of each."""
        if len(self.budgets) < 2 or not self._sizes:
            return 0
        sizes = np.sort(np.concatenate(self._sizes))
        if sum(rows for _, rows in self.budgets) != len(sizes):
            return 0
        allowed = np.repeat([budget.epsilon for budget, _ in self.budgets], [rows for _, rows in self.budgets])
        return int((sizes > allowed + 1e-6).sum())


def budgets_of(record: Record) -> list[tuple[Budget, int]]:
    """The budgets that were kept by the record, in whole 255ths, and by how many rows each; the largest comes last."""
    told = [(Budget(said["norm"], said["epsilon"]).whole(), said["kept_by_rows"]) for said in record.pixels["budgets"]]
    return sorted(told, key=lambda pair: pair[0].epsilon)


def decoded(values: list[Any]) -> list[Picture | str]:
    """Every picture, or what is wrong with it."""
    try:
        return list(decode_many(values))
    except (ValueError, TypeError):
        return [_decoded_one(value) for value in values]


def constant(pixels: Pixels) -> np.ndarray:
    """Which pictures have one colour at every pixel."""
    flat = pixels.flatten(2)
    return (flat == flat[:, :, :1]).flatten(1).all(1).numpy()


def _decoded_one(value: Any) -> Picture | str:
    try:
        return decode(value)
    except (ValueError, TypeError) as error:
        return str(error).removeprefix("picture: ")


def _same(old: torch.Tensor | None, new: torch.Tensor | None) -> bool:
    return old is new or (old is not None and new is not None and torch.equal(old, new))
