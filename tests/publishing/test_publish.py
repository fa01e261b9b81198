"""Publishing against a local Hub, with the real clients: what arrives, in which order, and what a stop leaves."""

import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from datasets import ClassLabel, Dataset, load_dataset
from huggingface_hub import HfApi

from hf_unlearnable import CudaPoison, RandomNoisePoison
from hf_unlearnable.gate import checks
from hf_unlearnable.gate.secret_scan import holds_secret
from hf_unlearnable.protect import protect
from hf_unlearnable.publishing import pages, push
from hf_unlearnable.publishing.hub import HubError, Repository
from hf_unlearnable.publishing.push import Publication, Words, publish
from hf_unlearnable.record import Record
from tests.conftest import make_dataset, noise_pictures, pixels
from tests.publishing.conftest import SECRET
from tests.publishing.local_hub import Hub
from tests.test_card import evaluation

MINE = "owner/shapes"


def send(folder: Path, repo_id: str = MINE, **more: Any) -> Publication:
    return publish(folder, Repository(repo_id), progress=False, **more)


def readme(hub: Hub, repo_id: str = MINE) -> str:
    return hub.files("dataset", repo_id)["README.md"].decode()


def test_what_arrives_is_what_was_protected(logged_in: Hub, folder: Path, small: Dataset) -> None:
    send(folder, clean=small, key=SECRET, words=Words(license="cc0-1.0", title="Small: a test"))
    found = load_dataset(MINE, split="train")
    assert found.features == small.features
    assert np.array_equal(pixels(found), pixels(load_dataset("parquet", data_files=str(folder / "data/*"))["train"]))
    assert found["label"][:] == small["label"][:]
    files = logged_in.files("dataset", MINE)
    assert sorted(set(files) - {".gitattributes"}) == [
        "README.md",
        "assets/default/preview.png",
        "data/train-00000-of-00001.parquet",
        "results/default/record.json",
    ]
    data, text = pages.split(files["README.md"].decode())
    assert data["license"] == "cc0-1.0"
    assert data["pretty_name"] == "Small: a test"
    assert data["configs"][0]["config_name"] == "default"
    assert data["dataset_info"]["splits"][0]["num_examples"] == 24
    assert pages.finished(text, "default")
    assert "![protected pictures](assets/default/preview.png)" in text
    told = json.loads(files["results/default/record.json"])["published"]
    assert list(told["files"]) == ["data/train-00000-of-00001.parquet"]
    assert told["pixels_sha256"] == Record.load(folder / "record.json").published["pixels_sha256"]


@pytest.mark.parametrize("key", [SECRET, 4_123_456_789])
def test_nothing_that_was_sent_holds_the_key(logged_in: Hub, small: Dataset, tmp_path: Path, key: int | bytes) -> None:
    """Neither in the requests nor, unpacked, in any file; nor a fingerprint that guesses could be tried on."""
    protect(small, CudaPoison(seed=key), tmp_path / "out", source="small", progress=False)
    send(tmp_path / "out", allow_guessable_key=True)
    received = b"\0".join(logged_in.everything())
    forms = [key, key.hex().encode()] if isinstance(key, bytes) else [str(key).encode(), key.to_bytes(4, "little")]
    for form in (*forms, CudaPoison(seed=key).apply(small)._fingerprint.encode(), b"fingerprint"):
        assert form not in received
    for name, data in logged_in.files("dataset", MINE).items():
        path = tmp_path / "pulled" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    assert holds_secret(tmp_path / "pulled", key) == []
    (tmp_path / "pulled" / "results" / "default" / "note.md").write_text(
        f"{key.hex() if isinstance(key, bytes) else key}"
    )
    assert len(holds_secret(tmp_path / "pulled", key)) == 1


def test_the_card_comes_first_and_is_finished_last(logged_in: Hub, folder: Path) -> None:
    send(folder)
    commits = [c.title for c in reversed(HfApi().list_repo_commits(MINE, repo_type="dataset"))]
    assert commits[-3:] == ["default: being published", "default: pictures", "default: finished"]
    states = []
    for commit in HfApi().list_repo_commits(MINE, repo_type="dataset")[:3]:
        files = logged_in.files("dataset", MINE, commit.commit_id)
        states.append((pages.finished(files["README.md"].decode(), "default"), any("parquet" in f for f in files)))
    assert states == [(True, True), (False, True), (False, False)]


