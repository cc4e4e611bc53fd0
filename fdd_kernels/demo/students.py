"""Students of one size and budget under several objectives, trained side by side on the same
batches.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    LlamaForCausalLM,
    get_cosine_with_min_lr_schedule_with_warmup,
    get_inverse_sqrt_schedule,
)

from fdd_kernels.common.progress import Activity
from fdd_kernels.demo.corpus import random_windows
from fdd_kernels.demo.teacher import CONTEXT, llama
from fdd_kernels.hf.distiller import Distiller
from fdd_kernels.hf.layers import paired_layers
from fdd_kernels.hf.model_reader import ModelReader
from fdd_kernels.hf.targets import Targets
from fdd_kernels.hf.teachers import model_states
from fdd_kernels.objectives.fdd.options import FDDConfig

OBJECTIVES: dict[str, FDDConfig] = {
    "labels only": FDDConfig.paper(output_kd_weight=0.0, alpha=0.0, beta=0.0, ce_weight=1.0),
    "output KD": FDDConfig.paper(alpha=0.0, beta=0.0),
    "KD + trajectory": FDDConfig.paper(beta=0.0),
    "full FDD": FDDConfig.paper(),
    "full FDD, weighted": FDDConfig.paper(derivative="weighted_cosine"),
}
# Those that are trained where they are named.
FURTHER: dict[str, FDDConfig] = {
    "KD + derivative": FDDConfig.paper(alpha=0.0),
    "KD + weighted derivative": FDDConfig.paper(alpha=0.0, derivative="weighted_cosine"),
}
LAYER_WINDOWS = 16


def choose(names: Sequence[str] | None) -> dict[str, FDDConfig]:
    """Choose objectives by name, in the order given; None: `OBJECTIVES`.

    Raises:
        ValueError: a name that is unknown or given twice.
    """
    known = OBJECTIVES | FURTHER
    for name in names or ():
        if name not in known or list(names).count(name) > 1:
            raise ValueError(
                f"objective {name!r} is not one of {', '.join(map(repr, known))}, each at most once"
            )
    return {name: known[name] for name in names or OBJECTIVES}


@dataclass(frozen=True)
class Budget:
    """Size and training of every student."""

    steps: int
    batch_size: int = 4
    learning_rate: float = 2.5e-3
    hidden_size: int = 96
    num_layers: int = 5
    num_heads: int = 3
    evaluations: int = 6
    evaluation_windows: int = 48


@dataclass
class Run:
    """The record of one student.

    Attributes:
        steps: the steps after which it was evaluated; of the next six lists there is one entry per
            evaluation.
        held_out_loss, held_out_kl: validation cross-entropy and KL(teacher || student), in nats per
            token.
        seconds, cpu_seconds: wall-clock and CPU time of the student's own steps so far, without
            teacher and evaluations. With one thread the CPU time is the one to compare where other
            programs run too.
        teacher_seconds, teacher_cpu_seconds: of the teacher's forward passes so far, which several
            students share.
        window_kl: validation KL of every window at the last evaluation. Runs of the same teacher
            and budget have the same windows, so their differences can be taken window by window.
        window_kl_curve: the same at every evaluation, if it was asked for.
        layer_kl_before, layer_kl_after: validation KL of the paper's layers (see `Evaluation`),
            then of the output, before the first step and after the last.
    """

    objective: str
    seed: int
    steps: list[int] = field(default_factory=list)
    held_out_loss: list[float] = field(default_factory=list)
    held_out_kl: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    teacher_seconds: list[float] = field(default_factory=list)
    teacher_cpu_seconds: list[float] = field(default_factory=list)
    window_kl: list[float] = field(default_factory=list)
    window_kl_curve: list[list[float]] = field(default_factory=list)
    layer_kl_before: list[float] = field(default_factory=list)
    layer_kl_after: list[float] = field(default_factory=list)


class Evaluation:
    """Validation windows (count, CONTEXT), and what the teacher predicts on them.

    All figures are computed from dense logits, without our kernels. The last token of a window has
    no label and does not count.
    """

    def __init__(self, teacher: LlamaForCausalLM, windows: Tensor) -> None:
        self.windows = windows
        self.teacher = ModelReader(teacher, "teacher")
        self._log_p = self._log_probabilities(teacher)
        self.teacher_loss = self._loss(self._log_p)

    @torch.no_grad()
    def _log_probabilities(self, model: LlamaForCausalLM) -> Tensor:
        """Log-probabilities (windows, CONTEXT - 1, V) of the model's own forward pass."""
        logits = [model(input_ids=part).logits[:, :-1] for part in self.windows.split(8)]
        return torch.cat(logits).float().log_softmax(-1)

    def _loss(self, log_p: Tensor) -> float:
        return F.nll_loss(log_p.flatten(0, 1), self.windows[:, 1:].flatten()).item()

    def __call__(self, student: LlamaForCausalLM) -> tuple[float, Tensor]:
        """Validation cross-entropy, and KL(teacher || student) of each window (windows,), in nats
        per token.
        """
        student.eval()
        log_q = self._log_probabilities(student)
        student.train()
        return self._loss(log_q), _kl(self._log_p, log_q).mean(1)

    @torch.no_grad()
    def by_layer(self, student: LlamaForCausalLM) -> list[float]:
        """KL(teacher || student) in nats per token of the sampled layers of `FDDConfig.paper()`,
        each through its own model's final norm and head, and of the output; on the first
        `LAYER_WINDOWS` windows, since every layer costs dense logits of both models.
        """
        reader = ModelReader(student, "student")
        layers = paired_layers(FDDConfig.paper(), reader.depth, self.teacher.depth)
        student.eval()
        windows = self.windows[:LAYER_WINDOWS]
        sums, count = torch.zeros(len(layers[0]) + 1), windows[:, 1:].numel()
        for part in windows.split(8):
            states, targets = (
                model_states(model, {"input_ids": part}, own, apply_final_norm=True)
                for model, own in zip((reader, self.teacher), layers)
            )
            for i, (own, other) in enumerate(zip(states, targets, strict=True)):
                log_q, log_p = (
                    model.logits(state[:, :-1]).float().log_softmax(-1)
                    for model, state in ((reader, own), (self.teacher, other))
                )
                sums[i] += _kl(log_p, log_q).sum()
        student.train()
        return (sums / count).tolist()


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of each token, from log-probabilities (..., V)."""
    return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)


class _Student:
    """A student with its objective and optimizer."""

    def __init__(
        self,
        objective: str,
        config: FDDConfig,
        seed: int,
        teacher: LlamaForCausalLM,
        budget: Budget,
        warmup: int | None,
    ) -> None:
        torch.manual_seed(seed)
        self.model = llama(budget.hidden_size, budget.num_layers, budget.num_heads).train()
        self.distiller = Distiller(self.model, teacher, config)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=budget.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=0.05,
            fused=True,
        )
        if warmup is None:
            self.scheduler = get_cosine_with_min_lr_schedule_with_warmup(
                self.optimizer,
                num_warmup_steps=budget.steps // 10,
                num_training_steps=budget.steps,
                min_lr_rate=0.05,
            )
        else:
            self.scheduler = get_inverse_sqrt_schedule(self.optimizer, warmup)
        self.run, self.seconds, self.cpu_seconds = Run(objective, seed), 0.0, 0.0

    def step(self, batch: dict[str, Tensor], teacher_states: Targets) -> None:
        started, cpu_started = time.monotonic(), time.process_time()
        loss = self.distiller(batch, teacher_states=teacher_states).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.seconds += time.monotonic() - started
        self.cpu_seconds += time.process_time() - cpu_started

    def evaluate(
        self, step: int, teacher: _SharedTeacher, evaluation: Evaluation, curve: bool
    ) -> None:
        loss, window_kl = evaluation(self.model)
        run = self.run
        run.steps.append(step)
        run.held_out_loss.append(loss)
        run.held_out_kl.append(window_kl.mean().item())
        run.seconds.append(self.seconds)
        run.cpu_seconds.append(self.cpu_seconds)
        run.teacher_seconds.append(teacher.seconds)
        run.teacher_cpu_seconds.append(teacher.cpu_seconds)
        run.window_kl = window_kl.tolist()
        if curve:
            run.window_kl_curve.append(run.window_kl)


class _SharedTeacher:
    """Runs the teacher once per batch for all students that compare the same of its layers."""

    def __init__(self, students: Sequence[_Student]) -> None:
        self.seconds, self.cpu_seconds, self._widest = 0.0, 0.0, {}
        for student in students:  # the one whose targets hold all that the others need
            config = student.distiller.config
            needs = config.compares_dynamics, config.compares_output
            widest = self._widest.setdefault(self._layers(student), (needs, student))
            self._widest[self._layers(student)] = max(widest, (needs, student), key=lambda x: x[0])

    def _layers(self, student: _Student) -> tuple:
        return student.distiller.teacher_layers, student.distiller.config.apply_final_norm

    def __call__(self, batch: dict[str, Tensor]) -> dict[tuple, Targets]:
        started, cpu_started = time.monotonic(), time.process_time()
        targets = {
            layers: student.distiller.teacher_states(batch)
            for layers, (_, student) in self._widest.items()
        }
        self.seconds += time.monotonic() - started
        self.cpu_seconds += time.process_time() - cpu_started
        return targets

    def of(self, student: _Student, targets: dict[tuple, Targets]) -> Targets:
        """Choose a student's targets."""
        return targets[self._layers(student)]


