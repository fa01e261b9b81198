"""Claims: settled before they are measured, judged by differences and their errors, quoted beside the papers."""

import json
from pathlib import Path

import pytest

from hf_unlearnable.evaluation.attackers import suite
from hf_unlearnable.evaluation.claims import CLAIMS, Below, Claim, measured, page, save
from hf_unlearnable.evaluation.jobs import Outcome
from hf_unlearnable.reported import reported
from hf_unlearnable.result import Result
from tests.conftest import load_script

SETTING = {
    "scale": "small",
    "command": "python scripts/reproduce.py x",
    "dataset": "cifar10",
    "train_rows": 10,
    "backbone": "tiny",
    "recipe": "tiny",
    "hardware": ["a machine"],
}
CLAIM = Claim(
    name="x",
    says="y",
    source="z",
    poisons=("cuda",),
    attackers=("erm", "at-4"),
    expects=(
        Below(lower=("cuda", "erm"), higher=("clean", "erm"), margin=0.1),
        Below(lower=("cuda", "at-4"), higher=("clean", "at-4")),
    ),
)


def outcome(arm: str, attacker: str, accuracy: float, digest: str = "0", seed: int = 0) -> Outcome:
    job = {
        "arm": {
            "label": arm,
            "kind": "clean" if arm == "clean" else "protected",
            "digest": digest,
            "fraction": 1.0,
            "epsilon": None,
        },
        "attacker": {"name": attacker},
        "seed": seed,
        "steps": None,
    }
    result = Result.__new__(Result)
    values = {"test_accuracy": accuracy, "best_test_accuracy": accuracy, "best_validation_accuracy": accuracy}
    for name, value in values.items():
        object.__setattr__(result, name, value)
    epoch = type("Epoch", (), {"test_accuracy": accuracy, "train_accuracy": accuracy})()
    object.__setattr__(result, "curve", (epoch,))
    return Outcome(job=job, result=result)


def test_a_direction_holds_beyond_its_margin_and_error() -> None:
    clear = [outcome("clean", "erm", 0.6), *(outcome("cuda", "erm", 0.3 + d, str(d)) for d in (0, 0.02))]
    record = measured(CLAIM, clear, SETTING)
    first, second = record["expects"]
    assert first["holds"] is True
    assert first["difference"] == pytest.approx(0.29)
    assert first["error"] == pytest.approx(0.01)
    assert (second["holds"], second["difference"]) == (None, None)
    close = [outcome("clean", "erm", 0.6), *(outcome("cuda", "erm", 0.5 + d, str(d)) for d in (-0.05, 0.05))]
    assert measured(CLAIM, close, SETTING)["expects"][0]["holds"] == "unclear"
    wrong = [outcome("clean", "erm", 0.6), outcome("cuda", "erm", 0.58)]
    assert measured(CLAIM, wrong, SETTING)["expects"][0]["holds"] is False
    single = [outcome("clean", "erm", 0.6), outcome("cuda", "erm", 0.46)]
    assert measured(CLAIM, single, SETTING)["expects"][0]["holds"] == "unclear"


def test_the_record_quotes_the_paper_beside_what_was_measured(tmp_path: Path) -> None:
    record = measured(CLAIM, [outcome("clean", "erm", 0.6), outcome("cuda", "erm", 0.3)], SETTING)
    by = {(cell["arm"], cell["attacker"]): cell for cell in record["cells"]}
    assert by["cuda", "erm"]["reported"]["test_accuracy"] == 0.1848
    assert by["cuda", "erm"]["measured"]["mean"] == 0.3
    assert by["cuda", "at-4"]["measured"] is None
    text = page([json.loads(save(record, tmp_path).read_text())])
    assert "| cuda | erm | 30.0 | 1, 1 | 18.48 |" in text
    assert "| cuda | at-4 | not measured |  | 44.40 |" in text
    assert "| cuda under erm lies below clean under erm by 10.0 points or more | 30.0 | yes |" in text
    assert [path.name for path in tmp_path.iterdir()] == ["x-small.json"]


def test_nothing_measured_is_an_error() -> None:
    with pytest.raises(ValueError, match="none of"):
        measured(CLAIM, [outcome("lsp", "erm", 0.3)], SETTING)


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=CLAIMS)
def test_every_claim_can_be_measured_and_its_directions_are_the_papers(claim: Claim) -> None:
    known = {one.name for one in suite("full").attackers}
    assert known.issuperset(claim.attackers)
    assert {"cuda", *load_script("compare").POISONS}.issuperset(claim.poisons)
    for below in claim.expects:
        low, high = (reported("cifar10", *pair) for pair in (below.lower, below.higher))
        assert low is not None
        assert high is not None
        assert high["test_accuracy"] - low["test_accuracy"] > below.margin, below.words()


def test_the_script_lists_refuses_and_names_the_claims(capsys: pytest.CaptureFixture[str]) -> None:
    script = load_script("reproduce")
    assert script.main(["--list"]) == 0
    assert "mmm-table-3" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        script.main(["no-such-claim", "--dataset", "demo", "--output", "x"])
    assert "there is no claim 'no-such-claim'" in capsys.readouterr().err
