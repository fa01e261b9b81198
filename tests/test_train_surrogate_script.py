"""scripts/train_surrogate.py from the command line to the protected dataset."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import load_dataset

from hf_unlearnable import ClustersPoison, MinMaxMinPoison, Surrogate
from tests.conftest import ROOT, load_script, make_dataset, noise_pictures, pixels

SCRIPT = ROOT / "scripts" / "train_surrogate.py"
QUICK = ["--method", "min-max-min", "--backbone", "tiny", "--steps", "3", "--batch-size", "8", "--no-progress", "--cpu"]
QUICK += ["--pgd-steps", "2", "--eot", "2", "--adversarial-steps", "1"]
Call = Callable[..., int]


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for split, rows, seed in (("train", 24, 0), ("test", 12, 1)):
        make_dataset(noise_pictures(rows, 16, 16, seed=seed), [i % 4 for i in range(rows)]).to_parquet(
            str(folder / f"{split}-00000-of-00001.parquet")
        )
    return folder


@pytest.fixture
def call(data: Path, tmp_path: Path) -> Call:
    main = load_script("train_surrogate").main

    def run(*extra: str, output: str = "s.safetensors") -> int:
        AcceleratorState._reset_state(reset_partial_state=True)
        return main(["--dataset", str(data), *QUICK, "--output", str(tmp_path / output), *extra])

    return run


def test_from_a_split_to_protected_pictures(
    call: Call, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("--test-split", "test", "--measure-every", "1") == 0
    assert "min-max-min, tiny, 24 rows, 3 steps" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.png", "s.safetensors"]
    known = Surrogate.load(tmp_path / "s.safetensors")
    assert known.classes == ("class0", "class1", "class2", "class3")
    assert known.settings["eot"] == 2
    assert known.provenance["recipe"]["steps"] == 3
    assert [sorted(point) for point in known.provenance["curve"]] == [["clean accuracy", "loss", "step"]] * 3
    assert str(data) not in str(known.provenance)
    protect = load_script("protect").main
    how = ["--dataset", str(data), "--poison", "min-max-min", "--surrogate", str(tmp_path / "s.safetensors")]
    protect([*how, "--output", str(tmp_path / "out")])
    published = load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    source = load_dataset(str(data), split="train", cache_dir=str(tmp_path / "cache"))
    expected = MinMaxMinPoison.from_surrogate(tmp_path / "s.safetensors").apply(source)
    assert (pixels(published) != pixels(expected)).mean() < 0.01
    assert abs(pixels(published).astype(int) - pixels(source).astype(int)).max() == 8


def test_a_stopped_training_goes_on_with_the_same_command(
    call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(output="whole.safetensors") == 0
    assert call("--max-minutes", "0") == 75
    assert "the same command goes on" in capsys.readouterr().out
    assert (tmp_path / "s.checkpoint.safetensors").exists()
    assert call("--eot", "3") == 1
    assert "is of another training: settings.eot is 2 there and 3 here" in capsys.readouterr().err
    assert call() == 0
    whole, resumed = (Surrogate.load(tmp_path / name) for name in ("whole.safetensors", "s.safetensors"))
    assert whole.secret() == resumed.secret()
    assert not (tmp_path / "s.checkpoint.safetensors").exists()
    assert call() == 1
    assert "exists: --overwrite" in capsys.readouterr().err
    assert call("--overwrite", "--seed", "1") == 0
    assert Surrogate.load(tmp_path / "s.safetensors").secret() != whole.secret()


@pytest.mark.parametrize("name", sorted(load_script("train_surrogate").METHODS))
def test_every_method_has_its_flags(name: str) -> None:
    script = load_script("train_surrogate")
    assert script.METHODS[name].name == name
    given = script.parse(["--dataset", "demo", "--method", name, "--output", "s.safetensors", "--batch-size", "7"])
    assert given.batch_size == 7
    protect = load_script("protect")
    assert protect.POISONS[name] is script.METHODS[name]


def test_overwriting_goes_on_too(call: Call, tmp_path: Path) -> None:
    assert call() == 0
    whole = Surrogate.load(tmp_path / "s.safetensors")
    assert call("--overwrite", "--max-minutes", "0") == 75
    assert call("--overwrite", "--max-minutes", "0") == 75
    assert call("--overwrite", "--max-minutes", "0") == 0
    assert Surrogate.load(tmp_path / "s.safetensors").secret() == whole.secret()


def test_protect_takes_the_rows_that_were_trained_on(data: Path, tmp_path: Path) -> None:
    main, protect = load_script("train_surrogate").main, load_script("protect").main
    file = str(tmp_path / "s.safetensors")
    how = ["--dataset", str(data), "--rows", "12"]
    assert main([*how, "--method", "ntga", "--block", "6", "--output", file, "--no-progress", "--cpu"]) == 0
    protect([*how, "--poison", "ntga", "--surrogate", file, "--output", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="expected some of the 12 pictures that the noise was made for"):
        protect([*how[:2], "--poison", "ntga", "--surrogate", file, "--output", str(tmp_path / "other")])


def test_mistakes_are_told(call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        call("--method", "min-max-mn")
    assert "did you mean 'min-max-min'" in capsys.readouterr().err
    for extra, said in (
        (["--batch-size", "25"], "at least a batch of 25 rows"),
        (["--epsilon", "3"], "epsilon is a fraction"),
        (["--backbone", "resnet81"], "unknown network 'resnet81'"),
        (["--learning-rate", "1e30"], "at step"),
        (["--label-column", "kind"], "'kind'"),
        (["--key-file", str(tmp_path / "none")], "none"),
    ):
        assert call(*extra) == 1
        assert said in capsys.readouterr().err
    assert call(output="s.pt") == 1
    assert "name of a .safetensors file" in capsys.readouterr().err
    assert not (tmp_path / "s.safetensors").exists()


@pytest.mark.slow
def test_two_processes_from_the_command_line(data: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT)]
    command += ["--dataset", str(data), *QUICK, "--test-split", "test", "--output", str(tmp_path / "s.safetensors")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("3 steps; 2 process(es)") == 1
    assert Surrogate.load(tmp_path / "s.safetensors").provenance["hardware"]["processes"] == 2


def test_clusters_need_no_labels(tmp_path: Path, data: Path) -> None:
    bare = load_dataset(str(data), split="train").remove_columns("label")
    bare.to_parquet(str(tmp_path / "bare" / "train.parquet"))
    told = ["--dataset", str(tmp_path / "bare"), "--steps", "2", "--batch-size", "8", "--no-progress", "--cpu"]
    main = load_script("train_surrogate").main
    output = ["--output", str(tmp_path / "c.safetensors")]
    small = [
        "--backbone",
        "tiny",
        "--clusters",
        "2",
        "--no-pretrained",
        "--feature-size",
        "0",
        "--generator-width",
        "8",
    ]
    assert main([*told, "--method", "clusters", *small, *output]) == 0
    poison = ClustersPoison.from_surrogate(tmp_path / "c.safetensors")
    assert not np.array_equal(pixels(poison.apply(bare)), pixels(bare))
    assert main([*told, *QUICK, *output, "--overwrite"]) == 1
