"""`python -m benchmarks COMMAND`: run, step, compare, table, check-records, report, study, gpu,
traffic, list; see `--help` of each.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.workloads import SUITES, Workload, select, suite
from fdd_kernels.common.atomic import write_text
from fdd_kernels.common.sizes import show

DOCS = record.ROOT / "docs"
Command = Callable[[argparse.Namespace], int]


def build_parser() -> argparse.ArgumentParser:
    """Build the parser; each subcommand sets `run` to its function."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Speed, memory and accuracy of the FDD loss."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Command, text: str) -> Callable[..., argparse.Action]:
        added = commands.add_parser(name, help=text, description=run.__doc__)
        added.set_defaults(run=run)
        return added.add_argument

    add = command("run", do_run, "measure, and write a record, plots and an HTML report")
    names = {"action": "append", "metavar": "NAME"}
    number = {"type": int, "metavar": "N"}
    add("--suite", choices=SUITES, default="quick", help="what to measure (%(default)s)")
    add("--workload", **names, help="only this one or this group; may repeat; *? as in a shell")
    add("--provider", **names, help="only this one; may repeat")
    _measuring(add, "3")
    add("--no-plots", action="store_true", help="no plots and no HTML report")

    add = command("step", do_step, "a whole training step: output KD and FDD, dense and ours")
    several = {"nargs": "+", "metavar": "NAME"}
    add("--pairs", **several, help="of models: gpt2, llama, tiny (gpt2 llama)")
    add("--tokens", nargs="+", type=int, metavar="N", help="of the batch (128 512)")
    add("--dtypes", **several, help="of both models (float32 bfloat16; on a GPU bfloat16)")
    add("--quick", action="store_true", help="16 tokens, one round; its record is in no table")
    _measuring(add, "5")

    add = command("compare", do_compare, "what changed between two records beyond noise")
    add("before", type=Path)
    add("after", type=Path)
    least = {"type": float, "default": 0.1, "metavar": "PART"}
    add("--threshold", **least, help="smallest change to report (%(default)s)")

    table = command("table", do_table, "the tables of docs/benchmarks.md, the README's picture")
    table("--check", action="store_true", help="change nothing; exit status 1 if one is stale")
    check = command("check-records", do_check, "do docs and planner agree with the newest records")
    for add in (table, check):
        _folder(add, "--results", record.RESULTS, "(benchmarks/results)")
        file = {"type": Path, "metavar": "FILE"}
        add("--page", **file, default=DOCS / "benchmarks.md", help="of the tables")
        add("--image", **file, default=DOCS / "images" / "memory_and_time.svg", help="the picture")

    add = command("report", do_report, "show a record; plots and HTML beside it")
    add("record", type=Path, nargs="?", help="(the newest in benchmarks/results)")
    add("--no-plots", action="store_true")

    add = command("study", do_study, "train students under many objectives; docs/study.md")
    _folder(add, "--output", record.RESULTS / "study", "of the runs (benchmarks/results/study)")
    only = "only runs in whose name --list has this, as in '4x, width 96'; may repeat"
    add("--only", action="append", default=[], metavar="TEXT", help=only)
    add(
        "--minutes",
        type=float,
        metavar="N",
        help="stop after the training that passes them (no limit)",
    )
    add("--threads", **number, help="of PyTorch (all cores)")
    add("--list", action="store_true", help="only say what is done and what is missing")
    add("--report", action="store_true", help="only write tables and plots of docs/study.md")
    file = {"type": Path, "metavar": "FILE"}
    add("--page", **file, default=DOCS / "study.md", help="of the tables; plots in images/ there")

    add = command("gpu", do_gpu, "are the Triton strategies right and fast on this GPU")
    minutes = "of this call; the next call measures the rest (%(default)s)"
    add("--minutes", type=float, default=8.0, help=minutes)
    _folder(add, "--output", record.RESULTS / "gpu", "(benchmarks/results/gpu)")
    add("--step", **names, help="only steps of this name; may repeat; *? as in a shell")
    add("--fresh", action="store_true", help="put aside the record in --output")
    dry = "every step at toy size on the CPU, in Triton's interpreter"
    add("--dry-run", action="store_true", help=dry)
    add("--table", action="store_true", help="only print the record in --output")

    add = command("traffic", do_traffic, "what the Triton backend moves and launches")
    add("--json", type=Path, metavar="FILE", help="write the counts to this file")

    add = command("list", do_list, "workloads of a suite, and providers")
    add("--suite", choices=SUITES, default="full")
    return parser


def _measuring(add: Callable, rounds: str) -> None:
    """Add the options of every command that measures."""
    number = {"type": int, "metavar": "N"}
    _folder(add, "--output", record.RESULTS, "where records go (benchmarks/results)")
    add("--threads", **number, help="of PyTorch (all cores)")
    add("--repeats", **number, help=f"interleaved rounds after the warm-up ({rounds})")
    add("--device", choices=("cpu", "cuda"), help="(cuda if there is one)")
    add("--fresh", action="store_true", help="discard an unfinished run in --output")


