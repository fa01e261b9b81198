import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import PIL.Image
import pytest
from datasets import Dataset, Image, load_dataset

from hf_unlearnable import CudaPoison, RandomNoisePoison
from hf_unlearnable import protect as room
from hf_unlearnable.digests import columns_digest, split_digest
from hf_unlearnable.protect import protect
from hf_unlearnable.record import SCHEMA, Record
from tests.conftest import ROOT, load_script, make_dataset, noise_pictures, pixels

SECRET = bytes(range(32))


@pytest.fixture
def script() -> ModuleType:
    return load_script("protect")


def everything_written(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def test_the_folder_is_a_dataset_with_a_record_a_picture_and_a_card(small: Dataset, tmp_path: Path) -> None:
    poison = CudaPoison(seed=SECRET)
    record = protect(small, poison, tmp_path / "out", source="somebody/small", progress=False)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["README.md", "data", "preview.png", "record.json"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    found = load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    assert list(found) == ["train"]
    assert found["train"].features == small.features
    assert np.array_equal(pixels(found["train"]), pixels(poison.apply(small)))
    assert found["train"]["label"][:] == small["label"][:]
    assert found["train"]["name"][:] == small["name"][:]
    assert Record.load(tmp_path / "out" / "record.json") == record
    assert record.method == "cuda"
    assert record.source["rows"] == record.published["rows"] == 24
    assert record.source["dataset"] == "somebody/small"
    shown = [{name: row[name] for name in ("label", "name")} for row in small]
    assert record.source["columns_sha256"] == split_digest(map(columns_digest, shown))
    assert record.pixels["rows_changed"] == 24
    assert record.results == []
    assert record.key["kind"] == "secret"
    with PIL.Image.open(tmp_path / "out" / "preview.png") as preview:
        assert min(preview.size) > 300
    card = (tmp_path / "out" / "README.md").read_text()
    assert "not measured" in card
    assert record.key["commitment"] in card


@pytest.mark.parametrize("seed", [SECRET, 987654321])
def test_the_key_is_in_nothing_that_was_written(small: Dataset, tmp_path: Path, seed: int | bytes) -> None:
    protect(small, CudaPoison(seed=seed), tmp_path / "out", source="small", progress=False)
    written = everything_written(tmp_path / "out")
    for form in (SECRET, SECRET.hex().encode(), b"987654321", (987654321).to_bytes(4, "little")):
        assert form not in written


def test_an_int_seed_is_recorded_only_on_request(small: Dataset, tmp_path: Path) -> None:
    poison = CudaPoison(seed=987654321)
    silent = protect(small, poison, tmp_path / "a", source="small", progress=False)
    spoken = protect(small, poison, tmp_path / "b", source="small", progress=False, record_seed=True)
    secret = protect(small, CudaPoison(seed=SECRET), tmp_path / "c", source="small", progress=False, record_seed=True)
    assert silent.key == {"kind": "int", "commitment": None}
    assert spoken.key == {"kind": "int", "commitment": None, "seed": 987654321}
    assert set(secret.key) == {"kind", "commitment"}
    assert "guessable" in (tmp_path / "a" / "README.md").read_text()


def test_several_shards_and_processes_are_the_same_rows(
    small: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "SHARD_BYTES", small.data.nbytes // 3)
    record = protect(small, RandomNoisePoison(seed=7), tmp_path / "out", source="small", num_proc=2, progress=False)
    assert len(record.published["files"]) >= 3
    found = load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert np.array_equal(pixels(found), pixels(RandomNoisePoison(seed=7).apply(small)))
    assert record.pixels["budgets"] == [{"norm": "linf", "epsilon": 8 / 255, "kept_by_rows": 24}]
    assert record.pixels["linf_levels"]["largest"] == 8


def test_a_path_is_not_recorded_whole(small: Dataset, tmp_path: Path) -> None:
    small.to_parquet(tmp_path / "mine.parquet")
    record = protect(small, CudaPoison(seed=7), tmp_path / "out", source=str(tmp_path / "mine.parquet"), progress=False)
    assert record.source["dataset"] == "mine.parquet"
    assert str(tmp_path).encode() not in everything_written(tmp_path / "out")


def test_folders_of_one_name_are_not_mistaken_for_each_other(small: Dataset, tmp_path: Path) -> None:
    for seed, folder in ((7, "a"), (8, "b")):
        protect(small, CudaPoison(seed=seed), tmp_path / folder / "out", source="small", progress=False)
        found = load_dataset(str(tmp_path / folder / "out"), split="train", cache_dir=str(tmp_path / "cache"))
        assert np.array_equal(pixels(found), pixels(CudaPoison(seed=seed).apply(small)))
    protect(small, CudaPoison(seed=9), tmp_path / "a" / "out", source="small", progress=False, overwrite=True)
    found = load_dataset(str(tmp_path / "a" / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert np.array_equal(pixels(found), pixels(CudaPoison(seed=9).apply(small)))


def test_an_existing_output_is_refused_then_replaced_whole(small: Dataset, tmp_path: Path) -> None:
    protect(small, CudaPoison(seed=7), tmp_path / "out", source="small", progress=False)
    before = everything_written(tmp_path / "out")
    with pytest.raises(FileExistsError, match="--overwrite"):
        protect(small, CudaPoison(seed=8), tmp_path / "out", source="small", progress=False)
    assert everything_written(tmp_path / "out") == before
    protect(small, CudaPoison(seed=8), tmp_path / "out", source="small", progress=False, overwrite=True)
    assert everything_written(tmp_path / "out") != before


def test_only_an_earlier_output_is_overwritten_and_never_the_source(small: Dataset, tmp_path: Path) -> None:
    small.to_parquet(tmp_path / "mine" / "a.parquet")
    (tmp_path / "mine" / "key").write_text("secret")
    protect(small, CudaPoison(seed=7), tmp_path / "out", source="small", progress=False)
    (tmp_path / "out" / "notes").write_text("mine")
    for output, source, message in (
        (tmp_path / "mine", "small", "not overwritten"),
        (tmp_path / "out", "small", "not overwritten"),
        (tmp_path / "mine" / "a.parquet", "small", "not overwritten"),
        (tmp_path / "mine", str(tmp_path / "mine" / "a.parquet"), "holds the source"),
        (tmp_path, str(tmp_path / "mine"), "holds the source"),
    ):
        before = everything_written(tmp_path)
        with pytest.raises(FileExistsError, match=message):
            protect(small, CudaPoison(seed=8), output, source=source, progress=False, overwrite=True)
        assert everything_written(tmp_path) == before


def test_other_pictures_are_not_published_clean(small: Dataset, tmp_path: Path) -> None:
    thumbs = small.add_column("thumb", [row["bytes"] for row in small.cast_column("img", Image(decode=False))["img"]])
    thumbs = thumbs.cast_column("thumb", Image())
    with pytest.raises(ValueError, match=r"columns \['thumb'\] hold pictures too"):
        protect(thumbs, CudaPoison(seed=7, image_column="img"), tmp_path / "out", source="small", progress=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("split", ["train[:3]", "train+test", "a/b", "train-x", ""])
def test_split_names_that_could_not_be_read(small: Dataset, tmp_path: Path, split: str) -> None:
    with pytest.raises(ValueError, match="split name"):
        protect(small, CudaPoison(seed=7), tmp_path / "out", source="small", split=split, progress=False)


@pytest.mark.parametrize("where", ["_write", "_measure"])
def test_a_failure_leaves_the_old_output_and_nothing_finished(
    small: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    protect(small, CudaPoison(seed=7), tmp_path / "old", source="small", progress=False)
    before = everything_written(tmp_path / "old")

    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(room, where, full_disk)
    for name, overwrite in (("new", False), ("old", True)):
        with pytest.raises(OSError, match="No space left"):
            protect(small, CudaPoison(seed=8), tmp_path / name, source="small", progress=False, overwrite=overwrite)
    assert not (tmp_path / "new").exists()
    assert everything_written(tmp_path / "old") == before
    monkeypatch.undo()
    protect(small, CudaPoison(seed=8), tmp_path / "new", source="small", progress=False)
    assert not list(tmp_path.glob(".new*"))


def test_ctrl_c_in_the_middle(tmp_path: Path) -> None:
    rows = 3000
    make_dataset(noise_pictures(rows, 64, 64), [i % 4 for i in range(rows)]).to_parquet(tmp_path / "in.parquet")
    command = [sys.executable, str(ROOT / "scripts" / "protect.py"), "--dataset", str(tmp_path / "in.parquet")]
    command += ["--poison", "cuda", "--seed", "7", "--output", str(tmp_path / "out"), "--batch-size", "20"]
    with subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job is born deaf to it
    ) as process:
        deadline = time.monotonic() + 100
        while not list(tmp_path.glob(".out.partial/cache/*")) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        try:
            assert process.wait(timeout=60) != 0
        finally:
            process.kill()
    assert not (tmp_path / "out").exists()


def test_two_runs_on_one_output(small: Dataset, tmp_path: Path) -> None:
    from filelock import FileLock

    with FileLock(str(tmp_path / ".out.partial.lock")), pytest.raises(FileExistsError, match="another run"):
        protect(small, CudaPoison(seed=7), tmp_path / "out", source="small", progress=False)


def test_published_data_that_differ_are_refused(
    small: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = room._write

    def relabelled(dataset: Dataset, *rest: object) -> list[Path]:
        labels = dataset["label"][:]
        labels[13] = (labels[13] + 1) % 4
        column = dataset.features["label"]
        return write(
            dataset.remove_columns("label")
            .add_column("label", labels)
            .cast_column("label", column)
            .select_columns(dataset.column_names),
            *rest,
        )

    def shortened(dataset: Dataset, *rest: object) -> list[Path]:
        return write(dataset.select(range(20)), *rest)

    def clean(_: Dataset, *rest: object) -> list[Path]:
        loud = [PIL.Image.fromarray(255 - p) for p in pixels(small)]
        return write(make_dataset(loud, small["label"][:]), *rest)

    for damage, message in (
        (relabelled, "row 13: column 'label'"),
        (shortened, "expected 24 published rows, got 20"),
        (clean, "row 0: expected linf"),
    ):
        monkeypatch.setattr(room, "_write", damage)
        with pytest.raises(ValueError, match=message):
            protect(small, RandomNoisePoison(seed=7), tmp_path / "out", source="small", progress=False)
        assert not (tmp_path / "out").exists()


def test_an_empty_split(small: Dataset, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="empty split"):
        protect(small.select([]), CudaPoison(seed=7), tmp_path / "out", source="small")
    assert not list(tmp_path.iterdir())


def test_alpha_grayscale_and_sizes_survive_the_round_trip(tmp_path: Path) -> None:
    rgb = PIL.Image.fromarray(noise_pictures(1, 40, 52)[0])
    rgba = rgb.copy()
    rgba.putalpha(120)
    source = make_dataset([rgb, rgb.convert("L"), rgba, rgb.resize((33, 20))], [0, 1, 2, 3])
    protect(source, CudaPoison(seed=7), tmp_path / "out", source="mixed", progress=False)
    found = load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert [p.mode for p in found["img"]] == ["RGB", "RGB", "RGBA", "RGB"]
    assert [p.size for p in found["img"]] == [p.size for p in source["img"]]
    assert (np.asarray(found["img"][2])[:, :, 3] == 120).all()


def test_lost_transparency_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = PIL.Image.fromarray(noise_pictures(1)[0])
    picture.putalpha(120)
    source, write = make_dataset([picture], [0]), room._write

    def opaque(dataset: Dataset, *rest: object) -> list[Path]:
        return write(make_dataset([dataset[0]["img"].convert("RGB")], [0]), *rest)

    monkeypatch.setattr(room, "_write", opaque)
    with pytest.raises(ValueError, match="row 0: the transparency"):
        protect(source, CudaPoison(seed=7), tmp_path / "out", source="small", progress=False)


# The record.


def test_a_record_of_a_newer_schema_or_none_at_all(small: Dataset, tmp_path: Path) -> None:
    protect(small, CudaPoison(seed=7), tmp_path / "out", source="small", progress=False)
    path = tmp_path / "out" / "record.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "schema": SCHEMA + 1}))
    with pytest.raises(ValueError, match="update hf_unlearnable"):
        Record.load(path)
    path.write_text(json.dumps({**values, "surprise": 1}))
    with pytest.raises(ValueError, match="not a record of schema"):
        Record.load(path)
    for text in ("", "[]", "{}"):
        path.write_text(text)
        with pytest.raises(ValueError, match="expected a record"):
            Record.load(path)


# The script.


def test_the_script_on_a_folder_of_pictures_with_a_secret_key(tmp_path: Path) -> None:
    for i, picture in enumerate(noise_pictures(8)):
        folder = tmp_path / "photos" / ("cat" if i % 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        PIL.Image.fromarray(picture).save(buffer, "JPEG")
        (folder / f"{i}.jpg").write_bytes(buffer.getvalue())
    keygen = [sys.executable, str(ROOT / "scripts" / "keygen.py"), "--output", str(tmp_path / "key")]
    assert "commitment" in subprocess.check_output(keygen, text=True, timeout=100)
    again = subprocess.run(keygen, capture_output=True, text=True, timeout=100, check=False)
    assert again.returncode != 0
    assert "File exists" in again.stderr
    command = [sys.executable, str(ROOT / "scripts" / "protect.py"), "--dataset", str(tmp_path / "photos")]
    command += ["--poison", "cuda", "--key-file", str(tmp_path / "key"), "--output", str(tmp_path / "out")]
    command += ["--kernel-size", "5", "--blur", "0.2", "--protect-classes", "cat"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert "4 of 8 pictures changed by cuda" in done.stdout
    record = Record.load(tmp_path / "out" / "record.json")
    assert record.settings["kernel_size"] == 5
    assert record.settings["classes"] == [0]
    found = load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    for row in found.cast_column("image", Image(decode=False))["image"]:
        assert row["path"] is None
        assert row["bytes"][:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--poison", "cude", "--seed", "1"], "no poison 'cude'; did you mean 'cuda'"),
        (["--poison", "cuda"], "one of the arguments --key-file --seed is required"),
        (["--poison", "cuda", "--seed", "1", "--key-file", "k"], "not allowed with"),
        (["--poison", "cuda", "--seed", "1", "--sede", "2"], "unrecognized arguments: --sede"),
        (["--poison", "cuda", "--seed", "1", "--kernel-size", "4"], "kernel_size is odd"),
        (["--poison", "cuda", "--seed", "-1"], "not negative"),
        (["--poison", "cuda", "--seed", "x"], "invalid int value"),
        (["--poison", "cuda", "--key-file", "missing-key"], "missing-key"),
        (["--poison", "cuda", "--seed", "1", "--image-column", "nope"], "not a column"),
        (["--poison", "cuda", "--seed", "1", "--protect-classes", "zebra"], "'zebra'"),
        (["--poison", "cuda", "--seed", "1", "--split", "trian"], "did you mean 'train'"),
        (["--poison", "cuda", "--seed", "1", "--mode", "odd"], "invalid choice: 'odd'"),
    ],
)
def test_the_script_says_what_is_wrong(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    small: Dataset,
    script: ModuleType,
    capsys: pytest.CaptureFixture[str],
) -> None:
    small.to_parquet(tmp_path / "in.parquet")
    with pytest.raises(SystemExit) as stopped:
        script.main(["--dataset", str(tmp_path / "in.parquet"), "--output", str(tmp_path / "out"), *arguments])
    assert message in f"{stopped.value} {capsys.readouterr().err}"
    assert not (tmp_path / "out").exists()


def test_help_lists_the_settings_of_a_poison(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, expected in ((["--help"], "--dataset"), (["--poison", "cuda", "--help"], "--kernel-size INT")):
        with pytest.raises(SystemExit, match="0"):
            script.main(arguments)
        assert expected in capsys.readouterr().out


def test_a_leftover_of_another_run_does_not_leak_in(small: Dataset, tmp_path: Path) -> None:
    staging = tmp_path / ".out.partial"
    (staging / "data").mkdir(parents=True)
    (staging / "data" / "train-00099-of-00100.parquet").write_bytes(b"old")
    (staging / "cache").mkdir()
    (staging / "cache" / "tmpabc").write_bytes(b"old")
    protect(small, CudaPoison(seed=7), tmp_path / "out", source="small", progress=False)
    assert len(list((tmp_path / "out" / "data").iterdir())) == 1
    assert not (tmp_path / "out" / "cache").exists()
    shutil.rmtree(tmp_path / "out")
    assert os.listdir(tmp_path) == []
