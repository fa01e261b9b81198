"""What every data defense promises, shown on small ones."""

import dataclasses
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from datasets import Dataset

from hf_unlearnable.batches import Batches
from hf_unlearnable.defenses.base import describe
from hf_unlearnable.defenses.data import DataDefense
from hf_unlearnable.defenses.displace import RandomDisplacement
from hf_unlearnable.defenses.sharpen import RandomSharpening
from hf_unlearnable.defenses.squeeze import Jpeg
from hf_unlearnable.draws import Draws, RandomNumbers
from hf_unlearnable.images import Images, Labels, Pixels
from tests.conftest import make_dataset, noise_pictures, pixels


@dataclass(frozen=True, kw_only=True)
class Dimmed(DataDefense):
    """A random brightness for every picture, and less of it for higher labels."""

    name: ClassVar[str] = "dimmed"

    least: float = 0.2

    @property
    def needs_labels(self) -> bool:
        return True

    def alter(self, x: Images, y: Labels | None, draws: RandomNumbers) -> Images:
        assert y is not None
        assert not torch.is_grad_enabled()
        share = self.least + (1 - self.least) * draws.uniform(1, 1, 1).to(x)
        return x * share / (1 + y.view(-1, 1, 1, 1))


@dataclass(frozen=True, kw_only=True)
class Beyond(DataDefense):
    """Leaves [0, 1]."""

    name: ClassVar[str] = "beyond"

    factor: float = 3.0

    def alter(self, x: Images, y: Labels | None, draws: RandomNumbers) -> Images:
        return (x - 0.5) * self.factor + 0.5


@dataclass(frozen=True, kw_only=True)
class Told(DataDefense):
    """Repeats what it is told of a row."""

    name: ClassVar[str] = "told"

    def change(self, pixels: Pixels, labels: Labels | None, where: Sequence[str]) -> Pixels:
        raise ValueError(",".join(where))


DEFENSES = [Dimmed(seed=5), RandomSharpening(seed=5), RandomDisplacement(seed=5), Jpeg(), Beyond()]
each = pytest.mark.parametrize("defense", DEFENSES, ids=lambda defense: defense.name)


@each
def test_on_a_split_is_what_map_stores(defense: DataDefense, small: Dataset) -> None:
    split = Batches.load(small, progress=False)
    kept = split.pixels.clone()
    stored = torch.from_numpy(pixels(small.map(defense, batched=True, batch_size=5))).permute(0, 3, 1, 2)
    for chunk in (1, 7, 500):
        changed = defense.on(split, chunk=chunk)
        assert torch.equal(changed.pixels, stored)
    assert torch.equal(changed.labels, split.labels)
    assert changed.classes == split.classes
    assert torch.equal(split.pixels, kept)
    assert (stored != kept).flatten(1).any(1).all()


@each
def test_every_way_of_mapping_gives_the_same_pixels(defense: DataDefense, small: Dataset) -> None:
    expected = pixels(defense.apply(small))
    assert np.array_equal(pixels(small.map(defense)), expected)
    stream = small.to_iterable_dataset().map(defense, batched=True, batch_size=9)
    assert np.array_equal(np.stack([np.asarray(row["img"]) for row in stream]), expected)
    order = np.random.default_rng(0).permutation(len(small))
    assert np.array_equal(pixels(small.select(order).map(defense, batched=True)), expected[order])


def test_processes_give_the_same_pixels(small: Dataset) -> None:
    defense = RandomSharpening(seed=2)
    assert np.array_equal(pixels(defense.apply(small, num_proc=2)), pixels(defense.apply(small)))


def test_the_seed_and_the_picture_decide(small: Dataset) -> None:
    one, same, other = (pixels(small.map(Dimmed(seed=seed), batched=True)) for seed in (0, 0, 1))
    assert np.array_equal(one, same)
    assert (one != other).any((1, 2, 3)).all()
    twice = make_dataset([*noise_pictures(1), *noise_pictures(1)], [1, 1])
    first, second = pixels(twice.map(Dimmed(), batched=True))
    assert np.array_equal(first, second)


def test_the_draws_are_the_seeds_and_the_names(small: Dataset) -> None:
    u = torch.from_numpy(pixels(small)).permute(0, 3, 1, 2).contiguous()
    y = torch.tensor(small["label"][:])
    with torch.no_grad():
        float32 = Dimmed(seed=3).alter(u.float() / 255, y, Draws(3, "dimmed", u)) * 255
        assert (Dimmed(seed=3).change(u, y, [""] * len(u)) - float32).abs().max() <= 0.5


def test_stored_values_are_rounded_and_clipped(small: Dataset) -> None:
    before = pixels(small).astype(np.float64)
    expected = np.clip(np.round((before / 255 - 0.5) * 3 * 255 + 127.5), 0, 255)
    assert np.abs(pixels(small.map(Beyond(), batched=True)) - expected).max() <= 1
    assert np.array_equal(pixels(small.map(Beyond(factor=1.0), batched=True)), before)


def test_it_is_a_value() -> None:
    defense = Dimmed(seed=5)
    assert pickle.loads(pickle.dumps(defense)) == defense  # noqa: S301
    assert hash(defense) == hash(dataclasses.replace(defense)) != hash(Dimmed(seed=6))
    assert defense.fit(batch(), seed=0) is defense
    state = defense.cache_state()
    assert (state["transform"], state["seed"], state["least"]) == ("dimmed", 5, 0.2)
    assert state != Dimmed(seed=6).cache_state()


def test_settings_say_nothing_of_storage() -> None:
    told = {"name": "dimmed", "version": 1, "seed": 5, "least": 0.2}
    assert describe(Dimmed(seed=5, image_format="webp", image_column="img")) == told


def batch() -> Batches:
    u = torch.from_numpy(noise_pictures(4, 8, 12)).permute(0, 3, 1, 2).contiguous()
    return Batches(pixels=u, labels=torch.arange(4), classes=("a", "b", "c", "d"))


def test_rows_are_named_over_the_split() -> None:
    with pytest.raises(ValueError, match="^row 0,row 1,row 2$"):
        Told().on(batch(), chunk=3)
    with pytest.raises(TypeError, match="DataDefense does not say how it alters pictures"):
        DataDefense().alter(torch.zeros(1, 3, 2, 2), None, Draws(0, "", torch.zeros(1, 3, 2, 2, dtype=torch.uint8)))
