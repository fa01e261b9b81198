import dataclasses
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from datasets import Dataset
from safetensors.torch import save_file
from torch import Tensor

from hf_unlearnable.batches import Batches
from hf_unlearnable.budget import Budget
from hf_unlearnable.fitting import Setup
from hf_unlearnable.images import to_float
from hf_unlearnable.networks import create_network
from hf_unlearnable.poisons.clusters import ClustersFit, ClustersPoison, divergence, features, nearest, seen_size
from hf_unlearnable.recipes import Recipe
from hf_unlearnable.surrogate import Surrogate
from hf_unlearnable.training import Unfinished, own_randomness
from tests.conftest import make_dataset, noise_pictures, pixels

KMeans = pytest.importorskip("sklearn.cluster").KMeans

ROWS = 40
RECIPE = Recipe(name="test", epochs=2, batch_size=8, learning_rate=3e-3)
SETTINGS = {"clusters": 3, "pretrained": False, "feature_size": 0, "generator_width": 4}


@pytest.fixture(scope="module")
def source() -> Dataset:
    return make_dataset(noise_pictures(ROWS, 16, 17), [i % 4 for i in range(ROWS)])


@pytest.fixture(scope="module")
def rows(source: Dataset) -> Batches:
    return Batches.load(source, progress=False)


@pytest.fixture(scope="module")
def surrogate(rows: Batches) -> Surrogate:
    return fitted(rows)


def fitted(rows: Batches, recipe: Recipe = RECIPE, backbone: str = "tiny", changes: dict | None = None, **options):
    poison = ClustersPoison(**{**SETTINGS, **(changes or {})})
    return poison.fit(rows, recipe=recipe, backbone=backbone, progress=False, **options)


def fit_of(rows: Batches, recipe: Recipe = RECIPE, **changes) -> ClustersFit:
    poison = ClustersPoison(**{**SETTINGS, **changes})
    fit = poison.fitting(Setup(train=rows, recipe=recipe, backbone="tiny", seed=3, accelerator=Accelerator(cpu=True)))
    assert isinstance(fit, ClustersFit)
    return fit


def run(fit: ClustersFit, steps: int | None = None) -> list[float]:
    losses = []
    with own_randomness(torch.device("cpu")):
        while not fit.finished(len(losses)) and len(losses) != steps:
            losses.append(fit.step(len(losses))["loss"].item())
    return losses


def bare(surrogate: Surrogate) -> Surrogate:
    return dataclasses.replace(surrogate, provenance={}, path=None)


def phi(fit: ClustersFit, x: Tensor) -> Tensor:
    with torch.no_grad():
        return features(fit.modules["features"].eval(), x, 0)


# The parts.


def test_divergence_is_that_of_the_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    found, centre = torch.randn(5, 7, generator=generator), torch.randn(7, generator=generator)
    target, expected = centre.softmax(0), []
    for row in found:
        q = np.exp(row.double().numpy()) / np.exp(row.double().numpy()).sum()
        p = target.double().numpy()
        expected.append(float((p * np.log(p / q)).sum()))
    assert divergence(target, found).item() == pytest.approx(np.mean(expected), rel=1e-5)
    assert divergence(target, centre.expand(3, 7)).item() == pytest.approx(0, abs=1e-6)


def test_the_nearest_centre() -> None:
    generator = torch.Generator().manual_seed(0)
    found, centres = torch.randn(30, 4, generator=generator), torch.randn(5, 4, generator=generator)
    expected = [min(range(5), key=lambda i, row=row: float((row - centres[i]).square().sum())) for row in found]
    assert nearest(found, centres).tolist() == expected
    assert nearest(torch.zeros(1, 1), torch.tensor([[2.0], [-1.0], [1.0]])).tolist() == [1]


def test_the_size_that_the_network_sees() -> None:
    assert seen_size((32, 32), 224) == (224, 224)
    assert seen_size((300, 400), 224) == (224, 299)
    assert seen_size((400, 300), 150) == (200, 150)
    assert seen_size((17, 30), 0) == (17, 30)


def test_features_of_enlarged_pictures_pass_gradients_back(rows: Batches) -> None:
    network = create_network("tiny", num_classes=1, image_size=32, seed=0).eval()
    x = to_float(rows.pixels[:2]).requires_grad_()
    larger = F.interpolate(x, size=(32, 34), mode="bilinear", antialias=True)
    found = features(network, x, 32)
    assert torch.equal(found, network.features(larger))
    assert (torch.autograd.grad(found.sum(), x)[0] != 0).float().mean() > 0.9


# Clusters.


