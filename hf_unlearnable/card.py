"""The card of a protected dataset, rendered from its record."""

import json

from hf_unlearnable.record import Record


def stub(record: Record) -> str:
    """A README.md that says what is known so far, and what is not measured.

    Its front matter has no `configs`: with them, `load_dataset` caches a local folder by its name alone, and would show
    the pictures of an older folder of the same name.
    """
    split = record.source["split"]
    pixels = record.pixels
    settings = "\n".join(f"- {name}: `{json.dumps(value)}`" for name, value in record.settings.items())
    commitment = record.key["commitment"]
    if commitment:
        key = f"a 32-byte secret; commitment `{commitment}`"
    else:
        key = "an int seed: **guessable**, anyone can enumerate it and recompute the perturbation"
    measures = "\n".join(
        f"| {name} | {spread['mean']:.4g} | {spread['sd']:.3g} | {spread['least']:.4g} | {spread['largest']:.4g} |"
        for name, spread in pixels.items()
        if isinstance(spread, dict) and "mean" in spread
    )
    return f"""---
tags:
- hf_unlearnable
---

# {record.source["dataset"]}, protected with `{record.method}`

{_learned(record)}

![clean, poisoned and difference](preview.png)

```python
from datasets import load_dataset

dataset = load_dataset("path/to/this/folder", split="{split}")
```

## What was done

{pixels["rows_changed"]} of {pixels["rows"]} pictures of the split `{split}` were changed; labels, order and the other
columns were not. The key is {key}.

{settings}

## What was measured on the published pixels

| per picture | mean | sd | least | largest |
|---|---|---|---|---|
{measures}

PSNR and SSIM ({pixels["ssim_variant"]}) on {pixels["perceptual_rows"]} rows, the other measures on all of them;
linf in grey levels, l2 in units of the value range [0, 1].
"""


def _learned(record: Record) -> str:
    """What the best attacker learned, in every evaluation; or that there is none."""
    if not record.results:
        return (
            "**What a trainer still learns from it: not measured.** Until `results` in `record.json` holds an "
            "evaluation, nothing is\nclaimed about how well this dataset resists training."
        )
    told = []
    for found in record.results:
        setting, learned = found["setting"], found["learnability"]
        where = f"{setting['backbone']}, recipe {setting['recipe']}, {setting['train_rows']:,} rows"
        if found["refused"] or learned is None:
            told.append(f"**Nothing is claimed** ({where}): {'; '.join(found['refused'])}.")
            continue
        clean = "not measured" if found["clean"] is None else f"{100 * found['clean']:.1f} %"
        error = "" if learned["error"] is None else f" ± {100 * learned['error']:.1f}"
        told.append(
            f"**A trainer still reaches {100 * learned['mean']:.1f}{error} % on clean test pictures** with "
            f"`{found['attacker']}`, the best of {len(found['measured'])} attackers ({where}); "
            f"plain training on clean pictures: {clean}, chance: {100 * found['chance']:.1f} %."
            + (f" Beside it: {'; '.join(found['notes'])}." if found["notes"] else "")
        )
    return "\n\n".join(told)
