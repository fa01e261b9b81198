"""scripts/compare.py: what it hands over to the evaluation."""

from pathlib import Path

import pytest

from tests.conftest import load_script


def test_a_poison_without_a_key_is_evaluated_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script, called = load_script("compare"), []
    monkeypatch.setattr(script.subprocess, "call", lambda command: called.append(command) or 0)
    given = ["--dataset", "demo", "--poisons", "ops", "lsp", "--rows", "200", "--seeds", "0", "1"]
    assert script.main([*given, "--output", str(tmp_path), "--", "--attackers", "erm"]) == 0
    (command,) = called
    start = command.index("--protected") + 1
    names = [f"ops={tmp_path}/protected/ops-0", *(f"lsp={tmp_path}/protected/lsp-{seed}" for seed in (0, 1))]
    assert command[start : start + 4] == [*names, "--clean"]
    assert "ops, seed 1: the very pictures of ops under an earlier seed" in capsys.readouterr().out
