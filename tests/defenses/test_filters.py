"""Random filters and deconvolution adversarial training, beside slow oracles of one picture or one class at a time."""

import copy
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_unlearnable import create_network
from hf_unlearnable.defenses.base import BeforeCrop, describe
from hf_unlearnable.defenses.erm import Erm
from hf_unlearnable.defenses.filters import DeconvolutionAdversarial, RandomFilter


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(rows: int, height: int = 24, width: int = 40) -> Tensor:
    return torch.rand(rows, 3, height, width, generator=generator(9))


def network(classes: int = 4) -> nn.Module:
    return create_network("tiny", num_classes=classes, image_size=(24, 40), seed=0)


def test_filters_are_cudas() -> None:
    weights = RandomFilter(kernel_size=3, blur=0.2).filters(9000, generator=generator()).flatten(1)
    ones = weights == 1
    assert (ones.sum(1) == 1).all()
    assert torch.allclose(ones.float().mean(0), torch.tensor(1 / 9), atol=0.015)
    others = weights[~ones]
    assert others.min() >= 0
    assert others.max() < 0.2
    assert others.mean().item() == pytest.approx(0.1, rel=0.02)
    assert others.var().item() == pytest.approx(0.2**2 / 12, rel=0.03)


@pytest.mark.parametrize("k", [1, 3, 9])
@pytest.mark.parametrize("per", ["batch", "image"])
@pytest.mark.parametrize(("rows", "height", "width"), [(4, 24, 40), (1, 7, 5), (3, 2, 3)])
def test_each_channel_is_correlated_and_the_picture_divided_by_its_maximum(
    k: int, per: Any, rows: int, height: int, width: int
) -> None:
    x = pictures(rows, height, width)
    before, defense = x.clone(), RandomFilter(kernel_size=k, blur=0.7, per=per)
    found = defense.before_crop(x, torch.zeros(rows, dtype=torch.int64), generator=generator(3))
    filters = defense.filters(1 if per == "batch" else rows, generator=generator(3)).numpy()
    assert torch.equal(x, before)
    for i in range(rows):
        kernel = filters[0 if per == "batch" else i]
        blurred = np.stack([scipy.ndimage.correlate(plane, kernel, mode="constant") for plane in x[i].numpy()])
        np.testing.assert_allclose(found[i], blurred / blurred.max(), atol=1e-6)
        assert found[i].max() == 1


def test_filters_differ_between_batches_and_pictures_as_told() -> None:
    x, y = pictures(1).repeat(6, 1, 1, 1), torch.zeros(6, dtype=torch.int64)
    batch, image = RandomFilter(), RandomFilter(per="image")
    one = batch.before_crop(x, y, generator=generator(1))
    assert torch.equal(one, one[:1].expand_as(one))
    assert torch.equal(one, batch.before_crop(x, y, generator=generator(1)))
    assert not torch.allclose(one, batch.before_crop(x, y, generator=generator(2)), atol=0.01)
    each = image.before_crop(x, y, generator=generator(1))
    assert all(not torch.allclose(each[i], each[j], atol=1e-3) for i in range(6) for j in range(i))
    assert isinstance(batch, BeforeCrop)


def test_a_black_picture_stays_black() -> None:
    x = pictures(3)
    x[1] = 0
    found = RandomFilter().before_crop(x, torch.zeros(3, dtype=torch.int64), generator=generator())
    assert torch.equal(found[1], x[1])
    assert found.isfinite().all()


def test_filtered_pictures_keep_float32_under_autocast() -> None:
    x, y = pictures(3), torch.zeros(3, dtype=torch.int64)
    expected = RandomFilter().before_crop(x, y, generator=generator())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(RandomFilter().before_crop(x, y, generator=generator()), expected)


def test_the_loss_of_random_filters_is_plain_training() -> None:
    x, y = pictures(4), torch.arange(4)
    losses = [defense(network(), x, y, progress=0.0, generator=generator()) for defense in (Erm(), RandomFilter())]
    assert losses[0].item() == losses[1].item()


