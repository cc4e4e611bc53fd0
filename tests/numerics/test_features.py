"""attention_transfer, norm_direction_loss and relational_kd against their dense formulas in
float64, near agreement, and their invariances.

Budgets: u float64's or float32's unit roundoff; a sum of n products rounds by n u of its terms.
"""

import functools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from fdd_kernels import attention_transfer, gram_loss, norm_direction_loss, relational_kd
from fdd_kernels.objectives.features import streams
from fdd_kernels.objectives.features.relational import MOST_SAMPLES_WITH_ANGLES
from tests.support.allocations import allocated_peak
from tests.support.grams import unit

U = unit(torch.float64)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def run(function, s, *others, **options):
    """Return a loss and its gradient, upstream 1."""
    s = s.detach().requires_grad_()
    value = function(s, *others, **options)
    (gradient,) = torch.autograd.grad(value.sum(), s)
    return value.detach(), gradient


def check(got, true, terms: int, size: float = 1.0, work: float = U) -> None:
    """Compare values and gradients: `terms` roundings of `work` relative to `size`, then one each
    of the result and of the gradient in their dtypes.
    """
    for a, b in zip(got, true):
        smallest = torch.finfo(a.dtype).smallest_normal * torch.finfo(a.dtype).eps
        bound = terms * work * size * max(1.0, float(b.abs().max()))
        assert ((a.double() - b).abs() <= bound + unit(a.dtype) * b.abs() + smallest).all()


