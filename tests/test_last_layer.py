"""DFR: the last layer alone changes (or BatchNorm's statistics too), on a copy, and beside it stand two controls."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from hf_unlearnable import create_network, last_layer
from hf_unlearnable.augment import CropFlip
from hf_unlearnable.batches import Batches
from hf_unlearnable.last_layer import LastLayerResult, dfr_with_controls, refit_last_layer
from hf_unlearnable.networks import Network
from hf_unlearnable.recipes import Recipe
from hf_unlearnable.training import as_input, augmented
from hf_unlearnable.victim import evaluate


def coloured(rows: int = 90, size: tuple[int, int] = (16, 16), seed: int = 0) -> Batches:
    """Three classes that differ in colour."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % 3
    base = torch.randint(40, 200, (rows, 3, *size), generator=generator)
    pixels = base + 40 * torch.eye(3, dtype=torch.int64)[labels][:, :, None, None]
    return Batches(pixels=pixels.to(torch.uint8), labels=labels, classes=("red", "green", "blue"))


def network(size: int | tuple[int, int] = 16, seed: int = 0) -> Network:
    """One whose last layer knows nothing, and whose running statistics are not the initial ones."""
    made = create_network("tiny", num_classes=3, image_size=size, seed=seed)
    with torch.no_grad():
        for _ in range(30):
            made(as_input(coloured(30, made.image_size or (16, 16), seed=7).pixels))
        made.backbone.get_classifier().weight.mul_(-3)
    return made


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def is_head(name: str, made: Network) -> bool:
    return name.startswith(f"backbone.{made.backbone.pretrained_cfg['classifier']}.")


def accuracy(made: Network, rows: Batches) -> float:
    made.eval()
    with torch.no_grad():
        return float((made(as_input(rows.pixels)).argmax(1) == rows.labels).double().mean())


@pytest.mark.parametrize("bn", ["eval", "train"])
def test_it_changes_what_it_says_on_a_copy(bn: Any) -> None:
    found = network().train()
    found.backbone.features[1].eval()
    before = state(found)
    refit = refit_last_layer(found, coloured(), bn=bn, epochs=3, batch_size=32, seed=0)[0]
    assert all(torch.equal(found.state_dict()[name], value) for name, value in before.items())
    assert all(weight.requires_grad and weight.grad is None for weight in (*found.parameters(), *refit.parameters()))
    assert [module.training for module in refit.modules()] == [module.training for module in found.modules()]
    changed = {name for name, value in refit.state_dict().items() if not torch.equal(value, before[name])}
    heads = {name for name in before if is_head(name, found)}
    buffers = {name for name in before if name.endswith(("running_mean", "running_var", "num_batches_tracked"))}
    assert len(heads) == 2
    assert buffers
    assert changed == (heads if bn == "eval" else heads | buffers)


def test_a_spoilt_last_layer_is_repaired() -> None:
    spoilt, test = network(), coloured(60, seed=3)
    assert accuracy(copy.deepcopy(spoilt), test) < 0.7
    for bn in ("eval", "train"):
        refit = refit_last_layer(spoilt, coloured(), bn=bn, epochs=15, batch_size=32, seed=0)[0]  # type: ignore[arg-type]
        assert accuracy(refit, test) > 0.95


def test_training_mode_moves_the_statistics_once_a_batch() -> None:
    found, rows = network(), coloured(48)
    refit = refit_last_layer(found, rows, bn="train", epochs=2, batch_size=24, seed=5)[0]
    expected = copy.deepcopy(found).train()
    step = 0
    for epoch in range(2):
        for batch in rows.epoch(epoch, key=5, batch_size=24):
            with torch.no_grad():
                expected.features(as_input(augmented(batch, CropFlip(padding=2), 5, step)))
            step += 1
    for name, value in expected.state_dict().items():
        if not is_head(name, found):
            assert torch.allclose(refit.state_dict()[name], value, atol=1e-6), name


def test_against_the_whole_network_at_every_evaluation() -> None:
    found, rows = network(), coloured(60)
    refit = refit_last_layer(found, rows, epochs=2, batch_size=30, seed=1)[0]
    slow = copy.deepcopy(found).eval()
    layer = slow.backbone.get_classifier()
    optimizer = torch.optim.LBFGS(layer.parameters(), lr=0.5)
    batches = [batch for epoch in range(2) for batch in rows.epoch(epoch, key=1, batch_size=30)]
    for step, batch in enumerate(batches):
        x = as_input(augmented(batch, CropFlip(padding=2), 1, step))

        def objective(x: Tensor = x, y: Tensor = batch.labels) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(slow(x), y)
            loss.backward()
            return loss

        optimizer.step(objective)  # type: ignore[arg-type]
    expected, got = layer.weight.detach(), refit.backbone.get_classifier().weight.detach()
    assert (got - expected).norm() < 1e-2 * (got - found.backbone.get_classifier().weight).norm()


