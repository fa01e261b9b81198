"""The local Hub against the real clients: what is pushed is what is loaded."""

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import safetensors.torch
import torch
from datasets import Dataset, DatasetDict, IterableDataset, load_dataset
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import CommitOperationCopy, CommitOperationDelete, DatasetCard, HfApi, hf_hub_download
from huggingface_hub.errors import BadRequestError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import get_session

from tests.conftest import make_dataset, noise_pictures
from tests.publishing.conftest import ID, numbers, shards
from tests.publishing.local_hub import Hub

CARD = "---\nlicense: mit\ntags:\n- mine\n---\n# Words of the owner\n"


def mixed() -> Dataset:
    """Pictures of several sizes and modes, stored as PNG."""
    noise = noise_pictures(6, 24, 40)
    modes = ["RGB", "L", "RGBA", "P", "RGB", "LA"]
    pictures = [PIL.Image.fromarray(n).convert(mode) for n, mode in zip(noise, modes, strict=True)]
    pictures[4] = pictures[4].crop((0, 0, 7, 5))
    return make_dataset(pictures, [0, 1, 2, 3, 0, 1])


def assert_same(got: Dataset | IterableDataset, expected: Dataset) -> None:
    assert got.features == expected.features
    rows = list(got)
    assert len(rows) == len(expected)
    for row, wanted in zip(rows, expected, strict=True):
        assert {**row, "img": None} == {**wanted, "img": None}
        assert row["img"].mode == wanted["img"].mode
        assert np.array_equal(np.asarray(row["img"]), np.asarray(wanted["img"]))


def test_round_trip(logged_in: Hub) -> None:
    source = mixed()
    source.push_to_hub(ID, num_shards=2)
    assert shards(logged_in) == [f"data/train-0000{i}-of-00002.parquet" for i in (0, 1)]
    back = load_dataset(ID, split="train")
    assert_same(back, source)
    assert back[0]["img"].format == "PNG"
    assert Path(back.cache_files[0]["filename"]).is_relative_to(logged_in.home)
    assert not logged_in.slept
    assert all(request.user == "owner" for request in logged_in.requests if request.method != "PUT")


def test_streamed_both_ways(logged_in: Hub, tmp_path: Path) -> None:
    source = mixed()
    for i in range(3):
        source.shard(3, i, contiguous=True).to_parquet(tmp_path / f"{i}.parquet")
    streamed = load_dataset("parquet", data_files=str(tmp_path / "*.parquet"), streaming=True, split="train")
    assert isinstance(streamed, IterableDataset)
    streamed.push_to_hub(ID)
    assert len(shards(logged_in)) == 3
    assert_same(load_dataset(ID, split="train"), source)
    asked = len(logged_in.requests)
    assert_same(load_dataset(ID, split="train", streaming=True), source)
    assert not any(r.method == "GET" and "resolve" in r.path and r.status == 404 for r in logged_in.requests[asked:])


def test_second_config_and_split(logged_in: Hub) -> None:
    DatasetDict(train=numbers(), test=numbers(2)).push_to_hub(ID)
    numbers(3).push_to_hub(ID, config_name="half", split="test")
    stems = ["data/test", "data/train", "half/test"]
    assert shards(logged_in) == [f"{stem}-00000-of-00001.parquet" for stem in stems]
    assert load_dataset(ID, "half").num_rows == {"test": 3}
    assert load_dataset(ID).num_rows == {"train": 4, "test": 2}


def test_pushing_a_split_again_replaces_its_shards(logged_in: Hub) -> None:
    numbers(9).push_to_hub(ID, num_shards=3)
    numbers(2).push_to_hub(ID, split="test")
    numbers(5).push_to_hub(ID, num_shards=1)
    assert shards(logged_in) == ["data/test-00000-of-00001.parquet", "data/train-00000-of-00001.parquet"]
    assert load_dataset(ID).num_rows == {"train": 5, "test": 2}


def test_same_bytes_are_not_sent_twice(logged_in: Hub) -> None:
    numbers().push_to_hub(ID)
    sent = len(logged_in.asked("PUT"))
    numbers().push_to_hub(ID)
    numbers().push_to_hub("owner/copy")
    assert len(logged_in.asked("PUT")) == sent == 1


def test_branch(logged_in: Hub) -> None:
    numbers(4).push_to_hub(ID)
    numbers(7).push_to_hub(ID, revision="draft/1")
    assert load_dataset(ID, split="train").num_rows == 4
    assert load_dataset(ID, split="train", revision="draft/1").num_rows == 7
    api = HfApi()
    heads = {b.name: b.target_commit for b in api.list_repo_refs(ID, repo_type="dataset").branches}
    assert heads.keys() == {"main", "draft/1"}
    history = api.list_repo_commits(ID, repo_type="dataset", revision="draft/1")
    assert [c.title for c in history] == ["Upload dataset", "Upload dataset", "initial commit"]
    assert [c.commit_id for c in history[:2]] == [heads["draft/1"], heads["main"]]
    with pytest.raises(RevisionNotFoundError):
        api.repo_info(ID, repo_type="dataset", revision="none")


