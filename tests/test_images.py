import io
import os

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import torch

from hf_unlearnable import images
from tests.conftest import noise_pictures


def stored(picture: PIL.Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def picture() -> PIL.Image.Image:
    return PIL.Image.fromarray(noise_pictures(1, 37, 53)[0])


def seen(picture: images.Picture) -> np.ndarray:
    return picture.pixels.permute(1, 2, 0).numpy()


def test_every_level_survives_float_and_back() -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert torch.equal(images.to_uint8(images.to_float(levels)), levels)


def test_rounding_is_to_nearest_then_clamped() -> None:
    x = torch.tensor([-0.3, 0.49 / 255, 0.51 / 255, 254.4 / 255, 254.6 / 255, 7.0]).view(1, 1, 1, 6).expand(1, 3, 1, 6)
    assert images.to_uint8(x)[0, 0, 0].tolist() == [0, 0, 1, 254, 255, 255]


def test_nan_is_named() -> None:
    x = torch.zeros(4, 3, 2, 2)
    x[2, 1, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN in row 2 of the batch"):
        images.to_uint8(x)
    with pytest.raises(ValueError, match="NaN in row 17$"):
        images.to_uint8(x, ["row 3", "row 9", "row 17", "row 20"])


@pytest.mark.parametrize("image_format", ["png", "webp"])
@pytest.mark.parametrize("level", range(10))
@pytest.mark.parametrize("alpha", [False, True])
def test_encoding_is_lossless(image_format: str, level: int, alpha: bool) -> None:
    pixels = torch.from_numpy(noise_pictures(1, 23, 31)[0]).permute(2, 0, 1).contiguous()
    mask = torch.arange(23 * 31).view(23, 31).remainder(256).to(torch.uint8) if alpha else None
    data = images.encode(images.Picture(pixels, mask), image_format=image_format, compress_level=level)
    back = images.decode(data)
    assert torch.equal(back.pixels, pixels)
    assert (back.alpha is None) == (mask is None)
    assert mask is None or torch.equal(back.alpha, mask)
    with PIL.Image.open(io.BytesIO(data)) as opened:
        assert opened.format == image_format.upper()
        assert not opened.info.get("exif")


def test_compression_is_visible_in_size() -> None:
    smooth = images.Picture(torch.arange(64, dtype=torch.uint8).view(1, 1, 64).expand(3, 64, 64).contiguous())
    sizes = [len(images.encode(smooth, compress_level=level)) for level in (0, 1, 9)]
    assert sizes[0] > sizes[1] >= sizes[2]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF"])
def test_bytes_decode_to_what_pil_shows(picture: PIL.Image.Image, kind: str) -> None:
    data = stored(picture, kind)
    expected = np.asarray(PIL.Image.open(io.BytesIO(data)).convert("RGB"))
    for value in (data, {"bytes": data, "path": None}, PIL.Image.open(io.BytesIO(data))):
        assert np.array_equal(seen(images.decode(value)), expected)


@pytest.mark.parametrize("options", [{}, {"quality": 30}, {"progressive": True}, {"subsampling": 0}, {"quality": 100}])
def test_the_fast_jpeg_decoder_is_used_and_agrees(picture: PIL.Image.Image, options: dict) -> None:
    data = stored(picture, "JPEG", **options)
    plain = images._decode_plain(data)
    assert plain is not None
    assert np.array_equal(plain.permute(1, 2, 0).numpy(), np.asarray(PIL.Image.open(io.BytesIO(data))))


def test_paths(picture: PIL.Image.Image, tmp_path) -> None:
    path = tmp_path / "a.png"
    picture.save(path)
    assert np.array_equal(seen(images.decode({"bytes": None, "path": str(path)})), np.asarray(picture))
    with pytest.raises(ValueError, match=r"row 3: expected a readable picture file"):
        images.decode({"bytes": None, "path": str(tmp_path / "missing.png")}, where="row 3")


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr", "LAB", "HSV"])
def test_colour_modes_become_rgb(picture: PIL.Image.Image, mode: str) -> None:
    source = picture if mode != "LAB" else picture.convert("RGB")
    if mode == "LAB":
        from PIL import ImageCms

        change = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
        converted = ImageCms.applyTransform(source, change)
        assert converted is not None
    else:
        converted = source.convert(mode)
    decoded = images.decode(converted)
    assert decoded.alpha is None
    if mode != "LAB":
        assert np.array_equal(seen(decoded), np.asarray(converted.convert("RGB")))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_alpha_is_kept_apart(picture: PIL.Image.Image, mode: str) -> None:
    mask = PIL.Image.fromarray((np.arange(37 * 53) % 256).astype(np.uint8).reshape(37, 53))
    if mode == "PA":
        converted = picture.convert("P").convert("RGBA").convert("LA")
    else:
        converted = picture.convert(mode)
    converted.putalpha(mask)
    decoded = images.decode(stored(converted, "PNG"))
    assert decoded.alpha is not None
    assert np.array_equal(decoded.alpha.numpy(), np.asarray(mask))
    assert np.array_equal(seen(decoded), np.asarray(converted.convert("RGBA"))[:, :, :3])


def test_palette_transparency_is_alpha() -> None:
    palette = PIL.Image.new("P", (4, 4), 1)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.putpixel((0, 0), 0)
    decoded = images.decode(stored(palette, "PNG", transparency=0))
    assert decoded.alpha is not None
    assert decoded.alpha[0, 0] == 0
    assert decoded.alpha[1, 1] == 255
    assert decoded.pixels[:, 1, 1].tolist() == [0, 255, 0]


def test_sixteen_bits_become_eight() -> None:
    wide = np.array([[0, 257, 65535, 128, 129, 32768]], dtype=np.uint16)
    data = stored(PIL.Image.fromarray(wide), "PNG")
    assert images.decode(data).pixels[0, 0].tolist() == [0, 1, 255, 0, 1, 128]


def test_exif_rotation_is_applied(picture: PIL.Image.Image) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    for kind, options in (("JPEG", {"quality": 95}), ("PNG", {})):
        data = stored(picture, kind, exif=exif, **options)
        upright = stored(picture, kind, **options)
        turned = np.rot90(np.asarray(PIL.Image.open(io.BytesIO(upright)).convert("RGB")), k=-1)
        assert np.array_equal(seen(images.decode(data)), turned)
        assert np.array_equal(seen(images.decode(PIL.Image.open(io.BytesIO(data)))), turned)


def test_rotation_that_is_not_in_the_first_exif_segment(picture: PIL.Image.Image) -> None:
    plain = stored(picture, "JPEG", quality=95)
    xmp = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF '
    xmp += b'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description '
    xmp += b'xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    far = stored(picture, "JPEG", quality=95, exif=exif)
    padding = b"\xff\xe5\xff\xff" + b"x" * 65533
    for data in (
        plain[:2] + b"\xff\xe1" + (len(xmp) + 2).to_bytes(2, "big") + xmp + plain[2:],
        far[:2] + padding + far[2:],
    ):
        shown = np.asarray(PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(data))))
        assert shown.shape == (53, 37, 3)
        assert np.array_equal(seen(images.decode(data)), shown)


