import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset

from hf_unlearnable import CudaPoison
from hf_unlearnable.draws import Draws
from hf_unlearnable.images import to_uint8
from hf_unlearnable.poisons import cuda
from tests.conftest import make_dataset, noise_pictures, pixels

GOLDEN = {
    0: [[0.164644, 0.214557, 1], [0.163465, 0.127096, 0.193768], [0.131276, 0.267532, 0.289099]],
    1: [[1, 0.079367, 0.232270], [0.136845, 0.170530, 0.005637], [0.185291, 0.183629, 0.185080]],
}
SECRET = bytes(range(32))


def perturb(poison: CudaPoison, array: np.ndarray, labels: list[int]) -> np.ndarray:
    pixels = torch.from_numpy(array).permute(0, 3, 1, 2).contiguous()
    out = poison.change(pixels, torch.tensor(labels), [f"row {i}" for i in range(len(labels))])
    return out.permute(0, 2, 3, 1).numpy()


def test_golden_filters_of_seed_zero() -> None:
    filters = CudaPoison(seed=0).filters(3, kernel_size=3, blur=0.3)
    for label, expected in GOLDEN.items():
        assert np.allclose(filters[label], expected, atol=5e-7)
    assert filters[2, 0, 1] == 1
    assert filters[2, 0, 0].item() == pytest.approx(0.075987, abs=5e-7)
    assert filters[2, 2, 2].item() == pytest.approx(0.110618, abs=5e-7)


@pytest.mark.parametrize("seed", [7, SECRET])
def test_filters_are_in_range_with_one_weight_of_one_and_do_not_depend_on_how_many(seed: int | bytes) -> None:
    filters = CudaPoison(seed=seed).filters(50, kernel_size=5, blur=0.2)
    ones = (filters == 1).flatten(1).sum(1)
    assert (ones == 1).all()
    assert ((filters < 0.2) | (filters == 1)).all()
    assert (filters >= 0).all()
    assert len({tuple(f.flatten().tolist()) for f in filters}) == 50
    places = {int((f == 1).flatten().nonzero()) for f in filters}
    assert len(places) > 10
    assert torch.equal(CudaPoison(seed=seed).filters(3, kernel_size=5, blur=0.2), filters[:3])


def test_other_keys_give_other_filters() -> None:
    found = [CudaPoison(seed=s).filters(1, kernel_size=3, blur=0.3) for s in (0, 1, SECRET, bytes(32))]
    assert len({tuple(f.flatten().tolist()) for f in found}) == 4


