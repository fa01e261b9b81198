"""Measure speed, as ratios within one run.

    python scripts/benchmark.py map                      # pictures that the project draws; --quick for a short look
    python scripts/benchmark.py map --dataset ../shared/data/cifar10 --dataset ../shared/data/imagenette-224-subset
    python scripts/benchmark.py surrogate --dataset ../shared/data/cifar10

`map` compares, at each picture size: a lossless identity map (decode, re-encode, no poison), the CUDA map, the usual
identity map (PIL, default PNG), CUDA as it is usually written (the same, row by row, one convolution a picture), and
the arithmetic alone against that loop.

`surrogate` compares one step of a surrogate's training at the paper's settings, and the map of its poison over the
pictures, with one step of plain training (forward, backward, SGD) of the same network on a batch. Beside it stands the
ideal: the forward-backward passes that the method consists of, in batches. A pass of an attack needs no gradients of
weights, so a ratio may lie below its ideal. "tiny" is the network on a CPU, ResNet-18 (bf16) on a GPU.

Rounds alternate between the variants; a ratio is the median over rounds of the ratio within a round.
"""

import argparse
import dataclasses
import itertools
import json
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import datasets
import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from datasets import ClassLabel, Dataset, Features, Image

import hf_unlearnable as hu
from hf_unlearnable import CudaPoison, Transform, columns, sources
from hf_unlearnable.batches import Batches
from hf_unlearnable.draws import Draws
from hf_unlearnable.environment import hardware, versions
from hf_unlearnable.fitting import Setup
from hf_unlearnable.images import decode_many
from hf_unlearnable.keys import numpy_generator
from hf_unlearnable.recipes import Recipe
from hf_unlearnable.training import as_input, own_randomness

SEED = 7


@dataclass(frozen=True, kw_only=True)
class Identity(Transform):
    """Decode and re-encode losslessly: what any map that stores pictures must at least do."""

    name: ClassVar[str] = "identity"

    def change(self, pixels: torch.Tensor, labels: torch.Tensor | None, where: Sequence[str]) -> torch.Tensor:
        return pixels


