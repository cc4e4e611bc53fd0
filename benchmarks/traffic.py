"""What the default strategy moves and launches, counted without a GPU: GEMMs, bytes an element,
scratch, kernels a block.

    python -m benchmarks traffic [--json FILE]

The launches of a whole loss with its gradients are recorded on tensors without memory ("meta"),
per-row mathematics included; nothing runs. An element is one row, layer and token of the
vocabulary; heads and hidden states, which every block reads once a GEMM, are not counted among its
bytes.
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

# Operators that launch nothing: views, and memory that nobody writes.
FREE = (
    "alias",
    "as_strided",
    "detach",
    "empty",
    "empty_like",
    "empty_strided",
    "expand",
    "lift_fresh",
    "new_empty",
    "permute",
    "promote_types",
    "resolve_conj",
    "select",
    "slice",
    "split",
    "split_with_sizes",
    "squeeze",
    "t",
    "transpose",
    "unbind",
    "unsqueeze",
    "view",
    "_reshape_alias",
    "_unsafe_view",
)
ROWS = (4096, 16384)


class Watch(TorchDispatchMode):
    """Counts the operators that launch a kernel, and the bytes that are in use at a time.

    `launched()` is called before each operator: it lets go of the launches recorded since, and says
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
        """Take notice of what was launched since the last operator."""
        if self._launched():
            so_far = self.operators.total()
            self._before = so_far if self._before is None else self._before
            self.within = so_far - self._before


def storage_key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@dataclass
class Traffic:
    """The counts of one call. `moved`: bytes of elements by who moves them; `columns`: columns that
    GEMMs of a kind covered.
    """

    call: Call
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
        """One (m, k) x (k, n) product: logits write a block's elements, dH and dW read their
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
        self.moved[kind] += moved.numel() * moved.element_size()

    def _add_kernel(self, name: str, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        """One kernel: those over logits read both models' and write the gradient's; every kernel
        moves its state.
        """
        self.launches[name] += 1
        if "logits_s" not in arguments:
            # A merge reads what the tiles of its block have written.
            self.moved[f"{name}, state"] += sum(
                arguments[state].numel() * arguments[state].element_size()
                for state in ("state", "sums")
                if state in arguments
            )
            return
        block, first = arguments["BLOCK_C"], arguments["first_tile"]
        columns = min(arguments["columns"], (first + grid[1]) * block) - first * block
        elements = grid[0] * columns * arguments["layers"]
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


def count(pair: str, rows: int, *, trained: bool) -> dict[str, Any]:
    """The counts of one call of the default strategy; see `main`."""
    traffic = Traffic(call := Call(PAIRS[pair], rows, trained=trained))
    watch, outputs, block_rows = recorded_call(call, traffic)
    blocks = -(-rows // block_rows)
    state = sum(moved for name, moved in traffic.moved.items() if name.endswith("state"))
    kernels = traffic.launches.total() + traffic.gemms.total() + watch.within
    heads = [traffic.gemms[f"{model} logits"] / blocks for model in ("student", "teacher")]
    covered = {kind: columns / (blocks * call.columns) for kind, columns in traffic.columns.items()}
    return {
        "pair": pair,
        "rows": rows,
        "head": "trained" if trained else "frozen",
        "blocks": blocks,
        "block_rows": block_rows,
        "gemms_per_head_and_block": max(heads),
        "covered": covered,
        "bytes_per_element": (sum(traffic.moved.values()) - state) / call.elements,
        "state_bytes_per_element": state / call.elements,
        "peak_scratch_bytes": watch.peak - outputs,
        "kernels_per_block": kernels / blocks,
        "gemms": dict(traffic.gemms),
        "launches": dict(traffic.launches),
        "operators": dict(watch.operators.most_common()),
        "moved_bytes_per_element": {
            name: moved / call.elements for name, moved in traffic.moved.items()
        },
    }


def recorded_call(call: Call, traffic: Traffic) -> tuple[Watch, int, int]:
    """Count one loss with its gradients into `traffic`; what was watched, bytes of the gradients,
    and rows a block.
    """
    from fdd_kernels.backends.triton import operations
    from fdd_kernels.backends.triton.launch import recorded
    from fdd_kernels.lens.inputs import LensInputs
    from fdd_kernels.objectives.fdd.options import LossOptions
    from fdd_kernels.objectives.fdd.plan import make_plan
    from fdd_kernels.objectives.fdd.terms import term_weights, upstream_gradients

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    students, teachers = (
        [new(call.rows, width) for _ in range(call.layers)]
        for width in (call.student, call.teacher)
    )
    heads = new(call.columns, call.student), new(call.columns, call.teacher)
    # a plan for "triton" asks for a GPU
    options = LossOptions(**call.pair.loss_options, backend="torch")
    with recorded():  # tensors that hold no numbers are refused elsewhere
        plan, *_ = make_plan(
            options, students, heads[0], teachers, heads[1], None, None, None, None, None
        )
    inputs = LensInputs(students, heads[0], None, teachers, heads[1], None, None, None)
    needed = [True] * call.layers + [call.trained, False]
    block_rows = operations.cached_rows(inputs, plan.spec, needed)
    weights = term_weights(plan, call.rows, (1.0, None, None, None, None), torch.float32)

    def upstream_of(_rows: Tensor, *statistics: Tensor) -> tuple[Tensor, ...]:
        return *statistics, *upstream_gradients(plan, *statistics, None, weights)

    with recorded() as launches:
        with Watch(lambda: traffic.add(launches)) as watch:
            found, _ = operations.stats_and_grad(
                inputs, plan.spec, block_rows, upstream_of, needed, True
            )
        watch.look()
    return watch, sum(g.numel() * g.element_size() for g in found), block_rows


def table() -> list[dict[str, Any]]:
    """Every pair, number of rows, and head trained or frozen."""
    return [
        count(pair, rows, trained=trained)
        for pair in PAIRS
        for rows in ROWS
        for trained in (True, False)
    ]


def run(path: Path | None) -> int:
    """Print the counts, and write them to `path`."""
    found = table()
    print(
        f"{'pair':8}{'rows':>7} "
        f"{'head':8}{'blocks':>7}{'GEMMs a head and block':>24}{'bytes an element':>18}{'state':>7}"
        f"{'scratch GiB':>13}{'kernels a block':>17}"
    )
    for e in found:
        print(
            f"{e['pair']:8}{e['rows']:7} "
            f"{e['head']:8}{e['blocks']:7}{e['gemms_per_head_and_block']:24g}"
            f"{e['bytes_per_element']:18.2f}{e['state_bytes_per_element']:7.2f}"
            f"{e['peak_scratch_bytes'] / 2**30:13.2f}"
            f"{e['kernels_per_block']:17.1f}"
        )
    print("counted on recorded launches; nothing is measured")
    if path is not None:
        path.write_text(json.dumps(found, indent=1) + "\n")
    return 0
