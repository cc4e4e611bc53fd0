"""row_deltas against float64, and deviations in lens space through fused_fdd_loss.

Budgets: u the unit roundoff of the work's dtype, float32 or float64. A mean is summed in float64
and rounded once, a delta rounds once in the work's dtype and once in that of the hidden states.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fdd_kernels import fused_fdd_loss, row_deltas
from fdd_kernels.testing import assert_same_sums
from tests.support.grams import unit


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def close(got, true, hidden) -> None:
    """Three roundings of the largest number, the last in the dtype of the hidden states."""
    work = unit(torch.promote_types(hidden.dtype, torch.float32))
    largest = 2 * hidden.double().nan_to_num().abs().max()
    smallest = torch.finfo(hidden.dtype).smallest_normal * torch.finfo(hidden.dtype).eps
    bound = 3 * work * largest + 2.0**-53 * hidden.numel() * largest
    error = (got.double() - true).abs()
    assert (error <= bound + unit(hidden.dtype) * true.abs() + smallest).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_deviation(dtype):
    hidden = (draw(2, 5, 3) + 4).to(dtype)
    wide = hidden.double()
    for groups, mean in (
        (None, wide.mean((0, 1))),
        ("all", wide.mean((0, 1))),
        ("sequence", wide.mean(1, keepdim=True)),
    ):
        rows, mask = row_deltas(hidden, groups=groups)
        assert rows.dtype == dtype
        assert mask is None
        close(rows, wide - mean, hidden)
    stored = draw(3, seed=1).to(dtype)
    close(row_deltas(hidden, reference=stored).rows, wide - stored.double(), hidden)


def test_deviation_over_valid_rows_and_classes():
    hidden = draw(2, 5, 3)
    mask = torch.tensor([[1, 1, 0, 1, 1], [0, 0, 1, 1, 0]])
    classes = torch.tensor([[9, -4, 9, 9, -4], [-4, 9, -4, 9, 0]])
    spoiled = hidden.masked_fill(mask[..., None] == 0, torch.nan)
    rows, valid = row_deltas(spoiled, mask=mask)
    true = (hidden - hidden[mask != 0].mean(0)).masked_fill(mask[..., None] == 0, 0)
    close(rows, true, hidden)
    assert torch.equal(valid, mask != 0)
    rows, _ = row_deltas(spoiled, mask=mask, groups=classes)
    for index in classes.unique():
        chosen = (classes == index) & (mask != 0)
        close(rows[chosen], hidden[chosen] - hidden[chosen].mean(0), hidden)
    assert (rows[mask == 0] == 0).all()
    each = row_deltas(spoiled, mask=mask, groups="sequence").rows
    ids = torch.arange(2)[:, None].expand(2, 5)
    close(each, row_deltas(spoiled, mask=mask, groups=ids).rows, hidden)
    assert (row_deltas(spoiled, mask=mask * 0).rows == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_adjacent(dtype):
    hidden, wide = draw(2, 5, 3).to(dtype), draw(2, 5, 3).to(dtype).double()
    rows, mask = row_deltas(hidden, "adjacent")
    assert mask is None
    close(rows, wide[:, 1:] - wide[:, :-1], hidden)
    given_mask = torch.tensor([[1, 1, 0, 1, 1], [1, 1, 1, 1, 1]])
    packed = torch.tensor([[0, 0, 0, 0, 0], [3, 3, 5, 5, 5]])
    rows, mask = row_deltas(
        hidden.masked_fill(given_mask[..., None] == 0, torch.nan),
        "adjacent",
        mask=given_mask,
        groups=packed,
    )
    assert mask.tolist() == [[True, False, False, True], [True, False, True, True]]
    true = (wide[:, 1:] - wide[:, :-1]).masked_fill(~mask[..., None], 0)
    close(rows, true, hidden)
    assert row_deltas(hidden[:, :1], "adjacent", groups="sequence").rows.shape == (2, 0, 3)


@pytest.mark.parametrize(
    ("options", "through"),
    [
        ({}, True),
        ({"detach_reference": True}, False),
        ({"reference": "tensor"}, False),
        ({"reference": "tensor", "detach_reference": False}, True),
    ],
)
def test_gradient_through_the_reference(options, through):
    hidden, upstream = draw(2, 5, 3).requires_grad_(), draw(2, 5, 3, seed=1)
    stored = draw(3, seed=2).requires_grad_()
    if options.get("reference") == "tensor":
        options = options | {"reference": stored}
    rows = row_deltas(hidden, **options).rows
    gradients = torch.autograd.grad(rows, (hidden, stored), upstream, allow_unused=True)
    of_batch = "reference" not in options
    expected = upstream - upstream.mean((0, 1)) if of_batch and through else upstream
    assert_same_sums(gradients[0], expected, 12)
    assert (gradients[1] is not None) == (not of_batch and through)
    if gradients[1] is not None:
        assert_same_sums(gradients[1], -upstream.sum((0, 1)), 12)


@given(seed=st.integers(0, 2**16), r=st.integers(1, 8))
def test_deviations_sum_to_zero_and_are_blind_to_a_shift(seed, r):
    hidden = draw(r, 2, 3, seed=seed)
    rows = row_deltas(hidden).rows
    assert_same_sums(rows.sum((0, 1)), torch.zeros(3, dtype=torch.float64), 8 * r)
    assert_same_sums(row_deltas(hidden + 2).rows, rows, 16 * r)
    order = torch.randperm(r, generator=torch.Generator().manual_seed(seed))
    assert_same_sums(row_deltas(hidden[order]).rows, rows[order], 8 * r)
    assert_same_sums(
        row_deltas(hidden + 2, "adjacent").rows, row_deltas(hidden, "adjacent").rows, 8
    )


def models():
    """Hidden states (2, 6, D) with heads of 11 tokens, and a mask."""
    mask = torch.tensor([[1, 1, 1, 0, 1, 1], [1, 1, 1, 1, 0, 0]]) != 0
    student = draw(2, 6, 4).requires_grad_(), draw(11, 4, seed=1).requires_grad_()
    return student, (draw(2, 6, 5, seed=2), draw(11, 5, seed=3)), mask


def test_deviation_mse_in_lens_space(backend):
    """The oracle takes deviations of the logits, over valid positions."""
    (h_s, w_s), (h_t, w_t), mask = models()
    scale = 0.5
    z_s, z_t = (scale * (h @ w.T)[mask] for h, w in ((h_s, w_s), (h_t, w_t)))
    true = ((z_s - z_s.mean(0)) - (z_t - z_t.mean(0))).square().mean()
    s, t = row_deltas(h_s, mask=mask), row_deltas(h_t, mask=mask)
    got = fused_fdd_loss(
        s.rows,
        w_s,
        t.rows,
        w_t,
        mask=s.mask,
        trajectory="mse",
        output_in_dynamics=True,
        output_kd_weight=0.0,
        beta=0.0,
        student_logit_scale=scale,
        teacher_logit_scale=scale,
        backend=backend,
    )
    compare(got, true, (h_s, w_s), backend)


@pytest.mark.parametrize("trajectory", ["mse", "cosine"])
def test_adjacent_differences_in_lens_space(backend, trajectory):
    """Of logits whose bias cancels; the call gives none."""
    (h_s, w_s), (h_t, w_t), mask = models()
    bias = draw(11, seed=4)
    both = mask[:, 1:] & mask[:, :-1]
    d_s, d_t = (((h @ w.T + bias).diff(dim=1))[both] for h, w in ((h_s, w_s), (h_t, w_t)))
    true = (d_s - d_t).square().mean()
    if trajectory == "cosine":
        true = (1 - torch.cosine_similarity(d_s, d_t)).mean()
    s, t = (row_deltas(h, "adjacent", mask=mask) for h in (h_s, h_t))
    got = fused_fdd_loss(
        s.rows,
        w_s,
        t.rows,
        w_t,
        mask=s.mask,
        trajectory=trajectory,
        output_in_dynamics=True,
        output_kd_weight=0.0,
        beta=0.0,
        backend=backend,
    )
    compare(got, true, (h_s, w_s), backend)


def compare(got, true, leaves, backend) -> None:
    """Sums over 12 rows, 11 tokens and widths of 5, of numbers of size 10."""
    pairs = zip(
        (got, *torch.autograd.grad(got, leaves)), (true, *torch.autograd.grad(true, leaves))
    )
    for a, b in pairs:
        assert_same_sums(a.detach() / 10, b.detach() / 10, 16 * (12 + 11 + 5), f"backend {backend}")


CLASSES = torch.tensor([[2, 7, 2, 7, 7, 2], [7, 7, 2, 2, 7, 2]])
PACKED = torch.tensor([[4, 4, 4, 4, 9, 9], [1, 1, 5, 5, 5, 5]])
KINDS = {
    "batch": {},
    "batch, constant": {"detach_reference": True},
    "sequence": {"groups": "sequence"},
    "classes": {"groups": CLASSES},
    "stored": {"reference": "stored"},
    "stored, with gradient": {"reference": "stored", "detach_reference": False},
    "adjacent": {"kind": "adjacent"},
    "adjacent, packed": {"kind": "adjacent", "groups": PACKED},
}


def ends(h, mask, stored, kind="deviation", groups=None, reference=None, detach_reference=None):
    """The oracle's two ends of each delta, and which deltas are valid."""
    if kind == "adjacent":
        ids = torch.zeros_like(PACKED) if groups is None else groups
        valid = mask[:, 1:] & mask[:, :-1] & (ids[:, 1:] == ids[:, :-1])
        return h[:, :-1], h[:, 1:], valid
    if reference is not None:
        means = (stored if detach_reference is False else stored.detach()).expand_as(h)
        return means, h, mask
    if groups is None:
        ids = torch.zeros_like(CLASSES)
    else:
        ids = torch.tensor([[0], [1]]).expand(2, 6) if isinstance(groups, str) else groups
    means = torch.zeros_like(h)
    for index in ids.unique():
        chosen = (ids == index)[..., None]
        mean = h[(ids == index) & mask].mean(0)
        means = torch.where(chosen, mean.detach() if detach_reference else mean, means)
    return means, h, mask


