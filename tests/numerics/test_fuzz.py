"""The first hundred random configurations of tests/tools/fuzz.py, on every backend under test, ten
at a time.
"""

from __future__ import annotations

import pytest

from tests.tools.fuzz import failures


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
