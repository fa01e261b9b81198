import math
from collections.abc import Callable

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hf_unlearnable.architectures import default_cfgs
from hf_unlearnable.networks import SHORT_NAMES, Network, create_network, frozen

# name: (parameters for 10 classes, shape of forward_features for one picture of 32x32)
FORMS = {
    "cifar_resnet18": (11_173_962, (512, 4, 4)),
    "cifar_resnet50": (23_520_842, (2048, 4, 4)),
    "cifar_wrn34_10": (46_162_714, (640, 8, 8)),
    "cifar_vgg11_bn": (9_231_114, (512, 1, 1)),
    "cifar_vgg16_bn": (15_253_578, (512, 1, 1)),
    "cifar_densenet121": (6_956_298, (1024, 4, 4)),
    "cifar_densenet121_imagenet_stem": (6_964_106, (1024, 1, 1)),
    "cifar_mobilenetv2": (2_296_922, (1280, 4, 4)),
    "cifar_efficientnetv2_s": (20_190_298, (1280, 2, 2)),
    "cifar_vit": (9_523_722, (65, 512)),
    "cifar_deit_tiny": (5_362_762, (65, 192)),
    "cifar_tiny": (99_210, (128, 2, 2)),
}
PYTORCH_INIT = ["cifar_resnet18", "cifar_resnet50", "cifar_wrn34_10", "cifar_densenet121", "cifar_mobilenetv2"]


def on_meta(name: str, num_classes: int = 10) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, num_classes=num_classes).eval()


def built(name: str, num_classes: int = 10) -> nn.Module:
    with torch.random.fork_rng():
        return timm.create_model(name, num_classes=num_classes)


def tiny(**options) -> Network:
    return create_network("tiny", **{"num_classes": 10, "image_size": 32, "seed": 0, **options})


def pictures(height: int = 32, width: int | None = None, count: int = 2) -> Tensor:
    return torch.rand(count, 3, height, width or height, generator=torch.Generator().manual_seed(height))


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_every_registered_form_is_tested():
    assert set(FORMS) == set(default_cfgs)


@pytest.mark.parametrize("name", FORMS)
def test_parameters_and_last_map(name: str):
    parameters, shape = FORMS[name]
    model = on_meta(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert model.forward_features(pictures().to("meta")).shape == (2, *shape)


@pytest.mark.parametrize("name", FORMS)
def test_any_picture_size(name: str):
    model = on_meta(name)
    for size in (32, 33, 64, 224):
        assert model(pictures(size).to("meta")).shape == (2, 10)
    assert model(torch.empty(1, 3, 40, 64, device="meta")).shape == (1, 10)


@pytest.mark.parametrize("name", FORMS)
def test_timm_interface(name: str):
    model = on_meta(name)
    x = pictures().to("meta")
    features = model.forward_features(x)
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, model.num_features)
    assert model.get_classifier().weight.shape == (10, model.num_features)
    assert model.forward_head(features).shape == (2, 10)
    model.reset_classifier(7)
    assert model.num_classes == 7
    assert model(x).shape == (2, 7)
    model.reset_classifier(0)
    assert model(x).shape == (2, model.num_features)


@pytest.mark.parametrize("name", FORMS)
def test_timm_data_config_leaves_pictures_in_unit_range(name: str):
    config = timm.data.resolve_model_data_config(on_meta(name))
    assert config["mean"] == (0.0, 0.0, 0.0)
    assert config["std"] == (1.0, 1.0, 1.0)
    assert config["input_size"] == (3, 32, 32)


@pytest.mark.parametrize("size", [32, 33, 64])
@pytest.mark.parametrize("backbone", ["resnet18", "densenet121", "mobilenetv2", "vit", "tiny"])
def test_forward_and_features_agree(backbone: str, size: int):
    network = create_network(backbone, num_classes=5, image_size=size, seed=0).eval()
    x = pictures(size)
    with torch.no_grad():
        features = network.features(x)
        logits = network(x)
        assert features.shape == (2, network.num_features)
        assert logits.shape == (2, 5)
        assert logits.isfinite().all()
        torch.testing.assert_close(network.backbone.get_classifier()(features), logits)


@pytest.mark.parametrize("backbone", ["vit", "deit_tiny"])
def test_transformers_see_every_pixel_of_sizes_that_are_not_whole_patches(backbone: str):
    network = create_network(backbone, num_classes=10, image_size=(33, 38), seed=0).eval()
    x = pictures(33, 38, count=1).requires_grad_()
    network(x).square().sum().backward()
    assert x.grad is not None
    assert (x.grad.abs().sum(1) > 0).all()


@pytest.mark.parametrize("name", PYTORCH_INIT)
def test_initialisation_is_that_of_pytorch(name: str):
    model = built(name)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
        if isinstance(module, nn.Conv2d | nn.Linear):
            fan_in = module.weight[0].numel()
            assert module.weight.abs().max() <= 1 / math.sqrt(fan_in) * (1 + 1e-6)
            if module.weight.numel() > 2000:
                assert module.weight.std().item() == pytest.approx(1 / math.sqrt(3 * fan_in), rel=0.1)


