"""Attackers: what a trainer may do with published pictures, and the suites of them that an evaluation runs."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from hf_unlearnable.defenses.adversarial import Adversarial
from hf_unlearnable.defenses.augmented import Augmented
from hf_unlearnable.defenses.base import Defense, describe
from hf_unlearnable.defenses.blur import GaussianBlur
from hf_unlearnable.defenses.data import DataDefense
from hf_unlearnable.defenses.displace import RandomDisplacement
from hf_unlearnable.defenses.dvae import Dvae
from hf_unlearnable.defenses.erm import Erm
from hf_unlearnable.defenses.filters import DeconvolutionAdversarial, RandomFilter
from hf_unlearnable.defenses.fresh import EachStep
from hf_unlearnable.defenses.inversion import FilterInversion
from hf_unlearnable.defenses.mixing import Cutmix, Mixup
from hf_unlearnable.defenses.orthogonal import OrthogonalRegularization
from hf_unlearnable.defenses.projection import OrthogonalProjection
from hf_unlearnable.defenses.resize import Resize
from hf_unlearnable.defenses.sda import AdversarialNoise
from hf_unlearnable.defenses.sharpen import RandomSharpening
from hf_unlearnable.defenses.smoothing import Smoothing
from hf_unlearnable.defenses.squeeze import BitDepth, Grayscale, Jpeg, Webp
from hf_unlearnable.defenses.strong import StrongAugmentation
from hf_unlearnable.defenses.ueraser import Ueraser
from hf_unlearnable.digests import file_digest
from hf_unlearnable.networks import Network, create_pretrained, freeze_early

SuiteName = Literal["quick", "standard", "full"]


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """Weights that a victim starts from.

    Args:
        backbone: a short name or timm's, see `create_network`.
        file: a safetensors file with its weights; None for timm's from the Hub.
        image_size: side in pixels that pictures are stretched to inside the network; None: as they are.
        frozen_stages: see `networks.freeze_early`; "all" trains the last layer alone.
        frozen_batch_norm: see `networks.Network`.
    """

    backbone: str
    file: str | None = None
    image_size: int | None = None
    frozen_stages: int | Literal["all"] | None = None
    frozen_batch_norm: bool = False

    def network(self, num_classes: int, image_size: tuple[int, int], seed: int) -> Network:
        """The victim before its training, with a last layer for these classes drawn under the seed.

        Raises:
            ValueError, FileNotFoundError: see `create_network`; weights of another network.
        """
        seen = image_size if self.image_size is None else (self.image_size, self.image_size)
        how: dict[str, Any] = {"num_classes": num_classes, "image_size": seen, "seed": seed}
        network = create_pretrained(self.backbone, pretrained=self.file or True, **how)
        network.sees = None if self.image_size is None else seen
        network.frozen_batch_norm = self.frozen_batch_norm
        freeze_early(network, self.frozen_stages)
        return network

    def words(self) -> str:
        """For people: which weights, at which size, and what of them stays as it is."""
        told = [
            f"{self.backbone} from " + ("timm's weights" if self.file is None else f"weights {self._digest()[:12]}")
        ]
        told += [] if self.image_size is None else [f"at {self.image_size} px"]
        told += [] if self.frozen_stages is None else [f"{self.frozen_stages} stages frozen"]
        return ", ".join([*told, *(["BatchNorm frozen"] if self.frozen_batch_norm else [])])

    def _digest(self) -> str:
        assert self.file is not None
        return _digest_once(self.file)

    def described(self) -> dict[str, Any]:
        """As plain data; of a file, the digest in place of its path."""
        values = dataclasses.asdict(self)
        del values["file"]
        return {**values, "file_sha256": None if self.file is None else self._digest()}


@cache
def _digest_once(file: str) -> str:
    return file_digest(Path(file))


@dataclass(frozen=True, kw_only=True)
class Attacker:
    """What a trainer does: data defenses, one after the other on the whole split, and then a training.

    Args:
        name: in tables and file names.
        data: fitted to the published rows and applied to them, once.
        loss: the training's.
        backbone: the victim's, where it is another than the suite's.
        recipe: its name, where it is another than the suite's.
        changes: to the recipe.
        start: weights to start from, in place of random ones.
    """

    name: str
    data: tuple[DataDefense, ...] = ()
    loss: Defense = field(default_factory=Erm)
    backbone: str | None = None
    recipe: str | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)
    start: Pretrained | None = None

    def words(self) -> str | None:
        """For people: how the victim differs from the suite's; None where it does not."""
        told = [] if self.start is None else [self.start.words()]
        told += [] if self.backbone is None else [self.backbone]
        told += [] if self.recipe is None else [f"recipe {self.recipe}"]
        told += [f"{name} {value}" for name, value in self.changes.items()]
        return ", ".join(told) or None

    def described(self) -> dict[str, Any]:
        """As plain data; two attackers of one description do the same."""
        return {
            "data": [describe(defense) for defense in self.data],
            "loss": describe(self.loss),
            "backbone": self.backbone,
            "changes": dict(self.changes),
            **({} if self.recipe is None else {"recipe": self.recipe}),
            **({} if self.start is None else {"start": self.start.described()}),
        }


