"""Objectives of the logits where one token has nearly all probability, or both models nearly agree.

The truth has 60 digits (mpmath), gradients by central differences. The head is the identity, so
that logits are the hidden states, without error. Budgets per element: a log-probability is off by
delta = u (4 max|z| + V + 24), u the unit roundoff: a quotient, an exponential's argument, a sum of
V exponentials and a dozen operations. Of a token of more than half of all probability it is the sum
over the others that is off, and delta is relative.
"""

from __future__ import annotations

import itertools

import mpmath
import pytest
import torch

from fdd_kernels import fused_decoupled_kd, fused_topk_kd, row_statistics, selected_logprobs
from fdd_kernels.testing import unit_roundoff

V, LABEL, DIGITS = 6, 2, 60
PRECISIONS = [torch.float32, torch.float64]
# What the student's logits are above the teacher's, and how far the label is above the others.
DISTANCES = {"equal": 0.0, "nearer": 2.0**-18, "near": 1e-3, "far": 2.0}
GAPS = [0.0, 6.0, 27.6, 60.0]
TEMPERATURES = [0.5, 1.0, 4.0, 8.0]
CASES = list(itertools.product(DISTANCES, GAPS, TEMPERATURES))


@pytest.fixture(autouse=True)
def _digits():
    with mpmath.workdps(DIGITS):
        yield


def logits(distance: str, gap: float, temperature: float, dtype: torch.dtype):
    """Student and teacher, (V,) each, with the label `gap` above others of differing size."""
    generator = torch.Generator().manual_seed(int(gap * 10) + int(temperature))
    base, away = torch.randn((2, V), generator=generator, dtype=torch.float64)
    base[LABEL] += gap
    both = base + DISTANCES[distance] * away, base
    return [(temperature * z).to(dtype) for z in both]


def exact(u: torch.Tensor, temperature: float) -> list:
    return [mpmath.mpf(x) / temperature for x in u.tolist()]


def log_softmax(z: list) -> list:
    lse = mpmath.log(sum(mpmath.exp(x) for x in z))
    return [x - lse for x in z]


def kl(log_p: list, log_q: list):
    return sum(mpmath.exp(a) * (a - b) for a, b in zip(log_p, log_q))


def divergence(name: str, log_p: list, log_q: list):
    if name == "kl":
        return kl(log_p, log_q)
    if name == "reverse_kl":
        return kl(log_q, log_p)
    beta = mpmath.mpf(float(name.partition(":")[2]))
    mixed = [
        mpmath.log(beta * mpmath.exp(a) + (1 - beta) * mpmath.exp(b)) for a, b in zip(log_p, log_q)
    ]
    return beta * kl(log_p, mixed) + (1 - beta) * kl(log_q, mixed)


def gradient(value, z: list, temperature: float) -> list:
    """Central differences by the logits before the temperature."""
    step, found = mpmath.mpf(10) ** -22, []
    for i in range(len(z)):
        ahead, behind = ([x + s * (j == i) for j, x in enumerate(z)] for s in (step, -step))
        found.append((value(ahead) - value(behind)) / (2 * step * temperature))
    return found


class Bounds:
    """What rounding moves a divergence of two distributions over classes by."""

    def __init__(self, log_p: list, log_q: list, delta: float):
        self.delta, self.p, self.q = (
            delta,
            *([mpmath.exp(x) for x in log] for log in (log_p, log_q)),
        )
        self.x = [abs(a - b) for a, b in zip(log_p, log_q)]
        # of a likely token relative to its log-probability
        self.off = [delta * min(1, max(abs(a), abs(b))) for a, b in zip(log_p, log_q)]

    def value(self, true) -> float:
        of_classes = zip(self.p, self.q, self.x, self.off)
        return 2 * sum((p + q) * (x + o) * o for p, q, x, o in of_classes) + self.delta * abs(true)

    def gradients(self, true) -> list:
        """Per class; of the likeliest one, that of all others."""
        found = [(p + q) * (1 + x + abs(true)) for p, q, x in zip(self.p, self.q, self.x)]
        for likely in (self.p, self.q):
            top = max(range(len(likely)), key=likely.__getitem__)
            if likely[top] > 0.5:
                found[top] = sum(b for i, b in enumerate(found) if i != top)
        return [self.delta * f for f in found]


