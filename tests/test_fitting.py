"""The training loop of surrogates: stopped anywhere it goes on as if it had not been."""

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors import safe_open
from torch import Tensor, nn

from hf_unlearnable import (
    ClustersPoison,
    DeepConfusePoison,
    EmPoison,
    EntfPoison,
    HypoPoison,
    MinMaxMinPoison,
    NtgaPoison,
    PilPoison,
    RobustEmPoison,
    SemPoison,
    SurrogatePoison,
    TapPoison,
    fitting,
)
from hf_unlearnable.batches import Batches
from hf_unlearnable.fitting import Fit, Progress, Setup
from hf_unlearnable.recipes import Recipe, changed
from hf_unlearnable.training import Unfinished, as_input
from tests.conftest import noise_pictures

RECIPE = Recipe(name="quick", steps=9, batch_size=8, learning_rate=0.05, schedule="step", milestones=(0.5,))


def make_batches(rows: int = 20, seed: int = 0) -> Batches:
    pixels = torch.from_numpy(noise_pictures(rows, 16, 16, seed=seed)).permute(0, 3, 1, 2).contiguous()
    return Batches(pixels=pixels, labels=torch.arange(rows) % 3, classes=("a", "b", "c"))


class Plain(Fit):
    """Plain training, with a tensor and a number that also have to survive."""

    def __init__(self, setup: Setup, at: int = -1, do: Any = None) -> None:
        super().__init__(setup)
        network = setup.network()
        self.modules, self.optimizers = {"network": network}, {"network": setup.sgd(network)}
        self.tensors = {"seen": torch.zeros(3)}
        self.state = {"calls": 0}
        self.total, self.at, self.do = 9, at, do
        self.steps: list[int] = []

    def step(self, step: int) -> dict[str, Tensor]:
        if step == self.at:
            self.do()
        self.steps.append(step)
        batch, network = self.batch(step), self.modules["network"]
        noise = torch.rand(len(batch.labels), 3, 16, 16, generator=self.generator("noise", step)) / 10
        x = self.view(as_input(batch.pixels), batch, "view", step) + noise
        loss = self.descend(step, batch, lambda: F.cross_entropy(network(x), batch.labels))
        self.tensors["seen"] += torch.bincount(batch.labels, minlength=3)
        self.state["calls"] += 1
        return {"loss": loss} | ({"other": loss * 2} if step % 2 else {})


def run(accelerator: Accelerator, at: int = -1, do: Any = None, **how: Any) -> tuple[Plain, Progress]:
    setup = Setup(train=make_batches(), recipe=RECIPE, backbone="tiny", seed=3, accelerator=accelerator)
    fit = Plain(setup, at, do)
    done = fitting.run(fit, what={"rows": 20, "how": how.pop("named", "plain")}, progress=False, **how)
    return fit, done


def same(one: Plain, other: Plain) -> bool:
    a, b = one.modules["network"].state_dict(), other.modules["network"].state_dict()
    return (
        all(torch.equal(a[name], b[name]) for name in a)
        and torch.equal(one.tensors["seen"], other.tensors["seen"])
        and one.state == other.state
    )


class Crash(Exception):
    pass


def crash() -> None:
    raise Crash


