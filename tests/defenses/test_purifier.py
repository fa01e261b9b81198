"""The adapter: what a purifier returns is checked, and its label stands for it."""

import pickle
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor

from hf_unlearnable.defenses.base import describe
from hf_unlearnable.defenses.purifier import Purifier
from hf_unlearnable.draws import FreshDraws
from tests.conftest import make_dataset, noise_pictures, pixels


def halved(x: Tensor) -> Tensor:
    return x / 2


def in_place(x: Tensor) -> Tensor:
    return x.mul_(0)


def centred(x: Tensor) -> Tensor:
    return 2 * x - 1


def broken(x: Tensor) -> Tensor:
    return x / 0


def smaller(x: Tensor) -> Tensor:
    return x[:, :, ::2]


def levels(x: Tensor) -> Tensor:
    return (x * 255).to(torch.uint8)


def nothing(x: Tensor) -> None:
    return None


def nearly(x: Tensor) -> Tensor:
    return x + 5e-5


@dataclass(frozen=True)
class Scaled:
    factor: float = 0.25

    def __call__(self, x: Tensor) -> Tensor:
        return self.factor * x


def on(purify: Any, x: Tensor | None = None) -> Tensor:
    x = torch.linspace(0, 1, 3 * 4 * 6).view(1, 3, 4, 6) if x is None else x
    return Purifier(purify=purify, label="test").alter(x, None, FreshDraws(len(x), torch.Generator()))


def test_it_is_the_function(small: Dataset) -> None:
    purifier = Purifier(purify=halved, label="halved")
    expected = np.round(pixels(small) / 2.0)
    assert np.array_equal(pixels(small.map(purifier)), expected)
    assert np.array_equal(pixels(small.map(purifier, batched=True, batch_size=7)), expected)
    assert np.array_equal(pixels(purifier.apply(small, num_proc=2)), expected)
    scaled = Purifier(purify=Scaled(), label="scaled 1/4")
    assert np.array_equal(pixels(small.map(scaled, batched=True)), np.round(pixels(small) / 4.0))
    mixed = make_dataset([*noise_pictures(2), *noise_pictures(1, 24, 40)], [0] * 3)
    for one, other in zip(mixed.map(purifier, batched=True), mixed, strict=True):
        assert np.array_equal(np.asarray(one["img"]), np.round(np.asarray(other["img"]) / 2.0))


def test_x_is_left_alone() -> None:
    x = torch.full((2, 3, 4, 6), 0.5)
    assert not on(in_place, x).any()
    assert (x == 0.5).all()
    assert on(halved, torch.empty(0, 3, 4, 6)).shape == (0, 3, 4, 6)


def test_rounding_errors_of_the_range_are_clipped() -> None:
    assert on(nearly).max() == 1


@pytest.mark.parametrize(
    ("purify", "error", "message"),
    [
        (centred, ValueError, r"'test': expected values in \[0, 1\], got -1 to 1: bring them from \[-1, 1\]"),
        (broken, ValueError, r"expected values in \[0, 1\], got nan"),
        (smaller, ValueError, r"expected pictures of shape \(1, 3, 4, 6\), got \(1, 3, 2, 6\)"),
        (levels, TypeError, "expected float pictures, got torch.uint8"),
        (nothing, TypeError, "expected float pictures, got NoneType"),
    ],
)
def test_what_is_wrong_is_told(purify: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        on(purify)


def test_it_is_a_value_told_apart_by_label_and_name() -> None:
    purifier = Purifier(purify=halved, label="a")
    assert pickle.loads(pickle.dumps(purifier)) == purifier  # noqa: S301
    assert purifier.cache_state()["label"] == "a"
    states = [
        Purifier(purify=purify, label=label).cache_state()  # type: ignore[arg-type]
        for purify, label in ((halved, "a"), (halved, "b"), (nearly, "a"), (Scaled(), "a"))
    ]
    assert all(one != other for i, one in enumerate(states) for other in states[:i])
    told = describe(Purifier(purify=Scaled(), label="a"))
    assert told == {"name": "purifier", "version": 1, "seed": 0, "label": "a", "function": f"{__name__}.Scaled"}


def test_functions_without_a_name_are_refused() -> None:
    def inner(x: Tensor) -> Tensor:
        return x

    for purify in (inner, lambda x: x):
        with pytest.raises(ValueError, match="expected a function or class of a module, got .*<l"):
            Purifier(purify=purify, label="a")
    with pytest.raises(ValueError, match="label: expected what the purifier is"):
        Purifier(purify=halved, label=" ")
