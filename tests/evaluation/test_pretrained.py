"""Attackers that start from pretrained weights: what they train, and a whole evaluation with them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors.torch import save_file

from hf_unlearnable.checkpoint import OtherRun
from hf_unlearnable.defenses.erm import Erm
from hf_unlearnable.evaluation.attackers import Attacker, Pretrained, pretrained
from hf_unlearnable.evaluation.jobs import Outcome
from hf_unlearnable.networks import Network, create_network
from hf_unlearnable.recipes import recipe
from hf_unlearnable.training import Unfinished
from hf_unlearnable.victim import train
from tests.evaluation.test_evaluate_script import call
from tests.test_plain_loops import coloured

pytestmark = pytest.mark.usefixtures("fresh_state")


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


def test_a_training_does_not_go_on_at_another_size(weights: Path, tmp_path: Path) -> None:
    def network(size: int | None) -> Network:
        return Pretrained(backbone="test_resnet", file=str(weights), image_size=size).network(6, (16, 16), 0)

    rows = coloured(96, 0)
    how: dict[str, Any] = {"recipe": recipe("finetune", epochs=2), "defense": Erm(), "seed": 0, "progress": False}
    how |= {"accelerator": Accelerator(cpu=True), "checkpoint": tmp_path / "c.safetensors"}
    with pytest.raises(Unfinished):
        train(network(48), rows, rows, max_minutes=0.0, **how)
    with pytest.raises(OtherRun):
        train(network(32), rows, rows, **how)


def test_another_attacker_of_the_same_name_does_not_take_the_place_of_the_first(
    place: Path,
    weights: Path,
) -> None:
    other = create_network("test_resnet", num_classes=5, image_size=32, seed=10)
    save_file(other.backbone.state_dict(), place / "other.safetensors")
    for file in (weights, place / "other.safetensors"):
        flags = ["--pretrained", f"test_resnet={file}", "--attackers", "last layer of test_resnet"]
        assert call(place, *flags, "--output", str(place / file.stem), "--no-anchors") == 0
    results = json.loads((place / "lsp" / "record.json").read_text())["results"]
    assert len({result["setting"]["attackers"]["last layer of test_resnet"] for result in results}) == 2


def test_an_evaluation_with_them(
    place: Path,
    weights: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = ["last layer of test_resnet", "fine-tuned test_resnet"]
    flags = ["--pretrained", f"test_resnet={weights}", "--attackers", *names]
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
    setting = json.loads((place / "lsp" / "record.json").read_text())["results"][0]["setting"]
    words = setting["attackers"]["last layer of test_resnet"]
    assert words.startswith("test_resnet from weights ")
    assert words.endswith(", all stages frozen, BatchNorm frozen, recipe finetune, learning_rate 0.001")
    assert words in (place / "lsp" / "README.md").read_text()
    assert words in (place / "eval" / "summary.md").read_text()
    with pytest.raises(SystemExit):
        call(place, "--attackers", "last layer of test_resnet")
    assert "has no attacker 'last layer of test_resnet'" in capsys.readouterr().err