def test_private_repository(hub: Hub) -> None:
    numbers().push_to_hub(ID, token="good", private=True)
    for token in (False, "other"):
        with pytest.raises(DatasetNotFoundError):
            load_dataset(ID, token=token)
        with pytest.raises(RepositoryNotFoundError):
            HfApi(token=token).repo_info(ID, repo_type="dataset")
    assert load_dataset(ID, token="good", split="train").num_rows == 4
    HfApi(token="good").update_repo_settings(ID, repo_type="dataset", private=False)
    assert load_dataset(ID, token="other", split="train", download_mode="force_redownload").num_rows == 4


def test_card_keeps_what_the_owner_wrote(logged_in: Hub) -> None:
    HfApi().create_repo(ID, repo_type="dataset")
    DatasetCard(CARD).push_to_hub(ID)
    numbers().push_to_hub(ID)
    card = DatasetCard.load(ID)
    assert card.data.license == "mit"
    assert card.data.tags == ["mine"]
    assert card.data.to_dict()["dataset_info"]["splits"][0]["num_examples"] == 4
    card.text += "\nmore"
    card.push_to_hub(ID)
    text = logged_in.files("dataset", ID)["README.md"].decode()
    assert "# Words of the owner" in text
    assert text.endswith("more")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("license: 5", '"license" must be one of'),
        ("license: [mit, Apache 2]", '"license" must be one of'),
        ("size_categories: [n<2K]", '"size_categories" must be one of'),
        ("tags: poison", '"tags" must be an array'),
        ("language: EN", '"language" must only contain lowercase'),
        ("dataset_info: many", '"dataset_info" must be of type object'),
        ("configs: [{data_files: x}]", '"configs" must be an array'),
        ("a: [{b.c: 1}]", "can't have a key"),
        ("a: [", "Invalid YAML"),
        ("[a]", "of type object"),
        ("model-index: [{name: m, results: [{task: {type: t}}]}]", '"model-index" must be'),
    ],
)
def test_metadata_that_the_hub_refuses(logged_in: Hub, metadata: str, message: str) -> None:
    api = HfApi()
    api.create_repo(ID, repo_type="dataset")
    card = f"---\n{metadata}\n---\n# text\n"
    with pytest.raises(ValueError, match=f"(?s)Invalid metadata in README.md.*{message}"):
        api.upload_file(path_or_fileobj=card.encode(), path_in_repo="README.md", repo_id=ID, repo_type="dataset")
    assert logged_in.files("dataset", ID).keys() == {".gitattributes"}


def test_validated_card(logged_in: Hub) -> None:
    """A card's own validation says why in JSON."""
    with pytest.raises(ValueError, match=r'{"message": "\\"tags\\" must be an array of strings"}'):
        DatasetCard(CARD.replace("tags:\n- mine", "tags: mine")).validate()


def test_metadata_that_the_hub_takes(logged_in: Hub) -> None:
    DatasetCard(
        "---\nlicense: [mit, cc-by-4.0]\nsize_categories: [10K<n<100K]\nlanguage: en\nx: {y: 1}\n---\n"
    ).validate()
    HfApi().create_repo(ID, repo_type="dataset")
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        HfApi().upload_file(path_or_fileobj=b"# text", path_in_repo="README.md", repo_id=ID, repo_type="dataset")


def test_commit_refuses_metadata_by_itself(logged_in: Hub) -> None:
    HfApi().create_repo(ID, repo_type="dataset")
    logged_in.fail("POST", "validate-yaml", status=200)
    with pytest.raises(BadRequestError, match='"license" must be one of'):
        HfApi().upload_file(
            path_or_fileobj=b"---\nlicense: 5\n---\n", path_in_repo="README.md", repo_id=ID, repo_type="dataset"
        )


def test_model_repository(logged_in: Hub) -> None:
    api, weights = HfApi(), {"w": torch.arange(6.0).reshape(2, 3)}
    api.create_repo("owner/net")
    for _ in range(2):
        api.upload_file(
            path_or_fileobj=safetensors.torch.save(weights), path_in_repo="net.safetensors", repo_id="owner/net"
        )
    assert len(logged_in.asked("POST", "/commit/")) == 1
    path = hf_hub_download("owner/net", "net.safetensors")
    assert Path(path).is_relative_to(logged_in.home)
    assert torch.equal(safetensors.torch.load_file(path)["w"], weights["w"])
    assert not api.repo_exists("owner/net", repo_type="dataset")
    api.create_repo("owner/net", repo_type="dataset")


