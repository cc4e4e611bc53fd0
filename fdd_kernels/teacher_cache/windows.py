"""The token windows of a cache: as a dataset for training, and matched to its batches."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fdd_kernels.data import IGNORED, Window, Windows
from fdd_kernels.hf.positions import (
    SHIFT_LABELS,
    TEACHER_INDEX,
    TOKEN_WEIGHTS,
    attended_positions,
    precedes_label,
    valid_positions,
)

_SHOWN = 8


def pack_windows(windows: Windows) -> dict[str, Tensor]:
    """Concatenate windows: `input_ids` and `labels` (tokens,) int32, and the offsets `starts` and
    `rows` (windows + 1,) int64 of each window's tokens and rows. If a window has `token_weights`
    there are also those, (tokens,) float32, 1 in windows without.

    There is one row for each valid position: one whose next token has a label.

    Raises:
        ValueError: a window without valid position, or with padding.
        TypeError: windows without a length.
    """
    starts, rows, pieces = [0], [0], {"input_ids": [], "labels": []}
    weights, are_given = [], False
    for index, window in enumerate(
        chain(_sized("train", windows.train), _sized("held_out", windows.held_out))
    ):
        ids, labels = (torch.as_tensor(window[name], dtype=torch.int32) for name in pieces)
        own = window.get(TOKEN_WEIGHTS)
        are_given = are_given or own is not None
        weights.append(torch.ones(len(ids)) if own is None else torch.as_tensor(own).float())
        lengths = {len(ids), len(labels), len(weights[-1])}
        if len(lengths) > 1 or not all(window.get("attention_mask", (1,))):
            raise ValueError(
                f"window {index} must have as many labels, and token_weights if any, as "
                "input_ids, and no padding"
            )
        count = int(precedes_label(labels, IGNORED).sum())
        if not count:
            raise ValueError(f"window {index} has no token to predict: leave it out")
        starts.append(starts[-1] + len(ids))
        rows.append(rows[-1] + count)
        pieces["input_ids"].append(ids)
        pieces["labels"].append(labels)
    empty = torch.zeros(0, dtype=torch.int32)
    tokens = {name: torch.cat([empty, *parts]) for name, parts in pieces.items()}
    if are_given:
        tokens[TOKEN_WEIGHTS] = torch.cat(weights)
    return {**tokens, "starts": torch.tensor(starts), "rows": torch.tensor(rows)}


def _sized(name: str, windows: Sequence[Window]) -> Sequence[Window]:
    if not hasattr(windows, "__len__"):
        raise TypeError(
            f"windows.{name} is a {type(windows).__name__}, which has no length, but a cache "
            "numbers its windows: give a list or a datasets.Dataset; fdd_kernels.data.load_windows "
            "makes one of a stream"
        )
    return windows


class WindowTable:
    """All windows of a cache, the training windows first.

    Args:
        tensors: the result of `pack_windows`.
        train: number of training windows.
    """

    def __init__(self, tensors: dict[str, Tensor], train: int) -> None:
        self._tensors, self.train = tensors, train
        self.input_ids, self.labels = tensors["input_ids"], tensors["labels"]
        self.starts, self.rows = tensors["starts"], tensors["rows"]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def describe(self) -> dict[str, Any]:
        """Return counts and the SHA-256 of the windows, as the index has them."""
        digest = hashlib.sha256()
        for name in sorted(self._tensors):
            digest.update(self._tensors[name].numpy())
        return {
            "train": self.train,
            "held_out": len(self) - self.train,
            "train_tokens": int(self.starts[self.train]),
            "max_length": int(self.starts.diff().max()),
            "rows": int(self.rows[-1]),
            "sha256": digest.hexdigest(),
        }

    def window(self, index: int) -> tuple[Tensor, Tensor]:
        """Return tokens and labels (length,) of one window."""
        part = self._part(index)
        return self.input_ids[part], self.labels[part]

    def weights(self, index: int) -> Tensor | None:
        """Return the weights (length,) of the tokens of one window; None if there are none."""
        weights = self._tensors.get(TOKEN_WEIGHTS)
        return None if weights is None else weights[self._part(index)]

    def _part(self, index: int) -> slice:
        return slice(int(self.starts[index]), int(self.starts[index + 1]))

    def match(self, batch: Mapping[str, Tensor]) -> tuple[list[int], Tensor]:
        """Find the windows of a batch, and the positions that their cached rows belong to.

        Returns:
            One window per row of the batch, and indices (rows,) int64 into the flattened (batch,
            sequence), in the order of the windows' cached rows.

        Raises:
            ValueError: the batch does not say which windows it is made of, or its tokens are not
                those of the cache's window; names the window.
        """
        labelled = "labels" in batch or SHIFT_LABELS in batch
        if TEACHER_INDEX not in batch or not labelled:
            missing = [TEACHER_INDEX] * (TEACHER_INDEX not in batch) + ["labels"] * (not labelled)
            raise ValueError(
                f"the batch has no {' and no '.join(missing)} (it has {', '.join(batch)}): make "
                "batches of the cache's own windows, cache.dataset('train'), with "
                "fdd_kernels.data.pad_windows as the collator"
            )
        windows = batch[TEACHER_INDEX].tolist()
        ids, valid = batch["input_ids"].cpu(), valid_positions(batch, IGNORED).cpu()
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
                row * ids.shape[1] + self._valid(window, ids[row], valid[row], firsts[row], row)
            )
        return windows, torch.cat(places)

    def _valid(self, window: int, ids: Tensor, valid: Tensor, first: int, row: int) -> Tensor:
        """Return the valid positions of a window in a batch's row, where it begins at `first`.

        Raises ValueError if the row holds other tokens, or if other positions are `valid` in it.
        """
        own_ids, own_labels = self.window(window)
        found = ids[first : first + len(own_ids)]
        if not torch.equal(found.int(), own_ids):
            raise ValueError(
                f"row {row} of the batch should be window {window} of the cache, but input_ids "
                f"differ: the cache has {len(own_ids)} tokens {own_ids[:_SHOWN].tolist()}..., the "
                f"batch {found[:_SHOWN].tolist()}...: train on cache.dataset(...) as it is, not "
                "truncated, packed or tokenized again"
            )
        positions = precedes_label(own_labels, IGNORED).nonzero().flatten() + first
        unknown = valid.index_fill(0, positions, False)
        if unknown.any():
            raise ValueError(
                f"row {row} of the batch has a label at position {int(unknown.nonzero()[0]) + 1}, "
                f"for which window {window} of the cache holds no prediction: use the labels of "
                "cache.dataset(...), or fewer"
            )
        return positions

    def dataset(self, split: str) -> CachedWindows:
        """Return the windows of "train" or "held_out" (the validation split), for a DataLoader."""
        splits = {"train": range(self.train), "held_out": range(self.train, len(self))}
        if split not in splits:
            raise ValueError(f"split={split!r} is not one of {', '.join(map(repr, splits))}")
        return CachedWindows(self, splits[split])


class CachedWindows(Dataset, Sequence):
    """Windows as dicts of lists input_ids, attention_mask, labels, token_weights if there are any,
    and their `teacher_index`.
    """

    def __init__(self, table: WindowTable, indices: range) -> None:
        self.table, self.indices = table, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int) -> dict[str, Any]:
        index = self.indices[item]
        ids, labels = self.table.window(index)
        window = {
            "input_ids": ids.tolist(),
            "attention_mask": [1] * len(ids),
            "labels": labels.tolist(),
        }
        weights = self.table.weights(index)
        if weights is not None:
            window[TOKEN_WEIGHTS] = weights.tolist()
        return window | {TEACHER_INDEX: index}
