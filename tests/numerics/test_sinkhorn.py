"""fused_sinkhorn_kd against its formula in float64, with autograd through all iterations."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fdd_kernels import fused_sinkhorn_kd
from fdd_kernels.backends.torch_stream.pair_costs import GROUP_BYTES
from fdd_kernels.objectives.logits import sinkhorn
from fdd_kernels.testing import Problem, random_problem, unit_roundoff
from fdd_kernels.testing.dense_call import gemm_rounding, summation_rounding
from tests.support.allocations import allocated_peak
from tests.support.logit_objectives import norms

F32, F64 = torch.float32, torch.float64
IDS = torch.tensor([[3, 3, 1, 1, 1], [7, 3, 3, 1, 7]])


def arguments(p: Problem, **options):
    return {
        "student_hidden": p.student_hidden[0],
        "student_weight": p.student_weight,
        "teacher_hidden": p.teacher_hidden[0],
        "teacher_weight": p.teacher_weight,
        "student_bias": p.student_bias,
        "teacher_bias": p.teacher_bias,
        "labels": p.labels,
        "mask": p.mask,
        **options,
    }


def oracle(
    p: Problem,
    groups="all",
    temperature=2.0,
    epsilon=0.1,
    iterations=20,
    move=None,
    gaps=None,
    **caps,
):
    """One number per group, in the order of ids, of a problem in float64; and h W^T + b of both.

    Into `gaps` go the relative differences |q - p| / q of the probabilities that are compared.
    """
    leading = p.leading_shape
    valid = torch.ones(leading, dtype=torch.bool) if p.mask is None else p.mask
    valid = valid if p.labels is None else valid & (p.labels >= 0)
    if isinstance(groups, str):
        sequences = torch.arange(leading[0])[:, None].expand(leading)
        groups = torch.zeros_like(sequences) if groups == "all" else sequences
    logits, z = [], []
    for side in ("student", "teacher"):
        h, w, b = (getattr(p, f"{side}_{n}") for n in ("hidden", "weight", "bias"))
        u = h[0] @ w.T + (0.0 if b is None else b)
        logits.append(u)
        u = u if move is None else u + move(side, u.detach())
        cap = caps.get(f"{side}_softcap")
        z.append((u if cap is None else cap * torch.tanh(u / cap)) / temperature)
    values = []
    for group in groups.unique():
        q, t = (x.softmax(-1)[valid & (groups == group)] for x in z)
        if gaps is not None:
            live = (q > 0).any(0) | (t > 0).any(0)
            gaps.append(((q[:, None] - t).abs() / q[:, None])[..., live].detach())
        W = torch.cdist(q, t, p=1.0)
        W = W if move is None else W + move("costs", W.detach())
        X = -W / epsilon
        for _ in range(iterations):
            X = X - X.logsumexp(1, keepdim=True)
            X = X - X.logsumexp(0, keepdim=True)
        values.append((X.exp() * W).sum())
    return torch.stack(values), logits


def logit_rounding(p: Problem, side: str, x: torch.Tensor, unit: float) -> torch.Tensor:
    """How far off logits x may be: a GEMM, three roundings, and their log-sum-exp."""
    h, w, b = (getattr(p, f"{side}_{n}") for n in ("hidden", "weight", "bias"))
    flat = h[0].detach().reshape(-1, h[0].shape[-1])
    off = gemm_rounding(flat, w.detach(), None if b is None else b.detach(), unit)
    of_sum = summation_rounding(len(p.student_weight), unit)
    return off.view(x.shape) + 3 * unit * x.abs().where(x.isfinite(), 0.0) + of_sum


def moves(p: Problem, unit: float, seed: int):
    """Random movements as large as roundings: of GEMMs, of W as a sum over the vocabulary."""
    generator = torch.Generator().manual_seed(seed)

    def move(what, x):
        random = 2 * torch.rand(x.shape, generator=generator, dtype=F64) - 1
        if what == "costs":
            return (summation_rounding(len(p.student_weight), unit) * x + 4 * unit) * random
        return logit_rounding(p, what, x, unit) * random

    return move


def assert_away_from_ties(p: Problem, unit: float, **options) -> None:
    """No difference of probabilities may change its sign by rounding, or the gradient jumps.

    A probability is off by at most twice its logit's error, relatively; both sides are.
    """
    gaps = []
    _, logits = oracle(p, gaps=gaps, **options)
    least = min(float(g.min()) for g in gaps if g.numel())
    off = sum(
        float(logit_rounding(p, side, u.detach(), unit).max())
        for side, u in zip(("student", "teacher"), logits)
    )
    most = 2 * off / options.get("temperature", 2.0)
    assert least > most, f"choose another seed: a gap of {least:.1e}, roundings of {most:.1e}"


def check(p: Problem, backend="torch", **options):
    """Values, and gradients per row, are within what movements by roundings of logits and of W
    change in float64, and the roundings of the sums that gradients are made of.
    """
    leaves = list(p.leaves.values())
    value = fused_sinkhorn_kd(**arguments(p, **options), backend=backend)
    gradients = torch.autograd.grad(value.sum(), leaves)
    options.pop("reduction", None)
    low, wide = p.student_weight.dtype, p.to(F64)
    unit = 2 * unit_roundoff(F64) if low == F64 else unit_roundoff(F32)
    assert value.dtype == (F64 if low == F64 else F32)
    assert_away_from_ties(wide, unit, **options)

    def exact(move=None):
        values, logits = oracle(wide, move=move, **options)
        tensors = [*wide.leaves.values(), logits[0]]
        return [values.detach(), *torch.autograd.grad(values.sum(), tensors)]

    true, *of_true, of_logits = exact()
    moved = [exact(moves(wide, unit, seed))[:-1] for seed in range(8)]
    columns, rows = len(p.student_weight), math.prod(p.leading_shape)
    relative = unit * (math.sqrt(columns) + math.sqrt(rows) + 12)

    def most(i, size):
        found = torch.stack([size(m[i] - ([true, *of_true])[i]) for m in moved]).amax(0)
        return found.clamp(min=float(found.mean()))

    error = (value.detach().reshape(-1) - true).abs()
    assert (error <= relative * true.abs() + 2 * most(0, torch.abs)).all()
    grad, h = of_logits.reshape(rows, -1).abs(), wide.student_hidden[0].detach()
    magnitudes = {
        "student_hidden[0]": (grad @ wide.student_weight.detach().abs())
        .norm(dim=-1)
        .view(p.leading_shape),
        "student_weight": (grad.T @ h.reshape(rows, -1).abs()).norm(dim=-1),
        "student_bias": grad.sum(0),
    }
    for i, (name, got, exact_one) in enumerate(zip(p.leaves, gradients, of_true), 1):
        leaf = p.leaves[name]
        assert got.dtype == leaf.dtype
        own = (unit_roundoff(leaf.dtype) + relative) * norms(exact_one)
        floor = own + 2 * most(i, norms) + relative * magnitudes[name]
        floor = floor + math.sqrt(leaf.shape[-1]) * torch.finfo(leaf.dtype).tiny
        assert (norms(got.double() - exact_one) <= floor).all(), name


class TestFormula:
    @pytest.mark.parametrize("dtype", [F32, F64, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("bias", [None, "plain", "padded"])
    @pytest.mark.parametrize("groups", ["all", "sequence", IDS], ids=["all", "sequence", "ids"])
    def test_groups(self, groups, bias, dtype):
        p = random_problem(layers=1, dtype=dtype, bias=bias)
        check(p, groups=groups, reduction="none")

    @pytest.mark.parametrize("way", ["torch", "reference"])
    @pytest.mark.parametrize("epsilon", [0.02, 1.0])
    @pytest.mark.parametrize("iterations", [1, 3, 20])
    def test_iterations(self, epsilon, iterations, way):
        p = random_problem(layers=1, dtype=F64)
        options = {"epsilon": epsilon, "iterations": iterations, "temperature": 1.0}
        check(p, way, reduction="sum", **options)

    @pytest.mark.parametrize("way", ["torch", "reference"])
    def test_masks_labels_and_soft_caps(self, way):
        p = random_problem(layers=1, mask=True, labels=True, bias="plain")
        caps = {"student_softcap": 3.0, "teacher_softcap": 2.0}
        check(p, way, groups="sequence", reduction="none", **caps)

    @pytest.mark.parametrize("columns", [1, 3, 36, 37])
    def test_tiles_of_every_size(self, columns, monkeypatch):
        monkeypatch.setitem(GROUP_BYTES, "cpu", 8 * 10 * 6 * columns)
        check(random_problem(layers=1, dtype=F64, bias="padded"), student_softcap=4.0)

    def test_the_gradient_goes_through_the_iterations(self):
        """It is not that of a constant P."""
        p = random_problem(layers=1, dtype=F64)
        (found,) = torch.autograd.grad(fused_sinkhorn_kd(**arguments(p)), p.student_hidden[0])
        z_s, z_t = (
            h[0] @ w.T / 2
            for h, w in (
                (p.student_hidden, p.student_weight),
                (p.teacher_hidden, p.teacher_weight),
            )
        )
        W = torch.cdist(z_s.softmax(-1).view(10, -1), z_t.softmax(-1).view(10, -1), p=1.0)
        X = -W.detach() / 0.1
        for _ in range(20):
            X = X - X.logsumexp(1, keepdim=True)
            X = X - X.logsumexp(0, keepdim=True)
        (envelope,) = torch.autograd.grad((X.exp() * W).sum(), p.student_hidden[0])
        assert (found - envelope).norm() >= 0.05 * found.norm()

    def test_reductions(self):
        p = random_problem((3, 4), layers=1, mask=True, dtype=F64)
        mask = p.mask.clone()
        mask[1] = False
        call = {**arguments(p), "groups": "sequence", "mask": mask}
        each = fused_sinkhorn_kd(**call, reduction="none").detach()
        assert each[1] == 0
        for options, expected in (
            ({}, each.sum() / 2),
            ({"reduction": "sum"}, each.sum()),
            ({"num_items_in_batch": 8}, each.sum() / 8),
        ):
            torch.testing.assert_close(fused_sinkhorn_kd(**call, **options).detach(), expected)


class TestEdges:
    @pytest.mark.parametrize("way", ["torch", "reference"])
    @pytest.mark.parametrize("leading", [(2, 5), (0, 5)])
    def test_no_valid_row(self, leading, way):
        p = random_problem(leading, layers=1, mask=True)
        mask = torch.zeros_like(p.mask)
        value = fused_sinkhorn_kd(**{**arguments(p), "mask": mask}, backend=way)
        assert value == 0
        for gradient in torch.autograd.grad(value, list(p.leaves.values())):
            assert not gradient.any()

    def test_one_row_is_its_distance(self):
        p = random_problem((1,), layers=1, dtype=F64)
        q, t = (
            (h[0] @ w.T / 2).softmax(-1)
            for h, w in (
                (p.student_hidden, p.student_weight),
                (p.teacher_hidden, p.teacher_weight),
            )
        )
        value = fused_sinkhorn_kd(**arguments(p))
        torch.testing.assert_close(value.detach(), (q - t).abs().sum().detach())

    @pytest.mark.parametrize("way", ["torch", "reference"])
    def test_equal_models_have_finite_gradients(self, way):
        """Distances of 0 on the diagonal, whose gradient is 0."""
        p = random_problem(layers=1, near=0.0, teacher_width=8)
        value = fused_sinkhorn_kd(**arguments(p, epsilon=0.01), backend=way)
        for gradient in torch.autograd.grad(value, list(p.leaves.values())):
            assert gradient.isfinite().all()

    @pytest.mark.parametrize("poison", [math.nan, math.inf])
    def test_rows_left_out_change_nothing(self, poison):
        p = random_problem((12,), layers=1, mask=True)
        leaves = list(p.leaves.values())
        clean = fused_sinkhorn_kd(**arguments(p))
        hidden = p.student_hidden[0].detach().masked_fill(~p.mask[:, None], poison)
        dirty = replace(p, student_hidden=(hidden.requires_grad_(),))
        value = fused_sinkhorn_kd(**arguments(dirty))
        assert torch.equal(value, clean)
        for a, b in zip(
            torch.autograd.grad(value, list(dirty.leaves.values())),
            torch.autograd.grad(clean, leaves),
        ):
            assert torch.equal(a, b)

    def test_the_reference_can_be_differentiated_twice(self):
        p = random_problem((3,), 5, layers=1, dtype=F64)

        def value(hidden):
            call = {**arguments(p), "student_hidden": hidden, "iterations": 2}
            return fused_sinkhorn_kd(**call, backend="reference")

        assert torch.autograd.gradgradcheck(value, p.student_hidden[0])
        grads = torch.autograd.grad(
            fused_sinkhorn_kd(**arguments(p)), p.student_hidden[0], create_graph=True
        )
        with pytest.raises(RuntimeError, match="differentiated once"):
            torch.autograd.grad(grads[0].square().sum(), p.student_hidden[0])

    def test_compiled_code_is_left_to_eager_mode(self):
        torch._dynamo.reset()
        p = random_problem(layers=1)

        def step(hidden):
            return fused_sinkhorn_kd(**{**arguments(p), "student_hidden": 2 * hidden})

        found = torch.compile(step, backend="aot_eager")(p.student_hidden[0])
        assert torch.equal(found, step(p.student_hidden[0]))
        torch._dynamo.reset()
        with pytest.raises(RuntimeError, match=r"fused_sinkhorn_kd is not a graph.*fullgraph"):
            torch.compile(step, backend="aot_eager", fullgraph=True)(p.student_hidden[0])


def test_memory_does_not_grow_with_the_vocabulary(monkeypatch):
    """But for the head and its gradient."""
    monkeypatch.setitem(GROUP_BYTES, "cpu", 2**20)
    rows, columns = 256, 16384
    p = random_problem((rows,), columns, 2, 2, layers=1)

    def run():
        value = fused_sinkhorn_kd(**arguments(p, iterations=2))
        return torch.autograd.grad(value, list(p.leaves.values()))

    peak = allocated_peak(run)
    of_head, of_groups = 4 * 2 * columns * 4, 4 * rows * rows * (4 * 2 + 6)
    assert peak <= 2**20 + of_head + of_groups + 2**18
    assert 2**20 + of_head + of_groups + 2**18 < 4 * rows * columns  # one (R, V) tensor


@given(
    rows=st.integers(1, 6),
    columns=st.integers(2, 30),
    seed=st.integers(0, 2**16),
    epsilon=st.sampled_from([0.01, 0.1, 1.0]),
)
def test_it_is_a_cost_of_a_transport(rows, columns, seed, epsilon):
    """Columns of P sum to 1: between the sums of the least and of the largest cost per column.

    Rounded, a cost is off by u of a sum over the vocabulary, and a column of P by u of its logits,
    which are at most 2 / epsilon in each of the last two steps, and of its sum.
    """
    p = random_problem((rows,), columns, layers=1, seed=seed, dtype=F64)
    value = float(fused_sinkhorn_kd(**arguments(p, epsilon=epsilon)).detach())
    q, t = (
        (h[0] @ w.T / 2).softmax(-1).detach()
        for h, w in ((p.student_hidden, p.student_weight), (p.teacher_hidden, p.teacher_weight))
    )
    W = torch.cdist(q, t, p=1.0)
    slack = unit_roundoff(F64) * (columns + rows + 4 / epsilon + 16)
    assert float(W.amin(0).sum()) * (1 - slack) <= value <= float(W.amax(0).sum()) * (1 + slack)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"epsilon": 0}, ValueError, "^epsilon=0 must be finite and greater"),
        ({"iterations": 0}, ValueError, "^iterations=0 must be at least 1"),
        ({"iterations": 2.0}, TypeError, "^iterations must be an int"),
        ({"groups": "batch"}, ValueError, "^groups='batch' is not 'all' or 'sequence'"),
        ({"groups": torch.zeros(3, dtype=torch.int64)}, ValueError, r"^groups has shape \(3,\)"),
        ({"groups": torch.zeros(2, 5)}, TypeError, "^groups has dtype"),
        ({"temperature": "std"}, TypeError, "^temperature must be a number"),
        ({"teacher_weight": torch.ones(30, 12)}, ValueError, "^student_weight has 37 rows and tea"),
        ({"backend": "cpu"}, ValueError, '^backend="cpu" does not compute this objective'),
        ({"shift": True}, ValueError, "^shift=True shifts the labels"),
    ],
)
def test_errors(changes, error, message, monkeypatch):
    def fail(*_):
        raise AssertionError("work was done before the arguments were checked")

    monkeypatch.setattr(sinkhorn, "_costs", fail)
    with pytest.raises(error, match=message):
        fused_sinkhorn_kd(**{**arguments(random_problem(layers=1)), **changes})
