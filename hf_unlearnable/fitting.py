"""The training of a surrogate: one loop for all methods, which stops and goes on at any step."""

import abc
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_unlearnable.augment import Augmentation, take
from hf_unlearnable.batches import Batch, Batches
from hf_unlearnable.checkpoint import Interrupts, load_checkpoint, save_checkpoint, tensors_digest, weights_digest
from hf_unlearnable.environment import keep_freed_memory
from hf_unlearnable.images import Images, Labels
from hf_unlearnable.keys import Key, torch_generator
from hf_unlearnable.networks import Network, create_network, frozen, placed
from hf_unlearnable.recipes import Recipe
from hf_unlearnable.training import (
    Unfinished,
    as_input,
    average_over_processes,
    own_randomness,
    seed_layers,
    standard_augmentation,
    stream,
)

POINTS = 200
"""Points of a curve, at most twice as many."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a method's training is given: rows on the device, and how to train."""

    train: Batches
    recipe: Recipe
    backbone: str
    seed: Key
    accelerator: Accelerator

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def network(self, name: str = "network", *, num_classes: int | None = None) -> Network:
        """A fresh network on the device, in training mode; its weights follow from seed and name.

        That of the name "network" is, for an int seed, the one that `create_network` makes of this seed.
        """
        seed = torch_generator(self.seed, "weights", name).initial_seed()
        if isinstance(self.seed, int) and name == "network":
            seed = self.seed
        network = create_network(
            self.backbone,
            num_classes=len(self.train.classes) if num_classes is None else num_classes,
            image_size=self.train.image_size,
            seed=seed,
        )
        return placed(network, self.device)

    def sgd(self, model: nn.Module) -> torch.optim.SGD:
        """The recipe's optimiser.

        Raises:
            ValueError: the recipe asks for another than SGD, which surrogates are trained with.
        """
        recipe = self.recipe
        if recipe.optimizer != "sgd":
            raise ValueError(f"surrogates are trained with SGD, got optimizer={recipe.optimizer!r}")
        return torch.optim.SGD(
            model.parameters(),
            recipe.learning_rate,
            recipe.momentum,
            weight_decay=recipe.weight_decay,
            nesterov=recipe.nesterov,
        )


