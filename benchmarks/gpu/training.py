"""A whole training step of a student and a teacher of a real architecture with random weights, and
the loss's part of it.
"""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu.bench import Bench, NotHere


def _shape(width: int, inner: int, layers: int, heads: int) -> dict[str, int]:
    shape = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers}
    return shape | {"num_attention_heads": heads, "num_key_value_heads": heads}


STUDENT, TEACHER, TOY = _shape(1024, 2816, 16, 16), _shape(2048, 5632, 24, 16), _shape(8, 12, 6, 2)


def _model(bench: Bench, shape: dict[str, int], vocabulary: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    about = {"vocab_size": vocabulary, "max_position_embeddings": 1024}
    with torch.device(bench.card.device):
        model = LlamaForCausalLM(LlamaConfig(**shape, **about, tie_word_embeddings=False))
    return model.to(torch.bfloat16)


def training_step(bench: Bench) -> dict:
    """Time a step and its peak memory: output KD dense in PyTorch, output KD and FDD by the
    Distiller.
    """
    if importlib.util.find_spec("transformers") is None:
        raise NotHere("transformers is not installed")
    from fdd_kernels import Distiller, FDDConfig

    card = bench.card
    bench.forget()
    torch.manual_seed(0)
    vocabulary, shapes = card.size(32000, 19), (card.size(STUDENT, TOY), card.size(TEACHER, TOY))
    student, teacher = (_model(bench, shape, vocabulary) for shape in shapes)
    teacher.requires_grad_(False).eval()
    tokens = torch.randint(0, vocabulary, card.size((4, 1024), (1, 4)), device=card.device)
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, fused=not card.dry)

    def distilled(**options: float) -> Callable[[], Tensor]:
        distiller = Distiller(student, teacher, FDDConfig.paper(**options, backend="triton"))
        return lambda: distiller(batch).loss

    losses = {
        "dense output KD": lambda: dense_output_kd(student, teacher, batch),
        "output KD": distilled(alpha=0.0, beta=0.0),
        "FDD": distilled(),
    }
    for name, loss_of in losses.items():

        @card.once
        def step(loss_of: Callable[[], Tensor] = loss_of) -> Tensor:
            loss = loss_of()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.detach()

        first = step()
        last, peak = card.peak(step)
        seconds = statistics.median(card.seconds(step))
        found = {"ms": seconds * 1e3, "host_ms": card.host_seconds(step) * 1e3}
        found |= {"peak_bytes": peak, "losses": [float(first), float(last)]}
        bench.report(name, found | {"tokens_per_second": tokens.numel() / seconds})
    return {"student": shapes[0], "teacher": shapes[1], "tokens": list(tokens.shape)}


def dense_output_kd(student: nn.Module, teacher: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Compute KL(teacher || student) of the final logits as training code writes it."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        p = F.log_softmax(teacher(**inputs).logits[:, :-1].float(), -1)
    q = F.log_softmax(student(**inputs).logits[:, :-1].float(), -1)
    return F.kl_div(q.flatten(0, 1), p.flatten(0, 1), reduction="batchmean", log_target=True)