@dataclass(frozen=True, kw_only=True)
class Suite:
    """How thoroughly a dataset is attacked.

    Args:
        backbone, recipe: of the victims.
        seeds: of the trainings.
        rows: the most training rows; None for all.
        image_size: side in pixels that victims see pictures at; None: as they are.
        attackers: the first is plain training.
        fractions: shares of protected rows, mixed with clean ones, under plain training.
        least_train_accuracy: what plain training must reach on the published rows, or its figures are refused as those
            of a victim that was trained too little; None: as much as on the clean rows, less two points.
    """

    name: str
    backbone: str
    recipe: str
    seeds: tuple[int, ...]
    rows: int | None
    attackers: tuple[Attacker, ...]
    fractions: tuple[float, ...] = ()
    least_train_accuracy: float | None = None
    image_size: int | None = None


def _attacker(name: str, *defenses: Defense | DataDefense, **more: Any) -> Attacker:
    """Data defenses in their order and at most one loss, last."""
    data: list[DataDefense] = []
    loss: Defense = Erm()
    for defense in reversed(defenses):
        if not isinstance(defense, DataDefense):
            loss = defense
        elif defense.each_step == "never":
            data.insert(0, defense)
        else:
            loss = EachStep(defense, loss)
    return Attacker(name=name, data=tuple(data), loss=loss, **more)


def _core(at: Adversarial) -> tuple[Attacker, ...]:
    return (
        _attacker("erm"),
        _attacker("grayscale", Grayscale()),
        _attacker("jpeg-10", Jpeg(quality=10)),
        _attacker("bit-depth-2", BitDepth(bits=2)),
        _attacker("ueraser-lite", Ueraser(mode="lite")),
        _attacker("ueraser", Ueraser()),
        _attacker("at-4", at),
        _attacker("rsk-ff", RandomSharpening()),
        _attacker("coin", RandomDisplacement()),
        _attacker("op", OrthogonalProjection()),
        _attacker("cutmix", Cutmix()),
    )


def _tier_1() -> tuple[Attacker, ...]:
    return (
        *_core(Adversarial()),
        _attacker("ueraser-max", Ueraser(mode="max")),
        _attacker("mixup", Mixup()),
        _attacker("cutout", Augmented("cutout")),
        _attacker("jpeg-50", Jpeg(quality=50)),
        _attacker("gaussian-blur", GaussianBlur()),
        _attacker("grayscale+jpeg-10", Grayscale(), Jpeg(quality=10)),
        _attacker("jpeg-10+ueraser", Jpeg(quality=10), Ueraser()),
        _attacker("coin+rsk-ff", RandomDisplacement(), RandomSharpening()),
        _attacker("op+cutmix", OrthogonalProjection(), Cutmix()),
        _attacker("republished jpeg-75", Jpeg(quality=75)),
        _attacker("republished webp-80", Webp(quality=80)),
        _attacker("republished half size", Resize(scale=0.5)),
        _attacker("erm on vgg16_bn", backbone="vgg16_bn"),
        _attacker("erm on densenet121", backbone="densenet121"),
    )


