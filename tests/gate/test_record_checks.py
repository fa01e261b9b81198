"""The record of a protected folder, and what it says of the key."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hf_unlearnable import RandomNoisePoison
from hf_unlearnable.environment import versions
from hf_unlearnable.gate.checks import Refused, check, inspect
from hf_unlearnable.protect import protect
from tests.gate.folders import checks, only, put, source

# The record.


def test_no_folder_and_no_record(cuda: Path, tmp_path: Path) -> None:
    assert "there is no folder" in only(tmp_path / "nowhere")
    (cuda / "record.json").unlink()
    assert "there is no record.json" in only(cuda)
    (cuda / "state.json").write_text("{}")
    assert checks(cuda) == ["record", "files"]
    with pytest.raises(
        Refused, match=r"must not be published:\n- record: there is no record.json.*\n- files: state.json"
    ):
        check(cuda, progress=False)


@pytest.mark.parametrize("text", ["", "[]", "{}", "\xff\xfe", '{"schema": "x"}', '{"schema": 99}', '{"schema": 1}'])
def test_what_is_no_record(cuda: Path, text: str) -> None:
    (cuda / "record.json").write_text(text, encoding="latin-1")
    assert "record.json cannot be read" in only(cuda)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("method", "", "method is missing"),
        ("settings", {}, "settings.version is missing; settings.poison_rate is missing"),
        ("settings", [], "settings is no mapping"),
        ("settings.poison_rate", float("nan"), "settings.poison_rate: expected a finite number"),
        ("key", {"kind": "secret"}, "key.commitment is missing"),
        ("source.pixels_sha256", 7, "source.pixels_sha256: expected str, got int"),
        ("source.label_column", 7, "source.label_column: expected str or null, got int"),
        ("published.files", [], "published.files: expected dict"),
        ("published.files", {"data/..": {}}, "expected data/....parquet, got 'data/..'"),
        ("published.files", {"data/train-00000-of-00001.parquet": {"bytes": 1}}, "expected the sha256 and bytes"),
        ("pixels.rows", True, "pixels.rows: expected int, got bool"),
        ("pixels", {}, "pixels.rows is missing"),
        ("pixels.linf_levels", {"largest": 8}, "pixels.linf_levels: expected the numbers mean, sd"),
        ("pixels.l2.largest", 0.1, "pixels.l2: expected the numbers mean, sd"),
        ("settings.epsilon", "x", "settings.epsilon: expected a number, 0 or more, got 'x'"),
        (
            "pixels.budgets",
            [{"norm": "l7", "epsilon": 1, "kept_by_rows": 24}],
            "expected norm, epsilon and kept_by_rows",
        ),
        ("pixels.budgets", [None], "expected norm, epsilon and kept_by_rows"),
        ("versions", {"python": "3"}, "versions of datasets, hf_unlearnable, numpy, pillow, torch, torchvision are"),
        ("versions", None, "versions of datasets"),
        ("results", None, "results: expected a list"),
    ],
)
def test_an_incomplete_record(cuda: Path, place: str, value: Any, message: str) -> None:
    put(cuda, place, value)
    told = only(cuda, clean=source())
    assert told.startswith("record: incomplete: ")
    assert message in told


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("pixels.rows", 23, "expected one number of rows, 1 or more, got 24 (source), 24 (published), 23 (pixels)"),
        ("published.image_format", "jpeg", "expected png or webp"),
        ("settings.poison_rate", 2, "expected a poison_rate from 0 to 1, got 2"),
        ("settings.classes", [0, 9], "expected classes from 0 to 3, got [0, 9]"),
        ("pixels.values_changed", 1.5, "expected values_changed from 0 to 1, got 1.5"),
        ("pixels.perceptual_rows", 25, "expected 1 to 24 rows seen by PSNR and SSIM, got 25"),
        ("source.dataset", "", "expected the name of the source dataset"),
        ("published.compress_level", 10, "a compress_level from 0 to 9, got 1 and 10"),
        ("pixels.rows_changed", 25, "expected 0 to 24 rows changed, got 25"),
        ("pixels.rows_changed", 0, "0 rows changed do not go with a largest change of"),
        ("source.pixels_sha256", "abc", "source.pixels_sha256: expected 64 hexadecimal digits"),
        ("source.split", "test", "expected the shards of the split 'test'"),
        (
            "pixels.budgets",
            [{"norm": "linf", "epsilon": 1.0, "kept_by_rows": 3}],
            "expected all 24 rows to keep a budget, got 3",
        ),
    ],
)
def test_a_record_that_contradicts_itself(cuda: Path, place: str, value: Any, message: str) -> None:
    put(cuda, place, value)
    assert any(message in str(f) for f in inspect(cuda, progress=False) if f.check == "record")
    with pytest.raises(Refused):
        check(cuda, progress=False)


def places_in(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for name, below in inner:
        yield (*above, name)
        yield from places_in(below, (*above, name))


def test_nonsense_anywhere_in_the_record_is_found_and_stops_nothing(whole: Path) -> None:
    may_be_so = {"method", "source.dataset", "source.label_column", "pixels.ssim"}
    may_be_so |= {f"settings.{name}" for name in ("version", "classes", "num_classes", "epsilon")}
    may_be_so |= {f"versions.{name}" for name in versions()}
    record = json.loads((whole / "record.json").read_text())
    for i, place in enumerate(places_in(record)):
        nonsense = ([], "x", -1, None, 10**30, [[1]], {"a": None})
        for odd in (nonsense[i % len(nonsense)], nonsense[(i + 1) % len(nonsense)]):
            values = json.loads(json.dumps(record))
            inner = values
            for name in place[:-1]:
                inner = inner[name]
            inner[place[-1]] = odd
            (whole / "record.json").write_text(json.dumps(values))
            found = inspect(whole, progress=False)
            assert found or ".".join(map(str, place)) in may_be_so, (place, odd)


# The key.


def test_an_int_seed_needs_to_be_allowed(tmp_path: Path) -> None:
    for name, told in (("silent", False), ("spoken", True)):
        poison = RandomNoisePoison(seed=987654321)
        protect(source(8), poison, tmp_path / name, source="small", record_seed=told, progress=False)
        assert inspect(tmp_path / name, allow_guessable_key=True, progress=False) == []
    assert "--allow-guessable-key" in only(tmp_path / "silent")
    found = inspect(tmp_path / "spoken", progress=False)
    assert [f.check for f in found] == ["key", "key"]
    assert "tells the seed" in found[1].problem
    assert "987654321" not in str(found)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ({"kind": "secret", "commitment": None}, "expected a commitment"),
        ({"kind": "secret", "commitment": "sha256:abc"}, "expected a commitment"),
        ({"kind": "secret", "commitment": "sha256:" + "0" * 64, "seed": 3}, "tells the seed"),
        ({"kind": "secret", "commitment": "sha256:" + "0" * 64, "bytes": "abcd"}, "alone, got bytes too"),
        ({"kind": "none", "commitment": None}, 'expected the kind "secret" or "int"'),
        ({"kind": "int", "commitment": "sha256:" + "0" * 64}, "gives it away"),
    ],
)
def test_what_the_record_says_of_the_key(cuda: Path, key: dict[str, Any], message: str) -> None:
    put(cuda, "key", key)
    told = only(cuda, allow_guessable_key=True)
    assert told.startswith("key: ")
    assert message in told


def test_a_key_that_follows_from_a_surrogate(cuda: Path) -> None:
    put(cuda, "key.surrogate", "a secret")
    assert inspect(cuda, progress=False) == []
    put(cuda, "key.surrogate", "an int seed")
    assert "key: the key follows from a surrogate that was trained under an int seed" in only(cuda)
    assert inspect(cuda, allow_guessable_key=True, progress=False) == []
    put(cuda, "key.surrogate", 7)
    assert 'to be "a secret" or "an int seed", got 7' in only(cuda)


def test_a_key_in_the_settings(cuda: Path) -> None:
    put(cuda, "settings.seed", 7)
    assert "the settings hold seed" in only(cuda)
