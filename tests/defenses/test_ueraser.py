"""UEraser: the worst copy of every picture, its schedule, its settings, and what BatchNorm sees."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_unlearnable import create_network
from hf_unlearnable.augment import augment, take
from hf_unlearnable.budget import Budget
from hf_unlearnable.defenses.base import describe
from hf_unlearnable.defenses.ueraser import Ueraser
from hf_unlearnable.erasing import UeraserAugmentation
from hf_unlearnable.pgd import Pgd
from hf_unlearnable.policies import OPERATIONS


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Linear(nn.Module):
    """Logits of a linear map, with what it was shown."""

    def __init__(self, values: int = 3 * 8 * 8) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, values, generator=generator(5)) / 4)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach())
        return x.flatten(1) @ self.weight.T


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    return torch.rand(6, 3, 8, 8, generator=generator(1)), torch.tensor([0, 1, 0, 1, 1, 0])


def test_the_loss_and_its_gradient_are_those_of_the_worst_copy_of_each_picture(batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    model, defense = Linear(), Ueraser(mode="max", copies=4)
    loss = defense(model, x, y, progress=0.9, generator=generator(3))
    loss.backward()
    (shown,) = model.seen
    assert shown.shape == (24, 3, 8, 8)
    copies = shown.view(4, 6, 3, 8, 8)
    kept = []
    for i in range(6):
        losses = [F.cross_entropy(model(copies[k, i : i + 1]), y[i : i + 1]).item() for k in range(4)]
        kept.append(copies[max(range(4), key=losses.__getitem__), i])
    worst = Linear()
    expected = F.cross_entropy(worst(torch.stack(kept)), y)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert model.weight.grad is not None
    assert worst.weight.grad is not None
    assert torch.allclose(model.weight.grad, worst.weight.grad, atol=1e-6)


def test_copies_are_of_the_same_picture_and_differ(batch: tuple[Tensor, Tensor]) -> None:
    constant = torch.linspace(0.1, 0.9, 40).view(40, 1, 1, 1).expand(40, 3, 8, 8)
    y = torch.zeros(40, dtype=torch.int64)
    model, defense = Linear(), Ueraser(mode="max", copies=3)
    defense(model, constant.contiguous(), y, progress=0.0, generator=generator(3))
    draws = [defense.augmentation.draw(40, generator=(own := generator(3)))]
    draws += [defense.augmentation.draw(40, generator=own) for _ in range(2)]
    for k, drawn in enumerate(draws):
        expected = defense.augmentation.apply(constant.contiguous(), drawn)
        assert torch.allclose(model.seen[0][40 * k : 40 * (k + 1)], expected, atol=1e-6)
    assert not torch.equal(draws[0]["trivial operation"], draws[1]["trivial operation"])


@pytest.mark.parametrize("preset", ["repository", "paper", "apbench"])
def test_pictures_stay_in_the_box_and_have_operations_of_their_own(preset: Any) -> None:
    x = torch.rand(16, 3, 24, 40, generator=generator(2))
    model, defense = Linear(3 * 24 * 40), Ueraser(mode="max", copies=2, preset=preset)
    defense(model, x, torch.arange(16) % 2, progress=0.0, generator=generator(1))
    assert model.seen[0].min() >= 0
    assert model.seen[0].max() <= 1
    drawn = defense.augmentation.draw(16, generator=generator(1))["trivial operation"]
    assert len(drawn.unique()) > 4
    shared = Ueraser(per_picture=False).augmentation.draw(16, generator=generator(1))["trivial operation"]
    assert len(shared.unique()) == 1


def test_without_per_picture_copies_may_still_differ() -> None:
    x, y = torch.rand(4, 3, 8, 8, generator=generator(2)), torch.zeros(4, dtype=torch.int64)
    defense = Ueraser(mode="max", copies=5, per_picture=False)
    own = generator(0)
    numbers = [int(defense.augmentation.draw(4, generator=own)["trivial operation"][0]) for _ in range(5)]
    assert len(set(numbers)) > 1
    model = Linear()
    defense(model, x, y, progress=0.0, generator=generator(0))
    assert len(model.seen[0]) == 20


@pytest.mark.parametrize("progress", [0.0, 0.7])
def test_one_copy_is_lite(progress: float, batch: tuple[Tensor, Tensor]) -> None:
    losses = [
        defense(Linear(), *batch, progress=progress, generator=generator(4)).item()
        for defense in (Ueraser(mode="max", copies=1), Ueraser(mode="lite"), Ueraser(mode="standard", copies=1))
    ]
    assert losses[0] == losses[1] == losses[2]
    model = Linear()
    loss = Ueraser(mode="lite")(model, *batch, progress=progress, generator=generator(4))
    assert loss.item() == pytest.approx(F.cross_entropy(model(model.seen[0]), batch[1]).item())


@pytest.mark.parametrize(
    ("settings", "progress", "copies"),
    [
        ({}, 0.0, 5),
        ({}, 49 / 200, 5),
        ({}, 50 / 200, 1),
        ({}, 0.99, 1),
        ({"mode": "lite"}, 0.0, 1),
        ({"mode": "max"}, 0.999, 5),
        ({"mode": "max", "copies": 3}, 0.5, 3),
        ({"adversarial_share": 30 / 300}, 29_999 / 300_000, 5),
        ({"adversarial_share": 30 / 300}, 30_000 / 300_000, 1),
        ({"adversarial_share": 1.0}, 0.999, 5),
        ({"adversarial_share": 0.0}, 0.0, 1),
    ],
)
def test_the_schedule(settings: dict[str, Any], progress: float, copies: int, batch: tuple[Tensor, Tensor]) -> None:
    model = Linear()
    Ueraser(**settings)(model, *batch, progress=progress, generator=generator())
    assert [len(shown) for shown in model.seen] == [6 * copies]


def test_presets_are_the_columns_of_the_table() -> None:
    table = {
        "repository": (0.5, 0.5, (0.3, 0.7), (0.3, 0.7), (0.5, 1.0), 0.5),
        "paper": (0.5, 0.5, (0.1, 0.7), (0.1, 0.7), (0.0, 1.0), 0.5),
        "apbench": (1.0, 1.0, (0.3, 0.7), (0.3, 0.7), (0.5, 1.0), 0.5),
    }
    for preset, expected in table.items():
        a = Ueraser(preset=preset).augmentation  # type: ignore[arg-type]
        found = (a.brightness, a.contrast, a.brightness_roughness, a.contrast_roughness, a.intensity, a.shuffle)
        assert found == expected, preset
        assert a.trivial
    kornias = Ueraser(max_shear=54).augmentation.draw(4000, generator=generator())
    shears = kornias["trivial magnitude"][kornias["trivial operation"] == OPERATIONS.index("shear_x")]
    assert 50 < shears.abs().max() <= 54


def test_batch_norm_sees_all_copies_once_a_step() -> None:
    x, y = torch.rand(8, 3, 16, 16, generator=generator(1)), torch.arange(8) % 2
    norm = nn.BatchNorm2d(3, momentum=1.0)
    model = nn.Sequential(norm, Linear(3 * 16 * 16)).train()
    shown: list[Tensor] = []
    norm.register_forward_pre_hook(lambda module, inputs: shown.append(inputs[0].detach()))
    Ueraser(mode="max", copies=3)(model, x, y, progress=0.0, generator=generator()).backward()
    assert len(shown) == 1
    assert len(shown[0]) == 24
    assert int(norm.num_batches_tracked) == 1  # type: ignore[arg-type]
    assert torch.allclose(norm.running_mean, shown[0].mean((0, 2, 3)), atol=1e-6)  # type: ignore[arg-type]


def test_the_generator_decides_and_the_model_is_left_as_it_was() -> None:
    x, y = torch.rand(6, 3, 16, 16, generator=generator(3)), torch.arange(6) % 2
    before = x.clone()
    model = create_network("tiny", num_classes=2, image_size=16, seed=0)
    model.backbone.features[1].eval()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    losses = []
    for seed in (0, 0, 1):
        model.load_state_dict(weights)
        losses.append(Ueraser(copies=2)(model, x, y, progress=0.0, generator=generator(seed)).item())
    assert losses[0] == losses[1] != losses[2]
    assert model.training
    assert not model.backbone.features[1].training
    assert all(weight.requires_grad and weight.grad is None for weight in model.parameters())
    assert torch.equal(x, before)


def test_several_copies_are_at_least_as_bad_as_the_first(batch: tuple[Tensor, Tensor]) -> None:
    losses = [
        Ueraser(mode="max", copies=copies)(Linear(), *batch, progress=0.0, generator=generator(8)).item()
        for copies in (1, 2, 5)
    ]
    assert losses[0] <= losses[1] <= losses[2]
    assert losses[0] < losses[2]


def test_one_picture_in_bfloat16() -> None:
    x, y = torch.rand(1, 3, 17, 9, generator=generator(3)), torch.tensor([1])
    with torch.autocast("cpu", torch.bfloat16):
        loss = Ueraser(mode="max")(Linear(3 * 17 * 9), x, y, progress=0.0, generator=generator())
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    plain = Ueraser(mode="max")(Linear(3 * 17 * 9), x, y, progress=0.0, generator=generator())
    assert loss.item() == pytest.approx(plain.item(), rel=0.1)


def test_draws_are_small_and_parts_are_the_whole() -> None:
    method = UeraserAugmentation()
    draws = method.draw(9, generator=generator(3))
    assert all(len(values) == 9 for values in draws.values())
    assert sum(values.numel() for values in draws.values()) < 9 * 20
    for size in ((8, 8), (24, 40)):
        x = torch.rand(9, 3, *size, generator=generator(1))
        before = x.clone()
        whole = augment(x, method, generator=generator(3))
        parts = [method.apply(x[part], take(draws, part)) for part in (slice(0, 1), slice(1, 1), slice(1, 9))]
        assert torch.allclose(torch.cat(parts), whole, atol=1e-6)
        assert torch.equal(x, before)
        assert whole.is_contiguous()
        last = method.apply(x.contiguous(memory_format=torch.channels_last), draws)
        assert last.is_contiguous(memory_format=torch.channels_last)
        assert torch.allclose(last, whole, atol=1e-6)
        assert whole.min() >= 0
        assert whole.max() <= 1
        assert not torch.equal(whole, augment(x, method, generator=generator(4)))


def test_the_chain_is_its_parts_in_order() -> None:
    x = torch.rand(40, 3, 16, 16, generator=generator(1))
    method = UeraserAugmentation()
    assert list(method.parts) == ["plasma", "shuffle", "trivial"]
    draws = method.draw(40, generator=generator(2))
    z = x
    for name, part in method.parts.items():
        z = part.apply(z, {k.split(" ")[1]: v for k, v in draws.items() if k.split(" ")[0] == name})
    assert torch.equal(method.apply(x, draws), z)
    alone = UeraserAugmentation(brightness=0, contrast=0, shuffle=0, trivial=False)
    assert torch.equal(augment(x, alone, generator=generator()), x)
    shuffled = augment(
        x, UeraserAugmentation(brightness=0, contrast=0, shuffle=1, trivial=False), generator=generator()
    )
    assert torch.equal(shuffled.sort(1).values, x.sort(1).values)
    assert not torch.equal(shuffled, x)


def test_an_attacker_descends_through_it() -> None:
    x = 0.2 + 0.6 * torch.rand(12, 3, 8, 8, generator=generator(1))
    weight = torch.randn(12, 3, 8, 8, generator=generator(2))
    pgd = Pgd(
        budget=Budget("linf", 0.1),
        steps=5,
        step_size=0.03,
        direction="max",
        augmentation=UeraserAugmentation(),
        eot=3,
    )

    def loss(z: Tensor, rows: Tensor) -> Tensor:
        return (z * weight[rows].mean((2, 3), keepdim=True)).sum((1, 2, 3))

    delta = pgd.run(loss, x, draws=generator(4))
    assert delta.abs().flatten(1).amax(1).min() > 0.03
    draws = UeraserAugmentation().draw(12 * 50, generator=generator(9))
    rows = torch.arange(12).repeat_interleave(50)
    before, after = (loss(UeraserAugmentation().apply(z[rows], draws), rows).mean() for z in (x, x + delta))
    assert after > before


def test_what_it_is_goes_into_results() -> None:
    assert describe(Ueraser(mode="max")) == {
        "name": "ueraser",
        "mode": "max",
        "copies": 5,
        "adversarial_share": None,
        "preset": "repository",
        "max_shear": 16.7,
        "per_picture": True,
    }


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mode": "heavy"}, "mode is one of lite, standard, max, got 'heavy'"),
        ({"preset": "kornia"}, "preset is one of"),
        ({"copies": 0}, "copies is at least 1, got 0"),
        ({"adversarial_share": 1.5}, "adversarial_share"),
        ({"adversarial_share": 0.5, "mode": "max"}, "adversarial_share"),
        ({"max_shear": 90.0}, "max_shear"),
    ],
)
def test_bad_settings(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Ueraser(**wrong)


@pytest.mark.parametrize("wrong", [{"max_shear": 100}, {"intensity": (0.9, 0.1)}, {"shuffle": 1.1}])
def test_bad_settings_of_the_augmentation(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="probability" if "shuffle" in wrong else next(iter(wrong))):
        UeraserAugmentation(**wrong)


def test_whole_numbers_are_refused() -> None:
    with pytest.raises(TypeError, match="float pictures"):
        augment(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), UeraserAugmentation(), generator=generator())
