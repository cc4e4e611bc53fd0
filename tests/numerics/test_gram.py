"""gram_loss against dense Gram matrices in float64, against 60 digits near agreement, and its
invariances.

Budgets. With u the unit roundoff of float64, S and T of length 1 a row and n = R + Ds + Dt:

- a sum of R products and a form of width D round by at most n u of the largest of their terms, and
  values and gradients are polynomials of degree 4 to 8 in the rows, times a division and a root:
  8 n u of the largest number met, which `_scale` bounds;
- where the widths are equal and S - T has the relative size e, the difference is exact to u of the
  rows, u / e of itself, and so are value (twice: a square) and gradient. The form of plain
  sums would lose u / e^2 of the value;
- the result is rounded once to float32, a gradient once to the dtype of the features; the
  gradient of "sp" is a sum of two parts that are rounded to float32 (float64 for such features).
"""

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fdd_kernels import gram_loss
from fdd_kernels.objectives.features import streams
from tests.support.allocations import allocated_peak
from tests.support.grams import KINDS, dense, exact, exact_derivative, unit

U = unit(torch.float64)
INVARIANT = {
    "sp": "rotation scale",
    "cka": "rotation scale shift",
    "nst": "rotation",
    "ickd": "scale",
}


def features(shape, width: int, teacher_width: int, seed: int = 0, near: float | None = None):
    """Rows of length about 1, in float64; the teacher's near the student's if `near` is given."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*dims):
        return torch.randn(*dims, generator=generator, dtype=torch.float64) / dims[-1] ** 0.5

    student = draw(*shape, width)
    return student, draw(*shape, teacher_width) if near is None else student + near * draw(
        *shape, width
    )


def additions(s: Tensor, t: Tensor) -> int:
    return s.shape[:-1].numel() + s.shape[-1] + t.shape[-1] + 12


def scale_of(kind: str, s: Tensor, t: Tensor) -> float:
    """The largest number that a value passes through: 2 but for "nst", which is not normalised."""
    if kind != "nst":
        return 2.0
    with torch.no_grad():
        s, t = s.flatten(0, -2).double(), t.flatten(0, -2).double()
        return float(((s.T @ s).square().mean() + 2 * (s.T @ t).square().mean()) / len(s))


def value_and_gradient(function, s: Tensor, t: Tensor, upstream: float = 1.0):
    s = s.detach().requires_grad_()
    value = function(s, t)
    (gradient,) = torch.autograd.grad(value, s, torch.full_like(value, upstream))
    return value.detach(), gradient


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("teacher_width", [5, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_dense_formula(kind, teacher_width, dtype):
    """On the same numbers, rounded to the dtype of the features first."""
    if kind == "ickd" and teacher_width != 8:
        pytest.skip("channels are compared one by one")
    s, t = (f.to(dtype) for f in features((3, 11), 8, teacher_width))
    got, gradient = value_and_gradient(lambda a, b: gram_loss(a, b, kind, groups="all"), s, t)
    true, expected_gradient = value_and_gradient(
        lambda a, b: dense(kind, a.flatten(0, 1), b.flatten(0, 1)), s.double(), t.double()
    )
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert gradient.dtype == dtype
    budget = 8 * additions(s, t) * U * scale_of(kind, s, t)
    assert abs(got.double() - true) <= budget + unit(got.dtype) * abs(true)
    error = (gradient.double() - expected_gradient).abs()
    rounded = (
        unit(dtype) * expected_gradient.abs()
        + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    )
    if kind == "sp":
        left, right = (f.detach().double().flatten(0, 1).requires_grad_() for f in (s, s))
        value = dense(kind, left, t.double().flatten(0, 1), right)
        parts = torch.stack(torch.autograd.grad(value, (left, right)))
        largest = parts.abs().sum(0) + parts.sum(0).abs()
        rounded = rounded + unit(torch.promote_types(dtype, torch.float32)) * largest.view_as(s)
    assert (error <= 8 * budget + rounded).all()


@pytest.mark.parametrize("near", [1e-2, 1e-5, 1e-8])
@pytest.mark.parametrize("kind", KINDS)
def test_keeps_its_digits_where_the_models_nearly_agree(kind, near):
    s, t = features((7,), 3, 3, near=near)
    if "scale" in INVARIANT[kind]:
        t = 3 * t  # parallel models agree too
    direction = features((7,), 3, 3, seed=1)[0]
    got, gradient = value_and_gradient(lambda a, b: gram_loss(a, b, kind), s, t)
    of_value = of_gradient = 16 * additions(s, t) * U / near
    true, derivative = exact(kind, s, t), exact_derivative(kind, s, t, direction)
    if kind == "nst":  # its value is not small, and its gradient is
        of_value = 8 * additions(s, t) * U * scale_of(kind, s, t) / abs(true)
    assert abs(float(got) - true) <= of_value * abs(true)
    # the gradient's length, since one derivative may be small by chance
    size = float(gradient.norm() * direction.norm())
    assert abs(float((gradient * direction).sum()) - derivative) <= of_gradient * size
    if kind != "nst" and near <= 1e-5:  # as the formula stands
        lost = abs(float(dense(kind, s, t)) - true) > of_value * abs(true)
        assert lost == (kind == "cka")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["sp", "cka", "ickd"])
def test_low_precision_features_that_differ_in_their_last_bits(kind, dtype):
    """The features are given exactly: only the result is rounded."""
    s = features((7,), 3, 3)[0].to(dtype)
    t = s * (1 + torch.finfo(dtype).eps * torch.arange(7)[:, None].remainder(3)).to(dtype)
    near = float((s - t).double().norm() / s.double().norm())
    got = gram_loss(s, t, kind)
    true = exact(kind, s, t)
    bound = 16 * additions(s, t) * U / near + unit(torch.float32)
    assert abs(float(got) - true) <= bound * abs(true)
    assert true > 0


@pytest.mark.parametrize("kind", KINDS)
def test_one_model_has_loss_and_gradient_zero(kind):
    s, _ = features((2, 9), 4, 4)
    value, gradient = value_and_gradient(lambda a, b: gram_loss(a, b, kind, groups="all"), s, s)
    bound = 8 * additions(s, s) * U * scale_of(kind, s, s)
    if kind != "nst":  # without the teacher's own term, which is a constant
        assert abs(value) <= bound
    assert gradient.abs().max() <= 8 * bound


rows = st.integers(1, 12)
widths = st.integers(1, 6)


@given(kind=st.sampled_from(KINDS), r=rows, width=widths, other=widths, seed=st.integers(0, 2**16))
def test_invariances(kind, r, width, other, seed):
    s, t = features((r,), width, width if kind == "ickd" else other, seed)
    expected = gram_loss(s, t, kind)
    moved = [(s.flip(0), t.flip(0))]
    if "rotation" in INVARIANT[kind]:
        moved.append(
            [
                m @ torch.linalg.qr(features((k,), k, k, seed + 1)[0])[0]
                for m, k in ((s, s.shape[1]), (t, t.shape[1]))
            ]
        )
    if "scale" in INVARIANT[kind]:
        moved.append((3 * s, t / 7))
    if "shift" in INVARIANT[kind]:
        moved.append((s + 0.5, t - 0.25))
    if kind in ("sp", "cka"):  # of different widths, for which there is no residual form
        moved.append((s, torch.nn.functional.pad(t, (0, 1))))
    # A row, a channel or a matrix whose length is rounding has no direction.
    bound = 32 * additions(s, t) * U * max(1.0, scale_of(kind, s, t))
    if kind == "cka":
        lengths = [(m - m.mean(0)).square().sum() for m in (s, t)]
        bound = bound / min(1.0, float(min(lengths))) ** 2 if min(lengths) > 1e-3 else 2.0
    for a, b in moved:
        assert abs(gram_loss(a, b, kind) - expected) <= bound
    if kind != "nst":
        assert expected >= -bound


@given(kind=st.sampled_from(KINDS), r=st.integers(2, 12), seed=st.integers(0, 2**16))
def test_masked_rows_are_as_if_they_were_not_there(kind, r, seed):
    s, t = features((r,), 3, 3, seed)
    mask = torch.rand(r, generator=torch.Generator().manual_seed(seed)) < 0.6
    mask[:2] = True  # one row has no variance
    run = functools.partial(gram_loss, kind=kind)
    expected, expected_gradient = value_and_gradient(run, s[mask], t[mask])
    s, t = (m.masked_fill(~mask[:, None], torch.nan) for m in (s, t))
    got, gradient = value_and_gradient(functools.partial(run, mask=mask), s, t)
    bound = 64 * additions(s, t) * U
    assert abs(got - expected) <= bound
    assert (gradient[~mask] == 0).all()
    # a gradient is at least a value over a row's length, and by that much harder
    assert (gradient[mask] - expected_gradient).abs().max() <= bound * max(
        1.0, float(expected_gradient.abs().max()) ** 2
    )


@pytest.mark.parametrize("kind", KINDS)
def test_groups_and_reductions(kind):
    s, t = features((3, 6), 4, 4)
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[0, 4:] = False
    mask[2] = False
    each = torch.stack(
        [gram_loss(a[m], b[m], kind, groups="all") for a, b, m in zip(s[:2], t[:2], mask)]
    )
    bound = 8 * additions(s, t) * U * max(2.0, scale_of(kind, s, t))
    ids = torch.tensor([5, -1, 7])[:, None].expand(3, 6)
    order = torch.randperm(18, generator=torch.Generator().manual_seed(0))
    packed = [m.flatten(0, 1)[order] for m in (s, t, mask, ids)]

    def check(expected, **options):
        got = gram_loss(s, t, kind, mask=mask, groups="sequence", **options)
        assert (got - expected).abs().max() <= bound
        by_id = gram_loss(packed[0], packed[1], kind, mask=packed[2], groups=packed[3], **options)
        if options.get("reduction") == "none":
            by_id = by_id[[1, 0, 2]]  # in the order of ids
        assert (by_id - expected).abs().max() <= bound

    check(each.mean())
    check(each.sum(), reduction="sum")
    check(each.sum() / 7, num_items_in_batch=7)
    check(torch.cat([each, each.new_zeros(1)]), reduction="none")
    default = gram_loss(s, t, kind, mask=mask)
    of_all = gram_loss(s[mask], t[mask], kind, groups="all")
    assert abs(default - (of_all if kind in ("sp", "cka") else each.mean())) <= bound


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_valid_gives_zero(kind):
    s, t = features((2, 4), 3, 3)
    none = torch.zeros(2, 4, dtype=torch.bool)
    for a, b, mask in ((s, t, none), (s[:, :0], t[:, :0], None)):
        run = functools.partial(gram_loss, kind=kind, mask=mask)
        value, gradient = value_and_gradient(run, a, b)
        assert value == 0
        assert (gradient == 0).all()


def test_rows_of_zeros_stay_zeros_when_normalised():
    s, t = features((5,), 3, 3)
    s[1], t[1], t[3] = 0, 0, 0
    for kind in ("sp", "ickd"):
        got, gradient = value_and_gradient(functools.partial(gram_loss, kind=kind), s, t)
        assert abs(got - dense(kind, s, t)) <= 8 * additions(s, t) * U * 2
        assert gradient.isfinite().all()
    constant = torch.ones(5, 3)
    assert gram_loss(constant, t.float(), "cka") == 1
    assert value_and_gradient(lambda a, b: gram_loss(a, b, "cka"), constant, t)[1].abs().max() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_rows_change_nothing(kind, monkeypatch):
    s, t = features((2, 25), 4, 4)
    whole = value_and_gradient(lambda a, b: gram_loss(a, b, kind), s, t)
    monkeypatch.setattr(streams, "BLOCK_NUMBERS", 56)  # 7 rows
    parts = value_and_gradient(lambda a, b: gram_loss(a, b, kind), s, t)
    bound = 8 * additions(s, t) * U * max(2.0, scale_of(kind, s, t))
    for a, b in zip(whole, parts):
        assert (a - b).abs().max() <= 8 * bound


@pytest.mark.parametrize("kind", KINDS)
def test_memory_does_not_grow_with_the_rows(kind, monkeypatch):
    """Beside the gradient and the blocks of which it is put together, a block's tensors.

    An (R, R) tensor of the longer run would be 64 MiB.
    """
    monkeypatch.setattr(streams, "BLOCK_NUMBERS", 2**10)
    extra = []
    for count in (512, 4096):
        s, t = (f.float() for f in features((count,), 4, 4))
        s.requires_grad_()

        def run(s=s, t=t):
            return torch.autograd.grad(gram_loss(s, t, kind, groups="all"), s)

        uses = 2 if kind == "sp" else 1  # passes that send gradient to the rows
        uses += kind == "cka"  # and the mean
        extra.append(allocated_peak(run) - (1 + uses) * s.nbytes)
    assert extra[1] <= extra[0] <= 32 * 2**10


@pytest.mark.parametrize("kind", KINDS)
def test_many_rows(kind):
    """An (R, R) tensor would be 37 GiB in float32."""
    s, t = (f.float() for f in features((100_000,), 3, 3))
    value, gradient = value_and_gradient(
        functools.partial(gram_loss, kind=kind, groups="all"), s, t
    )
    assert value.isfinite()
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0


def test_second_derivatives():
    s, t = features((5,), 3, 2)
    for kind in ("sp", "cka", "nst"):
        assert torch.autograd.gradgradcheck(
            lambda a, kind=kind: gram_loss(a, t, kind), s.clone().requires_grad_()
        )


@pytest.mark.parametrize(
    "kind", ["nst", *[pytest.param(k, marks=pytest.mark.slow) for k in ("sp", "cka", "ickd")]]
)
def test_compiled(kind):
    s, t = (f.float() for f in features((2, 9), 4, 4))
    mask = torch.arange(9).expand(2, 9) < 7
    torch._dynamo.reset()
    run = torch.compile(gram_loss, fullgraph=True, backend="aot_eager")
    for got, expected in zip(
        value_and_gradient(lambda a, b: run(a, b, kind, mask=mask), s, t),
        value_and_gradient(lambda a, b: gram_loss(a, b, kind, mask=mask), s, t),
    ):
        largest = expected.abs().max()
        assert (got - expected).abs().max() <= 4 * unit(torch.float32) * largest
