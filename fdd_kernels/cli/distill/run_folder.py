"""The output directory of a run: which run it belongs to, and whether that is finished."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from fdd_kernels.cli.distill.identity import model_identity, same_model
from fdd_kernels.cli.distill.options import RUN_FILE, DistillOptions
from fdd_kernels.cli.loading import open_cache
from fdd_kernels.common.atomic import remove_directory, write_text
from fdd_kernels.common.errors import UserError
from fdd_kernels.data.sources import open_source
from fdd_kernels.integrations.checkpoints import NOT_FINITE, PREFIX, checkpoints
from fdd_kernels.lens.divergence_text import parse_divergence
from fdd_kernels.objectives.fdd.options import FDDConfig
from fdd_kernels.objectives.gradient_balance import GradientBalance
from fdd_kernels.objectives.schedules import Stages

METRICS_FILE, STUDENT_FOLDER, ADAPTER_FOLDER = "metrics.json", "student", "adapter"
ALIGNMENT_FILE = "layer_alignment.svg"
# Options that may change when a run is resumed.
_FREE_OPTIONS = (
    "output",
    "resume",
    "save_steps",
    "log_steps",
    "report_to",
    "teacher_device_map",
    "teacher_offload_folder",
)
_LENGTH = ("epochs", "max_steps")
# Of options whose text may be written in several ways.
_PARSERS = {
    "config.trajectory": parse_divergence,
    "config.output_divergence": parse_divergence,
    "config.stages": Stages.parse,
    "config.gradient_balance": GradientBalance.parse,
}


def steps_of(options: DistillOptions, train_windows: int, processes: int = 1) -> int:
    """Optimizer steps of a run."""
    an_epoch = math.ceil(
        train_windows / (options.batch_size * options.gradient_accumulation * processes)
    )
    return options.max_steps or math.ceil(options.epochs * an_epoch)


def settle_run(options: DistillOptions, processes: int = 1) -> dict[str, Any] | None:
    """Make `output` the directory of this run.

    Returns:
        The metrics if the run is finished, else None.

    Raises:
        UserError: it belongs to another run, or this run has more steps already.
    """
    output, run = options.output, run_record(options, processes)
    record, saved = output / RUN_FILE, checkpoints(output)
    if not options.resume:
        for name in (METRICS_FILE, RUN_FILE, ALIGNMENT_FILE):
            (output / name).unlink(missing_ok=True)
        for folder in (
            *saved,
            *output.glob(f"{PREFIX}*{NOT_FINITE}"),
            output / STUDENT_FOLDER,
            output / ADAPTER_FOLDER,
        ):
            if folder.is_dir():
                remove_directory(folder)
    elif record.exists():
        try:
            before = json.loads(record.read_text("utf-8"))
        except ValueError as error:
            raise UserError(
                f"{record}: cannot be parsed ({error}); start again with --no-resume or another "
                "--output"
            ) from None
        different = _differences(before, run, options)
        if different and (saved or (output / METRICS_FILE).exists()):
            raise UserError(
                f"{output} holds another run ({'; '.join(different)}): give the same options to "
                "resume it, another --output, or --no-resume to remove it and start again"
            )
        if not different and (output / METRICS_FILE).exists():
            metrics = json.loads((output / METRICS_FILE).read_text("utf-8"))
            wanted = steps_of(options, metrics["train_windows"], processes)
            if wanted == metrics["steps"]:
                return metrics
            require_more(output, metrics["steps"], wanted)
    elif saved:
        raise UserError(
            f"{output} holds {saved[-1].name} but no {RUN_FILE}: another program wrote it; use "
            "another --output"
        )
    try:
        write_text(record, json.dumps(run, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"{record}: cannot be written: {error.strerror}") from None
    return None


def require_more(output: Path, done: int, wanted: int) -> None:
    """Raise UserError if a resumed run would end at a step before the last one done."""
    if wanted < done:
        raise UserError(
            f"{output} holds this run after {done} steps, and {wanted} are wanted: give more "
            "--steps or --epochs to resume it, another --output, or --no-resume to remove it and "
            "start again"
        )


def run_record(options: DistillOptions, processes: int = 1) -> dict[str, Any]:
    """The record of a run as JSON: its options, and digests of its data and models."""
    run = dataclasses.asdict(options)
    for name in _FREE_OPTIONS:
        del run[name]
    run |= {f"config.{name}": value for name, value in run.pop("config").items()}
    if options.teacher_cache is not None:  # the digest of its index, which holds all checksums
        run["teacher_cache"] = open_cache(options.teacher_cache).digest
    for name in ("data", "eval_data"):
        if run[name] is not None:
            run[name] = open_source(getattr(options, name)).digests()
    for role in ("teacher", "student"):
        if run[role] is not None:
            run[role] = model_identity(run[role])
    if processes > 1:
        run["processes"] = processes
    return json.loads(json.dumps(run))


def _differences(before: dict[str, Any], now: dict[str, Any], options: DistillOptions) -> list[str]:
    """What differs between two records, in words; an option missing in a record had its default."""
    defaults = {f.name: f.default for f in dataclasses.fields(options)} | {"processes": 1}
    defaults |= {f"config.{f.name}": f.default for f in dataclasses.fields(FDDConfig)}
    defaults = json.loads(
        json.dumps(
            {
                n: d
                for n, d in defaults.items()
                if d is None or isinstance(d, str | int | float | tuple)
            }
        )
    )
    found = []
    for key in {**before, **now}:
        was, is_now = (record.get(key, defaults.get(key)) for record in (before, now))
        if key in _LENGTH or was == is_now or _same_text(key, was, is_now):
            continue
        if key in ("teacher", "student") and same_model(was, is_now, getattr(options, key)):
            continue
        found.append(_in_words(key, was, is_now))
    return found


def _same_text(key: str, was: Any, is_now: Any) -> bool:
    """Whether two texts say the same: "jsd" is "jsd:0.5", and weights may stand in any order."""
    try:
        return _PARSERS[key](was) == _PARSERS[key](is_now)
    except (AttributeError, KeyError, TypeError, ValueError):  # no text of these options
        return False


def _in_words(key: str, was: Any, is_now: Any) -> str:
    if isinstance(was, dict) and isinstance(is_now, dict):
        files = [
            f"{file} "
            f"{'is new' if file not in was else 'is gone' if file not in is_now else 'differs'}"
            for file in {**was, **is_now}
            if was.get(file) != is_now.get(file)
        ]
        return f"{key} was another: {', '.join(files[:4])}{', ...' if len(files) > 4 else ''}"
    if key == "teacher_cache" or isinstance(was, dict) or isinstance(is_now, dict):
        return f"{key} was another"
    return f"{key} was {was!r}, is {is_now!r}"