def _folder(add: Callable, name: str, default: Path, text: str) -> None:
    add(name, type=Path, default=default, metavar="DIR", help=text)


def do_run(arguments: argparse.Namespace) -> int:
    """Measure. An interrupted run resumes where it stopped. Nothing else should run on the machine
    meanwhile.
    """
    from benchmarks.providers import choose

    workloads = select(suite(arguments.suite), arguments.workload)
    providers = choose(arguments.provider)
    device, plots = _device(arguments), not arguments.no_plots
    part = bool(arguments.workload or arguments.provider)
    return _measure(arguments, arguments.suite, workloads, providers, device, plots, part=part)


def do_step(arguments: argparse.Namespace) -> int:
    """Measure whole training steps of pairs of real architectures with random weights. Losses and
    gradients of dense and ours are compared first, and refused if they differ. An interrupted run
    resumes where it stopped. Nothing else should run on the machine meanwhile.
    """
    from benchmarks import steps

    device = _device(arguments)
    tokens = steps.QUICK_TOKENS if arguments.quick else steps.TOKENS
    dtypes = ("bfloat16",) if device == "cuda" else ("float32", "bfloat16")
    workloads = steps.workloads(
        arguments.pairs or steps.DEFAULT_PAIRS,
        arguments.tokens or tokens,
        arguments.dtypes or dtypes,
    )
    if arguments.quick:
        arguments.repeats = arguments.repeats or 1
    losses = list(steps.LOSSES.values())
    about = {"module": "benchmarks.step_measure", "part": arguments.quick}
    if len(workloads) > 1:  # the tables of the whole record are those of its only step
        about["show"] = _show_step
    return _measure(arguments, steps.SUITE, workloads, losses, device, False, **about)


def _show_step(result: dict) -> None:
    """Print the tables of one training step, as far as the packages for it are installed."""
    try:
        from benchmarks.report import steps
        from benchmarks.report.terminal import print_tables
    except ModuleNotFoundError:
        return  # the end of the run says what is missing
    print_tables(steps.tables({"results": [result]}))


def _device(arguments: argparse.Namespace) -> str:
    """Choose the device that a command measures on.

    Raises:
        ValueError: a GPU is asked for and there is none.
    """
    import torch

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU")
    return device


def _measure(
    arguments: argparse.Namespace,
    name: str,
    workloads: list[Workload],
    providers: list,
    device: str,
    plots: bool,
    **about: Any,
) -> int:
    """Run the measurements of a suite of this name and show its record."""
    from benchmarks.runner import DEFAULT_REPEATS, Run

    for option in ("threads", "repeats"):
        value = getattr(arguments, option)
        if value is not None and value < 1:
            raise ValueError(f"--{option} {value} must be at least 1")
    run = Run(
        arguments.output,
        name,
        workloads,
        providers,
        threads=arguments.threads or len(os.sched_getaffinity(0)),
        repeats=arguments.repeats or DEFAULT_REPEATS[name],
        device=device,
        fresh=arguments.fresh,
        **about,
    )
    try:
        path = run.execute()
    except KeyboardInterrupt:
        rest = "the same command measures the rest"
        print(f"\ninterrupted; finished results are in {run.path}, {rest}", file=sys.stderr)
        return 130
    _show(path, plots=plots)
    statuses = [e["status"] for r in run.record["results"] for e in r["providers"].values()]
    return 1 if {"refused", "failed"} & set(statuses) else 0


def _show(path: Path, *, plots: bool) -> None:
    """Print a record and write its page, as far as the packages for it are installed."""
    data = record.load(path)
    print(f"record: {path}")
    try:
        from benchmarks.report.terminal import print_record

        print_record(data)
        if plots:
            from benchmarks.report.page import write_report

            print(f"report: {write_report(data, path.with_suffix(''))}")
    except ModuleNotFoundError as error:
        print(
            f"{'no plots and no HTML report' if error.name == 'matplotlib' else 'no report'}: "
            f"{error.name} is missing; pip install {error.name}, then `python -m benchmarks report`"
        )


def do_compare(arguments: argparse.Namespace) -> int:
    """Compare two records. Exit status 1 if anything became slower or larger beyond noise and
    threshold, or was lost.
    """
    from benchmarks.report.compare import compare
    from benchmarks.report.terminal import print_comparison

    if not arguments.threshold >= 0:
        raise ValueError(f"--threshold {arguments.threshold} must be at least 0")
    before, after = record.load(arguments.before), record.load(arguments.after)
    result = compare(before, after, arguments.threshold)
    print_comparison(result)
    return 1 if len(result.regressions) or result.lost else 0


