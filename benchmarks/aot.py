"""Compile every Triton kernel ahead of time, without a GPU, and report what the machine code takes.

    python -m benchmarks.aot --target cuda:80 cuda:90 cuda:100 hip:gfx942 --json aot.json [--quick]

What is compiled is what would be launched: the cases below go through the public options and the
backend's own launchers on tensors of the device "meta", which record every launch; kernels are then
specialised on dtypes, on integers that are 1 or divisible by 16, and on constexprs, as at run time.
The options that reach a constexpr are all enumerated; every other option (temperatures, soft caps,
scales, biases, labels, masks, numbers of layers) is a run-time value of the same code. Left out are
combinations of what is enumerated one at a time (both 16-bit types in one call, one width of the
two that 16 divides, heads at odd addresses): each mixes the loads of two kernels that are here.

`--quick` is what the tests and so CI compile: in bfloat16 every option at the default tile, every
one with two heads at the tile for few rows, and in float32 the most that a kernel is asked for. It
leaves out what compiles to the same code but for a type (float16), a part of it (no deltas; at few
rows a single head), or kernels of smaller tiles with registers to spare (pairs of dtypes, ragged
widths).

Each case is compiled for both kinds of kernels: the one-pass tiles, and the row kernels over cached
logits.

Exits with 1 if a kernel spills registers, asks for more shared memory than its target has,
multiplies 16-bit matrices without a tensor-core instruction, or, of the row kernels, reads full
tiles by less than 128 bits or takes more instructions than its variant may.
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
from fdd_kernels.backends.triton import gather_rows, gemm, operations
from fdd_kernels.backends.triton.cached import grad as cached_grad
from fdd_kernels.backends.triton.cached import merge as cached_merge
from fdd_kernels.backends.triton.cached import second_pass as cached_second_pass
from fdd_kernels.backends.triton.cached import stats as cached_stats
from fdd_kernels.backends.triton.launch import Launch, recorded
from fdd_kernels.backends.triton.one_pass import grad, second_pass, splits, stats
from fdd_kernels.backends.triton.one_pass import host as one_pass
from fdd_kernels.backends.triton.strategy import MOST_CACHE_BYTES, rows_of_cache
from fdd_kernels.lens.inputs import LensInputs
from fdd_kernels.objectives.fdd.options import LossOptions
from fdd_kernels.objectives.fdd.plan import make_plan

HEAVY = ("lens_stats_kernel", "divergence_stats_kernel", "lens_grad_kernel")
# Machine instructions an element pair of the row kernels' full tiles, as they stand in the code
# (every branch counted once): of the plain variant, and what a flag may add.
CEILINGS = {
    "cached_stats_kernel": {"": 65, "BIAS_S": 50, "CAP_S": 75, "LABELS": 10, "reverse_kl": 15},
    "cached_grad_kernel": {
        "": 85,
        "BIAS_S": 35,
        "CAP_S": 75,
        "LABELS": 10,
        "reverse_kl": 40,
        "jsd": 90,
        "skew_kl": 60,
    },
    "cached_second_pass_kernel": {"": 240, "BIAS_S": 10, "CAP_S": 75},
}


@dataclass(frozen=True)
class Hardware:
    """What bounds a kernel on a target: shared memory a program, and a multiprocessor's registers,
    memory and threads.
    """

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
    """One way through the public options: dtypes, rows, widths that do or do not divide, and the
    options themselves.
    """

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
    biases: bool = False  # which changes the row kernels alone


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
CAPPED = {
    "student_softcap": 30.0,
    "teacher_softcap": 30.0,
    "student_logit_scale": 0.5,
    "teacher_logit_scale": 0.5,
}
FEATURES = {"trajectory": "mse", "derivative": "mse", "output_kd_weight": 0.0}


def every_option(label: str = "", **inputs) -> Iterator[Case]:
    """Each way through the options for one kind of inputs."""
    for name, options in LENS.items():
        yield Case(name + label, options, **inputs)
    yield Case("features" + label, FEATURES, features=True, **inputs)


def row_variants(**inputs) -> Iterator[Case]:
    """Options that change a constexpr of the row kernels but nothing of the tiles."""
    yield Case("kl, biases and labels", {"ce_weight": 1.0}, biases=True, **inputs)
    yield Case("kl, soft caps and scales", CAPPED, **inputs)
    yield Case("kl, whole tiles", {}, columns=49152, **inputs)


def cases(quick: bool) -> Iterator[Case]:
    """The kinds of inputs that change a specialisation or a tile, each with every option; `quick`:
    see the top.
    """
    bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
    few, ragged = {"rows": 48}, {"student_width": 250, "teacher_width": 333}
    if quick:
        parts = ("no deltas", "labels alone, few rows", "features, few rows")
        chosen = [
            *every_option(),
            *every_option(", few rows", **few),
            Case("jsd", LENS["jsd"], f32, f32),
            *row_variants(),
        ]
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
    yield from row_variants()
    yield from row_variants(student=f32, teacher=f32)
    yield Case("one row, one layer", {}, rows=1, layers=1)


def launches(case: Case, architecture: str) -> list[Launch]:
    """What the operations would launch on an architecture for one case, by both kinds of
    kernels.
    """

    def new(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    students = [new(case.rows, case.student_width, dtype=case.student) for _ in range(case.layers)]
    teachers = [new(case.rows, case.teacher_width, dtype=case.teacher) for _ in range(case.layers)]
    columns = case.teacher_width if case.features else case.columns
    weight = new(columns, case.student_width, dtype=case.heads or case.student)
    teacher_weight = (
        None
        if case.features
        else new(columns, case.teacher_width, dtype=case.heads or case.teacher)
    )
    bias = new(columns, dtype=torch.float32) if case.biases else None
    labels = new(case.rows, dtype=torch.int64) if case.options.get("ce_weight") else None
    options = LossOptions(**case.options, backend="torch")
    with recorded():  # tensors that hold no numbers are refused elsewhere
        plan, *_ = make_plan(
            options, students, weight, teachers, teacher_weight, labels, bias, bias, None, None
        )
    chosen = [[states[i] for i in plan.layers] for states in (students, teachers)]
    inputs = LensInputs(chosen[0], weight, bias, chosen[1], teacher_weight, bias, None, labels)
    needed = [True] * (len(plan.layers) + 1) + [case.biases]
    named, precision = configurations.architecture_of, os.environ.get(configurations.F32_PRECISION)
    configurations.architecture_of = lambda device: architecture
    os.environ[configurations.F32_PRECISION] = case.precision

    def upstream_of(rows, shifts, requests, moments) -> tuple[torch.Tensor, ...]:
        return shifts, requests, moments, torch.empty_like(requests), torch.empty_like(moments)

    try:
        with recorded() as found:
            if not case.biases:  # a run-time value of these kernels
                one_pass.grad(
                    inputs, plan.spec, upstream_of(None, *one_pass.stats(inputs, plan.spec)), needed
                )
            shape = operations.shape_of(inputs, plan.spec, trains_head=True)
            rows = rows_of_cache(shape, MOST_CACHE_BYTES)
            operations.stats_and_grad(inputs, plan.spec, rows, upstream_of, needed, True)
    finally:
        configurations.architecture_of = named
        os.environ.pop(configurations.F32_PRECISION)
        if precision is not None:
            os.environ[configurations.F32_PRECISION] = precision
    return [launch for launch in found if launch.kernel is not gemm.multiply] + [
        product_launch(case)
    ]


def product_launch(case: Case) -> Launch:
    """The plain GEMM, which stands in where the vendor's cannot write float32."""
    half = torch.float16 if case.student == torch.float16 else torch.bfloat16
    a, b = (torch.empty(shape, dtype=half, device="meta") for shape in ((512, 768), (768, 4096)))
    with recorded() as found:
        gemm.launch_product(torch.empty((512, 4096), device="meta"), a, b, accumulate=False)
    return found[0]


