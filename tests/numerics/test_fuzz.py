"""The first hundred random configurations of tests/tools/fuzz.py, on every backend under test, ten
at a time, and those that failed before.
"""

from __future__ import annotations

import pytest

from tests.tools.fuzz import failures

# Seeds that failed, and whether they draw the options of later releases.
FAILED = [
    # skew_kl of confident models that nearly agree, where grad - q sum(grad) cancelled
    *[(seed, False) for seed in (2716, 20991, 21209, 30132, 30822)],
    # weighted_cosine with vectors so short in weights of nearly 0 that their budget was NaN
    *[(seed, True) for seed in (10023, 10211)],
]


@pytest.mark.parametrize(
    "tens", [0, 1, *[pytest.param(tens, marks=pytest.mark.slow) for tens in range(2, 10)]]
)
def test_random_configurations(backend, tens):
    if backend == "triton":
        pytest.skip("its own files cover it: interpreted, these take an hour")
    failed = [
        line for seed in range(10 * tens, 10 * tens + 10) for line in failures(seed, [backend])
    ]
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize(("seed", "later"), FAILED)
def test_configurations_that_failed_before(backend, seed, later):
    if backend == "triton":
        pytest.skip("interpreted, these take minutes")
    assert not failures(seed, [backend], later)