@pytest.fixture(params=KINDS)
def of_kind(request):
    """The states of both models with the ends of their deltas, and `row_deltas` of them."""
    (h_s, w_s), (h_t, w_t), mask = models()
    stored = draw(4, seed=6).requires_grad_(), draw(5, seed=7)
    models_of = []
    for h, w, reference in zip((h_s, h_t), (w_s, w_t), stored):
        options = KINDS[request.param]
        given = options | {"reference": reference} if "reference" in options else options
        if reference is stored[1]:
            given = {k: v for k, v in given.items() if k != "detach_reference"}
        spoiled = h if h is h_s else h.masked_fill(~mask[..., None], torch.nan)
        models_of.append((w, ends(h, mask, reference, **options), spoiled, given))
    leaves = [h_s, w_s] + [stored[0]] * (request.param == "stored, with gradient")
    return models_of, leaves, mask


def loss_of_deltas(models_of, mask, *, as_layers=False, **options) -> torch.Tensor:
    """Compare the deltas of both models under their heads."""
    s, t = (row_deltas(h, mask=mask, as_layers=as_layers, **given) for *_, h, given in models_of)
    (w_s, *_), (w_t, *_) = models_of
    options = {"output_in_dynamics": True, "output_kd_weight": 0.0} | options
    return fused_fdd_loss(s.rows, w_s, t.rows, w_t, mask=s.mask, **options)


