"""Publish a protected folder: the card first, then the data, then the finished card.

On the Hub: README.md; data/ (or CONFIG/) with parquet; results/CONFIG/ with record.json and evaluations;
assets/CONFIG/ with pictures. Until the last commit the card says that it is not finished.
"""

import glob
import json
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datasets import Dataset, IterableDataset, load_dataset

from hf_unlearnable import card, preview
from hf_unlearnable.digests import file_digest
from hf_unlearnable.gate import checks
from hf_unlearnable.gate.secret_scan import holds_secret
from hf_unlearnable.images import decode
from hf_unlearnable.keys import Key
from hf_unlearnable.publishing.attachments import evaluation_files, is_ours
from hf_unlearnable.publishing.hub import HubError, Repository, Unreachable, asked
from hf_unlearnable.publishing.readback import Contents, Rows, contents, rows_of
from hf_unlearnable.publishing.standing import (
    README,
    Standing,
    check_room,
    data_folder,
    is_there,
    new_card,
    standing_of,
)
from hf_unlearnable.record import Record

PREVIEW_PICTURES, PREVIEW_FROM = 8, 1000


@dataclass(frozen=True, kw_only=True)
class Words:
    """What only the owner can say on the card: identifiers as the Hub lists them, or plain words."""

    title: str | None = None
    license: str | None = None
    source_license: str | None = None
    contact: str | None = None


@dataclass(frozen=True)
class Publication:
    """What was published, or (in a dry run) would be: the card's part and the files by their path on the Hub.

    Args:
        unseen: of a dry run that could not reach the Hub: why. What is there was not looked at then.
    """

    url: str
    record: Record
    page: str
    files: dict[str, str | bytes | Path]
    unseen: str | None = None


def publish(
    folder: str | Path,
    repository: Repository,
    *,
    config: str = "default",
    private: bool | None = None,
    clean: Dataset | None = None,
    key: Key | None = None,
    evaluations: Sequence[str | Path] = (),
    words: Words = Words(),
    allow_guessable_key: bool = False,
    accept: Collection[str] = (),
    show_clean: bool = False,
    dry_run: bool = False,
    batch_size: int = 500,
    progress: bool = True,
) -> Publication:
    """Check a folder that `protect` made, push it, read back what was pushed, and only then say that it is finished.

    After an interruption the same call goes on: shards that the Hub has are not sent again. Memory holds a batch
    of rows and one parquet file; each file of the folder becomes one on the Hub.

    Args:
        folder: `protect`'s output.
        config: name of the configuration, for variants and poison rates beside each other.
        private: only for a new repository; None for the Hub's default.
        clean: the source, to compare with row by row.
        key: the secret, to make sure that nothing that is sent holds it.
        evaluations: folders that `scripts/evaluate.py` made; their pages, tables and pictures are sent too.
        allow_guessable_key, accept: see `checks.check`.
        show_clean: send the folder's own preview, with some clean pictures beside their published ones. From one such
            pair what a class-wise method adds to the whole class can be computed, without the key. Otherwise the
            preview shows published pictures alone.
        dry_run: check and render everything, and send nothing. The Hub is asked what the repository holds, and whether
            it takes the card's metadata.
        batch_size: pictures held at most at a time; fewer of large ones.

    Raises:
        checks.Refused: the folder does not pass.
        HubError: no network, no token, no rights, a repository that holds something else under this configuration.
        ValueError: front matter of the existing card that is no YAML; what was pushed does not read back as recorded.
    """
    folder = Path(folder)
    _check_config(config)
    record = checks.check(
        folder,
        clean=clean,
        allow_guessable_key=allow_guessable_key,
        accept=accept,
        progress=progress,
        batch_size=batch_size,
    )
    if key is not None and (places := holds_secret(folder, key)):
        raise ValueError(f"the key is in {', '.join(places)}: nothing was sent")
    extra: dict[str, str | bytes | Path] = {**evaluation_files([Path(one) for one in evaluations], config, record, key)}
    shown: bytes | Path = folder / "preview.png" if show_clean else published_preview(folder, record)
    extra[f"assets/{config}/preview.png"] = shown
    page = _page(record, repository, config, extra, words)
    prepared = Publication(repository.url, record, page, {**extra, **_record_file(record, config)})
    try:
        _standing(repository, record, config, page, words)
    except Unreachable as error:
        if dry_run:
            return replace(prepared, unseen=str(error))
        raise
    if dry_run:
        return prepared
    repository.create(private=private)
    found = _standing(repository, record, config, page, words)
    if found is None:
        raise HubError(f"{repository.repo_id}: was made, and the Hub does not show it: run the same command again")
    now, place = found.at, data_folder(config)
    there = is_there(found, record, config)
    if not there:
        _announce(repository, record, config, extra, words)
        _push(folder, record, repository, config)
        now = replace(repository, revision=repository.commit_id())
    record = replace(record, published={**record.published, "files": _pushed(now, place, record)})
    if not there:
        got = contents(_read_back(now, record, batch_size), total=record.published["rows"], progress=progress)
        _compare(got, record)
    _finish(repository, record, config, extra, words, parent=now.revision)
    return Publication(repository.url, record, page, {**extra, **_record_file(record, config)})


