"""Compare embedding models: their sentences' embeddings, and the states of sampled layers."""

from __future__ import annotations

import torch
from torch import Tensor

from fdd_kernels.engine.evaluate import evaluate
from fdd_kernels.hf.features import state_inputs
from fdd_kernels.hf.positions import attended_tokens
from fdd_kernels.hf.task_heads import TaskLoss
from fdd_kernels.objectives.fdd.loss import fdd_call
from fdd_kernels.objectives.fdd.options import FDDLossTerms, LossOptions


class EmbeddingLoss(TaskLoss):
    """Embeddings of sentences: the mean over a sentence's tokens, or its first token. Their
    distance is `config.output_divergence`.
    """

    def trains_projection(self, options: LossOptions) -> bool:
        uses = options.compares_dynamics or bool(options.output_kd_weight)
        return self.projection is not None and uses

    def _needs_projection(self) -> bool:
        return True

    def _output_kd(self, logits, targets, view, valid, options, items):
        attended = attended_tokens(view).to(logits.device)
        ours, theirs = (self._pooled(states, attended) for states in (logits, targets))
        inputs = state_inputs(
            [ours],
            [theirs],
            self.projection,
            mask=valid,
            rows="states",
            num_items_in_batch=items,
            token_weights=None,
        )
        own = LossOptions(
            trajectory=self.config.output_divergence,
            beta=0.0,
            output_kd_weight=0.0,
            output_in_dynamics=True,
            backend=options.backend,
        )
        return FDDLossTerms(*evaluate(fdd_call(inputs, own))).trajectory

    def _pooled(self, states: Tensor, attended: Tensor) -> Tensor:
        """Make embeddings (batch, width) of the states of tokens (batch, sequence, width)."""
        if self.config.pooling == "cls":
            first = attended.int().argmax(1)
            return states[torch.arange(len(states), device=states.device), first]
        weights = attended / attended.sum(1, keepdim=True).clamp(min=1).to(states.dtype)
        return torch.einsum("bs,bsd->bd", weights, states)

    def _ce(self, logits, view, valid, options, items):
        raise ValueError("an embedding model has no labels: give ce_weight=0")
