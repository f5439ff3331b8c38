"""For whom ranks of other hosts wait: a rank that misses them for a while asks them, as it looks into shared memory for
those of its own host (csrc/host/groups.hpp, which says who is at the root of a wait).

The thread that reads frames answers, so a rank answers while its callers wait, and does not if its process is stopped:
whoever is silent for a second is at the root itself. A process answers with what it shows on its own host, and shows
there what others have answered, so that a root is carried on by every process that it passes.
"""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from pycomm import _C
from pycomm.backends.causes import Heard
from pycomm.backends.gloo.frames import BODY_BYTES, Frame, FrameError, Kind

__all__ = ["Inquiry"]

_SILENT_S = 0.9  # without an answer; below the time that a rank takes at its deadline (failure.py)
_STALE_S = 2.0  # of an answer to a question of an earlier wait
_ROOT = struct.Struct("<QI")  # token, hops
_MOST_ROOTS = 64  # in an answer

Roots = list[tuple[int, int]]  # processes, by their tokens, and over how many others


@dataclass
class _Asked:
    """A rank. ``asked_at``: of a question that it has not answered; 0: of none."""

    asked_at: float = 0.0
    answered_at: float = 0.0
    is_waiting: bool = False
    roots: tuple[tuple[int, int], ...] = ()
    text: str = ""


class Inquiry:
    """One rank's questions and answers.

    Args:
        tokens: the processes of the group, by rank.
        send: a frame to a rank.
        missing: the ranks of other hosts that operations wait for which a caller waits for.
        heard: of this rank.
    """

    def __init__(
        self,
        rank: int,
        group: str,
        tokens: Sequence[int],
        send: Callable[[int, Frame], None],
        missing: Callable[[], Collection[int]],
        heard: Heard,
    ) -> None:
        self._rank = rank
        self._group = group
        self._tokens = tokens
        self._send = send
        self._missing = missing
        self._heard = heard
        self._lock = threading.RLock()  # a signal handler may come while this thread holds it
        self._asked: dict[int, _Asked] = {}
        self._shown: _C.ShownWait | None = None
        _C.expect_ranks(len(tokens))

    def look(self) -> None:
        """A caller has waited for a while: ask whom it misses, and show what is known."""
        missing = self._missing()
        self.ask(missing)
        with self._lock:
            if not missing:
                self._shown = None
                return
            if self._shown is None:
                self._shown = _C.ShownWait()
            self._shown.show(*self.roots(missing))

    def rest(self) -> None:
        """The caller's wait is over."""
        with self._lock:
            self._shown = None

    def ask(self, ranks: Collection[int]) -> None:
        """Does not wait for the answers. A rank that owes one is not asked again."""
        for rank in ranks:
            now = time.monotonic()
            with self._lock:
                asked = self._asked.get(rank, _Asked())
                if asked.asked_at:
                    continue
                self._asked[rank] = _Asked() if now - asked.answered_at > _STALE_S else asked
                self._asked[rank].asked_at = now
            self._send(rank, Frame(Kind.ASK, self._rank))

    def roots(self, ranks: Collection[int]) -> tuple[Roots, str]:
        """At the root of a wait for these ranks, by what is known; and what the first of them is in.

        Empty if they wait for this process.
        """
        found: dict[int, int] = {}
        said = ""
        for rank in ranks:
            with self._lock:
                asked = self._asked.get(rank, _Asked())
                is_late = bool(asked.asked_at) and time.monotonic() - asked.asked_at > _SILENT_S
                is_silent = is_late or not asked.answered_at
                roots: tuple[tuple[int, int], ...] = ((self._tokens[rank], -1),)
                text = f"rank {rank} does not answer (group {self._group!r})"
                if not is_silent and asked.is_waiting:
                    roots, text = asked.roots, asked.text
                elif not is_silent:
                    text = f"rank {rank} is in {asked.text or 'its own code'} (group {self._group!r})"
            for token, hops in roots:
                if token != self._tokens[self._rank] and hops < _C.MAX_RANKS:
                    found[token] = min(hops + 1, found.get(token, hops + 1))
                    said = said or text
        return list(found.items()), said

    def on_frame(self, frame: Frame) -> None:
        """On the thread that reads frames; :class:`FrameError` for one that makes no sense."""
        if frame.kind == Kind.ASK:
            self._answer(frame.rank)
            return
        end = frame.count * _ROOT.size
        if not (0 <= frame.count <= _MOST_ROOTS and end <= len(frame.body) and frame.tag in (0, 1)):
            raise FrameError(f"an answer of {frame.count} processes in {len(frame.body)} bytes")
        roots = tuple(_ROOT.iter_unpack(frame.body[:end]))
        text = frame.body[end:].decode(errors="replace")
        with self._lock:
            self._asked[frame.rank] = _Asked(0.0, time.monotonic(), bool(frame.tag), roots, text)

    def _answer(self, rank: int) -> None:
        is_waiting, roots, text = _C.shown_waits()
        if not is_waiting and (missing := self._missing()):  # for a caller that has only just begun to wait
            self.ask(missing)
            is_waiting, (roots, text) = True, self.roots(missing)
        if not is_waiting and (cause := self._heard.cause("ends")) is not None:  # and has not gone on since
            is_waiting, roots, text = True, [(root, 0) for root in cause.roots], cause.text
        roots = roots[:_MOST_ROOTS]
        body = b"".join(_ROOT.pack(*root) for root in roots) + text.encode(errors="replace")
        self._send(rank, Frame(Kind.ANSWER, self._rank, tag=is_waiting, count=len(roots), body=body[:BODY_BYTES]))