class Slow:
    """METHODS 25.2 read aloud: a transposed convolution a class, one class after the other."""

    def __init__(self, k: int, classes: list[int], seed: int) -> None:
        drawn = 2 * torch.rand(len(classes), k * k + 1, generator=generator(seed)) - 1
        self.filters = {}
        for label, values in zip(classes, drawn / k, strict=True):
            layer = nn.ConvTranspose2d(1, 1, k, padding=k // 2)
            layer.weight.data.copy_(values[:-1].view(1, 1, k, k))
            assert layer.bias is not None
            layer.bias.data.copy_(values[-1:])
            self.filters[label] = layer

    def apply(self, x: Tensor, label: int) -> Tensor:
        return torch.cat([self.filters[label](x[:, c : c + 1]) for c in range(3)], 1)

    def attack(self, model: nn.Module, x: Tensor, y: Tensor, defense: DeconvolutionAdversarial) -> Tensor:
        model.train(defense.bn_mode == "train")
        for _ in range(defense.ascent_steps):
            for layer in self.filters.values():
                for parameter in layer.parameters():
                    parameter.data.clamp_(-defense.limit, defense.limit)
            for label, layer in self.filters.items():
                loss = F.cross_entropy(model(self.apply(x[y == label], label)), y[y == label])
                layer.zero_grad()
                loss.backward()
                for parameter in layer.parameters():
                    assert parameter.grad is not None
                    parameter.data += defense.ascent_rate * parameter.grad
        found = []
        for picture, label in zip(x, y.tolist(), strict=True):
            z = self.apply(picture[None], label)[0].detach()
            found.append((z - z.min()) / (z.max() - z.min()))
        return torch.stack(found)


@pytest.mark.parametrize(
    ("bn_mode", "k", "steps", "rate", "limit"),
    [
        ("eval", 5, 10, 0.1, 5.0),
        ("eval", 3, 4, 20.0, 0.3),
        ("train", 5, 3, 0.1, 5.0),  # later, batch statistics of two pictures make more of float32's rounding than of x
        ("train", 3, 4, 20.0, 0.3),
        ("train", 7, 0, 0.1, 5.0),
    ],
)
def test_the_ascent_is_that_of_one_class_at_a_time(bn_mode: Any, k: int, steps: int, rate: float, limit: float) -> None:
    x, y = pictures(9), torch.tensor([3, 0, 3, 1, 0, 3, 3, 1, 3])
    defense = DeconvolutionAdversarial(k, ascent_steps=steps, ascent_rate=rate, limit=limit, bn_mode=bn_mode)
    model = network()
    other = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):
        slow = Slow(k, [0, 1, 3], seed=4)
    expected = slow.attack(other, x, y, defense)
    found = defense.attack(model, x, y, generator=generator(4))
    assert torch.allclose(found, expected, atol=1e-4)
    assert all(module.training for module in model.modules())
    for name, value in model.state_dict().items():
        assert torch.allclose(value.float(), other.state_dict()[name].float(), rtol=1e-3, atol=1e-5), name
    assert (model.backbone.features[1].num_batches_tracked == (3 * steps if bn_mode == "train" else 0)).all()


def test_pictures_fill_the_unit_interval_and_filters_differ_by_class() -> None:
    x, y = pictures(1).repeat(6, 1, 1, 1), torch.tensor([0, 1, 2, 0, 1, 2])
    found = DeconvolutionAdversarial().attack(network(), x, y, generator=generator())
    assert torch.equal(found.amin((1, 2, 3)), torch.zeros(6))
    assert torch.equal(found.amax((1, 2, 3)), torch.ones(6))
    assert torch.allclose(found[:3], found[3:], atol=1e-5)
    assert all(not torch.allclose(found[i], found[j], atol=0.01) for i, j in ((0, 1), (0, 2), (1, 2)))
    again = DeconvolutionAdversarial().attack(network(), x, y, generator=generator(1))
    assert not torch.allclose(found, again, atol=0.01)


