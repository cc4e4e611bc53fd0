"""The public function `layer_costs`, and the way from its arguments to the engine's `Call`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fdd_kernels.backends import resolve_backend
from fdd_kernels.engine.evaluate import Call, evaluate
from fdd_kernels.lens import divergences
from fdd_kernels.objectives.alignment.objective import CostObjective, cost_spec
from fdd_kernels.objectives.alignment.options import OF_LOGITS, CostOptions
from fdd_kernels.objectives.inputs import LossInputs
from fdd_kernels.objectives.numbers import check_labels, check_numbers
from fdd_kernels.objectives.reduction import loss_denominator
from fdd_kernels.objectives.validation import (
    check_feature_options,
    check_num_items,
    check_shift,
    check_tensors,
    check_tokens,
    check_transforms,
    compared_tokens,
)


def layer_costs(
    student_hidden: Sequence[Tensor] | Tensor,
    student_weight: Tensor,
    teacher_hidden: Sequence[Tensor] | Tensor,
    teacher_weight: Tensor | None,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    mask: Tensor | None = None,
    token_weights: Tensor | None = None,
    ignore_index: int = -100,
    shift: bool = False,
    cost: str = "kl",
    per_row: bool = False,
    temperature: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    num_items_in_batch: Tensor | float | None = None,
    vocab_size: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Compute how far every layer of the student is from every layer of the teacher, (Ls, Lt).

    With z = softcap(logit_scale * (h W^T + b)) / temperature, p_j = softmax(z_t of layer j) and
    q_i = softmax(z_s of layer i), per token::

        costs[i, j] = D(p_j, q_i)            "kl": KL(p_j || q_i)
                    = |z_s - z_t|^2 / V      "mse"
                    = 1 - cos(z_s, z_t)      "cosine"

    Logits are computed once per layer and tile of the vocabulary (twice for a divergence of two
    passes) and compared Ls x Lt times there: no tensor grows with tokens x vocabulary.
    `align_layers` turns costs into weights, and `(weights * costs).sum()` is a loss. Where the
    models nearly agree the costs keep their leading digits, so that they can serve as weights.

    Gradient flows to the student's hidden states, weight and bias, never to the teacher. The costs
    can be differentiated once. Since the loss is made of them later, the backward pass computes the
    logits again; evaluate under `torch.no_grad()` where the costs only choose a pairing.

    Sources: the matrix of mean squared errors is that of BERT-EMD (Li et al., EMNLP 2020) and
    SemCKD (Chen et al., AAAI 2021); that of divergences over the vocabulary is ours.

    Args:
        student_hidden, teacher_hidden: Ls tensors (..., Ds) and Lt tensors (..., Dt); Ls and Lt may
            differ.
        student_weight, teacher_weight: LM heads (V, Ds) and (V, Dt). `teacher_weight=None` compares
            features: the student's weight then projects to the teacher's width, (Dt, Ds), and the
            cost must be "mse" or "cosine".
        labels, student_bias, teacher_bias, mask, ignore_index, shift, vocab_size: as in
            `fused_fdd_loss`; labels mark valid tokens alone.
        token_weights: (...) constants, at least 0, that multiply every cost of a position.
        cost: a divergence as in `fused_fdd_loss(trajectory=...)`, such as "kl", "reverse_kl",
            "jsd:0.5" or "tv"; or "mse" and "cosine" of the logits.
        per_row: return the costs of every token, (Ls, Lt, ...), 0 where it is not valid.
        temperature: divides the logits.
        student_softcap, teacher_softcap, student_logit_scale, teacher_logit_scale: as in
            `fused_fdd_loss`.
        num_items_in_batch: divides the sums over tokens, in place of the number of valid tokens.
        backend: "auto", "reference", "torch", "cpu" or "triton". Triton compares a student layer
            with one teacher layer; "auto" passes over it where there are more.

    Returns:
        (Ls, Lt), or (Ls, Lt, ...) with `per_row`, in float32; float64 for float64 inputs. Without a
        valid token the costs are 0.

    Raises:
        TypeError, ValueError: an argument of a wrong type, shape, device or range, a teacher tensor
            that requires grad, or options that do not go together; named, before any work.
        RuntimeError: the backend named cannot run here, with the reason and the remedy.
    """
    options = CostOptions(
        cost=cost,
        per_row=per_row,
        temperature=temperature,
        student_softcap=student_softcap,
        teacher_softcap=teacher_softcap,
        student_logit_scale=student_logit_scale,
        teacher_logit_scale=teacher_logit_scale,
        ignore_index=ignore_index,
        shift=shift,
        vocab_size=vocab_size,
        backend=backend,
    )
    inputs = LossInputs(
        student_hidden=student_hidden,
        student_weight=student_weight,
        teacher_hidden=teacher_hidden,
        teacher_weight=teacher_weight,
        labels=labels,
        student_bias=student_bias,
        teacher_bias=teacher_bias,
        mask=mask,
        num_items_in_batch=num_items_in_batch,
        token_weights=token_weights,
    )
    (costs,) = evaluate(_cost_call(inputs, options))
    return costs


def _cost_call(inputs: LossInputs, options: CostOptions) -> Call:
    """Check every argument before any work, and plan the call."""
    inputs = check_tensors(inputs, paired=False)
    if inputs.feature_space:
        check_feature_options(options, OF_LOGITS)
        _check_feature_cost(options.cost)
    columns = compared_tokens(inputs, options.vocab_size)
    check_tokens(inputs)
    check_shift(options.shift, inputs.labels)
    items = inputs.num_items_in_batch
    if options.per_row and items is not None:
        raise ValueError(
            f"num_items_in_batch={items} divides sums over tokens, but per_row=True returns one "
            "cost per token: pass one of the two"
        )
    check_num_items("mean", items)
    layers = len(inputs.student_hidden), len(inputs.teacher_hidden)
    spec = cost_spec(options, columns, *layers)
    backend = resolve_backend(options.backend, inputs.device, spec)
    check_transforms(inputs, backend)
    check_numbers(inputs)
    if options.shift:
        inputs = inputs.shifted(options.ignore_index)
    rows = inputs.flattened(options.ignore_index, *map(range, layers))
    if rows.labels is not None and not inputs.feature_space:
        check_labels(rows.labels, options.ignore_index, len(inputs.student_weight))
    denominator = None
    if not options.per_row:
        denominator = loss_denominator("mean", rows.rows, rows.valid, rows.device, items)
    rows, weights = inputs.weighted(rows._replace(labels=None))
    shape = inputs.leading_shape if options.per_row else None
    objective = CostObjective(options, spec, layers, shape, rows.valid, denominator, weights)
    return Call(objective, rows, backend)


def _check_feature_cost(cost: str) -> None:
    names = divergences.FEATURE_DISTANCES
    if cost not in names:
        raise ValueError(
            f"cost={cost!r} compares distributions, but teacher_weight=None means feature space: "
            f"pass one of {', '.join(map(repr, names))}, or a teacher_weight"
        )
