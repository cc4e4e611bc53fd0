"""fused_relation_kd and fused_attention_kd against their formulas in float64: values, gradients per
vector, every option, edges.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

from fdd_kernels.backends.torch_stream import attention_blocks, blocks
from tests.support.attention import F32, F64, KINDS, Call, assert_exact, random_call

BF16 = torch.bfloat16
WAYS = ["torch", "reference"]
NAMES = ["relation", "attention"]
MASK = torch.tensor([[1, 1, 0, 1, 1, 1, 0], [0, 1, 1, 1, 0, 0, 0]])
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 0, 1], [0, 0, 1, 2, 3, 4, 5]])
SIZES = [1, 3, 7, 8, 15, 1000]  # rows of a block: parts of a group, and whole groups of 7 rows


def upstream_of(call: Call) -> torch.Tensor | None:
    if call.options.get("reduction") != "none":
        return None
    return torch.linspace(-1, 2, 14).view(2, 7)


def views(name: str) -> list[dict]:
    """What leaves out columns, in all combinations."""
    options = [("causal", True), ("mask", MASK), ("lengths", [3, 4, 1, 1, 5])]
    options += [("exclude_self", True)] * (name == "relation")
    return [
        dict(chosen)
        for count in range(len(options) + 1)
        for chosen in itertools.combinations(options, count)
    ]


@pytest.fixture
def computed(monkeypatch) -> dict[str, list[int]]:
    """How many scores each block has, and how many gradients of scores enter GEMMs."""
    found = {"scores": [], "gradients": []}
    walk = attention_blocks.AttentionWalk
    block, add_gradients = walk.block, walk.add_gradients

    def recorded_block(*arguments):
        result = block(*arguments)
        assert result.student.shape == result.teacher.shape
        found["scores"].append(result.student.numel())
        return result

    def recorded_gradients(self, place, grad, *rest):
        found["gradients"].append(grad.numel())
        return add_gradients(self, place, grad, *rest)

    monkeypatch.setattr(walk, "block", recorded_block)
    monkeypatch.setattr(walk, "add_gradients", recorded_gradients)
    return found


class TestFormulas:
    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
    @pytest.mark.parametrize("kind", KINDS)
    def test_kinds_of_relations(self, kind, dtype, way):
        assert_exact(random_call("relation", kind=kind, dtype=dtype), way)

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("name", NAMES)
    def test_what_leaves_out_columns(self, name, way):
        for options in views(name):
            for kind in KINDS if name == "relation" else KINDS[:1]:
                more = {"kind": kind} if name == "relation" else {}
                assert_exact(random_call(name, **options, **more), way)

    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("name", NAMES)
    def test_blocks_of_every_size(self, name, size, monkeypatch):
        """Also of causal rows and of packed sequences, which compute no columns in vain."""
        monkeypatch.setattr(blocks, "block_rows", lambda *_: size)
        monkeypatch.setitem(attention_blocks.SCORES, "cpu", 0)
        for options in views(name)[:: 2 if name == "relation" else 1]:
            assert_exact(random_call(name, keys=(1, 2), **options))

    def test_causal_rows_compute_no_later_columns(self, computed, monkeypatch):
        monkeypatch.setattr(blocks, "block_rows", lambda *_: 3)
        random_call("attention", 1, 9, 1, causal=True).value()
        assert computed["scores"] == [3 * 3, 3 * 6, 3 * 9]

    @pytest.mark.parametrize(
        ("size", "options", "scores"),
        [
            # 2 heads of each sequence at a time; some rows of one head; up to themselves
            (1000, {}, [2 * 4 * 4, 2 * 5 * 5, 2 * 1, 2 * 8 * 8]),
            (4, {}, [4 * 4] * 2 + [4 * 5, 1 * 5] * 2 + [2] + [4 * 8] * 4),
            (3, {"causal": True}, [9, 4] * 2 + [9, 10] * 2 + [2] + [9, 18, 16] * 2),
        ],
        ids=["whole", "rows", "causal"],
    )
    def test_packed_rows_compute_no_other_sequences(
        self, size, options, scores, computed, monkeypatch
    ):
        """Neither their scores nor, in the gradients, products with them."""
        monkeypatch.setattr(blocks, "block_rows", lambda *_: size)
        monkeypatch.setitem(attention_blocks.SCORES, "cpu", 0)
        random_call("attention", 2, 9, 2, lengths=[4, 5, 1, 8], **options).run()
        assert computed == {"scores": scores, "gradients": scores}

    def test_short_sequences_are_computed_together(self, computed, monkeypatch):
        """Up to a least number of scores; rows of the batch that are packed alike too."""
        monkeypatch.setitem(attention_blocks.SCORES, "cpu", 2 * 4 * 4)
        call = random_call("attention", 3, 9, 2, lengths=[1, 1, 2, 5] * 2 + [3, 2, 4])
        assert_exact(call)
        computed["scores"].clear()
        call.value()
        assert computed["scores"] == [4 * 4 * 4, 4 * 5 * 5, 2 * 3 * 3, 2 * 2 * 2, 2 * 4 * 4]

    @pytest.mark.parametrize("size", SIZES + [14, 21, 28, 35])
    @pytest.mark.parametrize("lengths", [None, [3, 4, 1, 6]], ids=["one", "packed"])
    def test_blocks_of_grouped_keys(self, lengths, size, monkeypatch):
        """Some have queries of several groups of keys, some a part of those of one."""
        monkeypatch.setattr(blocks, "block_rows", lambda *_: size)
        monkeypatch.setitem(attention_blocks.SCORES, "cpu", 0)
        for keys in ((1, 2), (2, 1), (4, 2)):
            options = {"keys": keys, "causal": True, "lengths": lengths}
            assert_exact(random_call("attention", heads=4, **options))

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("keys", [(1, 1), (2, 4), (4, 1), (1, 2)])
    def test_grouped_keys(self, keys, way):
        for dtype in (F32, BF16):
            assert_exact(random_call("attention", heads=4, keys=keys, dtype=dtype, mask=MASK), way)

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("k", [1, 2, 6, 7, 100])
    def test_nearest_columns(self, k, kind, way):
        for options in ({}, {"exclude_self": True, "mask": MASK}, {"causal": True}):
            assert_exact(random_call("relation", kind=kind, k=k, **options), way)

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_reductions(self, name, reduction, way):
        call = random_call(name, mask=MASK, causal=True, reduction=reduction)
        assert_exact(call, way, upstream_of(call))

    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("items", [3, 17.5, torch.tensor(11), torch.tensor([2.5])], ids=str)
    def test_num_items(self, name, items):
        assert_exact(random_call(name, mask=MASK, num_items_in_batch=items))

    @pytest.mark.parametrize("name", NAMES)
    def test_positions_are_lengths(self, name):
        """Padded ends, whose positions do not grow, are sequences of one."""
        call = random_call(name, positions=POSITIONS)
        assert_exact(call)
        same = random_call(name, lengths=[3, 2, 2, 1, 6])
        assert torch.equal(call.value(), same.value())
        tensor = random_call(name, lengths=torch.tensor([3, 2, 2, 1, 6], dtype=torch.int32))
        assert torch.equal(call.value(), tensor.value())

    @pytest.mark.parametrize("name", NAMES)
    def test_packed_sequences_are_those_one_by_one(self, name):
        """The sum over packed sequences is that of calls of each sequence."""
        call = random_call(name, 1, 9, lengths=[4, 5], reduction="sum", dtype=F64, causal=True)
        parts = 0.0
        for span in (slice(0, 4), slice(4, 9)):
            cut = [t[:, span] if name == "relation" else t[:, :, span] for t in call.tensors]
            parts = parts + replace(call.but(lengths=None), tensors=tuple(cut)).value()
        assert abs(float((call.value() - parts).detach())) <= 2.0**-50 * float(parts.detach())

    @pytest.mark.parametrize("way", WAYS)
    def test_queries_that_are_left_out(self, way):
        """Padding on the right sees keys, and counts unless it is left out."""
        padded = torch.tensor([[1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0]])
        assert_exact(random_call("attention", mask=padded, causal=True), way)
        call = random_call("attention", mask=padded, query_mask=padded, causal=True)
        assert_exact(call, way)
        short = [t[:1, :, :4] for t in call.tensors]
        alone = Call("attention", tuple(short), {"causal": True, "reduction": "none"})
        whole = call.but(reduction="none").value()
        assert (whole[:1, :4] - alone.value()).abs().max() <= 2.0**-20

    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("scales", [(1.0, 0.5), (0.3, 2)])
    def test_scales(self, name, scales):
        assert_exact(random_call(name, student_scale=scales[0], teacher_scale=scales[1]))

    @pytest.mark.parametrize("name", NAMES)
    def test_one_tensor_on_both_sides(self, name):
        """Gets both gradients: value relations of MiniLM."""
        call = random_call(name)
        x = call.tensors[0]
        own = replace(call, tensors=(x, x, *call.tensors[2:]))
        (of_both,) = torch.autograd.grad(own.value(), [x])
        twin = x.detach().clone().requires_grad_()
        parts = replace(call, tensors=(x, twin, *call.tensors[2:])).run()[1]
        assert (of_both - sum(parts)).abs().max() <= 2.0**-22 * float(of_both.abs().max())

    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("trained", [0, 1])
    def test_only_the_gradients_that_are_needed(self, name, trained):
        call = random_call(name)
        tensors = [t if i == trained else t.detach() for i, t in enumerate(call.tensors)]
        (found,) = replace(call, tensors=tuple(tensors)).run()[1]
        assert torch.equal(found, call.run()[1][trained])

    @pytest.mark.parametrize("name", NAMES)
    def test_strided_tensors(self, name):
        call = random_call(name)
        strided = [
            t.detach().transpose(-1, -2).contiguous().transpose(-1, -2) for t in call.tensors
        ]
        strided = [s.requires_grad_(t.requires_grad) for s, t in zip(strided, call.tensors)]
        assert_exact(replace(call, tensors=tuple(strided)))

    @pytest.mark.parametrize("kind", KINDS)
    def test_the_budget_catches_scores_of_16_bits(self, kind, monkeypatch):
        """Else it would prove little."""
        scores = attention_blocks.AttentionWalk._scores
        rounded = lambda *a: scores(*a).bfloat16().float()  # noqa: E731
        monkeypatch.setattr(attention_blocks.AttentionWalk, "_scores", rounded)
        with pytest.raises(AssertionError, match="is above"):
            assert_exact(random_call("relation", kind=kind))

    @pytest.mark.parametrize("kind", KINDS)
    def test_values_where_the_models_nearly_agree(self, kind):
        call = random_call("relation", kind=kind, student_scale=0.5, teacher_scale=0.5)
        generator = torch.Generator().manual_seed(9)
        teacher = [
            t.detach() + 1e-3 * torch.randn(t.shape, generator=generator) for t in call.tensors[:2]
        ]
        call = replace(call, tensors=(*call.tensors[:2], *teacher))
        assert_exact(call)
        value, true = call.run()[0], call.truth().result
        assert 0 < value < 1e-3
        assert abs(float(value - true)) <= 0.01 * float(true)

    @pytest.mark.parametrize("name", NAMES)
    def test_reference_is_differentiable_twice(self, name):
        call = random_call(name, 1, 4, dtype=F64, causal=True)
        call = call.but(exclude_self=True, k=2) if name == "relation" else call

        def value(a, b):
            return replace(call, tensors=(a, b, *call.tensors[2:])).value("reference")

        assert torch.autograd.gradgradcheck(value, list(call.tensors[:2]))


class TestEdges:
    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    @pytest.mark.parametrize("how", ["mask", "no sequence", "no position", "one position"])
    def test_nothing_to_compare_gives_zeros(self, name, reduction, how, way):
        shape = {"no sequence": (0, 5), "no position": (2, 0), "one position": (2, 1)}
        shape = shape.get(how, (2, 5))
        options = {"mask": torch.zeros(shape)} if how == "mask" else {}
        options = {n: t.bool() for n, t in options.items()}
        call = random_call(name, *shape, reduction=reduction, **options)
        value, gradients = call.run(way)
        assert value.shape == (shape if reduction == "none" else ())
        for tensor in (value, *gradients):
            assert not tensor.any()

    @pytest.mark.trap("mask not applied")
    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("poison", [math.nan, math.inf])
    def test_positions_left_out_change_nothing(self, name, poison, way):
        """Not even by 0 * NaN."""
        options = {"mask": MASK}
        if name == "attention":
            options["query_mask"] = MASK
        call = random_call(name, **options, causal=True)
        dead = (MASK == 0)[:, :, None] if name == "relation" else (MASK == 0)[:, None, :, None]
        dirty = [
            t.detach().masked_fill(dead, poison).requires_grad_(t.requires_grad)
            for t in call.tensors
        ]
        clean, found = call.run(way), replace(call, tensors=tuple(dirty)).run(way)
        assert torch.equal(found[0], clean[0])
        for got, expected in zip(found[1], clean[1]):
            assert torch.equal(got, expected)

    @pytest.mark.parametrize("name", NAMES)
    def test_sharp_attention_has_finite_exact_gradients(self, name):
        """A column of nearly all probability in both models."""
        assert_exact(random_call(name, spread=6.0, dtype=F64))
        value, gradients = random_call(name, spread=100.0).run()
        assert all(t.isfinite().all() for t in (value, *gradients))

    @pytest.mark.parametrize("name", NAMES)
    def test_autocast_changes_nothing(self, name):
        call = random_call(name)
        with torch.autocast("cpu", BF16):
            found = call.run()
        expected = call.run()
        assert torch.equal(found[0], expected[0])
        assert all(torch.equal(a, b) for a, b in zip(found[1], expected[1]))

    @pytest.mark.parametrize("name", NAMES)
    def test_under_no_grad_and_inference_mode(self, name):
        call = random_call(name)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                found = call.value()
            assert not found.requires_grad
            assert abs(float(found - call.run()[0])) <= 1e-5
