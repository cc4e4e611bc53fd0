"""Compile every Triton kernel ahead of time, without a GPU, and report what the machine code takes.

    python -m benchmarks.aot --target cuda:80 cuda:90 cuda:100 hip:gfx942 --json aot.json [--quick]

What is compiled is what would be launched: the cases below go through the public options and the backend's own launchers
on tensors of the device "meta", which record every launch; kernels are then specialised on dtypes, on integers that are 1
or divisible by 16, and on constexprs, as at run time. The options that reach a constexpr are all enumerated; every other
option (temperatures, soft caps, scales, biases, labels, masks, numbers of layers) is a run-time value of the same code.
Left out are combinations of what is enumerated one at a time (both 16-bit types in one call, one width of the two that 16
divides, heads at odd addresses): each mixes the loads of two kernels that are here.

`--quick` is what the tests and so CI compile: in bfloat16 every option at the default tile, every one with two heads at the
tile for few rows, and in float32 the most that a kernel is asked for. It leaves out what compiles to the same code but for a
type (float16), a part of it (no deltas; at few rows a single head), or kernels of smaller tiles with registers to spare
(pairs of dtypes, ragged widths).

Exits with 1 if a kernel spills registers, asks for more shared memory than its target has, or multiplies 16-bit
matrices without a tensor-core instruction.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fdd_kernels.backends.triton import config as configurations
from fdd_kernels.backends.triton import divergence, grad, merge, operations, rows, stats
from fdd_kernels.backends.triton.launch import Launch, recorded
from fdd_kernels.config import LossOptions
from fdd_kernels.plan import make_plan
from fdd_kernels.spec import LensInputs

HEAVY = ("lens_stats_kernel", "divergence_stats_kernel", "lens_grad_kernel")


@dataclass(frozen=True)
class Hardware:
    """What bounds a kernel on a target: shared memory a program, and a multiprocessor's registers, memory and threads."""

    shared_limit: int
    shared_total: int
    registers: int
    threads: int
    warp: int


KIB = 1024
HARDWARE = {
    "cuda:80": Hardware(163 * KIB, 164 * KIB, 65536, 2048, 32),
    "cuda:89": Hardware(99 * KIB, 100 * KIB, 65536, 1536, 32),
    "cuda:90": Hardware(227 * KIB, 228 * KIB, 65536, 2048, 32),
    "cuda:100": Hardware(227 * KIB, 228 * KIB, 65536, 2048, 32),
    "cuda:120": Hardware(99 * KIB, 100 * KIB, 65536, 1536, 32),
    "hip:gfx942": Hardware(64 * KIB, 64 * KIB, 4 * 512 * 64, 2048, 64),
    "hip:gfx950": Hardware(160 * KIB, 160 * KIB, 4 * 512 * 64, 2048, 64),
}
MOST_PROGRAMS = 32  # that a multiprocessor keeps, whatever they take
TENSOR_CORE = {"cuda": r"\b(tcgen05\.mma|wgmma\.mma_async|mma\.sync)\b", "hip": r"\bv_mfma_\w+"}


@dataclass(frozen=True)
class Case:
    """One way through the public options: dtypes, rows, widths that do or do not divide, and the options themselves."""

    name: str
    options: dict
    student: torch.dtype = torch.bfloat16
    teacher: torch.dtype = torch.bfloat16
    heads: torch.dtype | None = None  # of both weights, where not that of the hidden states
    precision: str = "ieee"
    features: bool = False
    rows: int = 4096
    student_width: int = 768
    teacher_width: int = 1600
    columns: int = 50257
    layers: int = 5


