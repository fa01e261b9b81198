"""Diagnosis of a protected dataset: how easily its secret is read, found out and leant on, beside its clean rows."""

import dataclasses
import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from jaxtyping import Int, UInt8
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as tvf
from tqdm.auto import tqdm

from hf_unlearnable.batches import Batches, stratified_rows
from hf_unlearnable.certificate import certify
from hf_unlearnable.defenses.erm import Erm
from hf_unlearnable.detection import reliance, sample_auc, supervised_auc
from hf_unlearnable.environment import hardware, versions
from hf_unlearnable.evaluation.arms import Rows
from hf_unlearnable.evaluation.diagnosis_pages import What, summary
from hf_unlearnable.evaluation.protocol import protected_arms
from hf_unlearnable.images import Labels
from hf_unlearnable.keys import Key, torch_generator
from hf_unlearnable.last_layer import dfr_with_controls, refit_last_layer
from hf_unlearnable.networks import Network, create_network
from hf_unlearnable.probes import linear_separability
from hf_unlearnable.recipes import changed, recipe
from hf_unlearnable.record import Record
from hf_unlearnable.recovery import RECOVERY, distance, recover
from hf_unlearnable.result import Result
from hf_unlearnable.set_detection import bias_shift_score, simple_network_score
from hf_unlearnable.victim import evaluate, train_to_end

