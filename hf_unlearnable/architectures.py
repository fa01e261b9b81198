"""The small-picture networks of the literature, registered with timm.

Importing this module makes them available as `timm.create_model("cifar_resnet18", num_classes=10)` and so on. Each is
timm's own network with another stem wherever timm has the family; all take pictures of any size from 32 pixels on, and
have timm's interface (`forward_features`, `forward_head`, `get_classifier`, `reset_classifier`).
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from timm.layers.classifier import create_classifier
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.deit import deit_tiny_patch16_224
from timm.models.densenet import DenseNet
from timm.models.efficientnet import EfficientNet, efficientnetv2_s
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

PATCH = 4


def _cfg(first_conv: str, classifier: str, **kwargs: Any) -> dict[str, Any]:
    """Pictures in [0, 1], as the papers' repositories feed them: mean 0, std 1."""
    return {
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "mean": (0.0, 0.0, 0.0),
        "std": (1.0, 1.0, 1.0),
        "crop_pct": 1.0,
        "first_conv": first_conv,
        "classifier": classifier,
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "cifar_resnet18": _cfg("conv1", "fc"),
        "cifar_resnet50": _cfg("conv1", "fc"),
        "cifar_wrn34_10": _cfg("conv1", "fc"),
        "cifar_vgg11_bn": _cfg("features.0", "classifier"),
        "cifar_vgg16_bn": _cfg("features.0", "classifier"),
        "cifar_densenet121": _cfg("features.conv0", "classifier"),
        "cifar_densenet121_imagenet_stem": _cfg("features.conv0", "classifier"),
        "cifar_mobilenetv2": _cfg("conv_stem", "classifier"),
        "cifar_efficientnetv2_s": _cfg("conv_stem", "classifier"),
        "cifar_vit": _cfg("patch_embed.proj", "head", fixed_input_size=True),
        "cifar_deit_tiny": _cfg("patch_embed.proj", "head", fixed_input_size=True),
        "cifar_tiny": _cfg("features.0", "classifier"),
    }
)


def _reset_parameters(model: nn.Module) -> None:
    """PyTorch's default initialisation of every layer, in place of timm's."""
    for module in model.modules():
        reset = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()


def _small_stem(stem: nn.Conv2d, width: int) -> nn.Conv2d:
    return nn.Conv2d(
        stem.in_channels, width, 3, padding=1, bias=False, device=stem.weight.device, dtype=stem.weight.dtype
    )


