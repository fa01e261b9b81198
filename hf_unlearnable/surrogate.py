"""Surrogate: what a poison learnt from a dataset, in one safetensors file."""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hf_unlearnable.checkpoint import tensors_digest
from hf_unlearnable.networks import Network, create_network, placed

SCHEMA = 1
FILE = "surrogate.safetensors"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Surrogate:
    """Networks, other tensors, and where they come from. Two are equal if their digests are.

    Pickling one that has a file leaves out the tensors: worker processes read the file again, and check it.

    Args:
        method: the name of the poison it is for.
        settings: the poison's hyper-parameters in training, as JSON values.
        classes: names of the classes in label order; empty for a method that needs no labels.
        image_size: height and width in pixels of the pictures it was trained on.
        networks: for every network how it is made: {"backbone": timm's name, "num_classes": k, "mean": [3 numbers],
            "std": [3 numbers]}, and "image_size": [height, width] where it is not the pictures'. Its weights are the
            tensors "NAME.WEIGHT".
        tensors: all tensors by name, on the CPU.
        provenance: what else is known of the training, as JSON values: data, recipe, seed, versions, hardware, curve.
        path: the file it was loaded from or saved to.
    """

    method: str
    settings: dict[str, Any]
    classes: tuple[str, ...]
    image_size: tuple[int, int]
    networks: dict[str, dict[str, Any]]
    tensors: dict[str, Tensor]
    provenance: dict[str, Any]
    path: Path | None = None
    digest: str = field(init=False)
    """SHA-256 of all tensors and of everything said about them."""

    def __post_init__(self) -> None:
        described = json.dumps(self._described(), sort_keys=True, allow_nan=False)
        digest = hashlib.sha256((described + tensors_digest(self.tensors)).encode()).hexdigest()
        object.__setattr__(self, "digest", digest)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Surrogate) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        size = f"{self.image_size[0]}x{self.image_size[1]}"
        return f"Surrogate({self.method!r}, {len(self.classes)} classes, {size}, digest {self.digest[:12]})"

    def network(self, name: str = "network", device: str | torch.device = "cpu") -> Network:
        """One of its networks on a device, in evaluation mode and frozen; made once and kept.

        Raises:
            KeyError: it has no network of this name.
        """
        kept: dict[tuple[str, str], Network] = self.__dict__.setdefault("_kept", {})
        place = (name, str(device))
        if place not in kept:
            how = self.networks[name]
            network = create_network(
                how["backbone"],
                num_classes=how["num_classes"],
                image_size=tuple(how.get("image_size", self.image_size)),
                seed=0,
                mean=how["mean"],
                std=how["std"],
            )
            before = f"{name}."
            own = {key[len(before) :]: value for key, value in self.tensors.items() if key.startswith(before)}
            network.load_state_dict(own)
            kept[place] = placed(network, device).eval().requires_grad_(False)
        return kept[place]

    def secret(self) -> bytes:
        """32 bytes that only who has the tensors can know; neither the digest nor a record gives them away."""
        return bytes.fromhex(tensors_digest(self.tensors))

    def save(self, path: str | Path) -> Path:
        """Write the file, whole or not at all. Returns its path.

        Raises:
            ValueError: the name does not end in .safetensors.
        """
        path = Path(path)
        if path.suffix != ".safetensors":
            raise ValueError(f"expected the name of a .safetensors file, got {path}")
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        text = json.dumps({**self._described(), "schema": SCHEMA, "digest": self.digest})
        try:
            tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in self.tensors.items()}
            save_file(tensors, partial, metadata={"format": "pt", "hf_unlearnable_surrogate": text})
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        object.__setattr__(self, "path", path.absolute())
        return path

    @classmethod
    def load(cls, source: str | Path, *, revision: str | None = None) -> "Surrogate":
        """Read a surrogate and check its digest.

        Args:
            source: a file, a folder with `surrogate.safetensors`, or the Hub id of a model repository ("user/name")
                with that file.
            revision: branch, tag or commit on the Hub.

        Raises:
            FileNotFoundError: there is no such file, nor a repository of that id.
            ValueError: no surrogate, a damaged or altered one, or one of a newer schema; says which.
        """
        path = _find(source, revision)
        try:
            with safe_open(path, "pt") as file:
                text = (file.metadata() or {}).get("hf_unlearnable_surrogate")
                tensors = {name: file.get_tensor(name) for name in file.keys()} if text else {}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path}: expected a safetensors file, got a damaged or another one ({error})") from error
        if text is None:
            raise ValueError(f"{path}: a safetensors file, but not a surrogate of this library")
        try:
            said = json.loads(text)
            if not isinstance(said, dict) or not isinstance(said.get("schema"), int):
                raise ValueError("no schema")
            if said["schema"] > SCHEMA:
                raise _NewerSchema(
                    f"{path}: expected a surrogate of schema {SCHEMA} or older, got {said['schema']}: "
                    "update hf_unlearnable"
                )
            expected = said["digest"]
            found = cls(
                method=said["method"],
                settings=said["settings"],
                classes=tuple(said["classes"]),
                image_size=(said["image_size"][0], said["image_size"][1]),
                networks=said["networks"],
                tensors=tensors,
                provenance=said["provenance"],
                path=path.absolute(),
            )
        except _NewerSchema as error:
            raise ValueError(str(error)) from None
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ValueError(f"{path}: the description of this surrogate is damaged: {error!r}") from error
        if found.digest != expected:
            raise ValueError(
                f"{path}: this surrogate was altered after it was made: expected digest {expected}, got {found.digest}"
            )
        return found

    def _described(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "settings": self.settings,
            "classes": list(self.classes),
            "image_size": list(self.image_size),
            "networks": self.networks,
            "provenance": self.provenance,
        }

    def __getstate__(self) -> dict[str, Any]:
        if self.path is not None:
            return {"path": self.path, "digest": self.digest}
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        if "tensors" not in state:
            found = _loaded(state["path"], state["digest"])
            if found.digest != state["digest"]:
                raise ValueError(f"{state['path']}: another surrogate was written there meanwhile")
            state = found.__dict__
        self.__dict__.update(state)


class _NewerSchema(Exception):
    pass


_LOADED: dict[tuple[Path, str], Surrogate] = {}


def _loaded(path: Path, digest: str) -> Surrogate:
    """The file, read once in a process."""
    if (path, digest) not in _LOADED:
        _LOADED[path, digest] = Surrogate.load(path)
    return _LOADED[path, digest]


def _find(source: str | Path, revision: str | None) -> Path:
    path = Path(source)
    if path.is_dir():
        path = path / FILE
    if path.is_file():
        return path
    if not isinstance(source, str) or not _HUB_ID.fullmatch(source) or path.suffix == ".safetensors":
        raise FileNotFoundError(f"{source}: expected a surrogate file, or a Hub id such as user/name; there is none")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError

    try:
        return Path(hf_hub_download(source, FILE, revision=revision))
    except (RepositoryNotFoundError, EntryNotFoundError) as error:
        raise FileNotFoundError(f"{source}: neither a file here nor a model on the Hub with {FILE}") from error
    except HfHubHTTPError as error:
        raise FileNotFoundError(f"{source}: no file here, and the Hub does not give it: {error}") from error
