"""What protecting many pictures would cost: on paper, from what was measured on few."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_unlearnable.benchmarks.containers import FIRST, table

COUNTS = (10**6, 10**8, 10**9)
SHOWN = ("png 0", FIRST, "png 6", "webp 1")
GIGA = 1e9
FURTHER = "further_row_over_first"


@dataclass(frozen=True, kw_only=True)
class Prices:
    """Assumptions of round size, no vendor's prices.

    Args:
        core_hour: dollars for an hour of one core.
        gb_month: dollars for keeping 10^9 bytes for a month.
    """

    core_hour: float = 0.05
    gb_month: float = 0.02

    def __post_init__(self) -> None:
        for name in ("core_hour", "gb_month"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is a price in dollars, 0 or more, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of protecting `pictures` pictures of `size` pixels a side once, and of keeping them for a month."""

    size: int
    container: str
    pictures: int
    core_hours: float
    gigabytes: float
    compute_dollars: float
    month_dollars: float


def cost_table(
    scale: Mapping[str, Any], containers: Mapping[str, Any], prices: Prices, counts: Sequence[int] = COUNTS
) -> list[Cost]:
    """core-hours = pictures * (p + merge + e_c - e_1 + (d_c - d_1) / r) / 3600, bytes = pictures * b_c.

    p: processor seconds of a picture in PNG level 1 at this size, from "by size"; merge: those of a row in the largest
    merge, from "by rows"; e, d, b: seconds of encoding and of decoding, and bytes of a picture in container c or PNG
    level 1; one stored picture in r is decoded again. Sizes are those that both measured.

    Args:
        scale, containers: the results of `benchmark_scale` and of `benchmark_containers`.

    Raises:
        ValueError: other figures than these, or no common size.
    """
    merge = _merge_seconds(scale)
    sizes = [size for size in scale.get("by size", {}) if size in containers.get("sizes", {})]
    if not sizes:
        raise ValueError(
            f"expected a size that both files measured, got {list(scale.get('by size', {}))} and "
            f"{list(containers.get('sizes', {}))}: are they those of `benchmark.py scale` and `containers`?"
        )
    found, again = [], scale.get("read_back_every", 1)
    for size in sizes:
        measured = containers["sizes"][size]
        for container in (name for name in SHOWN if name in measured):
            other, first = measured[container], measured[FIRST]
            encode, decode = (other[f"{what}_seconds"] - first[f"{what}_seconds"] for what in ("encode", "decode"))
            seconds = scale["by size"][size]["cpu_seconds_a_row"] + merge + encode + decode / again
            for count in counts:
                hours, gigabytes = count * seconds / 3600, count * other["bytes"] / GIGA
                found.append(
                    Cost(
                        size=int(size),
                        container=container,
                        pictures=count,
                        core_hours=hours,
                        gigabytes=gigabytes,
                        compute_dollars=hours * prices.core_hour,
                        month_dollars=gigabytes * prices.gb_month,
                    )
                )
    return found