def published_preview(folder: Path, record: Record) -> bytes:
    """A picture of published rows: the first of up to eight classes among the first rows, or the first eight."""
    image, label, classes = (record.source[name] for name in ("image_column", "label_column", "classes"))
    chosen: dict[Any, tuple[str, bytes]] = {}
    with pq.ParquetFile(folder / min(record.published["files"])) as parquet:
        batches = parquet.iter_batches(8, columns=[image] if label is None else [image, label])
        rows = (row for batch in batches for row in batch.to_pylist())
        for number, row in enumerate(islice(rows, PREVIEW_FROM)):
            value = number if label is None else row[label]
            if value not in chosen:
                known = classes and isinstance(value, int) and 0 <= value < len(classes)
                name = "" if label is None else str(classes[value] if known else value)
                chosen[value] = (name[:16], row[image]["bytes"])
            if len(chosen) == PREVIEW_PICTURES:
                break
    title = f"published pictures ({record.method})"
    shown = [(name, decode(data)) for name, data in chosen.values()]
    return preview.draw_published([picture for _, picture in shown], [name for name, _ in shown], title=title)


def pull(repository: Repository, paths: Sequence[str]) -> Iterator[Path]:
    """Files one after the other; each is gone when the next is asked for, so that a disk need not hold them all."""
    with tempfile.TemporaryDirectory() as folder:
        for path in paths:
            file = repository.download(path, folder)
            yield file
            file.unlink()


def _standing(repository: Repository, record: Record, config: str, page: str, words: Words) -> Standing | None:
    """What the repository holds, once it is sure that this may be put there; None where there is no such one yet."""
    found = standing_of(repository, config)
    if found is not None:
        check_room(found, record, config)
    readme = None if found is None else found.readme
    new_card(repository.repo_id, readme, record, config, page, license=words.license, title=words.title)
    return found


def _check_config(config: str) -> None:
    if config in ("data", "assets", "results") or not config.replace("-", "_").replace(".", "_").isidentifier():
        raise ValueError(f"expected a configuration name of letters, digits, - and _, got {config!r}")


def _record_file(record: Record, config: str) -> dict[str, str | bytes | Path]:
    return {f"results/{config}/record.json": json.dumps(asdict(record), indent=2, allow_nan=False) + "\n"}


def _page(
    record: Record,
    repository: Repository,
    config: str,
    files: Mapping[str, str | bytes | Path],
    words: Words,
    *,
    unfinished: bool = False,
) -> str:
    kind = "published" if isinstance(files[f"assets/{config}/preview.png"], bytes) else "preview"
    pictures = {} if unfinished else {kind: f"assets/{config}/preview.png"}
    maps = [path for path in files if path.endswith("/heat-map.png")]
    if maps and not unfinished:
        pictures["heat_map"] = maps[0]
    load = f'"{repository.repo_id}"' if config == "default" else f'"{repository.repo_id}", "{config}"'
    load += "" if repository.revision is None else f', revision="{repository.revision}"'
    own = None if config == "default" else f"{record.source['dataset']}, protected with {record.method}: {config}"
    return card.dataset_page(
        record,
        load=load,
        title=words.title or own,
        pictures=pictures,
        unfinished=unfinished,
        license=words.license,
        source_license=words.source_license,
        contact=words.contact,
    )


