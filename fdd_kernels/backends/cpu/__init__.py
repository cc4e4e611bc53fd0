"""The backend "cpu": the operations in C++ (csrc/), for float32, bfloat16 and float16 inputs."""

from fdd_kernels.backends.cpu.cached import cached_rows, stats_and_grad
from fdd_kernels.backends.cpu.problem import refusal, unavailable
from fdd_kernels.backends.cpu.streamed import grad, stats
from fdd_kernels.backends.cpu.tiling import memory

__all__ = [
    "cached_rows",
    "grad",
    "memory",
    "refusal",
    "stats",
    "stats_and_grad",
    "unavailable",
]
