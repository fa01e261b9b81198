"""scripts/compare_surrogates.py: the curves of several trainings in one picture and one table."""

import json
from pathlib import Path

import PIL.Image
import pytest

from hf_unlearnable import MinMaxMinPoison
from hf_unlearnable.batches import Batches
from hf_unlearnable.recipes import changed
from tests.conftest import load_script, make_dataset, noise_pictures


@pytest.fixture(scope="module")
def surrogates(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("surrogates")
    rows = Batches.load(make_dataset(noise_pictures(16, 16, 16), [i % 4 for i in range(16)]), progress=False)
    made = []
    for dar in ("code", "none"):
        poison = MinMaxMinPoison(dar=dar, pgd_steps=1, eot=1, adversarial_steps=1)
        recipe = changed(poison.recipe, steps=3, batch_size=8)
        options = {"test": rows, "measure_every": 1} if dar == "code" else {}
        surrogate = poison.fit(rows, recipe=recipe, backbone="tiny", seed=712, progress=False, **options)
        made.append(surrogate.save(folder / f"dar-{dar}.safetensors"))
    return made


def test_curves_and_a_table(surrogates: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load_script("compare_surrogates").main([*map(str, surrogates), "--output", str(tmp_path / "figure")])
    page = capsys.readouterr().out
    assert page == (tmp_path / "figure" / "README.md").read_text()
    head, _, first, second = [line for line in page.splitlines() if line.startswith("|")]
    assert head.startswith("| surrogate | dar | backbone | rows | steps |")
    assert first.startswith("| dar-code | code | tiny | 16 | 3 |")
    assert second.endswith("| not measured |")
    told = json.loads((tmp_path / "figure" / "curves.json").read_text())
    accuracies = [point["clean accuracy"] for point in told["dar-code"]["curve"] if "clean accuracy" in point]
    assert len(accuracies) == 3
    assert f"| {accuracies[-1]:.3g} ({min(accuracies):.3g}, {max(accuracies):.3g}) |" in first
    assert "712" not in json.dumps(told)
    with PIL.Image.open(tmp_path / "figure" / "curves.png") as picture:
        assert picture.size[0] >= 1000


def test_bad_input(surrogates: list[Path], tmp_path: Path) -> None:
    main = load_script("compare_surrogates").main
    with pytest.raises(SystemExit, match="expected files of different names"):
        main([str(surrogates[0]), str(surrogates[0]), "--output", str(tmp_path / "figure")])
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    with pytest.raises(SystemExit, match=r"bad\.safetensors"):
        main([str(tmp_path / "bad.safetensors"), "--output", str(tmp_path / "figure")])
    assert not (tmp_path / "figure").exists()
