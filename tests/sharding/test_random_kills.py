"""Twenty runs that are killed at a random moment, and gone on with: no row is lost or doubled."""

import multiprocessing
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from datasets import load_dataset

from hf_unlearnable import CudaPoison
from hf_unlearnable.record import Record
from hf_unlearnable.sharding.merge import merge
from hf_unlearnable.sharding.run import protect_shards
from hf_unlearnable.sources import stream_of
from tests.conftest import make_dataset, noise_pictures, pixels

RUNS = 20
SECRET = bytes(range(32))


def work(output: Path) -> None:
    clean = make_dataset(noise_pictures(600, seed=1), [i % 4 for i in range(600)])
    protect_shards(stream_of(clean, "small"), CudaPoison(seed=SECRET), output, shards=6, batch_size=20, progress=False)
    merge(output, progress=False)


@pytest.mark.slow
def test_no_row_is_lost_or_doubled_by_a_kill_at_a_random_moment(tmp_path: Path) -> None:
    clean = make_dataset(noise_pictures(600, seed=1), [i % 4 for i in range(600)])
    expected = pixels(CudaPoison(seed=SECRET).apply(clean))
    fork = multiprocessing.get_context("fork")

    def started(output: Path) -> multiprocessing.process.BaseProcess:
        child = fork.Process(target=work, args=(output,))
        child.start()
        return child

    begin = time.monotonic()
    whole = started(tmp_path / "whole")
    whole.join()
    length = time.monotonic() - begin
    assert whole.exitcode == 0
    moments = np.random.default_rng(0).uniform(0, 1.1 * length, RUNS)
    killed = 0
    for run, moment in enumerate(moments):
        output = tmp_path / str(run)
        child = started(output)
        child.join(moment)
        child.kill()
        child.join()
        killed += child.exitcode == -signal.SIGKILL
        if not (output / "record.json").exists():
            rest = started(output)
            rest.join()
            assert rest.exitcode == 0, f"run {run}, killed after {moment:.2f} s"
        found = load_dataset(str(output), split="train", cache_dir=str(tmp_path / f"cache-{run}"))
        assert found["name"][:] == clean["name"][:]
        assert np.array_equal(pixels(found), expected)
        assert Record.load(output / "record.json").published["rows"] == 600
    assert killed >= RUNS // 2
