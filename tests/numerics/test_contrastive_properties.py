"""Properties of fused_contrastive_kd for any input, under transforms of torch, and its memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from fdd_kernels import fused_contrastive_kd
from fdd_kernels.backends.torch_stream import blocks
from fdd_kernels.lens.row_blocks import MATRICES
from fdd_kernels.testing import unit_roundoff
from tests.support.allocations import allocated_peak
from tests.support.contrastive import F32, F64, LOSSES, Call, random_call


@st.composite
def small_calls(draw, losses=tuple(LOSSES), **fixed):
    loss = draw(st.sampled_from(losses))
    excludes = ["none", "self"] + ["same_tag"] * (loss != "supcon")
    return random_call(
        loss,
        draw(st.integers(2, 12)),
        width=draw(st.integers(1, 9)),
        seed=draw(st.integers(0, 2**16)),
        scale=draw(st.sampled_from([0.5, 1.0, 14.0, 100.0])),
        exclude=draw(st.sampled_from(excludes)),
        dtype=F64,
        **fixed,
    )


def close(a: torch.Tensor, b: torch.Tensor, scale: float) -> None:
    """Equal up to roundings of scores of the given scale and sums over at most 12 columns."""
    most = max(1.0, scale, float(b.detach().abs().max()) if b.numel() else 0.0)
    assert (a - b).abs().max() <= 2.0**-53 * 400 * most


class TestProperties:
    @given(call=small_calls())
    def test_not_negative(self, call):
        """But SupCon with a teacher's positives."""
        assert call.but(reduction="none").value().min() >= -(2.0**-53) * 400

    @given(call=small_calls(("kl", "margin_mse")))
    def test_zero_where_the_models_are_equal(self, call):
        twin = replace(call, teachers=((call.a.detach(), call.b.detach()),))
        value, gradients = twin.run()
        assert not value.any()
        for gradient in gradients:
            assert not gradient.any() or gradient.abs().max() <= 1e-13 * call.options["scale"]

    @given(call=small_calls(reduction="none"), order=st.randoms(use_true_random=False))
    def test_the_order_of_entries_does_not_matter(self, call, order):
        """Rows move with their pairs, or columns alone where nothing pairs them with rows."""
        scale, rows = call.options["scale"], list(range(len(call.a)))
        order.shuffle(rows)
        tags = {n: call.options[n][rows] for n in ("row_tags", "column_tags") if n in call.options}
        pairs = tuple([tuple([t[rows] for t in pair]) for pair in call.teachers])
        moved = replace(call.but(**tags), a=call.a[rows], b=call.b[rows], teachers=pairs)
        close(moved.value(), call.value()[rows], scale)
        if call.loss != "infonce" and call.options["exclude"] != "self":
            tags.pop("row_tags", None)
            pairs = tuple([(a, b[rows]) for a, b in call.teachers])
            close(
                replace(call.but(**tags), b=call.b[rows], teachers=pairs).value(),
                call.value(),
                scale,
            )

    @given(call=small_calls(), reduction=st.sampled_from(["mean", "sum", "none"]))
    def test_symmetric_is_the_mean_of_both_directions(self, call, reduction):
        call = call.but(reduction=reduction)
        swapped = {"row_tags": "column_tags", "column_tags": "row_tags"}
        options = {swapped.get(n, n): v for n, v in call.options.items()}
        pairs = tuple([(b, a) for a, b in call.teachers])
        other = Call(call.b, call.a, pairs, options)
        upstream = torch.ones_like(call.value())
        both, one, two = call.but(symmetric=True), call, other
        results = [c.run(upstream=upstream) for c in (both, one, two)]
        close(results[0][0], (results[1][0] + results[2][0]) / 2, call.options["scale"])
        gradients = zip(results[0][1], results[1][1], reversed(results[2][1]))
        for of_both, of_one, of_two in gradients:
            close(of_both, (of_one + of_two) / 2, 100 * call.options["scale"])

    @given(call=small_calls(("infonce", "supcon", "kl")), factor=st.sampled_from([0.25, 8.0]))
    def test_lengths_of_vectors_do_not_matter(self, call, factor):
        longer = replace(call, a=call.a * factor, b=call.b / factor)
        close(longer.value(), call.value(), call.options["scale"])

    @given(call=small_calls(("kl",)))
    def test_several_equal_teachers_are_one(self, call):
        several = replace(call, teachers=call.teachers * 3)
        close(several.value(), call.value(), call.options["scale"])


