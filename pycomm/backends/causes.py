"""Why a group of ranks cannot go on: found by one rank, told to all, and raised by each in its own call.

A failure goes from group to group with the processes at the root of it, since ranks have other numbers elsewhere. What
a process has heard of is kept for all its groups by the extension (csrc/host/groups.hpp); :class:`Heard` asks for it.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from pycomm import _C
from pycomm.errors import MismatchError, PeerLostError, PeerTimeoutError, PycommError
from pycomm.rendezvous import known_to_end

__all__ = ["LEFT", "Cause", "Heard", "heard", "listeners", "pass_on", "raised", "ranks_text"]

LEFT = "exited normally (it closed the communicator)"

_MARK = "cause:"
_MOST_BYTES = 400  # what fits beside the mark into the reason of an abort on the host transport
_MOST_ROOTS = 4  # told in one line
_KINDS = ("lost", "expired", "mismatch", "failed")


@dataclass(frozen=True)
class Cause:
    """The first failure of a group.

    Attributes:
        kind: "lost" (a rank died, left or gave up), "expired" (ranks did not arrive in time), "mismatch" (ranks called
            different things, and it was found out too late to go on) or "failed" (something else broke).
        ranks: those at the root of it; if it lies outside of the group, those that brought it here.
        text: a sentence that names them.
        calls: of a mismatch: rank -> what it called. Not passed on to others, who find it out themselves.
        roots: the processes at the root of it; empty: those of ``ranks``.
    """

    kind: str
    ranks: tuple[int, ...]
    text: str
    calls: Mapping[int, str] = field(default_factory=dict)
    roots: tuple[int, ...] = ()

    def encode(self) -> str:
        """One line, for a frame or for the reason of an abort inside a host."""
        numbers = ",".join(map(str, self.ranks[:16]))
        roots = ",".join(f"{root:x}" for root in self.roots[:_MOST_ROOTS])
        line = f"{_MARK}{self.kind}:{numbers}:{roots}:{self.text}"
        return line.encode(errors="replace")[:_MOST_BYTES].decode(errors="ignore")

    @classmethod
    def decode(cls, text: str) -> Cause | None:
        """What :meth:`encode` wrote, wherever in ``text`` it stands; None if it does not."""
        _, mark, line = text.partition(_MARK)
        fields = line.split(":", 3)
        if not mark or len(fields) != 4 or fields[0] not in _KINDS:
            return None
        try:
            return cls(fields[0], _numbers(fields[1], 10), fields[3], roots=_numbers(fields[2], 16))
        except ValueError:
            return None

    @classmethod
    def of_host(
        cls, error: PycommError, timeout_s: float, tokens: Sequence[int], ranks: Sequence[int] | None = None
    ) -> Cause:
        """What an error of the host transport says.

        Args:
            tokens: the processes of the whole group, by rank.
            ranks: those of the whole group that the error's numbers stand for; None: all.
        """
        cause = cls.decode(str(error))
        if cause is not None:  # passed on by another rank
            return cause
        processes, text = error._root
        if isinstance(error, PeerTimeoutError):
            missing = _renumbered(error.missing_ranks, ranks)
            _, _, at_root = str(error).partition(_C.AT_ROOT)
            return cls.expired(missing, processes, tokens, f"did not come within {timeout_s:g} s", at_root)
        if isinstance(error, PeerLostError) and error.lost_ranks:
            lost = _renumbered(error.lost_ranks, ranks)
            if any(tokens[rank] in processes for rank in lost):
                return cls("lost", lost, f"{ranks_text(lost)} {_how(str(error))}")
            return cls.elsewhere(processes, text, tokens, lost, f"{ranks_text(lost)} gave up: {text}")
        return cls("lost", (), str(error))

    @classmethod
    def elsewhere(
        cls, processes: Sequence[int], text: str, tokens: Sequence[int], carriers: Sequence[int], told: str
    ) -> Cause:
        """A failure of another group, with the numbers that ranks have here.

        Args:
            processes: at the root of it; ``text`` names them.
            carriers: the ranks of this group that brought it here.
            told: the sentence if none of the roots is in this group.
        """
        here = tuple(rank for rank, token in enumerate(tokens) if token in processes and rank not in carriers)
        return cls("lost", here or tuple(carriers), told, roots=tuple(processes))

    @classmethod
    def expired(
        cls, missing: Sequence[int], processes: Sequence[int], tokens: Sequence[int], said: str, at_root: str
    ) -> Cause:
        """Ranks did not come in time.

        Args:
            missing: those that were waited for.
            processes: at the root of that; empty: those.
            said: what the missing ones did, after their names.
            at_root: what the first of the processes is in.
        """
        here = tuple(rank for rank, token in enumerate(tokens) if token in processes)
        named = here or tuple(missing)
        text = f"{ranks_text(named)} {said}" if named else f"no rank {said}"
        if named != tuple(missing) and missing:
            text += f", for which {ranks_text(missing)} wait{'s' if len(missing) == 1 else ''}"
        if at_root and (named != tuple(missing) or not here):
            text += f"{_C.AT_ROOT}{at_root}"
        return cls("expired", named, text, roots=tuple(processes))

    def rooted(self, tokens: Sequence[int]) -> Cause:
        """The same with ``roots``."""
        return self if self.roots else replace(self, roots=tuple(tokens[rank] for rank in self.ranks))

    def error(self, call: str, seq: int, group: str, *, later: bool = False) -> PycommError:
        """The exception of ``call``, which the failure ended, or which came ``later`` and was refused."""
        message = f"{call}: {self.text}"
        if later:
            message = f"{call}: the communicator {group!r} cannot be used any more: {self.text}"
        error: PycommError
        if self.kind == "expired":
            error = PeerTimeoutError(message, op=call, seq=seq, group=group, missing_ranks=self.ranks)
        elif self.kind == "mismatch":
            return MismatchError(message, calls=self.calls)
        elif self.kind == "failed":
            return PycommError(message)
        else:
            error = PeerLostError(message, lost_ranks=self.ranks, group=group)
        error._root = (self.roots, f"{self.text} (group {group!r})")
        return error


class Listener(Protocol):
    """A back end that tells its peers what this process has heard of, and for whom it waits."""

    def on_heard(self, processes: Sequence[int], text: str) -> None: ...

    def look(self) -> None:
        """A caller waits, and has for a while: ask for whom the ranks that it misses wait."""

    def rest(self) -> None:
        """It does not any more."""


@functools.cache
def listeners() -> weakref.WeakSet[Listener]:
    """Those of this process."""
    return weakref.WeakSet()


def heard(processes: Sequence[int], text: str) -> None:
    """This process knows that a group failed because of these processes, in the words of ``text``."""
    _C.tell_of(list(processes), text)
    _show(processes, text)


def pass_on(processes: Sequence[int], text: str) -> None:
    """The same of an error that the caller is about to see; the extension, which calls this, knows it already."""
    known_to_end.update(processes)
    _show(processes, text)


def _show(processes: Sequence[int], text: str) -> None:
    for listener in list(listeners()):
        listener.on_heard(processes, text)


def raised(error: BaseException) -> BaseException:
    """``error``, which the caller is about to see: what is at its root is heard now, whatever was called since."""
    if isinstance(error, PycommError) and error._root[0]:
        _C.tell_of(list(error._root[0]), error._root[1])
        pass_on(*error._root)
    return error


class Heard:
    """What the process of a rank has heard of failures in other groups since the rank's last call in this one.

    If the rank ends now, that is why.
    """

    def __init__(self, rank: int, tokens: Sequence[int]) -> None:
        self._rank = rank
        self._tokens = tokens
        self.carry_on()

    def carry_on(self) -> None:
        """A call: whatever was heard before, this rank goes on."""
        self._number = _C.num_heard()

    def cause(self, how: str) -> Cause | None:
        """None: nothing was heard. ``how``: what the rank does, after its name."""
        if _C.num_heard() == self._number:
            return None
        processes, text = _C.last_heard()
        told = f"rank {self._rank} {how}"
        if (text.rpartition(" (group ")[0] or text) not in how:
            told += f"{',' if ':' in how else ''} after a failure: {text}"
        return Cause.elsewhere(processes, text, self._tokens, (self._rank,), told)


def ranks_text(ranks: Sequence[int]) -> str:
    """ "rank 3", "ranks 1, 2"."""
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))}"


def _numbers(text: str, base: int) -> tuple[int, ...]:
    return tuple(int(number, base) for number in text.split(",") if number)


def _renumbered(places: Sequence[int], ranks: Sequence[int] | None) -> tuple[int, ...]:
    return tuple(places if ranks is None else (ranks[place] for place in places))


def _how(text: str) -> str:
    """What has become of a rank that the host transport calls lost."""
    if "exited normally" in text:
        return LEFT
    _, aborted, reason = text.partition(" aborted: ")
    return f"aborted: {reason}" if aborted else "died"
