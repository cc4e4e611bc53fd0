"""The index of a cache: its contents, its files, and whether they are unchanged.

A cache is a directory of

    index.json                        `contents`, size and SHA-256 of every file, `complete`
    shard-00000.safetensors, ...      the encoded rows of every array, for whole windows
    NAME.safetensors, tokenizer/      what is stored once

Each file is on disk before the index names it. So the index that a killed writer leaves is correct,
and the next writer resumes from it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fdd_kernels.data import file_digest
from fdd_kernels.teacher_cache.codec import CODECS

FORMAT, VERSION = "fdd_kernels.teacher_cache", 1
INDEX_FILE, TOKENIZER_FOLDER = "index.json", "tokenizer"


@dataclass(frozen=True)
class ArraySpec:
    """One array: a row of `width` numbers for each valid position, encoded by the named codec."""

    width: int
    codec: str

    @property
    def bytes_per_row(self) -> int:
        return CODECS[self.codec].bytes_per_row(self.width)


def stored_tensors(
    arrays: dict[str, ArraySpec], rows: int
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return the tensors of a shard of `rows` rows: name -> (dtype, shape)."""
    return {
        name + part: (dtype, (rows, *shape))
        for name, spec in arrays.items()
        for part, (dtype, shape) in CODECS[spec.codec].parts(spec.width).items()
    }


def split_into_shards(
    counts: Sequence[int], arrays: dict[str, ArraySpec], shard_size: int
) -> list[tuple[int, int]]:
    """Split windows, window i with `counts[i]` rows, into runs [start, stop) of at most
    `shard_size` bytes; a larger window is a run of its own.
    """
    most = shard_size // sum(spec.bytes_per_row for spec in arrays.values())
    runs, start, rows = [], 0, 0
    for window, count in enumerate(counts):
        if window > start and rows + count > most:
            runs.append((start, window))
            start, rows = window, 0
        rows += count
    return [*runs, (start, len(counts))]


def read_index(folder: Path) -> dict[str, Any] | None:
    """Return the index of a cache, complete or not; None if there is none.

    Raises:
        ValueError: it cannot be read, or is of another format or version.
    """
    path = folder / INDEX_FILE
    if not path.exists():
        return None
    try:
        index = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise ValueError(f"{path} is not the index of a teacher cache")
    if index.get("version") != VERSION:
        raise ValueError(
            f"{path} has version {index.get('version')}, this fdd_kernels reads version {VERSION}: "
            "cache into another directory"
        )
    return index


def damaged_files(
    folder: Path, files: dict[str, dict[str, Any]], *, checksums: bool
) -> dict[str, str]:
    """Return the files that differ from the index: name -> problem. Compares sizes, with
    `checksums` also SHA-256.
    """
    damaged = {}
    for name, recorded in files.items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            damaged[name] = "lies outside of the cache"
        elif not path.is_file():
            damaged[name] = "is missing"
        elif path.stat().st_size != recorded["bytes"]:
            damaged[name] = f"has {path.stat().st_size} bytes instead of {recorded['bytes']}"
        elif checksums and file_digest(path) != recorded["sha256"]:
            damaged[name] = "has another SHA-256 than when it was written"
    return damaged


def differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """Describe in words where two nested JSON objects differ."""
    found = []
    for key in {**before, **now}:
        a, b = before.get(key), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key} was {a!r}, is {b!r}")
    return found
