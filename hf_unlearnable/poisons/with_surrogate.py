"""SurrogatePoison: a poison that learns something from the dataset first."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from accelerate import Accelerator

from hf_unlearnable import fitting
from hf_unlearnable.batches import Batches
from hf_unlearnable.draws import Draws
from hf_unlearnable.environment import hardware, versions
from hf_unlearnable.fitting import Fit, Setup
from hf_unlearnable.images import Images, Labels
from hf_unlearnable.keys import Key, cache_tag, check_key, commitment, subkey
from hf_unlearnable.poisons.base import Poison
from hf_unlearnable.recipes import Recipe
from hf_unlearnable.surrogate import Surrogate
from hf_unlearnable.training import as_input

P = TypeVar("P", bound="SurrogatePoison")


def settled(default: Any) -> Any:
    """A field that shapes the surrogate: what it was in training holds for good."""
    return field(default=default, metadata={"settled": True})


@dataclass(frozen=True, kw_only=True)
class SurrogatePoison(Poison):
    """A poison that is trained once (`fit`), kept in a file (`Surrogate.save`) and then mapped (`from_surrogate`).

        surrogate = MinMaxMinPoison(epsilon=8 / 255).fit(Batches.load(train), seed=0)
        surrogate.save("mmm.safetensors")
        train.map(MinMaxMinPoison.from_surrogate("mmm.safetensors"), batched=True)

    Pixels do not depend on batches or processes but for the last bits of the network's arithmetic, which may differ
    between batch shapes: a value near a rounding boundary or near a zero of the gradient then falls to the other side.

    Args:
        surrogate: what was learnt; without it a poison can be fitted, and not be mapped.
        seed: what random starts are drawn from; by default a secret that follows from the surrogate's tensors.
    """

    surrogate: Surrogate | None = field(default=None, repr=False)
    seed: Key = field(default=b"", repr=False)

    recipe: ClassVar[Recipe]
    """How the surrogate is trained by default."""
    backbone: ClassVar[str] = "resnet18"
    """The network trained by default."""

    def __post_init__(self) -> None:
        known = self.surrogate
        if self.seed == b"":
            object.__setattr__(self, "seed", 0 if known is None else _derived(known))
        if known is not None:
            if known.method != self.name:
                raise ValueError(f"expected a surrogate for {self.name!r}, got one for {known.method!r}")
            if self.uses_labels:
                if self.num_classes not in (None, len(known.classes)):
                    raise ValueError(
                        f"expected {self.num_classes} classes (num_classes), got a surrogate for {len(known.classes)}"
                    )
                object.__setattr__(self, "num_classes", len(known.classes))
        super().__post_init__()

    # What a method defines.

    def fitting(self, setup: Setup) -> Fit:
        """The training of this poison's surrogate."""
        raise TypeError(f"{type(self).__name__} does not say how its surrogate is trained")

    def craft(self, x: Images, y: Labels | None, draws: Draws, surrogate: Surrogate) -> Images:
        """The batch generator, with the surrogate at hand; x lies in memory as its networks like best."""
        raise TypeError(f"{type(self).__name__} does not say how it perturbs")

    # Final.

    @property
    def drawn_from_surrogate(self) -> bool:
        """Whether the seed is the secret that follows from the surrogate."""
        return self.surrogate is not None and self.seed == _derived(self.surrogate)

    @classmethod
    def from_surrogate(cls: type[P], source: Surrogate | str | Path, *, seed: Key | None = None, **changes: Any) -> P:
        """The poison of a surrogate, with the settings that it was trained for.

        Args:
            source: a surrogate, its file, or the Hub id of a model repository that holds one.
            seed: what random starts are drawn from; by default a secret that follows from the surrogate.
            changes: other values for fields of the poison, but for those that shaped the surrogate.

        Raises:
            FileNotFoundError: there is no such file or repository.
            ValueError: the file is damaged, altered, of another method, of another version of it or of a newer schema;
                a settled field changed.
        """
        known = source if isinstance(source, Surrogate) else Surrogate.load(source)
        if known.method != cls.name:
            raise ValueError(f"{source}: expected a surrogate for {cls.name!r}, got one for {known.method!r}")
        if (made := known.provenance.get("version")) != cls.version:
            raise ValueError(
                f"{source}: expected a surrogate for version {cls.version} of {cls.name!r}, got one of version {made}: "
                "its pixels would differ; train another, or use the hf_unlearnable that made it"
            )
        own = {f.name: f for f in fields(cls)}
        if strange := sorted(set(known.settings) - set(own)):
            raise ValueError(f"{source}: this version's {cls.name!r} has no setting {strange[0]!r}")
        for name in changes:
            if name in own and own[name].metadata.get("settled") and changes[name] != _value(known.settings.get(name)):
                raise ValueError(
                    f"{name} was settled when the surrogate was trained, as {known.settings.get(name)!r}, "
                    f"got {changes[name]!r}: train another surrogate"
                )
        values = {name: _value(value) for name, value in known.settings.items()}
        key = {} if seed is None else {"seed": seed}
        return cls(surrogate=known, **key, **{**values, **changes})

    def fit(
        self,
        train: Batches,
        *,
        seed: Key = 0,
        recipe: Recipe | None = None,
        backbone: str | None = None,
        accelerator: Accelerator | None = None,
        test: Batches | None = None,
        measure_every: int | None = None,
        checkpoint: str | Path | None = None,
        checkpoint_seconds: float = 60.0,
        max_minutes: float | None = None,
        source: str | None = None,
        progress: bool = True,
    ) -> Surrogate:
        """Train the surrogate, on all processes of the accelerator.

        Args:
            train: the clean training rows.
            seed: of initial weights, order, augmentation and random starts; an uninterrupted training and a resumed
                one with the same seed give the same surrogate (bit for bit on a CPU). Who has the clean pictures and
                an int seed, which the provenance tells, can train the surrogate again; under a 32-byte secret not.
            recipe: how to train; default: the paper's (the class's `recipe`).
            backbone: a short name or any name of timm; default: the paper's.
            test, measure_every: clean rows on which the surrogate's accuracy is measured during training, now and then.
            checkpoint, checkpoint_seconds, max_minutes: see `fitting.run`.
            source: what is said of the data in the surrogate's provenance.
            progress: bars on the main process.

        Raises:
            ValueError: a class without rows, fewer rows than the method needs, or as `fitting.run`.
            Unfinished, FloatingPointError, KeyboardInterrupt: as `fitting.run`.
        """
        accelerator, seed = accelerator or Accelerator(), check_key(seed)
        recipe, backbone = recipe or self.recipe, backbone or self.backbone
        _check_rows(train, recipe, needs_labels=self.uses_labels)
        if test is not None:
            test = test.relabel(train.classes).to(accelerator.device)
        train = train.to(accelerator.device)
        setup = Setup(train=train, recipe=recipe, backbone=backbone, seed=seed, accelerator=accelerator)
        fit = self.fitting(setup)
        settings = self.own_settings()
        what = {
            "method": self.name,
            "version": self.version,
            "settings": settings,
            "recipe": dataclasses.asdict(recipe),
            "backbone": backbone,
            "seed": seed if isinstance(seed, int) else commitment(seed),
            "precision": accelerator.mixed_precision,
            "data": {"source": source, "rows": len(train), "sha256": train.digest()},
        }
        done = fitting.run(
            fit,
            what=what,
            test=test,
            measure_every=measure_every,
            checkpoint=checkpoint,
            checkpoint_seconds=checkpoint_seconds,
            max_minutes=max_minutes,
            progress=progress,
            description=f"{self.name}: surrogate",
        )
        networks, tensors = {}, {name: tensor.detach().cpu() for name, tensor in fit.kept().items()}
        for name, network in fit.networks().items():
            networks[name] = {
                "backbone": network.architecture,
                "num_classes": network.num_classes,
                "mean": network.mean.flatten().tolist(),
                "std": network.std.flatten().tolist(),
            }
            if network.image_size is not None and network.image_size != train.image_size:
                networks[name]["image_size"] = list(network.image_size)
            tensors |= {f"{name}.{key}": value.detach().cpu() for key, value in network.state_dict().items()}
        provenance = {
            **{name: what[name] for name in ("version", "recipe", "backbone", "seed", "data")},
            "steps": done.step,
            "seconds": round(done.seconds, 3),
            "curve": done.curve,
            "state": fit.state,
            "hardware": hardware(accelerator),
            "versions": versions("timm", "accelerate"),
        }
        return Surrogate(
            method=self.name,
            settings=settings,
            classes=train.classes if self.uses_labels else (),
            image_size=train.image_size,
            networks=networks,
            tensors={name: tensor.contiguous() for name, tensor in tensors.items()},
            provenance=provenance,
        )

    def perturb(self, x: Images, y: Labels | None, draws: Draws) -> Images:
        known = self.surrogate
        if known is None:
            raise ValueError(f"this {type(self).__name__} has no surrogate: fit one, or use from_surrogate")
        if tuple(x.shape[2:]) != known.image_size:
            raise ValueError(
                f"expected pictures of {known.image_size[0]} x {known.image_size[1]} pixels (height x width), for "
                f"which the surrogate was trained, got {x.shape[2]} x {x.shape[3]}: resize the dataset before both"
            )
        if self.uses_labels and y is None:
            raise ValueError("expected labels, got none")
        return self.craft(as_input(x), y, draws, known).contiguous()

    def own_settings(self) -> dict[str, Any]:
        """The hyper-parameters of the method alone, as JSON values."""
        base = {f.name for f in fields(SurrogatePoison)}
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in base and f.repr}

    def settings(self) -> dict[str, Any]:
        known = self.surrogate
        return {**super().settings(), "surrogate": None if known is None else f"sha256:{known.digest}"}

    def cache_state(self) -> dict[str, Any]:
        known = self.surrogate
        return {**super().cache_state(), "surrogate": None if known is None else cache_tag(known.secret())}

    @property
    def known_classes(self) -> Sequence[str] | None:
        known = self.surrogate
        return known.classes if known is not None and self.uses_labels else super().known_classes

    def check_classes(self, names: Sequence[str] | None, where: str) -> None:
        super().check_classes(names, where)
        known = self.surrogate
        if known is None or names is None or not self.uses_labels or tuple(names) == known.classes:
            return
        if len(names) != len(known.classes):
            raise ValueError(f"{where}: expected the surrogate's {len(known.classes)} classes, got {len(names)}")
        if known.classes != tuple(str(i) for i in range(len(known.classes))):
            first = next(i for i, name in enumerate(names) if name != known.classes[i])
            raise ValueError(
                f"{where}: expected the classes of the surrogate in its order, got {names[first]!r} as class {first} "
                f"in place of {known.classes[first]!r}"
            )


def _derived(surrogate: Surrogate) -> bytes:
    return subkey(surrogate.secret(), "surrogate poison")


def _value(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _check_rows(train: Batches, recipe: Recipe, *, needs_labels: bool) -> None:
    if needs_labels:
        counts = torch.bincount(train.labels.cpu(), minlength=len(train.classes))
        if (empty := (counts == 0).nonzero().flatten().tolist()) and len(train):
            raise ValueError(
                f"expected rows of every class, got none of class {empty[0]} ({train.classes[empty[0]]}); "
                "leave out its name: ds.cast_column(label, Value('string')), then ds.class_encode_column(label)"
            )
    if not train.steps(recipe.batch_size, drop_last=recipe.drop_last):
        least = f"a batch of {recipe.batch_size}" if recipe.drop_last else "one"
        raise ValueError(f"expected at least {least} rows to train on, got {len(train)}")
