"""What sharding is measured against, as a script: the CUDA map over a folder, and `to_parquet`; no record.

    python hf_unlearnable/benchmarks/plain_map.py SOURCE OUTPUT             # Dataset.map, which checks nothing
    python hf_unlearnable/benchmarks/plain_map.py SOURCE OUTPUT checked     # Transform.apply, which reads back

The files `began` and `done` in OUTPUT tell from outside when rows were there to be mapped, and when all were written.
"""

import os
import sys
from pathlib import Path

import datasets
from datasets import Image

from hf_unlearnable import columns
from hf_unlearnable.benchmarks.timing import SEED
from hf_unlearnable.poisons.cuda import CudaPoison
from hf_unlearnable.sources import load_split


def main(source: str, output: str, how: str = "") -> None:
    datasets.disable_progress_bars()
    rows, folder = load_split(source), Path(output)
    folder.mkdir()
    plain = rows.cast_column(columns.image_column(rows.features), Image(decode=False))
    (folder / "began").touch()
    if how == "checked":
        poisoned = CudaPoison(seed=SEED).apply(rows, cache_dir=folder)
    else:
        poisoned = plain.map(
            CudaPoison(seed=SEED),
            batched=True,
            batch_size=500,
            cache_file_name=str(folder / "mapped.arrow"),
            new_fingerprint=os.urandom(8).hex(),
        ).cast(rows.features)
    poisoned.to_parquet(str(folder / "train.parquet"))
    (folder / "done").touch()


if __name__ == "__main__":
    main(*sys.argv[1:])
