"""Strong augmentation: torchvision's colours, windows of the right law, and nothing at strength 0."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as tvf

from hf_unlearnable import create_network
from hf_unlearnable.defenses.base import describe
from hf_unlearnable.defenses.erm import Erm
from hf_unlearnable.defenses.strong import StrongAugmentation, grey, recoloured, turned_hue, windows

pytestmark = pytest.mark.usefixtures("one_thread")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(rows: int = 3, height: int = 24, width: int = 40) -> Tensor:
    return torch.rand(rows, 3, height, width, generator=generator(1))


def column(*values: float) -> Tensor:
    return torch.tensor(values).view(-1, 1, 1, 1)


def test_colours_are_torchvisions() -> None:
    x = pictures(4)
    factors = [(0.6, 1.4, 0.7), (1.4, 0.6, 1.3), (1.0, 1.0, 1.0), (0.9, 1.2, 0.0)]
    found = recoloured(x, *(column(*values) for values in zip(*factors, strict=True)))
    for picture, shown, (brightness, contrast, saturation) in zip(x, found, factors, strict=True):
        oracle = tvf.adjust_contrast(tvf.adjust_brightness(picture, brightness), contrast)
        assert torch.allclose(shown, tvf.adjust_saturation(oracle, saturation), atol=2e-4)
    assert torch.allclose(grey(x), tvf.rgb_to_grayscale(x), atol=1e-6)


@pytest.mark.parametrize("turns", [-0.1, 0.0, 0.03, 0.1, 0.5])
def test_hue_is_torchvisions(turns: float) -> None:
    x = torch.cat([pictures(1), torch.full((1, 3, 24, 40), 0.3), pictures(1).round(), torch.zeros(1, 3, 24, 40)])
    found = turned_hue(x, torch.full((4, 1, 1, 1), turns))
    assert torch.allclose(found, tvf.adjust_hue(x, turns), atol=1e-5)
    if turns == 0:
        assert torch.allclose(found, x, atol=1e-6)
    assert found.isfinite().all()


@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 40)])
def test_windows_have_the_area_and_the_ratio(height: int, width: int) -> None:
    u = torch.rand(2, 20_000, 10, generator=generator())
    tall, wide = windows(u[0], u[1], 1.0, height, width)
    assert max(tall.max(), wide.max()) <= 1
    area, ratio = tall * wide, (wide * width) / (tall * height)
    assert area.min() >= 0.1 - 1e-5
    assert ratio.log().abs().max() <= math.log(4 / 3) + 1e-5
    alone = windows(u[0, :, :1], u[1, :, :1], 0.2, 32, 32)
    assert (alone[0] * alone[1]).min() >= 0.82 - 1e-5
    with torch.random.fork_rng():
        torch.manual_seed(0)
        crop, canvas = RandomResizedCrop.get_params, torch.zeros(3, 10 * height, 10 * width)
        oracle = torch.tensor([crop(canvas, [0.1, 1.0], [3 / 4, 4 / 3])[2:] for _ in range(4000)])
    for found, expected in ((tall, oracle[:, 0] / (10 * height)), (wide, oracle[:, 1] / (10 * width))):
        shares = torch.linspace(0.1, 0.9, 9)
        assert torch.allclose(found.quantile(shares), expected.quantile(shares), atol=0.025)


def test_the_first_try_that_fits_is_taken() -> None:
    area, ratio = torch.tensor([[1.0, 0.5, 0.2]]), torch.tensor([[1.0, 0.5, 0.5]])
    tall, wide = windows(area, ratio, 1.0, 32, 32)
    assert tall.item() == pytest.approx(math.sqrt(0.55))
    assert wide.item() == pytest.approx(math.sqrt(0.55))
    tall, wide = windows(area[:, :1], ratio[:, :1], 1.0, 32, 32)
    assert (tall.item(), wide.item()) == (1.0, 1.0)
    tall, wide = windows(area[:, :1], ratio[:, :1], 1.0, 32, 64)
    assert (tall.item(), wide.item()) == (1.0, pytest.approx(2 / 3))


def test_windows_lie_in_the_picture_and_are_mirrored_half_of_the_time() -> None:
    """Ramps tell where a view was taken: their ends lie in the picture, and their slope tells width and mirror."""
    height, width = 24, 40
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    x = torch.stack([rows / (height - 1), columns / (width - 1), rows / (height - 1)]).expand(2000, -1, -1, -1)
    shown = StrongAugmentation()._windows(x.contiguous(), generator())
    across, down = shown[:, 1, 12], shown[:, 0, :, 20]
    mirrored = across[:, 0] > across[:, -1]
    assert mirrored.float().mean() == pytest.approx(0.5, abs=0.04)
    assert (down[:, -1] > down[:, 0]).all()
    middle = (across[:, 19] + across[:, 20]) / 2
    assert middle.mean() == pytest.approx(0.5, abs=0.02)
    assert middle.std() > 0.1
    slope = (across[:, 21] - across[:, 18]).abs() / 3 * (width - 1)
    assert slope.max() <= 1 + 1e-4
    assert slope.min() < 0.45


def test_a_whole_window_is_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    import hf_unlearnable.defenses.strong as strong

    ones = torch.ones(8)
    monkeypatch.setattr(strong, "windows", lambda *_: (ones, ones))
    x = pictures(8)
    shown = StrongAugmentation()._windows(x, generator())
    mirrored = [torch.allclose(a, b.flip(2), atol=1e-5) for a, b in zip(shown, x, strict=True)]
    plain = [torch.allclose(a, b, atol=1e-5) for a, b in zip(shown, x, strict=True)]
    assert [one != other for one, other in zip(mirrored, plain, strict=True)] == [True] * 8
    assert any(mirrored)
    assert any(plain)


def test_how_often_colours_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StrongAugmentation, "_windows", lambda self, x, generator: x)
    x = pictures(1, 4, 4).expand(4000, -1, -1, -1).contiguous()
    for strength in (1.0, 0.5):
        shown = StrongAugmentation(strength=strength).view(x, generator=generator())
        greys = (shown.amax(1) - shown.amin(1)).flatten(1).amax(1) == 0
        same = (shown == x).flatten(1).all(1)
        assert greys.float().mean() == pytest.approx(0.2 * strength, abs=0.02)
        assert same.float().mean() == pytest.approx((1 - 0.8 * strength) * (1 - 0.2 * strength), abs=0.02)
        assert shown.min() >= 0
        assert shown.max() <= 1


def test_strength_zero_is_plain_training_and_the_generator_decides() -> None:
    x, y = pictures(6, 16, 16), torch.tensor([0, 1, 0, 1, 1, 0])
    assert StrongAugmentation(strength=0.0).view(x, generator=generator()) is x
    model, kept = create_network("tiny", num_classes=2, image_size=16, seed=0).train(), x.clone()
    state = {name: value.clone() for name, value in model.state_dict().items()}

    def loss(defense: StrongAugmentation | Erm, seed: int) -> float:
        model.load_state_dict(state)
        return defense(model, x, y, progress=0.0, generator=generator(seed)).item()

    assert loss(StrongAugmentation(strength=0.0), 0) == loss(Erm(), 0)
    assert loss(StrongAugmentation(), 3) == loss(StrongAugmentation(), 3) != loss(StrongAugmentation(), 4)
    assert torch.equal(x, kept)
    assert model.training


def test_the_loss_is_of_the_view_and_of_one_picture_too() -> None:
    x, y, defense = pictures(1), torch.tensor([7]), StrongAugmentation()
    found = defense(nn.Flatten(), x, y, progress=0.0, generator=generator(5))
    view = defense.view(x, generator=generator(5))
    assert view.shape == x.shape
    assert torch.equal(found, F.cross_entropy(view.flatten(1), y))
    assert describe(defense) == {"name": "strong-augmentation", "strength": 1.0}


@pytest.mark.parametrize("strength", [-0.1, 1.1])
def test_bad_strength(strength: float) -> None:
    with pytest.raises(ValueError, match="strength lies in"):
        StrongAugmentation(strength=strength)
