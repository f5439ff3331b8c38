"""Files that a run writes: errors told in one line, and the cache, which nobody else may have written.

What lies in the cache decides what a model learns, so its folder has to be this user's alone: one that others may write
into, or that somebody else has made, is refused and not used.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException

from pycomm.errors import PycommError
from pycomm.pretrain.config import PretrainError, printable

_BLOCK_BYTES = 1 << 20


class FileError(PretrainError):
    """A file of the run cannot be read or written; the message says which, why and what to do."""


@contextmanager
def file_errors(what: str, advice: str) -> Iterator[None]:
    """Turns an OSError of the block into a :class:`FileError`.

    Args:
        what: is being read or written, with the flag that it comes from.
        advice: what to do about it.
    """
    try:
        yield
    except PycommError:  # some are a ConnectionError or a TimeoutError too
        raise
    except (OSError, CheckpointException) as error:
        cause = _os_error(error)
        if cause is None:
            raise
        where = f" ({printable(os.fsdecode(cause.filename))})" if isinstance(cause.filename, str | bytes) else ""
        raise FileError(f"{what}: {cause.strerror or cause}{where}; {advice}") from error


def _os_error(error: BaseException | None) -> OSError | None:
    """The error of the system beneath: torch's checkpoints wrap it, one error a rank, and their archives hide it."""
    while error is not None and not isinstance(error, OSError):
        if isinstance(error, CheckpointException):
            error = next((failure for failure, _ in error.failures.values()), None)
        else:
            error = error.__cause__ or error.__context__
    return error


def own_folder(path: Path) -> Path:
    """The folder, created if needed (for this user alone), after a check that nobody else can write into it.

    Raises:
        FileError: somebody else owns it or may write into it, or it cannot be created.
    """
    advice = "set PYCOMM_CACHE_DIR to a folder of your own"
    shown = printable(str(path))
    if shown != str(path):
        raise FileError(f"the cache {shown}: its name is not UTF-8; {advice}")
    with file_errors(f"the cache {shown}", advice):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.stat()
    if found.st_uid != os.geteuid():
        raise FileError(
            f"the cache {shown} belongs to user {found.st_uid} and you are {os.geteuid()}: its owner "
            f"could choose what your model learns; {advice}"
        )
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise FileError(
            f"the cache {shown} can be written by other users (mode {stat.S_IMODE(found.st_mode):o}), who "
            f"could choose what your model learns: take that right away (chmod go-w), or {advice}"
        )
    return path


def checksum(path: Path, algorithm: str) -> str:
    """Hex digest of a file; ``algorithm`` is one of hashlib's."""
    digest = hashlib.new(algorithm)
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock that the file stands for; it is created if needed, never followed as a link and never written.

    The lock belongs to the open file: the kernel drops it when its holder ends, however it ends.
    """
    with file_errors(f"the lock {printable(str(path))}", "remove it if it is a link or no file of yours"):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
