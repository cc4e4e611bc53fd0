"""Weighted pair moments and mixed teachers of the Triton backend against their formulas in float64;
run by tests/kernels/test_triton_interpreter.py with TRITON_INTERPRET=1.

The models are made of one-hot hidden states: every logit is an element of a head, exact in float32,
and every element of dL/dlogits is an element of the head's gradient.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fdd_kernels.backends import BACKENDS
from fdd_kernels.backends.triton import config, strategy
from fdd_kernels.lens.inputs import LensInputs
from fdd_kernels.lens.layout import (
    COUNT,
    LSE_T,
    M_DD,
    M_SS,
    M_ST,
    M_TT,
    MEAN_S,
    MEAN_T,
    MOMENT_STATS,
    REQUEST_STATS,
    TOP_S,
    TOP_T,
    VALUE,
)
from fdd_kernels.lens.spec import Layers, LensSpec, PairMoments, Request, of_pair

TILE = config.INTERPRETED_ROW_LAUNCH.block
COLUMNS = 2 * TILE + 7
LAYERS = 2
TEMPERATURE = 1.5
RESTS = (0.5, 1e-2, 1e-4, 1e-7, 1e-12)  # 1 - the largest weight, one a row
ROWS = len(RESTS)
# z, s and t are at most 64. A shift, a scale, and the mean or the log-sum-exp that is subtracted
# round them: a relative error of the weights, an absolute one of s and t.
ROUNDING = 4 * 64 * 2.0**-24


@pytest.fixture(params=strategy.STRATEGIES[1:])
def named(request, monkeypatch):
    """Each strategy, with slabs of one tile."""
    monkeypatch.setattr(strategy, "SLAB_TOKENS", TILE)
    monkeypatch.setenv(strategy.STRATEGY, request.param)
    return request.param


def logits(seed: int) -> Tensor:
    """Draw logits (LAYERS, ROWS, COLUMNS) with a common part, far from 0."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(LAYERS, ROWS, COLUMNS, generator=generator, dtype=torch.float64) + 30.0


def sharpened(u_t: Tensor, live: Tensor) -> Tensor:
    """Raise a token of each row until it has the weight 1 - RESTS at TEMPERATURE."""
    u_t = u_t.clone()
    for row, rest in enumerate(RESTS):
        z = torch.where(live, u_t[-1, row] / TEMPERATURE, -torch.inf)
        token = live.nonzero()[37 * row + 3]
        z[token] = -torch.inf
        u_t[-1, row, token] = (z.logsumexp(0) + math.log((1 - rest) / rest)) * TEMPERATURE
    return u_t


def problem(u_s: Tensor, u_t: Tensor, live: Tensor) -> LensInputs:
    """Make the models whose logits are these; the tokens that are not `live` have biases of -inf,
    in turn in one model and the other.
    """
    hidden = list(torch.eye(LAYERS * ROWS).view(LAYERS, ROWS, -1).unbind())
    heads = [u.flatten(0, 1).t().float().contiguous() for u in (u_s, u_t)]
    biases = [None, None]
    if not live.all():
        places = torch.arange(COLUMNS)
        for i in (0, 1):
            biases[i] = torch.where(live | (places % 2 == i), 0.0, -torch.inf)
    return LensInputs(hidden, heads[0], biases[0], hidden, heads[1], biases[1], None, None)


def exact(s: Tensor, t: Tensor, z: Tensor) -> tuple[dict[int, tuple[Tensor, Tensor]], tuple]:
    """Compute the moments, each with the size of its terms; the weights, s and t about their means,
    and where the likeliest tokens are, (ROWS, COLUMNS) each.

    All about the likeliest token: even float64 would lose the difference from a mean.
    """
    w, at_top = z.softmax(-1), z.argmax(-1, keepdim=True)
    from_s, from_t = s - s.gather(-1, at_top), t - t.gather(-1, at_top)
    offset_s, offset_t = ((w * x).sum(-1, keepdim=True) for x in (from_s, from_t))
    about_s, about_t = from_s - offset_s, from_t - offset_t
    terms = {TOP_S: -from_s, TOP_T: -from_t, M_SS: about_s.square(), M_TT: about_t.square()}
    terms |= {M_ST: about_s * about_t, M_DD: (about_s - about_t).square()}
    moments = {i: ((w * x).sum(-1), (w * x.abs()).sum(-1)) for i, x in terms.items()}
    for i, x, offset in ((MEAN_S, s, offset_s), (MEAN_T, t, offset_t)):
        moments[i] = (x.gather(-1, at_top) + offset)[:, 0], torch.ones(ROWS)
    moments[COUNT] = z.logsumexp(-1), torch.ones(ROWS)
    is_top = torch.zeros_like(w).scatter(-1, at_top, 1.0)
    return moments, (w, about_s, about_t, is_top)


