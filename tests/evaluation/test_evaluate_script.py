"""scripts/evaluate.py, as it is typed: goes on where it was stopped, refuses what does not fit, tells what failed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from hf_unlearnable.record import Record
from tests.conftest import ROOT, load_script

pytestmark = pytest.mark.usefixtures("fresh_state")


def command(place: Path, *more: str, protected: str | None = None) -> list[str]:
    known = {"--protected": protected or str(place / "lsp"), "--clean": str(place / "shapes"), "--anchor": "0.01"}
    flags = [word for pair in known.items() for word in pair]
    flags += ["--attackers", "grayscale", "--seeds", "0", "--output", str(place / "eval"), "--no-progress", "--cpu"]
    return [*flags, *more]


def call(place: Path, *more: str, **how: str) -> int:
    code = load_script("evaluate").main(command(place, *more, **how))
    AcceleratorState._reset_state(reset_partial_state=True)
    return code


def test_it_stops_in_time_goes_on_reports_and_tells_the_record(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(place, "--max-minutes", "0") == 75
    assert "6 of 6 trainings are not done" in capsys.readouterr().out
    assert call(place) == 0
    said = capsys.readouterr().out
    assert ", erm, seed 0: " in said
    assert ", grayscale, seed 0: " in said
    assert "lsp: " in said
    assert len(list((place / "eval" / "jobs").rglob("*.json"))) == 6
    assert (place / "eval" / "heat-map.png").exists()
    (found,) = Record.load(place / "lsp" / "record.json").results
    assert found["setting"]["train_rows"] == 160
    before = {path: path.stat().st_mtime_ns for path in (place / "eval" / "jobs").rglob("*.json")}
    assert call(place, "--report-only", "--no-note") == 0
    assert before == {path: path.stat().st_mtime_ns for path in (place / "eval" / "jobs").rglob("*.json")}
    assert call(place, "--rows", "80") == 1
    assert "holds an evaluation with {'rows': 10000}" in capsys.readouterr().err


def test_a_failed_training_costs_no_other_and_can_be_tried_again(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(place, "--no-anchors") == 0
    (job,) = (place / "eval" / "jobs").rglob("grayscale*.json")
    values = json.loads(job.read_text())
    job.write_text(json.dumps({**values, "result": None, "failed": "ValueError: it did not work"}))
    assert call(place, "--no-anchors") == 1
    said = capsys.readouterr().out
    assert "failed: lsp, grayscale: ValueError: it did not work" in said
    assert "refused: plain training on the clean rows is not measured" in said
    assert call(place, "--no-anchors", "--retry-failed") == 0
    assert json.loads(job.read_text())["result"] is not None


def test_bad_requests(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        call(place, "--attackers", "grayscal")
    assert "did you mean 'grayscale'" in capsys.readouterr().err
    assert call(place, protected=str(place / "nowhere")) == 1
    assert "with its record.json, got" in capsys.readouterr().err
    (place / "eval").mkdir()
    (place / "eval" / "thesis.txt").touch()
    assert call(place) == 1
    assert "holds no evaluation" in capsys.readouterr().err


def test_two_workers_divide_the_trainings(place: Path) -> None:
    script = [sys.executable, str(ROOT / "scripts" / "evaluate.py"), *command(place, "--workers", "2")]
    done = subprocess.run(script, capture_output=True, text=True, timeout=300, check=False, env={**os.environ})
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stdout.splitlines() if ", seed 0: " in line and " left, " in line]
    assert len(told) == 6
    assert "see " in done.stdout
