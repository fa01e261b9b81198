"""Pictures that the project draws itself: ten shapes, 32 x 32, for trying things offline."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageDraw
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, NamedSplit

from hf_unlearnable.keys import numpy_generator

CLASSES = ("circle", "square", "triangle", "star", "cross", "ring", "crescent", "arrow", "heart", "bars")
_SIZE = 32
_SCALE = 4


def shapes(*, train_rows: int = 4000, test_rows: int = 1000, seed: int = 0) -> DatasetDict:
    """Ten shapes in random colours, sizes, places and angles on cloudy, grainy grounds; columns `image` and `label`.

    Args:
        train_rows, test_rows: pictures a split, in turn over the classes.
        seed: other seeds give other pictures of the same kind.
    """
    return DatasetDict(
        {split: _split(split, rows, seed) for split, rows in (("train", train_rows), ("test", test_rows))}
    )


def _split(split: str, rows: int, seed: int) -> Dataset:
    features = Features({"image": Image(), "label": ClassLabel(names=list(CLASSES))})

    def generate() -> Iterator[dict[str, Any]]:
        for row in range(rows):
            label = row % len(CLASSES)
            yield {"image": _draw(label, numpy_generator(seed, "demo", split, row)), "label": label}

    columns = list(generate())
    return Dataset.from_dict(
        {name: [row[name] for row in columns] for name in ("image", "label")},
        features=features,
        split=NamedSplit(split),
    )


def _outline(label: int) -> list[list[tuple[float, float]]]:
    """Polygons of a shape, in a square from -1 to 1; a second polygon is cut out."""
    circle = [(math.cos(t), math.sin(t)) for t in np.linspace(0, 2 * math.pi, 40)]
    star = [
        (r * math.sin(t), -r * math.cos(t)) for t, r in zip(np.arange(10) * math.pi / 5, [1, 0.42] * 5, strict=True)
    ]
    cross = [(-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3)]
    cross += [(-x, -y) for x, y in cross]
    heart = [
        (math.sin(t) ** 3, -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16)
        for t in np.linspace(0, 2 * math.pi, 40)
    ]
    return {
        "circle": [circle],
        "square": [[(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)]],
        "triangle": [[(0, -1), (0.95, 0.8), (-0.95, 0.8)]],
        "star": [star],
        "cross": [cross],
        "ring": [circle, [(0.55 * x, 0.55 * y) for x, y in circle]],
        "crescent": [circle, [(0.8 * x + 0.45, 0.8 * y) for x, y in circle]],
        "arrow": [[(0, -1), (0.9, 0), (0.35, 0), (0.35, 1), (-0.35, 1), (-0.35, 0), (-0.9, 0)]],
        "heart": [heart],
        "bars": [[(-1, -0.9), (1, -0.9), (1, 0.9), (-1, 0.9)], [(-1.1, -0.3), (1.1, -0.3), (1.1, 0.3), (-1.1, 0.3)]],
    }[CLASSES[label]]


def _draw(label: int, draws: np.random.Generator) -> PIL.Image.Image:
    side = _SIZE * _SCALE
    ground = draws.uniform(40, 215, 3)
    direction = draws.normal(size=3)
    colour = ground + draws.uniform(110, 180) * direction / np.linalg.norm(direction)
    angle, radius = draws.uniform(-0.5, 0.5), draws.uniform(0.3, 0.44) * side
    centre = draws.uniform(radius, side - radius, 2)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    canvas = PIL.Image.new("L", (side, side), 0)
    pen = PIL.ImageDraw.Draw(canvas)
    for polygon, ink in zip(_outline(label), (255, 0), strict=False):
        points = np.asarray(polygon) @ turn.T * radius + centre
        pen.polygon([(float(x), float(y)) for x, y in points], fill=ink)
    shape = np.asarray(canvas.resize((_SIZE, _SIZE), PIL.Image.Resampling.BOX), dtype=np.float64)[:, :, None] / 255
    texture = sum(_clouds(cells, draws) * size for cells, size in ((3, 8.0), (6, 5.6), (12, 4.0), (_SIZE, 18.0)))
    picture = ground * (1 - shape) + colour * shape + texture
    return PIL.Image.fromarray(np.clip(np.round(picture), 0, 255).astype(np.uint8))


def _clouds(cells: int, draws: np.random.Generator) -> np.ndarray:
    """Smooth noise of unit size on a grid of cells, at full resolution."""
    grid = draws.normal(size=(3, cells, cells)).astype(np.float32)
    planes = [PIL.Image.fromarray(plane).resize((_SIZE, _SIZE), PIL.Image.Resampling.BICUBIC) for plane in grid]
    return np.stack([np.asarray(plane) for plane in planes], axis=-1)
