"""`python -m benchmarks run | compare | table | check-records | report | list | gpu | traffic`; see
`--help` of each.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import record
from benchmarks.summary import memory as show
from benchmarks.workloads import SUITES, select, suite
from fdd_kernels.common.atomic import write_text


def build_parser() -> argparse.ArgumentParser:
    """The parser; each subcommand sets `run` to its function."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Speed, memory and accuracy of the FDD loss."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    run = commands.add_parser(
        "run",
        help="measure, and write a record, plots and an HTML report",
        description=do_run.__doc__,
    )
    run.add_argument(
        "--suite", choices=SUITES, default="quick", help="what to measure (%(default)s)"
    )
    run.add_argument(
        "--workload",
        action="append",
        metavar="NAME",
        help="only this one or this group; may repeat; *? as in a shell",
    )
    run.add_argument(
        "--provider", action="append", metavar="NAME", help="only this one; may repeat"
    )
    run.add_argument(
        "--output",
        type=Path,
        default=record.RESULTS,
        metavar="DIR",
        help="where records go (benchmarks/results)",
    )
    run.add_argument(
        "--threads", type=int, default=None, metavar="N", help="of PyTorch (all cores)"
    )
    run.add_argument(
        "--repeats",
        type=int,
        default=None,
        metavar="N",
        help="interleaved rounds after the warm-up (3)",
    )
    run.add_argument(
        "--device", choices=("cpu", "cuda"), default=None, help="(cuda if there is one)"
    )
    run.add_argument(
        "--fresh",
        action="store_true",
        help="discard an unfinished run in --output instead of continuing it",
    )
    run.add_argument("--no-plots", action="store_true", help="no plots and no HTML report")
    run.set_defaults(run=do_run)

    compare = commands.add_parser(
        "compare",
        help="what changed between two records beyond noise",
        description=do_compare.__doc__,
    )
    compare.add_argument("before", type=Path)
    compare.add_argument("after", type=Path)
    compare.add_argument(
        "--threshold",
        type=float,
        default=0.1,
        metavar="PART",
        help="smallest change that counts (%(default)s)",
    )
    compare.set_defaults(run=do_compare)

    table = commands.add_parser(
        "table",
        help="the tables of README and docs from the newest records",
        description=do_table.__doc__,
    )
    table.add_argument(
        "--check", action="store_true", help="change nothing; exit status 1 if a table is stale"
    )
    table.set_defaults(run=do_table)

    check = commands.add_parser(
        "check-records",
        help="are tables and planner in agreement with the newest records",
        description=do_check.__doc__,
    )
    check.set_defaults(run=do_check)
    for command in (table, check):
        command.add_argument("--results", type=Path, default=record.RESULTS, metavar="DIR")
        command.add_argument(
            "--readme",
            type=Path,
            default=record.ROOT / "README.md",
            metavar="FILE",
            help="for the overview",
        )
        command.add_argument(
            "--page",
            type=Path,
            default=record.ROOT / "docs" / "benchmarks.md",
            metavar="FILE",
            help="for the rest",
        )

    report = commands.add_parser(
        "report", help="show a record; plots and HTML beside it", description=do_report.__doc__
    )
    report.add_argument("record", type=Path, nargs="?", help="(the newest in benchmarks/results)")
    report.add_argument("--no-plots", action="store_true")
    report.set_defaults(run=do_report)

    gpu = commands.add_parser(
        "gpu",
        help="are the Triton strategies right and fast on this GPU",
        description=do_gpu.__doc__,
    )
    gpu.add_argument(
        "--minutes",
        type=float,
        default=8.0,
        help="of this call; what is missing is measured by the next (8)",
    )
    gpu.add_argument(
        "--output",
        type=Path,
        default=record.RESULTS / "gpu",
        metavar="DIR",
        help="(benchmarks/results/gpu)",
    )
    gpu.add_argument(
        "--step",
        action="append",
        metavar="NAME",
        help="only steps of this name; may repeat; *? as in a shell",
    )
    gpu.add_argument(
        "--fresh",
        action="store_true",
        help="put aside the record in --output instead of continuing it",
    )
    gpu.add_argument(
        "--dry-run",
        action="store_true",
        help="every step at toy size on the CPU, in Triton's interpreter",
    )
    gpu.add_argument(
        "--table", action="store_true", help="only print what the record in --output says"
    )
    gpu.set_defaults(run=do_gpu)

    traffic = commands.add_parser(
        "traffic", help="what the Triton backend moves and launches", description=do_traffic.__doc__
    )
    traffic.add_argument("--json", type=Path, metavar="FILE", help="write the counts to this file")
    traffic.set_defaults(run=do_traffic)

    listing = commands.add_parser(
        "list", help="workloads of a suite, and providers", description=do_list.__doc__
    )
    listing.add_argument("--suite", choices=SUITES, default="full")
    listing.set_defaults(run=do_list)
    return parser


