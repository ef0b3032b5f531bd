"""Whether the cache folder, and the store in it, may be used: who can write there decides what plans are made of."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path


class UnsafeFolderError(OSError):
    """Others may write to the cache folder, or what lies there is not a plain file."""


def check(file: Path) -> None:
    """UnsafeFolderError if the folder or the store in it is writable by everyone, belongs to another user, or is a link or a pipe.

    The folder itself may be a link (to a larger disk); what counts is where it leads. Root may use others' folders: containers
    mount them. A group may share a folder: that is its administrator's decision.
    """
    if sys.platform == "win32":
        return
    _check(file.parent, os.stat(file.parent))
    for suffix in ("", "-wal", "-shm"):
        path = file.with_name(f"{file.name}{suffix}")
        try:
            found = os.lstat(path)
        except FileNotFoundError:
            continue
        if not stat.S_ISREG(found.st_mode):
            raise UnsafeFolderError(f"{path} is not a plain file, but a link, a pipe or a folder: remove it")
        _check(path, found)


def check_plain(folder: Path) -> None:
    """UnsafeFolderError if a folder inside the cache folder, or that one, is writable by everyone, of another user, or a link."""
    if sys.platform == "win32":
        return
    _check(folder.parent, os.stat(folder.parent))
    found = os.lstat(folder)
    if not stat.S_ISDIR(found.st_mode):
        raise UnsafeFolderError(f"{folder} is not a plain folder: remove it")
    _check(folder, found)


def check_open(handle: int, path: Path) -> None:
    """UnsafeFolderError if an open file is not a plain one, or others may have written it."""
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode):
        raise UnsafeFolderError(f"{path} is not a plain file, but a link, a pipe or a folder: remove it")
    if sys.platform != "win32":
        _check(path, found)


def _check(path: Path, found: os.stat_result) -> None:
    user = os.geteuid()
    if found.st_mode & stat.S_IWOTH:
        raise UnsafeFolderError(f"everyone may write to {path}: chmod o-w {path}")
    if user != 0 and found.st_uid not in (user, 0):
        raise UnsafeFolderError(f"{path} belongs to another user (uid {found.st_uid})")
