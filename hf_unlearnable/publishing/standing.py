"""What a repository on the Hub holds before anything is sent to it, and whether it may be."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard

from hf_unlearnable import card
from hf_unlearnable.gate.record_checks import lacking
from hf_unlearnable.poisons.names import POISONS
from hf_unlearnable.publishing import pages
from hf_unlearnable.publishing.hub import HubError, Repository, asked
from hf_unlearnable.record import Record

README = "README.md"


@dataclass(frozen=True)
class Standing:
    """A repository at one commit: its files, the text of its card, and our record of a configuration where there is a
    usable one."""

    at: Repository
    files: Mapping[str, dict[str, Any]]
    readme: str | None
    before: Record | None


def standing_of(repository: Repository, config: str) -> Standing | None:
    """None where there is no such repository or branch yet, or none that the token may see."""
    commit = repository.commit_id_or_none()
    if commit is None:
        return None
    now = replace(repository, revision=commit)
    return Standing(now, now.files(), now.text(README), _usable_record(now, config))


def check_room(found: Standing, record: Record, config: str) -> None:
    """That a configuration may be put into a repository, beside or in place of what is there.

    Raises:
        HubError: it holds data that hf_unlearnable did not publish, or another split's record.
    """
    place, repo_id, before = data_folder(config), found.at.repo_id, found.before
    announced = found.readme is not None and pages.part_of(found.readme, config) is not None
    foreign = [path for path in found.files if path.startswith(f"{place}/")]
    if foreign and not (announced or f"results/{config}/record.json" in found.files):
        raise HubError(
            f"{repo_id} already holds {foreign[0]} and {len(foreign) - 1} more files under the configuration "
            f"{config!r}, which hf_unlearnable did not publish (and the history would keep them): choose another "
            "repository or --config-name"
        )
    if before is not None and before.source["split"] != record.source["split"]:
        raise HubError(
            f"{repo_id}: the configuration {config!r} holds the split {before.source['split']!r}, whose record and "
            f"card the split {record.source['split']!r} would replace: choose another --config-name"
        )


def is_there(found: Standing, record: Record, config: str) -> bool:
    """Whether these very pixels were published and found complete before: only the words are new then."""
    before, readme = found.before, found.readme
    if before is None or readme is None or not pages.finished(readme, config):
        return False
    same = ("rows", "pixels_sha256", "image_format")
    if any(before.published.get(name) != record.published.get(name) for name in same) or before.source != record.source:
        return False
    files, split = before.published["files"], record.source["split"]
    named = {path for path in found.files if path.startswith(f"{data_folder(config)}/{split}-")}
    loads = (pages.loaded(readme, found.files, config) or {}).get(split)
    return set(files) == named == set(loads or ()) and all(
        found.files.get(path) == facts for path, facts in files.items()
    )


def new_card(
    repo_id: str,
    readme: str | None,
    record: Record,
    config: str,
    page: str,
    *,
    license: str | None = None,
    title: str | None = None,
) -> str:
    """README.md with the page of a configuration in it, after the Hub was asked whether it takes the front matter.

    Raises:
        HubError: it does not; tells why.
        ValueError: see `pages.put`.
    """
    front = card.front_matter(record, license=license, pretty_name=title)
    new = pages.put(readme, config, page, front, stale=card.stale(POISONS))
    asked(repo_id, _validated, pages.join(pages.split(new)[0], ""))
    return new


def _validated(metadata: str) -> None:
    try:
        DatasetCard(metadata).validate(repo_type="dataset")
    except ValueError as error:
        raise HubError(f"the Hub refuses the card's front matter: {error}") from error


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


def data_folder(config: str) -> str:
    """Where a configuration's parquet files are, as `push_to_hub` places them."""
    return "data" if config == "default" else config
