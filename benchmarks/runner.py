"""A whole run: every workload with every provider, each measurement in its own process, results
written as they come.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from benchmarks.call import LOSS
from benchmarks.providers import Provider, of_workload
from benchmarks.workloads import Workload
from fdd_kernels.common.sizes import GIB
from fdd_kernels.memory.loss import LossMemory, LossShape, loss_memory
from fdd_kernels.objectives.fdd.options import LossOptions

# glibc caches some freed tensors of up to 32 MiB, more or less of them from run to run. With a
# fixed threshold it gives them back, so that the high-water mark is of memory in use, as
# max_memory_allocated is on a GPU.
RETURN_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**16)}
DEFAULT_REPEATS = {"tiny": 2, "quick": 3, "full": 3, "limits": 3, "objectives": 5, "streamed": 3}
DEFAULT_REPEATS |= {"step": 5}


@dataclass
class Run:
    """A record that grows: written after every measurement, resumed from `folder` if unfinished.

    `say` is called with one line per step, `show` with each finished workload's entry. `fresh`
    discards an unfinished record in `folder`. `module` is the process of a measurement. `part`
    marks a part of the suite, which no table shows.
    """

    folder: Path
    suite: str
    workloads: list[Workload]
    providers: list[Provider]
    threads: int
    repeats: int
    device: str
    fresh: bool = False
    part: bool = False
    say: Callable[[str], None] = print
    show: Callable[[dict[str, Any]], None] = lambda result: None
    module: str = "benchmarks.measure"
    record: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.missing = {p.name: p.unavailable(torch.device(self.device)) for p in self.providers}
        self.path = self.folder / record.PARTIAL
        self.record = self._resume() or self._start()

    def _settings(self) -> dict[str, Any]:
        """Return the settings that must be the same for an unfinished run to be resumed."""
        return {
            "format": record.FORMAT,
            "suite": self.suite,
            "part": self.part,
            "device": self.device,
            "threads": self.threads,
            "repeats": self.repeats,
            "machine": record.machine(self.device),
            "versions": record.versions(),
            "sources": record.source_digest(),
            "workloads": [w.to_json() for w in self.workloads],
            "chosen": [p.name for p in self.providers],
        }

    def _start(self) -> dict[str, Any]:
        about = {
            p.name: {"title": p.title, "version": p.version(), "unavailable": self.missing[p.name]}
            for p in self.providers
        }
        return self._settings() | {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "git": record.git_revision(),
            "providers": about,
            "interruptions": 0,
            "results": [],
        }

    def _resume(self) -> dict[str, Any] | None:
        if self.fresh or not self.path.exists():
            return None
        found = record.load(self.path)
        settings = json.loads(json.dumps(self._settings()))
        different = [key for key, value in settings.items() if found.get(key) != value]
        if different:
            raise record.RecordError(
                f"{self.path}: is an unfinished run with other {', '.join(different)}; pass "
                "--fresh to discard it, or another --output"
            )
        finished = sum(len(r["done"]) for r in found["results"])
        self.say(f"continuing an unfinished run that has {finished} measurements")
        found["interruptions"] += 1
        return found

    def save(self) -> None:
        record.save(self.path, self.record)

    def execute(self) -> Path:
        """Measure everything that is missing; the path of the finished record."""
        self.save()
        for number, workload in enumerate(self.workloads, 1):
            self.say(f"[{number}/{len(self.workloads)}] {workload.name}: {workload.describe()}")
            self._workload(workload)
            self.show(self._result(workload))
        stamp = datetime.fromisoformat(self.record["date"]).strftime("%Y%m%d-%H%M%S")
        final = self.folder / f"{stamp}-{self.suite}.json"
        record.save(final, self.record)
        self.path.unlink()
        return final

    def _result(self, workload: Workload) -> dict[str, Any]:
        """Find the workload's entry in the record, or begin it."""
        for result in self.record["results"]:
            if result["workload"]["name"] == workload.name:
                return result
        chosen = of_workload(workload, self.providers, self.device)
        result = {
            "workload": json.loads(json.dumps(workload.to_json())),
            "products": None,
            "providers": {p.name: self._entry(p, workload) for p in chosen},
            "done": [],
        }
        self.record["results"].append(result)
        return result

    def _entry(self, provider: Provider, workload: Workload) -> dict[str, Any]:
        """Make an empty result, with the reason if there will be none."""
        reason, status = self.missing[provider.name], "missing"
        if reason is None:
            reason, status = provider.unsupported(workload), "unsupported"
        limit, threads = memory_limit(self.device), workload.threads or self.threads
        of_device = limit if self.device == "cuda" else None
        where = {"threads": threads, "device": self.device, "device_memory": of_device}
        prediction = predicted_memory(workload, provider.name, **where)
        needed = 0 if prediction is None else prediction.total + prediction.inputs
        if reason is None and needed > limit:
            needs = f"{needed / GIB:.1f} GiB ({prediction.arithmetic()})"
            reason = f"predicted to need {needs}, this machine has {limit / GIB:.1f} GiB"
            status = "too large"
        return {
            "computes": provider.part(workload),
            "status": "ok" if reason is None else status,
            "reason": reason,
            "predicted_memory": prediction and prediction.total,
            **dict.fromkeys(("time", "memory", "accuracy")),
        }

    def _workload(self, workload: Workload) -> None:
        result = self._result(workload)
        for name, entry in result["providers"].items():
            if entry["status"] != "ok" and entry["reason"] and not entry.get("said"):
                self.say(f"    {name}: {entry['status']}: {entry['reason']}")
                entry["said"] = True
        if "accuracy" in workload.measures:
            self._shared(workload, result, "accuracy")
            for name, entry in result["providers"].items():
                found = entry["accuracy"]
                if found and not found["passed"]:
                    self._refuse(
                        name, entry, f"accuracy is wrong: {found['of_budget']:.3g} times the budget"
                    )
        if "time" in workload.measures:
            self._shared(workload, result, "time")
            for name, entry in result["providers"].items():
                check = entry["time"] and entry["time"]["check"]
                if check and not check["passed"]:
                    error = f"gradient is wrong: {check['error']:.3g} relative error"
                    self._refuse(name, entry, f"the timed call's {check.get('reason') or error}")
        if "memory" in workload.measures:
            for name in self._able(result):
                if f"memory {name}" not in result["done"]:
                    self._job(workload, result, "memory", [name])
                    self._finish(result, f"memory {name}")

    def _refuse(self, name: str, entry: dict, reason: str) -> None:
        """Take the figures of a provider whose answer is wrong out of the record."""
        entry |= {"status": "refused", "time": None, "memory": None, "reason": reason}
        self.say(f"    {name}: refused: {reason}")
        self.save()

    def _able(self, result: dict[str, Any]) -> list[str]:
        return [name for name, entry in result["providers"].items() if entry["status"] == "ok"]

    def _finish(self, result: dict[str, Any], done: str) -> None:
        result["done"].append(done)
        self.save()

    def _shared(self, workload: Workload, result: dict[str, Any], measure: str) -> None:
        """Measure all providers in one process; without those that brought it down, until it ends
        well.
        """
        while measure not in result["done"]:
            names = self._able(result)
            if not names or self._job(workload, result, measure, names):
                self._finish(result, measure)

    def _job(self, workload: Workload, result: dict, measure: str, names: list[str]) -> bool:
        """Run one process and enter its results; False if a provider failed and is now marked."""
        threads = workload.threads or self.threads
        self.say(f"    {measure}: {', '.join(names)}")
        with tempfile.TemporaryDirectory(prefix="fdd-bench-") as folder:
            events, job = Path(folder) / "events.jsonl", Path(folder) / "job.json"
            events.touch()
            description = {
                "workload": workload.to_json(),
                "measure": measure,
                "providers": names,
                "threads": threads,
                "repeats": workload.repeats or self.repeats,
                "device": self.device,
                "events": str(events),
            }
            job.write_text(json.dumps(description))
            limits = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
            limits |= RETURN_FREED_MEMORY if measure == "memory" else {}
            status, last = _run_job(self.module, job, os.environ | limits)
            running, gathered = None, {}
            for line in events.read_text().splitlines():
                key, value = json.loads(line)
                if key == "running":
                    running = value
                else:
                    gathered[key] = value
        result["products"] = gathered.pop("products", result["products"])
        for name, value in gathered.items():
            result["providers"][name][measure] = value
        if status == 0:
            return True
        reason = f"{measure} ended with signal {-status}" if status < 0 else f"{measure}: {last}"
        if status == -9:
            reason += " (the system ends a process so when memory runs out)"
        for name in [running] if running else names:
            result["providers"][name] |= {"status": "failed", "reason": reason}
            self.say(f"    {name}: failed: {reason}")
        return False


