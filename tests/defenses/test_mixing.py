"""Mixup and cutmix: what is mixed, with which weights, and that the labels follow the pictures."""

from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_unlearnable import create_network
from hf_unlearnable.defenses.base import describe
from hf_unlearnable.defenses.erm import Erm
from hf_unlearnable.defenses.mixing import Cutmix, Mixing, Mixup, _beta

BOTH = pytest.mark.parametrize("kind", [Mixup, Cutmix])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(rows: int, height: int = 24, width: int = 40) -> Tensor:
    return torch.rand(rows, 3, height, width, generator=generator(9))


@pytest.mark.parametrize("alpha", [0.02, 0.2, 0.5, 1, 2.0, 30.0])
def test_lambda_is_beta(alpha: float) -> None:
    drawn = _beta(alpha, 20_000, generator(3)).double().numpy()
    # float32 shares end at 0 and at 1, where a small alpha has its weight
    edge = 1e-6
    inside = (drawn > edge) & (drawn < 1 - edge)
    law = scipy.stats.beta(alpha, alpha)
    assert abs((drawn <= edge).mean() - law.cdf(edge)) < 0.012
    assert abs((drawn >= 1 - edge).mean() - law.sf(1 - edge)) < 0.012
    low, high = law.cdf(edge), law.cdf(1 - edge)
    found = scipy.stats.kstest(drawn[inside], lambda value: (law.cdf(value) - low) / (high - low))
    assert found.pvalue > 1e-3
    assert drawn.mean() == pytest.approx(0.5, abs=0.012)
    assert drawn.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.04)


@pytest.mark.parametrize("alpha", [1e-300, 1e-12, 1e12])
def test_lambda_at_the_ends_of_alpha(alpha: float) -> None:
    drawn = _beta(alpha, 4000, generator(3))
    if alpha > 1:
        assert torch.allclose(drawn, torch.tensor(0.5), atol=1e-5)
    else:
        assert set(drawn.tolist()) == {0.0, 1.0}
        assert drawn.mean().item() == pytest.approx(0.5, abs=0.04)


@pytest.mark.parametrize("settings", [{}, {"per": "image"}, {"rounds": 3}, {"rounds": 2, "per": "image", "alpha": 0.4}])
def test_mixup_adds_pictures_in_the_shares_of_their_labels(settings: dict[str, Any]) -> None:
    x = pictures(7)
    before = x.clone()
    mixed, shares = Mixup(**settings).mix(x, generator=generator(1))
    assert torch.allclose(mixed, torch.einsum("ij,jchw->ichw", shares, x), atol=1e-6)
    assert torch.allclose(shares.sum(1), torch.ones(7))
    assert (shares >= 0).all()
    assert not torch.allclose(mixed, x, atol=0.05)
    assert torch.equal(x, before)


@BOTH
def test_one_lambda_for_the_batch_or_one_for_each_picture(kind: type[Mixing]) -> None:
    x = pictures(12)
    for seed in range(3):
        shares = kind().mix(x, generator=generator(seed))[1]
        others = shares - torch.diag(shares.diagonal())
        assert torch.allclose(others.sum(0), others.sum(1)), "partners are a permutation"
        kept = shares.diagonal()[others.sum(1) > 0]
        assert torch.equal(kept, kept[:1].expand_as(kept))
    kept = kind(per="image").mix(x, generator=generator(4))[1].diagonal()
    assert len(kept.unique()) > 8


@pytest.mark.parametrize("per", ["batch", "image"])
def test_a_cutmix_box_is_the_partners_at_its_own_place(per: Any) -> None:
    x, rectangles = pictures(9), 0
    for seed in range(20):
        mixed, shares = Cutmix(per=per).mix(x, generator=generator(seed))
        for i, row in enumerate(shares):
            partner = row.clone()
            partner[i] = 0
            j = int(partner.argmax())
            changed = (mixed[i] != x[i]).any(0)
            if j == i or partner[j] == 0:
                assert not changed.any()
                continue
            ys, xs = changed.nonzero().T
            top, bottom, left, right = (int(at) for at in (ys.min(), ys.max() + 1, xs.min(), xs.max() + 1))
            assert changed[top:bottom, left:right].all()
            assert torch.equal(mixed[i][:, changed], x[j][:, changed])
            assert row[i].item() == pytest.approx(1 - (bottom - top) * (right - left) / (24 * 40), abs=1e-6)
            assert (row[i] + row[j]).item() == pytest.approx(1)
            rectangles += 1
    assert rectangles > 100


