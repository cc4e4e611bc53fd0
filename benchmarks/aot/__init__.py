"""Compile every Triton kernel ahead of time, without a GPU, and report the resources of its code.

    python -m benchmarks.aot --target cuda:80 cuda:90 cuda:100 hip:gfx942 --json aot.json [--quick]

cases.py     the cases, and the launches that each leads to
compile.py   the compilation of a launch, and problems in its machine code
"""

from benchmarks.aot.cases import HEAVY, TARGETS, Case, Job, cases, job, jobs, launches
from benchmarks.aot.compile import HARDWARE, TENSOR_CORE, Report, compile_job

__all__ = [
    "HARDWARE",
    "HEAVY",
    "TARGETS",
    "TENSOR_CORE",
    "Case",
    "Job",
    "Report",
    "cases",
    "compile_job",
    "job",
    "jobs",
    "launches",
]
