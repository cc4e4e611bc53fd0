"""The study of objectives: many small trainings, one line of a record for each.

`python -m benchmarks study` trains what the record lacks; `--report` writes docs/study.md's tables
and plots from it (study_report.py).
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM

from benchmarks import record
from fdd_kernels.common.atomic import write_text
from fdd_kernels.common.progress import Activity
from fdd_kernels.demo.corpus import standard_library_texts, token_stream
from fdd_kernels.demo.students import OBJECTIVES, Budget, Evaluation, Run, train_students
from fdd_kernels.demo.teacher import SHIPPED_TEACHER, held_out_windows
from fdd_kernels.objectives.fdd.options import FDDConfig

FOLDER = record.RESULTS / "study"
FILE = "runs.jsonl"
SEEDS = 5
# 512 tokens a step
BUDGETS = {
    name: {"steps": steps, "batch_size": 2, "evaluations": evaluations, "evaluation_windows": 48}
    for name, steps, evaluations in (("1x", 64, 1), ("4x", 256, 2), ("16x", 1024, 4))
}
# The learning rate is the best of 1.25e-3, 2.5e-3 and 5e-3 (width 48: of the last two) for output
# KD, 125 steps, seed 0. It is the same for all objectives.
SIZES = {
    "width 96": {"hidden_size": 96, "num_layers": 5, "num_heads": 3, "learning_rate": 2.5e-3},
    "width 48": {"hidden_size": 48, "num_layers": 5, "num_heads": 3, "learning_rate": 5e-3},
}
MAIN = ("output KD", "KD + trajectory", "full FDD", "full FDD, weighted")
CONFIGS = {name: OBJECTIVES[name] for name in MAIN}
VARIANTS = {
    "KD + derivative": FDDConfig.paper(alpha=0.0),
    "KD + weighted derivative": FDDConfig.paper(alpha=0.0, derivative="weighted_cosine"),
    "full FDD, centred": FDDConfig.paper(derivative="centered_cosine"),
    "full FDD, beta 0.1": FDDConfig.paper(beta=0.1),
    "full FDD, raw states": FDDConfig.paper(apply_final_norm=False),
    "KD + trajectory, raw states": FDDConfig.paper(beta=0.0, apply_final_norm=False),
    "KD + trajectory, 1 layer": FDDConfig.paper(beta=0.0, num_layers=1),
    "KD + trajectory, 2 layers": FDDConfig.paper(beta=0.0, num_layers=2),
    "KD + trajectory, 2 layers spread": FDDConfig.paper(
        beta=0.0, num_layers=2, layer_grid="linspace"
    ),
    "full FDD, weighted, 2 layers spread": FDDConfig.paper(
        derivative="weighted_cosine", num_layers=2, layer_grid="linspace"
    ),
    "KD + trajectory, last layers": FDDConfig.paper(
        beta=0.0, student_layers=(1, 2, 3, 4), teacher_layers=(6, 7, 8, 9)
    ),
}
CONFIGS |= VARIANTS
VARIANTS_AT = ("1x", "4x"), "width 96"
# The main objectives with another learning rate, at one budget: does their order depend on it?
RATES = {
    f"{size}, {word} the learning rate": options
    | {"learning_rate": factor * options["learning_rate"]}
    for size, options in SIZES.items()
    for word, factor in (("half", 0.5), ("twice", 2.0))
}
RATES_AT = "4x"
# Deep students: which layers to sample? The learning rate is the better of 2.5e-3 and 5e-3 for
# output KD in 10 layers, 125 steps, seed 0.
DEEP = {
    f"{depth} layers, width 64": {
        "hidden_size": 64,
        "num_layers": depth,
        "num_heads": 2,
        "learning_rate": 5e-3,
    }
    for depth in (10, 12)
}
DEEP_SLOW = {
    "10 layers, width 64, half the learning rate": DEEP["10 layers, width 64"]
    | {"learning_rate": 2.5e-3}
}
# In a student of 5 or 10 layers these are the paper's.
CONFIGS["KD + trajectory, 4 layers spread"] = FDDConfig.paper(beta=0.0, layer_grid="linspace")
# Part, budget, sizes, objectives.
DEEP_RUNS = (
    ("main", "4x", tuple(DEEP), ("output KD", "KD + trajectory", "full FDD, weighted")),
    # For the comparison at equal CPU time.
    ("main", "16x", ("10 layers, width 64",), ("output KD",)),
    (
        "variants",
        "4x",
        tuple(DEEP),
        ("KD + trajectory, 2 layers spread", "full FDD, weighted, 2 layers spread"),
    ),
    ("variants", "4x", ("12 layers, width 64",), ("KD + trajectory, 4 layers spread",)),
    ("variants", "4x", tuple(DEEP_SLOW), ("output KD", "KD + trajectory")),
)


@dataclass(frozen=True)
class Setting:
    """One run of the plan, by names."""

    part: str
    budget: str
    size: str
    seed: int
    objective: str

    @property
    def cell(self) -> str:
        """The name of the runs that differ in seed and objective."""
        return f"{self.part}, {self.budget}, {self.size}"

    @property
    def group(self) -> str:
        """The name of the runs that are trained side by side: they differ in the objective."""
        return f"{self.cell}, seed {self.seed}"

    def training(self) -> Budget:
        """Size and training of the student."""
        return Budget(**BUDGETS[self.budget], **(SIZES | RATES | DEEP | DEEP_SLOW)[self.size])

    def key(self) -> str:
        """Identify the run by all that was set, not by names, as JSON."""
        own, usual = CONFIGS[self.objective], FDDConfig.paper()
        changed = {
            f.name: getattr(own, f.name)
            for f in fields(FDDConfig)
            if getattr(own, f.name) != getattr(usual, f.name)
        }
        return json.dumps(
            {"seed": self.seed, "paper, but": changed, "training": asdict(self.training())}
        )


def plan() -> Iterator[Setting]:
    """All runs, in the order in which they are done: every stop leaves a balanced table."""

    def deep(part: str) -> Iterator[Setting]:
        for of_part, budget, sizes, objectives in DEEP_RUNS:
            for seed, size in product(range(SEEDS), sizes if of_part == part else ()):
                for objective in objectives:
                    yield Setting(part, budget, size, seed, objective)

    budgets, size = VARIANTS_AT
    for budget in BUDGETS:
        for seed in range(SEEDS):
            for every in SIZES:
                for objective in MAIN:
                    yield Setting("main", budget, every, seed, objective)
    yield from deep("main")
    for budget in budgets:
        for seed in range(SEEDS):
            for objective in VARIANTS:
                yield Setting("variants", budget, size, seed, objective)
    for seed in range(SEEDS):
        for of_rate in RATES:
            for objective in MAIN:
                yield Setting("variants", RATES_AT, of_rate, seed, objective)
    yield from deep("variants")


class Record:
    """The finished runs of a folder, by their keys; one line of JSON each.

    Raises:
        RecordError: a line that is damaged or of another teacher or text than the first.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self.runs: dict[str, dict[str, Any]] = {}
        text = self.path.read_text("utf-8") if self.path.exists() else ""
        for number, line in enumerate(text.splitlines(), 1):
            where = f"{self.path}, line {number}"
            try:
                entry = json.loads(line)
                key = json.dumps(entry["setting"])
                entry["material"], entry["run"]["window_kl"][0]
            except (ValueError, TypeError, LookupError) as error:
                raise record.RecordError(
                    f"{where}: is no run of the study ({error!r}): remove it, and it is run again"
                ) from error
            self.require_same(entry["material"], where)
            self.runs[key] = entry

    @property
    def material(self) -> dict[str, Any] | None:
        """Hashes of teacher and texts, the same for all runs; None if there is no run."""
        return next((entry["material"] for entry in self.runs.values()), None)

    def require_same(self, material: dict[str, Any], where: str) -> None:
        """Refuse a run with another teacher or other text: it cannot be compared.

        Raises:
            RecordError: says what differs, and the remedy.
        """
        known = self.material or material
        differs = [name for name in known if known[name] != material.get(name)]
        if differs:
            shown = ", ".join(f"{n} {material.get(n)} is not {known[n]}" for n in differs)
            raise record.RecordError(
                f"{where}: {shown}, as in the runs of {self.path}: they cannot be compared; "
                "give another folder with --output"
            )

    def add(self, entries: list[dict[str, Any]]) -> None:
        """Write finished runs to the file."""
        for entry in entries:
            self.runs[json.dumps(entry["setting"])] = entry
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.path, "".join(json.dumps(e) + "\n" for e in self.runs.values()))

    def of(self, setting: Setting) -> dict[str, Any] | None:
        """The run of a setting, or None."""
        return self.runs.get(setting.key())


