"""Training on filtered pictures: random filters of CUDA's kind, and the worst deconvolution of each class."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from hf_unlearnable.images import Images, Labels
from hf_unlearnable.networks import frozen

_TINY = 1e-12


@dataclass(frozen=True)
class RandomFilter:
    """Augmentation with random blurs of CUDA's kind, before crop and flip: x' = (s * x) / max(s * x).

    The k x k weights of s come from U(0, blur), and the one at a random place is 1; s is the same for the three
    channels, with zero padding of k // 2. The maximum is that of each picture over its channels; a black picture stays
    black. The loss is that of plain training.

    Args:
        kernel_size: k, odd.
        blur: upper end p'_b of the weights, in [0, 1].
        per: "batch" draws one filter for all pictures that are given together, "image" one for each.

    Raises:
        ValueError: an even filter, a blur outside its range.

    Source: CUDA, section 5.2 (METHODS 25.1): one 3 x 3 filter a batch, p'_b of 0.1 and 0.3.
    Deviations: whether one weight is 1 and the maximum is divided out is not told there; both are done, as in the
    poison. The draws are the step's own, not the official stream's, and nothing is rounded to levels.
    """

    name: ClassVar[str] = "random-filter"

    kernel_size: int = 3
    blur: float = 0.3
    per: Literal["batch", "image"] = "batch"

    def __post_init__(self) -> None:
        _check_size("kernel_size", self.kernel_size)
        if not 0 <= self.blur <= 1:
            raise ValueError(f"blur: expected a number in [0, 1], got {self.blur}")
        if self.per not in ("batch", "image"):
            raise ValueError(f'per: expected "batch" or "image", got {self.per!r}')

    def filters(self, count: int, *, generator: torch.Generator) -> Float[Tensor, "{count} k k"]:
        """Random filters, on the generator's device."""
        size, device = self.kernel_size**2, generator.device
        weights = self.blur * torch.rand(count, size, generator=generator, device=device)
        places = torch.randint(size, (count, 1), generator=generator, device=device)
        return weights.scatter_(1, places, 1.0).view(count, self.kernel_size, self.kernel_size)

    def before_crop(self, x: Images, y: Labels, *, generator: torch.Generator) -> Images:
        """The pictures under their filters, in [0, 1]; the largest value of each that is not black is 1."""
        filters = self.filters(1 if self.per == "batch" else len(x), generator=generator)
        blurred = _correlate(x, filters.expand(len(x), -1, -1))
        return blurred / blurred.amax((1, 2, 3), keepdim=True).clamp_min(_TINY)

    def __call__(
        self, model: nn.Module, x: Images, y: Labels, *, progress: float, generator: torch.Generator
    ) -> Tensor:
        return F.cross_entropy(model(x).float(), y)


