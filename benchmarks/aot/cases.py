"""The cases that are compiled ahead of time, and the launches and compilations of each.

Each case calls the public loss on recorded tensors (`benchmarks.recorded`), by the one-pass kernels
and by the row kernels over cached logits. A launch is specialised as at run time: on dtypes, on
integers that are 1 or divisible by 16, and on constexprs. All options that reach a constexpr are
enumerated; every other option (temperatures, soft caps, scales, labels, masks, numbers of layers)
is a run-time value of the same code. Combinations of options enumerated one at a time are left out
(both 16-bit types in one call, one width of the two that 16 divides, heads at odd addresses): each
mixes the loads of two kernels that are here.

The quick subset has, in bfloat16, every option at the default tile and options with two heads at
the tile for few rows, and in float32 the largest kernel. It leaves out code that differs only by a
type (float16), is part of other code (no deltas; a single head at few rows), or is of smaller tiles
with registers to spare (pairs of dtypes, ragged widths).

It covers options, tiles and targets by pairs: every option with each of TARGETS, every option with
each tile, every tile with each target. At few rows a target has every fourth option. A target that
is not of TARGETS, and shares the compiler of one that is, has every second option at all.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from typing import Any
from unittest import mock

import torch

from benchmarks.recorded import STRATEGY, environment, record_loss
from fdd_kernels.backends import Backend
from fdd_kernels.backends.triton import config, gemm
from fdd_kernels.backends.triton.launch import Launch, recorded
from fdd_kernels.lens.divergences import DIVERGENCES

TARGETS = ["cuda:80", "cuda:90", "cuda:100", "hip:gfx942"]
# The first of the options of which the quick subset has every fourth one; of every second one, the
# first is its parity.
FIRSTS = {"cuda:80": 0, "cuda:90": 1, "cuda:100": 2, "hip:gfx942": 3}
FIRSTS |= {"cuda:89": 1, "cuda:120": 0, "hip:gfx950": 2}
HEAVY = ("lens_stats_kernel", "divergence_stats_kernel", "lens_grad_kernel")
MOST_ROWS = 768  # rows a block where the backend would not cache logits (float16 gradients)


@dataclass(frozen=True)
class Case:
    """One set of public options with the dtypes and widths of a call. `heads`: the dtype of both
    weights, if not that of the hidden states.
    """

    name: str
    options: dict
    student: torch.dtype = torch.bfloat16
    teacher: torch.dtype = torch.bfloat16
    heads: torch.dtype | None = None
    precision: str = "ieee"
    features: bool = False
    rows: int = 4096
    student_width: int = 768
    teacher_width: int = 1600
    columns: int = 50257
    layers: int = 5
    biases: bool = False  # constexprs of the row kernels only


LENS = {name: {"trajectory": name} for name in DIVERGENCES}
LENS |= {f"{name}, no deltas": {"trajectory": name, "beta": 0.0} for name in DIVERGENCES}
OFF = {"alpha": 0.0, "beta": 0.0, "output_kd_weight": 0.0}
LENS["labels alone"] = OFF | {"ce_weight": 1.0}
CAPPED = {f"{model}_softcap": 30.0 for model in ("student", "teacher")}
CAPPED |= {f"{model}_logit_scale": 0.5 for model in ("student", "teacher")}
LENS["weighted moments"] = {"derivative": "weighted_cosine"}
LENS["mixed teacher"] = {"teacher_mix": 0.5}
FEATURES = {"trajectory": "mse", "derivative": "mse", "output_kd_weight": 0.0}


def every_option(label: str = "", **inputs: Any) -> Iterator[Case]:
    """List each way through the options for one kind of inputs."""
    for name, options in LENS.items():
        yield Case(name + label, options, **inputs)
    yield Case("features" + label, FEATURES, features=True, **inputs)


def row_variants(**inputs: Any) -> Iterator[Case]:
    """List options that change a constexpr of the row kernels but nothing of the tiles."""
    yield Case("kl, biases and labels", {"ce_weight": 1.0}, biases=True, **inputs)
    yield Case("kl, soft caps and scales", CAPPED, **inputs)
    yield Case("kl, whole tiles", {}, columns=49152, **inputs)


def cases(quick: bool, target: str = TARGETS[0]) -> Iterator[Case]:
    """List inputs that change a specialisation or a tile, with every option; `quick`: the subset
    of a target.
    """
    bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
    few, ragged = {"rows": 48}, {"student_width": 250, "teacher_width": 333}
    floats = {"student": f32, "teacher": f32}
    if quick:
        left_out = ("no deltas", "labels alone, few rows", "features, few rows")
        many, some = (
            [c for c in found if not any(part in c.name for part in left_out)]
            for found in (every_option(), every_option(", few rows", **few))
        )
        first = FIRSTS[target]
        yield from many if target in TARGETS else many[first % 2 :: 2]
        yield from some[first::4]
        yield Case("jsd", LENS["jsd"], **floats)
        yield from row_variants()
        return
    for student, teacher in ((bf16, bf16), (f16, f16), (f32, f32), (f32, bf16), (bf16, f32)):
        yield from every_option(student=student, teacher=teacher)
    yield from every_option(", few rows", **few)
    yield from every_option(", ragged", **ragged)
    yield from every_option(", ragged", **floats, **ragged)
    yield from every_option(", bf16 heads", **floats, heads=bf16)
    for precision in ("tf32x3", "tf32"):
        yield from every_option(f", {precision}", **floats, precision=precision)
    yield from row_variants()
    yield from row_variants(**floats)
    yield Case("one row, one layer", {}, rows=1, layers=1)


def _problem(case: Case) -> dict[str, Any]:
    """Make arguments of the public loss on the device "meta"."""

    def new(*shape: int, dtype: torch.dtype, trained: bool = False) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta", requires_grad=trained)

    def states(width: int, dtype: torch.dtype, trained: bool) -> list[torch.Tensor]:
        return [new(case.rows, width, dtype=dtype, trained=trained) for _ in range(case.layers)]

    columns = case.teacher_width if case.features else case.columns
    heads = case.heads or case.student, case.heads or case.teacher
    problem = {
        "student_hidden": states(case.student_width, case.student, True),
        "student_weight": new(columns, case.student_width, dtype=heads[0], trained=True),
        "teacher_hidden": states(case.teacher_width, case.teacher, False),
        "teacher_weight": None,
    }
    if not case.features:
        problem["teacher_weight"] = new(columns, case.teacher_width, dtype=heads[1])
    if case.options.get("ce_weight"):
        problem["labels"] = new(case.rows, dtype=torch.int64)
    if case.biases:
        problem["student_bias"] = new(columns, dtype=torch.float32, trained=True)
        problem["teacher_bias"] = new(columns, dtype=torch.float32)
    return problem


def launches(case: Case, architecture: str) -> list[Launch]:
    """Record the launches of one case on an architecture, by both kinds of kernels."""

    def by_both(entry: Backend, _: list[Launch]) -> dict[str, Callable]:
        def cached_rows(inputs, spec, needed):
            return entry.cached_rows(inputs, spec, needed) or min(inputs.rows, MOST_ROWS)

        def stats_and_grad(inputs, spec, rows, upstream_of, needed, refine):
            inputs = inputs._replace(valid=None)  # nobody can count rows that hold no numbers
            if not case.biases:  # a run-time value of the one-pass kernels
                with environment({STRATEGY: "one_pass"}):
                    statistics = entry.stats(inputs, spec)
                    upstream = [torch.empty_like(t) for t in statistics[1:]]
                    entry.grad(inputs, spec, (*statistics, *upstream), needed)
            return entry.stats_and_grad(inputs, spec, rows, upstream_of, needed, refine)

        return {"cached_rows": cached_rows, "stats_and_grad": stats_and_grad}

    with (
        mock.patch.object(config, "architecture_of", return_value=architecture),
        environment({config.F32_PRECISION: case.precision}),
    ):
        found = record_loss(_problem(case), case.options, by_both)
    return [launch for launch in found if launch.kernel is not gemm.multiply] + [plain_gemm(case)]


def plain_gemm(case: Case) -> Launch:
    """Record the plain GEMM, which stands in where the vendor's cannot write float32."""
    half = torch.float16 if case.student == torch.float16 else torch.bfloat16
    a, b = (torch.empty(shape, dtype=half, device="meta") for shape in ((512, 768), (768, 4096)))
    with recorded() as found:
        gemm.launch_product(torch.empty((512, 4096), device="meta"), a, b, accumulate=False)
    return found[0]


