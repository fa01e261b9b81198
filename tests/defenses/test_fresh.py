"""A data defense at every step: before or after the crop, around another loss, with new numbers."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from hf_unlearnable import create_network
from hf_unlearnable.batches import Batches
from hf_unlearnable.defenses.base import BeforeCrop, Predicts, describe
from hf_unlearnable.defenses.data import DataDefense
from hf_unlearnable.defenses.displace import RandomDisplacement
from hf_unlearnable.defenses.erm import Erm
from hf_unlearnable.defenses.fresh import EachStep
from hf_unlearnable.defenses.sharpen import RandomSharpening
from hf_unlearnable.defenses.squeeze import Jpeg
from hf_unlearnable.draws import FreshDraws, RandomNumbers
from hf_unlearnable.images import Images, Labels
from hf_unlearnable.recipes import Recipe
from hf_unlearnable.victim import train

QUICK = Recipe(name="quick", epochs=2, batch_size=16, learning_rate=0.05)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@dataclass(frozen=True, kw_only=True)
class Marked(DataDefense):
    """x -> 2 x + mark, which tells the order of several."""

    name: ClassVar[str] = "marked"

    mark: float = 1.0

    def alter(self, x: Images, y: Labels | None, draws: RandomNumbers) -> Images:
        assert y is not None
        assert draws.uniform(2).shape == (len(x), 2)
        return 2 * x + self.mark


class Late(Marked):
    each_step: ClassVar = "after crop"


@dataclass
class Loss:
    """The mean of what it is shown; it predicts the first values, negated."""

    name: ClassVar[str] = "loss"
    seen: list[Tensor] = field(default_factory=list)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, progress: float, generator: Any) -> Tensor:
        assert progress == 0.25
        self.seen.append(x)
        return model(x).mean()

    def predict(self, model: nn.Module, x: Tensor, *, generator: torch.Generator) -> Tensor:
        return -model(x)

    def before_crop(self, x: Tensor, y: Tensor, *, generator: torch.Generator) -> Tensor:
        return x + 100


def both(defense: EachStep, x: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """What comes out before the crop, and the loss on that."""
    y, stream = torch.zeros(len(x), dtype=torch.int64), generator(seed)
    early = defense.before_crop(x, y, generator=stream)
    return early, defense(nn.Flatten(), early, y, progress=0.25, generator=stream)


@pytest.fixture
def x() -> Tensor:
    return torch.rand(3, 3, 6, 10, generator=generator(1))


def test_before_and_after_the_crop(x: Tensor) -> None:
    loss = Loss()
    early, _ = both(EachStep(Marked(mark=1), loss), x)
    assert torch.equal(early, 2 * x + 1 + 100)
    assert torch.equal(loss.seen[-1], early)
    early, mean = both(EachStep(Late(mark=1), loss), x)
    assert torch.equal(early, x + 100)
    assert torch.equal(loss.seen[-1], 2 * early + 1)
    assert torch.equal(mean, loss.seen[-1].mean())


@pytest.mark.parametrize("kind", [Marked, Late])
def test_when_may_be_chosen(kind: Any, x: Tensor) -> None:
    assert torch.equal(both(EachStep(kind(mark=1), when="before crop"), x)[0], 2 * x + 1)
    assert torch.equal(both(EachStep(kind(mark=1), when="after crop"), x)[0], x)


def test_the_outer_one_comes_first(x: Tensor) -> None:
    loss = Loss()
    early, _ = both(EachStep(Marked(mark=1), EachStep(Marked(mark=5), loss)), x)
    assert torch.equal(early, 2 * (2 * x + 1) + 5 + 100)
    both(EachStep(Late(mark=1), EachStep(Late(mark=5), loss)), x)
    assert torch.equal(loss.seen[-1], 2 * (2 * (x + 100) + 1) + 5)
    both(EachStep(Late(mark=1), EachStep(Marked(mark=5), loss)), x)
    assert torch.equal(loss.seen[-1], 2 * (2 * x + 5 + 100) + 1)


def test_coin_after_rsk(x: Tensor) -> None:
    """Each in its own place of the step, whichever is the outer one, and nothing beside them."""
    x, y = torch.rand(2, 3, 24, 40, generator=generator(2)), torch.tensor([0, 1])
    coin, rsk, loss = RandomDisplacement(), RandomSharpening(), Loss()
    for defense in (EachStep(coin, EachStep(rsk, loss)), EachStep(rsk, EachStep(coin, loss))):
        early, _ = both(defense, x, seed=7)
        stream = generator(7)
        sharp = rsk.alter(x, y, FreshDraws(2, stream))
        assert torch.equal(early, sharp + 100)
        assert torch.equal(loss.seen[-1], coin.alter(early, y, FreshDraws(2, stream)))


def test_every_step_has_its_own_numbers(x: Tensor) -> None:
    defense, y, stream = EachStep(RandomDisplacement(), when="before crop"), torch.zeros(3).long(), generator()
    one, two = (defense.before_crop(x, y, generator=stream) for _ in range(2))
    assert not torch.equal(one, two)
    assert torch.equal(one, defense.before_crop(x, y, generator=generator()))


def test_predictions_are_the_losss(x: Tensor) -> None:
    for data in (Marked(), Late()):
        assert torch.equal(EachStep(data, Loss()).predict(nn.Flatten(), x, generator=generator()), -x.flatten(1))
        assert torch.equal(EachStep(data).predict(nn.Flatten(), x, generator=generator()), x.flatten(1))
        assert isinstance(EachStep(data), BeforeCrop)
        assert isinstance(EachStep(data), Predicts)


def test_names_and_what_goes_into_results() -> None:
    coin, rsk = RandomDisplacement(alpha=1.0), RandomSharpening()
    assert EachStep(coin).name == "coin"
    assert EachStep(coin, EachStep(rsk)).name == "coin+rsk-ff"
    told = describe(EachStep(coin, EachStep(rsk)))
    assert told["data"] == {"name": "coin", "version": 1, "seed": 0, "alpha": 1.0}
    assert told["loss"]["data"]["keep"] == 0.3
    assert told["loss"]["loss"] == {"name": "erm"}


@pytest.mark.usefixtures("one_thread")
def test_a_training_takes_it(accelerator: Accelerator) -> None:
    labels = torch.arange(48) % 3
    u = torch.randint(0, 200, (48, 3, 16, 16), generator=generator(4)) + 25 * labels.view(-1, 1, 1, 1)
    rows = Batches(pixels=u.to(torch.uint8), labels=labels, classes=("a", "b", "c"))

    def final(defense: Any) -> Tensor:
        model = create_network("tiny", num_classes=3, image_size=16, seed=0)
        result = train(
            model, rows, rows, recipe=QUICK, defense=defense, accelerator=accelerator, seed=0, progress=False
        )
        assert result.defense == describe(defense)
        assert all(parameter.isfinite().all() for parameter in model.parameters())
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    plain, nothing = final(Erm()), final(EachStep(RandomDisplacement(alpha=0.0)))
    assert torch.equal(plain, nothing)
    one, again = (final(EachStep(RandomDisplacement(), EachStep(RandomSharpening()))) for _ in range(2))
    assert torch.equal(one, again)
    assert not torch.allclose(one, plain)


def test_the_loss_is_plain_by_default(x: Tensor) -> None:
    y = torch.tensor([0, 1, 2])
    found = EachStep(Late(mark=0.5))(nn.Flatten(), x, y, progress=0.0, generator=generator())
    assert torch.equal(found, F.cross_entropy((2 * x + 0.5).flatten(1), y))


def test_what_cannot_be_done_at_each_step_is_refused() -> None:
    with pytest.raises(TypeError, match="applied to a whole split"):
        EachStep(Jpeg())
    with pytest.raises(ValueError, match="before crop"):
        EachStep(RandomDisplacement(), when="later")  # type: ignore[arg-type]
