"""Which positions of a batch count: one rule for the loss, for what its sums are divided by, and
for the teacher cache.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

# Labels that are shifted already, as transformers and accelerate make them where they split
# sequences over processes.
SHIFT_LABELS = "shift_labels"


def counted_positions(batch: Mapping[str, Tensor], ignore_index: int) -> Tensor:
    """Where the loss compares the models' predictions, bool (batch, sequence).

    A position counts if it is attended and, where the batch has labels, the next token has one: the
    last position of padding on the left precedes a label too, but its state has seen nothing.

    Raises:
        ValueError: neither labels nor `attention_mask` say where padding is.
    """
    labels, attended = next_labels(batch, ignore_index), attended_positions(batch)
    if labels is not None:
        counts = labels != ignore_index
        return counts if attended is None else counts & attended.to(counts.device)
    if attended is not None:
        return attended
    if batch.get("attention_mask") is not None:
        raise ValueError(
            "without labels every attended position counts, but attention_mask does not say which "
            "those are: it is not of the "
            f"shape {tuple(token_shape(batch))} (batch, sequence). Pass one that is, or labels, "
            f"with {ignore_index} for what "
            "does not count"
        )
    return torch.ones(token_shape(batch), dtype=torch.bool)


def counting_rows(batch: Mapping[str, Tensor], rows: int, ignore_index: int) -> dict[str, Tensor]:
    """The batch with nothing that counts after its first `rows` rows; it keeps its shape."""
    labels, counts = next_labels(batch, ignore_index), counted_positions(batch, ignore_index)
    labels = torch.where(counts, 0, ignore_index) if labels is None else labels.clone()
    labels[rows:] = ignore_index
    return {**batch, SHIFT_LABELS: labels}


def attended_positions(batch: Mapping[str, Tensor]) -> Tensor | None:
    """Which tokens are no padding, bool (batch, sequence); None without an `attention_mask` of that
    shape.
    """
    mask = batch.get("attention_mask")
    return mask != 0 if isinstance(mask, Tensor) and mask.shape == token_shape(batch) else None


def next_labels(batch: Mapping[str, Tensor], ignore_index: int) -> Tensor | None:
    """The label of the token after each position, (batch, sequence); None if the batch has no
    labels.

    `shift_labels` are that already and win over `labels`: in a part of a sequence the last one is
    the next part's first label.
    """
    shifted, labels = batch.get(SHIFT_LABELS), batch.get("labels")
    if shifted is not None or labels is None:
        return shifted
    return torch.cat([labels[..., 1:], torch.full_like(labels[..., :1], ignore_index)], dim=-1)


def precedes_label(labels: Tensor, ignore_index: int) -> Tensor:
    """Where the next token has a label: bool, of the shape (..., sequence) of a causal LM's
    labels.
    """
    return next_labels({"labels": labels}, ignore_index) != ignore_index


def token_shape(batch: Mapping[str, Tensor]) -> torch.Size:
    """(batch, sequence), of `input_ids` or `inputs_embeds`."""
    tokens = batch.get("input_ids")
    return (batch["inputs_embeds"] if tokens is None else tokens).shape[:2]
