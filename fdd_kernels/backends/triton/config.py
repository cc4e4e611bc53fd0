"""Launch configurations: a plain function of operation, shape, dtype and architecture.

How the numbers were argued (benchmarks/gpu_model.py prints the model, benchmarks/aot the
resources; neither is a timing: no GPU has run these kernels yet). GEMMs of this kind are bound by
the multiprocessors' L2 reads: 2 / block_rows + 2 / block_columns bytes per 16-bit multiplication
and model. So the tile is the largest that compiles without a spill on every target: 128 x 128 with
8 warps, one program a multiprocessor. Tiles wait for their neighbours in scratch, not in registers,
so one tile serves every request. Sub-tiles of 16 tokens keep the elementwise part within the
registers that the GEMM leaves. Float32 GEMMs at "ieee" precision run on the ordinary cores, from
registers, and want small tiles.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

F32_PRECISION = "FDD_KERNELS_TRITON_F32"
F32_PRECISIONS = ("ieee", "tf32x3", "tf32")
INTERPRETER = "interpreter"
ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950")


def interpreting() -> bool:
    """Tell whether Triton's interpreter was asked for, which runs the kernels on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


@dataclass(frozen=True)
class LaunchConfig:
    """The launch of a heavy kernel.

    Attributes:
        block_rows, block_columns: the tile.
        block_depth: step along the hidden width.
        block_strip: tokens of a sub-tile in the elementwise part.
        max_registers: of a thread; without a limit NVIDIA's assembler spills to make room for more
            programs.
    """

    block_rows: int
    block_columns: int
    block_depth: int
    block_strip: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """Return the compiler's options."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options if self.max_registers is None else options | {"maxnreg": self.max_registers}

    @property
    def programs(self) -> int:
        """Count the programs that a multiprocessor has the registers for."""
        return max(1, 8 // self.num_warps)


@dataclass(frozen=True)
class RowLaunch:
    """The launch of a kernel whose program owns one row.

    `block` is the tokens of a tile. `long_warps` are the warps of long programs: tokens are masked
    or have weights, or the teacher is mixed.
    """

    block: int
    num_warps: int
    long_warps: int

    def options(self, long: bool, architecture: str) -> dict[str, int]:
        """Return the compiler's options; `long` programs need more registers."""
        options = {"num_warps": self.long_warps if long else self.num_warps, "num_stages": 1}
        # Without a limit NVIDIA's assembler spills to make room for more programs.
        return options | {"maxnreg": 255} if architecture.startswith("sm_") else options


# The launches that compile without a stack on every target (benchmarks/aot); they are not timed.
# One warp needs no barriers: its reductions are shuffles. Long programs and the gradient need too
# many registers for one warp.
ROW_LAUNCHES = {
    "stats": RowLaunch(1024, 1, 2),
    "second_pass": RowLaunch(1024, 2, 2),
    "grad": RowLaunch(2048, 4, 4),
}
INTERPRETED_ROW_LAUNCH = RowLaunch(128, 1, 1)


def row_launch(operation: str) -> RowLaunch:
    """Return the launch of a row kernel; in the interpreter small tiles, so that few tokens make
    several.
    """
    return INTERPRETED_ROW_LAUNCH if interpreting() else ROW_LAUNCHES[operation]


def architecture_of(device: torch.device) -> str:
    """Name a device's architecture, as in ARCHITECTURES; `choose` takes others as their nearest
    relative.
    """
    if interpreting() or device.type != "cuda":
        return INTERPRETER
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def multiprocessors(device: torch.device) -> int:
    """Count a device's multiprocessors; two in the interpreter, so that work is always split."""
    if interpreting() or device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def f32_precisions(architecture: str) -> tuple[str, ...]:
    """List the ways to multiply float32 inputs that Triton has for an architecture."""
    if architecture.startswith("gfx"):
        return ("ieee", "tf32") if architecture == "gfx942" else ("ieee",)
    return F32_PRECISIONS


def f32_precision(architecture: str) -> str:
    """Return how float32 inputs are multiplied: "ieee" (exact, no tensor cores), or another way of
    F32_PRECISIONS by the environment variable FDD_KERNELS_TRITON_F32.

    Raises:
        ValueError: the architecture does not have the one that the environment variable names.
    """
    precision = os.environ.get(F32_PRECISION, "ieee")
    if precision not in f32_precisions(architecture):
        known = ", ".join(f32_precisions(architecture))
        raise ValueError(
            f"{F32_PRECISION}={precision!r} is not one of {known}, which {architecture} has"
        )
    return precision


def choose(
    shape: tuple[int, ...], dtype: torch.dtype, architecture: str, mixed: bool = False
) -> LaunchConfig:
    """Choose the configuration of the three heavy kernels.

    `shape` is (R, V, student's width, teacher's width or 0 without one), `dtype` the wider of the
    two models' GEMMs, `mixed` whether they differ.
    """
    rows, _, *widths = shape
    if architecture == INTERPRETER:
        return LaunchConfig(16, 32, 32, 16, num_warps=4, num_stages=1)
    amd, datacenter_blackwell = architecture.startswith("gfx"), architecture.startswith("sm_10")
    few = rows <= 64  # half a tile of rows would be computed for nothing
    wide = dtype == torch.float32
    # Where accumulators have a memory of their own (sm_100), kernels of two heads and full tiles
    # take some 200 registers if left alone, and spill some 50 bytes if told that they may take 255.
    unlimited = amd or (datacenter_blackwell and not wide and not few and widths[1] > 0)
    registers = None if unlimited else 255
    # Rows that start anywhere are loaded number by number, through registers.
    ragged = any(width % 16 for width in widths)
    if wide:
        # Nothing is prefetched where registers are short: with ragged rows, and with two dtypes,
        # whose GEMMs share them.
        return LaunchConfig(
            64,
            64,
            16,
            8,
            num_warps=8,
            num_stages=1 if mixed or ragged else 2,
            max_registers=registers,
        )
    if ragged:
        return LaunchConfig(64, 64, 64, 16, num_warps=8, num_stages=2, max_registers=registers)
    if amd:
        return LaunchConfig(
            64 if few else 128, 128, 64, 16, num_warps=4 if few else 8, num_stages=2
        )
    # Shared memory a multiprocessor: 227 KiB on sm_90 and sm_100, 163 on sm_80, 99 on sm_89 and
    # sm_120. On sm_100 a depth of 64 leaves the second pass short of registers.
    depth, stages = (
        (32, 4) if datacenter_blackwell else (64, 3 if architecture in ("sm_80", "sm_90") else 2)
    )
    return LaunchConfig(64 if few else 128, 128, depth, 16, 4 if few else 8, stages, registers)


def candidates(
    shape: tuple[int, ...], dtype: torch.dtype, architecture: str, mixed: bool = False
) -> list[LaunchConfig]:
    """List the candidates of autotuning: the default, its neighbours in tile and pipeline depth."""
    default = choose(shape, dtype, architecture, mixed)
    found, limit = [default], default.max_registers
    for block_rows, block_columns, num_warps in (
        (128, 128, 8),
        (64, 128, 4),
        (128, 64, 4),
        (128, 256, 8),
        (64, 256, 8),
    ):
        for block_depth, num_stages in ((64, 2), (64, 3), (64, 4), (32, 4)):
            for block_strip in (16, 32):
                found.append(
                    LaunchConfig(
                        block_rows,
                        block_columns,
                        block_depth,
                        block_strip,
                        num_warps,
                        num_stages,
                        limit,
                    )
                )
    return list(dict.fromkeys(found)) if dtype != torch.float32 else [default]
