"""Protected folders to be changed."""

import shutil
from pathlib import Path

import pytest

from hf_unlearnable import CudaPoison, RandomNoisePoison
from hf_unlearnable import protect as protecting
from hf_unlearnable.protect import protect
from tests.gate.folders import SECRET, source


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("originals")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "home"))
        protect(source(), CudaPoison(seed=SECRET), folder / "cuda", source="me/small", progress=False)
        noise = RandomNoisePoison(seed=SECRET, poison_rate=0.5, classes=(0, 2))
        protect(source(), noise, folder / "noise", source="me/small", progress=False)
        patch.setattr(protecting, "SHARD_BYTES", source().data.nbytes // 3)
        whole = RandomNoisePoison(seed=SECRET)
        protect(source(), whole, folder / "whole", source="me/small", progress=False)
    return folder


@pytest.fixture
def cuda(originals: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals / "cuda", tmp_path / "cuda"))


@pytest.fixture
def noise(originals: Path, tmp_path: Path) -> Path:
    """Half of the rows of classes 0 and 2, under 8/255."""
    return Path(shutil.copytree(originals / "noise", tmp_path / "noise"))


@pytest.fixture
def whole(originals: Path, tmp_path: Path) -> Path:
    """All rows, under 8/255, in several files."""
    return Path(shutil.copytree(originals / "whole", tmp_path / "whole"))
