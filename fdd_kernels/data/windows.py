"""Turn documents into token windows with labels, stored in Arrow: 9 bytes a token, where Python
lists take 47.
"""

from __future__ import annotations

import random
import uuid
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fdd_kernels.common.errors import UserError
from fdd_kernels.data.chats import chat_pieces
from fdd_kernels.data.collate import IGNORED
from fdd_kernels.data.records import TOKEN_WEIGHTS, Chat, Record, Tokens
from fdd_kernels.data.sources import Source, import_datasets, open_source

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

Window = Mapping[str, Sequence[int]]
# Tokens in one piece of an Arrow table: little memory while it is built, and offsets fit in 32
# bits.
_PIECE = 1 << 20


@dataclass
class Windows:
    """Token windows (input_ids, attention_mask, labels; at most max_length tokens each). If a
    document has `token_weights`, every window has, 1 where its document has none.

    Attributes:
        train: training windows: those of `load_windows`, a list, or a `datasets.Dataset`.
        held_out: validation windows, likewise.
        documents: number of documents read.
        without_labels: documents left out because they have no token to predict.
        train_tokens: tokens in the training windows, prompts included.
        not_shared: documents with windows left out because of tokens that only one model has.
    """

    train: Sequence[Window] | Dataset = field(default_factory=list)
    held_out: Sequence[Window] | Dataset = field(default_factory=list)
    documents: int = 0
    without_labels: list[str] = field(default_factory=list)
    train_tokens: int = 0
    not_shared: list[str] = field(default_factory=list)


def tokenize(record: Record, tokenizer) -> tuple[list[int], list[int]]:
    """Tokenize one document into ids and labels; labels are -100 for tokens that are not learned.

    Raises:
        UserError: the tokenizer's template cannot write the chat.
    """
    ids: list[int] = []
    labels: list[int] = []

    def add(tokens: list[int], learned: bool) -> None:
        ids.extend(tokens)
        labels.extend(tokens if learned else [IGNORED] * len(tokens))

    def encode(text: str, special: bool) -> list[int]:
        return tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]

    if isinstance(record.value, Tokens):
        return record.value.ids, record.value.labels
    end = tokenizer.eos_token_id
    if isinstance(record.value, Chat):
        for text, learned in chat_pieces(record.value, tokenizer, record.source):
            add(encode(text, False), learned)
        return ids, labels
    prompt, text = record.value if isinstance(record.value, tuple) else (None, record.value)
    if prompt is None:
        add(encode(text, True), True)
    else:
        before = encode(prompt, True)
        add(before[:-1] if before and before[-1] == end else before, False)
        add(encode(text, False), True)
    if end is not None and (not ids or ids[-1] != end):
        add([end], True)
    return ids, labels


def load_windows(
    data: str | Path | Dataset | IterableDataset | Source,
    tokenizer,
    *,
    max_length: int,
    eval_fraction: float,
    seed: int,
    unshared: frozenset[int] = frozenset(),
    advance: Callable[[int], None] = lambda amount: None,
) -> Windows:
    """Read, tokenize, cut into windows, and split off validation windows.

    Plain texts are cut into windows of `max_length` tokens; prompts with completions and chats are
    truncated to `max_length`. The validation split takes whole documents, chosen by `seed`, up to
    `eval_fraction` of the windows. Of a single document it takes the last windows.

    Args:
        data: see `open_source`. A streamed data set is read once, to its end.
        unshared: tokens that student and teacher do not share; windows with one are left out.
        advance: called with the amount read, in bytes of files or rows of a data set.

    Raises:
        UserError: see `open_source`, `read_records`, `tokenize`; or there is nothing to learn.
    """
    source, result, table = open_source(data), Windows(), _WindowTable()
    counts: list[int] = []  # windows of each document that has any
    for record in source.records(advance):
        result.documents += 1
        ids, labels = tokenize(record, tokenizer)
        weights = record.weights
        if isinstance(weights, float):
            weights = [weights] * len(ids)
        added, foreign = 0, None
        for start in (
            range(0, len(ids), max_length) if isinstance(record.value, str | Tokens) else (0,)
        ):
            part = slice(start, start + max_length)
            if not unshared.isdisjoint(ids[part]):
                foreign = next(token for token in ids[part] if token in unshared)
            elif any(label != IGNORED for label in labels[part][1:]):
                table.add(ids[part], labels[part], None if weights is None else weights[part])
                added += 1
        if foreign is not None:
            result.not_shared.append(
                f"{record.source} ({foreign}, {tokenizer.convert_ids_to_tokens(foreign)!r})"
            )
        if added:
            counts.append(added)
        elif foreign is None:
            result.without_labels.append(record.source)
    if not counts:
        raise UserError(_nothing_to_learn(source.name, result, max_length))
    train, held_out = _split(counts, eval_fraction, seed)
    lengths, windows = np.frombuffer(table.lengths, np.int32), table.dataset()
    result.train, result.held_out = windows.select(train), windows.select(held_out)
    result.train_tokens = int(lengths[train].sum())
    return result


