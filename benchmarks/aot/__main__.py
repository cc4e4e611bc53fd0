"""Compile every Triton kernel ahead of time; exit status 1 if one has a problem: see compile.py."""

from __future__ import annotations

import argparse
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

from benchmarks.aot import HARDWARE, TARGETS, Report, compile_job, jobs

COLUMNS = "{:10} {:20} {:34} {:15} {:>5} {:>4} {:>5} {:>7} {:>8} {:>5} {:>4}  {}"
HEADINGS = [
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
]


def line(report: Report) -> str:
    """Format a report in one line."""
    numbers = (report.num_warps, report.registers, report.spilled_bytes, report.shared_bytes)
    numbers += (report.exponentials_a_tile, report.programs_a_multiprocessor)
    names = report.target, report.kernel.removesuffix("_kernel"), report.case, report.tile
    dots = report.tensor_core_instructions, report.tensor_core
    text = COLUMNS.format(*names, *numbers, *dots)
    if report.instructions_an_element:
        text += f" {report.instructions_an_element} instructions an element,"
        text += f" {report.wide_loads} wide loads"
    return " ".join([text, *report.problems])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aot", description=__doc__)
    parser.add_argument("--target", nargs="+", default=TARGETS, choices=HARDWARE)
    parser.add_argument("--json", type=Path, help="write the reports to this file")
    only = "only kernels whose name contains this, such as cached"
    parser.add_argument("--kernels", default="", help=only)
    parser.add_argument("--quick", action="store_true", help="the subset that the tests compile")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    arguments = parser.parse_args()
    todo = [j for j in jobs(arguments.target, arguments.quick) if arguments.kernels in j.kernel]
    reports = []
    print(COLUMNS.format(*HEADINGS, ""))
    with ProcessPoolExecutor(arguments.processes) as pool:
        for report in pool.map(compile_job, todo):
            reports.append(report)
            print(line(report), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(r) for r in reports], indent=1) + "\n")
    wrong = [report for report in reports if report.problems]
    print(f"{len(reports)} compiled, {len(wrong)} with problems")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