def train_students(
    teacher: LlamaForCausalLM,
    stream: Tensor,
    evaluation: Evaluation,
    budget: Budget,
    seed: int,
    activity: Activity,
    objectives: Mapping[str, FDDConfig] = OBJECTIVES,
    *,
    warmup: int | None = None,
    window_curves: bool = False,
) -> tuple[list[Run], dict[str, LlamaForCausalLM]]:
    """Train one student per objective from the same initial weights on the same batches.

    The teacher runs once per batch for all of them that compare the same layers.

    Args:
        activity: told after every step, with the KL of the last evaluation of each student.
        warmup: steps in which the learning rate rises, after which it falls with the square root of
            the step: it does not depend on the number of steps, so that each point of a curve is a
            run of that length. None: it rises in a tenth of the steps and falls as a cosine to 5%.
        window_curves: keep `Run.window_kl_curve`.

    Returns:
        The records, and the models by objective.
    """
    students = [
        _Student(name, config, seed, teacher, budget, warmup) for name, config in objectives.items()
    ]
    run_teacher = _SharedTeacher(students)
    before = evaluation.by_layer(students[0].model)
    generator = torch.Generator().manual_seed(1000 + seed)
    every = max(1, budget.steps // budget.evaluations)
    for step in range(1, budget.steps + 1):
        windows = random_windows(stream, budget.batch_size, CONTEXT, generator)
        batch = {
            "input_ids": windows,
            "attention_mask": torch.ones_like(windows),
            "labels": windows,
        }
        targets = run_teacher(batch)
        for student in students:
            student.step(batch, run_teacher.of(student, targets))
        if step % every == 0 or step == budget.steps:
            for student in students:
                student.evaluate(step, run_teacher, evaluation, window_curves)
        terms = [f"{s.run.objective} {kl:.3f}" for s in students for kl in s.run.held_out_kl[-1:]]
        activity.update(step, terms=terms)
    for student in students:
        student.run.layer_kl_before = before
        student.run.layer_kl_after = evaluation.by_layer(student.model)
    return [student.run for student in students], {s.run.objective: s.model for s in students}
