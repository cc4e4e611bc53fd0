"""The backend "cpu": the operations in C++ (csrc/), for float32, bfloat16 and float16 inputs."""

from fdd_kernels.backends.cpu.operations import (
    cached_rows,
    grad,
    memory,
    stats,
    stats_and_grad,
    unavailable,
)

__all__ = ["cached_rows", "grad", "memory", "stats", "stats_and_grad", "unavailable"]
