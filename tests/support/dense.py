"""The paper's loss in dense PyTorch, by hand from the models' own states and logits."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdd_kernels import Distiller, FDDConfig, FDDLossTerms
from tests.support.hf_models import tiny_model

STUDENT_LAYERS, TEACHER_LAYERS = (1, 2, 3), (2, 4, 6)


CONFIG = FDDConfig.paper(num_layers=3, ce_weight=0.5, alpha=0.7, beta=1.3, output_kd_weight=0.9)


def final_norm(model: nn.Module):
    """Return a function that applies the family's final norm, and the projection before the
    head.
    """
    names = {
        "gpt2": "transformer.ln_f",
        "llama": "model.norm",
        "gemma2": "model.norm",
        "granite": "model.norm",
    }
    if model.config.model_type == "opt":
        decoder = model.model.decoder
        return lambda h, norm=True: decoder.project_out(decoder.final_layer_norm(h) if norm else h)
    module = model.get_submodule(names[model.config.model_type])
    return lambda h, norm=True: module(h) if norm else h


def logits_of(model: nn.Module, state: Tensor, *, train_head: bool = True) -> Tensor:
    """Apply the head, scale and soft cap in float64, from the config fields of the families here.

    Under autocast operands are rounded to bfloat16 first, and logits still are not.
    """
    head = model.get_output_embeddings()
    operands = [state, head.weight, *([] if head.bias is None else [head.bias])]
    if not train_head:
        operands[1:] = [t.detach() for t in operands[1:]]
    if torch.is_autocast_enabled("cpu"):
        operands = [t.bfloat16() for t in operands]
    with torch.autocast("cpu", enabled=False):
        logits = F.linear(*[t.double() for t in operands])
    logits = logits / (getattr(model.config, "logits_scaling", None) or 1.0)
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def dense_terms(
    student,
    teacher,
    batch,
    config=CONFIG,
    student_layers=STUDENT_LAYERS,
    teacher_layers=TEACHER_LAYERS,
):
    """The paper's loss from output_hidden_states and logits, position by position."""
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}

    def logits(model, layers, train_head=True):
        output = model(**inputs, output_hidden_states=True)
        read = final_norm(model)
        lens = [
            logits_of(
                model, read(output.hidden_states[k], config.apply_final_norm), train_head=train_head
            )
            for k in layers
        ]
        final = output.hidden_states[-1]
        if model.config.model_type == "opt":
            final = (
                model.model.decoder.project_out(final)
                if final.shape[-1] != model.lm_head.in_features
                else final
            )
        final_logits = logits_of(model, final, train_head=train_head)
        rounding = 8 * torch.finfo(output.logits.dtype).eps + 1e-6
        torch.testing.assert_close(
            final_logits, output.logits.double(), rtol=rounding, atol=rounding
        )
        return [*lens, final_logits]

    ours = logits(student, student_layers, config.train_head)
    with torch.no_grad():
        theirs = logits(teacher, teacher_layers)
    if "labels" not in batch:
        return terms_of_logits(ours, theirs, config, counts=batch["attention_mask"].bool())
    labels = torch.full_like(batch["labels"], -100)
    labels[:, :-1] = batch["labels"][:, 1:]
    return terms_of_logits(ours, theirs, config, labels)


def terms_of_logits(
    ours: list[Tensor],
    theirs: list[Tensor],
    config: FDDConfig,
    labels: Tensor | None = None,
    *,
    counts: Tensor | None = None,
) -> FDDLossTerms:
    """The paper's loss from logits (batch, sequence, V) of the sampled layers and, last, of the
    output.

    Args:
        labels: of each position's own prediction, -100 where it is not valid.
        counts: which positions are valid, without labels.
    """
    counts = labels != -100 if counts is None else counts
    *ours, our_logits = [z[..., : config.vocab_size] for z in ours]
    *theirs, their_logits = [z[..., : config.vocab_size] for z in theirs]
    ours, theirs = ([z.log_softmax(-1) for z in lens] for lens in (ours, theirs))

    def mean(per_position: Tensor) -> Tensor:
        return per_position[counts].mean()

    def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
        return mean((log_p.exp() * (log_p - log_q)).sum(-1))

    trajectory = sum(kl(t, s) for s, t in zip(ours, theirs)) / len(ours)
    pairs = [(ours[i + 1] - ours[i], theirs[i + 1] - theirs[i]) for i in range(len(ours) - 1)]
    derivative = sum(mean(1 - F.cosine_similarity(s, t, dim=-1)) for s, t in pairs) / len(pairs)
    output_kd = kl(their_logits.log_softmax(-1), our_logits.log_softmax(-1))
    ce = our_logits.new_zeros(())
    if config.ce_weight:
        ce = F.cross_entropy(our_logits.flatten(0, 1), labels.flatten())
    loss = (
        config.output_kd_weight * output_kd
        + config.alpha * trajectory
        + config.beta * derivative
        + config.ce_weight * ce
    )
    return FDDLossTerms(loss, output_kd, trajectory, derivative, ce)


def models(student="llama", teacher="gpt2", dtype=torch.float64, **student_options):
    """A student of 4 blocks and a teacher of 8."""
    ours = tiny_model(student, depth=4, seed=1, dtype=dtype, **student_options)
    theirs = tiny_model(teacher, depth=8, seed=2, dtype=dtype)
    return ours, theirs


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def compare_with_dense(student, teacher, batch, config=CONFIG, *, dense=dense_terms, **tolerance):
    """Terms and every gradient of the student against `dense(student, teacher, batch, config)`."""
    distiller = Distiller(student, teacher, config)
    student.train()
    terms = distiller(batch)
    terms.loss.backward()
    actual = gradients(student)
    student.zero_grad()
    expected_terms = dense(student, teacher, batch, config)
    expected_terms.loss.backward()
    expected = gradients(student)
    student.zero_grad()
    for name in FDDLossTerms._fields:
        torch.testing.assert_close(
            getattr(terms, name),
            getattr(expected_terms, name),
            **tolerance,
            check_dtype=False,
            msg=lambda m, n=name: n + m,
        )
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            actual[name], expected[name], **tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert any(g.abs().max() > 1e-4 for g in actual.values())
    return terms
