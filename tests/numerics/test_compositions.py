"""advantage_kd, and block-wise logits through fused_fdd_loss, against dense formulas in float64."""

import pytest
import torch
import torch.nn.functional as F

from fdd_kernels import advantage_kd, fused_fdd_loss
from fdd_kernels.testing import assert_same_sums


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def compare(got, true, leaves) -> None:
    pairs = zip(
        (got, *torch.autograd.grad(got.sum(), leaves, retain_graph=True)),
        (true, *torch.autograd.grad(true.sum(), leaves)),
    )
    for a, b in pairs:
        assert_same_sums(a.detach() / 4, b.detach() / 4, 8 * (10 + 13 + 6))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_advantage_kd(backend, reduction):
    h_s, w_s = draw(2, 5, 4).requires_grad_(), draw(13, 4, seed=1).requires_grad_()
    policy, reference = (
        (draw(2, 5, 6, seed=2), draw(13, 6, seed=3)),
        (
            draw(2, 5, 5, seed=4),
            draw(13, 5, seed=5),
        ),
    )
    biases = draw(13, seed=6), draw(13, seed=7)
    labels = torch.arange(10).view(2, 5).where(draw(2, 5, seed=8) > -0.5, -100)
    temperature = 1.5
    lq, lp, lr = (
        ((h @ w.T + b) / temperature).log_softmax(-1)
        for (h, w), b in (((h_s, w_s), 0), (policy, biases[0]), (reference, biases[1]))
    )
    each = -(lq.exp() * (lp - lr)).sum(-1) * (labels != -100)
    true = {"mean": each.sum() / (labels != -100).sum(), "sum": each.sum(), "none": each}
    got = advantage_kd(
        h_s,
        w_s,
        *policy,
        *reference,
        labels,
        policy_bias=biases[0],
        reference_bias=biases[1],
        temperature=temperature,
        reduction=reduction,
        backend=backend,
    )
    compare(got, true[reduction], (h_s, w_s))


def test_advantage_kd_refuses_what_it_does_not_know():
    h, w = draw(3, 4), draw(7, 4)
    with pytest.raises(
        TypeError, match="trajectory is not an option of advantage_kd: use student_b"
    ):
        advantage_kd(h, w, h, w, h, w, trajectory="kl")
    with pytest.raises(TypeError, match="policy_hidden must be a tensor, got list: pass the final"):
        advantage_kd(h, w, [h], w, h, w)
    with pytest.raises(ValueError, match=r"teacher_hidden\[0\] requires grad"):
        advantage_kd(h, w, h.clone().requires_grad_(), w, h, w)


def test_block_wise_logits(backend):
    """Stepping stones: the student's first blocks, then the teacher's others and its head.

    The teacher's head is a constant on both sides; gradient goes through the teacher's blocks to
    the student's.
    """
    states = [draw(2, 5, 4, seed=k).requires_grad_() for k in range(3)]
    blocks = [draw(6, 4, seed=10 + k) for k in range(2)]
    own_head, teacher_head, h_t = draw(13, 4, seed=20), draw(13, 6, seed=21), draw(2, 5, 6, seed=22)
    own_head.requires_grad_()
    weights, labels = (0.5, 2.0), torch.arange(10).view(2, 5)

    # what the teacher's remaining blocks and final norm make of the student's states
    stones = [torch.tanh(h @ block.T) for h, block in zip(states, blocks)]

    lp = (h_t @ teacher_head.T).log_softmax(-1)
    true = F.cross_entropy((states[2] @ own_head.T).flatten(0, 1), labels.flatten())
    for weight, stone in zip((*weights, None), (*stones, states[2])):
        head = own_head if weight is None else teacher_head
        lq = (stone @ head.T).log_softmax(-1)
        kl = (lp.exp() * (lp - lq)).sum(-1).mean()
        true = true + (1.0 if weight is None else weight) * kl

    of_stones = fused_fdd_loss(
        [*stones, stones[-1]],
        teacher_head,
        [h_t] * 3,
        teacher_head,
        layer_weights=weights,
        alpha=2.0,  # the trajectory is a mean over layers: as many as there are stones
        beta=0.0,
        output_kd_weight=0.0,
        backend=backend,
    )
    of_output = fused_fdd_loss(
        states[2], own_head, h_t, teacher_head, labels, ce_weight=1.0, backend=backend
    )
    compare(of_stones + of_output, true, (*states, own_head))
