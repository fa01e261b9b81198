"""Pictures: PIL, bytes or arrays <-> uint8 and float [0, 1] NCHW. The only rounding, and the only encoding.

What is stored is lossless and made from fresh pixels: never the source's encoder, path or metadata.
"""

import hashlib
import io
import os
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypeAlias, TypeVar

import multiprocess.process
import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
import torchvision.io  # noqa: F401 (registers its operators)
from jaxtyping import Float, Int, UInt8
from torch import Tensor

Images: TypeAlias = Float[Tensor, "b 3 h w"]
Pixels: TypeAlias = UInt8[Tensor, "b 3 h w"]
Labels: TypeAlias = Int[Tensor, "b"]
ImageFormat: TypeAlias = Literal["png", "webp"]

T = TypeVar("T")
R = TypeVar("R")
_IN_PARENT = os.getpid()
MOST_THREADS = min(os.cpu_count() or 1, 16)


@dataclass(frozen=True)
class Picture:
    """One decoded picture: `pixels`, uint8 RGB of shape (3, height, width), and its alpha channel where it has one."""

    pixels: UInt8[Tensor, "3 h w"]
    alpha: UInt8[Tensor, "h w"] | None = None


def to_float(pixels: UInt8[Tensor, "*b 3 h w"]) -> Float[Tensor, "*b 3 h w"]:
    """uint8 to float32 in [0, 1], the nearest float to level / 255 on every device."""
    return pixels.to(torch.float32).div_(torch.tensor(255.0, device=pixels.device))


def to_uint8(x: Float[Tensor, "*b 3 h w"], where: Sequence[str] | None = None) -> UInt8[Tensor, "*b 3 h w"]:
    """The one rounding: nearest of 256 levels (ties to even), then clamped to [0, 255].

    Args:
        where: what each row is called in errors (default: its place in the batch).

    Raises:
        ValueError: `x` holds NaN; names the first row.
    """
    levels = x.mul(255).round_()
    if torch.isnan(levels.sum()):
        rows = torch.isnan(levels).flatten(1).any(1).nonzero().flatten().tolist() if x.dim() == 4 else [0]
        if rows:
            at = f"row {rows[0]} of the batch" if where is None else where[rows[0]]
            raise ValueError(f"expected pictures of numbers in [0, 1], got NaN in {at}")
    return as_uint8(levels.clamp_(0, 255))