def test_every_kind_in_lens_space(backend, of_kind):
    """Deltas of rows under a head give the deltas of logits: nothing crosses a sequence."""
    models_of, leaves, mask = of_kind
    d_s, d_t = ((after - before)[valid] @ w.T for w, (before, after, valid), *_ in models_of)
    got = loss_of_deltas(models_of, mask, backend=backend, trajectory="mse", beta=0.0)
    compare(got, (d_s - d_t).square().mean(), leaves, backend)


@pytest.mark.parametrize("derivative", ["cosine", "centered_cosine", "mse"])
def test_every_kind_under_a_soft_cap(backend, of_kind, derivative):
    """Log-probabilities of capped logits at both ends of each delta."""
    models_of, leaves, mask = of_kind
    caps, temperature = (2.0, 3.0), 1.5
    deltas = []
    for (w, (*pair, valid), *_), cap in zip(models_of, caps):
        y = [(cap * torch.tanh(h[valid] @ w.T / cap) / temperature).log_softmax(-1) for h in pair]
        deltas.append(y[1] - y[0])
    if derivative == "mse":
        true = (deltas[0] - deltas[1]).square().mean()
    else:
        means = [d.mean(-1, keepdim=True) * (derivative == "centered_cosine") for d in deltas]
        true = 1 - torch.cosine_similarity(*[d - m for d, m in zip(deltas, means)])
        true = true.mean()
    got = loss_of_deltas(
        models_of,
        mask,
        as_layers=True,
        derivative=derivative,
        temperature=temperature,
        student_softcap=caps[0],
        teacher_softcap=caps[1],
        alpha=0.0,
        backend=backend,
    )
    compare(got, true, leaves, backend)


