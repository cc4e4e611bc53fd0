"""`fdd-kernels doctor`: show what is installed and which backends work here. Needs torch and numpy
only.
"""

from __future__ import annotations

import json
import platform
import warnings
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from fdd_kernels.backends import backend_names, why_unavailable
from fdd_kernels.backends.cpu import extension
from fdd_kernels.common.processor import processor
from fdd_kernels.objectives.fdd.api import fused_fdd_loss
from fdd_kernels.version import __version__

# Packages and the features that need them.
PACKAGES = {
    "torch": "everything",
    "numpy": "everything",
    "triton": "the triton backend",
    "transformers": "Distiller, FDDTrainer, demo, distill",
    "accelerate": "FDDTrainer, demo, distill",
    "safetensors": "demo, distill",
    "tokenizers": "demo, distill",
    "rich": "demo, distill",
    "peft": "distill --lora-rank",
    "matplotlib": "demo, plots of plan and benchmarks",
}
INSTRUCTION_SETS = (
    "avx2",
    "fma",
    "avx512f",
    "avx512_bf16",
    "avx512_vnni",
    "amx_bf16",
    "amx_tile",
    "asimd",
    "sve",
    "bf16",
)
ROWS, VOCABULARY, WIDTHS, LAYERS = 6, 131, (16, 24), 3
TOLERANCE = 1e-4


def examine() -> dict[str, Any]:
    """Collect what `fdd-kernels doctor` prints, as JSON-ready values."""
    devices = [torch.device("cuda")] if torch.cuda.is_available() else []
    devices.append(torch.device("cpu"))
    return {
        "fdd_kernels": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "compiler": extension.compiler(),
        "kernels": extension.origin,
        "processor": _processor(),
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count())],
        "backends": {
            name: {d.type: examine_backend(name, d) for d in devices}
            for name in backend_names()
            if name != "auto"
        },
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> dict[str, Any]:
    name, flags = processor()
    return {
        "name": name,
        "threads": torch.get_num_threads(),
        "instruction_sets": [flag for flag in INSTRUCTION_SETS if flag in flags],
        "torch_uses": torch.backends.cpu.get_cpu_capability(),
        "bfloat16_products": extension.kernels is not None and extension.kernels.bf16_gemm(),
    }


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "compute_capability": f"{properties.major}.{properties.minor}",
    }


def examine_backend(name: str, device: torch.device) -> dict[str, Any]:
    """Compare a backend with the reference on a tiny problem on `device`: loss and gradients.

    Returns:
        `works`; `expected`, False if the backend is known not to run here; `reason`, with the
        remedy, None if it works.
    """
    reason = why_unavailable(name, device)
    if reason is not None:
        return {"works": False, "expected": False, "reason": reason}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected, actual = (_run(backend, device) for backend in ("reference", name))
    except Exception as error:  # a broken installation may raise anything
        text = (str(error).strip().splitlines() or [""])[0]
        return {
            "works": False,
            "expected": True,
            "reason": f"{type(error).__name__}: {text}; please report this",
        }
    errors = [
        float((a.double() - e.double()).norm() / e.double().norm())
        for a, e in zip(actual, expected)
    ]
    if not max(errors) < TOLERANCE:
        return {
            "works": False,
            "expected": True,
            "reason": f"wrong by {max(errors):.1e} relative to the reference; please report this",
        }
    return {"works": True, "expected": True, "reason": None}


def _run(backend: str, device: torch.device) -> list[torch.Tensor]:
    """The loss of a tiny problem and its gradients; the same numbers at every call."""
    generator = torch.Generator().manual_seed(0)

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    student_width, teacher_width = WIDTHS
    student = [tensor(ROWS, student_width).requires_grad_() for _ in range(LAYERS + 1)]
    weight = (tensor(VOCABULARY, student_width) / 4).requires_grad_()
    teacher = [tensor(ROWS, teacher_width) for _ in range(LAYERS + 1)]
    loss = fused_fdd_loss(
        student, weight, teacher, tensor(VOCABULARY, teacher_width) / 4, backend=backend
    )
    return [loss.detach(), *torch.autograd.grad(loss, [*student, weight])]


def print_findings(findings: dict[str, Any], *, as_json: bool = False) -> int:
    """Print what `examine` found.

    Returns:
        1 if a backend that should work here does not, else 0.
    """
    results = [result for devices in findings["backends"].values() for result in devices.values()]
    broken = any(result["expected"] and not result["works"] for result in results)
    if as_json:
        print(json.dumps(findings, indent=1))
        return int(broken)
    print(
        f"fdd_kernels {findings['fdd_kernels']}, Python {findings['python']}, {findings['system']}"
    )
    print("\npackages")
    for name, found in findings["packages"].items():
        print(f"  {name:<13} {found or f'missing: needed for {PACKAGES[name]}'}")
    if any(not found for found in findings["packages"].values()):
        print('  remedy: pip install "fdd_kernels[hf]", peft or matplotlib, as needed')
    cpu = findings["processor"]
    sets = ", ".join(cpu["instruction_sets"]) or "none of those looked for"
    print(f"\nprocessor\n  {cpu['name']}, {cpu['threads']} threads")
    print(f"  instruction sets: {sets}; torch uses {cpu['torch_uses']}")
    gemms = "in bfloat16" if cpu["bfloat16_products"] else "converted to float32"
    print(f"  the C++ kernels multiply bfloat16 operands {gemms}")
    print(f"  C++ compiler: {findings['compiler'] or 'none found'}")
    print(f"  C++ kernels: {findings['kernels'] or 'none, see backend cpu'}")
    print("\nGPU")
    for gpu in findings["gpus"]:
        print(
            f"  {gpu['name']}, {gpu['memory_gib']} GiB, compute capability "
            f"{gpu['compute_capability']}"
        )
    if not findings["gpus"]:
        print("  none that torch sees")
    print("\nbackends (loss and gradients of a tiny problem against the reference)")
    for name, devices in findings["backends"].items():
        for device, result in devices.items():
            print(
                f"  {name:<10} on {device:<5} "
                f"{'works' if result['works'] else 'no: ' + result['reason']}"
            )
    return int(broken)
