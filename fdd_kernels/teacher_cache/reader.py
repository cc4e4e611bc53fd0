"""Open a cache: files are memory-mapped, and only the requested rows are loaded."""

from __future__ import annotations

import warnings
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from fdd_kernels.data import IGNORED, Windows, file_digest
from fdd_kernels.hf.positions import TEACHER_INDEX
from fdd_kernels.hf.teachers import Teacher
from fdd_kernels.hf.transform import LogitTransform
from fdd_kernels.objectives.fdd.options import FDDConfig, LossOptions
from fdd_kernels.teacher_cache.codec import CODECS
from fdd_kernels.teacher_cache.format import (
    INDEX_FILE,
    TOKENIZER_FOLDER,
    ArraySpec,
    damaged_files,
    read_index,
    stored_tensors,
)
from fdd_kernels.teacher_cache.windows import CachedWindows, WindowTable


class CacheReader:
    """The files of a complete cache: index, tensors stored once, rows by array and window.

    Args:
        folder: the cache's directory.
        kind: the kind that it must be of.

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
                "the same fdd-kernels cache-teacher again, which resumes"
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
        """Size of all files in bytes."""
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
        """Compare the SHA-256 of every file.

        Raises:
            ValueError: names the files that changed since they were written.
        """
        self._refuse(damaged_files(self.folder, self._files, checksums=True))

    def once(self, name: str) -> dict[str, Tensor]:
        """Load the tensors that are stored once under `name`."""
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
        """Decode the rows (rows, width) of one array for `windows`, concatenated.

        Args:
            offsets: (all windows + 1,) int64, the row at which each window begins.
        """
        codec = CODECS[self.arrays[name].codec]
        parts: dict[str, list[Tensor]] = {part: [] for part in codec.parts(1)}
        for window in windows:
            number = bisect_right(self._starts, window) - 1
            shard, first = self._shard(number), int(offsets[self._starts[number]])
            start, stop = int(offsets[window]) - first, int(offsets[window + 1]) - first
            for part, found in parts.items():
                found.append(shard.get_slice(name + part)[start:stop])
        whole = {part: torch.cat(found).to(device) for part, found in parts.items()}
        return codec.decode(whole, dtype)


class WindowCache(Teacher):
    """Base of both cache kinds: the windows, and the teacher's identity, layers and transform.

    Files are memory-mapped, and opened again in every process that a cache is sent to.

    Args:
        path: the directory that `fdd-kernels cache-teacher` wrote.

    Attributes:
        layers: the sampled layers it holds, 1-based.
        apply_final_norm: whether the final norm was applied to them.
        name, depth, vocabulary: of the teacher.
        max_length: tokens in the longest window.
        relative_error: per array {"mean": |stored - given| / |given| over all rows, "worst_row": of
            one row}.
        digest: SHA-256 of the index, which holds the checksums of all other files.

    Raises:
        FileNotFoundError, ValueError: there is no cache, it is of another kind, not complete, or
            damaged; says what to do.
    """

    kind: str
    batch_columns = (TEACHER_INDEX,)

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.files = CacheReader(path, self.kind)
        contents = self.files.contents
        self.layers: tuple[int, ...] = tuple(contents["layers"])
        self.depth: int = contents["depth"]
        self.name = f"a cached {contents['teacher']['class']} of {self.depth} blocks"
        self.vocabulary: int = contents["vocab_size"]
        self.apply_final_norm: bool = contents["apply_final_norm"]
        self.transform = LogitTransform(contents["logit_scale"], contents["softcap"])
        self.max_length: int = contents["windows"]["max_length"]
        self.relative_error: dict[str, dict[str, float]] = self.files.index["relative_error"]
        self.digest = self.files.digest
        self.table = WindowTable(self.files.once("windows"), contents["windows"]["train"])

    @property
    def reader(self) -> CacheReader:
        """The name of `files` in earlier releases."""
        warnings.warn("WindowCache.reader is now .files", DeprecationWarning, stacklevel=2)
        return self.files

    def __reduce__(self):
        return type(self), (self.path,)

    def __len__(self) -> int:
        """Number of windows, training and validation."""
        return len(self.table)

    @property
    def tokenizer_folder(self) -> Path:
        """Folder of the tokenizer that made the windows, for `AutoTokenizer.from_pretrained`."""
        return self.path / TOKENIZER_FOLDER

    def dataset(self, split: str) -> CachedWindows:
        """Return the windows of "train" or "held_out" (the validation split) as a map-style dataset
        of lists, with `teacher_index`.
        """
        return self.table.dataset(split)

    @property
    def windows(self) -> Windows:
        """Both splits, as `fdd_kernels.data.load_windows` would return them."""
        counted = self.files.contents["windows"]
        return Windows(
            self.dataset("train"), self.dataset("held_out"), train_tokens=counted["train_tokens"]
        )

    def verify(self) -> None:
        """Compare the SHA-256 of every file.

        Raises:
            ValueError: names the files that changed since they were written.
        """
        self.files.verify()

    def require(self, config: FDDConfig, options: LossOptions, layers: tuple[int, ...]) -> None:
        missing = [layer for layer in layers if layer not in self.layers]
        if missing:
            raise ValueError(
                f"the run compares teacher layers {list(layers)}, but the cache {self.path} holds "
                f"{list(self.layers)}: choose among these with student_layers and teacher_layers, "
                "or cache the teacher again with the layers wanted"
            )
        if layers and config.apply_final_norm != self.apply_final_norm:
            raise ValueError(
                f"the run has apply_final_norm={config.apply_final_norm}, but the cache "
                f"{self.path} was made with apply_final_norm={self.apply_final_norm}: give the "
                "same, or cache the teacher again"
            )
        if config.ignore_index != IGNORED:
            raise ValueError(
                f"ignore_index={config.ignore_index}, but a teacher cache marks what does not "
                f"count by {IGNORED}"
            )
