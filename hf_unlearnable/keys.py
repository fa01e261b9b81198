"""Keys: from an int seed or a 32-byte secret to generators, commitments and cache tags.

Randomness in this library comes from a key and an explicit context (method, label, digest of a picture, step), never
from a global generator. A `bytes` key is a secret; an `int` seed is for reproducible research and can be enumerated.
"""

import contextlib
import hashlib
import hmac
import operator
import os
import secrets
from functools import cache
from pathlib import Path
from typing import SupportsIndex, TypeAlias, cast

import numpy as np
import torch

Key: TypeAlias = int | bytes
KEY_BYTES = 32


def new_key() -> bytes:
    """A fresh 32-byte secret key from the operating system's source of randomness."""
    return secrets.token_bytes(KEY_BYTES)


def check_key(key: object) -> Key:
    """The key as a plain `int` or `bytes`.

    Raises:
        TypeError: the key is neither an integer nor bytes (a bool is neither).
        ValueError: a negative integer, or bytes of another length than 32. The message never repeats the key.
    """
    if isinstance(key, bytes):
        if len(key) != KEY_BYTES:
            raise ValueError(f"a secret key has {KEY_BYTES} bytes (hf_unlearnable.new_key() makes one), got {len(key)}")
        return key
    if isinstance(key, bool) or not hasattr(key, "__index__"):
        raise TypeError(f"a key is a non-negative int or {KEY_BYTES} bytes, got {type(key).__name__}")
    number = operator.index(cast(SupportsIndex, key))
    if number < 0:
        raise ValueError("an int seed is not negative")
    return number


def _material(key: Key) -> bytes:
    key = check_key(key)
    return b"secret" + key if isinstance(key, bytes) else b"seed" + str(key).encode()


def subkey(key: Key, *context: str | int | bytes) -> bytes:
    """32 bytes derived from the key for one context; other contexts say nothing about them (HMAC-SHA256)."""
    message = bytearray()
    for part in context:
        if isinstance(part, str):
            tag, data = b"s", part.encode()
        elif isinstance(part, bytes):
            tag, data = b"b", part
        else:
            tag, data = b"i", str(operator.index(part)).encode()
        message += tag + len(data).to_bytes(8, "little") + data
    return hmac.digest(_material(key), bytes(message), "sha256")


def numpy_generator(key: Key, *context: str | int | bytes) -> np.random.Generator:
    """A counter-based generator (Philox, 128-bit key) for one context: what secret perturbations are drawn from."""
    return np.random.Generator(np.random.Philox(key=int.from_bytes(subkey(key, *context)[:16], "little")))


def torch_generator(key: Key, *context: str | int | bytes, device: str | torch.device = "cpu") -> torch.Generator:
    """A torch generator for one context. Its state is seeded with 64 bits or fewer: for training, not for secrets."""
    seed = int.from_bytes(subkey(key, *context)[:8], "little") >> 1
    return torch.Generator(device=device).manual_seed(seed)


def uniforms(key: Key, context: str, digests: list[bytes]) -> np.ndarray:
    """One float64 in [0, 1) for every digest, the same wherever that digest stands."""
    words = [int.from_bytes(subkey(key, context, digest)[:8], "little") >> 11 for digest in digests]
    return np.array(words, dtype=np.float64) * 2.0**-53


def commitment(key: Key) -> str | None:
    """A hash that binds the owner to a secret key without showing it; None for an int, which a hash would give away."""
    if isinstance(check_key(key), int):
        return None
    return "sha256:" + subkey(key, "hf_unlearnable commitment v1").hex()


@cache
def _local_salt() -> bytes:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf_unlearnable"
    path = folder / "salt"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        fresh = folder / f"salt-{os.getpid()}-{secrets.token_hex(4)}"
        fresh.touch(mode=0o600)
        fresh.write_bytes(secrets.token_bytes(KEY_BYTES))
        with contextlib.suppress(FileExistsError):
            os.link(fresh, path)
        fresh.unlink()
    with contextlib.suppress(OSError):
        salt = path.read_bytes()
        if len(salt) == KEY_BYTES:
            return salt
    return secrets.token_bytes(KEY_BYTES)


def cache_tag(key: Key) -> str:
    """A name for the key in cache fingerprints: equal on this machine, useless for guessing the key elsewhere.

    It depends on a random salt that never leaves this machine (in the user's cache folder), so that a published
    fingerprint cannot be used to test guesses of an int seed. Without a writable cache folder the salt lasts as long
    as the process, and caches are not reused.
    """
    return hashlib.sha256(_local_salt() + subkey(key, "cache tag")).hexdigest()


def write_key(path: str | Path) -> bytes:
    """A fresh secret key, written as hex to a new file that only its owner may read.

    Raises:
        FileExistsError: there is such a file: a key is never overwritten.
    """
    key = new_key()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(key.hex() + "\n")
    return key


def read_key(path: str | Path) -> bytes:
    """The secret key in a file made by `write_key`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file does not hold 64 hexadecimal digits; the message does not repeat what it holds.
    """
    text = Path(path).read_text(errors="replace").strip()
    try:
        return cast(bytes, check_key(bytes.fromhex(text)))
    except ValueError:
        raise ValueError(f"{path}: expected a key of {2 * KEY_BYTES} hexadecimal digits") from None
