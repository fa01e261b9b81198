"""Benchmarks of protecting at scale: sources, watched processes, the measurement with a stand-in, costs on paper."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Image

from hf_unlearnable.benchmarks import containers, costs, plain_map, scaling
from hf_unlearnable.benchmarks.containers import benchmark_containers, table
from hf_unlearnable.benchmarks.costs import Prices, cost_table, page
from hf_unlearnable.benchmarks.pictures import Pictures, check_space, first_rows, space_needed, write_source
from hf_unlearnable.benchmarks.scaling import Bench, alternate, benchmark_scale, growth, ratio, siblings
from hf_unlearnable.benchmarks.watching import Job, watch
from hf_unlearnable.poisons.cuda import CudaPoison
from hf_unlearnable.sharding.plan import FOLDER, PLAN
from hf_unlearnable.sources import load_split, stream_split
from tests.conftest import ROOT, load_script, make_dataset, noise_pictures, pixels

# Sources.


@pytest.mark.parametrize("size", [32, 41])
def test_a_drawn_picture_depends_on_its_row_and_size_alone(size: int) -> None:
    picture = Pictures().picture(3, size)
    assert picture.shape == (size, size, 3)
    assert picture.dtype == np.uint8
    assert np.array_equal(picture, Pictures().picture(3, size))
    assert not np.array_equal(picture, Pictures().picture(4, size))
    assert len(np.unique(picture)) > 50


@pytest.mark.parametrize(
    ("rows", "per_file", "files"), [(1, 10, [1]), (250, 100, [100, 100, 50]), (200, 100, [100, 100])]
)
def test_a_source_has_so_many_rows_in_so_many_files(tmp_path: Path, rows: int, per_file: int, files: list[int]) -> None:
    source = write_source(Pictures(), tmp_path, rows, 8, rows_per_file=per_file)
    assert [pq.read_metadata(file).num_rows for file in sorted(source.iterdir())] == files
    assert [path.name for path in tmp_path.iterdir()] == [source.name]
    found = stream_split(source)
    assert found.count() == files
    got = list(found.read(0, found.source_shards))
    assert [row["label"] for row in got] == [i % 10 for i in range(rows)]
    assert [row["image"]["bytes"] for row in got] == [Pictures().jpeg(i, 8) for i in range(rows)]


def test_a_source_is_written_once_and_only_whole_ones_are_kept(tmp_path: Path) -> None:
    source = write_source(Pictures(), tmp_path, 5, 8)
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in source.iterdir()}
    assert write_source(Pictures(), tmp_path, 5, 8) == source
    assert {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in source.iterdir()} == before
    os.rename(source, source.with_name(source.name + ".partial"))
    (source.with_name(source.name + ".partial") / "train-00001.parquet").write_bytes(b"half of a file")
    assert write_source(Pictures(), tmp_path, 5, 8) == source
    assert [file.read_bytes() for file in source.iterdir()] == [data for _, data in before.values()]


def test_arrow_sources_hold_the_same_and_cannot_be_counted(tmp_path: Path) -> None:
    plain, arrow = (write_source(Pictures(), tmp_path, 130, 8, kind=kind) for kind in ("parquet", "arrow"))
    streams = [stream_split(folder) for folder in (plain, arrow)]
    assert [stream.count() for stream in streams] == [[130], None]
    assert list(streams[0].read(0, 1)) == list(streams[1].read(0, 1))
    assert streams[0].features == streams[1].features


@pytest.mark.parametrize("rows", [1, 100, 130, 250])
def test_first_rows_are_those_of_a_source_of_that_size(tmp_path: Path, rows: int) -> None:
    source = write_source(Pictures(), tmp_path, 250, 8, rows_per_file=100)
    part, alone = first_rows(source, rows, tmp_path / "part"), write_source(Pictures(), tmp_path, rows, 8)
    told = [list(found.read(0, found.source_shards)) for found in map(stream_split, (part, alone))]
    assert told[0] == told[1]
    assert len(told[0]) == rows


def test_first_rows_refuses_more_than_there_are(tmp_path: Path) -> None:
    source = write_source(Pictures(), tmp_path, 5, 8)
    with pytest.raises(ValueError, match=r"expected 6 rows in .*, got 5"):
        first_rows(source, 6, tmp_path / "part")


def test_real_pictures_are_cut_square_resized_and_taken_in_turn() -> None:
    wide = make_dataset(noise_pictures(3, 24, 40), [0, 1, 2])
    small = make_dataset(noise_pictures(2, 16, 16), [0, 1])
    chosen = Pictures.largest({"small": small, "wide": wide})
    assert chosen.title == "wide, resized from 24 px"
    assert np.array_equal(chosen.picture(1, 24), np.asarray(wide[1]["img"])[:, 8:32])
    assert np.array_equal(chosen.picture(4, 48), chosen.picture(1, 48))
    assert chosen.picture(0, 48).shape == (48, 48, 3)
    assert Pictures.largest({}) == Pictures()


def test_gray_pictures_become_rgb() -> None:
    gray = make_dataset([PIL.Image.fromarray(noise_pictures(1)[0][:, :, 0])], [0])
    assert Pictures("gray", gray).picture(0, 16).shape == (16, 16, 3)


Usage = namedtuple("Usage", "total used free")


def test_too_little_space_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, 2 * 10**9))
    check_space(tmp_path, 2 * 10**9, "nothing")
    with pytest.raises(OSError, match=r"expected 6\.\d+ GB free for 1,000,000 drawn pictures of 32 px .* got 2 GB"):
        benchmark_scale(
            Bench(protect=tmp_path, work=tmp_path), Pictures(), rows=[10, 1_000_000], size=32, sizes={8: 1}, rounds=1
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [32, 224])
def test_the_space_needed_is_enough(tmp_path: Path, size: int) -> None:
    source = write_source(Pictures(), tmp_path, 20, size)
    stored = CudaPoison(seed=7)(load_split(source).cast_column("image", Image(decode=False))[:])["image"]
    made = sum(file.stat().st_size for file in source.iterdir()) + sum(len(value["bytes"]) for value in stored)
    assert made < space_needed(20, size) < 4 * made


# Watching.


def script(folder: Path, text: str, name: str = "script.py") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_watch_tells_time_processor_time_memory_and_marks(tmp_path: Path) -> None:
    text = """
