"""Make image datasets unlearnable, and measure what a trainer still learns from them."""

from hf_unlearnable.budget import Budget
from hf_unlearnable.keys import new_key
from hf_unlearnable.networks import create_network
from hf_unlearnable.poisons.ar import ArPoison
from hf_unlearnable.poisons.base import Poison
from hf_unlearnable.poisons.cuda import CudaPoison
from hf_unlearnable.poisons.lsp import LspPoison
from hf_unlearnable.poisons.noise import RandomNoisePoison
from hf_unlearnable.poisons.ops import OpsPoison
from hf_unlearnable.poisons.robust_em import MinMaxMinPoison, RobustEmPoison, SemPoison
from hf_unlearnable.poisons.with_surrogate import SurrogatePoison
from hf_unlearnable.surrogate import Surrogate
from hf_unlearnable.transform import Transform

__version__ = "0.1.0"

__all__ = [
    "ArPoison",
    "Budget",
    "CudaPoison",
    "LspPoison",
    "MinMaxMinPoison",
    "OpsPoison",
    "Poison",
    "RandomNoisePoison",
    "RobustEmPoison",
    "SemPoison",
    "Surrogate",
    "SurrogatePoison",
    "Transform",
    "create_network",
    "new_key",
]
