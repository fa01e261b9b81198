"""Which column holds the pictures and which the labels: in a dataset's features, and in a bare row or batch."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image
from datasets import ClassLabel, Image, Value
from torch import Tensor

IMAGE_NAMES = ("image", "img")
LABEL_NAMES = ("label", "labels", "fine_label", "coarse_label")


def image_column(features: Mapping[str, Any], given: str | None = None) -> str:
    """The name of the one picture column, or `given` if it is one.

    Raises:
        ValueError: there is none or more than one, or `given` is not a picture column; names the candidates.
    """
    images = [name for name, feature in features.items() if isinstance(feature, Image)]
    if given is not None:
        if given not in features:
            raise ValueError(f"image_column={given!r} is not a column; the columns are {list(features)}")
        if given not in images:
            raise ValueError(
                f"image_column={given!r} holds {features[given]}, expected Image; pictures are in {images}"
            )
        return given
    if len(images) == 1:
        return images[0]
    if not images:
        raise ValueError(f"no column of type Image among {dict(features)}; cast one with ds.cast_column(name, Image())")
    raise ValueError(f"expected one picture column, got {images}: choose with image_column=...")


def holds_pictures(feature: Any) -> bool:
    """Whether a feature is or contains pictures."""
    if isinstance(feature, Mapping):
        return any(holds_pictures(inner) for inner in feature.values())
    if isinstance(feature, list | tuple):
        return any(holds_pictures(inner) for inner in feature)
    return isinstance(feature, Image) or (hasattr(feature, "feature") and holds_pictures(feature.feature))


def _is_integer(feature: Any) -> bool:
    return isinstance(feature, Value) and feature.dtype.startswith(("int", "uint"))


def label_column(features: Mapping[str, Any], given: str | None = None) -> str:
    """The name of the one label column (ClassLabel, else an integer column with a usual name), or `given`.

    Raises:
        ValueError: there is none or more than one, or `given` does not hold integers; names the candidates.
    """
    if given is not None:
        if given not in features:
            raise ValueError(f"label_column={given!r} is not a column; the columns are {list(features)}")
        if not (isinstance(features[given], ClassLabel) or _is_integer(features[given])):
            raise ValueError(
                f"label_column={given!r} holds {features[given]}, expected ClassLabel or integers; "
                f"ds.class_encode_column({given!r}) converts it"
            )
        return given
    labels = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    if not labels:
        labels = [name for name in LABEL_NAMES if name in features and _is_integer(features[name])]
    if len(labels) == 1:
        return labels[0]
    if not labels:
        raise ValueError(
            f"no label column (ClassLabel, or integers named one of {LABEL_NAMES}) among {dict(features)}: "
            "choose one with label_column=... after ds.class_encode_column(...). A folder of pictures has labels "
            "only if it has several class folders"
        )
    raise ValueError(f"expected one label column, got {labels}: choose with label_column=...")


def class_names(features: Mapping[str, Any], column: str) -> tuple[str, ...] | None:
    """The names of the classes in label order, or None where the column holds bare integers."""
    feature = features[column]
    return tuple(feature.names) if isinstance(feature, ClassLabel) else None


def of_example(
    example: Mapping[str, Any], image: str | None, label: str | None, needs_labels: bool
) -> tuple[str, str | None]:
    """The picture and label columns of a row or batch that comes without features, judged by values and names.

    Raises:
        ValueError: none or several candidates, or a given column that is not there.
    """
    if image is None:
        found = [name for name in example if _looks_like_pictures(example[name])]
        if not found:
            found = [name for name in IMAGE_NAMES if name in example]
        if len(found) != 1:
            raise ValueError(
                f"expected one picture column, got {found} among {list(example)}: choose with image_column=..."
            )
        image = found[0]
    elif image not in example:
        raise ValueError(f"image_column={image!r} is not a column; the columns are {list(example)}")
    if not needs_labels:
        return image, None
    if label is None:
        names = [name for name in LABEL_NAMES if name in example]
        if len(names) != 1:
            raise ValueError(
                f"expected one label column, got {names} among {list(example)}: choose with label_column=..."
            )
        label = names[0]
    elif label not in example:
        raise ValueError(f"label_column={label!r} is not a column; the columns are {list(example)}")
    return image, label


def check_labels(column: Any, names: Sequence[str] | None, name: str) -> None:
    """That every label of a column is a class.

    Raises:
        ValueError: a label that is None, negative or not below the number of classes; names the first row.
    """
    top = np.inf if names is None else len(names)
    position = 0
    for chunk in column.chunks if hasattr(column, "chunks") else [column]:
        values = chunk.to_numpy(zero_copy_only=False).astype(np.float64)
        bad = np.flatnonzero(~((values >= 0) & (values < top)))
        if len(bad):
            value = chunk[int(bad[0])].as_py()
            known = "a class (0 or more)" if names is None else f"one of {len(names)} classes (0 to {len(names) - 1})"
            raise ValueError(f"row {position + int(bad[0])}: expected {known} in column {name!r}, got {value}")
        position += len(values)


def check_label(value: Any, where: str, column: str, classes: int | None = None) -> int:
    """The label of one row as a plain int.

    Raises:
        ValueError: None, negative, no integer, or not below `classes`; begins with `where`.
    """
    if type(value) is not int:
        if isinstance(value, Tensor | np.generic):
            value = value.item()
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{where}: expected a class (an integer, 0 or more) in column {column!r}, got {value!r}")
    if value < 0:
        raise ValueError(f"{where}: expected a class (0 or more) in column {column!r}, got {value}")
    if classes is not None and value >= classes:
        raise ValueError(f"{where}: expected one of {classes} classes in column {column!r}, got {value}")
    return value


def _looks_like_pictures(value: Any) -> bool:
    if isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.dtype.hasobject):
        found = [item for item in value if item is not None]
        return bool(found) and _looks_like_pictures(found[0])
    if isinstance(value, dict):
        return value.keys() == {"bytes", "path"}
    if isinstance(value, Tensor | np.ndarray):
        return value.ndim >= 2
    return isinstance(value, PIL.Image.Image | bytes)


def is_batch(image: Any, label: Any) -> bool:
    """Whether the value of a picture column (beside that of a label column) is a batch rather than one picture."""
    if isinstance(image, list | tuple):
        return True
    if isinstance(image, Tensor | np.ndarray):
        if image.ndim == 4 or (isinstance(image, np.ndarray) and image.dtype.hasobject):
            return True
        if image.ndim == 3 and label is not None:
            return not isinstance(label, int | np.integer) and getattr(label, "ndim", 1) > 0
    return False


def labels_of(features: Mapping[str, Any], column: str, wanted: Sequence[str]) -> tuple[int, ...]:
    """Labels from class names or numbers.

    Raises:
        ValueError: a name that is no class; names the classes.
    """
    names = class_names(features, column) or ()
    unknown = [name for name in wanted if name not in names and not name.isdigit()]
    if unknown:
        raise ValueError(f"expected classes of column {column!r}, got {unknown}; the classes are {list(names)}")
    return tuple(names.index(name) if name in names else int(name) for name in wanted)
