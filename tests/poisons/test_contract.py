"""What every poison promises, over one table of all of them."""

import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, Image

from hf_unlearnable import (
    ArPoison,
    ClustersPoison,
    CudaPoison,
    DeepConfusePoison,
    EmPoison,
    EntfPoison,
    HypoPoison,
    LspPoison,
    MinMaxMinPoison,
    NtgaPoison,
    OpsPoison,
    PilPoison,
    Poison,
    RandomNoisePoison,
    RobustEmPoison,
    SemPoison,
    Surrogate,
    SurrogatePoison,
    TapPoison,
)
from hf_unlearnable.batches import Batches
from hf_unlearnable.images import to_uint8
from hf_unlearnable.recipes import changed
from tests.conftest import make_dataset, noise_pictures, pixels

SECRET = bytes(range(32))
ROWS = 40


Make = Callable[[Dataset, int | bytes], Poison]


def fitted(poison: SurrogatePoison, backbone: str | None = "tiny", **how: Any) -> Make:
    """A poison whose surrogate is trained for a moment, once for all tests."""
    known: list[Surrogate] = []

    def make(source: Dataset, seed: int | bytes) -> Poison:
        if not known:
            recipe = changed(poison.recipe, batch_size=20, **how) if how else None
            rows = Batches.load(source, progress=False)
            known.append(poison.fit(rows, recipe=recipe, backbone=backbone, progress=False))
        return poison.from_surrogate(known[0], seed=seed)

    return make


QUICK: dict[str, Any] = {"pgd_steps": 2, "pgd_step_size": 5 / 255, "eot": 1, "adversarial_steps": 1}
POISONS: dict[str, Make] = {
    "ar": lambda _, seed: ArPoison(seed=seed, num_classes=4),
    "clusters": fitted(ClustersPoison(clusters=2, pretrained=False, feature_size=0, generator_width=4), epochs=1),
    "cuda": lambda _, seed: CudaPoison(seed=seed),
    "deep-confuse": fitted(DeepConfusePoison(outer_epochs=1, generator_width=4, generator_learning_rate=0.1), epochs=5),
    "em": fitted(EmPoison(max_rounds=1, train_steps_per_round=1, pgd_steps=2, pgd_step_size=5 / 255), epochs=5),
    "entf": fitted(EntfPoison(pgd_steps=3, adversarial_steps=1), epochs=1),
    "hypo": fitted(HypoPoison(pgd_steps=3), epochs=1),
    "lsp": lambda _, seed: LspPoison(seed=seed),
    "min-max-min": fitted(MinMaxMinPoison(**QUICK), steps=3),
    "ntga": fitted(NtgaPoison(block=20, pgd_steps=2, pgd_step_size=5 / 255), backbone=None),
    "ops": lambda source, seed: OpsPoison.fit(source, seed=seed, progress=False),
    "pil": fitted(PilPoison(pgd_steps=5), backbone=None, epochs=1),
    "random-noise": lambda _, seed: RandomNoisePoison(seed=seed),
    "robust-em": fitted(RobustEmPoison(**QUICK), steps=3),
    "sem": fitted(SemPoison(**QUICK), steps=3),
    "tap": fitted(TapPoison(pgd_steps=3, pgd_step_size=4 / 255), epochs=1),
}
KEYLESS = {"clusters", "deep-confuse", "em", "hypo", "ntga", "ops"}
"""Poisons whose pixels follow from what was fitted, not from the key."""


def same(one: np.ndarray, other: np.ndarray, poison: Poison) -> bool:
    """Equal pixels. A network's arithmetic may differ in its last bits between batch shapes: one value in a hundred."""
    return bool((one != other).mean() <= (0.01 if isinstance(poison, SurrogatePoison) else 0.0))


@pytest.fixture(scope="module")
def source() -> Dataset:
    return make_dataset(noise_pictures(ROWS), [i % 4 for i in range(ROWS)])


@pytest.fixture(params=POISONS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[7, SECRET], ids=["int", "secret"])
def poison(name: str, source: Dataset, request: pytest.FixtureRequest) -> Poison:
    poison = POISONS[name](source, request.param)
    if isinstance(poison, SurrogatePoison) and request.param == 7:
        pytest.skip("one kind of key is enough where a network takes its time")
    return poison


def test_the_name_is_the_tables(poison: Poison, name: str) -> None:
    assert poison.name == name


def test_it_is_a_value(poison: Poison, source: Dataset) -> None:
    assert dataclasses.is_dataclass(poison)
    assert pickle.loads(pickle.dumps(poison)) == poison  # noqa: S301
    assert hash(poison) == hash(dataclasses.replace(poison))
    with pytest.raises(dataclasses.FrozenInstanceError):
        poison.poison_rate = 0.5  # type: ignore[misc]


def test_every_way_of_mapping_gives_the_same_pixels(poison: Poison, source: Dataset) -> None:
    expected = pixels(source.map(poison, keep_in_memory=True))
    assert same(pixels(source.map(poison, batched=True, batch_size=7)), expected, poison)
    assert same(pixels(poison.apply(source)), expected, poison)
    stream = source.to_iterable_dataset().map(poison, batched=True, batch_size=9)
    assert same(np.stack([np.asarray(row["img"]) for row in stream]), expected, poison)
    order = np.random.default_rng(0).permutation(ROWS)
    assert same(pixels(source.select(order).map(poison, batched=True)), expected[order], poison)


