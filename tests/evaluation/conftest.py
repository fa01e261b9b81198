"""A small protected dataset, made once, and the clean pictures behind it."""

import shutil
from pathlib import Path

import pytest
from datasets import DatasetDict

from hf_unlearnable import LspPoison, demo
from hf_unlearnable.protect import protect


@pytest.fixture(scope="session")
def shapes() -> DatasetDict:
    return demo.shapes(train_rows=160, test_rows=200)


@pytest.fixture(scope="session")
def protected_once(shapes: DatasetDict, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same rows under two keys."""
    root = tmp_path_factory.mktemp("protected")
    for seed in (0, 1):
        protect(shapes["train"], LspPoison(seed=seed), root / f"lsp-{seed}", source="demo", progress=False)
    return [root / "lsp-0", root / "lsp-1"]


@pytest.fixture
def place(shapes: DatasetDict, protected_once: list[Path], tmp_path: Path) -> Path:
    """A folder with a clean and a protected dataset."""
    for split, rows in shapes.items():
        rows.to_parquet(str(tmp_path / "shapes" / "data" / f"{split}-00000-of-00001.parquet"))
    shutil.copytree(protected_once[0], tmp_path / "lsp")
    return tmp_path
