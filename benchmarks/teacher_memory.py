"""Memory and time of a teacher, each way of holding it in a process of its own: python
-m benchmarks.teacher_memory

A randomly initialised Llama-like teacher of 358 MiB in float32, a small student, 256 tokens. Memory
is resident memory beyond that of the process before the teacher was loaded: after loading, at the
peak of the teacher's part of a step (its states, then its head, both in memory), and at the peak of
whole steps (loss and backward included, most of the rest). It counts pages of a mapped file, which
the system takes back when it needs memory: safetensors maps a checkpoint of unchanged dtype. "own"
leaves them out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from benchmarks.report import markdown
from fdd_kernels.common.sizes import MIB

MEASURES = {
    "float32": "the whole teacher in memory",
    "float32, no output KD": "stops after its last sampled layer, 4 of 6",
    "bfloat16": "from_pretrained(dtype=torch.bfloat16)",
    "int8 weights": "torchao's Int8WeightOnlyConfig, head included",
    "disk offload": "from_pretrained(device_map={'': 'disk'})",
    "disk offload, no output KD": "both",
}
BATCH, LENGTH, STEPS, VOCABULARY = 2, 128, 3, 8192


def _model(width: int, inner: int, layers: int, heads: int):
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers}
    shape |= {"num_attention_heads": heads, "num_key_value_heads": heads}
    shape |= {"max_position_embeddings": 512, "tie_word_embeddings": False}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **shape))


def _load(measure: str, folder: Path):
    import torch
    from transformers import AutoModelForCausalLM

    checkpoint = folder / "teacher"
    if measure.startswith("disk"):
        offload = {"device_map": {"": "disk"}, "offload_folder": folder / "offload"}
        return AutoModelForCausalLM.from_pretrained(checkpoint, **offload)
    dtype = torch.bfloat16 if measure == "bfloat16" else torch.float32
    teacher = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)
    if measure == "int8 weights":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(teacher, Int8WeightOnlyConfig())
        others = [p for p in teacher.parameters() if p.ndim == 1]
        for parameter in (teacher.get_input_embeddings().weight, *others):
            # or the whole float32 checkpoint stays mapped
            parameter.data = parameter.data.clone()
    return teacher


def run(measure: str, folder: Path, threads: int) -> dict[str, float]:
    """Take one measure, in this process: MiB, and seconds of the head and of a step."""
    import torch

    from benchmarks.measure import give_back_memory, reset_high_water, status_bytes
    from fdd_kernels import Distiller, FDDConfig

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = FDDConfig.paper(
        num_layers=2, output_kd_weight=0.0 if "no output KD" in measure else 1.0
    )
    student = _model(256, 704, 4, 4)
    ids = torch.randint(0, VOCABULARY, (BATCH, LENGTH))
    batch = {"input_ids": ids, "labels": ids}

    def step(distiller) -> None:
        distiller(batch).loss.backward()
        student.zero_grad(set_to_none=False)

    # Code, threads and the student's gradients are there before the teacher comes: they are not its
    # cost.
    step(Distiller(student, _model(64, 64, 6, 16), config))
    give_back_memory()
    before, own_before = status_bytes("VmRSS"), status_bytes("RssAnon")
    teacher = _load(measure, folder).eval().requires_grad_(False)
    distiller = Distiller(student, teacher, config)
    give_back_memory()
    loaded, own = status_bytes("VmRSS") - before, status_bytes("RssAnon") - own_before

    def watch(function: Callable[[], float | None]) -> tuple[float, float]:
        """Return the shortest call in seconds (the function's own figure, or its time), and the
        peak.
        """
        give_back_memory()
        reset_high_water()
        seconds = []
        for _ in range(STEPS):
            start = time.perf_counter()
            reported = function()
            seconds.append(time.perf_counter() - start if reported is None else reported)
        return min(seconds), status_bytes("VmHWM") - before

    def teachers_part() -> float:
        """Time the fetch of the head."""
        states = distiller.teacher_states(batch)
        start = time.perf_counter()
        head = distiller.teacher.reader.read_head()
        seconds = time.perf_counter() - start
        del states, head
        return seconds

    head, part = watch(teachers_part)
    seconds, whole = watch(lambda: step(distiller))
    sizes = {"loaded": loaded, "own": own, "part": part, "whole": whole}
    return {name: size / MIB for name, size in sizes.items()} | {"head": head, "seconds": seconds}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    threads = "threads of each process (default 1)"
    parser.add_argument("--threads", type=int, default=1, help=threads)
    parser.add_argument("--measure", choices=MEASURES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure:
        print(json.dumps(run(options.measure, options.folder, options.threads)))
        return 0

    import torch

    headings = ["teacher", "how", "MiB after loading", "own", "peak of its part"]
    headings += ["peak of a step", "head, ms", "step, s"]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        _model(1024, 2816, 6, 16).save_pretrained(Path(folder) / "teacher")
        for measure, how in MEASURES.items():
            command = [sys.executable, "-m", "benchmarks.teacher_memory", f"--measure={measure}"]
            command += [f"--folder={folder}", f"--threads={options.threads}"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
                rows.append([measure, how, f"missing: {reason}", *[""] * 5])
                continue
            row = json.loads(done.stdout.splitlines()[-1])
            sizes = [f"{row[key]:.0f}" for key in ("loaded", "own", "part", "whole")]
            times = [f"{1e3 * row['head']:.1f}", f"{row['seconds']:.2f}"]
            rows.append([measure, how, *sizes, *times])
    print(*markdown(pd.DataFrame(rows, columns=headings)), sep="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
