"""Whether a secret lies in a folder: in any byte of any file, compressed parts included."""

import base64
import mmap
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from hf_unlearnable.gate.containers import PNG_SIGNATURE, png_chunks
from hf_unlearnable.images import decode
from hf_unlearnable.keys import Key, check_key

LEAST_DIGITS = 6
ROWS_AT_ONCE, NUMBERS_AT_ONCE = 16, 10_000
"""Of columns that may hold pictures, and of columns of numbers, where a key may stand in values below each other."""
_PIECE = 1 << 24
_OVERLAP = 256
_FRAMES = (b"IDAT", b"fdAT")


def holds_secret(folder: str | Path, key: Key) -> list[str]:
    """Where a folder holds a key: file, form and place, one line for each; empty if nowhere. The key is not repeated.

    A file that cannot be looked through to its end has a line too.

    Looked for in names, in every byte, in the rows and the schema of parquet files, and inside pictures: compressed
    text and profiles, the inflated pixel data, the decoded pixels. A secret key is known as raw bytes (in both orders),
    hex, base64 (also of the hex, at any alignment), one decimal number, a list of numbers and Python's way to show
    bytes; an int seed as decimal digits and as 8 bytes (4, if it fills them: by chance these stand once in 4 GB).

    Raises:
        ValueError: an int seed of fewer than 6 digits: such numbers stand in any file by chance, so that finding one
            says nothing.
        FileNotFoundError: there is no such folder.
    """
    forms = _forms(check_key(key))
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    found: list[str] = []
    for place, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = Path(place) / name
            found += _search(path, str(path.relative_to(folder)), forms)
    return found


def files_hold_secret(files: Mapping[str, Path], key: Key) -> list[str]:
    """The same of single files, by the names that they shall have."""
    forms = _forms(check_key(key))
    return [line for name, path in files.items() for line in _search(path, name, forms)]


def _search(path: Path, told: str, forms: list[tuple[str, bytes]]) -> list[str]:
    found: dict[str, None] = {}
    try:
        for where, data in _parts(path, told):
            for form, pattern in forms:
                if _stands_in(data, pattern, digits=form == "decimal digits"):
                    found[f"{told}: {form}{where}"] = None
    except (pa.ArrowException, OSError) as error:
        found[f"{told}: cannot be looked through ({type(error).__name__})"] = None
    return list(found)


def _forms(key: Key) -> list[tuple[str, bytes]]:
    if isinstance(key, int):
        digits = str(key).encode()
        if len(digits) < LEAST_DIGITS:
            raise ValueError(
                f"expected a 32-byte key or a seed of at least {LEAST_DIGITS} digits, got one of {len(digits)}: "
                "numbers that short stand in any file by chance"
            )
        sizes = [size for size in (4, 8) if 256 ** (size - 1) <= key < 256**size or (size == 8 and key < 256**8)]
        raw = [(f"{size} bytes", key.to_bytes(size, order)) for size in sizes for order in ("little", "big")]
        return [("decimal digits", digits), *raw]
    text = key.hex().encode()
    forms = [("raw bytes", key), ("raw bytes, reversed", key[::-1]), ("hex", text), ("hex, upper case", text.upper())]
    forms += [("a list of numbers", mark.join(map(str, key)).encode()) for mark in (",", ", ")]
    forms += [("bytes as Python shows them", repr(key)[2:-1].encode())]
    forms += [("base64", form) for form in _base64(key)]
    forms += [("base64 of hex", form) for case in (text, text.upper()) for form in _base64(case)]
    return forms + [("decimal digits", str(int.from_bytes(key, order)).encode()) for order in ("little", "big")]


