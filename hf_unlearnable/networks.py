"""timm backbones for pictures of any size, with the normalisation inside.

`create_network("resnet18", num_classes=10, image_size=32, seed=0)` takes float RGB pictures in [0, 1], (b, 3, h, w).
"""

import contextlib
import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import timm
import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors import safe_open
from timm.models import group_parameters
from torch import Tensor, nn

import hf_unlearnable.architectures  # noqa: F401  (registers the small-picture networks with timm)

M = TypeVar("M", bound=nn.Module)

SMALL = 64

# short name: (its form for pictures whose shorter side is at most 64 pixels, timm's own for larger ones)
SHORT_NAMES: dict[str, tuple[str, str]] = {
    "resnet18": ("cifar_resnet18", "resnet18"),
    "resnet50": ("cifar_resnet50", "resnet50"),
    "vgg11_bn": ("cifar_vgg11_bn", "vgg11_bn"),
    "vgg16_bn": ("cifar_vgg16_bn", "vgg16_bn"),
    "densenet121": ("cifar_densenet121", "densenet121"),
    "wrn34_10": ("cifar_wrn34_10", "cifar_wrn34_10"),
    "mobilenetv2": ("cifar_mobilenetv2", "mobilenetv2_100"),
    "vit": ("cifar_vit", "vit_small_patch16_224"),
    "deit_tiny": ("cifar_deit_tiny", "deit_tiny_patch16_224"),
    "efficientnetv2_s": ("cifar_efficientnetv2_s", "tf_efficientnetv2_s"),
    "tiny": ("cifar_tiny", "cifar_tiny"),
}


class Network(nn.Module):
    """A timm backbone behind the normalisation of its pictures.

    Args:
        backbone: a classifier with timm's interface.
        mean, std: one number a channel, for pictures in [0, 1]; (0, 0, 0) and (1, 1, 1) leave them as they are.

    Raises:
        ValueError: `mean` or `std` does not have three numbers, or a `std` is not positive.
    """

    mean: Tensor
    std: Tensor
    image_size: tuple[int, int] | None = None
    """The height and width that `create_network` was told."""
    frozen_batch_norm: bool = False
    """Whether `train()` leaves BatchNorm in evaluation mode: it normalises by its running statistics, which stay."""
    sees: tuple[int, int] | None = None
    """The height and width that pictures of other sizes are stretched to first (bicubic, antialiased, clamped)."""

    def __init__(
        self, backbone: nn.Module, mean: Sequence[float] = (0.0, 0.0, 0.0), std: Sequence[float] = (1.0, 1.0, 1.0)
    ) -> None:
        super().__init__()
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(f"expected three means and three positive stds (RGB), got mean={mean} and std={std}")
        self.backbone: Any = backbone
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    @property
    def architecture(self) -> str:
        """The name under which timm creates this backbone, "cifar_resnet18" for "resnet18" and small pictures."""
        return self.backbone.pretrained_cfg["architecture"]

    @property
    def num_classes(self) -> int:
        return self.backbone.num_classes

    @property
    def num_features(self) -> int:
        """The length of what `features` returns for one picture."""
        return self.backbone.head_hidden_size

    def train(self, mode: bool = True) -> "Network":
        """Training mode, but for BatchNorm where `frozen_batch_norm`, or evaluation mode.

        BatchNorm's scale and shift are parameters like others: they are trained in either mode.
        """
        super().train(mode)
        if self.frozen_batch_norm:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.training = False
        return self

    def _normalized(self, x: Tensor) -> Tensor:
        if not x.dtype.is_floating_point:
            raise TypeError(f"expected float pictures in [0, 1], got {x.dtype}: divide uint8 pictures by 255")
        if x.ndim != 4 or x.shape[1] != 3:
            raise ValueError(f"expected RGB pictures of shape (b, 3, h, w), got {tuple(x.shape)}")
        if self.sees is not None and x.shape[2:] != self.sees:
            x = F.interpolate(x, self.sees, mode="bicubic", antialias=True).clamp(0, 1)
        return (x - self.mean) / self.std

    def features(self, x: Tensor) -> Float[Tensor, "b num_features"]:
        """What the last layer is given: pooled features of pictures in [0, 1], (b, 3, h, w).

        Raises:
            TypeError: the pictures are not of a float type.
            ValueError: they do not have the shape (b, 3, h, w).
        """
        return self.backbone.forward_head(self.backbone.forward_features(self._normalized(x)), pre_logits=True)

    def forward(self, x: Tensor) -> Float[Tensor, "b num_classes"]:
        """Logits of pictures in [0, 1], (b, 3, h, w). The range is not checked.

        Raises:
            TypeError: the pictures are not of a float type.
            ValueError: they do not have the shape (b, 3, h, w).
        """
        return self.backbone(self._normalized(x))


