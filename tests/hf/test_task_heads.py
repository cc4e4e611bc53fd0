"""Classifiers, question answering and embeddings: against dense formulas, bad input, training."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fdd_kernels import Distiller, FDDConfig
from tests.support.dense import gradients
from tests.support.task_models import TASKS, hidden_states, pair, task_batch

CONFIG = FDDConfig(
    space="feature",
    trajectory="mse",
    student_layers=(1, 2),
    teacher_layers=(2, 4),
    alpha=0.7,
    beta=1.3,
    ce_weight=0.5,
    output_temperature=1.5,
)
EMBEDDING = replace(CONFIG, ce_weight=0.0, output_temperature=1.0, output_divergence="cosine")
# Norms and softmax of some families are float32 inside of float64 models: gradients differ by the
# rounding of these, of numbers of about 1.
CLOSE = {"rtol": 1e-6, "atol": 1e-6}


def config_of(task: str) -> FDDConfig:
    return EMBEDDING if task == "embedding" else CONFIG


def kl(z_t: Tensor, z_s: Tensor, temperature: float) -> Tensor:
    log_p, log_q = ((z / temperature).log_softmax(-1) for z in (z_t, z_s))
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def mean_of(rows: Tensor, mask: Tensor) -> Tensor:
    """The mean over the tokens of each sequence, (batch,)."""
    return torch.stack([row[own].mean() for row, own in zip(rows, mask)])


def dense_terms(family, task, student, teacher, batch, config, weight):
    """The formulas row by row, from the models' own results; a mean over valid rows."""
    targets = ("labels", "start_positions", "end_positions")
    inputs = {k: v for k, v in batch.items() if k not in targets}
    mask = batch["attention_mask"].bool()
    ours, own = hidden_states(student, family, inputs, config.student_layers)
    with torch.no_grad():
        theirs, other = hidden_states(teacher, family, inputs, config.teacher_layers)
    z = [h @ weight.T for h in ours]
    trajectory = sum((s - t).square().mean(-1) for s, t in zip(z, theirs)) / 2
    derivative = 1 - F.cosine_similarity(z[1] - z[0], theirs[1] - theirs[0], dim=-1)
    temperature, ce = config.output_temperature, None
    if task == "token_classification":
        valid = batch["labels"] != -100
        kd = kl(other.logits, own.logits, temperature)[valid]
        ce = F.cross_entropy(own.logits[valid], batch["labels"][valid], reduction="none")
        trajectory, derivative = trajectory[valid], derivative[valid]
    else:
        trajectory, derivative = mean_of(trajectory, mask), mean_of(derivative, mask)
    if task == "sequence_classification":
        valid = batch["labels"] != -100
        kd = kl(other.logits, own.logits, temperature)[valid]
        ce = F.cross_entropy(own.logits[valid], batch["labels"][valid], reduction="none")
        trajectory, derivative = trajectory[valid], derivative[valid]
    if task == "question_answering":
        both = []
        for name in ("start", "end"):
            z_s, z_t = (getattr(o, f"{name}_logits") for o in (own, other))
            rows = [kl(t[m], s[m], temperature) for s, t, m in zip(z_s, z_t, mask)]
            labels = batch[f"{name}_positions"]
            both.append((torch.stack(rows), F.cross_entropy(z_s, labels, reduction="none")))
        kd, ce = (torch.stack(parts).mean(0) for parts in zip(*both))
    if task == "embedding":

        def pooled(h):
            if config.pooling == "cls":
                return torch.stack([row[own][0] for row, own in zip(h, mask)])
            return torch.stack([row[own].mean(0) for row, own in zip(h, mask)])

        e_s = pooled(own.last_hidden_state) @ weight.T
        e_t = pooled(other.last_hidden_state)
        kd = 1 - F.cosine_similarity(e_s, e_t, dim=-1)
        if config.output_divergence == "mse":
            kd = (e_s - e_t).square().mean(-1)
    ce = torch.zeros_like(kd) if ce is None else ce
    kd, trajectory, derivative, ce = (term.mean() for term in (kd, trajectory, derivative, ce))
    loss = kd + config.alpha * trajectory + config.beta * derivative + config.ce_weight * ce
    return loss, kd, trajectory, derivative, ce


def compare(family, task, config, batch, **changes):
    """Compare terms and gradients of the student and of the projection with the formulas."""
    student, teacher = pair(family, task, **changes)
    distiller = Distiller(student, teacher, config)
    modules = torch.nn.ModuleList([student, distiller.projection])
    terms = distiller(batch)
    terms.loss.backward()
    found = gradients(modules)
    modules.zero_grad()
    weight = distiller.projection.weight
    expected = dense_terms(family, task, student, teacher, batch, config, weight)
    expected[0].backward()
    for name, actual, wanted in zip(terms._fields, terms, expected, strict=True):
        torch.testing.assert_close(actual, wanted, **CLOSE, msg=lambda m, n=name: f"{n}: {m}")
    wanted = gradients(modules)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, **CLOSE, msg=lambda m, n=name: n + m)
    return distiller, terms


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_terms_and_gradients_equal_the_formulas(family, task):
    batch = task_batch(task)
    distiller, terms = compare(family, task, config_of(task), batch)
    if task != "embedding":
        inputs = dict(batch)
        own = distiller.student.model(**inputs).loss
        torch.testing.assert_close(terms.ce, own, **CLOSE)


@pytest.mark.parametrize(
    ("family", "task"),
    [
        ("roberta", "sequence_classification"),
        ("distilbert", "question_answering"),
        ("deberta_v2", "token_classification"),
        ("albert", "sequence_classification"),
        ("electra", "embedding"),
        ("gpt2", "sequence_classification"),
        ("llama", "sequence_classification"),
    ],
)
def test_families(family, task):
    compare(family, task, config_of(task), task_batch(task))


@pytest.mark.parametrize("task", ["question_answering", "embedding"])
def test_padding_on_the_left(task):
    config = replace(config_of(task), pooling="cls" if task == "embedding" else "mean")
    compare("bert", task, config, task_batch(task, side="left"))


@pytest.mark.parametrize(("divergence", "pooling"), [("mse", "mean"), ("cosine", "cls")])
def test_embeddings(divergence, pooling):
    config = replace(EMBEDDING, output_divergence=divergence, pooling=pooling)
    compare("bert", "embedding", config, task_batch("embedding"))
