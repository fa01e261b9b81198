"""Diagnosis: the pictures that victims are shown, figures that are not done twice, and what is said of them."""

import copy
import itertools
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from datasets import DatasetDict

from hf_unlearnable import LspPoison, OpsPoison
from hf_unlearnable.batches import Batches
from hf_unlearnable.evaluation import diagnosis as room
from hf_unlearnable.evaluation.arms import Rows
from hf_unlearnable.evaluation.diagnosis import QUICK, Diagnosis, Setting, donors
from hf_unlearnable.evaluation.diagnosis_pages import PAGES, headlines, summary
from hf_unlearnable.networks import create_network
from hf_unlearnable.protect import protect
from tests.conftest import load_script, make_dataset, noise_pictures
from tests.evaluation.test_findings import result

pytestmark = [
    pytest.mark.usefixtures("fresh_state"),
    pytest.mark.filterwarnings("ignore:the search for the last layer diverged"),  # of one epoch, on some processors
]

SETTING = Setting(
    detector_epochs=1, sample_epochs=(1,), dfr_rows=50, recovery_epochs=1, draws=60, certificate_rows=20, hidden=1
)
ALL = tuple(PAGES)


@pytest.fixture(scope="session")
def rows(shapes: DatasetDict) -> Rows:
    return Rows(shapes["train"], shapes["test"], rows=100, validation_rows=100, progress=False)


def diagnosis(rows: Rows, folder: Path, output: Path, **changes: Any) -> Diagnosis:
    AcceleratorState._reset_state(reset_partial_state=True)
    how: dict[str, Any] = {"setting": SETTING, "accelerator": Accelerator(cpu=True), "progress": False, **changes}
    return Diagnosis(rows, folder, output=output, **how)


