"""Every poison by the name that commands, records and surrogates call it."""

from collections.abc import Mapping
from typing import Any

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

POISONS: dict[str, type[Poison]] = {
    "ar": ArPoison,
    "clusters": ClustersPoison,
    "cuda": CudaPoison,
    "deep-confuse": DeepConfusePoison,
    "em": EmPoison,
    "entf": EntfPoison,
    "hypo": HypoPoison,
    "lsp": LspPoison,
    "min-max-min": MinMaxMinPoison,
    "ntga": NtgaPoison,
    "ops": OpsPoison,
    "pil": PilPoison,
    "random-noise": RandomNoisePoison,
    "robust-em": RobustEmPoison,
    "sem": SemPoison,
    "tap": TapPoison,
}


def arguments_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A poison's arguments from the settings that a record tells: without the version and the surrogate's digest."""
    kept = {name: value for name, value in settings.items() if name not in ("version", "surrogate")}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in kept.items()}