class Fit(abc.ABC):
    """A training under way: all that it remembers between two steps lies in these attributes.

    Attributes:
        total: number of steps; where `finished` may end it earlier, the largest.
        passes: forward-backward passes of a whole batch that a step costs, on average: for estimates.
        modules, optimizers: what is trained, by name; "network" is the surrogate proper.
        tensors: other tensors, changed in place, such as a noise bank. They stay where they are.
        state: what else there is, as JSON values.
    """

    total: int
    passes: float = 1.0

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.modules: dict[str, nn.Module] = {}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.tensors: dict[str, Tensor] = {}
        self.state: dict[str, Any] = {}
        self.augmentation: Augmentation | None = standard_augmentation(setup.recipe, setup.train.image_size)
        self._batches: Iterator[Batch] | None = None

    # What a method defines.

    @abc.abstractmethod
    def step(self, step: int) -> dict[str, Tensor]:
        """Do step `step` (from 0); return what a curve shows, scalars that are equal on all processes."""

    def finished(self, step: int) -> bool:
        """Whether the training is over after `step` steps."""
        return step >= self.total

    def gather(self) -> None:  # noqa: B027  (most methods have nothing to gather)
        """Make `tensors` whole and equal on all processes; called on all of them before a checkpoint and at the end."""

    def objective(self, x: Images, y: Labels) -> Tensor | None:
        """What a pass differentiates, for pictures that are leaves; None where a step consists of no such passes."""
        network = self.modules.get("network")
        if network is None:
            return None
        with frozen(network):
            return F.cross_entropy(network(x).float(), y)

    def estimate(self) -> float:
        """Seconds that the training will take, or NaN: one timed forward-backward pass of a few pictures, times all
        there are."""
        setup, train = self.setup, self.setup.train
        if not len(train):
            return math.nan
        rows = min(len(train), 64 if setup.device.type == "cpu" else setup.recipe.batch_size)
        took = math.inf
        for _ in range(2):
            leaf = as_input(train.pixels[:rows]).detach().requires_grad_()
            began = time.perf_counter()
            with setup.accelerator.autocast():
                loss = self.objective(leaf, train.labels[:rows])
            if loss is None:
                return math.nan
            torch.autograd.grad(loss, leaf)
            if setup.device.type == "cuda":
                torch.cuda.synchronize()
            took = min(took, time.perf_counter() - began)
        batch = min(setup.recipe.batch_size, len(train)) / setup.accelerator.num_processes
        return took * batch / rows * self.passes * self.total

    def networks(self) -> dict[str, Network]:
        """The networks that belong into the surrogate."""
        network = self.modules["network"]
        assert isinstance(network, Network)
        return {"network": network}

    def kept(self) -> dict[str, Tensor]:
        """The other tensors that belong into the surrogate."""
        return {}

    def measure(self, test: Batches) -> dict[str, float]:
        """What is measured now and then: the clean accuracy of the surrogate."""
        return {"clean accuracy": accuracy(self.modules["network"], test, self.setup.accelerator)}

    # What methods share.

    def batch(self, step: int) -> Batch:
        """The batch of step `step`: this process's rows of it. To be asked for one step after the other."""
        if self._batches is None:
            setup, accelerator = self.setup, self.setup.accelerator
            rank, world = accelerator.process_index, accelerator.num_processes
            self._batches = stream(setup.train, setup.recipe, setup.seed, rank, world, step)
        return next(self._batches)

    def generator(self, purpose: str, step: int) -> torch.Generator:
        """This process's generator for one purpose and step, on the device."""
        rank = self.setup.accelerator.process_index
        return torch_generator(self.setup.seed, purpose, step, rank, device=self.setup.device)

    def view(self, x: Tensor, batch: Batch, purpose: str, step: int) -> Tensor:
        """The pictures of a batch under the recipe's augmentation; the same for any number of processes."""
        if self.augmentation is None:
            return x
        draws = self.augmentation.draw(batch.size, generator=torch_generator(self.setup.seed, purpose, step))
        return self.augmentation.apply(x, take(draws, batch.part))

    def descend(
        self, step: int, batch: Batch, loss: Callable[[], Tensor], name: str = "network", *, rate: float | None = None
    ) -> Tensor:
        """One optimiser step of a module on the mean of `loss()` over the whole batch, which is returned.

        Its learning rate is the recipe's for this step out of `total`, or `rate`.
        """
        accelerator, recipe = self.setup.accelerator, self.setup.recipe
        module, optimizer = self.modules[name], self.optimizers[name]
        weights = [weight for weight in module.parameters() if weight.requires_grad]
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step, self.total) if rate is None else rate
        optimizer.zero_grad()
        sums, rows = torch.zeros(2, device=self.setup.device), len(batch.labels)
        if rows:
            seed_layers(self.setup.seed, step, accelerator.process_index, self.setup.device)
            with accelerator.autocast():
                value = loss()
            (value * (rows * accelerator.num_processes / batch.size)).backward()
            sums = torch.stack([value.detach().float() * rows, torch.full_like(sums[0], rows)])
        sums = average_over_processes(sums, weights, module, accelerator)
        if recipe.gradient_clip is not None:
            nn.utils.clip_grad_norm_(weights, recipe.gradient_clip)
        optimizer.step()
        return sums[0] / sums[1]


@dataclass
class Progress:
    """What the loop remembers.

    Args:
        step: steps done.
        seconds: time they took, over all calls.
        curve: {"step": steps done, name: mean since the point before, ...}.
        sums: of the point under way: name to [sum, steps].
    """

    step: int = 0
    seconds: float = 0.0
    curve: list[dict[str, float]] = dataclasses.field(default_factory=list)
    sums: dict[str, list[float]] = dataclasses.field(default_factory=dict)


