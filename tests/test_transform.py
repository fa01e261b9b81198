"""The map edge and its traps, with the CUDA poison and a transform that only inverts."""

import hashlib
import io
import json
import os
import pickle
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value, load_from_disk
from datasets.fingerprint import Hasher

from hf_unlearnable import CudaPoison, RandomNoisePoison, Transform, images
from hf_unlearnable.images import Picture
from hf_unlearnable.transform import _CHECK_COLUMN, _ReadBack
from tests.conftest import make_dataset, noise_pictures, pixels


@dataclass(frozen=True, kw_only=True)
class Invert(Transform):
    name: ClassVar[str] = "invert"

    def change(self, pixels, labels, where):
        return 255 - pixels


def stored_bytes(dataset: Dataset, column: str = "img") -> list[bytes]:
    return [row["bytes"] for row in dataset.cast_column(column, Image(decode=False))[column]]


def jpeg_dataset(rows: int = 24, **options: object) -> Dataset:
    values = []
    for picture in noise_pictures(rows):
        buffer = io.BytesIO()
        PIL.Image.fromarray(picture).save(buffer, "JPEG", quality=75, **options)
        values.append({"bytes": buffer.getvalue(), "path": "original.jpg"})
    return make_dataset(values, [i % 4 for i in range(rows)])