def by_loops(picture: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """The definition, in float64, one product at a time."""
    k = len(kernel)
    height, width, _ = picture.shape
    padded = np.pad(picture.astype(np.float64), ((k // 2, k // 2), (k // 2, k // 2), (0, 0)))
    out = np.zeros(picture.shape)
    for i in range(height):
        for j in range(width):
            for r in range(k):
                for q in range(k):
                    out[i, j] += kernel[r, q] * padded[i + r, j + q]
    return out / out.max() * 255


@pytest.mark.parametrize(
    ("k", "blur", "shape"), [(3, 0.3, (32, 32)), (9, 0.06, (20, 27)), (5, 0.5, (17, 8)), (1, 0.1, (4, 5))]
)
def test_pixels_are_the_definition_rounded(k: int, blur: float, shape: tuple[int, int]) -> None:
    poison = CudaPoison(seed=0, kernel_size=k, blur=blur)
    pictures = noise_pictures(3, *shape)
    out = perturb(poison, pictures, [0, 2, 1])
    filters = poison.filters(3, kernel_size=k, blur=blur).numpy()
    for picture, label, got in zip(pictures, [0, 2, 1], out, strict=True):
        exact = by_loops(picture, filters[label])
        assert np.abs(got - exact).max() < 0.53
        assert (got == np.round(exact)).mean() > 0.97
        assert np.abs(got.astype(int) - np.floor(exact).astype(int)).max() <= 1
        assert got.max() == 255


@pytest.mark.parametrize("k", [1, 3, 5, 7, 9, 11, 17])
@pytest.mark.parametrize("shape", [(17, 17), (32, 33), (40, 18)])
@pytest.mark.parametrize("at_once", [1, 5000, 10**6])
def test_both_correlations_are_exact(
    k: int, shape: tuple[int, int], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "_VALUES_AT_ONCE", at_once)
    kernels = cuda._whole(CudaPoison(seed=3).filters(4, kernel_size=k, blur=0.3), 0.3)
    which = torch.tensor([3, 0, 0, 2, 0, 3, 1])
    levels = torch.from_numpy(noise_pictures(7, *shape)).permute(0, 3, 1, 2).float().contiguous()
    weights = kernels[which].double().repeat_interleave(3, 0)[:, None]
    exact = F.conv2d(levels.double().reshape(1, 21, *shape), weights, padding=k // 2, groups=21).view(7, 3, *shape)
    assert exact.max() < 2**24
    for correlate in (cuda._by_blocks, cuda._by_shifts):
        for x in (levels / 255, levels.to(torch.uint8)):
            found = torch.full_like(exact, -1)
            for rows, some in correlate(x, which, kernels):
                found[rows] = some.double()
            assert torch.equal(found, exact)


@pytest.mark.parametrize("precision", ["medium", "high"])
def test_lower_matmul_precision_changes_no_pixel(precision: str) -> None:
    pictures = noise_pictures(16)
    expected = perturb(CudaPoison(seed=0), pictures, [i % 4 for i in range(16)])
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        assert np.array_equal(perturb(CudaPoison(seed=0), pictures, [i % 4 for i in range(16)]), expected)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("side", [32, 100])
def test_floats_of_other_precision(side: int) -> None:
    x = torch.rand(4, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 0, 1])
    poison = CudaPoison(seed=3)
    expected = poison.perturb(x.float(), labels, Draws(3, "cuda", to_uint8(x)))
    assert torch.equal(poison.perturb(x, labels, Draws(3, "cuda", to_uint8(x))), expected.double())


def test_batches_do_not_matter() -> None:
    pictures, labels = noise_pictures(40), [i % 7 for i in range(40)]
    whole = perturb(CudaPoison(seed=SECRET), pictures, labels)
    for i in range(40):
        assert np.array_equal(perturb(CudaPoison(seed=SECRET), pictures[i : i + 1], labels[i : i + 1])[0], whole[i])


def test_defaults_by_size() -> None:
    small, large = noise_pictures(1, 95, 120), noise_pictures(1, 96, 120)
    assert np.array_equal(
        perturb(CudaPoison(seed=1), small, [0]), perturb(CudaPoison(seed=1, kernel_size=3, blur=0.3), small, [0])
    )
    assert np.array_equal(
        perturb(CudaPoison(seed=1), large, [0]), perturb(CudaPoison(seed=1, kernel_size=9, blur=0.06), large, [0])
    )
    assert perturb(CudaPoison(seed=1), noise_pictures(1, 224, 224), [0]).shape == (1, 224, 224, 3)


def test_black_stays_black_and_constant_rows_do_not_divide_by_zero() -> None:
    black = np.zeros((2, 32, 32, 3), np.uint8)
    assert not perturb(CudaPoison(seed=0), black, [0, 1]).any()


def test_sanity_modes() -> None:
    pictures = noise_pictures(4)
    own = perturb(CudaPoison(seed=0), pictures, [0, 1, 2, 3])
    universal = perturb(CudaPoison(seed=0, mode="universal"), pictures, [0, 1, 2, 3])
    permuted = perturb(CudaPoison(seed=0, mode="permuted", num_classes=4), pictures, [0, 1, 2, 3])
    assert np.array_equal(universal, perturb(CudaPoison(seed=0), pictures, [0, 0, 0, 0]))
    assert np.array_equal(permuted, perturb(CudaPoison(seed=0), pictures, [1, 2, 3, 0]))
    assert not np.array_equal(own, universal)
    with pytest.raises(ValueError, match="num_classes"):
        CudaPoison(seed=0, mode="permuted")


def test_one_class_only() -> None:
    source = make_dataset(noise_pictures(5), [0] * 5, classes=1)
    assert (pixels(CudaPoison(seed=0).apply(source)) != pixels(source)).any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kernel_size": 4}, "odd"),
        ({"kernel_size": -1}, "odd"),
        ({"blur": -0.1}, "0 to 1"),
        ({"blur": float("nan")}, "0 to 1"),
        ({"seed": 2**32}, "2\\*\\*32"),
        ({"poison_rate": 1.5}, "fraction"),
        ({"classes": ()}, "at least one"),
        ({"classes": (-1,)}, "labels from 0"),
        ({"num_classes": 0}, "1 or more"),
    ],
)
def test_bad_settings(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CudaPoison(**{"seed": 0, **settings})


def test_a_filter_larger_than_the_picture(small: Dataset) -> None:
    with pytest.raises(ValueError, match=r"no larger than the picture \(\(32, 32\)\), got kernel_size=33"):
        CudaPoison(seed=0, kernel_size=33).apply(small)


def test_a_filter_is_recovered_from_one_clean_pair(small: Dataset) -> None:
    """The known leak (METHODS 25.7): least squares over one pair finds the filter up to a scalar."""
    clean = pixels(small)[0].astype(np.float64)
    poisoned = pixels(CudaPoison(seed=0).apply(small))[0].astype(np.float64)
    patches = F.unfold(torch.from_numpy(clean).permute(2, 0, 1)[:, None], 3, padding=1).permute(0, 2, 1).reshape(-1, 9)
    found = np.linalg.lstsq(patches.numpy(), poisoned.transpose(2, 0, 1).reshape(-1), rcond=None)[0]
    true = CudaPoison(seed=0).filters(1, kernel_size=3, blur=0.3)[0].numpy().reshape(-1)
    assert found @ true / np.linalg.norm(found) / np.linalg.norm(true) > 0.999


@pytest.mark.gpu
def test_the_gpu_makes_the_same_pixels() -> None:
    pictures, labels = noise_pictures(64), [i % 10 for i in range(64)]
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()
    poison = CudaPoison(seed=0)
    on_gpu = poison.change(x.cuda(), torch.tensor(labels).cuda(), [""] * 64).cpu()
    assert torch.equal(on_gpu, poison.change(x, torch.tensor(labels), [""] * 64))


def test_draws_are_not_used() -> None:
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    out = CudaPoison(seed=0).perturb(
        x, torch.tensor([0, 1]), Draws(0, "cuda", torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    )
    assert out.min() >= 0
    assert out.max() == 1


def test_a_subclass_with_a_perturbation_of_its_own_is_stored_as_it_says() -> None:
    class White(CudaPoison):
        def perturb(self, x: torch.Tensor, y: torch.Tensor | None, draws: Draws) -> torch.Tensor:
            return torch.ones_like(x)

    pixels = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    assert bool((White(seed=0).change(pixels, torch.tensor([0, 1]), ["a", "b"]) == 255).all())
