"""Ownership: p-values of wrong keys are uniform, the right key is recognised, and decoys follow the poisons' laws."""

import io
import json
import math
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from tqdm.auto import tqdm

from hf_unlearnable import ArPoison, CudaPoison, LspPoison, OpsPoison, RandomNoisePoison
from hf_unlearnable.images import Picture, to_pil
from hf_unlearnable.keys import numpy_generator
from hf_unlearnable.ownership import patches, processes, spectra
from hf_unlearnable.ownership.evidence import ClassTest, Moments, combined
from hf_unlearnable.ownership.proof import Unprovable, prove, read
from hf_unlearnable.poisons import ar
from hf_unlearnable.poisons.base import Poison
from hf_unlearnable.poisons.lsp import _vertices
from tests.conftest import load_script, make_dataset, noise_pictures

RIGHT, WRONG = b"r" * 32, b"w" * 32


def poisoned(
    poison: Poison, per_class: int = 24, classes: int = 4, size: tuple[int, int] = (32, 32), rate: float = 1.0
) -> tuple[list[Picture], list[int]]:
    rows = per_class * classes
    arrays = noise_pictures(rows, *size) // 4 + 96
    pictures = [Picture(torch.from_numpy(array.transpose(2, 0, 1).copy())) for array in arrays]
    labels = [row % classes for row in range(rows)]
    mask = np.arange(rows) // classes < round(rate * per_class)
    if poison.classes is not None:
        mask &= np.isin(labels, poison.classes)
    return poison.change_pictures(pictures, labels, mask, [f"row {row}" for row in range(rows)]), labels


def p_value(pictures: list[Picture], labels: list[int], poison: Poison, decoys: int = 8000, **more: Any) -> float:
    return prove([(pictures, labels)], poison, decoys=decoys, decoy_key=0, progress=False, **more).p_value


def through(picture: Picture, *, size: tuple[int, int] | None = None, quality: int | None = None) -> Picture:
    image = to_pil(picture)
    if size is not None:
        image = image.resize(size[::-1], PIL.Image.Resampling.BICUBIC)
    if quality is not None:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        image = PIL.Image.open(buffer)
    return Picture(torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy()))


def distance_from_uniform(values: list[float]) -> float:
    ordered, steps = np.sort(values), np.arange(len(values))
    return float(max((ordered - steps / len(values)).max(), ((steps + 1) / len(values) - ordered).max()))


# The arithmetic of p-values.


def test_combined_is_the_probability_of_so_small_a_product() -> None:
    assert combined([0.03]) == pytest.approx(0.03)
    assert combined([0.1, 0.2]) == pytest.approx(0.02 * (1 - math.log(0.02)))
    assert combined([1.0, 1.0]) == 1
    draws = np.random.default_rng(0).random((200_000, 5)).prod(1)
    product = 0.5 * 0.2 * 0.9 * 0.1 * 0.7
    assert combined([0.5, 0.2, 0.9, 0.1, 0.7]) == pytest.approx((draws <= product).mean(), abs=0.005)
    assert 0 < combined([1e-5] * 300) < 1e-300
    assert combined([0.999] * 1000) == pytest.approx(1)