def create_network(
    backbone: str,
    *,
    num_classes: int,
    image_size: int | tuple[int, int],
    seed: int,
    pretrained: bool | str = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Network:
    """A network on the CPU, in training mode, whose weights depend on the seed alone.

    The weights are drawn on the CPU from a forked generator: the global ones are left as they were.

    Args:
        backbone: a short name (a key of `SHORT_NAMES`) or any name of timm, with or without the tag of its weights.
        image_size: pixels, or (height, width). It chooses what a short name means, and is the size of a transformer
            that needs to know one; convolutional networks and this library's transformers take others too.
        seed: of the initial weights.
        pretrained: True for timm's weights from the Hub, or the path of a safetensors file with the backbone's own
            weights. A head for another number of classes than `num_classes` is replaced by a fresh one.
        mean, std: the normalisation inside the network; by default none (the papers feed pictures in [0, 1]), or
            timm's for these weights when `pretrained`.

    Raises:
        ValueError: the name is unknown (names near matches), there are no weights for it on the Hub, the file is not
            safetensors or without a classifier, or a number is not positive.
        FileNotFoundError: there is no such file.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    if num_classes < 1 or min(size) < 1:
        raise ValueError(f"expected positive numbers, got num_classes={num_classes} and image_size={image_size}")
    name = _timm_name(backbone, small=min(size) <= SMALL)
    cfg = timm.get_pretrained_cfg(name)
    if pretrained is True and not (cfg and cfg.has_weights):
        larger = SHORT_NAMES.get(backbone, (name, name))[1]
        hint = f", or pictures of more than {SMALL} pixels for {larger!r}" if larger != name else ""
        raise ValueError(f"there are no weights on the Hub for {name!r}: pretrained=False, the path of a file{hint}")
    options: dict[str, Any] = {"img_size": size} if cfg and cfg.fixed_input_size else {}
    model: Any
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        # torch.manual_seed would seed the accelerators too, which fork_rng(devices=[]) does not restore
        torch.default_generator.manual_seed(seed)
        if isinstance(pretrained, str):
            rows = _num_classes_in(pretrained, cfg.classifier if cfg else None)
            model = timm.create_model(name, num_classes=rows, checkpoint_path=pretrained, **options)
            if rows != num_classes:
                model.reset_classifier(num_classes)
        else:
            model = timm.create_model(name, num_classes=num_classes, pretrained=pretrained, **options)
        own = model.pretrained_cfg if pretrained else {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
        network = Network(model, own["mean"] if mean is None else mean, own["std"] if std is None else std)
    network.image_size = size
    return network


def create_pretrained(backbone: str, *, pretrained: bool | str, **how: Any) -> Network:
    """`create_network` with weights, whose names or shapes may be another network's.

    Raises:
        ValueError: they are; and as `create_network`.
    """
    try:
        return create_network(backbone, pretrained=pretrained, **how)
    except RuntimeError as error:  # torch's, where names or shapes differ
        if pretrained is False:
            raise
        raise ValueError(f"expected weights of {backbone}, but: {' '.join(str(error).split())[:300]}") from error


def freeze_early(network: Network, stages: int | Literal["all"] | None) -> None:
    """No gradients from now on for the parameters of the stem and of the first stages.

    What a stage is, timm says: layer1 to layer4 of a ResNet, every block of a plain transformer (whose stem are the
    patch embedding, the class token and the positions). What it counts to no stage belongs to the head, which stays
    trainable. BatchNorm's running statistics are no parameters: see `Network.frozen_batch_norm`.

    Args:
        stages: how many stages beside the stem; 0 for the stem alone, None or -1 for nothing, "all" for everything but
            the last layer.

    Raises:
        ValueError: there are fewer stages, or timm knows none of this backbone.

    Source: METHODS_NEW N30. Deviations: none; there with one stage.
    """
    if stages is None:
        return
    backbone = network.backbone
    if stages == "all":
        network.requires_grad_(False)
        heads = backbone.get_classifier()
        for head in heads if isinstance(heads, tuple) else (heads,):
            head.requires_grad_(True)
        return
    try:
        groups = group_parameters(backbone, backbone.group_matcher(coarse=True), return_values=True)
    except (AttributeError, AssertionError) as error:
        raise ValueError(
            f"expected a backbone that groups its parameters by stages, as timm's do, got {type(backbone).__name__}: "
            f"{error}"
        ) from error
    head = max(groups)
    if not -1 <= stages < head:
        raise ValueError(f"expected 0 (the stem alone) to {head - 1} stages of this backbone, got {stages}")
    for number in range(stages + 1):
        for parameter in groups[number]:
            parameter.requires_grad_(False)


def memory_format(device: torch.device) -> torch.memory_format:
    """The layout that convolutions are fastest in."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def placed(module: M, device: str | torch.device) -> M:
    """The module itself, moved to a device in the layout that convolutions are fastest in there."""
    return module.to(device).to(memory_format=memory_format(torch.device(device)))


def _timm_name(backbone: str, small: bool) -> str:
    if backbone in SHORT_NAMES:
        in_small, in_large = SHORT_NAMES[backbone]
        return in_small if small else in_large
    if timm.is_model(backbone):
        return backbone
    near = difflib.get_close_matches(backbone.lower(), [*SHORT_NAMES, *timm.list_models()], n=5)
    raise ValueError(
        f"unknown network {backbone!r}; near matches: {', '.join(near) or 'none'}; "
        f"short names: {', '.join(SHORT_NAMES)}; timm.list_models() has the others"
    )


def _num_classes_in(path: str, classifier: Any) -> int:
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"expected a .safetensors file, got {path!r}")
    with safe_open(path, framework="pt") as file:
        key = f"{classifier}.weight"
        if key not in file.keys():  # noqa: SIM118  (not a dict)
            ours = f"backbone.{key}" in file.keys()  # noqa: SIM118
            hint = ", named as timm does: without 'backbone.'" if ours else ""
            raise ValueError(f"{path!r} has no {key!r}, expected the weights of the whole backbone{hint}")
        return file.get_slice(key).get_shape()[0]


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients for any parameter; then, also after an exception, all as it was found.

    Gradients with respect to the pictures still flow. The mode is restored module by module.
    """
    modes = [(module, module.training) for module in model.modules()]
    grads = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval()
        model.requires_grad_(False)
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in grads:
            parameter.requires_grad_(requires_grad)
