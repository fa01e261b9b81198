"""Protect a stream shard by shard: on one machine, in array jobs, or by the ranks of torchrun and accelerate."""

import os
from collections.abc import Collection, Mapping
from pathlib import Path

from hf_unlearnable.poisons.base import Poison
from hf_unlearnable.sharding.files import Container
from hf_unlearnable.sharding.manifest import Manifest
from hf_unlearnable.sharding.plan import FOLDER, PLAN, OnError, Plan, make_plan, settle, terms_of
from hf_unlearnable.sharding.shard import make_shard
from hf_unlearnable.sharding.storage import Busy, Storage
from hf_unlearnable.sources import Stream

_RANK = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK")
_PROCESSES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE")


def protect_shards(
    stream: Stream,
    poison: Poison,
    output: str | Path,
    *,
    shards: int | None = None,
    only: Collection[int] | None = None,
    rank: int = 0,
    processes: int = 1,
    container: Container = "parquet",
    batch_size: int = 500,
    on_error: OnError = "stop",
    read_back_every: int | None = None,
    record_seed: bool = False,
    progress: bool = True,
) -> list[int]:
    """Make the shards of an output that are missing; returns those that this call made. `merge` makes the whole.

    The output holds `data/SPLIT-00000-of-000NN.parquet` (or `.tar`) and, until the merge, `.shards/`: the plan, and for
    each finished shard its manifest. The shards in the order of their numbers are the source's rows in their order:
    whole source shards where the source has at least as many, else ranges of rows. Pixels are those of one process;
    where `poison_rate` is below 1 each row is drawn by itself, as in `ds.map` (`protect` changes an exact count).

    Who comes first writes the plan; whoever comes with other settings, key, source or library versions is refused. Of
    two runs at the same shard the second is refused (a run over several shards makes the others): by a file lock, in
    the output, or for a URL in this machine's temporary folder. Two machines at the same shard of a URL do not see each
    other: both make the same bytes. A killed run leaves at most unfinished shards, which the next run makes anew.

    Args:
        output: a path, or any URL that fsspec knows. Elsewhere than on this machine, start one process first if the
            storage cannot create a file only where it is absent (`Storage.write_new`).
        shards: how many there are in all; None for the plan's, or about one for each 10,000 rows.
        only: their numbers, from 1; None for all, of which process `rank` of `processes` makes its share.
        container: "parquet", or "webdataset" for tar archives (`files.Archive`), which `publish` does not take.
        batch_size: pictures held at most at a time, fewer of large ones; it shapes the files, so that all runs must use
            the same.
        on_error: "stop" at an unreadable picture, or "skip": its row is left out, and listed with the reason in the
            manifest and in `source["left_out"]` of the record.
        read_back_every: every n-th stored picture is decoded again and compared with what was to be stored; None for
            those on which PSNR and SSIM are measured: all of a split of at most 10,000 rows, else about so many, spread
            over it; every 100th of a shard where rows cannot be counted beforehand. In any case all that a file holds
            is read again, and compared (by digests) with what was written. The record tells it, where it is not 1.
        record_seed: as in `protect`.

    Raises:
        FileExistsError: the output is finished, holds something else or the source, or another run is at work.
        ValueError: another plan, a shard that there is not, or anything that `make_shard` refuses.
        OSError: storage that keeps failing.
    """
    storage = Storage(output)
    poison = settle(poison, stream.features)
    terms = terms_of(
        stream,
        poison,
        container=container,
        batch_size=batch_size,
        on_error=on_error,
        read_back_every=read_back_every,
        record_seed=record_seed,
    )
    _check_place(storage, stream)
    plan, fresh = Plan.load(storage), None
    if plan is None:
        fresh = make_plan(stream, terms, poison.seed, shards=shards, processes=processes)
        storage.write_new(PLAN, fresh.to_json())
        plan = Plan.load(storage)
        if plan is None:
            raise FileNotFoundError(f"{storage.url}/{PLAN} was written, and is not there")
    if plan != fresh:
        plan.check_same(terms, poison.seed)
    if shards not in (None, len(plan.parts)):
        raise ValueError(f"this output was begun with {len(plan.parts)} shards, got {shards}")
    wrong = [shard for shard in only or () if not 1 <= shard <= len(plan.parts)]
    if wrong:
        raise ValueError(f"expected shards from 1 to {len(plan.parts)}, got {wrong}")
    mine = range(rank + 1, len(plan.parts) + 1, processes) if only is None else sorted(set(only))
    made, busy = [], []
    for shard in mine:
        try:
            with storage.lock(plan.beside(shard, ".lock"), f"shard {shard}/{len(plan.parts)} of {storage.url}"):
                if Manifest.load(storage, plan, shard) is None:
                    make_shard(stream, poison, plan, shard, storage, progress=progress)
                    made.append(shard)
        except Busy:
            busy.append(shard)
    if busy:
        raise Busy(
            f"another run is at work on shards {busy} of {len(plan.parts)} of {storage.url}; this one made {made}"
        )
    return made


def place(environment: Mapping[str, str] | None = None) -> tuple[int, int]:
    """Which process of how many this is, told by torchrun, accelerate or MPI; (0, 1) for one alone.

    Raises:
        ValueError: a rank that is not below the number of processes.
    """
    environment = os.environ if environment is None else environment
    rank = next((int(environment[name]) for name in _RANK if name in environment), 0)
    processes = next((int(environment[name]) for name in _PROCESSES if name in environment), 1)
    if not 0 <= rank < processes:
        raise ValueError(f"expected a rank from 0 to {processes - 1}, got {rank}")
    return rank, processes


def _check_place(storage: Storage, stream: Stream) -> None:
    """Only an output of shards that is not finished is gone on with, and never the source."""
    source = Path(stream.name)
    if storage.local and source.exists() and source.resolve().is_relative_to(Path(storage.root).resolve()):
        raise FileExistsError(f"the output {storage.url} holds the source {stream.name}: choose another output")
    if not storage.local and f"{stream.name.rstrip('/')}/".startswith(f"{storage.url.rstrip('/')}/"):
        raise FileExistsError(f"the output {storage.url} holds the source {stream.name}: choose another output")
    found = storage.names()
    if "record.json" in found:
        raise FileExistsError(f"{storage.url} exists and is finished: choose another output")
    others = [name for name in found if name != FOLDER]
    if others and storage.size(PLAN) is None:
        raise FileExistsError(f"{storage.url} holds {others[:3]}, and no plan of shards: choose another output")
