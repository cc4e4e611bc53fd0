"""fused_gold_loss against its formula in float64, and against TRL's own loss of merged spans.

Budget: what random movements of the logits by their roundings change in float64, and the roundings
of the terms: a token's term and its derivative are products of probabilities with logarithms, of
which each rounds relatively, a sum over the vocabulary behind them. No two sorted probabilities are
so near that roundings could change their order, or which of the two models' is larger.
"""

from __future__ import annotations

import math

import pytest
import torch

from fdd_kernels import fused_gold_loss, fused_rank_kd, selected_logprobs
from fdd_kernels.backends.torch_stream import blocks
from fdd_kernels.lens.row_blocks import ROW_FUNCTIONS
from fdd_kernels.objectives.logits import call as logit_call
from fdd_kernels.testing import assert_same_sums, unit_roundoff
from fdd_kernels.testing.dense_call import gemm_rounding, summation_rounding
from tests.support.allocations import allocated_peak

F32, F64 = torch.float32, torch.float64
ROWS, SIZES, MATCHED = 10, (20, 27), 9


def problem(dtype=F64, sizes=SIZES, matched=MATCHED, rows=ROWS, spread=1.0):
    """Student and teacher of different vocabularies, and the ids of the same tokens."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=F64).to(dtype)

    ids = torch.stack([torch.randperm(n, generator=generator)[:matched] for n in sizes])
    weights = [spread * normal(n, width) for n, width in zip(sizes, (8, 5))]
    student = normal(rows, 8).requires_grad_(), (0.7 * weights[0]).requires_grad_()
    return [*student, normal(rows, 5), weights[1], ids]


def oracle(
    h, w, t, wt, ids, beta=0.5, weights=None, scales=(None, None), temperature=1.0, move=None
):
    """Per row, from probabilities; `move` changes the logits."""
    z = [a @ b.T for a, b in ((h, w), (t, wt))]
    z = z if move is None else [x + move(i, x.detach()) for i, x in enumerate(z)]
    q, p = ((x / temperature).softmax(-1) for x in z)
    q, p = (x if c is None else x * c.exp()[:, None] for x, c in zip((q, p), scales))
    a, b = q[:, ids[0]], p[:, ids[1]]
    m = beta * b + (1 - beta) * a
    if beta in (0, 1):
        matched = a * (a / b).log() if beta else b * (b / a).log()
    else:
        matched = beta * b * (b / m).log() + (1 - beta) * a * (a / m).log()
    left = sorted_others(q, p, ids)
    unmatched = (left[0] - left[1]).abs().sum(-1) if left else 0.0
    first, second = weights_of(p, ids, weights)
    return first * matched.sum(-1) + second * unmatched


def weights_of(p, ids, weights):
    share = ids.shape[1] / p.shape[1]
    return weights or (share, 1 - share)


def sorted_others(q, p, ids):
    """The sorted probabilities of unmatched tokens, padded to one number; none if one has none."""
    left = []
    for x, of_side in ((q, ids[0]), (p, ids[1])):
        is_left = torch.ones(x.shape[1], dtype=torch.bool).index_fill(0, of_side, False)
        left.append(x[:, is_left])
    if not all(x.shape[1] for x in left):
        return []
    size = max(x.shape[1] for x in left)
    return [
        torch.nn.functional.pad(x.sort(-1, descending=True).values, (0, size - x.shape[1]))
        for x in left
    ]


def logit_rounding(h, w, unit):
    """How far off logits (R, V) may be: a GEMM, three roundings, and their log-sum-exp."""
    of_gemm = gemm_rounding(h, w, None, unit) + 3 * unit * (h @ w.T).abs()
    return of_gemm + summation_rounding(len(w), unit)


def term_roundings(h, w, t, wt, ids, unit, weights=None, scales=(None, None), temperature=1.0):
    """How far off the summand of each token and its derivative may be, (R, V): four roundings of a
    probability, whose exponent has a rounding too, and of its logarithm.
    """
    logs = [(a @ b.T / temperature).log_softmax(-1) for a, b in ((h, w), (t, wt))]
    logs = [x if c is None else x + c[:, None] for x, c in zip(logs, scales)]
    (q, p), (first, second) = (x.exp() for x in logs), weights_of(logs[1], ids, weights)
    a, b, log_a, log_b = q[:, ids[0]], p[:, ids[1]], logs[0][:, ids[0]], logs[1][:, ids[1]]
    matched = first * (a + b) * (1 + log_a.abs() + log_b.abs())
    return 4 * unit * (second * q * (1 + logs[0].abs())).index_copy(1, ids[0], matched)


def assert_exact(p, found, reduce=torch.mean, leaf_scale=None, **options) -> None:
    """Compare a result, and the gradients of h, w and perhaps the student's log-scales.

    `reduce` makes of the values of rows the scalar that was differentiated, and is linear.
    """
    low = p[1].dtype
    unit = 2 * unit_roundoff(F64) if low == F64 else unit_roundoff(F32)
    wide = [x.detach().double().requires_grad_(x.requires_grad) for x in p[:4]]
    leaves = wide[:2] if leaf_scale is None else [*wide[:2], leaf_scale]
    h, w, t, wt = (x.detach() for x in wide)
    off = [logit_rounding(*model, unit) for model in ((h, w), (t, wt))]
    temperature = options.get("temperature", 1.0)
    assert_away_from_ties(h, w, t, wt, p[4], options, 2 * sum(float(x.max()) for x in off))

    def exact(move=None):
        value = reduce(oracle(*wide, p[4], move=move, **options))
        return [value.detach(), *torch.autograd.grad(value, leaves)]

    moved = []
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)

        def move(i, x, generator=generator):
            return off[i] * (2 * torch.rand(x.shape, generator=generator, dtype=F64) - 1)

        moved.append(exact(move))
    zero = torch.zeros_like(off[0]).requires_grad_()
    value = oracle(*wide, p[4], move=lambda i, x: zero if i == 0 else 0.0, **options)
    (of_logits,) = torch.autograd.grad(reduce(value), zero)
    rows = torch.zeros(len(h), dtype=F64).requires_grad_()
    (factor,) = torch.autograd.grad(reduce(rows), rows)
    of_terms = {name: value for name, value in options.items() if name != "beta"}
    apart = factor.abs()[:, None] * term_roundings(h, w, t, wt, p[4], unit, **of_terms).detach()
    # Roundings of terms are independent; that of their sum is common to a row's tokens.
    of_row = apart.norm(dim=1, keepdim=True)
    common = of_row * (h @ w.T / temperature).softmax(-1)
    squares = (apart.square() + common.square()) / temperature**2
    own = [
        of_row.norm(),
        (squares @ w.square()).sqrt(),
        (squares.T @ h.square()).sqrt(),
        of_row[:, 0],
    ]
    relative = unit * (math.sqrt(max(len(w), len(wt))) + math.sqrt(len(h)) + 12)
    grad = of_logits.abs()
    sums = [value.abs().detach() @ factor.abs(), grad @ w.abs(), grad.T @ h.abs()]
    sums.append(temperature * grad.sum(1))
    for i, (got, true, terms, total) in enumerate(zip(found, exact(), own, sums)):
        movement = torch.stack([m[i] - true for m in moved]).abs().amax(0)
        movement = movement.clamp(min=float(movement.mean()))
        bound = relative * (true.abs() + total) + terms + 2 * movement
        bound = bound + unit_roundoff(low) * true.abs()
        error = (got.detach().double() - true).abs()
        assert (error <= bound).all(), (
            f"result {i}: {float((error / bound).max()):.2g} of its bound"
        )


def assert_away_from_ties(h, w, t, wt, ids, options, logits_off) -> None:
    """No sorted probabilities may change their order by rounding, or the gradient jumps."""
    temperature, scales = options.get("temperature", 1.0), options.get("scales", (None, None))
    q, p = ((a @ b.T / temperature).softmax(-1) for a, b in ((h, w), (t, wt)))
    q, p = (x if c is None else x * c.detach().exp()[:, None] for x, c in zip((q, p), scales))
    gaps, left = [], sorted_others(q, p, ids)
    if left:
        own, other = (x[:, : len(w) - ids.shape[1]] for x in left)
        gaps = [(own - other).abs() / own, (own[:, :-1] - own[:, 1:]) / own[:, 1:]]
    least = min([float(g.min()) for g in gaps if g.numel()], default=math.inf)
    most = 2 * logits_off / temperature
    assert least > most, f"choose another seed: a gap of {least:.1e}, roundings of {most:.1e}"


class TestFormula:
    @pytest.mark.parametrize("way", ["torch", "reference"])
    @pytest.mark.parametrize("beta", [0, 0.1, 0.5, 1])
    @pytest.mark.parametrize("weights", [None, (0.3, 0.0), (0, 2)])
    @pytest.mark.parametrize("dtype", [F32, F64], ids=str)
    def test_values_and_gradients(self, beta, weights, dtype, way):
        p = problem(dtype)
        named = dict(zip(("matched_weight", "unmatched_weight"), weights or (None, None)))
        value = fused_gold_loss(*p, jsd_beta=beta, temperature=2.0, backend=way, **named)
        found = [value, *torch.autograd.grad(value, p[:2])]
        assert_exact(p, found, beta=beta, weights=weights, temperature=2.0)

    @pytest.mark.parametrize("way", ["torch", "reference"])
    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    @pytest.mark.parametrize("beta", [0, 0.4, 1])
    def test_log_scales_and_their_gradient(self, beta, reduction, way):
        p, options = problem(), {"reduction": reduction, "temperature": 2.0, "scale_by_t2": True}
        scales = [-torch.arange(ROWS, dtype=F64) / n for n in (4, 7)]
        mask = torch.arange(ROWS) != 3
        scales[0][3] = -torch.inf  # of a position that is left out
        leaves = [*p[:2], scales[0].requires_grad_()]
        names = "student_log_scale", "teacher_log_scale"
        token_weights = torch.linspace(0.5, 2, ROWS)
        value = fused_gold_loss(
            *p,
            **dict(zip(names, scales)),
            jsd_beta=beta,
            mask=mask,
            token_weights=token_weights,
            backend=way,
            **options,
        )
        upstream = torch.linspace(-1, 2, ROWS, dtype=F64) if reduction == "none" else None
        gradients = torch.autograd.grad(value, leaves, upstream)
        kept = mask.nonzero()[:, 0]
        assert not gradients[0][3].any()
        assert not gradients[2][3]
        factor = 4 * token_weights[kept].double() / (ROWS - 1 if reduction == "mean" else 1)
        factor = factor if upstream is None else factor * upstream[kept]
        leaf = scales[0].detach()[kept].requires_grad_()
        total = value.detach() if upstream is None else (value.detach() * upstream).sum()
        assert_exact(
            [p[0].detach()[kept].requires_grad_(), p[1], p[2][kept], p[3], p[4]],
            [total, gradients[0][kept], gradients[1], gradients[2][kept]],
            reduce=lambda values: (factor * values).sum(),
            leaf_scale=leaf,
            beta=beta,
            scales=(leaf, scales[1][kept]),
            temperature=2.0,
        )

    @pytest.mark.parametrize("way", ["torch", "reference"])
    def test_without_a_match_it_is_uld(self, way):
        p = problem(matched=0)
        for value in (fused_gold_loss(*p, backend=way), fused_rank_kd(*p[:4], kind="uld")):
            assert_exact(p, [value, *torch.autograd.grad(value, p[:2])])

    @pytest.mark.parametrize("way", ["torch", "reference"])
    @pytest.mark.parametrize("sizes", [(9, 27), (27, 9), (9, 9)])
    def test_where_one_side_is_all_matched_nothing_is_sorted(self, sizes, way):
        """As in TRL."""
        p = problem(sizes=sizes)
        value = fused_gold_loss(*p, backend=way)
        assert_exact(p, [value, *torch.autograd.grad(value, p[:2])])

    @pytest.mark.parametrize("rows", [1, 3])
    def test_row_blocks(self, rows, monkeypatch):
        monkeypatch.setattr(blocks, "block_rows", lambda *_: rows)
        self.test_log_scales_and_their_gradient(0.4, "mean", "torch")
        self.test_values_and_gradients(0.5, None, F32, "torch")

    def test_compiled(self):
        torch._dynamo.reset()
        p = problem(F32)

        def step(hidden, weight):
            return fused_gold_loss(2 * hidden, weight, *p[2:])

        outcomes = []
        for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
            value = function(*p[:2])
            outcomes.append([value, *torch.autograd.grad(value, p[:2])])
        for a, b in zip(*outcomes):
            torch.testing.assert_close(a, b)


def test_spans_of_trl():
    """Its alignment by byte offsets, its merged distributions, and its loss of them."""
    gold_trainer = pytest.importorskip("trl.experimental.gold.gold_trainer")
    loss = object.__new__(gold_trainer.ULDLoss)
    # No probability is near 1e-8, where TRL clamps.
    p, generator = problem(spread=0.3), torch.Generator().manual_seed(1)
    ids = [torch.randint(0, n, (ROWS,), generator=generator) for n in SIZES]
    ends = [[2, 3, 5, 6, 9, 11, 12, 15, 17, 20], [1, 3, 4, 6, 10, 12, 14, 15, 19, 20]]
    offsets = [list(zip([0, *e[:-1]], e)) for e in ends]
    groups = gold_trainer.ULDLoss._align_by_byte_offsets(*offsets)
    loss.__dict__ |= {
        "token_merge_strategy": "observed",
        "beta": 0.5,
        "hybrid_matched_weight": None,
        "_teacher_matched_ids": set(p[4][1].tolist()),
        "mapping_tensor": torch.zeros(SIZES[1], dtype=torch.int64).index_put((p[4][1],), p[4][0]),
        "use_hybrid_loss": True,
    }
    merged = [
        loss._merge_probabilities_with_alignment_groups((h @ w.T).softmax(-1), spans, of_side)
        for h, w, spans, of_side in zip(p[0:4:2], p[1:4:2], groups, ids)
    ]
    expected = loss._compute_hybrid_uld_loss(*merged)
    # The same by ours: the first position of each span, times its other tokens' probabilities.
    hidden, scales = [], []
    for h, w, spans, of_side in zip(p[0:4:2], p[1:4:2], groups, ids):
        logprobs = selected_logprobs(h, w, of_side)
        hidden.append(h[[span[0] for span in spans]])
        scales.append(torch.stack([logprobs[span[1:]].sum() for span in spans]))
    value = fused_gold_loss(
        hidden[0],
        p[1],
        hidden[1],
        p[3],
        p[4],
        student_log_scale=scales[0],
        teacher_log_scale=scales[1],
    )
    results = [[x, *torch.autograd.grad(x, p[:2])] for x in (value, expected)]
    for got, true in zip(*results):
        assert_same_sums(got.detach(), true.detach(), 16 * (SIZES[1] + 8 + ROWS))


@pytest.mark.parametrize("scaled", [False, True])
def test_memory(scaled):
    rows, columns = 64, 8192
    p = problem(F32, (columns, columns), columns // 2, rows)
    scale = torch.zeros(rows, requires_grad=True) if scaled else None

    def run():
        value = fused_gold_loss(*p, student_log_scale=scale)
        return torch.autograd.grad(value, p[:2])

    allowed = (ROW_FUNCTIONS["gold"].matrices + blocks._OWN_MATRICES) * 4 * rows * columns
    peak = allocated_peak(run)
    assert peak <= allowed, peak / (4 * rows * columns)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"jsd_beta": 1.5}, ValueError, r"^jsd_beta=1.5 is not in \[0, 1\]"),
        (
            {"matched_weight": 1.0},
            ValueError,
            "^matched_weight=1.0 and unmatched_weight=None: pass",
        ),
        ({"matched_ids": [1]}, TypeError, "^matched_ids must be a tensor of int64 or int32, got l"),
        ({"matched_ids": torch.zeros(2, 3)}, TypeError, "^matched_ids must be a tensor of int64"),
        (
            {"matched_ids": torch.arange(3)},
            ValueError,
            r"^matched_ids has shape \(3,\): it must be",
        ),
        ({"matched_ids": torch.tensor([[1], [27]])}, ValueError, "^matched_ids contains 27, which"),
        ({"matched_ids": torch.tensor([[-1], [2]])}, ValueError, "^matched_ids contains -1, which"),
        (
            {"matched_ids": torch.tensor([[1, 1], [2, 3]])},
            ValueError,
            "of the student twice: match",
        ),
        ({"student_log_scale": torch.zeros(3)}, ValueError, "^student_log_scale is a float32"),
        ({"student_log_scale": 0.5}, TypeError, "^student_log_scale must be a tensor"),
        (
            {"teacher_log_scale": torch.zeros(ROWS, requires_grad=True)},
            ValueError,
            "^teacher_log_scale requires grad.*detach",
        ),
        ({"teacher_vocab_size": 28}, ValueError, "^teacher_vocab_size=28 is larger than"),
        ({"temperature": math.nan}, ValueError, "^temperature=nan must be finite"),
    ],
)
def test_errors(changes, error, message, monkeypatch):
    def fail(*_, **__):
        raise AssertionError("work was done before the arguments were checked")

    for name in ("row_sum", "row_values", "dense_logits"):
        monkeypatch.setattr(logit_call, name, fail)
    names = "student_hidden", "student_weight", "teacher_hidden", "teacher_weight", "matched_ids"
    with pytest.raises(error, match=message):
        fused_gold_loss(**{**dict(zip(names, problem())), **changes})
