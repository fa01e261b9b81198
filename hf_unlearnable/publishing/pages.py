"""README.md of a repository: our part between marks, everything else as its owner wrote it."""

import fnmatch
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import pyarrow as pa
import yaml
from datasets import Features

from hf_unlearnable.gate.folder_checks import features_of

_FRONT = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)
UNFINISHED = "> **Not finished.**"


def split(readme: str) -> tuple[dict[str, Any], str]:
    """Front matter and text.

    Raises:
        ValueError: front matter that is no YAML mapping.
    """
    found = _FRONT.match(readme)
    if found is None:
        return {}, readme
    try:
        data = yaml.safe_load(found[1]) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"README.md: expected front matter in YAML, got {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"README.md: expected a mapping as front matter, got {type(data).__name__}")
    return data, readme[found.end() :]


def join(data: Mapping[str, Any], text: str) -> str:
    """A README.md of front matter and text."""
    front = yaml.safe_dump(dict(data), sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n\n{text.lstrip()}"


def put(
    readme: str | None,
    config: str,
    page: str,
    front: Mapping[str, Any],
    *,
    stale: Mapping[str, Collection[str]] | None = None,
) -> str:
    """The README with the part of one configuration put in, or replaced; other text and metadata are kept.

    Values of the front matter that are already there win, but for the lists of `tags`, `task_categories` and
    `size_categories`, to which ours are added, and for another licence, which is an error.

    Args:
        stale: entries of those lists that only an earlier publication can have left, where no other configuration of
            ours is in the text.

    Raises:
        ValueError: front matter that is no YAML mapping, an opening mark without its end, another licence, or words
            with an HTML comment, which would be taken for a mark.
    """
    if "<!--" in page or "-->" in page:
        raise ValueError("expected names and words without HTML comments (<!-- -->), got one in the card's text")
    data, text = split(readme or "")
    others = {found[1] for found in re.finditer(r"<!-- hf_unlearnable: (\S+) -->", text)} - {config}
    for name, value in front.items():
        if isinstance(value, list):
            own = data.get(name) or []
            own = own if isinstance(own, list) else [own]
            if not others:
                own = [one for one in own if one not in (stale or {}).get(name, ())]
            data[name] = [*own, *(one for one in value if one not in own)]
        elif data.setdefault(name, value) != value and name == "license":
            raise ValueError(
                f"README.md: its metadata say license {data[name]!r}, expected {value!r}: change one of them"
            )
    begin, end = _marks(config)
    part = f"{begin}\n{page.strip()}\n{end}"
    if begin not in text:
        last = max((found.end() for found in re.finditer(r"<!-- end of hf_unlearnable: \S+ -->", text)), default=None)
        text = f"{text.rstrip()}\n\n{part}\n" if last is None else f"{text[:last]}\n\n{part}{text[last:]}"
    else:
        start = text.index(begin)
        if (stop := text.find(end, start)) < 0:
            raise ValueError(f"README.md: {begin!r} without {end!r}: put the end back, or take the beginning out")
        text = text[:start] + part + text[stop + len(end) :]
    return join(data, text)


def part_of(readme: str, config: str) -> str | None:
    """Our part for one configuration, or None."""
    begin, end = _marks(config)
    start = readme.find(begin)
    stop = readme.find(end, max(0, start))
    return readme[start + len(begin) : stop].strip() if 0 <= start < stop else None


def finished(readme: str, config: str) -> bool:
    """Whether the part of a configuration is there and does not say that it is being published."""
    part = part_of(readme, config)
    return part is not None and not any(line.startswith(UNFINISHED) for line in part.splitlines())


def loaded(readme: str, paths: Iterable[str], config: str) -> dict[str, list[str]] | None:
    """Which of the repository's files `load_dataset` reads for a configuration, by split.

    None where the front matter does not say so in the form that `push_to_hub` writes: a list of split and path
    (a pattern, or several) and nothing else; or where `.huggingface.yaml` may say otherwise.

    Raises:
        ValueError: front matter that is no YAML mapping.
    """
    paths, configs = sorted(paths), split(readme)[0].get("configs")
    named = [one for one in configs if isinstance(one, dict)] if isinstance(configs, list) else []
    told = [one for one in named if one.get("config_name") == config]
    if len(told) != 1 or not isinstance(files := told[0].get("data_files"), list):
        return None
    if set(told[0]) - {"config_name", "data_files", "default"} or ".huggingface.yaml" in paths:
        return None
    found: dict[str, list[str]] = {}
    for entry in files:
        if not isinstance(entry, dict) or set(entry) != {"split", "path"}:
            return None
        patterns = entry["path"] if isinstance(entry["path"], list) else [entry["path"]]
        matched = [path for path in paths if any(fnmatch.fnmatchcase(path, str(one)) for one in patterns)]
        found[str(entry["split"])] = matched
    return found


def other_features(readme: str, config: str, schema: pa.Schema) -> str:
    """Where `dataset_info` of the front matter contradicts the files' own features: what differs, or nothing.

    Raises:
        ValueError: front matter that is no YAML mapping, features that cannot be read.
    """
    told = split(readme)[0].get("dataset_info")
    infos = [one for one in (told if isinstance(told, list) else [told]) if isinstance(one, dict)]
    own = features_of(schema)
    for info in infos:
        if info.get("config_name", "default") == config and "features" in info:
            try:
                found = Features._from_yaml_list(info["features"])
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise ValueError(f"README.md: features of {config!r} that cannot be read: {error}") from error
            if differ := [name for name in {**own, **found} if own.get(name) != found.get(name)]:
                name = differ[0]
                return f"the card's front matter says {found.get(name)} of column {name!r}, the files {own.get(name)}"
    return ""


def _marks(config: str) -> tuple[str, str]:
    return f"<!-- hf_unlearnable: {config} -->", f"<!-- end of hf_unlearnable: {config} -->"