def test_the_seed_decides_and_sizes_may_be_odd() -> None:
    found, rows = network((24, 40)), coloured(9, (24, 40))
    first, again, other = (
        refit_last_layer(found, rows, epochs=2, batch_size=4, seed=seed)[0].backbone.get_classifier().weight
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.isfinite().all()


def test_frozen_networks_stay_frozen() -> None:
    found = network().requires_grad_(False)
    refit = refit_last_layer(found, coloured(9), epochs=1, batch_size=4, seed=0)[0]
    assert not any(weight.requires_grad for weight in refit.parameters())


def test_what_cannot_be_refitted() -> None:
    found = network()
    with pytest.raises(ValueError, match="at least one clean row"):
        refit_last_layer(found, coloured().select([]), seed=0)
    with pytest.raises(FloatingPointError, match="diverged"):
        refit_last_layer(found, coloured(30), learning_rate=1e38, seed=0)
    found.backbone.reset_classifier(0)
    with pytest.raises(TypeError, match="linear layer, got Identity"):
        refit_last_layer(found, coloured(), seed=0)


def test_a_search_that_diverges_is_begun_anew_with_half_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[float] = []
    refit = last_layer._refit

    def watched(network, clean, bn, epochs, batch_size, learning_rate, seed):
        steps.append(learning_rate)
        return None if len(steps) < 3 else refit(network, clean, bn, epochs, batch_size, learning_rate, seed)

    monkeypatch.setattr(last_layer, "_refit", watched)
    victim = network(seed=3)
    with pytest.warns(UserWarning, match="diverged with steps of 0.5: their length is 0.125 now"):
        found, step = refit_last_layer(victim, coloured(60), epochs=2, seed=0)
    assert steps == [0.5, 0.25, 0.125]
    assert step == 0.125
    expected = refit(victim, coloured(60), "eval", 2, 1024, 0.125, 0)
    assert expected is not None
    assert torch.equal(found.backbone.get_classifier().weight, expected.backbone.get_classifier().weight)


def test_a_result_tells_the_steps_of_both_searches(monkeypatch: pytest.MonkeyPatch, accelerator: Accelerator) -> None:
    refit, victim = last_layer._refit, network(seed=3)
    trunk = victim.state_dict()

    def diverging_from_scratch(found, *others):
        known = all(torch.equal(found.state_dict()[name], value) for name, value in trunk.items())
        return refit(found, *others) if known or others[-2] < 0.5 else None

    monkeypatch.setattr(last_layer, "_refit", diverging_from_scratch)
    recipe = Recipe(name="quick", epochs=1, batch_size=16, learning_rate=0.02, augmentation="none")
    how: Any = {"recipe": recipe, "accelerator": accelerator, "seed": 4, "epochs": 1, "progress": False}
    with pytest.warns(UserWarning, match="diverged with steps of 0.5: their length is 0.25 now"):
        found = dfr_with_controls(victim, coloured(60), coloured(60, seed=9), **how)
    assert (found.refitted_step, found.random_trunk_step) == (0.5, 0.25)


def test_the_controls_are_what_they_say(accelerator: Accelerator) -> None:
    victim, clean, test = network(seed=3).train(), coloured(60), coloured(60, seed=9)
    before = state(victim)
    renamed = Batches(pixels=test.pixels, labels=2 - test.labels, classes=test.classes[::-1])
    recipe = Recipe(name="quick", epochs=2, batch_size=16, learning_rate=0.02, augmentation="none")
    found = dfr_with_controls(
        victim,
        clean,
        renamed,
        recipe=recipe,
        accelerator=accelerator,
        seed=4,
        epochs=2,
        batch_size=16,
        progress=False,
    )
    fresh = create_network("tiny", num_classes=3, image_size=16, seed=4)
    settings: Any = {"epochs": 2, "batch_size": 16, "seed": 4}

    def share(made: Network) -> float:
        confusion = evaluate(made, test, accelerator=accelerator)
        return int(confusion.trace()) / len(test)

    assert found.before == share(copy.deepcopy(victim))
    assert found.refitted == share(refit_last_layer(victim, clean, **settings)[0])
    assert found.random_trunk == share(refit_last_layer(fresh, clean, **settings)[0])
    assert 0 <= found.from_scratch <= 1
    assert found.clean_rows == 60
    assert victim.training
    assert all(torch.equal(victim.state_dict()[name], value) for name, value in before.items())


def test_what_was_learnt_is_beyond_both_controls() -> None:
    steps = {"refitted_step": 0.5, "random_trunk_step": 0.25}
    made = LastLayerResult(before=0.2, refitted=0.8, random_trunk=0.3, from_scratch=0.65, clean_rows=10, **steps)
    assert made.learnt == pytest.approx(0.15)
