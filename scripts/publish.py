"""Publish a protected dataset, or a surrogate, on the HuggingFace Hub.

    python scripts/publish.py out/cuda --repo-id me/cifar10-cuda --dry-run
    python scripts/publish.py out/cuda --repo-id me/cifar10-cuda --clean path/or/hub-id --key-file key --private
    python scripts/publish.py surrogates/mmm.safetensors --repo-id me/mmm-surrogate --private

Nothing leaves before every check has passed; the card says that the dataset is not finished until all of it has been
pushed and read back. After an interruption the same command goes on.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import datasets
from datasets.exceptions import DatasetBuildError

from hf_unlearnable import sources
from hf_unlearnable.gate import checks
from hf_unlearnable.keys import read_key
from hf_unlearnable.poisons.names import POISONS
from hf_unlearnable.publishing.hub import Repository
from hf_unlearnable.publishing.push import Publication, Words, publish
from hf_unlearnable.publishing.surrogates import publish_surrogate
from hf_unlearnable.record import Record
from hf_unlearnable.surrogate import Surrogate


def main(argv: Sequence[str] | None = None) -> None:
    listed = "\n".join(f"  {known.name:15} {known.meaning}" for known in checks.CHECKS)
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"checks before anything is sent:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", type=Path, help="what protect.py made, or a surrogate (.safetensors)")
    parser.add_argument("--repo-id", required=True, help="user/name on the Hub; made where it is not there")
    parser.add_argument("--config-name", default="default", help="for variants beside each other (default: default)")
    parser.add_argument("--revision", help="branch; default: main")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument(
        "--show-clean", action="store_true", help="send the preview with clean pictures too: gives away what was added"
    )
    parser.add_argument("--dry-run", action="store_true", help="check and show the card; send nothing")
    parser.add_argument("--clean", help="the source, to compare with row by row: Hub id, folder, parquet, or demo")
    parser.add_argument("--split", help="split of --clean; default: the one that was protected")
    parser.add_argument("--key-file", type=Path, help="the secret key: makes sure that nothing that is sent holds it")
    parser.add_argument("--evaluation", nargs="+", default=[], type=Path, help="folders that evaluate.py made")
    parser.add_argument("--allow-guessable-key", action="store_true", help="publish although anyone can find the key")
    parser.add_argument("--accept", nargs="+", default=[], choices=checks.ACCEPTABLE, help="findings that are meant so")
    words = parser.add_argument_group("words on the card")
    words.add_argument("--title")
    words.add_argument("--license", help="of what is published: an identifier of the Hub, such as cc-by-4.0")
    words.add_argument("--source-license", help="of the source")
    words.add_argument("--contact", help="who answers questions")
    parser.add_argument(
        "--batch-size",
        type=int,
        default=500,
        help="pictures held at most at a time, fewer of large ones (default: 500)",
    )
    parser.add_argument("--no-progress", dest="progress", action="store_false")
    arguments = parser.parse_args(argv)
    datasets.utils.logging.set_verbosity_error()
    if not arguments.progress:
        datasets.disable_progress_bars()
    try:
        run(arguments)
    except (ValueError, OSError, TypeError, RuntimeError, DatasetBuildError) as error:
        sys.exit(f"publish.py: {error}")


def run(arguments: argparse.Namespace) -> None:
    source: Path = arguments.source
    if source.suffix == ".safetensors":
        repository = Repository(arguments.repo_id, "model", arguments.revision)
        page = publish_surrogate(
            source,
            repository,
            class_name=POISONS[Surrogate.load(source).method].__name__,
            private=arguments.private or None,
            key=None if arguments.key_file is None else read_key(arguments.key_file),
            allow_guessable_key=arguments.allow_guessable_key,
            license=arguments.license,
            title=arguments.title,
            dry_run=arguments.dry_run,
        )
        print(page if arguments.dry_run else f"{repository.url}: published")
        return
    clean = None
    if arguments.clean:
        split = arguments.split or split_of(Record.load(source / "record.json"))
        clean = sources.load_split(arguments.clean, split)
    done = publish(
        source,
        Repository(arguments.repo_id, "dataset", arguments.revision),
        config=arguments.config_name,
        private=arguments.private or None,
        clean=clean,
        key=None if arguments.key_file is None else read_key(arguments.key_file),
        evaluations=arguments.evaluation,
        words=Words(
            title=arguments.title,
            license=arguments.license,
            source_license=arguments.source_license,
            contact=arguments.contact,
        ),
        allow_guessable_key=arguments.allow_guessable_key,
        accept=arguments.accept,
        show_clean=arguments.show_clean,
        dry_run=arguments.dry_run,
        batch_size=arguments.batch_size,
        progress=arguments.progress,
    )
    show(done, dry_run=arguments.dry_run)


def split_of(record: Record) -> str | None:
    """The split that was protected, as far as an unchecked record tells it."""
    return record.source.get("split") if isinstance(record.source, dict) else None


def show(done: Publication, *, dry_run: bool) -> None:
    rows = done.record.published["rows"]
    if dry_run:
        print(done.page)
        names = [*done.record.published["files"], *done.files, "README.md"]
        print(f"{done.url}: every check passed; {rows:,} rows and these files would be sent:")
        print("\n".join(f"  {name}" for name in names))
        if done.unseen:
            print(f"what is there already was not looked at: {done.unseen}")
        return
    print(f"{done.url}: {rows:,} rows published, read back and found as recorded")
    if not done.record.results:
        print("  what a trainer still learns from it is not measured (scripts/evaluate.py), and its card says so")


if __name__ == "__main__":
    main()
