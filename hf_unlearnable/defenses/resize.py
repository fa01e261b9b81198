"""Pictures made smaller or larger, and back again: what happens to published pictures on their way."""

from dataclasses import dataclass
from typing import ClassVar

from torchvision.transforms.v2 import functional as tvf

from hf_unlearnable.defenses.data import DataDefense
from hf_unlearnable.draws import RandomNumbers
from hf_unlearnable.images import Images, Labels


@dataclass(frozen=True, kw_only=True)
class Resize(DataDefense):
    """Resampled to `scale` times the size and back, bilinear with antialiasing, clipped to [0, 1].

    Args:
        scale: above 0; 0.5 loses half of the detail, 1.5 is a screenshot on a finer screen.

    Raises:
        ValueError: a scale that is not above 0.

    Source: METHODS_NEW P6 (robustness rows). Deviations: none known.
    """

    name: ClassVar[str] = "resize"

    scale: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.scale > 0:
            raise ValueError(f"scale: expected a number above 0, got {self.scale}")

    def alter(self, x: Images, y: Labels | None, draws: RandomNumbers) -> Images:
        size = [x.shape[2], x.shape[3]]
        other = [max(1, round(side * self.scale)) for side in size]
        return tvf.resize(tvf.resize(x, other, antialias=True), size, antialias=True).clamp(0, 1)
