"""The cache of a teacher's hidden states, and of its head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from fdd_kernels.data import Windows
from fdd_kernels.hf.targets import HiddenTargets
from fdd_kernels.hf.tasks import require_causal_lm
from fdd_kernels.hf.teachers import LiveTeacher
from fdd_kernels.teacher_cache.codec import CODECS
from fdd_kernels.teacher_cache.format import ArraySpec
from fdd_kernels.teacher_cache.identity import describe_teacher
from fdd_kernels.teacher_cache.reader import WindowCache
from fdd_kernels.teacher_cache.writer import CachedQuantity, write_cache

KIND = "states"
FINAL = "final"


def layer_name(layer: int) -> str:
    """Return the name of the array with a sampled layer's states."""
    return f"layer_{layer}"


def hidden_states(
    teacher: LiveTeacher, layers: Sequence[int], *, apply_final_norm: bool, codec: str
) -> CachedQuantity:
    """Describe the cache of sampled layers and the final state, ready for the head, and the head.

    Args:
        layers: 1-based; 0 are the embeddings.
        apply_final_norm: apply the model's final norm to sampled layers.
        codec: one of float32, bfloat16, int8, float8.

    Raises:
        ValueError: layers that the model does not have, an unknown codec.
    """
    if codec not in CODECS:
        raise ValueError(f"codec={codec!r} is not one of {', '.join(map(repr, CODECS))}")
    about = describe_teacher(teacher, layers, apply_final_norm)
    weight, bias = teacher.head()
    names = [*map(layer_name, layers), FINAL]
    head = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}

    def rows(batch: Mapping[str, Tensor], places: Tensor) -> dict[str, Tensor]:
        states = teacher.targets(batch, tuple(layers), apply_final_norm=apply_final_norm)
        return {
            name: state.flatten(0, 1)[places.to(state.device)] for name, state in zip(names, states)
        }

    return CachedQuantity(
        kind=KIND,
        arrays={name: ArraySpec(weight.shape[1], codec) for name in names},
        dtype=weight.dtype,
        contents=about | {"dtype": str(weight.dtype).removeprefix("torch.")},
        once={"head": {name: tensor.cpu().contiguous() for name, tensor in head.items()}},
        rows=rows,
    )


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
    """Run a teacher over windows and store its states; resume a cache of equal contents.

    Args:
        folder: made if it does not exist; nothing else may be in it.
        teacher: a transformers causal LM, on the device where it is to run.
        windows: unpadded, with labels that are -100 where there is nothing to learn; only positions
            before a label are stored.
        layers, apply_final_norm, codec: see `hidden_states`.
        **storage: batch_size, shard_size, tokenizer, data, resume, advance; see `write_cache`.

    Raises:
        TypeError: the teacher is no causal LM.
        ValueError: see `hidden_states`, `pack_windows`, `CacheWriter`; states that are not finite.
        fdd_kernels.common.errors.UserError: another process writes there.
        OSError, safetensors.SafetensorError: it could not be written; the next call resumes from
            the shards that are complete.
    """
    live = LiveTeacher(teacher)
    require_causal_lm(live.task, "a teacher cache")
    quantity = hidden_states(live, layers, apply_final_norm=apply_final_norm, codec=codec)
    write_cache(Path(folder), quantity, windows, **storage)
    return TeacherCache(folder)


class TeacherCache(WindowCache):
    """A teacher's sampled states at every valid position, and its head; replaces the teacher.

        cache = TeacherCache("cache")
        distiller = Distiller(student, cache)
        loader = DataLoader(
            cache.dataset("train"), batch_size=8, shuffle=True, collate_fn=pad_windows
        )

    Batches say in `teacher_index` (batch,) int64 which windows they are;
    `fdd_kernels.data.pad_windows` collates it. A run may use fewer layers than it holds. States
    come in `dtype`, the teacher's, whatever they are stored in. For the rest see `WindowCache`.
    """

    kind = KIND

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self.dtype: torch.dtype = getattr(torch, self.files.contents["dtype"])
        self._head = self.files.once("head")

    def head(self, device: torch.device | None = None) -> tuple[Tensor, Tensor | None]:
        """Return the head; moved to `device` once, if given, and left there."""
        if device is not None:
            self._head = {name: tensor.to(device) for name, tensor in self._head.items()}
        return self._head["weight"], self._head.get("bias")

    def targets(
        self,
        batch: Mapping[str, Tensor],
        layers: tuple[int, ...],
        *,
        apply_final_norm: bool,
        final: bool = True,
    ) -> HiddenTargets:
        """Load the states (batch, sequence, Dt) of a batch of the cache's windows; 0 at positions
        that are not valid.

        Raises:
            ValueError: rows of the batch are not the windows they are said to be, or other
                positions are valid in them.
        """
        windows, places = self.table.match(batch)
        shape, device = batch["input_ids"].shape, batch["input_ids"].device
        places = places.to(device)

        def spread(name: str) -> Tensor:
            rows = self.files.rows(name, windows, self.table.rows, dtype=self.dtype, device=device)
            flat = rows.new_zeros(shape.numel(), rows.shape[1])
            return flat.index_copy_(0, places, rows).view(*shape, -1)

        return [*(spread(layer_name(layer)) for layer in layers), spread(FINAL) if final else None]
