"""Verification: whole or not, altered or not, whose: of a folder and of what was published."""

import io
import json
from pathlib import Path

import pytest
from datasets import Dataset, Image

from hf_unlearnable import ArPoison, CudaPoison, OpsPoison, PilPoison, RandomNoisePoison, Surrogate
from hf_unlearnable.batches import Batches
from hf_unlearnable.card import local_page
from hf_unlearnable.poisons.base import Poison
from hf_unlearnable.protect import protect
from hf_unlearnable.publishing import verify as verifying
from hf_unlearnable.publishing.hub import HubError, Repository
from hf_unlearnable.publishing.push import publish
from hf_unlearnable.publishing.verify import Outcome, judged, recognise, verify
from hf_unlearnable.record import Record
from hf_unlearnable.sharding.merge import merge
from hf_unlearnable.sharding.run import protect_shards
from hf_unlearnable.sources import stream_of
from tests.conftest import load_script, make_dataset, noise_pictures
from tests.publishing.local_hub import Hub
from tests.test_card import evaluation

SECRET, OTHER = bytes(range(32)), bytes(32)
MINE = "owner/shapes"


def made(dataset: Dataset, poison: Poison, folder: Path) -> Path:
    protect(dataset, poison, folder, source="somebody/small", progress=False)
    return folder


def by_name(outcomes: list[Outcome]) -> dict[str, Outcome]:
    assert len({outcome.name for outcome in outcomes}) == len(outcomes)
    return {outcome.name: outcome for outcome in outcomes}


def states(outcomes: list[Outcome]) -> dict[str, str]:
    return {outcome.name: outcome.status for outcome in outcomes}


def test_what_was_published_passes_and_the_key_proves_it(logged_in: Hub, small: Dataset, tmp_path: Path) -> None:
    folder = made(small, CudaPoison(seed=SECRET), tmp_path / "out")
    publish(folder, Repository(MINE), progress=False)
    alone = states(verify(Repository(MINE), progress=False))
    assert "failed" not in alone.values()
    assert alone["finished"] == alone["files"] == alone["pictures"] == "passed"
    assert alone["owner"] == alone["budget"] == "not checked"
    found = by_name(verify(Repository(MINE), clean=small, key=SECRET, progress=False))
    assert {name for name, outcome in found.items() if outcome.status != "passed"} == {"budget"}  # CUDA promises none
    assert found["owner"].detail == "24 pictures recomputed from the clean ones: 100 % of the values are equal"
    wrong = by_name(verify(Repository(MINE), clean=small, key=OTHER, progress=False))
    assert wrong["commitment"].status == wrong["owner"].status == "failed"
    assert "differ at rows 0, 1, 2, 3, 4 and 19 more" in wrong["owner"].detail


def test_what_the_card_says_first_is_compared_with_the_record(logged_in: Hub, small: Dataset, tmp_path: Path) -> None:
    folder = made(small, CudaPoison(seed=SECRET), tmp_path / "out")
    record = Record.load(folder / "record.json")
    record.results[:] = [evaluation(0.49, pixels_sha256=[record.published["pixels_sha256"]])]
    record.save(folder / "record.json")
    publish(folder, Repository(MINE), progress=False)
    assert states(verify(Repository(MINE), progress=False))["card"] == "passed"
    whole = Repository(MINE).text("README.md") or ""
    for old, new, status in (
        ("reaches 49.0 ± 1.2 %", "reaches 19.0 ± 1.2 %", "failed"),
        ("**A trainer still reaches", "**An attacker gets", "not checked"),
        ("**A trainer still reaches 49.0 ± 1.2 % on", "A trainer learns nothing", "failed"),
        ("**A trainer still reaches", "No trainer reaches more than 12.0 %. **A trainer still reaches", "failed"),
    ):
        assert old in whole
        Repository(MINE).commit("other words", {"README.md": whole.replace(old, new)})
        assert states(verify(Repository(MINE), progress=False))["card"] == status, new


def test_a_card_that_claims_what_was_not_measured(logged_in: Hub, small: Dataset, tmp_path: Path) -> None:
    folder = made(small, CudaPoison(seed=SECRET), tmp_path / "out")
    publish(folder, Repository(MINE), progress=False)
    assert states(verify(Repository(MINE), progress=False))["card"] == "passed"
    whole = Repository(MINE).text("README.md") or ""
    start, stop = whole.index("**What a trainer still learns from it"), whole.index("## What this is")
    Repository(MINE).commit("praise", {"README.md": f"{whole[:start]}No trainer learns anything.\n\n{whole[stop:]}"})
    assert states(verify(Repository(MINE), progress=False))["card"] == "failed"
    Repository(MINE).commit("praise", {"README.md": whole.replace("**What a", "10.0 % at most.\n\n**What a")})
    assert states(verify(Repository(MINE), progress=False))["card"] == "failed"