def maps(h, mask=None):
    squares = h.square().mean(-1)
    return F.normalize(squares if mask is None else squares * mask, dim=-1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_transfer(dtype):
    s, t = draw(2, 7, 5).to(dtype), draw(2, 7, 6, seed=1).to(dtype)
    true = run(lambda a: (maps(a) - maps(t.double())).square().mean(), s.double())
    got = run(attention_transfer, s, t)
    assert got[0].dtype == (dtype if dtype == torch.float64 else torch.float32)
    check(got, true, 8 * (7 + 6))


def test_attention_transfer_with_a_mask_and_reductions():
    s, t = draw(2, 7, 5), draw(2, 7, 6, seed=1)
    mask = torch.arange(14).view(2, 7).remainder(3) != 0
    each = (maps(s, mask) - maps(t, mask)).square() * mask
    spoiled = [m.masked_fill(~mask[..., None], torch.nan) for m in (s, t)]
    call = functools.partial(attention_transfer, *spoiled, mask=mask.int())
    for got, true in (
        (call(), each.sum() / mask.sum()),
        (call(reduction="sum"), each.sum()),
        (call(num_items_in_batch=5), each.sum() / 5),
        (call(reduction="none"), each),
    ):
        check([got], [true], 8 * (7 + 6))
    gradient = run(attention_transfer, spoiled[0], spoiled[1], mask=mask)[1]
    assert (gradient[~mask] == 0).all()
    assert gradient.isfinite().all()
    assert attention_transfer(0 * s, t) > 0
    assert (run(attention_transfer, 0 * s, t)[1] == 0).all()


def test_attention_transfer_keeps_its_digits_near_agreement():
    """The maps are float64: their difference is off by u / e of itself for a relative change e."""
    s = draw(1, 6, 4).float()
    t = s * (1 + 2.0**-20 * torch.arange(6).remainder(2)[:, None])
    true = run(lambda a: (maps(a) - maps(t.double())).square().mean(), s.double())
    got = run(attention_transfer, s, t)
    for a, b in zip(got, true):
        bound = 16 * (6 + 4) * U * 2**20 + unit(torch.float32)
        assert ((a.double() - b).abs() <= bound * b.abs().max()).all()


@given(seed=st.integers(0, 2**16), scale=st.sampled_from([0.1, 3.0]))
def test_attention_transfer_is_blind_to_rotation_and_size(seed, scale):
    s, t = draw(2, 5, 4, seed=seed), draw(2, 5, 4, seed=seed + 1)
    turned = scale * s @ torch.linalg.qr(draw(4, 4, seed=seed + 2))[0]
    check([attention_transfer(turned, t)], [attention_transfer(s, t)], 8 * (5 + 4 + 4))


def norm_direction(s, t, means, labels):
    c = F.normalize(means[labels], dim=-1)
    return 1 - (s * c).sum(-1) / torch.maximum(s.norm(dim=-1), t.norm(dim=-1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_direction_loss(dtype):
    s, t, means = draw(3, 4, 6), draw(3, 4, 6, seed=1), draw(5, 6, seed=2)
    s, t, means = (m.to(dtype) for m in (s, t, means))
    labels = torch.arange(12).view(3, 4).remainder(5)
    true = run(lambda a: norm_direction(a, t.double(), means.double(), labels).mean(), s.double())
    got = run(norm_direction_loss, s, t, means, labels)
    check(got, true, 8 * (6 + 12), work=unit(got[0].dtype))


def test_norm_direction_loss_with_labels_mask_and_reductions():
    s, t, means = draw(3, 4, 6), draw(3, 4, 6, seed=1), draw(5, 6, seed=2)
    labels = torch.arange(12).view(3, 4).remainder(5)
    valid = (torch.arange(12).remainder(3) != 0).view(3, 4)
    mask = (torch.arange(12) < 10).view(3, 4)
    each = norm_direction(s, t, means, labels) * (valid & mask)
    s, t = (m.masked_fill(~(valid & mask)[..., None], torch.nan) for m in (s, t))
    labels = labels.where(valid, -1)
    call = functools.partial(norm_direction_loss, s, t, means, labels, mask=mask, ignore_index=-1)
    for got, true in (
        (call(), each.sum() / (valid & mask).sum()),
        (call(reduction="sum"), each.sum()),
        (call(num_items_in_batch=5), each.sum() / 5),
        (call(reduction="none"), each),
    ):
        check([got], [true], 8 * (6 + 12))
    gradient = run(norm_direction_loss, s, t, means, labels, mask=mask, ignore_index=-1)[1]
    assert (gradient[~(valid & mask)] == 0).all()


def test_norm_direction_loss_keeps_its_digits_where_it_is_small():
    """As the formula stands in float32, a loss of 5e-9 would be rounding of 1."""
    means = draw(1, 6).float()
    s = 2 * means * (1 + 1e-4 * draw(1, 6, seed=1)).float()
    label = torch.zeros(1, dtype=torch.int64)
    true = run(
        lambda a: norm_direction(a, s.double() / 2, means.double(), label).mean(), s.double()
    )
    got = run(norm_direction_loss, s, s / 2, means, label)
    for a, b in zip(got, true):
        bound = 8 * 6 * unit(torch.float32) * 1e4
        assert ((a.double() - b).abs() <= bound * b.abs().max()).all()


def test_norm_direction_loss_of_vectors_without_direction():
    t, means, labels = draw(3, 4), torch.cat([draw(1, 4), torch.zeros(1, 4)]), torch.zeros(3).long()
    labels[1] = 1
    s = draw(3, 4, seed=1)
    s[0], s[2] = 0, 0
    t[2] = 0
    value, gradient = run(norm_direction_loss, s, t, means, labels, reduction="none")
    assert (value == 1).all()
    assert (gradient[1:] == 0).all()
    assert gradient.isfinite().all()


def test_where_the_lengths_are_equal_the_gradient_is_that_of_the_student():
    """As Python's max in the authors' code, of which the student's length is the first argument."""
    s, c = draw(1, 4), draw(1, 4, seed=1)
    label = torch.zeros(1, dtype=torch.int64)
    true = run(lambda a: 1 - F.cosine_similarity(a, c), s)
    check(run(norm_direction_loss, s, s.clone(), c, label), true, 8 * (4 + 12))


@given(seed=st.integers(0, 2**16), factor=st.sampled_from([0.1, 3.0]))
def test_norm_direction_loss_is_blind_to_rotation_and_sizes(seed, factor):
    s, t, c = (draw(6, 4, seed=seed + k) for k in range(3))
    labels = torch.arange(6)
    turn = torch.linalg.qr(draw(4, 4, seed=seed + 3))[0]
    expected = norm_direction_loss(s, t, c, labels, reduction="none")
    assert ((expected >= -16 * U) & (expected <= 2 + 16 * U)).all()
    for a, b, means in ((s @ turn, t @ turn, factor * c @ turn), (factor * s, factor * t, c)):
        check(
            [norm_direction_loss(a, b, means, labels, reduction="none")], [expected], 8 * (6 + 12)
        )


def relations(s, t, distance_weight=25.0, angle_weight=50.0):
    """mdistiller's RKD, with distances between rows themselves, and a gradient of 0 instead of 1e12
    between equal rows.
    """

    def distances(x):
        d = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
        return d / d[d > 0].mean()

    def angles(x):
        e = x[None] - x[:, None]
        squares = e.square().sum(-1, keepdim=True)
        e = e * squares.masked_fill(squares == 0, torch.inf).rsqrt()
        return e @ e.mT

    return distance_weight * F.smooth_l1_loss(
        distances(s), distances(t)
    ) + angle_weight * F.smooth_l1_loss(angles(s), angles(t))


@pytest.mark.parametrize("weights", [(25.0, 50.0), (25.0, 0.0), (0.0, 50.0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_relational_kd(dtype, weights):
    s, t = draw(9, 5).to(dtype), draw(9, 6, seed=1).to(dtype)
    true = run(lambda a: relations(a, t.double(), *weights), s.double())
    got = run(relational_kd, s, t, distance_weight=weights[0], angle_weight=weights[1])
    # squares of distances round by (D + 2) u of squared lengths, up to 40 times the square
    sizes = max(float(2 * m.double().square().sum(-1).max()) for m in (s, t))
    least = min(float(torch.pdist(m.double()).min()) for m in (s, t)) ** 2
    check(got, true, 8 * (9 + 6), sum(weights) * sizes / least)


def test_relational_kd_with_a_mask():
    s, t, mask = draw(2, 6, 4), draw(2, 6, 4, seed=1), torch.arange(12).view(2, 6) % 4 != 0
    true = run(relational_kd, s[mask], t[mask])
    s, t = (m.masked_fill(~mask[..., None], torch.nan) for m in (s, t))
    value, gradient = run(relational_kd, s, t, mask=mask)
    check((value, gradient[mask]), true, 64 * 12, 75)
    assert (gradient[~mask] == 0).all()
    nothing = run(relational_kd, s, t, mask=torch.zeros(2, 6, dtype=torch.bool))
    assert nothing[0] == 0
    assert (nothing[1] == 0).all()


def test_equal_samples_have_distance_and_gradient_zero():
    s, t = draw(4, 5) + 100, draw(4, 5, seed=1)
    s[1], t[2] = s[0], t[3]
    check(run(relational_kd, s, t), run(lambda a: relations(a, t), s), 8 * 9, 75 * 1e4)
    value, gradient = run(relational_kd, s[:1].expand(4, 5), t)
    assert value.isfinite()
    assert (gradient == 0).all()


@given(seed=st.integers(0, 2**16), r=st.integers(1, 8))
def test_relations_are_blind_to_motion_and_size(seed, r):
    s, t = draw(r, 4, seed=seed), draw(r, 3, seed=seed + 1)
    expected = relational_kd(s, t)
    moved = 3 * (s + 2) @ torch.linalg.qr(draw(4, 4, seed=seed + 2))[0]
    order = torch.randperm(r, generator=torch.Generator().manual_seed(seed))
    for a, b in ((moved, t), (s, -t / 5), (s[order], t[order])):
        check([relational_kd(a, b)], [expected], 64 * 12, 75 * 100)
    check([relational_kd(s, 2 * s + 1)], [torch.zeros(())], 64 * 12, 75)


def test_distances_in_blocks(monkeypatch):
    s, t = draw(50, 4), draw(50, 5, seed=1)
    whole = run(relational_kd, s, t)
    monkeypatch.setattr(streams, "BLOCK_NUMBERS", 350)
    check(run(relational_kd, s, t), whole, 64 * 50, 75)


def test_distances_hold_no_square_tensor(monkeypatch):
    """A block's tensors, and float64 rows of both models; 1024 x 1024 in float64 are 8 MiB."""
    monkeypatch.setattr(streams, "BLOCK_NUMBERS", 2**14)
    s, t = draw(1024, 4).requires_grad_(), draw(1024, 4, seed=1)

    def call():
        return torch.autograd.grad(relational_kd(s, t, angle_weight=0.0), s)

    assert allocated_peak(call) <= 16 * 2**14 * 8 + 16 * s.nbytes


def test_angles_of_many_samples_are_refused():
    s = torch.zeros(MOST_SAMPLES_WITH_ANGLES + 1, 2)
    with pytest.raises(
        ValueError, match=r"angle_weight=50.0 with 513 samples.*R\^3.*angle_weight=0"
    ):
        relational_kd(s, s)
    assert relational_kd(s, s, angle_weight=0.0) == 0


@pytest.mark.parametrize(
    "function",
    [
        attention_transfer,
        norm_direction_loss,
        pytest.param(relational_kd, marks=pytest.mark.slow),
    ],
)
def test_compiled(function):
    s, t = draw(2, 5, 4).float(), draw(2, 5, 4, seed=1).float()
    others = ()
    if function is norm_direction_loss:
        others = draw(3, 4).float(), torch.arange(10).view(2, 5) % 3
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(compiled, s, t, *others), run(function, s, t, *others)):
        assert (a - b).abs().max() <= 32 * unit(torch.float32) * b.abs().max()


@pytest.mark.parametrize(
    "kind", ["sp", "cka", "nst", "ickd", "attention", "direction", "relations"]
)
def test_autocast_changes_nothing(kind):
    """Sums are float64, and what is elementwise is not cast."""
    s, t = draw(2, 5, 4).float(), draw(2, 5, 4, seed=1).float()
    functions = {
        "attention": attention_transfer,
        "direction": functools.partial(
            norm_direction_loss,
            class_means=draw(3, 4).float(),
            labels=torch.arange(10).view(2, 5) % 3,
        ),
        "relations": relational_kd,
    }
    function = functions.get(kind) or functools.partial(gram_loss, kind=kind)
    expected = run(function, s, t)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(function, s, t)
    for a, b in zip(got, expected):
        assert a.dtype == b.dtype
        assert (a - b).abs().max() <= 32 * unit(torch.float32) * b.abs().max()
