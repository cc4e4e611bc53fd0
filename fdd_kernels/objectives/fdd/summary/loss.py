"""The FDD loss of a student with a frozen linear head, from a teacher summary.

Shape suffixes: L layers, R rows, D the student's width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fdd_kernels.backends import resolve_backend
from fdd_kernels.engine.log_sum_exps import log_sum_exps
from fdd_kernels.lens.layout import (
    COUNT,
    LSE_S,
    LSE_T,
    M_DD,
    M_SS,
    M_ST,
    M_TT,
    MEAN_S,
    MEAN_T,
    MOMENT_STATS,
    REQUEST_STATS,
    VALUE,
)
from fdd_kernels.lens.spec import NLL, Layers, PairMoments, Request
from fdd_kernels.objectives.dense import dense_logits
from fdd_kernels.objectives.fdd.objective import reduce_terms
from fdd_kernels.objectives.fdd.options import FDDLossTerms, LossOptions
from fdd_kernels.objectives.fdd.plan import Plan, build_plan
from fdd_kernels.objectives.fdd.summary.maker import (
    Head,
    check_options,
    finite_tokens,
    plan_of_everything,
)
from fdd_kernels.objectives.fdd.terms import row_terms_from_statistics
from fdd_kernels.objectives.reduction import loss_denominator
from fdd_kernels.objectives.validation import check_num_items, check_row_weights


class SummaryLoss:
    """The FDD loss of a student with a frozen linear head, from what `SummaryMaker` makes.

    Args:
        options: the loss; temperatures, `output_in_dynamics` and `vocab_size` must be those of the
            summary.
        layers: how many hidden states a model gives, the final one included.
        student_weight, student_bias: the head (V, Ds), (V,); constant from now on.

    Raises:
        ValueError: an objective that a summary cannot serve, a trainable head.
    """

    def __init__(
        self,
        options: LossOptions,
        layers: int,
        student_weight: Tensor,
        student_bias: Tensor | None = None,
    ) -> None:
        check_options(options)
        for name, tensor in (("student_weight", student_weight), ("student_bias", student_bias)):
            if tensor is not None and tensor.requires_grad:
                raise ValueError(
                    f"{name} requires grad, but a teacher summary holds for one head only: "
                    "freeze it (train_head=False, or LoRA without the head), or use a cache of the "
                    "teacher's hidden states"
                )
        self.options, self.layers = options, layers
        self.columns = options.vocab_size or len(student_weight)
        self.weight, self.bias, self.version = student_weight, student_bias, student_weight._version
        self.available = plan_of_everything(options, self.columns, layers, 0).spec
        self._gram: tuple[Tensor, Tensor, Tensor] | None = None

    def _deltas(self, count: Tensor) -> tuple[Tensor, Tensor]:
        """Return m and G over the `count` tokens that both models have; made at the first call."""
        if self._gram is None:
            live = finite_tokens(self.bias, self.columns, self.weight.device)
            head = Head(self.weight, self.bias, self.columns)
            mean = head.mean(live).to(
                torch.float64 if self.weight.dtype == torch.float64 else torch.float32
            )
            self._gram = live.sum(), mean, head.gram(live, mean)
        if bool((count != self._gram[0]).any()):
            raise ValueError(
                "the teacher summary leaves out other tokens than the student's bias does "
                "(-inf in the teacher's bias alone): use a cache of the teacher's hidden states"
            )
        return self._gram[1:]

    def __call__(
        self,
        student_hidden: Sequence[Tensor],
        summary: dict[str, Tensor],
        labels: Tensor | None = None,
        *,
        token_weights: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
    ) -> FDDLossTerms:
        """Compute the loss of R rows, all valid.

        Args:
            student_hidden: L tensors (R, Ds).
            summary: the arrays of `SummaryMaker` for the same rows.
            labels: (R,) already shifted, needed for CE alone.
            token_weights: (R,), see `fused_fdd_loss`.
            num_items_in_batch: see `fused_fdd_loss`.

        Raises:
            TypeError, ValueError: the head has changed, CE without labels, bad `token_weights` or
                a bad `num_items_in_batch`.
        """
        if self.weight._version != self.version:
            raise ValueError(
                "the student's head has changed since the loss was made: the teacher summary "
                "is of another head"
            )
        options, rows = self.options, len(student_hidden[0])
        check_num_items(options.reduction, num_items_in_batch)
        if options.ce_weight and labels is None:
            raise ValueError(
                f"ce_weight={options.ce_weight} needs labels: pass labels, or ce_weight=0"
            )
        counted = None
        if token_weights is not None:
            check_row_weights(token_weights, (rows,), self.weight.device)
            counted = token_weights != 0
        backend = resolve_backend(options.backend, self.weight.device)
        plan = build_plan(
            options, self.columns, self.layers, leading_shape=(rows,), backend=backend
        )
        hidden = [student_hidden[i] for i in plan.student_layers]
        if counted is not None:  # a row of weight 0 may hold anything
            hidden = [torch.where(counted[:, None], h, 0.0) for h in hidden]
            token_weights = token_weights.to(torch.promote_types(hidden[0].dtype, torch.float32))
        lse = self._log_sum_exps(plan, hidden)
        hidden = [h.to(lse.dtype) for h in hidden]
        requests = [
            self._request(plan, request, lse[i], hidden, summary, labels)
            for i, request in enumerate(plan.spec.requests)
        ]
        moments = [self._moment(plan, pair, hidden, summary) for pair in plan.spec.moments]
        row_terms = row_terms_from_statistics(
            plan,
            lse.new_empty(0),
            _stacked(requests, REQUEST_STATS, lse),
            _stacked(moments, MOMENT_STATS, lse),
        )
        denominator = loss_denominator(
            options.reduction, rows, None, self.weight.device, num_items_in_batch
        )
        return reduce_terms(row_terms, options, counted, (rows,), denominator, token_weights)

    def _log_sum_exps(self, plan: Plan, hidden: list[Tensor]) -> Tensor:
        """Compute the student's log-sum-exp of each request, (requests, R), in float32 or wider."""
        pairs = [(request.student_layer, request.temperature) for request in plan.spec.requests]
        distinct = list(dict.fromkeys(pairs))
        wide = torch.promote_types(hidden[0].dtype, self.weight.dtype)
        wide = torch.promote_types(wide, torch.float32)
        if not distinct:
            return hidden[0].new_zeros((0, len(hidden[0])), dtype=wide)
        states = [hidden[layer].to(wide) for layer, _ in distinct]
        temperatures = [temperature for _, temperature in distinct]
        scale, columns = self.options.student_logit_scale, self.columns
        if plan.backend == "reference":
            logits = [
                dense_logits(h, self.weight, self.bias, scale, None, columns) / temperature
                for h, temperature in zip(states, temperatures)
            ]
            found = torch.stack([z.logsumexp(-1) for z in logits])
        else:
            found = log_sum_exps(
                states,
                temperatures,
                self.weight,
                self.bias,
                logit_scale=scale,
                columns=columns,
                backend=plan.backend,
            )
        return torch.stack([found[distinct.index(pair)] for pair in pairs])

    def _scalars(self, summary: dict[str, Tensor], index: int) -> Tensor:
        return summary["scalars"][:, 3 * index : 3 * index + 3].unbind(-1)

    def _request(
        self, plan: Plan, request: Request, lse: Tensor, hidden, summary, labels
    ) -> Tensor:
        """Compute the row statistics of one request, (REQUEST_STATS, R)."""
        out = [torch.zeros_like(lse)] * REQUEST_STATS
        scale = self.options.student_logit_scale / request.temperature
        state = hidden[request.student_layer]
        out[LSE_S] = lse
        if request.divergence == NLL:
            own = (state * F.embedding(labels.long(), self.weight).to(lse.dtype)).sum(-1)
            if self.bias is not None:
                own = own + self.bias[labels.long()]
            out[VALUE] = lse - scale * own
            return torch.stack(out)
        at = self._position(plan, request)
        negative_entropy, expected_bias, out[LSE_T] = self._scalars(summary, at)
        if request.divergence is None:
            return torch.stack(out)
        expected = (state * summary[f"expectation_{at}"]).sum(-1) + expected_bias
        out[VALUE] = negative_entropy - scale * expected + lse
        return torch.stack(out)

    def _position(self, plan: Plan, request: Request) -> int:
        """Find a request among those of the summary; KL's have the log-sum-exps too."""
        layer = plan.student_layers[request.student_layer]
        request = request._replace(student_layer=layer, teacher_layer=layer)
        requests = self.available.requests
        return requests.index(request if request in requests else request._replace(divergence="kl"))

    def _moment(self, plan: Plan, pair: PairMoments, hidden, summary) -> Tensor:
        """Compute the moments of one pair of layers, (MOMENT_STATS, R)."""
        own = plan.student_layers
        first, second = (Layers(*[own[i] for i in layers]) for layers in pair.layers)
        at = self.available.moments.index(pair._replace(first=first, second=second))
        count, mean_t, squares_t = self._scalars(summary, len(self.available.requests) + at)
        mean, gram = self._deltas(count)
        scale = self.options.student_logit_scale / pair.temperature
        delta = scale * (hidden[pair.second.student] - hidden[pair.first.student])
        out = [torch.zeros_like(count)] * MOMENT_STATS
        out[COUNT], out[MEAN_S], out[MEAN_T], out[M_TT] = count, delta @ mean, mean_t, squares_t
        out[M_SS] = ((delta @ gram) * delta).sum(-1)
        out[M_ST] = (delta * summary[f"correlation_{at}"]).sum(-1)
        out[M_DD] = (out[M_SS] + out[M_TT] - 2 * out[M_ST]).clamp(min=0)
        return torch.stack(out)


def _stacked(parts: list[Tensor], size: int, like: Tensor) -> Tensor:
    return torch.stack(parts) if parts else like.new_zeros((0, size, like.shape[-1]))
