"""The queue: no job is lost or done twice, whatever is killed, and an error costs one job."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from datasets import DatasetDict
from filelock import FileLock

from hf_unlearnable.defenses.squeeze import Jpeg
from hf_unlearnable.evaluation.arms import Arm, Rows
from hf_unlearnable.evaluation.attackers import Attacker
from hf_unlearnable.evaluation.jobs import Job, Outcome, Queue, Worker
from hf_unlearnable.training import Unfinished


def job(name: str = "erm", seed: int = 0, path: str = "nowhere", **more: Any) -> Job:
    arm = Arm(label="clean", kind="clean", path=path)
    return Job(arm=arm, attacker=Attacker(name=name, **more), seed=seed, backbone="tiny", recipe="tiny")


def done(one: Job) -> Outcome:
    return Outcome(job=one.described(), result=None, failed="nothing was tried")


def test_every_job_is_done_once_and_not_again(tmp_path: Path) -> None:
    jobs = [job(seed=seed) for seed in range(5)]
    seen: list[Job] = []

    def do(one: Job) -> Outcome:
        seen.append(one)
        return done(one)

    left: list[int] = []
    assert Queue(tmp_path, jobs).work(do, told=lambda a, b, open_now: left.append(open_now)) == 0
    assert Queue(tmp_path, jobs).work(do, told=lambda a, b, c: None) == 0
    assert (seen, left) == (jobs, [4, 3, 2, 1, 0])


def test_claimed_jobs_are_left_to_others(tmp_path: Path) -> None:
    jobs = [job(seed=seed) for seed in range(3)]
    queue = Queue(tmp_path, jobs)
    path = queue.path(jobs[1])
    path.parent.mkdir(parents=True)
    with FileLock(path.with_suffix(".lock")):
        assert queue.work(done, told=lambda a, b, c: None) == 1
    assert queue.open() == [jobs[1]]


def test_what_is_killed_is_taken_over(tmp_path: Path) -> None:
    one = job()
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom filelock import FileLock\n"
        "path = Path(sys.argv[1])\npath.parent.mkdir(parents=True)\n"
        "lock = FileLock(path.with_suffix('.lock'))\nlock.acquire()\nprint('held', flush=True)\ntime.sleep(60)\n"
    )
    queue = Queue(tmp_path, [one])
    holder = subprocess.Popen([sys.executable, "-c", script, str(queue.path(one))], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    assert queue.work(done, told=lambda a, b, c: None) == 1
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    assert queue.work(done, told=lambda a, b, c: None) == 0


def test_two_processes_divide_the_jobs(tmp_path: Path) -> None:
    script = (
        "import sys, time\nfrom pathlib import Path\n"
        "from tests.evaluation.test_jobs import Queue, done, job\n"
        "made = []\n"
        "def do(one):\n    made.append(one.name)\n    time.sleep(0.05)\n    return done(one)\n"
        "Queue(Path(sys.argv[1]), [job(seed=s) for s in range(12)]).work(do, told=lambda a, b, c: None)\n"
        "print(*made, sep='\\n')\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    made = [process.communicate(timeout=120)[0].split() for process in both]
    assert sorted(made[0] + made[1]) == sorted(job(seed=s).name for s in range(12))


def test_an_outcome_of_another_job_is_refused_and_a_damaged_one_named(tmp_path: Path) -> None:
    queue = Queue(tmp_path, [job("x", data=(Jpeg(quality=10),))])
    queue.work(done, told=lambda a, b, c: None)
    other = Queue(tmp_path, [job("x", data=(Jpeg(quality=20),))])
    with pytest.raises(ValueError, match="is of another job"):
        other.open()
    path = queue.path(queue.jobs[0])
    path.write_text(path.read_text().replace('"schema":1', '"schema":2'))
    with pytest.raises(ValueError, match="newer than 1"):
        queue.open()
    path.write_text("{")
    with pytest.raises(ValueError, match="delete it to do it again"):
        queue.open()
    with pytest.raises(ValueError, match="two jobs"):
        Queue(tmp_path, [job(), job()])


def test_a_real_job_stops_in_time_goes_on_and_ends_as_if_it_had_not(
    tmp_path: Path, shapes: DatasetDict, protected_once: list[Path], accelerator: Accelerator
) -> None:
    torch.set_num_threads(1)
    rows = Rows(shapes["train"], shapes["test"], rows=None, validation_rows=60, progress=False)
    one = job("jpeg", path=str(protected_once[0]), data=(Jpeg(quality=10),))

    def worker(folder: str, minutes: float | None) -> Worker:
        return Worker(rows, accelerator, checkpoints=tmp_path / folder, max_minutes=minutes, progress=False)

    whole = worker("whole", None)(one)
    assert whole.result is not None
    began, stops = time.monotonic(), 0
    while True:
        try:
            found = worker("parts", 1e-9 if stops == 0 else 0.001)(one)
            break
        except Unfinished:
            stops += 1
    assert time.monotonic() - began < 60
    assert stops >= 2
    assert found.result is not None
    assert found.result.curve == whole.result.curve
    assert (found.result.train_rows, found.result.validation_rows) == (160, 60)
    assert found.job["attacker"]["data"] == [{"name": "jpeg", "version": 1, "seed": 0, "quality": 10}]
    found.save(tmp_path / "outcome.json")
    assert Outcome.load(tmp_path / "outcome.json") == found
    assert not list((tmp_path / "parts").rglob("*.safetensors"))


def test_an_error_is_an_outcome(
    tmp_path: Path, shapes: DatasetDict, protected_once: list[Path], accelerator: Any
) -> None:
    rows = Rows(shapes["train"], shapes["test"], rows=None, validation_rows=60, progress=False)
    worker = Worker(rows, accelerator, checkpoints=tmp_path, max_minutes=None, progress=False)
    broken = dataclasses.replace(job(path=str(protected_once[0])), backbone="no-such-network")
    found = worker(broken)
    assert found.result is None
    assert "unknown network 'no-such-network'" in str(found.failed)