def found_by(name: str, inputs: LensInputs, spec: LensSpec, upstream: tuple[Tensor, Tensor]):
    """Compute statistics, and the gradient of the student's head as dL/dlogits."""
    needed = [False] * LAYERS + [True, False]
    backend = BACKENDS["triton"]
    if name == "cached":
        (gradient,), statistics = backend.stats_and_grad(
            inputs,
            spec,
            2,
            lambda rows, *own: (*own, *[u[..., rows] for u in upstream]),
            needed,
            True,
        )
    else:
        statistics = backend.stats(inputs, spec)
        (gradient,) = backend.grad(inputs, spec, (*statistics, *upstream), needed)
    return statistics, gradient.double().t().reshape(LAYERS, ROWS, COLUMNS)


KL = (Request(0, 0, 1.0, "kl"),)


@pytest.mark.parametrize(
    ("requests", "excluded"),
    [
        (KL, True),
        pytest.param((), True, marks=pytest.mark.slow),
        pytest.param(KL, False, marks=pytest.mark.slow),
        pytest.param((), False, marks=pytest.mark.slow),
    ],
    ids=["excluded", "excluded, alone", "all tokens", "all tokens, alone"],
)
def test_weighted_moments_are_right_at_every_sharpness(named, requests, excluded):
    """Also beside a pair without weights, and with the likeliest tokens of all excluded."""
    live = torch.ones(COLUMNS, dtype=torch.bool)
    u_s, u_t = logits(0), logits(1)
    if excluded:
        live[TILE - 9 : TILE + 5] = False
        live[::11] = False
        u_t[:, :, ~live] += 90.0  # the weights underflow unless their maximum is their own
    pairs = [PairMoments(None, Layers(1, 1)), PairMoments(Layers(0, 0), Layers(1, 1))]
    moments = (
        *[pair._replace(temperature=TEMPERATURE, weighted=True) for pair in pairs],
        pairs[1]._replace(temperature=0.7),
    )
    spec = LensSpec(COLUMNS, tuple(requests), moments, 1.0, None, 1.0, None)
    u_t = sharpened(u_t, live)
    inputs = problem(u_s, u_t, live)
    u_s, u_t = u_s.float().double(), u_t.float().double()
    upstream_R = {M_SS: 0.3, M_ST: -0.7, M_DD: 0.2}
    upstream = (
        torch.zeros(len(requests), REQUEST_STATS, ROWS),
        torch.zeros(len(moments), MOMENT_STATS, ROWS),
    )
    for index, value in upstream_R.items():
        upstream[1][:2, index] = value
    statistics, gradient = found_by(named, inputs, spec, upstream)
    exact_gradient = torch.zeros(LAYERS, ROWS, COLUMNS, dtype=torch.float64)
    scale = torch.zeros_like(exact_gradient) + 2.0**-100
    for pair, found in zip(moments, statistics[2].double()):
        if not pair.weighted:
            assert found[TOP_S : TOP_T + 1].eq(0).all()
            assert (found[COUNT] == live.sum()).all()
            continue
        first = 0.0 if pair.first is None else 1.0
        s, t = ((u[1] - first * u[0])[:, live] / TEMPERATURE for u in (u_s, u_t))
        expected, (w, about_s, about_t, is_top) = exact(s, t, u_t[1][:, live] / TEMPERATURE)
        found[MEAN_S : MEAN_T + 1] += of_pair(statistics[0].double(), pair) / TEMPERATURE
        found[COUNT] += statistics[0][1, 1].double() / TEMPERATURE
        for index, (value, size) in expected.items():
            error = (found[index] - value).abs()
            assert (error <= ROUNDING * size).all(), (index, error / size / ROUNDING)
        parts = 2 * upstream_R[M_SS] * about_s, upstream_R[M_ST] * about_t
        parts = [*parts, 2 * upstream_R[M_DD] * (about_s - about_t)]
        # s and t themselves are rounded; of the likeliest token it is TOP that is
        sizes = [part.abs() + 1.0 - is_top for part in parts]
        for gradients, terms in ((exact_gradient, parts), (scale, sizes)):
            of_vector = w * sum(terms) / TEMPERATURE
            gradients[1][:, live] += of_vector
            if pair.first is not None:
                gradients[0][:, live] += of_vector if gradients is scale else -of_vector
    error = (gradient - exact_gradient).abs()
    assert (error <= ROUNDING * scale).all(), error / scale / ROUNDING
    assert gradient[..., ~live].eq(0).all()