@pytest.fixture(scope="session")
def whole(rows: Rows, protected_once: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of them, in one call."""
    output = tmp_path_factory.mktemp("diagnosis") / "whole"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    diagnosis(rows, protected_once[0], output, other=protected_once[1]).run(ALL)
    torch.set_num_threads(threads)
    return output


def read(output: Path) -> dict[str, Any]:
    return json.loads((output / "diagnosis.json").read_text())


def figures(output: Path) -> dict[str, Any]:
    return {name: entry.get("figures") for name, entry in read(output)["diagnostics"].items()}


def shares(value: Any) -> Iterator[float]:
    for name, inner in value.items():
        if isinstance(inner, dict):
            yield from shares(inner)
        elif "accuracy" in name or name in ("auc", "own", "same_class", "next_class", "none", "refitted"):
            yield inner


def test_everything_is_measured_beside_the_clean_rows_and_told(whole: Path) -> None:
    found, text = figures(whole), (whole / "summary.md").read_text()
    assert list(found) == list(ALL)
    assert set(found["separability"]) == {"linear", "tanh"}
    linear = found["separability"]["linear"]
    assert linear["delta_held_out_accuracy"] == 1.0  # LSP
    assert (linear["train_rows"], linear["held_out_rows"]) == (80, 20)
    assert f"{100 * linear['clean_held_out_accuracy']:.1f} %" in text
    for kind in ("linear", "two_layer", "bias_shift"):
        assert {name: score["threshold"] for name, score in found["detector"][kind].items()} == {
            "published": 0.7,
            "clean": 0.7,
        }
    for name in ("shortcuts", "dfr", "recovery", "certificate"):
        assert {"published", "clean"} <= set(found[name]), name
    assert found["supervised"]["pairs"] == [50, 50]
    assert len(found["certificate"]["published"]["bounds"]) == len(room.ETAS)
    points = found["recovery"]["published"]["points"]
    assert [point["radius"] for point in points] == [0.2, 0.5, 1.0, 2.0, None]
    assert all(point["radius"] is None or point["moved"] <= point["radius"] * 1.001 for point in points)
    assert "the paper trains for 60" in text
    assert all(0 <= share <= 1 for share in shares(found))
    assert sum(1 for _ in shares(found)) > 20
    for title, _ in PAGES.values():
        assert f"## {title}" in text
    assert "Nothing here is a promise" in text
    assert "1 epoch; the paper trains for 100" in text
    assert "nan" not in text
    assert not list(whole.glob(".*")), "no partial file is left"
    assert len(headlines(read(whole))) == len(ALL)


def test_what_is_finished_is_not_done_again(
    whole: Path, rows: Rows, protected_once: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (whole / "diagnosis.json").read_text()
    (whole / "summary.md").write_text("stale")
    for name in (
        "train_to_end",
        "linear_separability",
        "simple_network_score",
        "sample_auc",
        "supervised_auc",
        "certify",
    ):
        monkeypatch.setattr(room, name, lambda *a, **k: pytest.fail("done again"))
    diagnosis(rows, protected_once[0], whole).run((*ALL, "detector"))
    assert (whole / "diagnosis.json").read_text() == before
    assert (whole / "summary.md").read_text().startswith("# Diagnosis of demo, protected with lsp")


@pytest.mark.parametrize(
    ("changes", "name", "told"),
    [
        ({"hidden": 2}, "separability", "separability was done with another setting: hidden was 1 and would be 2"),
        ({"detector_epochs": 5}, "detector", "detector_epochs was 1 and would be 5"),
        ({"sample_epochs": (1, 2)}, "samples", r"sample_epochs was \[1\] and would be \[1, 2\]"),
        ({"dfr_rows": 49}, "dfr", "dfr_rows was 50 and would be 49"),
        ({"draws": 61}, "certificate", "draws was 60 and would be 61"),
    ],
)
def test_other_settings_of_a_finished_one_are_refused_before_anything_is_done(
    whole: Path, rows: Rows, protected_once: list[Path], changes: dict[str, Any], name: Any, told: str
) -> None:
    other = room.dataclasses.replace(SETTING, **changes)
    one = diagnosis(rows, protected_once[0], whole, setting=other)
    with pytest.raises(ValueError, match=told):
        one.run(("shortcuts", name))
    assert one.run(("shortcuts",)) == read(whole), "what does not depend on it stands"


def test_an_output_of_other_rows_or_seed_or_of_no_diagnosis_is_refused(
    whole: Path, rows: Rows, protected_once: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="seed was 0 and would be 1"):
        diagnosis(rows, protected_once[0], whole, setting=room.dataclasses.replace(SETTING, seed=1))
    with pytest.raises(ValueError, match="published_digest was"):
        diagnosis(rows, protected_once[1], whole)
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds no diagnosis"):
        diagnosis(rows, protected_once[0], tmp_path)
    for text, told in (("{", "expected a diagnosis"), ('{"schema": 99, "setting": 1, "diagnostics": 1}', "got 99")):
        (tmp_path / "diagnosis.json").write_text(text)
        with pytest.raises(ValueError, match=told):
            diagnosis(rows, protected_once[0], tmp_path)


def test_a_stopped_run_keeps_what_is_finished_and_ends_as_if_it_had_not_been_stopped(
    whole: Path, rows: Rows, protected_once: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    what, output = ("samples", "separability", "supervised"), tmp_path / "out"

    def stop(*args: Any, **how: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(room, "linear_separability", stop)
        with pytest.raises(KeyboardInterrupt):
            diagnosis(rows, protected_once[0], output).run(what)
    assert list(figures(output)) == ["samples"]
    assert (output / "summary.md").read_text().count("\n## ") == 1
    monkeypatch.setattr(room, "sample_auc", stop)
    diagnosis(rows, protected_once[0], output).run(what)
    assert figures(output)["supervised"] is None
    assert "Skipped: it needs a second dataset under another key" in (output / "summary.md").read_text()
    diagnosis(rows, protected_once[0], output, other=protected_once[1]).run(what)
    assert figures(output) == {name: figures(whole)[name] for name in what}
    assert "Skipped" not in (output / "summary.md").read_text()


def test_a_figure_that_json_cannot_hold_leaves_the_file_as_it_was(
    rows: Rows, protected_once: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = diagnosis(rows, protected_once[0], tmp_path / "out")
    before = (tmp_path / "out" / "diagnosis.json").read_text()
    monkeypatch.setattr(one, "samples", lambda: {"points": [], "chance_deviation": float("nan")})
    with pytest.raises(ValueError, match="JSON"):
        one.run(("samples",))
    assert (tmp_path / "out" / "diagnosis.json").read_text() == before


def test_the_other_dataset_is_of_the_same_rows_and_method_and_of_another_key(
    rows: Rows, shapes: DatasetDict, protected_once: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="hold the same pictures"):
        diagnosis(rows, protected_once[0], tmp_path / "out", other=protected_once[0])
    poison = OpsPoison.fit(shapes["train"], seed=0)
    protect(shapes["train"], poison, tmp_path / "ops", source="demo", progress=False)
    with pytest.raises(ValueError, match="rows protected by 'lsp', got 'ops'"):
        diagnosis(rows, protected_once[0], tmp_path / "out", other=tmp_path / "ops")
    assert not (tmp_path / "out").exists()


def test_victims_are_shown_the_pictures_that_the_table_names(
    rows: Rows, protected_once: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = diagnosis(rows, protected_once[0], tmp_path / "out")
    trained: list[Batches] = []
    shown: list[Batches] = []

    def train(network: Any, training: Batches, *args: Any, **how: Any) -> Any:
        trained.append(training)
        return result([0.5], [0.5], 0.5)

    def accuracy(model: Any, split: Batches) -> float:
        shown.append(split)
        return 0.5

    monkeypatch.setattr(room, "train_to_end", train)
    monkeypatch.setattr(one, "_accuracy", accuracy)
    found = one.shortcuts()
    assert (found["train_rows"], found["held_out_rows"]) == (80, 20)
    published, clean = one.published, one.clean
    own, same, following, none, as_delta = shown[:5]
    index = [int((clean.pixels == plane).flatten(1).all(1).nonzero()[0]) for plane in none.pixels]
    assert torch.equal(own.pixels, published.pixels[index])
    for training, source, held in ((trained[0], published, own), (trained[1], clean, none)):
        given, every, apart = (set(map(bytes, split.pixels.flatten(1).numpy())) for split in (training, source, held))
        assert given == every - apart
    assert [len(split) for split in trained] == [80, 80]
    delta = (published.pixels.int() - clean.pixels.int())[index]
    labels = none.labels.tolist()
    for split, ahead in ((same, 0), (following, 1)):
        for row, label in enumerate(labels):
            makes = [
                torch.equal((none.pixels[row].int() + delta[j]).clamp(0, 255), split.pixels[row].int())
                for j in range(len(labels))
                if j != row and labels[j] == (label + ahead) % 10
            ]
            assert any(makes)
    assert own.labels.tolist() == same.labels.tolist() == following.labels.tolist() == labels
    assert torch.equal(as_delta.pixels, following.pixels)
    assert as_delta.labels.tolist() == [(label + 1) % 10 for label in labels]


def test_a_victim_is_trained_once(rows: Rows, protected_once: list[Path], tmp_path: Path) -> None:
    one = diagnosis(rows, protected_once[0], tmp_path / "out")
    network, first = one._victim("published")
    again, second = one._victim("published")
    assert first == second, "its seconds too"
    fresh = create_network("tiny", num_classes=10, image_size=32, seed=0).state_dict()
    there, here = network.state_dict(), again.state_dict()
    assert all(torch.equal(there[name], here[name]) for name in fresh)
    assert not all(torch.equal(there[name], fresh[name]) for name in fresh)


@pytest.mark.parametrize("seed", range(3))
def test_donors_are_other_rows_of_the_class_that_was_asked_for(seed: int) -> None:
    labels = torch.tensor([5, 0, 2, 2, 0, 5, 2, 5, 0, 5, 5])
    after = {0: 2, 2: 5, 5: 0}
    same, following = (donors(labels, ahead=ahead, seed=seed) for ahead in (0, 1))
    assert sorted(same.tolist()) == list(range(len(labels)))
    assert all(int(j) != i for i, j in enumerate(same))
    assert torch.equal(labels[same], labels)
    assert [after[int(label)] for label in labels] == labels[following].tolist()
    assert set(labels[following].tolist()) == {0, 2, 5}
    assert torch.equal(same, donors(labels, ahead=0, seed=seed))
    assert not torch.equal(following, donors(labels, ahead=1, seed=seed + 1))


@pytest.mark.parametrize("labels", [[0, 0, 0], [0, 0, 1], [3]])
def test_too_few_rows_to_swap(labels: list[int]) -> None:
    with pytest.raises(ValueError, match="two rows of each"):
        donors(torch.tensor(labels), ahead=0, seed=0)


def test_chance_deviation_against_all_orders() -> None:
    n, m = 3, 4
    areas = []
    for places in itertools.combinations(range(n + m), n):
        wrong = [j for j in range(n + m) if j not in places]
        areas.append(sum(i > j for i in places for j in wrong) / (n * m))
    truth = torch.tensor([True] * n + [False] * m)
    assert room._chance_deviation(truth) == pytest.approx(statistics.pstdev(areas))


@pytest.mark.parametrize(("size", "shrunk"), [((64, 48), (43, 32)), ((24, 40), (24, 40)), ((32, 32), (32, 32))])
def test_the_detector_is_shown_small_pictures(size: tuple[int, int], shrunk: tuple[int, int]) -> None:
    pixels = torch.randint(0, 256, (3, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    split = Batches(pixels=pixels, labels=torch.zeros(3, dtype=torch.int64), classes=("a", "b"))
    found = room._shrunk(split)
    assert abs(found.image_size[0] - shrunk[0]) <= 1
    assert found.image_size[1] == shrunk[1]
    assert torch.equal(found.pixels, pixels) == (size == shrunk)


@pytest.mark.parametrize(
    ("published", "clean", "told"),
    [
        (0.71, 0.7, "called poisoned, the clean rows are not"),
        (0.71, 0.71, "the verdict says nothing"),
        (0.3, 0.9, "the verdict says nothing"),
        (0.7, 0.3, "70.0 %: not called poisoned"),
    ],
)
def test_the_verdict_is_told_beside_that_on_clean_rows(whole: Path, published: float, clean: float, told: str) -> None:
    values = read(whole)
    score = values["diagnostics"]["detector"]["figures"]["two_layer"]
    score["published"]["validation_accuracy"], score["clean"]["validation_accuracy"] = published, clean
    line = next(line for line in headlines(values) if line.startswith("detector: "))
    assert told in line
    assert f"{100 * published:.1f} %" in line
    assert f"{100 * clean:.1f} %" in line


def test_what_is_not_shown_is_not_claimed(whole: Path) -> None:
    values = copy.deepcopy(read(whole))
    made = values["diagnostics"]["dfr"]["figures"]["published"]
    for learnt, told in ((0.125, "+12.5 points more than the better"), (-0.1, "not more than the better")):
        made["learnt"] = learnt
        assert told in summary(values)
    made["random_trunk_step"] = 0.25
    told = "0.5 (victim of published rows), 0.25 (untrained network) and 0.5 (victim of clean rows)"
    assert f"with steps of {told}" in summary(values)
    del made["refitted_step"], made["random_trunk_step"]  # as earlier versions wrote it
    assert "with steps of" not in summary(values)
    certificate = values["diagnostics"]["certificate"]["figures"]
    assert "For any one set of weights within L2 distance 0.01" in summary(values)
    assert "| 0.3 | abstains | abstains |" in summary(values)  # 60 draws
    for name in ("published", "clean"):
        for bound in certificate[name]["bounds"]:
            bound["accuracy"] = None
    assert "Nothing is certified: 60 draws are too few." in summary(values)


@pytest.mark.parametrize(
    "changes", [{"draws": 0}, {"sample_epochs": ()}, {"sample_epochs": (1, 0)}, {"sigma": 0.0}, {"hidden": -1}]
)
def test_settings_outside_their_range(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        Setting(**changes)
    with pytest.raises(ValueError, match="no recipe is named"):
        Setting(recipe="tinny")


def test_more_clean_rows_than_there_are(rows: Rows, protected_once: list[Path], tmp_path: Path) -> None:
    one = diagnosis(rows, protected_once[0], tmp_path / "out", setting=Setting(dfr_rows=101))
    with pytest.raises(ValueError, match="at most the 100 validation rows, got 101"):
        one.run(("dfr",))


def test_the_command(
    shapes: DatasetDict, protected_once: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    shapes.save_to_disk(tmp_path / "clean")
    capsys.readouterr()
    script, output = load_script("diagnose"), tmp_path / "out"
    given = ["--protected", str(protected_once[0]), "--clean", str(tmp_path / "clean"), "--output", str(output)]
    given += ["--validation-rows", "60", "--rows", "100", "--cpu", "--no-progress", "--what", "separability"]
    assert script.main([*given, "supervised"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("separability: From the perturbation alone a linear reader names the class of 100.0 %")
    assert "supervised: skipped" in out
    assert out.endswith("summary.md\n")
    values = read(output)
    assert values["setting"]["published_rows"] == 100
    assert "tanh" not in values["diagnostics"]["separability"]["figures"]
    assert script.main([*given, "--hidden", "1"]) == 1
    assert "hidden was 0 and would be 1" in capsys.readouterr().err
    assert read(output) == values
    assert script.parse(given[:6]).what == QUICK
    for wrong in (["--what", "everything"], ["--sed", "1"]):
        with pytest.raises(SystemExit, match="2"):
            script.main([*given[:6], *wrong])


def test_pictures_of_mixed_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    sizes = [(40, 56), (33, 33), (64, 40)]
    pictures = [noise_pictures(1, *sizes[i % 3], seed=i)[0] for i in range(240)]
    splits = {
        name: make_dataset(pictures[part], [i % 2 for i in range(120)], classes=2)
        for name, part in (("train", slice(0, 120)), ("test", slice(120, 240)))
    }
    DatasetDict(splits).save_to_disk(tmp_path / "clean")
    protect(splits["train"], LspPoison(seed=0), tmp_path / "lsp", source="any", split="train", progress=False)
    capsys.readouterr()
    script, output = load_script("diagnose"), tmp_path / "out"
    given = ["--protected", str(tmp_path / "lsp"), "--clean", str(tmp_path / "clean"), "--output", str(output)]
    given += ["--validation-rows", "60", "--cpu", "--no-progress", "--what", "separability"]
    assert script.main(given) == 1
    assert "size" in capsys.readouterr().err
    assert script.main([*given, "--image-size", "24"]) == 0
    assert read(output)["setting"]["image_size"] == [24, 24]
    assert script.main([*given, "--image-size", "32"]) == 1
    assert "image_size was [24, 24] and would be [32, 32]" in capsys.readouterr().err


def test_ctrl_c_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    script = load_script("diagnose")

    def stop(arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "run", stop)
    assert script.main(["--protected", "a", "--clean", "b", "--output", "c"]) == 130
    assert "the same command goes on" in capsys.readouterr().out
