import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from hf_unlearnable.networks import create_network
from hf_unlearnable.result import Result

from .conftest import ROOT, make_dataset, noise_pictures

SCRIPT = ROOT / "scripts" / "train_victim.py"
pytestmark = pytest.mark.usefixtures("fresh_state")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_victim", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("data")
    for name, rows, seed in (("train", 60, 0), ("test", 24, 1)):
        dataset = make_dataset(noise_pictures(rows, 16, 16, seed=seed), [i % 4 for i in range(rows)])
        dataset.to_parquet(folder / f"{name}.parquet")
    return folder / "train.parquet", folder / "test.parquet"


Call = Callable[..., int]


@pytest.fixture
def call(script: ModuleType, data: tuple[Path, Path], tmp_path: Path) -> Call:
    def call(*extra: str, output: str = "run") -> int:
        AcceleratorState._reset_state(reset_partial_state=True)
        given = ["--dataset", str(data[0]), "--test-dataset", str(data[1]), "--test-split", "train", "--cpu"]
        given += ["--backbone", "tiny", "--recipe", "tiny", "--epochs", "2", "--batch-size", "16", "--no-progress"]
        return script.main([*given, "--output", str(tmp_path / output), *extra])

    return call


def test_a_run_of_two_seeds(call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--seeds", "3", "5", "--rows", "40") == 0
    told = capsys.readouterr().out
    output = tmp_path / "run"
    assert sorted(os.listdir(output)) == ["options.json", "seed-3", "seed-5", "summary.json"]
    results = [Result.load(output / f"seed-{seed}" / "result.json") for seed in (3, 5)]
    for seed, result in zip((3, 5), results, strict=True):
        files = sorted(os.listdir(output / f"seed-{seed}"))
        assert files == ["curves.png", "result.json", "victim.safetensors"]
        assert (result.seed, result.train_rows, result.validation_rows, result.test_rows) == (seed, 36, 4, 24)
        assert (result.recipe.epochs, result.recipe.batch_size, result.recipe.name) == (2, 16, "tiny")
        network = create_network("tiny", num_classes=4, image_size=16, seed=99)
        network.load_state_dict(load_file(output / f"seed-{seed}" / "victim.safetensors"))
    summary = json.loads((output / "summary.json").read_text())
    mean = sum(result.test_accuracy for result in results) / 2
    assert summary["seeds"] == [3, 5]
    assert summary["test_accuracy"]["mean"] == pytest.approx(mean)
    assert f"test accuracy after the last step   {mean:.4f} ±" in told
    assert "chance (commonest test class)       0.2500" in told
    assert "validation accuracy" in told


def test_out_of_time_and_the_same_command_goes_on(
    call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stops = 0
    while (status := call("--max-minutes", "0", "--seeds", "0", "1")) == 75:
        stops += 1
        assert not (tmp_path / "run" / "summary.json").exists()
    assert (status, stops) == (0, 2 * (2 * 4 - 1))
    assert "out of time: stopped after step 3 of 8" in capsys.readouterr().out
    assert call("--seeds", "0", "1", output="whole") == 0
    for seed in ("seed-0", "seed-1"):
        one, other = (load_file(tmp_path / run / seed / "victim.safetensors") for run in ("run", "whole"))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_is_there_is_not_replaced_unasked(call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call() == 0
    result = tmp_path / "run" / "seed-0" / "result.json"
    before = result.read_text()
    assert call() == 1
    assert "holds this run, finished" in capsys.readouterr().err
    assert call("--learning-rate", "0.01") == 1
    assert "holds another run (learning_rate=None)" in capsys.readouterr().err
    assert result.read_text() == before
    assert call("--seeds", "0", "1") == 0
    assert result.read_text() == before, "a finished seed is not trained again"
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["seeds"] == [0, 1]
    assert call("--learning-rate", "0.01", "--overwrite") == 0
    assert Result.load(result).recipe.learning_rate == 0.01
    assert not (tmp_path / "run" / "seed-1").exists()


def test_a_folder_of_something_else_is_left_alone(
    call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run" / "seed-0").mkdir(parents=True)
    (tmp_path / "run" / "seed-0" / "thesis.txt").write_text("years of work")
    for extra in ([], ["--overwrite"]):
        assert call(*extra) == 1
        assert "is not a run of this script" in capsys.readouterr().err
    assert (tmp_path / "run" / "seed-0" / "thesis.txt").exists()


def test_unknown_names_are_answered_with_near_ones(call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    for option, name, near in (("--recipe", "tinny", "'tiny'"), ("--defense", "ermm", "'erm'")):
        with pytest.raises(SystemExit, match="2"):
            call(option, name)
        assert f"did you mean {near}" in capsys.readouterr().err
    assert call("--backbone", "resnet81", output="b") == 1
    assert "resnet18" in capsys.readouterr().err
    assert call("--image-column", "picture", output="c") == 1
    assert "image_column='picture' is not a column" in capsys.readouterr().err
    assert call("--test-dataset", "/nowhere/at/all", output="d") == 1
    assert "there is no /nowhere/at/all" in capsys.readouterr().err


def test_a_diverging_training_ends_with_status_1(call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--learning-rate", "1e30") == 1
    assert "lower the learning rate" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_from_the_command_line(data: tuple[Path, Path], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT)]
    command += ["--dataset", str(data[0]), "--test-dataset", str(data[1]), "--test-split", "train"]
    command += ["--backbone", "tiny", "--recipe", "tiny", "--epochs", "1", "--batch-size", "16"]
    command += ["--output", str(tmp_path / "run"), "--cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("test accuracy after the last step") == 1
    assert Result.load(tmp_path / "run" / "seed-0" / "result.json").hardware["processes"] == 2
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert again.returncode != 0
    assert again.stderr.count("holds this run, finished") == 1