def _divide_reductions(model: Any, factor: int) -> None:
    for info in model.feature_info:
        info["reduction"] = max(1, info["reduction"] // factor)


def _resnet(stem_width: int = 64, channels: tuple[int, ...] = (64, 128, 256, 512), **kwargs: Any) -> ResNet:
    # timm's plain stem is always 64 wide; its deep stem, replaced below, is as wide as asked for.
    stem = {} if stem_width == 64 else {"stem_type": "deep", "stem_width": stem_width // 2}
    model = ResNet(channels=channels, **stem, **kwargs)
    model.conv1 = _small_stem(
        next(layer for layer in model.conv1.modules() if isinstance(layer, nn.Conv2d)), stem_width
    )
    model.maxpool = nn.Identity()
    for stage in range(len(channels) + 1, 5):
        model.add_module(f"layer{stage}", nn.Sequential())
    _divide_reductions(model, 4)
    _reset_parameters(model)
    return model


@register_model
def cifar_resnet18(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-18 with a 3x3 stem and no max-pool: 11,173,962 parameters for 10 classes, a 4x4 map at 32 pixels.

    Source: the repositories of REM, CUDA, MMM and pytorch-cifar (METHODS Part IV). Deviations: none.
    """
    return build_model_with_cfg(_resnet, "cifar_resnet18", pretrained, block=BasicBlock, layers=(2, 2, 2, 2), **kwargs)


@register_model
def cifar_resnet50(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-50 with a 3x3 stem and no max-pool: 23,520,842 parameters for 10 classes, a 4x4 map at 32 pixels.

    Source: the repositories of REM, CUDA, MMM and pytorch-cifar (METHODS Part IV). Deviations: none.
    """
    return build_model_with_cfg(_resnet, "cifar_resnet50", pretrained, block=Bottleneck, layers=(3, 4, 6, 3), **kwargs)


@register_model
def cifar_wrn34_10(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """Wide ResNet-34-10 with post-activation blocks: 46,162,714 parameters for 10 classes, an 8x8 map at 32 pixels.

    A ReLU follows every addition and nothing follows the last block; the usual wide ResNet is pre-activation.

    Source: the repositories of REM, CUDA and MMM (METHODS Part IV). Deviations: none.
    """
    shape = {"block": BasicBlock, "layers": (5, 5, 5), "channels": (160, 320, 640), "stem_width": 16}
    return build_model_with_cfg(_resnet, "cifar_wrn34_10", pretrained, **shape, **kwargs)


class PlainConvNet(nn.Module):
    """Stages of 3x3 conv, BN, ReLU, each stage ended by a 2x2 max-pool; then average pooling and a small head.

    Args:
        stages: the widths of the convolutions of each stage.
        hidden: the widths of the head's hidden layers; each is dropout, linear, ReLU.
        drop_rate: the dropout probability before each hidden layer.
    """

    def __init__(
        self,
        stages: Sequence[Sequence[int]],
        hidden: Sequence[int] = (),
        drop_rate: float = 0.5,
        num_classes: int = 10,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = in_chans
        for stage in stages:
            for after in stage:
                conv = nn.Conv2d(width, after, 3, padding=1)
                nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(conv.bias)  # pyright: ignore[reportArgumentType]
                layers += [conv, nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
                width = after
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.num_features = width
        head: list[nn.Module] = []
        for after in hidden:
            head += [nn.Dropout(drop_rate), nn.Linear(width, after), nn.ReLU(inplace=True)]
            width = after
        self.pre_logits = nn.Sequential(*head)
        self.in_chans, self.num_classes, self.head_hidden_size = in_chans, num_classes, width
        self.global_pool, self.classifier = create_classifier(width, num_classes)[:2]

    def group_matcher(self, coarse: bool = False) -> Callable[[str], float]:
        """For timm: the first convolution with its BN is the stem; a stage, or convolution, a group; then the head."""
        pooled = 0
        groups: dict[str, float] = {}
        for number, layer in enumerate(self.features):
            convolution = number - isinstance(layer, nn.BatchNorm2d)
            groups[f"features.{number}"] = 0 if number < 2 else 1 + (pooled if coarse else convolution)
            pooled += isinstance(layer, nn.MaxPool2d)
        return lambda name: groups.get(".".join(name.split(".")[:2]), math.inf)

    def get_classifier(self) -> nn.Module:
        """The last layer: linear, or the identity when there are no classes."""
        return self.classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the last layer by a fresh one for `num_classes`.

        Raises:
            ValueError: another pooling than the average was asked for.
        """
        if global_pool not in (None, "avg"):
            raise ValueError(f"this network has average pooling only, got global_pool={global_pool!r}")
        weight = next(self.features.parameters())
        self.num_classes = num_classes
        with weight.device:
            self.classifier = create_classifier(self.head_hidden_size, num_classes)[1].to(weight.dtype)

    def forward_features(self, x: Tensor) -> Tensor:
        """The last map before pooling, (b, num_features, h, w)."""
        return self.features(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (b, num_classes) of the last map, or what the last layer is given, (b, head_hidden_size)."""
        x = self.pre_logits(self.global_pool(x))
        return x if pre_logits else self.classifier(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


@register_model
def cifar_vgg11_bn(pretrained: bool = False, **kwargs: Any) -> PlainConvNet:
    """VGG-11-BN with one linear layer as its head: 9,231,114 parameters for 10 classes, a 1x1 map at 32 pixels.

    Source: pytorch-cifar, and DeepConfuse's repository (METHODS 13), whose head is another. Deviations: none.
    """
    stages = ((64,), (128,), (256, 256), (512, 512), (512, 512))
    return build_model_with_cfg(PlainConvNet, "cifar_vgg11_bn", pretrained, stages=stages, **kwargs)


@register_model
def cifar_vgg16_bn(pretrained: bool = False, **kwargs: Any) -> PlainConvNet:
    """VGG-16-BN with a head of two hidden layers of 512: 15,253,578 parameters for 10 classes, 1x1 map at 32 pixels.

    Source: the repositories of REM, CUDA and MMM (METHODS Part IV; pytorch-cifar's has one linear layer as its head).
    Deviations: none.
    """
    stages = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
    return build_model_with_cfg(PlainConvNet, "cifar_vgg16_bn", pretrained, stages=stages, hidden=(512, 512), **kwargs)


@register_model
def cifar_tiny(pretrained: bool = False, **kwargs: Any) -> PlainConvNet:
    """A network for two CPU cores: four convolutions of 16 to 128 channels, 99,210 parameters for 10 classes.

    It learns CIFAR-10 to a test accuracy of about 0.60 from 10,000 rows in 5 epochs (batch 128, crop and flip, OneCycle
    SGD with a top learning rate of 0.1 to 0.2, weight decay 5e-4): 0.597 to 0.609 in five runs, each 18 to 28 s with
    one thread on a busy AMD EPYC of two cores; torch 2.15, timm 1.0.31.

    Source: none, it is of this library.
    """
    return build_model_with_cfg(PlainConvNet, "cifar_tiny", pretrained, stages=((16,), (32,), (64,), (128,)), **kwargs)


def _densenet121(small_stem: bool, **kwargs: Any) -> DenseNet:
    model = DenseNet(growth_rate=32, block_config=(6, 12, 24, 16), **kwargs)
    if small_stem:
        features: Any = model.features
        features.conv0 = _small_stem(features.conv0, 64)
        features.norm0 = features.pool0 = nn.Identity()
        _divide_reductions(model, 4)
        _reset_parameters(model)
    return model


@register_model
def cifar_densenet121(pretrained: bool = False, **kwargs: Any) -> DenseNet:
    """DenseNet-121 with a bare 3x3 stem: 6,956,298 parameters for 10 classes, a 4x4 map at 32 pixels.

    Source: pytorch-cifar, which UEraser's repository and others use (METHODS Part IV). Deviations: the dense layers
    append their new channels instead of prepending them, a permutation.
    """
    return build_model_with_cfg(_densenet121, "cifar_densenet121", pretrained, small_stem=True, **kwargs)


@register_model
def cifar_densenet121_imagenet_stem(pretrained: bool = False, **kwargs: Any) -> DenseNet:
    """DenseNet-121 with the 7x7 stem and max-pool: 6,964,106 parameters for 10 classes, a 1x1 map at 32 pixels.

    It explains the weak clean accuracy of this network in the tables of REM, CUDA and MMM.

    Source: the repositories of REM, CUDA and MMM (METHODS Part IV). Deviations: none; it is timm's, as torchvision's.
    """
    return build_model_with_cfg(_densenet121, "cifar_densenet121_imagenet_stem", pretrained, small_stem=False, **kwargs)


class _ProjectedResidual(nn.Module):
    """An inverted residual block that changes its width at stride 1, with a projection as its shortcut."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.block = block
        old, new, like = block.conv_pw.in_channels, block.conv_pwl.out_channels, block.conv_pw.weight
        self.shortcut = nn.Sequential(nn.Conv2d(old, new, 1, bias=False), nn.BatchNorm2d(new))
        self.shortcut.to(like.device, like.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) + self.shortcut(x)


def _mobilenetv2(**kwargs: Any) -> EfficientNet:
    stages = [
        ["ir_r1_k3_s1_e1_c16"],
        ["ir_r2_k3_s1_e6_c24"],
        ["ir_r3_k3_s2_e6_c32"],
        ["ir_r4_k3_s2_e6_c64"],
        ["ir_r3_k3_s1_e6_c96"],
        ["ir_r3_k3_s2_e6_c160"],
        ["ir_r1_k3_s1_e6_c320"],
    ]
    model: Any = EfficientNet(decode_arch_def(stages), num_features=1280, stem_size=32, act_layer=nn.ReLU, **kwargs)
    model.conv_stem.stride = (1, 1)
    for stage in model.blocks:
        if stage[0].conv_dw.stride == (1, 1) and not stage[0].has_skip:
            stage[0] = _ProjectedResidual(stage[0])
    _divide_reductions(model, 2)
    _reset_parameters(model)
    return model


@register_model
def cifar_mobilenetv2(pretrained: bool = False, **kwargs: Any) -> EfficientNet:
    """MobileNet-V2 with strides 1 in the stem and the second stage: 2,296,922 parameters for 10 classes, a 4x4 map.

    Beside the strides it differs from timm's `mobilenetv2_100`: ReLU, not ReLU6; a 1x1 convolution in the first
    block too; projections as shortcuts where the width changes at stride 1.

    Source: pytorch-cifar, which UEraser's repository and others use (METHODS Part IV). Deviations: none.
    """
    return build_model_with_cfg(_mobilenetv2, "cifar_mobilenetv2", pretrained, **kwargs)


def _efficientnetv2_s(**kwargs: Any) -> EfficientNet:
    model: Any = efficientnetv2_s(**kwargs)
    model.conv_stem.stride = (1, 1)
    _divide_reductions(model, 2)
    return model


@register_model
def cifar_efficientnetv2_s(pretrained: bool = False, **kwargs: Any) -> EfficientNet:
    """EfficientNet-V2-S with stride 1 in the stem: 20,190,298 parameters for 10 classes, a 2x2 map at 32 pixels.

    Source: timm; CUDA (its supplement) names the network, its form there is unknown. Deviations: the stride; timm's
    initialisation is kept.
    """
    return build_model_with_cfg(_efficientnetv2_s, "cifar_efficientnetv2_s", pretrained, **kwargs)


def _any_size(img_size: int | tuple[int, int]) -> dict[str, Any]:
    """Arguments for a transformer that pads pictures to whole patches and resamples positions for other sizes."""
    size = (img_size, img_size) if isinstance(img_size, int) else img_size
    whole = tuple(-(-side // PATCH) * PATCH for side in size)
    return {"img_size": whole, "patch_size": PATCH, "dynamic_img_size": True, "dynamic_img_pad": True}


def _vit(img_size: int | tuple[int, int], **kwargs: Any) -> VisionTransformer:
    shape = {"embed_dim": 512, "depth": 6, "num_heads": 8, "mlp_ratio": 1.0, "qkv_bias": False}
    drop = {"pos_drop_rate": 0.1, "proj_drop_rate": 0.1}
    norm = partial(nn.LayerNorm, eps=1e-5)
    model = VisionTransformer(norm_layer=norm, **_any_size(img_size), **{**shape, **drop, **kwargs})
    _reset_parameters(model)
    for embedding in (model.pos_embed, model.cls_token):
        assert embedding is not None
        nn.init.normal_(embedding)
    return model


@register_model
def cifar_vit(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """ViT with 4x4 patches, dim 512, depth 6, heads 8, mlp 512, dropout 0.1: 9,523,722 parameters for 10 classes.

    Source: the sizes of MMM's and ISS's repositories (METHODS Part IV), in the form of lucidrains' ViT as CIFAR
    repositories copy it: no bias in the projection to queries, keys and values, PyTorch's default initialisation,
    embeddings from N(0, 1). Deviations: none.
    """
    return build_model_with_cfg(_vit, "cifar_vit", pretrained, **kwargs)


def _deit_tiny(img_size: int | tuple[int, int], **kwargs: Any) -> VisionTransformer:
    return deit_tiny_patch16_224(**_any_size(img_size), **kwargs)


@register_model
def cifar_deit_tiny(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """DeiT-tiny with 4x4 patches: 5,362,762 parameters for 10 classes at 32 pixels.

    Source: timm; CUDA (its supplement) names the network, its form there is unknown. Deviations: the patch size.
    """
    return build_model_with_cfg(_deit_tiny, "cifar_deit_tiny", pretrained, **kwargs)