def test_a_push_that_broke_goes_on_and_sends_no_shard_twice(
    logged_in: Hub, small: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_unlearnable.protect.SHARD_BYTES", 20_000)
    protect(small, CudaPoison(seed=SECRET), tmp_path / "out", source="small", progress=False)
    shards = len(list((tmp_path / "out" / "data").iterdir()))
    assert shards > 1
    fault = logged_in.fail(method="PUT", path="", status=403, after=1, times=100)
    with pytest.raises(HubError):
        send(tmp_path / "out")
    assert not pages.finished(readme(logged_in), "default")
    assert "Do not use it yet" in readme(logged_in)
    fault.times = 0
    before = {request.path for request in logged_in.asked("PUT") if request.status == 200}
    send(tmp_path / "out")
    after = [request.path for request in logged_in.asked("PUT") if request.status == 200]
    assert len(after) == len(set(after)), "a shard that was there was sent again"
    assert before
    assert pages.finished(readme(logged_in), "default")
    assert len([f for f in logged_in.files("dataset", MINE) if f.endswith(".parquet")]) == shards
    assert np.array_equal(
        pixels(load_dataset(MINE, split="train")),
        pixels(load_dataset("parquet", data_files=str(tmp_path / "out/data/*"))["train"]),
    )


@pytest.mark.parametrize("status", [500, 429, None])
def test_passing_trouble_is_waited_out(logged_in: Hub, folder: Path, status: int | None) -> None:
    logged_in.fail(method="PUT", path="", status=status, times=2, headers={"Retry-After": "0"})
    send(folder)
    assert pages.finished(readme(logged_in), "default")


def test_publishing_again_changes_only_what_is_new(logged_in: Hub, folder: Path) -> None:
    send(folder)
    before = logged_in.files("dataset", MINE)
    sent = len(logged_in.asked("PUT"))
    send(folder)
    assert logged_in.files("dataset", MINE) == before
    assert len(logged_in.asked("PUT")) == sent
    send(folder, words=Words(contact="somebody@example.org"))
    assert "Contact: somebody@example.org." in readme(logged_in)
    assert [r.path for r in logged_in.asked("PUT")][sent:] == []


def evaluated(folder: Path, output: Path) -> Path:
    """What an evaluation of these pictures leaves, as far as publishing looks at it."""
    digest = Record.load(folder / "record.json").published["pixels_sha256"]
    (output / "jobs" / f"cuda-{digest[:8]}").mkdir(parents=True)
    record = Record.load(folder / "record.json")
    record.results[:] = [evaluation(0.49, pixels_sha256=[digest])]
    record.save(folder / "record.json")
    (output / "summary.md").write_text("# Summary\n")
    shutil.copy(folder / "preview.png", output / "heat-map.png")
    return output


def test_only_what_an_evaluation_writes_is_sent_with_it(logged_in: Hub, folder: Path, tmp_path: Path) -> None:
    evaluated_in = evaluated(folder, tmp_path / "eval")
    for name in ("key.json", "record.json", "notes.md", "selfie.png"):
        (evaluated_in / name).write_text("mine\n")
    files = send(folder, evaluations=[evaluated_in], dry_run=True).files
    assert sorted(files) == [f"assets/default/{n}.png" for n in ("heat-map", "preview")] + [
        f"results/default/{n}" for n in ("record.json", "summary.md")
    ]
    assert isinstance(files["results/default/record.json"], str)


def test_evaluations_that_are_not_sent(logged_in: Hub, folder: Path, small: Dataset, tmp_path: Path) -> None:
    evaluated_in = evaluated(folder, tmp_path / "eval")
    with pytest.raises(ValueError, match="folders of different names"):
        send(folder, evaluations=[evaluated_in, evaluated_in])
    (evaluated_in / "summary.md").write_text("one\nrun in /home/me/secret\n")
    with pytest.raises(ValueError, match="line 2: holds what looks like a local path"):
        send(folder, evaluations=[evaluated_in])
    (evaluated_in / "summary.md").write_text(f"key {SECRET.hex()}\n")
    with pytest.raises(ValueError, match=r"the key is in results/default/summary\.md: hex"):
        send(folder, evaluations=[evaluated_in], key=SECRET)
    protect(small, CudaPoison(seed=bytes(32)), tmp_path / "b", source="small", progress=False)
    with pytest.raises(ValueError, match="expected an evaluation of these pictures"):
        send(tmp_path / "b", evaluations=[evaluated_in])
    with pytest.raises(FileNotFoundError, match=r"with its summary\.md"):
        send(folder, evaluations=[tmp_path])
    (evaluated_in / "diagnosis.json").write_text("{}")
    with pytest.raises(ValueError, match="expected a diagnosis of these pictures"):
        send(folder, evaluations=[evaluated_in])
    (evaluated_in / "diagnosis.json").unlink()
    (evaluated_in / "summary.md").write_text("fine\n")
    record = Record.load(folder / "record.json")
    record.results.clear()
    record.save(folder / "record.json")
    with pytest.raises(ValueError, match="the record holds no evaluation"):
        send(folder, evaluations=[evaluated_in])
    assert not logged_in.asked("POST")


def test_other_pictures_under_the_same_name_replace_the_old_ones(
    logged_in: Hub, folder: Path, small: Dataset, tmp_path: Path
) -> None:
    evaluated_in = evaluated(folder, tmp_path / "eval")
    send(folder, evaluations=[evaluated_in])
    assert "results/default/summary.md" in logged_in.files("dataset", MINE)
    assert "(assets/default/heat-map.png)" in readme(logged_in)
    protect(small, CudaPoison(seed=bytes(32)), tmp_path / "b", source="small", progress=False)
    send(tmp_path / "b")
    assert not [f for f in logged_in.files("dataset", MINE) if "summary" in f or "heat-map" in f]
    assert np.array_equal(pixels(load_dataset(MINE, split="train")), pixels(CudaPoison(seed=bytes(32)).apply(small)))


def test_no_clean_picture_is_sent_unless_that_is_asked_for(logged_in: Hub, folder: Path) -> None:
    send(folder)
    sent = logged_in.files("dataset", MINE)["assets/default/preview.png"]
    assert sent != (folder / "preview.png").read_bytes()
    with PIL.Image.open(io.BytesIO(sent)) as picture:
        assert picture.height < 300  # one row of pictures, where the folder's own has three
    assert "![protected pictures](assets/default/preview.png)" in readme(logged_in)
    assert "clean pictures beside" not in readme(logged_in)
    send(folder, show_clean=True)
    assert logged_in.files("dataset", MINE)["assets/default/preview.png"] == (folder / "preview.png").read_bytes()
    assert "shows some clean pictures beside their protected versions" in readme(logged_in)


def test_what_came_between_is_not_called_finished(
    logged_in: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = push._compare

    def interrupted(*args: Any) -> None:
        compared(*args)
        Repository(MINE).commit("meanwhile", {"data/train-00000-of-00001.parquet": b"other"})

    monkeypatch.setattr(push, "_compare", interrupted)
    with pytest.raises(HubError):
        send(folder)
    assert not pages.finished(readme(logged_in), "default")


def test_files_of_others_are_kept_and_tags_follow_the_method(
    logged_in: Hub, folder: Path, small: Dataset, tmp_path: Path
) -> None:
    send(folder)
    others = {"assets/default/logo.png": b"logo", "results/default/notes.md": b"mine"}
    Repository(MINE).commit("mine", dict(others))
    protect(small, RandomNoisePoison(seed=SECRET), tmp_path / "b[1]", source="small", progress=False)
    send(tmp_path / "b[1]")
    files = logged_in.files("dataset", MINE)
    assert {name: files[name] for name in others} == others
    tags = pages.split(readme(logged_in))[0]["tags"]
    assert "random-noise" in tags
    assert "cuda" not in tags


def test_lost_metadata_are_put_back(logged_in: Hub, folder: Path, small: Dataset) -> None:
    send(folder)
    before = pages.split(readme(logged_in))[0]["configs"]
    data, text = pages.split(readme(logged_in))
    del data["configs"]
    Repository(MINE).commit("lost", {"README.md": pages.join(data, text)})
    send(folder)
    assert pages.split(readme(logged_in))[0]["configs"] == before


def test_a_preview_without_labels_or_of_few_rows(small: Dataset, tmp_path: Path) -> None:
    for name, rows in (("bare", small.remove_columns("label")), ("few", small.select(range(2)))):
        poison = RandomNoisePoison(seed=SECRET)
        protect(rows, poison, tmp_path / name, source="small", progress=False)
        drawn = push.published_preview(tmp_path / name, Record.load(tmp_path / name / "record.json"))
        with PIL.Image.open(io.BytesIO(drawn)) as picture:
            assert (picture.width > 500) == (name == "bare")


def test_the_card_of_a_branch_loads_the_branch(logged_in: Hub, folder: Path) -> None:
    page = publish(folder, Repository(MINE, revision="draft"), progress=False, dry_run=True).page
    assert f'load_dataset("{MINE}", revision="draft", split="train")' in page


def test_names_of_classes_stay_in_their_cell(logged_in: Hub, tmp_path: Path) -> None:
    names = ["a|b", "c\n\n# Injected\n> **Not finished.**", "<!-- hf_unlearnable: default -->"]
    rows = make_dataset(noise_pictures(6, 16, 16), [i % 3 for i in range(6)], classes=3)
    rows = rows.cast_column("label", ClassLabel(names=names))
    protect(rows, CudaPoison(seed=SECRET), tmp_path / "out", source="small", progress=False)
    send(tmp_path / "out")
    text = readme(logged_in)
    assert pages.finished(text, "default")
    assert "\n# Injected" not in text
    assert "a\\|b, c # Injected" in text


def test_configurations_stand_beside_each_other(logged_in: Hub, folder: Path, small: Dataset, tmp_path: Path) -> None:
    send(folder)
    half = CudaPoison(seed=SECRET, poison_rate=0.5)
    protect(small, half, tmp_path / "half", source="small", progress=False)
    send(tmp_path / "half", config="rate-50")
    both = readme(logged_in)
    assert pages.finished(both, "default")
    assert pages.finished(both, "rate-50")
    assert "assets/rate-50/preview.png" in both
    assert np.array_equal(pixels(load_dataset(MINE, "rate-50", split="train")), pixels(half.apply(small)))
    assert np.array_equal(
        pixels(load_dataset(MINE, "default", split="train")), pixels(CudaPoison(seed=SECRET).apply(small))
    )


def test_text_and_metadata_of_an_existing_card_are_kept(logged_in: Hub, folder: Path) -> None:
    api = HfApi()
    api.create_repo(MINE, repo_type="dataset")
    own = b"---\nlicense: mit\nlanguage:\n- en\n---\n\n# My words\n\nKept.\n"
    api.upload_file(path_or_fileobj=own, path_in_repo="README.md", repo_id=MINE, repo_type="dataset")
    with pytest.raises(ValueError, match="license 'mit', expected 'cc0-1.0'"):
        send(folder, words=Words(license="cc0-1.0"))
    send(folder, words=Words(license="mit"))
    data, text = pages.split(readme(logged_in))
    assert (data["license"], data["language"]) == ("mit", ["en"])
    assert "# My words\n\nKept." in text
    assert pages.finished(text, "default")


def test_a_private_repository_on_a_branch(logged_in: Hub, folder: Path) -> None:
    publish(folder, Repository(MINE, revision="draft"), private=True, progress=False)
    assert HfApi().repo_info(MINE, repo_type="dataset").private
    assert pages.finished(logged_in.files("dataset", MINE, "draft")["README.md"].decode(), "default")
    assert not [f for f in logged_in.files("dataset", MINE, "main") if f.endswith(".parquet")]


def test_a_public_repository_is_not_taken_for_a_private_one(logged_in: Hub, folder: Path) -> None:
    HfApi().create_repo(MINE, repo_type="dataset")
    with pytest.raises(HubError, match="is there already and is public"):
        publish(folder, Repository(MINE), private=True, progress=False)
    assert not [f for f in logged_in.files("dataset", MINE) if f.endswith(".parquet")]


def test_results_of_other_pictures_are_not_published(logged_in: Hub, folder: Path) -> None:
    record = Record.load(folder / "record.json")
    record.results[:] = [evaluation(0.49)]
    record.save(folder / "record.json")
    with pytest.raises(checks.Refused, match="results: entry 0 was measured on other pictures than these"):
        send(folder)


def test_what_the_gate_refuses_is_not_sent(logged_in: Hub, folder: Path, small: Dataset, tmp_path: Path) -> None:
    (folder / "data" / "clean.parquet").write_bytes(b"PAR1")
    with pytest.raises(checks.Refused, match=r"clean\.parquet"):
        send(folder)
    protect(small, CudaPoison(seed=7), tmp_path / "guessable", source="small", progress=False)
    with pytest.raises(checks.Refused, match="allow-guessable-key"):
        send(tmp_path / "guessable")
    assert not logged_in.requests
    send(tmp_path / "guessable", allow_guessable_key=True)
    assert "The key is an int seed" in readme(logged_in)


def test_what_the_owner_accepts_is_told_on_the_card(logged_in: Hub, tmp_path: Path) -> None:
    pictures = noise_pictures(24)
    pictures[5] = 0
    flat = make_dataset(pictures, [i % 4 for i in range(24)])
    protect(flat, RandomNoisePoison(seed=SECRET, poison_rate=0.0), tmp_path / "out", source="x", progress=False)
    with pytest.raises(checks.Refused, match="blank"):
        send(tmp_path / "out")
    send(tmp_path / "out", accept=["blank"])
    assert re.search(r"Published although the checks before publishing said: blank: row 5", readme(logged_in))


def test_who_may_not_write_is_told_so(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HubError, match="no token, or a wrong one|no token"):
        send(folder)
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(HubError, match="wrong one"):
        send(folder)
    monkeypatch.setenv("HF_TOKEN", "other")
    with pytest.raises(HubError, match="is the name yours"):
        send(folder)
    assert not hub.files("dataset", MINE)


def test_no_network_and_bad_names(logged_in: Hub, folder: Path) -> None:
    with pytest.raises(HubError, match="expected a repository id"):
        send(folder, repo_id="a b/c")
    with pytest.raises(ValueError, match="configuration name"):
        send(folder, config="data")
    logged_in.stop()
    with pytest.raises(HubError, match="cannot be reached"):
        send(folder)


def test_pictures_that_arrived_otherwise_are_not_called_finished(
    logged_in: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record tells other pixels than were pushed: as if something between had changed them."""
    from hf_unlearnable.publishing import push

    genuine = push._push

    def other(folder: Path, record: Record, repository: Repository, config: str) -> None:
        genuine(folder, record, repository, config)
        record.published["pixels_sha256"] = "0" * 64

    monkeypatch.setattr(push, "_push", other)
    with pytest.raises(ValueError, match="differs from the record: expected pixels_sha256"):
        send(folder)
    assert not pages.finished(readme(logged_in), "default")


@pytest.mark.parametrize("kind", ["rgba", "grayscale", "sizes"])
def test_round_trips_of_other_pictures(logged_in: Hub, tmp_path: Path, kind: str) -> None:
    noise = noise_pictures(8)
    if kind == "rgba":
        values = [
            PIL.Image.fromarray(np.dstack([p, np.full(p.shape[:2], 10 * i, np.uint8)])) for i, p in enumerate(noise)
        ]
    elif kind == "grayscale":
        values = [PIL.Image.fromarray(p[:, :, 0]) for p in noise]
    else:
        values = [PIL.Image.fromarray(p[: 20 + i, : 30 - i]) for i, p in enumerate(noise)]
    clean = make_dataset(values, [i % 4 for i in range(8)])
    protect(clean, CudaPoison(seed=SECRET), tmp_path / "out", source="x", progress=False)
    send(tmp_path / "out", clean=clean)
    expected = CudaPoison(seed=SECRET).apply(clean)
    for row, wanted in zip(load_dataset(MINE, split="train"), expected, strict=True):
        assert row["img"].mode == wanted["img"].mode
        assert np.array_equal(np.asarray(row["img"]), np.asarray(wanted["img"]))
