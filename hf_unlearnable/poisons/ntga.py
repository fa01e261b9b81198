"""NTGA: noise under which a whole family of infinitely wide networks generalises badly, block by block."""

import math
from dataclasses import dataclass
from time import perf_counter
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from hf_unlearnable.batches import Batches, share, stratified_rows
from hf_unlearnable.budget import Budget
from hf_unlearnable.draws import Draws
from hf_unlearnable.fitting import Fit, Setup
from hf_unlearnable.images import Images, Labels, Pixels, to_uint8
from hf_unlearnable.keys import Key, torch_generator
from hf_unlearnable.networks import Network
from hf_unlearnable.pgd import Pgd
from hf_unlearnable.poisons.neural_tangent import learnt, tangent_kernel
from hf_unlearnable.poisons.noise_bank import NoiseBank
from hf_unlearnable.poisons.with_surrogate import SurrogatePoison, settled
from hf_unlearnable.recipes import Recipe
from hf_unlearnable.surrogate import Surrogate

CHUNK = 128
"""Held-out rows at a time: it bounds memory."""


@dataclass(frozen=True, kw_only=True)
class NtgaPoison(SurrogatePoison):
    """NTGA: noise with which gradient descent on the rows of a block errs most on rows outside it.

        delta = argmax_{|delta| <= epsilon} sum_{held-out} CE(f_t(x*), y*)
        f_t(x*) = Theta(x*, x + delta) Theta_r^-1 (I - e^{-t Theta_r / (n K)}) onehot(y)

    Theta is the neural tangent kernel of an infinitely wide network and f_t its mean prediction when it has been
    trained for a time t on the n rows of a block, of K classes. No network is trained. The noise of a block's rows is
    found together, so it is kept in the surrogate, for the pictures it was made for and no others.

    The rows are split once by key. Those that are not held out are cut at random into blocks; all have the held-out
    rows for a judge. Then the held-out rows are cut into blocks too, and judged by as many of the others. The blocks of
    a round differ by one row at most.

    Args:
        epsilon: L-inf budget of the noise, a fraction of the value range.
        pgd_steps, pgd_step_size: signed ascent from the clean block.
        fgsm: a single step of size epsilon instead, as the released noise was made.
        block: the most rows of a block. Time grows with block * rows, for eigenvalues with block^3.
        held_out: share of the rows that are held out, above 0 and below 1.
        time: t, of gradient descent with a learning rate of 1 on the mean square over all n K targets.
        kernel: "fnn", five times (dense, erf) on the flat picture.

    Raises:
        ValueError: a number outside its range.

    Source: Yuan & Wu 2021, "Neural Tangent Generalization Attacks", and its repository (METHODS 10).
    Deviations: all rows get noise: the official code drops those held out and the last block. Its ten steps all start
    from the clean block with a step of epsilon, which is `fgsm`. Smaller blocks keep t and divide by their own n. The
    paper's CNN kernel is missing.
    """

    name: ClassVar[str] = "ntga"
    recipe: ClassVar[Recipe] = Recipe(name="ntga", epochs=1, batch_size=1, augmentation="none")
    backbone: ClassVar[str] = "none"

    epsilon: float = settled(8 / 255)
    pgd_steps: int = settled(10)
    pgd_step_size: float = settled(0.88 / 255)
    fgsm: bool = settled(False)
    block: int = settled(512)
    held_out: float = settled(0.2)
    time: float = settled(64.0)
    kernel: Literal["fnn"] = settled("fnn")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.pgd  # noqa: B018  (it checks its numbers)
        if self.kernel != "fnn":
            raise ValueError(f'kernel is "fnn", got {self.kernel!r}')
        if self.block < 1:
            raise ValueError(f"block is at least 1 row, got {self.block}")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out is a share above 0 and below 1, got {self.held_out}")
        if not 0 < self.time < math.inf:
            raise ValueError(f"time is a positive number, got {self.time}")

    @property
    def pgd(self) -> Pgd:
        """The ascent that makes the noise of a block."""
        budget = Budget("linf", self.epsilon).whole()
        steps, size = (1, self.epsilon) if self.fgsm and self.epsilon > 0 else (self.pgd_steps, self.pgd_step_size)
        return Pgd(budget=budget, steps=steps, step_size=size, direction="max")

    def budget_for(self, height: int, width: int) -> Budget:
        return Budget("linf", self.epsilon)

    def fitting(self, setup: Setup) -> Fit:
        for what, wanted, got in (("recipe", self.recipe, setup.recipe), ("backbone", self.backbone, setup.backbone)):
            if got != wanted:
                raise ValueError(f"ntga trains no network: expected the {what} {wanted!r}, got {got!r}")
        return NtgaFit(setup, self)

    def craft(self, x: Images, y: Labels | None, draws: Draws, surrogate: Surrogate) -> Images:
        bank = NoiseBank.in_surrogate(surrogate)
        places = bank.find(draws.digests)
        if unknown := [str(row) for row, place in enumerate(places) if place is None]:
            told = ", ".join(unknown[:10]) + (", ..." if len(unknown) > 10 else "")
            raise ValueError(
                f"expected some of the {len(bank.noise):,} pictures that the noise was made for, pixel by pixel, got "
                f"others as row {told} of the batch ({len(unknown)} of {len(places)} rows)"
            )
        return x + bank.noise[torch.tensor(places)].to(x) / 255