def test_records_of_before_results_named_their_pictures(small: Dataset, tmp_path: Path) -> None:
    folder = made(small, CudaPoison(seed=SECRET), tmp_path / "out")
    record = Record.load(folder / "record.json")
    record.results[:] = [{k: v for k, v in evaluation(0.49).items() if k != "pixels_sha256"}]
    record.save(folder / "record.json")
    found = by_name(verify(folder, clean=small, key=SECRET, progress=False))
    assert "does not tell of which pictures (an older version)" in found["results"].detail
    assert found["owner"].status == "passed"
    assert "reaches 49.0" in local_page(record)


def test_an_unfinished_publication_and_a_missing_one(logged_in: Hub, small: Dataset, tmp_path: Path) -> None:
    with pytest.raises(HubError, match="no such repository"):
        verify(Repository("owner/nothing"), progress=False)
    small.push_to_hub(MINE)
    with pytest.raises(FileNotFoundError, match=r"no results/default/record\.json"):
        verify(Repository(MINE), progress=False)


def test_files_that_would_be_loaded_besides_are_found(logged_in: Hub, small: Dataset, tmp_path: Path) -> None:
    repository = Repository(MINE)
    publish(made(small, CudaPoison(seed=SECRET), tmp_path / "out"), repository, progress=False)
    assert by_name(verify(repository, progress=False))["loads"].status == "passed"
    small.to_parquet(tmp_path / "more.parquet")
    name = "data/train-00001-of-00002.parquet"
    repository.commit("more", {name: tmp_path / "more.parquet"})
    found = by_name(verify(repository, progress=False))["loads"]
    assert (found.status, found.detail) == ("failed", f"{name} is not in the record, of 1 such files")
    repository.commit("less", {}, [name])
    readme = repository.text("README.md") or ""
    repository.commit("elsewhere", {"README.md": readme.replace("data/train-*", "other/train-*")})
    assert "is not loaded" in by_name(verify(repository, progress=False))["loads"].detail
    repository.commit("bare", {"README.md": readme.replace("data_files:", "files:")})
    assert "does not say which files" in by_name(verify(repository, progress=False))["loads"].detail


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (".huggingface.yaml", "configs: []\n", "does not say which files"),
        ("README.md", "  columns: [img]\n  data_files:", "does not say which files"),
        ("README.md", "'0': class9", "says ClassLabel"),
    ],
)
def test_what_load_dataset_gives_is_looked_at(
    logged_in: Hub, small: Dataset, tmp_path: Path, name: str, content: str, message: str
) -> None:
    repository = Repository(MINE)
    publish(made(small, CudaPoison(seed=SECRET), tmp_path / "out"), repository, progress=False)
    readme = repository.text("README.md") or ""
    if name == "README.md":
        old = content.rpartition("\n")[2] if "columns" in content else "'0': class0"
        assert old in readme
        content = readme.replace(old, content, 1)
    repository.commit("other", {name: content})
    found = by_name(verify(repository, progress=False))["loads"]
    assert found.status == "failed"
    assert message in found.detail


def test_keys_that_change_nothing_or_cannot_be_told_apart_prove_nothing(small: Dataset, tmp_path: Path) -> None:
    folder = made(small, OpsPoison.fit(small, seed=7, progress=False), tmp_path / "ops")
    found = by_name(verify(folder, clean=small, key=8, progress=False))["owner"]
    assert found.status == "not checked"
    assert "other keys may give these pixels" in found.detail
    folder = made(small, CudaPoison(seed=SECRET, classes=(0,)), tmp_path / "one")
    found = by_name(verify(folder, clean=small, key=SECRET, progress=False))["owner"]
    assert found.detail.startswith("6 pictures recomputed")
    folder = made(small, RandomNoisePoison(seed=SECRET, epsilon=0.0), tmp_path / "none")
    found = by_name(verify(folder, clean=small, key=OTHER, progress=False))["owner"]
    assert (found.status, found.detail) == ("failed", "this key changes no picture: nothing to recognise")


