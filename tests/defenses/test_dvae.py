"""D-VAE: its loss and its floors, its size, and a poison of the class that it takes off."""

import pickle
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor

from hf_unlearnable.batches import Batches
from hf_unlearnable.defenses.base import describe
from hf_unlearnable.defenses.dvae import Dvae, _loaded, _without
from hf_unlearnable.defenses.dvae_network import LATENT, Parts, create, loss
from hf_unlearnable.draws import Draws, FreshDraws
from hf_unlearnable.images import to_float
from tests.conftest import make_dataset, noise_pictures, pixels

pytestmark = pytest.mark.usefixtures("one_thread")

FLOORS: dict[str, Any] = {"kl_weight": 0.01, "kl_floor": 1.0, "power_floor": 0.002}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def parts(power: float, divergence: float) -> tuple[Parts, list[Tensor]]:
    picture = torch.rand(2, 3, 4, 6, generator=generator(1)).requires_grad_()
    perturbation = torch.full((2, 3, 4, 6), power**0.5).requires_grad_()
    kl = torch.tensor(divergence, requires_grad=True)
    return Parts(picture, perturbation, kl), [picture, perturbation, kl]


def test_the_loss_is_the_sum() -> None:
    x = torch.rand(2, 3, 4, 6, generator=generator(2))
    found, (picture, perturbation, _) = parts(0.01, 4.0)
    whole = torch.min(torch.max(picture + perturbation, torch.zeros(1)), torch.ones(1))
    images = ((picture - x) ** 2).mean() + ((whole - x) ** 2).mean()
    assert loss(found, x, **FLOORS).item() == pytest.approx((images + 0.01 * 4.0 + 0.01).item(), rel=1e-5)
    late = loss(found, x, **{**FLOORS, "power_floor": None})
    assert late.item() == pytest.approx((images + 0.01 * 4.0).item(), rel=1e-5)


@pytest.mark.parametrize(("power", "divergence"), [(0.001, 0.5), (0.001, 2.0), (0.004, 0.5), (0.004, 2.0)])
def test_the_floors_are_active(power: float, divergence: float) -> None:
    """Below its floor a term is a constant, and nothing is gained by pushing it further down."""
    found, leaves = parts(power, divergence)
    x = (found.picture + found.perturbation).detach()  # where the pictures' terms have no slope in the perturbation
    found = Parts(found.picture, found.perturbation, found.divergence)
    inside = (x < 1).float()
    slopes = torch.autograd.grad(loss(found, x, **FLOORS), leaves[1:])
    expected_power = 2 * power**0.5 / x.numel() if power > 0.002 else 0.0
    assert torch.allclose(slopes[0] * inside, expected_power * inside, atol=1e-7)
    assert slopes[1].item() == pytest.approx(0.01 if divergence > 1 else 0.0)


def test_the_divergence_is_torchs_and_the_latent_is_drawn() -> None:
    model = create(3, (8, 12), 0).eval()
    x, y = torch.rand(2, 3, 8, 12, generator=generator(3)), torch.tensor([0, 2])
    with torch.no_grad():
        features = model.encoder(x)
        mean, deviation = model.mean(features), (model.log_variance(features) / 2).exp()
        normal = torch.distributions.Normal
        kl = torch.distributions.kl_divergence(normal(mean, deviation), normal(0.0, 1.0)).sum(1).mean()
        drawn = [model(x, y, FreshDraws(2, generator(seed)).normal(LATENT, 4, 6)) for seed in (0, 0, 1)]
    assert drawn[0].divergence.item() == pytest.approx(kl.item(), rel=1e-4)
    assert torch.equal(drawn[0].picture, drawn[1].picture)
    assert not torch.equal(drawn[0].picture, drawn[2].picture)
    assert drawn[0].picture.shape == drawn[0].perturbation.shape == x.shape
    other = model(x, y.flip(0), FreshDraws(2, generator(0)).normal(LATENT, 4, 6))
    assert torch.equal(other.picture, drawn[0].picture)
    assert not torch.allclose(other.perturbation, drawn[0].perturbation)


def test_the_size_is_about_the_papers_1_2_million() -> None:
    model = create(10, (32, 32), 0)
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_181_382
    assert model.encoder(torch.zeros(2, 3, 32, 32)).shape == (2, 128, 16, 16)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), create(10, (32, 32), 0).parameters(), strict=True))


def poisoned(rows: int = 24, height: int = 4, width: int = 6) -> tuple[Batches, Tensor]:
    """Smooth pictures with a sign pattern of the class on top; and the patterns, in [0, 1] units."""
    labels = torch.arange(rows) % 2
    coarse = torch.rand(rows, 3, 2, 3, generator=generator(4))
    smooth = 0.1 + 0.8 * F.interpolate(coarse.round(), (height, width), mode="bilinear")
    patterns = torch.randint(0, 2, (2, 3, height, width), generator=generator(5)) * 0.2 - 0.1
    u = (255 * (smooth + patterns[labels])).round().to(torch.uint8)
    return Batches(pixels=u, labels=labels, classes=("a", "b")), patterns[labels]


QUICK: dict[str, Any] = {"vae_epochs": 16, "vae_batch_size": 4}


@pytest.fixture(scope="module")
def fitted() -> Dvae:
    return Dvae(**QUICK).fit(poisoned()[0], seed=0)


