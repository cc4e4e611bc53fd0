"""Every row of "Systems and their calls" in docs/objectives.md runs, forward and backward, and
gives the value and the gradients of the dense float64 formula in tests/support/systems.py.

Budget: u the unit roundoff of float64, 2^-53. No number goes through more than `OPERATIONS`
roundings (inner products over widths, sums over vocabulary, rows and candidates, iterations of
Sinkhorn). So the result is that of inputs moved by as much, and a movement of all inputs in random
directions shows how far results move; of `MOVEMENTS` of them the largest counts, twice, since both
sides round.
"""

from __future__ import annotations

import ast
import contextlib
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.support.systems import FORMULAS, UP_TO_A_CONSTANT

PAGE = Path(__file__).parents[2] / "docs" / "objectives.md"
SECTION = PAGE.read_text(encoding="utf-8").partition("\n## Systems and their calls\n")[2]
NAMES = re.search(r"^```python\n(.*?)^```$", SECTION, re.MULTILINE | re.DOTALL)[1]
OPERATIONS, MOVEMENTS = 512, 6
UNIT = 2.0**-53


def rows() -> dict[str, str]:
    """Return the code of each row of the tables by its first cell."""
    found = {}
    for line in SECTION.splitlines():
        if line.startswith("| ") and not line.startswith(("| system |", "| request |")):
            system, call, _ = line.strip("| ").split(" | ", 2)
            assert system not in found, f"two rows are called {system}"
            found[system] = joined(re.findall(r"`([^`]+)`", call))
    return found


def joined(lines: list[str]) -> str:
    """Join lines of code; one that begins with an operator continues the line before."""
    code = ""
    for line in lines:
        code += line if not code else f" {line}" if line[:2] in ("+ ", "- ") else f"\n{line}"
    return code


ROWS = rows()
# What a training computes is compared with formulas in tests/hf; here it runs.
TRAININGS = [system for system, code in ROWS.items() if "Distiller(" in code]
LOSSES = [system for system in ROWS if system not in TRAININGS]


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def called(code: str) -> tuple[torch.Tensor, dict]:
    """Run the code that defines the names, then that of a row, whose last expression is the loss.

    Returns the loss and the names.
    """
    torch.manual_seed(0)
    names = models() if "Distiller(" in code else {}
    exec(compile(NAMES, str(PAGE), "exec"), names)
    *lines, last = ast.parse(code).body
    assert isinstance(last, ast.Expr), f"the last line of {code!r} is no loss"
    exec(compile(ast.Module(lines, []), str(PAGE), "exec"), names)
    return eval(compile(ast.Expression(last.value), str(PAGE), "eval"), names), names


def models() -> dict:
    """Return a small student and teacher, and a batch."""
    pytest.importorskip("transformers")
    from tests.support.hf_models import tiny_batch, tiny_model

    student, teacher = (tiny_model("gpt2", depth=5, seed=seed) for seed in (1, 2))
    return {"student": student, "teacher": teacher, "batch": tiny_batch()}


def leaves(names: dict) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for name, tensor in names.items()
        if isinstance(tensor, torch.Tensor) and tensor.is_leaf and tensor.requires_grad
    }


def results(system: str, loss: torch.Tensor, of: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Return the value, 0 where it is known up to a constant, and the gradients."""
    gradients = torch.autograd.grad(
        loss, list(of.values()), materialize_grads=True, allow_unused=True
    )
    value = torch.zeros_like(loss) if system in UP_TO_A_CONSTANT else loss.detach()
    return [value, *gradients]


def test_every_row_has_a_formula():
    assert set(LOSSES) == set(FORMULAS)


@pytest.mark.parametrize("system", ROWS)
def test_a_row_runs_as_printed(system):
    loss, names = called(ROWS[system])
    assert loss.shape == ()
    loss.backward()
    tensors = list(leaves(names).values())
    if system in TRAININGS:
        tensors = list(names["student"].parameters())
    found = [tensor.grad for tensor in tensors if tensor.grad is not None]
    assert found
    assert all(grad.isfinite().all() and grad.any() for grad in found)


@pytest.mark.parametrize("system", LOSSES)
def test_a_row_gives_its_formula(system):
    with default_dtype(torch.float64):
        loss, names = called(ROWS[system])
        of, n = leaves(names), SimpleNamespace(**names)
        got = results(system, loss, of)
        true = results(system, FORMULAS[system](n), of)
        given = {
            name: (tensor, tensor.detach().clone())
            for name, tensor in names.items()
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point()
        }
        generator = torch.Generator().manual_seed(1)
        moved = [torch.zeros_like(t) for t in true]
        for _ in range(MOVEMENTS):
            for tensor, before in given.values():
                random = 2 * torch.rand(tensor.shape, generator=generator) - 1
                tensor.data.copy_(before * (1 + OPERATIONS * UNIT * random))
            found = results(system, FORMULAS[system](n), of)
            moved = [torch.maximum(m, (a - b).abs()) for m, a, b in zip(moved, found, true)]
    for what, a, b, movement in zip(("value", *of), got, true, moved):
        bound = 2 * float(movement.max()) + OPERATIONS * UNIT * float(b.abs().max())
        error = float((a - b).abs().max())
        assert error <= bound, f"{what}: error {error:.2e} is above {bound:.2e}"
