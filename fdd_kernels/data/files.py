"""Which files hold data, and what they hold, in a digest."""

from __future__ import annotations

import hashlib
from pathlib import Path

from fdd_kernels.common.errors import UserError

SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".parquet")
KINDS = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"


def data_files(path: Path) -> list[Path]:
    """The data files that `path` is or holds, in a fixed order. What is hidden (.git,
    .ipynb_checkpoints) holds none.

    Raises:
        UserError: nothing there, or a file of another kind.
    """
    if path.is_dir():
        files = sorted(
            file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file()
        )
        files = [
            file
            for file in files
            if not any(part.startswith(".") for part in file.relative_to(path).parts)
        ]
        if not files:
            raise UserError(f"{path}: no {KINDS} file in this directory")
        return files
    if not path.exists():
        raise UserError(f"{path}: no such file or directory")
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: expected a {KINDS} file, or a directory of them")
    return [path]


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else _digest(file)
        )


def _digest(file) -> str:
    digest = hashlib.sha256()  # Python 3.10
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
