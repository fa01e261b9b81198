import dataclasses
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor, nn

from hf_unlearnable.batches import Batches
from hf_unlearnable.budget import Budget
from hf_unlearnable.fitting import Setup
from hf_unlearnable.images import to_float
from hf_unlearnable.poisons.deepconfuse import Bottleneck, DeepConfuseFit, DeepConfusePoison, look_ahead
from hf_unlearnable.poisons.generators import UNet, seeded
from hf_unlearnable.surrogate import Surrogate
from hf_unlearnable.training import Unfinished, own_randomness
from tests.conftest import make_dataset, noise_pictures, pixels

LABELS = [i % 4 for i in range(40)]
RECIPE = dataclasses.replace(DeepConfusePoison.recipe, epochs=1, batch_size=16, learning_rate=0.1)
SETTINGS = {"outer_epochs": 2, "generator_width": 4, "generator_learning_rate": 1e-2}


@pytest.fixture(scope="module")
def source() -> Dataset:
    return make_dataset(noise_pictures(40, 16, 17), LABELS)


@pytest.fixture(scope="module")
def rows(source: Dataset) -> Batches:
    return Batches.load(source, progress=False)


@pytest.fixture(scope="module")
def surrogate(rows: Batches) -> Surrogate:
    return fitted(rows)


def fitted(rows: Batches, **options) -> Surrogate:
    made = DeepConfusePoison(**SETTINGS)
    return made.fit(rows, recipe=RECIPE, backbone="tiny", progress=False, **options)


def fit_of(rows: Batches, recipe=RECIPE, **changes) -> DeepConfuseFit:
    poison = DeepConfusePoison(**{**SETTINGS, **changes})
    fit = poison.fitting(Setup(train=rows, recipe=recipe, backbone="tiny", seed=3, accelerator=Accelerator(cpu=True)))
    assert isinstance(fit, DeepConfuseFit)
    return fit


def stepped(fit: DeepConfuseFit, step: int) -> dict[str, Tensor]:
    with own_randomness(torch.device("cpu")):
        return fit.step(step)


def bare(surrogate: Surrogate) -> Surrogate:
    return dataclasses.replace(surrogate, provenance={}, path=None)


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one | other)


# The look-ahead.


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def by_hand(weight: np.ndarray, bias: np.ndarray, shown: np.ndarray, x: np.ndarray, y: np.ndarray, rate: float):
    """Softmax regression, one step of gradient descent, in closed form."""
    error = (softmax(shown @ weight.T + bias) - np.eye(len(bias))[y]) / len(y)
    after = softmax(x @ (weight - rate * error.T @ shown).T + bias - rate * error.sum(0))
    return -np.log(after[np.arange(len(y)), y]).mean()


def test_the_look_ahead_is_that_of_the_closed_form() -> None:
    generator = torch.Generator().manual_seed(0)
    shown, x = torch.rand(2, 5, 3, 2, 2, generator=generator, dtype=torch.float64)
    y, rate = torch.tensor([0, 2, 1, 1, 0]), 0.7
    network = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), 1).double()
    weight, bias = (part.detach().numpy() for part in network.parameters())
    flat = [part.flatten(1).numpy() for part in (shown, x)]
    shown.requires_grad_()
    found = look_ahead(network, shown, x, y, rate)
    assert found.item() == pytest.approx(by_hand(weight, bias, *flat, y.numpy(), rate), rel=1e-6)
    slopes = torch.autograd.grad(found, shown)[0].flatten(1).numpy()
    for row, column in ((0, 0), (3, 7), (4, 11)):
        ends = []
        for move in (1e-3, -1e-3):
            there = flat[0].copy()
            there[row, column] += move
            ends.append(by_hand(weight, bias, there, flat[1], y.numpy(), rate))
        # the network's logits, and so the gradient, are rounded to float32
        assert slopes[row, column] == pytest.approx((ends[0] - ends[1]) / 2e-3, rel=1e-3, abs=1e-6)


def test_the_look_ahead_leaves_the_network_as_it_is(rows: Batches) -> None:
    network = fit_of(rows).modules["network"]
    before, x = state(network), to_float(rows.pixels[:8])
    look_ahead(network, (x / 2).requires_grad_(), x, rows.labels[:8], 0.1).backward()
    assert equal(before, state(network))
    assert all(weight.grad is None and weight.requires_grad for weight in network.parameters())
    assert network.training


def test_without_a_rate_it_is_the_loss_in_training_mode(rows: Batches) -> None:
    network, x, y = fit_of(rows).modules["network"], to_float(rows.pixels[:8]), rows.labels[:8]
    found = look_ahead(network, x / 2, x, y, 0.0)
    assert found.item() == pytest.approx(F.cross_entropy(network(x), y).item(), rel=1e-5)


# Training.


def test_the_generator_learns_to_mislead(rows: Batches) -> None:
    fit = fit_of(rows, dataclasses.replace(RECIPE, epochs=8, batch_size=40), epsilon=0.2)
    x, y, generator = to_float(rows.pixels), rows.labels, fit.modules["generator"]
    start = Bottleneck.of(fit.setup, 0)

    def ahead() -> float:
        with torch.no_grad():
            shown = (x + fit.scale * generator(x)).clamp(0, 1)
        return look_ahead(start, shown, x, y, 0.1).item()

    before = ahead()
    for step in range(8):
        stepped(fit, step)
    assert ahead() > before + 0.01, before