import sys, time
from pathlib import Path
end = time.process_time() + 0.3
while time.process_time() < end: pass
Path(sys.argv[1]).touch()
held = bytearray(b"x" * 50_000_000)
time.sleep(0.3)
"""
    busy = script(tmp_path, text)
    told = watch([Job(script=busy, arguments=(str(tmp_path / "half"),))], {"half": (tmp_path / "half").exists})
    assert list(told) == ["half", "end"]
    half, end = told["half"], told["end"]
    assert half.seconds >= 0.3
    assert end.seconds >= half.seconds + 0.25
    assert 0.25 <= half.cpu <= end.cpu <= end.seconds + 0.05
    assert end.mib - half.mib > 30
    assert end.mib < 150, "not this process's memory"


def test_watch_runs_jobs_at_once_on_their_cores_and_adds_their_time(tmp_path: Path) -> None:
    text = """
import os, sys, time
from pathlib import Path
end = time.process_time() + 0.2
while time.process_time() < end: pass
Path(sys.argv[1]).write_text(f"{sorted(os.sched_getaffinity(0))} {os.environ['RANK']}")
while not Path(sys.argv[2]).exists(): time.sleep(0.01)
"""
    core = min(os.sched_getaffinity(0))
    files = [str(tmp_path / name) for name in "ab"]
    one = script(tmp_path, text)
    jobs = [
        Job(script=one, arguments=tuple(files[:: 1 - 2 * i]), environment={"RANK": str(i)}, core=core) for i in (0, 1)
    ]
    told = watch(jobs)
    assert [Path(file).read_text() for file in files] == [f"[{core}] 0", f"[{core}] 1"]
    assert told["end"].cpu >= 0.4


def test_a_job_that_fails_ends_all_and_says_why(tmp_path: Path) -> None:
    bad = script(tmp_path, "import sys; print('made half'); sys.exit('no such thing')")
    slow = script(tmp_path, "import time; time.sleep(60)", "slow.py")
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=r"script.py --x ended with 1: (?s:.*)no such thing"):
        watch([Job(script=slow, arguments=()), Job(script=bad, arguments=("--x",))])
    assert time.monotonic() - began < 20
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_a_mark_that_never_happens_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"script.py.* ended, and \['merge'\] never happened"):
        watch([Job(script=script(tmp_path, ""), arguments=())], {"merge": lambda: False, "start": lambda: True})


# The measurement, with a stand-in for protect.py that only sleeps and leaves the same files.

STAND_IN = """
import os, sys, time
from pathlib import Path
told = dict(zip(sys.argv[1::1], sys.argv[2::1]))
output, shards = Path(told["--output"]), int(told.get("--num-shards", 1))
rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("x")
    time.sleep(0.05)
