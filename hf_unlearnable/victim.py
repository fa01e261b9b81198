"""Train and evaluate one victim.

The loop stands in `train`: batches from a split on the device, crop and flip, the defense's loss, SGD or AdamW. Every
random number is drawn from the seed and the step, and the learning rate is a function of the step, so that a resumed
training ends with the weights of an uninterrupted one (bit for bit on a CPU).

With several processes gradients are averaged here, weighted by rows, instead of by DistributedDataParallel: defenses
may call the model as often as they like, and the weights are equal on all processes after every step. Two processes
give the loss curve of one but for float rounding, for networks without BatchNorm: its batch statistics are those of a
process's own rows (the running ones are averaged over the processes).
"""

import contextlib
import dataclasses
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_unlearnable.batches import Batches
from hf_unlearnable.checkpoint import Interrupts, load_checkpoint, save_checkpoint, weights_digest
from hf_unlearnable.defenses.base import BeforeCrop, Defense, Predicts, describe
from hf_unlearnable.environment import hardware, keep_freed_memory, versions
from hf_unlearnable.images import Labels, to_float
from hf_unlearnable.keys import torch_generator
from hf_unlearnable.networks import Network, frozen, placed
from hf_unlearnable.recipes import Recipe
from hf_unlearnable.result import Result, Tally
from hf_unlearnable.training import (
    Unfinished,
    as_input,
    augmented,
    average_over_processes,
    own_randomness,
    restored_modes,
    seed_layers,
    standard_augmentation,
    stream,
)