QUICK: tuple[What, ...] = ("separability", "detector", "samples", "shortcuts")
SCHEMA = 1
HELD_OUT = 0.2
DETECTOR_PIXELS = 32
ETAS = (0.01, 0.05, 0.1, 0.2, 0.3)
RADII = (0.2, 0.5, 1.0, 2.0, math.inf)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What decides the figures, beside the rows.

    Args:
        backbone, recipe: of the victims (shortcuts, dfr, recovery, certificate) and of the learnt detector
            (supervised); the backbone also of samples and of the detector of shifted pictures.
        seed: of all that is drawn.
        hidden: separability: probes with so many tanh layers of 30 units, beside the linear ones; 0 for none.
        detector_epochs: detector: 100 in the paper.
        sample_epochs: samples: a training for each.
        dfr_rows: dfr: clean rows that the last layer is fitted to, out of the validation rows.
        recovery_epochs: recovery: 60 in the paper.
        draws: certificate: noisy weights.
        sigma: certificate: standard deviation of the noise on every weight.
        certificate_rows: certificate: test rows that the accuracy is measured on.

    Raises:
        ValueError: a value outside its range, or no recipe of this name.
    """

    backbone: str = "tiny"
    recipe: str = "tiny"
    seed: int = 0
    hidden: int = 0
    detector_epochs: int = 20
    sample_epochs: tuple[int, ...] = (1, 2, 3, 5)
    dfr_rows: int = 500
    recovery_epochs: int = 20
    draws: int = 1000
    sigma: float = 0.25
    certificate_rows: int = 1000

    def __post_init__(self) -> None:
        recipe(self.recipe)
        positive = ("detector_epochs", "dfr_rows", "recovery_epochs", "draws", "certificate_rows")
        counts = {name: getattr(self, name) for name in positive}
        counts |= {"sample_epochs": min(self.sample_epochs, default=0)}
        if low := {name: value for name, value in counts.items() if value < 1}:
            raise ValueError(f"expected at least 1, got {low}")
        if self.hidden < 0 or self.seed < 0 or not self.sigma > 0:
            raise ValueError(
                f"expected hidden and seed of at least 0 and a positive sigma, got {self.hidden}, {self.seed} and "
                f"{self.sigma}"
            )


OWN: dict[What, tuple[str, ...]] = {
    "separability": ("hidden",),
    "detector": ("detector_epochs",),
    "samples": ("sample_epochs",),
    "supervised": (),
    "shortcuts": (),
    "dfr": ("dfr_rows",),
    "recovery": ("recovery_epochs",),
    "certificate": ("draws", "sigma", "certificate_rows"),
}


class Diagnosis:
    """The diagnostics of one protected dataset, kept in a folder: what is finished there is not done again.

    The folder holds diagnosis.json (setting and figures) and summary.md, both written anew, whole or not at all, after
    each diagnostic; and the two victims, trained once for several diagnostics.

    Args:
        rows: the clean rows, checked against the protected ones.
        folder: the protected dataset.
        other: another one, made of the same clean rows by the same method under another key; for "supervised".
        output: a new folder, or one that holds a diagnosis of the same rows and setting.

    Raises:
        FileNotFoundError: a folder without a record.
        ValueError: the folders do not belong together, or the output is of something else (names what differs).
    """

    def __init__(
        self,
        rows: Rows,
        folder: str | Path,
        *,
        other: str | Path | None = None,
        setting: Setting,
        output: Path,
        accelerator: Accelerator,
        progress: bool = True,
    ) -> None:
        arms = protected_arms([f"published={folder}", *([] if other is None else [f"other={other}"])])
        self.published = rows.training(arms[0])
        self.clean = rows.training(dataclasses.replace(arms[0], kind="clean"))
        self.other = None if other is None else rows.training(arms[1])
        self.setting, self.output, self.accelerator, self.progress = setting, output, accelerator, progress
        self.test, self.validation = rows.test, rows.validation
        self.recipe = recipe(setting.recipe)
        record = Record.load(Path(arms[0].path) / "record.json")
        if other is not None:
            self._check_other(record, Record.load(Path(arms[1].path) / "record.json"))
        self._open(record)

    def _check_other(self, record: Record, other: Record) -> None:
        if other.method != record.method:
            raise ValueError(f"other: expected rows protected by {record.method!r}, got {other.method!r}")

    def _open(self, record: Record) -> None:
        splits = {"published": self.published, "clean": self.clean, "validation": self.validation, "test": self.test}
        how: dict[str, Any] = {
            "dataset": record.source["dataset"],
            "method": record.method,
            "pixels_sha256": record.published["pixels_sha256"],
            **{f"{name}_rows": len(split) for name, split in splits.items() if name != "clean"},
            "image_size": list(self.clean.image_size),
            "classes": len(self.clean.classes),
            "chance": int(torch.bincount(self.clean.labels).max()) / len(self.clean),
            **{name: getattr(self.setting, name) for name in ("backbone", "recipe", "seed")},
            **{f"{name}_digest": split.digest() for name, split in splits.items()},
        }
        if (self.output / "diagnosis.json").exists():
            self._same(self._read()["setting"], how, "it")
        elif self.output.exists() and any(self.output.iterdir()):
            raise ValueError(f"{self.output} exists and holds no diagnosis: choose another output")
        else:
            self._write({"schema": SCHEMA, "versions": versions("timm"), "setting": how, "diagnostics": {}})

    def _same(self, there: dict[str, Any], here: dict[str, Any], what: str) -> None:
        here = json.loads(json.dumps(here))
        if differs := [name for name in here if there.get(name) != here[name]]:
            told = "; ".join(f"{name} was {there.get(name)!r} and would be {here[name]!r}" for name in differs)
            raise ValueError(f"{self.output}: {what} was done with another setting: {told}; choose another output")

    def _read(self) -> dict[str, Any]:
        path = self.output / "diagnosis.json"
        try:
            values = json.loads(path.read_text())
            newer = values["schema"] > SCHEMA
            _ = values["setting"], values["diagnostics"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: expected a diagnosis in JSON, got {type(error).__name__}: {error}") from error
        if newer:
            raise ValueError(
                f"{path}: expected schema {SCHEMA} or older, got {values['schema']}: update hf_unlearnable"
            )
        return values

    def _write(self, values: dict[str, Any]) -> None:
        self.output.mkdir(parents=True, exist_ok=True)
        text = json.dumps(values, indent=1, allow_nan=False)
        for name, content in (("diagnosis.json", text), ("summary.md", summary(values))):
            partial = self.output / f".{name}.{os.getpid()}.partial"
            partial.write_text(content + "\n")
            os.replace(partial, self.output / name)

    def _own(self, name: What) -> dict[str, Any]:
        own = {field: getattr(self.setting, field) for field in OWN[name]}
        return own if name != "supervised" or self.other is None else {"other_digest": self.other.digest()}

    def run(self, what: Sequence[What] = QUICK) -> dict[str, Any]:
        """Do those that are not finished, one after the other; returns what diagnosis.json then holds.

        "supervised" without `other` is skipped: the summary says so, and a later call may do it.

        Raises:
            ValueError: one of them was finished with another setting (nothing is done then), or cannot be done.
            FloatingPointError: a training diverged.
            KeyboardInterrupt: Ctrl-C; the same call goes on.
        """
        values = self._read()
        found: dict[str, Any] = values["diagnostics"]
        todo: list[What] = [name for name in dict.fromkeys(what) if "figures" not in found.get(name, {})]
        for name in what:
            if name not in todo:
                self._same(found[name]["setting"], self._own(name), name)
        self._write(values)
        with tqdm(total=len(todo), desc="diagnostics", unit="diagnostic", disable=not self.progress) as bar:
            for name in todo:
                bar.set_postfix_str(name)
                if name == "supervised" and self.other is None:
                    entry: dict[str, Any] = {"skipped": "it needs a second dataset under another key (--other)"}
                else:
                    began, own = time.monotonic(), self._own(name)
                    entry = {"setting": own, "figures": getattr(self, name)()}
                    entry |= {"seconds": time.monotonic() - began, "hardware": hardware(self.accelerator)}
                values = self._read()
                values["diagnostics"][name] = entry
                self._write(values)
                bar.update()
        return self._read()

    def separability(self) -> dict[str, Any]:
        """`linear_separability` of perturbation, published and clean pictures; with tanh layers too where asked."""
        probes = {"linear": 0} | ({"tanh": self.setting.hidden} if self.setting.hidden else {})
        return {
            name: asdict(linear_separability(self.clean, self.published, seed=self.setting.seed, hidden=layers))
            for name, layers in probes.items()
        }

    def detector(self) -> dict[str, Any]:
        """`simple_network_score` and `bias_shift_score` of published and of clean rows; the simple networks see larger
        pictures shrunk to 32 pixels."""
        kinds: tuple[Literal["linear", "two_layer"], ...] = ("linear", "two_layer")
        splits = {"published": self.published, "clean": self.clean}
        small = {name: _shrunk(split) for name, split in splits.items()}
        how: dict[str, Any] = {"epochs": self.setting.detector_epochs, **self._how()}
        found = {
            kind: {name: asdict(simple_network_score(split, kind=kind, **how)) for name, split in small.items()}
            for kind in kinds
        }
        network = self._network(len(self.clean.classes))
        shifted = {name: asdict(bias_shift_score(network, split, **how)) for name, split in splits.items()}
        return {**found, "bias_shift": shifted}

    def samples(self) -> dict[str, Any]:
        """`sample_auc` on the rows, half of them published and the others clean (class by class), for each length."""
        poisoned = self._half()
        mixed = dataclasses.replace(
            self.clean, pixels=torch.where(poisoned[:, None, None, None], self.published.pixels, self.clean.pixels)
        )
        points, network = [], self._network(len(self.clean.classes))
        for epochs in self.setting.sample_epochs:
            found = sample_auc(network, mixed, poisoned, epochs=epochs, **self._how())
            points.append({"epochs": epochs, **_areas(found)})
        return {"points": points, "chance_deviation": _chance_deviation(poisoned)}

    def supervised(self) -> dict[str, Any]:
        """`supervised_auc`: taught on one half of the rows under the other key, tested on the other half.

        Raises:
            ValueError: there is no dataset under another key.
        """
        if self.other is None:
            raise ValueError("expected a second dataset under another key (other), got none")
        half = self._half()
        taught, tested = half.nonzero()[:, 0], (~half).nonzero()[:, 0]
        known = self.clean.select(taught), self.other.select(taught)
        unknown = self.clean.select(tested), self.published.select(tested)
        found = supervised_auc(self._network(2), known, unknown, recipe=self.recipe, **self._how())
        kinds = torch.arange(2 * len(tested)) < len(tested)
        return {**_areas(found), "chance_deviation": _chance_deviation(kinds), "pairs": [len(taught), len(tested)]}

    def shortcuts(self) -> dict[str, Any]:
        """What a victim follows on rows held out of its training, and R_p of its answers on clean test rows.

            x + delta(x);  x + delta(x'), y' = y, x' != x;  x + delta(x'), y' the next class;  x

        Each for the victim of the published rows and, as the reference, for that of the clean ones. Sums are clamped to
        [0, 255].

        Raises:
            ValueError: fewer than two classes, or a class with a single row among those held out.

        Source: METHODS_NEW N43 (feature use); MMM, equations 4 and 5 (R_p). Deviations: the sheet swaps within classes
        alone, and its key-bound test (a permuted key on test pictures) needs the key: not done.
        """
        published, clean = (s.split(HELD_OUT, key=self.setting.seed)[1] for s in (self.published, self.clean))
        labels = clean.labels.cpu()
        same, following = (donors(labels, ahead=n, seed=self.setting.seed).to(clean.device) for n in (0, 1))
        delta = published.pixels.to(torch.int16) - clean.pixels
        carried = {
            "own": published,
            "same_class": dataclasses.replace(clean, pixels=_plus(clean.pixels, delta[same])),
            "next_class": dataclasses.replace(clean, pixels=_plus(clean.pixels, delta[following])),
            "none": clean,
        }
        carried["next_class_as_delta"] = dataclasses.replace(carried["next_class"], labels=clean.labels[following])
        figures: dict[str, Any] = {"train_rows": len(self.clean) - len(clean), "held_out_rows": len(clean)}
        for name in ("published", "clean"):
            network, result = self._victim(name)
            figures[name] = {
                "held_out": {kind: self._accuracy(network, split) for kind, split in carried.items()},
                "train_accuracy": result.curve[-1].train_accuracy,
                "test_accuracy": result.test_accuracy,
                "reliance": reliance(result.confusion),
            }
        classes = len(clean.classes)
        return {**figures, "chance": result.chance, "most_reliance": (classes - 1) / classes**2}

    def dfr(self) -> dict[str, Any]:
        """`dfr_with_controls` of the victim of the published rows, and the same re-fit of that of the clean rows.

        The control from scratch takes about as many steps as the victim took.

        Raises:
            ValueError: more clean rows wanted than there are validation rows.
        """
        wanted, seed = self.setting.dfr_rows, self.setting.seed
        if wanted > len(self.validation):
            raise ValueError(f"dfr_rows: expected at most the {len(self.validation)} validation rows, got {wanted}")
        clean = self.validation.select(stratified_rows(self.validation.labels.cpu(), wanted, key=seed))
        network, result = self._victim("published")
        longer = changed(self.recipe, epochs=-(-result.curve[-1].steps // clean.steps(self.recipe.batch_size)))
        longer = dataclasses.replace(longer, drop_last=False)
        found = dfr_with_controls(network, clean, self.test, recipe=longer, **self._how())
        reference, result = self._victim("clean")
        refit, step = refit_last_layer(reference, clean, seed=seed)
        return {
            "published": {**asdict(found), "learnt": found.learnt},
            "clean": {
                "before": result.test_accuracy,
                "refitted": self._accuracy(refit, self.test),
                "refitted_step": step,
            },
            "epochs_from_scratch": longer.epochs,
        }

    def recovery(self) -> dict[str, Any]:
        """`recover` the victim of the published rows, and that of the clean ones, on the fifth of the clean rows that
        neither was trained on; and what those rows give a network of their own, in about the victim's number of steps.
        """
        seed = self.setting.seed
        _, few = self.clean.split(HELD_OUT, key=seed)
        short = changed(RECOVERY, epochs=self.setting.recovery_epochs)
        figures: dict[str, Any] = {"clean_rows": len(few)}
        for name in ("published", "clean"):
            network, result = self._victim(name)
            points = []
            for radius in RADII:
                near = recover(network, few, radius=radius, recipe=short, **self._how())
                told = {"radius": radius if math.isfinite(radius) else None, "moved": distance(near, network)}
                points.append({**told, "accuracy": self._accuracy(near, self.test)})
            figures[name] = {"before": result.test_accuracy, "points": points}
        longer = changed(self.recipe, epochs=-(-result.curve[-1].steps // few.steps(self.recipe.batch_size)))
        scratch = train_to_end(
            self._network(len(self.clean.classes)),
            few,
            self.test,
            recipe=dataclasses.replace(longer, drop_last=False),
            defense=Erm(),
            **self._how(),
        )
        return {**figures, "from_scratch": scratch.test_accuracy, "epochs_from_scratch": longer.epochs}

    def certificate(self) -> dict[str, Any]:
        """`certify` the accuracy on clean test rows of the victim of the published rows, and of that of the clean."""
        wanted = min(self.setting.certificate_rows, len(self.test))
        few = self.test.select(stratified_rows(self.test.labels.cpu(), wanted, key=self.setting.seed))
        figures: dict[str, Any] = {"test_rows": wanted}
        for name in ("published", "clean"):
            network, _ = self._victim(name)
            made = certify(
                network,
                lambda model: self._accuracy(model, few),
                sigma=self.setting.sigma,
                draws=self.setting.draws,
                seed=self.setting.seed,
                progress=self.progress,
            )
            figures[name] = {
                "unperturbed": made.unperturbed,
                "median": made.accuracies[len(made.accuracies) // 2],
                "highest": made.accuracies[-1],
                "bounds": [{"eta": eta, "accuracy": made.bound(eta)} for eta in ETAS],
            }
        how = {"quantile": made.quantile, "confidence": made.confidence, "largest_eta": made.largest_eta}
        return {**figures, **how, "chance": int(torch.bincount(few.labels).max()) / len(few)}

    def _how(self) -> dict[str, Any]:
        return {"accelerator": self.accelerator, "seed": self.setting.seed, "progress": self.progress}

    def _half(self) -> Tensor:
        chosen = torch.zeros(len(self.clean), dtype=torch.bool)
        chosen[stratified_rows(self.clean.labels.cpu(), len(self.clean) // 2, key=self.setting.seed)] = True
        return chosen.to(self.clean.device)

    def _network(self, classes: int) -> Network:
        return create_network(
            self.setting.backbone, num_classes=classes, image_size=self.clean.image_size, seed=self.setting.seed
        )

    def _victim(self, name: Literal["published", "clean"]) -> tuple[Network, Result]:
        """Trained plainly on four fifths of the rows; kept in the output, and gone on with from there."""
        training, _ = (self.published if name == "published" else self.clean).split(HELD_OUT, key=self.setting.seed)
        network = self._network(len(training.classes))
        result = train_to_end(
            network,
            training,
            self.test,
            recipe=self.recipe,
            defense=Erm(),
            checkpoint=self.output / f"victim-{name}.safetensors",
            **self._how(),
        )
        return network, result

    def _accuracy(self, model: nn.Module, split: Batches) -> float:
        confusion = evaluate(model, split, accelerator=self.accelerator)
        return int(confusion.trace()) / int(confusion.sum())


def donors(labels: Labels, *, ahead: int, seed: Key) -> Int[Tensor, " n"]:
    """For every row another one, whose perturbation it is to carry; a fixed cycle through each class, drawn from seed.

    Args:
        labels: on the CPU.
        ahead: 0 for a row of the same class, 1 for the next class that has rows (after the last the first), and so on.

    Raises:
        ValueError: fewer than two classes, or a class with a single row.
    """
    counts = torch.bincount(labels)
    present = counts.nonzero()[:, 0]
    if len(present) < 2 or int(counts[present].min()) < 2:
        raise ValueError(
            f"expected two classes or more and two rows of each to swap perturbations, got {counts.tolist()} rows held "
            "out: take more rows"
        )
    start = counts.cumsum(0) - counts
    order = torch.randperm(len(labels), generator=torch_generator(seed, "donors"))
    by_class = order[labels[order].argsort(stable=True)]
    place = torch.empty_like(labels)
    place[by_class] = torch.arange(len(labels)) - start[labels[by_class]]
    target = present[(torch.searchsorted(present, labels) + ahead) % len(present)]
    return by_class[start[target] + (place + 1) % counts[target]]


def _plus(pixels: UInt8[Tensor, "n 3 h w"], delta: Tensor) -> UInt8[Tensor, "n 3 h w"]:
    return (pixels + delta).clamp_(0, 255).to(torch.uint8)


def _shrunk(split: Batches) -> Batches:
    if min(split.image_size) <= DETECTOR_PIXELS:
        return split
    parts = [tvf.resize(part, [DETECTOR_PIXELS], antialias=True) for part in split.pixels.split(1000)]
    return dataclasses.replace(split, pixels=torch.cat(parts))


def _areas(found: Any) -> dict[str, float]:
    return {name: getattr(found, name) for name in ("auc", "fpr_at_95_tpr", "half_total_error")}


def _chance_deviation(truth: Tensor) -> float:
    """Standard deviation of the area under the curve where truth has nothing to do with the scores (Mann-Whitney)."""
    right = int(truth.sum())
    return math.sqrt((len(truth) + 1) / (12 * right * (len(truth) - right)))