LENS = {
    "kl": {},
    "kl, no deltas": {"beta": 0.0},
    "reverse_kl": {"trajectory": "reverse_kl"},
    "reverse_kl, no deltas": {"trajectory": "reverse_kl", "beta": 0.0},
    "jsd": {"trajectory": "jsd"},
    "jsd, no deltas": {"trajectory": "jsd", "beta": 0.0},
    "skew_kl": {"trajectory": "skew_kl"},
    "skew_kl, no deltas": {"trajectory": "skew_kl", "beta": 0.0},
    "labels alone": {"alpha": 0.0, "beta": 0.0, "output_kd_weight": 0.0, "ce_weight": 1.0},
}
FEATURES = {"trajectory": "mse", "derivative": "mse", "output_kd_weight": 0.0}


def every_option(label: str = "", **inputs) -> Iterator[Case]:
    """Each way through the options for one kind of inputs."""
    for name, options in LENS.items():
        yield Case(name + label, options, **inputs)
    yield Case("features" + label, FEATURES, features=True, **inputs)


def cases(quick: bool) -> Iterator[Case]:
    """The kinds of inputs that change a specialisation or a tile, each with every option; `quick`: see the top."""
    bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
    few, ragged = {"rows": 48}, {"student_width": 250, "teacher_width": 333}
    if quick:
        parts = ("no deltas", "labels alone, few rows", "features, few rows")
        chosen = [*every_option(), *every_option(", few rows", **few), Case("jsd", LENS["jsd"], f32, f32)]
        yield from (case for case in chosen if not any(part in case.name for part in parts))
        return
    for student, teacher in ((bf16, bf16), (f16, f16), (f32, f32), (f32, bf16), (bf16, f32)):
        yield from every_option(student=student, teacher=teacher)
    yield from every_option(", few rows", **few)
    yield from every_option(", ragged", **ragged)
    yield from every_option(", ragged", student=f32, teacher=f32, **ragged)
    yield from every_option(", bf16 heads", student=f32, teacher=f32, heads=bf16)
    for precision in ("tf32x3", "tf32"):
        yield from every_option(f", {precision}", student=f32, teacher=f32, precision=precision)
    yield Case("one row, one layer", {}, rows=1, layers=1)


def launches(case: Case, architecture: str) -> list[Launch]:
    """What both operations would launch on an architecture for one case."""

    def new(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    students = [new(case.rows, case.student_width, dtype=case.student) for _ in range(case.layers)]
    teachers = [new(case.rows, case.teacher_width, dtype=case.teacher) for _ in range(case.layers)]
    columns = case.teacher_width if case.features else case.columns
    weight = new(columns, case.student_width, dtype=case.heads or case.student)
    teacher_weight = None if case.features else new(columns, case.teacher_width, dtype=case.heads or case.teacher)
    labels = new(case.rows, dtype=torch.int64) if case.options.get("ce_weight") else None
    plan, *_ = make_plan(
        LossOptions(**case.options, backend="torch"), students, weight, teachers, teacher_weight, labels, None, None, None, None
    )
    chosen = [[states[i] for i in plan.layers] for states in (students, teachers)]
    inputs = LensInputs(chosen[0], weight, None, chosen[1], teacher_weight, None, None, labels)
    named, precision = configurations.architecture_of, os.environ.get(configurations.F32_PRECISION)
    operations.architecture_of = lambda device, interpreting: architecture
    os.environ[configurations.F32_PRECISION] = case.precision
    try:
        with recorded() as found:
            pivots, reads, moments = operations.stats(inputs, plan.spec)
            per_row = (pivots, reads, moments, torch.empty_like(reads), torch.empty_like(moments))
            operations.grad(inputs, plan.spec, per_row, [True] * (len(plan.layers) + 1) + [False])
    finally:
        operations.architecture_of = named
        os.environ.pop(configurations.F32_PRECISION)
        if precision is not None:
            os.environ[configurations.F32_PRECISION] = precision
    return found


@dataclass(frozen=True)
class Job:
    """One compilation: a kernel by name, with its types, constants and alignments, for one target."""

    target: str
    kernel: str
    case: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, object], ...]
    divisible: tuple[str, ...]
    options: tuple[tuple[str, int], ...]


POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int64: "*i64", torch.int32: "*i32"}
KERNELS = {
    kernel.fn.__name__: kernel
    for kernel in (
        stats.lens_stats_kernel,
        divergence.divergence_stats_kernel,
        grad.lens_grad_kernel,
        merge.merge_stats_kernel,
        merge.merge_divergence_kernel,
        rows.move_rows_kernel,
    )
}


def job(target: str, case: Case, launch: Launch) -> Job:
    """How Triton would specialise a launch."""
    kernel = launch.kernel
    signature, constants, divisible = [], [], []
    for parameter in kernel.params:
        name, value = parameter.name, launch.arguments[parameter.name]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1 and not parameter.do_not_specialize):
            signature.append((name, "constexpr"))
            constants.append((name, value))
            continue
        if isinstance(value, torch.Tensor):
            kind, aligned = POINTERS[value.dtype], True
        elif isinstance(value, float):
            kind, aligned = "fp32", False
        else:
            kind = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = value % 16 == 0 and not parameter.do_not_specialize
        signature.append((name, kind))
        if aligned:
            divisible.append(name)
    name = f"{case.name}, {_short(case.student)}/{_short(case.teacher)}"
    return Job(
        target, kernel.fn.__name__, name, tuple(signature), tuple(constants), tuple(divisible),
        tuple(launch.options.items()),
    )  # fmt: skip


def _short(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}[dtype]


def jobs(targets: list[str], quick: bool) -> list[Job]:
    """Each compilation once, under the name of the first case that needs it."""
    found: dict[tuple, Job] = {}
    for target in targets:
        architecture = target.removeprefix("hip:").replace("cuda:", "sm_")
        precisions = configurations.f32_precisions(architecture)
        for case in (case for case in cases(quick) if case.precision in precisions):
            for launch in launches(case, architecture):
                one = job(target, case, launch)
                found.setdefault((one.target, one.kernel, *tuple(vars(one).values())[3:]), one)
    # The heaviest first, so that no process is left alone with one at the end.
    return sorted(found.values(), key=lambda one: one.kernel not in HEAVY)


@dataclass(frozen=True)
class Report:
    """What one compilation came to.

    `tensor_core_instructions` are counted as they stand in the code, `exponentials_a_tile` in elements: what one pass over
    every branch takes, soft caps and the alternatives of a slot included, so the most that a tile can ask for.
    `occupancy`: resident threads over the most that a multiprocessor holds.
    """

    target: str
    kernel: str
    case: str
    tile: str
    num_warps: int
    num_stages: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    tensor_core: str
    tensor_core_instructions: int
    exponentials_a_tile: int
    programs_a_multiprocessor: int
    occupancy: float
    problems: tuple[str, ...]


