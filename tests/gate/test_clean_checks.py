"""Beside the clean rows: the source and the budget."""

import io
from pathlib import Path

import numpy as np
import PIL.Image
from datasets import ClassLabel, concatenate_datasets

from hf_unlearnable import LspPoison, RandomNoisePoison
from hf_unlearnable.gate.checks import inspect
from hf_unlearnable.protect import protect
from tests.conftest import make_dataset, noise_pictures
from tests.gate.folders import SECRET, Rows, array_of, checks, edit, only, png, put, rewrite, set_picture, sign, source

# The source.


def test_rows_that_were_left_out(cuda: Path) -> None:
    """As sharded runs may skip unreadable rows."""
    extra = make_dataset(noise_pictures(2, seed=9), [3, 3])
    more = concatenate_datasets([source().select(range(5)), extra, source().select(range(5, 24))])
    assert "source: expected the 24 clean rows of me/small (train), got 26" in only(cuda, clean=more)
    put(cuda, "source.left_out", [{"row": 5, "reason": "unreadable"}, {"row": 6, "reason": "unreadable"}])
    for clean in (None, source(), more):
        assert inspect(cuda, clean=clean, progress=False) == []
    put(cuda, "source.left_out", [{"row": 5, "reason": "unreadable"}, {"row": 7, "reason": "unreadable"}])
    assert "the clean rows are not those of the record" in only(cuda, clean=more)
    put(cuda, "source.left_out", [5])
    assert "source.left_out: expected a list of rows and reasons" in only(cuda)


def test_another_clean_set_is_told_once(cuda: Path) -> None:
    other = make_dataset(noise_pictures(24, seed=5), [i % 4 for i in range(24)])
    for clean in (other, source().select([1, 0, *range(2, 24)])):
        told = only(cuda, clean=clean)
        assert told.startswith("source: the clean rows are not those of the record")
        assert "'train' of me/small in its order. Nothing was compared" in told
    assert "expected the 24 clean rows of me/small (train), got 20" in only(cuda, clean=source(20))
    assert "in the column 'img', got the columns ['image'" in only(cuda, clean=source().rename_column("img", "image"))
    assert "expected the columns of the clean rows, ['img', 'label']" in only(
        cuda, clean=source().remove_columns("name")
    )
    names = source().cast_column("label", ClassLabel(names=["class0", "class1", "class3", "class2"]))
    assert "column 'label': expected ClassLabel" in only(cuda, clean=names)


def test_labels_and_other_columns_that_differ(cuda: Path) -> None:
    def change(rows: Rows) -> None:
        rows[4]["label"], rows[5]["label"] = rows[5]["label"], rows[4]["label"]
        rows[9]["name"] = None

    rewrite(cuda, change, others=False)
    assert only(cuda) == "source: labels or other columns are not those of the record (columns_sha256)"
    found = [str(f) for f in inspect(cuda, clean=source(), progress=False)]
    assert found == [
        "source: rows 4, 5: column 'label' differs from the clean rows",
        "source: row 9: column 'name' differs from the clean rows",
    ]
    sign(cuda)
    assert inspect(cuda, progress=False) == []
    assert [str(f) for f in inspect(cuda, clean=source(), progress=False)] == found


def test_another_order_than_the_source(cuda: Path) -> None:
    rewrite(cuda, lambda rows: rows.__setitem__(slice(4, 6), rows[5:3:-1]), others=False)
    assert checks(cuda) == ["source"]
    assert "rows 4, 5: column 'label' differs" in str(inspect(cuda, clean=source(), progress=False)[0])


def test_an_older_record_without_a_digest_of_the_columns(cuda: Path) -> None:
    edit(cuda, lambda values: values["source"].pop("columns_sha256"))
    assert only(cuda).startswith("columns-digest: the record has no digest of the other columns")
    assert inspect(cuda, accept=("columns-digest",), progress=False) == []