class Material:
    """What all runs share: the teacher, the text and the validation windows."""

    def __init__(self) -> None:
        self.teacher = LlamaForCausalLM.from_pretrained(SHIPPED_TEACHER, dtype=torch.float32)
        self.teacher.eval().requires_grad_(False)
        tokenizer = AutoTokenizer.from_pretrained(SHIPPED_TEACHER)
        self.stream, self.held_out = (
            token_stream(tokenizer, standard_library_texts(held_out=held_out))
            for held_out in (False, True)
        )
        self.description = {
            "teacher": _digest((SHIPPED_TEACHER / "model.safetensors").read_bytes()),
            "text": _digest(self.stream),
            "held_out_text": _digest(self.held_out),
        }

    def evaluation(self, budget: Budget) -> Evaluation:
        return Evaluation(self.teacher, held_out_windows(self.held_out, budget.evaluation_windows))


def _digest(data: bytes | Tensor) -> str:
    raw = data if isinstance(data, bytes) else data.numpy().tobytes()
    return hashlib.sha256(raw).hexdigest()[:16]


def _entry(setting: Setting, run: Run, conditions: dict[str, Any]) -> dict[str, Any]:
    """Make the line of a run; figures have five digits."""
    figures = asdict(run)
    del figures["objective"], figures["seed"]
    for name, values in figures.items():
        figures[name] = [float(f"{value:.5g}") for value in values]
    figures["steps"] = run.steps
    named = {"objective": setting.objective, "budget": setting.budget, "size": setting.size}
    return named | {"setting": json.loads(setting.key())} | conditions | {"run": figures}


