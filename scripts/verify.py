"""Verify a published dataset: is it whole, is it what its record says, whose is it?

    python scripts/verify.py me/cifar10-cuda
    python scripts/verify.py me/cifar10-cuda --key-file key
    python scripts/verify.py out/cuda --clean path/or/hub-id --key-file key
    python scripts/verify.py somebody/else --record out/cuda/record.json --key-file key

With --record, a record of your own, the pictures may be anybody's: the test is whether they carry your key.

Ends with status 0 if nothing failed, 1 if something did, or if a key was given and whose it is was not shown.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from datasets.exceptions import DatasetBuildError

from hf_unlearnable import sources
from hf_unlearnable.keys import read_key
from hf_unlearnable.publishing.hub import Repository
from hf_unlearnable.publishing.standing import read_record
from hf_unlearnable.publishing.verify import Outcome, judged, recognise, verify
from hf_unlearnable.record import Record


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("source", help="user/name on the Hub, or what protect.py made")
    parser.add_argument("--config-name", default="default")
    parser.add_argument("--revision", help="branch or commit; default: main")
    parser.add_argument("--clean", help="the clean source: Hub id, folder, parquet, or demo")
    parser.add_argument("--split", help="split of --clean; default: the one that was protected")
    key = parser.add_mutually_exclusive_group()
    key.add_argument("--key-file", type=Path, help="the secret key that is claimed")
    key.add_argument("--seed", type=int, help="the int seed that is claimed")
    parser.add_argument("--record", type=Path, help="your own record, for pictures that somebody else shows")
    parser.add_argument("--original-size", nargs=2, type=int, metavar=("HEIGHT", "WIDTH"), help="before a resizing")
    parser.add_argument("--surrogate", help="of a method that has one: its file or Hub id")
    parser.add_argument("--decoys", type=int, default=1_000_000, help="keys that the claimed one must beat")
    parser.add_argument(
        "--batch-size",
        type=int,
        default=500,
        help="pictures held at most at a time, fewer of large ones (default: 500)",
    )
    parser.add_argument("--no-progress", dest="progress", action="store_false")
    arguments = parser.parse_args(argv)
    try:
        return run(arguments)
    except (ValueError, OSError, TypeError, RuntimeError, DatasetBuildError) as error:
        print(f"verify.py: {error}", file=sys.stderr)
        return 2


def run(arguments: argparse.Namespace) -> int:
    key = arguments.seed if arguments.key_file is None else read_key(arguments.key_file)
    if arguments.record is not None:
        return whose(arguments, key)
    if arguments.original_size is not None:
        raise ValueError("--original-size is for resized pictures, which no longer have their record: give --record")
    source: Repository | Path = Path(arguments.source)
    if not source.exists():
        source = Repository(arguments.source, "dataset", arguments.revision)
    clean = None
    if arguments.clean:
        local = isinstance(source, Path)
        record = Record.load(source / "record.json") if local else read_record(source, arguments.config_name)
        known = record.source if record is not None and isinstance(record.source, dict) else {}
        split = arguments.split or known.get("split")
        clean = sources.load_split(arguments.clean, split)
    outcomes = verify(
        source,
        config=arguments.config_name,
        clean=clean,
        key=key,
        surrogate=arguments.surrogate,
        decoys=arguments.decoys,
        batch_size=arguments.batch_size,
        progress=arguments.progress,
    )
    return told(arguments.source, outcomes, claimed=key is not None or arguments.surrogate is not None)


def whose(arguments: argparse.Namespace, key: int | bytes | None) -> int:
    if key is None:
        raise ValueError("--record is for a claim: give the key")
    size = arguments.original_size
    proof = recognise(
        sources.load_split(arguments.source, arguments.split),
        Record.load(arguments.record),
        key,
        surrogate=arguments.surrogate,
        original_size=None if size is None else (size[0], size[1]),
        decoys=arguments.decoys,
        batch_size=arguments.batch_size,
        progress=arguments.progress,
    )
    return told(arguments.source, [judged(proof)], claimed=True)


def told(source: str, outcomes: list[Outcome], *, claimed: bool) -> int:
    for outcome in outcomes:
        print(f"{outcome.status:12} {outcome.name:15} {outcome.detail}")
    failed = [outcome.name for outcome in outcomes if outcome.status == "failed"]
    print(f"{source}: " + (f"FAILED: {', '.join(failed)}" if failed else "nothing failed"))
    if claimed and not any(outcome.name == "owner" and outcome.status == "passed" for outcome in outcomes):
        print("  whose it is was not shown")
        return 1
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
