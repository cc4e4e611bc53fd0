"""Find the valid positions of a batch, for the loss, its denominator and teacher caches."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

# Labels of the next token, as transformers and accelerate make them to split sequences over
# processes.
SHIFT_LABELS = "shift_labels"
# Factors of every term of a position, as in `fused_fdd_loss`; they belong to positions of hidden
# states and are never shifted.
TOKEN_WEIGHTS = "token_weights"
# Which rows of a task without a vocabulary are valid, (batch,) bool.
VALID_ROWS = "valid_rows"
# The window of a teacher cache in each row of a batch.
TEACHER_INDEX = "teacher_index"


def valid_positions(batch: Mapping[str, Tensor], ignore_index: int) -> Tensor:
    """Return which positions the loss compares, bool (batch, sequence).

    A position is valid if it is attended and, in a batch with labels, the next token has one. (The
    last position of padding on the left also precedes a label, but its state has seen no token.)

    Raises:
        ValueError: neither labels nor `attention_mask` say where padding is.
    """
    labels, attended = next_labels(batch, ignore_index), attended_positions(batch)
    if labels is not None:
        valid = labels != ignore_index
        return valid if attended is None else valid & attended.to(valid.device)
    if attended is not None:
        return attended
    if batch.get("attention_mask") is not None:
        raise ValueError(
            "without labels every attended position is valid, but attention_mask does not say "
            f"which are: it is not of the shape {tuple(token_shape(batch))} (batch, sequence). "
            f"Pass one that is, or labels, with {ignore_index} where a token is to be ignored"
        )
    return torch.ones(token_shape(batch), dtype=torch.bool)


def ignore_rows_from(
    batch: Mapping[str, Tensor], first: int, ignore_index: int
) -> dict[str, Tensor]:
    """Return the batch, of the same shape, without valid positions in rows `first` and later."""
    labels, valid = next_labels(batch, ignore_index), valid_positions(batch, ignore_index)
    labels = torch.where(valid, 0, ignore_index) if labels is None else labels.clone()
    labels[first:] = ignore_index
    return {**batch, SHIFT_LABELS: labels}


def attended_positions(batch: Mapping[str, Tensor]) -> Tensor | None:
    """Return which tokens are not padding, bool (batch, sequence); None without an `attention_mask`
    of that shape.
    """
    mask = batch.get("attention_mask")
    return mask != 0 if isinstance(mask, Tensor) and mask.shape == token_shape(batch) else None


def attended_tokens(batch: Mapping[str, Tensor]) -> Tensor:
    """Return which tokens are not padding, bool (batch, sequence): all of them where no
    `attention_mask` says so.
    """
    found = attended_positions(batch)
    return torch.ones(token_shape(batch), dtype=torch.bool) if found is None else found


def next_labels(batch: Mapping[str, Tensor], ignore_index: int) -> Tensor | None:
    """Return the label of the token after each position, (batch, sequence); None without labels.

    `shift_labels` hold them already and win over `labels`: in a part of a sequence the last one is
    the first label of the next part.
    """
    shifted, labels = batch.get(SHIFT_LABELS), batch.get("labels")
    if shifted is not None or labels is None:
        return shifted
    return torch.cat([labels[..., 1:], torch.full_like(labels[..., :1], ignore_index)], dim=-1)


def precedes_label(labels: Tensor, ignore_index: int) -> Tensor:
    """Return where the next token has a label, bool of the shape of `labels` (..., sequence)."""
    return next_labels({"labels": labels}, ignore_index) != ignore_index


def token_shape(batch: Mapping[str, Tensor]) -> torch.Size:
    """Return (batch, sequence) of `input_ids` or `inputs_embeds`."""
    tokens = batch.get("input_ids")
    return (batch["inputs_embeds"] if tokens is None else tokens).shape[:2]
