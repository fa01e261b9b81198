"""Killed at every step, killed for good, and storage that fails."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from hf_unlearnable import RandomNoisePoison
from hf_unlearnable.record import Record
from hf_unlearnable.sharding import storage as room
from hf_unlearnable.sharding.merge import merge
from hf_unlearnable.sharding.run import protect_shards
from hf_unlearnable.sharding.storage import Storage
from hf_unlearnable.sources import stream_of, stream_split
from tests.conftest import ROOT, make_dataset, noise_pictures
from tests.sharding.conftest import copied, same_pixels
from tests.sharding.test_run import NOISE, make


class Killed(BaseException):
    pass


def test_killed_at_every_write(small: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = stream_of(small.select(range(4)), "few")

    def whole(output: Path) -> Record:
        protect_shards(few, NOISE, output, shards=2, batch_size=2, progress=False)
        return merge(output, progress=False)

    expected = whole(tmp_path / "whole")
    put, write_new, left = Storage.put, Storage.write_new, [0]

    def step(self: Storage, name: str) -> None:
        left[0] -= 1
        if left[0] == 0:
            path = Path(self.path(name) + ".1-a.partial")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"half")
            raise Killed

    def dying_put(self: Storage, name: str, file: Path) -> None:
        step(self, name)
        put(self, name, file)

    def dying_write_new(self: Storage, name: str, data: bytes) -> bool:
        step(self, name)
        return write_new(self, name, data)

    monkeypatch.setattr(Storage, "put", dying_put)
    monkeypatch.setattr(Storage, "write_new", dying_write_new)
    for killed_at in range(1, 100):
        output = tmp_path / f"out-{killed_at}"
        left[0] = killed_at
        try:
            whole(output)
            break
        except Killed:
            assert not (output / "record.json").exists()
        assert whole(output) == expected
        assert sorted(p.name for p in output.iterdir()) == ["README.md", "data", "preview.png", "record.json"]
        assert sorted(f"data/{p.name}" for p in (output / "data").iterdir()) == list(expected.published["files"])
    assert killed_at == 1 + 1 + 2 * 3 + 3


def test_sigkill_in_the_middle_of_a_shard(tmp_path: Path, read: Callable[[Path], Dataset]) -> None:
    source = make_dataset(noise_pictures(150), [i % 4 for i in range(150)])
    source.to_parquet(tmp_path / "photos" / "train.parquet")
    program = (
        "import sys, time; from hf_unlearnable import RandomNoisePoison; from hf_unlearnable.sharding import shard\n"
        "from hf_unlearnable.sharding.run import protect_shards; from hf_unlearnable.sources import stream_split\n"
        "encode = shard.encode_many\n"
        "shard.encode_many = lambda *a, **k: time.sleep(0.05) or encode(*a, **k)\n"
        "protect_shards(stream_split(sys.argv[1]), RandomNoisePoison(seed=bytes(range(32))), sys.argv[2], shards=3,\n"
        "               batch_size=10, progress=False)\n"
    )
    output = tmp_path / "out"
    command = [sys.executable, "-c", program, str(tmp_path / "photos"), str(output)]
    with subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
        deadline = time.monotonic() + 60
        partial = output / ".shards" / "train-00001-of-00003.partial" / "shard.parquet"
        while time.monotonic() < deadline and not (partial.exists() and partial.stat().st_size > 5_000):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait(timeout=30) == -signal.SIGKILL
    assert partial.exists()
    assert [p.name for p in (output / "data").iterdir()] == ["train-00000-of-00003.parquet"]
    with pytest.raises(ValueError, match=r"\[2, 3\] of 3 shards are missing"):
        merge(output, progress=False)
    assert make(tmp_path / "photos", output, batch_size=10) == [2, 3]
    assert not list(output.rglob("*.partial"))
    merge(output, progress=False)
    assert same_pixels(read(output), NOISE.apply(source))


def test_storage_that_fails_half_of_its_writes(
    parquet: Path, small: Dataset, faulty: Any, tmp_path: Path, read: Callable[[Path], Dataset]
) -> None:
    assert make(parquet, "faulty://bucket/out", shards=4) == [1, 2, 3, 4]
    record = merge("faulty://bucket/out", progress=False)
    assert faulty.writes > 30
    here = copied(faulty(), "/bucket/out", tmp_path / "copy")
    assert sorted(p.name for p in here.iterdir()) == ["README.md", "data", "preview.png", "record.json"]
    assert same_pixels(read(here), NOISE.apply(small))
    assert record.source["rows"] == 24


@pytest.mark.parametrize(
    ("broken", "finished"),
    [("plan.json", []), (".parquet", []), ("00002-of-00003.npz", [1, 2]), ("00001-of-00003.json", [1])],
)
def test_storage_that_fails_for_good(parquet: Path, faulty: Any, broken: str, finished: list[int]) -> None:
    url = "faulty://bucket/out"
    faulty.broken = broken
    with pytest.raises(OSError, match=r"writing .* failed 8 times, at last with OSError: .*(network is gone|expected)"):
        make(parquet, url, shards=3)
    faulty.broken = None
    if broken == "plan.json":
        return
    with pytest.raises(ValueError, match="missing or not finished"):
        merge(url, progress=False)
    made = make(parquet, url)
    assert made == [shard for shard in (1, 2, 3) if shard not in finished]
    assert merge(url, progress=False).source["rows"] == 24


def test_a_full_disk_is_not_tried_again(parquet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def full(*_: object) -> None:
        tried.append(1)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(room.os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        make(parquet, tmp_path / "out", shards=2)
    assert tried == [1]
    assert not list((tmp_path / "out").rglob("*.parquet"))


def test_a_file_is_created_once(tmp_path: Path, memory: Any) -> None:
    for url in (tmp_path / "out", "memory://bucket/out"):
        store = Storage(url)
        assert store.read("a/b") is None
        assert store.write_new("a/b", b"first")
        assert not store.write_new("a/b", b"other")
        assert store.read("a/b") == b"first"
        store.write("a/b", b"second")
        assert (store.read("a/b"), store.size("a/b"), store.names("a")) == (b"second", 6, ["b"])
        store.remove("a/b")
        store.remove("a/b")
        assert store.names("a") == []
    assert sorted(p.name for p in (tmp_path / "out").rglob("*")) == ["a"]


def test_an_unknown_protocol() -> None:
    with pytest.raises(ValueError, match="nowhere"):
        Storage("nowhere://bucket")


def test_a_source_that_changed_under_way(parquet: Path, small: Dataset, tmp_path: Path) -> None:
    stream = stream_split(parquet)
    protect_shards(stream, NOISE, tmp_path / "out", shards=3, only=[1], progress=False)
    small.select(range(3)).to_parquet(parquet / "train-00001-of-00003.parquet")
    with pytest.raises(ValueError, match="shard 2/3: expected 8 rows, the source gave 3: has it changed"):
        protect_shards(stream, RandomNoisePoison(seed=NOISE.seed), tmp_path / "out", only=[2], progress=False)
