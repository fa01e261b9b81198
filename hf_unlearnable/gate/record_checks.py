"""Whether the record of a protected folder is there, complete, and of one mind; and what it says of the key."""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hf_unlearnable.budget import Budget
from hf_unlearnable.environment import versions
from hf_unlearnable.gate.finding import Finding
from hf_unlearnable.record import Record

RECORD = "record.json"
BOUNDED_BY = frozenset({"epsilon", "l2_radius", "sparsity"})
"""The settings that promise a budget."""
_SHA256 = re.compile(r"[0-9a-f]{64}")
_COMMITMENT = re.compile(r"sha256:[0-9a-f]{64}")
_SPREAD = ("mean", "sd", "p5", "p95", "least", "largest")
_RESULT = {"setting", "attacker", "learnability", "clean", "chance", "measured", "refused", "cells"}
_NUMBER = (int, float)
_NONE = type(None)

# What `protect` writes, part by part; "columns_sha256" is younger than the first records and has a check of its own.
_PARTS: dict[str, dict[str, tuple[type, ...]]] = {
    "settings": {"version": (int,), "poison_rate": _NUMBER, "classes": (list, _NONE), "num_classes": (int, _NONE)},
    "key": {"kind": (str,), "commitment": (str, _NONE)},
    "source": {
        "dataset": (str,),
        "split": (str,),
        "rows": (int,),
        "image_column": (str,),
        "label_column": (str, _NONE),
        "classes": (list, _NONE),
        "pixels_sha256": (str,),
    },
    "published": {
        "rows": (int,),
        "image_format": (str,),
        "compress_level": (int,),
        "pixels_sha256": (str,),
        "files": (dict,),
    },
    "pixels": {
        "rows": (int,),
        "rows_changed": (int,),
        "perceptual_rows": (int,),
        "values_changed": _NUMBER,
        "values_clipped": _NUMBER,
        "ssim_variant": (str,),
        "budgets": (list,),
        "linf_levels": (dict,),
        "l2": (dict,),
        "l0_pixels": (dict,),
        "mean_shift_levels": (dict,),
        "psnr_db": (dict,),
        "ssim": (dict, _NONE),
    },
}


def read_record(folder: Path) -> tuple[Record | None, list[Finding]]:
    """The record of a folder, and what is wrong with it; None where it is not there or lacks what the checks need."""
    if not folder.is_dir():
        return None, [Finding("record", f"there is no folder {folder}")]
    try:
        record = Record.load(folder / RECORD)
    except FileNotFoundError:
        return None, [Finding("record", f"there is no {RECORD}: is this a folder that protect.py has written?")]
    except (OSError, ValueError, TypeError) as error:
        return None, [Finding("record", f"{RECORD} cannot be read: {error}")]
    if missing := list(lacking(record)):
        return None, [Finding("record", f"incomplete: {'; '.join(missing)}")]
    return record, [Finding("record", problem) for problem in disagreements(record)]


def lacking(record: Record) -> Iterator[str]:
    """What a record lacks of what every check needs; empty for a complete one."""
    for part, expected in _PARTS.items():
        found = getattr(record, part)
        if not isinstance(found, dict):
            yield f"{part} is no mapping"
            continue
        for name, types in expected.items():
            if name not in found:
                yield f"{part}.{name} is missing"
            elif not isinstance(found[name], types) or isinstance(found[name], bool):
                wanted = " or ".join(kind.__name__ for kind in types).replace("NoneType", "null")
                yield f"{part}.{name}: expected {wanted}, got {type(found[name]).__name__}"
            elif isinstance(found[name], int | float) and not _is_finite(found[name]):
                yield f"{part}.{name}: expected a finite number of at most 18 digits"
            elif part == "pixels" and isinstance(found[name], dict) and not _is_spread(found[name]):
                yield f"{part}.{name}: expected the numbers {', '.join(_SPREAD)}, of one mind"
    left_out = record.source.get("left_out", []) if isinstance(record.source, dict) else []
    if not (isinstance(left_out, list) and all(isinstance(one, dict) and _is_row(one.get("row")) for one in left_out)):
        yield "source.left_out: expected a list of rows and reasons"
    settings = record.settings if isinstance(record.settings, dict) else {}
    for name in BOUNDED_BY & settings.keys():
        bound = settings[name]
        if bound is not None and not (_is_finite(bound) and bound >= 0):
            yield f"settings.{name}: expected a number, 0 or more, got {str(bound)[:40]!r}"
    if not (isinstance(record.method, str) and record.method):
        yield "method is missing"
    known = record.versions if isinstance(record.versions, dict) else {}
    if unknown := sorted(name for name in versions() if not isinstance(known.get(name), str)):
        yield f"versions of {', '.join(unknown)} are missing"
    if not (isinstance(record.results, list) and all(isinstance(result, dict) for result in record.results)):
        yield "results: expected a list of mappings"
    elif wrong := [i for i, found in enumerate(record.results) if not found.keys() >= _RESULT]:
        yield f"results: expected {', '.join(sorted(_RESULT))} in each, entry {wrong[0]} lacks some"
    if isinstance(record.published, dict) and isinstance(files := record.published.get("files"), dict):
        yield from _lacking_of_files(files)
    if isinstance(record.pixels, dict) and isinstance(found := record.pixels.get("budgets"), list):
        yield from _lacking_of_budgets(found)


