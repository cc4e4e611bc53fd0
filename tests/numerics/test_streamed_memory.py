"""The memory of the objectives that stream their matrices: the formulas of
`fdd_kernels/memory/streamed.py` beside the peak of allocations, at small sizes.
"""

from __future__ import annotations

import pytest
import torch

from fdd_kernels import (
    fused_attention_kd,
    fused_contrastive_kd,
    fused_relation_kd,
    fused_sinkhorn_kd,
    layer_costs,
)
from fdd_kernels.backends.torch_stream import blocks, tiling
from fdd_kernels.backends.torch_stream.pair_costs import GROUP_BYTES
from fdd_kernels.memory.streamed import (
    attention_memory,
    contrastive_memory,
    layer_costs_memory,
    sinkhorn_memory,
)
from tests.support.allocations import allocated_peak

# A formula adds up parts that are not all there at the peak.
LEAST = 0.75


def peak(function, *tensors: torch.Tensor, **options) -> int:
    """Measure the loss with its gradients."""
    leaves = [t for t in tensors if t.requires_grad]
    return allocated_peak(lambda: torch.autograd.grad(function(*tensors, **options), leaves))


def draw(*shape: int, grad: bool) -> torch.Tensor:
    return torch.randn(*shape).requires_grad_(grad)


def assert_predicted(measured: int, parts: dict[str, int]) -> None:
    predicted = sum(parts.values())
    assert LEAST * predicted <= measured <= predicted, (measured, parts)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of a MiB, so that no test takes many."""
    monkeypatch.setitem(blocks.BLOCK_BYTES, "cpu", 2**20)
    monkeypatch.setitem(blocks.CACHED_BYTES, "cpu", 2**20)


@pytest.mark.parametrize("loss", ["infonce", "kl", "margin_mse"])
@pytest.mark.parametrize(
    ("rows", "columns", "width", "teacher_width"), [(512, 2048, 24, 48), (1024, 1024, 96, 32)]
)
def test_contrastive(loss, rows, columns, width, teacher_width, small_blocks):
    a, b = draw(rows, width, grad=True), draw(columns, width, grad=True)
    teacher_width = 0 if loss == "infonce" else teacher_width
    sizes = (rows, columns) if teacher_width else ()
    teacher = [draw(n, teacher_width, grad=False) for n in sizes]
    measured = peak(fused_contrastive_kd, a, b, *teacher, loss=loss)
    parts = contrastive_memory(rows, columns, width, teacher_width, loss=loss)
    assert_predicted(measured, parts)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("positions", "widths"), [(64, (32, 16)), (512, (16, 32))])
def test_attention(causal, positions, widths, small_blocks):
    """A block is of several heads, or of some rows of one; masks take a quarter of a matrix."""
    shapes = [(1, 4, positions, width) for width in widths for _ in range(2)]
    tensors = [draw(*shape, grad=i < 2) for i, shape in enumerate(shapes)]
    measured = peak(fused_attention_kd, *tensors, causal=causal)
    assert_predicted(measured, attention_memory(1, 4, positions, *widths))


@pytest.mark.parametrize(("positions", "widths"), [(64, (32, 16)), (512, (16, 32))])
def test_relation(positions, widths, small_blocks):
    shapes = [(1, positions, 4 * width) for width in widths for _ in range(2)]
    tensors = [draw(*shape, grad=i < 2) for i, shape in enumerate(shapes)]
    measured = peak(fused_relation_kd, *tensors, relation_heads=4)
    assert_predicted(measured, attention_memory(1, 4, positions, *widths, as_heads=False))


@pytest.mark.parametrize(("rows", "columns", "iterations"), [(32, 4096, 20), (128, 256, 30)])
@pytest.mark.parametrize("budget", [2**18, 2**27])
def test_sinkhorn(rows, columns, iterations, budget, monkeypatch):
    """In many tiles of the vocabulary, or in one; the vocabulary's part or that of iterations."""
    monkeypatch.setitem(GROUP_BYTES, "cpu", budget)
    student = draw(rows, 8, grad=True), draw(columns, 8, grad=True)
    teacher = draw(rows, 8, grad=False), draw(columns, 8, grad=False)
    measured = peak(fused_sinkhorn_kd, *student, *teacher, iterations=iterations)
    assert_predicted(measured, sinkhorn_memory(rows, columns, 8, iterations=iterations))


@pytest.mark.parametrize("depths", [(2, 4), (3, 3)], ids=lambda d: "x".join(map(str, d)))
@pytest.mark.parametrize(("rows", "columns"), [(64, 2048), (256, 256)])
def test_layer_costs(depths, rows, columns, monkeypatch):
    monkeypatch.setitem(tiling.TILE_BYTES, "cpu", 2**22)
    widths = 16, 24
    models = []
    for width, layers, grad in zip(widths, depths, (True, False)):
        models.append([draw(rows, width, grad=grad) for _ in range(layers)])
        models.append(draw(columns, width, grad=grad))
    leaves = [*models[0], models[1]]

    def run():
        return torch.autograd.grad(layer_costs(*models, backend="torch").sum(), leaves)

    assert_predicted(allocated_peak(run), layer_costs_memory(rows, columns, *widths, *depths))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_memory_does_not_grow_with_the_matrices(device):
    """Twice the rows and columns, or positions, take at most twice as much."""
    few, many = (
        sum(contrastive_memory(n, n, 512, 768, loss="kl", device=device).values())
        for n in (2**16, 2**17)
    )
    assert many <= 2 * few
    few, many = (
        sum(attention_memory(1, 12, n, 64, 64, device=device).values()) for n in (2**14, 2**15)
    )
    assert many <= 2 * few
