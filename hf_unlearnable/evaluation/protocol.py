"""The protocol: which trainings an evaluation needs, and what is written when some of them are done."""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock

from hf_unlearnable import card
from hf_unlearnable.evaluation import pages, pictures
from hf_unlearnable.evaluation.arms import Arm
from hf_unlearnable.evaluation.attackers import Suite, suite
from hf_unlearnable.evaluation.findings import Cell, Verdict, arm_of, attacker_of, cells, verdict
from hf_unlearnable.evaluation.jobs import Job, Outcome
from hf_unlearnable.recipes import recipe
from hf_unlearnable.record import Record


def protected_arms(given: Sequence[str]) -> list[Arm]:
    """An arm for every `label=folder`, or folder labelled by its method.

    Raises:
        FileNotFoundError: a folder without a record.
        ValueError: a label that is no plain name, a dataset given twice, datasets that were not made of the same clean
            rows, or of one label by different methods or settings.
    """
    arms: list[Arm] = []
    records: dict[str, Record] = {}
    for text in given:
        label, found, path = text.partition("=")
        path = path if found else text
        record = _record(path)
        label = label if found else record.method
        if not re.fullmatch(r"\w[\w.+-]*", label):
            raise ValueError(f"expected a label of letters, digits and . + - _, got {label!r}")
        digest = record.published["pixels_sha256"]
        for arm in arms:
            there = records[arm.digest]
            if arm.digest == digest:
                raise ValueError(f"{path} and {arm.path} hold the same pictures")
            if there.source["pixels_sha256"] != record.source["pixels_sha256"]:
                raise ValueError(f"{path} and {arm.path} were not made of the same clean rows: evaluate them apart")
            if arm.label == label and _settings(there) != _settings(record):
                raise ValueError(
                    f"{path} and {arm.path} are both {label!r}, but of different methods or settings: "
                    "label them (label=folder)"
                )
        arms.append(Arm(label=label, kind="protected", path=os.path.abspath(path), digest=digest))
        records[digest] = record
    return arms


def _settings(record: Record) -> tuple[str, dict[str, Any]]:
    return record.method, {name: value for name, value in record.settings.items() if name != "surrogate"}


def epsilon_of(arm: Arm) -> float | None:
    """The L-inf radius that an arm's record says its rows keep; None where they keep none."""
    kept = [one["epsilon"] for one in _record(arm.path).pixels.get("budgets", []) if one["norm"] == "linf"]
    return max(kept, default=None)


def plan(suite: Suite, protected: Sequence[Arm], *, anchors: bool = True) -> list[Job]:
    """The trainings of an evaluation, in the order in which they are wanted.

    Seed by seed: plain training on the clean rows and on the controls, every attacker on every protected dataset, every
    attacker on the clean rows (its ceiling), and the mixed fractions, each beside the clean remainder, trained for as
    many epochs and for as many steps.

    Args:
        anchors: False leaves out the clean rows and the controls: nothing can then be claimed.
    """
    first = protected[0]
    epsilons = sorted({epsilon_of(arm) or 8 / 255 for arm in protected})
    behind: dict[str, Any] = {"path": first.path, "digest": _record(first.path).source["pixels_sha256"]}
    clean = Arm(label="clean", kind="clean", **behind)
    noise = [Arm(label="random noise", kind="noise", epsilon=epsilon, **behind) for epsilon in epsilons]
    shuffled = Arm(label="shuffled labels", kind="shuffled", **behind)
    plain, *others = suite.attackers
    how: dict[str, Any] = {"backbone": suite.backbone, "recipe": suite.recipe}
    jobs: list[Job] = []
    for seed in suite.seeds:
        if anchors:
            jobs.append(Job(arm=clean, attacker=plain, seed=seed, **how))
        if anchors:
            controls = [*noise, shuffled] if seed == suite.seeds[0] else noise
            jobs += [Job(arm=arm, attacker=plain, seed=seed, **how) for arm in controls]
        jobs += [Job(arm=arm, attacker=one, seed=seed, **how) for arm in protected for one in suite.attackers]
        if anchors:
            jobs += [Job(arm=clean, attacker=one, seed=seed, **how) for one in others]
        for arm in {arm.label: arm for arm in reversed(protected)}.values():
            for fraction in suite.fractions:
                part = {"label": arm.label, "path": arm.path, "digest": arm.digest, "fraction": fraction}
                jobs.append(Job(arm=Arm(kind="mix", **part), attacker=plain, seed=seed, **how))  # type: ignore[arg-type]
                rest = Arm(kind="remainder", **part)  # type: ignore[arg-type]
                jobs.append(Job(arm=rest, attacker=plain, seed=seed, **how))
                jobs.append(Job(arm=rest, attacker=plain, seed=seed, steps=_all_steps(suite, arm.path), **how))
    return jobs


