"""The gate as a whole: what passes it, and how its findings are told."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from datasets import Value

from hf_unlearnable import CudaPoison, LspPoison, RandomNoisePoison
from hf_unlearnable.gate.checks import ACCEPTABLE, CHECKS, Refused, check, inspect
from hf_unlearnable.protect import protect
from hf_unlearnable.record import Record
from tests.conftest import make_dataset, noise_pictures
from tests.gate.folders import SECRET, png, put, rewrite, set_picture, source
from tests.gate.test_containers import saved

# What passes.


@pytest.mark.parametrize("name", ["cuda", "noise", "whole"])
@pytest.mark.parametrize("batch_size", [5, 500])
def test_what_protect_wrote_passes(originals: Path, name: str, batch_size: int) -> None:
    folder = originals / name
    for clean in (None, source()):
        assert inspect(folder, clean=clean, progress=False, batch_size=batch_size) == []
    assert check(folder, clean=source(), progress=False) == Record.load(folder / "record.json")


@pytest.mark.parametrize("image_format", ["png", "webp"])
def test_modes_sizes_and_formats_pass(tmp_path: Path, image_format: Any) -> None:
    rgb = PIL.Image.fromarray(noise_pictures(1, 40, 52)[0])
    rgba = rgb.copy()
    rgba.putalpha(120)
    jpeg = PIL.Image.open(io.BytesIO(saved("JPEG")))
    mixed = make_dataset(
        [rgb, rgb.convert("L"), rgba, rgb.resize((33, 20)), rgb.convert("P"), jpeg], [0, 1, 2, 3, 0, 1]
    )
    for poison in (
        CudaPoison(seed=SECRET, image_format=image_format),
        RandomNoisePoison(seed=SECRET, image_format=image_format),
        LspPoison(seed=SECRET, image_format=image_format),
    ):
        folder = tmp_path / poison.name
        record = protect(mixed, poison, folder, source="mixed", progress=False)
        if poison.name == "lsp":
            assert len(record.pixels["budgets"]) == 3
        for clean in (None, mixed):
            assert inspect(folder, clean=clean, progress=False) == []


def test_other_columns_of_many_types_pass(tmp_path: Path) -> None:
    small = source(8)
    table = small.add_column("score", [float("nan"), *range(7)]).add_column("tags", [["a", None]] * 8)
    table = table.add_column("box", [{"x": 1, "y": [2]}] * 8).add_column("raw", [b"\x00\xff"] * 8)
    table = table.add_column("url", ["https://example.org/home/cat?file=/tmp"] * 8)
    protect(table, CudaPoison(seed=SECRET), tmp_path / "out", source="many", progress=False)
    for clean in (None, table):
        assert inspect(tmp_path / "out", clean=clean, progress=False) == []


def test_without_labels_and_with_bare_integers(tmp_path: Path) -> None:
    plain = source(8).cast_column("label", Value("int64"))
    for name, data in (("bare", plain), ("none", plain.remove_columns("label"))):
        protect(data, RandomNoisePoison(seed=SECRET), tmp_path / name, source="small", progress=False)
        assert inspect(tmp_path / name, clean=data, progress=False) == []


def test_evaluation_files_and_pictures_may_lie_beside(cuda: Path) -> None:
    for name, data in (("results/default/table.csv", b"a,b\n1,2\n"), ("results/summary.md", b"# ok\n")):
        (cuda / name).parent.mkdir(parents=True, exist_ok=True)
        (cuda / name).write_bytes(data)
    (cuda / "results" / "default" / "cuda.json").write_text(json.dumps({"accuracy": 0.5, "where": "eval/demo"}))
    (cuda / "assets").mkdir()
    shutil.copy(cuda / "preview.png", cuda / "assets" / "heat-map.png")
    assert inspect(cuda, clean=source(), progress=False) == []


def test_the_checks_are_named_once_with_one_line_each() -> None:
    names = [known.name for known in CHECKS]
    assert len(set(names)) == len(names)
    assert all(known.meaning and "\n" not in known.meaning for known in CHECKS)
    assert set(ACCEPTABLE) == {"columns-digest", "blank", "unchanged", "paths"}


# Arguments.


def test_what_cannot_be_accepted(cuda: Path) -> None:
    for accept in (["budget"], ["blanks"], "blank"):
        with pytest.raises(
            ValueError, match="accept takes a collection of columns-digest, blank, unchanged, paths, got"
        ):
            inspect(cuda, accept=accept)
    with pytest.raises(ValueError, match="batch size of 1 or more"):
        inspect(cuda, batch_size=0)


def test_a_refusal_holds_all_findings_in_order(cuda: Path) -> None:
    put(cuda, "key.commitment", None)
    (cuda / "state.json").write_text("{}")
    rewrite(cuda, set_picture(5, png(np.zeros((32, 32, 3), dtype=np.uint8))), pixels=False)
    with pytest.raises(Refused) as refused:
        check(cuda, clean=source(), progress=False)
    assert [f.check for f in refused.value.findings] == ["key", "files", "pictures", "blank"]
    assert str(refused.value).count("\n- ") == 4
    assert not list(cuda.glob("**/*.lock"))
