"""Make image datasets unlearnable, and measure what a trainer still learns from them."""

from hf_unlearnable.budget import Budget
from hf_unlearnable.keys import new_key
from hf_unlearnable.networks import create_network
from hf_unlearnable.poisons.ar import ArPoison
from hf_unlearnable.poisons.base import Poison
from hf_unlearnable.poisons.clusters import ClustersPoison
from hf_unlearnable.poisons.cuda import CudaPoison
from hf_unlearnable.poisons.deepconfuse import DeepConfusePoison
from hf_unlearnable.poisons.em import EmPoison
from hf_unlearnable.poisons.entf import EntfPoison
from hf_unlearnable.poisons.hypo import HypoPoison
from hf_unlearnable.poisons.lsp import LspPoison
from hf_unlearnable.poisons.noise import RandomNoisePoison
from hf_unlearnable.poisons.ntga import NtgaPoison
from hf_unlearnable.poisons.ops import OpsPoison
from hf_unlearnable.poisons.pil import PilPoison
from hf_unlearnable.poisons.robust_em import MinMaxMinPoison, RobustEmPoison, SemPoison
from hf_unlearnable.poisons.tap import TapPoison
from hf_unlearnable.poisons.with_surrogate import SurrogatePoison
from hf_unlearnable.surrogate import Surrogate
from hf_unlearnable.transform import Transform

__version__ = "0.2.0"

__all__ = [
    "ArPoison",
    "Budget",
    "ClustersPoison",
    "CudaPoison",
    "DeepConfusePoison",
    "EmPoison",
    "EntfPoison",
    "HypoPoison",
    "LspPoison",
    "MinMaxMinPoison",
    "NtgaPoison",
    "OpsPoison",
    "PilPoison",
    "Poison",
    "RandomNoisePoison",
    "RobustEmPoison",
    "SemPoison",
    "Surrogate",
    "SurrogatePoison",
    "TapPoison",
    "Transform",
    "create_network",
    "new_key",
]