@dataclass(frozen=True)
class Job:
    """One compilation: a kernel by name, with its types, constants and alignments, for one
    target.
    """

    target: str
    kernel: str
    case: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, object], ...]
    divisible: tuple[str, ...]
    options: tuple[tuple[str, int], ...]


POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
    torch.int32: "*i32",
}
KERNELS = {
    kernel.fn.__name__: kernel
    for kernel in (
        stats.lens_stats_kernel,
        second_pass.divergence_stats_kernel,
        grad.lens_grad_kernel,
        splits.merge_stats_kernel,
        splits.merge_divergence_kernel,
        cached_stats.cached_stats_kernel,
        cached_merge.cached_merge_kernel,
        cached_merge.merge_values_kernel,
        cached_second_pass.cached_second_pass_kernel,
        cached_grad.coefficients_kernel,
        cached_grad.cached_grad_kernel,
        gather_rows.move_rows_kernel,
        gemm.product_kernel,
    )
}


def job(target: str, case: Case, launch: Launch) -> Job:
    """How Triton would specialise a launch."""
    kernel = launch.kernel
    signature, constants, divisible = [], [], []
    for parameter in kernel.params:
        name, value = parameter.name, launch.arguments[parameter.name]
        if parameter.is_constexpr or (
            isinstance(value, int) and value == 1 and not parameter.do_not_specialize
        ):
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
        target,
        kernel.fn.__name__,
        name,
        tuple(signature),
        tuple(constants),
        tuple(divisible),
        tuple(launch.options.items()),
    )


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

    `tensor_core_instructions` are counted as they stand in the code, `exponentials_a_tile` in
    elements: what one pass over every branch takes, soft caps and the alternatives of a slot
    included, so the most that a tile can ask for. `occupancy`: resident threads over the most that
    a multiprocessor holds.
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
    instructions_an_element: float  # of the row kernels on NVIDIA's targets, else 0
    wide_loads: int  # of 128 bits, as they stand in the code
    problems: tuple[str, ...]