def test_moments_are_those_of_all_rows() -> None:
    generator = np.random.default_rng(0)
    values, labels = generator.normal(size=(40, 3)), generator.integers(0, 3, 40) * 2
    weights = generator.random(40)
    moments = Moments(3)
    for rows in (slice(0, 7), slice(7, 40)):
        moments.add(values[rows], labels[rows].tolist(), weights[rows])
    means = np.stack(
        [np.average(values[labels == label], axis=0, weights=weights[labels == label]) for label in (0, 2, 4)]
    )
    centred = values - means[labels // 2]
    covariance = (centred * weights[:, None]).T @ centred / weights.sum()
    assert moments.labels == (0, 2, 4)
    assert np.allclose(moments.means(), means)
    wanted = covariance + 0.5 * np.trace(covariance) / 3 * np.eye(3)
    assert np.allclose(moments.precision(0.5) @ wanted, np.eye(3))


@pytest.mark.parametrize("kind", [CudaPoison, LspPoison])
def test_p_values_of_wrong_keys_are_uniform(kind: type[Poison]) -> None:
    pictures, labels = poisoned(kind(seed=RIGHT))
    reading = read([(pictures, labels)], kind(seed=RIGHT), progress=False)
    judged = [
        reading.judge(kind(seed=bytes([7]) * 31 + bytes([i])), decoys=800, decoy_key=i, progress=False)
        for i in range(150)
    ]
    assert distance_from_uniform([proof.p_value for proof in judged]) < 2.2 / math.sqrt(150)  # of 1 in 10,000
    singles = [p for proof in judged for p in proof.class_p_values]
    assert distance_from_uniform(singles) < 2.2 / math.sqrt(600)
    assert reading.judge(kind(seed=RIGHT), decoys=800, decoy_key=0, progress=False).p_value < 1e-4


def test_ties_count_against_the_key() -> None:
    test = ClassTest(
        label=0,
        own=np.zeros(1),
        draw=lambda generator, count: generator.integers(0, 4, (count, 1)).astype(float),
        score=lambda some: 3.0 - some[:, 0] * (some[:, 0] > 2),
        size=2**20,
    )
    with tqdm(disable=True) as bar:
        rank = test.rank(10_000, np.random.default_rng(0), bar)
    assert (rank.own, rank.best, rank.decoys) == (3, 3, 10_000)
    assert rank.p_value == pytest.approx(0.75, abs=0.02)
    black = [Picture(torch.zeros(3, 32, 32, dtype=torch.uint8))] * 8
    assert p_value(black, [0, 1] * 4, LspPoison(seed=RIGHT), decoys=1000) == 1


# The right key.


@pytest.mark.parametrize("kind", [CudaPoison, LspPoison])
@pytest.mark.parametrize("size", [(32, 32), (24, 40), (112, 100)])
def test_the_right_key_is_recognised_and_a_wrong_one_is_not(kind: type[Poison], size: tuple[int, int]) -> None:
    pictures, labels = poisoned(kind(seed=RIGHT), per_class=24 if size[0] < 96 else 12, size=size)
    proof = prove([(pictures, labels)], kind(seed=RIGHT), decoys=8000, decoy_key=0, progress=False)
    assert proof.p_value <= 1e-6
    assert (proof.method, proof.classes, proof.rows, proof.decoys) == (kind.name, 4, len(pictures), 8000)
    assert proof.p_value == combined(proof.class_p_values)
    assert p_value(pictures, labels, kind(seed=WRONG)) > 1e-3
    shifted = [(label + 1) % 4 for label in labels]
    assert p_value(pictures, shifted, kind(seed=RIGHT)) > 1e-3


@pytest.mark.parametrize("size", [(32, 40), (100, 112)])
def test_processes_are_recognised(size: tuple[int, int]) -> None:
    pictures, labels = poisoned(ArPoison(seed=RIGHT), per_class=24 if size[0] < 96 else 12, size=size)
    proof = prove([(pictures, labels)], ArPoison(seed=RIGHT), decoys=1200, decoy_key=0, progress=False)
    assert proof.p_value < 1e-3
    assert max(proof.class_p_values) < 0.2
    assert 300 < proof.decoys < 900  # 300 for the first class, and fewer for the others
    assert p_value(pictures, labels, ArPoison(seed=WRONG), decoys=1200) > 1e-2
    shifted = [(label + 1) % 4 for label in labels]
    assert p_value(pictures, shifted, ArPoison(seed=RIGHT), decoys=1200) > 1e-2


def test_p_values_of_wrong_processes_are_uniform() -> None:
    pictures, labels = poisoned(ArPoison(seed=RIGHT), per_class=4, classes=2, size=(96, 96))
    reading = read([(pictures, labels)], ArPoison(seed=RIGHT), progress=False)
    judged = [reading.judge(ArPoison(seed=seed), decoys=200, decoy_key=seed, progress=False) for seed in range(30)]
    assert distance_from_uniform([proof.p_value for proof in judged]) < 2.2 / math.sqrt(30)


def test_few_pictures_and_two_classes() -> None:
    pictures, labels = poisoned(CudaPoison(seed=RIGHT), classes=2)
    assert p_value(pictures, labels, CudaPoison(seed=RIGHT), decoys=40_000) < 1e-3
    one_each = prove([(pictures[:2], labels[:2])], CudaPoison(seed=RIGHT), decoys=1000, decoy_key=0, progress=False)
    assert 0 < one_each.p_value <= 1
    assert any("no p is below" in note for note in one_each.notes)


@pytest.mark.parametrize("kind", [CudaPoison, LspPoison])
def test_damaged_pictures(kind: type[Poison]) -> None:
    poison = kind(seed=RIGHT)
    pictures, labels = poisoned(poison, per_class=40)
    for size in ((24, 24), (48, 40)):
        resized = [through(picture, size=size) for picture in pictures]
        assert p_value(resized, labels, poison, original_size=(32, 32)) < 1e-6
        assert p_value(resized, labels, kind(seed=WRONG), original_size=(32, 32)) > 1e-3
    squeezed = [through(picture, quality=90) for picture in pictures]
    assert p_value(squeezed, labels, poison) < 1e-4


def test_original_size_says_which_filters_and_at_which_scale() -> None:
    poison = CudaPoison(seed=RIGHT)
    pictures, labels = poisoned(poison, per_class=12, size=(112, 112))
    small = [through(picture, size=(80, 80)) for picture in pictures]
    assert p_value(small, labels, poison, original_size=(112, 112)) < 1e-6
    assert p_value(small, labels, poison) > 1e-3


def test_batches_do_not_matter() -> None:
    for poison in (CudaPoison(seed=RIGHT), LspPoison(seed=RIGHT)):
        pictures, labels = poisoned(poison)
        whole = prove([(pictures, labels)], poison, decoys=2000, decoy_key=0, progress=False)
        parts = [(pictures[i : i + 7], labels[i : i + 7]) for i in range(0, len(pictures), 7)]
        again = prove(iter(parts), poison, decoys=2000, decoy_key=0, progress=False)
        assert again.class_p_values == whole.class_p_values
        assert again.statistic == pytest.approx(whole.statistic, rel=1e-4)


def test_pictures_of_several_sizes() -> None:
    poison = CudaPoison(seed=RIGHT)
    many, labels = poisoned(poison, per_class=16)
    wide, others = poisoned(poison, per_class=8, size=(40, 64))
    few, rest = poisoned(poison, per_class=2, size=(16, 16))
    proof = prove([(many + few + wide, labels + rest + others)], poison, decoys=8000, decoy_key=0, progress=False)
    assert proof.p_value < 1e-6
    assert proof.rows == 96  # a tile fits the first and the last
    assert any(note.startswith("8 pictures did not count") for note in proof.notes)
    lsp = LspPoison(seed=RIGHT)
    many, labels = poisoned(lsp, per_class=16)
    wide, others = poisoned(lsp, per_class=8, size=(40, 64))
    assert prove([(wide + many, others + labels)], lsp, decoys=8000, decoy_key=0, progress=False).rows == 64


def test_only_protected_classes_count() -> None:
    poison = CudaPoison(seed=RIGHT, classes=(1, 3, 4))
    pictures, labels = poisoned(poison, per_class=30, classes=5)
    proof = prove([(pictures, labels)], poison, decoys=30_000, decoy_key=0, progress=False)
    assert (proof.classes, proof.rows) == (3, 90)
    assert proof.p_value < 1e-4
    assert any("60 pictures of unprotected classes" in note for note in proof.notes)


def test_half_the_pictures_poisoned() -> None:
    for poison in (CudaPoison(seed=RIGHT, poison_rate=0.5), LspPoison(seed=RIGHT, poison_rate=0.5)):
        pictures, labels = poisoned(poison, per_class=60, rate=0.5)
        assert p_value(pictures, labels, poison) < 1e-4


def test_permuted_filters_are_those_of_the_next_class() -> None:
    poison = CudaPoison(seed=RIGHT, mode="permuted", num_classes=4)
    pictures, labels = poisoned(poison)
    assert p_value(pictures, labels, poison) < 1e-6
    assert p_value(pictures, labels, CudaPoison(seed=RIGHT)) > 1e-3


def test_an_int_seed_is_recognised_with_a_warning() -> None:
    pictures, labels = poisoned(CudaPoison(seed=7))
    proof = prove([(pictures, labels)], CudaPoison(seed=7), decoys=8000, decoy_key=0, progress=False)
    assert proof.p_value < 1e-6
    assert any("int seed" in note for note in proof.notes)


def test_other_decoys_say_the_same() -> None:
    pictures, labels = poisoned(CudaPoison(seed=RIGHT))
    reading = read([(pictures, labels)], CudaPoison(seed=RIGHT), progress=False)
    found = [
        reading.judge(CudaPoison(seed=RIGHT), decoys=8000, decoy_key=key, progress=False) for key in (0, 0, b"j" * 32)
    ]
    assert found[0] == found[1] != found[2]
    assert found[2].p_value < 1e-6


# What decoys are drawn from.


@pytest.mark.parametrize("seed", [5, RIGHT])
@pytest.mark.parametrize(("k", "blur"), [(3, 0.3), (5, 0.06)])
def test_decoy_filters_follow_the_law_of_the_poison(seed: int | bytes, k: int, blur: float) -> None:
    own = CudaPoison(seed=seed).filters(4000, kernel_size=k, blur=blur).numpy().reshape(-1, k * k)
    drawn = spectra.draw_filters(numpy_generator(1, "test"), 4000, k, blur)
    for filters in (own, drawn):
        ones = filters == 1
        assert (ones.sum(1) == 1).all()
        places = ones.sum(0)
        assert ((places - 4000 / k**2) ** 2 / (4000 / k**2)).sum() < k**2 + 6 * math.sqrt(2 * k**2)
        assert distance_from_uniform((filters[~ones] / blur).tolist()) < 2.2 / math.sqrt(4000 * (k**2 - 1))
        others = np.where(ones, blur / 2, filters) - blur / 2
        correlation = others.T @ others / 4000 / (blur**2 / 12)
        assert np.abs(correlation - np.diag(np.diag(correlation))).max() < 6 / math.sqrt(4000)


def test_decoy_vertices_follow_the_law_of_the_poison() -> None:
    taken = np.array([[1.0, 1, 1], [-1, 1, -1], [1, -1, -1]])
    drawn = patches.draw_vertices(numpy_generator(1, "test"), 5000, taken)
    counts = Counter(map(tuple, drawn.tolist()))
    assert len(counts) == 5
    assert not set(counts) & set(map(tuple, taken.tolist()))
    assert max(abs(count - 1000) for count in counts.values()) < 5 * math.sqrt(800)
    pairs = Counter(_vertices(key, 2, 2).tobytes() for key in range(3000))
    assert len(pairs) == 12
    assert max(abs(count - 250) for count in pairs.values()) < 5 * math.sqrt(250)
    wide = patches.draw_vertices(numpy_generator(2, "test"), 4000, np.empty((0, 51)))
    assert np.abs(wide.mean(0)).max() < 6 / math.sqrt(4000)
    assert np.abs(wide.T @ wide / 4000 - np.eye(51)).max() < 6 / math.sqrt(4000)


def test_decoy_processes_follow_the_law_of_the_poison() -> None:
    filters = ArPoison(seed=RIGHT).coefficients(3, large=True).numpy()
    filters[:, :, 2, 2] = -1
    filters = filters.reshape(3, 27)
    key = numpy_generator(1, "test").bytes(32)
    found = list(islice(ar._bounded(key, True), 300))
    drawn = processes.draw_processes(numpy_generator(1, "test"), 300, filters, 5.0, large=True)
    wanted = [process for process, pattern in found if ar._answer_at_least(5.0, filters, pattern)]
    assert 0 < len(drawn) < 300
    assert np.array_equal(drawn, np.array(wanted).reshape(-1, 27))
    everything = processes.draw_processes(numpy_generator(1, "test"), 300, filters[:0], 5.0, large=True)
    assert len(everything) == 300


def test_the_strictness_of_a_search_is_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ar, "_PATIENCE", 3)
    monkeypatch.setattr(ar, "_PROCESSES_APART", 4)
    asked, answer = [], ar._answer_at_least

    def listening(required: float, filters: np.ndarray, pattern: np.ndarray) -> bool:
        good = answer(required, filters, pattern)
        if good:
            asked.append(required)
        return good

    monkeypatch.setattr(ar, "_answer_at_least", listening)
    first = np.stack(list(islice(ar._search(RIGHT, True), 8)))
    assert processes.strictness(RIGHT, first, large=True) == pytest.approx(asked)
    assert asked[0] == 5
    assert asked[3] < 5
    assert asked[4] < 3


