import inspect
import re
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Image, Value, load_dataset
from torchvision.transforms.v2 import functional as tvf

from hf_unlearnable.batches import Batches, share, stratified_rows
from hf_unlearnable.images import decode

from .conftest import make_dataset, noise_pictures, pixels


def load(dataset: Dataset, **options) -> Batches:
    return Batches.load(dataset, progress=False, **options)


def numbered(labels: list[int], classes: int) -> Batches:
    """Rows whose first pixel tells their number."""
    x = torch.zeros(len(labels), 3, 2, 2, dtype=torch.uint8)
    x[:, 0, 0, 0], x[:, 1, 0, 0] = torch.arange(len(labels)) % 256, torch.arange(len(labels)) // 256
    names = tuple(f"class{i}" for i in range(classes))
    return Batches(pixels=x, labels=torch.tensor(labels, dtype=torch.int64), classes=names)


def numbers(batch_pixels: torch.Tensor) -> list[int]:
    return (batch_pixels[:, 0, 0, 0].int() + 256 * batch_pixels[:, 1, 0, 0].int()).tolist()


# ---------------------------------------------------------------------------------------------------------- loading


def test_a_split_without_labels_is_one_class_only_where_that_is_asked_for(small: Dataset) -> None:
    bare = small.remove_columns("label")
    with pytest.raises(ValueError, match="no label column"):
        Batches.load(bare, progress=False)
    with pytest.raises(ValueError, match="is not a column"):
        Batches.load(bare, label_column="label", labelled=False, progress=False)
    found = Batches.load(bare, rows=5, labelled=False, progress=False)
    assert (found.classes, found.labels.tolist()) == (("all",), [0] * 5)
    known = Batches.load(small, labelled=False, progress=False)
    assert known.labels.tolist() == small["label"][:]


def test_load_holds_what_a_reader_sees(small: Dataset) -> None:
    batches = load(small)
    assert np.array_equal(batches.pixels.permute(0, 2, 3, 1).numpy(), pixels(small))
    assert batches.labels.tolist() == small["label"][:]
    assert batches.classes == ("class0", "class1", "class2", "class3")
    assert (len(batches), batches.image_size) == (24, (32, 32))


@pytest.mark.parametrize("kind", ["numpy", "torch", "pandas"])
def test_the_format_of_the_dataset_does_not_matter(small: Dataset, kind: str) -> None:
    assert torch.equal(load(small.with_format(kind)).pixels, load(small).pixels)


def test_other_columns_are_not_decoded(small: Dataset) -> None:
    other = Dataset.from_dict({"other": [{"bytes": b"no picture", "path": None}] * 24}).cast_column("other", Image())
    both = small.add_column("other", other.cast_column("other", Image(decode=False))["other"][:])
    both = both.cast_column("other", Image())
    with pytest.raises(ValueError, match=r"got \['img', 'other'\]"):
        load(both)
    assert torch.equal(load(both, image_column="img").pixels, load(small).pixels)


