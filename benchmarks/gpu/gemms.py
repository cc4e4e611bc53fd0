"""The card, and GEMMs alone: does PyTorch write float32 sums of 16-bit operands in place, how fast?

The logits are `mm.dtype_out` into a view of a buffer whose rows are padded; dH and dW are float32
sums over slabs of the vocabulary.
"""

from __future__ import annotations

import os
import platform
import statistics

import torch
from torch import Tensor

from benchmarks import record
from benchmarks.gpu.bench import STRATEGIES, Bench, NotHere, WrongNumbersError
from benchmarks.gpu_devices import gemm
from benchmarks.gpu_model import PAIRS

SLAB_BYTES = 128 * 2**20  # of dL/dlogits, in whole 2048 tokens
ROWS = {"GPT-2": (4220, 1020), "Llama": (4220, 4095), "Qwen": (1660, 1020), "Gemma": (1020, 4220)}
PROBED = {
    "plain": (1020, 32000, 2048),
    "odd": (1020, 50257, 768),
    "few tiles": (128, 768, 50176),
    "one row": (1, 32001, 96),
}


def machine(bench: Bench) -> dict:
    """Report versions, clocks and strategies; bytes a second of a copy, operations a second of a
    large GEMM.
    """
    card, model = bench.card, bench.model
    about = {"name": card.name, "smi": card.smi(), "free_bytes": card.memory(), "model": model.name}
    bench.report("card", about)
    versions = {"cuda": torch.version.cuda, "hip": torch.version.hip}
    bench.report("versions", record.versions() | versions)
    bench.report("host", {"system": platform.platform(), "cores": os.cpu_count()})
    bench.report("strategies", STRATEGIES)
    numbers, side = card.size(2**31, 2**10), card.size(8192, 16)
    source = _random(bench, numbers)
    target = torch.empty_like(source)
    copy = min(card.seconds(lambda: target.copy_(source)))
    a, b = _random(bench, side, side), _random(bench, side, side)
    multiplied = min(card.seconds(lambda: a @ b))
    return {
        "copy_bytes_per_second": 2 * 2 * numbers / copy,
        "gemm_flops": 2 * side**3 / multiplied,
        "smi_after": card.smi(),
        "predicted": {"memory": model.memory * model.eager, "gemms": model.gemms * model.gemm},
    }


def _random(bench: Bench, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device=bench.card.device)


def _multiply(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool = False) -> None:
    """Run the package's own GEMM."""
    from fdd_kernels.backends.triton.gemm import multiply

    multiply(out, a, b, accumulate=accumulate)


def _padded(columns: int) -> int:
    return -(-columns // 16) * 16


def probe(bench: Bench) -> dict:
    """Check GEMMs into a padded view: no copy, no extra memory, float32 sums, the same bits
    twice.
    """
    card = bench.card
    if not card.dry and not hasattr(torch.ops.aten.mm, "dtype_out"):
        raise NotHere("this torch has no mm.dtype_out: no GEMM of 16-bit operands writes float32")
    shapes = card.size(PROBED, {"plain": (6, 35, 8), "one row": (1, 17, 8)})
    for name, (m, n, k) in shapes.items():
        a, b = _random(bench, m, k), _random(bench, n, k)
        buffer = torch.full((m, _padded(n) + 16), float("nan"), device=card.device)
        out = buffer[:, :n]
        address = out.data_ptr()
        _, extra = card.peak(lambda a=a, b=b, out=out: _multiply(out, a, b.t()))
        first = out.clone()
        _multiply(out, a, b.t())
        repeatable = torch.equal(first, out)
        truth = a[:64].double() @ b.double().t()
        relative = (first[:64].double() - truth).norm() / truth.norm()
        _multiply(out, a, b.t(), accumulate=True)
        doubled = (out[:64].double() - 2 * truth).norm() / truth.norm()
        found = {
            "relative_error": float(relative),
            "accumulated_error": float(doubled),
            "extra_bytes": extra,
            "in_place": out.data_ptr() == address and bool(buffer[:, n:].isnan().all()),
            "repeatable": repeatable,
        }
        bench.report(name, found)
        # Sums in float32 are off by sqrt(k) of its rounding; sums in 16 bits by 1e-3.
        if not (relative < 1e-5 and doubled < 1e-5 and found["in_place"]):
            raise WrongNumbersError(f"the GEMM {name} {(m, n, k)}: {found}")
        if extra > 4 * m * n / 2 and not card.dry:
            warning = "the GEMM allocates as much as its result: it is not written in place"
            bench.report(f"{name}: warning", warning)
    return {}


def alone(bench: Bench) -> dict:
    """Measure TF/s of the four pairs' GEMMs at the sizes of a block: float32 and 16-bit output,
    padded or not, dH and dW.
    """
    card = bench.card
    for pair, rows in ROWS.items():
        shapes = bench.workload(pair) if card.dry else PAIRS[pair]
        for m in card.size(rows, (4,)):
            bench.report(f"{pair} M={m}", _of_block(bench, m, shapes.columns, shapes))
        card.free()
    return {}


def _of_block(bench: Bench, m: int, v: int, shapes) -> dict:
    student, found = shapes.student_width, {}
    device = bench.card.device
    wide, narrow = torch.empty(m, _padded(v), device=device), _random(bench, m, v)
    for width in (student, shapes.teacher_width):
        a, b, name = _random(bench, m, width), _random(bench, v, width).t(), f"logits {width}"
        outputs = {"f32 out": wide[:, :v], "bf16 out": narrow}
        if v % 8:
            outputs["f32 out, rows not padded"] = wide.flatten()[: m * v].view(m, v)
        for which, out in outputs.items():
            found[f"{name}, {which}"] = _timed(bench, out, a, b)
    slab = min(_padded(v), max(2048, SLAB_BYTES // (2 * m) // 2048 * 2048))
    gradient, head, hidden = (
        _random(bench, *shape) for shape in ((m, slab), (slab, student), (m, student))
    )
    grad_hidden, grad_head = (torch.zeros(n, student, device=device) for n in (m, slab))
    found["dH of a slab"] = _timed(bench, grad_hidden, gradient, head, accumulate=True)
    for name, accumulate in (("dW of a slab", False), ("dW of a slab, added", True)):
        found[name] = _timed(bench, grad_head, gradient.t(), hidden, accumulate=accumulate)
    return found


def _timed(bench: Bench, out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool = False) -> dict:
    (m, k), n = a.shape, b.shape[1]

    def run() -> None:
        if out.dtype == a.dtype:
            torch.mm(a, b, out=out)
        else:
            _multiply(out, a, b, accumulate=accumulate)

    seconds = statistics.median(bench.card.seconds(run, most=0.05))
    predicted = gemm(bench.model, m, n, k, out=out.element_size(), accumulate=accumulate)
    rate = 2 * m * n * k / seconds / 1e12
    return {"ms": seconds * 1e3, "tflops": rate, "predicted_ms": predicted * 1e3}