def test_spectra_of_processes_are_of_all_frequencies_once() -> None:
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 3, 16, 16)))
    window = np.outer(np.hanning(18)[1:-1], np.hanning(18)[1:-1])
    power = np.abs(np.fft.fft2((x - x.mean((-1, -2), keepdim=True)).numpy() * window)) ** 2
    places = processes._places()
    mirrored = [tuple(place % 16) for place in places] + [tuple(-place % 16) for place in places]
    assert len(places) == 129  # half of 256, less the mean, and three that are their own mirror pictures
    assert len(set(mirrored)) == 255
    assert np.allclose(processes._spectra(x, None), power[:, :, places[:, 0], places[:, 1]].reshape(2, -1), rtol=1e-4)


def test_gains_are_those_of_a_fourier_transform() -> None:
    setting = (3, 0.3, 20, 1.0, 1.0)
    filters = spectra.draw_filters(numpy_generator(1, "test"), 3, 3, 0.3)
    wanted = np.abs(np.fft.fft2(filters.reshape(3, 3, 3), s=(20, 20))) ** 2
    places = spectra._places(20, 1.0, 1.0)
    assert len(places) == 201  # half of 400, less the mean, and three that are their own mirror pictures
    got = spectra._log_gains(filters, spectra._waves(setting))
    assert np.allclose(np.exp(got), wanted[:, places[:, 0], places[:, 1]] + 1e-3, rtol=1e-4)
    mirrored = {tuple(-place % 20) for place in places} | {tuple(place % 20) for place in places}
    assert len(mirrored) == 399


