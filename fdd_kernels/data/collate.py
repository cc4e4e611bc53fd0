"""Collate windows of unequal length into batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from fdd_kernels.data.records import TOKEN_WEIGHTS

IGNORED = -100
_FILL = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}


def pad_windows(
    windows: Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Any]],
) -> dict[str, torch.Tensor]:
    """Pad windows on the right to a batch (rows, longest window). Padding is neither attended nor
    learned, and has weight 0 in `token_weights`, which become float32.

    A window without `attention_mask` is attended everywhere. Numbers in the windows, such as a
    teacher cache's `teacher_index`, become a tensor (rows,). Windows without labels give a batch
    without labels: then every attended position is valid.

    Args:
        windows: mappings of lists or tensors, or one mapping of columns, as a slice of a
            `datasets.Dataset` gives.

    Raises:
        ValueError: some windows have labels, or token_weights, and some have none.
    """
    if isinstance(windows, Mapping):
        windows = [dict(zip(windows, values)) for values in zip(*windows.values())]
    windows = [
        {"attention_mask": [1] * len(window["input_ids"])} | dict(window) for window in windows
    ]
    for name in ("labels", TOKEN_WEIGHTS):
        having = sum(name in window for window in windows)
        if having not in (0, len(windows)):
            raise ValueError(
                f"{having} of {len(windows)} windows have {name}: give them to all or to none"
            )
    batch = {
        name: _padded(windows, name, torch.int64, value)
        for name, value in _FILL.items()
        if name in windows[0]
    }
    if TOKEN_WEIGHTS in windows[0]:
        batch[TOKEN_WEIGHTS] = _padded(windows, TOKEN_WEIGHTS, torch.float32, 0.0)
    numbers = [
        name
        for name, value in windows[0].items()
        if isinstance(value, Integral) or _is_scalar(value)
    ]
    return batch | {name: torch.tensor([int(w[name]) for w in windows]) for name in numbers}


def _padded(windows: Sequence[Mapping[str, Any]], name: str, dtype: torch.dtype, value):
    rows = [torch.as_tensor(window[name]).to(dtype) for window in windows]
    return pad_sequence(rows, batch_first=True, padding_value=value)


def _is_scalar(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim == 0 and not value.is_floating_point()
