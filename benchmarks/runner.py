"""A whole run: every workload with every provider, each measurement in its own process, finished
ones kept on the way.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from benchmarks.providers import Provider
from benchmarks.workloads import Workload
from fdd_kernels.memory.loss import LossShape, loss_memory

GIB = 2**30
# glibc puts tensors of up to 32 MiB where it keeps what is freed, more or less of it from run to
# run. With a fixed threshold it gives them back, so that the high-water mark is that of memory in
# use, as max_memory_allocated is on a GPU.
RETURN_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**16)}
DEFAULT_REPEATS = {"tiny": 2, "quick": 3, "full": 3, "limits": 3}


class Run:
    """The state of a run: a record that grows, written after every measurement.

    Args:
        folder: where the record goes; an unfinished one there with the same settings is continued.
        suite, workloads, providers, threads, repeats, device: what to measure.
        say: called with one line per step.
    """

    def __init__(
        self,
        folder: Path,
        suite: str,
        workloads: list[Workload],
        providers: list[Provider],
        *,
        threads: int,
        repeats: int,
        device: str,
        fresh: bool = False,
        say=print,
    ):
        self.folder, self.suite, self.workloads, self.providers = (
            folder,
            suite,
            workloads,
            providers,
        )
        self.threads, self.repeats, self.device, self.say = threads, repeats, device, say
        self.missing = {p.name: p.unavailable(torch.device(device)) for p in providers}
        self.path = folder / record.PARTIAL
        self.record = self._continue(fresh) or self._start()

    def _settings(self) -> dict[str, Any]:
        """What must be the same for an unfinished run to be continued."""
        return {
            "format": record.FORMAT,
            "suite": self.suite,
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
        return self._settings() | {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "git": record.git_revision(),
            "providers": {
                p.name: {
                    "title": p.title,
                    "version": p.version(),
                    "unavailable": self.missing[p.name],
                }
                for p in self.providers
            },
            "interruptions": 0,
            "results": [],
        }

    def _continue(self, fresh: bool) -> dict[str, Any] | None:
        if fresh or not self.path.exists():
            return None
        found = record.load(self.path)
        settings = json.loads(json.dumps(self._settings()))
        different = [key for key, value in settings.items() if found.get(key) != value]
        if different:
            raise record.RecordError(
                f"{self.path}: is an unfinished run with other {', '.join(different)}; pass "
                "--fresh to discard it, or "
                "another --output"
            )
        finished = sum(len(r["done"]) for r in found["results"])
        self.say(f"continuing an unfinished run: {finished} measurements are kept")
        found["interruptions"] += 1
        return found

    def save(self) -> None:
        record.save(self.path, self.record)

    def execute(self) -> Path:
        """Measure what is missing; the path of the finished record."""
        self.save()
        for number, workload in enumerate(self.workloads, 1):
            self.say(f"[{number}/{len(self.workloads)}] {workload.name}: {workload.describe()}")
            self._workload(workload)
        stamp = datetime.fromisoformat(self.record["date"]).strftime("%Y%m%d-%H%M%S")
        final = self.folder / f"{stamp}-{self.suite}.json"
        record.save(final, self.record)
        self.path.unlink()
        return final

    def _result(self, workload: Workload) -> dict[str, Any]:
        for result in self.record["results"]:
            if result["workload"]["name"] == workload.name:
                return result
        result = {
            "workload": json.loads(json.dumps(workload.to_json())),
            "products": None,
            "providers": {},
            "done": [],
        }
        names = workload.providers
        for provider in self.providers:
            if names is None or provider.name in names:
                result["providers"][provider.name] = self._entry(provider, workload)
        self.record["results"].append(result)
        return result

    def _entry(self, provider: Provider, workload: Workload) -> dict[str, Any]:
        """An empty result, with its reason if there will be none."""
        entry = {
            "computes": provider.part(workload),
            "status": "ok",
            "reason": None,
            "predicted_memory": None,
        }
        entry |= {"time": None, "memory": None, "accuracy": None}
        reason, status = self.missing[provider.name], "missing"
        if reason is None:
            reason, status = provider.unsupported(workload), "unsupported"
        prediction = loss_memory(
            loss_shape(workload),
            provider.name,
            threads=workload.threads or self.threads,
            device=self.device,
            device_memory=memory_limit(self.device) if self.device == "cuda" else None,
        )
        if prediction is not None:
            entry["predicted_memory"] = prediction.total
            needed, there = prediction.total + prediction.inputs, memory_limit(self.device)
            if reason is None and needed > there:
                reason = (
                    f"predicted to need {needed / GIB:.1f} GiB ({prediction.arithmetic()}), "
                    f"this machine has {there / GIB:.1f} GiB"
                )
                status = "too large"
        if reason is not None:
            entry |= {"status": status, "reason": reason}
        return entry

    def _workload(self, workload: Workload) -> None:
        result = self._result(workload)
        for name, entry in result["providers"].items():
            if entry["status"] != "ok" and entry["reason"] and not entry.get("said"):
                self.say(f"    {name}: {entry['status']}: {entry['reason']}")
                entry["said"] = True
        if "accuracy" in workload.measures:
            self._shared(workload, result, "accuracy")
            for name, entry in result["providers"].items():
                if entry["accuracy"] and not entry["accuracy"]["passed"]:
                    self._refuse(
                        entry, name, "accuracy", entry["accuracy"]["of_budget"], "times the budget"
                    )
        if "time" in workload.measures:
            self._shared(workload, result, "time")
            for name, entry in result["providers"].items():
                if entry["time"] and not entry["time"]["check"]["passed"]:
                    self._refuse(
                        entry,
                        name,
                        "the timed call's gradient",
                        entry["time"]["check"]["error"],
                        "relative error",
                    )
        if "memory" in workload.measures:
            for name in self._able(result):
                if f"memory {name}" not in result["done"]:
                    self._job(workload, result, "memory", [name])
                    self._finish(result, f"memory {name}")

    def _refuse(self, entry: dict, name: str, what: str, number: float, of: str) -> None:
        """Take the figures of a provider whose answer is wrong out of the record."""
        entry |= {"status": "refused", "time": None, "memory": None}
        entry["reason"] = f"{what} is wrong: {number:.3g} {of}"
        self.say(f"    {name}: refused: {entry['reason']}")
        self.save()

    def _able(self, result: dict[str, Any]) -> list[str]:
        return [name for name, entry in result["providers"].items() if entry["status"] == "ok"]

    def _finish(self, result: dict[str, Any], what: str) -> None:
        result["done"].append(what)
        self.save()

    def _shared(self, workload: Workload, result: dict[str, Any], measure: str) -> None:
        """A measurement of all providers in one process; one that brings it down is marked and left
        out of the next try.
        """
        while measure not in result["done"]:
            names = self._able(result)
            if not names or self._job(workload, result, measure, names):
                self._finish(result, measure)

    def _job(
        self, workload: Workload, result: dict[str, Any], measure: str, names: list[str]
    ) -> bool:
        """Run one process and take in what it reports; False if a provider failed and is now
        marked.
        """
        threads = workload.threads or self.threads
        self.say(f"    {measure}: {', '.join(names)}")
        with tempfile.TemporaryDirectory(prefix="fdd-bench-") as folder:
            events, job, errors = (
                Path(folder) / name for name in ("events.jsonl", "job.json", "errors.txt")
            )
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
            environment = os.environ | {
                "OMP_NUM_THREADS": str(threads),
                "MKL_NUM_THREADS": str(threads),
            }
            if measure == "memory":
                environment |= RETURN_FREED_MEMORY
            with errors.open("w") as stderr:
                process = subprocess.Popen(
                    [sys.executable, "-m", "benchmarks.worker", str(job)],
                    cwd=record.ROOT,
                    env=environment,
                    stderr=stderr,
                    stdout=stderr,
                )
                try:
                    status = process.wait()
                except BaseException:
                    process.kill()
                    process.wait()
                    raise
            running, gathered = None, {}
            for line in events.read_text().splitlines():
                key, value = json.loads(line)
                if key == "running":
                    running = value
                else:
                    gathered[key] = value
            last = (errors.read_text(errors="replace").strip().splitlines() or ["no message"])[-1]
        products = gathered.pop("products", None)
        if products is not None:
            result["products"] = products
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


def loss_shape(workload: Workload) -> LossShape:
    """The workload's loss as the planner sees it."""
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
        output_in_dynamics=bool(options.get("output_in_dynamics")),
        trajectory=options.get("trajectory", "kl") if options.get("alpha", 1) else None,
        derivative=options.get("derivative", "cosine") if options.get("beta", 1) else None,
        softcap="student_softcap" in options,
    )


def memory_limit(device: str) -> int:
    """Bytes that a measurement may take here."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory
    limit = record.machine(device).get("memory", 0) or 2**63
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(path).read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            limit = min(limit, int(text))
    return limit