def test_arrays_and_tensors(picture: PIL.Image.Image) -> None:
    array = np.asarray(picture)
    assert np.array_equal(seen(images.decode(array)), array)
    assert np.array_equal(seen(images.decode(array.astype(np.int64))), array)
    assert np.array_equal(seen(images.decode(torch.from_numpy(array.copy()).permute(2, 0, 1))), array)
    assert np.array_equal(seen(images.decode(array[:, :, 0])), array[:, :, :1].repeat(3, 2))
    before = array.copy()
    images.decode(array).pixels.zero_()
    assert np.array_equal(array, before)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "got None"),
        ({"bytes": None, "path": None}, "neither bytes nor a path"),
        (b"", "readable picture"),
        (b"not a picture at all", "readable picture"),
        (np.zeros((0, 4, 3), np.uint8), "empty"),
        (np.zeros((4, 4, 2), np.uint8), "channels"),
        (np.full((4, 4, 3), 300), "0 to 255"),
        (PIL.Image.new("F", (4, 4)), "floating point"),
    ],
)
def test_bad_values_are_named(value: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"^row 5: .*{message}"):
        images.decode(value, where="row 5")


@pytest.mark.parametrize("value", [3.5, "path.png", np.zeros((4, 4, 3)), torch.zeros(3, 4, 4)])
def test_bad_types_are_named(value: object) -> None:
    with pytest.raises(TypeError, match="^row 5: expected"):
        images.decode(value, where="row 5")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_damaged_bytes_never_become_a_picture_or_a_crash(picture: PIL.Image.Image, kind: str) -> None:
    data = stored(picture, kind)
    for cut in (30, len(data) // 3, len(data) // 2):
        with pytest.raises(ValueError, match="^row 5: expected a readable picture"):
            images.decode(data[:cut], where="row 5")
    damaged = bytearray(data)
    damaged[len(data) // 2] ^= 0xFF
    try:
        expected = np.asarray(PIL.Image.open(io.BytesIO(bytes(damaged))).convert("RGB"))
    except (OSError, SyntaxError):
        with pytest.raises(ValueError, match="^row 5"):
            images.decode(bytes(damaged), where="row 5")
    else:
        assert np.array_equal(seen(images.decode(bytes(damaged))), expected)


def test_animations_are_refused_and_phone_photos_are_not(picture: PIL.Image.Image) -> None:
    frames = [picture, picture.rotate(90)]
    animated = stored(frames[0], "GIF", save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match="one frame, got 2"):
        images.decode(animated)
    photo = stored(frames[0], "MPO", save_all=True, append_images=frames[1:])
    assert images.decode(photo).pixels.shape == (3, 37, 53)


def test_digest_is_of_pixels_not_of_containers(picture: PIL.Image.Image) -> None:
    png, bmp = (images.decode(stored(picture, kind)).pixels for kind in ("PNG", "BMP"))
    assert images.digest(png) == images.digest(bmp)
    other = png.clone()
    other[0, 0, 0] ^= 1
    assert images.digest(other) != images.digest(png)
    assert images.digest(png.reshape(3, 53, 37)) != images.digest(png)


def test_many_keeps_order_and_names_the_row() -> None:
    pictures = noise_pictures(40, 8, 8)
    data = [stored(PIL.Image.fromarray(p), "PNG") for p in pictures]
    assert np.array_equal(np.stack([seen(p) for p in images.decode_many(data)]), pictures)
    data[33] = b"broken"
    with pytest.raises(ValueError, match="^row 33 of the batch"):
        images.decode_many(data)


@pytest.mark.parametrize("image_format", ["png", "webp"])
@pytest.mark.parametrize("alpha", [False, True])
def test_what_was_encoded_is_read_back_where_rows_are_named(
    image_format: images.ImageFormat, alpha: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = torch.from_numpy(noise_pictures(12, 9, 11)).permute(0, 3, 1, 2).contiguous()
    mask = torch.arange(99).view(9, 11).to(torch.uint8) if alpha else None
    pictures = [images.Picture(one, mask) for one in pixels]
    names = [f"row {i}" for i in range(12)]
    plain = images.encode_many(pictures, image_format=image_format)
    assert images.encode_many(pictures, image_format=image_format, where=names) == plain
    encode = images.encode

    def encoder_that_changes(what: str):
        def changed(picture: images.Picture, **how) -> bytes:
            wrong, alpha = picture.pixels.clone(), picture.alpha
            if torch.equal(picture.pixels, pixels[10]):
                if what == "pixels":
                    wrong[2, 8, 10] ^= 1
                else:
                    alpha = torch.full((9, 11), 7, dtype=torch.uint8) if alpha is None or what == "alpha" else None
            return encode(images.Picture(wrong, alpha), **how)

        return changed

    for what in ("pixels", "alpha", "transparency"):
        monkeypatch.setattr(images, "encode", encoder_that_changes(what))
        with pytest.raises(ValueError, match="^row 10: the stored picture is not the one that was made"):
            images.encode_many(pictures, image_format=image_format, where=names)


def test_the_parent_is_no_worker() -> None:
    assert not images.in_worker_process()
    assert os.getpid() == images._IN_PARENT


def test_plain_pictures_are_read_back_by_the_faster_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = [images.Picture(one) for one in torch.from_numpy(noise_pictures(9)).permute(0, 3, 1, 2).contiguous()]
    with monkeypatch.context() as patch:
        patch.setattr(images, "decode", None)
        assert len(images.encode_many(pictures, where=["row"] * 9)) == 9
    monkeypatch.setattr(images, "_decode_png", None)
    assert len(images.encode_many(pictures, where=["row"] * 9)) == 9, "where torchvision has no operator"


def test_threads_have_one_torch_thread_each_and_the_caller_keeps_its_own() -> None:
    own = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        images._threads.cache_clear()
        large = torch.ones(200_000)
        found = images.in_threads(lambda _: (float(large.mul(2).sum()), torch.get_num_threads()), range(40))
        assert {threads for _, threads in found} == {1}
        assert torch.get_num_threads() == 3
        assert images.in_threads(lambda item: -item, [3, 1, 2]) == [-3, -1, -2]
    finally:
        torch.set_num_threads(own)
