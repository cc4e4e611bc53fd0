"""Write a cache shard by shard: a writer that was killed at any moment can be resumed."""

from __future__ import annotations

import importlib
import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fdd_kernels.common.atomic import (
    atomic_directory,
    atomic_file,
    clear_unfinished,
    only_process,
    remove_directory,
    write_text,
)
from fdd_kernels.data import Windows, file_digest, pad_windows
from fdd_kernels.teacher_cache import SHARD_SIZE
from fdd_kernels.teacher_cache.codec import CODECS
from fdd_kernels.teacher_cache.format import (
    FORMAT,
    INDEX_FILE,
    TOKENIZER_FOLDER,
    VERSION,
    ArraySpec,
    damaged_files,
    differences,
    read_index,
    split_into_shards,
    stored_tensors,
)
from fdd_kernels.teacher_cache.identity import tokenizer_digest
from fdd_kernels.teacher_cache.windows import CachedWindows, WindowTable, pack_windows
from fdd_kernels.version import __version__

_SHARD = "shard-{:05d}.safetensors"
# Names that were here in earlier releases, by their module.
_MOVED = dict.fromkeys(
    ("FINAL", "KIND", "TeacherCache", "layer_name", "write_teacher_cache"), "hidden"
) | {"describe_model": "identity"}


@dataclass(frozen=True)
class CachedQuantity:
    """What one kind of cache stores of a teacher.

    Attributes:
        kind: its name in the index.
        arrays: what is stored for each valid position.
        dtype: in which rows are decoded.
        contents: JSON values that decide the rows, and whatever decoding them takes.
        once: tensors that are stored once, by the name of their file.
        rows: (batch, places) -> rows (n, width) of every array at `places` (n,), indices into the
            flattened (batch, sequence).
    """

    kind: str
    arrays: dict[str, ArraySpec]
    dtype: torch.dtype
    contents: dict[str, Any]
    once: dict[str, dict[str, Tensor]]
    rows: Callable[[Mapping[str, Tensor], Tensor], dict[str, Tensor]]