def report(
    suite: Suite,
    protected: Sequence[Arm],
    outcomes: Sequence[Outcome],
    output: Path,
    *,
    anchor: float | None = None,
    note: bool = True,
) -> list[Verdict]:
    """Write summary.md, table.csv, matrix.md, heat-map.png, curves and confusion matrices of every protected dataset.

    Args:
        anchor: see `findings.verdict`.
        note: put the verdicts and their cells into the records of the protected datasets, and into their cards.

    Raises:
        ValueError: there is no result at all, or they were measured on different test rows.
    """
    done = [outcome for outcome in outcomes if outcome.result is not None]
    if not done:
        raise ValueError(f"no training gave a result; the first error: {outcomes[0].failed if outcomes else 'none'}")
    result = done[0].result
    assert result is not None
    if len({(o.result.test_digest, o.result.validation_rows) for o in done if o.result}) > 1:
        raise ValueError("these trainings were tested on different rows: evaluate into another output")
    found, chance = cells(outcomes), result.chance
    labels = list(dict.fromkeys(arm.label for arm in protected))
    verdicts = [
        verdict(
            label,
            found,
            chance=chance,
            planned=[one.name for one in suite.attackers],
            test_rows=result.test_rows,
            epsilon=next(epsilon_of(arm) for arm in protected if arm.label == label),
            least_train_accuracy=suite.least_train_accuracy,
            anchor=anchor,
        )
        for label in labels
    ]
    setting = {
        "suite": suite.name,
        "anchor": anchor,
        "dataset": Record.load(Path(protected[0].path) / "record.json").source["dataset"],
        "train_rows": max(o.result.train_rows for o in done if o.result),
        "validation_rows": result.validation_rows,
        "test_rows": result.test_rows,
        **({"image_size": suite.image_size} if suite.image_size else {}),
        "backbone": suite.backbone,
        "recipe": suite.recipe,
        "epochs": _length(suite),
        "seeds": suite.seeds,
        "attackers": {one.name: told for one in suite.attackers if (told := one.words()) is not None},
        "hardware": sorted({_machine(o.result.hardware) for o in done if o.result}),
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "summary.md").write_text(pages.summary(verdicts, found, setting) + "\n")
    (output / "table.csv").write_text(pages.table(found))
    main = [cell for cell in found if cell.arm in ("clean", *labels)]
    (output / "matrix.md").write_text(pages.matrix(main) + "\n")
    title = f"{setting['dataset']}, {setting['train_rows']:,} rows, {suite.backbone}, recipe {suite.recipe}"
    title += f", {suite.image_size} px" if suite.image_size else ""
    if any(cell.selected for cell in main):
        pictures.heat_map(main, output / "heat-map.png", title=title, chance=chance)
    for told in verdicts:
        own = [outcome for outcome in done if arm_of(outcome) == told.arm]
        if not own:
            continue
        pictures.curves(own, output / f"curves-{told.arm}.png", title=f"{told.arm}: {title}")
        wanted = dict.fromkeys(("erm", told.attacker))
        first = {attacker_of(outcome): outcome.result for outcome in reversed(own) if outcome.result}
        shown = [(name, first[name]) for name in wanted if name in first]
        pictures.confusions(shown, output / f"confusion-{told.arm}.png", title=f"{told.arm}: {title}")
        alike = [arm for arm in protected if arm.label == told.arm]
        of = {"setting": setting, "pixels_sha256": [arm.digest for arm in alike]}
        for arm in alike if note else ():
            _note(Path(arm.path), told, [cell for cell in found if cell.arm in (told.arm, "clean")], of)
    return verdicts


