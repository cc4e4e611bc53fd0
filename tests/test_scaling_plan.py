"""The scaling plan: what it counts is what the package sends, and it says that nothing was measured."""

from __future__ import annotations

import sys

import pytest

from benchmarks import scaling_plan
from fdd_kernels.config import LossOptions
from fdd_kernels.plan import make_plan
from fdd_kernels.spec import MOMENT_STATS
from fdd_kernels.testing import random_problem
from fdd_kernels.vocab_parallel import SENT_READ_STATS


@pytest.mark.parametrize("layers", [2, 5, 9])
def test_numbers_sent_are_those_of_the_default_objective(layers):
    p = random_problem(layers=layers)
    plan, *_ = make_plan(
        LossOptions(), p.student_hidden, p.student_weight, p.teacher_hidden, p.teacher_weight, None, None, None, None, None
    )
    sent = 2 * len(plan.layers) + SENT_READ_STATS * len(plan.spec.reads) + MOMENT_STATS * len(plan.spec.moments)
    assert scaling_plan.statistics_numbers(layers) == sent


def test_a_ring_moves_what_rings_move():
    device = scaling_plan.Device("d", 1.0, link=8.0, network=1.0)
    in_node = scaling_plan.one_way(80.0, 8, device) * scaling_plan.LINK_UTILISATION
    assert in_node == pytest.approx(7 / 8 * 80 / 8)
    over_four = scaling_plan.one_way(80.0, 32, device) * scaling_plan.LINK_UTILISATION
    assert over_four == pytest.approx(in_node + 3 / 4 * 10)


def test_table(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["scaling_plan", "--json", str(tmp_path / "plan.json")])
    scaling_plan.main()
    text = capsys.readouterr().out
    assert text.startswith("PREDICTED, NOT MEASURED")
    assert text.count(" 1024 ") == len(scaling_plan.PAIRS)
    for pair in scaling_plan.PAIRS:
        found = [scaling_plan.prediction(pair, gpus, 8192, 2048) for gpus in scaling_plan.GPUS]
        for kind in ("ddp", "fsdp", "vocabulary"):
            lows, highs = zip(*[p["efficiency"][kind] for p in found])
            assert list(lows) == sorted(lows, reverse=True)
            assert all(0 < low <= high <= 1 for low, high in zip(lows, highs))
