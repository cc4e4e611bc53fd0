"""The paired bootstrap of ratios of sums."""

import numpy as np
import pytest

from fdd_kernels.evaluation import intervals
from fdd_kernels.evaluation.intervals import RESAMPLES, Ratio, paired_bootstrap
from fdd_kernels.evaluation.record import differs

RNG = np.random.default_rng(1)
WEIGHTS = RNG.integers(1, 30, 80).astype(float)
SUMS = WEIGHTS * (2 + RNG.standard_normal(80) / 2)


def test_mean_and_interval_of_a_ratio():
    """The interval has the width that the normal approximation gives (delta method)."""
    found = paired_bootstrap({"a": Ratio(SUMS, WEIGHTS), "b": Ratio(SUMS, WEIGHTS, np.exp)})
    mean = SUMS.sum() / WEIGHTS.sum()
    assert found["a"].mean == pytest.approx(mean, rel=1e-14)
    assert found["b"].mean == pytest.approx(np.exp(mean), rel=1e-14)
    interval = found["a"].record()
    assert interval["low"] < mean < interval["high"]
    residuals = SUMS - mean * WEIGHTS
    width = 2 * 1.96 * np.sqrt((residuals**2).sum()) / WEIGHTS.sum()
    # A quantile of 1000 draws is off by about sqrt(0.025 * 0.975 / 1000) / 0.058 = 0.085 standard
    # errors; two of them, at 4 standard deviations, are 0.48 of 3.92.
    assert interval["high"] - interval["low"] == pytest.approx(width, rel=0.13)
    assert found["b"].record()["low"] == pytest.approx(np.exp(interval["low"]), rel=1e-2)


def test_differences_are_paired():
    """A constant difference has no spread, whatever the sequences'."""
    found = paired_bootstrap({"a": Ratio(SUMS, WEIGHTS), "b": Ratio(SUMS + 0.1 * WEIGHTS, WEIGHTS)})
    difference = found["b"].minus(found["a"]).record()
    assert list(difference.values()) == pytest.approx([0.1] * 3, abs=1e-12)
    assert differs(difference)
    assert not differs(found["a"].minus(found["a"]).record())


def test_pieces_give_the_same_resamples(monkeypatch):
    whole = paired_bootstrap({"a": Ratio(SUMS, WEIGHTS)})["a"]
    monkeypatch.setattr(intervals, "_HELD", 7 * len(SUMS))
    pieces = paired_bootstrap({"a": Ratio(SUMS, WEIGHTS)})["a"]
    assert whole.draws.shape == pieces.draws.shape == (RESAMPLES,)
    np.testing.assert_allclose(pieces.draws, whole.draws, rtol=1e-13)


@pytest.mark.parametrize("count", [1, 0])
def test_too_few_sequences_have_no_interval(count):
    found = paired_bootstrap({"a": Ratio(SUMS[:count], WEIGHTS[:count])})["a"].record()
    assert (found["low"], found["high"]) == (None, None)
    assert not differs(found)


@pytest.mark.filterwarnings("error")
def test_no_interval_where_a_resample_has_no_number():
    """Bits per byte of resamples that consist of the text without a byte; infinite perplexity."""
    ratio = Ratio(np.array([1.0, 2.0]), np.array([0.0, 3.0]))
    infinite = Ratio(np.full(2, 800.0), np.ones(2), np.exp)
    found = paired_bootstrap({"a": ratio, "b": infinite})
    assert found["a"].record() == {"mean": 1.0, "low": None, "high": None}
    difference = found["b"].minus(found["b"]).record()
    assert (difference["low"], difference["high"]) == (None, None)
