"""Shared fixtures: real pictures where they are, small pictures that the tests make, and guards over every test."""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from jaxtyping import install_import_hook

from tests import typecheck

with install_import_hook("hf_unlearnable", f"{typecheck.__name__}.check"):
    import hf_unlearnable

import datasets
from datasets import ClassLabel, Dataset, Features, Image, Value

datasets.disable_progress_bars()
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real pictures; tests that need it are skipped where there is none."""
    folder = Path(os.environ.get("UNLEARNABLE_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real pictures: neither $UNLEARNABLE_DATA nor {folder.name} beside the checkout")
    return folder


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    """Of one process, and forgotten after the test."""
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads only cost time on networks as small as those of tests."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fresh_state(one_thread: None) -> Iterator[None]:
    """For tests that make accelerators of their own: one thread, and none of them is left."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def global_randomness_untouched() -> Iterator[None]:
    """No test may find that the library has drawn from a global generator."""
    before = np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    yield
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), before[0], strict=True)), "numpy's was used"  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[1]), "torch's was used"


@pytest.fixture(autouse=True)
def quiet_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def noise_pictures(rows: int, height: int = 32, width: int = 32, seed: int = 0) -> np.ndarray:
    """Smooth random pictures, uint8 of shape (rows, height, width, 3)."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (rows, -(-height // 8), -(-width // 8), 3)).repeat(8, 1).repeat(8, 2)
    fine = generator.integers(-20, 21, (rows, height, width, 3))
    return np.clip(coarse[:, :height, :width] + fine, 0, 255).astype(np.uint8)


@pytest.fixture
def small() -> Dataset:
    """24 lossless pictures of 32 x 32 in 4 classes, with another column."""
    return make_dataset(noise_pictures(24), [i % 4 for i in range(24)])


def make_dataset(pictures: np.ndarray | list, labels: list, classes: int = 4) -> Dataset:
    features = Features(
        {"img": Image(), "label": ClassLabel(names=[f"class{i}" for i in range(classes)]), "name": Value("string")}
    )
    import PIL.Image

    values = [p if not isinstance(p, np.ndarray) else PIL.Image.fromarray(p) for p in pictures]
    names = [f"picture {i}" for i in range(len(values))]
    return Dataset.from_dict({"img": values, "label": labels, "name": names}, features=features)


def pixels(dataset: Dataset, column: str = "img") -> np.ndarray:
    """What a reader of the dataset sees, uint8 of shape (rows, height, width, channels)."""
    return np.stack([np.asarray(row[column]) for row in dataset])


def load_script(name: str) -> ModuleType:
    """A script as a module, so that its `main(argv)` runs in this process."""
    spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


__all__ = ["hf_unlearnable", "load_script", "make_dataset", "noise_pictures", "pixels"]