def test_bare_integers_give_numbers_as_names(small: Dataset) -> None:
    batches = load(small.cast_column("label", Value("int64")))
    assert batches.classes == ("0", "1", "2", "3")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, None, 3], "row 2: expected a label, got None"),
        ([0, -1, 2, -1], r"row 1: expected a label in 0 to 3, got -1 \(2 of 4 rows\)"),
    ],
)
def test_unusable_labels_name_the_row(labels: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(make_dataset(noise_pictures(4), labels))


def test_bare_integers_that_are_no_labels_name_the_row() -> None:
    dataset = make_dataset(noise_pictures(3), [0, 1, 2]).remove_columns("label").add_column("label", [1, 77, 2])
    with pytest.raises(ValueError, match="row 1: expected labels 0 to K - 1, got 77"):
        load(dataset)


def test_an_unreadable_picture_names_its_row_in_the_dataset() -> None:
    dataset = make_dataset(noise_pictures(40), [i % 4 for i in range(40)]).cast_column("img", Image(decode=False))
    broken = dataset.map(lambda row, i: {"img": {"bytes": b"??", "path": None}} if i == 31 else {}, with_indices=True)
    with pytest.raises(ValueError, match="row 31"):
        load(broken.cast_column("img", Image()))
    with pytest.raises(ValueError, match="row 31"):
        load(broken.cast_column("img", Image()), rows=39)


def test_pictures_of_several_sizes_name_the_row_and_the_way_out() -> None:
    dataset = make_dataset([*noise_pictures(2), *noise_pictures(1, 24, 40), *noise_pictures(2)], [0, 1, 2, 3, 0])
    with pytest.raises(ValueError, match=r"row 2: expected 32 x 32 pixels .* got 24 x 40; image_size=32"):
        load(dataset)
    batches = load(dataset, image_size=20)
    assert batches.image_size == (20, 20)
    odd = decode(dataset[2]["img"]).pixels
    expected = tvf.center_crop(tvf.resize(odd, [20, 33], antialias=True), [20, 20])
    assert torch.equal(batches.pixels[2], expected)
    even = decode(dataset[3]["img"]).pixels
    assert torch.equal(batches.pixels[3], tvf.resize(even, [20, 20], antialias=True))


@pytest.mark.parametrize("size", [(16, 48), (48, 16), (33, 32), (2, 3)])
def test_any_size_covers_and_cuts(small: Dataset, size: tuple[int, int]) -> None:
    assert load(small, image_size=size).image_size == size


def test_the_size_that_they_have_leaves_pixels_alone(small: Dataset) -> None:
    assert torch.equal(load(small, image_size=32).pixels, load(small).pixels)


def test_transparent_pictures_are_refused() -> None:
    import PIL.Image

    clear = PIL.Image.fromarray(np.concatenate([noise_pictures(1)[0], np.full((32, 32, 1), 9, np.uint8)], axis=2))
    solid = PIL.Image.fromarray(np.concatenate([noise_pictures(1)[0], np.full((32, 32, 1), 255, np.uint8)], axis=2))
    with pytest.raises(ValueError, match="row 1: expected an opaque picture"):
        load(make_dataset([solid, clear], [0, 1]))
    assert len(load(make_dataset([solid, solid], [0, 1]))) == 2


def test_what_is_no_split_is_refused(small: Dataset) -> None:
    unchecked: Any = inspect.unwrap(Batches.load.__func__)  # type: ignore[attr-defined]  (without the tests' type checker)
    with pytest.raises(TypeError, match="choose a split"):
        unchecked(Batches, DatasetDict(train=small))
    with pytest.raises(TypeError, match="IterableDataset"):
        unchecked(Batches, small.to_iterable_dataset())
    with pytest.raises(ValueError, match="set_transform"):
        load(small.with_transform(lambda batch: batch))
    with pytest.raises(ValueError, match="at least one row"):
        load(small.select([]))


def test_rows_depend_on_labels_alone_and_keep_their_order(small: Dataset) -> None:
    other = make_dataset(noise_pictures(24, seed=5), small["label"][:])
    chosen, twin = load(small, rows=8), load(other, rows=8)
    assert torch.bincount(chosen.labels).tolist() == [2, 2, 2, 2]
    everything = load(small).pixels
    places = [int((everything == row).flatten(1).all(1).nonzero()[0]) for row in chosen.pixels]
    assert places == sorted(places)
    assert torch.equal(twin.pixels, load(other).select(places).pixels)
    assert not torch.equal(load(small, rows=8, rows_key=1).pixels, chosen.pixels)
    with pytest.raises(ValueError, match="expected 0 to 24 rows, got 25"):
        load(small, rows=25)


def test_real_grayscale_pictures(real_data: Path) -> None:
    dataset = load_dataset(str(real_data / "imagenette-224-subset"), split="validation[:60]")
    batches = load(dataset)
    assert batches.image_size == (224, 224)
    assert dataset[38]["image"].mode == "L"
    for i in (0, 38, 59):
        assert np.array_equal(
            batches.pixels[i].permute(1, 2, 0).numpy(), np.asarray(dataset[i]["image"].convert("RGB"))
        )


# -------------------------------------------------------------------------------------------------------- selecting


def quotas_by_hand(counts: list[int], total: int) -> list[int]:
    shares = [count * total / sum(counts) for count in counts]
    quotas = [int(share) for share in shares]
    while sum(quotas) < total:
        left = [share - quota for share, quota in zip(shares, quotas, strict=True)]
        quotas[left.index(max(left))] += 1
    return quotas


@pytest.mark.parametrize("counts", [[10, 10, 10], [1, 2, 30], [7, 0, 5], [3], [1, 1, 1, 1]])
@pytest.mark.parametrize("share_kept", [0.0, 0.1, 0.34, 0.5, 1.0])
def test_stratified_rows_have_exact_counts(counts: list[int], share_kept: float) -> None:
    labels = torch.tensor([c for c, count in enumerate(counts) for _ in range(count)])
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))]
    total = round(share_kept * len(labels))
    rows = stratified_rows(labels, total, key=3)
    assert rows.tolist() == sorted(set(rows.tolist()))
    assert torch.bincount(labels[rows], minlength=len(counts)).tolist() == quotas_by_hand(counts, total)


def test_stratified_rows_are_drawn_from_the_whole_class_by_key() -> None:
    labels = torch.arange(40) % 2
    seen = torch.stack([torch.bincount(stratified_rows(labels, 10, key=key), minlength=40) for key in range(200)])
    assert seen.sum(0).min() > 25
    assert seen.sum(0).max() < 80
    assert torch.equal(stratified_rows(labels, 10, key=5), stratified_rows(labels, 10, key=5))


def test_split_is_a_partition_class_by_class() -> None:
    batches = numbered([i % 3 for i in range(90)] + [3] * 10, 4)
    training, validation = batches.split(0.1, key=0)
    assert sorted(numbers(training.pixels) + numbers(validation.pixels)) == list(range(100))
    assert torch.bincount(validation.labels).tolist() == [3, 3, 3, 1]
    assert numbers(training.pixels) == sorted(numbers(training.pixels))
    again, other = batches.split(0.1, key=0)[1], batches.split(0.1, key=1)[1]
    assert numbers(again.pixels) == numbers(validation.pixels) != numbers(other.pixels)
    whole, none = batches.split(0, key=0)
    assert (len(whole), len(none), none.classes) == (100, 0, batches.classes)
    for wrong in (-0.1, 1.0, 1.5):
        with pytest.raises(ValueError, match="validation_fraction"):
            batches.split(wrong, key=0)
    with pytest.raises(ValueError, match="no training row"):
        batches.select([0]).split(0.9, key=0)