def test_the_poison_is_taken_off(fitted: Dvae) -> None:
    train, delta = poisoned()
    x = to_float(train.pixels)
    kept = x.clone()
    pure = fitted.alter(x, train.labels, FreshDraws(len(x), generator()))
    assert pure.min() >= 0
    assert pure.max() <= 1
    assert torch.equal(x, kept)
    clean, away = x - delta, delta - delta.mean(0)
    known = fitted.known(x, train.labels)
    first = _loaded(known, "first.", 2, x)
    removed = _without(first, x, train.labels, FreshDraws(len(x), generator()), "first")
    for z, least, most in ((x, 0.95, 1.05), (removed, 0.0, 0.7), (pure, -0.1, 0.1)):
        left = ((z - z.mean(0)) * away).mean() / away.square().mean()
        assert least < left < most
    assert F.mse_loss(removed, clean) < 0.8 * F.mse_loss(x, clean)
    both = torch.stack([(z - z.mean(0)).flatten() for z in (pure, clean)])
    assert torch.corrcoef(both)[0, 1] > 0.3


def test_three_draws_decide_and_a_picture_alone_gets_the_same(fitted: Dvae) -> None:
    train, _ = poisoned()
    u, y = train.pixels[:4], train.labels[:4]
    together = fitted.change(u, y, [""] * 4)
    alone = torch.cat([fitted.change(u[i : i + 1], y[i : i + 1], [""]) for i in range(4)])
    assert (together != alone).float().mean() < 0.01
    assert (together.int() - alone.int()).abs().max() <= 1
    other = fitted.alter(to_float(u), y, Draws(1, fitted.name, u))
    assert not torch.allclose(other, fitted.alter(to_float(u), y, Draws(0, fitted.name, u)))


def test_row_and_batch_give_the_same_pixels() -> None:
    source = make_dataset(noise_pictures(10, 8, 12), [i % 4 for i in range(10)])
    defense = Dvae(vae_epochs=1, vae_batch_size=500).fit(Batches.load(source, progress=False), seed=0)
    expected = pixels(source.map(defense))
    assert (pixels(source.map(defense, batched=True, batch_size=4)) != expected).mean() < 0.01
    assert (pixels(defense.apply(source)) != expected).mean() < 0.01


def test_fit_depends_on_seed_and_rows_and_pickles() -> None:
    train = poisoned(12)[0]
    settings = Dvae(vae_epochs=1, vae_batch_size=5)
    with torch.no_grad():
        one, again, other = (settings.fit(train, seed=seed, progress=seed == 1) for seed in (0, 0, 1))
    assert one == again != other
    assert describe(one)["learned"] == again.learned != other.learned
    assert one.cache_state() != other.cache_state()
    data = pickle.dumps(one)
    assert pickle.loads(data) == one  # noqa: S301
    weights = sum(tensor.numel() for tensor in create(2, train.image_size, 0).state_dict().values())
    assert len(data) < 2 * 4 * weights + 50_000


def test_the_stages_differ_by_their_floor_and_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    import hf_unlearnable.defenses.dvae as dvae

    seen: list[tuple[float, float | None]] = []

    def spy(found: Parts, x: Tensor, *, kl_weight: float, kl_floor: float, power_floor: float | None) -> Tensor:
        seen.append((kl_floor, power_floor))
        return loss(found, x, kl_weight=kl_weight, kl_floor=kl_floor, power_floor=power_floor)

    monkeypatch.setattr(dvae, "loss", spy)
    Dvae(vae_epochs=6, vae_batch_size=5).fit(poisoned(11)[0], seed=0)
    stage: list[float | None] = [None] * 4 + [0.002] * 8
    assert seen == [(1.0, late) for late in stage] + [(3.0, late) for late in stage]


def test_what_does_not_fit_is_told(fitted: Dvae, small: Dataset) -> None:
    x, y = torch.full((2, 3, 4, 6), 0.5), torch.tensor([0, 2])
    with pytest.raises(ValueError, match="expected labels, got none"):
        fitted.alter(x, None, FreshDraws(2, generator()))
    with pytest.raises(ValueError, match="expected labels in 0 to 1, as fitted, got 0 to 2"):
        fitted.alter(x, y, FreshDraws(2, generator()))
    with pytest.raises(ValueError, match=r"expected pictures of 4 x 6 pixels .* got 32 x 32"):
        small.map(fitted, batched=True)
    with pytest.raises(ValueError, match=r"Dvae has learnt nothing yet: call \.fit"):
        small.map(Dvae())
    odd = Batches(pixels=torch.zeros(2, 3, 7, 8, dtype=torch.uint8), labels=torch.arange(2), classes=("a", "b"))
    with pytest.raises(ValueError, match="expected rows of pictures with even sides, got 2 of 7 x 8"):
        Dvae().fit(odd, seed=0)


def test_a_loss_that_is_not_finite() -> None:
    with pytest.raises(FloatingPointError, match="stage 1: the loss is not finite after epoch"):
        Dvae(vae_epochs=6, vae_batch_size=4, vae_learning_rate=1e30).fit(poisoned(8)[0], seed=0)


@pytest.mark.parametrize("wrong", [{"vae_epochs": 0}, {"kl_floors": (1.0,)}, {"power_floor": -1.0}, {"kl_weight": -1}])
def test_bad_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError), match="expected"):
        Dvae(**wrong)


def test_flat_pictures_do_not_break_it(fitted: Dvae) -> None:
    x = torch.stack([torch.zeros(3, 4, 6), torch.ones(3, 4, 6)])
    pure = fitted.alter(x, torch.tensor([0, 1]), FreshDraws(2, generator()))
    assert np.isfinite(pure.numpy()).all()
