"""What an evaluation prints and writes."""

from __future__ import annotations

import dataclasses
import platform
from importlib import metadata
from json import dumps
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fdd_kernels.cli.evaluate.options import EvaluateOptions
from fdd_kernels.cli.evaluate.prepare import Models
from fdd_kernels.common.atomic import write_text
from fdd_kernels.common.errors import UserError
from fdd_kernels.common.processor import processor
from fdd_kernels.data import Source, Windows
from fdd_kernels.evaluation.answers import Question
from fdd_kernels.evaluation.page import page_of
from fdd_kernels.evaluation.record import COLUMNS, INTERVALS, differs, shown
from fdd_kernels.integrations.finite import as_json
from fdd_kernels.objectives.fdd.options import FDDConfig
from fdd_kernels.version import __version__

# Characters in a line of a table where the output is no terminal.
_WIDTH = 200


def setting_of(
    options: EvaluateOptions,
    loaded: Models,
    max_length: int,
    config: FDDConfig | None,
    questions: list[Question],
) -> dict[str, Any]:
    """Return what the numbers depend on: options, seeds, versions, machine."""
    given = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in dataclasses.asdict(options).items()
    }
    packages = ("torch", "transformers", "rouge-score") if questions else ("torch", "transformers")
    name, _ = processor()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "options": given,
        "max_length": max_length,
        "vocab_size": None if config is None else config.vocab_size,
        "questions": len(questions),
        "seeds": list(options.seeds or ()),
        "parameters": {n: sum(p.numel() for p in m.parameters()) for n, m in loaded.all.items()},
        "dtypes": {n: str(m.dtype).removeprefix("torch.") for n, m in loaded.all.items()},
        "versions": {
            "fdd_kernels": __version__,
            "python": platform.python_version(),
            **{package: metadata.version(package) for package in packages},
        },
        "machine": {"processor": name, "threads": torch.get_num_threads(), "gpu": gpu},
    }


def data_of(source: Source, windows: Windows, count: int) -> dict[str, Any]:
    return {
        "name": source.name,
        "sha256": source.digests(),
        "documents": windows.documents,
        "windows": count,
        "documents_without_labels": len(windows.without_labels),
        "documents_not_shared": len(windows.not_shared),
    }


def write(options: EvaluateOptions, record: dict[str, Any], console: Console) -> None:
    texts = {"json": lambda: dumps(as_json(record), indent=1, allow_nan=False) + "\n"}
    texts["html"] = lambda: page_of(record)
    for name, text in texts.items():
        path = getattr(options, name)
        if path is None:
            continue
        try:
            write_text(path, text())
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror}") from None
        console.print(f"wrote {path}", soft_wrap=True)


def standard_output() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=_WIDTH)


def print_tables(record: dict[str, Any], console: Console) -> None:
    """Print the metrics of all models, KL by layer, and ROUGE-L by seed."""
    models = record["models"]
    columns = [name for name in COLUMNS if any(name in model["metrics"] for model in models)]
    table = Table(
        "model",
        *(COLUMNS[name][0] for name in columns),
        title=f"{record['sequences']} sequences of {record['data']['name']}",
        caption=f"± half of {INTERVALS}. * differs from {models[0]['name']} by more",
    )
    for model in models:
        differences = model.get("minus_first", {})
        cells = (
            shown(name, model["metrics"].get(name)) + " *" * differs(differences.get(name))
            for name in columns
        )
        table.add_row(model["name"], *cells)
    console.print(table)
    _print_layers([model for model in models if model["layers"]], console)
    if "answers" in models[0]:
        _print_passes(models, record["seeds"], console)
    for note in record["notes"]:
        console.print(note, soft_wrap=True)


def _print_layers(models: list[dict[str, Any]], console: Console) -> None:
    if not models:
        return
    ranks = range(1, len(models[0]["layers"]) + 1)
    title = "KL to the teacher by layer (layers of model / teacher)"
    table = Table("model", *map(str, ranks), title=title)
    for model in models:
        cells = (
            f"{shown('kl', layer)} ({layer['student_layer']} / {layer['teacher_layer']})"
            for layer in model["layers"]
        )
        table.add_row(model["name"], *cells)
    console.print(table)


def _print_passes(models: list[dict[str, Any]], seeds: list[int], console: Console) -> None:
    passes = [f"seed {seed}" for seed in seeds] or ["greedy"]
    table = Table("model", *passes, "standard deviation", "empty answers", title="ROUGE-L by pass")
    for model in models:
        found = model["answers"]
        spread = found["standard_deviation"]
        means = [f"{mean:.2f}" for mean in found["rouge_l_by_seed"]]
        spread = "" if spread is None else f"{spread:.2f}"
        table.add_row(model["name"], *means, spread, str(found["empty"]))
    console.print(table)
