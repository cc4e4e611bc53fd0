"""Files and directories that are there completely or not at all, also after a kill, a power cut or a full disk."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from fdd_kernels.user_error import UserError

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


@contextlib.contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """A path to write to; after the block the file is `target`, on disk. After an exception there is no trace of it.

    The path is in a directory of its own, for what libraries put beside the files that they write.

    Raises:
        OSError: it could not be written; an earlier `target` is intact.
    """
    part = target.parent / UNFINISHED / target.name
    part.parent.mkdir(exist_ok=True)
    try:
        yield part
        _sync(part)
        part.replace(target)
        _sync(target.parent)
    finally:
        part.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            part.parent.rmdir()


def write_text(target: Path, text: str) -> None:
    """Write a file that is there completely or not at all.

    Raises:
        OSError: it could not be written; an earlier `target` is intact.
    """
    with atomic_file(target) as part:
        part.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def only_process(folder: Path) -> Iterator[None]:
    """Refuse to share `folder` with a process that is still at work; a killed one holds nothing.

    Raises:
        UserError: the directory cannot be written to, or another process works there.
    """
    try:
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written to: {error.strerror}") from None
    with lock as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{folder}: another process is at work in this directory") from None
        yield