def test_vgg_initialisation_is_that_of_rem():
    model = built("cifar_vgg16_bn")
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert len(convs) == 13
    for conv in convs:
        assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * conv.out_channels)), rel=0.1)
        assert conv.bias is not None
        assert (conv.bias == 0).all()


def test_vgg_head_drops_out_before_each_hidden_layer_only():
    model = built("cifar_vgg16_bn")
    kinds = [type(layer) for layer in model.pre_logits]
    assert kinds == [nn.Dropout, nn.Linear, nn.ReLU] * 2
    assert isinstance(model.get_classifier(), nn.Linear)


def test_wide_resnet_is_post_activation():
    model = built("cifar_wrn34_10").eval()
    seen: list[tuple[Tensor, Tensor]] = []
    blocks = [*model.layer1, *model.layer2, *model.layer3]
    assert len(blocks) == 15
    for block in blocks:
        block.act2.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0].clone(), output)))
        block.act2.inplace = False
    with torch.no_grad():
        last = model.forward_features(pictures(count=1))
    assert len(seen) == 15
    for before, after in seen:
        assert before.min() < 0
        assert torch.equal(after, before.relu())
    assert torch.equal(last, seen[-1][1])


def test_mobilenet_projects_where_the_width_changes_at_stride_one():
    model = built("cifar_mobilenetv2")
    projected = [stage for stage in model.blocks if hasattr(stage[0], "shortcut")]
    assert [stage[0].shortcut[0].out_channels for stage in projected] == [16, 24, 96, 320]
    assert not any(isinstance(module, nn.ReLU6) for module in model.modules())


def test_short_names_depend_on_the_shorter_side():
    assert tiny().architecture == "cifar_tiny"
    assert create_network("resnet18", num_classes=3, image_size=(64, 500), seed=0).architecture == "cifar_resnet18"
    assert create_network("resnet18", num_classes=3, image_size=65, seed=0).architecture == "resnet18"


def test_short_names_exist():
    for names in SHORT_NAMES.values():
        assert all(timm.is_model(name) for name in names)


@pytest.mark.parametrize("name", ["resnet10t", "test_vit", "test_resnet"])
def test_other_timm_names_as_they_stand(name: str):
    network = create_network(name, num_classes=4, image_size=(48, 80), seed=0).eval()
    with torch.no_grad():
        x = pictures(48, 80)
        assert network(x).shape == (2, 4)
        assert network.features(x).shape == (2, network.num_features)


def test_unknown_name_gives_near_matches():
    with pytest.raises(ValueError, match=r"unknown network 'Resnet-18'; near matches: .*resnet18"):
        create_network("Resnet-18", num_classes=10, image_size=32, seed=0)
    with pytest.raises(ValueError, match="near matches: none; short names: resnet18, "):
        create_network("?", num_classes=10, image_size=32, seed=0)


@pytest.mark.parametrize("options", [{"num_classes": 0}, {"image_size": 0}, {"image_size": (32, -1)}])
def test_sizes_are_positive(options: dict):
    with pytest.raises(ValueError, match="expected positive numbers, got num_classes"):
        tiny(**options)


@pytest.mark.parametrize("backbone", ["tiny", "vit", "mobilenetv2"])
def test_weights_depend_on_the_seed_alone(backbone: str):
    def build(seed: int) -> Network:
        return create_network(backbone, num_classes=10, image_size=32, seed=seed)

    with torch.random.fork_rng():
        torch.manual_seed(1)
        first = build(7)
        torch.manual_seed(2)
        with torch.device("meta"):
            second = build(7)
    assert same_weights(first, second)
    assert not same_weights(first, build(8))


def test_the_global_generator_is_left_as_it_was():
    before = torch.get_rng_state()
    tiny()
    with pytest.raises(ValueError, match="weights"):
        tiny(pretrained=True)
    assert torch.equal(torch.get_rng_state(), before)


def test_no_normalisation_by_default():
    network = tiny().eval()
    x = pictures()
    with torch.no_grad():
        assert torch.equal(network(x), network.backbone(x))


def test_normalisation_is_inside():
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    network = tiny(mean=mean, std=std).eval()
    x = pictures()
    by_hand = torch.stack([(x[:, channel] - mean[channel]) / std[channel] for channel in range(3)], dim=1)
    with torch.no_grad():
        torch.testing.assert_close(network(x), network.backbone(by_hand))
        torch.testing.assert_close(
            network.features(x),
            network.backbone.forward_head(network.backbone.forward_features(by_hand), pre_logits=True),
        )
    assert same_weights(network.backbone, tiny().backbone)
    other = tiny()
    other.load_state_dict(network.state_dict())
    assert torch.equal(other.mean, network.mean)


