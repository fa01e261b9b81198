"""Stopping a training, and going on with it.

A checkpoint is one safetensors file, written whole or not at all: weights and buffers ("module.NAME." before their
names), the state of optimisers ("optimizer.NAME.", the parameter's number and what it is), other tensors
("tensor.NAME"), and as JSON in the metadata `run` (what the training is: of another one nothing is loaded) and `state`
(what else it has to remember, such as its step).
"""

import hashlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer


class OtherRun(ValueError):
    """A checkpoint of another training than the one that wants to go on from it."""


def save_checkpoint(
    path: str | Path,
    *,
    run: dict[str, Any],
    state: dict[str, Any],
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, Optimizer],
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a checkpoint in place of the one before.

    Args:
        run, state: what JSON gives back as it was: lists but no tuples, strings as keys.
        tensors: what else the training keeps, such as a noise bank.
    """
    path = Path(path)
    found = {f"tensor.{name}": tensor for name, tensor in (tensors or {}).items()}
    for name, module in modules.items():
        found |= {f"module.{name}.{key}": tensor for key, tensor in module.state_dict().items()}
    for name, optimizer in optimizers.items():
        for number, weight in enumerate(_weights(optimizer)):
            for key, value in optimizer.state.get(weight, {}).items():
                if isinstance(value, Tensor):
                    found[f"optimizer.{name}.{number}.{key}"] = value
    found = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in found.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        text = json.dumps({"run": run, "state": state})
        save_file(found, partial, metadata={"hf_unlearnable": text})
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load_checkpoint(
    path: str | Path,
    *,
    run: dict[str, Any],
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, Optimizer],
    tensors: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Put everything back into modules, optimisers and tensors (in place), and return the state.

    Raises:
        FileNotFoundError: there is none.
        OtherRun: it is of another run (names what differs); nothing was changed.
        ValueError: not a checkpoint.
    """
    try:
        with safe_open(path, "pt") as file:
            kept = json.loads(file.metadata()["hf_unlearnable"])
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        there, state = kept["run"], kept["state"]
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: expected a checkpoint of a training, got {error!r}; delete it to start anew"
        ) from error
    if there != run:
        there, here = _flat(there), _flat(run)
        keys = [key for key in {**there, **here} if there.get(key) != here.get(key)]
        told = "; ".join(f"{key} is {there.get(key)!r} there and {here.get(key)!r} here" for key in keys)
        raise OtherRun(f"{path} is of another training: {told}; delete it to start anew")
    for name, module in modules.items():
        before = f"module.{name}."
        module.load_state_dict({key[len(before) :]: value for key, value in found.items() if key.startswith(before)})
    for name, optimizer in optimizers.items():
        for number, weight in enumerate(_weights(optimizer)):
            before = f"optimizer.{name}.{number}."
            for key in [key for key in found if key.startswith(before)]:
                value = found[key]
                if value.shape == weight.shape and not key.endswith(".step"):  # a count stays what and where it is
                    value = torch.empty_like(weight.detach()).copy_(value)
                optimizer.state[weight][key[len(before) :]] = value
    for name, tensor in (tensors or {}).items():
        tensor.copy_(found[f"tensor.{name}"])
    return state


def _weights(optimizer: Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and values."""
    state = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        state.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of names, types, shapes and values of all parameters and buffers."""
    return tensors_digest(model.state_dict())


class Interrupts:
    """Ctrl-C and SIGTERM become a wish (`asked`) to stop after the step under way; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.asked, self._when, self._before = False, 0.0, {}

    def _note(self, number: int, frame: Any) -> None:
        if self.asked and number == signal.SIGINT and time.monotonic() - self._when > 1:
            raise KeyboardInterrupt
        if not self.asked:
            self.asked, self._when = True, time.monotonic()

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            self._before = {n: signal.signal(n, self._note) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    inner = {f"{k}.{i}": v for k, value in values.items() if isinstance(value, dict) for i, v in value.items()}
    return {**{key: value for key, value in values.items() if not isinstance(value, dict)}, **inner}
