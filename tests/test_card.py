"""Cards: every figure from the record, the weakest first, nothing that was not measured."""

import json
from pathlib import Path
from typing import Any

import jinja2
import pytest
import yaml
from datasets import Dataset

from hf_unlearnable import CudaPoison, RandomNoisePoison, Surrogate, card
from hf_unlearnable.papers import PAPERS
from hf_unlearnable.poisons.names import POISONS
from hf_unlearnable.protect import protect
from hf_unlearnable.record import Record
from hf_unlearnable.reported import known

SECRET = bytes(range(32))


@pytest.fixture
def record(small: Dataset, tmp_path: Path) -> Record:
    return protect(small, CudaPoison(seed=SECRET), tmp_path / "out", source="somebody/cifar10", progress=False)


def spread(mean: float, error: float | None = None) -> dict[str, Any]:
    return {"mean": mean, "error": error, "poisons": 1, "trainings": 3, "least": mean, "most": mean}


def cell(arm: str, attacker: str, selected: float, reported: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "arm": arm,
        "attacker": attacker,
        "last": spread(selected - 0.01, 0.004),
        "selected": spread(selected, 0.005),
        "oracle": None,
        "validation": None,
        "train": None,
        "failed": [],
        "reported": reported,
    }


def evaluation(best: float, backbone: str = "tiny", **changes: Any) -> dict[str, Any]:
    paper = {"test_accuracy": 0.7853, "setting": "CIFAR-10, ResNet-18", "source": "RSK"}
    return {
        "setting": {
            "suite": "quick",
            "dataset": "cifar10",
            "train_rows": 10000,
            "validation_rows": 2000,
            "test_rows": 8000,
            "backbone": backbone,
            "recipe": "tiny",
            "epochs": "5 epochs",
            "seeds": [0, 1, 2],
            "hardware": ["a machine"],
        },
        "pixels_sha256": ["ab" * 32],
        "attacker": "rsk-ff",
        "learnability": spread(best, 0.012),
        "clean": 0.638,
        "chance": 0.1,
        "measured": ["erm", "rsk-ff"],
        "refused": [],
        "notes": [],
        "cells": [
            cell("clean", "erm", 0.638),
            cell("cuda", "erm", 0.266),
            cell("cuda", "rsk-ff", best, paper),
        ],
        **changes,
    }


def page(record: Record, **words: Any) -> str:
    return card.dataset_page(record, load='"me/x"', **words)


def tables(text: str) -> list[list[str]]:
    """Markdown tables as lists of lines."""
    found: list[list[str]] = []
    previous = ""
    for line in text.splitlines():
        if line.startswith("|"):
            if not previous.startswith("|"):
                found.append([])
            found[-1].append(line)
        previous = line
    return found


def test_unmeasured_is_told_first_and_nothing_is_claimed(record: Record) -> None:
    text = page(record)
    assert text.index("not measured") < text.index("## What this is")
    assert "still reaches" not in text
    assert "Licence of this version: not stated" in text


def test_the_weakest_result_stands_first_and_tables_are_well_formed(record: Record) -> None:
    record.results[:] = [evaluation(0.3, "strong"), evaluation(0.49)]
    text = page(record)
    first, second = text.index("still reaches 49.0 ± 1.2 %"), text.index("still reaches 30.0 ± 1.2 %")
    assert first < second < text.index("## What this is")
    assert "not measured." not in text.split("## What this is")[0]
    for table in tables(text):
        assert len({line.count("|") for line in table}) == 1, table
        assert set(table[1]) <= set("|-"), table
    matrix = next(table for table in tables(text) if "what the trainer does" in table[0] and "trainings" in table[0])
    assert matrix[2].startswith("| `rsk-ff` | 49.0 ± 0.5 | 48.0 ± 0.4 | 3 | 78.53 (RSK) |")
    assert matrix[3].startswith("| `erm` | 26.6")
    assert matrix[4].startswith("| *plain training on the clean pictures* | 63.8")