def _announce(
    repository: Repository, record: Record, config: str, files: Mapping[str, str | bytes | Path], words: Words
) -> None:
    """The card first: it says that what follows is not finished."""
    page = _page(record, repository, config, files, words, unfinished=True)
    _write_card(repository, record, config, page, words, {}, (), f"{config}: being published")


def _push(folder: Path, record: Record, repository: Repository, config: str) -> None:
    split = record.source["split"]
    files = [glob.escape(str(folder / name)) for name in sorted(record.published["files"])]
    rows = load_dataset("parquet", data_files={split: files}, split=split, streaming=True)
    assert isinstance(rows, IterableDataset)
    asked(
        repository.repo_id,
        rows.push_to_hub,
        repository.repo_id,
        config_name=config,
        split=split,
        revision=repository.revision,
        token=repository.token,
        num_shards=len(files),
        commit_message=f"{config}: pictures",
    )


def _pushed(repository: Repository, place: str, record: Record) -> dict[str, dict]:
    """The data files of the split on the Hub, with the SHA-256 that the Hub tells."""
    prefix = f"{place}/{record.source['split']}-"
    files = {path: facts for path, facts in repository.files().items() if path.startswith(prefix)}
    if missing := [path for path, facts in files.items() if facts["sha256"] is None]:
        raise HubError(f"{repository.repo_id}: the Hub tells no SHA-256 of {missing[0]}")
    return dict(sorted(files.items()))


def _read_back(at: Repository, record: Record, batch_size: int) -> Iterator[Rows]:
    files = record.published["files"]

    def checked() -> Iterator[Path]:
        for name, path in zip(files, pull(at, list(files)), strict=True):
            if (found := file_digest(path)) != files[name]["sha256"]:
                raise ValueError(f"{name}: expected SHA-256 {files[name]['sha256']} as the Hub tells, got {found}")
            yield path

    return rows_of(checked(), record.source["image_column"], batch_size)


def _compare(found: Contents, record: Record) -> None:
    """Rows and digests as the record tells them."""
    told = {
        "rows": record.published["rows"],
        "pixels_sha256": record.published["pixels_sha256"],
        "columns_sha256": record.source.get("columns_sha256", found.columns_sha256),
    }
    for name, value in told.items():
        if (got := getattr(found, name)) != value:
            raise ValueError(f"what was pushed differs from the record: expected {name} {value}, got {got}")


def _finish(
    repository: Repository,
    record: Record,
    config: str,
    extra: dict[str, str | bytes | Path],
    words: Words,
    *,
    parent: str | None,
) -> None:
    """The finished card, the record and the evaluations, in one commit, on top of the one that was checked; what an
    earlier publication sent besides goes."""
    add = {**extra, **_record_file(record, config)}
    old = [
        path
        for path in repository.files()
        if path.startswith((f"results/{config}/", f"assets/{config}/")) and is_ours(path) and path not in add
    ]
    page = _page(record, repository, config, extra, words)
    _write_card(repository, record, config, page, words, add, old, f"{config}: finished", parent)


def _write_card(
    repository: Repository,
    record: Record,
    config: str,
    page: str,
    words: Words,
    add: dict[str, str | bytes | Path],
    delete: Sequence[str],
    message: str,
    parent: str | None = None,
) -> None:
    parent = parent or repository.commit_id()
    readme = replace(repository, revision=parent).text(README)
    new = new_card(repository.repo_id, readme, record, config, page, license=words.license, title=words.title)
    if new != readme:
        add = {README: new, **add}
    if add or delete:
        repository.commit(message, add, delete, parent)
