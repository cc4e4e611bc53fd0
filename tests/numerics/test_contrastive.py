"""fused_contrastive_kd against its formulas in float64: values, gradients per row, every option,
edges.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from fdd_kernels.backends.torch_stream import blocks
from tests.support.contrastive import F32, F64, LOSSES, Call, assert_exact, random_call

BF16 = torch.bfloat16
WAYS = ["torch", "reference"]
EXCLUSIONS = [
    (loss, exclude)
    for loss in LOSSES
    for exclude in ("none", "self", "same_tag")
    if (loss, exclude) != ("supcon", "same_tag")  # refused: has no positives
]


def learned(scale: float, dtype=F32) -> torch.Tensor:
    return torch.tensor(scale, dtype=dtype, requires_grad=True)


def upstream_of(call: Call) -> torch.Tensor | None:
    if call.options.get("reduction") != "none":
        return None
    return torch.linspace(-1, 2, len(call.a))


class TestFormulas:
    @pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
    @pytest.mark.parametrize(("loss", "exclude"), EXCLUSIONS)
    def test_losses(self, loss, exclude, dtype):
        for scale in (1.0, 14.0, 100.0):
            options = {"exclude": exclude, "scale": learned(scale, F64 if dtype == F64 else F32)}
            assert_exact(random_call(loss, dtype=dtype, **options))

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("symmetric", [False, True])
    @pytest.mark.parametrize("exclude", ["none", "self"])
    def test_positives_of_the_teacher(self, exclude, symmetric, way):
        options = {"positives": "teacher", "exclude": exclude, "symmetric": symmetric}
        assert_exact(random_call("supcon", 8, scale=learned(10.0), **options), way)
        if not symmetric:
            call = random_call("supcon", 8, 5, **options | {"exclude": "none"})
            assert_exact(replace(call, teachers=((None, call.teachers[0][1]),)), way)

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("weights", [None, [1.0, 0.0, 3.0], "teachers", "rows"])
    def test_several_teachers(self, weights, way):
        """Weights of rows in one direction only."""
        generator = torch.Generator().manual_seed(0)
        drawn = torch.rand(3, 7, generator=generator)
        weights = {"teachers": drawn[:, 0], "rows": drawn}.get(str(weights), weights)
        for symmetric in [False, True][: 1 if weights is drawn else 2]:
            options = {"teacher_weights": weights, "symmetric": symmetric}
            options |= {"teacher_scale": [70.0, 60.0, 20.0], "scale": learned(30.0)}
            assert_exact(random_call("kl", 7, teachers=3, **options), way)

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("loss", LOSSES)
    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    @pytest.mark.parametrize("symmetric", [False, True])
    def test_reductions_and_masks(self, loss, reduction, symmetric, way):
        masks = torch.tensor([1, 1, 0, 1, 0, 1, 1, 1, 1]), torch.arange(9) != 5
        options = {"reduction": reduction, "symmetric": symmetric, "scale": 5.0}
        call = random_call(loss, mask=masks[0], column_mask=masks[1], **options)
        assert_exact(call, way, upstream_of(call))

    @pytest.mark.parametrize("loss", LOSSES)
    @pytest.mark.parametrize("items", [3, 17.5, torch.tensor(11), torch.tensor([2.5])], ids=str)
    def test_num_items(self, loss, items):
        assert_exact(random_call(loss, num_items_in_batch=items, symmetric=True))

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("exclude", ["none", "self", "same_tag"])
    def test_labels(self, exclude, way):
        """Partners among two views of each sample (NT-Xent excludes the row itself), prototypes."""
        partner = (torch.arange(10) + 5) % 10
        partner[3] = -100
        call = random_call("infonce", 10, labels=partner.int(), exclude=exclude, scale=2.0)
        assert_exact(call, way)
        few = random_call("infonce", 10, 4, labels=torch.arange(10) % 4, scale=3.0)
        assert_exact(few, way)

    @pytest.mark.parametrize("loss", LOSSES[1:])
    @pytest.mark.parametrize("columns", [1, 3, 40])
    def test_more_or_fewer_columns_than_rows(self, loss, columns):
        assert_exact(random_call(loss, 6, columns, scale=4.0))
        assert_exact(random_call(loss, 6, columns, scale=4.0, symmetric=True))

    @pytest.mark.parametrize("loss", LOSSES)
    def test_vectors_as_they_are_and_normalised(self, loss):
        for normalize in (False, True):
            assert_exact(random_call(loss, normalize=normalize, scale=learned(1.5)))

    @pytest.mark.parametrize("loss", LOSSES)
    @pytest.mark.parametrize("rows", [1, 3, 4])
    def test_blocks_of_every_size(self, loss, rows, monkeypatch):
        monkeypatch.setattr(blocks, "block_rows", lambda *_: rows)
        mask = torch.arange(11) % 4 != 2
        assert_exact(random_call(loss, 11, 13, mask=mask, teachers=1, scale=3.0))
        if loss == "kl":
            assert_exact(random_call(loss, 11, teachers=3, symmetric=True))

    @pytest.mark.parametrize("loss", LOSSES)
    @pytest.mark.parametrize("trained", ["a", "b"])
    def test_only_the_gradients_that_are_needed(self, loss, trained):
        call = random_call(loss)
        frozen = {n: t.detach() for n, t in (("a", call.a), ("b", call.b)) if n != trained}
        (found,) = replace(call, **frozen).run()[1]
        assert torch.equal(found, dict(zip(call.leaves, call.run()[1]))[trained])

    def test_one_tensor_on_both_sides(self):
        """Gets both gradients."""
        call = random_call("supcon", exclude="self", column_tags=None, scale=8.0)
        own = replace(call, b=call.a)
        twin = replace(call, b=call.a.detach().clone().requires_grad_())
        (of_both,) = torch.autograd.grad(own.value(), [call.a])
        of_a, of_b = twin.run()[1]
        assert (of_both - of_a - of_b).abs().max() <= 2.0**-22 * float(of_both.abs().max())

    @pytest.mark.parametrize("loss", LOSSES)
    def test_the_budget_catches_scores_of_16_bits(self, loss, monkeypatch):
        """Else it would prove little."""
        logits = blocks._logits
        monkeypatch.setattr(blocks, "_logits", lambda *a: logits(*a).bfloat16().float())
        with pytest.raises(AssertionError, match="is above"):
            assert_exact(random_call(loss, scale=14.0))

    @pytest.mark.parametrize("loss", ["kl", "margin_mse"])
    def test_values_where_the_models_nearly_agree(self, loss):
        """Not lost in rounding, as they would be in a difference of large sums."""
        call = random_call(loss, near=1e-3, scale=20.0, teacher_scale=20.0, normalize=True)
        assert_exact(call)
        value, true = call.run()[0], call.truth().result
        assert 0 < float(value) < 1e-3
        assert abs(float(value - true)) <= 0.05 * float(true)

    def test_autocast_changes_nothing(self):
        """At a scale of 100 unit vectors of 16 bits would move scores by 0.1."""
        call = random_call("infonce", scale=100.0)
        with torch.autocast("cpu", BF16):
            value, gradients = call.run()
        expected = call.run()
        assert torch.equal(value, expected[0])
        for got, gradient in zip(gradients, expected[1]):
            assert torch.equal(got, gradient)

    @pytest.mark.parametrize("loss", LOSSES)
    def test_reference_is_differentiable_twice(self, loss):
        call = random_call(loss, 4, dtype=F64, scale=3.0, symmetric=True)
        call = call.but(exclude="self") if loss == "supcon" else call

        def value(a, b):
            return replace(call, a=a, b=b).value("reference")

        assert torch.autograd.gradgradcheck(value, [call.a, call.b])


class TestEdges:
    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("loss", LOSSES)
    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    @pytest.mark.parametrize("how", ["mask", "column_mask", "empty"])
    def test_nothing_to_compare_gives_zeros(self, loss, reduction, how, way):
        rows = 0 if how == "empty" else 5
        options = {"reduction": reduction, "exclude": "self" if loss == "kl" else "none"}
        if how != "empty":
            options[how] = torch.zeros(5, dtype=torch.bool)
        call = random_call(loss, rows, 5, **options)
        calls = [call]
        if reduction != "none":
            calls.append(random_call(loss, num_items_in_batch=torch.tensor(0)))
        for one in calls:
            value, gradients = one.run(way)
            assert value.shape == ((rows,) if reduction == "none" else ())
            for tensor in (value, *gradients):
                assert not tensor.any()

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("positives", ["student", "teacher"])
    def test_a_row_without_positives_gives_zero_and_counts(self, positives, way):
        tags = torch.tensor([0, 1, 0, 2])
        options = {"row_tags": tags, "column_tags": tags, "exclude": "self"}
        call = random_call("supcon", 4, positives=positives, **options)
        per_row = call.but(reduction="none").value(way)
        assert not per_row[[1, 3]].any()
        assert per_row[[0, 2]].all()
        mean, (of_a, _) = call.run(way)
        assert (mean - per_row.detach().sum() / 4).abs() <= 2.0**-22 * mean.abs()
        assert not of_a[[1, 3]].any()

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("loss", LOSSES)
    def test_a_vector_of_zeros_has_gradient_zero(self, loss, way):
        call = random_call(loss, normalize=True)
        a = call.a.detach().clone()
        a[3] = 0
        a[4] = 1e-20 * a[4]
        value, (of_a, of_b) = replace(call, a=a.requires_grad_()).run(way)
        assert not of_a[3].any()
        assert all(t.isfinite().all() for t in (value, of_a, of_b))

    @pytest.mark.trap("mask not applied")
    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("loss", LOSSES)
    @pytest.mark.parametrize("poison", [math.nan, math.inf, 1e30])
    def test_entries_left_out_change_nothing(self, loss, poison, way):
        """Not even by 0 * NaN."""
        masks = torch.arange(9) != 4, torch.arange(9) != 6
        call = random_call(loss, mask=masks[0], column_mask=masks[1], symmetric=True)
        clean = call.run(way)

        def poisoned(x, mask):
            return x.detach().masked_fill(~mask[:, None], poison).requires_grad_(x.requires_grad)

        a, b = (poisoned(x, m) for x, m in zip((call.a, call.b), masks))
        pairs = [tuple([poisoned(t, m) for t, m in zip(pair, masks)]) for pair in call.teachers]
        value, gradients = replace(call, a=a, b=b, teachers=tuple(pairs)).run(way)
        assert torch.equal(value, clean[0])
        for got, expected in zip(gradients, clean[1]):
            assert torch.equal(got, expected)

    def test_a_label_that_is_ignored_leaves_its_row_out(self):
        labels = torch.tensor([0, -100, 2])
        call = random_call("infonce", 3, labels=labels)
        a = call.a.detach().clone()
        a[1] = torch.nan
        value, gradients = replace(call, a=a.requires_grad_()).run()
        assert torch.equal(value, call.value().detach())
        for got, expected in zip(gradients, call.run()[1]):
            assert torch.equal(got, expected)

    @pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
    def test_confident_rows_keep_their_small_losses(self, scale):
        """-log q of a column with nearly all probability comes from the other columns."""
        eye = torch.eye(4)
        call = Call(eye.clone().requires_grad_(), eye, (), {"scale": 20.0})
        expected = math.log1p(3 * math.exp(-20.0))
        assert float(call.run()[0]) == pytest.approx(expected, rel=2.0**-20)
        sharp = Call(eye.clone().requires_grad_(), eye, (), {"scale": scale})
        assert all(t.isfinite().all() for t in (sharp.value(), *sharp.run()[1]))

    @pytest.mark.parametrize("loss", LOSSES)
    def test_under_no_grad_and_inference_mode(self, loss):
        call = random_call(loss, symmetric=True)
        expected = call.value().detach()
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                found = call.value()
            assert not found.requires_grad
            assert torch.equal(found, expected) or abs(float(found - expected)) <= 1e-5
