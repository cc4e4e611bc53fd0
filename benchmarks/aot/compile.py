"""Compile one launch for one target, and find problems in the machine code.

Problems: a kernel spills registers, asks for more shared memory than its target has, or multiplies
16-bit matrices without a tensor-core instruction; a row kernel reads full tiles by less than 128
bits or takes more instructions than its variant may.
"""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.aot.cases import HEAVY, Job

KIB = 1024
# Machine instructions an element pair of the row kernels' full tiles, every branch counted once: of
# the plain variant, and of each flag on top.
CEILINGS = {
    "cached_stats_kernel": {"": 65, "BIAS_S": 50, "CAP_S": 75, "LABELS": 10, "reverse_kl": 15}
    | {"WEIGHTED": 75, "MIXED": 25},
    "cached_grad_kernel": {"": 85, "BIAS_S": 35, "CAP_S": 75, "LABELS": 10}
    | {"reverse_kl": 40, "jsd": 90, "skew_kl": 60}
    | {"skew_reverse_kl": 110, "tv": 10, "alpha_beta": 50, "WEIGHTED": 25, "MIXED": 10},
    "cached_second_pass_kernel": {"": 240, "BIAS_S": 10, "CAP_S": 75},
}


@dataclass(frozen=True)
class Hardware:
    """Limits of a target: shared memory a program and a multiprocessor (KiB), registers and threads
    a multiprocessor, threads a warp.
    """

    shared_limit: int
    shared_total: int
    registers: int = 65536
    threads: int = 2048
    warp: int = 32


HARDWARE = {
    "cuda:80": Hardware(163 * KIB, 164 * KIB),
    "cuda:89": Hardware(99 * KIB, 100 * KIB, threads=1536),
    "cuda:90": Hardware(227 * KIB, 228 * KIB),
    "cuda:100": Hardware(227 * KIB, 228 * KIB),
    "cuda:120": Hardware(99 * KIB, 100 * KIB, threads=1536),
    "hip:gfx942": Hardware(64 * KIB, 64 * KIB, registers=4 * 512 * 64, warp=64),
    "hip:gfx950": Hardware(160 * KIB, 160 * KIB, registers=4 * 512 * 64, warp=64),
}
MOST_PROGRAMS = 32  # resident on a multiprocessor
TENSOR_CORE = {"cuda": r"\b(tcgen05\.mma|wgmma\.mma_async|mma\.sync)\b", "hip": r"\bv_mfma_\w+"}


@dataclass(frozen=True)
class Report:
    """The resources of one compilation.

    `tensor_core_instructions` are counted as they stand in the code. `exponentials_a_tile` counts
    elements in one pass over every branch, so the most that a tile can ask for. `occupancy` is
    resident threads over the most that a multiprocessor holds. `instructions_an_element` is of the
    row kernels on NVIDIA's targets, 0 elsewhere; `wide_loads` are loads of 128 bits in the code.
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
    instructions_an_element: float
    wide_loads: int
    problems: tuple[str, ...]


def compile_job(one: Job) -> Report:
    """Compile for the target, and report the machine code's resources."""
    backend, arch = one.target.split(":")
    hardware, constants, options = HARDWARE[one.target], dict(one.constants), dict(one.options)
    target = GPUTarget(backend, int(arch) if backend == "cuda" else arch, hardware.warp)
    names = [name for name, _ in one.signature]
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in one.divisible}
    source = ASTSource(one.function, dict(one.signature), constants, aligned)
    with triton.knobs.compilation.scope():
        # A sixth of the time; registers, spills and numbers of instructions stay the same.
        triton.knobs.compilation.disable_line_info = True
        compiled = triton.compile(source, target=target, options=options)
    instructions, row_kernel = 0, one.kernel in CEILINGS
    if backend == "cuda":
        assembly, cubin = compiled.asm["ptx"], compiled.asm["cubin"]
        registers, spilled = cuda_resources(cubin)
        instructions, wide = cuda_instructions(cubin) if row_kernel else (0, 0)
    else:
        assembly = compiled.asm["amdgcn"]
        registers, spilled = hip_resources(assembly)
        wide = len(re.findall(r"\b(?:global|buffer)_load_dwordx4\b", assembly))
    threads, shared = options["num_warps"] * hardware.warp, compiled.metadata.shared
    dots = re.findall(TENSOR_CORE[backend], assembly)
    problems = [f"spills {spilled} bytes"] if spilled else []
    if shared > hardware.shared_limit:
        problems.append(f"{shared} bytes of shared memory of {hardware.shared_limit}")
    if multiplies_16_bits(one) and not dots:
        problems.append("no tensor-core instruction")
    per_element = instructions * threads / constants.get("BLOCK_C", threads)
    if row_kernel:
        problems += row_kernel_problems(one, threads, per_element, wide)
    reserved = shared + (KIB if backend == "cuda" else 0)
    programs = min(
        hardware.registers // max(1, -(-registers // 8) * 8 * threads),
        hardware.threads // threads,
        hardware.shared_total // max(1, reserved),
        MOST_PROGRAMS,
    )
    blocks = ("BLOCK_R", "BLOCK_C", "BLOCK_D", "BLOCK_E")
    families = sorted({shorten(instruction) for instruction in dots})
    return Report(
        target=one.target,
        kernel=one.kernel,
        case=one.case,
        tile="x".join(str(constants[name]) for name in blocks if name in constants),
        num_warps=options["num_warps"],
        num_stages=options["num_stages"],
        registers=registers,
        spilled_bytes=spilled,
        shared_bytes=shared,
        tensor_core="+".join(families) or "-",
        tensor_core_instructions=len(dots),
        exponentials_a_tile=exponentials(compiled.asm["ttir"], constants),
        programs_a_multiprocessor=programs,
        occupancy=round(programs * threads / hardware.threads, 3),
        instructions_an_element=round(per_element, 1),
        wide_loads=wide,
        problems=tuple(problems),
    )


