"""Cards: what a stranger can judge a protected dataset or a surrogate by, rendered from its record."""

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import yaml

from hf_unlearnable.papers import PAPERS
from hf_unlearnable.record import Record
from hf_unlearnable.reported import known
from hf_unlearnable.surrogate import Surrogate

_PLACES = (Path(__file__).parent / "templates", Path(__file__).parent.parent / "cards" / "templates")
_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))
_SUITE_NAMES = "attackers of the suites quick, standard and full that are not in the table"


@cache
def templates() -> jinja2.Environment:
    """The templates of `cards/templates` (in a wheel: of the package); an unknown variable is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([str(place) for place in _PLACES]),
        undefined=jinja2.StrictUndefined,
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["inline"] = inline
    environment.filters["capitalize_first"] = lambda text: text[:1].upper() + text[1:]
    return environment


def dataset_page(
    record: Record,
    *,
    load: str,
    title: str | None = None,
    pictures: Mapping[str, str] | None = None,
    unfinished: bool = False,
    license: str | None = None,
    source_license: str | None = None,
    contact: str | None = None,
) -> str:
    """The text of a protected split's card, without front matter: the weakest result first.

    Args:
        load: the arguments of `load_dataset` as they stand in code.
        pictures: links to pictures by name: "preview" (with clean pictures), "published" (without), "heat_map".
        unfinished: say that this is being published and must not be used yet.
        license, source_license: identifiers or words; None is shown as not stated.

    Raises:
        jinja2.UndefinedError: the record lacks something that every card tells.
    """
    pixels = record.pixels
    paper = PAPERS.get(record.method)
    classes = record.source["classes"]
    results = sorted(record.results, key=lambda found: -_learnability(found))
    return (
        templates()
        .get_template("dataset.md.jinja")
        .render(
            record=record,
            title=inline(title) if title else f"{inline(record.source['dataset'])}, protected with `{record.method}`",
            source=f"the dataset `{inline(record.source['dataset'])}`",
            unfinished=unfinished,
            pictures=dict(pictures or {}),
            learned=learned(record),
            evaluations=[_evaluation(found) for found in results],
            known=known(record.method),
            done=_done(record),
            key=_key(record),
            measures=[(n, s) for n, s in pixels.items() if isinstance(s, dict) and "mean" in s],
            load=load,
            classes=None if not classes else _few(classes),
            license=license and inline(license),
            source_license=source_license and inline(source_license),
            contact=contact and inline(contact),
            paper=paper,
            bibtex=None if paper is None else paper.bibtex(record.method),
        )
    )


def local_page(record: Record) -> str:
    """README.md of a protected folder.

    Its front matter has no `configs`: with them, `load_dataset` caches a local folder by its name alone, and would show
    the pictures of an older folder of the same name.
    """
    body = dataset_page(record, load='"path/to/this/folder"', pictures={"preview": "preview.png"})
    return f"---\n{yaml.safe_dump({'tags': ['hf_unlearnable']})}---\n\n{body}"


def surrogate_page(
    surrogate: Surrogate, *, repo_id: str, class_name: str, title: str | None = None, guessable: bool = True
) -> str:
    """The text of a surrogate's card, without front matter.

    Args:
        class_name: the poison's class, for the code.
        guessable: the file is public, and with it what was drawn from it.
    """
    paper, known_of = PAPERS.get(surrogate.method), surrogate.provenance
    data = known_of.get("data", {})
    told = ("seed", "data", "steps", "seconds", "backbone", "version", "hardware", "versions")
    return (
        templates()
        .get_template("surrogate.md.jinja")
        .render(
            surrogate=surrogate,
            title=title or f"`{surrogate.method}` surrogate",
            data=f"{data['rows']:,} pictures of {data.get('source') or 'an unnamed dataset'}" if data else "a dataset",
            guessable=guessable,
            class_name=class_name,
            repo_id=repo_id,
            networks=", ".join(f"{name}: {how['backbone']}" for name, how in surrogate.networks.items()) or "none",
            classes=_few(surrogate.classes) if surrogate.classes else "none: the method needs no labels",
            facts=[(name, known_of[name]) for name in told if name in known_of],
            paper=paper,
            bibtex=None if paper is None else paper.bibtex(surrogate.method),
        )
    )


def surrogate_front_matter(surrogate: Surrogate, *, license: str | None = None) -> dict[str, Any]:
    """Metadata of a surrogate's model repository."""
    found = {"license": license, "library_name": "hf_unlearnable"}
    tags = ["hf_unlearnable", "unlearnable-examples", "data-poisoning", surrogate.method]
    return {**{name: value for name, value in found.items() if value is not None}, "tags": tags}


def front_matter(record: Record, *, license: str | None = None, pretty_name: str | None = None) -> dict[str, Any]:
    """Metadata of a published dataset that the Hub understands."""
    rows = record.published["rows"]
    known_values = {
        "license": license,
        "pretty_name": pretty_name,
        "task_categories": ["image-classification"] if record.source["label_column"] else None,
        "size_categories": [next((name for top, name in _SIZES if rows < top), "10M<n<100M")],
        "tags": ["hf_unlearnable", "unlearnable-examples", "data-poisoning", record.method],
    }
    return {name: value for name, value in known_values.items() if value is not None}