def run(
    fit: Fit,
    *,
    what: dict[str, Any],
    test: Batches | None = None,
    measure_every: int | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_seconds: float = 60.0,
    max_minutes: float | None = None,
    progress: bool = True,
    description: str = "surrogate",
) -> Progress:
    """Train to the end, or until the time is up.

    Args:
        what: what the training is, as JSON values; a checkpoint of another one is refused.
        test: rows for `fit.measure`, or None to measure nothing.
        measure_every: steps between two measurements; None for about ten.
        checkpoint: a safetensors file, written in one piece now and then; where it exists, training goes on from it.
        checkpoint_seconds: time between checkpoints; 0 writes one after every step.
        max_minutes: stop after this time in this call; needs a checkpoint.
        progress: an estimate before the first step, and a progress bar with the losses, on the main process.

    Raises:
        Unfinished: `max_minutes` are over; the checkpoint holds the state.
        KeyboardInterrupt: Ctrl-C or SIGTERM, after the step under way; the checkpoint holds the state.
        FloatingPointError: a loss or a gradient is no longer finite (names the step); the checkpoint is the last one.
        ValueError: the checkpoint is of another training; `max_minutes` without one.
    """
    if max_minutes is not None and checkpoint is None:
        raise ValueError("max_minutes needs a checkpoint to go on from")
    began = saved = time.monotonic()
    accelerator, device = fit.setup.accelerator, fit.setup.device
    main = accelerator.is_main_process
    started = {name: weights_digest(module) for name, module in fit.modules.items()}
    what = json.loads(json.dumps({**what, "initial": started, "initial tensors": tensors_digest(fit.tensors)}))
    trained: Any = {"modules": fit.modules, "optimizers": fit.optimizers, "tensors": fit.tensors}
    done = Progress()
    if checkpoint and Path(checkpoint).exists():
        kept = load_checkpoint(checkpoint, run=what, **trained)
        done, fit.state = Progress(**kept["progress"]), kept["state"]
    if device.type == "cpu":
        keep_freed_memory()
    before, measure_every = done.seconds, measure_every or max(1, fit.total // 10)
    every = max(1, fit.total // POINTS)
    look_every = 1 if device.type == "cpu" else 20  # to read from a GPU is to wait for it
    for module in fit.modules.values():
        module.train()
    if progress and main and done.step == 0:
        tqdm.write(f"{description}: {fit.total} steps on {device}, about {_told(fit.estimate())}")
    sums: dict[str, tuple[Tensor | float, float]] = {name: (total, n) for name, (total, n) in done.sums.items()}
    with (
        own_randomness(device),
        Interrupts() as interrupts,
        tqdm(
            desc=description,
            total=fit.total,
            initial=done.step,
            unit="step",
            mininterval=0.5,
            disable=not (progress and main),
        ) as bar,
    ):
        while not fit.finished(done.step):
            try:
                losses = fit.step(done.step)
            except FloatingPointError as error:
                raise FloatingPointError(f"at step {done.step + 1} of {fit.total}: {error}") from error
            for name, value in losses.items():
                total, count = sums.get(name, (0.0, 0.0))
                sums[name] = (total + value.detach(), count + 1)
            done.step += 1
            bar.update()
            finished = fit.finished(done.step)
            if not (finished or done.step % every == 0 or done.step % look_every == 0):
                continue
            late = max_minutes is not None and time.monotonic() - began >= 60 * max_minutes and main
            found = {name: [float(total), count] for name, (total, count) in sums.items()}
            due = main and time.monotonic() - saved >= checkpoint_seconds
            late, asked, due = _agreed([late, interrupts.asked, due], accelerator)
            if broken := [name for name, (total, _) in found.items() if not math.isfinite(total)]:
                raise FloatingPointError(
                    f"expected a finite {broken[0]}, got one that is not at step {done.step} of {fit.total}, or in the "
                    f"{look_every - 1} before it: lower the learning rate, or clip the gradient (gradient_clip=5.0)"
                )
            means = {name: total / count for name, (total, count) in found.items() if count}
            bar.set_postfix({name: f"{mean:.3g}" for name, mean in means.items()}, refresh=False)
            if finished or done.step % every == 0:
                point = {"step": done.step, **means}
                if test is not None and (finished or done.step // measure_every > (done.step - every) // measure_every):
                    point |= fit.measure(test)
                done.curve.append(point)
                sums, found = {}, {}
            done.sums, done.seconds = found, before + time.monotonic() - began
            stopped = (late or asked) and not finished
            if checkpoint and (finished or stopped or due):
                fit.gather()
                if main:
                    state = {"progress": dataclasses.asdict(done), "state": fit.state}
                    save_checkpoint(checkpoint, run=what, state=state, **trained)
                saved = time.monotonic()
                accelerator.wait_for_everyone()
            if asked and not finished:
                raise KeyboardInterrupt(f"stopped after step {done.step} of {fit.total}")
            if stopped:
                raise Unfinished(f"stopped after step {done.step} of {fit.total}; go on from {checkpoint}")
    fit.gather()
    return done


def accuracy(model: nn.Module, batches: Batches, accelerator: Accelerator) -> float:
    """Share of the rows that a network gets right, in evaluation mode, over all processes."""
    right = torch.zeros((), device=batches.device)
    rank, world = accelerator.process_index, accelerator.num_processes
    with frozen(model), torch.no_grad(), accelerator.autocast():
        for pixels, labels in batches.chunks(250, rank=rank, world=world):
            right += (model(as_input(pixels)).argmax(1) == labels).sum()
    total = accelerator.reduce(right, "sum")
    assert isinstance(total, Tensor)
    return float(total) / len(batches)


def _agreed(wishes: list[bool], accelerator: Accelerator) -> list[bool]:
    """What any process wishes."""
    if accelerator.num_processes == 1:
        return wishes
    total = accelerator.reduce(torch.tensor(wishes, dtype=torch.float32, device=accelerator.device), "sum")
    assert isinstance(total, Tensor)
    return [value > 0 for value in total.tolist()]


def _told(seconds: float) -> str:
    if math.isnan(seconds):
        return "an unknown time"
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(1, seconds):.0f} seconds"