def page(scale: Mapping[str, Any], containers: Mapping[str, Any], prices: Prices) -> str:
    """The page of all of it, from the two reports that `scripts/benchmark.py` writes.

    Raises:
        ValueError: as `cost_table`.
    """
    measured, coded = scale.get("results", {}), containers.get("results", {})
    costs = cost_table(measured, coded, prices)
    lines = ["# Protecting at scale: what it costs", ""]
    if measured["quick"] or coded["quick"]:
        lines += ["**From a quick look: these figures mean nothing.**", ""]
    lines += [f"- `python {report['command']}` on {_place(report)}" for report in (scale, containers)]
    lines += ["", "CUDA, one key, `scripts/protect.py --streaming`; PNG level 1 where nothing else is said.", ""]
    lines += ["## On paper: computed from the measurement, not run", ""]
    lines += [
        f"Assumed prices, no vendor's: ${prices.core_hour:g} for an hour of a core, ${prices.gb_month:g} for",
        "10^9 bytes for a month. Core-hours are decoding JPEG, CUDA, encoding, reading back, measuring and a share of",
        "the merge; bytes are those of the protected pictures, without the source. Transfers, requests, waiting",
        "machines and failed runs are not in it.",
        f"Pictures: {measured['pictures']} (time), {coded['pictures']} (containers). "
        "Seconds of other containers than PNG 1 are those of PNG 1, less its coding and plus theirs.",
        "",
        "| pictures | size | container | core-hours | stored | compute, once | storage, a month |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in sorted(costs, key=lambda cost: cost.pictures):
        lines.append(
            f"| 10^{len(str(one.pictures)) - 1} | {one.size} px | {one.container} | {_figures(one.core_hours)} "
            f"| {_bytes(one.gigabytes)} | ${_figures(one.compute_dollars)} | ${_figures(one.month_dollars)} |"
        )
    lines += ["", "## Measured: rows", "", *_by_rows(measured), "", "## Measured: sizes", "", *_by_size(measured)]
    lines += ["", "## Measured: processes, and beside a plain map", "", *_ratios(measured)]
    return "\n".join([*lines, "", "## Measured: containers", "", table(coded)])


def _merge_seconds(scale: Mapping[str, Any]) -> float:
    """Of one row, in the largest merge."""
    _, rows = _rows_of(scale)
    largest = max(rows, key=lambda told: told["rows"])
    return largest["merge_cpu_seconds"] / largest["rows"]


def _rows_of(scale: Mapping[str, Any]) -> tuple[str, list[Mapping[str, float]]]:
    title = next((name for name in scale if name.startswith("by rows")), None)
    if title is None:
        raise ValueError(f"expected the results of `benchmark.py scale`, got {list(scale)}")
    return title, [told for name, told in scale[title].items() if name != "growth"]


def _by_rows(scale: Mapping[str, Any]) -> list[str]:
    title, rows = _rows_of(scale)
    more = scale[title]["growth"]
    again = ", and what was stored is decoded again," if scale.get("read_back_every", 1) > 1 else ""
    lines = [
        f"One process on all cores ({title.removeprefix('by rows, ')}); rows a second without the start. PSNR and SSIM",
        f"are measured{again} on at most 10,000 rows spread over the split, so that",
        "rows above that number cost less.",
        "",
        "| rows | start, s | shards, s | merge, s | rows a second | peak, shards, MiB | peak with merge, MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        seconds = " | ".join(f"{row[f'{what}_seconds']:.1f}" for what in ("start", "shards", "merge"))
        lines.append(
            f"| {row['rows']:,} | {seconds} | {row['rows_per_second']:.0f} | {row['shards_peak_mib']:.0f} "
            f"| {row['peak_mib']:.0f} |"
        )
    return [
        *lines,
        "",
        f"Seconds a row, most rows over fewest: {more['seconds_a_row_over_smallest']:.2f}. MiB for a million rows",
        f"more: {more['shards_peak_mib_per_million_rows']:,.0f} (shards), {more['peak_mib_per_million_rows']:,.0f} "
        "(with the merge).",
        *(
            [f"Seconds of a further row, between the largest over between the smallest: {more[FURTHER]:.2f}."]
            if FURTHER in more
            else []
        ),
    ]


def _by_size(scale: Mapping[str, Any]) -> list[str]:
    lines = [
        f"One process on all cores, pictures: {scale['pictures']}, as JPEG of quality 90; without start and merge.",
        "PSNR and SSIM on one row in a hundred, as in a split of a million.",
        "",
        "| size | rows | core-milliseconds a picture | rows a second | source, bytes | published, bytes | peak, MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for size, told in scale["by size"].items():
        lines.append(
            f"| {size} px | {told['rows']} | {1000 * told['cpu_seconds_a_row']:.2f} | {told['rows_per_second']:.1f} "
            f"| {told['source_bytes_a_row']:,.0f} | {told['published_bytes_a_row']:,.0f} | {told['peak_mib']:.0f} |"
        )
    return lines


def _ratios(scale: Mapping[str, Any]) -> list[str]:
    lines = []
    for title, told in scale.items():
        if title.startswith("processes"):
            gains = "; ".join(
                f"{name}: {gain['median']:.2f} (least {gain['least']:.2f})"
                for name, gain in told["speed-up of two"].items()
            )
            lines += [
                f"Two processes on a core each, {title.removeprefix('processes, ')}, {told['rows']} rows, "
                f"{told['cores']} cores ({told['two cores']}), median over rounds, {gains}.",
                "One process on all cores codes pictures in threads.",
                "",
            ]
    lines += [
        "| size | rows | shards, few measured, over plain map | over checked map | shards over plain map"
        " | shards and merge over plain map | whole split over plain map | shards and merge over whole split |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for size, told in scale["over plain map"].items():
        plain, checked, few = told["over plain map"], told.get("over checked map", {}), "shards, few measured"
        cells = [
            plain[few],
            checked.get(few),
            *(plain[name] for name in ("shards", "shards, and merge", "whole split")),
        ]
        cells.append(told["over whole split"]["shards, and merge"])
        shown = ["not measured" if cell is None else f"{cell:.2f}" for cell in cells]
        lines.append(f"| {size} | {told['rows']} | {' | '.join(shown)} |")
    return [
        *lines,
        "",
        "Times on all cores, median over rounds. Plain map: `Dataset.map(CudaPoison, batched=True)` and `to_parquet`",
        "of rows that were loaded before; it neither reads back nor measures. Checked map: `CudaPoison.apply`, which",
        "reads all pictures back. Whole split: `protect.py` without `--streaming`, which does both. Few measured: PSNR",
        "and SSIM on one row in a hundred, and one stored picture in "
        f"{scale.get('read_back_every', 1)} decoded again, as in a split of a million; else all, as in one of at most",
        "10,000.",
    ]


def _place(report: Mapping[str, Any]) -> str:
    threads, rounds = report["torch threads"], report["rounds"]
    return f"{report['processor']} ({report['machine']}), torch threads: {threads}, rounds: {rounds}"


def _figures(number: float) -> str:
    """Three significant figures, with commas."""
    rounded = float(f"{number:.3g}")
    return f"{rounded:,.0f}" if rounded >= 100 else f"{rounded:g}"


def _bytes(gigabytes: float) -> str:
    for unit, size in (("PB", 1e6), ("TB", 1e3)):
        if gigabytes >= size:
            return f"{_figures(gigabytes / size)} {unit}"
    return f"{_figures(gigabytes)} GB"
