"""Find data files and compute digests of files."""

from __future__ import annotations

import hashlib
from pathlib import Path

from fdd_kernels.common.errors import UserError

SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".parquet")
KINDS = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"


def data_files(path: Path) -> list[Path]:
    """List the data files at or below `path`, in a fixed order. Hidden folders (.git,
    .ipynb_checkpoints) are skipped.

    Raises:
        UserError: there is none, or the file is of another kind.
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
    """Compute SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()  # hashlib.file_digest needs Python 3.11
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
