"""The one map edge: from a row or a batch of `datasets` to pixels and back, for every poison and data defense."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

import datasets
import numpy as np
import torch
from datasets import Dataset, DatasetDict, Image, IterableDataset

from hf_unlearnable import columns
from hf_unlearnable.environment import keep_freed_memory
from hf_unlearnable.images import (
    MOST_THREADS,
    ImageFormat,
    Labels,
    Picture,
    Pixels,
    decode_many,
    encode,
    encode_many,
    in_threads,
    one_thread_in_workers,
    to_pil,
)
from hf_unlearnable.sizes import at_once

D = TypeVar("D", Dataset, DatasetDict, IterableDataset)
_CHECK_COLUMN = "__stored_sha256__"
VALUES_AT_ONCE = {"cpu": 1_000_000}
"""Values of pictures that are changed together: on a CPU as many as its caches hold, on an accelerator many more."""
LEAST_AT_ONCE, LARGE = 250_000, 50_000
"""Values that are worth a thread of their own, in pictures of so many: over small ones, threads wait for each other."""


@dataclass(frozen=True, kw_only=True)
class Transform:
    """Changes the pictures of a dataset: `ds.map(transform)`, batched or not, or `transform.apply(ds)`.

    The callable tells a row from a batch by itself. It returns the picture column only, so that other columns, labels
    and order stay as they are (Ray Data, which keeps only what it is handed back, gets every column); inputs are never
    mutated. Pictures are stored losslessly, from fresh pixels. Every picture is treated as RGB; transparency is carried
    over untouched. Pictures of several sizes may share a batch.

    Args:
        image_column: where the pictures are; None finds the one picture column.
        label_column: where the labels are; None finds the one label column, if the transform needs labels.
        image_format: "png" or "webp" (lossless; smaller for large pictures). A later map that hands WebP pictures back
            makes `datasets` store them anew with loss; PNG stays lossless.
        compress_level: 0 (stored) to 9 (smallest); see `images.encode`.
        device: where the arithmetic runs ("cpu", "cuda", ...). The pixels do not depend on it.
    """

    image_column: str | None = None
    label_column: str | None = None
    image_format: ImageFormat = "png"
    compress_level: int = 1
    device: str = field(default="cpu", compare=False)

    name: ClassVar[str]
    version: ClassVar[int] = 1
    """Raised whenever the pixels a transform makes change: caches of an older version are then not reused."""
    pure: ClassVar[bool] = False
    """Whether `change` is arithmetic alone, without networks: on a CPU, parts of a batch of large pictures then go to
    several threads."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _hash_by_cache_state(cls)

    def __post_init__(self) -> None:
        if self.image_format not in ("png", "webp"):
            raise ValueError(f'image_format is "png" or "webp", got {self.image_format!r}')
        if self.compress_level not in range(10):
            raise ValueError(f"compress_level is an int from 0 to 9, got {self.compress_level!r}")
        try:
            kind = torch.device(self.device).type
        except RuntimeError as error:
            raise ValueError(f"device={self.device!r} is not known to torch") from error
        if kind != "cpu" and not torch.accelerator.is_available():
            raise ValueError(f"device={self.device!r}: there is no accelerator here")

    # What a subclass defines.

    @property
    def needs_labels(self) -> bool:
        return False

    def change(self, pixels: Pixels, labels: Labels | None, where: Sequence[str]) -> Pixels:
        """The changed pixels of pictures of one size; `where` names each row in errors."""
        raise TypeError(f"{type(self).__name__} does not say how it changes pixels")

    def chosen(self, pictures: Sequence[Picture], labels: Sequence[int] | None) -> np.ndarray:
        """Which rows of a batch are changed, judged by each row alone (bool)."""
        return np.ones(len(pictures), dtype=bool)

    def chosen_exactly(self, dataset: Dataset, image_column: str, label_column: str | None) -> np.ndarray | None:
        """Which rows of a whole split are changed (bool), where that needs a look at the whole; else None."""
        return None

    def check_classes(self, names: Sequence[str] | None, where: str) -> None:
        """Raise ValueError if the transform was made for other classes than these."""

    @property
    def known_classes(self) -> Sequence[str] | None:
        """The classes the transform was told of, where the data name none."""
        return None

    def cache_state(self) -> dict[str, Any]:
        """What decides the stored bytes, as JSON values; it may be published, so it holds no key."""
        state = {f.name: getattr(self, f.name) for f in fields(self) if f.repr and f.compare}
        return {"transform": self.name, "version": self.version, **state}

    # Final.

    def __call__(self, example: Any) -> dict[str, Any]:
        """A row or a batch with its pictures changed.

        Raises:
            ValueError: an unreadable or missing picture, a bad label, an ambiguous column; names the row.
        """
        return self._on_example(example)

    def apply(
        self,
        dataset: D,
        *,
        split: str | None = None,
        num_proc: int | None = None,
        batch_size: int = 500,
        cache_dir: str | Path | None = None,
    ) -> D:
        """The dataset with its pictures changed: `ds.map` with the features, the cache and the checks looked after.

        Labels are checked before anything is written; what was stored is read back and compared. The result has the
        features and the format of `dataset`. Where a share of the rows is changed, it is changed exactly (a stream,
        which cannot be counted, gets each row's own draw, as with `ds.map`).

        Args:
            split: required for a DatasetDict, whose other splits are left alone: only training data is to be changed.
            num_proc: worker processes; None for none.
            batch_size: pictures held at most at a time; fewer of large ones (`sizes`), but in a stream, which cannot be
                looked at beforehand, always so many.
            cache_dir: folder for the cache files; default: `datasets`' own choice, beside the source's cache.

        Raises:
            ValueError: a batch size below 1; as `__call__`, naming the row of the split; a column that would not hold
                the result; a stored picture that differs.
            TypeError: not a Dataset, DatasetDict or IterableDataset.
        """
        if batch_size < 1:
            raise ValueError(f"expected a batch size of 1 or more, got {batch_size}")
        if isinstance(dataset, DatasetDict):
            if split is None:
                raise ValueError(
                    f"expected one split, got a DatasetDict of {list(dataset)}: only training data is to be changed; "
                    'say which with apply(ds, split="train")'
                )
            if split not in dataset:
                raise ValueError(f"split={split!r} is not in this DatasetDict of {list(dataset)}")
            done = self.apply(dataset[split], num_proc=num_proc, batch_size=batch_size, cache_dir=cache_dir)
            return cast(D, DatasetDict({**dataset, split: done}))
        if isinstance(dataset, IterableDataset):
            return cast(D, self._apply_to_stream(dataset, batch_size))
        if not isinstance(dataset, Dataset):
            raise TypeError(f"expected a Dataset, DatasetDict or IterableDataset, got {type(dataset).__name__}")
        return cast(D, self._apply_to_split(dataset, num_proc, batch_size, cache_dir))

    def _columns(self, features: Mapping[str, Any]) -> tuple[str, str | None]:
        image = columns.image_column(features, self.image_column)
        mode = features[image].mode
        if mode not in (None, "RGB", "RGBA"):
            raise ValueError(
                f"column {image!r} is read as mode {mode!r}, which would not show the changed colours: "
                f"ds.cast_column({image!r}, Image()) first"
            )
        return image, columns.label_column(features, self.label_column) if self.needs_labels else None

    def _apply_to_stream(self, dataset: IterableDataset, batch_size: int) -> IterableDataset:
        features = dataset.features
        if features is None:
            return dataset.map(self, batched=True, batch_size=batch_size)
        image, label = self._columns(features)
        names = columns.class_names(features, label) if label else None
        self.check_classes(names, f"column {label!r}")
        settled = replace(self, image_column=image, label_column=label)
        plain = dataset.cast_column(image, Image(decode=False))
        changed = plain.map(
            _Indexed(settled, image, label, stream=True, classes=len(names) if names else None),
            batched=True,
            batch_size=batch_size,
            with_indices=True,
            features=features,
        )
        return changed

    def _apply_to_split(
        self, dataset: Dataset, num_proc: int | None, batch_size: int, cache_dir: str | Path | None
    ) -> Dataset:
        image, label = self._columns(dataset.features)
        if label is not None:
            names = columns.class_names(dataset.features, label)
            self.check_classes(names, f"column {label!r}")
            known = names if names is not None else self.known_classes
            columns.check_labels(dataset.with_format("arrow")[label], known, label)
        features, form = dataset.features.copy(), dataset.format
        plain = dataset.with_format(None).cast_column(image, Image(decode=False))
        batch_size = max(1, at_once(plain, image, batch_size) // (num_proc or 1))
        chosen = self.chosen_exactly(plain, image, label)
        function = _Indexed(replace(self, image_column=image, label_column=label), image, label, chosen)
        state = json.dumps([plain._fingerprint, self.cache_state(), _CHECK_COLUMN], sort_keys=True)
        fingerprint = hashlib.sha256(state.encode()).hexdigest()[:32]
        stored = plain.map(
            function,
            batched=True,
            batch_size=batch_size,
            with_indices=True,
            num_proc=num_proc,
            features=datasets.Features({**plain.features, _CHECK_COLUMN: datasets.Value("binary")}),
            new_fingerprint=fingerprint,
            cache_file_name=None if cache_dir is None else str(Path(cache_dir) / f"cache-{fingerprint}.arrow"),
            desc=f"{self.name}: pictures",
        )
        stored.map(
            _ReadBack(image),
            batched=True,
            batch_size=batch_size,
            with_indices=True,
            num_proc=num_proc,
            desc=f"{self.name}: read back",
        )
        stored = stored.remove_columns(_CHECK_COLUMN).cast_column(image, features[image])
        return stored.with_format(form["type"], columns=form["columns"], **form["format_kwargs"])

    def _on_example(
        self,
        example: Any,
        *,
        indices: Sequence[int] | None = None,
        chosen: np.ndarray | None = None,
        read_back: bool = False,
        as_pictures: bool = False,
        classes: int | None = None,
    ) -> dict[str, Any]:
        one_thread_in_workers()
        if not isinstance(example, Mapping):
            raise TypeError(
                f"expected a row or batch of columns, got {type(example).__name__}: ds.with_format(None) first"
            )
        features = getattr(getattr(example, "formatter", None), "features", None)
        if features is not None:
            image, label = self._columns({name: features[name] for name in example if name in features})
        else:
            image, label = columns.of_example(example, self.image_column, self.label_column, self.needs_labels)
        is_batch = columns.is_batch(example[image], example[label] if label else None)
        values = list(example[image]) if is_batch else [example[image]]
        labels = None
        if label is not None:
            labels = list(example[label]) if is_batch else [example[label]]
        if indices is not None:
            where = [f"row {i}" for i in indices]
        else:
            where = [f"row {i} of the batch" for i in range(len(values))] if is_batch else ["this row"]
        checked = None
        if labels is not None:
            known = columns.class_names(features, cast(str, label)) if features is not None else None
            top = classes if classes is not None else len(known) if known else None
            checked = [
                columns.check_label(value, at, cast(str, label), top) for value, at in zip(labels, where, strict=True)
            ]
        pictures = decode_many(values, where=where)
        mask = self.chosen(pictures, checked) if chosen is None else chosen
        changed = self.change_pictures(pictures, checked, mask, where)
        if as_pictures or (type(example) is dict and values and not isinstance(values[0], dict | bytes)):
            stored: list[Any] = [to_pil(picture) for picture in changed]
        elif is_batch:
            how: dict[str, Any] = {"image_format": self.image_format, "compress_level": self.compress_level}
            stored = encode_many(changed, where=where if read_back else None, **how)
        else:
            stored = [encode(changed[0], image_format=self.image_format, compress_level=self.compress_level)]
        stored = [{"bytes": value, "path": None} if isinstance(value, bytes) else value for value in stored]
        result: dict[str, Any] = {image: stored if is_batch else stored[0]}
        if _from_ray(example, image):
            result = {**example, image: _objects(stored) if is_batch else stored[0]}
        return result

    def change_pictures(
        self, pictures: list[Picture], labels: list[int] | None, mask: np.ndarray, where: Sequence[str]
    ) -> list[Picture]:
        """Decoded pictures of any sizes: those of the mask changed, the others as they are.

        Args:
            where: what each row is called in errors.
        """
        here = torch.device(self.device).type == "cpu"
        if here:
            keep_freed_memory()
        changed = list(pictures)
        sizes: dict[torch.Size, list[int]] = {}
        rows_to_change = np.flatnonzero(mask)
        if labels is not None and self.pure:  # rows of a class beside each other
            rows_to_change = rows_to_change[np.argsort(np.asarray(labels)[rows_to_change], kind="stable")]
        for row in rows_to_change.tolist():
            sizes.setdefault(pictures[row].pixels.shape, []).append(row)
        most = VALUES_AT_ONCE.get(torch.device(self.device).type, 100_000_000)
        values = sum(shape.numel() * len(rows) for shape, rows in sizes.items())
        parallel = here and self.pure and values >= LARGE * len(rows_to_change)
        if parallel:
            most = min(most, max(LEAST_AT_ONCE, -(-values // MOST_THREADS)))

        def change(rows: list[int]) -> Pixels:
            pixels = torch.stack([pictures[row].pixels for row in rows]).to(self.device)
            y = None if labels is None else torch.tensor([labels[row] for row in rows], device=self.device)
            with torch.no_grad():
                return self.change(pixels, y, [where[row] for row in rows]).cpu()

        parts = list(_bounded(sizes, most))
        made = in_threads(change, parts) if parallel else map(change, parts)
        for rows, new in zip(parts, made, strict=True):
            for row, pixels in zip(rows, new.unbind(), strict=True):
                changed[row] = Picture(pixels, pictures[row].alpha)
        return changed


def _from_ray(example: Any, image: str) -> bool:
    """Whether this is a row or numpy batch of Ray Data, which keeps nothing but what it is handed back."""
    value = example[image]
    if isinstance(value, np.ndarray) and value.dtype.hasobject and len(value):
        value = value[0]
    return type(example) is dict and isinstance(value, dict | bytes)


def _objects(values: list[Any]) -> np.ndarray:
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


def _bounded(sizes: dict[torch.Size, list[int]], values: int) -> Iterator[list[int]]:
    """Rows of one size, in parts of so many values."""
    for shape, rows in sizes.items():
        few = max(1, values // shape.numel())
        for start in range(0, len(rows), few):
            yield rows[start : start + few]


@dataclass(frozen=True)
class _Indexed:
    """What `apply` maps: the transform with its columns settled, rows counted over the split, and a digest to check
    (in a stream: pictures in memory, which `datasets` would not decode)."""

    transform: Transform
    image: str
    label: str | None
    chosen: np.ndarray | None = None
    stream: bool = False
    classes: int | None = None

    def __call__(self, batch: Mapping[str, Any], indices: Sequence[int]) -> dict[str, Any]:
        narrow = {name: batch[name] for name in (self.image, self.label) if name is not None}
        chosen = None if self.chosen is None else self.chosen[np.asarray(indices)]
        changed = self.transform._on_example(
            narrow,
            indices=indices,
            chosen=chosen,
            read_back=not self.stream,
            as_pictures=self.stream,
            classes=self.classes,
        )
        if not self.stream:
            changed[_CHECK_COLUMN] = [hashlib.sha256(value["bytes"]).digest() for value in changed[self.image]]
        return changed


@dataclass(frozen=True)
class _ReadBack:
    """Compares the bytes that were stored with those that were made, and found to hold their pictures."""

    image: str

    def __call__(self, batch: Mapping[str, Any], indices: Sequence[int]) -> None:
        for value, expected, row in zip(batch[self.image], batch[_CHECK_COLUMN], indices, strict=True):
            if hashlib.sha256(value["bytes"]).digest() != expected:
                raise ValueError(f"row {row}, read back: the stored picture is not the one that was made")


def _hash_by_cache_state(cls: type[Transform]) -> None:
    """Make `datasets` fingerprint a transform by `cache_state()`: small, stable, and without the key.

    Only the pickler that makes fingerprints is told; pickling for worker processes stays complete.
    """
    from datasets.utils import _dill

    register = cast(Callable[[type], Callable[[Callable[..., None]], Any]], _dill.pklregister)

    @register(cls)
    def _save(pickler: Any, transform: Transform) -> None:
        state = json.dumps(transform.cache_state(), sort_keys=True)
        pickler.save_reduce(_Fingerprint, (type(transform).__qualname__, state), obj=transform)


def _Fingerprint(*parts: str) -> None:
    """Stands for a transform in a fingerprint; never called."""
