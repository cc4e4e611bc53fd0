"""Products (GEMMs) alone: whether PyTorch writes float32 sums of 16-bit operands where it is told
to, and how fast.

The logits are `mm.dtype_out` into a view of a buffer whose rows are padded; dH and dW are float32
sums over slabs of columns.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.gpu.bench import Bench, NotHere, WrongNumbersError
from benchmarks.gpu_model import PAIRS, gemm

SLAB_BYTES = 128 * 2**20  # of dL/dlogits, in whole 2048 tokens
PRODUCT_ROWS = {
    "GPT-2": (4220, 1020),
    "Llama": (4220, 4095),
    "Qwen": (1660, 1020),
    "Gemma": (1020, 4220),
}


def multiplier() -> Callable[..., None]:
    """`multiply(out, a, b, accumulate=False)`: the package's own, or what it is to be where this
    version has none.
    """
    try:
        from fdd_kernels.backends.triton.gemm import multiply
    except ImportError:
        return _multiply
    return multiply


def _multiply(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool = False) -> None:
    if not out.is_cuda or not hasattr(torch.ops.aten.mm, "dtype_out"):
        product = a.to(out.dtype) @ b.to(out.dtype)
        out.add_(product) if accumulate else out.copy_(product)
    elif accumulate:
        torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, out=out)
    else:
        torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)


def _padded(columns: int) -> int:
    return -(-columns // 16) * 16


def probe(bench: Bench) -> dict:
    """The product into a padded view: no copy, no extra memory, float32 sums, the same bits
    twice.
    """
    card, multiply = bench.card, multiplier()
    if not card.dry and not hasattr(torch.ops.aten.mm, "dtype_out"):
        raise NotHere(
            "this torch has no mm.dtype_out: products of 16-bit operands cannot be written in "
            "float32"
        )
    shapes = card.size(
        {
            "plain": (1020, 32000, 2048),
            "odd": (1020, 50257, 768),
            "few tiles": (128, 768, 50176),
            "one row": (1, 32001, 96),
        },
        {"plain": (6, 35, 8), "one row": (1, 17, 8)},
    )
    for name, (m, n, k) in shapes.items():
        a = torch.randn(m, k, dtype=torch.bfloat16, device=card.device)
        b = torch.randn(n, k, dtype=torch.bfloat16, device=card.device)
        buffer = torch.full((m, _padded(n) + 16), float("nan"), device=card.device)
        out = buffer[:, :n]
        address = out.data_ptr()
        _, extra = card.peak(lambda a=a, b=b, out=out: multiply(out, a, b.t()))
        first = out.clone()
        multiply(out, a, b.t())
        truth = a[:64].double() @ b.double().t()
        relative = (first[:64].double() - truth).norm() / truth.norm()
        multiply(out, a, b.t(), accumulate=True)
        doubled = (out[:64].double() - 2 * truth).norm() / truth.norm()
        found = {
            "relative_error": float(relative),
            "accumulated_error": float(doubled),
            "extra_bytes": extra,
            "in_place": out.data_ptr() == address and bool(buffer[:, n:].isnan().all()),
            "repeatable": bool(
                torch.equal(first, first.clone().copy_(_again(multiply, out, a, b)))
            ),
        }
        bench.report(name, found)
        # float32 sums of n products: sqrt(k) u; 16-bit ones would be off by 1e-3.
        if not (relative < 1e-5 and doubled < 1e-5 and found["in_place"]):
            raise WrongNumbersError(f"the product {name} {(m, n, k)}: {found}")
        if extra > 4 * m * n / 2 and not card.dry:
            bench.report(
                f"{name}: warning",
                "the product allocates as much as its result: it is not written in place",
            )
    return {}


def _again(multiply: Callable[..., None], out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    multiply(out, a, b.t())
    return out


def alone(bench: Bench) -> dict:
    """TF/s of the four pairs' products at the sizes of a block: float32 and 16-bit output, padded
    or not, dH and dW.
    """
    card, multiply = bench.card, multiplier()
    for pair, both in PRODUCT_ROWS.items():
        shapes = bench.workload(pair) if card.dry else PAIRS[pair]
        v, student, teacher = shapes.columns, shapes.student_width, shapes.teacher_width
        for m in card.size(both, (4,)):
            hidden = {width: _random(bench, m, width) for width in (student, teacher)}
            heads = {width: _random(bench, v, width) for width in (student, teacher)}
            wide = torch.empty(m, _padded(v), dtype=torch.float32, device=card.device)
            narrow = torch.empty(m, v, dtype=torch.bfloat16, device=card.device)
            found = {}
            for width in (student, teacher):
                a, b = hidden[width], heads[width].t()
                _timed(
                    bench, found, f"logits {width}, f32 out", (m, v, width), 4, wide[:, :v], a, b
                )
                _timed(bench, found, f"logits {width}, bf16 out", (m, v, width), 2, narrow, a, b)
                if v % 8:
                    tight = wide.flatten()[: m * v].view(m, v)
                    _timed(
                        bench,
                        found,
                        f"logits {width}, f32 out, rows not padded",
                        (m, v, width),
                        4,
                        tight,
                        a,
                        b,
                    )
            slab = min(_padded(v), max(2048, SLAB_BYTES // (2 * m) // 2048 * 2048))
            gradient = _random(bench, m, slab)
            grad_hidden = torch.zeros(m, student, device=card.device)
            grad_head = torch.zeros(slab, student, device=card.device)
            head = _random(bench, slab, student)
            _timed(
                bench,
                found,
                "dH of a slab",
                (m, student, slab),
                4,
                grad_hidden,
                gradient,
                head,
                accumulate=True,
            )
            args = ((slab, student, m), 4, grad_head, gradient.t(), hidden[student])
            _timed(bench, found, "dW of a slab", *args)
            _timed(bench, found, "dW of a slab, added", *args, accumulate=True)
            bench.report(f"{pair} M={m}", found)
            del wide, narrow, hidden, heads, gradient
        card.free()
    return {"multiply": multiply.__module__}


def _random(bench: Bench, rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, dtype=torch.bfloat16, device=bench.card.device)


def _timed(
    bench: Bench,
    found: dict,
    name: str,
    shape: tuple[int, int, int],
    item: int,
    out: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    accumulate: bool = False,
) -> None:
    multiply, (m, n, k) = multiplier(), shape

    def run() -> None:
        if out.dtype == a.dtype:
            torch.mm(a, b, out=out)
        else:
            multiply(out, a, b, accumulate=accumulate)

    seconds = statistics.median(bench.card.seconds(run, repeats=7, warm_up=2, most=0.3))
    predicted = gemm(bench.model, m, n, k, out=item, accumulate=accumulate)
    found[name] = {
        "ms": seconds * 1e3,
        "tflops": 2 * m * n * k / seconds / 1e12,
        "predicted_ms": predicted * 1e3,
    }