@dataclass(frozen=True)
class Job:
    """One compilation for one target: a kernel by its module and name, types, constants,
    alignments.
    """

    target: str
    kernel: str
    case: str
    module: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, object], ...]
    divisible: tuple[str, ...]
    options: tuple[tuple[str, int], ...]

    @property
    def function(self) -> Any:
        """Look up the Triton kernel."""
        return getattr(sys.modules[self.module], self.kernel)


TYPES = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32", "int64": "*i64"}
TYPES["int32"] = "*i32"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def job(target: str, case: Case, launch: Launch) -> Job:
    """Describe the compilation of a launch by Triton's own rules of specialisation."""
    signature, constants, divisible = [], [], []
    for parameter in launch.kernel.params:
        name, value = parameter.name, launch.arguments[parameter.name]
        special, integer = not parameter.do_not_specialize, isinstance(value, int)
        if parameter.is_constexpr or (integer and value == 1 and special):
            signature.append((name, "constexpr"))
            constants.append((name, value))
            continue
        if isinstance(value, torch.Tensor):
            kind, aligned = TYPES[_name(value.dtype)], True
        elif isinstance(value, float):
            kind, aligned = "fp32", False
        else:
            kind = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = value % 16 == 0 and special
        signature.append((name, kind))
        divisible += [name] if aligned else []
    short = (
        _name(dtype).replace("bfloat", "bf").replace("float", "f")
        for dtype in (case.student, case.teacher)
    )
    named = f"{case.name}, {'/'.join(short)}"
    function, lists = launch.kernel.fn, (tuple(signature), tuple(constants), tuple(divisible))
    options = tuple(launch.options.items())
    return Job(target, function.__name__, named, function.__module__, *lists, options)


def jobs(targets: list[str], quick: bool) -> list[Job]:
    """List each compilation once, under the name of the first case that needs it."""
    found: dict[tuple, Job] = {}
    for target in targets:
        architecture = target.removeprefix("hip:").replace("cuda:", "sm_")
        precisions = config.f32_precisions(architecture)
        for case in (c for c in cases(quick, target) if c.precision in precisions):
            for launch in launches(case, architecture):
                one = job(target, case, launch)
                found.setdefault((one.target, one.kernel, *astuple(one)[3:]), one)
    # The heaviest first, so that no process is left alone with one at the end.
    return sorted(found.values(), key=lambda one: one.kernel not in HEAVY)