class NtgaFit(Fit):
    """A block a step: its noise, in whole grey levels."""

    def __init__(self, setup: Setup, poison: NtgaPoison) -> None:
        super().__init__(setup)
        self.poison = poison
        self.plan = plan(setup.train.labels.cpu(), block=poison.block, held_out=poison.held_out, key=setup.seed)
        self.total = len(self.plan)
        self.tensors = {"noise": torch.zeros_like(setup.train.pixels, dtype=torch.int8)}

    def step(self, step: int) -> dict[str, Tensor]:
        train, accelerator, device = self.setup.train, self.setup.accelerator, self.setup.device
        rows, others = (part.to(device) for part in self.plan[step])
        mine = share(len(others), accelerator.process_index, accelerator.num_processes)
        block, held = train.select(rows), train.select(others[mine])
        clean = block.pixels.double() / 255
        losses: list[Tensor] = []

        def objective(z: Tensor, _: Tensor) -> Tensor:
            value, slope = held_out_loss(z.detach(), block.labels, held, len(train.classes), self.poison.time)
            found = accelerator.reduce(torch.cat([value[None], slope.flatten()]), "sum")
            assert isinstance(found, Tensor)
            losses.append(found[0] / len(others))
            return ((z - z.detach()) * found[1:].view_as(z)).flatten(1).sum(1)

        shown = to_uint8(clean + self.poison.pgd.run(objective, clean))
        self.tensors["noise"][rows] = (shown.short() - block.pixels.short()).to(torch.int8)
        objective(shown.double() / 255, rows)
        return {"held-out loss, clean block": losses[0], "held-out loss": losses[-1]}

    def estimate(self) -> float:
        """Two timed gradients of the first block, by one and by two chunks of held-out rows, times all there are."""
        train, classes, pgd = self.setup.train, len(self.setup.train.classes), self.poison.pgd
        rows, others = (part.to(self.setup.device) for part in self.plan[0])
        block, took = train.select(rows), []
        for chunks in (1, 2):
            held = train.select(others[: chunks * CHUNK])
            began = perf_counter()
            float(held_out_loss(block.pixels.double() / 255, block.labels, held, classes, self.poison.time)[0])
            took.append(perf_counter() - began)
        more = max(0.0, took[1] - took[0]) if len(others) >= 2 * CHUNK else 0.0
        chunks = len(others) / CHUNK / self.setup.accelerator.num_processes
        return self.total * (pgd.steps + 1) * (took[0] + max(0.0, chunks - 1) * more)

    def networks(self) -> dict[str, Network]:
        return {}

    def kept(self) -> dict[str, Tensor]:
        return NoiseBank.of(self.setup.train.pixels, self.tensors["noise"].float() / 255).tensors()

    def measure(self, test: Batches) -> dict[str, float]:
        return {}


def plan(
    labels: Int[Tensor, " n"], *, block: int, held_out: float, key: Key
) -> list[tuple[Int[Tensor, " b"], Int[Tensor, " m"]]]:
    """The rows of every block, each row in one, and the rows that it is judged by.

    Raises:
        ValueError: no row is left to be held out, or to make a block of.
    """
    count = round(held_out * len(labels))
    if not 0 < count < len(labels):
        raise ValueError(f"expected enough rows to hold out {held_out:g} of them, and not all, got {len(labels)}")
    first = torch.ones(len(labels), dtype=torch.bool)
    second = stratified_rows(labels, count, key=key)
    first[second] = False
    others = first.nonzero().flatten()
    judges = others[stratified_rows(labels[others], min(count, len(others)), key=key)]
    found = []
    for name, rows, held in (("blocks", others, second), ("blocks of those held out", second, judges)):
        order = rows[torch.randperm(len(rows), generator=torch_generator(key, name))]
        found += [(part, held) for part in order.tensor_split(-(-len(rows) // block))]
    return found


def held_out_loss(
    x: Float[Tensor, "b 3 h w"], y: Labels, held: Batches, classes: int, time: float
) -> tuple[Float[Tensor, ""], Float[Tensor, "b 3 h w"]]:
    """The sum of held-out rows' cross-entropies after training on a block for a time, and its gradient in the block.

    The gradient through the block's own kernel is taken once, after that of all held-out rows is known.
    """
    leaf = x.detach().flatten(1).requires_grad_()
    targets = F.one_hot(y, classes).to(x)
    total = x.new_zeros(())
    with torch.enable_grad():
        coefficients = learnt(tangent_kernel(leaf, leaf), targets, time / targets.numel())
        constant = coefficients.detach().requires_grad_()
        slopes = [torch.zeros_like(leaf), torch.zeros_like(constant)]
        for pixels, labels in held.chunks(CHUNK):
            outputs = tangent_kernel(_flat(pixels), leaf) @ constant
            loss = F.cross_entropy(outputs, labels, reduction="sum")
            for slope, part in zip(slopes, torch.autograd.grad(loss, (leaf, constant)), strict=True):
                slope += part
            total += loss.detach()
        slopes[0] += torch.autograd.grad(coefficients, leaf, slopes[1])[0]
    return total, slopes[0].view_as(x)


def _flat(pixels: Pixels) -> Float[Tensor, "b d"]:
    return pixels.flatten(1).double() / 255