def test_it_is_the_plain_loop(accelerator: Accelerator) -> None:
    fit, done = run(accelerator)
    setup = fit.setup
    network = setup.network()
    optimizer = setup.sgd(network)
    losses, step = [], 0
    for epoch in range(3):
        for batch in setup.train.epoch(epoch, key=3, batch_size=8):
            optimizer.param_groups[0]["lr"] = 0.05 if step < 4 else 0.005
            noise = torch.rand(len(batch.labels), 3, 16, 16, generator=fit.generator("noise", step)) / 10
            x = fit.view(as_input(batch.pixels), batch, "view", step) + noise
            optimizer.zero_grad()
            loss = F.cross_entropy(network(x), batch.labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            step += 1
    a, b = network.state_dict(), fit.modules["network"].state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert [point["step"] for point in done.curve] == list(range(1, 10))
    assert [point["loss"] for point in done.curve] == pytest.approx(losses)
    assert done.curve[1]["other"] == pytest.approx(2 * losses[1])
    assert "other" not in done.curve[2]


@pytest.mark.parametrize("at", [0, 1, 2, 3, 8])
def test_a_killed_training_resumes_bit_for_bit(accelerator: Accelerator, tmp_path: Path, at: int) -> None:
    whole, expected = run(accelerator)
    file = tmp_path / "inner" / "checkpoint.safetensors"
    how: dict[str, Any] = {"checkpoint": file, "checkpoint_seconds": 0.0}
    with pytest.raises(Crash):
        run(accelerator, at, crash, **how)
    fit, done = run(accelerator, **how)
    assert fit.steps == list(range(at, 9))
    assert same(fit, whole)
    assert done.curve == expected.curve
    again, _ = run(accelerator, **how)
    assert again.steps == []
    assert same(again, whole)
    assert os.listdir(file.parent) == [file.name]


def test_time_up_at_every_step_gives_the_same(accelerator: Accelerator, tmp_path: Path) -> None:
    whole, expected = run(accelerator)
    file, found, stops = tmp_path / "c.safetensors", None, 0
    while found is None:
        try:
            found = run(accelerator, checkpoint=file, max_minutes=0.0)
        except Unfinished as error:
            stops += 1
            assert f"step {stops} of 9" in str(error)  # noqa: PT017
    assert stops == 8
    assert same(found[0], whole)
    assert found[1].curve == expected.curve
    with pytest.raises(ValueError, match="needs a checkpoint"):
        run(accelerator, max_minutes=1.0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_step(accelerator: Accelerator, tmp_path: Path, number: int) -> None:
    whole, expected = run(accelerator)
    file = tmp_path / "c.safetensors"
    with pytest.raises(KeyboardInterrupt, match="step 5 of 9"):
        run(accelerator, 4, lambda: os.kill(os.getpid(), number), checkpoint=file)
    fit, done = run(accelerator, checkpoint=file)
    assert same(fit, whole)
    assert done.curve == expected.curve


def test_a_loss_that_is_not_finite_keeps_the_last_good_state(accelerator: Accelerator, tmp_path: Path) -> None:
    file = tmp_path / "c.safetensors"

    class Breaks(Plain):
        def step(self, step: int) -> dict[str, Tensor]:
            losses = super().step(step)
            return {name: loss * (math.nan if step == 5 else 1) for name, loss in losses.items()}

    setup = Setup(train=make_batches(), recipe=RECIPE, backbone="tiny", seed=3, accelerator=accelerator)
    with pytest.raises(FloatingPointError, match="at step 6 of 9"):
        fitting.run(Breaks(setup), what={}, checkpoint=file, checkpoint_seconds=0.0, progress=False)
    with safe_open(file, "pt") as opened:
        assert json.loads(opened.metadata()["hf_unlearnable"])["state"]["progress"]["step"] == 5
        assert all(opened.get_tensor(name).isfinite().all() for name in opened.keys())  # noqa: SIM118

    def broken() -> None:
        raise FloatingPointError("row 2 of the batch")

    with pytest.raises(FloatingPointError, match="at step 4 of 9: row 2 of the batch"):
        run(accelerator, 3, broken)


def test_another_training_is_refused(accelerator: Accelerator, tmp_path: Path) -> None:
    file = tmp_path / "c.safetensors"
    with pytest.raises(Unfinished):
        run(accelerator, checkpoint=file, max_minutes=0.0)
    with pytest.raises(ValueError, match="is of another training: how is 'plain' there and 'other' here"):
        run(accelerator, checkpoint=file, named="other")
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ValueError, match="delete it to start anew"):
        run(accelerator, checkpoint=file)


def test_a_training_may_end_early(accelerator: Accelerator) -> None:
    class Short(Plain):
        def finished(self, step: int) -> bool:
            return step >= 4

    setup = Setup(train=make_batches(), recipe=RECIPE, backbone="tiny", seed=3, accelerator=accelerator)
    fit = Short(setup)
    assert fitting.run(fit, what={}, progress=False).step == 4
    assert fit.steps == [0, 1, 2, 3]


def test_measurements_are_of_the_clean_rows(accelerator: Accelerator) -> None:
    test = make_batches(30, seed=1)
    fit, done = run(accelerator, test=test, measure_every=4)
    measured = {int(point["step"]): point["clean accuracy"] for point in done.curve if "clean accuracy" in point}
    assert sorted(measured) == [4, 8, 9]
    network = fit.modules["network"].eval()
    with torch.no_grad():
        right = (network(test.pixels.float() / 255).argmax(1) == test.labels).float().mean()
    assert measured[9] == pytest.approx(float(right))


def test_an_estimate_grows_with_steps_and_passes(accelerator: Accelerator) -> None:
    setup = Setup(train=make_batches(), recipe=RECIPE, backbone="tiny", seed=3, accelerator=accelerator)
    fit = Plain(setup)
    before = {name: value.clone() for name, value in fit.modules["network"].state_dict().items()}
    fit.estimate()
    small = min(fit.estimate() for _ in range(3))
    fit.passes, fit.total = 100.0, 900
    large = min(fit.estimate() for _ in range(3))
    assert large > 100 * small
    assert all(torch.equal(value, before[name]) for name, value in fit.modules["network"].state_dict().items())
    fit.modules = {}
    assert math.isnan(fit.estimate())


@pytest.mark.parametrize(
    "poison",
    [
        ClustersPoison(clusters=2, pretrained=False, feature_size=0, generator_width=4),
        DeepConfusePoison(generator_width=4),
        EmPoison(),
        EntfPoison(),
        HypoPoison(),
        MinMaxMinPoison(),
        NtgaPoison(block=20),
        PilPoison(),
        RobustEmPoison(),
        SemPoison(),
        TapPoison(),
    ],
    ids=lambda poison: poison.name,
)
def test_every_method_can_tell_how_long_it_will_take(accelerator: Accelerator, poison: SurrogatePoison) -> None:
    backbone = poison.backbone if poison.backbone in ("linear", "none") else "tiny"
    made = poison.recipe if backbone == "none" else changed(poison.recipe, batch_size=20)
    setup = Setup(train=make_batches(200), recipe=made, backbone=backbone, seed=3, accelerator=accelerator)
    assert 0 < poison.fitting(setup).estimate() < 10**8


def test_modes_are_for_training(accelerator: Accelerator) -> None:
    class Looks(Plain):
        def step(self, step: int) -> dict[str, Tensor]:
            assert all(module.training for module in self.modules["network"].modules() if isinstance(module, nn.Module))
            return super().step(step)

    setup = Setup(train=make_batches(), recipe=RECIPE, backbone="tiny", seed=3, accelerator=accelerator)
    fit = Looks(setup)
    fit.modules["network"].eval()
    fitting.run(fit, what={}, test=make_batches(), measure_every=2, progress=False)
