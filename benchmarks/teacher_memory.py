"""What a teacher costs in memory and time, each way of keeping it in a process of its own: python
-m benchmarks.teacher_memory

The example is fixed: a randomly initialised Llama-like teacher of 358 MiB in float32, a small
student, 256 tokens. Memory is resident memory beyond what the process had before the teacher was
loaded: after loading, at the peak of the teacher's part of a step (its states, then its head, both
held), and at the peak of whole steps (with loss and backward, most of the rest). Pages of a mapped
file, which the system takes back when it needs memory, are part of it: safetensors maps a
checkpoint that keeps its dtype, and "own" leaves them out.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MIB = 2**20
MEASURES = {
    "float32": "the whole teacher in memory",
    "float32, no output KD": "stops after its last sampled layer, 4 of 6",
    "bfloat16": "from_pretrained(dtype=torch.bfloat16)",
    "int8 weights": "torchao's Int8WeightOnlyConfig, head included",
    "disk offload": "from_pretrained(device_map={'': 'disk'})",
    "disk offload, no output KD": "both",
}
TEACHER = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 8192,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
STUDENT = TEACHER | {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
BATCH, LENGTH, STEPS = 2, 128, 3


def _status(field: str) -> float:
    """A field of /proc/self/status in MiB."""
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(field + ":")
    )
    return int(line.split()[1]) / 1024


def _settle() -> None:
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _load(measure: str, folder: Path):
    import torch
    from transformers import AutoModelForCausalLM

    checkpoint = folder / "teacher"
    if measure.startswith("disk"):
        return AutoModelForCausalLM.from_pretrained(
            checkpoint, device_map={"": "disk"}, offload_folder=folder / "offload"
        )
    dtype = torch.bfloat16 if measure == "bfloat16" else torch.float32
    teacher = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)
    if measure == "int8 weights":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(teacher, Int8WeightOnlyConfig())
        for parameter in (
            teacher.get_input_embeddings().weight,
            *(p for p in teacher.parameters() if p.ndim == 1),
        ):
            # or they keep the whole float32 checkpoint mapped
            parameter.data = parameter.data.clone()
    return teacher


def run(measure: str, folder: Path, threads: int) -> dict:
    """One measure, in this process."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from fdd_kernels import Distiller, FDDConfig

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = FDDConfig(num_layers=2, output_kd_weight=0.0 if "no output KD" in measure else 1.0)
    student = LlamaForCausalLM(LlamaConfig(**STUDENT))
    ids = torch.randint(0, TEACHER["vocab_size"], (BATCH, LENGTH))
    batch = {"input_ids": ids, "labels": ids}

    def step(distiller) -> None:
        distiller(batch).loss.backward()
        student.zero_grad(set_to_none=False)

    # Code, threads and the student's gradients are there before the teacher comes: it is not to be
    # charged with them.
    small = LlamaForCausalLM(
        LlamaConfig(**(TEACHER | {"hidden_size": 64, "intermediate_size": 64}))
    )
    step(Distiller(student, small, config))
    del small
    _settle()
    before = _status("VmRSS"), _status("RssAnon")
    teacher = _load(measure, folder).eval().requires_grad_(False)
    distiller = Distiller(student, teacher, config)
    _settle()
    loaded = _status("VmRSS") - before[0], _status("RssAnon") - before[1]

    def teachers_part() -> float:
        """Seconds for reading the head."""
        states = distiller.teacher_states(batch)
        start = time.perf_counter()
        head = distiller.teacher.reader.read_head()
        seconds = time.perf_counter() - start
        del states, head
        return seconds

    head, part = _watch(teachers_part, before[0])
    step_seconds, whole = _watch(lambda: step(distiller), before[0])
    return {
        "loaded": loaded[0],
        "own": loaded[1],
        "part": part,
        "whole": whole,
        "head": head,
        "seconds": step_seconds,
    }


def _watch(function, before: float) -> tuple[float, float]:
    """The shortest of some calls in seconds (what the function says, or else its own time), and the
    peak in MiB.
    """
    _settle()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
    seconds = []
    for _ in range(STEPS):
        start = time.perf_counter()
        said = function()
        seconds.append(time.perf_counter() - start if said is None else said)
    return min(seconds), _status("VmHWM") - before


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--threads", type=int, default=1, help="threads of each process (default 1)"
    )
    parser.add_argument("--measure", choices=MEASURES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure:
        print(json.dumps(run(options.measure, options.folder, options.threads)))
        return 0

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**TEACHER)).save_pretrained(folder / "teacher")
        print(
            "| teacher | how | MiB after loading | own | peak of its part | peak of a step | head, "
            "ms | step, s |"
        )
        print("| --- | --- | --- | --- | --- | --- | --- | --- |")
        for measure, how in MEASURES.items():
            command = [
                sys.executable,
                "-m",
                "benchmarks.teacher_memory",
                "--measure",
                measure,
                "--folder",
                name,
            ]
            done = subprocess.run(
                [*command, "--threads", str(options.threads)], capture_output=True, text=True
            )
            if done.returncode:
                reason = done.stderr.strip().splitlines()[-1:] or ["no message"]
                print(f"| {measure} | {how} | missing: {reason[0]} | | | | | |", flush=True)
                continue
            row = json.loads(done.stdout.splitlines()[-1])
            memory = " | ".join(f"{row[key]:.0f}" for key in ("loaded", "own", "part", "whole"))
            print(
                f"| {measure} | {how} | {memory} | {1e3 * row['head']:.1f} | {row['seconds']:.2f} "
                "|",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
