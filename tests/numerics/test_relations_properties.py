"""Properties of rows of attention that are compared, under transforms of torch, memory, errors."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from fdd_kernels import fused_attention_kd, fused_relation_kd
from fdd_kernels.backends.torch_stream import attention_blocks, blocks
from fdd_kernels.lens.row_blocks import MATRICES
from fdd_kernels.objectives.relations import api
from fdd_kernels.testing import unit_roundoff
from tests.support.allocations import allocated_peak
from tests.support.attention import F32, F64, KINDS, Call, random_call

NAMES = ["relation", "attention"]
U = 2.0**-53


@st.composite
def small_calls(draw, name=None, **fixed):
    name = name or draw(st.sampled_from(NAMES))
    sequences, length = draw(st.integers(1, 3)), draw(st.integers(1, 8))
    options = {"causal": draw(st.booleans())}
    if draw(st.booleans()):
        numbers = draw(st.lists(st.booleans(), min_size=length, max_size=length))
        options["mask"] = torch.tensor([numbers] * sequences)
    if name == "relation":
        options["kind"] = draw(st.sampled_from(KINDS))
        options["exclude_self"] = draw(st.booleans())
        options["k"] = draw(st.sampled_from([None, 1, 3]))
    return random_call(
        name,
        sequences,
        length,
        draw(st.sampled_from([1, 2, 3])),
        width=draw(st.integers(1, 5)),
        spread=draw(st.sampled_from([0.1, 1.0, 4.0])),
        seed=draw(st.integers(0, 2**16)),
        dtype=F64,
        **options | fixed,
    )


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    """Equal up to roundings of scores of up to 4^2 sqrt(5) and more, over at most 8 columns."""
    most = max(1.0, float(b.detach().abs().max()) if b.numel() else 0.0)
    assert not a.numel() or (a - b).detach().abs().max() <= U * 4000 * most


class TestProperties:
    @given(call=small_calls())
    def test_not_negative(self, call):
        assert call.but(reduction="none").value().min() >= -U * 400

    @given(call=small_calls())
    def test_zero_where_the_models_are_equal(self, call):
        student = [t.detach() for t in call.tensors[:2]]
        value, gradients = replace(call, tensors=(*call.tensors[:2], *student)).run()
        assert not value.any()
        for gradient in gradients:
            assert gradient.abs().max() <= U * 4000

    @given(call=small_calls(causal=False), order=st.randoms(use_true_random=False))
    def test_the_order_of_positions_does_not_matter(self, call, order):
        dimension = 1 if call.name == "relation" else 2
        at = list(range(call.tensors[0].shape[dimension]))
        order.shuffle(at)
        tensors = tuple([t.index_select(dimension, torch.tensor(at)) for t in call.tensors])
        masks = {n: v[:, at] for n, v in call.options.items() if n == "mask"}
        moved = replace(call.but(**masks, reduction="none"), tensors=tensors)
        close(moved.value(), call.but(reduction="none").value()[:, at])

    @given(call=small_calls(), order=st.randoms(use_true_random=False))
    def test_the_order_of_heads_does_not_matter(self, call, order):
        many = call.options.get("relation_heads") or call.tensors[0].shape[1]
        heads = list(range(many))
        order.shuffle(heads)
        if call.name == "relation":
            tensors = [t.unflatten(2, (many, -1))[:, :, heads].flatten(2) for t in call.tensors]
        else:
            tensors = [t[:, heads] for t in call.tensors]
        close(replace(call, tensors=tuple(tensors)).value(), call.value())

    @given(call=small_calls("relation", k=None))
    def test_as_many_nearest_columns_as_there_are_is_all(self, call):
        length = call.tensors[0].shape[1]
        close(call.but(k=length).value(), call.value())

    @given(call=small_calls("relation", kind="jeffreys", k=None))
    def test_jeffreys_is_symmetric(self, call):
        swapped = replace(call, tensors=tuple([t.detach() for t in call.tensors[2:]]) * 2)
        swapped = replace(swapped, tensors=(*swapped.tensors[:2], *call.tensors[:2]))
        swapped = replace(swapped, tensors=tuple([t.detach() for t in swapped.tensors]))
        close(swapped.value(), call.value().detach())

    @given(call=small_calls("attention"))
    def test_attention_is_relations_of_heads(self, call):
        """Both functions agree where they say the same; relations leave rows out with the mask."""
        many = call.tensors[0].shape[1]
        tensors = tuple([t.transpose(1, 2).flatten(2) for t in call.tensors])
        options = {**call.options, "relation_heads": many}
        both = call.but(query_mask=call.options.get("mask"))
        close(Call("relation", tensors, options).value(), both.value())


@pytest.fixture
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class TestTransforms:
    @pytest.mark.usefixtures("_fresh_dynamo")
    @pytest.mark.parametrize("reduction", ["mean", "none"])
    @pytest.mark.parametrize("name", NAMES)
    def test_compiled_training_step(self, name, reduction):
        """Whole: a graph break is an error. The result is the eager one."""
        mask = torch.arange(14).view(2, 7) % 4 != 2
        positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]] * 2)
        call = random_call(name, reduction=reduction, mask=mask, causal=True, positions=positions)
        leaves = list(call.tensors[:2])

        def step(x, y):
            function = fused_relation_kd if name == "relation" else fused_attention_kd
            names = list(call.arguments())[:2]
            changed = call.arguments() | {names[0]: 2 * x, names[1]: y}
            return (3 * function(**changed)).sum()

        outcomes = []
        for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
            value = function(*leaves)
            outcomes.append([value, *torch.autograd.grad(value, leaves)])
        for eager, compiled in zip(*outcomes):
            atol = 1e-6 * float(eager.detach().abs().max())
            torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=atol)

    @pytest.mark.parametrize("name", NAMES)
    def test_repeated_and_second_backward(self, name):
        call = random_call(name)
        value, leaves = call.value(), list(call.tensors[:2])
        first = torch.autograd.grad(value, leaves, retain_graph=True)
        second = torch.autograd.grad(3 * value, leaves)
        for a, b in zip(first, second):
            assert (3 * a - b).abs().max() <= 4 * unit_roundoff(F32) * float(b.abs().max())
        found = torch.autograd.grad(call.value(), leaves, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiated once"):
            torch.autograd.grad(sum(g.square().sum() for g in found), leaves)

    @pytest.mark.parametrize("reentrant", [False, True])
    @pytest.mark.parametrize("name", NAMES)
    def test_checkpointing(self, name, reentrant):
        call = random_call(name)

        def function(x, y):
            return replace(call, tensors=(x, y, *call.tensors[2:])).value()

        checkpoint(function, *call.tensors[:2], use_reentrant=reentrant).backward()
        for leaf, gradient in zip(call.tensors, call.run()[1]):
            assert torch.equal(leaf.grad, gradient)

    @pytest.mark.parametrize("name", NAMES)
    def test_a_transform_of_torch_is_refused(self, name):
        call = random_call(name)
        with pytest.raises(RuntimeError, match=r"is under a transform of torch\.func"):
            torch.func.grad(lambda x: replace(call, tensors=(x, *call.tensors[1:])).value())(
                call.tensors[0].detach()
            )


class TestMemory:
    LENGTH, WIDTH = 512, 4
    MATRIX = 4 * LENGTH**2  # bytes of one (T, T) tensor of one head: 1 MiB; there are 4

    @pytest.mark.parametrize("reduction", ["mean", "none"])
    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("attention", {"causal": True}),
            ("attention", {"keys": (1, 2)}),
            *[("relation", {"kind": kind, "exclude_self": True}) for kind in KINDS],
            ("relation", {"k": 8, "causal": True}),
        ],
        ids=str,
    )
    def test_no_tensor_of_positions_by_positions(self, name, options, reduction, monkeypatch):
        """One block within its bytes, and vectors; not even the scores of one head."""
        budget = 2**18
        monkeypatch.setitem(blocks.BLOCK_BYTES, "cpu", budget)
        mask = torch.arange(2 * self.LENGTH).view(2, -1) % 5 != 1
        options = {"width": self.WIDTH, "mask": mask, "reduction": reduction} | options
        call = random_call(name, 2, self.LENGTH, 2, **options, lengths=[300, 212, 512])
        upstream = torch.ones(2, self.LENGTH) if reduction == "none" else None
        peak = allocated_peak(lambda: call.run(upstream=upstream))
        # Per vector: without what is masked, cut into heads, gradients of these in sums, rounded,
        # and of autograd; numbers of positions.
        vectors = 4 * 2 * self.LENGTH * 4 * (self.WIDTH + 1) * 4
        assert peak <= budget + vectors + 2 * self.LENGTH * 100, f"{peak / 2**20:.2f} MiB"
        assert budget + vectors + 2 * self.LENGTH * 100 < self.MATRIX

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("k", [None, 1, 500])
    def test_the_matrices_that_a_row_function_holds(self, kind, k, monkeypatch):
        monkeypatch.setitem(attention_blocks.SCORES, "cpu", self.LENGTH**2)  # sequences together
        options = {"kind": kind, "k": k, "exclude_self": True, "lengths": [300, 212]}
        call = random_call("relation", 1, self.LENGTH, 1, width=1, **options)
        peak = allocated_peak(call.run)
        matrices = MATRICES if k is None else 8.5
        assert peak <= (matrices + blocks._OWN_MATRICES) * self.MATRIX, peak / self.MATRIX


RELATION = random_call("relation", 2, 4).arguments()
ATTENTION = random_call("attention", 2, 4).arguments()
X, Q = torch.ones(2, 4, 8), torch.ones(2, 2, 4, 4)
MASK = torch.ones(2, 4)
ERRORS = [
    (RELATION, {"student_x": None}, TypeError, "student_x must be a tensor, got NoneType"),
    (RELATION, {"student_x": X[0]}, ValueError, "student_x has shape (4, 8): it must be (seq"),
    (RELATION, {"teacher_y": X[:, :3]}, ValueError, "must have seen the same positions"),
    (RELATION, {"student_y": X[..., :6]}, ValueError, "student_y has width 6 and student_x 8"),
    (RELATION, {"relation_heads": 3}, ValueError, "relation_heads=3 does not divide the width 8"),
    (RELATION, {"relation_heads": 0}, ValueError, "relation_heads=0 must be at least 1"),
    (RELATION, {"relation_heads": 2.0}, TypeError, "relation_heads must be an int"),
    (RELATION, {"kind": "js"}, ValueError, "kind='js' is not one of 'kl', 'jeffreys', 'mse'"),
    (RELATION, {"k": 0}, ValueError, "k=0 must be at least 1"),
    (RELATION, {"k": 1.5}, TypeError, "k must be an int"),
    (RELATION, {"causal": 1.5}, ValueError, "causal=1.5 is not one of True, False"),
    (RELATION, {"exclude_self": "yes"}, ValueError, "exclude_self='yes' is not one of"),
    (RELATION, {"backend": "cpu"}, ValueError, "Backends that can: auto, reference, torch"),
    (RELATION, {"backend": "x"}, ValueError, "backend='x' is not one of"),
    (RELATION, {"reduction": "max"}, ValueError, "reduction='max' is not one of"),
    (RELATION, {"student_scale": -1.0}, ValueError, "student_scale=-1.0 must be finite"),
    (RELATION, {"teacher_scale": 0.0}, ValueError, "teacher_scale=0.0 must be finite"),
    (RELATION, {"mask": MASK}, TypeError, "mask is a float32 tensor"),
    (RELATION, {"mask": MASK[0].bool()}, ValueError, "mask has shape (4,): it must be"),
    (RELATION, {"mask": [1]}, TypeError, "mask must be a tensor, got list"),
    (RELATION, {"lengths": [4, 3]}, ValueError, "lengths sum to 7 and the least is 3"),
    (RELATION, {"lengths": [4, 4, 0]}, ValueError, "lengths sum to 8 and the least is 0"),
    (RELATION, {"lengths": [3, 2, 3]}, ValueError, "cross the end of a row, at position 4"),
    (RELATION, {"lengths": 8}, TypeError, "lengths must be a list of ints, got int"),
    (RELATION, {"lengths": MASK}, TypeError, "lengths is a float32 tensor"),
    (RELATION, {"positions": MASK.long()[0]}, ValueError, "positions has shape (4,)"),
    (RELATION, {"positions": MASK}, TypeError, "positions is a float32 tensor"),
    (
        RELATION,
        {"positions": MASK.long(), "lengths": [4, 4]},
        ValueError,
        "lengths and positions were both given",
    ),
    (RELATION, {"num_items_in_batch": 0}, ValueError, "num_items_in_batch=0 must be greater"),
    (
        RELATION,
        {"teacher_x": torch.ones(2, 4, 10, requires_grad=True)},
        ValueError,
        "teacher_x requires grad, but the loss never sends gradient to the teacher",
    ),
    (ATTENTION, {"q_s": X}, ValueError, "q_s has shape (2, 4, 8): it must be (sequences, heads"),
    (ATTENTION, {"k_s": Q.long()}, TypeError, "k_s is a int64 tensor"),
    (ATTENTION, {"k_t": Q[:, :, :3]}, ValueError, "k_t has shape (2, 2, 3, 4) and q_s"),
    (ATTENTION, {"q_t": Q[:, :1]}, ValueError, "q_t has 1 heads and q_s 2"),
    (ATTENTION, {"k_s": Q[:, [0, 0, 0]]}, ValueError, "k_s has 3 heads, which do not divide"),
    (ATTENTION, {"k_s": Q[..., :3]}, ValueError, "k_s has width 3 and its queries 4"),
    (ATTENTION, {"query_mask": MASK[:1].bool()}, ValueError, "query_mask has shape (1, 4)"),
    (ATTENTION, {"k_t": Q}, ValueError, "k_t has width 4 and its queries 5"),
    (ATTENTION, {"k_s": Q.to("meta")}, ValueError, "k_s is on meta and q_s on cpu"),
    (
        ATTENTION,
        {"q_t": torch.ones(2, 2, 4, 5, requires_grad=True)},
        ValueError,
        "q_t requires grad, but the loss never sends",
    ),
]


@pytest.mark.parametrize(
    ("good", "changes", "error", "message"),
    ERRORS,
    ids=lambda x: x[:30] if isinstance(x, str) else None,
)
def test_refused(good, changes, error, message, monkeypatch):
    """Naming argument, value and remedy, before any work."""
    for name in ("row_sum", "row_values", "_dense"):
        monkeypatch.setattr(f"fdd_kernels.objectives.relations.call.{name}", None)
    function = fused_relation_kd if good is RELATION else fused_attention_kd
    with pytest.raises(error, match=re.escape(message)):
        function(**(good | changes))
    assert api.fused_relation_kd is fused_relation_kd