def pil_copy(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Decode with PIL and let `datasets` store PNG at its default: the usual lossless map, without a poison."""
    name = next(name for name in ("image", "img") if name in batch)
    return {name: [PIL.Image.fromarray(np.asarray(picture.convert("RGB"))) for picture in batch[name]]}


class Loop:
    """CUDA as a plain map: PIL, one convolution module a picture, default PNG."""

    def __init__(self, image: str, label: str, classes: int, size: int) -> None:
        self.image, self.label = image, label
        k, blur = (3, 0.3) if size < 96 else (9, 0.06)
        self.padding = k // 2
        self.filters = CudaPoison(seed=SEED).filters(classes, kernel_size=k, blur=blur).float()

    def tensor(self, x: torch.Tensor, label: int) -> torch.Tensor:
        weight = self.filters[label].expand(3, 1, -1, -1)
        blurred = F.conv2d(x[None], weight, padding=self.padding, groups=3)[0]
        return blurred / blurred.max()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        picture = np.asarray(row[self.image].convert("RGB"), dtype=np.float32) / 255
        x = self.tensor(torch.from_numpy(picture).permute(2, 0, 1), row[self.label])
        return {self.image: PIL.Image.fromarray((x.permute(1, 2, 0) * 255).numpy().astype(np.uint8))}


def mapped(source: Dataset, function: Any, **options: Any) -> None:
    """One map over the rows, written to a file that is thrown away."""
    with tempfile.TemporaryDirectory() as folder:
        source.map(function, cache_file_name=f"{folder}/out.arrow", new_fingerprint=os.urandom(8).hex(), **options)


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def drawn(rows: int, size: int) -> Dataset:
    """JPEG pictures with smooth and fine detail, made on the spot."""
    generator = numpy_generator(SEED, "benchmark", size)
    coarse = generator.integers(0, 256, (rows, 4, 4, 3), dtype=np.uint8)
    values = []
    for picture in coarse:
        smooth = PIL.Image.fromarray(picture).resize((size, size), PIL.Image.Resampling.BICUBIC)
        noisy = np.asarray(smooth, dtype=np.int16) + generator.integers(-12, 13, (size, size, 3))
        values.append(_jpeg(np.clip(noisy, 0, 255).astype(np.uint8)))
    features = Features({"image": Image(), "label": ClassLabel(num_classes=10)})
    return Dataset.from_dict({"image": values, "label": [i % 10 for i in range(rows)]}, features=features)


def _jpeg(array: np.ndarray) -> dict[str, Any]:
    import io

    buffer = io.BytesIO()
    PIL.Image.fromarray(array).save(buffer, "JPEG", quality=90)
    return {"bytes": buffer.getvalue(), "path": None}


def compare(
    variants: dict[str, Callable[[], object]], rows: dict[str, int], rounds: int
) -> dict[str, dict[str, float]]:
    """Pictures per second of every variant (best round), and the median ratio of its time a picture to the first's."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, function in variants.items():
            times[name].append(seconds(function) / rows[name])
    base = times[next(iter(variants))]
    return {
        name: {
            "pictures_per_second": 1 / min(spent),
            "time_over_first": statistics.median(a / b for a, b in zip(spent, base, strict=True)),
        }
        for name, spent in times.items()
    }


def benchmark_map(source: Dataset, name: str, rounds: int) -> dict[str, Any]:
    image, label = columns.image_column(source.features), columns.label_column(source.features)
    plain = source.cast_column(image, Image(decode=False))
    pictures = decode_many(plain[image])
    shapes = [picture.pixels.shape for picture in pictures]
    common = max(set(shapes), key=shapes.count)
    kept = [i for i, shape in enumerate(shapes) if shape == common]
    plain, source = plain.select(kept), source.select(kept)
    size, count = min(common[1:]), len(kept)
    poison = CudaPoison(seed=SEED, image_column=image, label_column=label)
    identity = Identity(image_column=image, label_column=label)
    classes = int(max(source[label])) + 1
    loop = Loop(image, label, classes, size)
    few = max(8, count // 8)
    result: dict[str, Any] = {"data": name, "height_width": list(common[1:]), "rows": count}
    batched = {"batched": True, "batch_size": 500}
    result["map, one process"] = compare(
        {
            "identity map": lambda: mapped(plain, identity, **batched),
            "CUDA map": lambda: mapped(plain, poison, **batched),
            "PIL map, default PNG": lambda: mapped(source.select(range(few)), pil_copy, **batched),
            "plain loop map": lambda: mapped(source.select(range(few)), loop),
        },
        {"identity map": count, "CUDA map": count, "PIL map, default PNG": few, "plain loop map": few},
        rounds,
    )
    result["map, two processes"] = compare(
        {
            "identity map": lambda: mapped(plain, identity, num_proc=2, **batched),
            "CUDA map": lambda: mapped(plain, poison, num_proc=2, **batched),
        },
        {"identity map": count, "CUDA map": count},
        rounds,
    )
    sizes = (1, 32, 500, 2000)
    result["CUDA map by batch size"] = compare(
        {f"{b}": (lambda b=b: mapped(plain.select(range(few)), poison, batched=True, batch_size=b)) for b in sizes},
        {f"{b}": few for b in sizes},
        rounds,
    )
    levels = (0, 1, 3, 6)
    chosen = plain.select(range(few))
    result["CUDA map by container"] = compare(
        {
            **{
                f"png {n}": (lambda n=n: mapped(chosen, CudaPoison(seed=SEED, compress_level=n), **batched))
                for n in levels
            },
            "webp 1": lambda: mapped(chosen, CudaPoison(seed=SEED, image_format="webp"), **batched),
        },
        {**{f"png {n}": few for n in levels}, "webp 1": few},
        rounds,
    )
    for container in result["CUDA map by container"]:
        kind, level = container.split()
        image_format = "webp" if kind == "webp" else "png"
        made = CudaPoison(seed=SEED, image_format=image_format, compress_level=int(level))(chosen[:few])
        stored = [len(value["bytes"]) for value in made[image]]
        result["CUDA map by container"][container]["bytes_over_raw"] = statistics.mean(stored) / (
            3 * common[1] * common[2]
        )
    pixels = torch.stack([pictures[i].pixels for i in kept[:2000]])
    labels = torch.tensor(source[label])[:2000]
    x = pixels.float() / 255
    result["arithmetic alone"] = compare(
        {
            "CUDA batch": lambda: poison.perturb(x, labels, Draws(SEED, "cuda", pixels)),
            "one convolution a picture": lambda: [
                loop.tensor(a, b) for a, b in zip(x[:few], labels[:few].tolist(), strict=True)
            ],
        },
        {"CUDA batch": len(x), "one convolution a picture": few},
        rounds,
    )
    result["peak memory, MiB, by rows"] = {str(n): peak_memory(plain, poison, n) for n in (1000, 4000)}
    return result


def peak_memory(plain: Dataset, poison: CudaPoison, rows: int) -> float:
    """Of a process of its own that maps `rows` rows (the source repeated)."""
    source = datasets.concatenate_datasets([plain] * -(-rows // len(plain))).select(range(rows))
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            mapped(source, poison, batched=True, batch_size=500)
            os.write(writer, str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        found = pipe.read()
    os.waitpid(child, 0)
    return float(found) / 1024 if found else float("nan")


SURROGATES: dict[str, hu.SurrogatePoison] = {
    "robust-em": hu.RobustEmPoison(),
    "sem": hu.SemPoison(),
    "min-max-min": hu.MinMaxMinPoison(),
    "em": hu.EmPoison(max_rounds=1),
    "pil": hu.PilPoison(),
}


def benchmark_surrogate(source: Dataset, name: str, rounds: int, quick: bool) -> dict[str, Any]:
    accelerator = Accelerator(mixed_precision="bf16" if torch.cuda.is_available() else "no")
    device = str(accelerator.device)
    backbone = "resnet18" if device.startswith("cuda") else "tiny"
    train = Batches.load(source, progress=False, device=device)
    batch = min(16 if quick else 128, len(train))
    poisons = {
        title: dataclasses.replace(poison, pgd_steps=2, eot=1, adversarial_steps=1)
        if quick and isinstance(poison, hu.RobustEmPoison)
        else poison
        for title, poison in SURROGATES.items()
    }
    recipe = Recipe(name="benchmark", steps=1000, batch_size=batch, schedule="constant", augmentation="none")
    setup = Setup(train=train, recipe=recipe, backbone=backbone, seed=SEED, accelerator=accelerator)
    network = setup.network()
    optimizer = setup.sgd(network)
    x, y = as_input(train.pixels[:batch]), train.labels[:batch]

    def plain() -> None:
        optimizer.zero_grad()
        with accelerator.autocast():
            loss = F.cross_entropy(network(x).float(), y)
        loss.backward()
        optimizer.step()
        wait(device)

    def steps_of(poison: hu.SurrogatePoison, numbers: Iterator[int]) -> Callable[[], None]:
        linear = isinstance(poison, hu.PilPoison)
        fit = poison.fitting(dataclasses.replace(setup, backbone=poison.backbone if linear else backbone))

        def one() -> None:
            fit.step(next(numbers))
            wait(device)

        return one

    steps: dict[str, Callable[[], object]] = {"plain training": plain}
    ideal: dict[str, float | None] = {"plain training": 1.0}
    for title, poison in poisons.items():
        if isinstance(poison, hu.EmPoison):
            first = poison.train_steps_per_round
            steps["em, network"] = steps_of(poison, itertools.cycle(range(first)))
            steps["em, noise"] = steps_of(poison, itertools.cycle(range(first, first + len(train) // batch)))
            ideal |= {"em, network": 1.0, "em, noise": float(poison.pgd_steps or 0)}
        else:
            steps[title] = steps_of(poison, itertools.count())
            linear = isinstance(poison, hu.PilPoison)
            ideal[title] = None if linear else poison.fitting(setup).passes
    with own_randomness(accelerator.device):
        for function in steps.values():
            function()
        one_step = compare(steps, dict.fromkeys(steps, 1), rounds)

    plain_source = source.cast_column(columns.image_column(source.features), Image(decode=False))
    maps: dict[str, Callable[[], object]] = {"plain training": plain}
    passes: dict[str, float | None] = {"plain training": 1.0}
    for title, poison in poisons.items():
        linear = isinstance(poison, hu.PilPoison)
        known = poison.fit(
            train,
            recipe=dataclasses.replace(recipe, steps=1),
            backbone=poison.backbone if linear else backbone,
            accelerator=accelerator,
            progress=False,
        )
        made = dataclasses.replace(type(poison).from_surrogate(known), device=device)
        maps[title] = partial(mapped, plain_source, made, batched=True, batch_size=500)
        passes[title] = None
        if isinstance(poison, hu.RobustEmPoison):
            noise = poison.noise_pgd(train.image_size)
            inner = 0 if noise.inner is None else noise.inner.steps
            passes[title] = noise.steps * noise.eot * (1 + inner) * len(source) / batch
    over_map = compare(maps, dict.fromkeys(maps, 1), 1 if quick else max(1, rounds // 3))
    titles = (("one step", one_step, ideal), (f"map of {len(source)} pictures", over_map, passes))
    return {
        "data": name,
        "network": f"{backbone} on {hardware(accelerator)['device']}",
        "batch": batch,
        **{
            title: {variant: beside(values["time_over_first"], wanted[variant]) for variant, values in found.items()}
            for title, found, wanted in titles
        },
    }


def beside(ratio: float, ideal: float | None) -> dict[str, float]:
    return {"plain_steps": ratio} | ({} if ideal is None else {"ideal": ideal, "over_ideal": ratio / ideal})


def wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def show(value: Any, indent: int = 0) -> None:
    for name, inner in value.items():
        if isinstance(inner, dict) and any(isinstance(v, dict) for v in inner.values()):
            print(f"{' ' * indent}{name}")
            show(inner, indent + 2)
        elif isinstance(inner, dict):
            print(f"{' ' * indent}{name:28}" + "".join(f"  {k} {v:.4g}" for k, v in inner.items()))
        else:
            print(f"{' ' * indent}{name:28}  {inner}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["map", "surrogate"])
    parser.add_argument("--dataset", action="append", help="pictures to use instead of drawn ones; may be repeated")
    parser.add_argument("--rows", type=int, help="default: 4000 (surrogate: 1000) below 96 pixels, 160 above")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a tenth of the rows, one round: to see that it runs")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args(argv)
    datasets.disable_progress_bars()
    share = 10 if arguments.quick else 1
    rounds = 1 if arguments.quick else arguments.rounds
    usual = 4000 if arguments.what == "map" else 1000
    inputs: list[tuple[str, Dataset]] = []
    try:
        for name in arguments.dataset or []:
            source = sources.load_split(name)
            small = min(source[0][columns.image_column(source.features)].size) < 96
            rows = arguments.rows or (usual if small else 160) // share
            inputs.append((Path(name).name, source.select(range(min(rows, len(source))))))
        if not inputs:
            for size, rows in ((32, usual), (224, 160))[: 1 if arguments.what == "surrogate" else 2]:
                inputs.append((f"drawn, {size} px", drawn((arguments.rows or rows) // share, size)))
    except (ValueError, OSError) as error:
        sys.exit(f"benchmark.py: {error}")
    report = {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "torch threads": torch.get_num_threads()}
    report["rounds"] = rounds
    if arguments.what == "map":
        results = [benchmark_map(source, name, rounds) for name, source in inputs]
    else:
        results = [benchmark_surrogate(source, name, rounds, arguments.quick) for name, source in inputs]
    show(report)
    for result in results:
        print()
        show(result)
    if arguments.output:
        text = json.dumps({**report, "versions": versions(), "results": results}, indent=2)
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
