"""Collate windows of unequal length into batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

IGNORED = -100
_FILL = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}


def pad_windows(
    windows: Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Any]],
) -> dict[str, torch.Tensor]:
    """Pad windows on the right to a batch (rows, longest window). Padding is neither attended nor
    learned.

    A window without `attention_mask` is attended everywhere. Numbers in the windows, such as a
    teacher cache's `teacher_index`, become a tensor (rows,). Windows without labels give a batch
    without labels: then every attended position is valid.

    Args:
        windows: mappings of lists or tensors, or one mapping of columns, as a slice of a
            `datasets.Dataset` gives.

    Raises:
        ValueError: some windows have labels and some have none.
    """
    if isinstance(windows, Mapping):
        windows = [dict(zip(windows, values)) for values in zip(*windows.values())]
    windows = [
        {"attention_mask": [1] * len(window["input_ids"])} | dict(window) for window in windows
    ]
    labelled = sum("labels" in window for window in windows)
    if labelled not in (0, len(windows)):
        raise ValueError(
            f"{labelled} of {len(windows)} windows have labels: give them to all or to none"
        )
    batch = {
        name: pad_sequence(
            [torch.as_tensor(w[name]).long() for w in windows],
            batch_first=True,
            padding_value=value,
        )
        for name, value in _FILL.items()
        if name in windows[0]
    }
    numbers = [
        name
        for name, value in windows[0].items()
        if isinstance(value, Integral) or _is_scalar(value)
    ]
    return batch | {name: torch.tensor([int(w[name]) for w in windows]) for name in numbers}


def _is_scalar(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim == 0 and not value.is_floating_point()
