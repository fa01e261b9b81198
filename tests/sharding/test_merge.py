"""What is missing, doubled, changed or foreign is not called finished."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_unlearnable import RandomNoisePoison, metrics
from hf_unlearnable.budget import Budget
from hf_unlearnable.metrics import PixelReport
from hf_unlearnable.record import Record
from hf_unlearnable.sharding import merge as room
from hf_unlearnable.sharding.manifest import pack, unpack
from hf_unlearnable.sharding.merge import merge
from hf_unlearnable.sharding.run import protect_shards
from hf_unlearnable.sharding.storage import Storage
from hf_unlearnable.sources import stream_split
from tests.sharding.test_run import SECRET, close


@pytest.fixture
def made(parquet: Path, tmp_path: Path) -> Path:
    output = tmp_path / "out"
    poison = RandomNoisePoison(seed=SECRET)
    protect_shards(stream_split(parquet), poison, output, shards=4, batch_size=5, progress=False)
    return output


def manifest(made: Path, shard: int) -> Path:
    return made / ".shards" / f"train-{shard - 1:05d}-of-00004.json"


def rewrite(made: Path, shard: int, **changes: object) -> None:
    path = manifest(made, shard)
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def hole(made: Path) -> None:
    manifest(made, 2).unlink()
    manifest(made, 4).write_text("{")


def half_a_file(made: Path) -> None:
    path = made / "data" / "train-00002-of-00004.parquet"
    path.write_bytes(path.read_bytes()[:-9])


def flipped_byte(made: Path) -> None:
    path = made / "data" / "train-00002-of-00004.parquet"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)


def double(made: Path) -> None:
    rewrite(made, 3, start=6)


def gap(made: Path) -> None:
    rewrite(made, 3, start=13)


def another_plan(made: Path) -> None:
    rewrite(made, 3, plan="0" * 64)


def another_shard(made: Path) -> None:
    manifest(made, 3).write_bytes(manifest(made, 2).read_bytes())


def stray_file(made: Path) -> None:
    (made / "data" / "train-00000-of-00007.parquet").write_bytes(b"")


def no_evidence(made: Path) -> None:
    (made / ".shards" / "train-00001-of-00004.npz").unlink()


def _evidence(made: Path, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    path = made / ".shards" / "train-00001-of-00004.npz"
    arrays = unpack(path.read_bytes())
    data = pack({**arrays, name: change(arrays[name])})
    path.write_bytes(data)
    rewrite(made, 2, evidence=hashlib.sha256(data).hexdigest())


def row_twice(made: Path) -> None:
    _evidence(made, "pixels.row", lambda rows: np.where(rows == 8, 7, rows))


def digest_missing(made: Path) -> None:
    _evidence(made, "columns", lambda digests: digests[:-16])


def other_evidence(made: Path) -> None:
    path = made / ".shards" / "train-00001-of-00004.npz"
    path.write_bytes((made / ".shards" / "train-00002-of-00004.npz").read_bytes())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (hole, r"\[2, 4\] of 4 shards are missing or not finished"),
        (half_a_file, r"\[3\] of 4 shards are missing or not finished"),
        (flipped_byte, "shard 3/4: data/train-00002-of-00004.parquet is not the file of the manifest"),
        (double, "shard 3/4: expected row 12 first, got 6: rows are there twice"),
        (gap, "shard 3/4: expected row 12 first, got 13: rows are missing"),
        (another_plan, "made under another plan"),
        (another_shard, "expected shard 3, got 2"),
        (stray_file, "train-00000-of-00007.parquet belongs to no shard"),
        (no_evidence, "npz is missing"),
        (other_evidence, "npz is not the one of the manifest"),
        (row_twice, "shard 2/4: rows of 6 to 11 are missing or there twice"),
        (digest_missing, r"shard 2/4: expected 6 digests \(columns\), got 5"),
    ],
)
def test_damage_is_found(made: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(made)
    with pytest.raises(ValueError, match=message):
        merge(made, progress=False)
    assert not (made / "record.json").exists()


def test_nothing_to_merge(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no shards were made here"):
        merge(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_two_merges(made: Path) -> None:
    with Storage(made).lock(".shards/merge.lock", "merging"), pytest.raises(FileExistsError, match="another run"):
        merge(made, progress=False)


@pytest.mark.parametrize("stop", ["preview.png", "README.md", "record.json", ".shards"])
def test_a_merge_that_was_stopped_is_begun_again(made: Path, stop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    put, remove = Storage.put, Storage.remove

    def stopped_put(self: Storage, name: str, file: Path) -> None:
        if name == stop:
            (made / f"{name}.1-a.partial").write_bytes(b"half")
            raise KeyboardInterrupt
        put(self, name, file)

    def stopped_remove(self: Storage, name: str) -> None:
        if name == stop:
            (made / ".shards" / "plan.json").unlink()
            raise KeyboardInterrupt
        remove(self, name)

    monkeypatch.setattr(Storage, "put", stopped_put)
    monkeypatch.setattr(Storage, "remove", stopped_remove)
    with pytest.raises(KeyboardInterrupt):
        merge(made, progress=False)
    assert (made / "record.json").exists() == (stop == ".shards")
    monkeypatch.undo()
    monkeypatch.setattr(room.preview, "draw", lambda _, path, **__: Path(path).write_bytes(b"picture"))
    record = merge(made, progress=False)
    assert sorted(p.name for p in made.iterdir()) == ["README.md", "data", "preview.png", "record.json"]
    assert Record.load(made / "record.json") == record
    assert merge(made, progress=False) == record


def test_reports_add_up() -> None:
    generator = torch.Generator().manual_seed(0)
    clean = torch.randint(0, 256, (12, 3, 16, 16), generator=generator, dtype=torch.uint8)
    poisoned = clean ^ 3
    whole, merged = PixelReport(perceptual_every=2), PixelReport(perceptual_every=2)
    whole.update(clean, poisoned, list(range(12)))
    for start in (0, 4, 8):
        part = PixelReport(perceptual_every=2)
        order = [start + i for i in (2, 0, 3, 1)]
        part.update(clean[order], poisoned[order], [row - start for row in order])
        merged.add(unpack(pack(part.arrays())), start)
    assert close(merged.summary(), whole.summary())


def test_measuring_does_not_depend_on_how_many_are_measured_together(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    clean = torch.randint(0, 256, (7, 3, 24, 40), generator=generator, dtype=torch.uint8)
    reports = []
    for values in (1, 3 * 24 * 40 * 2, 10**9):
        monkeypatch.setattr(metrics, "VALUES_AT_ONCE", values)
        reports.append(PixelReport(perceptual_every=3))
        reports[-1].update(clean, clean ^ 5, list(range(7)), Budget("linf", 5 / 255))
    assert close(reports[0].summary(), reports[2].summary())
    assert close(reports[1].summary(), reports[2].summary())
    assert reports[2].summary()["perceptual_rows"] == 3