def tables(folder: Path) -> list[Cell]:
    """table.csv, matrix.md and heat-map.png of an evaluation from the files of its trainings alone, whatever datasets
    and keys they are of: clean rows first, then the most learnable. Nothing is claimed, and no guard is looked at.

    Raises:
        ValueError: no trainings there, or trainings that were tested on different rows.
    """
    outcomes = [Outcome.load(path) for path in sorted((folder / "jobs").rglob("*.json"))]
    done = [outcome.result for outcome in outcomes if outcome.result is not None]
    if not done:
        raise ValueError(f"expected an evaluation with results of trainings in {folder / 'jobs'}, got none")
    if len({(result.test_digest, result.validation_rows) for result in done}) > 1:
        raise ValueError(f"{folder}: its trainings were tested on different rows")
    order = [one.name for one in suite("full").attackers]
    arms: dict[str, list[Cell]] = {}
    for cell in cells(outcomes):
        arms.setdefault(cell.arm, []).append(cell)
    for own in arms.values():
        own.sort(key=lambda cell: order.index(cell.attacker) if cell.attacker in order else len(order))
    best = {arm: max((cell.selected.mean for cell in own if cell.selected), default=-1.0) for arm, own in arms.items()}
    found = [cell for arm in sorted(arms, key=lambda arm: (arm != "clean", -best[arm], arm)) for cell in arms[arm]]
    kinds = {arm_of(outcome): outcome.job["arm"]["kind"] for outcome in outcomes}
    main = [cell for cell in found if kinds[cell.arm] in ("clean", "protected")]
    (folder / "table.csv").write_text(pages.table(found))
    (folder / "matrix.md").write_text(pages.matrix(main) + "\n")
    if any(cell.selected for cell in main):
        noted = folder / "setting.json"
        setting = json.loads(noted.read_text()) if noted.exists() else {}
        words = [str(setting[name]) for name in ("clean", "backbone") if name in setting]
        words += [f"recipe {setting['recipe']}"] if "recipe" in setting else []
        title = ", ".join([*words, f"{max(result.train_rows for result in done):,} rows"])
        pictures.heat_map(main, folder / "heat-map.png", title=title, chance=done[0].chance)
    return found


def _note(folder: Path, told: Verdict, found: Sequence[Cell], of: dict[str, Any]) -> None:
    """Put a verdict into a record and its card, in place of those that measured no attacker besides, with its setting
    and the digests of the pictures that it was measured on (`of`).

    A card that somebody else has written on is left alone.
    """
    with FileLock(folder.parent / f".{folder.name}.note.lock"):
        record = Record.load(folder / "record.json")
        page = folder / "README.md"
        ours = not page.exists() or page.read_text() == card.local_page(record)
        entry = {**of, "setting": {**of["setting"], "seeds": list(of["setting"]["seeds"])}, **asdict(told)}
        entry["cells"] = [asdict(cell) for cell in found]
        same = ("dataset", "train_rows", "image_size", "backbone", "recipe")

        def outdone(other: dict[str, Any]) -> bool:
            alike = all(other["setting"].get(name) == entry["setting"].get(name) for name in same)
            theirs, own = (one["setting"].get("attackers", {}) for one in (other, entry))
            alike = alike and all(theirs.get(name) == own.get(name) for name in other["measured"] if name in theirs)
            return alike and set(other["measured"]) <= set(told.measured)

        record.results[:] = [*(one for one in record.results if not outdone(one)), entry]
        record.save(folder / "record.json")
        if ours:
            page.write_text(card.local_page(record))


def _record(path: str) -> Record:
    try:
        return Record.load(Path(path) / "record.json")
    except FileNotFoundError:
        raise FileNotFoundError(f"expected a protected dataset with its record.json, got {path}") from None


def _all_steps(suite: Suite, path: str) -> int:
    rows, chosen = _record(path).published["rows"], recipe(suite.recipe)
    rows = rows if suite.rows is None else min(rows, suite.rows)
    whole = rows // chosen.batch_size
    return chosen.total_steps(whole if chosen.drop_last else -(-rows // chosen.batch_size))


def _length(suite: Suite) -> str:
    chosen = recipe(suite.recipe)
    return f"{chosen.epochs} epochs" if chosen.epochs is not None else f"{chosen.steps} steps"


def _machine(hardware: dict[str, Any]) -> str:
    return (
        f"{hardware['device']}, {hardware['processes']} process(es) of {hardware['threads']} thread(s), "
        f"precision {hardware['precision']}"
    )