def as_uint8(levels: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """Whole numbers from 0 to 255 as uint8; on a CPU by way of 16 bits, which PyTorch does several times faster."""
    return (levels.to(torch.int16) if levels.device.type == "cpu" else levels).to(torch.uint8)


def digest(pixels: UInt8[Tensor, "3 h w"]) -> bytes:
    """16 bytes that identify decoded pixels: BLAKE2b of height, width and the RGB planes, whatever the container."""
    _, height, width = pixels.shape
    state = hashlib.blake2b(f"{height}x{width}".encode(), digest_size=16)
    state.update(pixels.contiguous().cpu().numpy().data)
    return state.digest()


def in_worker_process() -> bool:
    """Whether this is a forked or spawned worker (or Ray's), where threads of its own would compete, or hang torch."""
    return os.getpid() != _IN_PARENT or multiprocess.process.parent_process() is not None or _in_ray_worker()


def _in_ray_worker() -> bool:
    ray: Any = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return False
    worker = getattr(ray.get_runtime_context(), "worker", None)
    return worker is not None and worker.mode == ray.WORKER_MODE


def one_thread_in_workers() -> None:
    """In a worker process, torch runs on one thread: a fork of a parent that has used its threads hangs otherwise."""
    if in_worker_process() and torch.get_num_threads() != 1:
        torch.set_num_threads(1)


@cache
def _threads(pid: int) -> ThreadPoolExecutor:
    """Threads in which torch uses no further threads of its own.

    Else it would have more threads at work than there are processors, upon which OpenMP lets those of the caller sleep
    between operations from then on, which small ones, as in training a small network, are slower by.
    """
    own, all_there = torch.get_num_threads(), threading.Barrier(MOST_THREADS)
    pool = ThreadPoolExecutor(MOST_THREADS, f"pictures-{pid}", initializer=_one_thread)
    list(pool.map(lambda _: all_there.wait(timeout=60), range(MOST_THREADS)))
    torch.set_num_threads(own)  # the last number that was set anywhere is what threads begun later start with
    return pool


def _one_thread() -> None:
    torch.get_num_threads()  # the first look in a thread takes over the number that was set last
    torch.set_num_threads(1)


def in_threads(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """What the function makes of each item, in order; one after the other in a worker process, and where there are few.

    The function may not call this itself.
    """
    if len(items) < 2 or in_worker_process():
        return [function(item) for item in items]
    return list(_threads(os.getpid()).map(function, items))


def _threaded(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """`in_threads` for many small tasks."""
    size = max(1, -(-len(items) // (4 * MOST_THREADS)))
    parts = [items[start : start + size] for start in range(0, len(items), size)]
    return [result for part in in_threads(lambda part: [function(item) for item in part], parts) for result in part]


def _bytes_of(value: dict[str, Any], where: str) -> bytes:
    """The stored bytes of an undecoded picture: its own, or those of the file at its path or address.

    Raises:
        ValueError: there are none, or no such file; begins with `where`.
        OSError: an address that cannot be read now.
    """
    data, path = value.get("bytes"), value.get("path")
    if data is not None:
        return data
    if path is None:
        raise ValueError(f"{where}: expected a picture, got neither bytes nor a path")
    if "::" in path or "://" in path:
        import fsspec

        try:
            with fsspec.open(path, "rb") as file:
                return file.read()  # type: ignore[union-attr]
        except (FileNotFoundError, PermissionError) as error:
            told = "no such file" if isinstance(error, FileNotFoundError) else "permission denied"
            raise ValueError(f"{where}: expected a readable picture file, got {told}") from error
        except OSError as error:
            raise OSError(f"{where}: reading the picture failed with {type(error).__name__}: {error}") from error
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise ValueError(f"{where}: expected a readable picture file, got {error.strerror or error}") from error


# torchvision's codecs are several times faster than PIL's on small pictures and run in threads. Its Python functions
# are announced for removal, so its operators are used where they exist and give PIL's pixels, PIL everywhere else.
_UNCHANGED = 0


def _operator(name: str) -> Callable[..., Tensor] | None:
    try:
        return getattr(torch.ops.image, name)
    except (AttributeError, RuntimeError):
        return None


_decode_jpeg = _operator("decode_jpeg")
_decode_png = _operator("decode_png")
_encode_png = _operator("encode_png")


def _test_picture() -> np.ndarray:
    yy, xx = np.mgrid[0:37, 0:51]
    return np.stack([xx * 5, yy * 6, (xx * yy) % 256], axis=-1).astype(np.uint8)


@cache
def _jpeg_decoders_agree() -> bool:
    for options in ({"quality": 75}, {"quality": 92, "subsampling": 0}, {"quality": 30, "progressive": True}):
        buffer = io.BytesIO()
        PIL.Image.fromarray(_test_picture()).save(buffer, "JPEG", **options)
        ours = _decode_by(_decode_jpeg, buffer.getvalue())
        if ours is None or not np.array_equal(ours.permute(1, 2, 0).numpy(), np.asarray(PIL.Image.open(buffer))):
            return False
    return True


@cache
def _png_encoder_agrees() -> bool:
    pixels = torch.from_numpy(_test_picture()).permute(2, 0, 1).contiguous()
    data = _encode_png_bytes(pixels, 1)
    return data is not None and np.array_equal(np.asarray(PIL.Image.open(io.BytesIO(data))), _test_picture())


def _decode_by(operator: Callable[..., Tensor] | None, data: bytes) -> Tensor | None:
    """What an operator makes of the bytes; None where there is none, or where it refuses them."""
    if operator is None:
        return None
    try:
        return operator(torch.frombuffer(bytearray(data), dtype=torch.uint8), _UNCHANGED, False)
    except (RuntimeError, TypeError):
        return None


def _encode_png_bytes(pixels: Tensor, compress_level: int) -> bytes | None:
    if _encode_png is None:
        return None
    try:
        return _encode_png(pixels, compress_level).numpy().tobytes()
    except (RuntimeError, TypeError):
        return None


def _decode_plain(data: bytes) -> Tensor | None:
    """The faster decoder, for JPEGs of three channels that no EXIF or XMP rotates; None for everything else.

    Not for PNGs from elsewhere: torchvision's decoder ends the process on some damaged files.
    """
    if data[:3] != b"\xff\xd8\xff" or b"Exif\0\0" in data or b"Orientation" in data or not _jpeg_decoders_agree():
        return None
    pixels = _decode_by(_decode_jpeg, data)
    return pixels.contiguous() if pixels is not None and pixels.shape[0] == 3 else None


def _from_pil(picture: PIL.Image.Image, where: str) -> Picture:
    if getattr(picture, "n_frames", 1) > 1 and picture.format != "MPO":
        raise ValueError(f"{where}: expected a picture of one frame, got {picture.n_frames} frames")  # type: ignore[attr-defined]
    try:
        picture = PIL.ImageOps.exif_transpose(picture)
        mode = picture.mode
        if mode in ("I;16", "I;16L", "I;16B", "I;16N") or mode == "I":
            if picture.has_transparency_data:
                raise ValueError(f"{where}: expected 8 bits a channel where there is transparency, got 16")
            wide = np.asarray(picture).astype(np.int64)
            if wide.size and (wide.min() < 0 or wide.max() > 65535):
                raise ValueError(f"{where}: expected 8 or 16 bits a channel, got values outside 0 to 65535")
            grey = np.round(wide / 257).astype(np.uint8)
            return _from_array(np.repeat(grey[:, :, None], 3, axis=2), where)
        if mode == "F":
            raise ValueError(f"{where}: expected 8 or 16 bits a channel, got floating point (mode F)")
        if mode == "RGB" and "transparency" not in picture.info:
            array = np.asarray(picture)
        elif picture.has_transparency_data:
            array = np.asarray(picture.convert("RGBA"))
        else:
            array = np.asarray(picture.convert("RGB"))
    except (OSError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        raise ValueError(f"{where}: expected a readable picture, got {type(error).__name__}: {error}") from error
    return _from_array(array, where)


def _from_array(array: Any, where: str, *, channels_first: bool = False) -> Picture:
    array = np.asarray(array)
    if array.dtype.kind in "iu" and array.dtype != np.uint8 and array.size:
        if array.min() < 0 or array.max() > 255:
            raise ValueError(f"{where}: expected values from 0 to 255, got {array.min()} to {array.max()}")
        array = array.astype(np.uint8)
    if array.dtype != np.uint8:
        raise TypeError(f"{where}: expected a uint8 picture, got an array of {array.dtype}")
    if array.ndim == 3 and channels_first:
        array = array.transpose(1, 2, 0)
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4):
        raise ValueError(f"{where}: expected a picture of 1, 3 or 4 channels, got an array of shape {array.shape}")
    if array.size == 0:
        raise ValueError(f"{where}: expected a picture, got an empty one of shape {array.shape}")
    colour = np.repeat(array, 3, axis=2) if array.shape[2] == 1 else array[:, :, :3]
    pixels = torch.from_numpy(np.array(colour.transpose(2, 0, 1), order="C", copy=True))
    alpha = torch.from_numpy(np.array(array[:, :, 3], order="C")) if array.shape[2] == 4 else None
    return Picture(pixels, alpha)


def decode(value: Any, *, where: str = "picture") -> Picture:
    """A picture from what `datasets` hands over: PIL, bytes, {"bytes", "path"}, a uint8 array (HWC) or tensor (CHW).

    EXIF rotation is applied. Grayscale, palette, CMYK and other colour modes become RGB; 16-bit grey becomes 8-bit
    (value / 257, rounded), 16-bit colour keeps its high bytes, as PIL decodes it; transparency is kept
    apart as `alpha`.

    Raises:
        ValueError: None, an empty or unreadable picture, several frames, floating-point pixels; begins with `where`.
        TypeError: a value of another type.
    """
    if value is None:
        raise ValueError(f"{where}: expected a picture, got None")
    if isinstance(value, dict):
        value = _bytes_of(value, where)
    if isinstance(value, bytes | bytearray | memoryview):
        data = bytes(value)
        plain = _decode_plain(data)
        if plain is not None:
            return Picture(plain)
        try:
            value = PIL.Image.open(io.BytesIO(data))
        except (OSError, SyntaxError, PIL.Image.DecompressionBombError) as error:
            raise ValueError(
                f"{where}: expected a readable picture, got {len(data)} bytes of no known format"
            ) from error
    if isinstance(value, PIL.Image.Image):
        return _from_pil(value, where)
    if isinstance(value, Tensor):
        return _from_array(value.cpu().numpy(), where, channels_first=True)
    if isinstance(value, np.ndarray):
        return _from_array(value, where)
    raise TypeError(
        f"{where}: expected a PIL picture, bytes, {{bytes, path}} or a uint8 array, got {type(value).__name__}"
    )


def decode_many(values: Iterable[Any], *, where: Sequence[str] | None = None) -> list[Picture]:
    """`decode` for many pictures, in threads; `where` names each one in errors (default: its place in the batch)."""
    values = list(values)
    names = where if where is not None else [f"row {i} of the batch" for i in range(len(values))]
    return _threaded(lambda item: decode(item[0], where=item[1]), list(zip(values, names, strict=True)))


def digest_many(pictures: Sequence[Picture]) -> list[bytes]:
    """`digest` of many pictures, in threads."""
    return _threaded(lambda picture: digest(picture.pixels), pictures)


def to_pil(picture: Picture) -> PIL.Image.Image:
    """The picture as a fresh PIL image (RGB, or RGBA where it has alpha) that carries no format, path or metadata."""
    array = picture.pixels.permute(1, 2, 0)
    if picture.alpha is not None:
        array = torch.cat([array, picture.alpha[:, :, None]], dim=2)
    return PIL.Image.fromarray(array.contiguous().numpy())


def encode(picture: Picture, *, image_format: ImageFormat = "png", compress_level: int = 1) -> bytes:
    """Lossless bytes of fresh pixels.

    Args:
        image_format: "png", or "webp" (lossless, exact under transparency): smaller for large pictures.
        compress_level: 0 (stored) to 9 (smallest). On noisy or blurred pictures levels above 1 cost several times the
            time for a few per cent of the size, so 1 is the default. For WebP it is the encoder's effort.
    """
    if image_format == "png" and picture.alpha is None and _png_encoder_agrees():
        data = _encode_png_bytes(picture.pixels, compress_level)
        if data is not None:
            return data
    buffer = io.BytesIO()
    if image_format == "webp":
        effort = max(0, min(6, compress_level - 1))
        to_pil(picture).save(buffer, "WEBP", lossless=True, exact=True, quality=min(100, 20 * effort), method=effort)
    else:
        to_pil(picture).save(buffer, "PNG", compress_level=compress_level)
    return buffer.getvalue()


def encode_many(
    pictures: Sequence[Picture],
    *,
    image_format: ImageFormat = "png",
    compress_level: int = 1,
    where: Sequence[str] | None = None,
    read_back: Sequence[bool] | None = None,
) -> list[bytes]:
    """`encode` for many pictures, in threads.

    Args:
        where: what each picture is called in errors; with it, what was made is decoded again and compared.
        read_back: for which of them (default: all).

    Raises:
        ValueError: what was made does not hold the picture; begins with its `where`.
    """
    how: dict[str, Any] = {"image_format": image_format, "compress_level": compress_level}
    if where is None:
        return _threaded(lambda picture: encode(picture, **how), pictures)

    def checked(item: tuple[Picture, str, bool]) -> bytes:
        picture, at, again = item
        data = encode(picture, **how)
        if again and not _holds(data, picture, at):
            raise ValueError(f"{at}: the stored picture is not the one that was made")
        return data

    again = [True] * len(pictures) if read_back is None else read_back
    return _threaded(checked, list(zip(pictures, where, again, strict=True)))


def _holds(data: bytes, picture: Picture, where: str) -> bool:
    """Whether bytes that were just made decode to the picture."""
    if picture.alpha is None and data[:4] == b"\x89PNG":
        pixels = _decode_by(_decode_png, data)
        if pixels is not None and torch.equal(pixels, picture.pixels):
            return True
    read = decode(data, where=f"{where}, read back")
    if (read.alpha is None) != (picture.alpha is None) or not torch.equal(read.pixels, picture.pixels):
        return False
    return read.alpha is None or picture.alpha is None or torch.equal(read.alpha, picture.alpha)