def write_cache(
    folder: Path,
    quantity: CachedQuantity,
    windows: Windows,
    *,
    batch_size: int = 8,
    shard_size: int = SHARD_SIZE,
    tokenizer=None,
    data: dict[str, str] | None = None,
    resume: bool = True,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Compute the rows of all windows and store them; see `write_teacher_cache`.

    Args:
        batch_size: windows per forward pass of the teacher.
        shard_size: bytes of a shard at most; memory for one is needed.
        tokenizer: stored beside the rows, for training from them.
        data: what else tells these windows from others, such as names and digests of files.
        resume: False removes the cache in `folder` and starts again.
        advance: called with the number of finished windows and of all windows.
    """
    for name, value in (("batch_size", batch_size), ("shard_size", shard_size)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    tensors = pack_windows(windows)
    table = WindowTable(tensors, len(windows.train))
    contents = {
        "kind": quantity.kind,
        **quantity.contents,
        "windows": table.describe(),
        "data": data,
        "tokenizer": None if tokenizer is None else tokenizer_digest(tokenizer),
    }
    folder.mkdir(parents=True, exist_ok=True)
    with only_process(folder):
        counts = table.rows.diff().tolist()
        writer = CacheWriter(
            folder, contents, quantity.arrays, counts, shard_size=shard_size, resume=resume
        )
        if writer.complete:
            advance(len(table), len(table))
            return
        writer.write_once({**quantity.once, "windows": tensors}, tokenizer)
        missing = writer.missing
        done = len(table) - sum(stop - start for _, (start, stop) in missing)
        every = CachedWindows(table, range(len(table)))
        for number, (start, stop) in missing:
            rows = int(table.rows[stop] - table.rows[start])
            shard = ShardBuffer(quantity.arrays, rows, quantity.dtype)
            for first in range(start, stop, batch_size):
                last = min(first + batch_size, stop)
                advance(done, len(table))
                batch = pad_windows([every[window] for window in range(first, last)])
                try:
                    shard.append(quantity.rows(batch, table.match(batch)[1]))
                except ValueError as error:
                    raise ValueError(f"windows {first} to {last - 1}: {error}") from error
                done += last - first
            writer.write_shard(number, shard)
        writer.finish()
        advance(done, len(table))


class ShardBuffer:
    """The encoded rows of one shard, and their rounding error.

    Args:
        dtype: in which the rows will be decoded; the error is measured in it.
    """

    def __init__(self, arrays: dict[str, ArraySpec], rows: int, dtype: torch.dtype) -> None:
        self.arrays, self.dtype, self.filled = arrays, dtype, 0
        tensors = stored_tensors(arrays, rows).items()
        self.tensors = {name: torch.empty(shape, dtype=stored) for name, (stored, shape) in tensors}
        # name -> sum of squared errors, sum of squares, largest relative error of a row
        self.errors = {name: [0.0, 0.0, 0.0] for name in arrays}

    def append(self, rows: dict[str, Tensor]) -> None:
        """Add rows (n, width) of every array.

        Raises:
            ValueError: they are not finite, or not finite once encoded.
        """
        wide = torch.promote_types(self.dtype, torch.float32)
        count = {len(values) for values in rows.values()}.pop()
        for name, spec in self.arrays.items():
            codec, exact = CODECS[spec.codec], rows[name].detach().cpu()
            parts = codec.encode(exact)
            stored = codec.decode(parts, self.dtype)
            if not (exact.isfinite().all() and stored.isfinite().all()):
                raise ValueError(
                    f"{name} has values that are not finite, or too large for {spec.codec}"
                )
            for part, tensor in parts.items():
                self.tensors[name + part][self.filled : self.filled + count] = tensor
            squares = exact.to(wide).square().sum(-1)
            errors = (exact.to(wide) - stored.to(wide)).square().sum(-1)
            worst = (errors / squares.clamp(min=torch.finfo(wide).tiny)).max().sqrt()
            total = self.errors[name]
            total[0] += float(errors.sum())
            total[1] += float(squares.sum())
            total[2] = max(total[2], float(worst))
        self.filled += count


class CacheWriter:
    """Write a cache, or resume the unfinished or damaged one of equal contents in its directory.

    Args:
        folder: an existing directory, empty or with a cache.
        contents: JSON values that decide what the cache holds, `kind` among them.
        arrays: what is stored for each valid position.
        counts: the number of valid positions of each window.
        shard_size: bytes of a shard.
        resume: False removes the existing cache and starts again.

    Raises:
        ValueError: the directory holds a cache of other contents, or other files and no cache.
    """

    def __init__(
        self,
        folder: Path,
        contents: dict[str, Any],
        arrays: dict[str, ArraySpec],
        counts: Sequence[int],
        *,
        shard_size: int,
        resume: bool = True,
    ) -> None:
        self.folder, self.arrays = folder, arrays
        self.plan = split_into_shards(counts, arrays, shard_size)
        specs = {name: asdict(spec) for name, spec in arrays.items()}
        contents = json.loads(json.dumps(contents | {"arrays": specs, "shard_size": shard_size}))
        before = read_index(folder)
        others = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
        if before is None and others:
            raise ValueError(
                f"{folder} holds {others[0]} and no cache: use an empty directory, or one that "
                "does not exist"
            )
        if before is not None and resume:
            self._require_same(before, contents)
        clear_unfinished(folder)
        if before is not None and resume:
            damaged = damaged_files(folder, before["shards"], checksums=False)
            shards = {
                name: shard for name, shard in before["shards"].items() if name not in damaged
            }
            self.index = before | {"shards": shards, "complete": before["complete"] and not damaged}
            return
        self.index = {
            "format": FORMAT,
            "version": VERSION,
            "complete": False,
            "files": {},
            "shards": {},
            "contents": contents,
            "versions": {"fdd_kernels": __version__, "torch": torch.__version__},
        }
        self._write_index()
        for shard in folder.glob(_SHARD.replace("{:05d}", "*")):
            shard.unlink()
        if (folder / TOKENIZER_FOLDER).is_dir():
            remove_directory(folder / TOKENIZER_FOLDER)

    def _require_same(self, before: dict[str, Any], contents: dict[str, Any]) -> None:
        different = differences(before["contents"], contents)
        if different:
            raise ValueError(
                f"{self.folder} holds another cache ({'; '.join(different[:3])}): give the same "
                "options to resume it, another directory, or --no-resume to remove it and "
                "start again"
            )
        damaged = damaged_files(self.folder, before["files"], checksums=False)
        if damaged:
            what = "; ".join(f"{name} {problem}" for name, problem in damaged.items())
            raise ValueError(f"{self.folder} is damaged ({what}): start again with --no-resume")

    @property
    def complete(self) -> bool:
        """Whether all shards are written."""
        return self.index["complete"]

    @property
    def missing(self) -> list[tuple[int, tuple[int, int]]]:
        """The shards to write: number and windows [start, stop)."""
        shards = enumerate(self.plan)
        return [(n, run) for n, run in shards if _SHARD.format(n) not in self.index["shards"]]

    def _save(self, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
        with atomic_file(self.folder / name) as part:
            save_file(tensors, part)
            # safetensors makes files that only their owner can open
            part.chmod((self.folder / INDEX_FILE).stat().st_mode)
            return _record(part)

    def _write_index(self) -> None:
        write_text(self.folder / INDEX_FILE, json.dumps(self.index, indent=1) + "\n")

    def write_once(self, files: dict[str, dict[str, Tensor]], tokenizer=None) -> None:
        """Write tensors by name of their file, and the tokenizer, unless an earlier writer did."""
        if self.index["files"]:
            return
        names = {f"{name}.safetensors": tensors for name, tensors in files.items()}
        written = {name: self._save(name, tensors) for name, tensors in names.items()}
        if tokenizer is not None:
            with atomic_directory(self.folder / TOKENIZER_FOLDER) as folder:
                tokenizer.save_pretrained(folder)
                for path in sorted(path for path in folder.rglob("*") if path.is_file()):
                    name = f"{TOKENIZER_FOLDER}/{path.relative_to(folder).as_posix()}"
                    written[name] = _record(path)
        self.index["files"] = written
        self._write_index()

    def write_shard(self, number: int, shard: ShardBuffer) -> None:
        """Write one shard and add it to the index.

        Raises:
            OSError, safetensors.SafetensorError: not written; earlier shards are intact.
        """
        name = _SHARD.format(number)
        record = self._save(name, shard.tensors)
        record |= {"windows": list(self.plan[number]), "rows": shard.filled, "errors": shard.errors}
        shards = dict(sorted((self.index["shards"] | {name: record}).items()))
        self.index = self.index | {"shards": shards, "complete": False}
        self._write_index()

    def finish(self) -> None:
        """Mark the cache complete, with the relative error of each array."""
        relative = {}
        for name in self.arrays:
            errors = [shard["errors"][name] for shard in self.index["shards"].values()]
            squares = sum(e[1] for e in errors)
            mean = math.sqrt(sum(e[0] for e in errors) / squares) if squares else 0.0
            relative[name] = {"mean": mean, "worst_row": max(e[2] for e in errors)}
        self.index |= {"relative_error": relative, "complete": True}
        self._write_index()


def _record(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": file_digest(path)}


def __getattr__(name: str):
    if name not in _MOVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = f"fdd_kernels.teacher_cache.{_MOVED[name]}"
    warnings.warn(f"{__name__}.{name} is now in {home}", DeprecationWarning, stacklevel=2)
    return getattr(importlib.import_module(home), name)