def test_listing_copying_deleting(logged_in: Hub) -> None:
    api: Any = HfApi()
    api.create_repo(ID, repo_type="dataset")
    of = {"repo_id": ID, "repo_type": "dataset"}
    for path, content in {"a/b/c.txt": b"text", "a/d.png": b"\x89\0", "e.txt": b"e"}.items():
        api.upload_file(path_or_fileobj=content, path_in_repo=path, **of)
    assert [e.path for e in api.list_repo_tree(**of)] == [".gitattributes", "a", "e.txt"]
    assert [e.path for e in api.list_repo_tree(path_in_repo="a", **of)] == ["a/b", "a/d.png"]
    deep = {e.path: e for e in api.list_repo_tree(path_in_repo="a", recursive=True, expand=True, **of)}
    assert deep.keys() == {"a/b", "a/b/c.txt", "a/d.png"}
    assert deep["a/d.png"].lfs.size == 2
    assert deep["a/b/c.txt"].lfs is None
    assert deep["a/d.png"].last_commit.oid == api.repo_info(**of).sha
    assert [e.path for e in api.get_paths_info(paths=["a/b", "e.txt", "none"], **of)] == ["a/b", "e.txt"]
    copies = [CommitOperationCopy(source, f"copy/{source}") for source in ("a/d.png", "e.txt")]
    removals = [CommitOperationDelete("a/b/c.txt"), CommitOperationDelete("e.txt")]
    api.create_commit(operations=[*copies, *removals], commit_message="move", **of)
    assert logged_in.files("dataset", ID).keys() == {".gitattributes", "a/d.png", "copy/a/d.png", "copy/e.txt"}
    api.delete_folder("copy", **of)
    assert logged_in.files("dataset", ID).keys() == {".gitattributes", "a/d.png"}
    assert logged_in.files("dataset", ID)["a/d.png"] == b"\x89\0"


def test_ranges(logged_in: Hub) -> None:
    HfApi().create_repo(ID, repo_type="dataset")
    HfApi().upload_file(path_or_fileobj=b"0123456789", path_in_repo="x", repo_id=ID, repo_type="dataset")

    def part(asked: str) -> tuple[int, bytes, str | None]:
        answer = get_session().get(f"{logged_in.url}/datasets/{ID}/resolve/main/x", headers={"Range": asked})
        return answer.status_code, answer.content, answer.headers.get("Content-Range")

    assert part("bytes=2-4") == (206, b"234", "bytes 2-4/10")
    assert part("bytes=7-") == (206, b"789", "bytes 7-9/10")
    assert part("bytes=8-99") == (206, b"89", "bytes 8-9/10")
    assert part("bytes=10-") == (416, b"", "bytes */10")


def test_subprocess(hub: Hub) -> None:
    numbers().push_to_hub(ID, token="good", private=True)
    code = (
        "import os, datasets, huggingface_hub as h\n"
        f"print(datasets.load_dataset({ID!r}, split='train')['n'][:], h.whoami()['name'])\n"
        f"h.upload_file(path_or_fileobj=b'hello', path_in_repo='x', repo_id={ID!r}, repo_type='dataset')\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=hub.environment("good"), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[0, 1, 2, 3] owner"
    assert hub.files("dataset", ID)["x"] == b"hello"


def test_nobody_is_logged_in(hub: Hub) -> None:
    assert HfApi().token is None
    assert "HF_TOKEN" not in hub.environment()
    numbers().push_to_hub(ID, token="good")
    load_dataset(ID)
    assert {r.user for r in hub.requests[-5:]} == {None}


def test_everything_that_was_sent(logged_in: Hub) -> None:
    Dataset.from_dict({"word": ["in-a-shard"]}).push_to_hub(ID, commit_message="in-a-message")
    with pytest.raises(RepositoryNotFoundError):
        HfApi().repo_info("owner/in-an-address", repo_type="dataset")
    logged_in.fail("PUT", times=6)
    buffer = io.BytesIO(b"\0in-a-failed-upload")
    with pytest.raises(RuntimeError):
        HfApi().upload_file(path_or_fileobj=buffer, path_in_repo="x.bin", repo_id=ID, repo_type="dataset")
    HfApi().upload_file(path_or_fileobj=b"in-a-file", path_in_repo="x.txt", repo_id=ID, repo_type="dataset")
    everything = logged_in.everything()
    for word in ("shard", "message", "file"):
        assert any(f"in-a-{word}".encode() in each for each in everything), word
    assert any(b"in-an-address" in each for each in everything)
    assert any(b"in-a-failed-upload" in each for each in everything)
    assert not any(b"in-nothing" in each for each in everything)


def test_faults_count(hub: Hub) -> None:
    fault = hub.fail("GET|HEAD", r"/api/whoami-v2\?a=b c", status=503, times=2, after=1, headers={"Retry-After": "7"})
    asked = [get_session().get(f"{hub.url}/api/whoami-v2?a=b%20c").status_code for _ in range(4)]
    assert asked == [401, 503, 503, 401]
    assert fault.injected == 2
    get_session().post(f"{hub.url}/api/whoami-v2?a=b%20c")
    assert fault.seen == 4
    assert [r.status for r in hub.requests] == [401, 503, 503, 401, 404]
