"""What a defense may do beside its loss: change pictures before the crop, and predict in its own way."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from hf_unlearnable.defenses.base import BeforeCrop, Predicts, describe
from hf_unlearnable.defenses.erm import Erm
from hf_unlearnable.training import Unfinished
from hf_unlearnable.victim import evaluate, train
from tests.test_victim import QUICK, make_batches, network, run, same_weights


@dataclass(frozen=True)
class White:
    """Whitens pictures before the crop, so that what is black afterwards is the crop's own border."""

    name: ClassVar[str] = "white"
    seen: Any = None

    def before_crop(self, x: Tensor, y: Tensor, *, generator: torch.Generator) -> Tensor:
        noise = torch.rand(x.shape, generator=generator, device=generator.device)
        return torch.ones_like(x) - 0.25 * noise

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, *, progress: float, generator: torch.Generator
    ) -> Tensor:
        if self.seen is not None:
            self.seen.append(x.detach().clone())
        return F.cross_entropy(model(x), y)


def test_pictures_are_changed_before_the_crop(accelerator: Accelerator) -> None:
    seen: list[Tensor] = []
    assert isinstance(White(), BeforeCrop)
    run(accelerator, defense=White(seen))
    values = torch.cat(seen).flatten()
    border = values == 0
    assert 0.01 < border.float().mean() < 0.4
    assert values[~border].min() >= 0.75
    assert len(torch.unique(values)) > 1000


def test_it_resumes_as_if_it_had_not_stopped(accelerator: Accelerator, tmp_path: Path) -> None:
    whole, expected = run(accelerator, defense=White())
    file, stops = tmp_path / "checkpoint.safetensors", 0
    while True:
        try:
            model, result = run(accelerator, defense=White(), checkpoint=file, max_minutes=0.0)
            break
        except Unfinished:
            stops += 1
    assert stops > 10
    assert same_weights(whole, model)
    assert result.curve == expected.curve


@dataclass(frozen=True)
class Always:
    """Answers with one class."""

    answer: int = 2
    name: ClassVar[str] = "always"

    def predict(self, model: nn.Module, x: Tensor, *, generator: torch.Generator) -> Tensor:
        assert not model.training
        assert not torch.is_grad_enabled()
        assert x.min() >= 0
        assert x.max() <= 1
        return F.one_hot(torch.full((len(x),), self.answer), 3).float()

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, *, progress: float, generator: torch.Generator
    ) -> Tensor:
        return Erm()(model, x, y, progress=progress, generator=generator)


def test_the_defense_answers_in_place_of_the_model(accelerator: Accelerator) -> None:
    assert isinstance(Always(), Predicts)
    assert not isinstance(Erm(), Predicts)
    _, result = run(accelerator, defense=Always())
    for counts in result.confusion:
        assert counts[2] == sum(counts)
    test = make_batches(50, seed=1)
    confusion = evaluate(network(), test, accelerator=accelerator, defense=Always(0))
    assert confusion[:, 0].sum() == 50


def test_given_validation_rows_choose_and_all_training_rows_train(accelerator: Accelerator) -> None:
    validation = make_batches(40, seed=5)
    model, result = run(accelerator, validation=validation)
    assert (result.train_rows, result.validation_rows) == (103, 40)
    last = result.curve[-1].validation_accuracy
    found = evaluate(model, validation, accelerator=accelerator)
    assert last == pytest.approx(float(found.diagonal().sum()) / 40)
    _, other = run(accelerator, validation=make_batches(40, seed=6))
    assert [p.train_loss for p in other.curve] == [p.train_loss for p in result.curve]
    assert [p.validation_accuracy for p in other.curve] != [p.validation_accuracy for p in result.curve]


def test_validation_rows_are_part_of_what_a_checkpoint_is_of(accelerator: Accelerator, tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.safetensors"
    with pytest.raises(Unfinished):
        run(accelerator, validation=make_batches(40, seed=5), checkpoint=file, max_minutes=0.0)
    with pytest.raises(ValueError, match="validation_digest"):
        run(accelerator, validation=make_batches(40, seed=6), checkpoint=file)


def test_validation_rows_of_unknown_classes_are_refused(accelerator: Accelerator) -> None:
    with pytest.raises(ValueError, match="expected one of the classes"):
        train(
            network(),
            make_batches(),
            make_batches(50, seed=1),
            validation=make_batches(40, classes=4),
            recipe=QUICK,
            defense=Erm(),
            accelerator=accelerator,
            seed=0,
            progress=False,
        )


def test_defenses_are_described_with_those_inside_them() -> None:
    @dataclass(frozen=True)
    class Outer:
        inner: Any
        size: int = 3
        name: ClassVar[str] = "outer"

    assert describe(Outer(Always(1))) == {"name": "outer", "inner": {"name": "always", "answer": 1}, "size": 3}
