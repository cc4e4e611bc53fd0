"""Runs the steps that a record lacks, in this process, until the time is up: `supervisor.py` starts
it.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import verdict
from benchmarks.gpu.bench import Bench, NotHere, WrongNumbersError
from benchmarks.gpu.card import Card
from benchmarks.gpu.plan import Step, steps
from benchmarks.gpu.supervisor import DONE, RESTART, WRONG, set_aside
from benchmarks.record import read_json, save

CUT = "cut short"
LEAST = 5.0  # seconds left below which no step is begun


class OverTime(Exception):
    """A step took longer than it may."""


class Runner:
    """The steps of a plan and the record that they are entered in."""

    def __init__(self, path: Path, until: float, card: Card, plan: Sequence[Step]) -> None:
        self.path, self.until, self.card, self.plan = path, until, card, plan
        self.record: dict[str, Any] = read_json(path)
        if self.record["device"] not in (None, card.name):
            set_aside(path)
            self.record["steps"] = {}
        self.record["device"] = card.name
        self.entry: dict[str, Any] = {}
        self.bench = Bench(card, self._report)

    def _report(self, key: str, value: Any) -> None:
        self.entry["results"][key] = json.loads(json.dumps(value, default=str))
        save(self.path, self.record)

    def run(self) -> int:
        """Run all steps that have no result, in order; an exit status for the supervisor."""
        for step in self.plan:
            before = self.record["steps"].get(step.name, {"status": CUT})["status"]
            if before == "wrong":
                return WRONG
            if before != CUT:
                continue
            left = self.until - time.time()
            if left < min(LEAST, step.cap):
                print("the time is up; the same command measures the rest", flush=True)
                break
            cap = self.card.size(step.cap, 20 * step.cap)  # the interpreter is slow
            status = self._take(step, min(cap, left), cut=left < cap)
            if status == "wrong":
                return WRONG
            if status not in ("ok", "not here") and not self._alive():
                return RESTART
        return DONE

    def _take(self, step: Step, cap: float, *, cut: bool) -> str:
        """Run one step; its status. The next run takes a step again that the end of the time cut
        short.
        """
        since, reason = time.time(), {}
        self.entry = self.record["steps"][step.name] = {"status": "killed", "results": {}}
        self.record["running"] = {"step": step.name, "since": since, "until": since + cap}
        save(self.path, self.record)
        found: dict[str, Any] = {}
        try:
            with _alarm(cap):
                found = step.run(self.bench)
            status = "ok"
        except NotHere as error:
            status, reason = "not here", {"reason": str(error)}
        except WrongNumbersError as error:
            status, reason = "wrong", {"reason": str(error)}
        except torch.OutOfMemoryError as error:
            status, reason = "out of memory", {"reason": str(error).splitlines()[0]}
        except Exception as error:
            over = isinstance(error, OverTime) or time.time() - since >= cap
            status = (CUT if cut else "over time") if over else "failed"
            reason = {"reason": f"{type(error).__name__}: {error}"[:400]}
            reason |= {"traceback": traceback.format_exc(limit=-12)}
        self.entry |= {"status": status, "seconds": round(time.time() - since, 2), **reason}
        for key, value in found.items():
            self._report(key, value)
        print(f"{step.name:40} {verdict.line(self.entry)}", flush=True)
        self.record["running"] = None
        save(self.path, self.record)
        if status != "ok":
            self.bench.forget()
        return status

    def _alive(self) -> bool:
        """Tell whether the device still takes orders from this process."""
        try:
            self.card.cuda.synchronize()
        except RuntimeError:
            return False
        return True


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Raise OverTime within after this many seconds."""

    def ring(*_: object) -> None:
        raise OverTime(f"more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("record", type=Path)
    parser.add_argument("until", type=float, help="seconds since the epoch")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--step", action="append", default=[])
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1 if arguments.dry_run else torch.get_num_threads())
    patterns = arguments.step or ["*"]
    plan = [s for s in steps() if any(fnmatch.fnmatchcase(s.name, p) for p in patterns)]
    return Runner(arguments.record, arguments.until, Card(arguments.dry_run), plan).run()


if __name__ == "__main__":
    sys.exit(main())