def delta_of(dtype: torch.dtype, *z: list) -> float:
    return unit_roundoff(dtype) * (4 * max(abs(float(x)) for v in z for x in v) + V + 24)


def check(got, true, bound, name: str) -> None:
    """Every element is within its bound, and the error of central differences."""
    bound = [b + mpmath.mpf(10) ** -36 for b in bound]
    for i, (g, t, b) in enumerate(zip(got.reshape(-1).tolist(), true, bound)):
        assert abs(g - t) <= b, f"{name}[{i}]: {g} differs from {float(t)} by more than {float(b)}"


def head(dtype: torch.dtype) -> torch.Tensor:
    return torch.eye(V, dtype=dtype)


@pytest.mark.trap("1 - p_y of a confident teacher")
@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize(("distance", "gap", "temperature"), CASES)
def test_decoupled_kd(distance, gap, temperature, dtype):
    u_s, u_t = logits(distance, gap, temperature, dtype)
    label = torch.tensor([LABEL])

    def parts(z):
        log = log_softmax(z)
        others = [x for i, x in enumerate(z) if i != LABEL]
        rest = mpmath.log(sum(mpmath.exp(x) for i, x in enumerate(log) if i != LABEL))
        return [log[LABEL], rest], log_softmax(others)

    z_s, z_t = exact(u_s, temperature), exact(u_t, temperature)
    (two_t, rest_t), (two_s, rest_s) = parts(z_t), parts(z_s)
    delta = delta_of(dtype, z_s, z_t)

    def value(z):
        two, rest = parts(z)
        return kl(two_t, two) + 8 * kl(rest_t, rest)

    of_two, of_rest = Bounds(two_t, two_s, delta), Bounds(rest_t, rest_s, delta)
    hidden = u_s[None].requires_grad_()
    for backend in ("torch", "reference"):
        loss = fused_decoupled_kd(
            hidden,
            head(dtype),
            u_t[None],
            head(dtype),
            label,
            temperature=temperature,
            backend=backend,
        )
        (grad,) = torch.autograd.grad(loss, hidden)
        if backend == "reference" and distance != "far":
            continue  # differences of log-probabilities as they are
        values = kl(two_t, two_s), 8 * kl(rest_t, rest_s)
        bound = of_two.value(values[0]) + 8 * of_rest.value(values[1])
        check(loss, [value(z_s)], [bound], "loss")
        if backend == "torch":
            label_bound = of_two.gradients(values[0])[0]
            bounds = iter(of_rest.gradients(values[1] / 8))
            share = iter([mpmath.exp(x) for x in rest_s])
            bounds = [
                label_bound if i == LABEL else label_bound * next(share) + 8 * next(bounds)
                for i in range(V)
            ]
            bounds = [b / temperature for b in bounds]
            check(grad, gradient(value, z_s, temperature), bounds, "gradient")


