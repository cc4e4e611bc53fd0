"""Files and directories that are there completely or not at all, also after a kill, a power cut or
a full disk.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import filelock

from fdd_kernels.common.errors import UserError

# Beside what is being written, on the same file system, so that a rename is atomic.
UNFINISHED = ".unfinished"
# What is moved there gets these endings: a whole directory while another takes its place, and one
# that is being deleted.
_REPLACED, _REMOVED = ".replaced", ".removed"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems know no sync of a directory, which is complete there without.
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(descriptor)


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        _sync(path)
    _sync(folder)


def clear_unfinished(folder: Path) -> None:
    """Complete what an earlier process had nearly finished in `folder`, and remove what it left
    unfinished.

    A directory that was being replaced when the process was killed is put back under its name, the
    new one where that was complete.
    """
    for old in (folder / UNFINISHED).glob(f"*{_REPLACED}"):
        target = folder / old.name.removesuffix(_REPLACED)
        _complete_replacement(target)
        _delete(old, target)
    shutil.rmtree(folder / UNFINISHED, ignore_errors=True)


def _complete_replacement(target: Path) -> None:
    """Put a directory under its name again if a replacement of it was interrupted between its two
    renames.

    The old one is moved away only when the new one is complete and on disk.
    """
    old, new = _beside(target, _REPLACED), _beside(target)
    if old.exists() and not target.exists():
        (new if new.exists() else old).rename(target)
        _sync(target.parent)


def _beside(target: Path, suffix: str = "") -> Path:
    """Where a directory is kept that is not `target` yet, or no more."""
    return target.parent / UNFINISHED / f"{target.name}{suffix}"


@contextlib.contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """An empty directory to fill; after the block it is `target`, on disk. After an exception there
    is no trace of it.

    A directory `target` that was there is replaced: moved away, and deleted when the new one has
    its name and is on disk. A process that is killed in between leaves both, and the next
    `atomic_directory(target)` or `clear_unfinished` puts the new one under its name.

    Raises:
        OSError: it could not be written; an earlier `target` is intact.
    """
    folder, old = _beside(target), _beside(target, _REPLACED)
    _complete_replacement(target)
    _delete(old, target)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    there = True
    try:
        yield folder
        _sync_tree(folder)
        there = target.exists()
        if there:
            target.rename(old)
            _sync(old.parent)
        folder.rename(target)
        _sync(target.parent)
    except BaseException:
        if target.exists() and (old.exists() or not there):  # the new one has its name already
            target.rename(folder)
        if old.exists():
            old.rename(target)
        shutil.rmtree(folder, ignore_errors=True)
        _remove_if_empty(folder.parent)
        raise
    with contextlib.suppress(OSError):  # what is left of it the next start deletes
        _delete(old, target)
    _remove_if_empty(folder.parent)


def remove_directory(target: Path) -> None:
    """Remove a directory so that no half of it is ever seen under its name, nor an older one that
    it had replaced.
    """
    _beside(target).parent.mkdir(exist_ok=True)
    _delete(_beside(target, _REPLACED), target)
    _delete(target, target)
    _remove_if_empty(_beside(target).parent)


def _delete(folder: Path, target: Path) -> None:
    """Delete `target` or what it replaced, if it is there, under a name by which nothing takes it
    for a whole directory.
    """
    grave = _beside(target, _REMOVED)
    shutil.rmtree(grave, ignore_errors=True)
    if folder.exists():
        folder.rename(grave)
        shutil.rmtree(grave)


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


@contextlib.contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """A path to write to; after the block the file is `target`, on disk. After an exception there
    is no trace of it.

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
        _remove_if_empty(part.parent)


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
    lock = filelock.FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise UserError(f"{folder}: another process is at work in this directory") from None
    except OSError as error:
        raise UserError(f"{folder}: cannot be written to: {error.strerror}") from None
    try:
        yield
    finally:
        lock.release()
