"""The protocol: which trainings an evaluation needs, and what is written when some of them are done."""

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hf_unlearnable import card
from hf_unlearnable.evaluation import pages, pictures
from hf_unlearnable.evaluation.arms import Arm
from hf_unlearnable.evaluation.attackers import Suite
from hf_unlearnable.evaluation.findings import Cell, Verdict, arm_of, attacker_of, cells, verdict
from hf_unlearnable.evaluation.jobs import Job, Outcome
from hf_unlearnable.recipes import recipe
from hf_unlearnable.record import Record


def protected_arms(given: Sequence[str]) -> list[Arm]:
    """An arm for every `label=folder`, or folder labelled by its method; those of one label are numbered.

    Raises:
        FileNotFoundError: a folder without a record.
        ValueError: the datasets were not made of the same clean rows.
    """
    arms: list[Arm] = []
    sources: dict[str, str] = {}
    for text in given:
        label, found, path = text.partition("=")
        path = path if found else text
        record = _record(path)
        label = label if found else record.method
        number = sum(arm.label == label for arm in arms)
        digest = record.published["pixels_sha256"]
        arms.append(Arm(label=label, kind="protected", number=number, path=os.path.abspath(path), digest=digest))
        sources[path] = record.source["pixels_sha256"]
    if len(set(sources.values())) > 1:
        raise ValueError(f"expected datasets made of the same clean rows, got {sources}: evaluate them apart")
    return arms


def plan(suite: Suite, protected: Sequence[Arm], *, anchors: bool = True) -> list[Job]:
    """The trainings of an evaluation, in the order in which they are wanted.

    Seed by seed: plain training on the clean rows and on the controls, every attacker on every protected dataset, every
    attacker on the clean rows (its ceiling), and the mixed fractions, each beside the clean remainder, trained for as
    many epochs and for as many steps.

    Args:
        anchors: False leaves out the clean rows and the controls: nothing can then be claimed.
    """
    first = protected[0]
    epsilons = [one["epsilon"] for arm in protected for one in _budgets(arm.path) if one["norm"] == "linf"]
    behind: dict[str, Any] = {"path": first.path, "digest": _record(first.path).source["pixels_sha256"]}
    clean = Arm(label="clean", kind="clean", **behind)
    noise = Arm(label="random noise", kind="noise", epsilon=max(epsilons, default=8 / 255), **behind)
    shuffled = Arm(label="shuffled labels", kind="shuffled", **behind)
    plain, *others = suite.attackers
    how: dict[str, Any] = {"backbone": suite.backbone, "recipe": suite.recipe}
    jobs: list[Job] = []
    for seed in suite.seeds:
        if anchors:
            jobs.append(Job(arm=clean, attacker=plain, seed=seed, **how))
        if anchors and seed == suite.seeds[0]:
            jobs += [Job(arm=arm, attacker=plain, seed=seed, **how) for arm in (noise, shuffled)]
        jobs += [Job(arm=arm, attacker=one, seed=seed, **how) for arm in protected for one in suite.attackers]
        if anchors:
            jobs += [Job(arm=clean, attacker=one, seed=seed, **how) for one in others]
        for arm in (arm for arm in protected if arm.number == 0):
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
    least = suite.least_train_accuracy
    verdicts = [verdict(label, found, chance=chance, least_train_accuracy=least, anchor=anchor) for label in labels]
    setting = {
        "dataset": Record.load(Path(protected[0].path) / "record.json").source["dataset"],
        "train_rows": max(o.result.train_rows for o in done if o.result),
        "validation_rows": result.validation_rows,
        "test_rows": result.test_rows,
        "backbone": suite.backbone,
        "recipe": suite.recipe,
        "epochs": _length(suite),
        "seeds": suite.seeds,
        "hardware": sorted({_machine(o.result.hardware) for o in done if o.result}),
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "summary.md").write_text(pages.summary(verdicts, found, setting) + "\n")
    (output / "table.csv").write_text(pages.table(found))
    main = [cell for cell in found if cell.arm in ("clean", *labels)]
    (output / "matrix.md").write_text(pages.matrix(main) + "\n")
    title = f"{setting['dataset']}, {setting['train_rows']:,} rows, {suite.backbone}, recipe {suite.recipe}"
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
        for arm in (arm for arm in protected if arm.label == told.arm and note):
            _note(Path(arm.path), told, [cell for cell in found if cell.arm in (told.arm, "clean")], setting)
    return verdicts


def _note(folder: Path, told: Verdict, found: Sequence[Cell], setting: dict[str, Any]) -> None:
    record = Record.load(folder / "record.json")
    entry = {"setting": {**setting, "seeds": list(setting["seeds"])}, **asdict(told)}
    entry["cells"] = [asdict(cell) for cell in found]
    kept = [one for one in record.results if one.get("setting") != entry["setting"]]
    record.results[:] = [*kept, entry]
    record.save(folder / "record.json")
    (folder / "README.md").write_text(card.stub(record))


def _record(path: str) -> Record:
    try:
        return Record.load(Path(path) / "record.json")
    except FileNotFoundError:
        raise FileNotFoundError(f"expected a protected dataset with its record.json, got {path}") from None


def _budgets(path: str) -> list[dict[str, Any]]:
    return _record(path).pixels.get("budgets", [])


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
