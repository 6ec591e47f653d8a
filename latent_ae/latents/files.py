"""Files that appear whole or not at all, and a folder that one run at a time may write."""

from __future__ import annotations

import errno
import hashlib
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from latent_ae.errors import UserError

__all__ = ["FolderLock", "disk_full_is_told", "sha256_of", "write_whole"]

LOCK = ".lock"


def write_whole(path: Path, write: bytes | Callable[[Path], Any]) -> None:
    """Writes a file aside, waits for the disk, renames.

    Args:
        path: the file.
        write: its content, or what writes it to the path that it is given.

    Raises:
        UserError: the disk is full; nothing of the file is left.
    """
    # By host and process: after a kill another process may be writing the same shard.
    aside = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    try:
        with disk_full_is_told(path):
            if isinstance(write, bytes):
                aside.write_bytes(write)
            else:
                write(aside)
                aside.chmod(0o666 & ~_umask())  # safetensors leaves its files to the owner alone
            with aside.open("rb+") as file:
                os.fsync(file.fileno())
            aside.rename(path)
            _sync_folder(path.parent)
    except BaseException:  # Ctrl-C too
        aside.unlink(missing_ok=True)
        raise


@contextmanager
def disk_full_is_told(path: Path) -> Iterator[None]:
    """Turns the system's complaint of a full disk into a `UserError` about `path`."""
    try:
        yield
    except Exception as error:
        # safetensors wraps the system's error in one of its own.
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if full or any(word in str(error) for word in ("No space left", "os error 28")):
            raise UserError(
                f"the disk is full: {path} could not be written. What is whole stays; make room "
                "and run the same command again"
            ) from error
        raise


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    """Waits until the disk knows the name too; some file systems cannot say."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


class FolderLock:
    """Keeps a second run out of a folder, for as long as a process of the first one lives.

    Each process of a run locks a byte of its own; a new run must find all of them free. POSIX
    record locks, not `flock` (nor a library that uses it): the loader's workers are forked, and
    would inherit an `flock` and hold it after their parent was killed. They work on NFS too.

    Raises:
        UserError: another run has the folder.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        import fcntl

        self.path, self.fcntl = folder / LOCK, fcntl
        self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if rank == 0:
                fcntl.lockf(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # all bytes
                fcntl.lockf(self._handle, fcntl.LOCK_UN, 0, 1)  # but the first are the others'
            fcntl.lockf(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank)
        except OSError as error:
            os.close(self._handle)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise UserError(f"another run is writing into {folder}; wait, or stop it") from None
            raise UserError(f"{self.path} cannot be locked: {error.strerror}") from error

    def release(self, remove: bool = False) -> None:
        """Lets others in; with `remove` the lock's file goes too."""
        if self._handle >= 0:
            if remove:
                self.path.unlink(missing_ok=True)
            os.close(self._handle)
            self._handle = -1
