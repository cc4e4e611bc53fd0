"""What 8 to 1024 GPUs should cost: communication of a training step against its compute, on paper.

    python -m benchmarks.scaling_plan [--tokens 8192] [--sequence 2048] [--json FILE]

NOTHING HERE IS MEASURED. Every figure follows from the published peaks below and these assumptions:

- Every GPU has `tokens` tokens a step whatever their number (weak scaling), in nodes of 8. Products run at UTILISATION of the
  16-bit peak, links at LINK_UTILISATION of theirs; latencies are not counted.
- A token costs the student 6 and the teacher 2 operations a parameter outside of embeddings and head, and causal attention
  2 * sequence * width a layer (three times that with its gradient). The loss reads 5 layers (4 sampled, one final): products
  of both heads in the statistics and once more in the gradients, and dH and dW of the student's.
- A collective over several nodes runs in each node first, then between the GPUs of equal rank (a ring each): of S bytes,
  reduce-scatter or all-gather takes (g-1)/g S / link in the node and (m-1)/m S/g / network over m nodes; an all-reduce is both.
- DDP: one all-reduce of the student's gradients in 16 bits, which may hide behind the student's backward pass. FSDP2:
  parameters gathered in 16 bits for the forward and again for the backward pass, gradients reduce-scattered in float32, all of
  which may hide behind the student's compute. The teacher is whole on every GPU (13B in 16 bits: 26 GB).
- Vocabulary parallelism over the 8 GPUs of a node, which then share 8 * tokens tokens, in models that are tensor-parallel over
  the same GPUs: this package gathers the statistics and all-reduces dH (both float32), in the critical path; gradients, an
  eighth of them a GPU, are all-reduced between the nodes. What tensor parallelism moves within the models (two all-reduces of
  the states a block and direction) is not ours and NOT COUNTED. Pipeline parallelism is not used.
- Sequence or context parallelism adds nothing to the loss but the sum of one number, the normaliser.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

GPUS = (8, 16, 64, 256, 1024)
NODE = 8
LAYERS = 5
UTILISATION = 0.4
LINK_UTILISATION = 0.8
F32, HALF = 4, 2


@dataclass(frozen=True)
class Device:
    """Published peaks: dense 16-bit operations, and bytes a second and direction of a GPU within and out of its node."""

    name: str
    products: float
    link: float
    network: float


H100 = Device("H100 SXM, NVLink 4, 400 Gb/s a GPU", 989e12, 450e9, 50e9)


@dataclass(frozen=True)
class Model:
    """`parameters` with embeddings and head; `heads`: how often the (vocabulary, width) matrix is among them."""

    name: str
    parameters: float
    layers: int
    width: int
    vocabulary: int
    heads: int

    @property
    def body(self) -> float:
        return self.parameters - self.heads * self.vocabulary * self.width

    def forward(self, sequence: int) -> float:
        """Operations a token, without embeddings and head."""
        return 2 * self.body + 2 * sequence * self.width * self.layers


@dataclass(frozen=True)
class Pair:
    student: Model
    teacher: Model


PAIRS = (
    Pair(Model("TinyLlama 1.1B", 1.10e9, 22, 2048, 32000, 2), Model("Llama-2 13B", 13.02e9, 40, 5120, 32000, 2)),
    Pair(Model("Qwen2.5 0.5B", 0.494e9, 24, 896, 151936, 1), Model("Qwen2.5 7B", 7.62e9, 28, 3584, 152064, 2)),
)


def statistics_numbers(layers: int = LAYERS) -> int:
    """Float32 numbers that vocabulary parallelism sends a token and process, default objective: see vocab_parallel.py."""
    sampled = layers - 1
    reads, moments = sampled + 1, sampled - 1
    return 2 * layers + 3 * reads + 7 * moments


def one_way(size: float, gpus: int, device: Device) -> float:
    """Seconds of a reduce-scatter or an all-gather of `size` bytes."""
    node, nodes = min(gpus, NODE), max(1, gpus // NODE)
    seconds = (node - 1) / node * size / device.link + (nodes - 1) / nodes * size / node / device.network
    return seconds / LINK_UTILISATION


def loss_operations(pair: Pair) -> float:
    """A token's products: both heads twice, dH and dW."""
    columns = min(pair.student.vocabulary, pair.teacher.vocabulary)
    return LAYERS * 2 * columns * (2 * (pair.student.width + pair.teacher.width) + 2 * pair.student.width)


