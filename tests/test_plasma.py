"""Plasma fields: a slow oracle from the definition, kornia's distribution, and what follows from the draws alone."""

import math
from typing import Any

import pytest
import torch
from kornia.contrib import diamond_square
from torch import Tensor

from hf_unlearnable.augment import Augmentation, augment, take
from hf_unlearnable.plasma import ChannelShuffle, Plasma, plasma, uniform_by_seed


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def seeds(count: int, seed: int = 0) -> Tensor:
    return torch.randint(2**63 - 1, (count,), generator=generator(seed))


def pictures(count: int, height: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(count, 3, height, width, generator=generator(7), dtype=dtype)


def split_mix(state: int) -> int:
    mask = 2**64 - 1
    state = (state + 0x9E3779B97F4A7C15) & mask
    word = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & mask
    return word ^ (word >> 31)


def test_the_numbers_are_those_of_splitmix() -> None:
    assert split_mix(0) == 0xE220A8397B1DCDAF  # the published first word of seed 0
    found = uniform_by_seed(torch.tensor([0, 123456789, 2**62 + 5]), 7)
    for row, seed in enumerate((0, 123456789, 2**62 + 5)):
        for number in range(7):
            word = split_mix(seed + (number // 4) * 0x9E3779B97F4A7C15)
            piece = word >> (16 * (number % 4)) & 0xFFFF
            expected = ((piece ^ 0x8000) + 0.5) / 65536
            assert found[row, number].item() == pytest.approx(expected, abs=1e-7)


def test_the_numbers_are_uniform_and_independent() -> None:
    found = uniform_by_seed(seeds(500), 400)
    assert 0 < found.min() < found.max() < 1
    shares = torch.histc(found, 16, 0, 1) / found.numel()
    assert (shares - 1 / 16).abs().max() < 0.002
    correlations = torch.corrcoef(found.T) - torch.eye(400)
    assert correlations.abs().max() < 0.25
    assert correlations.std() == pytest.approx(500**-0.5, rel=0.05)
    neighbours = uniform_by_seed(torch.arange(400), 300)
    assert torch.corrcoef(neighbours).sub(torch.eye(400)).std() == pytest.approx(300**-0.5, rel=0.05)


def cells(size: tuple[int, int]) -> tuple[list[int], int]:
    """Along each axis, how many cells the whole grid has, and how often the grid of corners is doubled."""
    whole = [2 ** math.ceil(math.log2(max(side, 3) - 1)) for side in size]
    return whole, int(math.log2(min(whole)))


def field_by_loop(numbers: list[float], roughness: float, size: tuple[int, int]) -> list[list[float]]:
    """One field, point by point; numbers in the order of corners, then of cells, edges across and edges down."""
    whole, doublings = cells(size)
    rest = iter(numbers)
    tall, wide = (side >> doublings for side in whole)
    grid = {(i, j): next(rest) for i in range(tall + 1) for j in range(wide + 1)}
    for k in range(doublings):
        weight = roughness**k
        grid = {(2 * i, 2 * j): value for (i, j), value in grid.items()}
        tall, wide = 2 * tall, 2 * wide
        middles = [(i, j) for i in range(1, tall, 2) for j in range(1, wide, 2)]
        across = [(i, j) for i in range(0, tall + 1, 2) for j in range(1, wide, 2)]
        down = [(i, j) for i in range(1, tall, 2) for j in range(0, wide + 1, 2)]
        diagonal, straight = [(-1, -1), (-1, 1), (1, -1), (1, 1)], [(-1, 0), (1, 0), (0, -1), (0, 1)]
        for points, steps in ((middles, diagonal), (across + down, straight)):
            for i, j in points:
                known = [grid[i + a, j + b] for a, b in steps if (i + a, j + b) in grid]
                mean = sum(known) / len(known)
                grid[i, j] = mean if k == 0 else (1 - weight) * mean + weight * next(rest)
    return [[grid[i, j] for j in range(size[1])] for i in range(size[0])]


@pytest.mark.parametrize("size", [(8, 8), (5, 9), (12, 7), (3, 3), (1, 1), (2, 6), (24, 40)])
def test_a_field_is_that_of_the_definition(size: tuple[int, int]) -> None:
    roughness = torch.tensor([0.0, 0.35, 1.0])
    found = plasma(seeds(3), roughness, size, maps=2)
    assert found.shape == (3, 2, *size)
    assert found.dtype == torch.float32
    whole, doublings = cells(size)
    corners, seeded, grid = (math.prod((side >> k) + 1 for side in whole) for k in (doublings, doublings - 1, 0))
    count = corners + grid - seeded
    numbers = uniform_by_seed(seeds(3), 2 * count).view(3, 2, count)
    for row in range(3):
        for which in range(2):
            expected = field_by_loop(numbers[row, which].tolist(), float(roughness[row]), size)
            assert torch.allclose(found[row, which], torch.tensor(expected), atol=1e-6)


def statistics(fields: Tensor) -> dict[str, Tensor]:
    """What is compared, one row a field; fields (n, h, w)."""
    spectrum = torch.fft.rfft2(fields - fields.mean((1, 2), keepdim=True)).abs().square()
    radius = (torch.fft.fftfreq(fields.shape[1])[:, None] ** 2 + torch.fft.rfftfreq(fields.shape[2]) ** 2).sqrt()
    bands = [
        ((radius > low) & (radius <= high)).float() for low, high in ((0, 0.06), (0.06, 0.2), (0.2, 0.35), (0.35, 1))
    ]
    return {
        "mean": fields.mean((1, 2)),
        "spread": fields.std((1, 2)),
        "range": fields.amax((1, 2)) - fields.amin((1, 2)),
        "across": (fields[:, :, 1:] - fields[:, :, :-1]).square().mean((1, 2)),
        "down": (fields[:, 1:] - fields[:, :-1]).square().mean((1, 2)),
        "corner": fields[:, 0, 0],
        "middle": fields[:, fields.shape[1] // 2, fields.shape[2] // 2],
        **{f"band {i}": (spectrum * band).sum((1, 2)).log() for i, band in enumerate(bands)},
    }


def kolmogorov_smirnov(a: Tensor, b: Tensor) -> float:
    """The largest distance of two distribution functions, in units of its size by chance (above 2.2: p < 1e-4)."""
    joint = torch.cat([a, b]).sort().values
    ranks = [torch.searchsorted(part.sort().values, joint, right=True) / len(part) for part in (a, b)]
    return float((ranks[0] - ranks[1]).abs().max() * (len(a) * len(b) / (len(a) + len(b))) ** 0.5)


@pytest.mark.parametrize(
    ("roughness", "size"), [(0.1, (32, 32)), (0.5, (32, 32)), (0.7, (32, 32)), (0.4, (24, 40)), (0.6, (20, 9))]
)
def test_fields_are_distributed_as_kornias(roughness: float, size: tuple[int, int]) -> None:
    own = generator(3)

    def uniform(shape: Any, **kwargs: Any) -> Tensor:
        return torch.rand(shape, generator=own, **kwargs)

    theirs = diamond_square((2500, 1, *size), roughness, random_fn=uniform)[:, 0]
    ours = plasma(seeds(2500, seed=1), torch.full((2500,), roughness), size, maps=1)[:, 0]
    expected, found = statistics(theirs), statistics(ours)
    distances = {name: kolmogorov_smirnov(found[name], expected[name]) for name in expected}
    assert max(distances.values()) < 2.2, distances
    noise = 6 * (theirs.std(0) * (2 / 2500) ** 0.5)
    assert ((theirs.mean(0) - ours.mean(0)).abs() < noise).all()
    assert ((theirs.std(0) / ours.std(0)).log().abs() < 6 * 2500**-0.5).all()


def test_the_comparison_would_see_another_roughness() -> None:
    fields = [
        statistics(plasma(seeds(4000, seed=i), torch.full((4000,), r), (32, 32), maps=1)[:, 0])
        for i, r in enumerate((0.5, 0.53))
    ]
    assert max(kolmogorov_smirnov(fields[0][name], fields[1][name]) for name in fields[0]) > 4


def test_channels_and_pictures_have_fields_of_their_own_and_share_roughness() -> None:
    fields = plasma(seeds(3000), torch.linspace(0.1, 0.9, 3000), (16, 16))
    values = fields[:, :, 8, 8]
    assert torch.corrcoef(values.T).sub(torch.eye(3)).abs().max() < 0.06
    rough = (fields[..., 1:] - fields[..., :-1]).square().mean((2, 3)).log()
    assert torch.corrcoef(rough.T).min() > 0.8


def test_a_field_follows_from_its_seed_alone() -> None:
    roughness = torch.rand(6, generator=generator(2))
    whole = plasma(seeds(6), roughness, (24, 40))
    for row in range(6):
        assert torch.equal(plasma(seeds(6)[row : row + 1], roughness[row : row + 1], (24, 40))[0], whole[row])
    assert plasma(seeds(0), roughness[:0], (24, 40)).shape == (0, 3, 24, 40)
    assert 0 <= whole.min() < whole.max() <= 1


@pytest.mark.parametrize("size", [(32, 32), (24, 40), (5, 1)])
def test_brightness_then_contrast_by_the_equations(size: tuple[int, int]) -> None:
    x = pictures(12, *size)
    before = x.clone()
    draws = Plasma().draw(12, generator=generator(4))
    assert 0 < draws["chosen"].sum() < 24
    found = Plasma().apply(x, draws)
    for row in range(12):
        expected = x[row]
        (lit, contrasted), (r, q), (p_seed, q_seed) = (draws[name][row] for name in ("chosen", "roughness", "seed"))
        if lit:
            field = plasma(p_seed[None], r[None], size)[0]
            expected = (expected + draws["intensity"][row] * (2 * field - 1)).clamp(0, 1)
        if contrasted:
            field = plasma(q_seed[None], q[None], size)[0]
            expected = ((expected - 0.5) * 4 * field + 0.5).clamp(0, 1)
        assert torch.allclose(found[row], expected, atol=1e-6)
        assert torch.equal(found[row], x[row]) == (not lit and not contrasted)
    assert torch.equal(x, before)
    assert found.min() >= 0
    assert found.max() <= 1


def test_draws_fill_their_ranges() -> None:
    method = Plasma(
        brightness=0.3,
        contrast=0.8,
        brightness_roughness=(0.2, 0.4),
        contrast_roughness=(0.5, 0.9),
        intensity=(0.6, 0.7),
    )
    draws = method.draw(20_000, generator=generator())
    assert torch.allclose(draws["chosen"].float().mean(0), torch.tensor([0.3, 0.8]), atol=0.01)
    for values, low, high in (
        (draws["roughness"][:, 0], 0.2, 0.4),
        (draws["roughness"][:, 1], 0.5, 0.9),
        (draws["intensity"], 0.6, 0.7),
    ):
        shares = torch.histc(values, 4, low, high) / 20_000
        assert torch.allclose(shares, torch.full((4,), 0.25), atol=0.015)
    assert len(draws["seed"].unique()) == 40_000
    together = torch.stack([draws["chosen"][:, 0].float(), *draws["roughness"].T, draws["intensity"]])
    assert torch.corrcoef(together).sub(torch.eye(4)).abs().max() < 0.03


@pytest.mark.parametrize("method", [Plasma(), ChannelShuffle()])
def test_draws_do_not_depend_on_size_and_parts_are_the_whole(method: Augmentation) -> None:
    draws = method.draw(9, generator=generator(3))
    for size in ((8, 8), (24, 40)):
        x = pictures(9, *size)
        whole = augment(x, method, generator=generator(3))
        parts = [method.apply(x[part], take(draws, part)) for part in (slice(0, 2), slice(2, 2), slice(2, 9))]
        assert torch.equal(torch.cat(parts), whole)
        assert not torch.equal(whole, augment(x, method, generator=generator(4)))


def test_orders_of_channels() -> None:
    draws = ChannelShuffle(probability=1).draw(30_000, generator=generator())
    orders = (draws["channels"] * torch.tensor([9, 3, 1])).sum(1)
    assert orders.unique().tolist() == [5, 7, 11, 15, 19, 21]
    assert (torch.bincount(orders)[orders.unique()] / 30_000 - 1 / 6).abs().max() < 0.01
    half = ChannelShuffle().draw(30_000, generator=generator())["channels"]
    assert abs((half == torch.arange(3)).all(1).float().mean().item() - (0.5 + 0.5 / 6)) < 0.01
    x = pictures(3, 4, 5)
    channels = torch.tensor([[2, 0, 1], [0, 1, 2], [1, 0, 2]])
    found = ChannelShuffle().apply(x, {"channels": channels})
    assert torch.equal(found, torch.stack([picture[order] for picture, order in zip(x, channels, strict=True)]))


@pytest.mark.parametrize("method", [Plasma(brightness=1, contrast=1), ChannelShuffle(probability=1)])
def test_it_is_differentiable(method: Augmentation) -> None:
    x = (0.4 + 0.2 * pictures(2, 4, 5, torch.float64)).requires_grad_()
    draws = method.draw(2, generator=generator(1))
    assert torch.autograd.gradcheck(lambda x: method.apply(x, draws), (x,), eps=1e-7)


@pytest.mark.parametrize(
    "wrong",
    [{"brightness": 1.5}, {"contrast": -0.1}, {"intensity": (0.5, 0.1)}, {"brightness_roughness": (0.1, 1.2)}],
)
def test_bad_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Plasma(**wrong)


def test_a_bad_probability_of_a_shuffle() -> None:
    with pytest.raises(ValueError, match="probability"):
        ChannelShuffle(probability=2)
