"""The Gaussian-mixture theory against torch's own distributions, plain matrices, quadrature and published figures."""

import json
import math
from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from hf_unlearnable.theory import Mixture, bayes_accuracy, toeplitz, toeplitz_eigen
from tests.conftest import load_script

PUBLISHED = [  # ||mu||, a_-1, a_1, then class +1, class -1, their mean (200,000 draws), the corrected bound
    (1, 0.3, 0.3, 0.839, 0.839, 0.839, 1.000),
    (1, 0.0, 0.3, 0.441, 0.919, 0.680, 0.982),
    (1, 0.1, 0.4, 0.179, 0.959, 0.569, 0.761),
    (1, 0.0, 0.45, 0.105, 0.965, 0.535, 0.661),
    (1, 0.05, 0.5, 0.025, 0.989, 0.507, 0.538),
    (2, 0.1, 0.4, 0.415, 0.994, 0.705, 0.950),
    (2, 0.0, 0.45, 0.237, 0.995, 0.616, 0.806),
    (2, 0.05, 0.5, 0.052, 0.998, 0.525, 0.574),
]
SLANTED = (0.9, -0.4, 0.1, 0.7, -1.1)


def even(norm: float, a_minus: float, a_plus: float, d: int = 10) -> Mixture:
    return Mixture((norm / math.sqrt(d),) * d, a_minus=a_minus, a_plus=a_plus)


def points(n: int, d: int) -> Tensor:
    return 2 * torch.randn(n, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(("norm", "a_minus", "a_plus", "plus", "minus", "mean", "bound"), PUBLISHED)
def test_published_figures(
    norm: int, a_minus: float, a_plus: float, plus: float, minus: float, mean: float, bound: float
) -> None:
    draws = 50_000
    mixture = even(norm, a_minus, a_plus)
    found = mixture.accuracy(draws, 0)
    for value, expected in ((found.plus, plus), (found.minus, minus), (found.mean, mean)):
        spread = math.sqrt(expected * (1 - expected) * (1 / draws + 1 / 200_000))
        assert value == pytest.approx(expected, abs=0.0005 + 4 * spread)
    assert mixture.bound() == pytest.approx(bound, abs=0.00051)


def test_the_clean_rule() -> None:
    assert bayes_accuracy((1 / math.sqrt(10),) * 10) == pytest.approx(0.8413, abs=5e-5)
    assert bayes_accuracy([0.0, 2.0]) == pytest.approx(0.9772, abs=5e-5)
    assert bayes_accuracy([0.0]) == 0.5


def test_a_toeplitz_matrix() -> None:
    expected = [[1, 0.2, 0, 0], [0.2, 1, 0.2, 0], [0, 0.2, 1, 0.2], [0, 0, 0.2, 1]]
    assert toeplitz(4, 0.2).tolist() == expected
    assert toeplitz(1, 0.5).tolist() == [[1]]


@pytest.mark.parametrize("d", [1, 2, 7, 40])
@pytest.mark.parametrize("a", [0.0, 0.13, 0.5])
def test_closed_eigenvalues_against_eigh(d: int, a: float) -> None:
    vectors, values = toeplitz_eigen(d, a)
    torch.testing.assert_close(values.flip(0), torch.linalg.eigh(toeplitz(d, a))[0], rtol=0, atol=1e-13)
    torch.testing.assert_close(vectors @ vectors, torch.eye(d, dtype=torch.float64), rtol=0, atol=1e-13)
    torch.testing.assert_close(vectors, vectors.T, rtol=0, atol=1e-15)
    torch.testing.assert_close(vectors @ values.diag() @ vectors, toeplitz(d, a), rtol=0, atol=1e-13)
    assert values.min() > 0


@pytest.mark.parametrize(("a_minus", "a_plus"), [(0.1, 0.4), (0.4, 0.1), (0.0, 0.5), (0.25, 0.25), (0.0, 0.0)])
@pytest.mark.parametrize("mu", [SLANTED, (0.7,), (0.0, 0.0)])
def test_the_score_is_twice_the_log_likelihood_ratio(mu: tuple[float, ...], a_minus: float, a_plus: float) -> None:
    x, centre = points(50, len(mu)), torch.tensor(mu, dtype=torch.float64)
    likelihoods = [
        MultivariateNormal(y * blur @ centre, blur @ blur).log_prob(x)
        for y, blur in ((1, toeplitz(len(mu), a_plus)), (-1, toeplitz(len(mu), a_minus)))
    ]
    found = Mixture(mu, a_minus, a_plus).score(x)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, 2 * (likelihoods[0] - likelihoods[1]), rtol=1e-12, atol=1e-10)


