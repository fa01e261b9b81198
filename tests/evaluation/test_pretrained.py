"""Attackers that start from pretrained weights: what they train, and a whole evaluation with them."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from hf_unlearnable.evaluation.attackers import Attacker, Pretrained, pretrained
from hf_unlearnable.evaluation.jobs import Outcome
from hf_unlearnable.networks import create_network
from tests.evaluation.test_evaluate_script import call, fresh_state, place  # noqa: F401  (fixtures)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Those of timm's smallest ResNet, with five classes."""
    network = create_network("test_resnet", num_classes=5, image_size=32, seed=9)
    save_file(network.backbone.state_dict(), tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


def trained(start: Pretrained) -> set[str]:
    """The first parts of the names of what a training changes."""
    network = start.network(num_classes=3, image_size=(32, 32), seed=0)
    names = [name for name, parameter in network.backbone.named_parameters() if parameter.requires_grad]
    return {name.split(".")[0] for name in names}


def test_each_way_trains_what_it_says(weights: Path) -> None:
    ways = pretrained("test_resnet", file=str(weights))
    assert [one.name for one in ways] == [
        f"{way} test_resnet"
        for way in ("last layer of", "partly fine-tuned", "fine-tuned", "fine-tuned with frozen norms")
    ]
    starts = [one.start for one in ways if one.start is not None]
    stages = {"layer2", "layer3", "layer4", "fc"}
    whole = {"conv1", "bn1", "layer1", *stages}
    assert [trained(start) for start in starts] == [{"fc"}, stages, whole, whole]
    assert [start.frozen_batch_norm for start in starts] == [True, False, False, True]
    assert {one.recipe for one in ways} == {"finetune"}
    descriptions = [one.described() for one in ways]
    assert all(str(weights.parent) not in str(told) for told in descriptions)
    assert descriptions[0]["start"]["file_sha256"] == descriptions[1]["start"]["file_sha256"]


def test_the_last_layer_is_new_and_the_rest_is_that_of_the_file(weights: Path) -> None:
    known = create_network("test_resnet", num_classes=5, image_size=32, seed=9).backbone
    one, other = (
        Pretrained(backbone="test_resnet", file=str(weights)).network(3, (32, 32), seed).backbone for seed in (0, 1)
    )
    assert torch.equal(one.conv1[0].weight, known.conv1[0].weight)
    assert one.fc.weight.shape[0] == 3
    assert not torch.equal(one.fc.weight, other.fc.weight)


def test_pictures_are_stretched_inside_the_network(weights: Path) -> None:
    small = Pretrained(backbone="test_resnet", file=str(weights)).network(3, (16, 16), 0).eval()
    large = Pretrained(backbone="test_resnet", file=str(weights), image_size=48).network(3, (16, 16), 0).eval()
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    stretched = F.interpolate(x, (48, 48), mode="bicubic", antialias=True).clamp(0, 1)
    assert torch.allclose(large(x), small(stretched))
    assert torch.allclose(large.features(x), small.features(stretched))
    assert not torch.allclose(large(x), small(x))


def test_what_is_not_there_is_told(weights: Path) -> None:
    with pytest.raises(ValueError, match="no weights on the Hub for 'cifar_resnet18'"):
        Pretrained(backbone="resnet18").network(3, (32, 32), 0)
    with pytest.raises(ValueError, match="expected weights of resnet18, but: Error"):
        Pretrained(backbone="resnet18", file=str(weights)).network(3, (32, 32), 0)
    assert Attacker(name="x").described() == {**Attacker(name="y").described()}
    assert "start" not in Attacker(name="x").described(), "outcomes of before stay what they are"


def test_an_evaluation_with_them(
    place: Path,  # noqa: F811
    weights: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = ["last layer of test_resnet", "fine-tuned test_resnet"]
    flags = ["--pretrained", f"test_resnet={weights}", "--attackers", *names, "--no-note"]
    assert call(place, *flags) == 0
    said = capsys.readouterr().out
    assert ", fine-tuned test_resnet, seed 0: " in said
    matrix = (place / "eval" / "matrix.md").read_text().splitlines()[0]
    assert all(name in matrix for name in names)
    (path,) = (place / "eval" / "jobs").glob("lsp-*/last-layer-of-test-resnet-0.json")
    found = Outcome.load(path)
    assert found.job["attacker"]["start"]["frozen_stages"] == "all"
    assert (found.job["backbone"], found.job["recipe"]["name"]) == ("test_resnet", "finetune")
    assert found.result is not None
    assert found.result.backbone == "test_resnet"
    with pytest.raises(SystemExit):
        call(place, "--attackers", "last layer of test_resnet")
    assert "has no attacker 'last layer of test_resnet'" in capsys.readouterr().err
