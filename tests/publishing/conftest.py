"""A local Hub for each test, and the clients of this process turned towards it."""

import os
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import datasets.config
import huggingface_hub.constants
import huggingface_hub.hf_api
import pytest
from datasets import Dataset
from huggingface_hub import HfFileSystem
from huggingface_hub.utils import close_session

from hf_unlearnable import CudaPoison
from hf_unlearnable.protect import protect
from tests.publishing.local_hub import Hub

TOKENS = {"good": "owner", "other": "stranger"}
UPLOADS_WARN = "Use 'content=<...>' to upload raw bytes"  # huggingface_hub 2.4 passes files as `data`
SLEEPERS = (
    "hf_unlearnable.publishing.hub",
    "huggingface_hub.utils._http",
    "huggingface_hub.file_download",
    "datasets.arrow_dataset",
    "datasets.dataset_dict",
    "datasets.utils.file_utils",
)


ID = "owner/pictures"
SECRET = bytes(range(32))


def numbers(n: int = 4) -> Dataset:
    """A dataset that is quick to push."""
    return Dataset.from_dict({"n": list(range(n))})


def shards(hub: Hub) -> list[str]:
    """The parquet files of `ID`."""
    return [path for path in hub.files("dataset", ID) if path.endswith(".parquet")]


@pytest.fixture
def hub(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An empty Hub with the users "owner" (token "good") and "stranger" (token "other"); nobody is logged in.

    Clients of this process and its children reach this Hub only, whatever HF_HUB_OFFLINE says, through caches of the
    test's own. Where they would sleep between tries, they add the seconds to `hub.slept`.
    """
    with Hub(TOKENS, tmp_path_factory.mktemp("hf_home")) as local, warnings.catch_warnings():
        warnings.filterwarnings("ignore", UPLOADS_WARN, DeprecationWarning)
        set_environment(monkeypatch, local.environment())
        point_clients(monkeypatch, local)
        forget_connections()
        yield local
        forget_connections()
    assert not local.errors, "\n".join(local.errors)


@pytest.fixture
def logged_in(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The Hub, where clients of this process and its children are "owner" without being told."""
    monkeypatch.setenv("HF_TOKEN", "good")
    return hub


def set_environment(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    for name in set(os.environ) - set(environment):
        monkeypatch.delenv(name)
    for name, value in environment.items():
        if os.environ.get(name) != value:
            monkeypatch.setenv(name, value)


def point_clients(monkeypatch: pytest.MonkeyPatch, hub: Hub) -> None:
    """What the clients read from the environment when they are imported, once more."""
    cache, datasets_cache = hub.home / "hub", hub.home / "datasets"
    of_hub = {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HOME": str(hub.home),
        "HF_HUB_CACHE": str(cache),
        "HF_ASSETS_CACHE": str(hub.home / "assets"),
        "HF_TOKEN_PATH": str(hub.home / "token"),
        "HF_STORED_TOKENS_PATH": str(hub.home / "stored_tokens"),
        "AGENT_HARNESSES_PATH": str(hub.home / "agent_harnesses.json"),
    }
    of_datasets = {
        "HF_ENDPOINT": hub.url,
        "HUB_DATASETS_URL": hub.url + "/datasets/{repo_id}/resolve/{revision}/{path}",
        "HF_HUB_OFFLINE": False,
        "HF_DATASETS_OFFLINE": False,
        "HF_UPDATE_DOWNLOAD_COUNTS": False,
        "HF_CACHE_HOME": str(hub.home),
        "HF_DATASETS_CACHE": datasets_cache,
        "HF_MODULES_CACHE": hub.home / "modules",
        "DOWNLOADED_DATASETS_PATH": datasets_cache / "downloads",
        "EXTRACTED_DATASETS_PATH": datasets_cache / "downloads" / "extracted",
    }
    for module, values in ((huggingface_hub.constants, of_hub), (datasets.config, of_datasets)):
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
    clock = SimpleNamespace(**vars(time) | {"sleep": hub.slept.append})
    for module in SLEEPERS:
        monkeypatch.setattr(f"{module}.time", clock)


def forget_connections() -> None:
    """File systems remember what was in a repository, and ports are given out again."""
    HfFileSystem.clear_instance_cache()
    close_session()


@pytest.fixture
def folder(small: Dataset, tmp_path: Path) -> Path:
    """A protected folder under the secret key."""
    protect(small, CudaPoison(seed=SECRET), tmp_path / "out", source="somebody/small", progress=False)
    return tmp_path / "out"