def _run_job(module: str, job: Path, environment: dict[str, str]) -> tuple[int, str]:
    """Run a measuring process; its exit status and the last line that it printed."""
    command = [sys.executable, "-m", module, str(job)]
    with job.with_name("output.txt").open("w+", errors="replace") as output:
        process = subprocess.Popen(
            command, cwd=record.ROOT, env=environment, stdout=output, stderr=output
        )
        try:
            status = process.wait()
        except BaseException:
            process.kill()
            process.wait()
            raise
        output.seek(0)
        return status, (output.read().strip().splitlines() or ["no message"])[-1]


def loss_shape(workload: Workload) -> LossShape:
    """Describe the workload's loss for the memory planner."""
    options = workload.loss_options
    return LossShape(
        rows=workload.rows,
        columns=workload.columns,
        student_width=workload.student_width,
        teacher_width=workload.teacher_width,
        layers=workload.layers,
        itemsize=workload.itemsize,
        train_head=workload.train_head,
        feature_space=workload.feature_space,
        options=LossOptions(**options),
        softcap="student_softcap" in options,
    )


def predicted_memory(workload: Workload, provider: str, **where: Any) -> LossMemory | None:
    """Ask the planner, which knows the loss, and its dense form with the default options alone."""
    unknown = (workload.group == "objectives" and provider == "dense") or workload.pair is not None
    if unknown or workload.objective != LOSS:
        return None
    return loss_memory(loss_shape(workload), provider, **where)


def memory_limit(device: str) -> int:
    """Count the bytes that a measurement may take here."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory
    limits = [record.machine(device).get("memory", 0) or 2**63]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(path).read_text().strip()
        except OSError:
            continue
        limits += [int(text)] if text.isdigit() else []
    return min(limits)


def peaks_on_record(data: dict[str, Any]) -> list[tuple[str, int, int, int | None]]:
    """List (workload / provider, predicted bytes, measured bytes, bytes predicted by the code that
    was measured) of every peak of memory in use.

    The oldest records count memory that an allocator cached besides, and are left out.
    """
    from benchmarks.measure import MEMORY_IN_USE

    found = []
    for result in data["results"]:
        workload = Workload.from_json(result["workload"])
        threads = workload.threads or data["threads"]
        for name, entry in result["providers"].items():
            held = entry["memory"]
            if held and held.get("measure") in MEMORY_IN_USE.values():
                where = {"threads": threads, "device": data["device"]}
                predicted = predicted_memory(workload, name, **where)
                if predicted is not None:
                    peak, then = held["beyond_inputs"], entry["predicted_memory"]
                    found.append((f"{workload.name} / {name}", predicted.total, peak, then))
    return found
