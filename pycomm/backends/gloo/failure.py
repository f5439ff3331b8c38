"""The first failure of a group, seen from one rank: found out, told to the others, remembered.

A rank that fails tells the ranks of its host through the host transport, and all others by frames, before it closes its
connections. So every rank names the root of the failure and not the neighbour that noticed first.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Sequence

from pycomm.backends.causes import LEFT, Cause, heard
from pycomm.backends.gloo.frames import Frame, Frames, Kind
from pycomm.backends.gloo.inquiry import Inquiry
from pycomm.backends.gloo.topology import Topology
from pycomm.backends.gloo.wire import WireError
from pycomm.errors import MismatchError, PycommError

__all__ = ["Failure"]

_GRACE_S = 1.0  # for news of the reason, and for answers, before a rank names what it saw itself
_CUT_S = 3.0  # the same where a peer that lives has closed a connection: it takes its own second before it tells
_LOOK_S = 0.02


class Failure:
    """See the module.

    Args:
        cut: ends all waits of this rank, and of its peers for it.
        tokens: the processes of the group, by rank.
        group: its name.
    """

    def __init__(
        self,
        topology: Topology,
        frames: Frames | None,
        inquiry: Inquiry | None,
        cut: Callable[[Cause], None],
        tokens: Sequence[int],
        group: str,
    ) -> None:
        self.cause: Cause | None = None
        self.left: set[int] = set()  # ranks that have closed their communicator
        self.told: dict[int, Cause] = {}  # why a rank has ended, or will have if it ends now
        self._tokens = tokens
        self._group = group
        self._topology = topology
        self._frames = frames
        self._inquiry = inquiry
        self._cut = cut
        self._lock = threading.RLock()  # a signal handler may come while this thread holds it
        self._known = threading.Event()

    def settle(self, cause: Cause, *, announce: bool) -> Cause:
        """The group cannot go on because of ``cause``, unless it has failed already; returns what counts."""
        cause = cause.rooted(self._tokens)
        with self._lock:
            if self.cause is not None:
                return self.cause
            self.cause = cause
        if announce and self._frames is not None:
            news = Frame(Kind.FAILED, self._topology.rank, body=cause.encode().encode())
            for rank in range(self._topology.world_size):
                if rank != self._topology.rank:
                    self._frames.send(rank, news)
        if cause.roots:  # before anybody is woken, and calls something
            heard(cause.roots, f"{cause.text} (group {self._group!r})")
        self._cut(cause)
        self._known.set()
        return cause

    def of_host(self, error: PycommError, timeout_s: float) -> Cause:
        """What an error of the host transport says, with the numbers of the whole group."""
        return Cause.of_host(error, timeout_s, self._tokens, self._topology.neighbours)

    def mismatch(self, error: MismatchError) -> MismatchError:
        """Of a message inside this host, with the numbers of the whole group."""
        here = self._topology.neighbours
        calls = {here[place]: self.renumbered(call) for place, call in error.calls.items()}
        return MismatchError(self.renumbered(str(error)), calls=calls)

    def renumbered(self, text: str) -> str:
        """A text of the host transport, with the numbers of the whole group."""
        here = self._topology.neighbours
        return re.sub(r"\b(rank |dst=|src=)(\d+)", lambda found: f"{found[1]}{here[int(found[2])]}", text)

    def close(self, reason: str) -> None:
        """From now on nothing can be called; nobody is told."""
        with self._lock:
            self.cause = self.cause or Cause("lost", (self._topology.rank,), reason)

    def of_wire(self, error: WireError, timeout_s: float) -> Cause:
        """Why a connection failed: what its peer, or somebody else, tells within a second; else what is seen here."""
        if error.expired:
            said = f"on another host sent nothing within {timeout_s:g} s"
            return self.expired(error.waited, error.silent, said)
        end = time.monotonic() + _CUT_S
        while self.cause is None and time.monotonic() < end:
            if self._frames is not None and error.rank in self._frames.gone:
                break  # its last frame has been read
            self._known.wait(_LOOK_S)
        return self.cause or self.of_gone(error.rank)

    def expired(self, waited: Sequence[int], silent: Sequence[int], said: str) -> Cause:
        """Ranks of other hosts did not come in time: who is at the root, after a second for answers and other news.

        Args:
            waited: whom this rank waited for.
            silent: whom to name if all of those wait for this rank.
            said: what these did, after their names.
        """
        assert self._inquiry is not None
        self._inquiry.ask(waited)
        end = time.monotonic() + _GRACE_S
        while self.cause is None and time.monotonic() < end:
            self._known.wait(_LOOK_S)
        if self.cause is not None:
            return self.cause
        roots, at_root = self._inquiry.roots(waited)
        return Cause.expired(silent, [token for token, _ in roots], self._tokens, said, at_root)

    def of_gone(self, rank: int) -> Cause:
        """A rank's connection is closed."""
        if rank in self.told:
            return self.told[rank]
        return Cause("lost", (rank,), f"rank {rank} {LEFT if rank in self.left else 'died'}")
