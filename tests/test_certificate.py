"""The certificate: the published vector, a plain binomial sum, and a model whose quantiles are known."""

import math
from statistics import NormalDist
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_unlearnable.certificate import Certificate, certify, largest_eta, quantile_index

NORMAL = NormalDist()


@pytest.mark.parametrize(("eta", "index"), [(0.05, 950), (0.1, 969), (0.2, 991), (0.3, 1000), (0.34, None)])
def test_published_indices(eta: float, index: int | None) -> None:
    assert quantile_index(1000, eta=eta) == index


def test_published_radii() -> None:
    radius = largest_eta(1000)
    assert radius == pytest.approx(0.3308, abs=5e-5)
    assert quantile_index(1000, eta=radius * 0.999) == 1000
    assert quantile_index(1000, eta=radius * 1.001) is None
    assert quantile_index(8919, eta=0.5) is None
    assert quantile_index(8920, eta=0.5) == 8920
    assert largest_eta(10) is None
    assert quantile_index(10, eta=0.0) is None


@pytest.mark.parametrize("draws", [1, 7, 60, 200])
@pytest.mark.parametrize(("quantile", "confidence"), [(0.9, 0.99), (0.5, 0.95), (0.3, 0.2), (0.05, 0.9)])
@pytest.mark.parametrize("eta", [0.0, 0.01, 0.2, 3.0])
def test_against_a_plain_sum(draws: int, quantile: float, confidence: float, eta: float) -> None:
    p = NORMAL.cdf(NORMAL.inv_cdf(quantile) + eta / 0.25)
    expected = None
    for k in range(draws, math.ceil(p * draws) - 1, -1):
        below = sum(math.comb(draws, i) * p**i * (1 - p) ** (draws - i) for i in range(k))
        if k >= 1 and below > confidence:
            expected = k
    assert quantile_index(draws, eta=eta, quantile=quantile, sigma=0.25, confidence=confidence) == expected


def test_a_radius_beyond_all_numbers_abstains() -> None:
    assert quantile_index(100, eta=1e6) is None


class OneWeight(nn.Module):
    """One weight, whose logistic value stands for the accuracy."""

    def __init__(self, value: float = 0.3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([value], dtype=torch.float64))


def logistic(model: Any) -> float:
    return float(model.weight.sigmoid())


def test_it_bounds_the_worst_quantile_with_the_confidence_it_states() -> None:
    sigma, quantile, eta, repeats = 0.5, 0.8, 0.15, 60
    worst = 1 / (1 + math.exp(-(0.3 + eta + sigma * NORMAL.inv_cdf(quantile))))
    bounds = []
    for seed in range(repeats):
        made = certify(
            OneWeight(), logistic, sigma=sigma, draws=120, quantile=quantile, confidence=0.9, seed=seed, progress=False
        )
        bound = made.bound(eta)
        assert bound is not None
        bounds.append(bound)
    missed = sum(bound < worst for bound in bounds)
    assert 1 <= missed <= 13  # about 10 % of 60: neither wrong nor idle
    assert max(bounds) < worst + 0.12


def test_the_bound_reads_the_sorted_accuracies() -> None:
    values = tuple(i / 1000 for i in range(1, 1001))
    made = Certificate(accuracies=values, unperturbed=0.9, sigma=0.25, quantile=0.9, confidence=0.99)
    assert [made.bound(eta) for eta in (0.05, 0.3, 0.34)] == [0.95, 1.0, None]
    assert made.largest_eta == largest_eta(1000)


class Mixed(nn.Module):
    """A frozen weight, a trained one, BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.trained = nn.Parameter(torch.full((2000,), 2.0))
        self.norm = nn.BatchNorm1d(4)
        self.norm.running_mean = torch.arange(4.0)


def test_noise_goes_to_trainable_weights_of_a_copy() -> None:
    model = Mixed().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen: list[dict[str, Tensor]] = []

    def watch(noisy: nn.Module) -> float:
        assert noisy is not model
        assert not any(module.training for module in noisy.modules())
        seen.append({name: value.clone() for name, value in noisy.state_dict().items()})
        return 0.5

    made = certify(model, watch, sigma=0.1, draws=30, seed=3, progress=False)
    assert (len(made.accuracies), made.unperturbed) == (30, 0.5)
    assert all(torch.equal(seen[0][name], value) for name, value in before.items())
    for state in seen[1:]:
        for name in ("frozen", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"):
            assert torch.equal(state[name], before[name])
        noise = state["trained"] - before["trained"]
        assert noise.std().item() == pytest.approx(0.1, rel=0.1)
        assert abs(noise.mean().item()) < 0.012  # five deviations: nothing adds up over the draws
        assert not torch.equal(state["norm.weight"], before["norm.weight"])
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert model.training
    assert model.norm.training


def test_a_draw_depends_on_its_number_and_the_seed() -> None:
    few, many, other = (
        certify(OneWeight(), logistic, draws=n, seed=s, progress=False) for n, s in ((5, 0), (9, 0), (9, 1))
    )
    assert set(few.accuracies) < set(many.accuracies)
    assert not set(many.accuracies) & set(other.accuracies)
    assert list(many.accuracies) == sorted(many.accuracies)


@pytest.mark.parametrize(
    "wrong",
    [{"sigma": 0.0}, {"draws": 0}, {"quantile": 1.0}, {"quantile": 0.0}, {"confidence": 1.0}],
)
def test_bad_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="got"):
        certify(OneWeight(), logistic, **{"draws": 2, "seed": 0, "progress": False, **wrong})
    with pytest.raises(ValueError, match="got"):
        largest_eta(**{"draws": 2, **wrong})
    with pytest.raises(ValueError, match="got"):
        quantile_index(**{"draws": 2, "eta": 0.1, **wrong})


def test_bad_models_accuracies_and_radii() -> None:
    with pytest.raises(ValueError, match="share in"):
        certify(OneWeight(), lambda model: 93.0, draws=2, seed=0, progress=False)
    with pytest.raises(ValueError, match="share in"):
        certify(OneWeight(), lambda model: math.nan, draws=2, seed=0, progress=False)
    with pytest.raises(ValueError, match="trainable"):
        certify(OneWeight().requires_grad_(False), logistic, draws=2, seed=0, progress=False)
    with pytest.raises(ValueError, match="eta"):
        quantile_index(10, eta=-0.1)