def test_log_spectra_are_those_of_tiles_under_a_window() -> None:
    picture = Picture(torch.from_numpy(noise_pictures(1, 24, 34)[0].transpose(2, 0, 1).copy()))
    got, weight = spectra._log_spectra([picture], (3, 0.3, 20, 1.0, 1.0), (1, 2))
    luma = (picture.pixels.double() / 255 * torch.tensor([0.299, 0.587, 0.114]).double()[:, None, None]).sum(0).numpy()
    window = np.outer(np.hanning(22)[1:-1], np.hanning(22)[1:-1])
    tiles = [luma[1:21, left : left + 20] for left in (2, 12)]
    waves = [np.fft.fft2((tile - tile.mean()) * window) for tile in tiles]
    power = np.mean([np.abs(wave) ** 2 for wave in waves], axis=0) / (window**2).sum()
    places = spectra._places(20, 1.0, 1.0)
    wanted = power[places[:, 0], places[:, 1]]
    assert np.allclose(np.exp(got[0]), wanted + 1e-6, rtol=1e-3)
    assert weight[0] == pytest.approx(math.sqrt(wanted[np.hypot(*places.T) > 4].mean() + 1e-6), rel=1e-3)


def test_patch_means_of_a_side() -> None:
    for now, once, patch in ((32, 32, 8), (33, 33, 8), (24, 32, 8), (40, 33, 8)):
        shares = patches._averages(now, once, patch)
        assert shares.shape == (-(-once // patch), now)
        assert np.allclose(shares.sum(1), 1)
    assert np.array_equal(patches._averages(5, 5, 2), np.array([[1, 1, 0, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 2]]) / 2)


# What cannot be proved, and bad input.


@pytest.mark.parametrize(
    ("poison", "why"),
    [
        (RandomNoisePoison(seed=RIGHT), "clean picture"),
        (OpsPoison(seed=RIGHT, pixels=(((0, 0, 1),), ((1, 1, 2),)), size=(32, 32)), "clean pictures"),
        (CudaPoison(seed=RIGHT, mode="universal"), "same filter"),
        (CudaPoison(seed=RIGHT, blur=0.0), "no filter"),
        (CudaPoison(seed=RIGHT, kernel_size=1), "no filter"),
        (LspPoison(seed=RIGHT, poison_rate=0.0), "no picture"),
    ],
)
def test_what_cannot_be_proved_says_why(poison: Poison, why: str) -> None:
    pictures = [Picture(torch.zeros(3, 32, 32, dtype=torch.uint8))] * 4
    with pytest.raises(Unprovable, match=why):
        p_value(pictures, [0, 1, 0, 1], poison)


def test_pictures_that_cannot_be_read() -> None:
    pictures, _ = poisoned(CudaPoison(seed=RIGHT), per_class=4)
    with pytest.raises(Unprovable, match="two protected classes"):
        p_value(pictures, [0] * len(pictures), CudaPoison(seed=RIGHT))
    with pytest.raises(Unprovable, match="two protected classes"):
        p_value([], [], CudaPoison(seed=RIGHT))
    tiny = [Picture(torch.zeros(3, 8, 8, dtype=torch.uint8))] * 4
    with pytest.raises(Unprovable, match="large enough"):
        p_value(tiny, [0, 1, 2, 3], CudaPoison(seed=RIGHT))
    with pytest.raises(Unprovable, match="patch colours"):
        p_value(*poisoned(LspPoison(seed=RIGHT), per_class=2, size=(32, 40)), LspPoison(seed=RIGHT, patch=1))
    with pytest.raises(Unprovable, match="one size"):
        p_value([*pictures[:1], *tiny[:1]], [0, 1], CudaPoison(seed=RIGHT), original_size=(32, 32))
    with pytest.raises(Unprovable, match="neighbouring pixels"):
        p_value(pictures, [0] * len(pictures), ArPoison(seed=RIGHT), original_size=(24, 24))
    with pytest.raises(Unprovable, match="large enough"):
        p_value(tiny, [0, 1, 2, 3], ArPoison(seed=RIGHT))


def test_bad_input() -> None:
    pictures, labels = poisoned(CudaPoison(seed=RIGHT), per_class=2)
    poison = CudaPoison(seed=RIGHT)
    with pytest.raises(ValueError, match="100 decoys a class"):
        p_value(pictures, labels, poison, decoys=399)
    with pytest.raises(ValueError, match="a label for each of 8 pictures, got 7"):
        p_value(pictures, labels[:-1], poison)
    with pytest.raises(ValueError, match="labels of 0 or more, got -1"):
        p_value(pictures, [-1, *labels[1:]], poison)
    with pytest.raises(ValueError, match="labels below 3"):
        p_value(pictures, labels, CudaPoison(seed=RIGHT, num_classes=3))
    with pytest.raises(ValueError, match="original_size"):
        p_value(pictures, labels, poison, original_size=(0, 32))
    reading = read([(pictures, labels)], poison, progress=False)
    with pytest.raises(ValueError, match="expected the settings"):
        reading.judge(CudaPoison(seed=RIGHT, blur=0.1), decoys=800, decoy_key=0, progress=False)


def test_the_experiment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script, output = load_script("ownership"), tmp_path / "figures.json"
    make_dataset(noise_pictures(96) // 4 + 96, [row % 4 for row in range(96)]).save_to_disk(tmp_path / "clean")
    command = (
        f"--dataset {tmp_path / 'clean'} --poison lsp --pictures-per-class 24 --keys 2 --wrong-keys 5 --decoys 4000"
    )
    command += f" --wrong-decoys 1000 --damage none jpeg-75 resize-48 --no-progress --output {output}"
    assert script.main(command.split()) == 0, capsys.readouterr().err
    figures = json.loads(output.read_text())
    assert [(line["damage"], line["keys"]) for line in figures["summary"]] == [
        ("none", 2),
        ("jpeg-75", 2),
        ("resize-48", 2),
    ]
    assert figures["summary"][0]["detected"] == 2
    assert (figures["wrong_keys"]["keys"], figures["wrong_keys"]["at_most_alpha"]) == (5, 0)
    assert figures["command"].endswith(str(output))
    assert "2 of 2 right keys" in capsys.readouterr().out
    assert script.main(f"--dataset demo --poison lsp --damage blur --output {output}".split()) == 1
    assert "jpeg-QUALITY" in capsys.readouterr().err


@pytest.mark.parametrize("own", [math.nan, 1.0])
def test_scores_that_are_no_numbers_count_for_the_decoys(own: float) -> None:
    scores = iter([np.array([own]), np.array([math.nan] * 60 + [0.0] * 40)])
    test = ClassTest(
        label=0, own=np.zeros(1), draw=lambda _, count: np.zeros((count, 1)), score=lambda rows: next(scores), size=1
    )
    rank = test.rank(100, numpy_generator(0, "test"), tqdm(disable=True))
    assert rank.p_value == (1.0 if math.isnan(own) else 61 / 101)
