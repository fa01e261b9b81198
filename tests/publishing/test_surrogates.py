"""Surrogates as model repositories, and the script that publishes."""

from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from hf_unlearnable import CudaPoison, PilPoison, Surrogate
from hf_unlearnable.batches import Batches
from hf_unlearnable.protect import protect
from hf_unlearnable.publishing import pages
from hf_unlearnable.publishing.hub import HubError, Repository
from hf_unlearnable.publishing.surrogates import publish_surrogate
from tests.conftest import load_script, pixels
from tests.publishing.local_hub import Hub

MINE = "owner/pil-surrogate"
SECRET = bytes(range(32))


@pytest.fixture
def file(small: Dataset, tmp_path: Path) -> Path:
    return PilPoison().fit(Batches.load(small, progress=False), seed=0, progress=False).save(tmp_path / "s.safetensors")


def test_what_is_loaded_from_the_hub_is_the_same_surrogate(logged_in: Hub, file: Path, small: Dataset) -> None:
    publish_surrogate(file, Repository(MINE, "model"), class_name="PilPoison", private=True, license="cc0-1.0")
    assert sorted(set(logged_in.files("model", MINE)) - {".gitattributes"}) == ["README.md", "surrogate.safetensors"]
    assert Surrogate.load(MINE) == Surrogate.load(file)
    there, here = PilPoison.from_surrogate(MINE), PilPoison.from_surrogate(file)
    assert np.array_equal(pixels(there.apply(small)), pixels(here.apply(small)))
    data, text = pages.split(logged_in.files("model", MINE)["README.md"].decode())
    assert data["license"] == "cc0-1.0"
    assert data["library_name"] == "hf_unlearnable"
    assert f'PilPoison.from_surrogate("{MINE}")' in text
    assert Surrogate.load(file).digest in text


def test_a_public_surrogate_gives_the_key_away_and_must_be_meant(logged_in: Hub, file: Path) -> None:
    with pytest.raises(HubError, match="--private, or with --allow-guessable-key"):
        publish_surrogate(file, Repository(MINE, "model"), class_name="PilPoison")
    assert not logged_in.requests
    publish_surrogate(file, Repository(MINE, "model"), class_name="PilPoison", allow_guessable_key=True)
    assert "Whoever has this file" in logged_in.files("model", MINE)["README.md"].decode()


def test_a_file_that_holds_its_key_is_not_sent(logged_in: Hub, file: Path, small: Dataset) -> None:
    how = {"class_name": "PilPoison", "private": True, "key": SECRET, "dry_run": True}
    publish_surrogate(file, Repository(MINE, "model"), **how)
    rows = Batches.load(small, progress=False)
    PilPoison().fit(rows, seed=0, source=SECRET.hex(), progress=False).save(file.with_name("t.safetensors"))
    with pytest.raises(ValueError, match=r"the key is in surrogate\.safetensors: hex: nothing was sent"):
        publish_surrogate(file.with_name("t.safetensors"), Repository(MINE, "model"), **how)
    assert not logged_in.requests


def test_foreign_text_is_kept_and_a_second_push_changes_nothing(logged_in: Hub, file: Path) -> None:
    def again() -> dict[str, bytes]:
        publish_surrogate(file, Repository(MINE, "model"), class_name="PilPoison", private=True)
        return logged_in.files("model", MINE)

    first = again()
    assert again() == first


def test_a_damaged_file_is_not_sent(logged_in: Hub, file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1] + b"\x55")
    with pytest.raises(ValueError, match=r"s\.safetensors"):
        publish_surrogate(file, Repository(MINE, "model"), class_name="PilPoison", private=True)
    assert not logged_in.requests


def test_the_script_publishes_both_kinds_and_says_what_is_wrong(
    logged_in: Hub, file: Path, small: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = load_script("publish")
    script.main([str(file), "--repo-id", MINE, "--private"])
    assert "published" in capsys.readouterr().out
    protect(small, CudaPoison(seed=SECRET), tmp_path / "out", source="x", progress=False)
    small.to_parquet(tmp_path / "clean.parquet")
    (tmp_path / "key").write_text(SECRET.hex())
    given = [str(tmp_path / "out"), "--repo-id", "owner/shapes", "--clean", str(tmp_path / "clean.parquet")]
    given += ["--key-file", str(tmp_path / "key"), "--no-progress"]
    script.main([*given, "--dry-run"])
    told = capsys.readouterr().out
    assert "**What a trainer still learns from it: not measured.**" in told
    assert "24 rows and these files would be sent" in told
    assert not logged_in.files("dataset", "owner/shapes")
    script.main(given)
    assert "24 rows published, read back and found as recorded" in capsys.readouterr().out
    (tmp_path / "out" / "clean.arrow").write_bytes(b"clean")
    with pytest.raises(SystemExit, match=r"publish\.py: .*must not be published"):
        script.main(given)
    with pytest.raises(SystemExit, match=r"publish\.py: "):
        script.main([str(tmp_path / "nothing"), "--repo-id", "owner/x"])
