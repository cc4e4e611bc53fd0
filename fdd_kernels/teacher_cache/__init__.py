"""What a teacher gives, computed once and kept on disk, so that training needs no teacher in
memory.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fdd_kernels.teacher_cache.cache import TeacherCache, WindowCache
    from fdd_kernels.teacher_cache.opening import open_teacher_cache
    from fdd_kernels.teacher_cache.statistics import StatisticsCache, write_statistics_cache
    from fdd_kernels.teacher_cache.writer import write_teacher_cache

__all__ = [
    "StatisticsCache",
    "TeacherCache",
    "WindowCache",
    "open_teacher_cache",
    "write_statistics_cache",
    "write_teacher_cache",
]

# Imported when asked for, so that `fdd-kernels cache-teacher --help` does not wait for torch.
_HOMES = {
    "StatisticsCache": "statistics",
    "TeacherCache": "cache",
    "WindowCache": "cache",
    "open_teacher_cache": "opening",
    "write_statistics_cache": "statistics",
    "write_teacher_cache": "writer",
}


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
