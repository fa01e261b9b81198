"""What a picture's bytes hold beside its pixels, told by the container itself: nothing is decoded."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from mmap import mmap

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_CHUNK = struct.Struct(">I4s")
_RIFF_CHUNK = struct.Struct("<4sI")

# Of a PNG: what decoding needs, and two chunks of fixed meaning (5 bytes in all) that only say how to show colours.
_PNG_PIXELS = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"sRGB", b"gAMA"})
_PNG_TEXT = frozenset({b"tEXt", b"zTXt", b"iTXt"})
_PNG_FRAMES = frozenset({b"acTL", b"fcTL", b"fdAT"})
_WEBP_PIXELS = frozenset({b"VP8L", b"VP8 ", b"VP8X", b"ALPH"})
_WEBP_FRAMES = frozenset({b"ANIM", b"ANMF"})
_FRAME_HEADER = 16

_MAGIC: tuple[tuple[int, bytes, str], ...] = (
    (0, PNG_SIGNATURE, "png"),
    (8, b"WEBP", "webp"),
    (0, b"\xff\xd8\xff", "jpeg"),
    (0, b"GIF87a", "gif"),
    (0, b"GIF89a", "gif"),
    (0, b"II*\0", "tiff"),
    (0, b"MM\0*", "tiff"),
    (0, b"II+\0", "tiff"),
    (4, b"ftypavi", "avif"),
    (4, b"ftyphei", "heif"),
    (4, b"ftyphev", "heif"),
    (4, b"ftypmif", "heif"),
    (0, b"\0\0\0\x0cjP  ", "jpeg2000"),
    (0, b"\xff\x4f\xff\x51", "jpeg2000"),
    (0, b"\0\0\0\x0cJXL ", "jpeg-xl"),
    (0, b"qoif", "qoi"),
    (0, b"8BPS", "psd"),
    (0, b"P4\n", "pnm"),
    (0, b"P5\n", "pnm"),
    (0, b"P6\n", "pnm"),
)
_LOSSLESS = frozenset({"bmp", "qoi", "pnm"})


@dataclass(frozen=True)
class Container:
    """A picture's container.

    Args:
        kind: "png", "webp", "jpeg", "gif", "tiff", ...
        lossless: whether it surely holds the pixels that the encoder was given (of a tiff, say, nobody knows).
        extras: what is neither pixel data nor needed to decode it, each named once: text ("tEXt Software"), EXIF,
            colour profiles, times, resolution, unknown chunks, bytes after the end, "animation". Only PNG and WebP are
            read; of other kinds nothing is told. An sRGB or gAMA chunk of a PNG is no extra.
    """

    kind: str
    lossless: bool
    extras: tuple[str, ...] = ()


def kind_of(data: bytes) -> str | None:
    """The kind of picture that bytes begin like, by its magic number; None where there is none."""
    for place, magic, kind in _MAGIC:
        if data.startswith(magic, place) and (kind != "webp" or data.startswith(b"RIFF")):
            return kind
    if data.startswith(b"BM") and len(data) > 26 and int.from_bytes(data[2:6], "little") == len(data):
        return "bmp"
    return None


def describe(data: bytes) -> Container:
    """The container of a picture: its kind, whether it is lossless, and what it holds beside pixels.

    Checksums and what a decoder would find inside the compressed pixels are left to the decoder.

    Raises:
        ValueError: no picture known by its first bytes, or a PNG or WebP whose chunks do not add up; says what was
            expected and where.
    """
    kind = kind_of(data)
    if kind is None:
        raise ValueError(f"expected a picture, got {len(data)} bytes that begin with {data[:8].hex() or 'nothing'}")
    if kind == "png":
        return _png(data)
    return _webp(data) if kind == "webp" else Container(kind, kind in _LOSSLESS)


def png_chunks(data: bytes | mmap, start: int = 0) -> Iterator[tuple[bytes, int, int]]:
    """The name of every chunk of a PNG, and where its content begins and ends; the last is IEND.

    Raises:
        ValueError: a chunk that is cut off, has no name, or none where one is expected.
    """
    place = start + len(PNG_SIGNATURE)
    while True:
        if place + 12 > len(data):
            raise ValueError(f"expected a PNG chunk at byte {place - start}, got {max(0, len(data) - place)} bytes")
        size, name = _CHUNK.unpack_from(data, place)
        if not (name.isalpha() and name.isascii()):
            raise ValueError(f"expected the name of a PNG chunk at byte {place - start + 4}, got {name.hex()}")
        end = place + 8 + size
        if end + 4 > len(data):
            raise ValueError(f"expected {size} bytes of {name.decode()} and a checksum, got {len(data) - place - 8}")
        yield name, place + 8, end
        if name == b"IEND":
            return
        place = end + 4


def _png(data: bytes) -> Container:
    extras: list[str] = []
    names: set[bytes] = set()
    end = 0
    for name, start, end in png_chunks(data):
        if not names and name != b"IHDR":
            raise ValueError(f"expected a PNG that begins with IHDR, got {name.decode()}")
        names.add(name)
        if name in _PNG_PIXELS:
            continue
        if name in _PNG_FRAMES:
            extras.append("animation")
        elif name in _PNG_TEXT:
            keyword = data[start:end].split(b"\0", 1)[0][:79].decode("latin-1")
            extras.append(f"{name.decode()} {keyword}".rstrip())
        else:
            extras.append(name.decode())
    if b"IDAT" not in names:
        raise ValueError("expected a PNG with pixels, got no IDAT")
    if len(data) > end + 4:
        extras.append(f"{len(data) - end - 4} bytes after the end")
    return Container("png", True, tuple(dict.fromkeys(extras)))


def _riff_chunks(data: bytes, place: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    while place < end:
        if place + 8 > end:
            raise ValueError(f"expected a WebP chunk at byte {place}, got {end - place} bytes")
        name, size = _RIFF_CHUNK.unpack_from(data, place)
        if place + 8 + size > end:
            raise ValueError(f"expected {size} bytes of {_shown(name)} at byte {place}, got {end - place - 8}")
        yield name, place + 8, place + 8 + size
        place += 8 + size + size % 2


def _webp(data: bytes) -> Container:
    end = 8 + int.from_bytes(data[4:8], "little")
    if end < 12 or end > len(data):
        raise ValueError(f"expected a WebP of {end} bytes, as it says, got {len(data)}")
    extras: list[str] = []
    names: set[bytes] = set()
    for name, start, stop in _riff_chunks(data, 12, end):
        names.add(name)
        if name in _WEBP_FRAMES:
            extras.append("animation")
            if name == b"ANMF":
                names |= {inner for inner, _, _ in _riff_chunks(data, start + _FRAME_HEADER, stop)}
        elif name not in _WEBP_PIXELS:
            extras.append(_shown(name))
    if not names & {b"VP8L", b"VP8 "}:
        raise ValueError(f"expected a WebP with pixels, got the chunks {sorted(map(_shown, names))}")
    if len(data) > end:
        extras.append(f"{len(data) - end} bytes after the end")
    return Container("webp", b"VP8 " not in names, tuple(dict.fromkeys(extras)))


def _shown(name: bytes) -> str:
    return name.decode().strip() if name.isascii() and name.strip().isalnum() else f"chunk {name.hex()}"
