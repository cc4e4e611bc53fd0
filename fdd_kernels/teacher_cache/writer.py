"""Running a teacher over windows once and keeping what it gives."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fdd_kernels.cli.cache_options import SHARD_SIZE
from fdd_kernels.common.atomic import only_process
from fdd_kernels.data import Windows, pad_windows
from fdd_kernels.hf.layers import require_layers
from fdd_kernels.hf.teachers import LiveTeacher
from fdd_kernels.teacher_cache.cache import FINAL, KIND, TeacherCache, layer_name
from fdd_kernels.teacher_cache.codec import CODECS
from fdd_kernels.teacher_cache.index import ArraySpec
from fdd_kernels.teacher_cache.storage import CacheWriter, ShardBuffer
from fdd_kernels.teacher_cache.windows import CachedWindows, WindowTable, pack_windows


class CachedQuantity(ABC):
    """What a kind of cache stores of a teacher.

    Attributes:
        kind: its name in the index.
        arrays: what is stored for each position that counts.
        dtype: in which its rows are read.
        contents: JSON values that decide the rows, and whatever reading them needs to know.
        once: tensors that are stored once, by the name of their file.
    """

    kind: str
    arrays: dict[str, ArraySpec]
    dtype: torch.dtype
    contents: dict[str, Any]
    once: dict[str, dict[str, Tensor]]

    @abstractmethod
    def rows(self, batch: Mapping[str, Tensor], places: Tensor) -> dict[str, Tensor]:
        """Rows (n, width) of every array at `places`, indices into the flattened (batch,
        sequence).
        """


class OfLayers(CachedQuantity):
    """What is stored of a teacher's sampled layers and its final state, of whatever kind.

    Raises:
        ValueError: layers that the model does not have.
    """

    def __init__(self, teacher: LiveTeacher, layers: Sequence[int], apply_final_norm: bool) -> None:
        self.teacher, self.layers, self.apply_final_norm = teacher, tuple(layers), apply_final_norm
        require_layers("layers", self.layers, teacher.depth)

    def about_the_teacher(self) -> dict[str, Any]:
        """What every kind says of the teacher in `contents`; reads all of its weights."""
        return {
            "layers": list(self.layers),
            "depth": self.teacher.depth,
            "apply_final_norm": self.apply_final_norm,
            "vocab_size": self.teacher.vocabulary,
            "softcap": self.teacher.transform.softcap,
            "logit_scale": self.teacher.transform.scale,
            "teacher": describe_model(self.teacher.model),
        }


class TeacherStates(OfLayers):
    """The hidden states of sampled layers and the final one, ready for the head, and the head.

    Args:
        layers: 1-based; 0 are the embeddings.
        apply_final_norm: read the sampled layers through the model's final norm.
        codec: one of float32, bfloat16, int8, float8.

    Raises:
        ValueError: layers that the model does not have, an unknown codec.
    """

    kind = KIND

    def __init__(
        self, teacher: LiveTeacher, layers: Sequence[int], *, apply_final_norm: bool, codec: str
    ) -> None:
        super().__init__(teacher, layers, apply_final_norm)
        if codec not in CODECS:
            raise ValueError(f"codec={codec!r} is not one of {', '.join(map(repr, CODECS))}")
        weight, bias = teacher.head()
        self.arrays = {
            name: ArraySpec(weight.shape[1], codec)
            for name in (*map(layer_name, self.layers), FINAL)
        }
        self.dtype = weight.dtype
        self.contents = self.about_the_teacher() | {"dtype": str(self.dtype).removeprefix("torch.")}
        head = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        self.once = {"head": {name: tensor.cpu().contiguous() for name, tensor in head.items()}}

    def rows(self, batch: Mapping[str, Tensor], places: Tensor) -> dict[str, Tensor]:
        states = self.teacher.states(batch, self.layers, apply_final_norm=self.apply_final_norm)
        return {
            name: state.flatten(0, 1)[places.to(state.device)]
            for name, state in zip(self.arrays, states)
        }


def describe_model(model: nn.Module) -> dict[str, Any]:
    """What tells a model from another: its class, its config, and a SHA-256 of its weights.

    Weights that are not plain tensors in memory (offloaded, quantised) count with their names and
    shapes only.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.named_parameters()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if tensor.device.type != "meta" and type(tensor.data) is Tensor:
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    config = json.loads(model.config.to_json_string())
    return {
        "class": type(model).__name__,
        # Not where it lay, what wrote it, and how attention is computed here.
        "config": {
            key: value
            for key, value in config.items()
            if key[0] != "_" and key != "transformers_version"
        },
        "sha256": digest.hexdigest(),
    }


def tokenizer_digest(tokenizer) -> str:
    """SHA-256 of a tokenizer's vocabulary."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def write_teacher_cache(
    folder: str | Path,
    teacher: nn.Module,
    windows: Windows,
    *,
    layers: Sequence[int],
    apply_final_norm: bool = True,
    codec: str = "bfloat16",
    **storage,
) -> TeacherCache:
    """Run a teacher over windows and store its states; goes on with a cache of the same contents
    that was interrupted.

    Args:
        folder: made if it does not exist; nothing else may be in it.
        teacher: a transformers causal LM, where it is to run.
        windows: unpadded, with labels that are -100 where there is nothing to learn; only positions
            before a label are stored.
        layers, apply_final_norm, codec: see `TeacherStates`.
        **storage: batch_size, shard_size, tokenizer, data, resume, advance; see `write_cache`.

    Raises:
        ValueError: see `TeacherStates`, `pack_windows`, `CacheWriter`; states that are not finite.
        fdd_kernels.common.errors.UserError: another process writes there.
        OSError, safetensors.SafetensorError: it could not be written; whole shards are kept for the
            next call.
    """
    quantity = TeacherStates(
        LiveTeacher(teacher), layers, apply_final_norm=apply_final_norm, codec=codec
    )
    write_cache(Path(folder), quantity, windows, **storage)
    return TeacherCache(folder)


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
    """The same for any kind of cache; see `write_teacher_cache`.

    Args:
        batch_size: windows that the teacher reads at a time.
        shard_size: bytes of a shard at most; memory for one is needed.
        tokenizer: kept beside the rows, for whoever trains from them.
        data: what else tells these windows from others, such as names and digests of files.
        resume: False removes the cache in `folder` and starts again.
        advance: called with the number of windows that are done and of all.
    """
    for name, value in (("batch_size", batch_size), ("shard_size", shard_size)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    tensors = pack_windows(windows)
    table = WindowTable(tensors, len(windows.train))
    contents = {
        "kind": quantity.kind,
        **quantity.contents,
        "windows": _describe_windows(table, tensors),
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
            shard = ShardBuffer(
                quantity.arrays, int(table.rows[stop] - table.rows[start]), quantity.dtype
            )
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


def _describe_windows(table: WindowTable, tensors: dict[str, Tensor]) -> dict[str, Any]:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].numpy())
    return {
        "train": table.train,
        "held_out": len(table) - table.train,
        "train_tokens": int(table.starts[table.train]),
        "max_length": int(table.starts.diff().max()),
        "rows": int(table.rows[-1]),
        "sha256": digest.hexdigest(),
    }
