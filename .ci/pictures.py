"""Make `pictures/`, the folder of pictures that the README's commands speak of: one folder for each class."""

from pathlib import Path

from hf_unlearnable import demo

for row, example in enumerate(demo.shapes(train_rows=200, test_rows=1)["train"]):
    folder = Path("pictures") / demo.CLASSES[example["label"]]
    folder.mkdir(parents=True, exist_ok=True)
    example["image"].save(folder / f"{row}.jpg", quality=90)
