from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_unlearnable.poisons.generators import ResidualGenerator, UNet, seeded

SIZES = [(32, 32), (7, 10), (33, 31), (5, 5)]
SMALL: list[Callable[[], nn.Module]] = [lambda: UNet(4), lambda: ResidualGenerator(4, 2)]


def pictures(height: int, width: int, count: int = 2) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0))


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_parameters() -> None:
    with torch.device("meta"):
        sizes = [sum(weight.numel() for weight in made.parameters()) for made in (UNet(), ResidualGenerator())]
    assert sizes == [7_785_862, 7_841_411]


@pytest.mark.parametrize("make", SMALL)
@pytest.mark.parametrize("size", SIZES)
def test_noise_has_the_pictures_size_and_lies_in_the_open_range(make: Callable[[], nn.Module], size: tuple) -> None:
    found = seeded(make, 0)(pictures(*size))
    assert found.shape == (2, 3, *size)
    assert found.abs().max() < 1
    assert found.std() > 0.01


@pytest.mark.parametrize("make", SMALL)
def test_every_pixel_is_seen_in_odd_sizes(make: Callable[[], nn.Module]) -> None:
    x = pictures(9, 11).requires_grad_()
    generator = seeded(make, 0).eval()
    slopes = torch.autograd.grad(generator(x).square().sum(), x)[0]
    assert (slopes != 0).any(1).all()


@pytest.mark.parametrize("make", SMALL)
def test_rows_are_apart_in_evaluation_mode(make: Callable[[], nn.Module]) -> None:
    generator, x = seeded(make, 0).eval(), pictures(8, 8, 3)
    assert torch.allclose(generator(x)[1:2], generator(x[1:2]), atol=1e-6)


@pytest.mark.parametrize("make", SMALL)
def test_weights_follow_from_the_seed(make: Callable[[], nn.Module]) -> None:
    assert same(seeded(make, 3), seeded(make, 3))
    assert not same(seeded(make, 3), seeded(make, 4))


def block(layers: nn.Module, x: Tensor) -> Tensor:
    first, norm, _, second, norm2, _ = layers.children()
    return norm2(second(norm(first(x)).relu())).relu()


def up(x: Tensor, like: Tensor) -> Tensor:
    """Bilinear interpolation in which corners stay corners, by two matrices."""
    for axis in (2, 3):
        before, after = x.shape[axis], like.shape[axis]
        places = torch.linspace(0, before - 1, after, dtype=torch.float64)
        weights = (1 - (places[:, None] - torch.arange(before)).abs()).clamp(min=0).float()
        x = torch.movedim(torch.movedim(x, axis, -1) @ weights.T, -1, axis)
    return x


def test_the_unet_is_that_of_the_description() -> None:
    generator, x = seeded(lambda: UNet(4), 0), pictures(16, 24)
    down = list(generator.down)
    one = block(down[0], x)
    two = block(down[1], F.avg_pool2d(one, 2))
    three = block(down[2], F.avg_pool2d(two, 2))
    found = block(down[3], F.avg_pool2d(three, 2))
    assert found.shape == (2, 32, 2, 3)
    for own, layers in zip((three, two, one), reversed(generator.up), strict=True):
        found = block(layers, torch.cat([own, up(found, own)], 1))
    convolution, norm, _ = generator.last
    assert torch.allclose(generator(x), norm(convolution(found)).tanh(), atol=1e-5)


def test_the_residual_generator_is_that_of_the_description() -> None:
    generator, x = seeded(lambda: ResidualGenerator(4, 2), 0), pictures(10, 12)

    def mirrored(layer: nn.Module, z: Tensor) -> Tensor:
        assert isinstance(layer, nn.Conv2d)
        return layer(F.pad(z, (layer.kernel_size[0] // 2,) * 4, mode="reflect"))

    layers = list(generator.layers)
    found = layers[2](mirrored(layers[1], x)).relu()
    found = layers[5](F.conv2d(found, layers[4].weight, stride=2, padding=1)).relu()
    found = layers[8](F.conv2d(found, layers[7].weight, stride=2, padding=1)).relu()
    assert found.shape == (2, 16, 3, 3)
    for residual in layers[10:12]:
        _, first, norm, _, _, second, norm2 = residual.layers
        found = found + norm2(mirrored(second, norm(mirrored(first, found)).relu()))
    for place in (12, 15):
        wider = F.conv_transpose2d(found, layers[place].weight, stride=2, padding=1, output_padding=1)
        found = layers[place + 1](wider).relu()
    found = mirrored(generator.last[1], found[:, :, :10, :12]).tanh()
    assert torch.allclose(generator(x), found, atol=1e-5)


def test_what_cannot_be_built_or_drawn_on() -> None:
    for make in (UNet, ResidualGenerator):
        with pytest.raises(ValueError, match="at least 1 channel, got 0"):
            make(0)
    with pytest.raises(ValueError, match="at least 1 residual block, got 0"):
        ResidualGenerator(4, 0)
    with pytest.raises(ValueError, match="at least 5 x 5 pixels, got 4 x 9"):
        seeded(lambda: ResidualGenerator(4, 1), 0)(pictures(4, 9))
    assert seeded(lambda: UNet(4), 0).eval()(pictures(1, 3)).shape == (2, 3, 1, 3)