def _base64(data: bytes) -> Iterator[bytes]:
    """The characters that follow from the data alone, wherever it stands in what was encoded."""
    for before in range(3):
        whole = (b"\0" * before + data + b"\0\0", -(-4 * before // 3), 4 * (before + len(data)) // 3)
        for encode in (base64.standard_b64encode, base64.urlsafe_b64encode):
            yield encode(whole[0])[whole[1] : whole[2]]


def _stands_in(data: bytes | mmap.mmap, pattern: bytes, *, digits: bool) -> bool:
    place = data.find(pattern)
    while digits and place >= 0:
        around = data[max(0, place - 1) : place] + data[place + len(pattern) : place + len(pattern) + 1]
        if not any(48 <= byte < 58 for byte in around):
            return True
        place = data.find(pattern, place + 1)
    return place >= 0


def _parts(path: Path, told: str) -> Iterator[tuple[str, bytes | mmap.mmap]]:
    """A file's name, its bytes, and what is compressed in them."""
    yield " in the name", told.encode(errors="surrogateescape")
    if not path.is_file() or not path.stat().st_size:
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        yield "", data
        if data[:4] == b"PAR1":
            for rows in _parquet(path):
                yield " inside its rows or schema", rows
                for part in _pictures(rows):
                    yield " inside a picture", part
        else:
            for part in _pictures(data):
                yield " inside a picture", part


def _parquet(path: Path) -> Iterator[bytes]:
    """Rows and schema, uncompressed. An unreadable rest cannot be looked through, and is an error of its own."""
    with pq.ParquetFile(path) as parquet:
        schema = parquet.schema_arrow
        yield schema.serialize().to_pybytes()
        numbers = [field.name for field in schema if pa.types.is_primitive(field.type)]
        others = [name for name in schema.names if name not in numbers]
        for names, rows in ((numbers, NUMBERS_AT_ONCE), (others, ROWS_AT_ONCE)):
            for batch in parquet.iter_batches(rows, columns=names) if names else ():
                sink = pa.BufferOutputStream()
                with pa.ipc.new_stream(sink, batch.schema) as stream:
                    stream.write_batch(batch)
                yield sink.getvalue().to_pybytes()


def _pictures(data: bytes | mmap.mmap) -> Iterator[bytes]:
    """What the pictures in some bytes hold when nothing is compressed: every zlib stream, and the decoded pixels."""
    place = data.find(PNG_SIGNATURE)
    while place >= 0:
        end = place + len(PNG_SIGNATURE)
        pixels, chunks = [], []
        try:
            for name, start, end in png_chunks(data, place):
                (pixels if name in _FRAMES else chunks).append((start, end))
        except ValueError:
            pass
        yield from _inflated(b"".join(data[start:stop] for start, stop in pixels))
        for start, stop in chunks:
            content = data[start:stop]
            for match in re.finditer(rb"\x78[\x01\x5e\x9c\xda]", content):
                yield from _inflated(memoryview(content)[match.start() :])
        yield from _pixels(data[place : end + 4])
        place = data.find(PNG_SIGNATURE, end)
    place = data.find(b"RIFF")
    while place >= 0:
        if data[place + 8 : place + 12] == b"WEBP":
            yield from _pixels(data[place : place + 8 + int.from_bytes(data[place + 4 : place + 8], "little")])
        place = data.find(b"RIFF", place + 4)


def _inflated(data: bytes | memoryview) -> Iterator[bytes]:
    inflater, kept = zlib.decompressobj(), b""
    try:
        while data and not inflater.eof:
            piece = inflater.decompress(data, _PIECE)
            yield kept + piece
            kept, data = (kept + piece)[-_OVERLAP:], inflater.unconsumed_tail
    except zlib.error:
        return


def _pixels(data: bytes) -> Iterator[bytes]:
    """Decoded pixels, pixel by pixel and plane by plane."""
    try:
        picture = decode(data)
    except ValueError:
        return
    yield picture.pixels.permute(1, 2, 0).contiguous().numpy().tobytes()
    yield picture.pixels.contiguous().numpy().tobytes()
    if picture.alpha is not None:
        yield picture.alpha.numpy().tobytes()