def test_normalisation_keeps_the_memory_format():
    seen: list[Tensor] = []
    network = tiny(mean=(0.1, 0.2, 0.3), std=(0.2, 0.2, 0.2))
    network.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    network(pictures().to(memory_format=torch.channels_last))
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("mean", "std"), [((0.5,), (1, 1, 1)), ((0, 0, 0), (1, 1)), ((0, 0, 0), (1, 0, 1))])
def test_normalisation_must_fit(mean: tuple, std: tuple):
    with pytest.raises(ValueError, match="three means and three positive stds"):
        tiny(mean=mean, std=std)


@pytest.mark.parametrize("method", ["forward", "features"])
def test_pictures_of_another_kind_are_refused(method: str):
    call: Callable[[Tensor], Tensor] = getattr(tiny(), method)
    with pytest.raises(TypeError, match=r"expected float pictures in \[0, 1\], got torch.uint8"):
        call(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    for shape in ((3, 32, 32), (2, 1, 32, 32), (2, 32, 32, 3)):
        with pytest.raises(ValueError, match=r"expected RGB pictures of shape \(b, 3, h, w\), got \("):
            call(torch.zeros(shape))


def test_local_weights(tmp_path):
    path = str(tmp_path / "tiny.safetensors")
    source = tiny(num_classes=6, seed=3)
    save_file(source.backbone.state_dict(), path)
    assert same_weights(tiny(num_classes=6, pretrained=path), source)
    other = tiny(num_classes=4, pretrained=path)
    assert same_weights(other.backbone.features, source.backbone.features)
    assert same_weights(other, tiny(num_classes=4, pretrained=path))
    assert other(pictures()).shape == (2, 4)


def test_local_weights_that_do_not_fit(tmp_path):
    with pytest.raises(FileNotFoundError):
        tiny(pretrained=str(tmp_path / "absent.safetensors"))
    with pytest.raises(ValueError, match=r"expected a \.safetensors file"):
        tiny(pretrained=str(tmp_path / "weights.pth"))
    headless, foreign = str(tmp_path / "headless.safetensors"), str(tmp_path / "foreign.safetensors")
    save_file({"features.0.bias": torch.zeros(16)}, headless)
    with pytest.raises(ValueError, match=r"has no 'classifier\.weight'"):
        tiny(pretrained=headless)
    save_file({"classifier.weight": torch.zeros(10, 128)}, foreign)
    with pytest.raises(RuntimeError, match="Missing key"):
        tiny(pretrained=foreign)


def test_normalisation_of_pretrained_weights_is_that_of_timm(tmp_path):
    path = str(tmp_path / "resnet.safetensors")
    save_file(built("test_resnet").state_dict(), path)
    network = create_network("test_resnet", num_classes=10, image_size=160, seed=0, pretrained=path)
    assert network.mean.flatten().tolist() == pytest.approx(network.backbone.pretrained_cfg["mean"])
    assert network.std.flatten().tolist() == pytest.approx(network.backbone.pretrained_cfg["std"])
    assert network.std.max() < 1


def test_no_weights_on_the_hub():
    with pytest.raises(ValueError, match="no weights on the Hub for 'cifar_resnet18'"):
        create_network("resnet18", num_classes=10, image_size=32, seed=0, pretrained=True)


def state_of(model: nn.Module) -> tuple[list[bool], list[bool]]:
    return [module.training for module in model.modules()], [p.requires_grad for p in model.parameters()]


@pytest.fixture
def mixed() -> Network:
    """A network with a batch norm in evaluation mode inside training mode, and one parameter without gradient."""
    network = tiny().train()
    network.backbone.features[1].eval()
    network.backbone.features[0].weight.requires_grad_(False)
    return network


def test_frozen_and_restored(mixed: Network):
    before = state_of(mixed)
    x = pictures().requires_grad_()
    statistics = mixed.backbone.features[5].running_mean.clone()
    with frozen(mixed):
        assert not any(flag for flags in state_of(mixed) for flag in flags)
        mixed(x).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in mixed.parameters())
    assert torch.equal(mixed.backbone.features[5].running_mean, statistics)
    assert state_of(mixed) == before


def test_restored_after_an_exception(mixed: Network):
    def fail() -> None:
        with frozen(mixed), frozen(mixed.backbone):
            mixed.train()
            raise KeyError

    before = state_of(mixed)
    with pytest.raises(KeyError):
        fail()
    assert state_of(mixed) == before


@pytest.mark.gpu
def test_on_a_gpu():
    state = torch.cuda.get_rng_state()
    network = tiny()
    assert torch.equal(torch.cuda.get_rng_state(), state)
    x = pictures()
    with torch.no_grad():
        expected = network.eval()(x)
        with torch.device("cuda"):
            moved = tiny().eval().cuda()
        torch.testing.assert_close(moved(x.cuda()).cpu(), expected, rtol=1e-3, atol=1e-4)
