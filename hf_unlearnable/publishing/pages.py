"""README.md of a repository: our part between marks, everything else as its owner wrote it."""

import fnmatch
import re
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

_FRONT = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)(?:\r?\n)?---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
UNFINISHED = "**Not finished.**"


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


def put(readme: str | None, config: str, page: str, front: Mapping[str, Any]) -> str:
    """The README with the part of one configuration put in, or replaced; other text and metadata are kept.

    Values of the front matter that are already there win, but for the lists of `tags`, `task_categories` and
    `size_categories`, to which ours are added, and for another licence, which is an error.

    Raises:
        ValueError: front matter that is no YAML mapping, an opening mark without its end, another licence, or words
            with an HTML comment, which would be taken for a mark.
    """
    if "<!--" in page or "-->" in page:
        raise ValueError("expected names and words without HTML comments (<!-- -->), got one in the card's text")
    data, text = split(readme or "")
    for name, value in front.items():
        if isinstance(value, list):
            own = data.get(name) or []
            own = own if isinstance(own, list) else [own]
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
    start, stop = readme.find(begin), readme.find(end)
    return readme[start + len(begin) : stop].strip() if 0 <= start < stop else None


def finished(readme: str, config: str) -> bool:
    """Whether the part of a configuration is there and does not say that it is being published."""
    part = part_of(readme, config)
    return part is not None and UNFINISHED not in part


def loaded(readme: str, paths: Iterable[str], config: str) -> dict[str, list[str]] | None:
    """Which of the repository's files `load_dataset` reads for a configuration, by split.

    None where the front matter does not say so in the form that `push_to_hub` writes: a list of split and path
    (a pattern, or several) and nothing else.

    Raises:
        ValueError: front matter that is no YAML mapping.
    """
    paths, configs = sorted(paths), split(readme)[0].get("configs")
    named = [one for one in configs if isinstance(one, dict)] if isinstance(configs, list) else []
    told = [one for one in named if one.get("config_name") == config]
    if len(told) != 1 or not isinstance(files := told[0].get("data_files"), list) or "data_dir" in told[0]:
        return None
    found: dict[str, list[str]] = {}
    for entry in files:
        if not isinstance(entry, dict) or set(entry) != {"split", "path"}:
            return None
        patterns = entry["path"] if isinstance(entry["path"], list) else [entry["path"]]
        matched = [path for path in paths if any(fnmatch.fnmatchcase(path, str(one)) for one in patterns)]
        found[str(entry["split"])] = matched
    return found


def _marks(config: str) -> tuple[str, str]:
    return f"<!-- hf_unlearnable: {config} -->", f"<!-- end of hf_unlearnable: {config} -->"
