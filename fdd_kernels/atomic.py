"""Files and directories that are there completely or not at all, also after a kill, a power cut or a full disk."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

# Beside what is being written, on the same file system, so that a rename is atomic.
UNFINISHED = ".unfinished"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        _sync(path)
    _sync(folder)


def clear_unfinished(folder: Path) -> None:
    """Remove what an earlier process left unfinished in `folder`."""
    shutil.rmtree(folder / UNFINISHED, ignore_errors=True)


@contextlib.contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """An empty directory to fill; after the block it is `target`, on disk. After an exception there is no trace of it.

    A directory `target` that was there is replaced.

    Raises:
        OSError: it could not be written; an earlier `target` is intact.
    """
    folder = target.parent / UNFINISHED / target.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
        _sync_tree(folder)
        if target.exists():
            remove_directory(target)
        folder.rename(target)
        _sync(target.parent)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        with contextlib.suppress(OSError):
            folder.parent.rmdir()


def remove_directory(target: Path) -> None:
    """Remove a directory so that no half of it is ever seen under its name."""
    grave = target.parent / UNFINISHED / f"{target.name}.removed"
    shutil.rmtree(grave, ignore_errors=True)
    grave.parent.mkdir(exist_ok=True)
    target.rename(grave)
    shutil.rmtree(grave)
    with contextlib.suppress(OSError):
        grave.parent.rmdir()


def write_text(target: Path, text: str) -> None:
    """Write a file that is there completely or not at all.

    Raises:
        OSError: it could not be written; an earlier `target` is intact.
    """
    part = target.with_name(f".{target.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        _sync(part)
        part.replace(target)
        _sync(target.parent)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