def do_run(arguments: argparse.Namespace) -> int:
    """Measure; a run that was interrupted goes on where it stopped. Nothing else should run on the
    machine meanwhile.
    """
    import torch

    from benchmarks.providers import choose
    from benchmarks.runner import DEFAULT_REPEATS, Run

    workloads = select(suite(arguments.suite), arguments.workload)
    providers = choose(arguments.provider)
    for name, value in (("--threads", arguments.threads), ("--repeats", arguments.repeats)):
        if value is not None and value < 1:
            raise ValueError(f"{name} {value} must be at least 1")
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU")
    run = Run(
        arguments.output,
        arguments.suite,
        workloads,
        providers,
        threads=arguments.threads or len(os.sched_getaffinity(0)),
        repeats=arguments.repeats or DEFAULT_REPEATS[arguments.suite],
        device=device,
        fresh=arguments.fresh,
    )
    try:
        path = run.execute()
    except KeyboardInterrupt:
        print(
            f"\ninterrupted; what was measured is in {run.path}, the same command goes on",
            file=sys.stderr,
        )
        return 130
    _show(path, plots=not arguments.no_plots)
    statuses = [e["status"] for r in run.record["results"] for e in r["providers"].values()]
    return 1 if {"refused", "failed"} & set(statuses) else 0


def _show(path: Path, *, plots: bool) -> None:
    from benchmarks.terminal import print_record

    data = record.load(path)
    print_record(data)
    print(f"record: {path}")
    if not plots:
        return
    try:
        from benchmarks.html import write_report
    except ModuleNotFoundError as error:
        print(
            f"no plots and no HTML report: {error.name} is missing; pip install matplotlib, then "
            "`python -m benchmarks report`"
        )
        return
    print(f"report: {write_report(data, path.with_suffix(''))}")


def do_compare(arguments: argparse.Namespace) -> int:
    """Exit status 1 if anything became slower or larger beyond noise and threshold, or was lost."""
    from benchmarks.compare import compare
    from benchmarks.terminal import print_comparison

    if not arguments.threshold >= 0:
        raise ValueError(f"--threshold {arguments.threshold} must be at least 0")
    result = compare(
        record.load(arguments.before), record.load(arguments.after), arguments.threshold
    )
    print_comparison(result)
    return 1 if result.regressions or result.lost else 0


def do_table(arguments: argparse.Namespace) -> int:
    """Write the tables of the newest record of each suite between the markers of the README and of
    docs/benchmarks.md.
    """
    from benchmarks import readme

    if arguments.check:
        return int(_stale(arguments))
    for path, render in readme.pages(arguments.readme, arguments.page).items():
        write_text(path, readme.updated(path.read_text(), arguments.results, render))
    print(f"tables of {', '.join(map(str, record.newest_of_each_suite(arguments.results)))}")
    return 0


def _stale(arguments: argparse.Namespace) -> bool:
    from benchmarks import readme

    stale = readme.stale(arguments.readme, arguments.page, arguments.results)
    for path in stale:
        print(f"{path} is stale: run `python -m benchmarks table`", file=sys.stderr)
    return bool(stale)


def do_check(arguments: argparse.Namespace) -> int:
    """Exit status 1 if a table is stale, or if the planner of today is off by more than 10% of a
    peak on record. No test does this: a record is of one machine."""
    from benchmarks.check import peaks_on_record

    checked, wrong = 0, 0
    for path in record.newest_of_each_suite(arguments.results):
        for what, predicted, measured in peaks_on_record(record.load(path)):
            checked += 1
            if abs(predicted - measured) > 0.1 * measured:
                wrong += 1
                print(
                    f"{path}: {what}: the planner predicts {show(predicted)}, {show(measured)} was "
                    "measured",
                    file=sys.stderr,
                )
    print(f"{checked} predictions of memory, {wrong} of them off by more than 10%")
    return int(_stale(arguments) or wrong > 0)


def do_report(arguments: argparse.Namespace) -> int:
    """Print a record and write its plots and HTML report again."""
    _show(arguments.record or record.newest(record.RESULTS), plots=not arguments.no_plots)
    return 0


def do_gpu(arguments: argparse.Namespace) -> int:
    """Measure on one GPU, what decides first; print measured beside predicted and the verdict. Exit
    status 3: wrong numbers.
    """
    from benchmarks.gpu import supervisor, verdict

    if not arguments.minutes > 0:
        raise ValueError(f"--minutes {arguments.minutes} must be above 0")
    if not arguments.table:
        status = supervisor.supervise(
            arguments.output,
            arguments.minutes,
            dry=arguments.dry_run,
            fresh=arguments.fresh,
            only=arguments.step or (),
        )
    print(verdict.text(record.read_json(arguments.output / supervisor.RECORD)))
    return 0 if arguments.table else status


def do_traffic(arguments: argparse.Namespace) -> int:
    """Count GEMMs, bytes an element, scratch and kernels a block on recorded launches; needs no
    GPU.
    """
    from benchmarks import traffic

    return traffic.run(arguments.json)


def do_list(arguments: argparse.Namespace) -> int:
    """Print what there is, and why what cannot run here cannot."""
    import torch

    from benchmarks.providers import PROVIDERS

    for workload in suite(arguments.suite):
        print(f"{workload.name:22} {workload.group:9} {workload.describe()}  {workload.text}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for provider in PROVIDERS.values():
        reason = provider.unavailable(device)
        print(
            f"{provider.name:14} {provider.title}: "
            f"{provider.computes}{f' [not here: {reason}]' if reason else ''}"
        )
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line: 0, 1 for a regression or a refused result, 2 for what the user can put
    right, 130 interrupted.
    """
    arguments = build_parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except (ValueError, OSError, record.RecordError) as error:
        print(f"benchmarks {arguments.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
