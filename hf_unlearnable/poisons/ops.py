"""OPS: one-pixel shortcut."""

import hashlib
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset, Image
from tqdm.auto import tqdm

from hf_unlearnable import columns
from hf_unlearnable.budget import Budget
from hf_unlearnable.draws import Draws
from hf_unlearnable.images import Images, Labels, decode, decode_many
from hf_unlearnable.keys import Key, cache_tag, subkey
from hf_unlearnable.poisons.base import Poison
from hf_unlearnable.sizes import at_once

_COLOURS = np.array([(code >> 2 & 1, code >> 1 & 1, code & 1) for code in range(8)])


@dataclass(frozen=True, kw_only=True)
class OpsPoison(Poison):
    """Every class has one pixel set to one colour: x'[:, h_y, w_y] = v_y, v_y in {0, 1}^3.

    `OpsPoison.fit(dataset, seed=...)` finds the pixels, which are the secret: the poison's key only chooses rows where
    poison_rate is below 1.

    Args:
        pixels: for every class its (row, column, colour) triples, `sparsity` of them; a colour is 4 R + 2 G + B.
        size: height and width in pixels of the pictures it is for.
        sparsity: pixels changed in every picture.

    Raises:
        ValueError: pixels outside the picture or of another number than `sparsity` and `num_classes` say; a picture of
            another size; a label without a pixel.

    Source: "One-Pixel Shortcut: on the Learning Preference of Deep Neural Networks" and its code (METHODS 4).
    Deviations: 1e-12 is added to the standard deviation, which is 0 for a constant pixel. The pixels of a class are at
        different places (official: with sparsity above 1 one may overwrite another). Of equal scores the first wins.
        Any number of classes and any height and width.
    """

    name: ClassVar[str] = "ops"
    pure: ClassVar[bool] = True

    pixels: tuple[tuple[tuple[int, int, int], ...], ...] = field(repr=False)
    size: tuple[int, int]
    sparsity: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        (height, width), pixels = self.size, self.pixels
        if self.num_classes is None and pixels:
            object.__setattr__(self, "num_classes", len(pixels))
        if not pixels or len(pixels) != self.num_classes:
            raise ValueError(f"expected pixels for {self.num_classes or 'one or more'} classes, got {len(pixels)}")
        for label, own in enumerate(pixels):
            if len(own) != self.sparsity or len({(h, w) for h, w, _ in own}) != self.sparsity or self.sparsity < 1:
                raise ValueError(f"class {label}: expected {self.sparsity} different pixels (sparsity), got {len(own)}")
            if any(not (0 <= h < height and 0 <= w < width and 0 <= v < 8) for h, w, v in own):
                raise ValueError(
                    f"class {label}: expected rows below {height}, columns below {width} and colours below 8, "
                    "got a pixel outside them"
                )

    @classmethod
    def fit(
        cls,
        dataset: Dataset,
        *,
        seed: Key,
        image_column: str | None = None,
        label_column: str | None = None,
        sparsity: int = 1,
        batch_size: int = 500,
        progress: bool = True,
        **fields: Any,
    ) -> "OpsPoison":
        """The poison for a split: for every class in turn, the pixel that a colour differs from most, and most evenly.

        The score of place (h, w) and colour v is mean(D) / std(D), D = |v - x[:, h, w]| over the pictures of the class
        and the three channels. A place and colour serve one class only. One pass over the pictures; memory does not
        grow with their number.

        Args:
            dataset: the clean training split. All of its rows count, whatever `poison_rate`.
            sparsity: pixels for every class.
            batch_size: pictures held at a time.
            progress: whether a bar is shown.
            fields: the poison's other arguments (`poison_rate`, `image_format`, ...).

        Raises:
            ValueError: pictures of different sizes or an unreadable one (names the row), a bad label, a class without
                rows, more pixels wanted than there are.
            TypeError: not a Dataset.
        """
        if not isinstance(dataset, Dataset):
            raise TypeError(f"expected a Dataset (one split), got {type(dataset).__name__}")
        if sparsity < 1:
            raise ValueError(f"sparsity is a number of pixels, 1 or more, got {sparsity}")
        image = columns.image_column(dataset.features, image_column)
        label = columns.label_column(dataset.features, label_column)
        names = columns.class_names(dataset.features, label)
        num_classes = fields.get("num_classes")
        known = names if names is not None or num_classes is None else [str(c) for c in range(num_classes)]
        columns.check_labels(dataset.with_format("arrow")[label], known, label)
        labels = np.asarray(dataset.with_format("numpy")[label][:], dtype=np.int64)
        counts = np.bincount(labels, minlength=0 if known is None else len(known))
        for missing in np.flatnonzero(counts == 0)[:1]:
            called = f" ({names[missing]})" if names is not None else ""
            raise ValueError(f"expected rows of every class in column {label!r}, got none of class {missing}{called}")
        if not len(counts):
            raise ValueError("expected a dataset with rows, got an empty one")
        plain = dataset.with_format(None).select_columns(image).cast_column(image, Image(decode=False))
        sums, squares = _moments(plain, labels, len(counts), batch_size, progress)
        return cls(
            seed=seed,
            image_column=image_column,
            label_column=label_column,
            pixels=_choose(counts, sums, squares, sparsity),
            size=sums.shape[2:],
            sparsity=sparsity,
            **fields,
        )

    def budget_for(self, height: int, width: int) -> Budget:
        return Budget("l0", self.sparsity)

    def perturb(self, x: Images, y: Labels | None, draws: Draws) -> Images:
        if y is None:
            raise ValueError("expected labels, got none")
        if tuple(x.shape[2:]) != self.size:
            raise ValueError(
                f"expected pictures of {self.size[0]} x {self.size[1]} pixels, for which this poison was fitted, "
                f"got {x.shape[2]} x {x.shape[3]} (height x width)"
            )
        table = torch.tensor(self.pixels, device=x.device)[y]
        colours = torch.from_numpy(_COLOURS).to(x)[table[:, :, 2]]
        rows = torch.arange(len(x), device=x.device)[:, None]
        poisoned = x.clone()
        poisoned[rows, :, table[:, :, 0], table[:, :, 1]] = colours
        return poisoned

    def cache_state(self) -> dict[str, Any]:
        fitted = hashlib.sha256(repr((self.size, self.pixels)).encode()).digest()
        return {**super().cache_state(), "pixels": cache_tag(subkey(fitted, "ops pixels"))}