def prediction(pair: Pair, gpus: int, tokens: int, sequence: int, device: Device = H100) -> dict:
    """Milliseconds of a step on one GPU, and efficiencies against communication that costs nothing."""
    rate = UTILISATION * device.products
    student, teacher = 3 * tokens * pair.student.forward(sequence) / rate, tokens * pair.teacher.forward(sequence) / rate
    loss = tokens * loss_operations(pair) / rate
    compute = student + teacher + loss
    bytes_half = HALF * pair.student.parameters
    ddp = 2 * one_way(bytes_half, gpus, device)
    fsdp = 2 * one_way(bytes_half, gpus, device) + one_way(2 * bytes_half, gpus, device)
    group_tokens = NODE * tokens
    gathered = group_tokens * statistics_numbers() * F32 * NODE
    statistics = one_way(gathered, NODE, device)
    grad_hidden = 2 * one_way(group_tokens * LAYERS * pair.student.width * F32, NODE, device)
    nodes = max(1, gpus // NODE)
    between_nodes = 2 * (nodes - 1) / nodes * bytes_half / NODE / device.network / LINK_UTILISATION

    def efficiency(exposed: float) -> float:
        return compute / (compute + exposed)

    return {
        "gpus": gpus,
        "student_ms": 1e3 * student, "teacher_ms": 1e3 * teacher, "loss_ms": 1e3 * loss,
        "ddp_ms": 1e3 * ddp, "fsdp_ms": 1e3 * fsdp, "between_nodes_ms": 1e3 * between_nodes,
        "statistics_ms": 1e3 * statistics, "grad_hidden_ms": 1e3 * grad_hidden,
        "efficiency": {
            "ddp": [efficiency(ddp), efficiency(max(0.0, ddp - student * 2 / 3))],
            "fsdp": [efficiency(fsdp), efficiency(max(0.0, fsdp - student))],
            "vocabulary": [
                efficiency(between_nodes + statistics + grad_hidden),
                efficiency(max(0.0, between_nodes - student * 2 / 3) + statistics + grad_hidden),
            ],
        },
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192, help="a GPU and step")
    parser.add_argument("--sequence", type=int, default=2048)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = []
    print(
        f"PREDICTED, NOT MEASURED. {H100.name}; {arguments.tokens} tokens a GPU in sequences of {arguments.sequence}, 16 bits."
    )
    print(f"Products at {UTILISATION:.0%} of the peak, links at {LINK_UTILISATION:.0%}. Milliseconds a step.\n")
    line = "{:>5} {:>20} {:>7} {:>7} {:>24} {:>13} {:>13} {:>13}"
    for pair in PAIRS:
        print(f"{pair.student.name} from {pair.teacher.name}")
        print(
            line.format(
                "GPUs", "student+teacher+loss", "DDP", "FSDP2", "vocab: stats+dH+gradients", "eff. DDP", "FSDP2", "vocab"
            )
        )
        for gpus in GPUS:
            p = prediction(pair, gpus, arguments.tokens, arguments.sequence)
            found.append({"pair": asdict(pair)} | p)
            print(
                line.format(
                    gpus, f"{p['student_ms']:.0f}+{p['teacher_ms']:.0f}+{p['loss_ms']:.0f}", f"{p['ddp_ms']:.1f}",
                    f"{p['fsdp_ms']:.1f}", f"{p['statistics_ms']:.1f}+{p['grad_hidden_ms']:.1f}+{p['between_nodes_ms']:.1f}",
                    *[f"{low:.1%}-{high:.1%}" for low, high in p["efficiency"].values()],
                )
            )  # fmt: skip
        print()
    print("Efficiencies: nothing hidden behind compute - gradients and parameters hidden as far as they can be.")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
