"""How sure is a proof of ownership without the clean pictures? Right keys under damage, and wrong keys.

    python scripts/ownership.py --dataset cifar10 --poison cuda --output cards/results/ownership-cuda-cifar10.json
    python scripts/ownership.py --dataset cifar10 --poison lsp --damage none jpeg-75 resize-24 --output ownership.json

For each of --keys keys the pictures are poisoned and damaged, and the p-value of that key is taken. Then --wrong-keys
other keys are tried on the undamaged pictures of the first: none may have p <= 1e-6, and their p-values must look
uniform (a Kolmogorov-Smirnov distance), or larger where decoys are few, as AR's are. The keys are secrets derived from
--seed, so that the figures can be had again.

damages  none, jpeg-QUALITY, resize-SIZE (bicubic, to SIZE x SIZE; the test is told the size before)

Exit status: 0 finished, 1 error, 2 wrong command line, 130 interrupted.
"""

import argparse
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from datasets import Dataset, Image
from tqdm.auto import tqdm

from hf_unlearnable import columns, sources
from hf_unlearnable.defenses.squeeze import Jpeg
from hf_unlearnable.environment import versions
from hf_unlearnable.images import Picture, decode, decode_many, to_pil
from hf_unlearnable.keys import subkey
from hf_unlearnable.ownership.proof import Proof, prove, read
from hf_unlearnable.poisons.ar import ArPoison
from hf_unlearnable.poisons.base import Poison
from hf_unlearnable.poisons.cuda import CudaPoison
from hf_unlearnable.poisons.lsp import LspPoison
from hf_unlearnable.transform import Transform

POISONS: dict[str, type[Poison]] = {"ar": ArPoison, "cuda": CudaPoison, "lsp": LspPoison}
ALPHA = 1e-6
BATCH = 500

Pictures = list[tuple[list[Picture], list[int]]]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    try:
        run(arguments, list(sys.argv[1:] if argv is None else argv))
    except (ValueError, TypeError, OSError, ArithmeticError) as error:
        print(f"ownership.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted")
        return 130
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    source = "Hub id, folder of pictures, parquet, save_to_disk, or demo"
    parser.add_argument("--dataset", required=True, help=f"clean pictures: {source}")
    parser.add_argument("--split", help="default: the only one, or train")
    parser.add_argument("--poison", required=True, choices=sorted(POISONS))
    parser.add_argument("--pictures-per-class", nargs="+", type=int, default=[100], help="default: 100")
    parser.add_argument("--keys", type=int, default=20, help="right keys (default: 20)")
    parser.add_argument("--wrong-keys", type=int, default=1000, help="default: 1000")
    parser.add_argument("--damage", nargs="+", default=["none"], help="default: none")
    parser.add_argument("--decoys", type=int, default=1_000_000, help="for a right key (default: 1000000)")
    parser.add_argument("--wrong-decoys", type=int, default=10_000, help="for a wrong key (default: 10000)")
    parser.add_argument("--seed", type=int, default=0, help="of all keys, and of the rows (default: 0)")
    parser.add_argument("--output", required=True, type=Path, help="a .json")
    parser.add_argument("--progress", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace, command: Sequence[str]) -> None:
    if arguments.output.suffix != ".json" or not arguments.output.parent.is_dir():
        raise ValueError(f"--output: expected the name of a .json in a folder that is there, got {arguments.output}")
    for name in ("keys", "wrong_keys"):
        if (value := getattr(arguments, name)) < 1:
            raise ValueError(f"--{name.replace('_', '-')}: expected at least 1, got {value}")
    for damage in arguments.damage:
        damaged([decode(np.zeros((16, 16, 3), np.uint8))], damage)
    started, dataset = time.perf_counter(), sources.load_split(arguments.dataset, arguments.split)
    right, wrong = [], None
    for count in arguments.pictures_per_class:
        clean = pictures_of(dataset, count, arguments.seed)
        for number in tqdm(range(arguments.keys), desc=f"{count} a class", unit="key", disable=not arguments.progress):
            poison = POISONS[arguments.poison](seed=subkey(arguments.seed, "ownership experiment", "right", number))
            poisoned = [(changed(poison, batch, labels), labels) for batch, labels in clean]
            if number == 0 and wrong is None:
                wrong = {"pictures_per_class": count, **wrong_keys(poisoned, arguments)}
            for damage in arguments.damage:
                proof = prove(
                    [(damaged(batch, damage), labels) for batch, labels in poisoned],
                    poison,
                    decoys=arguments.decoys,
                    decoy_key=arguments.seed,
                    original_size=original_size(poisoned) if damage.startswith("resize") else None,
                    progress=False,
                )
                right.append({"pictures_per_class": count, "damage": damage, "key": number, **told(proof)})
    figures = {
        "command": f"python scripts/ownership.py {shlex.join(command)}",
        "dataset": {"source": Path(arguments.dataset).name, "split": arguments.split, "rows": len(dataset)},
        "poison": {"name": arguments.poison, "settings": POISONS[arguments.poison](seed=0).settings()},
        "seed": arguments.seed,
        "alpha": ALPHA,
        "summary": summaries(right),
        "wrong_keys": wrong,
        "right_keys": right,
        "seconds": round(time.perf_counter() - started, 1),
        "versions": versions(),
    }
    partial = arguments.output.with_name(f".{arguments.output.name}.partial")
    partial.write_text(json.dumps(figures, indent=1, allow_nan=False) + "\n")
    os.replace(partial, arguments.output)
    for line in figures["summary"]:
        print(
            f"{line['pictures_per_class']} a class, {line['damage']}: {line['detected']} of {line['keys']} right keys "
            f"have p <= {ALPHA:g}; median p {line['median_p']:.1e}, worst {line['worst_p']:.1e}"
        )
    if wrong is not None:
        told_of = f"{wrong['at_most_alpha']} of {wrong['keys']} have p <= {ALPHA:g}, least p {wrong['least_p']:.1e}"
        print(
            f"wrong keys: {told_of}; distance from uniform {wrong['distance']:.3f} "
            f"(critical at 5 %: {wrong['critical_distance']:.3f})"
        )
    print(f"see {arguments.output}")


