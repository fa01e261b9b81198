import contextlib
import io
import struct
import time
import zlib

import numpy as np
import PIL.Image
import PIL.PngImagePlugin
import pytest
import torch

from hf_unlearnable.gate.containers import Container, describe, kind_of
from hf_unlearnable.images import Picture, encode
from tests.conftest import noise_pictures


def picture(height: int = 24, width: int = 40, alpha: bool = False) -> Picture:
    pixels = torch.from_numpy(noise_pictures(1, height, width)[0]).permute(2, 0, 1).contiguous()
    return Picture(pixels, torch.full((height, width), 120, dtype=torch.uint8) if alpha else None)


def saved(kind: str, mode: str = "RGB", **options: object) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(noise_pictures(1)[0]).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def png_chunk(name: bytes, content: bytes = b"") -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def with_chunk(data: bytes, name: bytes, content: bytes = b"") -> bytes:
    """A PNG with one more chunk after IHDR."""
    return data[:33] + png_chunk(name, content) + data[33:]


def with_riff(data: bytes, name: bytes, content: bytes) -> bytes:
    padded = content + b"\0" * (len(content) % 2)
    whole = data[8:] + name + struct.pack("<I", len(content)) + padded
    return b"RIFF" + struct.pack("<I", len(whole)) + whole


@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize("level", [0, 1, 9])
@pytest.mark.parametrize("image_format", ["png", "webp"])
def test_our_own_encoders_leave_pixels_alone(image_format: str, level: int, alpha: bool) -> None:
    for size in ((32, 32), (24, 40), (1, 1), (64, 65)):
        data = encode(picture(*size, alpha=alpha), image_format=image_format, compress_level=level)
        assert describe(data) == Container(image_format, True, ())


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "I;16"])
def test_plain_pngs_of_pil(mode: str) -> None:
    source = "L" if mode == "I;16" else mode
    assert describe(saved("PNG", source)) == Container("png", True, ())


def test_several_idat_chunks() -> None:
    array = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    PIL.Image.fromarray(array).save(buffer, "PNG")
    assert buffer.getvalue().count(b"IDAT") > 3
    assert describe(buffer.getvalue()) == Container("png", True, ())


@pytest.mark.parametrize(
    ("name", "content", "extra"),
    [
        (b"tEXt", b"Author\0somebody", "tEXt Author"),
        (b"zTXt", b"Comment\0\0" + zlib.compress(b"hello"), "zTXt Comment"),
        (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0<x/>", "iTXt XML:com.adobe.xmp"),
        (b"tEXt", b"", "tEXt"),
        (b"eXIf", b"MM\0*", "eXIf"),
        (b"tIME", bytes(7), "tIME"),
        (b"iCCP", b"name\0\0" + zlib.compress(b"profile"), "iCCP"),
        (b"pHYs", bytes(9), "pHYs"),
        (b"prVt", b"anything", "prVt"),
        (b"acTL", bytes(8), "animation"),
    ],
)
def test_what_a_png_holds_beside_pixels(name: bytes, content: bytes, extra: str) -> None:
    data = saved("PNG")
    assert describe(with_chunk(data, name, content)).extras == (extra,)
    twice = with_chunk(with_chunk(data, name, content), name, content)
    assert describe(twice).extras == (extra,)


def test_chunks_that_only_say_how_to_show_colours() -> None:
    data = with_chunk(with_chunk(saved("PNG"), b"sRGB", b"\0"), b"gAMA", struct.pack(">I", 45455))
    assert describe(data) == Container("png", True, ())


def test_pil_writes_what_we_find() -> None:
    info = PIL.PngImagePlugin.PngInfo()
    info.add_text("Software", "mine")
    info.add_text("Zipped", "x" * 2000, zip=True)
    info.add_itxt("Title", "a picture")
    exif = PIL.Image.Exif()
    exif[0x010F] = "camera"
    data = saved("PNG", pnginfo=info, exif=exif, dpi=(72, 72), icc_profile=b"a profile") + b"tail"
    assert set(describe(data).extras) == {
        *("tEXt Software", "zTXt Zipped", "iTXt Title", "eXIf", "pHYs", "iCCP", "4 bytes after the end"),
    }
    webp = saved("WEBP", lossless=True, exif=exif, icc_profile=b"a profile", xmp=b"<x/>")
    assert describe(webp) == Container("webp", True, ("ICCP", "EXIF", "XMP"))


def test_animations() -> None:
    frames = [PIL.Image.fromarray(p) for p in noise_pictures(3)]
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True})):
        buffer = io.BytesIO()
        frames[0].save(buffer, kind, save_all=True, append_images=frames[1:], **options)
        assert describe(buffer.getvalue()) == Container(kind.lower(), True, ("animation",))
    buffer = io.BytesIO()
    frames[0].save(buffer, "WEBP", save_all=True, append_images=frames[1:], quality=50)
    assert not describe(buffer.getvalue()).lossless


