"""The exceptions of pycomm.

Wrong arguments raise :class:`ValueError` or :class:`TypeError` on the rank that gave them, before anything is sent.
Everything that concerns other ranks is a :class:`PycommError`. docs/errors.md says when each one occurs and what to
do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

__all__ = [
    "BackendUnavailableError",
    "MismatchError",
    "PeerLostError",
    "PeerTimeoutError",
    "PycommError",
    "ScheduleError",
    "StrictOrderError",
]


class PycommError(RuntimeError):
    """Base of all errors of pycomm that are not about a wrong argument."""

    # Of a loss or a timeout: the processes at the root of it, by their tokens, and what happened to them.
    _root: tuple[Sequence[int], str] = ((), "")


class PeerTimeoutError(PycommError, TimeoutError):
    """Ranks did not arrive before the deadline. The communicator cannot be used any more.

    Attributes:
        op: what this rank was doing, such as ``"all_reduce(sum, float32[1024])"``.
        seq: the sequence number of that call in its group, from 1.
        group: the communicator's name.
        missing_ranks: the ranks at the root of the wait; those of ``group`` that wait for it, if the root is in none of
            its ranks. The message names it then.
    """

    def __init__(
        self, message: str, *, op: str = "", seq: int = 0, group: str = "", missing_ranks: Sequence[int] = ()
    ) -> None:
        super().__init__(message)
        self.op = op
        self.seq = seq
        self.group = group
        self.missing_ranks = list(missing_ranks)


class PeerLostError(PycommError, ConnectionError):
    """Ranks died, left or aborted while this rank waited for them. The communicator cannot be used any more.

    Attributes:
        lost_ranks: the ranks at the root of the failure; those of ``group`` that brought the news here, if the root is
            in none of its ranks. The message names it then.
        group: the name of the communicator whose ranks these are; empty while it is being made.
    """

    def __init__(self, message: str, *, lost_ranks: Sequence[int] = (), group: str = "") -> None:
        super().__init__(message)
        self.group = group
        self.lost_ranks = list(lost_ranks)


class MismatchError(PycommError):
    """Ranks called different operations, or one operation with different arguments. Nothing was written; all may go on.

    Attributes:
        calls: rank -> what it called.
    """

    def __init__(self, message: str, *, calls: Mapping[int, str] | None = None) -> None:
        super().__init__(message)
        self.calls = dict(calls or {})


class BackendUnavailableError(PycommError):
    """The back end that was asked for cannot work here; the message says why."""


class StrictOrderError(PycommError):
    """``strict=True``: NCCL would hang here. Either calls were issued in different orders, of which nothing was written
    and all may go on; or blocking calls wait for each other, and their communicators cannot be used any more."""


class ScheduleError(PycommError):
    """A pipeline schedule is not valid; the message names the rank, the action and the cycle."""
