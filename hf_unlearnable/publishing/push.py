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
from hf_unlearnable.gate.record_checks import lacking
from hf_unlearnable.gate.secret_scan import holds_secret
from hf_unlearnable.images import decode
from hf_unlearnable.keys import Key
from hf_unlearnable.poisons.names import POISONS
from hf_unlearnable.publishing import pages
from hf_unlearnable.publishing.attachments import evaluation_files, is_ours
from hf_unlearnable.publishing.hub import HubError, Repository, asked
from hf_unlearnable.publishing.readback import Contents, Rows, contents, rows_of
from hf_unlearnable.record import Record

README = "README.md"
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
    """What was published, or (in a dry run) would be: the card's part and the files by their path on the Hub."""

    url: str
    record: Record
    page: str
    files: dict[str, str | bytes | Path]


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

    After an interruption the same call goes on: shards that the Hub has are not sent again. Memory holds one batch of
    rows; each parquet file of the folder becomes one on the Hub.

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
        dry_run: check and render everything, send nothing.
        batch_size: pictures held at a time.

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
    if dry_run:
        return Publication(repository.url, record, page, {**extra, **_record_file(record, config)})
    repository.create(private=private)
    now = replace(repository, revision=repository.commit_id())
    already = now.files()
    place = _data_folder(config)
    mine = f"results/{config}/record.json" in already or _announced(now, config)
    foreign = [path for path in already if path.startswith(f"{place}/")]
    if foreign and not mine:
        raise HubError(
            f"{repository.repo_id} already holds {foreign[0]} and {len(foreign) - 1} more files under the "
            f"configuration {config!r}, which hf_unlearnable did not publish (and the history would keep them): choose "
            "another repository or --config-name"
        )
    before = _usable_record(now, config)
    if before is not None and before.source["split"] != record.source["split"]:
        raise HubError(
            f"{repository.repo_id}: the configuration {config!r} holds the split {before.source['split']!r}, whose "
            f"record and card the split {record.source['split']!r} would replace: choose another --config-name"
        )
    there = _is_there(now, already, record, before, config)
    if not there:
        _announce(repository, record, config, extra, words)
        _push(folder, record, repository, config)
        now = replace(repository, revision=repository.commit_id())
    record = replace(record, published={**record.published, "files": _pushed(now, place, record)})
    if not there:
        found = contents(_read_back(now, record, batch_size), total=record.published["rows"], progress=progress)
        _compare(found, record)
    _finish(repository, record, config, extra, words, parent=now.revision)
    return Publication(repository.url, record, page, {**extra, **_record_file(record, config)})


def read_record(repository: Repository, config: str) -> Record | None:
    """The record of a published configuration, or None."""
    text = repository.text(f"results/{config}/record.json")
    if text is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "record.json"
        path.write_text(text)
        return Record.load(path)


def _usable_record(repository: Repository, config: str) -> Record | None:
    """The record of a published configuration; None also where it is none that could be read or compared."""
    try:
        found = read_record(repository, config)
    except ValueError:
        return None
    return None if found is None or [*lacking(found)] else found


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


def _check_config(config: str) -> None:
    if config in ("data", "assets", "results") or not config.replace("-", "_").replace(".", "_").isidentifier():
        raise ValueError(f"expected a configuration name of letters, digits, - and _, got {config!r}")


def _data_folder(config: str) -> str:
    return "data" if config == "default" else config


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


def _announced(repository: Repository, config: str) -> bool:
    """Whether an earlier run of ours began with this configuration."""
    readme = repository.text(README)
    return readme is not None and pages.part_of(readme, config) is not None


def _is_there(
    repository: Repository, already: dict[str, dict], record: Record, before: Record | None, config: str
) -> bool:
    """Whether these very pixels were published and found complete before: only the words are new then."""
    readme = repository.text(README)
    if before is None or readme is None or not pages.finished(readme, config):
        return False
    same = ("rows", "pixels_sha256", "image_format")
    if any(before.published.get(name) != record.published.get(name) for name in same) or before.source != record.source:
        return False
    files, split = before.published["files"], record.source["split"]
    named = {path for path in already if path.startswith(f"{_data_folder(config)}/{split}-")}
    loads = (pages.loaded(readme, already, config) or {}).get(split)
    return set(files) == named == set(loads or ()) and all(already.get(path) == facts for path, facts in files.items())


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
    front = card.front_matter(record, license=words.license, pretty_name=words.title)
    new = pages.put(readme, config, page, front, stale=card.stale(POISONS))
    asked(repository.repo_id, card_errors, new)
    if new != readme:
        add = {README: new, **add}
    if add or delete:
        repository.commit(message, add, delete, parent)


def card_errors(readme: str) -> None:
    """Ask the Hub whether it takes the front matter.

    Raises:
        ValueError: it does not; tells why.
    """
    from huggingface_hub import DatasetCard

    try:
        DatasetCard(readme).validate(repo_type="dataset")
    except ValueError as error:
        raise HubError(f"the Hub refuses the card's front matter: {error}") from error
