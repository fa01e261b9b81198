"""The poison that a record tells of, with the key that somebody claims."""

from pathlib import Path

from datasets import Dataset

from hf_unlearnable.keys import Key
from hf_unlearnable.poisons.base import Poison
from hf_unlearnable.poisons.names import POISONS, arguments_of
from hf_unlearnable.poisons.ops import OpsPoison
from hf_unlearnable.poisons.with_surrogate import SurrogatePoison
from hf_unlearnable.record import Record


def rebuild(
    record: Record, key: Key | None, *, surrogate: str | Path | None = None, clean: Dataset | None = None
) -> Poison:
    """The same poison as the record's, under this key.

    Args:
        key: None only for a poison whose secret was drawn from its surrogate.
        surrogate: its file or Hub id, for the methods that have one.
        clean: the clean split, which the pixels of OPS are found on again.

    Raises:
        ValueError: an unknown method, another version of it, a surrogate that is not the recorded one, no clean rows
            where they are needed, or no key.
    """
    if record.method not in POISONS:
        raise ValueError(f"this version knows no method {record.method!r}: {', '.join(POISONS)}")
    poison_class = POISONS[record.method]
    settings = arguments_of(record.settings)
    if (made := record.settings.get("version")) != poison_class.version:
        raise ValueError(
            f"it was made by version {made} of {record.method!r}, this is version {poison_class.version}: its pixels "
            f"would differ; use hf_unlearnable {record.versions.get('hf_unlearnable')}"
        )
    columns = {"image_column": record.source["image_column"], "label_column": record.source["label_column"]}
    if issubclass(poison_class, SurrogatePoison):
        recorded = record.settings.get("surrogate")
        if surrogate is None:
            raise ValueError(f"{record.method!r} is computed with its surrogate ({recorded}): give its file")
        poison: Poison = poison_class.from_surrogate(surrogate, seed=key, **settings, **columns)
        if (got := poison.settings()["surrogate"]) != recorded:
            raise ValueError(f"expected the surrogate {recorded}, got {got}")
        return poison
    if key is None:
        raise ValueError(f"{record.method!r} is computed from its key: give the key")
    if poison_class is OpsPoison:
        if clean is None:
            raise ValueError("the pixels of 'ops' are found on the clean split: give it")
        kept = {name: settings[name] for name in ("sparsity", "poison_rate", "classes", "num_classes")}
        return OpsPoison.fit(clean, seed=key, **kept, **columns)
    return poison_class(seed=key, **settings, **columns)
