"""Costs and losses of a teacher cache, beside logits: bytes a token and KL to the exact
prediction.

python -m benchmarks.cache_size

On the demo teacher (V = 2048, width 192) and the demo's validation text: hidden states in each
storage; all logits in bfloat16; and the largest k logits with their indices in as many bytes as the
states take.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import pandas as pd
import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM

from benchmarks.report import markdown
from fdd_kernels.demo.corpus import standard_library_texts, token_stream
from fdd_kernels.demo.teacher import SHIPPED_TEACHER, held_out_windows
from fdd_kernels.hf.layers import layer_grid
from fdd_kernels.hf.teachers import LiveTeacher
from fdd_kernels.teacher_cache.codec import CODECS

# A logit in bfloat16 and an index that can name 2048 tokens (here) or any (large vocabularies).
SMALL_ENTRY, LARGE_ENTRY = 2 + 2, 2 + 4
# Name, width and vocabulary of other teachers.
OTHERS = (("GPT-2 XL", 1600, 50257), ("Llama 3.1 8B", 4096, 128256), ("Qwen2.5 7B", 3584, 152064))
# (state (R, D), logits (R, V), exact log probabilities (R, V)) -> log probabilities (R, V)
Way = Callable[[Tensor, Tensor, Tensor], Tensor]


def kl(log_p: Tensor, log_q: Tensor) -> float:
    """Return the mean over tokens of KL(p || q) in nats, inf where q is 0 and p is not."""
    p = log_p.exp()
    return float(torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1).mean())


def truncated(log_p_RV: Tensor, logits_RV: Tensor, k: int, *, tail: bool) -> Tensor:
    """Compute log probabilities from the k largest logits in bfloat16.

    Renormalised over them, or with the mass of all others, one number more, spread evenly.
    """
    largest, index = logits_RV.topk(k)
    largest = largest.to(torch.bfloat16).double()
    if not tail:
        return torch.full_like(log_p_RV, -torch.inf).scatter(-1, index, largest.log_softmax(-1))
    mass = log_p_RV.exp().gather(-1, index).sum(-1, keepdim=True).clamp(max=1.0)
    rest = ((1 - mass).clamp(min=1e-30) / (log_p_RV.shape[-1] - k)).log()
    return rest.expand_as(log_p_RV).scatter(-1, index, largest.log_softmax(-1) + mass.log())


def ways(weight_VD: Tensor) -> dict[str, tuple[int, Way]]:
    """List the ways to store a state: bytes a token and layer, and the predictions."""
    vocabulary, width = weight_VD.shape

    def decoded(name: str) -> Way:
        def predict(state: Tensor, *_: Tensor) -> Tensor:
            decoded = CODECS[name].decode(CODECS[name].encode(state), torch.float32)
            return (decoded.double() @ weight_VD.T).log_softmax(-1)

        return predict

    def top(k: int, *, tail: bool) -> Way:
        return lambda _, logits, log_p: truncated(log_p, logits, k, tail=tail)

    sizes = {name: codec.bytes_per_row(width) for name, codec in CODECS.items()}
    found = {f"states, {name}": (size, decoded(name)) for name, size in sizes.items()}
    found["logits, bfloat16, all"] = (
        2 * vocabulary,
        lambda _, logits, log_p: logits.to(torch.bfloat16).double().log_softmax(-1),
    )
    for name in ("bfloat16", "int8"):
        size, k = sizes[name], sizes[name] // SMALL_ENTRY
        found[f"top {k} logits, renormalised"] = size, top(k, tail=False)
        found[f"top {k - 1} logits and tail mass"] = size, top(k - 1, tail=True)
    return found


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    windows = {"type": int, "default": 16, "metavar": "N"}
    parser.add_argument("--windows", **windows, help="of 256 tokens (%(default)s)")
    arguments = parser.parse_args()
    model = LlamaForCausalLM.from_pretrained(SHIPPED_TEACHER, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED_TEACHER)
    stream = token_stream(tokenizer, standard_library_texts(held_out=True))
    ids, teacher = held_out_windows(stream, arguments.windows), LiveTeacher(model)
    layers = layer_grid(teacher.depth, 4, "floor")
    states = teacher.states({"input_ids": ids}, layers, apply_final_norm=True)
    *sampled, output = [state.flatten(0, 1) for state in states]
    weight_VD, rows = teacher.head()[0].double(), []

    def errors(predict: Way, state: Tensor) -> torch.Tensor:
        logits = state.double() @ weight_VD.T
        log_p = logits.log_softmax(-1)
        log_q = predict(state, logits, log_p)
        return torch.tensor([kl(log_p, log_q), kl(log_q, log_p)])

    for name, (size, predict) in ways(weight_VD).items():
        inner = torch.stack([errors(predict, state) for state in sampled]).mean(0)
        both = (f"{a:.2g}, {b:.2g}" for a, b in (errors(predict, output).tolist(), inner.tolist()))
        rows.append([name, f"{size}", *both])
    headings = ["stored", "bytes a token and layer", "output"]
    headings.append(f"mean of layers {', '.join(map(str, layers))}")
    print(f"{ids.numel()} tokens; mean KL in nats (exact || stored, stored || exact)\n")
    print(*markdown(pd.DataFrame(rows, columns=headings)), sep="\n")

    rows = []
    for name, width, tokens in OTHERS:
        narrow, small = (CODECS[codec].bytes_per_row(width) for codec in ("bfloat16", "int8"))
        numbers = map(str, (width, tokens, narrow, small, 2 * tokens, narrow // LARGE_ENTRY))
        rows.append([name, *numbers])
    headings = ["teacher", "width", "vocabulary", "states, bfloat16", "states, int8"]
    headings += ["logits, bfloat16", "k of top k in bfloat16 states"]
    print("\nBy arithmetic: bytes a token and layer for other models\n")
    print(*markdown(pd.DataFrame(rows, columns=headings)), sep="\n")


if __name__ == "__main__":
    main()
