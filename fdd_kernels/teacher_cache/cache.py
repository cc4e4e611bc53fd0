"""What a teacher gave, from disk, in the place of the teacher."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fdd_kernels.data import IGNORED, Windows
from fdd_kernels.hf.model_reader import LogitTransform
from fdd_kernels.hf.teachers import TEACHER_INDEX, Teacher, TeacherWithHead
from fdd_kernels.objectives.fdd.options import FDDConfig, LossOptions
from fdd_kernels.teacher_cache.index import TOKENIZER_FOLDER
from fdd_kernels.teacher_cache.reader import CacheReader
from fdd_kernels.teacher_cache.windows import CachedWindows, WindowTable

KIND = "states"
FINAL = "final"


def layer_name(layer: int) -> str:
    """The name of the array with a sampled layer's states."""
    return f"layer_{layer}"


class WindowCache(Teacher):
    """A cache of any kind: its windows, and what every teacher's side has.

    Files are memory-mapped, and opened again in every process that a cache is sent to.

    Args:
        path: the directory that `fdd-kernels cache-teacher` wrote.

    Attributes:
        layers: the sampled layers it holds, 1-based.
        apply_final_norm: whether they were read through the final norm.
        name, depth, vocabulary: of the teacher.
        max_length: tokens in the longest window.
        relative_error: per array {"mean": |stored - given| / |given| over everything, "worst_row":
            of one position}.
        digest: SHA-256 of the index, which holds the checksums of everything else.

    Raises:
        FileNotFoundError, ValueError: there is no cache, it is of another kind, not complete, or
            damaged; says what to do.
    """

    kind: str
    batch_columns = (TEACHER_INDEX,)

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.reader = CacheReader(path, self.kind)
        contents = self.reader.contents
        self.layers: tuple[int, ...] = tuple(contents["layers"])
        self.depth: int = contents["depth"]
        self.name = f"a cached {contents['teacher']['class']} of {self.depth} blocks"
        self.vocabulary: int = contents["vocab_size"]
        self.apply_final_norm: bool = contents["apply_final_norm"]
        self.transform = LogitTransform(contents["logit_scale"], contents["softcap"])
        self.max_length: int = contents["windows"]["max_length"]
        self.relative_error: dict[str, dict[str, float]] = self.reader.index["relative_error"]
        self.digest = self.reader.digest
        self.table = WindowTable(self.reader.once("windows"), contents["windows"]["train"])

    def __reduce__(self):
        return type(self), (self.path,)

    def __len__(self) -> int:
        """How many windows there are, training and held-out."""
        return len(self.table)

    @property
    def tokenizer_folder(self) -> Path:
        """Where the tokenizer lies with which the windows were made, for
        `AutoTokenizer.from_pretrained`.
        """
        return self.path / TOKENIZER_FOLDER

    def dataset(self, split: str) -> CachedWindows:
        """The windows of "train" or "held_out" as a map-style dataset of lists, with
        `teacher_index`.
        """
        return self.table.dataset(split)

    @property
    def windows(self) -> Windows:
        """Both datasets, as `fdd_kernels.data.load_windows` would give them."""
        counted = self.reader.contents["windows"]
        return Windows(
            self.dataset("train"), self.dataset("held_out"), train_tokens=counted["train_tokens"]
        )

    def verify(self) -> None:
        """Read every file and compare its SHA-256.

        Raises:
            ValueError: names the files that changed since they were written.
        """
        self.reader.verify()

    def require(self, config: FDDConfig, options: LossOptions, layers: tuple[int, ...]) -> None:
        missing = [layer for layer in layers if layer not in self.layers]
        if missing:
            raise ValueError(
                f"the run compares teacher layers {list(layers)}, but the cache {self.path} holds "
                f"{list(self.layers)}: choose "
                "among these with student_layers and teacher_layers, or cache the teacher again "
                "with the layers wanted"
            )
        if layers and config.apply_final_norm != self.apply_final_norm:
            raise ValueError(
                f"the run has apply_final_norm={config.apply_final_norm}, but the cache "
                f"{self.path} was made with "
                f"apply_final_norm={self.apply_final_norm}: give the same, or cache the teacher "
                "again"
            )
        if config.ignore_index != IGNORED:
            raise ValueError(
                f"ignore_index={config.ignore_index}, but a teacher cache marks what does not "
                f"count by {IGNORED}"
            )


class TeacherCache(WindowCache, TeacherWithHead):
    """The states of a teacher's sampled layers at every position that counts, and its head; stands
    in for the teacher.

        cache = TeacherCache("cache")
        distiller = Distiller(student, cache)
        loader = DataLoader(cache.dataset("train"), batch_size=8, shuffle=True,
        collate_fn=pad_windows)

    Batches say in `teacher_index` (batch,) int64 which windows they are;
    `fdd_kernels.data.pad_windows` collates it. A run may use fewer layers than it holds. States
    come in `dtype`, the teacher's, whatever they are stored in. For the rest see `WindowCache`.
    """

    kind = KIND

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self.dtype: torch.dtype = getattr(torch, self.reader.contents["dtype"])
        self._head = self.reader.once("head")

    def head(self) -> tuple[Tensor, Tensor | None]:
        return self._head["weight"], self._head.get("bias")

    def _head_on(
        self, device: torch.device, vocab_group, vocabulary: int
    ) -> tuple[Tensor, Tensor | None]:
        # once: it stays there
        self._head = {name: tensor.to(device) for name, tensor in self._head.items()}
        return super()._head_on(device, vocab_group, vocabulary)

    def states(
        self,
        batch: Mapping[str, Tensor],
        layers: tuple[int, ...],
        *,
        apply_final_norm: bool,
        final: bool = True,
    ) -> list[Tensor | None]:
        """The states of `layers` and the final state for a batch of the cache's windows: tensors
        (batch, sequence, Dt).

        Positions that do not count are 0.

        Raises:
            ValueError: rows of the batch are not the windows they are said to be, or count other
                positions.
        """
        windows, places = self.table.match(batch)
        shape, device = batch["input_ids"].shape, batch["input_ids"].device
        places = places.to(device)

        def spread(name: str) -> Tensor:
            rows = self.reader.rows(name, windows, self.table.rows, dtype=self.dtype, device=device)
            return (
                rows.new_zeros(shape.numel(), rows.shape[1])
                .index_copy_(0, places, rows)
                .view(*shape, -1)
            )

        return [*(spread(layer_name(layer)) for layer in layers), spread(FINAL) if final else None]
