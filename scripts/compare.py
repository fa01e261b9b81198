"""Compare poisons: protect the same rows with each of them, under several keys, and let every attacker at the result.

    python scripts/compare.py --dataset ../shared/data/cifar10 --rows 10000 --seeds 0 1 --output runs/compare
    python scripts/compare.py --dataset demo --poisons cuda lsp --rows 2000 --output runs/few -- --attackers erm jpeg-10

For every poison and seed (which is its key) the output gets surrogates/NAME-SEED.safetensors, where it needs one, and
the folder protected/NAME-SEED; then `scripts/evaluate.py` is run over all into evaluation/. What follows `--` are
its options (`--suite`, `--attackers erm` for plain training alone, `--seeds` of the trainings, `--workers 2`,
`--max-minutes`). The same command goes on after an interruption; poisons and seeds may be added later.

Surrogates are trained on the same rows with the small budgets below (`SURROGATES`): they are for two CPU cores, not the
papers'; `--budget paper` takes the papers' settings and recipes instead (on a GPU). Besides the poisons by name there
is `cuda-universal` (one filter for all classes: should hurt little).

`--checks` trains a plain victim on each `cuda` dataset and tests it on the test pictures under their class's filter
(should be near 100 %) and under the next class's (near 0): the CUDA paper, section 5.2.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
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
from hf_unlearnable.digests import split_digest
from hf_unlearnable.images import digest
from hf_unlearnable.networks import create_network
from hf_unlearnable.protect import protect
from hf_unlearnable.recipes import changed, recipe
from hf_unlearnable.record import Record
from hf_unlearnable.training import Unfinished
from hf_unlearnable.victim import evaluate, train_to_end

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
PAPER: dict[str, hu.SurrogatePoison] = {
    "em-classwise": hu.EmPoison(mode="classwise"),
    "min-max-min-without-dar": hu.MinMaxMinPoison(dar="none"),
}
WITHOUT: dict[str, type[hu.Poison]] = {
    "cuda": hu.CudaPoison,
    "lsp": hu.LspPoison,
    "ar": hu.ArPoison,
    "ops": hu.OpsPoison,
    "cuda-universal": hu.CudaPoison,
}
POISONS = (*WITHOUT, *SURROGATES)
CHECKS = {"own class's": "classwise", "next class's": "permuted"}


def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    at = given.index("--") if "--" in given else len(given)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--dataset", required=True, help="Hub id, folder of pictures, parquet, save_to_disk, or demo")
    parser.add_argument("--train-split", default="train")
    parser.add_argument("--test-split", default="test")
    parser.add_argument("--rows", type=int, default=10_000, help="training rows, class by class (default: 10000)")
    parser.add_argument("--poisons", nargs="+", default=list(POISONS), choices=POISONS, help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="of the poisons (default: 0 1)")
    parser.add_argument("--budget", choices=("small", "paper"), default="small", help="of the surrogates")
    parser.add_argument("--max-minutes", type=float, help="stop after this time; the same command goes on")
    parser.add_argument("--backbone", default="tiny", help="of the surrogates (default: tiny)")
    parser.add_argument("--checks", action="store_true", help="the CUDA paper's checks")
    parser.add_argument("--output", type=Path, required=True, help="folder for everything")
    arguments = parser.parse_args(given[:at])
    try:
        return run(arguments, given[at + 1 :])
    except (ValueError, TypeError, ArithmeticError, OSError) as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 1


def run(arguments: argparse.Namespace, options: list[str]) -> int:
    training = sources.load_split(arguments.dataset, arguments.train_split)
    label = columns.label_column(training.features)
    columns.check_labels(training.with_format("arrow")[label], columns.class_names(training.features, label), label)
    kept = stratified_rows(torch.tensor(training[label]), min(arguments.rows, len(training)), key=0)
    training = training.select(kept.tolist())
    until = None if arguments.max_minutes is None else time.monotonic() + 60 * arguments.max_minutes
    protected: dict[str, str] = {}
    wanted = split_digest(map(digest, Batches.load(training, progress=False).pixels))
    for seed in arguments.seeds:
        for name in arguments.poisons:
            folder = arguments.output / "protected" / f"{name}-{seed}"
            if not folder.exists():
                print(f"{name}, seed {seed}", flush=True)
                try:
                    poison = poison_of(name, training, seed, arguments, until)
                except Unfinished:
                    print("out of time; the same command goes on")
                    return 75
                source = arguments.dataset
                protect(training, poison, folder, source=source, split=arguments.train_split, record_seed=True)
            record = Record.load(folder / "record.json")
            if record.source["pixels_sha256"] != wanted:
                raise ValueError(f"{folder} was made of other rows: choose another --output, or delete it")
            given = f"{name}={folder}"
            if (same := protected.setdefault(record.published["pixels_sha256"], given)) != given:
                print(f"{name}, seed {seed}: the very pictures of {same.partition('=')[0]} under an earlier seed")
    if arguments.checks and "cuda" in arguments.poisons:
        print(checks(arguments))
    command = [sys.executable, str(Path(__file__).with_name("evaluate.py")), "--protected", *protected.values()]
    command += ["--clean", arguments.dataset, "--train-split", arguments.train_split]
    command += [
        "--rows",
        str(arguments.rows),
        "--test-split",
        arguments.test_split,
        "--output",
        str(arguments.output / "evaluation"),
    ]
    if until is not None:
        command += ["--max-minutes", f"{max(0.05, (until - time.monotonic()) / 60):.2f}"]
    return subprocess.call([*command, *options])


def poison_of(name: str, dataset: Dataset, seed: int, arguments: argparse.Namespace, until: float | None) -> hu.Poison:
    if name in SURROGATES:
        return trained(name, dataset, seed, arguments, until)
    if name == "ops":
        return hu.OpsPoison.fit(dataset, seed=seed)
    classes = len(columns.class_names(dataset.features, columns.label_column(dataset.features)) or ()) or None
    poison = WITHOUT[name](seed=seed, num_classes=classes)
    return replace(poison, mode="universal") if name == "cuda-universal" else poison  # type: ignore[call-arg]


def trained(name: str, dataset: Dataset, seed: int, arguments: argparse.Namespace, until: float | None) -> hu.Poison:
    poison, changes = SURROGATES[name]
    if arguments.budget == "paper":
        poison, changes = PAPER.get(name, type(poison)()), {}
    path = arguments.output / "surrogates" / f"{name}-{seed}.safetensors"
    checkpoint = path.with_name(f"{name}-{seed}.checkpoint.safetensors")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        surrogate = poison.fit(
            Batches.load(dataset, progress=False),
            seed=seed,
            recipe=changed(poison.recipe, **changes),
            backbone=None if poison.backbone in ("linear", "none") else arguments.backbone,
            checkpoint=checkpoint,
            max_minutes=None if until is None else max(0.05, (until - time.monotonic()) / 60),
            source=Path(arguments.dataset).name,
        )
        surrogate.save(path)
        checkpoint.unlink(missing_ok=True)
    known = hu.Surrogate.load(path)
    found = (known.settings, known.provenance["seed"], known.provenance["data"]["rows"])
    if found != (json.loads(json.dumps(poison.own_settings())), seed, len(dataset)):
        raise ValueError(f"{path} is of other settings or rows than {name}, seed {seed}: delete it")
    return type(poison).from_surrogate(known, seed=seed)


def checks(arguments: argparse.Namespace) -> str:
    """The accuracies of plain victims of CUDA on test pictures under filters, as a table."""
    test = sources.load_split(arguments.dataset, arguments.test_split)
    found: dict[str, list[float]] = {check: [] for check in CHECKS}
    for seed in arguments.seeds:
        path = arguments.output / f"checks-{seed}.json"
        if not path.exists():
            path.write_text(json.dumps(checked(arguments, test, seed)) + "\n")
        for check, value in json.loads(path.read_text()).items():
            found[check].append(value)
    lines = ["| CUDA, test pictures under their | test accuracy, % | seeds |", "|---|---|---|"]
    for check, values in found.items():
        spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
        lines.append(f"| {check} filter | {100 * statistics.mean(values):.1f}{spread} | {len(values)} |")
    text = "\n".join(lines) + "\n"
    (arguments.output / "checks.md").write_text(text)
    return text


def checked(arguments: argparse.Namespace, test: Dataset, seed: int) -> dict[str, float]:
    accelerator = Accelerator(mixed_precision="bf16" if torch.cuda.is_available() else "no")
    how: dict[str, Any] = {"device": accelerator.device, "progress": False}
    folder = arguments.output / "protected" / f"cuda-{seed}"
    rows, clean = Batches.load(sources.load_split(folder), **how), Batches.load(test, **how)
    chosen = recipe("tiny")
    network = create_network("tiny", num_classes=len(rows.classes), image_size=rows.image_size, seed=seed)
    train_to_end(network, rows, clean, recipe=chosen, defense=Erm(), accelerator=accelerator, seed=seed)
    result = {}
    for check, mode in CHECKS.items():
        poison = hu.CudaPoison(seed=seed, mode=mode)  # type: ignore[arg-type]
        confusion = evaluate(network, Batches.load(poison.apply(test), **how), accelerator=accelerator)
        result[check] = float(confusion.diagonal().sum() / confusion.sum())
    return result


if __name__ == "__main__":
    sys.exit(main())
