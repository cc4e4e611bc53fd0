"""Run several models over the same windows and sum their metrics sequence by sequence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fdd_kernels.data import IGNORED, pad_windows
from fdd_kernels.data.records import TOKEN_WEIGHTS
from fdd_kernels.evaluation.metrics import (
    SequenceSums,
    observed_sums,
    pairs_by_rank,
    sequence_sums,
)
from fdd_kernels.hf.distiller import Distiller
from fdd_kernels.hf.loss import student_inputs
from fdd_kernels.hf.model_reader import ModelReader
from fdd_kernels.hf.targets import HiddenTargets, StudentSide
from fdd_kernels.hf.teachers import LiveTeacher, model_states
from fdd_kernels.objectives.fdd.options import FDDConfig, LossOptions

TEACHER = "teacher"


class ModelSums(NamedTuple):
    """A model's metrics over all sequences.

    Attributes:
        weight: of each sequence's valid tokens, (sequences,).
        sums: of weight * metric by name, each (sequences,).
        layers: the layers of student and teacher that have a KL.
    """

    weight: np.ndarray
    sums: dict[str, np.ndarray]
    layers: tuple[tuple[int, int], ...]


class ModelComparison:
    """`comparison(windows)` -> `ModelSums` by name, of models that share a vocabulary.

    All models are in memory at once, so that a teacher runs once for each batch. No logits of a
    batch are ever made.

    Args:
        models: transformers causal LMs by name, each with its weights where it is to run.
        teacher: the model whose predictions are compared with, with metrics of its own under the
            name "teacher"; None: there is no KL.
        config: the sampled layers, `apply_final_norm` and `vocab_size`; the rest has no effect.

    Raises:
        TypeError, ValueError: see `Distiller`; names the model.
    """

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        teacher: nn.Module | None = None,
        config: FDDConfig | None = None,
    ) -> None:
        self._teacher, self._config = None, config or FDDConfig()
        self._teacher_layers: tuple[int, ...] = ()
        if teacher is None:
            self._models = {
                name: _Alone(ModelReader(model, name)) for name, model in models.items()
            }
            return
        if TEACHER in models:
            raise ValueError(f"models has a {TEACHER!r}, which is the teacher's name: give another")
        self._teacher, self._models = LiveTeacher(teacher), {}
        for name, model in models.items():
            self._models[name] = _Compared(name, model, self._teacher, self._config)
        self._teacher_layers = next(iter(self._models.values())).distiller.teacher_layers
        self._of_teacher = _Alone(self._teacher.reader)

    @torch.no_grad()
    def __call__(
        self,
        windows: Sequence[Mapping[str, Any]],
        *,
        batch_size: int = 8,
        advance: Callable[[int], None] = lambda done: None,
    ) -> dict[str, ModelSums]:
        """Evaluate all models, the teacher last.

        Args:
            windows: see `fdd_kernels.data.pad_windows`; a list, or a data set.
            batch_size: windows that a model runs over at once.
            advance: called with the number of windows done.
        """
        found: dict[str, list[SequenceSums]] = {name: [] for name in self._models}
        if self._teacher is not None:
            found[TEACHER] = []
        for start in range(0, len(windows), batch_size):
            batch = pad_windows(windows[start : start + batch_size])
            targets = None
            if self._teacher is not None:
                targets = self._teacher.targets(
                    batch, self._teacher_layers, apply_final_norm=self._config.apply_final_norm
                )
                found[TEACHER].append(self._of_teacher.of_states(targets[-1:], batch))
            for name, model in self._models.items():
                found[name].append(model(batch, targets))
            advance(min(start + batch_size, len(windows)))
        layers = {name: model.layers for name, model in self._models.items()}
        return {name: _joined(parts, layers.get(name, ())) for name, parts in found.items()}


class _Alone:
    """A model without a teacher."""

    layers: tuple[tuple[int, int], ...] = ()

    def __init__(self, reader: ModelReader) -> None:
        self._reader, own = reader, reader.transform
        self._options = LossOptions(student_softcap=own.softcap, student_logit_scale=own.scale)

    def __call__(self, batch: Mapping[str, Tensor], targets: None) -> SequenceSums:
        states = model_states(self._reader, batch, (), apply_final_norm=True)
        return self.of_states(states, batch)

    def of_states(self, states: HiddenTargets, batch: Mapping[str, Tensor]) -> SequenceSums:
        """Sum the metrics of final states that the model has given already."""
        side = _side(self._reader, states)
        batch = _on(side.weight.device, batch)
        return sequence_sums(student_inputs(side, batch, self._options), self._options)


class _Compared:
    """A model and the teacher."""

    def __init__(
        self, name: str, model: nn.Module, teacher: LiveTeacher, config: FDDConfig
    ) -> None:
        try:
            self.distiller = Distiller(model, teacher, config)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from error
        self.layers = ()
        if pairs_by_rank(self.distiller):
            self.layers = tuple(zip(self.distiller.student_layers, self.distiller.teacher_layers))

    def __call__(self, batch: Mapping[str, Tensor], targets: HiddenTargets) -> SequenceSums:
        distiller = self.distiller
        states = model_states(
            distiller.student,
            batch,
            distiller.student_layers,
            apply_final_norm=distiller.config.apply_final_norm,
        )
        side = _side(distiller.student, states)
        batch = _on(side.weight.device, batch)
        return observed_sums(distiller, side, targets, batch, distiller.options)


def _side(reader: ModelReader, states: HiddenTargets) -> StudentSide:
    weight, bias, *_ = reader.read_head()
    return StudentSide(states, weight, bias, len(weight))


def _on(device: torch.device, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _joined(parts: list[SequenceSums], layers: tuple[tuple[int, int], ...]) -> ModelSums:
    """Put the batches of one model together."""
    names = parts[0].sums if parts else ()
    weight, sums = ([part.weight for part in parts], {n: [p.sums[n] for p in parts] for n in names})
    return ModelSums(_array(weight), {name: _array(of) for name, of in sums.items()}, layers)


def _array(parts: list[Tensor]) -> np.ndarray:
    return torch.cat([part.cpu() for part in parts]).numpy() if parts else np.zeros(0)


def scored_bytes(windows: Sequence[Mapping[str, Any]], tokenizer) -> np.ndarray | None:
    """Return the UTF-8 bytes of the predicted tokens of each window, (windows,); None for windows
    with `token_weights`, whose loss is not that of the text.

    Special tokens have none. A character that a window cuts in two counts as the three bytes of
    U+FFFD.
    """
    if len(windows) and TOKEN_WEIGHTS in windows[0]:
        return None
    sizes = []
    for window in windows:
        labels = window.get("labels", window["input_ids"])
        tokens = [int(label) for label in labels[1:] if label != IGNORED]
        text = tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        sizes.append(len(text.encode()))
    return np.array(sizes, np.float64)
