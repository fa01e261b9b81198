"""The loops that our trainings are timed against: they do what they are called after, and as well as ours."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator

from hf_unlearnable.batches import Batches
from hf_unlearnable.benchmarks import plain_loops
from hf_unlearnable.benchmarks.trainings import LOSSES, benchmark_train, flops, train_ours
from hf_unlearnable.defenses.erm import Erm
from hf_unlearnable.networks import create_network
from hf_unlearnable.poisons.robust_em import MinMaxMinPoison, RobustEmPoison
from hf_unlearnable.recipes import recipe
from hf_unlearnable.training import as_input


@pytest.fixture(autouse=True)
def restored_randomness(global_randomness_untouched: None) -> Iterator[None]:
    """Such loops draw from torch's global generator."""
    with torch.random.fork_rng():
        yield


def coloured(count: int, key: int) -> Batches:
    """Noise of 16 x 16 pixels, a little brighter in one channel, above or below: six classes."""
    generator = torch.Generator().manual_seed(key)
    labels = torch.arange(count) % 6
    pixels = torch.randint(0, 200, (count, 3, 16, 16), generator=generator)
    for row, label in enumerate(labels.tolist()):
        half = slice(0, 8) if label < 3 else slice(8, 16)
        pixels[row, label % 3, half] += 55
    return Batches(pixels=pixels.to(torch.uint8), labels=labels, classes=tuple("abcdef"))


@pytest.fixture(scope="module")
def rows() -> Batches:
    return coloured(512, 0)


def test_both_ways_learn_the_same(rows: Batches) -> None:
    chosen, test = recipe("tiny", epochs=4, drop_last=True), coloured(300, 1)
    how = {"recipe": chosen, "backbone": "tiny", "seed": 3}
    ours = train_ours(rows, test, defense=Erm(), accelerator=Accelerator(cpu=True), **how)
    plain = plain_loops.train_plainly(rows, test, loss=plain_loops.plain_loss, device="cpu", **how)
    assert min(ours, plain) > 0.8


@pytest.mark.parametrize("poison", [RobustEmPoison(pgd_steps=2, eot=2, adversarial_steps=2), MinMaxMinPoison(eot=1)])
def test_noise_and_adversary_keep_their_radius_and_go_their_way(rows: Batches, poison: RobustEmPoison) -> None:
    step = plain_loops.RobustStep(rows, poison, backbone="tiny", batch_size=32, device="cpu")
    x, y = as_input(rows.pixels[:32]).contiguous(), rows.labels[:32]
    step.model.eval()
    with torch.no_grad():
        before = F.cross_entropy(step.model(x), y)
    noise, worst = step.noise(x, y), step.adversary(x, y)
    assert float(noise.abs().max()) <= 8 / 255 + 1e-6
    assert float((worst - x).abs().max()) <= 4 / 255 + 1e-6
    step.model.eval()
    with torch.no_grad():
        assert F.cross_entropy(step.model(x + noise), y) < before < F.cross_entropy(step.model(worst), y)
    weights = [weight.clone() for weight in step.model.parameters()]
    step()
    assert any(not torch.equal(a, b) for a, b in zip(weights, step.model.parameters(), strict=True))


def test_the_worst_of_the_copies_counts(rows: Batches) -> None:
    model = create_network("tiny", num_classes=len(rows.classes), image_size=rows.image_size, seed=0)
    x, y = as_input(rows.pixels[:16]), rows.labels[:16]
    one, many = (
        torch.stack([plain_loops.UeraserLoss(n)(model, x, y).detach() for _ in range(4)]).mean() for n in (1, 8)
    )
    assert many > one


def test_every_training_is_timed_both_ways(rows: Batches) -> None:
    found = benchmark_train(rows, "noise", 1, quick=True)["trainings"]
    assert [*found][: len(LOSSES)] == [*LOSSES]
    assert len(found) == len(LOSSES) + 2
    for both in found.values():
        assert [*both] == ["ours", "plain loop"]
        assert both["ours"]["time_over_first"] == 1
        assert all(told["pictures_per_second"] > 0 for told in both.values())


def test_operations_are_counted(rows: Batches) -> None:
    """The tiny network's first convolution alone: 2 * 3 * 9 * 16 a pixel forwards, as many for its weights."""
    assert flops("tiny", rows) > 2 * 2 * 3 * 9 * 16 * 16 * 16