def test_a_record_without_a_budget_says_so(small: Dataset, tmp_path: Path) -> None:
    folder = made(small, CudaPoison(seed=SECRET), tmp_path / "out")
    assert by_name(verify(folder, clean=small, progress=False))["budget"].status == "not checked"
    folder = made(small, RandomNoisePoison(seed=SECRET), tmp_path / "noise")
    assert by_name(verify(folder, clean=small, progress=False))["budget"].status == "passed"
    record = json.loads((folder / "record.json").read_text())
    (folder / "record.json").write_text(json.dumps({**record, "results": [{}]}))
    assert "entry 0 lacks some" in by_name(verify(folder, progress=False))["record"].detail


def test_rows_that_were_left_out_are_left_out_of_the_clean_rows(small: Dataset, tmp_path: Path) -> None:
    stored = small.cast_column("img", Image(decode=False)).to_list()
    stored[3]["img"]["bytes"] = b"no picture"
    broken = Dataset.from_list(stored, features=small.features)
    poison = CudaPoison(seed=SECRET)
    protect_shards(stream_of(broken, "some"), poison, tmp_path / "out", shards=1, on_error="skip", progress=False)
    merge(tmp_path / "out", progress=False)
    found = by_name(verify(tmp_path / "out", clean=broken, key=SECRET, progress=False))
    assert {name for name, outcome in found.items() if outcome.status != "passed"} == {"budget"}  # CUDA promises none
    assert found["owner"].detail.startswith("23 pictures recomputed")
    other = by_name(verify(tmp_path / "out", clean=small.select(range(20)), key=SECRET, progress=False))
    assert (other["source"].status, other["owner"].status) == ("failed", "not checked")


@pytest.mark.parametrize(
    "poison",
    [
        ArPoison(seed=SECRET),
        RandomNoisePoison(seed=SECRET, poison_rate=0.5),
        CudaPoison(seed=SECRET, classes=(1, 2)),
        CudaPoison(seed=12345),
    ],
    ids=["ar", "half", "classes", "int"],
)
def test_the_poison_is_recomputed_from_clean_rows(small: Dataset, tmp_path: Path, poison: Poison) -> None:
    folder = made(small, poison, tmp_path / "out")
    assert by_name(verify(folder, clean=small, key=poison.seed, progress=False))["owner"].status == "passed"
    assert by_name(verify(folder, clean=small, key=OTHER, progress=False))["owner"].status == "failed"


def test_pixels_found_on_the_clean_rows_are_found_again(small: Dataset, tmp_path: Path) -> None:
    folder = made(small, OpsPoison.fit(small, seed=SECRET, progress=False), tmp_path / "out")
    assert by_name(verify(folder, clean=small, key=SECRET, progress=False))["owner"].status == "passed"


def test_a_surrogate_stands_for_the_key(small: Dataset, tmp_path: Path) -> None:
    surrogates = []
    for seed in (0, 1):
        surrogate = PilPoison().fit(Batches.load(small, progress=False), seed=seed, progress=False)
        surrogates.append(surrogate.save(tmp_path / f"{seed}.safetensors"))
    folder = made(small, PilPoison.from_surrogate(surrogates[0]), tmp_path / "out")
    assert Record.load(folder / "record.json").key["surrogate"] == "an int seed"
    assert Surrogate.load(surrogates[0]) != Surrogate.load(surrogates[1])
    right = by_name(verify(folder, clean=small, surrogate=surrogates[0], progress=False))
    assert right["owner"].status == "passed"
    other = by_name(verify(folder, clean=small, surrogate=surrogates[1], progress=False))["owner"]
    assert other.status == "not checked"
    assert "expected the surrogate" in other.detail
    without = by_name(verify(folder, clean=small, key=SECRET, progress=False))["owner"]
    assert "give its file" in without.detail


def test_damage_is_found_and_named(small: Dataset, tmp_path: Path) -> None:
    folder = made(small, CudaPoison(seed=SECRET), tmp_path / "out")
    record = json.loads((folder / "record.json").read_text())
    (name,) = record["published"]["files"]
    genuine = (folder / name).read_bytes()
    (folder / name).write_bytes(genuine[:-1] + b"x")
    found = states(verify(folder, key=SECRET, progress=False))
    assert found["files"] == "failed"
    assert "pictures" not in found
    (folder / name).unlink()
    assert states(verify(folder, progress=False))["files"] == "failed"


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [("published", "files", {"../../etc/x.parquet": {"sha256": "0" * 64, "bytes": 1}}), ("source", "classes", 5)],
)
def test_a_record_that_is_none_is_told_as_such(
    small: Dataset, tmp_path: Path, part: str, name: str, value: object
) -> None:
    folder = made(small, CudaPoison(seed=SECRET), tmp_path / "out")
    record = Record.load(folder / "record.json")
    getattr(record, part)[name] = value
    record.save(folder / "record.json")
    (outcome,) = verify(folder, key=SECRET, progress=False)
    assert (outcome.name, outcome.status) == ("record", "failed")
    assert name in outcome.detail


