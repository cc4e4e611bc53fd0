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
from transformers import LlamaForCausalLM, get_cosine_with_min_lr_schedule_with_warmup

from fdd_kernels.common.progress import Activity
from fdd_kernels.demo.corpus import random_windows
from fdd_kernels.demo.teacher import CONTEXT, llama
from fdd_kernels.hf.distiller import Distiller
from fdd_kernels.objectives.fdd.options import FDDConfig

OBJECTIVES: dict[str, FDDConfig] = {
    "labels only": FDDConfig(output_kd_weight=0.0, alpha=0.0, beta=0.0, ce_weight=1.0),
    "output KD": FDDConfig(alpha=0.0, beta=0.0),
    "KD + trajectory": FDDConfig(beta=0.0),
    "KD + derivative": FDDConfig(alpha=0.0),
    "full FDD": FDDConfig(),
}
# Those that the demo trains where they are named.
FURTHER: dict[str, FDDConfig] = {
    "KD + weighted derivative": FDDConfig(alpha=0.0, derivative="weighted_cosine"),
    "full FDD, weighted": FDDConfig(derivative="weighted_cosine"),
}


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
    """The record of one student: validation loss and KL to the teacher at each evaluation, in nats
    per token.
    """

    objective: str
    seed: int
    steps: list[int] = field(default_factory=list)
    held_out_loss: list[float] = field(default_factory=list)
    held_out_kl: list[float] = field(default_factory=list)
    seconds: float = 0.0


class Evaluation:
    """Validation windows with the teacher's predictions on them."""

    def __init__(self, teacher: LlamaForCausalLM, windows: Tensor) -> None:
        self.windows = windows
        self.teacher_log_p, self.teacher_loss = self._predict(teacher)

    @torch.no_grad()
    def _predict(self, model: LlamaForCausalLM) -> tuple[Tensor, float]:
        """Log-probabilities (windows, CONTEXT - 1, V) and cross-entropy, from the model's own
        forward pass.
        """
        logits = torch.cat(
            [model(input_ids=part).logits[:, :-1].float() for part in self.windows.split(8)]
        )
        log_p = logits.log_softmax(-1)
        loss = F.nll_loss(log_p.flatten(0, 1), self.windows[:, 1:].flatten())
        return log_p, loss.item()

    def __call__(self, student: LlamaForCausalLM) -> tuple[float, float]:
        """Validation cross-entropy and KL(teacher || student) per token, from dense logits, without
        our kernels.
        """
        student.eval()
        log_q, loss = self._predict(student)
        student.train()
        kl = (
            F.kl_div(log_q, self.teacher_log_p, log_target=True, reduction="sum")
            / log_q[..., 0].numel()
        )
        return loss, kl.item()


class _Student:
    """A student with its objective and optimizer."""

    def __init__(
        self,
        objective: str,
        config: FDDConfig,
        seed: int,
        teacher: LlamaForCausalLM,
        budget: Budget,
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
        self.scheduler = get_cosine_with_min_lr_schedule_with_warmup(
            self.optimizer,
            num_warmup_steps=budget.steps // 10,
            num_training_steps=budget.steps,
            min_lr_rate=0.05,
        )
        self.run = Run(objective, seed)

    def step(self, batch: dict[str, Tensor], teacher_states: list[Tensor]) -> float:
        started = time.monotonic()
        loss = self.distiller(batch, teacher_states=teacher_states).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.run.seconds += time.monotonic() - started
        return loss.item()

    def evaluate(self, step: int, evaluation: Evaluation) -> None:
        loss, kl = evaluation(self.model)
        self.run.steps.append(step)
        self.run.held_out_loss.append(loss)
        self.run.held_out_kl.append(kl)


def train_students(
    teacher: LlamaForCausalLM,
    stream: Tensor,
    evaluation: Evaluation,
    budget: Budget,
    seed: int,
    activity: Activity,
    objectives: Mapping[str, FDDConfig] = OBJECTIVES,
) -> tuple[list[Run], dict[str, LlamaForCausalLM]]:
    """Train one student per objective from the same initial weights on the same batches.

    The teacher runs once per batch for all of them.

    Returns:
        The records, and the models by objective.
    """
    students = [
        _Student(name, config, seed, teacher, budget) for name, config in objectives.items()
    ]
    configs = [student.distiller.config for student in students]
    # the student whose targets hold all that the others need
    most = max(
        range(len(students)),
        key=lambda i: (configs[i].compares_dynamics, configs[i].compares_output),
    )
    generator = torch.Generator().manual_seed(1000 + seed)
    every = max(1, budget.steps // budget.evaluations)
    for step in range(1, budget.steps + 1):
        windows = random_windows(stream, budget.batch_size, CONTEXT, generator)
        batch = {
            "input_ids": windows,
            "attention_mask": torch.ones_like(windows),
            "labels": windows,
        }
        states = students[most].distiller.teacher_states(batch)
        losses = [student.step(batch, states) for student in students]
        if step % every == 0 or step == budget.steps:
            for student in students:
                student.evaluate(step, evaluation)
        kl = students[-1].run.held_out_kl
        terms = [
            f"{students[-1].run.objective} loss {losses[-1]:.3f}",
            *(f"validation KL {value:.3f}" for value in kl[-1:]),
        ]
        activity.update(step, terms=terms)
    return [student.run for student in students], {s.run.objective: s.model for s in students}
