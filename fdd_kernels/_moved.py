"""Resolve old module paths for one release, with a DeprecationWarning.

An old path gives the names of the new module, and old names by `SPLIT` and `RENAMED`. Internals
whose signature has changed are gone, since an old call of them would be a misleading TypeError;
tests/spec/test_moved.py lists them.
"""

from __future__ import annotations

import importlib
import sys
import types
import warnings
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import ClassVar

# Old path: new path, both below fdd_kernels.
MOVED = {
    "atomic": "common.atomic",
    "progress": "common.progress",
    "heartbeat": "common.heartbeat",
    "sizes": "common.sizes",
    "environment": "common.environment",
    "user_error": "common.errors",
    "spec": "lens.spec",
    "divergences": "lens.divergences",
    "distances": "lens.distances",
    "_extension": "backends.cpu.extension",
    "ops": "engine.ops",
    "functions": "engine.autograd",
    "merge": "engine.shards",
    "vocab_parallel": "engine.vocab_parallel",
    "api": "objectives.fdd.api",
    "config": "objectives.fdd.options",
    "plan": "objectives.fdd.plan",
    "terms": "objectives.fdd.terms",
    "reference": "objectives.fdd.reference",
    "teacher_statistics": "objectives.fdd.summary",
    "models.batches": "hf.batches",
    "models.capture": "hf.capture",
    "models.compiled": "hf.compiled",
    "models.heads": "hf.heads",
    "models.offload": "hf.offload",
    "models.positions": "hf.positions",
    "models.routers": "hf.routers",
    "models.sharing": "hf.sharing",
    "models.tail": "hf.tail",
    "models.teachers": "hf.teachers",
    "models.lens": "hf.model_reader",
    "models.parallel": "hf.wrappers",
    "models": "hf",
    "distiller": "hf.distiller",
    "layers": "hf.layers",
    "planner.loss": "memory.loss",
    "planner.models": "memory.models",
    "planner.step": "memory.step",
    "planner.command": "cli.plan",
    "planner": "memory",
    "doctor": "cli.doctor",
    "loading": "cli.loading",
    "vocabulary": "cli.vocabulary",
    "teacher_options": "cli.teacher_options",
    "parsing": "cli.parsing",
    "distill_command.run": "cli.distill.run",
    "distill_command.run_folder": "cli.distill.run_folder",
    "distill_command.options": "cli.distill.options",
    "distill_command.processes": "cli.distill.processes",
    "distill_command.identity": "cli.distill.identity",
    "distill_command.model_card": "integrations.model_card",
    "distill_command": "cli.distill",
    "teacher_cache.cache": "teacher_cache.hidden",
    "teacher_cache.command": "cli.cache_teacher",
    "teacher_cache.index": "teacher_cache.format",
    "teacher_cache.opening": "teacher_cache",
    "teacher_cache.options": "cli.cache_options",
    "teacher_cache.statistics": "teacher_cache.summary",
    "teacher_cache.storage": "teacher_cache.writer",
    "data.progress": "cli.reading",
}
# Further modules with names of an old one that was split.
SPLIT = {
    "functions": ("engine.cached_logits", "engine.log_sum_exps"),
    "plan": ("objectives.validation", "objectives.numbers"),
    "spec": ("lens.layout", "lens.inputs"),
    "terms": ("objectives.fdd.objective", "objectives.reduction"),
    "vocab_parallel": ("engine.shards", "engine.agreement"),
    "models.lens": ("hf.transform",),
    "distill_command.run": ("cli.distill.trainer",),
    "teacher_cache.cache": ("teacher_cache.reader",),
}
# Names that are called otherwise now.
RENAMED = {
    "models.positions.counted_positions": "hf.positions.valid_positions",
    "distill_command.run._ResumableTrainer": "cli.distill.trainer.ResumableTrainer",
    "models.positions.counting_rows": "hf.positions.ignore_rows_from",
    "planner.loss.HEAD_PRODUCT_BYTES": "memory.loss.HEAD_GEMM_BYTES",
    "spec.READ_STATS": "lens.layout.REQUEST_STATS",
    "teacher_cache.index.plan_shards": "teacher_cache.format.split_into_shards",
    "terms.combine": "objectives.fdd.objective.reduce_terms",
    "terms.divisor_of": "objectives.reduction.safe_denominator",
    "vocab_parallel.SENT_READ_STATS": "engine.shards.SENT_REQUEST_STATS",
    "vocab_parallel.second_pass_reads": "engine.shards.second_pass_requests",
}


def new_path(old: str) -> str:
    """The path that has taken the place of fdd_kernels.`old`."""
    return f"fdd_kernels.{MOVED[old]}"


class _MovedModule(types.ModuleType):
    """A module at an old path. It looks every name up in the new module."""

    # Makes it a package, so that modules below it are looked for in MOVED too.
    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str):
        old = self.__name__.removeprefix("fdd_kernels.")
        full = f"{old}.{name}"
        # A module below is imported, with a note of its own. `inspect` looks for __file__ in every
        # module, also in the middle of an import, and must not import another.
        if full in MOVED or (name.startswith("__") and name != "__all__"):
            raise AttributeError(name)
        module = importlib.import_module(new_path(old))
        if name == "__all__":
            return [public for public in dir(module) if not public.startswith("_")]
        if full in RENAMED:
            home, _, name = RENAMED[full].rpartition(".")
            return getattr(importlib.import_module(f"fdd_kernels.{home}"), name)
        if full == "config.BACKENDS":
            return importlib.import_module("fdd_kernels.backends").backend_names()
        for home in SPLIT.get(old, ()):
            other = importlib.import_module(f"fdd_kernels.{home}")
            if not hasattr(module, name) and hasattr(other, name):
                return getattr(other, name)
        return getattr(module, name)

    def __dir__(self) -> list[str]:
        return dir(importlib.import_module(new_path(self.__name__.removeprefix("fdd_kernels."))))


class _Finder(MetaPathFinder, Loader):
    """Find the modules of `MOVED`."""

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        is_moved = name.startswith("fdd_kernels.") and name.removeprefix("fdd_kernels.") in MOVED
        return ModuleSpec(name, self) if is_moved else None

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        old = spec.name.removeprefix("fdd_kernels.")
        if not any(path.startswith(f"{old}.") for path in MOVED):  # else the module below warns
            warnings.warn(
                f"{spec.name} is now {new_path(old)}; the old path works until the next release",
                DeprecationWarning,
                stacklevel=2,
            )
        return _MovedModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Do nothing: names are looked up when they are asked for."""


def install() -> None:
    """Make the old paths importable. Costs nothing until one is imported."""
    sys.meta_path.append(_Finder())
