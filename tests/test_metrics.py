import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from hf_unlearnable import Budget, metrics
from tests.conftest import noise_pictures


def pair(levels: int = 8, height: int = 32, width: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    clean = torch.from_numpy(noise_pictures(6, height, width)).permute(0, 3, 1, 2).contiguous()
    noise = np.random.default_rng(1).integers(-levels, levels + 1, clean.shape)
    return clean, (clean.int() + torch.from_numpy(noise)).clamp(0, 255).to(torch.uint8)


def test_ssim_is_scikit_images() -> None:
    clean, poisoned = pair()
    for row, value in enumerate(metrics.ssim(clean, poisoned)):
        a, b = (x[row].permute(1, 2, 0).numpy() for x in (clean, poisoned))
        expected = structural_similarity(
            a, b, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255
        )
        assert value == pytest.approx(expected, abs=1e-5)


def test_ssim_by_bands_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    clean, poisoned = pair(height=97)
    whole = metrics.ssim(clean, poisoned)
    monkeypatch.setattr(metrics, "SSIM_VALUES_AT_ONCE", 1)
    assert torch.allclose(metrics.ssim(clean, poisoned), whole, atol=1e-6)


def test_psnr_is_scikit_images_and_the_closed_forms() -> None:
    clean, poisoned = pair()
    for row, value in enumerate(metrics.psnr(clean, poisoned)):
        expected = peak_signal_noise_ratio(clean[row].numpy(), poisoned[row].numpy(), data_range=255)
        assert value == pytest.approx(expected, abs=1e-6)
    flat = torch.full((1, 3, 32, 32), 100, dtype=torch.uint8)
    for levels, expected in ((4, 36.09), (8, 30.07), (16, 24.05)):
        assert metrics.psnr(flat, flat + levels).item() == pytest.approx(expected, abs=0.005)
    assert metrics.psnr(flat, flat).item() == metrics.PSNR_CAP


def test_ssim_of_equals_is_one_and_symmetric() -> None:
    clean, poisoned = pair()
    assert torch.allclose(metrics.ssim(clean, clean), torch.ones(6))
    assert torch.allclose(metrics.ssim(clean, poisoned), metrics.ssim(poisoned, clean))


def test_ssim_needs_room() -> None:
    with pytest.raises(ValueError, match="at least 11"):
        metrics.ssim(*pair(height=10, width=40))


def test_the_report_is_what_loops_find_and_does_not_depend_on_batches() -> None:
    clean, poisoned = pair()
    poisoned[4] = clean[4]
    whole, parts = (metrics.PixelReport() for _ in range(2))
    whole.update(clean, poisoned, list(range(6)), Budget("linf", 8 / 255))
    for row in range(6):
        parts.update(clean[row : row + 1], poisoned[row : row + 1], [row], Budget("linf", 8 / 255))
    summary = whole.summary()
    for name, value in parts.summary().items():
        numeric = isinstance(value, int | float) or (isinstance(value, dict) and "mean" in value)
        assert value == (pytest.approx(summary[name], rel=1e-6) if numeric else summary[name]), name
    difference = poisoned.numpy().astype(int) - clean.numpy()
    assert summary["rows_changed"] == 5
    assert summary["linf_levels"]["largest"] == abs(difference).max() == 8
    assert summary["l2"]["mean"] == pytest.approx(np.sqrt((difference**2).sum((1, 2, 3))).mean() / 255)
    assert summary["l0_pixels"]["mean"] == (difference != 0).any(1).sum((1, 2)).mean()
    assert summary["values_at_bound"] == pytest.approx((abs(difference) == 8).mean())
    assert summary["values_changed"] == pytest.approx((difference != 0).mean())
    clipped = (difference != 0) & ((poisoned.numpy() == 0) | (poisoned.numpy() == 255))
    assert summary["values_clipped"] == pytest.approx(clipped.mean())
    assert summary["psnr_db"]["largest"] == metrics.PSNR_CAP
    assert summary["worst_rows_by_psnr"][-1] == 4


def test_the_report_enforces_the_budget_and_names_the_row() -> None:
    clean, poisoned = pair()
    with pytest.raises(ValueError, match="^row 1[0-5]: expected linf of at most 7/255, got 8/255"):
        metrics.PixelReport().update(clean, poisoned, list(range(10, 16)), Budget("linf", 7 / 255))


def test_small_pictures_have_no_ssim_and_an_empty_report_is_an_error() -> None:
    report = metrics.PixelReport(perceptual_every=2)
    report.update(*pair(height=8, width=8), list(range(6)))
    assert report.summary()["ssim"] is None
    assert report.summary()["perceptual_rows"] == 3
    with pytest.raises(ValueError, match="no pictures"):
        metrics.PixelReport().summary()


def test_what_was_handed_out_does_not_change_afterwards() -> None:
    report = metrics.PixelReport()
    report.update(*pair(), list(range(6)))
    counts = report.arrays()["counts"]
    before = counts.copy()
    report.update(*pair(), list(range(6, 12)))
    assert np.array_equal(counts, before)