def learned(record: Record) -> str:
    """What the best attacker learned, in every evaluation, the most learnable first; or that there is none."""
    if not record.results:
        return (
            "**What a trainer still learns from it: not measured.** Until `results` in `record.json` holds an "
            "evaluation, nothing is\nclaimed about how well this dataset resists training."
        )
    return "\n\n".join(_sentence(found) for found in sorted(record.results, key=lambda found: -_learnability(found)))


def _learnability(found: Mapping[str, Any]) -> float:
    """Refused evaluations come first: nothing is known to be better."""
    return 2.0 if found["refused"] or found["learnability"] is None else float(found["learnability"]["mean"])


def seen_at(setting: Mapping[str, Any]) -> str:
    """At which size victims saw the pictures, where they were resized for it."""
    side = setting.get("image_size")
    return f", resized and cut to {side} x {side} pixels" if side else ""


def others(setting: Mapping[str, Any]) -> str:
    """Which attackers trained other victims than the setting's."""
    known = setting.get("attackers") or {}
    told = "; ".join(f"`{inline(name)}`: {inline(words)}" for name, words in known.items())
    return f" Other victims: {told}." if told else ""


def _sentence(found: Mapping[str, Any]) -> str:
    setting, best, datasets = found["setting"], found["learnability"], len(found.get("pixels_sha256", ()))
    where = f"{setting['backbone']}, recipe {setting['recipe']}, {setting['train_rows']:,} rows{seen_at(setting)}"
    where += f"; mean over {datasets} datasets protected alike, this one among them" if datasets > 1 else ""
    if found["refused"] or best is None:
        return f"**Nothing is claimed** ({where}): {'; '.join(found['refused'])}."
    clean = "not measured" if found["clean"] is None else f"{100 * found['clean']:.1f} %"
    return (
        f"**A trainer still reaches {_percent(best)} % on clean test pictures** with "
        f"`{found['attacker']}`, the best of {len(found['measured'])} attackers ({where}); "
        f"plain training on clean pictures: {clean}, chance: {100 * found['chance']:.1f} %."
        + (f" Beside it: {'; '.join(found['notes'])}." if found["notes"] else "")
    )


def _percent(spread: Mapping[str, Any] | None) -> str:
    if spread is None:
        return "not measured"
    return f"{100 * spread['mean']:.1f}" + ("" if spread["error"] is None else f" ± {100 * spread['error']:.1f}")


def _evaluation(found: Mapping[str, Any]) -> dict[str, Any]:
    setting, cells = found["setting"], found["cells"]
    clean = [cell for cell in cells if cell["arm"] == "clean" and cell["attacker"] == "erm"]
    own = [cell for cell in cells if cell["arm"] != "clean"]
    own.sort(key=lambda cell: -(cell["selected"]["mean"] if cell["selected"] else -1.0))
    rows = [
        {
            "attacker": f"`{cell['attacker']}`" if cell["arm"] != "clean" else "*plain training on the clean pictures*",
            "selected": _percent(cell["selected"]),
            "last": _percent(cell["last"]),
            "trainings": cell["last"]["trainings"]
            if cell["last"]
            else f"failed: {inline('; '.join(cell['failed']))[:120]}",
            "reported": "" if cell["reported"] is None else _reported(cell["reported"]),
        }
        for cell in [*own, *clean]
    ]
    seeds = ", ".join(map(str, setting["seeds"]))
    sentence = (
        f"Victims: {setting['backbone']}, recipe {setting['recipe']} ({setting['epochs']}), {setting['train_rows']:,} "
        f"training pictures{seen_at(setting)}, training seeds {seeds}; {'; '.join(setting['hardware'])}. "
        f"Chance: {100 * found['chance']:.1f} %.{others(setting)}"
    )
    return {
        "sentence": sentence,
        "rows": rows,
        "papers": any(row["reported"] for row in rows),
        "test_rows": setting["test_rows"],
        "validation_rows": setting["validation_rows"],
        "unmeasured": _SUITE_NAMES if setting["suite"] != "full" else "anything that is not in the table",
    }


def _reported(paper: Mapping[str, Any]) -> str:
    return f"{100 * paper['test_accuracy']:.2f} ({paper['source']})"


def _done(record: Record) -> str:
    pixels, paper = record.pixels, PAPERS.get(record.method)
    does = "got uniform noise of its own" if paper is None else paper.does
    changed = f"{pixels['rows_changed']:,} of {pixels['rows']:,} pictures"
    return f"Every picture of those chosen {does}: {changed} were changed. Labels, order and other columns were not."


def _key(record: Record) -> str:
    key = record.key
    if key["kind"] == "int":
        return "The key is an int seed: **guessable**, anyone can enumerate it and recompute the perturbation."
    told = f"The key is a secret of 32 bytes; what binds its owner to it: commitment `{key['commitment']}`."
    if key.get("surrogate"):
        told += f" It was drawn from the surrogate, which was trained with {key['surrogate']}."
    return told


def stale(methods: Iterable[str]) -> dict[str, list[str]]:
    """Values of the front matter's lists that follow from method and rows: those of an earlier publication go."""
    return {"tags": list(methods), "size_categories": [*(name for _, name in _SIZES), "10M<n<100M"]}


def inline(text: object) -> str:
    """Words from outside as they may stand in a line or a table of Markdown."""
    told = " ".join(str(text).split())
    for mark, harmless in (("<", "&lt;"), (">", "&gt;"), ("|", "\\|"), ("`", "'")):
        told = told.replace(mark, harmless)
    return told


def _few(names: Sequence[str], most: int = 20) -> str:
    shown = ", ".join(inline(name) for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