def test_accuracy_against_quadrature() -> None:
    mu, (a_minus, a_plus) = (0.8, -0.3), (0.1, 0.45)
    side = torch.linspace(-6, 6, 601, dtype=torch.float64)
    z = torch.cartesian_prod(side, side)
    weight = torch.exp(-z.square().sum(1) / 2) / (2 * math.pi) * (side[1] - side[0]) ** 2
    inverse = [toeplitz(2, a).inverse() for a in (a_minus, a_plus)]

    def right(y: int) -> float:
        x, centre = y * torch.tensor(mu, dtype=torch.float64) + z, torch.tensor(mu, dtype=torch.float64)
        far = [((x @ i + s * centre) ** 2).sum(1) - 2 * i.logdet() for i, s in zip(inverse, (1, -1), strict=True)]
        return float(weight[y * (far[0] - far[1]) > 0].sum())

    found = Mixture(mu, a_minus, a_plus).accuracy(200_000, 1)
    assert found.plus == pytest.approx(right(1), abs=0.005)
    assert found.minus == pytest.approx(right(-1), abs=0.005)
    assert found.mean == pytest.approx((right(1) + right(-1)) / 2, abs=4 * found.standard_error + 0.0005)


def test_one_dimension_is_never_blurred() -> None:
    mixture = Mixture((0.7,), 0.0, 0.5)
    found = mixture.accuracy(40_000, 0)
    assert found.minus == found.plus == pytest.approx(NormalDist().cdf(0.7), abs=0.008)
    assert mixture.bound() == 1


def test_the_standard_error_is_the_spread_over_keys() -> None:
    mixture = Mixture(SLANTED, 0.2, 0.35)
    found = [mixture.accuracy(400, key) for key in range(150)]
    spread = torch.tensor([one.mean for one in found], dtype=torch.float64).std().item()
    assert spread == pytest.approx(found[0].standard_error, rel=0.25)


def test_draws_depend_on_the_key_alone() -> None:
    mixture = Mixture(SLANTED, 0.2, 0.35)
    assert mixture.accuracy(500, 3) == mixture.accuracy(500, 3) != mixture.accuracy(500, 4)


def test_draws_of_several_blocks_are_all_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    mixture = Mixture(SLANTED, 0.2, 0.35)
    whole, bound = mixture.accuracy(3001, 0), mixture.bound(777)
    monkeypatch.setattr("hf_unlearnable.theory.BLOCK", 100 * len(SLANTED))
    cut = mixture.accuracy(3001, 0)
    assert cut.mean == pytest.approx(whole.mean, abs=6 * whole.standard_error)
    assert mixture.bound(777) == pytest.approx(bound, rel=1e-12)
    apart = even(40, 0.2, 0.2, d=5).accuracy(3001, 0)
    assert (apart.minus, apart.plus, apart.standard_error) == (1, 1, 0)


@pytest.mark.parametrize(("a_minus", "a_plus"), [(0.0, 0.5), (0.3, 0.1), (0.33, 0.33)])
def test_swapping_the_blurs_swaps_the_classes(a_minus: float, a_plus: float) -> None:
    one, other = Mixture(SLANTED, a_minus, a_plus), Mixture(SLANTED, a_plus, a_minus)
    here, there = one.accuracy(5000, 0), other.accuracy(5000, 0)
    assert (here.minus, here.plus) == (there.plus, there.minus)
    assert here.standard_error == there.standard_error
    assert one.bound(2000) == pytest.approx(other.bound(2000), rel=1e-12)


@pytest.mark.parametrize("mixture", [even(1, 0.1, 0.4), Mixture(SLANTED, 0.45, 0.2), Mixture((0.0, 0.0), 0.1, 0.5)])
def test_the_bound_against_plain_matrices(mixture: Mixture) -> None:
    d, steps = len(mixture.mu), 200
    mu, eye = torch.tensor(mixture.mu, dtype=torch.float64), torch.eye(d, dtype=torch.float64)
    minus, plus = toeplitz(d, mixture.a_minus), toeplitz(d, mixture.a_plus)
    a = torch.linalg.matrix_power(minus, -2) - torch.linalg.matrix_power(plus, -2)
    b = 2 * (minus.inverse() + plus.inverse()) @ mu
    c = 2 * (minus.logdet() - plus.logdet())
    total = 0.0
    for y in (1, -1):
        slope, constant = 2 * a @ mu + y * b, y * (mu @ a @ mu) + b @ mu + y * c
        end = 1 / (2 * torch.linalg.eigvalsh(y * a).max())
        values = []
        for k in range(steps):
            t = end * k / steps
            inner = eye - 2 * t * y * a
            power = t * constant + t**2 / 2 * slope @ inner.inverse() @ slope
            values.append(float(inner.det() ** -0.5 * power.exp() / 2))
        total += min(values)
    assert total < 0.99  # or nothing was tried
    assert mixture.bound(steps) == pytest.approx(total, rel=1e-9)