def test_pictures_that_somebody_recompressed_are_no_longer_those_of_the_record(small: Dataset, tmp_path: Path) -> None:
    folder = made(small, CudaPoison(seed=SECRET), tmp_path / "out")
    record = Record.load(folder / "record.json")
    (name,) = record.published["files"]

    def worse(row: dict) -> dict:
        buffer = io.BytesIO()
        row["img"].save(buffer, "JPEG", quality=75)
        return {"img": {"bytes": buffer.getvalue(), "path": None}}

    Dataset.from_parquet(str(folder / name), cache_dir=str(tmp_path / "cache")).map(worse).to_parquet(folder / name)
    from hf_unlearnable.digests import file_digest

    record.published["files"][name] = {"sha256": file_digest(folder / name), "bytes": (folder / name).stat().st_size}
    record.save(folder / "record.json")
    found = by_name(verify(folder, clean=small, key=SECRET, progress=False))
    assert found["files"].status == "passed"
    assert found["pictures"].status == found["owner"].status == "failed"
    assert "jpeg" in found["pictures"].detail


def test_without_clean_rows_the_key_is_recognised(tmp_path: Path) -> None:
    """Ten classes of a hundred pictures, as the claim says; here smooth noise stands for photographs."""
    pictures = noise_pictures(1000, seed=3)
    clean = make_dataset(pictures, [i % 10 for i in range(1000)], classes=10)
    folder = made(clean, CudaPoison(seed=SECRET), tmp_path / "out")
    right = by_name(verify(folder, key=SECRET, decoys=10_000, progress=False))["owner"]
    assert right.status == "passed"
    assert "1,000 pictures" in right.detail
    wrong = by_name(verify(folder, key=OTHER, decoys=10_000, progress=False))["owner"]
    assert wrong.status == "failed"
    mine = Record.load(folder / "record.json")
    shown = Dataset.from_parquet(str(folder / "data/*"), cache_dir=str(tmp_path / "cache"))
    assert judged(recognise(shown, mine, SECRET, decoys=10_000, progress=False)).status == "passed"
    assert judged(recognise(shown, mine, OTHER, decoys=10_000, progress=False)).status == "failed"
    assert judged(recognise(clean, mine, SECRET, decoys=10_000, progress=False)).status == "failed"
    with pytest.raises(ValueError, match="expected the classes of the record"):
        recognise(make_dataset(pictures[:8], [0] * 8, classes=3), mine, SECRET, progress=False)
    noise = made(clean, RandomNoisePoison(seed=SECRET), tmp_path / "noise")
    told = by_name(verify(noise, key=SECRET, progress=False))["owner"]
    assert told.status == "not checked"
    assert "cannot be proved without the clean pictures" in told.detail