def _nothing_to_learn(name: str, result: Windows, max_length: int) -> str:
    if result.not_shared and not result.without_labels:
        return (
            f"{name}: every document holds a token that only one model has, as "
            f"{result.not_shared[0]} does"
        )
    example = f" (for example {result.without_labels[0]})" if result.without_labels else ""
    return (
        f"{name}: nothing to learn: {result.documents} documents, none with a token to predict "
        f"within max_length={max_length}{example}"
    )


def _split(counts: list[int], eval_fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices of training and validation windows, where document d has counts[d] windows."""
    starts = np.concatenate([[0], np.cumsum(counts)]).tolist()
    total = starts[-1]
    wanted = (
        min(max(1, round(eval_fraction * total)), total - 1) if eval_fraction and total > 1 else 0
    )
    order = list(range(len(counts)))
    random.Random(seed).shuffle(order)
    held_out: list[int] = []
    held: set[int] = set()
    for index in order:
        if len(held_out) + counts[index] <= wanted:
            held_out += range(starts[index], starts[index + 1])
            held.add(index)
    train = [
        w for d in range(len(counts)) if d not in held for w in range(starts[d], starts[d + 1])
    ]
    if wanted and not held_out:
        train, held_out = train[:-wanted], train[-wanted:]
    return train, held_out


class _WindowTable:
    """Collect windows in Arrow, piece by piece."""

    def __init__(self) -> None:
        self.lengths = array("i")
        self._pieces: list = []
        self._start()

    def _start(self) -> None:
        self._ids, self._labels, self._first = array("i"), array("i"), len(self.lengths)
        self._weights = array("f")  # of all tokens up to the last window that has weights

    def add(self, ids: list[int], labels: list[int], weights: list[float] | None) -> None:
        if weights is not None:
            self._weights.extend([1.0] * (len(self._ids) - len(self._weights)) + weights)
        self._ids.extend(ids)
        self._labels.extend(labels)
        self.lengths.append(len(ids))
        if len(self._ids) >= _PIECE:
            self._close()

    def _close(self) -> None:
        import pyarrow as pa

        if len(self.lengths) == self._first:
            return
        offsets = pa.array(
            np.concatenate([[0], np.cumsum(self.lengths[self._first :])]), pa.int32()
        )
        ids, labels = (np.frombuffer(values, np.int32) for values in (self._ids, self._labels))
        columns = {"input_ids": ids, "attention_mask": np.ones(len(ids), np.int8), "labels": labels}
        if self._weights:
            weights = np.ones(len(ids), np.float32)
            weights[: len(self._weights)] = self._weights
            columns[TOKEN_WEIGHTS] = weights
        arrays = [
            pa.ListArray.from_arrays(offsets, pa.array(values)) for values in columns.values()
        ]
        self._pieces.append(pa.Table.from_arrays(arrays, names=list(columns)))
        self._start()

    def dataset(self) -> Dataset:
        """All windows, in the order they were added."""
        import pyarrow as pa

        datasets = import_datasets("windows")
        self._close()
        pieces = self._pieces
        if any(TOKEN_WEIGHTS in piece.column_names for piece in pieces):
            pieces = [_weighted(piece) for piece in pieces]
        # With a fingerprint given, the data set does not hash its content.
        return datasets.Dataset(pa.concat_tables(pieces), fingerprint=uuid.uuid4().hex)


def _weighted(piece):
    """Return a piece with weights, 1 if it has none."""
    import pyarrow as pa

    if TOKEN_WEIGHTS in piece.column_names:
        return piece
    ids = piece["input_ids"].chunk(0)
    ones = pa.array(np.ones(len(ids.values), np.float32))
    return piece.append_column(TOKEN_WEIGHTS, pa.ListArray.from_arrays(ids.offsets, ones))