def do_table(arguments: argparse.Namespace) -> int:
    """Write the tables of the newest record of each suite and kind of processor between the markers
    of docs/benchmarks.md, and of the newest of suite full the picture of the README. Records of a
    part of a suite (--workload, --provider) are left out.
    """
    from benchmarks.report.docs import generated

    if arguments.check:
        return int(_stale(arguments))
    for path, text in generated(arguments.page, arguments.image, arguments.results).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    print(f"tables of {', '.join(map(str, record.newest_of_each_suite(arguments.results)))}")
    return 0


def _stale(arguments: argparse.Namespace) -> bool:
    from benchmarks.report.docs import generated

    stale = [
        path
        for path, text in generated(arguments.page, arguments.image, arguments.results).items()
        if not path.exists() or path.read_text() != text
    ]
    for path in stale:
        print(f"{path} is stale: run `python -m benchmarks table`", file=sys.stderr)
    return bool(stale)


def do_check(arguments: argparse.Namespace) -> int:
    """Check docs and planner. Exit status 1 if tables or picture are stale, or if the planner of
    today is off by more than 10% of a peak on record: of each suite's the newest, on whatever
    processor, since the code that earlier ones measured is another. No test does this: a record is
    of one machine.
    """
    from benchmarks.runner import peaks_on_record

    peaks: dict[tuple, tuple[Path, int, int, int | None]] = {}
    for path in record.newest_of_each_suite(arguments.results):  # oldest first
        data = record.load(path)
        where = data["suite"], data["device"], data["threads"]
        for what, *figures in peaks_on_record(data):
            peaks[(*where, what)] = path, *figures
    wrong = 0
    for (*_, what), (path, predicted, measured, then) in peaks.items():
        if abs(predicted - measured) > 0.1 * measured:
            wrong += 1
            error = f"predicts {show(predicted)}, {show(measured)} was measured"
            if then is not None:  # where it is near the measured, measure today's code
                error += f" of code for which it predicted {show(then)}"
            print(f"{path}: {what}: the planner {error}", file=sys.stderr)
    print(f"{len(peaks)} predictions of memory, {wrong} of them off by more than 10%")
    return int(_stale(arguments) or wrong > 0)


def do_report(arguments: argparse.Namespace) -> int:
    """Print a record and write its plots and HTML report again."""
    path = arguments.record or record.newest_of_each_suite(record.RESULTS)[-1]
    _show(path, plots=not arguments.no_plots)
    return 0


def do_study(arguments: argparse.Namespace) -> int:
    """Train students under the objectives of the study, one at a time with several objectives side
    by side. What the record has is not trained again.
    """
    from benchmarks import study

    if arguments.list:
        print("\n".join(study.listing(arguments.output)))
        return 0
    if arguments.report:
        from benchmarks import study_report

        for path in study_report.write(arguments.output, arguments.page):
            print(path)
        return 0
    if arguments.minutes is not None and not arguments.minutes > 0:
        raise ValueError(f"--minutes {arguments.minutes} must be above 0")
    if arguments.threads is not None and arguments.threads < 1:
        raise ValueError(f"--threads {arguments.threads} must be at least 1")
    done, missing = study.study(
        arguments.output,
        arguments.only,
        arguments.minutes,
        arguments.threads or len(os.sched_getaffinity(0)),
    )
    print(f"{done} runs done, {missing} missing; record: {arguments.output / study.FILE}")
    return 0


def do_gpu(arguments: argparse.Namespace) -> int:
    """Measure on one GPU, the most decisive steps first; print measured beside predicted and the
    verdict. Exit status 3: wrong numbers.
    """
    from benchmarks.gpu import supervisor, verdict

    if not arguments.minutes > 0:
        raise ValueError(f"--minutes {arguments.minutes} must be above 0")
    status = 0
    if not arguments.table:
        status = supervisor.supervise(
            arguments.output,
            arguments.minutes,
            dry=arguments.dry_run,
            fresh=arguments.fresh,
            only=arguments.step or (),
        )
    print(verdict.text(record.read_json(arguments.output / supervisor.RECORD)))
    return status


def do_traffic(arguments: argparse.Namespace) -> int:
    """Count GEMMs, bytes an element, scratch and kernels a block on recorded launches; needs no
    GPU.
    """
    from benchmarks import traffic

    return traffic.run(arguments.json)


def do_list(arguments: argparse.Namespace) -> int:
    """List workloads and providers, and why a provider cannot run here."""
    import torch

    from benchmarks.providers import PROVIDERS

    for workload in suite(arguments.suite):
        print(f"{workload.name:22} {workload.group:9} {workload.describe()}  {workload.text}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for provider in PROVIDERS.values():
        reason = provider.unavailable(device)
        not_here = f" [not here: {reason}]" if reason else ""
        print(f"{provider.name:14} {provider.title}: {provider.computes}{not_here}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line: 0, 1 for a regression or a refused result, 2 for a user's error, 130
    interrupted.
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