def test_the_bound_bounds_and_the_clean_rule_is_best() -> None:
    for mu in ((1 / math.sqrt(10),) * 10, SLANTED):
        for a_minus in (0.0, 0.15, 0.3, 0.4, 0.5):
            for a_plus in (0.0, 0.15, 0.3, 0.4, 0.5):
                mixture = Mixture(mu, a_minus, a_plus)
                found, bound = mixture.accuracy(4000, 0), mixture.bound(500)
                assert found.mean <= bound + 3 * found.standard_error
                assert found.mean <= bayes_accuracy(mu) + 3 * found.standard_error
                assert bound <= 1
                assert mixture.bound(4000) <= bound + 1e-12  # of the same values of t, and more


def test_when_the_bound_says_something() -> None:
    for a_minus, a_plus in ((0.0, 0.1), (0.0, 0.25), (0.0, 0.3), (0.2, 0.35), (0.45, 0.3)):
        mixture, d = even(1, a_minus, a_plus), 10
        mu = torch.tensor(mixture.mu, dtype=torch.float64)
        minus, plus = toeplitz(d, a_minus), toeplitz(d, a_plus)
        a = torch.linalg.matrix_power(minus, -2) - torch.linalg.matrix_power(plus, -2)
        linear = 2 * mu @ (minus.inverse() + plus.inverse()) @ mu
        rest = mu @ a @ mu + 2 * (minus.logdet() - plus.logdet()) + a.trace()
        assert (mixture.bound() < 1) == bool((linear + rest < 0) | (linear - rest < 0))


@pytest.mark.parametrize("a", [-0.01, 0.51, math.nan])
def test_bad_blurs(a: float) -> None:
    for make in (lambda: toeplitz(3, a), lambda: Mixture((1.0,), a, 0.1), lambda: Mixture((1.0,), 0.1, a)):
        with pytest.raises(ValueError, match=r"lies in \[0, 0.5\], got"):
            make()


def test_bad_sizes() -> None:
    for make in (lambda: toeplitz(0, 0.1), lambda: toeplitz_eigen(-1, 0.1), lambda: Mixture((), 0.1, 0.2)):
        with pytest.raises(ValueError, match="at least one dimension"):
            make()
    with pytest.raises(ValueError, match="finite"):
        Mixture((1.0, math.inf), 0.1, 0.2)
    mixture = Mixture(SLANTED, 0.1, 0.2)
    with pytest.raises(ValueError, match="5 dimensions, got 4"):
        mixture.score(points(2, 4))
    with pytest.raises(ValueError, match="2 draws, got 1"):
        mixture.accuracy(1, 0)
    with pytest.raises(ValueError, match="value of t, got 0"):
        mixture.bound(0)


def test_the_script_draws_and_tells_the_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "picture.png"
    options = ["--output", str(path), "--dimension", "4", "--points", "3", "--draws", "500", "--no-progress"]
    assert load_script("theory").main(options) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["picture.json", "picture.png"]
    figures: dict[str, Any] = json.loads(path.with_suffix(".json").read_text())
    assert figures["blurs"] == [0, 0.25, 0.5]
    assert figures["bayes_accuracy"] == pytest.approx(0.8413, abs=5e-5)
    mixture = even(1.0, 0.0, 0.5, d=4)
    assert figures["bound"][0][2] == mixture.bound()
    found = mixture.accuracy(500, 0)
    row = [figures[name][0][2] for name in ("accuracy", "accuracy_minus", "accuracy_plus", "standard_error")]
    assert row == [found.mean, found.minus, found.plus, found.standard_error]
    assert "0.8413" in capsys.readouterr().out


@pytest.mark.parametrize(("points", "mean"), [("2", "0.01"), ("4", "6")])
def test_the_script_draws_flat_tables(tmp_path: Path, points: str, mean: str) -> None:
    options = ["--points", points, "--mean", mean, "--dimension", "1", "--draws", "2", "--no-progress"]
    assert load_script("theory").main(["--output", str(tmp_path / "flat.png"), *options]) == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--points", "1"], "--points: expected at least 2, got 1"),
        (["--dimension", "0"], "--dimension: expected at least 1"),
        (["--draws", "1"], "--draws: expected at least 2"),
        (["--seed", "-1"], "--seed: expected at least 0"),
        (["--mean", "nan"], "--mean: expected a positive number"),
        (["--mean", "0"], "--mean: expected a positive number"),
        (["--output", "picture.jpg"], "expected the name of a .png, got picture.jpg"),
        (["--output", "nowhere/picture.png"], "no folder nowhere"),
    ],
)
def test_the_script_says_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], wrong: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_script("theory").main(["--output", "picture.png", "--no-progress", *wrong]) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
