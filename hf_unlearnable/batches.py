"""A split held on a device: decoded once to uint8, then cut into keyed batches for any number of processes."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from datasets import Dataset, Image
from jaxtyping import Int, Shaped, UInt8
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf
from tqdm.auto import tqdm

from hf_unlearnable import columns, images
from hf_unlearnable.images import Labels, Pixels
from hf_unlearnable.keys import Key, torch_generator
from hf_unlearnable.sizes import at_once


class Batch(NamedTuple):
    """What one process gets of a batch: its rows, where they stand in the whole batch, and the size of the whole."""

    pixels: Pixels
    labels: Labels
    part: slice
    size: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Batches:
    """A split on a device.

    Args:
        pixels: uint8 RGB, one size for all.
        labels: int64 in [0, len(classes)).
        classes: names in label order; the numbers as text where the data gives no names.
    """

    pixels: UInt8[Tensor, "n 3 h w"]
    labels: Int[Tensor, " n"]
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.pixels.dim() != 4 or self.pixels.shape[1] != 3 or self.pixels.dtype != torch.uint8:
            raise ValueError(f"pixels: expected uint8 (n, 3, h, w), got {self.pixels.dtype} {tuple(self.pixels.shape)}")
        if self.labels.shape != self.pixels.shape[:1] or self.labels.dtype != torch.int64:
            raise ValueError(
                f"labels: expected int64 ({len(self.pixels)},), got {self.labels.dtype} {tuple(self.labels.shape)}"
            )
        _check_labels(self.labels, len(self.classes), range(len(self.labels)))

    @classmethod
    def load(
        cls,
        dataset: Dataset,
        *,
        image_column: str | None = None,
        label_column: str | None = None,
        device: str | torch.device = "cpu",
        image_size: int | tuple[int, int] | None = None,
        rows: int | None = None,
        rows_key: Key = 0,
        labelled: bool = True,
        progress: bool = True,
    ) -> "Batches":
        """Decode a split once, in threads.

        Args:
            image_size: height and width in pixels (or one number for both): pictures are resized with antialiasing so
                that they just cover it, then cut at the centre. None: all pictures must be of one size already.
            rows: keep this many rows, drawn class by class (see `stratified_rows`); None keeps all.
            rows_key: what the rows are drawn from. The draw sees the labels alone: a clean and a poisoned version of
                a dataset give the same rows.
            labelled: False for what needs no labels: a split without a label column is taken for one class, "all".

        Raises:
            TypeError: not a map-style `Dataset`.
            ValueError: no rows, a transform set with `set_transform`, a label or a picture that cannot be used (the
                message names the row), pictures of different sizes, transparent pictures.
        """
        if not isinstance(dataset, Dataset):
            raise TypeError(
                f"expected a datasets.Dataset, got {type(dataset).__name__}: choose a split of a DatasetDict; "
                "write a stream to a Dataset first"
            )
        if dataset.format["type"] == "custom":
            raise ValueError("the dataset has a transform (set_transform); apply it with map, or call reset_format()")
        pictures = columns.image_column(dataset.features, image_column)
        label = _label_column(dataset, label_column, labelled)
        dataset = dataset.with_format(None).select_columns([pictures] if label is None else [pictures, label])
        dataset = dataset.cast_column(pictures, Image(decode=False))
        if label is None:
            labels, classes = _labels([0] * len(dataset), ("all",))
        else:
            names = columns.class_names(dataset.features, label)
            labels, classes = _labels(dataset.select_columns([label])[:][label], names)
        chosen = torch.arange(len(labels))
        if rows is not None:
            chosen = stratified_rows(labels, rows, key=rows_key)
            dataset, labels = dataset.select(chosen.tolist()), labels[chosen]
        pixels = _decode(dataset, pictures, chosen, image_size, device, progress)
        return cls(pixels=pixels, labels=labels.to(device), classes=classes)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.pixels.shape[2], self.pixels.shape[3]

    @property
    def device(self) -> torch.device:
        """Where the split is held."""
        return self.pixels.device

    def to(self, device: str | torch.device) -> "Batches":
        """The same split on another device."""
        return replace(self, pixels=self.pixels.to(device), labels=self.labels.to(device))

    def select(self, indices: Sequence[int] | Int[Tensor, " m"]) -> "Batches":
        """Some of the rows, in the order given."""
        index = torch.as_tensor(indices, dtype=torch.int64, device=self.device)
        return replace(self, pixels=self.pixels[index], labels=self.labels[index])

    def split(self, validation_fraction: float, *, key: Key) -> tuple["Batches", "Batches"]:
        """Training and validation rows: round(fraction * rows) are kept for validation, class by class, by key.

        Raises:
            ValueError: the fraction is outside [0, 1), or leaves no row for training.
        """
        if not 0 <= validation_fraction < 1:
            raise ValueError(f"validation_fraction is in [0, 1), got {validation_fraction}")
        count = round(validation_fraction * len(self))
        if count == len(self):
            raise ValueError(f"validation_fraction={validation_fraction} leaves no training row of {len(self)}")
        held = torch.zeros(len(self), dtype=torch.bool)
        held[stratified_rows(self.labels.cpu(), count, key=key)] = True
        return self.select((~held).nonzero()[:, 0]), self.select(held.nonzero()[:, 0])

    def relabel(self, classes: Sequence[str]) -> "Batches":
        """The same rows with labels numbered as in `classes`: matched by name.

        Raises:
            ValueError: a row is of a class that `classes` lacks.
        """
        if tuple(classes) == self.classes:
            return self
        number = {name: i for i, name in enumerate(classes)}
        mapped = torch.tensor([number.get(name, -1) for name in self.classes], device=self.device)[self.labels]
        if bool((mapped < 0).any()):
            row = int((mapped < 0).nonzero()[0])
            raise ValueError(
                f"row {row}: expected one of the classes {_short(classes)}, got {self.classes[int(self.labels[row])]!r}"
                "; name bare integers with ds.cast_column(column, ClassLabel(names=...))"
            )
        return replace(self, labels=mapped, classes=tuple(classes))

    def steps(self, batch_size: int, *, drop_last: bool = False) -> int:
        """The number of batches in an epoch."""
        return len(self) // batch_size if drop_last else -(-len(self) // batch_size)

    def epoch(
        self,
        epoch: int,
        *,
        key: Key,
        batch_size: int,
        drop_last: bool = False,
        rank: int = 0,
        world: int = 1,
        start_step: int = 0,
    ) -> Iterator[Batch]:
        """The batches of one epoch in an order drawn from key and epoch, the same on every process.

        Every process takes its own rows of every batch; together they take each row once, and their shares differ by
        one row at most (in a batch smaller than `world` some processes get none).

        Args:
            batch_size: rows of the whole batch, over all processes.
            rank: which process this is, in [0, world).
            start_step: batches to leave out at the beginning, for resuming in the middle of an epoch.
        """
        order = torch.randperm(len(self), generator=torch_generator(key, "order", epoch)).to(self.device)
        for step in range(start_step, self.steps(batch_size, drop_last=drop_last)):
            index = order[step * batch_size : (step + 1) * batch_size]
            part = share(len(index), rank, world)
            mine = index[part]
            yield Batch(self.pixels[mine], self.labels[mine], part, len(index))

    def chunks(self, batch_size: int, *, rank: int = 0, world: int = 1) -> Iterator[tuple[Pixels, Labels]]:
        """This process's share of the rows, in order, without copies: for evaluation."""
        part = share(len(self), rank, world)
        for start in range(part.start, part.stop, batch_size):
            rows = slice(start, min(start + batch_size, part.stop))
            yield self.pixels[rows], self.labels[rows]

    def digest(self) -> str:
        """SHA-256 of the class names, labels and pixels: which rows a network was trained on."""
        state = hashlib.sha256(repr((self.classes, tuple(self.pixels.shape))).encode())
        for tensor in (self.labels, self.pixels):
            for chunk in tensor.split(4096):
                state.update(chunk.cpu().numpy().tobytes())
        return state.hexdigest()


