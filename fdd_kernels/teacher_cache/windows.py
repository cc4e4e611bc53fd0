"""The token windows of a cache: as a dataset for training, and found again in its batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fdd_kernels.data import IGNORED, Window, Windows
from fdd_kernels.hf.positions import (
    SHIFT_LABELS,
    attended_positions,
    counted_positions,
    precedes_label,
)
from fdd_kernels.hf.teachers import TEACHER_INDEX

_SHOWN = 8


def pack_windows(windows: Windows) -> dict[str, Tensor]:
    """Windows as tensors: `input_ids` and `labels` (tokens,), and where each window's tokens and
    rows begin.

    A row is a position that counts: one whose next token has a label.

    Raises:
        ValueError: a window without one, or with padding.
        TypeError: windows without a length.
    """
    starts, rows, pieces = [0], [0], {"input_ids": [], "labels": []}
    for index, window in enumerate(
        chain(_sized("train", windows.train), _sized("held_out", windows.held_out))
    ):
        ids, labels = (torch.as_tensor(window[name], dtype=torch.int32) for name in pieces)
        if len(labels) != len(ids) or not all(window.get("attention_mask", (1,))):
            raise ValueError(
                f"window {index} must have as many labels as input_ids, and no padding"
            )
        count = int(precedes_label(labels, IGNORED).sum())
        if not count:
            raise ValueError(f"window {index} has no token to predict: leave it out")
        starts.append(starts[-1] + len(ids))
        rows.append(rows[-1] + count)
        pieces["input_ids"].append(ids)
        pieces["labels"].append(labels)
    return {
        **{
            name: torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int32)
            for name, parts in pieces.items()
        },
        "starts": torch.tensor(starts, dtype=torch.int64),
        "rows": torch.tensor(rows, dtype=torch.int64),
    }


def _sized(name: str, windows: Sequence[Window]) -> Sequence[Window]:
    if not hasattr(windows, "__len__"):
        raise TypeError(
            f"windows.{name} is a {type(windows).__name__}, which has no length, but a cache "
            "numbers its windows: give a "
            "list or a datasets.Dataset; fdd_kernels.data.load_windows makes one of a stream"
        )
    return windows


class WindowTable:
    """All windows of a cache, the training windows first.

    Args:
        tensors: what `pack_windows` gives.
        train: how many of them are for training.
    """

    def __init__(self, tensors: dict[str, Tensor], train: int) -> None:
        self.input_ids, self.labels = tensors["input_ids"], tensors["labels"]
        self.starts, self.rows, self.train = tensors["starts"], tensors["rows"], train

    def __len__(self) -> int:
        return len(self.starts) - 1

    def window(self, index: int) -> tuple[Tensor, Tensor]:
        """Tokens and labels (length,) of one window."""
        part = slice(int(self.starts[index]), int(self.starts[index + 1]))
        return self.input_ids[part], self.labels[part]

    def match(self, batch: Mapping[str, Tensor]) -> tuple[list[int], Tensor]:
        """Which windows the rows of a batch are, and which of its positions their cached rows
        belong to.

        Returns:
            The windows, and indices int64 into the flattened (batch, sequence), in the order of the
                windows' rows.

        Raises:
            ValueError: the batch does not say which windows it is made of, or they are not the
                cache's: names the window.
        """
        labelled = "labels" in batch or SHIFT_LABELS in batch
        if TEACHER_INDEX not in batch or not labelled:
            missing = [TEACHER_INDEX] * (TEACHER_INDEX not in batch) + ["labels"] * (not labelled)
            raise ValueError(
                f"the batch has no {' and no '.join(missing)} (it has {', '.join(batch)}): make "
                "batches of the cache's own "
                "windows, cache.dataset('train'), with fdd_kernels.data.pad_windows as the collator"
            )
        windows = batch[TEACHER_INDEX].tolist()
        ids, counted = batch["input_ids"].cpu(), counted_positions(batch, IGNORED).cpu()
        attended = attended_positions(batch)
        firsts = [0] * len(ids) if attended is None else attended.int().argmax(dim=1).tolist()
        if len(windows) != len(ids):
            raise ValueError(
                f"teacher_index has {len(windows)} entries for {len(ids)} rows of input_ids: give "
                "one each"
            )
        places = []
        for row, window in enumerate(windows):
            if not 0 <= window < len(self):
                raise ValueError(
                    f"teacher_index[{row}]={window}, but the cache has windows 0 to {len(self) - 1}"
                )
            places.append(
                row * ids.shape[1] + self._counted(window, ids[row], counted[row], firsts[row], row)
            )
        return windows, torch.cat(places)

    def _counted(self, window: int, ids: Tensor, counted: Tensor, first: int, row: int) -> Tensor:
        """The positions of a window that count, once it is sure that a batch's row has the window
        at `first`, and that no other is `counted` there.
        """
        own_ids, own_labels = self.window(window)
        found = ids[first : first + len(own_ids)]
        if not torch.equal(found.int(), own_ids):
            raise ValueError(
                f"row {row} of the batch should be window {window} of the cache, but input_ids "
                "differ: the cache has "
                f"{len(own_ids)} tokens {own_ids[:_SHOWN].tolist()}..., the batch "
                f"{found[:_SHOWN].tolist()}...: train on "
                "cache.dataset(...) as it is, not truncated, packed or tokenized again"
            )
        positions = precedes_label(own_labels, IGNORED).nonzero().flatten() + first
        unknown = counted.index_fill(0, positions, False)
        if unknown.any():
            raise ValueError(
                f"row {row} of the batch has a label at position {int(unknown.nonzero()[0]) + 1}, "
                f"for which window {window} of "
                "the cache holds no prediction: use the labels of cache.dataset(...), or fewer"
            )
        return positions

    def dataset(self, split: str) -> CachedWindows:
        """The windows of "train" or "held_out", for a DataLoader."""
        splits = {"train": range(self.train), "held_out": range(self.train, len(self))}
        if split not in splits:
            raise ValueError(f"split={split!r} is not one of {', '.join(map(repr, splits))}")
        return CachedWindows(self, splits[split])


class CachedWindows(Dataset, Sequence):
    """Windows with input_ids, attention_mask, labels (lists of unequal length) and their
    `teacher_index`.
    """

    def __init__(self, table: WindowTable, indices: range) -> None:
        self.table, self.indices = table, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int) -> dict[str, Any]:
        index = self.indices[item]
        ids, labels = self.table.window(index)
        return {
            "input_ids": ids.tolist(),
            "attention_mask": [1] * len(ids),
            "labels": labels.tolist(),
            TEACHER_INDEX: index,
        }
