"""What a repository holds already is looked at before anything is sent to it."""

import json
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, load_dataset

from hf_unlearnable import CudaPoison
from hf_unlearnable.protect import protect
from hf_unlearnable.publishing.hub import HubError, Repository
from hf_unlearnable.publishing.push import Words, publish
from hf_unlearnable.record import Record
from tests.conftest import pixels
from tests.publishing.conftest import SECRET
from tests.publishing.local_hub import Hub
from tests.publishing.test_publish import MINE, send


def test_a_repository_with_a_stray_shard_is_not_called_finished_as_it_is(
    logged_in: Hub, folder: Path, small: Dataset, tmp_path: Path
) -> None:
    send(folder)
    small.to_parquet(tmp_path / "more.parquet")
    Repository(MINE).commit("more", {"data/train-00001-of-00002.parquet": tmp_path / "more.parquet"})
    send(folder)
    assert [path for path in logged_in.files("dataset", MINE) if path.startswith("data/")] == [
        "data/train-00000-of-00001.parquet"
    ]
    assert np.array_equal(pixels(load_dataset(MINE, split="train")), pixels(CudaPoison(seed=SECRET).apply(small)))


def test_a_record_on_the_hub_that_is_none_is_replaced(logged_in: Hub, folder: Path) -> None:
    send(folder)
    for content in (b"no json", b'{"schema": 1, "source": {}}'):
        Repository(MINE).commit("damage", {"results/default/record.json": content})
        send(folder)
        assert (
            Record.load(folder / "record.json").source
            == json.loads(logged_in.files("dataset", MINE)["results/default/record.json"])["source"]
        )


def test_data_that_we_did_not_publish_are_not_touched(logged_in: Hub, folder: Path, small: Dataset) -> None:
    small.push_to_hub(MINE)
    before = logged_in.files("dataset", MINE)
    with pytest.raises(HubError, match="already holds data/train-00000-of-00001.parquet .* choose another"):
        send(folder)
    assert logged_in.files("dataset", MINE) == before


def test_another_split_does_not_replace_the_record_of_the_first(
    logged_in: Hub, folder: Path, small: Dataset, tmp_path: Path
) -> None:
    send(folder)
    before = logged_in.files("dataset", MINE)
    protect(small, CudaPoison(seed=SECRET), tmp_path / "v", source="x", split="validation", progress=False)
    with pytest.raises(HubError, match="holds the split 'train', .* choose another --config-name"):
        send(tmp_path / "v")
    assert logged_in.files("dataset", MINE) == before
    send(tmp_path / "v", config="held-out")
    assert len(load_dataset(MINE, "held-out", split="validation")) == 24


def test_a_dry_run_sends_nothing(logged_in: Hub, folder: Path) -> None:
    done = publish(folder, Repository(MINE), dry_run=True, progress=False)
    assert "not measured" in done.page
    assert set(done.files) == {"assets/default/preview.png", "results/default/record.json"}
    assert done.unseen is None
    told = [request.path for request in logged_in.requests if request.method != "GET"]
    assert told == ["/api/validate-yaml"]
    assert not logged_in.files("dataset", MINE)
    logged_in.stop()
    unseen = publish(folder, Repository(MINE), dry_run=True, progress=False)
    assert "cannot be reached" in (unseen.unseen or "")
    assert unseen.page == done.page


@pytest.mark.parametrize(
    ("readme", "message"),
    [
        ("---\nlicense: mit\n---\n", "metadata say license 'mit', expected 'cc0-1.0'"),
        ("---\nlicense: [\n---\n", "expected front matter in YAML"),
        ("---\ntags: none such\nlicense: cc0-1.0\nlanguage: 7\n---\n", "the Hub refuses the card's front matter"),
        ("<!-- hf_unlearnable: default -->\n", "put the end back"),
    ],
)
@pytest.mark.parametrize("dry_run", [True, False])
def test_an_existing_card_is_looked_at_before_anything_is_sent(
    logged_in: Hub, folder: Path, readme: str, message: str, dry_run: bool
) -> None:
    repository = Repository(MINE)
    repository.create(private=None)
    own = logged_in.store.repos["datasets", MINE]
    own.commit("main", "mine", {"README.md": logged_in.store.keep(readme.encode())})  # the client would refuse some
    before = logged_in.files("dataset", MINE)
    with pytest.raises((ValueError, HubError), match=message):
        publish(folder, repository, dry_run=dry_run, words=Words(license="cc0-1.0"), progress=False)
    assert logged_in.files("dataset", MINE) == before


def test_metadata_that_the_hub_refuses_leave_no_repository_behind(logged_in: Hub, folder: Path) -> None:
    with pytest.raises(HubError, match="refuses the card's front matter"):
        send(folder, words=Words(license="no such licence!"))
    assert not logged_in.asked("POST", "/api/repos/create")