def test_processes_give_the_same_pixels(name: str, source: Dataset) -> None:
    poison = POISONS[name](source, 7)
    assert same(pixels(poison.apply(source, num_proc=2)), pixels(poison.apply(source)), poison)


def test_the_budget_is_kept_and_something_changed(poison: Poison, source: Dataset) -> None:
    before, after = pixels(source), pixels(poison.apply(source))
    assert (before != after).any((1, 2, 3)).mean() > 0.9
    budget = poison.budget_for(32, 32)
    if budget is not None:
        budget.check(*[torch.from_numpy(p).permute(0, 3, 1, 2) for p in (before, after)])


def test_the_generator_keeps_shape_device_type_and_inputs(poison: Poison, source: Dataset) -> None:
    from hf_unlearnable.draws import Draws

    u = torch.from_numpy(pixels(source)).permute(0, 3, 1, 2).contiguous()
    x, y = u.float() / 255, torch.tensor(source["label"][:])
    kept, u_kept = x.clone(), u.clone()
    out = poison.perturb(x, y, Draws(poison.seed, poison.name, u))
    assert out.shape == x.shape
    assert out.dtype == torch.float32
    assert torch.equal(x, kept)
    poison.change(u, y, [""] * ROWS)
    assert torch.equal(u, u_kept)
    stored = poison.perturb_pixels(u, y, Draws(poison.seed, poison.name, u), [""] * ROWS)
    assert torch.equal(stored, to_uint8(out))


def test_another_key_gives_other_pixels(name: str, source: Dataset) -> None:
    if name in KEYLESS:
        pytest.skip("its pixels follow from what was fitted, not from the key")
    found = [pixels(POISONS[name](source, seed).apply(source)) for seed in (7, 8, SECRET)]
    assert not np.array_equal(found[0], found[1])
    assert not np.array_equal(found[0], found[2])


@pytest.mark.parametrize("rate", [0.0, 0.25, 0.5, 1.0])
def test_poison_rate_is_exact(name: str, source: Dataset, rate: float) -> None:
    poison = dataclasses.replace(POISONS[name](source, 7), poison_rate=rate)
    changed = (pixels(poison.apply(source)) != pixels(source)).any((1, 2, 3))
    whole = (pixels(dataclasses.replace(poison, poison_rate=1.0).apply(source)) != pixels(source)).any((1, 2, 3))
    assert changed.sum() <= round(rate * ROWS)
    assert changed.sum() >= round(rate * ROWS) - (~whole).sum()


def test_rows_are_nested_and_untouched_ones_share_the_container(name: str, source: Dataset) -> None:
    whole = POISONS[name](source, 7)
    full, before = pixels(whole.apply(source)), pixels(source)
    last = np.zeros(ROWS, dtype=bool)
    for rate in (0.2, 0.4, 0.8):
        applied = dataclasses.replace(whole, poison_rate=rate).apply(source)
        now = pixels(applied)
        changed = (now != before).any((1, 2, 3))
        assert same(now[changed], full[changed], whole)
        assert (changed >= last).all()
        last = changed
        heads = {row["bytes"][:8] for row in applied.cast_column("img", Image(decode=False))["img"]}
        assert heads == {b"\x89PNG\r\n\x1a\n"}


def test_rows_are_the_same_for_every_method(name: str, source: Dataset) -> None:
    poison = dataclasses.replace(POISONS[name](source, 7), poison_rate=0.5)
    reference = dataclasses.replace(RandomNoisePoison(seed=7), poison_rate=0.5)
    a, b = ((pixels(p.apply(source)) != pixels(source)).any((1, 2, 3)) for p in (poison, reference))
    assert (a <= b).all()


def test_mapped_rates_are_keyed_draws_of_each_row(name: str, source: Dataset) -> None:
    poison = dataclasses.replace(POISONS[name](source, 7), poison_rate=0.5)
    expected = pixels(source.map(poison, keep_in_memory=True))
    assert same(pixels(source.map(poison, batched=True, batch_size=9)), expected, poison)
    share = (expected != pixels(source)).any((1, 2, 3)).mean()
    assert 0.2 < share < 0.8


def test_chosen_classes(name: str, source: Dataset) -> None:
    poison = dataclasses.replace(POISONS[name](source, 7), classes=(1, 3))
    labels = np.asarray(source["label"][:])
    for mapped in (poison.apply(source), source.map(poison, batched=True)):
        changed = (pixels(mapped) != pixels(source)).any((1, 2, 3))
        assert not changed[(labels == 0) | (labels == 2)].any()
        assert changed[(labels == 1) | (labels == 3)].mean() > 0.9
    half = dataclasses.replace(poison, poison_rate=0.5).apply(source)
    changed = (pixels(half) != pixels(source)).any((1, 2, 3))
    assert not changed[(labels == 0) | (labels == 2)].any()
    assert 8 <= changed.sum() <= 10


def test_pictures_of_other_shapes(name: str, source: Dataset) -> None:
    if name == "ops" or isinstance(POISONS[name](source, 7), SurrogatePoison):
        pytest.skip("fitted to one size")
    for height, width in ((16, 40), (33, 31), (100, 130)):
        odd = make_dataset(noise_pictures(3, height, width), [0, 1, 2])
        assert pixels(POISONS[name](source, 7).apply(odd)).shape == (3, height, width, 3)


def test_settings_are_json_and_hold_no_key(poison: Poison) -> None:
    import json

    text = json.dumps(poison.settings())
    assert "seed" not in poison.settings()
    assert SECRET.hex() not in text
    assert "key" not in poison.settings()
