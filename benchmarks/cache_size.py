"""What a teacher cache costs and loses, beside logits: bytes a position and KL to the exact
prediction.

python -m benchmarks.cache_size

On the shipped demo teacher (V = 2048, width 192) and the demo's held-out text: hidden states in
each storage; the whole logits in bfloat16; and the largest k logits with their indices in as many
bytes as the states take.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM

from fdd_kernels.demo.corpus import standard_library_texts, token_stream
from fdd_kernels.demo.teacher import SHIPPED_TEACHER, held_out_windows
from fdd_kernels.hf.layers import layer_grid
from fdd_kernels.hf.teachers import LiveTeacher
from fdd_kernels.teacher_cache.codec import CODECS

WIDTH = 130  # of the tables, also where they are not printed to a terminal
# A logit in bfloat16 and an index that can name 2048 (here) or any token (large vocabularies).
SMALL_ENTRY, LARGE_ENTRY = 2 + 2, 2 + 4


@dataclass
class Errors:
    """Means over positions: KL(exact || kept), KL(kept || exact), both in nats."""

    forward: float
    backward: float


def kl(log_p: Tensor, log_q: Tensor) -> float:
    """Mean over positions of KL(p || q), inf where q is 0 and p is not."""
    p = log_p.exp()
    return float(torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1).mean())


def measure(log_p_RV: Tensor, log_q_RV: Tensor) -> Errors:
    return Errors(kl(log_p_RV, log_q_RV), kl(log_q_RV, log_p_RV))


def truncated(log_p_RV: Tensor, logits_RV: Tensor, k: int, *, tail: bool) -> Tensor:
    """Log probabilities kept by the k largest logits in bfloat16.

    Renormalised over them, or with the mass of all others, a number more, spread evenly.
    """
    kept, index = logits_RV.topk(k)
    kept = kept.to(torch.bfloat16).double()
    if not tail:
        return torch.full_like(log_p_RV, -torch.inf).scatter(-1, index, kept.log_softmax(-1))
    mass = log_p_RV.exp().gather(-1, index).sum(-1, keepdim=True).clamp(max=1.0)
    rest = ((1 - mass).clamp(min=1e-30) / (log_p_RV.shape[-1] - k)).log()
    return rest.expand_as(log_p_RV).scatter(-1, index, kept.log_softmax(-1) + mass.log())


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--windows", type=int, default=16, metavar="N", help="of 256 tokens (%(default)s)"
    )
    arguments = parser.parse_args()
    model = LlamaForCausalLM.from_pretrained(SHIPPED_TEACHER, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED_TEACHER)
    ids = held_out_windows(
        token_stream(tokenizer, standard_library_texts(held_out=True)), arguments.windows
    )
    teacher = LiveTeacher(model)
    layers = layer_grid(teacher.depth, 4, "floor")
    states = teacher.states({"input_ids": ids}, layers, apply_final_norm=True)
    weight_VD = teacher.head()[0].double()
    rows = {"output": states[-1].flatten(0, 1)}
    rows |= {f"layer {layer}": state.flatten(0, 1) for layer, state in zip(layers, states)}

    def logits(state_RD: Tensor) -> Tensor:
        return state_RD.double() @ weight_VD.T

    width, vocabulary = weight_VD.shape[1], len(weight_VD)
    ways: dict[str, tuple[int, Callable[[Tensor, Tensor, Tensor], Tensor]]] = {}
    for name, codec in CODECS.items():
        ways[f"states, {name}"] = (
            codec.bytes_per_row(width),
            lambda state, z, p, codec=codec: logits(
                codec.decode(codec.encode(state), torch.float32)
            ).log_softmax(-1),
        )
    ways["logits, bfloat16, all"] = (
        2 * vocabulary,
        lambda state, z, p: z.to(torch.bfloat16).double().log_softmax(-1),
    )
    for name in ("bfloat16", "int8"):
        size = CODECS[name].bytes_per_row(width)
        k = size // SMALL_ENTRY
        ways[f"top {k} logits, renormalised"] = (
            size,
            lambda state, z, p, k=k: truncated(p, z, k, tail=False),
        )
        ways[f"top {k - 1} logits and tail mass"] = (
            size,
            lambda state, z, p, k=k - 1: truncated(p, z, k, tail=True),
        )

    table = Table(
        title=(
            f"{ids.numel()} positions; KL in nats, its mean over positions (exact || kept, "
            "kept || exact)"
        )
    )
    for column in (
        "kept",
        "bytes a position and layer",
        "output",
        f"mean of layers {', '.join(map(str, layers))}",
    ):
        table.add_column(column)
    for name, (size, keep) in ways.items():
        found = {}
        for where, state_RD in rows.items():
            exact = logits(state_RD)
            log_p = exact.log_softmax(-1)
            found[where] = measure(log_p, keep(state_RD, exact, log_p))
        inner = [found[where] for where in rows if where != "output"]
        mean = Errors(
            sum(e.forward for e in inner) / len(inner), sum(e.backward for e in inner) / len(inner)
        )
        cells = [
            f"{errors.forward:.2g}, {errors.backward:.2g}" for errors in (found["output"], mean)
        ]
        table.add_row(name, str(size), *cells)
    console = Console(width=WIDTH)
    console.print(table)
    arithmetic = Table(title="by arithmetic: bytes a position and layer for other models")
    for column in (
        "teacher",
        "width",
        "vocabulary",
        "states, bfloat16",
        "states, int8",
        "logits, bfloat16",
        "top k in bfloat16 states",
    ):
        arithmetic.add_column(column)
    for name, wide, tokens in (
        ("GPT-2 XL", 1600, 50257),
        ("Llama 3.1 8B", 4096, 128256),
        ("Qwen2.5 7B", 3584, 152064),
    ):
        sizes = [CODECS[codec].bytes_per_row(wide) for codec in ("bfloat16", "int8")]
        arithmetic.add_row(
            name,
            str(wide),
            str(tokens),
            *map(str, sizes),
            str(2 * tokens),
            f"k = {sizes[0] // LARGE_ENTRY}",
        )
    console.print(arithmetic)


if __name__ == "__main__":
    main()