@pytest.fixture(params=["png", "jpeg", "paths"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Dataset:
    if request.param == "png":
        return make_dataset(noise_pictures(24), [i % 4 for i in range(24)])
    if request.param == "jpeg":
        return jpeg_dataset()
    values = []
    for i, picture in enumerate(noise_pictures(24)):
        path = tmp_path / f"{i}.png"
        PIL.Image.fromarray(picture).save(path)
        values.append({"bytes": None, "path": str(path)})
    return make_dataset(values, [i % 4 for i in range(24)])


def test_every_way_of_mapping_gives_the_same_pixels(source: Dataset) -> None:
    poison = CudaPoison(seed=7)
    expected = pixels(source.map(poison, keep_in_memory=True))
    assert (expected != pixels(source)).any((1, 2, 3)).all()
    for batch_size in (1, 7, 1000):
        assert np.array_equal(pixels(source.map(poison, batched=True, batch_size=batch_size)), expected)
    assert np.array_equal(pixels(poison.apply(source)), expected)
    assert np.array_equal(
        pixels(source.cast_column("img", Image(decode=False)).map(poison).cast_column("img", Image())), expected
    )
    for form in ("numpy", "torch"):
        for batched in (False, True):
            mapped = source.with_format(form).map(poison, batched=batched, batch_size=5)
            assert isinstance(mapped.features["img"], Image)
            assert np.array_equal(pixels(mapped.with_format(None)), expected)
            applied = poison.apply(source.with_format(form))
            assert applied.format["type"] == form
            assert np.array_equal(pixels(applied.with_format(None)), expected)


def test_order_does_not_matter(source: Dataset) -> None:
    poison = RandomNoisePoison(seed=7)
    expected = {row["name"]: np.asarray(row["img"]) for row in source.map(poison, keep_in_memory=True)}
    for other in (
        source.shuffle(seed=1),
        source.select([5, 3, 3, 9]),
        source.filter(lambda name: "1" in name, input_columns="name"),
    ):
        for row in other.map(poison, batched=True, batch_size=4, keep_in_memory=True):
            assert np.array_equal(np.asarray(row["img"]), expected[row["name"]])


def test_processes(source: Dataset) -> None:
    poison = RandomNoisePoison(seed=7)
    expected = pixels(source.map(poison, keep_in_memory=True))
    assert np.array_equal(pixels(source.map(poison, batched=True, num_proc=2)), expected)
    assert np.array_equal(pixels(poison.apply(source, num_proc=2)), expected)


@pytest.mark.filterwarnings("ignore:To copy construct:UserWarning")
def test_streams(source: Dataset) -> None:
    poison = CudaPoison(seed=7)
    expected = pixels(source.map(poison, keep_in_memory=True))
    stream = source.to_iterable_dataset()
    for mapped in (
        stream.map(poison),
        stream.map(poison, batched=True, batch_size=5),
        poison.apply(stream, batch_size=5),
    ):
        rows = list(mapped)
        assert all(isinstance(row["img"], PIL.Image.Image) for row in rows)
        assert np.array_equal(np.stack([np.asarray(row["img"]) for row in rows]), expected)
        assert [row["label"] for row in rows] == source["label"][:]
    assert poison.apply(stream).features == source.features
    torch_rows = list(stream.with_format("torch").map(poison, batched=True, batch_size=5))
    assert np.array_equal(np.stack([row["img"].permute(1, 2, 0).numpy() for row in torch_rows]), expected)


def test_a_hang_after_the_parent_has_used_torch() -> None:
    """A parent whose torch threads have run forks workers that run torch: hangs unless they run on one thread."""
    script = """
        import numpy as np, torch
        from datasets import Dataset, Features, Image, ClassLabel
        from hf_unlearnable import CudaPoison
        torch.set_num_threads(2)
        torch.nn.Conv2d(3, 64, 3)(torch.zeros(64, 3, 64, 64)).sum().backward()
        features = Features(img=Image(), label=ClassLabel(num_classes=2))
        pictures = [np.full((32, 32, 3), i, np.uint8) for i in range(64)]
        ds = Dataset.from_dict({"img": pictures, "label": [i % 2 for i in range(64)]}, features=features)
        print(len(ds.map(CudaPoison(seed=1), batched=True, batch_size=16, num_proc=2)))
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.stdout.strip() == "64", done.stderr[-2000:]


def test_what_is_stored_is_lossless_fresh_and_anonymous(source: Dataset) -> None:
    for mapped in (source.map(Invert(), batched=True), Invert().apply(source), source.map(Invert())):
        assert np.array_equal(pixels(mapped), 255 - pixels(source))
        for row in mapped.cast_column("img", Image(decode=False))["img"]:
            assert row["path"] is None
            assert row["bytes"][:4] == b"\x89PNG"
    webp = Invert(image_format="webp").apply(source)
    assert np.array_equal(pixels(webp), 255 - pixels(source))
    assert all(data[8:12] == b"WEBP" for data in stored_bytes(webp))


def test_inputs_labels_order_and_other_columns_stay(source: Dataset) -> None:
    before = pixels(source)
    for mapped in (source.map(Invert(), batched=True), Invert().apply(source)):
        assert mapped.features == source.features
        assert mapped["label"][:] == source["label"][:]
        assert mapped["name"][:] == source["name"][:]
        assert mapped.column_names == source.column_names
    assert np.array_equal(pixels(source), before)
    row = source[0]
    kept = np.asarray(row["img"]).copy()
    Invert()(row)
    assert np.array_equal(np.asarray(row["img"]), kept)
    batch = {"img": torch.zeros(2, 3, 4, 4, dtype=torch.uint8), "label": torch.tensor([0, 1])}
    Invert()(batch)
    assert not batch["img"].any()


def test_exif_rotation_is_baked_in_and_removed() -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    exif[0x8825] = {1: "N", 2: (1.0, 2.0, 3.0)}
    source = jpeg_dataset(4, exif=exif)
    upright = pixels(source)
    mapped = Invert().apply(source)
    assert np.array_equal(pixels(mapped), 255 - upright)
    assert all(b"eXIf" not in data and b"Exif" not in data for data in stored_bytes(mapped))


def test_mixed_modes_and_sizes_in_one_batch() -> None:
    array = noise_pictures(1, 20, 28)[0]
    rgb = PIL.Image.fromarray(array)
    rgba = rgb.copy()
    rgba.putalpha(PIL.Image.fromarray((np.arange(20 * 28) % 256).astype(np.uint8).reshape(20, 28)))
    pictures = [
        rgb,
        rgb.convert("L"),
        rgb.convert("P"),
        rgba,
        rgb.convert("CMYK"),
        rgb.resize((9, 13)),
        rgb.convert("1"),
    ]
    wide = PIL.Image.fromarray(np.asarray(rgb.convert("L")).astype(np.uint16) * 257)
    pictures.append(wide)
    source = make_dataset(pictures, [0] * len(pictures))
    for mapped in (Invert().apply(source), source.map(Invert(), batched=True), source.map(Invert())):
        for before, after in zip(pictures, mapped["img"], strict=True):
            if before is wide:
                expected = 255 - np.asarray(rgb.convert("L").convert("RGB"))
            else:
                expected = 255 - np.asarray(before.convert("RGBA").convert("RGB"))
            assert after.mode == ("RGBA" if before is rgba else "RGB")
            assert np.array_equal(np.asarray(after)[:, :, :3], expected)
        assert np.array_equal(np.asarray(mapped["img"][3])[:, :, 3], np.asarray(rgba)[:, :, 3])


BAD_LABELS = [(-1, "got -1"), (None, "got None")]


@pytest.mark.parametrize(("bad", "message"), BAD_LABELS)
def test_bad_labels_stop_everything_and_name_the_row(bad: int | None, message: str, tmp_path: Path) -> None:
    labels: list = [i % 4 for i in range(24)]
    labels[17] = bad
    source = make_dataset(noise_pictures(24), labels)
    poison = CudaPoison(seed=7)
    with pytest.raises(ValueError, match=f"row 17: expected one of 4 classes .*{message}"):
        poison.apply(source, cache_dir=tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=f"row 7 of the batch: expected a class .*{message}"):
        source.map(poison, batched=True, batch_size=10)
    with pytest.raises(ValueError, match=f"row 17: expected a class .*{message}"):
        list(poison.apply(source.to_iterable_dataset(), batch_size=10))
    assert len(RandomNoisePoison(seed=7).apply(source)) == 24


def test_labels_outside_the_classes_of_a_stream() -> None:
    stream = make_dataset(noise_pictures(12), [0, 1] * 6, classes=2).to_iterable_dataset()
    features = stream.features
    wrong = stream.map(lambda row, i: {"label": 5 if i == 9 else row["label"]}, with_indices=True, features=features)
    with pytest.raises(ValueError, match="row 9: expected one of 2 classes .*got 5"):
        list(CudaPoison(seed=7).apply(wrong, batch_size=4))


def test_more_classes_than_the_poison_was_told(small: Dataset) -> None:
    poison = CudaPoison(seed=7, num_classes=3)
    with pytest.raises(ValueError, match="at most 3 classes .*got 4"):
        poison.apply(small)
    with pytest.raises(ValueError, match="row 3 of the batch: expected one of 3 classes .*got label 3"):
        small.map(poison, batched=True)
    with pytest.raises(ValueError, match=r"has 4 classes .* got classes=\(1, 9\)"):
        CudaPoison(seed=7, classes=(9, 1)).apply(small)


def test_integer_labels_are_checked_before_writing_also_where_rows_stay(small: Dataset, tmp_path: Path) -> None:
    bare = small.cast_column("label", Value("int64"))
    with pytest.raises(ValueError, match="row 3: expected one of 3 classes .*got 3"):
        CudaPoison(seed=7, num_classes=3, classes=(0,)).apply(bare, cache_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_missing_and_unreadable_pictures_name_the_row() -> None:
    values: list = [PIL.Image.fromarray(p) for p in noise_pictures(12)]
    values[8] = None
    with pytest.raises(ValueError, match="row 8: expected a picture, got None"):
        CudaPoison(seed=7).apply(make_dataset(values, [0] * 12), batch_size=5)
    with pytest.raises(ValueError, match="row 3 of the batch: expected a picture, got None"):
        make_dataset(values, [0] * 12).map(CudaPoison(seed=7), batched=True, batch_size=5)
    values[8] = {"bytes": b"broken", "path": None}
    with pytest.raises(ValueError, match="row 8: expected a readable picture"):
        CudaPoison(seed=7).apply(make_dataset(values, [0] * 12))


def test_two_label_columns_need_a_choice(small: Dataset) -> None:
    names = ClassLabel(names=["x", "y"])
    both = (
        small.rename_column("label", "fine_label")
        .add_column("coarse_label", [0, 1] * 12)
        .cast_column("coarse_label", names)
    )
    for way in (lambda p: p.apply(both), lambda p: both.map(p), lambda p: list(both.to_iterable_dataset().map(p))):
        with pytest.raises(ValueError, match=r"\['fine_label', 'coarse_label'\].*label_column="):
            way(CudaPoison(seed=7))
    chosen = CudaPoison(seed=7, label_column="fine_label")
    expected = pixels(CudaPoison(seed=7).apply(small))
    assert np.array_equal(pixels(chosen.apply(both)), expected)
    assert np.array_equal(pixels(both.map(chosen, batched=True)), expected)


def test_no_label_column(small: Dataset) -> None:
    bare = small.remove_columns("label")
    with pytest.raises(ValueError, match="no label column"):
        CudaPoison(seed=7).apply(bare)
    assert np.array_equal(pixels(RandomNoisePoison(seed=7).apply(bare)), pixels(RandomNoisePoison(seed=7).apply(small)))


def test_wrong_containers(small: Dataset) -> None:
    poison = CudaPoison(seed=7)
    both = DatasetDict(train=small, test=small)
    with pytest.raises(ValueError, match=r"only training data .*split="):
        poison.apply(both)
    with pytest.raises(ValueError, match="split='valid' is not in"):
        poison.apply(both, split="valid")
    done = poison.apply(both, split="train")
    assert np.array_equal(pixels(done["test"]), pixels(small))
    assert np.array_equal(pixels(done["train"]), pixels(poison.apply(small)))
    with pytest.raises(ValueError, match="mode 'L'"):
        poison.apply(small.cast_column("img", Image(mode="L")))
    for form in ("arrow", "pandas"):
        with pytest.raises(TypeError, match=r"with_format\(None\)"):
            small.with_format(form).map(poison, batched=True)


# Fingerprints, caches and keys.


def test_equal_transforms_hash_alike_and_using_one_changes_nothing(small: Dataset) -> None:
    a, b = CudaPoison(seed=7), CudaPoison(seed=7, device="cpu")
    before = Hasher.hash(a)
    assert Hasher.hash(b) == before
    a(small[0])
    assert Hasher.hash(a) == before
    others = [
        CudaPoison(seed=8),
        CudaPoison(seed=7, blur=0.2),
        RandomNoisePoison(seed=7),
        CudaPoison(seed=7, compress_level=2),
    ]
    assert len({Hasher.hash(p) for p in [a, *others]}) == 5


def test_the_hash_is_the_same_in_another_process(tmp_path: Path) -> None:
    script = "from datasets.fingerprint import Hasher\nfrom hf_unlearnable import CudaPoison\n"
    script += "print(Hasher.hash(CudaPoison(seed=7)))"
    found = set()
    for hash_seed in ("0", "1"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "XDG_CACHE_HOME": str(tmp_path)}
        found.add(subprocess.check_output([sys.executable, "-c", script], text=True, env=environment, timeout=100))
    assert len(found) == 1


def test_a_new_version_does_not_reuse_old_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_dataset(noise_pictures(6), [0] * 6).save_to_disk(tmp_path / "ds")
    source = load_from_disk(tmp_path / "ds")
    first, old = source.map(Invert(), batched=True), Invert().apply(source)
    assert source.map(Invert(), batched=True).cache_files == first.cache_files
    assert Invert().apply(source).cache_files == old.cache_files
    monkeypatch.setattr(Invert, "version", 2)
    assert source.map(Invert(), batched=True).cache_files != first.cache_files
    assert Invert().apply(source).cache_files != old.cache_files


def test_batch_size_and_processes_do_not_recompute(tmp_path: Path) -> None:
    make_dataset(noise_pictures(6), [0] * 6).save_to_disk(tmp_path / "ds")
    source = load_from_disk(tmp_path / "ds")
    assert Invert().apply(source, batch_size=2).cache_files == Invert().apply(source, batch_size=5).cache_files


def test_the_key_is_in_no_text_cache_name_or_fingerprint(tmp_path: Path) -> None:
    key, seed = bytes(range(32)), 987654321
    make_dataset(noise_pictures(6), [0] * 6).save_to_disk(tmp_path / "ds")
    source = load_from_disk(tmp_path / "ds")
    for secret in (key, seed):
        poison = CudaPoison(seed=secret)
        applied, mapped = poison.apply(source), source.map(poison, batched=True)
        shown = f"{poison!r} {poison} {json.dumps(poison.cache_state())} {applied._fingerprint} {mapped.cache_files}"
        for form in (str(secret), key.hex(), repr(key)):
            assert form not in shown
        with pytest.raises(ValueError, match="blur") as caught:
            CudaPoison(seed=secret, blur=2)
        assert str(secret) not in str(caught.value)
    raw = b"".join(path.read_bytes() for path in (tmp_path / "ds").rglob("*") if path.is_file())
    for form in (key, key.hex().encode(), b"987654321", seed.to_bytes(4, "little"), seed.to_bytes(4, "big")):
        assert form not in raw


def test_a_fingerprint_is_no_oracle_for_a_seed(small: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another machine that guesses the right seed computes another fingerprint."""
    from hf_unlearnable import keys

    found = []
    for machine in ("a", "b"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / machine))
        keys._local_salt.cache_clear()
        found.append((Hasher.hash(CudaPoison(seed=7)), CudaPoison(seed=7).apply(small)._fingerprint))
    keys._local_salt.cache_clear()
    assert found[0][0] != found[1][0]
    assert found[0][1] != found[1][1]


def test_pickling_keeps_everything(small: Dataset) -> None:
    poison = CudaPoison(seed=bytes(range(32)), blur=0.2, classes=(1, 2))
    again = pickle.loads(pickle.dumps(poison))  # noqa: S301
    assert again == poison
    assert np.array_equal(pixels(small.map(again, batched=True)), pixels(small.map(poison, batched=True)))


def test_reading_back_notices_changed_bytes(small: Dataset) -> None:
    plain = small.cast_column("img", Image(decode=False))
    meant = [hashlib.sha256(value["bytes"]).digest() for value in plain["img"]]
    assert _ReadBack("img")({"img": plain["img"][:], _CHECK_COLUMN: meant}, range(100, 124)) is None
    meant[5] = b"0" * 32
    with pytest.raises(ValueError, match="row 105, read back: the stored picture is not"):
        _ReadBack("img")({"img": plain["img"][:], _CHECK_COLUMN: meant}, range(100, 124))


def test_an_encoder_that_loses_something_is_noticed(small: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    encode, row_7 = images.encode, 255 - images.decode_many(small["img"])[7].pixels

    def lossy(picture: Picture, **how: Any) -> bytes:
        changed = picture.pixels.clone()
        changed[0, 0, 0] ^= int(torch.equal(picture.pixels, row_7))
        return encode(Picture(changed, picture.alpha), **how)

    monkeypatch.setattr(images, "encode", lossy)
    with pytest.raises(ValueError, match="row 7: the stored picture is not the one that was made"):
        Invert().apply(small)


def test_an_interrupted_apply_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    values: list = [PIL.Image.fromarray(p) for p in noise_pictures(24)]
    values[20] = None
    with pytest.raises(ValueError, match="row 20"):
        Invert().apply(make_dataset(values, [0] * 24), batch_size=4, cache_dir=tmp_path)
    assert not list(tmp_path.glob("*.arrow"))


@pytest.mark.parametrize("settings", [{"image_format": "jpeg"}, {"compress_level": 10}, {"compress_level": -1}])
def test_bad_settings(settings: dict) -> None:
    with pytest.raises(Exception, match="image_format|compress_level"):
        Invert(**settings)


def test_extra_features_pass_through(small: Dataset) -> None:
    wide = small.add_column("box", [[1, 2]] * 24).add_column("none", [None] * 24)
    features = Features({**wide.features, "none": Value("float32")})
    applied = Invert().apply(wide.cast(features))
    assert applied.features == features
    assert applied["box"][:] == wide["box"][:]


def test_a_later_map_that_hands_pictures_back_keeps_them(small: Dataset) -> None:
    protected = RandomNoisePoison(seed=bytes(32)).apply(small)
    again = protected.map(lambda row: {"img": row["img"]})
    assert np.array_equal(pixels(again), pixels(protected))


def test_another_way_to_check_makes_another_cache(small: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Invert().apply(small)
    monkeypatch.setattr("hf_unlearnable.transform._CHECK_COLUMN", "__stored_otherwise__")
    second = Invert().apply(small)
    assert second._fingerprint != first._fingerprint
    assert np.array_equal(pixels(first), pixels(second))