def _lacking_of_files(files: Mapping[str, Any]) -> Iterator[str]:
    for name, said in files.items():
        if not re.fullmatch(r"\w[\w.-]*/\w[^/\\]*\.parquet", name):
            hint = " (archives cannot be published: protect without --container)" if name.endswith(".tar") else ""
            yield f"published.files: expected data/....parquet, got {name!r}{hint}"
        elif not (isinstance(said, dict) and _is_sha256(said.get("sha256")) and isinstance(said.get("bytes"), int)):
            yield f"published.files: expected the sha256 and bytes of {name}"


def _lacking_of_budgets(budgets: list[Any]) -> Iterator[str]:
    norms = set()
    for said in budgets:
        try:
            norms.add(Budget(said["norm"], said["epsilon"]).norm)
            told = isinstance(said["kept_by_rows"], int) and said["kept_by_rows"] >= 0
        except (TypeError, KeyError, ValueError, OverflowError):
            told = False
        if not told:
            yield f"pixels.budgets: expected norm, epsilon and kept_by_rows, got {str(said)[:120]}"
    if len(norms) > 1:
        yield f"pixels.budgets: expected one norm, got {', '.join(sorted(norms))}"


def _is_spread(found: Mapping[str, Any]) -> bool:
    if not all(_is_finite(found.get(name)) for name in _SPREAD):
        return False
    slack = 1e-9 * max(1, abs(found["least"]), abs(found["largest"]))
    if not -slack <= found["sd"] <= (found["largest"] - found["least"]) / 2 + slack:
        return False
    return all(found["least"] - slack <= found[name] <= found["largest"] + slack for name in ("mean", "p5", "p95"))


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < 1e18


