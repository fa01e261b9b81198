"""scripts/protect.py, shard by shard."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from datasets import Dataset

from hf_unlearnable import CudaPoison
from hf_unlearnable.record import Record
from tests.conftest import ROOT, load_script
from tests.sharding.conftest import copied, same_pixels


@pytest.fixture
def script() -> ModuleType:
    return load_script("protect")


@pytest.fixture
def key(tmp_path: Path) -> Path:
    (tmp_path / "key").write_text(bytes(range(32)).hex())
    return tmp_path / "key"


SECRET = bytes(range(32))


def test_three_shards_and_a_merge(
    parquet: Path,
    small: Dataset,
    key: Path,
    tmp_path: Path,
    script: ModuleType,
    read: Callable[[Path], Dataset],
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "out"
    common = ["--dataset", str(parquet), "--streaming", "--poison", "cuda", "--key-file", str(key)]
    common += ["--output", str(output), "--batch-size", "5"]
    for shard in (2, 3, 1):
        if shard == 1:
            with pytest.raises(SystemExit, match=r"\[1\] of 3 shards are missing"):
                script.main(["--merge", "--output", str(output)])
        script.main([*common, "--shard", f"{shard}/3"])
        assert f"made shards [{shard}]" in capsys.readouterr().out
    script.main([*common, "--shard", "2/3"])
    assert "nothing was missing" in capsys.readouterr().out
    script.main(["--merge", "--output", str(output)])
    assert "24 of 24 pictures changed by cuda" in capsys.readouterr().out
    assert same_pixels(read(output), CudaPoison(seed=SECRET).apply(small))
    script.main(["--merge", "--output", str(output)])
    with pytest.raises(SystemExit, match="is finished"):
        script.main([*common, "--shard", "2/3"])


def test_alone_it_merges_by_itself_into_any_storage(
    parquet: Path,
    small: Dataset,
    tmp_path: Path,
    script: ModuleType,
    memory: Any,
    read: Callable[[Path], Dataset],
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["--dataset", str(parquet), "--streaming", "--poison", "cuda", "--seed", "7", "--record-seed"]
    script.main([*command, "--output", "memory://bucket/protected", "--num-shards", "2"])
    assert "copy the folder to this machine, and then" in capsys.readouterr().out, "evaluate.py reads folders alone"
    here = copied(memory, "/bucket/protected", tmp_path / "copy")
    assert sorted(p.name for p in here.iterdir()) == ["README.md", "data", "preview.png", "record.json"]
    assert Record.load(here / "record.json").key == {"kind": "int", "commitment": None, "seed": 7}
    assert same_pixels(read(here), CudaPoison(seed=7).apply(small))


def test_ranks_take_their_shards_and_leave_the_merge(
    parquet: Path,
    tmp_path: Path,
    script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    common = ["--dataset", str(parquet), "--streaming", "--poison", "random-noise", "--seed", "7"]
    common += ["--output", str(tmp_path / "out"), "--num-shards", "5"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, made in (("0", [1, 3, 5]), ("1", [2, 4])):
        monkeypatch.setenv("RANK", rank)
        script.main(common)
        assert f"made shards {made}" in capsys.readouterr().out
    assert not (tmp_path / "out" / "record.json").exists()
    with pytest.raises(SystemExit, match="--shard is for one process, got 2"):
        script.main([*common, "--shard", "1/5"])
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.delenv("RANK")
    script.main(["--merge", "--output", str(tmp_path / "out")])
    assert "24 of 24 pictures changed" in capsys.readouterr().out


@pytest.mark.slow
def test_torchrun(parquet: Path, small: Dataset, tmp_path: Path, read: Callable[[Path], Dataset]) -> None:
    script = str(ROOT / "scripts" / "protect.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29577", script]
    command += ["--dataset", str(parquet), "--streaming", "--poison", "cuda", "--seed", "7"]
    subprocess.run([*command, "--output", str(tmp_path / "out")], check=True, timeout=200)
    subprocess.run([sys.executable, script, "--merge", "--output", str(tmp_path / "out")], check=True, timeout=100)
    assert len(Record.load(tmp_path / "out" / "record.json").published["files"]) == 2
    assert same_pixels(read(tmp_path / "out"), CudaPoison(seed=7).apply(small))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shard", "0/3"], "from 1/64 to 64/64, got '0/3'"),
        (["--shard", "4/3"], "got '4/3'"),
        (["--shard", "3"], "got '3'"),
        (["--shard", "1/3", "--num-shards", "4"], "differ"),
        (["--num-shards", "25"], "at most 24 shards, as many as there are rows"),
        (["--num-shards", "0"], "expected 1 shard or more"),
        (["--rows", "3"], "--rows is not for --streaming"),
        (["--num-proc", "2"], "--num-proc is not for --streaming"),
        (["--overwrite"], "--overwrite is not for --streaming"),
        (["--on-error", "ignore"], "invalid choice"),
        (["--batch-size", "0"], "batch size of 1 or more"),
        (["--read-back-every", "0"], "read_back_every is 1 or more, got 0"),
        (["--merge"], "--merge needs --output only"),
    ],
)
def test_what_is_wrong_is_said(
    arguments: list[str],
    message: str,
    parquet: Path,
    tmp_path: Path,
    script: ModuleType,
    capsys: pytest.CaptureFixture[str],
) -> None:
    common = ["--dataset", str(parquet), "--streaming", "--poison", "cuda", "--seed", "7"]
    with pytest.raises(SystemExit) as stopped:
        script.main([*common, "--output", str(tmp_path / "out"), *arguments])
    assert message in f"{stopped.value} {capsys.readouterr().err}"
    assert not (tmp_path / "out").exists()


def test_flags_that_need_streaming(parquet: Path, tmp_path: Path, script: ModuleType) -> None:
    common = ["--dataset", str(parquet), "--poison", "cuda", "--seed", "7", "--output", str(tmp_path / "out")]
    flags = {"--shard": "1/3", "--num-shards": "3", "--on-error": "skip", "--container": "parquet"}
    for flag, value in {**flags, "--read-back-every": "2"}.items():
        with pytest.raises(SystemExit, match=f"{flag} is for --streaming"):
            script.main([*common, flag, value])
    with pytest.raises(SystemExit, match="ops is fitted to a whole split"):
        script.main(["--streaming", *[argument if argument != "cuda" else "ops" for argument in common]])
