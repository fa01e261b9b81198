import numpy as np
import PIL.Image
import pyarrow as pa
import pytest
import torch
from datasets import ClassLabel, Features, Image, Value

from hf_unlearnable import columns

FINE = ClassLabel(names=["a", "b", "c"])


def test_the_one_picture_and_label_column() -> None:
    features = Features(photo=Image(), kind=FINE, id=Value("int64"))
    assert columns.image_column(features) == "photo"
    assert columns.label_column(features) == "kind"
    assert columns.class_names(features, "kind") == ("a", "b", "c")


def test_integer_labels_by_name() -> None:
    features = Features(img=Image(), label=Value("int32"), id=Value("int64"))
    assert columns.label_column(features) == "label"
    assert columns.class_names(features, "label") is None


def test_two_of_a_kind_need_a_choice() -> None:
    features = Features(left=Image(), right=Image(), fine_label=FINE, coarse_label=FINE)
    with pytest.raises(ValueError, match=r"\['left', 'right'\].*image_column="):
        columns.image_column(features)
    with pytest.raises(ValueError, match=r"\['fine_label', 'coarse_label'\].*label_column="):
        columns.label_column(features)
    assert columns.image_column(features, "right") == "right"
    assert columns.label_column(features, "coarse_label") == "coarse_label"


def test_none_of_a_kind() -> None:
    features = Features(text=Value("string"))
    with pytest.raises(ValueError, match="no column of type Image"):
        columns.image_column(features)
    with pytest.raises(ValueError, match="no label column"):
        columns.label_column(features)


@pytest.mark.parametrize(("name", "message"), [("nope", "not a column"), ("text", "expected Image")])
def test_a_given_picture_column_is_checked(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        columns.image_column(Features(img=Image(), text=Value("string")), name)


@pytest.mark.parametrize(("name", "message"), [("nope", "not a column"), ("text", "class_encode_column")])
def test_a_given_label_column_is_checked(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        columns.label_column(Features(img=Image(), text=Value("string")), name)


PICTURE = PIL.Image.new("RGB", (4, 5))


@pytest.mark.parametrize(
    "value",
    [
        PICTURE,
        [PICTURE],
        [None, PICTURE],
        {"bytes": b"", "path": None},
        [b"x"],
        np.zeros((4, 4, 3)),
        torch.zeros(3, 4, 4),
    ],
)
def test_pictures_are_recognised_in_a_bare_example(value: object) -> None:
    example = {"photo": value, "label": 1, "name": "x"}
    assert columns.of_example(example, None, None, True) == ("photo", "label")
    assert columns.of_example(example, None, None, False) == ("photo", None)


def test_a_bare_example_can_be_ambiguous() -> None:
    with pytest.raises(ValueError, match="image_column="):
        columns.of_example({"a": PICTURE, "b": PICTURE}, None, None, False)
    with pytest.raises(ValueError, match="label_column="):
        columns.of_example({"a": PICTURE, "fine_label": 1, "coarse_label": 0}, None, None, True)
    with pytest.raises(ValueError, match="label_column="):
        columns.of_example({"a": PICTURE, "kind": 1}, None, None, True)
    assert columns.of_example({"a": PICTURE, "b": PICTURE, "kind": 1}, "b", "kind", True) == ("b", "kind")
    for given in (("x", None), ("a", "x")):
        with pytest.raises(ValueError, match="'x' is not a column"):
            columns.of_example({"a": PICTURE, "label": 1}, *given, True)


@pytest.mark.parametrize(
    ("image", "label", "batch"),
    [
        (PICTURE, 1, False),
        ([PICTURE], [1], True),
        ({"bytes": b"", "path": None}, 1, False),
        (b"", 1, False),
        (np.zeros((4, 4, 3)), 1, False),
        (np.zeros((4, 4)), np.int64(1), False),
        (np.zeros((2, 4, 4, 3)), np.zeros(2), True),
        (np.zeros((3, 4, 4)), np.zeros(3), True),
        (np.array([{"bytes": b""}], dtype=object), np.zeros(1), True),
        (torch.zeros(3, 4, 4), torch.tensor(1), False),
        (torch.zeros(2, 3, 4, 4), torch.zeros(2), True),
        (np.zeros((4, 4, 3)), None, False),
    ],
)
def test_a_batch_is_told_from_a_row(image: object, label: object, batch: bool) -> None:
    assert columns.is_batch(image, label) is batch


@pytest.mark.parametrize("good", [3, np.int64(3), torch.tensor(3), np.uint8(3)])
def test_labels_of_any_integer_type(good: object) -> None:
    assert columns.check_label(good, "row 1", "label") == 3


@pytest.mark.parametrize("bad", [None, -1, "cat", 1.0, float("nan"), True, torch.tensor(float("nan")), np.int64(-1)])
def test_bad_labels_are_named(bad: object) -> None:
    with pytest.raises(ValueError, match="^row 1: expected a class"):
        columns.check_label(bad, "row 1", "label")


@pytest.mark.parametrize("bad", [-1, None, 3])
def test_a_bad_label_in_a_column_is_named(bad: int | None) -> None:
    column = pa.chunked_array([pa.array([0, 1, 2]), pa.array([2, bad, 0])])
    with pytest.raises(ValueError, match=f"^row 4: expected one of 3 classes .* got {bad}$"):
        columns.check_labels(column, ["a", "b", "c"], "label")


def test_labels_from_names_and_numbers() -> None:
    features = Features(kind=FINE)
    assert columns.labels_of(features, "kind", ["c", "0"]) == (2, 0)
    with pytest.raises(ValueError, match=r"\['d'\]; the classes are \['a', 'b', 'c'\]"):
        columns.labels_of(features, "kind", ["a", "d"])
