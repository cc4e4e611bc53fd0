"""What a teacher gives, computed once and kept on disk, so that training needs no teacher in memory."""

from fdd_kernels.teacher_cache.cache import TeacherCache
from fdd_kernels.teacher_cache.writer import write_teacher_cache

__all__ = ["TeacherCache", "write_teacher_cache"]
