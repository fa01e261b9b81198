"""Noise is found by the picture it was made for, and by nothing else."""

import pickle
from pathlib import Path

import pytest
import torch

from hf_unlearnable.images import digest
from hf_unlearnable.poisons import noise_bank
from hf_unlearnable.poisons.noise_bank import NoiseBank
from hf_unlearnable.surrogate import Surrogate


def pictures(rows: int, size: int = 3) -> torch.Tensor:
    return torch.arange(rows * 3 * size * size, dtype=torch.float64).view(rows, 3, size, size).mul(7).to(torch.uint8)


def digests(u: torch.Tensor) -> list[bytes]:
    return [digest(row) for row in u]


def surrogate(bank: NoiseBank | None) -> Surrogate:
    return Surrogate(
        method="em",
        settings={},
        classes=("a", "b"),
        image_size=(3, 3),
        networks={},
        tensors={"other": torch.zeros(1)} if bank is None else bank.tensors(),
        provenance={},
    )


def test_noise_is_whole_levels_rounded_half_to_even() -> None:
    levels = torch.tensor([0.0, 0.5, 1.5, 2.5, -0.5, -1.5, 7.6, -7.4, 127.4])
    delta = (levels / 255).repeat(3).view(1, 3, 3, 3)
    found = NoiseBank.of(pictures(1), delta).noise
    assert found.dtype == torch.int8
    assert found[0, 0].flatten().tolist() == [0, 0, 2, 2, 0, -2, 8, -7, 127]


def test_every_picture_is_found_in_any_order_and_an_unknown_one_is_not() -> None:
    u = pictures(5)
    bank = NoiseBank.of(u, torch.zeros(5, 3, 3, 3))
    assert bank.find(digests(u.flip(0))) == [4, 3, 2, 1, 0]
    changed = u[2].clone()
    changed[0, 0, 0] += 1
    assert bank.find([digest(u[3]), digest(changed)]) == [3, None]
    assert bank.find([]) == []


def test_of_equal_pictures_the_first_ones_noise_counts() -> None:
    u = pictures(4)[[0, 1, 0, 2]]
    bank = NoiseBank.of(u, torch.zeros(4, 3, 3, 3))
    assert bank.find(digests(u)) == [0, 1, 0, 3]


def test_a_label_is_part_of_what_noise_is_found_by() -> None:
    u = pictures(3)[[0, 1, 0]]
    bank = NoiseBank.of(u, torch.zeros(3, 3, 3, 3), torch.tensor([5, 1, 2]))
    assert bank.find(digests(u), [5, 1, 2]) == [0, 1, 2]
    assert bank.find(digests(u), [2, 5, 5]) == [2, None, 0]
    with pytest.raises(ValueError, match="expected labels to find"):
        bank.find(digests(u))
    with pytest.raises(ValueError, match="expected no labels"):
        NoiseBank.of(u, torch.zeros(3, 3, 3, 3)).find(digests(u), [5, 1, 2])


@pytest.mark.parametrize(("bad", "told"), [(float("nan"), "nan"), (128 / 255, "128"), (-1.0, "255")])
def test_noise_that_does_not_fit_is_refused_and_the_row_named(
    bad: float, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(noise_bank, "_ROWS", 2)
    delta = torch.zeros(5, 3, 3, 3)
    delta[3, 1, 0, 2] = bad
    with pytest.raises(ValueError, match=f"row 3: expected noise of at most 127/255, got {told}/255"):
        NoiseBank.of(pictures(5), delta)


def test_parts_make_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    delta = torch.linspace(-0.03, 0.03, 5 * 27).view(5, 3, 3, 3)
    whole = NoiseBank.of(pictures(5), delta.half())
    monkeypatch.setattr(noise_bank, "_ROWS", 2)
    assert torch.equal(NoiseBank.of(pictures(5), delta.half()).noise, whole.noise)


@pytest.mark.parametrize("labels", [None, torch.tensor([0, 1, 1])])
def test_it_comes_back_from_a_surrogates_file(labels: torch.Tensor | None, tmp_path: Path) -> None:
    u, delta = pictures(3), torch.arange(81.0).view(3, 3, 3, 3) / 255
    known = surrogate(NoiseBank.of(u, delta, labels))
    known = Surrogate.load(known.save(tmp_path / "s.safetensors"))
    bank = NoiseBank.in_surrogate(known)
    assert NoiseBank.in_surrogate(known) is bank
    assert bank.find(digests(u), None if labels is None else labels.tolist()) == [0, 1, 2]
    assert torch.equal(bank.noise, torch.arange(81).view(3, 3, 3, 3).to(torch.int8))
    assert len(pickle.dumps(known)) < 500, "the bank does not travel with a surrogate that has a file"


def test_a_surrogate_without_a_bank_says_so() -> None:
    with pytest.raises(ValueError, match="Surrogate.'em'.* holds no noise of known pictures"):
        NoiseBank.in_surrogate(surrogate(None))