@pytest.fixture
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class TestTransforms:
    @pytest.mark.usefixtures("_fresh_dynamo")
    @pytest.mark.parametrize("reduction", ["mean", "none"])
    @pytest.mark.parametrize("loss", LOSSES)
    def test_compiled_training_step(self, loss, reduction):
        """Whole: a graph break is an error. The result is the eager one."""
        scale = torch.tensor(7.0, requires_grad=True)
        call = random_call(loss, reduction=reduction, mask=torch.arange(9) != 3)
        arguments = call.arguments() | {"symmetric": True}
        leaves = [call.a, call.b, scale]

        def step(a, b, scale):
            changed = {"student_a": 2 * a, "student_b": b, "scale": scale}
            return (3 * fused_contrastive_kd(**(arguments | changed))).sum()

        outcomes = []
        for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
            value = function(*leaves)
            outcomes.append([value, *torch.autograd.grad(value, leaves)])
        for eager, compiled in zip(*outcomes):
            atol = 1e-6 * float(eager.detach().abs().max())
            torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=atol)

    @pytest.mark.parametrize("loss", LOSSES)
    def test_repeated_and_second_backward(self, loss):
        call = random_call(loss, symmetric=True)
        value, leaves = call.value(), [call.a, call.b]
        first = torch.autograd.grad(value, leaves, retain_graph=True)
        second = torch.autograd.grad(3 * value, leaves)
        for a, b in zip(first, second):
            assert (3 * a - b).abs().max() <= 32 * unit_roundoff(F32) * float(b.abs().max())
        found = torch.autograd.grad(call.value(), leaves, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiated once"):
            torch.autograd.grad(sum(g.square().sum() for g in found), leaves)

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_checkpointing(self, reentrant):
        call = random_call("kl", scale=9.0)

        def function(a, b):
            return replace(call, a=a, b=b).value()

        checkpoint(function, call.a, call.b, use_reentrant=reentrant).backward()
        for leaf, gradient in zip((call.a, call.b), call.run()[1]):
            assert torch.equal(leaf.grad, gradient)

    def test_a_transform_of_torch_is_refused(self):
        call = random_call("infonce")
        with pytest.raises(RuntimeError, match=r"student_a is under a transform of torch\.func"):
            torch.func.grad(lambda a: replace(call, a=a).value())(call.a.detach())


class TestMemory:
    ROWS, COLUMNS, WIDTH = 2048, 3072, 4
    MATRIX = 4 * ROWS * COLUMNS  # bytes of one (N, C) tensor: 24 MiB

    @pytest.mark.parametrize("reduction", ["mean", "none"])
    @pytest.mark.parametrize("loss", [*LOSSES, "teachers", "positives"])
    def test_no_tensor_of_rows_by_columns(self, loss, reduction, monkeypatch):
        """One block within its bytes, and vectors; not even a mask of one byte a score."""
        budget = 2**19
        monkeypatch.setitem(blocks.BLOCK_BYTES, "cpu", budget)
        more = {"teachers": {"teachers": 3}, "positives": {"positives": "teacher"}}.get(loss, {})
        name = {"teachers": "kl", "positives": "supcon"}.get(loss, loss)
        exclude = "self" if name == "supcon" else "same_tag"
        options = {"width": self.WIDTH, "exclude": exclude, "reduction": reduction} | more
        call = random_call(name, self.ROWS, self.COLUMNS, scale=torch.tensor(3.0), **options)
        upstream = torch.ones(self.ROWS) if reduction == "none" else None
        peak = allocated_peak(lambda: call.run(upstream=upstream))
        # Per entry: the student's vectors normalised, scaled and joined, with as many gradients and
        # one in sums; a teacher's normalised, scaled and joined; numbers.
        widths = 8 * self.WIDTH + 3 * sum(b.shape[1] for _, b in call.teachers)
        others = (self.ROWS + self.COLUMNS) * (4 * widths + 64)
        assert peak <= budget + others, f"{peak / 2**20:.2f} MiB"
        assert budget + others < self.MATRIX / 8

    @pytest.mark.parametrize("loss", [*LOSSES, "teachers", "positives"])
    def test_the_matrices_that_a_row_function_holds(self, loss):
        """At most `MATRICES` of a block's size."""
        rows, columns = 64, 16384
        more = {"teachers": {"teachers": 3}, "positives": {"positives": "teacher"}}.get(loss, {})
        name = {"teachers": "kl", "positives": "supcon"}.get(loss, loss)
        exclude = "self" if name == "supcon" else "same_tag"
        call = random_call(name, rows, columns, width=1, exclude=exclude, **more)
        peak = allocated_peak(call.run)
        matrix = 4 * rows * columns * (1 + (loss == "positives"))
        assert peak <= (MATRICES + blocks._OWN_MATRICES) * matrix, peak / matrix
