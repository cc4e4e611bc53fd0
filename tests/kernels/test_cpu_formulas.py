"""Test what the C++ kernels compute of a row's logits against float64: every divergence of the
registry, weighted moments, mixtures of the models, with every instruction set.

Heads are identities, so that every logit is an element of a hidden state, exact in float32, and
every element of dL/dlogits one of a hidden state's gradient.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fdd_kernels.backends import cpu
from fdd_kernels.backends.cpu import extension, tiling
from fdd_kernels.lens.divergence_text import parse_divergence
from fdd_kernels.lens.divergences import DIVERGENCES
from fdd_kernels.lens.inputs import LensInputs
from fdd_kernels.lens.layout import (
    COUNT,
    GRAD_SUM,
    LSE_S,
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
    Statistics,
)
from fdd_kernels.lens.spec import Layers, LensSpec, PairMoments, Request, of_pair
from fdd_kernels.testing.dense_call import summation_rounding
from fdd_kernels.testing.value_floors import movement

if extension.kernels is None:
    pytest.skip(f"no C++ kernels: {extension.why_missing}", allow_module_level=True)

INSTRUCTION_SETS = "avx512", "avx2", "generic"
UNIT = 2.0**-24
COLUMNS = 2 * tiling.TILE_COLUMNS + 44
ROWS = 12
SUMMATION = summation_rounding(COLUMNS, UNIT)


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_every_instruction_set_of_this_processor(name):
    if name == extension.kernels.instruction_set():
        pytest.skip("all other tests of this file use it")
    tests = [__file__, "-q", "-p", "no:cacheprovider", "-k", "not instruction_set"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *tests],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"FDD_KERNELS_ISA": name},
        capture_output=True,
        text=True,
        timeout=600,
    )
    if "this processor lacks it" in run.stdout + run.stderr:
        pytest.skip(f"this processor lacks {name}")
    assert run.returncode == 0, run.stdout[-3000:]
    assert " passed" in run.stdout


def models(u_s: Tensor, u_t: Tensor, bias_s: Tensor, bias_t: Tensor) -> LensInputs:
    """Make the models whose logits (L, ROWS, COLUMNS) these are."""
    return LensInputs(
        list(u_s.unbind()), torch.eye(COLUMNS), bias_s, list(u_t.unbind()), None, bias_t, None, None
    )


def excluding(places: list[int]) -> Tensor:
    """Make a bias that is -inf there and 0 elsewhere."""
    bias = torch.zeros(COLUMNS)
    bias[places] = -torch.inf
    return bias


def computed(
    way: str, inputs: LensInputs, spec: LensSpec, upstream: tuple[Tensor, Tensor]
) -> tuple[Statistics, Tensor]:
    """Compute float64 copies of statistics and of dL/dlogits (L, ROWS, COLUMNS)."""
    layers = len(inputs.student_hidden)
    needed = [True] * layers + [False, False]
    if way == "cached":
        gradients, statistics = cpu.stats_and_grad(
            inputs,
            spec,
            8,
            lambda rows, *own: (*own, *[u[..., rows] for u in upstream]),
            needed,
            True,
        )
    else:
        statistics = cpu.stats(inputs, spec)
        gradients = cpu.grad(inputs, spec, (*statistics, *upstream), needed)
    return Statistics(*[s.double() for s in statistics]), torch.stack(gradients).double()


WAYS = pytest.mark.parametrize("way", ["cached", "streamed"])


def spec_of(requests: list[Request], moments: tuple[PairMoments, ...] = ()) -> LensSpec:
    return LensSpec(COLUMNS, tuple(requests), moments, 1.0, None, 1.0, None)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_within(error: Tensor, bound: Tensor, what: str) -> None:
    fraction = (error / bound).nan_to_num(torch.inf).where(error != 0, 0.0)
    assert (fraction <= 1).all(), f"{what}: {float(fraction.max()):.2f} times the bound"


def moved(value: Callable[..., Tensor], vectors: tuple[Tensor, ...], off: list[Tensor]) -> Tensor:
    """Measure how far errors `off` (ROWS,) of its arguments move value(*vectors), in the 1-norm."""
    exact, most = value(*vectors), torch.zeros(ROWS, dtype=torch.float64)
    for seed in range(3):
        moves = [o[:, None] * drawn(10 * seed + i, *exact.shape) for i, o in enumerate(off)]
        changed = value(*[v + move for v, move in zip(vectors, moves)])
        most = torch.maximum(most, (changed - exact).abs().sum(-1))
    return most


FORMS = {
    "jsd": ["jsd", "jsd:0.01", "jsd:0.999"],
    "skew_kl": ["skew_kl", "skew_kl:1e-10", "skew_kl:0.99"],
    "skew_reverse_kl": ["skew_reverse_kl", "skew_reverse_kl:1e-10", "skew_reverse_kl:0.99"],
    "alpha_beta": [
        "alpha_beta",
        *[f"alpha_beta:{p}" for p in ("0,2", "2,0", "1e-3,0.5", "0.5,1e-30", "1,1", "3,2")],
    ],
}
# Both models' spread, and how far they are apart.
SHARPNESS = [(1.0, 1e-4), (3.0, 1e-2), (3.0, 1.0), (20.0, 20.0), (50.0, 50.0)]
EVERY_FORM = [form for name in DIVERGENCES for form in FORMS.get(name, [name])]


@WAYS
@pytest.mark.parametrize(("spread", "apart"), SHARPNESS)
@pytest.mark.parametrize("form", EVERY_FORM)
def test_every_divergence_at_every_sharpness(way, form, spread, apart):
    """Both models exclude some tokens, and one a few that the other has where that is legal."""
    u_t = spread * drawn(0, 1, ROWS, COLUMNS)
    u_s = u_t + apart * drawn(1, 1, ROWS, COLUMNS)
    bias = excluding([0, 5, tiling.TILE_COLUMNS, COLUMNS - 1])
    named = parse_divergence(form)
    entry = DIVERGENCES[named.name]
    spec = spec_of([Request(0, 0, 1.0, *named)])
    upstream = torch.zeros(1, REQUEST_STATS, ROWS), torch.zeros(0, MOMENT_STATS, ROWS)
    upstream[0][:, VALUE] = 1
    (_, (found,), _), (gradient,) = computed(way, models(u_s, u_t, bias, bias), spec, upstream)
    z_s, z_t = (u[0].double() + bias for u in (u_s, u_t))
    log_q, log_p = z_s.log_softmax(-1), z_t.log_softmax(-1)
    live = bias == 0
    off = [UNIT * (x[:, live].abs().amax(-1) + 1) for x in (log_q, log_p)]
    vectors = log_q[:, live], log_p[:, live]

    def value(a: Tensor, b: Tensor) -> Tensor:
        return entry.value(a, b, *named.parameters).sum(-1)

    def grad(a: Tensor, b: Tensor) -> Tensor:
        of_log_q = entry.grad(a, b, *named.parameters)
        return of_log_q - a.exp() * of_log_q.sum(-1, keepdim=True)

    exact = value(*vectors)
    bound = sum(movement(value, vectors, off, SUMMATION)) + SUMMATION * exact
    assert_within((found[VALUE] - exact).abs(), bound, "value")
    exact, parts = grad(*vectors), entry.grad(*vectors, *named.parameters)
    size = parts.abs().sum(-1) + parts.sum(-1).abs()
    if named.name == "skew_reverse_kl":  # the difference of two terms that are so much larger
        size = size / (1 - named.parameters[0])
    error = (gradient[:, live] - exact).abs().sum(-1)
    assert_within(error, 2 * moved(grad, vectors, off) + SUMMATION * size, "gradient")
    assert gradient[:, ~live].eq(0).all()


RESTS = (0.5, 1e-1, 1e-2, 1e-4, 1e-7, 1e-10, 1e-12)  # 1 - the largest weight
MOMENTS = (MEAN_S, MEAN_T, M_SS, M_TT, M_ST, M_DD, TOP_S, TOP_T)


def exact_moments(s: Tensor, t: Tensor, z: Tensor) -> tuple[dict[int, Tensor], tuple[Tensor, ...]]:
    """Compute the moments (ROWS,) with the weights softmax(z), the weights, and s and t about their
    means (ROWS, tokens).

    All about the likeliest token: even float64 would lose its distance from a mean.
    """
    w, top = z.softmax(-1), z.argmax(-1, keepdim=True)
    moments, about = {COUNT: z.logsumexp(-1)}, []
    for x, mean, of_top in ((s, MEAN_S, TOP_S), (t, MEAN_T, TOP_T)):
        x, at_top = x - x.gather(-1, top), x.gather(-1, top)
        offset = (w * x).sum(-1, keepdim=True)
        moments |= {mean: (at_top + offset)[:, 0], of_top: -offset[:, 0]}
        about.append(x - offset)
    s, t = about
    parts = {M_SS: s * s, M_TT: t * t, M_ST: s * t, M_DD: (s - t).square()}
    return moments | {i: (w * part).sum(-1) for i, part in parts.items()}, (w, s, t)


@WAYS
@pytest.mark.parametrize("apart", [1.0, 1e-3])
@pytest.mark.parametrize("place", [3, tiling.TILE_COLUMNS + 60, COLUMNS - 2])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_weighted_moments_at_every_sharpness(way, apart, place, temperature):
    """The likeliest token of each row is in the first, a middle or the last tile; tokens with all
    the teacher's probability are left out.
    """
    rows = len(RESTS)
    bias_s, bias_t = excluding([7, 150]), excluding([11, COLUMNS - 1])
    live = (bias_s == 0) & (bias_t == 0)
    u_t = 3 * drawn(2, 2, rows, COLUMNS) + 20
    z = (u_t[1].double() / temperature).masked_fill(~live, -torch.inf)
    z[:, place] = -torch.inf
    rest = torch.tensor(RESTS, dtype=torch.float64)
    u_t[1, :, place] = temperature * (z.logsumexp(-1) + ((1 - rest) / rest).log())
    u_s = u_t + apart * drawn(3, 2, rows, COLUMNS)
    u_t[:, :, ~live] += 90 * temperature  # largest, but for the bias
    first, last = Layers(0, 0), Layers(1, 1)
    pairs = (
        PairMoments(first, last, temperature, True),
        PairMoments(None, last, 2 * temperature, True),
        PairMoments(first, last, 0.7),
    )
    spec = spec_of([Request(0, 0, 1.0, "kl")], pairs)
    upstream = torch.zeros(1, REQUEST_STATS, rows), torch.zeros(len(pairs), MOMENT_STATS, rows)
    of_ss, of_st, of_dd = upstream[1][0, [M_SS, M_ST, M_DD]] = drawn(4, 3, rows)
    inputs = models(u_s, u_t, bias_s, bias_t)
    statistics, gradient = computed(way, inputs, spec, upstream)
    assert statistics.moments[2, TOP_S:].eq(0).all()
    assert statistics.moments[2, COUNT].eq(int(live.sum())).all()
    u_s, u_t = u_s.double()[:, :, live], u_t.double()[:, :, live]
    for pair, found in zip(pairs[:2], statistics.moments):
        s, t = (u[1] - (0 if pair.first is None else u[0]) for u in (u_s, u_t))
        s, t, z = (x / pair.temperature for x in (s, t, u_t[1]))
        exact, (w, about_s, about_t) = exact_moments(s, t, z)
        shifts = statistics.shifts / pair.temperature
        found[MEAN_S : MEAN_T + 1] += of_pair(shifts, pair)
        found[COUNT] += shifts[1, 1]
        top = z.argmax(-1, keepdim=True)
        # Weights have a relative error: of e^x, and of z, rounded relative to the largest.
        off_w = UNIT * (4 + 2 * (z.amax(-1, keepdim=True) - z))
        # Vectors have an absolute one: u is rounded relative to the shift, and 1 / temperature. The
        # sums are about the likeliest token: sum of w x y, less the product of sum of w x and sum
        # of w y.
        from_top, off, of_w_x, off_of_w_x = {}, {}, {}, {}
        for i, x, u, shift in zip("st", (s, t), (u_s, u_t), statistics.shifts):
            size = (u - shift[..., None]).abs().amax(-1, keepdim=True).sum(0) / pair.temperature
            from_top[i], off[i] = x - x.gather(-1, top), UNIT * (size + x.abs())
        from_top["d"], off["d"] = from_top["s"] - from_top["t"], off["s"] + off["t"]
        for i, x in from_top.items():
            of_w_x[i] = (w * x).sum(-1).abs()
            moved_x = (w * (off_w * x.abs() + off[i])).scatter(-1, top, 0.0).sum(-1)
            off_of_w_x[i] = moved_x + SUMMATION * (w * x.abs()).sum(-1)
        off_of_w_x["d"] = off_of_w_x["s"] + off_of_w_x["t"]
        bounds = {TOP_S: off_of_w_x["s"], TOP_T: off_of_w_x["t"]}
        for i, of_top in (("s", MEAN_S), ("t", MEAN_T)):
            bounds[of_top] = off_of_w_x[i] + off[i].amax(-1)
        for index, (i, j) in {M_SS: "ss", M_TT: "tt", M_ST: "st", M_DD: "dd"}.items():
            x, y = from_top[i].abs(), from_top[j].abs()
            parts = off_w * x * y + off[i] * y + off[j] * x + off[i] * off[j]
            bounds[index] = (
                (w * parts).scatter(-1, top, 0.0).sum(-1)
                + SUMMATION * (w * x * y).sum(-1)
                + off_of_w_x[i] * of_w_x[j]
                + off_of_w_x[j] * of_w_x[i]
            )
        at_shift = (z - shifts[1, 1][:, None]).abs()
        off_count = UNIT * (2 * at_shift.gather(-1, top)[:, 0] + found[COUNT].abs())
        bounds[COUNT] = off_count + SUMMATION
        for index, bound in bounds.items():
            assert_within((found[index] - exact[index]).abs(), bound, f"statistic {index}")
        if pair is not pairs[0]:
            continue
        is_top = torch.zeros_like(w).scatter(-1, top, 1.0) > 0
        off_about = {
            i: torch.where(is_top & (w > 0.5), off_of_w_x[i][:, None], off[i] + of_mean[:, None])
            for i, of_mean in (("s", bounds[MEAN_S]), ("t", bounds[MEAN_T]))
        }
        off_w = UNIT * (4 + 2 * at_shift) + off_count[:, None] + SUMMATION
        terms = [
            (2 * of_ss, about_s, off_about["s"]),
            (of_st, about_t, off_about["t"]),
            (2 * of_dd, about_s - about_t, off_about["s"] + off_about["t"]),
        ]
        expected = w * sum([up[:, None] * x for up, x, _ in terms]) / temperature
        bound = w * sum([up.abs()[:, None] * (off_w * x.abs() + e) for up, x, e in terms])
        bound = bound / temperature + 2.0**-120
        for layer, sign in ((1, 1), (0, -1)):
            error = (gradient[layer][:, live] - sign * expected).abs()
            assert_within(error, bound, f"gradient of layer {layer}")
    assert gradient[:, :, ~live].eq(0).all()


@WAYS
def test_two_tokens_with_half_the_weight_each(way):
    """TOP is of one of them alone, whichever way rounding moves both weights."""
    rows = 200
    u_t = drawn(5, 1, rows, COLUMNS) - 60
    u_s = drawn(6, 1, rows, COLUMNS)
    u_t[0, :, [4, 190]] = drawn(7, rows, 1).abs()  # also relative to a shift that is far from it
    u_t[0, :, 250] = 9 * drawn(8, rows).abs()
    bias = excluding([250])
    pair = PairMoments(None, Layers(0, 0), 1.0, True)
    spec = spec_of([Request(0, 0, 1.0, "kl")], (pair,))
    upstream = torch.zeros(1, REQUEST_STATS, rows), torch.zeros(1, MOMENT_STATS, rows)
    upstream[1][:, M_SS] = 1
    inputs = models(u_s, u_t, bias, torch.zeros(COLUMNS))
    _, gradient = computed(way, inputs, spec, upstream)
    half = (u_s[0, :, 4] - u_s[0, :, 190]).double() / 2  # s - mean, and w is 1/2
    for token, expected in ((4, half), (190, -half)):
        bound = UNIT * 4 * (64 + u_s[0].abs().amax(-1))
        assert_within((gradient[0][:, token] - expected).abs(), bound, f"token {token}")


@WAYS
def test_no_token_is_left(way):
    everywhere = excluding(list(range(COLUMNS)))
    pair = PairMoments(Layers(0, 0), Layers(1, 1), weighted=True)
    moments = (pair, pair._replace(weighted=False))
    upstream = torch.zeros(0, REQUEST_STATS, ROWS), torch.ones(2, MOMENT_STATS, ROWS)
    inputs = models(
        drawn(1, 2, ROWS, COLUMNS), drawn(2, 2, ROWS, COLUMNS), everywhere, torch.zeros(COLUMNS)
    )
    statistics, gradient = computed(way, inputs, spec_of([], moments), upstream)
    assert statistics.moments[0, COUNT].eq(-torch.inf).all()
    assert statistics.moments[1, COUNT].eq(0).all()
    assert statistics.moments[:, COUNT + 1 :].eq(0).all()
    assert gradient.eq(0).all()


@WAYS
@pytest.mark.parametrize("kind", ["near", "plain", "sharp", "far"])
@pytest.mark.parametrize("mix", [0.0, 0.4, 0.9])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_mixtures_in_the_teachers_place(way, kind, mix, temperature):
    """Also where the largest logits of the two models are 200 apart, each model excludes tokens of
    its own, and another request of the same layers has the teacher itself.
    """
    spread, apart = {"near": (3, 1e-4), "sharp": (15, 15)}.get(kind, (2, 2))
    u_s = spread * drawn(0, ROWS, COLUMNS)
    u_t = u_s + apart * drawn(1, ROWS, COLUMNS)
    if kind == "far":
        u_s[:, 3] += 200
        u_t[:, COLUMNS - 20] += 200
    bias_s, bias_t = excluding([0, 150]), excluding([11, COLUMNS - 1])
    requests = [
        Request(0, 0, temperature, "kl", teacher_mix=mix),
        Request(0, 0, 1.0, "kl"),
        Request(0, 0, temperature, None, teacher_mix=mix),
    ]
    upstream = torch.zeros(3, REQUEST_STATS, ROWS), torch.zeros(0, MOMENT_STATS, ROWS)
    upstream[0][0, VALUE] = 1
    inputs = models(u_s[None], u_t[None], bias_s, bias_t)
    (shifts, found, _), (gradient,) = computed(way, inputs, spec_of(requests), upstream)
    plain, _ = computed(way, inputs, spec_of(requests[1:2]), (upstream[0][1:2], upstream[1]))
    assert torch.equal(plain.shifts, shifts)
    assert torch.equal(plain.requests[0], found[1])
    assert torch.equal(found[2, [LSE_S, LSE_T]], found[0, [LSE_S, LSE_T]])
    assert found[0, GRAD_SUM].eq(-1).all()
    z_s, z_t = (
        (u.double() - shift[0][:, None] + bias) / temperature
        for u, shift, bias in zip((u_s, u_t), shifts, (bias_s, bias_t))
    )
    z = torch.where(z_t == -torch.inf, z_t, (1 - mix) * z_s + mix * z_t)
    log_q, log_p = z_s.log_softmax(-1), z.log_softmax(-1)
    live = z > -torch.inf
    # each rounding of the two parts and of their sum
    off = 3 * ((1 - mix) * z_s.abs() + mix * z_t.abs()).where(live, 0.0) + z.abs().where(live, 0.0)
    top = z.argmax(-1, keepdim=True)
    lse = z.logsumexp(-1)
    off_lse = UNIT * (off.gather(-1, top)[:, 0] + lse.abs()) + SUMMATION
    assert_within((found[0, LSE_T] - lse).abs(), off_lse, "log-sum-exp of the mixture")
    p, q = log_p.exp(), log_q.exp()
    off_p = p * (UNIT * (4 + off + lse.abs()[:, None]) + off_lse[:, None])
    of_z_s = z_s.abs().where(z_s > -torch.inf, 0.0)
    off_q = q * (UNIT * (4 + 2 * of_z_s + found[0, LSE_S].abs()[:, None]) + SUMMATION)
    error = (gradient - (q - p) / temperature).abs()
    assert_within(error, (off_p + off_q) / temperature + 2.0**-120, "gradient")
    # The value's errors: p (e^x - 1 - x) by x, and relative ones of its sums.
    x = (log_q - log_p).where(live, 0.0)
    part = torch.where(live, p * (x.expm1() - x), q)
    off_x = UNIT * (off + 3 * of_z_s)
    of_parts = torch.where(live, p * (x.expm1().abs() * off_x + off_x.square()), off_q)
    bound = of_parts.sum(-1) + SUMMATION * part.sum(-1) + 2.0**-120
    assert_within((found[0, VALUE] - part.sum(-1)).abs(), bound, "value")