def multiplies_16_bits(one: Job) -> bool:
    """Tell whether the kernel multiplies matrices of which one is 16-bit."""
    operands, kinds = ["student_hidden", "teacher_hidden"], dict(one.signature)
    if dict(one.constants).get("IDENTITY"):
        operands.pop()
    narrow = any(kinds.get(name) in ("*bf16", "*fp16") for name in operands)
    return one.kernel == "product_kernel" or (one.kernel in HEAVY and narrow)


def row_kernel_problems(one: Job, threads: int, per_element: float, wide: int) -> list[str]:
    """Find full tiles that are read by less than 128 bits at a time, or take more instructions than
    their variant may.
    """
    constants, kinds = dict(one.constants), dict(one.signature)
    if not constants["FULL"]:
        return []
    problems, parts = [], CEILINGS[one.kernel]
    names = "BIAS_S", "CAP_S", "LABELS", "WEIGHTED", "MIXED"
    flags = [name for name in names if constants.get(name)]
    ceiling = sum(parts.get(flag, 0) for flag in ("", *flags, constants["DIVERGENCE"]))
    if per_element > ceiling:
        problems.append(f"{per_element:.1f} instructions an element pair, more than {ceiling}")
    # Rows of logits in float32, and a teacher's features where their rows allow it.
    models = 2 if constants.get("TEACHER", True) and kinds["logits_t"] == "*fp32" else 1
    fewest = models * constants["BLOCK_C"] // (4 * threads)
    if wide < fewest:
        problems.append(f"{wide} loads of 128 bits, fewer than {fewest}")
    return problems


def _disassembled(cubin: bytes, tool: str, option: str) -> str:
    """Run one of the binary tools that Triton brings; its output."""
    path = Path(triton.__file__).parent / "backends/nvidia/bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [path, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def cuda_instructions(cubin: bytes) -> tuple[int, int]:
    """Count the machine instructions of a cubin, and its loads of 128 bits."""
    text = _disassembled(cubin, "nvdisasm", "-c")
    lines = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*)$", text, flags=re.MULTILINE)
    instructions = [line for line in lines if not re.match(r"(?:@!?U?P\w+ )?NOP\b", line)]
    wide = [line for line in instructions if re.search(r"\bLDG\b[\w.]*\.128\b", line)]
    return len(instructions), len(wide)


def shorten(instruction: str) -> str:
    """Name the family of a tensor-core instruction: mma, wgmma, tcgen05 or mfma."""
    return "mfma" if instruction.startswith("v_mfma") else instruction.split(".")[0]


def exponentials(ttir: str, constants: dict) -> int:
    """Count the elements of all exponentials in Triton's intermediate code, a strip's once a
    strip.
    """
    strips = constants["BLOCK_C"] // constants["BLOCK_E"] if "BLOCK_E" in constants else 1
    shapes = re.findall(r"math\.exp2? .*tensor<([\dx]+)xf32>", ttir)
    return strips * sum(math.prod(map(int, shape.split("x"))) for shape in shapes)


def cuda_resources(cubin: bytes) -> tuple[int, int]:
    """Read registers a thread and spilled bytes (local memory and stack) of a cubin."""
    text = _disassembled(cubin, "cuobjdump", "--dump-resource-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def hip_resources(assembly: str) -> tuple[int, int]:
    """Read vector registers a thread (accumulation registers included) and spilled bytes from the
    code object's metadata.
    """

    def entry(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        return int(found.group(1)) if found else 0

    return entry("vgpr_count"), entry("private_segment_fixed_size") + 4 * entry("vgpr_spill_count")