def _tier_2() -> tuple[Attacker, ...]:
    return (
        _attacker("at-2", Adversarial(radius=2 / 255)),
        _attacker("at-8", Adversarial(radius=8 / 255)),
        _attacker("at-l2-0.5", Adversarial(norm="l2", radius=0.5)),
        _attacker("smoothing", Smoothing()),
        _attacker("orthogonal", OrthogonalRegularization()),
        _attacker("random-filter", RandomFilter()),
        *(_attacker(f"dat-{k}", DeconvolutionAdversarial(filter_size=k)) for k in (3, 5, 7)),
        _attacker("auto-augment", Augmented("auto_augment")),
        _attacker("rand-augment", Augmented("rand_augment")),
        _attacker("trivial-augment", Augmented("trivial_augment")),
        _attacker("sda-an", AdversarialNoise(), StrongAugmentation(), changes={"augmentation": "none"}),
        _attacker("d-vae", Dvae()),
        _attacker("republished jpeg-95", Jpeg(quality=95)),
        _attacker("republished one and a half size", Resize(scale=1.5)),
    )


def adaptive() -> tuple[Attacker, ...]:
    """Trainers who know CUDA and its settings, and to whom one or ten clean pictures of every class leaked.

    Source: METHODS_NEW part IV, P5, tier 3. Deviations: the hundred pairs there are left out.
    """
    return tuple(
        _attacker(f"{pairs} leaked {'pair' if pairs == 1 else 'pairs'} a class", FilterInversion(pairs=pairs))
        for pairs in (1, 10)
    )


def pretrained(backbone: str, *, file: str | None = None, image_size: int | None = None) -> tuple[Attacker, ...]:
    """Trainers who start from pretrained weights, by the recipe "finetune": the last layer alone (ten times the
    learning rate), all but the stem and the first stage, everything, and everything with BatchNorm frozen.

    Args:
        backbone, file, image_size: see `Pretrained`.

    Source: METHODS_NEW N30. Deviations: the frozen probe is a last layer that is trained as the others are;
    `probes.frozen_probe` is the closed form.
    """
    start = Pretrained(backbone=backbone, file=file, image_size=image_size)
    ways: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "last layer of": ({"frozen_stages": "all", "frozen_batch_norm": True}, {"learning_rate": 1e-3}),
        "partly fine-tuned": ({"frozen_stages": 1}, {}),
        "fine-tuned": ({}, {}),
        "fine-tuned with frozen norms": ({"frozen_batch_norm": True}, {}),
    }
    return tuple(
        Attacker(name=f"{way} {backbone}", recipe="finetune", changes=changes, start=replace(start, **more))
        for way, (more, changes) in ways.items()
    )


def suite(name: SuiteName) -> Suite:
    """A suite by name.

    - quick: the tiny network on at most 10,000 rows, five epochs: an hour on two CPU cores. Its adversarial training
      takes three steps of 2/255 where the others take ten of 0.8/255.
    - standard: ResNet-18 on all rows for 30 epochs, tier 1 of the protocol, fractions 0.5 and 0.8.
    - full: ResNet-18 by `cuda100`, tiers 1 and 2, three seeds, fractions 0.1 to 0.9.

    Raises:
        ValueError: there is no such suite.

    Source: METHODS_NEW part IV, P5. Deviations: pretrained trainers are added with `pretrained` only, as their weights
    must come from somewhere, and the adaptive tier 3 with `adaptive`, as it is told some clean pictures; the strong
    recipe of OP's paper, AVATAR, SimCLR and DFR are no part of any suite (`hf_unlearnable.last_layer` has DFR).
    """
    if name == "quick":
        weak = Adversarial(pgd_steps=3, pgd_step_size=2 / 255)
        return Suite(name=name, backbone="tiny", recipe="tiny", seeds=(0, 1), rows=10_000, attackers=_core(weak))
    if name == "standard":
        return Suite(
            name=name,
            backbone="resnet18",
            recipe="fast",
            seeds=(0, 1),
            rows=None,
            attackers=_tier_1(),
            fractions=(0.5, 0.8),
            least_train_accuracy=0.95,
        )
    if name == "full":
        return Suite(
            name=name,
            backbone="resnet18",
            recipe="cuda100",
            seeds=(0, 1, 2),
            rows=None,
            attackers=(*_tier_1(), *_tier_2()),
            fractions=(0.1, 0.2, 0.5, 0.8, 0.9),
            least_train_accuracy=0.95,
        )
    raise ValueError(f"expected a suite of {get_args(SuiteName)}, got {name!r}")
