"""Make image datasets unlearnable, and measure what a trainer still learns from them."""

from hf_unlearnable.budget import Budget
from hf_unlearnable.keys import new_key
from hf_unlearnable.networks import create_network
from hf_unlearnable.poisons.base import Poison
from hf_unlearnable.poisons.cuda import CudaPoison
from hf_unlearnable.poisons.noise import RandomNoisePoison
from hf_unlearnable.transform import Transform

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "CudaPoison",
    "Poison",
    "RandomNoisePoison",
    "Transform",
    "create_network",
    "new_key",
]
