"""Reproduce what the papers claim: protect, attack, and write one small record for each claim.

    python scripts/reproduce.py cuda-table-2 --dataset ../shared/data/cifar10 --output runs/reproduce
    python scripts/reproduce.py all --dataset cifar10 --scale paper --output runs/full --max-minutes 10
    python scripts/reproduce.py --list

Scale "small" is for two CPU cores: 10,000 rows, the tiny network, five epochs, small surrogates (`SURROGATES` of
compare.py). Scale "paper" takes all rows, ResNet-18, the papers' recipes and surrogates: it needs a GPU.

The work is done by `scripts/compare.py` under OUTPUT/SCALE, which claims share; stopped at any moment, or out of
`--max-minutes` (status 75), the same command goes on. Records go to --records, with a page of them all.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from hf_unlearnable.environment import versions
from hf_unlearnable.evaluation.attackers import SuiteName, suite
from hf_unlearnable.evaluation.claims import CLAIMS, Claim, measured, page, save
from hf_unlearnable.evaluation.jobs import Outcome
from hf_unlearnable.evaluation.protocol import protected_arms

SCALES = {
    "small": {"backbone": "tiny", "recipe": "tiny", "rows": 10_000, "budget": "small", "seeds": (0, 1, 2)},
    "paper": {"backbone": "resnet18", "recipe": "cuda100", "rows": 1_000_000, "budget": "paper", "seeds": (0,)},
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("claims", nargs="*", help=f"all, or some of {', '.join(CLAIMS)}")
    parser.add_argument("--list", action="store_true", help="what the claims say")
    parser.add_argument("--dataset", help="CIFAR-10: Hub id or folder; or demo, to see that it runs")
    parser.add_argument("--scale", choices=SCALES, default="small")
    parser.add_argument("--rows", type=int, help="training rows; default: the scale's")
    parser.add_argument("--seeds", nargs="+", type=int, help="of the poisons; default: the scale's")
    parser.add_argument("--training-seeds", nargs="+", type=int, default=[0], help="default: 0")
    parser.add_argument("--output", type=Path, help="folder for everything that is made on the way")
    parser.add_argument("--records", type=Path, default=Path("cards/results/claims"), help="folder of the records")
    parser.add_argument("--max-minutes", type=float, help="stop after this time; the same command goes on")
    parser.add_argument("--workers", type=int, default=1, help="processes that train victims (default: 1)")
    arguments = parser.parse_args(argv)
    if arguments.list:
        for claim in CLAIMS.values():
            print(f"{claim.name}: {claim.says} ({claim.source})")
        return 0
    if not arguments.claims or arguments.dataset is None or arguments.output is None:
        parser.error("expected a claim, --dataset and --output (or --list)")
    names = list(CLAIMS) if arguments.claims == ["all"] else arguments.claims
    if unknown := [name for name in names if name not in CLAIMS]:
        parser.error(f"there is no claim {unknown[0]!r}; they are {', '.join(CLAIMS)}")
    try:
        return run(arguments, [CLAIMS[name] for name in names], sys.argv[1:] if argv is None else argv)
    except (ValueError, OSError) as error:
        print(f"reproduce.py: {error}", file=sys.stderr)
        return 1


def run(arguments: argparse.Namespace, claims: Sequence[Claim], given: Sequence[str]) -> int:
    until = None if arguments.max_minutes is None else time.monotonic() + 60 * arguments.max_minutes
    worst = 0
    for claim in claims:
        left = None if until is None else (until - time.monotonic()) / 60
        if left is not None and left <= 0:
            print("out of time; the same command goes on")
            worst = 75
            break
        status = reproduce(claim, arguments, left)
        if status not in (0, 75):
            return status
        worst = worst or status
        note(claim, arguments, given)
    records = [json.loads(path.read_text()) for path in sorted(arguments.records.glob("*.json"))]
    if records:
        (arguments.records / "README.md").write_text(page(records))
        print(f"see {arguments.records / 'README.md'}")
    return worst


def reproduce(claim: Claim, arguments: argparse.Namespace, minutes: float | None) -> int:
    """Let compare.py do what is missing of a claim."""
    scale, place = SCALES[arguments.scale], arguments.output / arguments.scale
    command = [sys.executable, str(Path(__file__).with_name("compare.py")), "--dataset", arguments.dataset]
    command += ["--rows", str(arguments.rows or scale["rows"]), "--budget", str(scale["budget"])]
    command += ["--poisons", *claim.poisons, "--backbone", str(scale["backbone"]), "--output", str(place)]
    command += ["--seeds", *map(str, arguments.seeds or scale["seeds"])]
    if minutes is not None:
        command += ["--max-minutes", f"{minutes:.2f}"]
    command += ["--", "--suite", suite_of(claim, arguments.scale)]
    command += ["--backbone", str(scale["backbone"]), "--recipe", str(scale["recipe"]), "--fractions"]
    command += ["--attackers", *claim.attackers, "--seeds", *map(str, arguments.training_seeds)]
    command += ["--workers", str(arguments.workers), "--no-note", "--no-progress"]
    return subprocess.call(command)


def folders(claim: Claim, arguments: argparse.Namespace) -> list[str]:
    """The protected datasets of a claim that are there, as evaluate.py names them."""
    place, seeds = arguments.output / arguments.scale / "protected", arguments.seeds or SCALES[arguments.scale]["seeds"]
    wanted = [(name, place / f"{name}-{seed}") for name in claim.poisons for seed in seeds]
    return [f"{name}={folder}" for name, folder in wanted if folder.exists()]


def suite_of(claim: Claim, scale: str) -> SuiteName:
    """The quick suite (its adversarial training takes three steps) where it has all attackers, at the small scale."""
    quick = {one.name for one in suite("quick").attackers}
    return "quick" if scale == "small" and quick.issuperset(claim.attackers) else "full"


def note(claim: Claim, arguments: argparse.Namespace, given: Sequence[str]) -> None:
    """Write a claim's record from the trainings that there are."""
    folder = arguments.output / arguments.scale / "evaluation"
    outcomes = [Outcome.load(path) for path in sorted((folder / "jobs").glob("*/*.json"))]
    attackers = [one for one in suite(suite_of(claim, arguments.scale)).attackers if one.name in claim.attackers]
    wanted = json.loads(json.dumps([{"name": one.name, **one.described()} for one in attackers]))
    outcomes = [one for one in outcomes if one.job["attacker"] in wanted and one.job["steps"] is None]
    own = {arm.digest for arm in protected_arms(folders(claim, arguments))}
    outcomes = [one for one in outcomes if one.job["arm"]["kind"] == "clean" or one.job["arm"]["digest"] in own]
    done = [one.result for one in outcomes if one.result is not None]
    if not done:
        return
    words = [Path(word).name if word.startswith(("/", "..", "~")) else word for word in given]
    setting = {
        "scale": arguments.scale,
        "command": shlex.join(["python", "scripts/reproduce.py", *words]),
        "dataset": Path(arguments.dataset).name,
        "train_rows": max(result.train_rows for result in done),
        "test_rows": done[0].test_rows,
        "backbone": SCALES[arguments.scale]["backbone"],
        "recipe": SCALES[arguments.scale]["recipe"],
        "hardware": sorted({f"{r.hardware['device']}, {r.hardware['threads']} thread(s)" for r in done}),
        "versions": versions("timm", "accelerate"),
    }
    path = save(measured(claim, outcomes, setting), arguments.records)
    print(f"{path}: written")


if __name__ == "__main__":
    sys.exit(main())