def pictures_of(dataset: Dataset, count: int, seed: int) -> Pictures:
    """`count` pictures of each class, in batches."""
    image = columns.image_column(dataset.features, None)
    label = columns.label_column(dataset.features, None)
    labels = np.asarray(dataset[label])
    order = np.random.default_rng(seed).permutation(len(labels))
    rows = np.concatenate([order[labels[order] == name][:count] for name in np.unique(labels)])
    some = dataset.select(rows).cast_column(image, Image(decode=False))
    batches = [some[start : start + BATCH] for start in range(0, len(some), BATCH)]
    return [(decode_many(batch[image]), list(batch[label])) for batch in batches]


def damaged(pictures: list[Picture], damage: str) -> list[Picture]:
    """The pictures as another would hold them."""
    kind, _, number = damage.partition("-")
    if damage == "none":
        return pictures
    if kind not in ("jpeg", "resize") or not number.isdigit() or int(number) < 1:
        raise ValueError(f"--damage: expected none, jpeg-QUALITY or resize-SIZE, got {damage!r}")
    if kind == "jpeg":
        return changed(Jpeg(quality=int(number)), pictures, None)
    size = int(number), int(number)
    return [decode(to_pil(picture).resize(size, PIL.Image.Resampling.BICUBIC)) for picture in pictures]


def changed(transform: Transform, pictures: list[Picture], labels: list[int] | None) -> list[Picture]:
    where = [f"row {row} of a batch" for row in range(len(pictures))]
    return transform.change_pictures(pictures, labels, np.ones(len(pictures), dtype=bool), where)


def original_size(pictures: Pictures) -> tuple[int, int]:
    _, height, width = pictures[0][0][0].pixels.shape
    return height, width


def told(proof: Proof) -> dict[str, Any]:
    return {name: value for name, value in asdict(proof).items() if name not in ("method", "notes")}


def wrong_keys(pictures: Pictures, arguments: argparse.Namespace) -> dict[str, Any]:
    """p-values of keys that have nothing to do with the pictures, beside uniform numbers."""
    p_values, kind = [], POISONS[arguments.poison]
    reading = read(pictures, kind(seed=0), progress=False)
    for number in tqdm(range(arguments.wrong_keys), desc="wrong keys", unit="key", disable=not arguments.progress):
        poison = kind(seed=subkey(arguments.seed, "ownership experiment", "wrong", number))
        decoy_key = subkey(arguments.seed, "ownership experiment", "decoys", number)
        proof = reading.judge(poison, decoys=arguments.wrong_decoys, decoy_key=decoy_key, progress=False)
        p_values.append(proof.p_value)
    ordered, count = np.sort(p_values), len(p_values)
    steps = np.arange(count)
    distance = float(max((ordered - steps / count).max(), ((steps + 1) / count - ordered).max()))
    return {
        "keys": count,
        "decoys": arguments.wrong_decoys,
        "at_most_alpha": int((ordered <= ALPHA).sum()),
        "least_p": float(ordered[0]),
        "at_most": {str(alpha): float((ordered <= alpha).mean()) for alpha in (0.001, 0.01, 0.05, 0.1, 0.5, 0.9)},
        "distance": distance,
        "critical_distance": 1.358 / math.sqrt(count),
    }


def summaries(right: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return list(_summaries(right))


def _summaries(right: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for count, damage in dict.fromkeys((one["pictures_per_class"], one["damage"]) for one in right):
        own = [one["p_value"] for one in right if (one["pictures_per_class"], one["damage"]) == (count, damage)]
        yield {
            "pictures_per_class": count,
            "damage": damage,
            "keys": len(own),
            "detected": sum(p <= ALPHA for p in own),
            "median_p": float(np.median(own)),
            "worst_p": max(own),
        }


if __name__ == "__main__":
    sys.exit(main())