def compile_job(one: Job) -> Report:
    """Compile for the target and read the machine code's resources."""
    backend, arch = one.target.split(":")
    target = GPUTarget(backend, int(arch) if backend == "cuda" else arch, 32 if backend == "cuda" else 64)
    kernel = KERNELS[one.kernel]
    constants, options = dict(one.constants), dict(one.options)
    names = [name for name, _ in one.signature]
    source = ASTSource(
        fn=kernel, signature=dict(one.signature), constexprs=constants,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in one.divisible},
    )  # fmt: skip
    compiled = triton.compile(source, target=target, options=options)
    if backend == "cuda":
        assembly = compiled.asm["ptx"]
        registers, spilled = cuda_resources(compiled.asm["cubin"])
    else:
        assembly = compiled.asm["amdgcn"]
        registers, spilled = hip_resources(assembly)
    hardware = HARDWARE[one.target]
    shared = compiled.metadata.shared
    found = re.findall(TENSOR_CORE[backend], assembly)
    dots = sorted({shorten(instruction) for instruction in found})
    multiplied = ("student_hidden",) if constants.get("IDENTITY") else ("student_hidden", "teacher_hidden")
    types = [kind for name, kind in one.signature if name in multiplied]
    problems = []
    if spilled:
        problems.append(f"spills {spilled} bytes")
    if shared > hardware.shared_limit:
        problems.append(f"{shared} bytes of shared memory of {hardware.shared_limit}")
    if one.kernel in HEAVY and any(kind in ("*bf16", "*fp16") for kind in types) and not dots:
        problems.append("no tensor-core instruction")
    threads = options["num_warps"] * hardware.warp
    per_thread = -(-registers // 8) * 8
    reserved = shared + (KIB if backend == "cuda" else 0)
    programs = min(hardware.registers // max(1, per_thread * threads), hardware.threads // threads)
    programs = min(programs, hardware.shared_total // max(1, reserved), MOST_PROGRAMS)
    tile = "x".join(str(constants[name]) for name in ("BLOCK_R", "BLOCK_C", "BLOCK_D", "BLOCK_E") if name in constants)
    return Report(
        target=one.target, kernel=one.kernel, case=one.case, tile=tile, num_warps=options["num_warps"],
        num_stages=options["num_stages"],
        registers=registers, spilled_bytes=spilled, shared_bytes=shared, tensor_core="+".join(dots) or "-",
        tensor_core_instructions=len(found), exponentials_a_tile=exponentials(compiled.asm["ttir"], constants),
        programs_a_multiprocessor=programs, occupancy=round(programs * threads / hardware.threads, 3), problems=tuple(problems),
    )  # fmt: skip


def shorten(instruction: str) -> str:
    """The family of a tensor-core instruction: mma, wgmma, tcgen05 or mfma."""
    return "mfma" if instruction.startswith("v_mfma") else instruction.split(".")[0]


def exponentials(ttir: str, constants: dict) -> int:
    """Elements that the exponentials of Triton's own intermediate code take, those of a strip once for every strip."""
    strips = constants["BLOCK_C"] // constants["BLOCK_E"] if "BLOCK_E" in constants else 1
    shapes = re.findall(r"math\.exp2? .*tensor<([\dx]+)xf32>", ttir)
    return strips * sum(math.prod(map(int, shape.split("x"))) for shape in shapes)


def cuda_resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread and spilled bytes (local memory and stack) of a cubin."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def hip_resources(assembly: str) -> tuple[int, int]:
    """Vector registers a thread (accumulation registers included) and spilled bytes, from the code object's metadata."""

    def entry(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        return int(found.group(1)) if found else 0

    return entry("vgpr_count"), entry("private_segment_fixed_size") + 4 * entry("vgpr_spill_count")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", nargs="+", default=["cuda:80", "cuda:90", "cuda:100", "hip:gfx942"], choices=HARDWARE)
    parser.add_argument("--json", type=Path, help="write the reports to this file")
    parser.add_argument("--quick", action="store_true", help="the subset that the tests compile")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    arguments = parser.parse_args()
    todo = jobs(arguments.target, arguments.quick)
    reports = []
    columns = "{:10} {:18} {:34} {:15} {:>5} {:>4} {:>5} {:>7} {:>8} {:>5} {:>4}  {}"
    names = ("target", "kernel", "case", "tile", "warps", "regs", "spill", "shared", "exp/tile", "progs", "dots", "")
    print(columns.format(*names))
    with ProcessPoolExecutor(arguments.processes) as pool:
        for report in pool.map(compile_job, todo):
            reports.append(report)
            r = report
            line = columns.format(
                r.target, r.kernel.removesuffix("_kernel"), r.case, r.tile, r.num_warps, r.registers, r.spilled_bytes,
                r.shared_bytes, r.exponentials_a_tile, r.programs_a_multiprocessor, r.tensor_core_instructions,
                r.tensor_core,
            )  # fmt: skip
            print(line, *r.problems, flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(report) for report in reports], indent=1) + "\n")
    wrong = [report for report in reports if report.problems]
    print(f"{len(reports)} compiled, {len(wrong)} with problems")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