def test_size_and_transparency_that_differ(cuda: Path) -> None:
    array = array_of(cuda, 2)
    rewrite(cuda, set_picture(2, png(np.ascontiguousarray(array[:30]))))
    told = "source: row 2: a picture of another size than the clean one ((30, 32) in place of (32, 32))"
    assert only(cuda, clean=source()) == told
    buffer = io.BytesIO()
    PIL.Image.fromarray(np.dstack([array, np.full((32, 32), 9, np.uint8)])).save(buffer, "PNG")
    rewrite(cuda, set_picture(2, buffer.getvalue()))
    assert only(cuda, clean=source()) == "source: row 2: other transparency than in the clean picture"


# The budget.


def test_one_level_over_the_budget(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "one"
    protect(source(), RandomNoisePoison(seed=SECRET), folder, source="me/small", progress=False)
    clean = np.asarray(source()[13]["img"]).astype(int)
    clean[0, 0, 0] += 9 if clean[0, 0, 0] < 128 else -9
    rewrite(folder, set_picture(13, png(clean.astype(np.uint8))))
    assert inspect(folder, progress=False) == []
    told = "budget: row 13: over the budget of the record (linf 9/255 in place of 8/255)"
    assert only(folder, clean=source()) == told


def test_a_record_over_its_own_budget(whole: Path) -> None:
    put(whole, "pixels.linf_levels.largest", 9.0)
    assert "by the record the largest linf_levels is 9, over its own Budget" in only(whole)
    assert only(whole, clean=source()).startswith("measures: the record says linf_levels largest 9, beside the clean")


def test_budgets_that_the_settings_do_not_promise(whole: Path) -> None:
    put(whole, "pixels.budgets", [])
    told = "by its settings 'random-noise' keeps linf 8/255 (24 rows), the record tells of "
    assert f"{told}none" in only(whole)
    put(whole, "pixels.budgets", [{"norm": "linf", "epsilon": 16 / 255, "kept_by_rows": 24}])
    assert f"{told}linf 16/255 (24 rows)" in only(whole)
    put(whole, "method", "of-tomorrow")
    put(whole, "pixels.budgets", [])
    assert "the settings have a bound (epsilon), and the record no budget" in only(whole)


def test_a_budget_that_follows_from_the_size_of_a_picture(tmp_path: Path) -> None:
    clean = make_dataset([*noise_pictures(2, 40, 52), *noise_pictures(2, 20, 24)], [0, 1, 2, 3])
    folder = tmp_path / "out"
    protect(clean, LspPoison(seed=SECRET, l2_radius=1.5), folder, source="small", progress=False)
    assert inspect(folder, progress=False) == []
    put(folder, "settings.l2_radius", None)
    assert "'lsp' keeps l2 0.892878 (2 rows), l2 1.85867 (2 rows), the record tells of l2 1.5 (4 rows)" in only(folder)


def test_l2_budgets_that_depend_on_the_size(tmp_path: Path) -> None:
    large, little = noise_pictures(3, 40, 52), noise_pictures(3, 20, 24)
    clean = make_dataset([*large, *little], [0, 1, 2, 3, 0, 1])
    record = protect(clean, LspPoison(seed=SECRET), tmp_path / "out", source="small", progress=False)
    wide, narrow = sorted((said["epsilon"] for said in record.pixels["budgets"]), reverse=True)
    array = np.asarray(clean[4]["img"]).astype(int)
    rough = np.where(array < 128, array + 8, array - 8)
    assert narrow + 0.5 / 255 * rough.size**0.5 < 8 / 255 * rough.size**0.5 < wide
    rewrite(tmp_path / "out", set_picture(4, png(rough.astype(np.uint8))))
    assert "the changes of 1 rows are larger than the budgets" in only(tmp_path / "out", clean=clean)
    rough = np.where(array < 128, array + 40, array - 40)
    rewrite(tmp_path / "out", set_picture(4, png(rough.astype(np.uint8))))
    assert "budget: row 4: over the budget of the record (l2 " in only(tmp_path / "out", clean=clean)
