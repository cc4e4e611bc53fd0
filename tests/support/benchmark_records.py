"""Benchmark records with made-up figures."""

import json

from benchmarks import record
from benchmarks.workloads import GPT2


def spread(median, noise=0.02):
    ends = {"min": median * (1 - noise), "max": median * (1 + noise)}
    return {"median": median, "all": [median]} | ends


def entry(total=2.0, memory=100 * 2**20, status="ok", reason=None):
    found = {"computes": "the whole objective", "status": status, "reason": reason}
    found |= {"predicted_memory": 105 * 2**20}
    if status != "ok":
        return found | dict.fromkeys(("time", "memory", "accuracy"))
    time = {"forward": spread(total / 2), "total": spread(total), "warm_up": total}
    time |= {"tokens_per_second": 4.0, "check": {"passed": True}}
    accuracy = {"value_error": 1e-7, "grad_hidden_relative": 1e-6, "of_budget": 0.5, "passed": True}
    memory = {"beyond_inputs": memory, "gradients": 2**20}
    return found | {"time": time, "memory": memory, "accuracy": accuracy}


def synthetic(workload=GPT2, **providers):
    gemms = {"forward": 0.4, "total": 1.0, "input_dtype_total": 1.0}
    gemms |= {"operations": {"forward": 1, "total": 10**9}}
    providers = providers or {"dense": entry(8.0), "cpu": entry()}
    workload = json.loads(json.dumps(workload.to_json()))
    result = {"workload": workload, "products": gemms, "done": [], "providers": providers}
    return {
        "format": record.FORMAT,
        "suite": "quick",
        "date": "2026-01-02T03:04:05+00:00",
        "device": "cpu",
        "threads": 2,
        "machine": {"processor": "some processor", "cores": 2},
        "versions": {"torch": "2", "fdd_kernels": "0"},
        "git": {"revision": "abcdef0123456789", "changed": False},
        "sources": "0",
        "interruptions": 0,
        "results": [result],
    }


def write(path, data):
    record.save(path, data)
    return path
