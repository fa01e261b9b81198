"""What papers report, beside what is measured here; never a figure of ours."""

import re
from typing import Any

_UERASER, _ISS, _CUDA, _MMM, _RSK = (
    "UEraser Table 2",
    "ISS README",
    "CUDA Table 2 and section 5.2",
    "MMM Table 3",
    "RSK",
)

# (method, attacker): test accuracy in %, source. CIFAR-10, ResNet-18; METHODS part VI, METHODS_NEW N60.
_CIFAR10: dict[tuple[str, str], tuple[float, str]] = {
    ("clean", "erm"): (94.66, _CUDA),
    ("clean", "at-4"): (89.51, _CUDA),
    ("clean", "grayscale"): (92.41, _ISS),
    ("clean", "jpeg-10"): (85.38, _ISS),
    ("cuda", "erm"): (18.48, _CUDA),
    ("cuda", "at-4"): (44.40, _CUDA),
    ("cuda", "at-8"): (32.85, _CUDA),
    ("cuda", "at-l2-0.5"): (51.19, _CUDA),
    ("cuda", "grayscale"): (20.12, _CUDA),
    ("cuda", "mixup"): (25.53, _CUDA),
    ("cuda", "cutout"): (25.80, _CUDA),
    ("cuda", "cutmix"): (26.93, _CUDA),
    ("cuda", "auto-augment"): (34.09, _CUDA),
    ("cuda", "orthogonal"): (50.72, _CUDA),
    ("cuda", "random-filter"): (13.37, _CUDA),
    ("cuda", "smoothing"): (43.85, _CUDA),
    ("cuda", "dat-3"): (39.05, _CUDA),
    ("cuda", "dat-5"): (46.21, _CUDA),
    ("cuda", "dat-7"): (38.48, _CUDA),
    ("cuda", "rsk-ff"): (78.53, _RSK),
    ("em", "erm"): (21.24, _UERASER),
    ("em", "ueraser-lite"): (90.78, _UERASER),
    ("em", "ueraser"): (93.38, _UERASER),
    ("em", "at-4"): (86.24, _UERASER),
    ("em", "grayscale"): (93.01, _ISS),
    ("em", "jpeg-10"): (81.50, _ISS),
    ("robust-em", "erm"): (27.09, _CUDA),
    ("robust-em", "at-4"): (48.16, _CUDA),
    ("robust-em", "ueraser-lite"): (85.49, _UERASER),
    ("robust-em", "ueraser"): (91.02, _UERASER),
    ("robust-em", "grayscale"): (92.84, _ISS),
    ("robust-em", "jpeg-10"): (81.50, _ISS),
    ("min-max-min", "erm"): (12.71, _MMM),
    ("min-max-min", "at-2"): (15.38, _MMM),
    ("min-max-min", "at-4"): (23.12, _MMM),
    ("tap", "erm"): (22.51, _CUDA),
    ("tap", "at-4"): (88.02, _CUDA),
    ("tap", "grayscale"): (9.11, _ISS),
    ("tap", "jpeg-10"): (83.87, _ISS),
    ("ntga", "erm"): (16.27, _CUDA),
    ("ntga", "at-4"): (88.96, _CUDA),
    ("ntga", "grayscale"): (74.32, _ISS),
    ("ntga", "jpeg-10"): (69.49, _ISS),
    ("hypo", "erm"): (72.12, _UERASER),
    ("hypo", "ueraser-lite"): (85.67, _UERASER),
    ("hypo", "ueraser"): (87.59, _UERASER),
    ("hypo", "grayscale"): (61.86, _ISS),
    ("hypo", "jpeg-10"): (85.45, _ISS),
    ("lsp", "erm"): (14.95, _UERASER),
    ("lsp", "ueraser-lite"): (84.92, _UERASER),
    ("lsp", "ueraser"): (85.07, _UERASER),
    ("lsp", "grayscale"): (82.47, _ISS),
    ("lsp", "jpeg-10"): (83.01, _ISS),
    ("ar", "erm"): (12.04, _UERASER),
    ("ar", "ueraser-lite"): (92.08, _UERASER),
    ("ar", "ueraser"): (93.16, _UERASER),
    ("ar", "grayscale"): (34.04, _ISS),
    ("ar", "jpeg-10"): (85.15, _ISS),
    ("ops", "erm"): (36.55, _ISS),
    ("ops", "grayscale"): (42.44, _ISS),
    ("ops", "jpeg-10"): (82.53, _ISS),
    ("entf", "erm"): (94.65, _MMM),
    ("entf", "at-4"): (89.52, _MMM),
    ("pil", "erm"): (12.77, "PIL README"),
}


def reported(dataset: str, label: str, attacker: str) -> dict[str, Any] | None:
    """A paper's test accuracy (a fraction) with its setting and source; None where none was read.

    Args:
        dataset: the name of what was protected; the figures are for CIFAR-10.
        label: the method's name in this library, or "clean".
        attacker: its name in the suites.
    """
    found = _CIFAR10.get((label, attacker))
    if found is None or not re.search(r"cifar[-_]?10(?!0)", dataset.lower()):
        return None
    return {"test_accuracy": round(found[0] / 100, 4), "setting": "CIFAR-10, ResNet-18", "source": found[1]}


def known(label: str) -> list[dict[str, Any]]:
    """Everything read about a method on CIFAR-10 with ResNet-18, the most learnable first; empty where nothing was."""
    found = [(value, attacker, source) for (name, attacker), (value, source) in _CIFAR10.items() if name == label]
    return [
        {"attacker": attacker, "test_accuracy": round(value / 100, 4), "source": source}
        for value, attacker, source in sorted(found, reverse=True)
    ]
