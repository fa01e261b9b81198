"""Detectors of a poisoned set: what they find in shortcuts and not in noise."""

import dataclasses
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hf_unlearnable import set_detection
from hf_unlearnable.batches import Batches
from hf_unlearnable.networks import create_network
from hf_unlearnable.recipes import Recipe
from hf_unlearnable.set_detection import Shifted, bias_shift_score, simple_network_score
from tests.test_detection import random_pictures, shortcut


@pytest.mark.parametrize("kind", ["linear", "two_layer"])
def test_a_simple_network_finds_a_shortcut_and_nothing_in_noise(kind: Any, accelerator: Accelerator) -> None:
    clean = random_pictures(600)
    settings: Any = {"kind": kind, "epochs": 25, "accelerator": accelerator, "seed": 0, "progress": False}
    found, nothing = simple_network_score(shortcut(clean), **settings), simple_network_score(clean, **settings)
    assert found.poisoned
    assert found.validation_accuracy > 0.8
    assert (found.train_rows, found.validation_rows) == (480, 120)
    assert not nothing.poisoned
    assert nothing.validation_accuracy < 0.45
    assert nothing.train_accuracy is not None
    assert 0.25 <= nothing.chance < 0.4
    assert found == simple_network_score(shortcut(clean), **settings)
    assert not simple_network_score(shortcut(clean), threshold=1.0, **settings).poisoned


def test_the_simple_networks_are_those_of_the_sheet(accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[list[tuple[int, ...]], Recipe, int, int]] = []
    plain = set_detection.train_to_end

    def watched(model: nn.Module, training: Batches, test: Batches, **options: Any) -> Any:
        shapes = [tuple(weight.shape) for weight in model.parameters()]
        asked.append((shapes, options["recipe"], len(training), len(test)))
        return plain(model, training, test, **options)

    monkeypatch.setattr(set_detection, "train_to_end", watched)
    for kind in ("linear", "two_layer"):
        simple_network_score(
            random_pictures(50),
            kind=kind,  # type: ignore[arg-type]
            epochs=2,
            accelerator=accelerator,
            seed=0,
            progress=False,
        )
    linear, two_layer = asked
    assert linear[0] == [(4, 126), (4,)]
    assert two_layer[0] == [(126, 126), (126,), (4, 126), (4,)]
    assert (linear[1].augmentation, two_layer[1].augmentation) == ("none", "crop_flip")
    assert (linear[2], linear[3]) == (40, 10)
    used = dataclasses.replace(two_layer[1], epochs=100)
    assert (used.learning_rate, used.momentum, used.weight_decay, used.batch_size) == (0.01, 0.9, 5e-4, 128)
    assert [used.rate(epoch, 100) for epoch in (74, 75, 89, 90)] == pytest.approx([1e-2, 1e-3, 1e-3, 1e-4])


def test_too_few_rows_to_hold_some_out(accelerator: Accelerator) -> None:
    with pytest.raises(ValueError, match="fifth"):
        simple_network_score(random_pictures(2), epochs=1, accelerator=accelerator, seed=0, progress=False)


def graded(rows: int) -> Batches:
    """As bright as the class says."""
    pixels = torch.randint(0, 40, (rows, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    labels = torch.arange(rows) % 4
    pixels += (50 * labels).to(torch.uint8)[:, None, None, None]
    return Batches(pixels=pixels, labels=labels, classes=("a", "b", "c", "d"))


def checkered(clean: Batches) -> Batches:
    """Every class gets a pattern of its own, on pictures of any brightness."""
    grid = torch.arange(16)
    patterns = torch.stack([(grid[:, None] * a + grid * b) % 4 < 2 for a, b in ((1, 0), (0, 1), (1, 1), (1, 3))])
    ground = torch.randint(0, 150, (len(clean), 1, 1, 1), generator=torch.Generator().manual_seed(1))
    pixels = ground + clean.pixels % 16 + 80 * patterns[clean.labels][:, None]
    return dataclasses.replace(clean, pixels=pixels.to(torch.uint8))


def test_a_network_of_darker_pictures_finds_a_pattern_and_not_brightness(accelerator: Accelerator) -> None:
    network = create_network("tiny", num_classes=4, image_size=16, seed=0)
    settings: Any = {"epochs": 30, "accelerator": accelerator, "seed": 0, "progress": False}
    clean = graded(400)
    plain = bias_shift_score(network, clean, shift=-1e-6, **settings)
    assert plain.validation_accuracy > 0.9, "brightness is easily learnt where it is the same"
    found, nothing = (bias_shift_score(network, rows, **settings) for rows in (checkered(clean), clean))
    assert found.poisoned
    assert not nothing.poisoned
    assert (found.train_rows, found.validation_rows, nothing.chance) == (320, 80, 0.25)
    assert found == bias_shift_score(network, checkered(clean), **settings)


def test_the_shift_is_of_the_training_alone() -> None:
    seen: list[Tensor] = []

    class Watch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            return x.mean((2, 3))

    x = torch.rand(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    Shifted(-0.5)(Watch(), x, torch.tensor([0, 1, 2, 0]), progress=0.0, generator=torch.Generator())
    assert torch.equal(seen[0], x - 0.5)


def test_no_shift_is_no_test(accelerator: Accelerator) -> None:
    with pytest.raises(ValueError, match="another number than 0"):
        bias_shift_score(nn.Identity(), random_pictures(50), shift=0.0, accelerator=accelerator, seed=0, progress=False)