def compile_job(one: Job) -> Report:
    """Compile for the target and request the machine code's resources."""
    backend, arch = one.target.split(":")
    target = GPUTarget(
        backend, int(arch) if backend == "cuda" else arch, 32 if backend == "cuda" else 64
    )
    kernel = KERNELS[one.kernel]
    constants, options = dict(one.constants), dict(one.options)
    names = [name for name, _ in one.signature]
    source = ASTSource(
        fn=kernel,
        signature=dict(one.signature),
        constexprs=constants,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in one.divisible},
    )
    compiled = triton.compile(source, target=target, options=options)
    instructions = 0
    if backend == "cuda":
        assembly = compiled.asm["ptx"]
        registers, spilled = cuda_resources(compiled.asm["cubin"])
        instructions, wide = (
            cuda_instructions(compiled.asm["cubin"]) if one.kernel in CEILINGS else (0, 0)
        )
    else:
        assembly = compiled.asm["amdgcn"]
        registers, spilled = hip_resources(assembly)
        wide = len(re.findall(r"\b(?:global|buffer)_load_dwordx4\b", assembly))
    hardware = HARDWARE[one.target]
    shared = compiled.metadata.shared
    found = re.findall(TENSOR_CORE[backend], assembly)
    dots = sorted({shorten(instruction) for instruction in found})
    multiplied = (
        ("student_hidden",) if constants.get("IDENTITY") else ("student_hidden", "teacher_hidden")
    )
    types = [kind for name, kind in one.signature if name in multiplied]
    problems = []
    if spilled:
        problems.append(f"spills {spilled} bytes")
    if shared > hardware.shared_limit:
        problems.append(f"{shared} bytes of shared memory of {hardware.shared_limit}")
    if (
        (one.kernel in HEAVY and any(kind in ("*bf16", "*fp16") for kind in types))
        or one.kernel == "product_kernel"
    ) and not dots:
        problems.append("no tensor-core instruction")
    threads = options["num_warps"] * hardware.warp
    if one.kernel in HEAVY or one.kernel == "product_kernel":
        per_element = 0.0
    else:
        per_element = instructions * threads / constants.get("BLOCK_C", threads)
        problems += row_kernel_problems(
            one.kernel, constants, dict(one.signature), threads, per_element, wide
        )
    per_thread = -(-registers // 8) * 8
    reserved = shared + (KIB if backend == "cuda" else 0)
    programs = min(hardware.registers // max(1, per_thread * threads), hardware.threads // threads)
    programs = min(programs, hardware.shared_total // max(1, reserved), MOST_PROGRAMS)
    tile = "x".join(
        str(constants[name])
        for name in ("BLOCK_R", "BLOCK_C", "BLOCK_D", "BLOCK_E")
        if name in constants
    )
    return Report(
        target=one.target,
        kernel=one.kernel,
        case=one.case,
        tile=tile,
        num_warps=options["num_warps"],
        num_stages=options["num_stages"],
        registers=registers,
        spilled_bytes=spilled,
        shared_bytes=shared,
        tensor_core="+".join(dots) or "-",
        tensor_core_instructions=len(found),
        exponentials_a_tile=exponentials(compiled.asm["ttir"], constants),
        programs_a_multiprocessor=programs,
        occupancy=round(programs * threads / hardware.threads, 3),
        instructions_an_element=round(per_element, 1),
        wide_loads=wide,
        problems=tuple(problems),
    )


def row_kernel_problems(
    kernel: str, constants: dict, kinds: dict[str, str], threads: int, per_element: float, wide: int
) -> list[str]:
    """Full tiles that are read by less than 128 bits at a time, or take more instructions than
    their variant may.
    """
    if kernel not in CEILINGS or not constants["FULL"]:
        return []
    problems, parts = [], CEILINGS[kernel]
    flags = [name for name in ("BIAS_S", "CAP_S", "LABELS") if constants.get(name)]
    ceiling = sum(parts.get(flag, 0) for flag in ("", *flags, constants["DIVERGENCE"]))
    if per_element > ceiling:
        problems.append(f"{per_element:.1f} instructions an element pair, more than {ceiling}")
    # Rows of logits in float32, and a teacher's features where their rows allow it.
    models = 2 if constants.get("TEACHER", True) and kinds["logits_t"] == "*fp32" else 1
    fewest = models * constants["BLOCK_C"] // (4 * threads)
    if wide < fewest:
        problems.append(f"{wide} loads of 128 bits, fewer than {fewest}")
    return problems


def cuda_instructions(cubin: bytes) -> tuple[int, int]:
    """Machine instructions of a cubin, and its loads of 128 bits."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "-c", file.name], capture_output=True, text=True, check=True
        ).stdout
    lines = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*)$", text, flags=re.MULTILINE)
    instructions = [line for line in lines if not re.match(r"(?:@!?U?P\w+ )?NOP\b", line)]
    return len(instructions), sum(
        bool(re.search(r"\bLDG\b[\w.]*\.128\b", line)) for line in instructions
    )


def shorten(instruction: str) -> str:
    """The family of a tensor-core instruction: mma, wgmma, tcgen05 or mfma."""
    return "mfma" if instruction.startswith("v_mfma") else instruction.split(".")[0]


def exponentials(ttir: str, constants: dict) -> int:
    """Elements that the exponentials of Triton's own intermediate code take, those of a strip once
    for every strip.
    """
    strips = constants["BLOCK_C"] // constants["BLOCK_E"] if "BLOCK_E" in constants else 1
    shapes = re.findall(r"math\.exp2? .*tensor<([\dx]+)xf32>", ttir)
    return strips * sum(math.prod(map(int, shape.split("x"))) for shape in shapes)


def cuda_resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread and spilled bytes (local memory and stack) of a cubin."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def hip_resources(assembly: str) -> tuple[int, int]:
    """Vector registers a thread (accumulation registers included) and spilled bytes, from the code
    object's metadata.
    """

    def entry(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        return int(found.group(1)) if found else 0

    return entry("vgpr_count"), entry("private_segment_fixed_size") + 4 * entry("vgpr_spill_count")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--target",
        nargs="+",
        default=["cuda:80", "cuda:90", "cuda:100", "hip:gfx942"],
        choices=HARDWARE,
    )
    parser.add_argument("--json", type=Path, help="write the reports to this file")
    parser.add_argument(
        "--kernels", default="", help="only kernels whose name contains this, such as cached"
    )
    parser.add_argument("--quick", action="store_true", help="the subset that the tests compile")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    arguments = parser.parse_args()
    todo = [
        one for one in jobs(arguments.target, arguments.quick) if arguments.kernels in one.kernel
    ]
    reports = []
    columns = "{:10} {:20} {:34} {:15} {:>5} {:>4} {:>5} {:>7} {:>8} {:>5} {:>4}  {}"
    names = (
        "target",
        "kernel",
        "case",
        "tile",
        "warps",
        "regs",
        "spill",
        "shared",
        "exp/tile",
        "progs",
        "dots",
        "",
    )
    print(columns.format(*names))
    with ProcessPoolExecutor(arguments.processes) as pool:
        for report in pool.map(compile_job, todo):
            reports.append(report)
            r = report
            line = columns.format(
                r.target,
                r.kernel.removesuffix("_kernel"),
                r.case,
                r.tile,
                r.num_warps,
                r.registers,
                r.spilled_bytes,
                r.shared_bytes,
                r.exponentials_a_tile,
                r.programs_a_multiprocessor,
                r.tensor_core_instructions,
                r.tensor_core,
            )
            if r.instructions_an_element:
                line += (
                    f" {r.instructions_an_element} instructions an element, {r.wide_loads} "
                    "wide loads"
                )
            print(line, *r.problems, flush=True)
    if arguments.json:
        arguments.json.write_text(
            json.dumps([asdict(report) for report in reports], indent=1) + "\n"
        )
    wrong = [report for report in reports if report.problems]
    print(f"{len(reports)} compiled, {len(wrong)} with problems")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
