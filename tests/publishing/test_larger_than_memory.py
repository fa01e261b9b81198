"""Publishing and verifying hold a batch of rows and a file, however many there are: the real command, by itself."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, Features, Image, Value

from hf_unlearnable import RandomNoisePoison
from hf_unlearnable.images import Picture, encode
from hf_unlearnable.protect import protect
from tests.conftest import ROOT
from tests.publishing.local_hub import Hub

SECRET = bytes(range(32))
MEASURED = """
import runpy, sys
script, sys.argv = sys.argv[1], sys.argv[1:]
try:
    runpy.run_path(script, run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
told = dict(line.split(":", 1) for line in open("/proc/self/status"))
print("peak", int(told["VmHWM"].split()[0]) // 1024)
"""


def incompressible(rows: int, side: int = 128) -> Dataset:
    """Pictures of noise: of 128 x 128 pixels about 50 kB each, of 8 x 8 some 250 bytes."""
    import torch

    generator = torch.Generator().manual_seed(0)

    def pictures():
        for _ in range(rows):
            pixels = torch.randint(0, 256, (3, side, side), generator=generator, dtype=torch.uint8)
            yield {"img": {"bytes": encode(Picture(pixels)), "path": None}, "label": 0}

    return Dataset.from_generator(pictures, features=Features({"img": Image(), "label": Value("int64")}))  # type: ignore[return-value]


pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to see the peak")


def peak(script: str, *arguments: str, hub: Hub) -> int:
    """MiB that a script took at most."""
    command = [sys.executable, "-c", MEASURED, str(ROOT / "scripts" / script), *arguments, "--no-progress"]
    done = subprocess.run(
        command, env=hub.environment("good"), capture_output=True, text=True, timeout=3600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return int(done.stdout.rsplit("peak", 1)[1])


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(
    logged_in: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("hf_unlearnable.protect.SHARD_BYTES", 10_000_000)
    found: dict[tuple[str, int], int] = {}
    for rows in (400, 1600):
        folder = tmp_path / str(rows)
        protect(incompressible(rows), RandomNoisePoison(seed=SECRET), folder, source="noise", batch_size=100)
        size = sum(path.stat().st_size for path in (folder / "data").iterdir())
        assert size > 48_000 * rows
        repo = f"owner/noise-{rows}"
        found["publish", rows] = peak(
            "publish.py", str(folder), "--repo-id", repo, "--batch-size", "100", hub=logged_in
        )
        found["verify", rows] = peak("verify.py", repo, "--batch-size", "100", hub=logged_in)
    with capsys.disabled():
        sys.stdout.write(f"{found}\n")
    for script in ("publish", "verify"):
        assert found[script, 1600] - found[script, 400] < 30, found
    assert np.all(np.array(list(found.values())) < 1500)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [10_000, 100_000, 1_000_000])
def test_memory_of_a_million_rows(
    rows: int, logged_in: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder is larger with every step, the peak is not: each keeps to one ceiling."""
    monkeypatch.setattr("hf_unlearnable.protect.SHARD_BYTES", 10_000_000)
    folder, repo = tmp_path / "out", f"owner/noise-{rows}"
    poison = RandomNoisePoison(seed=SECRET)
    protect(incompressible(rows, side=8), poison, folder, source="noise", batch_size=1000)
    found = {
        script: peak(f"{script}.py", *what, hub=logged_in)
        for script, what in {"publish": (str(folder), "--repo-id", repo), "verify": (repo,)}.items()
    }
    with capsys.disabled():
        sys.stdout.write(f"{rows} rows: {found}\n")
    assert max(found.values()) < 1100, found
