"""Which front matter of a card the Hub refuses: a handful of its rules, worded like its own."""

import re
from collections.abc import Callable, Container, Iterator
from itertools import pairwise
from typing import Any

import yaml

LICENSE_NAMES = (
    "afl-3.0 agpl-3.0 apache-2.0 artistic-2.0 bsd bsd-2-clause bsd-3-clause bsl-1.0 cc cc0-1.0 cc-by-2.0 cc-by-3.0"
    " cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0"
    " cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-permissive-1.0 cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m"
    " epl-2.0 eupl-1.2 gfdl gpl gpl-2.0 gpl-3.0 isc lgpl lgpl-2.1 lgpl-3.0 mit mpl-2.0 odbl odc-by openrail osl-3.0"
    " other pddl unknown unlicense wtfpl zlib"
)
LICENSES = set(LICENSE_NAMES.split())
BOUNDS = ["1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T"]
SIZES = {"n<1K", "n>1T"} | {f"{low}<n<{high}" for low, high in pairwise(BOUNDS)}
FRONT_MATTER = re.compile(r"\s*---[ ]*\r?\n(?P<yaml>.*?)(?:\r?\n)?---[ ]*(?:\r?\n|$)", re.DOTALL)


def listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def one_of(known: Container[str]) -> Callable[[Any], bool]:
    return lambda value: all(isinstance(each, str) and each in known for each in listed(value))


def texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def mappings(value: Any) -> bool:
    return all(isinstance(each, dict) for each in listed(value))


def lower_case(value: Any) -> bool:
    return all(isinstance(each, str) and each == each.lower() for each in listed(value))


def named_configs(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, dict) and "config_name" in each for each in value)


def model_index(value: Any) -> bool:
    parts = ("task", "dataset", "metrics")
    results = [r for model in listed(value) if isinstance(model, dict) for r in listed(model.get("results"))]
    return isinstance(value, list) and all(isinstance(r, dict) and all(p in r for p in parts) for r in results)


RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "license": (one_of(LICENSES), f"must be one of [{', '.join(sorted(LICENSES))}]"),
    "size_categories": (one_of(SIZES), f"must be one of [{', '.join(sorted(SIZES))}]"),
    "language": (lower_case, "must only contain lowercase characters"),
    "tags": (texts, "must be an array of strings"),
    "task_categories": (texts, "must be an array of strings"),
    "pretty_name": (lambda value: isinstance(value, str), "must be a string"),
    "dataset_info": (mappings, "must be of type object"),
    "configs": (named_configs, "must be an array of objects with a config_name"),
    "model-index": (model_index, "must be an array whose results have a task, a dataset and metrics"),
}


def keys(value: Any) -> Iterator[str]:
    """All keys of nested mappings."""
    if isinstance(value, dict):
        yield from map(str, value)
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from keys(each)


def metadata_problems(card: str) -> tuple[list[str], list[str]]:
    """Errors that make the Hub refuse this card, and warnings that do not."""
    front = FRONT_MATTER.match(card)
    if front is None or not front["yaml"].strip():
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        data = yaml.safe_load(front["yaml"])
    except yaml.YAMLError as error:
        return [f"Invalid YAML: {error}"], []
    if not isinstance(data, dict):
        return ["The metadata must be of type object"], []
    errors = [f'"{name}" {wrong}' for name, (fits, wrong) in RULES.items() if name in data and not fits(data[name])]
    if any(set(".$") & set(key) for key in keys(data)):
        errors.append('You can\'t have a key with a "." or "$" character in your YAML metadata')
    return errors, []