def test_clusters_are_those_of_k_means(rows: Batches) -> None:
    fit = fit_of(rows)
    fit.find_clusters()
    found = phi(fit, to_float(rows.pixels))
    centres = fit.tensors["centres"]
    assignment = fit.tensors["assignment"]
    for cluster in range(3):
        own = found[assignment == cluster]
        assert torch.allclose(own.mean(0), centres[cluster], atol=1e-4)
    again = KMeans(n_clusters=3, init=centres.numpy(), n_init=1).fit(found.numpy())
    assert np.array_equal(again.labels_, assignment.numpy())
    other = fit_of(rows)
    other.find_clusters()
    assert torch.equal(other.tensors["centres"], centres)


def test_groups_of_pictures_are_found() -> None:
    colours = torch.tensor([[250, 10, 10], [10, 250, 10], [10, 10, 250]])
    group = torch.arange(24) % 3
    noise = torch.randint(-8, 9, (24, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    made = (colours[group].view(24, 3, 1, 1) + noise).clamp(0, 255).byte()
    fit = fit_of(Batches(pixels=made, labels=torch.zeros(24, dtype=torch.int64), classes=("all",)))
    fit.find_clusters()
    pairs = set(zip(group.tolist(), fit.tensors["assignment"].tolist(), strict=True))
    assert len(pairs) == 3
    for cluster in range(3):
        assert len(fit.rows_of(cluster)) == 8


def test_lengths_are_epochs_over_the_clusters(rows: Batches) -> None:
    fit = fit_of(rows)
    fit.tensors["assignment"].copy_(torch.tensor([0] * 9 + [1] * 8 + [2] * 23))
    assert fit.lengths == [4, 2, 6]
    assert fit.total == 14  # 40 rows in three clusters make at most 7 batches of 8
    assert [fit.finished(step) for step in (0, 11, 12)] == [False, False, True]
    assert fit.rows_of(1).pixels.equal(rows.pixels[9:17])
    whole = fit_of(rows, restrict_to_cluster=False)
    assert whole.lengths == [10, 10, 10]
    assert whole.total == 30
    assert len(whole.rows_of(1)) == ROWS
    steps = fit_of(rows, dataclasses.replace(RECIPE, epochs=None, steps=5, drop_last=True))
    steps.tensors["assignment"].copy_(torch.tensor([0] * 9 + [1] * 3 + [2] * 28))
    assert steps.lengths == [5, 5, 5]
    assert steps.total == 15


@pytest.mark.parametrize("batch", [1, 3, 8, 40, 64])
def test_the_bound_of_the_steps_holds(rows: Batches, batch: int) -> None:
    fit, generator = fit_of(rows, dataclasses.replace(RECIPE, batch_size=batch)), torch.Generator().manual_seed(0)
    most = 0
    for _ in range(50):
        fit.tensors["assignment"].copy_(torch.randint(0, 3, (ROWS,), generator=generator))
        most = max(most, sum(fit.lengths))
        del fit.lengths
    assert 0.9 * fit.total <= most <= fit.total


# Training.


def test_the_first_step_is_that_of_the_definition(rows: Batches) -> None:
    recipe = dataclasses.replace(RECIPE, augmentation="none", batch_size=64, weight_decay=0.0)
    fit = fit_of(rows, recipe)
    generator = fit.generator_of(0)
    fixed = fit.delta(0)
    [loss] = run(fit, 1)
    x = to_float(fit.rows_of(0).pixels)
    noise = fixed.clamp(-16 / 255, 16 / 255)
    assert torch.equal(noise, fixed)
    assert fixed.abs().max().item() == pytest.approx(16 / 255)
    target = fit.tensors["centres"][1].softmax(0)
    expected = divergence(target, phi(fit, (x + fixed).clamp(0, 1).detach()))
    assert loss == pytest.approx(expected.item(), rel=1e-4)
    moved = [
        (after - before).abs().max().item()
        for before, after in zip(generator.parameters(), fit.modules["generator"].parameters(), strict=True)
    ]
    assert max(moved) == pytest.approx(3e-3, rel=1e-3)


@pytest.mark.parametrize("restrict", [True, False])
def test_noise_carries_clusters_to_the_next_ones_centre(rows: Batches, restrict: bool) -> None:
    recipe = dataclasses.replace(RECIPE, epochs=None, steps=25, batch_size=16, augmentation="none")
    fit = fit_of(rows, recipe, restrict_to_cluster=restrict, epsilon=64 / 255)
    run(fit)
    for cluster in range(3):
        x = to_float(fit.rows_of(cluster).pixels)
        noise, centres = fit.tensors["deltas"][cluster], fit.tensors["centres"]
        after = phi(fit, (x + noise).clamp(0, 1))
        loss = [divergence(centre.softmax(0), after).item() for centre in centres]
        clean = divergence(centres[(cluster + 1) % 3].softmax(0), phi(fit, x)).item()
        assert loss[(cluster + 1) % 3] < 0.8 * clean


def test_each_cluster_begins_anew(rows: Batches) -> None:
    recipe = dataclasses.replace(RECIPE, epochs=None, steps=2)
    fit = fit_of(rows, recipe)
    run(fit, 2)
    assert fit.tensors["deltas"].flatten(1).any(1).tolist() == [True, False, False]
    first = fit.tensors["deltas"].clone()
    fit.modules["generator"].load_state_dict(fit.generator_of(2).state_dict())  # must not matter
    rates = []
    with own_randomness(torch.device("cpu")):
        for step in range(2, 6):
            fit.step(step)
            rates.append(fit.optimizers["generator"].param_groups[0]["lr"])
            weight = next(fit.modules["generator"].parameters())
            assert fit.optimizers["generator"].state[weight]["step"] == 1 + step % 2
    assert rates == pytest.approx([3e-3, 1.5e-3] * 2)
    assert torch.equal(fit.tensors["deltas"][0], first[0])
    assert not torch.equal(fit.tensors["deltas"][1], fit.tensors["deltas"][2])
    fresh = fit_of(rows, recipe)
    run(fresh)
    assert torch.equal(fresh.tensors["deltas"], fit.tensors["deltas"])


def test_the_input_of_a_generator_is_its_clusters(rows: Batches) -> None:
    fit = fit_of(rows)
    fit.modules["generator"].eval()
    with torch.no_grad():
        assert torch.equal(fit.delta(1), fit.delta(1))
        assert not torch.allclose(fit.delta(0), fit.delta(1), atol=1e-4)


def test_the_feature_network_stays_as_it_is(rows: Batches) -> None:
    fit = fit_of(rows)
    before = {name: value.clone() for name, value in fit.modules["features"].state_dict().items()}
    run(fit, 3)
    assert all(torch.equal(before[name], value) for name, value in fit.modules["features"].state_dict().items())


def test_a_stopped_training_goes_on_exactly(rows: Batches, surrogate: Surrogate, tmp_path: Path) -> None:
    stops = 0
    while True:
        try:
            found = fitted(rows, checkpoint=tmp_path / "kept.safetensors", max_minutes=0.0)
            break
        except Unfinished:
            stops += 1
    assert stops == found.provenance["steps"] - 1
    assert stops > 9
    assert bare(found) == bare(surrogate)
    assert bare(fitted(rows, seed=1)) != bare(surrogate)


def test_weights_from_a_file(rows: Batches, tmp_path: Path) -> None:
    made = create_network("tiny", num_classes=7, image_size=16, seed=9)
    save_file(made.backbone.state_dict(), tmp_path / "own.safetensors")
    path = str(tmp_path / "own.safetensors")
    one = dataclasses.replace(RECIPE, epochs=None, steps=1)
    found = fitted(rows, one, changes={"weights": path, "pretrained": True})
    x = to_float(rows.pixels[:4])
    with torch.no_grad():
        assert torch.allclose(found.network("features").features(x), made.eval().features(x), atol=1e-6)
    assert path not in str(found.settings)
    checkpoint = tmp_path / "kept.safetensors"
    with pytest.raises(Unfinished):
        fitted(rows, changes={"weights": path}, checkpoint=checkpoint, max_minutes=0.0)
    with pytest.raises(ValueError, match="another training"):
        fitted(rows, checkpoint=checkpoint)


def test_a_large_network_for_small_pictures(rows: Batches, source: Dataset, tmp_path: Path) -> None:
    one = dataclasses.replace(RECIPE, epochs=None, steps=1)
    some = rows.select(range(8))
    found = fitted(some, one, "resnet18", {"feature_size": 65, "clusters": 2}).save(tmp_path / "large.safetensors")
    poison = ClustersPoison.from_surrogate(found)
    assert poison.surrogate is not None
    assert poison.surrogate.networks["features"]["backbone"] == "resnet18"
    assert poison.surrogate.networks["features"]["image_size"] == [65, 69]
    assert (pixels(poison.apply(source.select(range(2)))) != pixels(source.select(range(2)))).any()


# Mapping.


def by_loops(rows: Batches, surrogate: Surrogate) -> np.ndarray:
    network, centres = surrogate.network("features"), surrogate.tensors["centres"]
    out = []
    for picture in rows.pixels:
        with torch.no_grad():
            found = network.features(picture[None] / 255)[0]
        i = min(range(len(centres)), key=lambda i: float((found - centres[i]).norm()))
        x = (picture.double() / 255 + surrogate.tensors["deltas"][i].double()).clamp(0, 1)
        out.append((x * 255 + 0.5).floor().byte().permute(1, 2, 0).numpy())
    return np.stack(out)


def test_pixels_are_those_of_the_definition(source: Dataset, rows: Batches, surrogate: Surrogate) -> None:
    found = pixels(ClustersPoison.from_surrogate(surrogate).apply(source))
    # float32 sums beside float64 ones: a value at a rounding boundary may fall to the other side
    assert (found != by_loops(rows, surrogate)).sum() <= 3
    assert len({(a.astype(int) - b).tobytes() for a, b in zip(found, pixels(source), strict=True)}) >= 3


def test_every_way_of_mapping_gives_the_same_pixels(source: Dataset, surrogate: Surrogate) -> None:
    poison = ClustersPoison.from_surrogate(surrogate)
    expected = pixels(poison.apply(source))
    order = [7, 3, 20]
    # equal as long as no picture lies half-way between two centres
    assert np.array_equal(pixels(source.map(poison, batched=True, batch_size=7, keep_in_memory=True)), expected)
    assert np.array_equal(pixels(source.select(order).map(poison)), expected[order])
    assert np.array_equal(pixels(poison.apply(source, num_proc=2)), expected)
    assert np.array_equal(pixels(poison.apply(source.remove_columns("label"))), expected)


def test_the_budget_is_kept(source: Dataset, rows: Batches, surrogate: Surrogate) -> None:
    poison = ClustersPoison.from_surrogate(surrogate)
    assert poison.budget_for(16, 17) == Budget("linf", 16 / 255)
    found = torch.from_numpy(pixels(poison.apply(source))).permute(0, 3, 1, 2)
    assert (found.int() - rows.pixels.int()).abs().max() == 16
    less = fitted(rows, dataclasses.replace(RECIPE, epochs=None, steps=1), changes={"epsilon": 5.9 / 255})
    assert less.tensors["deltas"].abs().max() == pytest.approx(5 / 255)


def test_file_and_pickle_give_the_same_poison(source: Dataset, surrogate: Surrogate, tmp_path: Path) -> None:
    expected = pixels(ClustersPoison.from_surrogate(surrogate).apply(source))
    poison = ClustersPoison.from_surrogate(surrogate.save(tmp_path / "clusters.safetensors"))
    assert np.array_equal(pixels(poison.apply(source)), expected)
    again = pickle.loads(pickle.dumps(poison))  # noqa: S301
    assert again == poison
    assert np.array_equal(pixels(again.apply(source)), expected)
    assert surrogate.classes == ()


# What is refused.


def test_too_few_pictures(rows: Batches) -> None:
    with pytest.raises(ValueError, match="at least 3 rows, one for every cluster, got 2"):
        fit_of(rows.select([0, 1]))
    with pytest.raises(ValueError, match=r"each of 3 clusters, got none in 1 of them \(cluster 2 first\)"):
        fit_of(rows.select([0, 1, 0, 1, 1])).find_clusters()
    low = Batches(pixels=rows.pixels[:, :, :4], labels=rows.labels, classes=rows.classes)
    with pytest.raises(ValueError, match="at least 5 x 5 pixels, got 4 x 17"):
        fit_of(low)


def test_features_that_are_not_finite(rows: Batches) -> None:
    fit = fit_of(rows)
    next(fit.modules["features"].parameters()).data.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="row 0: expected finite features"):
        fit.find_clusters()


def test_without_scikit_learn(rows: Batches, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(ImportError, match=r"pip install 'hf_unlearnable\[clusters\]'"):
        fit_of(rows)


def test_other_pictures_settled_fields_and_other_methods(rows: Batches, surrogate: Surrogate) -> None:
    poison = ClustersPoison.from_surrogate(surrogate)
    with pytest.raises(ValueError, match="16 x 17 pixels .* got 17 x 16"):
        poison.apply(make_dataset(noise_pictures(2, 17, 16), [0, 1]))
    for changes in ({"epsilon": 8 / 255}, {"clusters": 4}, {"feature_size": 64}, {"weights": "other.safetensors"}):
        with pytest.raises(ValueError, match="settled when the surrogate was trained"):
            ClustersPoison.from_surrogate(surrogate, **changes)
    with pytest.raises(ValueError, match="expected a surrogate for 'clusters', got one for 'other'"):
        ClustersPoison.from_surrogate(dataclasses.replace(surrogate, method="other"))
    with pytest.raises(FileNotFoundError):
        fit_of(rows, weights="nowhere.safetensors")


@pytest.mark.parametrize("wrong", [{"epsilon": 1.1}, {"clusters": 1}, {"feature_size": -1}, {"generator_width": 0}])
def test_wrong_settings(wrong: dict) -> None:
    with pytest.raises(ValueError, match=r"epsilon|or more"):
        ClustersPoison(**wrong)
