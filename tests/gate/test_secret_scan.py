"""The scan for a secret."""

import base64
import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_unlearnable.gate.secret_scan import ROWS_AT_ONCE, holds_secret
from tests.gate.folders import SECRET
from tests.gate.test_containers import saved, with_chunk


def test_a_protected_folder_holds_no_secret(originals: Path) -> None:
    for name in ("cuda", "noise", "whole"):
        assert holds_secret(originals / name, SECRET) == []
        assert holds_secret(originals / name, 987654321) == []


def with_pixels(secret: bytes) -> bytes:
    array = np.frombuffer((secret * 100)[: 32 * 32 * 3], dtype=np.uint8).reshape(32, 32, 3)
    return saved_array(array)


def saved_array(array: np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(array).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "form"),
    [
        (b"--" + SECRET + b"--", "raw bytes"),
        (SECRET[::-1], "raw bytes, reversed"),
        (b"key=" + SECRET.hex().encode(), "hex"),
        (SECRET.hex().upper().encode(), "hex, upper case"),
        (base64.b64encode(SECRET), "base64"),
        (base64.b64encode(b"x" + SECRET + b"more"), "base64"),
        (base64.urlsafe_b64encode(b"xy" + SECRET), "base64"),
        (base64.b64encode(b"a key: " + SECRET.hex().encode()), "base64 of hex"),
        (str(int.from_bytes(SECRET, "big")).encode(), "decimal digits"),
        (json.dumps(list(SECRET)).encode(), "a list of numbers"),
        (repr(SECRET).encode(), "bytes as Python shows them"),
        (with_chunk(saved("PNG"), b"zTXt", b"note\0\0" + zlib.compress(SECRET.hex().encode())), "hex inside a picture"),
        (with_chunk(saved("PNG"), b"iTXt", b"n\0\1\0\0\0" + zlib.compress(SECRET)), "raw bytes inside a picture"),
        (with_pixels(SECRET), "raw bytes inside a picture"),
        (saved_array(np.frombuffer((SECRET * 40)[:1024], np.uint8).reshape(32, 32)), "raw bytes inside a picture"),
        (
            saved_array(np.frombuffer((SECRET * 100)[:3072], np.uint8).reshape(32, 32, 3), "WEBP", lossless=True),
            "raw bytes inside a picture",
        ),
    ],
)
@pytest.mark.parametrize("place", ["file", "rows"])
def test_a_secret_is_found_wherever_it_is(tmp_path: Path, data: bytes, form: str, place: str) -> None:
    if place == "file":
        (tmp_path / "found.bin").write_bytes(b"before" + data + b"after")
    else:
        table = pa.table({"label": [1, 2, 3], "deep": [[{"x": b"none"}], [], [{"x": b"before" + data + b"after"}]]})
        pq.write_table(table, tmp_path / "found.bin", compression="zstd")
    found = holds_secret(tmp_path, SECRET)
    assert any(line.startswith(f"found.bin: {form}") for line in found), found
    wrong = bytes([SECRET[0] ^ 1]) + SECRET[1:]
    assert holds_secret(tmp_path, wrong) == []


def test_a_secret_in_a_schema_a_name_or_a_dictionary(tmp_path: Path) -> None:
    text = SECRET.hex()
    for name, table in (
        ("field", pa.table([pa.array([1])], pa.schema([pa.field("a", pa.int64(), metadata={"k": text})]))),
        ("schema", pa.table({"a": [1]}).replace_schema_metadata({"k": text})),
        ("dictionary", pa.table({"a": pa.array([text, text]).dictionary_encode()})),
    ):
        (tmp_path / name).mkdir()
        pq.write_table(table, tmp_path / name / "a.parquet", compression="zstd")
        assert any("inside its rows or schema" in line for line in holds_secret(tmp_path / name, SECRET))
    (tmp_path / "named" / "deep").mkdir(parents=True)
    (tmp_path / "named" / "deep" / f"cache-{text}").write_bytes(b"")
    (line,) = holds_secret(tmp_path / "named", SECRET)
    assert line.endswith(": hex in the name")


def test_a_secret_in_a_bomb_and_past_the_first_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_unlearnable.gate import secret_scan

    monkeypatch.setattr(secret_scan, "_PIECE", 1000)
    for shift in range(968, 1001, 8):
        content = b"n\0\0" + zlib.compress(bytes(shift) + SECRET + bytes(5000))
        (tmp_path / "a.png").write_bytes(with_chunk(saved("PNG"), b"zTXt", content))
        assert holds_secret(tmp_path, SECRET) == ["a.png: raw bytes inside a picture"]


def test_an_int_seed_is_found_and_a_short_one_is_refused(tmp_path: Path) -> None:
    seed = 4_123_456_789
    for data, form in (
        (b'{"seed": 4123456789}', "decimal digits"),
        (struct.pack("<I", seed), "4 bytes"),
        (struct.pack(">Q", seed), "8 bytes"),
    ):
        (tmp_path / "a").write_bytes(data)
        assert any(line == f"a: {form}" for line in holds_secret(tmp_path, seed))
    (tmp_path / "a").write_bytes(b"14123456789 41234567890")
    assert holds_secret(tmp_path, seed) == []
    for short in (0, 7, 99_999):
        with pytest.raises(ValueError, match="at least 6 digits"):
            holds_secret(tmp_path, short)
    assert holds_secret(tmp_path, 10**40) == []
    with pytest.raises(ValueError, match="32 bytes"):
        holds_secret(tmp_path, b"short")
    with pytest.raises(FileNotFoundError, match="no folder"):
        holds_secret(tmp_path / "nowhere", SECRET)


def test_what_cannot_be_looked_through_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 broken")
    (tmp_path / "b.png").write_bytes(saved("PNG")[:60])
    assert holds_secret(tmp_path, SECRET) == ["a.parquet: cannot be looked through (ArrowInvalid)"]


def test_a_key_that_stands_in_a_column_below_each_other(tmp_path: Path) -> None:
    table = pa.table({"n": pa.array(list(SECRET), pa.uint8()), "img": [{"bytes": b"x", "path": None}] * len(SECRET)})
    assert len(SECRET) > ROWS_AT_ONCE
    pq.write_table(table, tmp_path / "a.parquet", compression="zstd", use_dictionary=["n"])
    assert holds_secret(tmp_path, SECRET) == ["a.parquet: raw bytes inside its rows or schema"]
