"""Protecting a stream: memory and time over the rows, cost over the picture size, one process and two, and what it
costs beside a plain map."""

import functools
import os
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from hf_unlearnable.benchmarks import plain_map
from hf_unlearnable.benchmarks.pictures import Pictures, check_space, first_rows, space_needed, write_source
from hf_unlearnable.benchmarks.timing import SEED
from hf_unlearnable.benchmarks.watching import Job, Moment, watch
from hf_unlearnable.sharding.plan import UNCOUNTED_EVERY

ROWS, QUICK_ROWS = (10_000, 100_000, 1_000_000), (2, 4)
SIZES = {32: 10_000, 224: 2000, 512: 200}
"""Rows that are protected at each size."""
QUICK_SIZES = {32: 4}
PARTS = 4
POISON = ("--poison", "cuda", "--seed", str(SEED))


@dataclass(frozen=True, kw_only=True)
class Bench:
    """How jobs are started.

    Args:
        protect: `scripts/protect.py`, which is measured as users run it.
        work: a folder for sources, which stay there, and outputs, which do not.
        quick: forks of this process, to see that it runs; else processes of their own.
    """

    protect: Path
    work: Path
    quick: bool = False

    def shards(
        self, source: Path, *, parts: int | None = None, cores: Sequence[int | None] = (None,)
    ) -> dict[str, Moment]:
        """Protect a source shard by shard, one process for each of `cores` (None: all that there are).

        Args:
            parts: how many shards; None for what `protect.py` takes by itself.

        Returns:
            The moments "start" (all is imported, and planned), "shards" (the last one is made), for one process "merge"
            (the record is written), and "end".
        """
        output = self._output()
        inner = output / ".shards"
        merging = (inner / "merge.lock").exists

        def all_made() -> bool:
            return len(list(inner.glob("*-of-*.json"))) == parts

        marks = {"start": (inner / "plan.json").exists, "shards": merging if len(cores) == 1 else all_made}
        marks |= {"merge": (output / "record.json").exists} if len(cores) == 1 else {}
        told = ("--dataset", str(source), "--streaming", *POISON, "--output", str(output))
        if parts is not None:
            told += ("--num-shards", str(parts))
        jobs = [
            self._job(
                self.protect, told, core, {} if len(cores) == 1 else {"RANK": str(i), "WORLD_SIZE": str(len(cores))}
            )
            for i, core in enumerate(cores)
        ]
        return watch(jobs, marks, fork=self.quick)

    def whole(self, source: Path) -> float:
        """Seconds of `protect.py` without shards: map, check, measure, record."""
        output = self._output()
        marks = {"start": output.with_name(f".{output.name}.partial").exists, "done": (output / "record.json").exists}
        job = self._job(self.protect, ("--dataset", str(source), *POISON, "--output", str(output)))
        return between(watch([job], marks, fork=self.quick), "start", "done")

    def plain(self, source: Path, *, checked: bool = False) -> float:
        """Seconds of `Dataset.map` (checked: `apply`) and `to_parquet`, of rows that were loaded before."""
        output = self._output()
        marks = {"start": (output / "began").exists, "done": (output / "done").exists}
        told = (str(source), str(output), *(("checked",) if checked else ()))
        job = self._job(Path(plain_map.__file__), told)
        return between(watch([job], marks, fork=self.quick), "start", "done")

    def _job(
        self, script: Path, arguments: tuple[str, ...], core: int | None = None, more: Mapping[str, str] | None = None
    ) -> Job:
        environment = {"HF_DATASETS_CACHE": str(self.work / "cache"), **(more or {})}
        return Job(script=script, arguments=arguments, environment=environment, core=core)

    def _output(self) -> Path:
        for name in ("protected", ".protected.partial", ".protected.partial.lock"):
            path = self.work / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        return self.work / "protected"


