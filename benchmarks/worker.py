"""A process of its own for one measurement: `python -m benchmarks.worker JOB.json`, started by
`runner.py`.

It writes one JSON line per event to the file named in the job, so that what was finished survives a
crash.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import check_accuracy, measure_memory, time_workload
from benchmarks.providers import PROVIDERS
from benchmarks.workloads import Workload


def main(job_file: str) -> None:
    """Do the job and report."""
    job: dict[str, Any] = json.loads(Path(job_file).read_text())
    torch.set_num_threads(job["threads"])
    workload = Workload.from_json(job["workload"])
    providers = [PROVIDERS[name] for name in job["providers"]]
    device = torch.device(job["device"])
    with open(job["events"], "a") as events:

        def report(key: str, value: Any) -> None:
            events.write(json.dumps([key, value]) + "\n")
            events.flush()

        if job["measure"] == "time":
            time_workload(workload, providers, job["repeats"], device, report)
        elif job["measure"] == "accuracy":
            check_accuracy(workload, providers, device, report)
        else:
            (provider,) = providers
            measure_memory(workload, provider, device, report)


if __name__ == "__main__":
    main(sys.argv[1])
