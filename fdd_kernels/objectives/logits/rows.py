"""A caller's own function of a block of logits as an objective."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fdd_kernels.lens.row_blocks import GradOf, RowBlock
from fdd_kernels.objectives.logits.arguments import Model, Positions, Reduction, logit_arguments
from fdd_kernels.objectives.logits.call import Formula, LogitCall
from fdd_kernels.objectives.logits.eager import outside_compiler
from fdd_kernels.objectives.logits.temperature import STD, at_temperature, encode_temperature
from fdd_kernels.objectives.numbers import debugging, describe
from fdd_kernels.objectives.option_checks import require_number
from fdd_kernels.objectives.tensors import require_plain

# That autograd holds beside `fn`'s.
_MATRICES_OF_STD = 3


@outside_compiler("it calls a Python function on one block of rows after another")
def fused_rows(
    fn: Callable[..., Tensor],
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    *per_row: Tensor,
    temperature: float | str = 1.0,
    scale_by_t2: bool = False,
    matrices: float = 12,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    token_weights: Tensor | None = None,
    ignore_index: int = -100,
    shift: bool = False,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    reduction: str = "mean",
    num_items_in_batch: Tensor | float | None = None,
    vocab_size: int | None = None,
    teacher_vocab_size: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """A loss of your own, in memory that does not grow with tokens x vocabulary.

    Calls `fn(z_s, z_t, *per_row)` on one block of r valid rows at a time, with the logits z_s (r,
    V) and z_t (r, Vt) after bias, scale, soft cap and temperature (z_t None without a teacher), in
    float32 (float64 for float64 inputs). It returns (r,), a value per row, differentiable in z_s::

        def focal_kl(z_s, z_t, focus):
            log_q, log_p = z_s.log_softmax(-1), z_t.log_softmax(-1)
            return focus * (log_p.exp() * (log_p - log_q)).sum(-1)

    torch's autograd differentiates `fn` within the block. In memory this is a fused loss; in time
    it is what `fn` and its backward take, beside each GEMM once.

    `fn` must treat every row alone, whatever rows are with it: blocks may have any size, and rows
    that are not valid are in none. This cannot be checked. It must change neither its arguments nor
    anything else: by reduction="none" it runs again in backward. No gradient flows to `per_row`, to
    the teacher or to tensors that `fn` has from elsewhere, such as parameters.

    Gradients are formed in the forward pass (by "none" in the backward pass, from the logits
    computed again) and wait in float32; evaluate under `torch.no_grad()`. The loss can be
    differentiated once. The compiler does not record `fn`: under torch.compile the call is left to
    eager mode, and with fullgraph=True it is an error.

    Args:
        fn: the function, as above.
        student_hidden, teacher_hidden: final, normed hidden states (..., Ds) and (..., Dt).
        student_weight, teacher_weight: LM heads (V, Ds) and (Vt, Dt) as in `nn.Linear`; the
            vocabularies may differ.
        per_row: tensors (..., *) of any dtype with an entry for each position, such as labels or
            ids; `fn` gets those of its rows, (r, *). Never shifted.
        temperature: divides the logits; "std" divides each row's by their standard deviation
            (unbiased, over tokens that can occur), with gradient through it.
        scale_by_t2: multiply the loss by temperature squared.
        matrices: how many (r, V) matrices of 4 bytes an entry `fn` and its backward hold at a time,
            logits and gradient among them; of `fn` without autograd's memory add what it saves.
            A block has as many rows as fit 128 MiB on a CPU and 1 GiB elsewhere, or one row.
        labels: (...) int64 or int32; positions equal to `ignore_index` drop out. To use them in
            `fn`, pass them among `per_row` too.
        shift: position t drops out with labels[..., t + 1], and the last position drops out.
        vocab_size, teacher_vocab_size: the first tokens of each vocabulary that `fn` gets.
        backend: "auto", "torch" or "reference" (all rows at once, differentiable any number of
            times).
        Other arguments: as in `fused_decoupled_kd`.

    Returns:
        The loss, a float32 scalar (float64 for float64 inputs; (...) with reduction="none").
        Without a valid token it is 0, with gradients of 0.

    Raises:
        TypeError, ValueError: an argument of a wrong type, shape, device or range; named, before
            any work. On its first block: `fn` returned no tensor of floats, another shape than
            (r,), or values without gradient; if FDD_KERNELS_DEBUG=1 also NaN or infinities.
        RuntimeError: under torch.compile with fullgraph=True.
    """
    if not callable(fn):
        raise TypeError(f"fn must be a function of logits, got {type(fn).__name__}")
    require_number("matrices", matrices, positive=True)
    uniform, number = encode_temperature(temperature, scale_by_t2)
    inputs, options = logit_arguments(
        Model(student_hidden, student_weight, student_bias, student_logit_scale, student_softcap),
        Model(teacher_hidden, teacher_weight, teacher_bias, teacher_logit_scale, teacher_softcap),
        Positions(labels, mask, token_weights, ignore_index, shift),
        Reduction(reduction, num_items_in_batch, scale_by_t2),
        temperature=uniform,
        vocab_size=vocab_size,
        teacher_vocab_size=teacher_vocab_size,
        backend=backend,
    )
    if teacher_hidden is None and teacher_weight is None:
        if teacher_bias is not None:
            raise ValueError("teacher_bias was given without teacher_hidden and teacher_weight")
        inputs = inputs.without_teacher()
    named = {f"per_row[{i}]": tensor for i, tensor in enumerate(per_row)}
    for name, tensor in named.items():
        _check_per_row(name, tensor, student_hidden)
    call = LogitCall.of(inputs, options, own_vocabularies=True, **named)
    of_temperature = _MATRICES_OF_STD if temperature == STD else 0
    function = _RowsOf(fn, number, matrices + of_temperature)
    leading, rows = len(call.leading_shape), call.rows.rows
    per_row = [t.detach().reshape(rows, *t.shape[leading:]) for t in per_row]
    return call.loss(Formula(function, (), (), function.dense), *per_row)


@dataclass(frozen=True)
class _RowsOf:
    """`fn` at a temperature as a row function, differentiated by autograd."""

    fn: Callable[..., Tensor]
    temperature: float
    matrices: float

    def __call__(self, block: RowBlock) -> tuple[Tensor, GradOf]:
        u = block.student.requires_grad_(block.asks_gradient)
        # Nothing that autograd saves may have been made under `torch.inference_mode`.
        per_row = [t.clone() if t.is_inference() else t for t in block.per_row]
        with torch.set_grad_enabled(block.asks_gradient):
            values = self.dense(u, block.teacher, *per_row)

        def grad_of(upstream: Tensor) -> Tensor:
            # A view of `upstream` may come back, and the gradient is changed in place.
            (grad,) = torch.autograd.grad(values, u, upstream.clone(), allow_unused=True)
            if grad is None:
                raise ValueError(_NO_GRADIENT)
            return grad.contiguous()

        return values.detach(), grad_of

    def dense(self, u_s: Tensor, u_t: Tensor | None, *per_row: Tensor) -> Tensor:
        """Compute values (r, 1) of logits, and check them."""
        z_s, z_t = (None if u is None else at_temperature(u, self.temperature) for u in (u_s, u_t))
        values = self.fn(z_s, z_t, *per_row)
        if not isinstance(values, Tensor) or not values.is_floating_point():
            got = describe(values) if isinstance(values, Tensor) else type(values).__name__
            raise TypeError(f"fn returned a {got}: it must return floats (r,), one value per row")
        if values.shape != (len(u_s),):
            raise ValueError(
                f"fn returned shape {tuple(values.shape)} for a block of {len(u_s)} rows: it must "
                f"return ({len(u_s)},), one value per row, such as a .sum(-1) over tokens"
            )
        if u_s.requires_grad and torch.is_grad_enabled() and not values.requires_grad:
            raise ValueError(_NO_GRADIENT)
        if debugging() and not values.isfinite().all():
            bad = int((~values.isfinite()).sum())
            raise ValueError(f"fn returned {bad} values that are NaN or infinite, of {len(values)}")
        return values.to(u_s.dtype)[:, None]


_NO_GRADIENT = (
    "fn returned values without gradient in the student's logits: compute them from its first "
    "argument by differentiable operations, without detach() or torch.no_grad()"
)


def _check_per_row(name: str, tensor: Tensor, hidden: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    require_plain(name, tensor)
    if not isinstance(hidden, Tensor):
        return  # refused elsewhere
    leading = hidden.shape[:-1]
    if tensor.shape[: len(leading)] != leading:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, but student_hidden {tuple(hidden.shape)}: it "
            f"must begin with {tuple(leading)}, an entry for each position"
        )
    if tensor.device != hidden.device:
        raise ValueError(f"{name} is on {tensor.device} and student_hidden on {hidden.device}")
    if torch.is_grad_enabled() and tensor.requires_grad:
        raise ValueError(
            f"{name} requires grad, but gradient flows to the student's tensors alone: pass "
            ".detach()"
        )
