"""Cutout by its definition, RandAugment and AutoAugment against torchvision's, and the plain loss after them."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import v2

from hf_unlearnable import create_network
from hf_unlearnable.augment import Augmentation, augment, take
from hf_unlearnable.defenses.augmented import CIFAR10, POLICIES, Augmented, AutoAugment, Cutout, RandAugment, strength
from hf_unlearnable.defenses.base import describe
from hf_unlearnable.policies import OPERATIONS


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def torchvision_name(name: str) -> str:
    return name.title().replace("_", "")


def theirs(name: str, position: int, bins: int, height: int, width: int) -> tuple[float, bool]:
    """torchvision's magnitude, and whether it draws a sign."""
    space = {**v2.RandAugment._AUGMENTATION_SPACE, **v2.AutoAugment._AUGMENTATION_SPACE}
    magnitudes, signed = space[torchvision_name(name)]
    values = magnitudes(bins, height, width)
    return (0.0 if values is None else float(values[position])), signed


@pytest.mark.parametrize("size", [(32, 32), (24, 40), (9, 5), (1, 1)])
@pytest.mark.parametrize("side", [0.0, 0.5, 1.0])
def test_cutout_by_the_definition(size: tuple[int, int], side: float) -> None:
    height, width = size
    x = 0.1 + 0.9 * torch.rand(60, 3, height, width, generator=generator(1))
    method = Cutout(side=side)
    draws = method.draw(60, generator=generator(2))
    found = method.apply(x, draws)
    half = round(side * min(size)) // 2
    for picture, original, (down, across) in zip(found, x, draws["middle"].tolist(), strict=True):
        row, column = int(down * height), int(across * width)
        expected = original.clone()
        expected[:, max(0, row - half) : row + half, max(0, column - half) : column + half] = 0
        assert torch.equal(picture, expected)


def test_cutout_is_sixteen_pixels_at_32_and_its_middle_is_any_pixel() -> None:
    draws = Cutout().draw(20_000, generator=generator())
    found = Cutout().apply(torch.ones(20_000, 1, 32, 32), draws)
    black = 1 - found[:, 0]
    assert black.sum((1, 2)).max() == 256
    assert black.sum((1, 2)).min() == 64
    counts = torch.bincount((draws["middle"] * 32).long().flatten(), minlength=32)
    assert (counts / 40_000 - 1 / 32).abs().max() < 0.005
    assert Cutout().apply(torch.ones(1, 1, 224, 224), {"middle": torch.tensor([[0.5, 0.5]])}).sum() == 224**2 - 112**2


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_magnitudes_are_torchvisions(size: tuple[int, int]) -> None:
    height, width = size
    levels = [(name, 9, 31) for name in RandAugment.OPERATIONS]
    levels += [(name, level, 10) for pair in CIFAR10 for name, _, level in pair]
    for name, position, bins in levels:
        middle, spread = strength(name, position / (bins - 1))
        expected, signed = theirs(name, position, bins, height, width)
        assert (spread > 0) == (signed and expected != 0), name
        if "shear" in name:
            assert math.tan(math.radians(spread)) == pytest.approx(expected)
        elif "translate" in name:
            assert spread * (width if name.endswith("x") else height) == pytest.approx(expected, rel=1e-5)
        elif name in ("brightness", "contrast", "color", "sharpness"):
            assert (middle, spread) == (1.0, pytest.approx(expected, rel=1e-5))
        else:
            assert middle + spread == pytest.approx(expected, rel=1e-5), name


def test_the_policy_is_that_of_the_paper() -> None:
    official = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)._policies
    mine = [tuple((torchvision_name(name), p, level) for name, p, level in pair) for pair in CIFAR10]
    assert mine == [tuple((name, p, level or 0) for name, p, level in pair) for pair in official]


def test_rand_augments_operations_are_torchvisions() -> None:
    assert sorted(map(torchvision_name, RandAugment.OPERATIONS)) == sorted(v2.RandAugment._AUGMENTATION_SPACE)


def test_rand_augment_draws_evenly() -> None:
    draws = RandAugment(number=3).draw(30_000, generator=generator())
    assert draws["operation"].shape == draws["magnitude"].shape == (30_000, 3)
    names, counts = draws["operation"].unique(return_counts=True)
    assert sorted(OPERATIONS[i] for i in names) == sorted(RandAugment.OPERATIONS)
    assert (counts / 90_000 - 1 / 14).abs().max() < 0.004
    for name, expected in (("rotate", [-9.0, 9.0]), ("color", [0.73, 1.27]), ("posterize", [7.0]), ("solarize", [0.7])):
        found = draws["magnitude"][draws["operation"] == OPERATIONS.index(name)]
        values, shares = found.unique(return_counts=True)
        assert values.tolist() == pytest.approx(expected)
        assert (shares / len(found) - 1 / len(expected)).abs().max() < 0.03
    assert torch.corrcoef((draws["operation"] == 0).float().T).sub(torch.eye(3)).abs().max() < 0.03
    assert RandAugment(number=0).draw(4, generator=generator())["operation"].shape == (4, 0)