class Mean(nn.Module):
    """Logits (m, -m) of the mean m: class 0 is harmed by darker pictures, class 1 by lighter ones."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((1, 2, 3))
        return torch.stack([mean, -mean], 1)


@pytest.mark.parametrize("rate", [0.1, 1000.0])
def test_the_filters_go_up_the_loss_to_the_limit(rate: float) -> None:
    x, y = pictures(2), torch.tensor([0, 1])
    seen: list[Tensor] = []
    model = Mean()
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    DeconvolutionAdversarial(3, ascent_rate=rate, limit=2.0).attack(model, x, y, generator=generator())
    losses = torch.stack([F.cross_entropy(Mean()(z), y, reduction="none") for z in seen])
    assert len(seen) == 10
    assert (losses[1:] > losses[:-1] - 1e-6).all()
    assert (losses[-1] > losses[0]).all()
    if rate > 1:
        kernel = torch.full((1, 1, 3, 3), 2.0)
        bright = torch.cat([F.conv2d(x[:, c : c + 1], kernel, padding=1) for c in range(3)], 1) + 2
        assert torch.allclose(seen[-1], torch.stack([-bright[0], bright[1]]), atol=1e-4)


def test_constant_pictures_and_a_batch_of_one() -> None:
    x = pictures(4)
    x[2] = 0
    for rows in (4, 1):
        model = network()
        loss = DeconvolutionAdversarial()(
            model, x[-rows:], torch.arange(4)[-rows:], progress=0.0, generator=generator()
        )
        loss.backward()
        assert loss.isfinite()
        assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in model.parameters())
    found = DeconvolutionAdversarial().attack(network(), x, torch.arange(4), generator=generator())
    assert torch.equal(found[2], torch.zeros_like(found[2]))
    assert found.isfinite().all()


def test_the_loss_is_that_of_the_attacked_pictures_in_training_mode() -> None:
    x, y = pictures(6), torch.arange(6) % 4
    model = network()
    seen: list[tuple[Tensor, bool]] = []
    model.register_forward_hook(lambda module, inputs, _: seen.append((inputs[0].detach(), module.training)))
    loss = DeconvolutionAdversarial()(model, x, y, progress=0.0, generator=generator(2))
    assert [mode for _, mode in seen] == [False] * 10 + [True]
    attacked = DeconvolutionAdversarial().attack(network(), x, y, generator=generator(2))
    assert torch.equal(seen[-1][0], attacked)
    assert loss.item() == F.cross_entropy(network()(attacked), y).item()
    assert (model.backbone.features[1].num_batches_tracked == 1).all()


def test_the_ascent_under_autocast_is_close_and_its_pictures_float32() -> None:
    x, y = pictures(6), torch.arange(6) % 4
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = DeconvolutionAdversarial().attack(network(), x, y, generator=generator())
    expected = DeconvolutionAdversarial().attack(network(), x, y, generator=generator())
    assert found.dtype == torch.float32
    assert (found - expected).abs().mean() < 0.01
    assert len(found.unique()) > 10_000, "bfloat16 has a few hundred numbers from 0.1 to 1"


@pytest.mark.parametrize("bn_mode", ["eval", "train"])
def test_the_model_is_left_as_it_was(bn_mode: Any) -> None:
    x, y = pictures(6), torch.arange(6) % 4
    defense = DeconvolutionAdversarial(ascent_steps=2, bn_mode=bn_mode)
    model = network()
    model.backbone.features[1].eval()
    first = next(model.parameters()).requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    losses = []
    for seed in (0, 0, 1):
        model.load_state_dict(before)
        losses.append(defense(model, x, y, progress=0.0, generator=generator(seed)).item())
    assert losses[0] == losses[1] != losses[2]
    handle = model.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        defense(model, x, y, progress=0.0, generator=generator())
    handle.remove()
    assert not model.backbone.features[1].training
    assert sum(not module.training for module in model.modules()) == 1 + len(
        list(model.backbone.features[1].children())
    )
    assert [weight.requires_grad for weight in model.parameters()] == [
        weight is not first for weight in model.parameters()
    ]
    assert all(weight.grad is None for weight in model.parameters())


def test_what_they_are_goes_into_results() -> None:
    told = describe(RandomFilter(blur=0.1))
    assert told == {"name": "random-filter", "kernel_size": 3, "blur": 0.1, "per": "batch"}
    assert describe(DeconvolutionAdversarial(7)) == {
        "name": "deconvolution",
        "filter_size": 7,
        "ascent_steps": 10,
        "ascent_rate": 0.1,
        "limit": 5.0,
        "bn_mode": "eval",
    }


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (RandomFilter, {"kernel_size": 4}),
        (RandomFilter, {"kernel_size": -1}),
        (RandomFilter, {"blur": 1.5}),
        (RandomFilter, {"per": "row"}),
        (DeconvolutionAdversarial, {"filter_size": 0}),
        (DeconvolutionAdversarial, {"ascent_steps": -1}),
        (DeconvolutionAdversarial, {"ascent_rate": float("nan")}),
        (DeconvolutionAdversarial, {"limit": -5.0}),
        (DeconvolutionAdversarial, {"bn_mode": "both"}),
    ],
)
def test_bad_settings(kind: Any, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))}: expected"):
        kind(**wrong)
