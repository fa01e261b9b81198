"""The training of EM: rounds of some batches for the network, then a sweep over the rows for the noise."""

import abc
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_unlearnable.batches import Batch, Batches, share, stratified_rows
from hf_unlearnable.fitting import Fit, Setup
from hf_unlearnable.keys import subkey, torch_generator
from hf_unlearnable.networks import frozen
from hf_unlearnable.pgd import Pgd
from hf_unlearnable.poisons.classifier_fit import cross_entropy
from hf_unlearnable.poisons.noise_bank import NoiseBank
from hf_unlearnable.training import as_input


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """How long it takes.

    Args:
        training: batches that train the network in a round.
        stop_error: the share of errors at which a round is the last.
        most: rounds.
    """

    training: int
    stop_error: float
    most: int


class EmFit(Fit, abc.ABC):
    """Rounds of `training` batches for the network and `searching` for the noise. A step is one batch, and follows from
    its number alone; `state` holds the errors counted in the round under way, and how the last whole round ended."""

    def __init__(
        self, setup: Setup, noise: Pgd, rounds: Rounds, *, rows: Batches, searching: int, passes: float
    ) -> None:
        """`rows` are those whose error is taken; `passes` is what the search of a round costs."""
        super().__init__(setup)
        self.noise, self.rounds, self.rows = noise, rounds, rows
        self.augmentation = noise.augmentation or self.augmentation
        network = setup.network()
        self.modules, self.optimizers = {"network": network}, {"network": setup.sgd(network)}
        self.state = {"rounds": 0, "error": None, "wrong": 0}
        order = torch.randperm(len(rows), generator=torch_generator(setup.seed, "fixed batches"))
        self.order, self.length = order.to(setup.device), rounds.training + searching
        self.epoch = setup.train.steps(setup.recipe.batch_size, drop_last=setup.recipe.drop_last)
        most = min(rounds.most, math.ceil(setup.recipe.total_steps(self.epoch) / rounds.training))
        self.total = most * self.length
        self.passes = (rounds.training + passes) / self.length

    @abc.abstractmethod
    def shown(self, number: int) -> tuple[Batch, Tensor]:
        """Training batch `number`, and its noise."""

    @abc.abstractmethod
    def search(self, step: int, done: int, place: int) -> dict[str, Tensor]:
        """Batch `place` of the search after `done` rounds."""

    def step(self, step: int) -> dict[str, Tensor]:
        done, place = divmod(step, self.length)
        if place < self.rounds.training:
            batch, delta = self.shown(done * self.rounds.training + place)
            x, network = as_input(batch.pixels) + delta, self.modules["network"]

            def objective() -> Tensor:
                return F.cross_entropy(network(self.view(x, batch, "view", step)).float(), batch.labels)

            return {"loss": self.descend(step, batch, objective)}
        found = self.search(step, done, place - self.rounds.training)
        if place == self.length - 1:
            error = self.state["wrong"] / len(self.rows)
            self.state = {"rounds": done + 1, "error": error, "wrong": 0}
            found["error"] = torch.tensor(error, device=self.setup.device)
        return found

    def finished(self, step: int) -> bool:
        error = self.state["error"]
        return step >= self.total or (error is not None and error <= self.rounds.stop_error)

    def fixed(self, number: int) -> tuple[Batch, Tensor]:
        """Batch `number` of the rows, the same in every round: this process's part of it, and the rows of the whole."""
        accelerator, batch_size = self.setup.accelerator, self.setup.recipe.batch_size
        whole = self.order[number * batch_size : (number + 1) * batch_size]
        part = share(len(whole), accelerator.process_index, accelerator.num_processes)
        return Batch(self.rows.pixels[whole[part]], self.rows.labels[whole[part]], part, len(whole)), whole

    def descent(self, step: int, batch: Batch, start: Tensor) -> Tensor:
        """A batch's noise, moved for the network as it is."""
        network, draws = self.modules["network"], self.generator("noise", step)
        x, loss = as_input(batch.pixels), cross_entropy(network, batch.labels)
        with self.setup.accelerator.autocast():
            return self.noise.run(loss, x, model=network, start=start, draws=draws)

    def count(self, batch: Batch, delta: Tensor) -> dict[str, Tensor]:
        """Add up how often the network, in evaluation mode, errs on x + delta, on all processes; return the loss."""
        network, y = self.modules["network"], batch.labels
        with frozen(network), torch.no_grad(), self.setup.accelerator.autocast():
            logits = network(as_input(batch.pixels) + delta).float()
        loss, wrong = F.cross_entropy(logits, y, reduction="sum"), (logits.argmax(1) != y).sum()
        found = self.summed(torch.stack([loss, wrong.to(loss), torch.full_like(loss, len(y))]))
        self.state["wrong"] += int(found[1])
        return {"noise loss": found[0] / found[2]}

    def summed(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        total = self.setup.accelerator.reduce(values, "sum")
        assert isinstance(total, Tensor)
        return total


class SamplewiseFit(EmFit):
    """Noise for every picture. The batches are the same round after round, so that a process always has the same rows,
    and keeps their noise.

    Errors are counted in the sweep itself, batch by batch, right after a batch's noise has moved: the network is frozen
    and no other batch moves that noise, so they add up to those of a pass of their own.
    """

    def __init__(self, setup: Setup, noise: Pgd, rounds: Rounds, *, bank: bool) -> None:
        """`bank`: whether the noise belongs into the surrogate."""
        searching = setup.train.steps(setup.recipe.batch_size)
        passes = searching * (noise.steps + 1 / 3)
        super().__init__(setup, noise, rounds, rows=setup.train, searching=searching, passes=passes)
        self.bank, self.searching = bank, searching
        # float16: half the memory of float32; at 8/255 off by 1/250 of a grey level, where a step is 0.8 of one
        self.delta = torch.zeros(setup.train.pixels.shape, dtype=torch.float16, device=setup.device)
        self.tensors = {"delta": self.delta}

    def shown(self, number: int) -> tuple[Batch, Tensor]:
        batch, whole = self.fixed(number % self.epoch)
        return batch, self.delta[whole[batch.part]].float()

    def search(self, step: int, done: int, place: int) -> dict[str, Tensor]:
        batch, whole = self.fixed(place)
        own = whole[batch.part]
        self.delta[own] = self.descent(step, batch, self.delta[own].float()).to(self.delta.dtype)
        return self.count(batch, self.delta[own].float())

    def gather(self) -> None:
        if self.setup.accelerator.num_processes == 1:
            return
        for number in range(self.searching):
            batch, whole = self.fixed(number)
            own = torch.zeros((batch.size, *self.delta.shape[1:]), device=self.delta.device)
            own[batch.part] = self.delta[whole[batch.part]].float()
            self.delta[whole] = self.summed(own).to(self.delta.dtype)

    def kept(self) -> dict[str, Tensor]:
        return NoiseBank.of(self.rows.pixels, self.delta, self.rows.labels).tensors() if self.bank else {}


class ClasswiseFit(EmFit):
    """Noise for every class, made on a share of the rows; the network is trained on all of them.

        delta_c <- project( mean over the batch's pictures of class c of their noise, moved on from delta_c )

    The table changes with every batch, so the errors of a round are counted afterwards, in steps of their own. Both the
    training and the search go over shuffled rows.
    """

    def __init__(self, setup: Setup, noise: Pgd, rounds: Rounds, *, fraction: float) -> None:
        train, recipe = setup.train, setup.recipe
        rows = train.select(stratified_rows(train.labels.cpu(), round(fraction * len(train)), key=setup.seed))
        missing = (torch.bincount(rows.labels, minlength=len(train.classes)) == 0).nonzero().flatten().tolist()
        self.moves, looks = (rows.steps(recipe.batch_size, drop_last=drop) for drop in (recipe.drop_last, False))
        if missing or not self.moves:
            least = f"a row of class {missing[0]}" if missing else f"a batch of {recipe.batch_size}"
            raise ValueError(
                f"expected at least {least} among the {len(rows)} of {len(train)} rows that the noise is made on, got "
                f"none: raise search_fraction, which is {fraction:g}"
            )
        passes = self.moves * noise.steps + looks / 3
        super().__init__(setup, noise, rounds, rows=rows, searching=self.moves + looks, passes=passes)
        self.key = subkey(setup.seed, "class-wise noise")
        self._moving: Iterator[Batch] | None = None
        self.table = torch.zeros((len(train.classes), *train.pixels.shape[1:]), device=setup.device)
        self.tensors = {"delta": self.table}

    def shown(self, number: int) -> tuple[Batch, Tensor]:
        batch = self.batch(number)
        return batch, self.table[batch.labels]

    def search(self, step: int, done: int, place: int) -> dict[str, Tensor]:
        if place >= self.moves:
            batch, _ = self.fixed(place - self.moves)
            return self.count(batch, self.table[batch.labels])
        batch = self._next(done, place)
        delta = self.descent(step, batch, self.table[batch.labels])
        sums = self.summed(torch.zeros_like(self.table).index_add_(0, batch.labels, delta))
        counts = self.summed(torch.bincount(batch.labels, minlength=len(self.table)).to(sums))[:, None, None, None]
        means = self.noise.budget.project(sums / counts.clamp_min(1))
        self.table.copy_(torch.where(counts > 0, means, self.table))
        return {}

    def kept(self) -> dict[str, Tensor]:
        return self.tensors

    def _next(self, done: int, place: int) -> Batch:
        if self._moving is None or place == 0:
            recipe, accelerator = self.setup.recipe, self.setup.accelerator
            self._moving = self.rows.epoch(
                done,
                key=self.key,
                batch_size=recipe.batch_size,
                drop_last=recipe.drop_last,
                rank=accelerator.process_index,
                world=accelerator.num_processes,
                start_step=place,
            )
        return next(self._moving)