def benchmark_scale(
    bench: Bench, pictures: Pictures, *, rows: Sequence[int], size: int, sizes: Mapping[int, int], rounds: int
) -> dict[str, Any]:
    """All that `scripts/benchmark.py scale` tells.

    Args:
        pictures: for everything but "by rows", whose pictures are drawn.
        rows, size: numbers of rows for "by rows", and the side of their pictures in pixels.
        sizes: sides of pictures in pixels for all the rest, with the number of rows of each.

    Raises:
        OSError: not enough space; says how much is needed.
        RuntimeError: a process that failed.
    """
    bench.work.mkdir(parents=True, exist_ok=True)
    numbers = sorted(set(rows))
    needed = max(
        space_needed(count, side) for side, count in [(size, numbers[-1]), *((s, 5 * n) for s, n in sizes.items())]
    )
    check_space(bench.work, needed, f"{numbers[-1]:,} drawn pictures of {size} px and one protected copy")
    result: dict[str, Any] = {"pictures": pictures.title, "quick": bench.quick, "read_back_every": UNCOUNTED_EVERY}
    result[f"by rows, drawn, {size} px"] = by_rows(bench, numbers, size)
    result["by size"] = {str(side): by_size(bench, pictures, side, count) for side, count in sizes.items()}
    small, large = min(sizes), sorted(sizes)[len(sizes) // 2]
    result[f"processes, {large} px"] = two_processes(bench, pictures, large, sizes[large], rounds)
    result["over plain map"] = {
        f"{side} px": over_plain(bench, pictures, side, sizes[side], rounds) for side in dict.fromkeys((small, large))
    }
    bench._output()
    return result


def by_rows(bench: Bench, numbers: Sequence[int], size: int) -> dict[str, Any]:
    """One process over so many drawn rows each, and how time and memory grow.

    PSNR and SSIM are measured, and what was stored is decoded again, on at most 10,000 rows spread over the split, so
    that rows above that number cost less.
    """
    source = write_source(Pictures(), bench.work, numbers[-1], size)
    found: dict[str, Any] = {}
    for count in numbers:
        part = source if count == numbers[-1] else first_rows(source, count, bench.work / f"first-{count}")
        told = bench.shards(part)
        found[f"{count}"] = {
            "rows": count,
            "start_seconds": told["start"].seconds,
            "shards_seconds": between(told, "start", "shards"),
            "merge_seconds": between(told, "shards", "merge"),
            "seconds": told["end"].seconds,
            "cpu_seconds": told["end"].cpu,
            "merge_cpu_seconds": told["merge"].cpu - told["shards"].cpu,
            "rows_per_second": count / between(told, "start", "merge"),
            "shards_peak_mib": told["shards"].mib,
            "peak_mib": told["end"].mib,
        }
    return {**found, "growth": growth([found[f"{count}"] for count in numbers])}


def growth(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """How the largest run compares with the smallest: seconds a row (start left out), and MiB for a million rows more.

    Linear time has a ratio of 1, or less where a small run measures PSNR and SSIM on more of its rows. Of three runs or
    more, all of at least 10,000 rows, that and all that is done once cancels in `further_row_over_first`: seconds of a
    further row between the two largest, over those between the two smallest.
    """
    small, large = found[0], found[-1]
    more = (large["rows"] - small["rows"]) / 1e6
    told = {
        "seconds_a_row_over_smallest": small["rows_per_second"] / large["rows_per_second"],
        **{
            f"{name}_per_million_rows": (large[name] - small[name]) / more if more else 0.0
            for name in ("shards_peak_mib", "peak_mib")
        },
    }
    if len(found) > 2:
        first, *_, last = [
            (b["rows"] / b["rows_per_second"] - a["rows"] / a["rows_per_second"]) / (b["rows"] - a["rows"])
            for a, b in pairwise(found)
        ]
        told["further_row_over_first"] = last / first
    return told


def by_size(bench: Bench, pictures: Pictures, size: int, rows: int) -> dict[str, float]:
    """Processor seconds of a picture, from start to the last shard: decode, CUDA, PNG level 1, read back, measure.

    The source is Arrow files, whose rows nobody counts beforehand: PSNR and SSIM are then measured on one row in a
    hundred, and some stored pictures decoded again (`UNCOUNTED_EVERY`), as they are in a split of a million rows.
    """
    source = write_source(pictures, bench.work, rows, size, kind="arrow")
    told = bench.shards(source)
    return {
        "rows": rows,
        "cpu_seconds_a_row": (told["shards"].cpu - told["start"].cpu) / rows,
        "rows_per_second": rows / between(told, "start", "shards"),
        "source_bytes_a_row": sum(file.stat().st_size for file in source.iterdir()) / rows,
        "published_bytes_a_row": sum(file.stat().st_size for file in (bench.work / "protected/data").iterdir()) / rows,
        "peak_mib": told["end"].mib,
    }


def two_processes(bench: Bench, pictures: Pictures, size: int, rows: int, rounds: int) -> dict[str, Any]:
    """Shards by one process on one core, by one on all cores (it codes pictures in threads), by two on a core each.

    Without start and merge; from the moment that the first process begins to that at which the last shard is made.
    """
    parts = min(PARTS, rows)
    source = write_source(pictures, bench.work, rows, size, rows_per_file=-(-rows // parts))
    cores = sorted(os.sched_getaffinity(0))
    first, last = cores[0], cores[-1]
    names = {"one, one core": (first,), "one, all cores": (None,), "two, a core each": (first, last)}

    def spent(chosen: Sequence[int | None]) -> float:
        return between(bench.shards(source, parts=parts, cores=chosen), "start", "shards")

    times = alternate({name: functools.partial(spent, chosen) for name, chosen in names.items()}, rounds)
    two = times["two, a core each"]
    return {
        "rows": rows,
        "cores": len(cores),
        "two cores": "one core's threads" if last in siblings(first) else "apart" if last != first else "one",
        "rows_per_second": {name: rows / min(spent) for name, spent in times.items()},
        "speed-up of two": {
            f"over {name}": {"median": ratio(times[name], two), "least": ratio(times[name], two, min)}
            for name in ("one, one core", "one, all cores")
        },
    }


def over_plain(bench: Bench, pictures: Pictures, size: int, rows: int, rounds: int) -> dict[str, Any]:
    """Time of the sharded path, and of `protect` on a whole split, in times of a map: all cores, without start.

    Both read back, compare, digest and measure what they stored; the plain map does none of it, the checked one
    (`apply`) reads back and compares. PSNR and SSIM are measured on all rows, and all stored pictures decoded again, as
    in any split of at most 10,000; "shards, few measured" does so with few, as in one of a million.
    """
    parts = min(PARTS, rows)
    source = write_source(pictures, bench.work, rows, size, rows_per_file=-(-rows // parts))
    arrow = write_source(pictures, bench.work, rows, size, kind="arrow")
    merges: dict[str, list[float]] = {name: [] for name in ("shards", "shards, few measured")}

    def sharded(name: str, chosen: Path) -> float:
        told = bench.shards(chosen)
        merges[name].append(between(told, "shards", "merge"))
        return between(told, "start", "shards")

    variants = {
        "plain map": lambda: bench.plain(source),
        "checked map": lambda: bench.plain(source, checked=True),
        "shards": lambda: sharded("shards", source),
        "shards, few measured": lambda: sharded("shards, few measured", arrow),
        "whole split": lambda: bench.whole(source),
    }
    times = alternate(variants, rounds)
    for name, spent in merges.items():
        times[f"{name}, and merge"] = [made + merge for made, merge in zip(times[name], spent, strict=True)]
    return {
        "rows": rows,
        "rows_per_second": {name: rows / min(spent) for name, spent in times.items()},
        **{
            f"over {base}": {name: ratio(spent, times[base]) for name, spent in times.items() if name != base}
            for base in ("plain map", "checked map", "whole split")
        },
    }


def alternate(variants: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each variant returns in every round; every other round takes them from the last to the first."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds):
        for name in list(variants)[:: -1 if turn % 2 else 1]:
            times[name].append(variants[name]())
    return times


def ratio(
    over: Sequence[float], under: Sequence[float], summary: Callable[[Sequence[float]], float] = statistics.median
) -> float:
    """The median (or another summary) over rounds of the ratio within a round."""
    return summary([a / b for a, b in zip(over, under, strict=True)])


def between(told: Mapping[str, Moment], first: str, last: str) -> float:
    """Seconds from one moment to another."""
    return told[last].seconds - told[first].seconds


def siblings(core: int) -> set[int]:
    """The processors that share a physical core with this one, as far as Linux tells."""
    path = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
    found: set[int] = set()
    for part in path.read_text().strip().split(",") if path.exists() else []:
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found - {core}
