"""Count the traffic and launches of the default strategy, without a GPU: GEMMs, bytes an element,
scratch, kernels a block.

    python -m benchmarks traffic [--json FILE]

The launches of a whole loss with its gradients are recorded (`benchmarks.recorded`), per-row
mathematics included. An element is one row, layer and token of the vocabulary. Heads and hidden
states, which every block reads once a GEMM, are not counted among its bytes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.gpu_model import PAIRS, Call

# Operators that launch nothing: views, and allocations that nobody writes.
_FREE = """
alias as_strided detach empty empty_like empty_strided expand lift_fresh new_empty permute
promote_types resolve_conj select slice split split_with_sizes squeeze t transpose unbind unsqueeze
view _reshape_alias _unsafe_view
"""
FREE = frozenset(_FREE.split())
ROWS = (4096, 16384)


class Watch(TorchDispatchMode):
    """Counts the operators that launch a kernel, and the bytes that are in use at a time.

    `launched()` is called before each operator: it counts the launches recorded since, and says
    whether there were any. `within` are the operators between the first launch and the last: the
    others are once a call, not once a block.
    """

    def __init__(self, launched: Callable[[], bool]) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()
        self.peak = self.within = 0
        self._launched = launched
        self._before: int | None = None
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.look()
        out = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name not in FREE:
            self.operators[name] += 1
        given = {storage_key(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and storage_key(tensor) not in given:
                storage = tensor.untyped_storage()
                self._alive[storage_key(tensor)] = StorageWeakRef(storage), storage.nbytes()
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return out

    def look(self) -> None:
        """Take notice of the launches since the last operator."""
        if self._launched():
            so_far = self.operators.total()
            self._before = so_far if self._before is None else self._before
            self.within = so_far - self._before


def storage_key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@dataclass
class Traffic:
    """The counts of one call. `moved`: bytes of elements by mover; `columns`: how much of the
    vocabulary the GEMMs of a kind covered.
    """

    call: Call
    block_rows: int = 0
    gradient_bytes: int = 0
    watch: Watch | None = None
    gemms: Counter = field(default_factory=Counter)
    columns: Counter = field(default_factory=Counter)
    moved: Counter = field(default_factory=Counter)
    launches: Counter = field(default_factory=Counter)

    def add(self, launches: list[Any]) -> bool:
        """Count recorded launches, and forget them; whether there were any."""
        any_launched = bool(launches)
        for launch in launches:
            if "accumulate" in launch.arguments:
                self._add_gemm(*(launch.arguments[name] for name in ("out", "a", "b")))
            else:
                self._add_kernel(launch.kernel.fn.__name__, launch.grid, launch.arguments)
        launches.clear()
        return any_launched

    def _add_gemm(self, out: Tensor, a: Tensor, b: Tensor) -> None:
        """Count one (m, k) x (k, n) GEMM: logits write a block's elements, dH and dW read their
        gradient.
        """
        inner, n = b.shape
        kinds = {self.call.student: "student logits", self.call.teacher: "teacher logits"}
        if n == self.call.student:
            kind, columns, moved = ("dH", inner, a) if a.stride(1) == 1 else ("dW", a.shape[0], a)
        else:
            kind, columns, moved = kinds[inner], n, out
        self.gemms[kind] += 1
        self.columns[kind] += columns
        self.moved[kind] += moved.nbytes

    def _add_kernel(self, name: str, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        """Count one kernel. Kernels over logits read both models' and write the gradient's; every
        kernel moves its state.
        """
        self.launches[name] += 1
        if "logits_s" not in arguments:  # a merge reads the state of all tiles of its block
            states = (arguments[state] for state in ("state", "sums") if state in arguments)
            self.moved[f"{name}, state"] += sum(state.nbytes for state in states)
            return
        elements = elements_of(grid, arguments)
        self.moved[f"{name}, read"] += 8 * elements
        for written in ("grad", "values", "state", "sums"):
            tensor = arguments.get(written)
            if tensor is None or (written == "values" and not arguments["VALUES"]):
                continue
            if written == "grad":
                self.moved[f"{name}, written"] += elements * tensor.element_size()
            else:  # one number of each field for a row and tile
                fields = tensor.numel() // (tensor.shape[-1] * tensor.shape[-2])
                self.moved[f"{name}, state"] += fields * grid[0] * grid[1] * tensor.element_size()


def elements_of(grid: tuple[int, ...], arguments: dict[str, Any]) -> int:
    """Count rows x layers x tokens of the vocabulary that a launch of a kernel over logits
    visits.
    """
    block, first = arguments["BLOCK_C"], arguments["first_tile"]
    columns = min(arguments["columns"], (first + grid[1]) * block) - first * block
    return grid[0] * columns * arguments["layers"]


def recorded_call(call: Call) -> Traffic:
    """Count one loss with its gradients."""
    from benchmarks.recorded import record_loss

    def new(*shape: int, trained: bool = False) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=trained)

    traffic = Traffic(call)

    def counted(entry, launches):
        def stats_and_grad(inputs, spec, block_rows, *rest):
            traffic.block_rows = block_rows
            traffic.watch = Watch(lambda: traffic.add(launches))
            with traffic.watch:
                found = entry.stats_and_grad(inputs, spec, block_rows, *rest)
            traffic.watch.look()
            traffic.gradient_bytes = sum(gradient.nbytes for gradient in found[0])
            return found

        return {"stats_and_grad": stats_and_grad}

    layers = range(call.layers)
    problem = {
        "student_hidden": [new(call.rows, call.student, trained=True) for _ in layers],
        "student_weight": new(call.columns, call.student, trained=call.trained),
        "teacher_hidden": [new(call.rows, call.teacher) for _ in layers],
        "teacher_weight": new(call.columns, call.teacher),
    }
    record_loss(problem, call.pair.loss_options, counted)
    return traffic


def count(pair: str, rows: int, *, trained: bool) -> dict[str, Any]:
    """Count one call of the default strategy."""
    call = Call(PAIRS[pair], rows, trained=trained)
    traffic = recorded_call(call)
    watch, blocks = traffic.watch, -(-rows // traffic.block_rows)
    state = sum(moved for name, moved in traffic.moved.items() if name.endswith("state"))
    kernels = traffic.launches.total() + traffic.gemms.total() + watch.within
    heads = [traffic.gemms[f"{model} logits"] / blocks for model in ("student", "teacher")]
    covered = {kind: columns / (blocks * call.columns) for kind, columns in traffic.columns.items()}
    moved = {name: moved / call.elements for name, moved in traffic.moved.items()}
    return {
        "pair": pair,
        "rows": rows,
        "head": "trained" if trained else "frozen",
        "blocks": blocks,
        "block_rows": traffic.block_rows,
        "gemms_per_head_and_block": max(heads),
        "covered": covered,
        "bytes_per_element": (sum(traffic.moved.values()) - state) / call.elements,
        "state_bytes_per_element": state / call.elements,
        "peak_scratch_bytes": watch.peak - traffic.gradient_bytes,
        "kernels_per_block": kernels / blocks,
        "gemms": dict(traffic.gemms),
        "launches": dict(traffic.launches),
        "operators": dict(watch.operators.most_common()),
        "moved_bytes_per_element": moved,
    }


# Heading: key and format.
COLUMNS = {
    "pair": ("pair", ""),
    "rows": ("rows", ""),
    "head": ("head", ""),
    "blocks": ("blocks", ""),
    "GEMMs a head and block": ("gemms_per_head_and_block", "g"),
    "bytes an element": ("bytes_per_element", ".2f"),
    "state": ("state_bytes_per_element", ".2f"),
    "scratch bytes": ("peak_scratch_bytes", ".3g"),
    "kernels a block": ("kernels_per_block", ".1f"),
}


def run(path: Path | None) -> int:
    """Print the counts of every pair, and write them to `path`."""
    import pandas as pd

    calls = [(p, rows, t) for p in PAIRS for rows in ROWS for t in (True, False)]
    found = [count(pair, rows, trained=trained) for pair, rows, trained in calls]
    cells = [{h: format(e[key], f) for h, (key, f) in COLUMNS.items()} for e in found]
    print(pd.DataFrame(cells).to_string(index=False))
    print("counted on recorded launches; nothing is measured")
    if path is not None:
        path.write_text(json.dumps(found, indent=1) + "\n")
    return 0
