"""Reading a cache where it lies: files are memory-mapped, and only the rows asked for are
touched.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from fdd_kernels.data import file_digest
from fdd_kernels.teacher_cache.codec import CODECS
from fdd_kernels.teacher_cache.index import (
    INDEX_FILE,
    ArraySpec,
    damaged_files,
    read_index,
    stored_tensors,
)


class CacheReader:
    """A complete cache: its index, what is stored once, and rows by array and window.

    Args:
        folder: the cache's directory.
        kind: what it must be a cache of.

    Raises:
        FileNotFoundError: there is no cache.
        ValueError: it is of another kind, not complete, or a file is missing or has another size.
    """

    def __init__(self, folder: str | Path, kind: str) -> None:
        self.folder = Path(folder)
        index = read_index(self.folder)
        if index is None:
            raise FileNotFoundError(
                f"{self.folder} holds no teacher cache (there is no {INDEX_FILE})"
            )
        self.index, self.contents = index, index["contents"]
        if self.contents["kind"] != kind:
            raise ValueError(
                f"{self.folder} is a cache of {self.contents['kind']}, but one of {kind} is needed"
            )
        if not index["complete"]:
            raise ValueError(
                f"{self.folder} is not complete ({len(index['shards'])} shards are written): run "
                "the same "
                "fdd-kernels cache-teacher again, which goes on from there"
            )
        self._refuse(damaged_files(self.folder, self._files, checksums=False))
        self.digest = file_digest(self.folder / INDEX_FILE)
        self.arrays = {name: ArraySpec(**spec) for name, spec in self.contents["arrays"].items()}
        self._shards = sorted(index["shards"].items(), key=lambda item: item[1]["windows"][0])
        self._starts = [shard["windows"][0] for _, shard in self._shards]
        self._opened: dict[int, Any] = {}

    @property
    def _files(self) -> dict[str, dict[str, Any]]:
        return self.index["files"] | self.index["shards"]

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(file["bytes"] for file in self._files.values())

    def _refuse(self, damaged: dict[str, str]) -> None:
        if damaged:
            what = "; ".join(f"{name} {problem}" for name, problem in damaged.items())
            shards = all(name in self.index["shards"] for name in damaged)
            remedy = (
                "remove these shards and run the same fdd-kernels cache-teacher again"
                if shards
                else "run the same fdd-kernels cache-teacher with --no-resume"
            )
            raise ValueError(f"{self.folder} is damaged ({what}): {remedy}")

    def verify(self) -> None:
        """Read everything and compare checksums.

        Raises:
            ValueError: names the files that changed since they were written.
        """
        self._refuse(damaged_files(self.folder, self._files, checksums=True))

    def once(self, name: str) -> dict[str, Tensor]:
        """Tensors that are stored once."""
        return load_file(self.folder / f"{name}.safetensors")

    def _shard(self, number: int):
        if number not in self._opened:
            name, record = self._shards[number]
            try:
                file = safe_open(self.folder / name, framework="pt")
                shapes = {
                    tensor: tuple(file.get_slice(tensor).get_shape())
                    for tensor in list(file.keys())
                }
            except SafetensorError as error:
                raise ValueError(f"{self.folder / name} cannot be read: {error}") from error
            expected = {
                tensor: shape
                for tensor, (_, shape) in stored_tensors(self.arrays, record["rows"]).items()
            }
            if shapes != expected:
                raise ValueError(
                    f"{self.folder / name} holds tensors of shapes {shapes}, the index says "
                    f"{expected}"
                )
            self._opened[number] = file
        return self._opened[number]

    def rows(
        self,
        name: str,
        windows: Sequence[int],
        offsets: Tensor,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Tensor:
        """The rows (rows, width) of one array for some windows, one after the other.

        Args:
            offsets: (windows + 1,) int64, the row at which each window begins.
        """
        codec = CODECS[self.arrays[name].codec]
        parts: dict[str, list[Tensor]] = {part: [] for part in codec.parts(1)}
        for window in windows:
            number = bisect_right(self._starts, window) - 1
            shard, first = self._shard(number), int(offsets[self._starts[number]])
            start, stop = int(offsets[window]) - first, int(offsets[window + 1]) - first
            for part, found in parts.items():
                found.append(shard.get_slice(name + part)[start:stop])
        return codec.decode(
            {part: torch.cat(found).to(device) for part, found in parts.items()}, dtype
        )
