"""The protocol: which trainings are planned, and what is written of them."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from datasets import load_dataset

from hf_unlearnable.evaluation.attackers import Suite, suite
from hf_unlearnable.evaluation.jobs import Job, Outcome
from hf_unlearnable.evaluation.protocol import plan, protected_arms, report, tables
from hf_unlearnable.gate.checks import inspect
from hf_unlearnable.record import Record
from hf_unlearnable.reported import reported
from tests.conftest import load_script
from tests.evaluation.test_findings import result


def small(**changes) -> Suite:
    made = suite("quick")
    how = {"attackers": made.attackers[:3], "rows": None, **changes}
    return dataclasses.replace(made, **how)


def made_up(job: Job) -> Outcome:
    """What a training might have given: every attacker learns more than the one before it."""
    known = {"clean": 0.9, "random noise": 0.895, "shuffled labels": 0.5}
    key = 0.01 * (job.arm.digest > "8")
    step = 0.05 * [one.name for one in small().attackers].index(job.attacker.name)
    test = known.get(job.arm.label, 0.6 + step + key)
    train = 0.5 if job.arm.kind == "shuffled" else 0.97
    return Outcome(job=job.described(), result=result([0.3, test], [0.3, test], train))


def test_the_plan_covers_every_pair_once(protected_once: list[Path]) -> None:
    arms = protected_arms([str(path) for path in protected_once])
    jobs = plan(small(fractions=(0.5,)), arms)
    names = [job.name for job in jobs]
    assert len(set(names)) == len(names)
    per_seed = 3 + 1 + 2 * 3 + 3  # clean, noise, two protected arms, mix and remainder twice
    assert len(jobs) == 2 * per_seed + 1  # and shuffled labels, once
    assert [job.arm.kind for job in jobs[:3]] == ["clean", "noise", "shuffled"]
    assert {job.seed for job in jobs} == {0, 1}
    matched = [job for job in jobs if job.steps is not None]
    assert {job.arm.kind for job in matched} == {"remainder"}
    assert {job.steps for job in matched} == {5 * 3}  # 160 rows in batches of 64, five epochs
    bare = plan(small(), arms, anchors=False)
    assert {job.arm.kind for job in bare} == {"protected"}


def test_the_noise_control_has_the_budget_of_the_record(protected_once: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "bounded"
    shutil.copytree(protected_once[0], folder)
    record = Record.load(folder / "record.json")
    record.pixels["budgets"] = [{"norm": "linf", "epsilon": 16 / 255, "kept_by_rows": 160}]
    record.save(folder / "record.json")
    noise = {job.arm.epsilon for job in plan(small(), protected_arms([str(folder)])) if job.arm.kind == "noise"}
    assert noise == {16 / 255}
    unbounded = plan(small(), protected_arms([str(protected_once[0])]))
    assert {job.arm.epsilon for job in unbounded if job.arm.kind == "noise"} == {8 / 255}


def test_the_report_writes_everything_and_tells_the_record(protected_once: list[Path], tmp_path: Path) -> None:
    folders = []
    for path in protected_once:
        shutil.copytree(path, tmp_path / path.name)
        folders.append(tmp_path / path.name)
    arms = protected_arms([str(path) for path in folders])
    made, output = small(), tmp_path / "eval"
    outcomes = [made_up(job) for job in plan(made, arms)]
    (told,) = report(made, arms, outcomes, output, anchor=0.8)
    assert (told.attacker, told.refused) == ("jpeg-10", ())
    assert told.learnability is not None
    assert told.learnability.mean == pytest.approx(0.705)
    assert (told.learnability.poisons, told.learnability.trainings) == (2, 4)
    for name in ("summary.md", "table.csv", "matrix.md", "heat-map.png", "curves-lsp.png", "confusion-lsp.png"):
        assert (output / name).stat().st_size > 100, name
    assert "| lsp | jpeg-10 | **70.5 ± " in (output / "summary.md").read_text()
    for folder in folders:
        (found,) = Record.load(folder / "record.json").results
        assert found["attacker"] == "jpeg-10"
        assert found["pixels_sha256"] == [arm.digest for arm in arms]
        assert inspect(folder, progress=False, allow_guessable_key=True) == []
        card = (folder / "README.md").read_text()
        assert "A trainer still reaches 70.5" in card
        assert "mean over 2 datasets protected alike, this one among them" in card
        assert "not measured" not in card.split("## What this is")[0]
        assert len(load_dataset(str(folder), split="train")) == 160
    report(made, arms, outcomes, output, anchor=0.8)
    assert len(Record.load(folders[0] / "record.json").results) == 1, "a second report replaces the first"
    (refused,) = report(made, arms, outcomes, output, anchor=0.95)
    assert refused.refused
    assert "Nothing is claimed" in (folders[0] / "README.md").read_text()


def test_tables_from_the_trainings_alone(protected_once: list[Path], tmp_path: Path) -> None:
    arms = protected_arms([str(path) for path in protected_once])
    outcomes = [made_up(job) for job in plan(small(), arms)]
    report(small(), arms, outcomes, tmp_path, anchor=0.8, note=False)
    before = {name: (tmp_path / name).read_text().splitlines() for name in ("table.csv", "matrix.md")}
    with pytest.raises(ValueError, match="expected an evaluation with results of trainings"):
        tables(tmp_path)
    for i, outcome in enumerate(outcomes):
        outcome.save(tmp_path / "jobs" / "any" / f"{i}.json")
    tables(tmp_path)
    for name, lines in before.items():
        assert sorted((tmp_path / name).read_text().splitlines()) == sorted(lines), "the same, in another order"
    assert (tmp_path / "matrix.md").read_text().splitlines()[2].startswith("| clean |")
    assert load_script("evaluate").main(["--tables", "--output", str(tmp_path)]) == 0
    with pytest.raises(SystemExit):
        load_script("evaluate").main(["--output", str(tmp_path)])


def test_the_record_can_be_left_alone(protected_once: list[Path], tmp_path: Path) -> None:
    arms = protected_arms([str(protected_once[0])])
    outcomes = [made_up(job) for job in plan(small(), arms)]
    before = (protected_once[0] / "record.json").read_text()
    report(small(), arms, outcomes, tmp_path, note=False)
    assert (protected_once[0] / "record.json").read_text() == before
    failed = [Outcome(job=one.job, result=None, failed="ValueError: no") for one in outcomes]
    with pytest.raises(ValueError, match="no training gave a result; the first error: ValueError: no"):
        report(small(), arms, failed, tmp_path, note=False)


def test_suites_have_the_attackers_that_are_promised() -> None:
    core = [
        *("erm", "grayscale", "jpeg-10", "bit-depth-2", "ueraser-lite", "ueraser", "at-4"),
        *("rsk-ff", "coin", "op", "cutmix"),
    ]
    assert [one.name for one in suite("quick").attackers] == core
    for name in ("quick", "standard", "full"):
        made = suite(name)  # type: ignore[arg-type]
        names = [one.name for one in made.attackers]
        assert names[: len(core)] == core
        assert len(set(names)) == len(names)
        described = [json.dumps(one.described(), default=str) for one in made.attackers]
        assert len(set(described)) == len(described), "two attackers do the same"
    with pytest.raises(ValueError, match="expected a suite of"):
        suite("huge")  # type: ignore[arg-type]


def test_papers_are_quoted_with_their_source_and_only_for_their_dataset() -> None:
    found = reported("cifar10", "cuda", "erm")
    assert found is not None
    assert found["test_accuracy"] == 0.1848
    assert "CUDA" in found["source"]
    assert reported("cifar10", "cuda", "nothing") is None
    assert reported("demo", "cuda", "erm") is None


def test_another_key_in_the_same_folder_is_another_job(protected_once: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    shutil.copytree(protected_once[0], folder)
    before = plan(small(), protected_arms([f"x={folder}"]))
    shutil.rmtree(folder)
    shutil.copytree(protected_once[1], folder)
    after = plan(small(), protected_arms([f"x={folder}"]))
    for old, new in zip(before, after, strict=True):
        assert (old.described() == new.described()) == (old.arm.kind != "protected")
        assert (old.name == new.name) == (old.arm.kind != "protected")


def test_results_on_different_test_rows_are_not_reported_together(protected_once: list[Path], tmp_path: Path) -> None:
    arms = protected_arms([str(protected_once[0])])
    outcomes = [made_up(job) for job in plan(small(), arms)]
    assert outcomes[0].result is not None
    other = dataclasses.replace(outcomes[0].result, test_digest="other")
    outcomes[0] = dataclasses.replace(outcomes[0], result=other)
    with pytest.raises(ValueError, match="different rows"):
        report(small(), arms, outcomes, tmp_path, note=False)