@pytest.mark.trap("1 - sum of the top k")
@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("name", ["kl", "reverse_kl", "jsd:0.3"])
@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
@pytest.mark.parametrize(("distance", "gap", "temperature"), CASES[::5])
def test_top_k(distance, gap, temperature, name, tail, dtype):
    if gap > 30:
        gap = 27.6  # of probabilities of 1e-26 the teacher's tail has nothing left
    u_s, u_t = logits(distance, gap, temperature, dtype)
    z_s, z_t = exact(u_s, temperature), exact(u_t, temperature)
    ids = [4, LABEL, 0]
    logprobs = torch.tensor([float(log_softmax(z_t)[i]) for i in ids], dtype=dtype)
    given = [mpmath.mpf(x) for x in logprobs.tolist()]

    def classes(z):
        log = log_softmax(z)
        chosen = [log[i] for i in ids]
        if tail == "renormalize":
            return log_softmax(chosen)
        rest = sum(mpmath.exp(x) for i, x in enumerate(log) if i not in ids)
        return [*chosen, mpmath.log(rest)]

    log_p = given
    if tail == "bucket":
        log_p = [*given, mpmath.log(1 - sum(mpmath.exp(x) for x in given))]
    else:
        log_p = log_softmax(given)
    delta = delta_of(dtype, z_s, z_t)
    # The teacher's tail is what is left of its likeliest token, after the others.
    left = 1 - max(mpmath.exp(x) for x in log_p)
    delta *= 1 + float(left / mpmath.exp(log_p[-1]))

    def value(z):
        return divergence(name, log_p, classes(z))

    hidden = u_s[None].requires_grad_()
    loss = fused_topk_kd(
        hidden,
        head(dtype),
        torch.tensor([ids]),
        logprobs[None],
        tail=tail,
        divergence=name,
        temperature=temperature,
        backend="torch",
    )
    (grad,) = torch.autograd.grad(loss, hidden)
    true, log_q = value(z_s), classes(z_s)
    bounds = Bounds(log_p, log_q, delta)
    check(loss, [true], [bounds.value(true)], "loss")
    of_classes = bounds.gradients(true)
    log_all = log_softmax(z_s)
    of_tokens = []
    for i in range(V):
        if i in ids:
            of_tokens.append(of_classes[ids.index(i)])
        elif tail == "bucket":
            of_tokens.append(of_classes[-1] * mpmath.exp(log_all[i] - log_q[-1]))
        else:
            of_tokens.append(0)
    of_tokens = [b / temperature for b in of_tokens]
    check(grad, gradient(value, z_s, temperature), of_tokens, "gradient")


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize(("distance", "gap", "temperature"), CASES[:16])
def test_selected_logprobs(distance, gap, temperature, dtype):
    u, _ = logits(distance, gap, temperature, dtype)
    z = exact(u, temperature)
    delta, log_q = delta_of(dtype, z), log_softmax(z)
    hidden = u[None].requires_grad_()
    for token in range(V):
        ids = torch.tensor([token])
        found = selected_logprobs(
            hidden, head(dtype), ids, temperature=temperature, backend="torch"
        )
        (grad,) = torch.autograd.grad(found, hidden)
        check(found, [log_q[token]], [delta * min(1, abs(log_q[token]))], "value")
        q = [mpmath.exp(x) for x in log_q]
        true = [((i == token) - q[i]) / temperature for i in range(V)]
        check(grad, true, [delta * abs(t) for t in true], "gradient")


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize(("distance", "gap", "temperature"), CASES)
def test_row_statistics(distance, gap, temperature, dtype):
    u_s, u_t = logits(distance, gap, temperature, dtype)
    arguments = u_s[None], head(dtype), u_t[None], head(dtype), torch.tensor([LABEL])
    found = row_statistics(*arguments, temperature=temperature, backend="torch")
    z_s, z_t = exact(u_s, temperature), exact(u_t, temperature)
    log_q, log_p = log_softmax(z_s), log_softmax(z_t)
    delta = delta_of(dtype, z_s, z_t)
    for lse, z, log in ((found.lse_s, z_s, log_q), (found.lse_t, z_t, log_p)):
        check(lse, [z[0] - log[0]], [delta * (1 + abs(z[0] - log[0]))], "lse")
    for entropy, log in ((found.entropy_s, log_q), (found.entropy_t, log_p)):
        parts = [mpmath.exp(x) * min(1, abs(x)) * (1 + abs(x)) for x in log]
        check(entropy, [-sum(mpmath.exp(x) * x for x in log)], [2 * delta * sum(parts)], "entropy")
    check(found.kl, [kl(log_p, log_q)], [Bounds(log_p, log_q, delta).value(kl(log_p, log_q))], "kl")
    label = log_q[LABEL]
    check(found.label_logprob, [label], [delta * min(1, abs(label))], "label_logprob")
    assert bool(found.correct) == (max(z_s) == z_s[LABEL])
    assert bool(found.agree) == (z_s.index(max(z_s)) == z_t.index(max(z_t)))