def test_the_script_ends_with_what_it_found(small: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = load_script("verify")
    folder = made(small, CudaPoison(seed=SECRET), tmp_path / "out")
    (tmp_path / "key").write_text(SECRET.hex())
    small.to_parquet(tmp_path / "clean.parquet")
    given = [str(folder), "--no-progress", "--clean", str(tmp_path / "clean.parquet")]
    assert script.main([*given, "--key-file", str(tmp_path / "key")]) == 0
    assert "nothing failed" in capsys.readouterr().out
    (tmp_path / "wrong").write_text(OTHER.hex())
    assert script.main([*given, "--key-file", str(tmp_path / "wrong")]) == 1
    assert "FAILED: commitment, owner" in capsys.readouterr().out
    assert script.main([str(tmp_path / "nothing" / "here" / "at-all")]) == 2
    assert "verify.py: " in capsys.readouterr().err


def test_a_second_configuration_is_verified_too(logged_in: Hub, small: Dataset, tmp_path: Path) -> None:
    publish(made(small, CudaPoison(seed=SECRET), tmp_path / "out"), Repository(MINE), progress=False)
    half = made(small, CudaPoison(seed=SECRET, poison_rate=0.5), tmp_path / "half")
    publish(half, Repository(MINE), config="rate-50", progress=False)
    found = by_name(verify(Repository(MINE), config="rate-50", clean=small, key=SECRET, progress=False))
    assert not [outcome for outcome in found.values() if outcome.status != "passed" and outcome.name != "budget"]
    assert found["owner"].detail.startswith("12 pictures recomputed")


@pytest.mark.parametrize(
    ("part", "change", "check"),
    [
        ("source", {"image_column": "x"}, "parquet"),
        ("source", {"label_column": "x"}, "parquet"),
        ("source", {"classes": ["a", "b", "c", "d"]}, "parquet"),
        ("key", {"kind": "x"}, "key"),
        ("key", {"commitment": None}, "key"),
        ("key", {"commitment": "sha256:00"}, "key"),
        ("settings", {"seed": 7}, "key"),
        ("settings", {"num_classes": 10**30}, "record"),
        ("settings", {"kernel_size": 10**30}, "owner"),
    ],
)
def test_records_that_say_what_is_not_so(
    small: Dataset, tmp_path: Path, part: str, change: dict[str, object], check: str
) -> None:
    folder = made(small, CudaPoison(seed=SECRET), tmp_path / "out")
    record = json.loads((folder / "record.json").read_text())
    record[part] |= change
    (folder / "record.json").write_text(json.dumps(record))
    found = by_name(verify(folder, clean=small, key=SECRET, progress=False))
    assert found[check].status == ("not checked" if check == "owner" else "failed")


@pytest.mark.parametrize("name", ["linf_levels", "l2", "mean_shift_levels", "psnr_db", "ssim"])
@pytest.mark.parametrize("part", ["mean", "sd", "largest"])
def test_figures_of_the_record_are_measured_again(small: Dataset, tmp_path: Path, name: str, part: str) -> None:
    folder = made(small, CudaPoison(seed=SECRET), tmp_path / "out")
    record = json.loads((folder / "record.json").read_text())
    spread = record["pixels"][name]
    spread[part] += 0.01 * (spread["largest"] - spread["least"]) * (-1 if part == "sd" else 1)
    (folder / "record.json").write_text(json.dumps(record))
    assert by_name(verify(folder, progress=False))["measures"].status == "not checked"
    found = by_name(verify(folder, clean=small, progress=False))["measures"]
    assert found.status == "failed"
    assert f"the record says {name} {part}" in found.detail


def test_sizes_and_schemas_are_looked_at(small: Dataset, tmp_path: Path) -> None:
    folder = made(small, CudaPoison(seed=SECRET), tmp_path / "out")
    record = json.loads((folder / "record.json").read_text())
    (said,) = record["published"]["files"].values()
    said["bytes"] += 1
    (folder / "record.json").write_text(json.dumps(record))
    assert "bytes, got" in by_name(verify(folder, progress=False))["files"].detail
    for schema in (None, "x", 0, -1, 1.5):
        (folder / "record.json").write_text(json.dumps({**record, "schema": schema}))
        with pytest.raises(ValueError, match="expected a record in JSON"):
            verify(folder, progress=False)


def test_decoys_are_drawn_afresh_each_time(small: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = made(small, CudaPoison(seed=SECRET), tmp_path / "out")
    keys: list[bytes] = []

    def proved(*_: object, decoy_key: bytes, **__: object) -> None:
        keys.append(decoy_key)
        raise ValueError("seen")

    monkeypatch.setattr(verifying, "prove", proved)
    for _ in range(2):
        verify(folder, key=SECRET, progress=False)
    with pytest.raises(ValueError, match="seen"):
        recognise(small, Record.load(folder / "record.json"), SECRET, progress=False)
    assert [len(key) for key in keys] == [32] * 3
    assert len(set(keys)) == 3


@pytest.mark.parametrize("place", [("pixels", "l2", "largest"), ("settings", "epsilon"), ("published", "rows")])
def test_numbers_of_any_length_are_told_and_stop_nothing(
    small: Dataset, tmp_path: Path, place: tuple[str, ...]
) -> None:
    folder = made(small, RandomNoisePoison(seed=SECRET), tmp_path / "out")
    record = json.loads((folder / "record.json").read_text())
    inner = record
    for part in place[:-1]:
        inner = inner[part]
    inner[place[-1]] = 10**400
    (folder / "record.json").write_text(json.dumps(record))
    (outcome,) = verify(folder, progress=False)
    assert (outcome.name, outcome.status) == ("record", "failed")
    with pytest.raises(ValueError, match="the record is incomplete"):
        recognise(small, Record.load(folder / "record.json"), SECRET, progress=False)


def test_a_claim_that_was_not_shown_is_no_success(
    small: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = made(small, RandomNoisePoison(seed=12345), tmp_path / "out")
    main = load_script("verify").main
    assert main([str(folder), "--no-progress"]) == 0
    assert main([str(folder), "--no-progress", "--seed", "12345"]) == 1
    assert "nothing failed\n  whose it is was not shown" in capsys.readouterr().out
