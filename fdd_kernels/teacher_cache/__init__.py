"""What a teacher gives, computed once and kept on disk, so that training needs no teacher in memory."""

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