def share(size: int, rank: int, world: int) -> slice:
    """The rows of one process out of `size`: contiguous and disjoint; the shares differ by one row at most."""
    if not 0 <= rank < world:
        raise ValueError(f"rank is in [0, {world}), got {rank}")
    return slice(size * rank // world, size * (rank + 1) // world)


def stratified_rows(labels: Int[Tensor, " n"], rows: int, *, key: Key) -> Int[Tensor, " m"]:
    """`rows` indices in ascending order, each class in proportion (largest remainders), drawn from the key.

    Raises:
        ValueError: more rows than there are, or fewer than none.
    """
    if not 0 <= rows <= len(labels):
        raise ValueError(f"expected 0 to {len(labels)} rows, got {rows}")
    if rows == 0:
        return torch.empty(0, dtype=torch.int64)
    counts = torch.bincount(labels)
    quotas, remainders = counts * rows // len(labels), counts * rows % len(labels)
    quotas[remainders.argsort(descending=True, stable=True)[: rows - int(quotas.sum())]] += 1
    shuffled = torch.randperm(len(labels), generator=torch_generator(key, "stratified rows"))
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    rank_in_class = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[by_class]]
    return by_class[rank_in_class < quotas[labels[by_class]]].sort().values


def _short(names: Sequence[str]) -> str:
    return f"({', '.join(names[:10])}{', ...' if len(names) > 10 else ''})"