def evaluate(
    model: nn.Module, batches: Batches, *, accelerator: Accelerator, defense: Defense | None = None, seed: int = 0
) -> Int[Tensor, "k k"]:
    """The confusion matrix over all processes: entry (i, j) counts the rows of class i that were taken for class j.

    The model is in evaluation mode meanwhile, and gets back its modes.

    Args:
        defense: answers in place of the model where it has its own way of predicting (`Predicts`).
        seed: of what it draws for that.
    """
    classes = len(batches.classes)
    counts = torch.zeros(classes * classes, dtype=torch.int64, device=batches.device)
    most = 250 if batches.device.type == "cpu" else 1000  # larger ones leave a CPU's cache
    size = max(1, min(most, 2**22 // math.prod(batches.image_size)))
    rank, world = accelerator.process_index, accelerator.num_processes
    generator = torch_generator(seed, "predict", rank, device=batches.device)
    with frozen(model), torch.no_grad(), accelerator.autocast():
        for pixels, labels in batches.chunks(size, rank=rank, world=world):
            x = as_input(pixels)
            own = isinstance(defense, Predicts)
            scores = defense.predict(model, x, generator=generator) if own else model(x)  # type: ignore[union-attr]
            counts += torch.bincount(labels * classes + scores.argmax(1), minlength=len(counts))
    total = accelerator.reduce(counts, "sum")
    assert isinstance(total, Tensor)
    return total.view(classes, classes)


def train(
    model: nn.Module,
    train: Batches,
    test: Batches,
    *,
    recipe: Recipe,
    defense: Defense,
    accelerator: Accelerator,
    seed: int,
    validation: Batches | None = None,
    validation_fraction: float = 0.1,
    evaluate_every: int = 1,
    checkpoint: str | Path | None = None,
    checkpoint_seconds: float = 60.0,
    max_minutes: float | None = None,
    progress: bool = True,
) -> Result:
    """Train `model` in place, on all processes of the accelerator.

    Args:
        train: training rows; a validation part is taken from them, class by class, by seed.
        test: rows never trained on; their classes are matched with the training classes by name.
        seed: of the validation part, the order, the augmentation and the defense; not of the initial weights.
        validation: rows to choose the best epoch by, such as clean ones; None takes them from the training rows.
        validation_fraction: share of the training rows in [0, 1); 0 trains on all of them and gives no "best".
            Without effect where `validation` is given.
        evaluate_every: epochs between evaluations; the end of the training is always evaluated.
        checkpoint: a safetensors file, written in one piece now and then; where it exists, training goes on from it.
        checkpoint_seconds: time between checkpoints; 0 writes one after every step.
        max_minutes: stop after this time in this call; needs a checkpoint.
        progress: a progress bar, on the main process.

    Raises:
        Unfinished: `max_minutes` are over; the checkpoint holds the state.
        KeyboardInterrupt: Ctrl-C or SIGTERM, after the step under way; the checkpoint holds the state.
        FloatingPointError: the loss is no longer finite (names the step); the checkpoint is the last one before.
        ValueError: data, network and recipe do not fit together, or the checkpoint is of another training.
    """
    began, saved = time.monotonic(), time.monotonic()
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    if device.type == "cpu":
        keep_freed_memory()
    train, test = train.to(device), test.relabel(train.classes).to(device)
    if validation is None:
        training, held_out = train.split(validation_fraction, key=seed)
    else:
        training, held_out, validation_fraction = train, validation.relabel(train.classes).to(device), 0.0
    per_epoch = training.steps(recipe.batch_size, drop_last=recipe.drop_last)
    total = recipe.total_steps(per_epoch)
    placed(model, device)
    if max_minutes is not None and checkpoint is None:
        raise ValueError("max_minutes needs a checkpoint to go on from")
    if evaluate_every < 1:
        raise ValueError(f"evaluate_every: expected at least 1 epoch, got {evaluate_every}")
    _check(model, train, test, recipe, per_epoch, accelerator)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = _optimizer(recipe, weights)
    augmentation = standard_augmentation(recipe, train.image_size)
    run = {
        "recipe": dataclasses.asdict(recipe),
        "defense": describe(defense),
        "seed": seed,
        "validation_fraction": validation_fraction,
        "evaluate_every": evaluate_every,
        "validation_digest": None if validation is None else held_out.digest(),
        "precision": accelerator.mixed_precision,
        "initial_weights": weights_digest(model),
        "frozen_parameters": [name for name, parameter in model.named_parameters() if not parameter.requires_grad],
        "frozen_batch_norm": isinstance(model, Network) and model.frozen_batch_norm,
        "train_digest": train.digest(),
        "test_digest": test.digest(),
    }
    if isinstance(model, Network) and model.sees is not None:
        run["sees"] = model.sees
    run = json.loads(json.dumps(run, default=str))
    trained: Any = {"modules": {"model": model}, "optimizers": {recipe.optimizer: optimizer}}
    tally = Tally()
    if checkpoint and Path(checkpoint).exists():
        tally = Tally.resumed(load_checkpoint(checkpoint, run=run, **trained))
    before, look_every = tally.seconds, 1 if device.type == "cpu" else 20  # to read from a GPU is to wait for it
    sums = torch.tensor(tally.sums, dtype=torch.float64, device=device)
    main = accelerator.is_main_process

    with (
        own_randomness(device),
        restored_modes(model),
        _last_logits(model) as logits,
        Interrupts() as interrupts,
        tqdm(
            desc="training",
            total=total,
            initial=tally.step,
            unit="step",
            mininterval=0.5,
            disable=not (progress and main),
        ) as bar,
    ):
        model.train()
        order = stream(training, recipe, seed, rank, world, tally.step)
        for step, batch in zip(range(tally.step, total), order, strict=False):
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate(step, total)
            optimizer.zero_grad()
            here = torch.zeros(len(sums) - 1, device=device)
            if rows := len(batch.labels):
                generator = torch_generator(seed, "defense", step, rank, device=device)
                early = None
                if isinstance(defense, BeforeCrop):
                    early = defense.before_crop(to_float(batch.pixels), batch.labels, generator=generator)
                x = as_input(augmented(batch, augmentation, seed, step, early))
                seed_layers(seed, step, rank, device)
                with accelerator.autocast():
                    loss = defense(model, x, batch.labels, progress=step / total, generator=generator)
                (loss * (rows * world / batch.size)).backward()
                here[0], here[1] = loss.detach() * rows, rows
                here[2:4] = _hits(logits.pop("last", None), batch.labels)
            overdue = main and max_minutes is not None and time.monotonic() - began >= 60 * max_minutes
            if overdue or interrupts.asked:
                here[4], here[5] = overdue, interrupts.asked
            sums[:-1] += average_over_processes(here, weights, model, accelerator)
            sums[-1] += ~sums[0].isfinite()
            if recipe.gradient_clip is not None:
                nn.utils.clip_grad_norm_(weights, recipe.gradient_clip)
            optimizer.step()
            bar.update()

            tally.step = step + 1
            finished, passed = tally.step == total, tally.step % per_epoch == 0
            if not (finished or passed or tally.step % look_every == 0):
                continue
            late, interrupted = tally.look(sums.tolist(), total)
            bar.set_postfix(tally.shown(), refresh=False)
            if finished or passed:
                epoch = -(-tally.step // per_epoch)
                if measured := finished or epoch % evaluate_every == 0:
                    looked = {"accelerator": accelerator, "defense": defense, "seed": seed}
                    tally.confusion = evaluate(model, test, **looked).tolist()
                    tally.held_out = evaluate(model, held_out, **looked).tolist()
                tally.end_epoch(epoch, measured)
                sums.zero_()
            tally.seconds = before + time.monotonic() - began
            stopped = interrupted or (late and not finished)
            if checkpoint and main and (finished or stopped or time.monotonic() - saved >= checkpoint_seconds):
                tally.sums = [*sums.tolist()[:4], 0.0, 0.0, 0.0]
                kept = dataclasses.asdict(tally)
                save_checkpoint(checkpoint, run=run, state=kept, **trained)
                saved = time.monotonic()
            if checkpoint and (finished or stopped):
                accelerator.wait_for_everyone()
            if interrupted:
                raise KeyboardInterrupt(f"stopped after step {tally.step} of {total}")
            if stopped:
                raise Unfinished(f"stopped after step {tally.step} of {total}; go on from {checkpoint}")

    return Result(
        **tally.measured(),
        classes=train.classes,
        train_rows=len(training),
        validation_rows=len(held_out),
        test_rows=len(test),
        image_size=train.image_size,
        train_digest=run["train_digest"],
        test_digest=run["test_digest"],
        backbone=model.architecture if isinstance(model, Network) else type(model).__name__,
        defense=run["defense"],
        recipe=recipe,
        seed=seed,
        hardware=hardware(accelerator),
        versions=versions("timm", "accelerate"),
    )


def train_to_end(
    model: nn.Module,
    rows: Batches,
    test: Batches,
    *,
    recipe: Recipe,
    defense: Defense,
    accelerator: Accelerator,
    seed: int,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> Result:
    """`train` on all rows, none of them held out, and evaluated once, after the last step."""
    return train(
        model,
        rows,
        test,
        recipe=recipe,
        defense=defense,
        accelerator=accelerator,
        seed=seed,
        validation_fraction=0.0,
        evaluate_every=recipe.epochs or recipe.steps or 1,
        checkpoint=checkpoint,
        progress=progress,
    )


def _optimizer(recipe: Recipe, weights: list[nn.Parameter]) -> torch.optim.Optimizer:
    how: dict[str, Any] = {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay}
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(weights, **how)
    return torch.optim.SGD(weights, momentum=recipe.momentum, nesterov=recipe.nesterov, **how)


def _hits(logits: Tensor | None, labels: Labels) -> Float[Tensor, "2"]:
    if logits is None or logits.dim() != 2 or len(logits) != len(labels):
        return torch.zeros(2, device=labels.device)
    right = (logits.argmax(1) == labels).sum()
    return torch.stack([right, torch.full_like(right, len(labels))]).float()


@contextlib.contextmanager
def _last_logits(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    seen: dict[str, Tensor] = {}

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            seen["last"] = output.detach()

    handle = model.register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


def _check(
    model: nn.Module, train: Batches, test: Batches, recipe: Recipe, per_epoch: int, accelerator: Accelerator
) -> None:
    known = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
    if accelerator.distributed_type not in known or accelerator.mixed_precision not in ("no", "bf16"):
        raise ValueError(
            "expected plain data-parallel processes in float32 or bf16, got "
            f"{accelerator.distributed_type} with mixed_precision={accelerator.mixed_precision!r}"
        )
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != accelerator.num_processes:
        raise ValueError(
            f"{started} processes were started, but the accelerator knows of {accelerator.num_processes}: "
            "on CPUs use Accelerator(cpu=True), or set ACCELERATE_USE_CPU=true"
        )
    if train.image_size != test.image_size:
        raise ValueError(f"expected test pictures of {train.image_size} pixels as in training, got {test.image_size}")
    if not len(test):
        raise ValueError("expected at least one test row, got none")
    if not per_epoch:
        raise ValueError(f"no whole batch of {recipe.batch_size} among the training rows, and the recipe drops others")
    with frozen(model), torch.no_grad(), accelerator.autocast():
        shape = tuple(model(as_input(train.pixels[:2])).shape)
    expected = (min(2, len(train)), len(train.classes))
    if shape != expected:
        raise ValueError(f"expected logits of shape {expected} (rows, classes) from the network, got {shape}")