def study(
    output: Path, only: Sequence[str], minutes: float | None, threads: int
) -> tuple[int, int]:
    """Train the runs that the record in `output` lacks, group by group.

    Args:
        only: only groups whose name contains one of these texts; empty: all.
        minutes: stop after the group that passes them; None: until all are done.

    Returns:
        How many runs were done, and how many are missing.

    Raises:
        RecordError: the record is damaged, or of another teacher or text.
    """
    torch.set_num_threads(threads)
    runs, started, done = Record(output), time.monotonic(), 0
    groups: dict[str, list[Setting]] = {}
    for setting in plan():
        chosen = not only or any(text in setting.group for text in only)
        if chosen and runs.of(setting) is None:
            groups.setdefault(setting.group, []).append(setting)
    missing = sum(map(len, groups.values()))
    if not missing:
        return 0, 0
    console = Console(stderr=True)
    with Activity(console, "reading the teacher and the standard library"):
        material = Material()
        runs.require_same(material.description, "this machine")
        windows = next(iter(groups.values()))[0].training()
        evaluation = material.evaluation(windows)
    conditions = {
        "material": material.description,
        "threads": threads,
        "versions": record.versions(),
        "git": record.git_revision(),
        "sources": record.source_digest(),
        "processor": record.machine("cpu")["processor"],
    }
    for what, settings in groups.items():
        first = settings[0]
        with Activity(console, what, first.training().steps) as activity:
            finished, _ = train_students(
                material.teacher,
                material.stream,
                evaluation,
                first.training(),
                first.seed,
                activity,
                {setting.objective: CONFIGS[setting.objective] for setting in settings},
            )
        date = {"date": datetime.now(UTC).isoformat(timespec="seconds")}
        runs.add([_entry(s, run, date | conditions) for s, run in zip(settings, finished)])
        done += len(settings)
        shown = ", ".join(f"{run.objective} {run.held_out_kl[-1]:.3f}" for run in finished)
        print(f"{what}: validation KL {shown}", file=sys.stderr, flush=True)
        if minutes is not None and time.monotonic() - started >= 60 * minutes:
            break
    return done, missing - done


def listing(output: Path) -> dict[str, bool]:
    """Say what is done and what is missing: a line for each budget and size, and whether it is
    complete.
    """
    runs, counts = Record(output), {}
    for setting in plan():
        found = counts.setdefault(setting.cell, {})
        found.setdefault(setting.objective, []).append(runs.of(setting) is not None)
    lines = {}
    for cell, objectives in counts.items():
        names: dict[tuple[int, ...], list[str]] = {}  # by the seeds that are missing
        for name, there in objectives.items():
            names.setdefault(tuple(s for s in range(SEEDS) if not there[s]), []).append(name)
        done = sum(map(sum, objectives.values()))
        line = f"{cell}: {done} of {sum(map(len, objectives.values()))} runs"
        if done:
            missing = [
                f"seeds {', '.join(map(str, seeds))} of "
                + ("all objectives" if len(names) == 1 else ", ".join(some))
                for seeds, some in names.items()
                if seeds
            ]
            line += "; missing: " * bool(missing) + "; ".join(missing)
        lines[line] = all(map(all, objectives.values()))
    return lines