def _check_labels(labels: Int[Tensor, " n"], classes: int, rows: Sequence[int]) -> None:
    wrong = ((labels < 0) | (labels >= classes)).nonzero()
    if len(wrong):
        first = int(wrong[0])
        raise ValueError(
            f"row {rows[first]}: expected a label in 0 to {classes - 1}, got {int(labels[first])}"
            f" ({len(wrong)} of {len(labels)} rows); drop such rows with ds.filter"
        )


def _label_column(dataset: Dataset, given: str | None, labelled: bool) -> str | None:
    try:
        return columns.label_column(dataset.features, given)
    except ValueError:
        if labelled or given is not None:
            raise
        return None


def _labels(values: list[int | None], names: tuple[str, ...] | None) -> tuple[Int[Tensor, " n"], tuple[str, ...]]:
    if not values:
        raise ValueError("expected at least one row, got none")
    if None in values:
        raise ValueError(f"row {values.index(None)}: expected a label, got None; drop such rows with ds.filter")
    labels = torch.tensor(values, dtype=torch.int64)
    if names is None:
        if int(labels.max()) >= len(values):
            row = int(labels.argmax())
            raise ValueError(f"row {row}: expected labels 0 to K - 1, got {values[row]}; use ds.class_encode_column")
        names = tuple(str(i) for i in range(max(0, int(labels.max())) + 1))
    _check_labels(labels, len(names), range(len(values)))
    return labels, names


def _decode(
    dataset: Dataset,
    column: str,
    numbers: Int[Tensor, " n"],
    image_size: int | tuple[int, int] | None,
    device: str | torch.device,
    progress: bool,
    chunk: int = 1024,
) -> Pixels:
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    pixels: Tensor | None = None
    chunk = at_once(dataset, column, chunk)
    with tqdm(total=len(dataset), desc="decoding", unit="row", disable=not progress, leave=False) as bar:
        for start in range(0, len(dataset), chunk):
            where = [f"row {i}" for i in numbers[start : start + chunk].tolist()]
            pictures = images.decode_many(dataset[start : start + chunk][column], where=where)
            for name, picture in zip(where, pictures, strict=True):
                if picture.alpha is not None and bool((picture.alpha < 255).any()):
                    raise ValueError(f"{name}: expected an opaque picture, got one with transparency; flatten it first")
            planes = [picture.pixels for picture in pictures]
            if pixels is None:
                first = size or (planes[0].shape[1], planes[0].shape[2])
                pixels = torch.empty((len(dataset), 3, *first), dtype=torch.uint8, device=device)
            block = _resize(planes, size) if size else _stack(planes, where, (pixels.shape[2], pixels.shape[3]))
            pixels[start : start + chunk] = block.to(device)
            bar.update(len(planes))
    assert pixels is not None
    return pixels


def _stack(planes: list[Tensor], where: list[str], size: tuple[int, int]) -> Pixels:
    for name, plane in zip(where, planes, strict=True):
        if tuple(plane.shape[1:]) != size:
            raise ValueError(
                f"{name}: expected {size[0]} x {size[1]} pixels (height x width) as in the first row, got "
                f"{plane.shape[1]} x {plane.shape[2]}; image_size={min(size)} resizes and crops every picture"
            )
    return torch.stack(planes)


def _resize(planes: list[Tensor], size: tuple[int, int]) -> Pixels:
    out = torch.empty((len(planes), 3, *size), dtype=torch.uint8)
    places: dict[tuple[int, ...], list[int]] = {}
    for place, plane in enumerate(planes):
        places.setdefault(tuple(plane.shape), []).append(place)
    for group in places.values():
        out[group] = _cover(torch.stack([planes[place] for place in group]), size)
    return out


def _cover(x: Shaped[Tensor, "b 3 h w"], size: tuple[int, int]) -> Shaped[Tensor, "b 3 h2 w2"]:
    height, width = x.shape[2:]
    if (height, width) == size:
        return x
    scale = max(size[0] / height, size[1] / width)
    covering = [max(size[0], round(height * scale)), max(size[1], round(width * scale))]
    return tvf.center_crop(tvf.resize(x, covering, antialias=True), list(size))
