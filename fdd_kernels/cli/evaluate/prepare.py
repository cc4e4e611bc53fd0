"""Load the models of an evaluation, and check that they go together."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from fdd_kernels.cli.evaluate.options import EvaluateOptions
from fdd_kernels.cli.loading import (
    computing_dtype,
    embeddings,
    fit_vocabularies,
    load_model,
    load_vocabulary,
)
from fdd_kernels.cli.teacher_options import load_teacher
from fdd_kernels.cli.vocabulary import Vocabulary
from fdd_kernels.common.errors import UserError
from fdd_kernels.common.progress import Activity
from fdd_kernels.evaluation.answers import Question, Sampling, that_fit
from fdd_kernels.evaluation.compare import TEACHER
from fdd_kernels.hf.layers import layer_grid
from fdd_kernels.hf.teachers import place_teacher
from fdd_kernels.objectives.fdd.options import FDDConfig

_LAYERS = 4


@dataclass
class Models:
    """The models of an evaluation by name, and the vocabulary that they share."""

    models: dict[str, nn.Module]
    teacher: nn.Module | None
    vocabulary: Vocabulary

    @property
    def all(self) -> dict[str, nn.Module]:
        return self.models | ({} if self.teacher is None else {TEACHER: self.teacher})


def names_of(given: tuple[str, ...]) -> dict[str, str]:
    """Return what to load by the name to show: of each path as few of its last parts as no other
    ends in.
    """
    paths = [Path(text).absolute() if Path(text).is_dir() else Path(text) for text in given]
    paths = [Path(os.path.normpath(path)) for path in paths]
    return {_name_of(path, [p for p in paths if p != path]): t for path, t in zip(paths, given)}


def _name_of(path: Path, others: list[Path]) -> str:
    for count in range(1, len(path.parts)):
        end = path.parts[-count:]
        if end != (TEACHER,) and all(other.parts[-count:] != end for other in others):
            return str(Path(*end))
    return str(path)


def vocabulary_of(options: EvaluateOptions, names: dict[str, str]) -> Vocabulary:
    """Return the vocabulary that all models share with the teacher, or with the first model.

    Raises:
        UserError: a model has no tokenizer and there is no other, or tokenizers differ.
    """
    (first, reference), *others = names.items()
    role = f"model {first}"
    found = []
    if options.teacher is not None:
        role, reference, others = TEACHER, options.teacher, list(names.items())
    else:
        found.append(load_vocabulary(reference, roles=(role, role)))
    for name, text in others:
        roles = f"model {name}", role
        try:
            found.append(load_vocabulary(reference, text, options.vocab_size, roles))
        except UserError as error:
            if options.teacher is not None or "differ" not in str(error):
                raise
            raise UserError(
                f"{error}; or evaluate them one by one and compare the bits per byte, which do not "
                "depend on tokens"
            ) from None
    return Vocabulary(
        found[0].tokenizer,
        min(one.size for one in found),
        any(one.partial for one in found) or len({one.size for one in found}) > 1,
        frozenset().union(*(one.unshared for one in found)),
        [note for one in found for note in one.notes],
    )


def load(
    options: EvaluateOptions, names: dict[str, str], vocabulary: Vocabulary, console: Console
) -> Models:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models, teacher = {}, None
    for name, text in names.items():
        with Activity(console, f"loading {name}"):
            model = load_model(text, "model").to(computing_dtype(options.dtype, device))
            models[name] = model.requires_grad_(False).to(device)
    if options.teacher is not None:
        with Activity(console, "loading the teacher"):
            dtype = computing_dtype(options.teacher_dtype or options.dtype, device)
            teacher = load_teacher(options, dtype)
            place_teacher(teacher, device)
    return Models(models, teacher, vocabulary)


def config_of(options: EvaluateOptions, loaded: Models) -> FDDConfig | None:
    """Return the layers and tokens that are compared with the teacher's; None without one."""
    if loaded.teacher is None:
        return None
    count = options.num_layers
    if count is None:
        depths = [m.config.get_text_config().num_hidden_layers for m in loaded.all.values()]
        count = _most_layers(depths, options.layer_grid)
    try:
        config = FDDConfig(
            num_layers=count,
            layer_grid=options.layer_grid,
            student_layers=options.student_layers,
            teacher_layers=options.teacher_layers,
            apply_final_norm=options.apply_final_norm,
            vocab_size=options.vocab_size,
        )
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from error
    rows = {name: embeddings(model) for name, model in loaded.all.items()}
    return fit_vocabularies(config, rows, loaded.vocabulary)


def _most_layers(depths: list[int], grid: str) -> int:
    """Return as many layers as every model has on the grid, at most 4."""
    for count in range(_LAYERS, 0, -1):
        try:
            for depth in depths:
                layer_grid(depth, count, grid)
        except ValueError:
            continue
        return count
    return 0


def fitting(
    options: EvaluateOptions, loaded: Models, questions: list[Question]
) -> tuple[Sampling, list[Question], list[str]]:
    """Return how to sample, the questions that fit every model, and what was left out in words.

    Raises:
        UserError: no question fits.
    """
    given = {
        name: getattr(options, name)
        for name in Sampling._fields
        if getattr(options, name) is not None
    }
    sampling, fitting = Sampling(**given), questions
    for model in loaded.all.values():
        fitting = that_fit(fitting, model, sampling.max_new_tokens)
    if len(fitting) == len(questions):
        return sampling, questions, []
    lost = f"{len(questions) - len(fitting)} of {len(questions)} prompts"
    reason = f"with max_new_tokens={sampling.max_new_tokens} exceed the positions of a model"
    if not fitting:
        raise UserError(f"{lost} {reason}: give fewer")
    return sampling, fitting, [f"{lost} {reason} and are left out of ROUGE-L"]
