"""`fdd-kernels evaluate`: compare models on a held-out text, with a teacher or without."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

from fdd_kernels.cli.evaluate.options import EvaluateOptions
from fdd_kernels.cli.evaluate.output import (
    data_of,
    print_tables,
    setting_of,
    standard_output,
    write,
)
from fdd_kernels.cli.evaluate.prepare import (
    Models,
    config_of,
    fitting,
    load,
    names_of,
    vocabulary_of,
)
from fdd_kernels.cli.loading import first_line, make_directory, window_length
from fdd_kernels.cli.reading import read_windows
from fdd_kernels.common.errors import UserError
from fdd_kernels.common.progress import Activity
from fdd_kernels.data import open_source
from fdd_kernels.evaluation.answers import Question, Sampling, generate, questions_of, rouge_l
from fdd_kernels.evaluation.compare import ModelComparison, scored_bytes
from fdd_kernels.evaluation.record import Answers, Evaluation
from fdd_kernels.integrations.finite import as_json

_QUESTIONS, _SAMPLES = 100, 5


def evaluate(
    options: EvaluateOptions, console: Console | None = None, output: Console | None = None
) -> dict[str, Any]:
    """Evaluate models on a text; print a table, and write JSON and a page if asked.

    Args:
        console: for progress; stderr unless given.
        output: for the table; stdout unless given.

    Returns:
        The record, as in the JSON file.

    Raises:
        UserError: models, data or options do not go together; before any model runs.
    """
    transformers.utils.logging.disable_progress_bar()
    console = console or Console(stderr=True)
    for name in ("json", "html"):
        _require_file(name, getattr(options, name))
    source = open_source(options.data)
    names = names_of(options.model)
    vocabulary = vocabulary_of(options, names)
    for note in vocabulary.notes:
        console.print(note, soft_wrap=True)
    questions, tokenizer = [], vocabulary.tokenizer
    if options.generate:
        limit = options.questions or _QUESTIONS
        questions = questions_of(source.records(), tokenizer, source.name, limit)
    loaded = load(options, names, vocabulary, console)
    max_length = window_length(options.max_length, **loaded.all)
    config = config_of(options, loaded)
    sampling, questions, notes = fitting(options, loaded, questions)
    try:
        comparison = ModelComparison(loaded.models, loaded.teacher, config)
    except (TypeError, ValueError) as error:
        raise UserError(f"cannot evaluate these models: {first_line(error)}") from error
    windows = read_windows(
        source,
        tokenizer,
        console,
        max_length=max_length,
        eval_fraction=0.0,
        seed=0,
        unshared=vocabulary.unshared,
        split="held-out",
    )
    rows = windows.train
    if options.max_windows is not None:
        rows = rows.select(range(min(options.max_windows, len(rows))))
    sizes = scored_bytes(rows, tokenizer)
    with _memory_is_enough():
        with Activity(console, "evaluating", len(rows)) as activity:
            sums = comparison(rows, batch_size=options.batch_size, advance=activity.update)
        answers = _answers(options, loaded, questions, sampling, console)
    samples = [
        {
            "source": question.source,
            "prompt": tokenizer.decode(question.prompt),
            "reference": question.reference,
        }
        for question in questions[:_SAMPLES]
    ]
    record = Evaluation(sums, sizes, answers, samples).record() | {"notes": notes}
    record |= setting_of(options, loaded, max_length, config, questions)
    record["data"] = data_of(source, windows, len(rows))
    write(options, record, console)
    print_tables(record, output or standard_output())
    return as_json(record)


def _require_file(name: str, path: Path | None) -> None:
    if path is None:
        return
    if path.is_dir():
        raise UserError(f"{name}={path} is a directory: give a file")
    make_directory(path.parent)


@contextlib.contextmanager
def _memory_is_enough() -> Iterator[None]:
    """Turn a lack of GPU memory into one line with its remedy."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{first_line(error)}. Give a smaller batch_size or max_length, dtype=bfloat16, a "
            "quantised teacher, or fewer models: all are in memory at once"
        ) from error


def _answers(
    options: EvaluateOptions,
    loaded: Models,
    questions: list[Question],
    sampling: Sampling,
    console: Console,
) -> dict[str, Answers]:
    if not questions:
        return {}
    found, references = {}, [question.reference for question in questions]
    total = len(loaded.all) * max(len(sampling.seeds), 1) * len(questions)
    with Activity(console, "generating answers", total) as activity:
        for name, model in loaded.all.items():
            texts = generate(
                model,
                loaded.vocabulary.tokenizer,
                questions,
                sampling,
                batch_size=options.batch_size,
                advance=lambda amount: activity.update(activity.done + amount),
            )
            found[name] = Answers(texts, [rouge_l(references, of_pass) for of_pass in texts])
    return found