def test_auto_augment_draws_pairs_with_their_probabilities() -> None:
    draws = AutoAugment().draw(50_000, generator=generator())
    shares = torch.bincount(draws["operation"].flatten(), minlength=len(OPERATIONS)) / 50_000
    for index, name in enumerate(OPERATIONS):
        expected = sum(p / 25 for pair in CIFAR10 for other, p, _ in pair if other == name)
        if name != "identity":
            assert shares[index].item() == pytest.approx(expected, abs=0.01), name
    both = (draws["operation"] == OPERATIONS.index("translate_y")).all(1)
    assert both.float().mean().item() == pytest.approx(0.9 * 0.7 / 25, abs=0.004)
    pixels = (draws["magnitude"][both] * 32).trunc()
    assert sorted(pixels.unique().tolist()) == [-14.0, 14.0]
    assert (pixels[:, 0] == pixels[:, 1]).float().mean().item() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("method", [RandAugment(), AutoAugment()])
@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_pictures_are_torchvisions(method: Augmentation, size: tuple[int, int]) -> None:
    """The same draws through torchvision's own operations, on uint8 and rounded after each: nearly all pixels agree."""
    pixels = torch.randint(0, 256, (60, 3, *size), generator=generator(4), dtype=torch.uint8)
    pixels[::2] = torch.linspace(20, 230, size[0] * size[1]).view(size).to(torch.uint8)
    draws = method.draw(60, generator=generator(5))
    found = method.apply(pixels.float() / 255, draws)
    tool = v2.RandAugment()
    close = []
    for row in range(60):
        expected = pixels[row]
        for operation, magnitude in zip(draws["operation"][row], draws["magnitude"][row].tolist(), strict=True):
            name = OPERATIONS[int(operation)]
            if "shear" in name:
                magnitude = math.tan(math.radians(magnitude))
            elif "translate" in name:
                magnitude *= size[1] if name.endswith("x") else size[0]
            elif name in ("brightness", "contrast", "color", "sharpness"):
                magnitude -= 1
            expected = tool._apply_image_or_video_transform(  # type: ignore[assignment]
                expected,
                torchvision_name(name),
                magnitude,
                interpolation=v2.InterpolationMode.NEAREST,
                fill={Tensor: None},
            )
        close.append(((255 * found[row] - expected.float()).abs() < 4.01).float().mean().item())
    assert sorted(close)[3] > 0.97, sorted(close)[:6]


@pytest.mark.parametrize("method", [*POLICIES.values()], ids=[*POLICIES])
def test_parts_are_the_whole_in_any_size(method: Augmentation) -> None:
    draws = method.draw(11, generator=generator(3))
    assert all(len(values) == 11 for values in draws.values())
    for size in ((8, 8), (24, 40)):
        x = torch.rand(11, 3, *size, generator=generator(1))
        before = x.clone()
        whole = augment(x, method, generator=generator(3))
        parts = [method.apply(x[part], take(draws, part)) for part in (slice(0, 1), slice(1, 1), slice(1, 11))]
        assert torch.allclose(torch.cat(parts), whole, atol=1e-6)
        assert torch.equal(x, before)
        assert whole.min() >= 0
        assert whole.max() <= 1
        last = method.apply(x.contiguous(memory_format=torch.channels_last), draws)
        assert last.is_contiguous(memory_format=torch.channels_last)
        assert torch.allclose(last, whole, atol=1e-6)


class Mean(nn.Module):
    """Logits of the mean colour, with what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return x.mean((2, 3))


@pytest.mark.parametrize("policy", POLICIES)
def test_the_loss_is_plain(policy: Any) -> None:
    x, y = torch.rand(16, 3, 16, 16, generator=generator(1)), torch.arange(16) % 3
    model = Mean()
    loss = Augmented(policy)(model, x, y, progress=0.5, generator=generator(2))
    assert torch.equal(model.seen[0], augment(x, POLICIES[policy], generator=generator(2)))
    assert loss.item() == pytest.approx(F.cross_entropy(model.seen[0].mean((2, 3)), y).item())
    assert not torch.equal(model.seen[0], x)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_generator_decides_and_the_model_is_left_as_it_was(policy: Any) -> None:
    x, y = torch.rand(6, 3, 16, 16, generator=generator(3)), torch.arange(6) % 2
    model = create_network("tiny", num_classes=2, image_size=16, seed=0)
    model.backbone.features[1].eval()
    losses = [Augmented(policy)(model, x, y, progress=0, generator=generator(s)).item() for s in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    assert model.training
    assert not model.backbone.features[1].training
    assert all(weight.requires_grad and weight.grad is None for weight in model.parameters())


def test_what_it_is_goes_into_results() -> None:
    assert describe(Augmented("rand_augment")) == {"name": "augmented", "policy": "rand_augment"}


@pytest.mark.parametrize(
    ("cls", "wrong", "message"),
    [
        (Augmented, {"policy": "mixup"}, "policy is one of cutout, .* got 'mixup'"),
        (Cutout, {"side": 1.1}, "side is a share"),
        (RandAugment, {"level": 31}, "level in"),
        (RandAugment, {"number": -1}, "number >= 0"),
    ],
)
def test_bad_settings(cls: Any, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cls(**wrong)