def test_a_step_is_that_of_the_algorithm(rows: Batches) -> None:
    """The first step, written out: Adam's first step is the rate times the sign of the gradient."""
    fit = fit_of(rows)
    network, generator = Bottleneck.of(fit.setup, 0), seeded(lambda: UNet(4), 0)
    generator.load_state_dict(fit.modules["generator"].state_dict())
    batch = next(rows.epoch(0, key=3, batch_size=16))
    x, y, scale = to_float(batch.pixels), batch.labels, 8 / 255
    found = stepped(fit, 0)
    with torch.no_grad():
        shown = (x + scale * generator.eval()(x)).clamp(0, 1)
    loss = F.cross_entropy(network(shown), y)
    assert found["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    slopes = torch.autograd.grad(loss, list(network.parameters()))
    for weight, slope, now in zip(network.parameters(), slopes, fit.modules["network"].parameters(), strict=True):
        assert torch.allclose(weight - 0.1 * slope, now, atol=1e-6)
    network = Bottleneck.of(fit.setup, 0)
    ahead = look_ahead(network, (x + scale * generator.train()(x)).clamp(0, 1), x, y, 0.1)
    assert found["look-ahead"].item() == pytest.approx(ahead.item(), rel=1e-5)
    slopes = torch.autograd.grad(ahead, list(generator.parameters()))
    for weight, slope, now in zip(generator.parameters(), slopes, fit.modules["generator"].parameters(), strict=True):
        sure = slope.abs() > 0.02 * slope.abs().max()
        assert torch.allclose((now - weight)[sure], 1e-2 * slope.sign()[sure], atol=2e-4)
    assert all(slope.abs().max() > 1e-5 for slope in slopes)


def test_every_outer_epoch_begins_with_a_fresh_classifier_and_the_noise_so_far(rows: Batches) -> None:
    fit = fit_of(rows, dataclasses.replace(RECIPE, momentum=0.9))
    assert (fit.per_classifier, fit.total) == (3, 6)
    first = state(fit.modules["generator"])
    for step in range(3):
        stepped(fit, step)
        assert equal(state(fit.modules["generator before"]), first)
    then = state(fit.modules["generator"])
    assert not equal(then, first)
    stepped(fit, 3)
    assert equal(state(fit.modules["generator before"]), then)
    assert not equal(state(fit.modules["generator"]), then)
    assert equal(fit.kept(), {f"generator.{name}": v for name, v in state(fit.modules["generator"]).items()})
    fresh = Bottleneck.of(fit.setup, 1)
    for weight, now in zip(fresh.parameters(), fit.modules["network"].parameters(), strict=True):
        assert now.grad is not None
        assert torch.allclose(weight - 0.1 * now.grad, now, atol=1e-6)


def test_the_rate_starts_anew_with_every_classifier(rows: Batches) -> None:
    fit = fit_of(rows, dataclasses.replace(RECIPE, schedule="cosine"))
    rates = []
    for step in range(6):
        stepped(fit, step)
        rates.append(fit.optimizers["network"].param_groups[0]["lr"])
        assert fit.optimizers["generator"].param_groups[0]["lr"] == 1e-2
    assert rates == [*rates[:3], *rates[:3]]
    assert rates[:3] == pytest.approx([0.1, 0.075, 0.025])


def test_a_stopped_training_goes_on_exactly(rows: Batches, surrogate: Surrogate, tmp_path: Path) -> None:
    for _ in range(6):
        try:
            found = fitted(rows, checkpoint=tmp_path / "kept.safetensors", max_minutes=0.0)
            break
        except Unfinished:
            continue
    assert found.provenance["steps"] == 6
    assert bare(found) == bare(surrogate)
    other = DeepConfusePoison(**SETTINGS).fit(rows, recipe=RECIPE, backbone="tiny", progress=False, seed=1)
    assert bare(other) != bare(surrogate)


def test_the_vgg_of_the_paper_by_default(rows: Batches) -> None:
    setup = Setup(train=rows, recipe=RECIPE, backbone=DeepConfusePoison.backbone, seed=0, accelerator=Accelerator())
    network = Bottleneck.of(setup, 0)
    assert (network.backbone.architecture, network.backbone.num_classes) == ("cifar_vgg11_bn", 2)
    assert network.head.weight.shape == (4, 2)


def test_numbers_that_are_not_finite(rows: Batches) -> None:
    recipe = dataclasses.replace(RECIPE, learning_rate=1e30)
    with pytest.raises(FloatingPointError, match="finite"):
        DeepConfusePoison(**SETTINGS).fit(rows, recipe=recipe, backbone="tiny", progress=False)


# Mapping.


def test_pixels_are_those_of_the_generator(source: Dataset, rows: Batches, surrogate: Surrogate) -> None:
    generator = seeded(lambda: UNet(4), 0).eval()
    before = "generator."
    generator.load_state_dict({k.removeprefix(before): v for k, v in surrogate.tensors.items() if k.startswith(before)})
    assert len(generator.state_dict()) == len(surrogate.tensors)
    x = rows.pixels.double() / 255
    with torch.no_grad():
        expected = ((x + 8 / 255 * generator(x.float()).double()).clamp(0, 1) * 255 + 0.5).floor().byte()
    found = pixels(DeepConfusePoison.from_surrogate(surrogate).apply(source))
    assert (found != expected.permute(0, 2, 3, 1).numpy()).sum() <= 3
    assert (found != pixels(source)).any((1, 2, 3)).all()


def test_every_way_of_mapping_gives_nearly_the_same_pixels(source: Dataset, surrogate: Surrogate) -> None:
    poison = DeepConfusePoison.from_surrogate(surrogate)
    expected = pixels(poison.apply(source))
    order = [7, 3, 20]
    for found, own in (
        (source.map(poison, batched=True, batch_size=7, keep_in_memory=True), expected),
        (source.select(order).map(poison), expected[order]),
        (poison.apply(source, num_proc=2), expected),
        (poison.apply(source.remove_columns("label")), expected),
    ):
        different = np.abs(pixels(found).astype(int) - own)
        assert different.max() <= 1
        assert (different > 0).sum() <= 3


def test_the_budget_is_kept_and_may_be_another(source: Dataset, rows: Batches, surrogate: Surrogate) -> None:
    for epsilon, levels in ((0.032, 8), (16 / 255, 16), (0, 0)):
        poison = DeepConfusePoison.from_surrogate(surrogate, epsilon=epsilon)
        found = torch.from_numpy(pixels(poison.apply(source))).permute(0, 3, 1, 2)
        assert poison.scale == pytest.approx(levels / 255)
        assert (found.int() - rows.pixels.int()).abs().max() <= levels
        budget = poison.budget_for(16, 17)
        assert budget == Budget("linf", epsilon)


def test_a_saturated_generator_stays_in_the_budget(surrogate: Surrogate) -> None:
    tensors = {name: tensor.clone() for name, tensor in surrogate.tensors.items()}
    tensors["generator.last.1.bias"] = torch.tensor([50.0, -50.0, 50.0])
    poison = DeepConfusePoison.from_surrogate(dataclasses.replace(surrogate, tensors=tensors))
    x = torch.arange(16 * 17).clamp(max=255).byte().view(1, 1, 16, 17).repeat(1, 3, 1, 1)
    found = poison.change(x, None, ["row 0"]).int()
    expected = (x.int() + torch.tensor([8, -8, 8]).view(1, 3, 1, 1)).clamp(0, 255)
    assert torch.equal(found, expected)


def test_file_and_pickle_give_the_same_poison(source: Dataset, surrogate: Surrogate, tmp_path: Path) -> None:
    expected = pixels(DeepConfusePoison.from_surrogate(surrogate).apply(source))
    path = surrogate.save(tmp_path / "deep.safetensors")
    poison = DeepConfusePoison.from_surrogate(path)
    assert poison.generator_width == 4
    assert np.array_equal(pixels(poison.apply(source)), expected)
    again = pickle.loads(pickle.dumps(poison))  # noqa: S301
    assert again == poison
    assert np.array_equal(pixels(again.apply(source)), expected)
    assert surrogate.classes == ()
    assert surrogate.networks == {}


# What is refused.


def test_a_class_without_rows(rows: Batches) -> None:
    few = rows.select((rows.labels != 2).nonzero().flatten())
    with pytest.raises(ValueError, match=r"rows of every class, got none of class 2 \(class2\)"):
        fitted(few)


def test_pictures_of_another_size(surrogate: Surrogate) -> None:
    poison = DeepConfusePoison.from_surrogate(surrogate)
    with pytest.raises(ValueError, match="16 x 17 pixels .* got 17 x 16"):
        poison.apply(make_dataset(noise_pictures(2, 17, 16), [0, 1]))


def test_settled_fields_and_other_methods(surrogate: Surrogate) -> None:
    for changes in ({"outer_epochs": 3}, {"generator_width": 8}, {"generator_learning_rate": 0.5}):
        with pytest.raises(ValueError, match="settled when the surrogate was trained"):
            DeepConfusePoison.from_surrogate(surrogate, **changes)
    with pytest.raises(ValueError, match="expected a surrogate for 'deep-confuse', got one for 'other'"):
        DeepConfusePoison.from_surrogate(dataclasses.replace(surrogate, method="other"))
    with pytest.raises(ValueError, match="has no surrogate"):
        DeepConfusePoison().change(torch.zeros(1, 3, 16, 17, dtype=torch.uint8), None, ["row 0"])


@pytest.mark.parametrize(
    "wrong",
    [
        {"epsilon": 1.1},
        {"epsilon": -0.1},
        {"outer_epochs": 0},
        {"generator_width": 0},
        {"generator_learning_rate": 0.0},
    ],
)
def test_wrong_settings(wrong: dict) -> None:
    with pytest.raises(ValueError, match=r"epsilon|positive"):
        DeepConfusePoison(**wrong)