def _moments(
    pictures: Dataset, labels: np.ndarray, num_classes: int, batch_size: int, progress: bool
) -> tuple[np.ndarray, np.ndarray]:
    """For every class, channel and place the sum of the levels and that of their squares: int64, exact."""
    (column,) = pictures.column_names
    shape = decode(pictures[0][column], where="row 0").pixels.shape
    sums, squares = np.zeros((2, num_classes, *shape), dtype=np.int64)
    batch_size = at_once(pictures, column, batch_size)
    starts = range(0, len(pictures), batch_size)
    for start in tqdm(starts, desc="ops: choosing pixels", unit=f"x{batch_size} rows", disable=not progress):
        values = pictures[start : start + batch_size][column]
        where = [f"row {start + i}" for i in range(len(values))]
        batch = [picture.pixels for picture in decode_many(values, where=where)]
        for at, pixels in zip(where, batch, strict=True):
            if pixels.shape != shape:
                raise ValueError(
                    f"{at}: expected pictures of one size, {shape[1]} x {shape[2]} pixels (height x width) as row 0, "
                    f"got {pixels.shape[1]} x {pixels.shape[2]}"
                )
        levels, own = torch.stack(batch).numpy(), labels[start : start + batch_size]
        for label in np.unique(own):
            some = levels[own == label]
            sums[label] += some.sum(0, dtype=np.int64)
            squares[label] += (some.astype(np.int32) ** 2).sum(0, dtype=np.int64)
    return sums, squares


def _scores(count: int, sums: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """mean(D) / std(D) of one class for every place and colour, (h, w, 8), float64; sums and squares are (3, h, w).

    The variance is a difference of whole numbers, exact in 64 bits up to 3.9 million rows a class.
    """
    scores = np.empty((*sums.shape[1:], 8))
    entries = 3 * count
    for code, colour in enumerate(_COLOURS):
        on = colour[:, None, None] == 1
        total = np.where(on, 255 * count - sums, sums).sum(0)
        total_of_squares = np.where(on, 255**2 * count - 510 * sums + squares, squares).sum(0)
        deviation = np.sqrt(entries * total_of_squares - total**2) / (255 * entries)
        scores[:, :, code] = total / (255 * entries) / (deviation + 1e-12)
    return scores


def _choose(
    counts: np.ndarray, sums: np.ndarray, squares: np.ndarray, sparsity: int
) -> tuple[tuple[tuple[int, int, int], ...], ...]:
    """For every class in turn, the best places and colours that no class before it has."""
    height, width = sums.shape[2:]
    used = np.zeros((height, width, 8), dtype=bool)
    pixels = []
    for label, count in enumerate(counts.tolist()):
        scores = np.where(used, -1, _scores(count, sums[label], squares[label]))
        own = []
        for _ in range(sparsity):
            row, column, colour = (int(i) for i in np.unravel_index(scores.argmax(), scores.shape))
            if scores[row, column, colour] < 0:
                raise ValueError(
                    f"expected at most as many pixels as there are: {sparsity} for each of {len(counts)} classes are "
                    f"more than {height} x {width} places of 8 colours can give"
                )
            own.append((row, column, colour))
            used[row, column, colour] = True
            scores[row, column] = -1
        pixels.append(tuple(own))
    return tuple(pixels)
