"""Writing a cache, shard by shard, so that it can be killed at any moment and gone on with."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fdd_kernels.common.atomic import (
    atomic_directory,
    atomic_file,
    clear_unfinished,
    remove_directory,
    write_text,
)
from fdd_kernels.data import file_digest
from fdd_kernels.teacher_cache.codec import CODECS
from fdd_kernels.teacher_cache.index import (
    FORMAT,
    INDEX_FILE,
    TOKENIZER_FOLDER,
    VERSION,
    ArraySpec,
    damaged_files,
    differences,
    plan_shards,
    read_index,
    stored_tensors,
)
from fdd_kernels.version import __version__

_SHARD = "shard-{:05d}.safetensors"


class ShardBuffer:
    """The stored form of the rows of one shard, and how far it is from what was put in.

    Args:
        dtype: in which the rows will be read, and compared here with what was put in.
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
            ValueError: they are not finite, or not finite once stored.
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
            squares, errors = (
                exact.to(wide).square().sum(-1),
                (exact.to(wide) - stored.to(wide)).square().sum(-1),
            )
            worst = (errors / squares.clamp(min=torch.finfo(wide).tiny)).max().sqrt()
            total = self.errors[name]
            self.errors[name] = [
                total[0] + float(errors.sum()),
                total[1] + float(squares.sum()),
                max(total[2], float(worst)),
            ]
        self.filled += count


class CacheWriter:
    """Writes a cache, or goes on with the unfinished or damaged one of the same contents in the
    same directory.

    Args:
        folder: an existing directory, empty or with a cache.
        contents: JSON values that decide what the cache holds, `kind` among them.
        arrays: what is stored for each position that counts.
        counts: how many positions count in each window.
        shard_size: bytes of a shard.
        resume: False removes the cache that is there and starts again.

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
        self.plan = plan_shards(counts, arrays, shard_size)
        contents = contents | {
            "arrays": {name: asdict(spec) for name, spec in arrays.items()},
            "shard_size": shard_size,
        }
        contents = json.loads(json.dumps(contents))
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
        if before is None or not resume:
            versions = {"fdd_kernels": __version__, "torch": torch.__version__}
            self.index = {
                "format": FORMAT,
                "version": VERSION,
                "complete": False,
                "files": {},
                "shards": {},
                "contents": contents,
                "versions": versions,
            }
            self._write_index()
            for shard in folder.glob(_SHARD.replace("{:05d}", "*")):
                shard.unlink()
            if (folder / TOKENIZER_FOLDER).is_dir():
                remove_directory(folder / TOKENIZER_FOLDER)
        else:
            damaged = damaged_files(folder, before["shards"], checksums=False)
            shards = {
                name: shard for name, shard in before["shards"].items() if name not in damaged
            }
            self.index = before | {"shards": shards, "complete": before["complete"] and not damaged}

    def _require_same(self, before: dict[str, Any], contents: dict[str, Any]) -> None:
        different = differences(before["contents"], contents)
        if different:
            raise ValueError(
                f"{self.folder} holds another cache ({'; '.join(different[:3])}): give the same "
                "options to go on with it, "
                "another directory, or --no-resume to remove it and start again"
            )
        damaged = damaged_files(self.folder, before["files"], checksums=False)
        if damaged:
            what = "; ".join(f"{name} {problem}" for name, problem in damaged.items())
            raise ValueError(f"{self.folder} is damaged ({what}): start again with --no-resume")

    @property
    def complete(self) -> bool:
        """Whether there is nothing left to write."""
        return self.index["complete"]

    @property
    def missing(self) -> list[tuple[int, tuple[int, int]]]:
        """The shards to write: number and windows [start, stop)."""
        return [
            (n, windows)
            for n, windows in enumerate(self.plan)
            if _SHARD.format(n) not in self.index["shards"]
        ]

    def _save(self, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
        with atomic_file(self.folder / name) as part:
            save_file(tensors, part)
            # safetensors lets nobody else read it
            part.chmod((self.folder / INDEX_FILE).stat().st_mode)
            return _record(part)

    def _write_index(self) -> None:
        write_text(self.folder / INDEX_FILE, json.dumps(self.index, indent=1) + "\n")

    def write_once(self, files: dict[str, dict[str, Tensor]], tokenizer=None) -> None:
        """Write what is stored once, unless an earlier writer did: tensors by name of their file,
        and the tokenizer.
        """
        if self.index["files"]:
            return
        written = {
            f"{name}.safetensors": self._save(f"{name}.safetensors", tensors)
            for name, tensors in files.items()
        }
        if tokenizer is not None:
            with atomic_directory(self.folder / TOKENIZER_FOLDER) as folder:
                tokenizer.save_pretrained(folder)
                paths = sorted(path for path in folder.rglob("*") if path.is_file())
                written |= {
                    f"{TOKENIZER_FOLDER}/{path.relative_to(folder).as_posix()}": _record(path)
                    for path in paths
                }
        self.index["files"] = written
        self._write_index()

    def write_shard(self, number: int, shard: ShardBuffer) -> None:
        """Write one shard and make it known.

        Raises:
            OSError, safetensors.SafetensorError: it could not be written; everything before it is
                kept.
        """
        name = _SHARD.format(number)
        record = self._save(name, shard.tensors)
        record |= {"windows": list(self.plan[number]), "rows": shard.filled, "errors": shard.errors}
        self.index = self.index | {
            "shards": dict(sorted((self.index["shards"] | {name: record}).items())),
            "complete": False,
        }
        self._write_index()

    def finish(self) -> None:
        """Call the cache complete."""
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
