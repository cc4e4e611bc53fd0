"""The demo's comparison of objectives against figures by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("rich")

from fdd_kernels.common.student_t import t_quantile
from fdd_kernels.demo.comparison import Comparison, estimate
from fdd_kernels.demo.students import Run


def record(objective, seed, kl, seconds, teacher):
    """A run evaluated after 10, 20, 30, ... steps, `kl` per evaluation and window."""
    steps = [10 * (i + 1) for i in range(len(kl))]
    return Run(
        objective,
        seed,
        steps=steps,
        held_out_loss=[1.0] * len(kl),
        held_out_kl=[sum(windows) / len(windows) for windows in kl],
        cpu_seconds=[seconds * step for step in steps],
        teacher_cpu_seconds=[teacher * step for step in steps],
        window_kl_curve=kl,
    )


def test_the_interval_is_that_of_its_definition():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(4, 1)) + rng.normal(size=(1, 12)) + rng.normal(size=(4, 12))
    seeds, windows = values.mean(1), values.mean(0)
    # Student's t, 97.5%, of 3 and 11 degrees of freedom
    by_hand = math.hypot(
        3.182 * np.std(seeds, ddof=1) / 2, 2.201 * np.std(windows, ddof=1) / math.sqrt(12)
    )
    found = estimate(values)
    assert found.mean == pytest.approx(values.mean())
    assert found.half == pytest.approx(by_hand, rel=2e-3)  # the expansion at 11: 2.1977
    assert estimate(values[:1]).half == pytest.approx(
        2.201 * np.std(values[0], ddof=1) / math.sqrt(12), rel=2e-3
    )
    for freedom, tabulated in ((1, 12.706), (10, 2.228), (20, 2.086), (47, 2.0117), (10**6, 1.96)):
        assert t_quantile(freedom) == pytest.approx(tabulated, rel=2e-3)


def test_what_all_seeds_and_windows_share_is_no_noise():
    noise = np.random.default_rng(0).normal(size=(3, 5))
    gap = estimate((noise + 0.25) - noise)
    assert gap.mean == pytest.approx(0.25)
    assert gap.half < 1e-12
    assert str(gap) == "+0.250±0.000*"
    assert not estimate(np.array([[1.0, -1.1]])).exceeds_noise


def test_equal_seconds_count_the_teacher_where_it_is_needed():
    def falling(per_step):  # linear in the step, another level for each window
        return [[9 - per_step * step, 11 - per_step * step] for step in (10, 20, 30)]

    runs = [
        record(name, seed, falling(per_step), seconds, 3.0)
        for name, per_step, seconds in (
            ("labels only", 0.01, 1.5),
            ("output KD", 0.02, 1.0),
            ("full FDD", 0.03, 2.0),
        )
        for seed in (0, 1)
    ]
    comparison = Comparison(runs)
    assert comparison.seconds_per_step == pytest.approx(
        {"labels only": 1.5, "output KD": 4.0, "full FDD": 5.0}
    )
    # 30 steps of labels only; and of output KD, before whose end labels only ended
    assert comparison.seconds == pytest.approx([45, 120])
    rows = {row["objective"]: row for row in comparison.rows()}
    full, kd, labels = (rows[name] for name in ("full FDD", "output KD", "labels only"))
    assert full["equal steps"]["kl"].mean == pytest.approx(10 - 0.9)
    assert full["equal steps"]["difference"].mean == pytest.approx(-0.3)
    # 11.25 steps lie between two evaluations; 9 before the first, whose figure stands for it
    assert kd["45 s"]["kl"].mean == pytest.approx(10 - 0.225)
    assert full["45 s"]["kl"].mean == pytest.approx(10 - 0.3)
    assert labels["45 s"]["difference"].mean == pytest.approx(-0.3 + 0.225)
    assert full["120 s"]["difference"].mean == pytest.approx(-0.03 * 24 + 0.02 * 30)
    assert full["120 s"]["difference_by_seed"] == pytest.approx([-0.12, -0.12])
    assert labels["120 s"] is None
    assert kd["120 s"]["difference"].half == 0
    assert comparison.neighbours()[0] == (
        "At equal steps: output KD - full FDD = 0.300 ±0.000, more than the noise."
    )
    others = [run for run in runs if run.objective != "output KD"]
    assert Comparison(others).baseline == "labels only"
