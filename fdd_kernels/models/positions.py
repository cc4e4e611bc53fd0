"""Which positions of a batch count: one rule for the loss, for what its sums are divided by, and for the teacher cache."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def counted_positions(batch: Mapping[str, Tensor], ignore_index: int) -> Tensor:
    """Where the loss compares the models' predictions, bool (batch, sequence).

    A position counts if it is attended and, where the batch has labels, the next token has one: the last position of
    padding on the left precedes a label too, but its state has seen nothing.

    Raises:
        ValueError: neither labels nor `attention_mask` say where padding is.
    """
    labels, attended = batch.get("labels"), attended_positions(batch)
    if labels is not None:
        counts = precedes_label(labels, ignore_index)
        return counts if attended is None else counts & attended.to(counts.device)
    if attended is not None:
        return attended
    if batch.get("attention_mask") is not None:
        raise ValueError(
            "without labels every attended position counts, but attention_mask does not say which those are: it is not of the "
            f"shape {tuple(token_shape(batch))} (batch, sequence). Pass one that is, or labels, with {ignore_index} for what "
            "does not count"
        )
    return torch.ones(token_shape(batch), dtype=torch.bool)


def attended_positions(batch: Mapping[str, Tensor]) -> Tensor | None:
    """Which tokens are no padding, bool (batch, sequence); None without an `attention_mask` of that shape."""
    mask = batch.get("attention_mask")
    return mask != 0 if isinstance(mask, Tensor) and mask.shape == token_shape(batch) else None


def precedes_label(labels: Tensor, ignore_index: int) -> Tensor:
    """Where the next token has a label: bool, of the shape (..., sequence) of a causal LM's labels."""
    counts = torch.zeros_like(labels, dtype=torch.bool)
    counts[..., :-1] = labels[..., 1:] != ignore_index
    return counts


def token_shape(batch: Mapping[str, Tensor]) -> torch.Size:
    """(batch, sequence), of `input_ids` or `inputs_embeds`."""
    tokens = batch.get("input_ids")
    return (batch["inputs_embeds"] if tokens is None else tokens).shape[:2]