def test_relabel_matches_by_name() -> None:
    batches = numbered([0, 1, 2, 2], 3)
    moved = batches.relabel(("class2", "other", "class0", "class1"))
    assert moved.labels.tolist() == [2, 3, 0, 0]
    assert [moved.classes[i] for i in moved.labels] == [batches.classes[i] for i in batches.labels]
    with pytest.raises(
        ValueError, match=re.escape("row 1: expected one of the classes (class0, class2), got 'class1'")
    ):
        batches.relabel(("class0", "class2"))
    assert numbered([0, 2], 3).relabel(("class2", "class0")).labels.tolist() == [1, 0]


def test_digest_tells_pixels_labels_and_names_apart() -> None:
    batches = numbered([0, 1, 2, 0], 3)
    changed = batches.pixels.clone()
    changed[3, 2, 1, 1] += 1
    others = [
        Batches(pixels=changed, labels=batches.labels, classes=batches.classes),
        Batches(pixels=batches.pixels, labels=batches.labels.flip(0), classes=batches.classes),
        Batches(pixels=batches.pixels, labels=batches.labels, classes=("a", "b", "c")),
        Batches(pixels=batches.pixels.view(4, 3, 1, 4), labels=batches.labels, classes=batches.classes),
    ]
    assert len({batches.digest(), *(other.digest() for other in others)}) == 5
    assert numbered([0, 1, 2, 0], 3).digest() == batches.digest()


# ----------------------------------------------------------------------------------------------------------- epochs


@pytest.mark.parametrize(("rows", "batch_size", "world"), [(103, 10, 1), (103, 10, 3), (21, 10, 4), (12, 4, 2)])
@pytest.mark.parametrize("drop_last", [False, True])
def test_processes_together_take_every_row_once(rows: int, batch_size: int, world: int, drop_last: bool) -> None:
    batches = numbered([0] * rows, 1)
    how = {"key": 5, "batch_size": batch_size, "drop_last": drop_last}
    alone = list(batches.epoch(2, **how))
    assert (
        len(alone)
        == batches.steps(batch_size, drop_last=drop_last)
        == (rows // 10 + (not drop_last) if rows != 12 else 3)
    )
    ranks = [list(batches.epoch(2, rank=rank, world=world, **how)) for rank in range(world)]
    for step, whole in enumerate(alone):
        parts = [batch[step] for batch in ranks]
        assert torch.equal(torch.cat([part.pixels for part in parts]), whole.pixels)
        assert torch.equal(torch.cat([part.labels for part in parts]), whole.labels)
        sizes = [len(part.labels) for part in parts]
        assert max(sizes) - min(sizes) <= 1
        assert {part.size for part in parts} == {len(whole.labels)}
        assert [part.part.stop - part.part.start for part in parts] == sizes
    seen = [n for batch in alone for n in numbers(batch.pixels)]
    assert len(seen) == len(set(seen)) == (rows // batch_size * batch_size if drop_last else rows)


def test_order_depends_on_key_and_epoch_only() -> None:
    batches = numbered([0] * 50, 1)

    def order(epoch: int, key: int, start_step: int = 0) -> list[list[int]]:
        return [numbers(b.pixels) for b in batches.epoch(epoch, key=key, batch_size=8, start_step=start_step)]

    assert order(0, 1) == order(0, 1)
    assert order(0, 1) != order(1, 1) != order(1, 2)
    assert order(3, 1, start_step=4) == order(3, 1)[4:]
    assert sorted(chain(*order(0, 1))) == list(range(50))
    assert list(chain(*order(0, 1))) != list(range(50))


@pytest.mark.parametrize("world", [1, 2, 5])
def test_chunks_take_every_row_once_in_order(world: int) -> None:
    batches = numbered([i % 2 for i in range(23)], 2)
    seen = [n for rank in range(world) for x, _ in batches.chunks(4, rank=rank, world=world) for n in numbers(x)]
    assert seen == list(range(23))


def test_shares_are_disjoint_and_even() -> None:
    for size in range(20):
        for world in range(1, 9):
            taken = [row for rank in range(world) for row in range(size)[share(size, rank, world)]]
            assert taken == list(range(size))
    with pytest.raises(ValueError, match=r"rank is in \[0, 2\)"):
        share(5, 2, 2)


def test_a_label_outside_the_classes_names_the_row(small: Dataset) -> None:
    x = torch.zeros(3, 3, 2, 2, dtype=torch.uint8)
    with pytest.raises(ValueError, match="row 2: expected a label in 0 to 1, got 2"):
        Batches(pixels=x, labels=torch.tensor([0, 1, 2]), classes=("a", "b"))
    assert small.features["label"] == ClassLabel(names=["class0", "class1", "class2", "class3"])