with open(output.parent / "calls", "a") as log:
    source = told["--dataset"].split("/")[-1]
    log.write(f"{sys.argv.count('--streaming')} {rank}/{processes} of {shards} for {source}\\n")
if "--streaming" in sys.argv:
    assert not (output / "record.json").exists()
    touch(output / ".shards/plan.json")
    for i in range(rank, shards, processes):
        touch(output / f"data/train-{i:05d}-of-{shards:05d}.parquet")
        touch(output / f".shards/train-{i:05d}-of-{shards:05d}.json")
    if processes == 1:
        touch(output / ".shards/merge.lock")
        touch(output / "record.json")
else:
    touch(output.parent / f".{output.name}.partial/cache")
    touch(output / "record.json")
"""
PLAIN = """
import sys, time
from pathlib import Path
Path(sys.argv[2]).mkdir()
for name in ("began", "done"):
    Path(sys.argv[2], name).touch()
    time.sleep(0.05)
"""


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("scale")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plain_map, "__file__", str(script(folder, PLAIN, "plain.py")))
        bench = Bench(protect=script(folder, STAND_IN), work=folder / "work")
        result = benchmark_scale(bench, Pictures(), rows=[30, 10], size=8, sizes={8: 8, 16: 4}, rounds=1)
    assert not (folder / "work/protected").exists()
    assert (folder / "work/drawn-8px-30-by-10000-parquet").exists()
    return json.loads(json.dumps(result)) | {"calls": (folder / "work/calls").read_text()}


def test_scale_tells_all_figures(measured: dict) -> None:
    rows = measured["by rows, drawn, 8 px"]
    assert list(rows) == ["10", "30", "growth"]
    for count in (10, 30):
        told = rows[str(count)]
        assert told["rows"] == count
        assert 0.05 <= told["shards_seconds"] < told["seconds"]
        assert 0.03 <= told["merge_seconds"] < told["seconds"]
        assert told["rows_per_second"] == pytest.approx(count / (told["shards_seconds"] + told["merge_seconds"]))
        assert told["start_seconds"] + told["shards_seconds"] + told["merge_seconds"] <= told["seconds"]
        assert 1 < told["shards_peak_mib"] <= told["peak_mib"] < 100
    assert rows["growth"] == growth([rows["10"], rows["30"]])
    assert {size: told["rows"] for size, told in measured["by size"].items()} == {"8": 8, "16": 4}
    assert all(told["published_bytes_a_row"] > 0 for told in measured["by size"].values())
    pair = measured["processes, 16 px"]
    assert pair["rows"] == 4
    assert set(pair["rows_per_second"]) == {"one, one core", "one, all cores", "two, a core each"}
    assert all(gain["median"] >= gain["least"] > 0 for gain in pair["speed-up of two"].values())
    assert set(measured["over plain map"]) == {"8 px", "16 px"}
    for told in measured["over plain map"].values():
        assert told["over plain map"]["shards"] < told["over plain map"]["shards, and merge"]


def test_each_part_of_the_measurement_starts_the_processes_that_it_says(measured: dict) -> None:
    small, large = "drawn-8px-8-by-2-parquet", "drawn-16px-4-by-1-parquet"
    calls = measured["calls"].splitlines()
    assert calls[:4] == [
        f"1 0/1 of 1 for {source}"
        for source in (
            "first-10",
            "drawn-8px-30-by-10000-parquet",
            "drawn-8px-8-by-10000-arrow",
            "drawn-16px-4-by-10000-arrow",
        )
    ]
    assert sorted(calls[4:8]) == sorted(
        [f"1 0/1 of 4 for {large}", f"1 0/1 of 4 for {large}", f"1 0/2 of 4 for {large}", f"1 1/2 of 4 for {large}"]
    )
    few = "drawn-8px-8-by-10000-arrow", "drawn-16px-4-by-10000-arrow"
    assert calls[8:] == [
        f"{streams} 0/1 of 1 for {source}"
        for all_of, arrow in zip((small, large), few, strict=True)
        for streams, source in ((1, all_of), (1, arrow), (0, all_of))
    ]


def test_the_names_that_are_waited_for_are_those_of_sharding() -> None:
    assert (FOLDER, PLAN) == (".shards", ".shards/plan.json")


def test_growth_of_linear_time_and_flat_memory_is_none() -> None:
    rows = [
        {"rows": n, "rows_per_second": 50.0, "shards_peak_mib": 700.0, "peak_mib": 700 + n / 1e4}
        for n in (1e4, 1e5, 1e6)
    ]
    told = growth(rows)
    assert told["seconds_a_row_over_smallest"] == 1
    assert told["shards_peak_mib_per_million_rows"] == 0
    assert told["peak_mib_per_million_rows"] == pytest.approx(100)
    assert told["further_row_over_first"] == pytest.approx(1)
    assert growth(rows[:1])["peak_mib_per_million_rows"] == 0


def test_a_further_row_costs_more_where_time_is_not_linear_whatever_is_done_once() -> None:
    def of(seconds: dict[int, float]) -> float:
        told = [{"rows": n, "rows_per_second": n / s, "shards_peak_mib": 1, "peak_mib": 1} for n, s in seconds.items()]
        return growth(told)["further_row_over_first"]

    assert of({10: 100 + 10, 20: 100 + 20, 40: 100 + 40}) == pytest.approx(1)
    assert of({10: 100 + 10**2, 20: 100 + 20**2, 40: 100 + 40**2}) == pytest.approx(60 / 30)


def test_rounds_alternate_their_order() -> None:
    order = []
    variants = {name: lambda name=name: order.append(name) or float(len(order)) for name in "abc"}
    times = alternate(variants, 3)
    assert "".join(order) == "abccbaabc"
    assert times == {"a": [1, 6, 7], "b": [2, 5, 8], "c": [3, 4, 9]}
    assert ratio(times["b"], times["a"]) == 8 / 7
    assert ratio(times["b"], times["a"], min) == 5 / 6


def test_siblings_are_other_processors() -> None:
    core = min(os.sched_getaffinity(0))
    assert core not in siblings(core)
    assert siblings(10**6) == set()


def test_the_plain_map_makes_the_pixels_of_the_poison(tmp_path: Path) -> None:
    source = write_source(Pictures(), tmp_path, 12, 16)
    plain_map.main(str(source), str(tmp_path / "out"))
    assert (tmp_path / "out/began").exists()
    assert (tmp_path / "out/done").exists()
    made, clean = Dataset.from_parquet(str(tmp_path / "out/train.parquet")), load_split(source)
    assert np.array_equal(pixels(made, "image"), pixels(CudaPoison(seed=7).apply(clean), "image"))
    assert made["label"][:] == clean["label"][:]


# Containers.


@pytest.fixture(scope="module")
def coded() -> dict:
    levels = {"png": (1, 0, 9), "webp": (1,)}
    return benchmark_containers(Pictures(), sizes={32: 6, 40: 1}, levels=levels, rounds=1, quick=True)


def test_containers_are_compared_with_png_1(coded: dict) -> None:
    assert list(coded["sizes"]) == ["32", "40"]
    for size, found in coded["sizes"].items():
        assert set(found) == {"png 0", "png 1", "png 9", "webp 1"}
        first = found["png 1"]
        assert (first["encode_over_png_1"], first["decode_over_png_1"], first["bytes_over_png_1"]) == (1, 1, 1)
        assert found["png 0"]["bytes"] > 3 * int(size) ** 2 > first["bytes"] > found["png 9"]["bytes"]
        for told in found.values():
            assert told["bytes_over_raw"] == told["bytes"] / (3 * int(size) ** 2)
            assert min(told["encode_seconds"], told["decode_seconds"]) > 0
    assert table(coded).count("\n| ") == 1 + 8
    assert "drawn, under CUDA" in table(coded)


def test_what_is_coded_is_protected_class_by_class() -> None:
    made = containers.protected(Pictures(), 24, 12)
    clean = make_dataset([Pictures().picture(row, 24) for row in range(12)], [row % 10 for row in range(12)], 10)
    assert np.array_equal(
        np.stack([picture.pixels.permute(1, 2, 0).numpy() for picture in made]),
        pixels(CudaPoison(seed=7).apply(clean)),
    )


# Costs.

SCALE = {
    "quick": False,
    "pictures": "drawn",
    "by rows, drawn, 32 px": {
        "1000": {"rows": 1000, "merge_cpu_seconds": 1.0},
        "100000": {"rows": 100_000, "merge_cpu_seconds": 20.0},
        "growth": {},
    },
    "by size": {"32": {"cpu_seconds_a_row": 0.0034}, "224": {"cpu_seconds_a_row": 0.1}, "9": {}},
}
CODED = {
    "sizes": {
        "32": {
            "png 1": {"encode_seconds": 0.0010, "decode_seconds": 0.0004, "bytes": 2500},
            "png 0": {"encode_seconds": 0.0001, "decode_seconds": 0.0003, "bytes": 3100},
            "webp 7": {"encode_seconds": 9.0, "decode_seconds": 9.0, "bytes": 1},
        },
        "512": {},
    }
}


def test_costs_have_their_closed_forms() -> None:
    prices = Prices(core_hour=0.5, gb_month=0.1)
    found = cost_table(SCALE, CODED, prices, counts=(10**6, 36 * 10**8))
    assert [(one.size, one.container, one.pictures) for one in found] == [
        (32, name, count) for name in ("png 0", "png 1") for count in (10**6, 36 * 10**8)
    ]
    first = found[3]
    assert first.core_hours == pytest.approx(36e8 * (0.0034 + 0.0002) / 3600)
    assert first.core_hours == pytest.approx(3600)
    assert first.gigabytes == pytest.approx(9000)
    assert first.compute_dollars == pytest.approx(1800)
    assert first.month_dollars == pytest.approx(900)
    stored = found[1]
    assert stored.core_hours == pytest.approx(1e6 * (0.0036 - 0.0009 - 0.0001))
    assert stored.gigabytes == pytest.approx(36e8 * 3100 / 1e9)
    assert found[2].core_hours == pytest.approx(1.0)
    few = cost_table({**SCALE, "read_back_every": 16}, CODED, prices, counts=(36 * 10**8,))[0]
    assert few.core_hours == pytest.approx(1e6 * (0.0036 - 0.0009 - 0.0001 / 16))


def test_records_of_earlier_versions_make_a_page_too() -> None:
    folder = Path(__file__).parent.parent / "cards/results"
    scale, coded = (json.loads((folder / f"{name}.json").read_text()) for name in ("scale", "containers"))
    told = page(scale, coded, Prices())
    assert "| 224 px | 2000 | 1.63 | not measured | 4.41 |" in told
    assert "are measured on at most 10,000 rows" in told
    scale["results"]["read_back_every"] = 100
    assert "are measured, and what was stored is decoded again, on at most 10,000 rows" in page(scale, coded, Prices())


def test_costs_refuse_other_figures() -> None:
    with pytest.raises(
        ValueError, match=r"expected a size that both files measured, got \['32', '224', '9'\] and \['7'\]"
    ):
        cost_table(SCALE, {"sizes": {"7": {}}}, Prices())
    with pytest.raises(ValueError, match=r"expected the results of `benchmark.py scale`, got \['sizes'\]"):
        cost_table(CODED, CODED, Prices())
    for name in ("core_hour", "gb_month"):
        for price in (-1.0, float("nan")):
            with pytest.raises(ValueError, match=f"{name} is a price in dollars, 0 or more, got"):
                Prices(**{name: price})


def report(results: dict, command: str) -> dict:
    told = {"machine": "x86_64, 2 cores", "processor": "a processor", "torch threads": 1, "rounds": 5}
    return {**told, "command": command, "results": results}


def test_the_page_says_that_it_is_on_paper_and_where_from(measured: dict, coded: dict) -> None:
    sizes = {**coded["sizes"], "8": coded["sizes"]["32"]}
    parts = report(measured, "scripts/benchmark.py scale"), report({**coded, "sizes": sizes, "quick": False}, "coding")
    text = page(*parts, Prices())
    assert "## On paper: computed from the measurement, not run" in text
    assert "`python scripts/benchmark.py scale` on a processor" in text
    assert "no vendor's: $0.05" in text
    assert "mean nothing" not in text
    assert [text.count(f"\n| 10^{n} | 8 px | ") for n in (6, 7, 8, 9)] == [3, 0, 3, 3]
    assert all(len(line) < 200 for line in text.splitlines())
    assert "**From a quick look: these figures mean nothing.**" in page(
        parts[0], report(coded | {"sizes": sizes}, ""), Prices()
    )


@pytest.mark.parametrize(
    ("number", "told"),
    [(0.0012345, "0.00123"), (0.5, "0.5"), (12.345, "12.3"), (99.96, "100"), (123456.0, "123,000"), (0.0, "0")],
)
def test_figures_have_three_digits(number: float, told: str) -> None:
    assert costs._figures(number) == told


@pytest.mark.parametrize(("gigabytes", "told"), [(2.5, "2.5 GB"), (2500.0, "2.5 TB"), (2.5e6, "2.5 PB")])
def test_bytes_have_their_unit(gigabytes: float, told: str) -> None:
    assert costs._bytes(gigabytes) == told


# The command line.


def test_containers_and_costs_from_the_command_line(
    tmp_path: Path, measured: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    main = load_script("benchmark").main
    main(["containers", "--quick", "--output", str(tmp_path / "containers.json")])
    found = json.loads((tmp_path / "containers.json").read_text())
    assert found["command"] == "scripts/benchmark.py containers --quick --output containers.json"
    assert set(found["results"]["sizes"]) == {"32", "224", "512"}
    assert (tmp_path / "containers.md").read_text() == table(found["results"])
    scale = report({**measured, "by size": {"32": measured["by size"]["8"]}}, "scale")
    (tmp_path / "scale.json").write_text(json.dumps(scale))
    files = ["--scale", str(tmp_path / "scale.json"), "--containers", str(tmp_path / "containers.json")]
    main(["costs", *files, "--core-hour-price", "1", "--output", str(tmp_path / "costs.md")])
    assert (tmp_path / "costs.md").read_text() == page(scale, found, Prices(core_hour=1.0))
    capsys.readouterr()
    with pytest.raises(SystemExit, match=r"benchmark.py: expected the results of `benchmark.py scale`"):
        main(["costs", *files[2:], "--scale", str(tmp_path / "containers.json")])
    with pytest.raises(SystemExit, match="--rows and --rounds are 1 or more"):
        main(["scale", "--rows", "0", "10"])


@pytest.mark.slow
def test_a_quick_run_measures_the_real_script(tmp_path: Path) -> None:
    output = tmp_path / "scale.json"
    command = [sys.executable, str(ROOT / "scripts/benchmark.py"), "scale", "--quick", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())["results"]
    assert found["quick"]
    assert list(found["by rows, drawn, 32 px"]) == [*map(str, scaling.QUICK_ROWS), "growth"]
    assert found["by size"]["32"]["published_bytes_a_row"] > 1000
