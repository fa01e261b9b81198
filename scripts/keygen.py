"""Make a secret key for protecting datasets: `python scripts/keygen.py --output key`. Keep it; never publish it."""

import argparse
import sys
from pathlib import Path

from hf_unlearnable.keys import commitment, write_key


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", required=True, type=Path, help="file to make; an existing one is never replaced")
    path = parser.parse_args().output
    try:
        key = write_key(path)
    except OSError as error:
        sys.exit(f"keygen.py: {path}: {error.strerror}")
    print(f"{path}: a new secret key, readable by you alone; without it you cannot prove that a dataset is yours")
    print(f"  its commitment, which may be published: {commitment(key)}")


if __name__ == "__main__":
    main()