def test_webp_with_loss_and_with_more_in_it() -> None:
    assert describe(saved("WEBP", quality=80)) == Container("webp", False, ())
    assert describe(saved("WEBP", "RGBA", quality=80)) == Container("webp", False, ())
    plain = saved("WEBP", lossless=True)
    assert describe(with_riff(plain, b"abcd", b"odd")).extras == ("abcd",)
    assert describe(with_riff(plain, b"EXIF", b"even")).extras == ("EXIF",)
    assert describe(with_riff(plain, b"\1\2\3\xff", b"")).extras == ("chunk 010203ff",)
    assert describe(plain + b"more").extras == ("4 bytes after the end",)


@pytest.mark.parametrize(
    ("kind", "told", "lossless"),
    [
        ("JPEG", "jpeg", False),
        ("GIF", "gif", False),
        ("TIFF", "tiff", False),
        ("BMP", "bmp", True),
        ("PPM", "pnm", True),
        ("JPEG2000", "jpeg2000", False),
        ("QOI", "qoi", True),
        ("AVIF", "avif", False),
    ],
)
def test_other_kinds_by_their_first_bytes(kind: str, told: str, lossless: bool) -> None:
    if kind.lower() not in {name.strip(".") for name in PIL.Image.registered_extensions()} | {"jpeg2000", "qoi"}:
        pytest.skip(f"this PIL cannot write {kind}")
    try:
        data = saved(kind)
    except (KeyError, OSError):
        pytest.skip(f"this PIL cannot write {kind}")
    assert describe(data) == Container(told, lossless, ())


@pytest.mark.parametrize("data", [b"", b"BM", b"BM" + bytes(40), b"RIFF\0\0\0\0WAVE", b"hello world", bytes(1000)])
def test_no_picture_at_all(data: bytes) -> None:
    assert kind_of(data) is None
    with pytest.raises(ValueError, match="expected a picture, got"):
        describe(data)


def test_malformed_pngs_say_what_was_expected() -> None:
    data = saved("PNG")
    for damaged, message in (
        (data[:8], "chunk at byte 8, got 0 bytes"),
        (data[:-12], "expected a PNG chunk at byte"),
        (data[:-40], "bytes of IDAT and a checksum"),
        (data[:12] + b"1HDR" + data[16:], "expected the name of a PNG chunk at byte 12"),
        (data[:8] + data[33:], "begins with IHDR, got IDAT"),
        (data[:33] + png_chunk(b"IEND"), "got no IDAT"),
        (data[:33] + b"\xff\xff\xff\xff" + data[37:], "4294967295 bytes of IDAT"),
    ):
        with pytest.raises(ValueError, match=message):
            describe(damaged)


def test_malformed_webps_say_what_was_expected() -> None:
    data = saved("WEBP", lossless=True)
    empty = b"RIFF" + struct.pack("<I", 4) + b"WEBP"
    for damaged, message in (
        (data[:-3], "expected a WebP of"),
        (data[:4] + bytes(4) + data[8:], "expected a WebP of 8 bytes"),
        (data[:16] + b"\xff\xff\xff\x7f" + data[20:], "expected 2147483647 bytes of VP8L"),
        (b"RIFF" + struct.pack("<I", len(data) - 4) + data[8:] + b"abcd", "chunk at byte"),
        (empty, r"with pixels, got the chunks \[\]"),
    ):
        with pytest.raises(ValueError, match=message):
            describe(damaged)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_damaged_bytes_give_a_container_or_a_value_error(kind: str) -> None:
    generator = np.random.default_rng(0)
    whole = saved(kind, **({"lossless": True} if kind == "WEBP" else {}))
    for _ in range(2000):
        data = bytearray(whole[: generator.integers(1, len(whole) + 1)])
        for place in generator.integers(0, len(data), 3):
            data[place % 60 % len(data)] = generator.integers(0, 256)
        with contextlib.suppress(ValueError):
            assert isinstance(describe(bytes(data)), Container)


def test_fifty_thousand_pngs_in_a_few_seconds() -> None:
    data = saved("PNG")
    start = time.process_time()
    for _ in range(50_000):
        describe(data)
    assert time.process_time() - start < 5
