"""Findings: closed forms of the spreads, the choice on validation, and the guards."""

import math
import statistics
from typing import Any

import pytest

from hf_unlearnable.evaluation import pages
from hf_unlearnable.evaluation.findings import Verdict, cells, spread, verdict
from hf_unlearnable.evaluation.jobs import Outcome
from hf_unlearnable.recipes import recipe
from hf_unlearnable.result import Epoch, Result


def result(test: list[float], validation: list[float], train: float | None = 0.97) -> Result:
    curve = tuple(
        Epoch(
            epoch=i + 1,
            steps=i + 1,
            train_loss=1.0,
            train_accuracy=train,
            validation_accuracy=v,
            test_accuracy=t,
        )
        for i, (t, v) in enumerate(zip(test, validation, strict=True))
    )
    best = max(curve, key=lambda point: point.validation_accuracy or 0.0)
    right = round(100 * test[-1])
    return Result(
        test_accuracy=test[-1],
        best_test_accuracy=best.test_accuracy,
        best_epoch=best.epoch,
        validation_accuracy=validation[-1],
        best_validation_accuracy=best.validation_accuracy,
        class_accuracy=(test[-1], test[-1]),
        confusion=((right, 100 - right), (100 - right, right)),
        curve=curve,
        classes=("a", "b"),
        train_rows=50,
        validation_rows=20,
        test_rows=200,
        image_size=(8, 8),
        train_digest="",
        test_digest="",
        backbone="cifar_tiny",
        defense={"name": "erm"},
        recipe=recipe("tiny"),
        seed=0,
        hardware={"device": "cpu", "processes": 1, "threads": 1, "precision": "no"},
        versions={},
        seconds=1.0,
    )


def outcome(
    arm: str, attacker: str, *, number: int = 0, seed: int = 0, failed: str | None = None, **how: Any
) -> Outcome:
    job = {
        "arm": {"label": arm, "kind": "protected", "digest": str(number), "fraction": 1.0, "epsilon": None},
        "attacker": {"name": attacker},
        "seed": seed,
        "steps": None,
    }
    return Outcome(job=job, result=None if failed else result(**how), failed=failed)


def controls(clean: float = 0.9) -> list[Outcome]:
    return [
        outcome("clean", "erm", test=[clean], validation=[clean], train=0.9),
        outcome("random noise 8/255", "erm", test=[clean - 0.01], validation=[clean]),
        outcome("shuffled labels", "erm", test=[0.51], validation=[0.5], train=0.5),
    ]


def judge(found: list[Outcome], **changes: Any) -> Verdict:
    planned = list(dict.fromkeys(one.job["attacker"]["name"] for one in found))
    how = {"chance": 0.5, "planned": planned, "test_rows": 200, "least_train_accuracy": 0.95, "anchor": 0.8, **changes}
    return verdict("p", cells(found), **how)


def test_spread_in_closed_form() -> None:
    grid = {0: [0.1, 0.3], 1: [0.5, 0.7]}
    train = statistics.fmean([statistics.variance([0.1, 0.3]), statistics.variance([0.5, 0.7])])
    poison = max(0.0, statistics.variance([0.2, 0.6]) - train / 2)
    found = spread(grid)
    assert found.mean == pytest.approx(0.4)
    assert found.error == pytest.approx(math.sqrt(poison / 2 + train / 4))
    assert (found.poisons, found.trainings, found.least, found.most) == (2, 4, 0.1, 0.7)
    assert spread({0: [0.2]}).error is None
    assert spread({0: [0.2], 1: [0.4]}).error == pytest.approx(math.sqrt(statistics.variance([0.2, 0.4]) / 2))
    assert spread({0: [0.2, 0.4]}).error == pytest.approx(statistics.stdev([0.2, 0.4]) / math.sqrt(2))
    alike = spread({0: [0.1, 0.5], 1: [0.1, 0.5]})
    assert alike.error == pytest.approx(math.sqrt(statistics.variance([0.1, 0.5]) / 4))


def test_attacker_and_epoch_are_chosen_on_validation_not_on_test() -> None:
    found = [
        *controls(),
        outcome("p", "erm", test=[0.60, 0.55], validation=[0.60, 0.55]),
        outcome("p", "lucky", test=[0.85, 0.80], validation=[0.50, 0.52]),
        outcome("p", "best", test=[0.70, 0.60], validation=[0.71, 0.60]),
        outcome("clean", "best", test=[0.9], validation=[0.9]),
    ]
    told = judge(found)
    assert told.attacker == "best"
    assert told.learnability is not None
    assert told.learnability.mean == pytest.approx(0.70)
    assert (told.ceiling, told.clean, told.refused) == (0.9, 0.9, ())
    assert told.normalized == pytest.approx((0.70 - 0.5) / (0.9 - 0.5))
    by = {(cell.arm, cell.attacker): cell for cell in cells(found)}
    columns = [by["p", "lucky"].last, by["p", "lucky"].selected, by["p", "lucky"].oracle]
    assert [one.mean for one in columns if one] == pytest.approx([0.80, 0.80, 0.85])