def test_no_token_is_left(named):
    """The log of the sum of no weights, and 0 for all else; no gradient."""
    nowhere = torch.zeros(COLUMNS, dtype=torch.bool)
    pair = PairMoments(Layers(0, 0), Layers(1, 1), weighted=True)
    spec = LensSpec(COLUMNS, (), (pair,), 1.0, None, 1.0, None)
    inputs = problem(logits(0), logits(1), nowhere)
    upstream = torch.zeros(0, REQUEST_STATS, ROWS), torch.ones(1, MOMENT_STATS, ROWS)
    statistics, gradient = found_by(named, inputs, spec, upstream)
    assert statistics[2][0, COUNT].eq(-torch.inf).all()
    assert statistics[2][0, COUNT + 1 :].eq(0).all()
    assert gradient.eq(0).all()


@pytest.mark.parametrize("mix", [0.0, 0.3, pytest.param(0.9, marks=pytest.mark.slow)])
def test_teacher_mixed_with_the_student(named, mix):
    """Where both models' likeliest tokens are impossible in the mixture: its logits lie so far
    below both shifts that e^z is 0 in float32. Beside a request of the teacher itself.
    """
    u_s, u_t, places = logits(0), logits(1), torch.arange(COLUMNS)
    live = places % 9 != 0
    u_s[..., 18] += 300.0
    u_t[..., 27] += 300.0
    requests = (
        Request(1, 1, TEMPERATURE, "kl", (), mix),
        Request(0, 0, TEMPERATURE, "kl", (), mix),
        Request(1, 1, TEMPERATURE, None),
    )
    spec = LensSpec(COLUMNS, requests, (), 1.0, None, 1.0, None)
    inputs = problem(u_s, u_t, live)
    biases = [0.0 if bias is None else bias.double() for bias in (inputs[2], inputs[5])]
    u_s, u_t = u_s.float().double() + biases[0], u_t.float().double() + biases[1]
    upstream = (
        torch.zeros(len(requests), REQUEST_STATS, ROWS),
        torch.zeros(0, MOMENT_STATS, ROWS),
    )
    upstream[0][:2, VALUE] = torch.tensor([1.0, -2.0])[:, None]
    statistics, gradient = found_by(named, inputs, spec, upstream)
    shifts = statistics[0].double()
    rounding = 8 * 256 * 2.0**-24  # z up to 256, rounded as above, twice
    exact_gradient = torch.zeros(LAYERS, ROWS, COLUMNS, dtype=torch.float64)
    scale = torch.zeros_like(exact_gradient) + 2.0**-100
    for request, found, of_value in zip(requests, statistics[1].double(), upstream[0][:, VALUE]):
        layer, share = request.student_layer, request.teacher_mix
        z_s, z_t = u_s[layer] / TEMPERATURE, u_t[layer] / TEMPERATURE
        if share < 1:
            mixed = share * z_t + (1 - share) * z_s
            z_t = torch.where(z_s.isinf() | z_t.isinf(), -torch.inf, mixed)
        log_q, log_p = z_s.log_softmax(-1), z_t.log_softmax(-1)
        p, q = log_p.exp(), log_q.exp()
        value = torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(-1)
        shift = share * shifts[1, layer] + (1 - share) * shifts[0, layer]
        assert (found[LSE_T] + shift / TEMPERATURE - z_t.logsumexp(-1)).abs().max() <= rounding
        if request.divergence == "kl":
            assert (found[VALUE] - value).abs().max() <= rounding * (1 + value.max())
            of_z = of_value[:, None].double() / TEMPERATURE
            exact_gradient[layer] += of_z * (q - p)
            scale[layer] += of_z.abs() * (q + p)
    assert ((gradient - exact_gradient).abs() <= rounding * scale).all()