@dataclass(frozen=True)
class DeconvolutionAdversarial:
    """DAT: training on the worst transposed convolution of each class, drawn anew and optimised for every batch.

        min_f mean CE(f(r(D_y(x))), y),   D_c = argmax mean_{y = c} CE(f(D_c(x)), c),   |W_c|, |b_c| <= limit

    D_c(x) = W_c transposed-convolved with x, plus b_c: one filter for the three channels. It starts at PyTorch's
    default, U(-1 / k, 1 / k), and takes steps along the gradient itself, each after a clamp to the limit. r stretches
    every picture to [0, 1] by its minimum and maximum (a constant one becomes black). The ascent sees neither r nor
    clamped pictures; test pictures are left as they are.

    Args:
        filter_size: k, odd.
        ascent_steps: how often the filters move; 0 trains on random ones.
        ascent_rate: what the gradient is multiplied with.
        limit: largest absolute value of weights and bias at a step.
        bn_mode: the network during the ascent: "eval", or "train" as in the official code. There BatchNorm normalises
            by the pictures of one class, in one pass a class, and its running statistics take in all those passes.

    Raises:
        ValueError: an even filter, a value outside its range.

    Source: CUDA, section 5.2, and `final_muladv.py` of its repository (METHODS 25.2).
    Deviations: "eval" is the default; draws are the step's own. The mean over a class is that over this process's rows.
    """

    name: ClassVar[str] = "deconvolution"

    filter_size: int = 5
    ascent_steps: int = 10
    ascent_rate: float = 0.1
    limit: float = 5.0
    bn_mode: Literal["train", "eval"] = "eval"

    def __post_init__(self) -> None:
        _check_size("filter_size", self.filter_size)
        for field in ("ascent_steps", "ascent_rate", "limit"):
            if not 0 <= getattr(self, field) < float("inf"):
                raise ValueError(f"{field}: expected a number that is not negative, got {getattr(self, field)}")
        if self.bn_mode not in ("train", "eval"):
            raise ValueError(f'bn_mode: expected "train" or "eval", got {self.bn_mode!r}')

    def attack(self, model: nn.Module, x: Images, y: Labels, *, generator: torch.Generator) -> Images:
        """The pictures under the filters that the ascent ends with, stretched to [0, 1]."""
        present, which, counts = y.unique(return_inverse=True, return_counts=True)
        size = self.filter_size**2
        drawn = torch.rand(len(present), size + 1, generator=generator, device=x.device)
        filters = (2 * drawn - 1) / self.filter_size  # the last column is the bias
        by_class = self.bn_mode == "train"
        parts = (
            which.argsort(stable=True).split(counts.tolist()) if by_class else (torch.arange(len(y), device=y.device),)
        )
        with self._mode(model), torch.enable_grad():
            for _ in range(self.ascent_steps):
                filters = filters.clamp(-self.limit, self.limit).requires_grad_()
                z = _deconvolve(x, filters, which)
                losses = [F.cross_entropy(model(z[rows]).float(), y[rows], reduction="none") for rows in parts]
                objective = (torch.cat(losses) / counts[which[torch.cat(parts)]]).sum()
                filters = (filters + self.ascent_rate * torch.autograd.grad(objective, filters)[0]).detach()
        z = _deconvolve(x, filters, which)
        low, high = z.amin((1, 2, 3), keepdim=True), z.amax((1, 2, 3), keepdim=True)
        return (z - low) / (high - low).clamp_min(_TINY)

    def __call__(
        self, model: nn.Module, x: Images, y: Labels, *, progress: float, generator: torch.Generator
    ) -> Tensor:
        return F.cross_entropy(model(self.attack(model, x, y, generator=generator)).float(), y)

    @contextlib.contextmanager
    def _mode(self, model: nn.Module) -> Iterator[None]:
        modes = [(module, module.training) for module in model.modules()]
        with frozen(model):
            if self.bn_mode == "train":
                for module, training in modes:
                    module.training = training
            yield


def _check_size(field: str, size: int) -> None:
    if size < 1 or size % 2 == 0:
        raise ValueError(f"{field}: expected an odd and positive number of pixels, got {size}")


def _deconvolve(x: Images, filters: Float[Tensor, "c n"], which: Int[Tensor, " b"]) -> Images:
    """Picture i under filter which[i]: k * k weights and a bias. A transposed convolution is a correlation, turned."""
    rows = filters[which]
    k = math.isqrt(filters.shape[1])
    return _correlate(x, rows[:, :-1].view(-1, k, k).flip(1, 2)) + rows[:, -1, None, None, None]


def _correlate(x: Images, filters: Float[Tensor, "b k k"]) -> Images:
    """Zero-padded cross-correlation of every picture with its own filter: pictures are channels, colours are rows."""
    with torch.autocast(x.device.type, enabled=False):
        planes = x.transpose(0, 1).contiguous()
        return F.conv2d(planes, filters[:, None], padding=filters.shape[1] // 2, groups=len(x)).transpose(0, 1)
