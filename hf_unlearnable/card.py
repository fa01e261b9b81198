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

**What a trainer still learns from it: not measured.** Until `results` in `record.json` holds an evaluation, nothing is
claimed about how well this dataset resists training.

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
