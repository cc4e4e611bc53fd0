"""A whole training step of a student and a teacher of a real architecture with random weights, and
what the loss is of it.
"""

from __future__ import annotations

import importlib.util
import statistics
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu.bench import Bench, NotHere

STUDENT = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
}
TEACHER = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
}
TOY = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def _model(bench: Bench, shape: dict[str, int], vocabulary: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary, max_position_embeddings=1024, tie_word_embeddings=False, **shape
    )
    with torch.device(bench.card.device):
        return LlamaForCausalLM(config).to(torch.bfloat16)


def training_step(bench: Bench) -> dict:
    """Milliseconds and peak memory of a step: output KD dense in PyTorch, output KD and FDD by the
    Distiller.
    """
    if importlib.util.find_spec("transformers") is None:
        raise NotHere("transformers is not installed")
    from fdd_kernels import Distiller, FDDConfig

    card = bench.card
    bench.forget()
    vocabulary = card.size(32000, 19)
    torch.manual_seed(0)
    student, teacher = (
        _model(bench, shape, vocabulary)
        for shape in (card.size(STUDENT, TOY), card.size(TEACHER, TOY))
    )
    teacher.requires_grad_(False).eval()
    tokens = torch.randint(0, vocabulary, card.size((4, 1024), (1, 4)), device=card.device)
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, fused=not card.dry)
    output_alone = {"alpha": 0.0, "beta": 0.0}
    losses = {
        "dense output KD": lambda: dense_output_kd(student, teacher, batch),
        "output KD": _distilled(
            Distiller(student, teacher, FDDConfig(**output_alone, backend="triton")), batch
        ),
        "FDD": _distilled(Distiller(student, teacher, FDDConfig(backend="triton")), batch),
    }
    for name, loss_of in losses.items():

        @card.once
        def step(loss_of: Any = loss_of) -> Tensor:
            loss = loss_of()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.detach()

        first = step()
        last, peak = card.peak(step)
        seconds = card.seconds(step, repeats=5, warm_up=1)
        bench.report(
            name,
            {
                "ms": statistics.median(seconds) * 1e3,
                "host_ms": card.host_seconds(step) * 1e3,
                "peak_bytes": peak,
                "losses": [float(first), float(last)],
                "tokens_per_second": tokens.numel() / statistics.median(seconds),
            },
        )
    return {
        "student": card.size(STUDENT, TOY),
        "teacher": card.size(TEACHER, TOY),
        "tokens": list(tokens.shape),
    }


def _distilled(distiller: Any, batch: dict[str, Tensor]):
    return lambda: distiller(batch).loss


def dense_output_kd(student: nn.Module, teacher: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """KL(teacher || student) of the final logits as training code writes it."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        p = F.log_softmax(teacher(**inputs).logits[:, :-1].float(), -1)
    q = F.log_softmax(student(**inputs).logits[:, :-1].float(), -1)
    return F.kl_div(q.flatten(0, 1), p.flatten(0, 1), reduction="batchmean", log_target=True)
