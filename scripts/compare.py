"""Train victims on clean and on poisoned rows, over several seeds, and print one table.

    python scripts/compare.py --dataset ../shared/data/cifar10 --rows 10000 --seeds 0 1 2 --output runs/compare
    python scripts/compare.py --dataset demo --poisons clean cuda --rows 2000 --output runs/compare-demo

Every training is plain (ERM); its seed is also the poison's key. Poisons that need a surrogate get one of the same
seed, trained on the same rows with the small budgets below (`SURROGATES`): they are for two CPU cores, not the papers'.
It is kept in the output. Besides the poisons by name there are `clean` and
`cuda-universal` (one filter for all classes: should hurt little); for `cuda` there are two more test sets: the test
pictures under their class's filter (should be near 100 %) and under the next class's (should be near 0). These are the
checks of the CUDA paper, section 5.2. Each training leaves one JSON file in the output; the same command goes on after
an interruption.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset

import hf_unlearnable as hu
from hf_unlearnable import columns, sources
from hf_unlearnable.batches import Batches, stratified_rows
from hf_unlearnable.defenses.erm import Erm
from hf_unlearnable.networks import Network, create_network
from hf_unlearnable.recipes import RECIPES, changed, recipe
from hf_unlearnable.victim import evaluate, train

ROBUST: dict[str, Any] = {
    "pgd_steps": 5,
    "pgd_step_size": 3.2 / 255,
    "eot": 1,
    "adversarial_steps": 3,
    "adversarial_step_size": 2 / 255,
}
FEW: dict[str, Any] = {"pgd_steps": 10, "pgd_step_size": 2 / 255}
SURROGATES: dict[str, tuple[hu.SurrogatePoison, dict[str, Any]]] = {
    "em": (
        hu.EmPoison(pgd_steps=5, pgd_step_size=1.6 / 255, train_steps_per_round=20, stop_error=0.02, max_rounds=20),
        {"batch_size": 128},
    ),
    "em-classwise": (hu.EmPoison(mode="classwise"), {"batch_size": 128}),
    "robust-em": (hu.RobustEmPoison(**ROBUST), {"steps": 75}),
    "sem": (hu.SemPoison(**ROBUST), {"steps": 150}),
    "min-max-min": (hu.MinMaxMinPoison(**ROBUST), {"steps": 150}),
    "min-max-min-without-dar": (hu.MinMaxMinPoison(**ROBUST, dar="none"), {"steps": 150}),
    "tap": (hu.TapPoison(**FEW), {"epochs": 10, "batch_size": 64, "schedule": "onecycle"}),
    "hypo": (hu.HypoPoison(pgd_steps=15), {"epochs": 10, "batch_size": 64, "schedule": "onecycle", "nesterov": True}),
    "entf": (
        hu.EntfPoison(**FEW, adversarial_steps=3),
        {"epochs": 3, "batch_size": 64, "schedule": "onecycle", "nesterov": True},
    ),
    "ntga": (hu.NtgaPoison(), {}),
    "clusters": (
        hu.ClustersPoison(pretrained=False, feature_size=0, generator_width=16),
        {"epochs": 5, "batch_size": 128, "learning_rate": 0.001},
    ),
    "deep-confuse": (
        hu.DeepConfusePoison(outer_epochs=4, generator_width=8, generator_learning_rate=0.001),
        {"epochs": 1, "batch_size": 64, "learning_rate": 0.1},
    ),
    "pil": (hu.PilPoison(), {"epochs": 147}),
}
WITHOUT = ("clean", "random-noise", "cuda", "lsp", "ar", "ops", "cuda-universal")
POISONS = (*WITHOUT, *SURROGATES)
CHECKS = {"own": "classwise", "next class's": "permuted"}


def poison_of(name: str, dataset: Dataset, seed: int, classes: int, arguments: argparse.Namespace) -> hu.Poison | None:
    if name == "clean":
        return None
    if name in SURROGATES:
        poison, changes = SURROGATES[name]
        path = arguments.output / f"{name}-{seed}.safetensors"
        if not path.exists():
            own = poison.backbone in ("linear", "none")
            surrogate = poison.fit(
                Batches.load(dataset, progress=False),
                seed=seed,
                recipe=changed(poison.recipe, **changes),
                backbone=None if own else arguments.backbone,
                checkpoint=path.with_name(f"{name}-{seed}.checkpoint.safetensors"),
                source=Path(arguments.dataset).name,
            )
            surrogate.save(path)
            path.with_name(f"{name}-{seed}.checkpoint.safetensors").unlink(missing_ok=True)
        known = hu.Surrogate.load(path)
        if known.settings != json.loads(json.dumps(poison.own_settings())) or known.provenance["seed"] != seed:
            raise ValueError(f"{path} is of other settings than {name}, seed {seed}: delete it")
        return type(poison).from_surrogate(known, seed=seed)
    if name == "ops":
        return hu.OpsPoison.fit(dataset, seed=seed)
    if name == "cuda-universal":
        return hu.CudaPoison(seed=seed, mode="universal")
    kinds: dict[str, type[hu.Poison]] = {
        "random-noise": hu.RandomNoisePoison,
        "cuda": hu.CudaPoison,
        "lsp": hu.LspPoison,
        "ar": hu.ArPoison,
    }
    return kinds[name](seed=seed, num_classes=classes)


def one(
    name: str, seed: int, training: Dataset, test: Dataset, clean_test: Batches, arguments: argparse.Namespace
) -> dict[str, Any]:
    classes = len(clean_test.classes)
    poison = poison_of(name, training, seed, classes, arguments)
    rows = Batches.load(training if poison is None else poison.apply(training), progress=False)
    network = create_network(arguments.backbone, num_classes=classes, image_size=rows.image_size, seed=seed)
    accelerator = Accelerator(mixed_precision="bf16" if torch.cuda.is_available() else "no")
    chosen = recipe(arguments.recipe)
    result = train(
        network,
        rows,
        clean_test,
        recipe=chosen,
        defense=Erm(),
        accelerator=accelerator,
        seed=seed,
        validation_fraction=0.0,
        evaluate_every=chosen.epochs or 1,
    )
    last = result.curve[-1]
    found: dict[str, Any] = {
        "poison": name,
        "seed": seed,
        "settings": None if poison is None else poison.settings(),
        "surrogate": surrogate_facts(poison),
        "linf_levels": None if poison is None else furthest(training, rows),
        "test_accuracy": result.test_accuracy,
        "train_accuracy": last.train_accuracy,
        "rows": result.train_rows,
        "backbone": result.backbone,
        "recipe": arguments.recipe,
        "hardware": result.hardware,
        "versions": result.versions,
        "seconds": result.seconds,
    }
    if name == "cuda" and isinstance(poison, hu.CudaPoison):
        found["checks"] = {
            check: accuracy_on(replace(poison, mode=mode).apply(test), network, accelerator)
            for check, mode in CHECKS.items()
        }
    return found


def surrogate_facts(poison: hu.Poison | None) -> dict[str, Any] | None:
    if not isinstance(poison, hu.SurrogatePoison) or poison.surrogate is None:
        return None
    known = poison.surrogate.provenance
    return {name: known[name] for name in ("backbone", "recipe", "steps", "seconds", "state")}


def furthest(clean: Dataset, poisoned: Batches) -> int:
    """The largest change of any value, in grey levels."""
    before = Batches.load(clean, progress=False).pixels
    return int((poisoned.pixels.short() - before.short()).abs().max())


def accuracy_on(dataset: Dataset, network: Network, accelerator: Accelerator) -> float:
    test = Batches.load(dataset, device=accelerator.device, progress=False)
    confusion = evaluate(network, test, accelerator=accelerator)
    return float(confusion.diagonal().sum() / confusion.sum())


def table(results: Sequence[dict[str, Any]], chance: float) -> str:
    lines = ["| trained on | test accuracy (mean, sd) | seeds | training accuracy | L-inf |", "|---|---|---|---|---|"]
    for name in dict.fromkeys(result["poison"] for result in results):
        own = [result for result in results if result["poison"] == name]
        lines.append(
            f"| {name} | {spread([r['test_accuracy'] for r in own])} | {len(own)} | ",
        )
        levels = [str(r["linf_levels"]) for r in own if r.get("linf_levels") is not None]
        lines[-1] += f"{spread([r['train_accuracy'] for r in own])} | {max(levels, key=int) if levels else ''} |"
        for check in CHECKS:
            values = [r["checks"][check] for r in own if "checks" in r]
            if values:
                lines.append(f"| {name}, test pictures under {check} filter | {spread(values)} | {len(values)} | | |")
    lines.append(f"| chance | {100 * chance:.1f} | | | |")
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    mean = 100 * statistics.mean(values)
    return f"{mean:.1f} ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else f"{mean:.1f}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="Hub id, folder of pictures, parquet, save_to_disk, or demo")
    parser.add_argument("--train-split", default="train")
    parser.add_argument("--test-split", default="test")
    parser.add_argument("--rows", type=int, default=10_000, help="training rows, class by class (default: 10000)")
    parser.add_argument(
        "--poisons", nargs="+", default=WITHOUT, choices=POISONS, help="default: those without a surrogate"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--backbone", default="tiny")
    parser.add_argument("--recipe", default="tiny", choices=RECIPES)
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    arguments = parser.parse_args(argv)
    try:
        run(arguments)
    except (ValueError, OSError) as error:
        sys.exit(f"compare.py: {error}")


def run(arguments: argparse.Namespace) -> None:
    training = sources.load_split(arguments.dataset, arguments.train_split)
    test = sources.load_split(arguments.dataset, arguments.test_split)
    label = columns.label_column(training.features)
    columns.check_labels(training.with_format("arrow")[label], columns.class_names(training.features, label), label)
    kept = stratified_rows(torch.tensor(training[label]), min(arguments.rows, len(training)), key=0)
    training = training.select(kept.tolist())
    clean_test = Batches.load(test, progress=False)
    what = {
        name: str(getattr(arguments, name))
        for name in ("dataset", "train_split", "test_split", "rows", "backbone", "recipe")
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    options = arguments.output / "options.json"
    if options.exists() and json.loads(options.read_text()) != what:
        raise ValueError(f"{arguments.output} holds results of other options: {options.read_text().strip()}")
    options.write_text(json.dumps(what) + "\n")
    results = []
    for name in arguments.poisons:
        for seed in arguments.seeds:
            path = arguments.output / f"{name}-{seed}.json"
            if not path.exists():
                found = one(name, seed, training, test, clean_test, arguments)
                partial = path.with_suffix(".partial")
                partial.write_text(json.dumps(found, indent=1) + "\n")
                partial.replace(path)
            results.append(json.loads(path.read_text()))
            print(f"{name}, seed {seed}: test accuracy {100 * results[-1]['test_accuracy']:.1f}", flush=True)
    counts = torch.bincount(clean_test.labels)
    text = table(results, float(counts.max() / counts.sum()))
    (arguments.output / "table.md").write_text(text + "\n")
    print(f"\n{Path(arguments.dataset).name}, {len(training)} rows, {arguments.backbone}, recipe {arguments.recipe}")
    print("\n" + text)


if __name__ == "__main__":
    main()