@pytest.mark.parametrize(("kept", "tall", "wide"), [(0.75, 12, 20), (0.5, 16, 28), (0.0, 24, 40), (1.0, 0, 0)])
def test_cutmix_boxes_have_their_side_and_a_uniform_centre(kept: float, tall: int, wide: int) -> None:
    """Every centre, oracle in whole numbers: sides 2 * floor(sqrt(1 - kept) * side / 2), cut off at the borders."""
    rows = 4000
    x, other = torch.zeros(rows, 3, 24, 40), torch.ones(rows, 3, 24, 40)
    mixed, weights = Cutmix().join(x, other, torch.full((rows,), kept), generator=generator(5))
    inside = [
        np.array([[c - long // 2 <= at < c + long // 2 for at in range(side)] for c in range(side)])
        for side, long in ((24, tall), (40, wide))
    ]
    heights, widths = mixed[:, 0].amax(2).sum(1).int(), mixed[:, 0].amax(1).sum(1).int()
    assert torch.allclose(weights, 1 - mixed.mean((1, 2, 3)))
    for found, lengths in ((heights, inside[0].sum(1)), (widths, inside[1].sum(1))):
        assert set(found.tolist()) == set(lengths.tolist())
        assert found.float().mean().item() == pytest.approx(lengths.mean(), rel=0.03)
    np.testing.assert_allclose(mixed[:, 0].mean(0), np.outer(inside[0].mean(0), inside[1].mean(0)), atol=0.03)


def test_rounds_of_cutmix_take_their_share_of_what_was_there() -> None:
    x = pictures(5)
    defense = Cutmix(rounds=2)
    first = Cutmix().mix(x, generator=generator(2))
    mixed, shares = defense.mix(x, generator=generator(2))
    later = (mixed != first[0]).any(1).float().mean((1, 2))
    assert not torch.equal(shares, first[1])
    for i in range(5):
        j = int((shares[i] - first[1][i]).argmax())
        kept = (1 - shares[i, j]) / (1 - first[1][i, j]) if first[1][i, j] < 1 else torch.tensor(1.0)
        assert torch.allclose(shares[i], kept * first[1][i] + (1 - kept) * torch.eye(5)[j], atol=1e-6)
        assert later[i] <= 1 - kept + 1e-6
    assert torch.allclose(shares.sum(1), torch.ones(5))


@BOTH
@pytest.mark.parametrize("settings", [{}, {"rounds": 2, "probability": 0.5, "per": "image"}])
def test_the_loss_is_cross_entropy_with_soft_labels(kind: type[Mixing], settings: dict[str, Any]) -> None:
    x, y = pictures(6), torch.tensor([0, 2, 2, 1, 0, 2])
    model = create_network("tiny", num_classes=4, image_size=(24, 40), seed=0)
    loss = kind(**settings)(model, x, y, progress=0.0, generator=generator(6))
    mixed, shares = kind(**settings).mix(x, generator=generator(6))
    logits = model(mixed).detach()
    total = 0.0
    for i in range(6):
        target = sum((shares[i, j] * F.one_hot(y[j], 4) for j in range(6)), torch.zeros(4))
        total -= float((target * logits[i].log_softmax(0)).sum()) / 6
    assert loss.item() == pytest.approx(total, rel=1e-5)
    assert loss.item() != pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-4)
    loss.backward()
    assert all(weight.grad is not None for weight in model.parameters())


@BOTH
def test_the_probability_of_mixing(kind: type[Mixing]) -> None:
    x = pictures(4, 8, 8)
    mixed = [
        not torch.equal(kind(alpha=50, probability=0.3).mix(x, generator=generator(seed))[1], torch.eye(4))
        for seed in range(400)
    ]
    # one permutation in 24 leaves all pictures where they are
    assert np.mean(mixed) == pytest.approx(0.3 * 23 / 24, abs=0.07)
    kept = kind(alpha=50, probability=0.3, per="image").mix(pictures(600, 8, 8), generator=generator())[1].diagonal()
    assert (kept < 1).float().mean().item() == pytest.approx(0.3, abs=0.06)


@BOTH
@pytest.mark.parametrize(("rows", "settings"), [(5, {"probability": 0.0}), (1, {}), (1, {"per": "image", "rounds": 2})])
def test_nothing_to_mix_is_plain_training(kind: type[Mixing], rows: int, settings: dict[str, Any]) -> None:
    x, y = pictures(rows), torch.arange(rows) % 3
    losses = []
    for defense in (Erm(), kind(**settings)):
        model = create_network("tiny", num_classes=3, image_size=(24, 40), seed=0)
        losses.append(defense(model, x, y, progress=0.0, generator=generator()).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@BOTH
def test_the_generator_decides_and_the_model_is_left_as_it_was(kind: type[Mixing]) -> None:
    x, y = pictures(6), torch.arange(6) % 3
    model = create_network("tiny", num_classes=3, image_size=(24, 40), seed=0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    losses = []
    for seed in (0, 0, 1):
        model.load_state_dict(before)
        losses.append(kind()(model, x, y, progress=0.0, generator=generator(seed)).item())
    assert losses[0] == losses[1] != losses[2]
    assert all(module.training for module in model.modules())
    assert all(weight.requires_grad and weight.grad is None for weight in model.parameters())


def test_what_it_is_goes_into_results() -> None:
    told = {"alpha": 0.5, "probability": 1.0, "rounds": 1, "per": "batch"}
    assert describe(Mixup(0.5)) == {"name": "mixup", **told}
    assert describe(Cutmix(0.5)) == {"name": "cutmix", **told}


@BOTH
@pytest.mark.parametrize(
    "wrong",
    [
        {"alpha": 0.0},
        {"alpha": float("nan")},
        {"alpha": float("inf")},
        {"probability": 1.1},
        {"probability": -0.1},
        {"rounds": 0},
        {"per": "row"},
    ],
)
def test_bad_settings(kind: type[Mixing], wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))}: expected"):
        kind(**wrong)