def test_every_kind_in_feature_space(of_kind):
    models_of, leaves, mask = of_kind
    projection = draw(5, 4, seed=5).requires_grad_()
    d_s, d_t = ((after - before)[valid] for _, (before, after, valid), *_ in models_of)
    s, t = (row_deltas(h, mask=mask, **given) for *_, h, given in models_of)
    got = fused_fdd_loss(
        s.rows,
        projection,
        t.rows,
        None,
        mask=s.mask,
        trajectory="mse",
        output_in_dynamics=True,
        beta=0.0,
    )
    leaves = [projection, *[leaf for leaf in leaves if leaf.shape != (11, 4)]]
    compare(got, (d_s @ projection.T - d_t).square().mean(), leaves, "auto")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_both_ends_of_a_delta(dtype):
    hidden, mask = draw(2, 6, 3).to(dtype), models()[2]
    spoiled = hidden.masked_fill(~mask[..., None], torch.nan)
    for kind, groups in (("deviation", None), ("adjacent", PACKED)):
        (before, after), valid = row_deltas(spoiled, kind, mask=mask, groups=groups, as_layers=True)
        assert before.dtype == after.dtype == dtype
        assert torch.equal(valid, row_deltas(spoiled, kind, mask=mask, groups=groups).mask)
        first, last, _ = ends(hidden.double(), mask, None, kind, groups)
        for got, true in ((before, first), (after, last)):
            close(got, true.masked_fill(~valid[..., None], 0), hidden)


def test_log_probabilities_differ_by_a_constant_of_the_row():
    """So a centred distance of log-probabilities' deltas is one of the logits' deltas."""
    (h_s, w_s), _, _ = models()
    logs = (h_s @ w_s.T).log_softmax(-1).flatten(0, 1)
    of_logits = row_deltas(h_s).rows.flatten(0, 1) @ w_s.T
    difference = ((logs - logs.mean(0)) - of_logits).detach()
    assert_same_sums(difference, difference.mean(-1, keepdim=True).expand_as(difference), 64)


def test_compiled():
    hidden = draw(2, 6, 3).float()
    mask = torch.arange(12).view(2, 6) % 3 != 0
    for kind in ("deviation", "adjacent"):
        torch._dynamo.reset()
        run = torch.compile(row_deltas, fullgraph=True, backend="aot_eager")
        for a, b in zip(run(hidden, kind, mask=mask), row_deltas(hidden, kind, mask=mask)):
            assert torch.equal(a, b)