def test_a_refused_evaluation_stands_before_all_others(record: Record) -> None:
    record.results[:] = [evaluation(0.49), evaluation(0.2, refused=["the control lost too much"])]
    text = page(record)
    assert text.index("Nothing is claimed") < text.index("still reaches 49.0")


def test_what_is_not_in_the_record_is_an_error_not_a_blank(record: Record) -> None:
    del record.pixels["ssim_variant"]
    with pytest.raises(jinja2.UndefinedError, match="ssim_variant"):
        page(record)


def test_the_key_is_told_by_its_commitment_and_a_seed_with_a_warning(
    record: Record, small: Dataset, tmp_path: Path
) -> None:
    assert record.key["commitment"] in page(record)
    guessable = protect(small, CudaPoison(seed=77123), tmp_path / "b", source="x", progress=False)
    assert "**The key is an int seed: anyone can try all seeds" in page(guessable)
    assert "77123" not in page(guessable)


def test_front_matter_is_yaml_without_configs(record: Record) -> None:
    text = card.local_page(record)
    assert yaml.safe_load(text.split("---")[1]) == {"tags": ["hf_unlearnable"]}
    front = card.front_matter(record, license="cc0-1.0", pretty_name="A: b")
    assert front == {
        "license": "cc0-1.0",
        "pretty_name": "A: b",
        "task_categories": ["image-classification"],
        "size_categories": ["n<1K"],
        "tags": ["hf_unlearnable", "unlearnable-examples", "data-poisoning", "cuda"],
    }


def test_known_attacks_are_told_with_their_source_and_controls_have_none(
    record: Record, small: Dataset, tmp_path: Path
) -> None:
    assert "| rsk-ff | 78.53 | RSK |" in page(record)
    control = protect(small, RandomNoisePoison(seed=SECRET), tmp_path / "b", source="x", progress=False)
    text = page(control)
    assert "What is known to break" not in text
    assert "is a control" in text
    assert "The bound linf 0.03137 holds for 24 pictures." in text


def test_an_unfinished_page_says_so_before_anything_else(record: Record) -> None:
    text = page(record, unfinished=True)
    assert text.index("**Not finished.**") < text.index("not measured")
    assert "Not finished" not in page(record)


def test_every_method_has_a_paper_and_what_is_known_is_sorted() -> None:
    assert set(PAPERS) == set(POISONS) - {"random-noise"}
    for method, paper in PAPERS.items():
        entry = paper.bibtex(method)
        assert entry.count("{") == entry.count("}")
        values = [one["test_accuracy"] for one in known(method)]
        assert values == sorted(values, reverse=True)


def test_names_of_poisons_are_their_own() -> None:
    assert {name: found.name for name, found in POISONS.items()} == {name: name for name in POISONS}


def test_a_surrogates_card_tells_what_it_is_and_what_it_gives_away(tiny_surrogate: Surrogate) -> None:
    text = card.surrogate_page(tiny_surrogate, repo_id="me/s", class_name="PilPoison")
    assert tiny_surrogate.digest in text
    assert 'PilPoison.from_surrogate("me/s")' in text
    assert "Whoever has this file" in text
    private = card.surrogate_page(tiny_surrogate, repo_id="me/s", class_name="PilPoison", guessable=False)
    assert "Whoever has this file" not in private
    for table in tables(text):
        assert len({line.count("|") for line in table}) == 1, table


@pytest.fixture
def tiny_surrogate() -> Surrogate:
    import torch

    return Surrogate(
        method="pil",
        settings={"epsilon": 8 / 255},
        classes=("a", "b"),
        image_size=(8, 8),
        networks={},
        tensors={"weight": torch.zeros(2, 3)},
        provenance={"seed": 0, "data": {"source": "x", "rows": 10, "sha256": "0"}, "steps": 3},
    )


def test_records_survive_json_with_results(record: Record, tmp_path: Path) -> None:
    record.results[:] = [evaluation(0.49)]
    record.save(tmp_path / "record.json")
    assert page(Record.load(tmp_path / "record.json")) == page(record)
    assert json.loads((tmp_path / "record.json").read_text())["results"][0]["attacker"] == "rsk-ff"
