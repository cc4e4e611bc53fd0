"""Write files and directories completely or not at all, also across a kill, a power cut or a full
disk.
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

# The folder for unfinished files, beside the target: on the same file system a rename is atomic.
UNFINISHED = ".unfinished"
# Endings of directories moved there: an old one while it is replaced, and one being deleted.
_REPLACED, _REMOVED = ".replaced", ".removed"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot sync a directory and do not need to.
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(descriptor)


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        _sync(path)
    _sync(folder)


def clear_unfinished(folder: Path) -> None:
    """Complete or remove what an earlier process left unfinished in `folder`.

    A directory that was being replaced when the process was killed gets its name back: the new one
    if it was complete, else the old one.
    """
    for old in (folder / UNFINISHED).glob(f"*{_REPLACED}"):
        target = folder / old.name.removesuffix(_REPLACED)
        _complete_replacement(target)
        _delete(old, target)
    shutil.rmtree(folder / UNFINISHED, ignore_errors=True)


def _complete_replacement(target: Path) -> None:
    """Finish a replacement of `target` that was interrupted between its two renames.

    The old directory is moved away only when the new one is complete and on disk.
    """
    old, new = _unfinished(target, _REPLACED), _unfinished(target)
    if old.exists() and not target.exists():
        (new if new.exists() else old).rename(target)
        _sync(target.parent)


def _unfinished(target: Path, suffix: str = "") -> Path:
    """The path of a directory that is not yet, or no longer, `target`."""
    return target.parent / UNFINISHED / f"{target.name}{suffix}"


@contextlib.contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Yield an empty directory to fill; after the block it is `target`, on disk. After an exception
    no trace of it is left.

    An existing `target` is moved away and deleted once the new directory has its name and is on
    disk. A process killed in between leaves both, and the next `atomic_directory(target)` or
    `clear_unfinished` gives the new one its name.

    Raises:
        OSError: it could not be written; an earlier `target` is intact.
    """
    folder, old = _unfinished(target), _unfinished(target, _REPLACED)
    _complete_replacement(target)
    _delete(old, target)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    existed = True
    try:
        yield folder
        _sync_tree(folder)
        existed = target.exists()
        if existed:
            target.rename(old)
            _sync(old.parent)
        folder.rename(target)
        _sync(target.parent)
    except BaseException:
        if target.exists() and (old.exists() or not existed):  # the new one has its name already
            target.rename(folder)
        if old.exists():
            old.rename(target)
        shutil.rmtree(folder, ignore_errors=True)
        _remove_if_empty(folder.parent)
        raise
    with contextlib.suppress(OSError):  # the next start deletes what is left of it
        _delete(old, target)
    _remove_if_empty(folder.parent)


def remove_directory(target: Path) -> None:
    """Remove a directory, and an older one that it replaced, so that a part of it is never seen
    under its name.
    """
    _unfinished(target).parent.mkdir(exist_ok=True)
    _delete(_unfinished(target, _REPLACED), target)
    _delete(target, target)
    _remove_if_empty(_unfinished(target).parent)


def _delete(folder: Path, target: Path) -> None:
    """Delete `folder` (`target` or the directory it replaced), if it exists, under a name that
    marks it as incomplete.
    """
    removed = _unfinished(target, _REMOVED)
    shutil.rmtree(removed, ignore_errors=True)
    if folder.exists():
        folder.rename(removed)
        shutil.rmtree(removed)


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


@contextlib.contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield a path to write to; after the block the file is `target`, on disk. After an exception
    no trace of it is left.

    The path lies in a directory of its own, since libraries may write further files beside it.

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
    """Write a text file completely or not at all.

    Raises:
        OSError: it could not be written; an earlier `target` is intact.
    """
    with atomic_file(target) as part:
        part.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def only_process(folder: Path) -> Iterator[None]:
    """Lock `folder` while the block runs. The lock of a killed process is released.

    Raises:
        UserError: the directory cannot be written to, or another process holds the lock.
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
