"""Scripts in processes of their own, watched from outside: when what happened, processor time, peak memory."""

import os
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

PAUSE = 0.02


@dataclass(frozen=True, kw_only=True)
class Job:
    """A script to run.

    Args:
        environment: beside this process's own.
        core: the only processor it may run on; None for all.
    """

    script: Path
    arguments: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    core: int | None = None


@dataclass(frozen=True)
class Moment:
    """What was true at a moment: seconds since the start, processor seconds of all jobs, peak MiB of the largest."""

    seconds: float
    cpu: float
    mib: float


def watch(
    jobs: Sequence[Job], marks: Mapping[str, Callable[[], bool]] | None = None, *, fork: bool = False
) -> dict[str, Moment]:
    """Run jobs at once until all have ended; the moments at which each mark was first true, and "end".

    Peak memory is the resident set that Linux keeps for each process (`VmHWM`; what `getrusage` tells of a child holds
    its parent's too). Looked at every 20 ms.

    Args:
        fork: run the scripts in forks of this process, which imports what they import: quick, and no measurement.

    Raises:
        OSError: there is no /proc.
        RuntimeError: a job failed (with the end of what it printed), or a mark was never true.
    """
    if not Path("/proc/self/status").exists():
        raise OSError("expected Linux's /proc, which tells a process's memory; there is none")
    marks, found = marks or {}, {}
    began, running, cpu, mib = time.perf_counter(), {}, {}, {}
    now = Moment(0.0, 0.0, 0.0)
    try:
        for job in jobs:
            log = tempfile.TemporaryFile()  # noqa: SIM115 (closed when the job has ended)
            pid = _fork(job, log) if fork else _spawn(job, log)
            running[pid] = (job, log)
            if job.core is not None:
                os.sched_setaffinity(pid, {job.core})
        while running:
            time.sleep(PAUSE)
            for pid in list(running):
                ended, status, usage = os.wait4(pid, os.WNOHANG)
                if not ended:
                    cpu[pid], mib[pid] = _look(pid, (cpu.get(pid, 0.0), mib.get(pid, 0.0)))
                    continue
                job, log = running.pop(pid)
                cpu[pid] = usage.ru_utime + usage.ru_stime
                _check(job, log, os.waitstatus_to_exitcode(status))
            now = Moment(time.perf_counter() - began, sum(cpu.values()), max(mib.values(), default=0.0))
            for name, happened in marks.items():
                if name not in found and happened():
                    found[name] = now
    finally:
        for pid, (_, log) in running.items():
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            log.close()
    missing = sorted(set(marks) - set(found))
    if missing:
        raise RuntimeError(f"{[job.script.name for job in jobs]} ended, and {missing} never happened")
    return {**found, "end": now}


def _spawn(job: Job, log: IO[bytes]) -> int:
    return os.posix_spawn(
        sys.executable,
        [sys.executable, str(job.script), *job.arguments],
        {**os.environ, **job.environment},
        file_actions=[(os.POSIX_SPAWN_DUP2, log.fileno(), descriptor) for descriptor in (1, 2)],
    )


def _fork(job: Job, log: IO[bytes]) -> int:
    runpy.run_path(str(job.script), run_name="imported")  # so that the forks need not import the same each
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        for descriptor in (1, 2):
            os.dup2(log.fileno(), descriptor)
        os.environ.update(job.environment)
        sys.argv = [str(job.script), *job.arguments]
        runpy.run_path(str(job.script), run_name="__main__")
        code = 0
    except SystemExit as stopped:
        code = stopped.code if isinstance(stopped.code, int) else 0 if stopped.code is None else 1
        if isinstance(stopped.code, str):
            os.write(2, stopped.code.encode())
    finally:
        error = sys.exception()
        if error is not None:
            sys.excepthook(type(error), error, error.__traceback__)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _look(pid: int, last: tuple[float, float]) -> tuple[float, float]:
    """Processor seconds and peak MiB so far; the last ones of a process that is just ending."""
    try:
        spent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return last
    peak = next((int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM")), last[1])
    return (int(spent[11]) + int(spent[12])) / os.sysconf("SC_CLK_TCK"), peak


def _check(job: Job, log: IO[bytes], code: int) -> None:
    log.seek(0)
    with log:
        told = log.read().decode(errors="replace")[-2000:]
    if code:
        raise RuntimeError(f"{job.script.name} {' '.join(job.arguments)} ended with {code}: {told.strip()}")