def _is_row(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def disagreements(record: Record) -> Iterator[str]:
    """Where the words of a complete record contradict each other."""
    source, published, pixels, settings = record.source, record.published, record.pixels, record.settings
    rows = {"source": source["rows"], "published": published["rows"], "pixels": pixels["rows"]}
    if len(set(rows.values())) > 1 or source["rows"] < 1:
        yield f"expected one number of rows, 1 or more, got {', '.join(f'{n} ({part})' for part, n in rows.items())}"
    if not 0 <= pixels["rows_changed"] <= pixels["rows"]:
        yield f"expected 0 to {pixels['rows']} rows changed, got {pixels['rows_changed']}"
    if (pixels["rows_changed"] > 0) != (pixels["linf_levels"]["largest"] > 0):
        yield (
            f"{pixels['rows_changed']} rows changed do not go with a largest change of "
            f"{pixels['linf_levels']['largest']:g} grey levels"
        )
    if not 1 <= pixels["perceptual_rows"] <= pixels["rows"]:
        yield f"expected 1 to {pixels['rows']} rows seen by PSNR and SSIM, got {pixels['perceptual_rows']}"
    for name in ("values_changed", "values_clipped", "values_at_bound"):
        share = pixels.get(name, 0)  # the last is told of linf budgets alone
        if not (isinstance(share, int | float) and 0 <= share <= 1):
            yield f"expected {name} from 0 to 1, got {share}"
    worst, top = pixels.get("worst_rows_by_psnr", []), pixels["rows"] + len(source.get("left_out", []))
    if not (isinstance(worst, list) and all(isinstance(row, int) and 0 <= row < top for row in worst)):
        yield f"expected rows below {top} as the worst by PSNR, got {worst}"
    if not source["dataset"]:
        yield "expected the name of the source dataset, got none"
    if settings["version"] < 1 or published["compress_level"] not in range(10):
        yield f"expected a version of 1 or more and a compress_level from 0 to 9, got {settings['version']} and " + (
            f"{published['compress_level']}"
        )
    if pixels["budgets"] and (kept := sum(said["kept_by_rows"] for said in pixels["budgets"])) != pixels["rows"]:
        yield f"expected all {pixels['rows']} rows to keep a budget, got {kept}"
    if not 0 <= settings["poison_rate"] <= 1:
        yield f"expected a poison_rate from 0 to 1, got {settings['poison_rate']}"
    if settings["classes"] is not None:
        top = math.inf if source["classes"] is None else len(source["classes"])
        if source["label_column"] is None:
            yield "only some classes were to be changed, but there is no label column"
        elif not all(isinstance(label, int) and 0 <= label < top for label in settings["classes"]):
            yield f"expected classes from 0 to {top - 1}, got {settings['classes']}"
    if published["image_format"] not in ("png", "webp"):
        yield f"expected png or webp pictures, got {published['image_format']!r}"
    for part, name in (("source", "pixels_sha256"), ("published", "pixels_sha256"), ("source", "columns_sha256")):
        value = getattr(record, part).get(name)
        if value is not None and not _is_sha256(value):
            yield f"{part}.{name}: expected 64 hexadecimal digits"
    files, split = published["files"], source["split"]
    folder = min(files, default="data/").rpartition("/")[0]
    if set(files) != {f"{folder}/{split}-{i:05d}-of-{len(files):05d}.parquet" for i in range(len(files))} or not files:
        yield f"expected the shards of the split {split!r}, numbered without gaps, got {sorted(files)}"


def check_results(record: Record) -> list[Finding]:
    """That every evaluation names these pictures among those that it was measured on."""
    found = []
    for i, result in enumerate(record.results):
        digests = result.get("pixels_sha256")
        if digests is None:
            hint = "`evaluate.py --report-only` with the same arguments notes it anew"
            found.append(f"entry {i} does not tell of which pictures (an older version): {hint}")
        elif not (isinstance(digests, list) and record.published["pixels_sha256"] in digests):
            found.append(f"entry {i} was measured on other pictures than these (pixels_sha256)")
    return [Finding("results", problem) for problem in found]


def check_key(record: Record, *, allow_guessable_key: bool) -> list[Finding]:
    """That the record commits to a secret key and tells none; an int seed needs to be allowed."""
    return [Finding("key", problem) for problem in _key_problems(record, allow_guessable_key)]


def _key_problems(record: Record, allow_guessable_key: bool) -> Iterator[str]:
    key, kind = record.key, record.key["kind"]
    if kind not in ("secret", "int"):
        yield f'expected the kind "secret" or "int", got {kind!r}'
    if kind == "secret" and not (key["commitment"] and _COMMITMENT.fullmatch(key["commitment"])):
        yield "expected a commitment to the secret key, sha256: and 64 hexadecimal digits"
    if kind == "int":
        if not allow_guessable_key:
            yield (
                "the key is an int seed: who has the dataset can try them all and recompute what was added. Protect "
                "with a secret key (scripts/keygen.py), or say that it may be guessed (--allow-guessable-key)"
            )
        if key["commitment"] is not None:
            yield "a commitment to an int seed gives it away"
    if "seed" in key and (kind == "secret" or not allow_guessable_key):
        yield "the record tells the seed: protect again without --record-seed" + (
            "" if kind == "secret" else ", or say that it may be known (--allow-guessable-key)"
        )
    trained = key.get("surrogate", "a secret")
    if trained == "an int seed" and not allow_guessable_key:
        yield (
            "the key follows from a surrogate that was trained under an int seed: who has the clean pictures can try "
            "them all and train it again. Train it with a secret key (train_surrogate.py --key-file), or say that it "
            "may be guessed (--allow-guessable-key)"
        )
    elif trained not in ("a secret", "an int seed"):
        yield f'expected the surrogate\'s key to be "a secret" or "an int seed", got {trained!r}'
    if unknown := sorted(key.keys() - {"kind", "commitment", "seed", "surrogate"}):
        yield f"expected kind and commitment alone, got {', '.join(unknown)} too"
    if told := sorted(record.settings.keys() & {"seed", "key", "secret", "key_file"}):
        yield f"the settings hold {', '.join(told)}, which belong to nobody but the owner"