def test_guards_refuse() -> None:
    other = outcome("p", "jpeg-10", test=[0.5], validation=[0.5])

    def plain(train: float = 0.97) -> Outcome:
        return outcome("p", "erm", test=[0.6], validation=[0.6], train=train)

    fine = [*controls(), plain(), other]
    assert judge(fine).refused == ()
    assert "anchor" in judge([*controls(0.7), plain()]).refused[0]
    assert "trained too little" in judge([*controls(), plain(0.93)]).refused[0]
    relative = {"least_train_accuracy": None}
    assert judge([*controls(), plain(0.885), other], **relative).refused == ()
    assert judge(fine[:-1]).refused == ("plain training alone is no evaluation",)
    assert "trained too little" in judge([*controls(), plain(0.87)], **relative).refused[0]
    assert "not measured" in judge([plain()]).refused[0]
    fragile = [fine[0], outcome("random noise 8/255", "erm", test=[0.8], validation=[0.8]), fine[2], fine[3]]
    assert "too fragile" in judge(fragile).refused[0]
    leaking = [*fine[:2], outcome("shuffled labels", "erm", test=[0.65], validation=[0.65]), *fine[3:]]
    assert "something leaks" in judge(leaking).refused[0]
    below = [*fine[:2], outcome("shuffled labels", "erm", test=[0.3], validation=[0.3]), *fine[3:]]
    assert judge(below).refused == ()
    assert judge(fine[:1] + fine[3:]).notes[:2] == (
        "random noise as a control: not measured",
        "shuffled labels: not measured",
    )
    assert "random noise as a control: not measured" in judge(fine, epsilon=16 / 255).notes


def test_default_anchors_can_be_reached_whatever_the_chance() -> None:
    def told(clean: float, chance: float) -> tuple[str, ...]:
        found = [
            outcome("clean", "erm", test=[clean], validation=[clean]),
            outcome("p", "erm", test=[0.6], validation=[0.6]),
            outcome("p", "jpeg-10", test=[0.5], validation=[0.5]),
        ]
        return judge(found, anchor=None, chance=chance).refused

    assert told(0.76, 0.5) == ()
    assert "its anchor is 0.750" in told(0.74, 0.5)[0]
    assert told(0.21, 0.1) == ()
    assert "its anchor is 0.200" in told(0.19, 0.1)[0]


def test_what_was_planned_and_not_measured_is_told() -> None:
    found = [*controls(), *(outcome("p", name, test=[0.6], validation=[0.6]) for name in ("erm", "jpeg-10"))]
    told = judge(found, planned=["erm", "jpeg-10", "ueraser"])
    assert told.measured == ("erm", "jpeg-10")
    assert "2 of 3 attackers: without ueraser" in told.notes


def test_failed_trainings_are_told_and_not_counted() -> None:
    found = [
        *controls(),
        outcome("p", "erm", test=[0.6], validation=[0.6]),
        outcome("p", "op", failed="ValueError: no"),
    ]
    told = judge(found)
    assert told.attacker == "erm"
    assert "failed and not counted: op" in told.notes
    assert judge([*controls(), outcome("p", "erm", failed="x")]).learnability is None
    text = pages.summary([told], cells(found), SETTING)
    assert "1 failed: ValueError: no" in text
    assert "| clean | erm" not in text


SETTING = {
    "dataset": "shapes",
    "train_rows": 50,
    "validation_rows": 20,
    "test_rows": 200,
    "backbone": "tiny",
    "recipe": "tiny",
    "epochs": "5 epochs",
    "seeds": (0,),
    "hardware": ["cpu"],
}


def test_pages_tell_the_most_learnable_first() -> None:
    found = [
        *controls(),
        *(outcome("strong", "erm", seed=s, test=[0.55], validation=[0.55]) for s in (0, 1)),
        outcome("weak", "erm", test=[0.75], validation=[0.75]),
        outcome("weak", "jpeg-10", test=[0.85], validation=[0.85]),
    ]
    told = [
        verdict(arm, cells(found), chance=0.5, planned=["erm", "jpeg-10"], test_rows=200, anchor=0.8)
        for arm in ("strong", "weak")
    ]
    text = pages.summary(told, cells(found), SETTING)
    assert text.index("| weak | jpeg-10 | **85.0** |") < text.index("| strong | erm | refused |")
    matrix = pages.matrix(cells(found))
    assert "| weak | 75.0 | **85.0** |" in matrix
    lines = pages.table(cells(found)).splitlines()
    assert len(lines) == 1 + 6
    assert lines[-1].startswith("weak,jpeg-10,0.850000,,0.850000,,0.850000,")
    refused = verdict(
        "weak", cells(found), chance=0.5, planned=["erm"], test_rows=200, least_train_accuracy=0.99, anchor=0.8
    )
    assert "| refused |" in pages.summary([refused], cells(found), SETTING)
    assert "REFUSED: plain training fits" in pages.summary([refused], cells(found), SETTING)


def test_gains_of_protected_rows_are_against_equal_steps() -> None:
    def part(kind: str, value: float, steps: int | None = None) -> Outcome:
        job = {
            "arm": {"label": "p", "kind": kind, "digest": "0", "fraction": 0.5, "epsilon": None},
            "attacker": {"name": "erm"},
            "seed": 0,
            "steps": steps,
        }
        return Outcome(job=job, result=result([value], [value]))

    found = [
        *controls(),
        outcome("p", "erm", test=[0.6], validation=[0.6]),
        part("mix", 0.84),
        part("remainder", 0.80),
        part("remainder", 0.82, steps=5),
    ]
    text = pages.summary([judge(found)], cells(found), SETTING)
    assert "| 0.5 | 84.0 | 80.0 | 82.0 | +2.0 |" in text
    assert "share of the rows protected" not in pages.summary([judge(found[:4])], cells(found[:4]), SETTING)
