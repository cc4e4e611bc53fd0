"""A whole training step of a student and a teacher of a real architecture with random weights."""

from __future__ import annotations

import importlib.util
import statistics

import torch

from benchmarks.gpu.bench import Bench, NotHere

STUDENT, TEACHER = (1024, 16, 16, 16, 2816), (2048, 24, 16, 16, 5632)


def training_step(bench: Bench) -> dict:
    """Time a step and its peak memory: output KD and FDD, dense in PyTorch and by the Distiller."""
    if importlib.util.find_spec("transformers") is None:
        raise NotHere("transformers is not installed")
    from benchmarks.steps import LOSSES, Models, llama

    card = bench.card
    bench.forget()
    pair = llama("a Llama", 32000, STUDENT, TEACHER)
    pair, shape = card.size((pair, (4, 1024)), (pair.toy, (1, 4)))
    models = Models(pair, shape, torch.bfloat16, card.device, backend="triton")
    for provider in LOSSES.values():

        @card.once
        def step(provider=provider) -> torch.Tensor:
            return models.train(lambda: provider.loss(models, provider.drops))

        first = step()
        last, peak = card.peak(step)
        seconds = statistics.median(card.seconds(step))
        found = {"ms": seconds * 1e3, "host_ms": card.host_seconds(step) * 1e3}
        found |= {"peak_bytes": peak, "losses": [float(first), float(last)]}
        tokens = models.batch["labels"].numel()
        bench.report(provider.title, found | {"tokens_per_second": tokens / seconds})
    return {"student": pair.student, "teacher": pair.teacher, "tokens": list(shape)}
