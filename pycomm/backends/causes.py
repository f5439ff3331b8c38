"""Why a group of ranks cannot go on: found by one rank, told to all, and raised by each in its own call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pycomm.errors import MismatchError, PeerLostError, PeerTimeoutError, PycommError

__all__ = ["LEFT", "Cause", "ranks_text"]

LEFT = "exited normally (it closed the communicator)"

_MARK = "cause:"
_MOST_BYTES = 400  # what fits beside the mark into the reason of an abort on the host transport
_KINDS = ("lost", "expired", "mismatch", "failed")


@dataclass(frozen=True)
class Cause:
    """The first failure of a group.

    Attributes:
        kind: "lost" (a rank died, left or gave up), "expired" (ranks did not arrive in time), "mismatch" (ranks called
            different things, and it was found out too late to go on) or "failed" (something else broke).
        ranks: those at the root of it.
        text: a sentence that names them.
        calls: of a mismatch: rank -> what it called. Not passed on to others, who find it out themselves.
    """

    kind: str
    ranks: tuple[int, ...]
    text: str
    calls: Mapping[int, str] = field(default_factory=dict)

    def encode(self) -> str:
        """One line, for a frame or for the reason of an abort inside a host."""
        numbers = ",".join(map(str, self.ranks[:16]))
        line = f"{_MARK}{self.kind}:{numbers}:{self.text}"
        return line.encode()[:_MOST_BYTES].decode(errors="ignore")

    @classmethod
    def decode(cls, text: str) -> Cause | None:
        """What :meth:`encode` wrote, wherever in ``text`` it stands; None if it does not."""
        _, mark, line = text.partition(_MARK)
        fields = line.split(":", 2)
        if not mark or len(fields) != 3 or fields[0] not in _KINDS:
            return None
        return cls(fields[0], tuple(int(number) for number in fields[1].split(",") if number), fields[2])

    @classmethod
    def of_host(cls, error: PycommError, timeout_s: float, ranks: Sequence[int] | None = None) -> Cause:
        """What an error of the host transport says; ``ranks``: those of the whole group that its numbers stand for."""
        cause = cls.decode(str(error))
        if cause is not None:  # passed on by another rank
            return cause
        if isinstance(error, PeerTimeoutError):
            missing = _renumbered(error.missing_ranks, ranks)
            return cls("expired", missing, f"{ranks_text(missing)} did not come within {timeout_s:g} s")
        if isinstance(error, PeerLostError) and error.lost_ranks:
            lost = _renumbered(error.lost_ranks, ranks)
            return cls("lost", lost, f"{ranks_text(lost)} {_how(str(error))}")
        return cls("lost", (), str(error))

    def error(self, call: str, seq: int, group: str, *, later: bool = False) -> PycommError:
        """The exception of ``call``, which the failure ended, or which came ``later`` and was refused."""
        message = f"{call}: {self.text}"
        if later:
            message = f"{call}: the communicator {group!r} cannot be used any more: {self.text}"
        if self.kind == "expired":
            return PeerTimeoutError(message, op=call, seq=seq, group=group, missing_ranks=self.ranks)
        if self.kind == "mismatch":
            return MismatchError(message, calls=self.calls)
        if self.kind == "failed":
            return PycommError(message)
        return PeerLostError(message, lost_ranks=self.ranks)


def ranks_text(ranks: Sequence[int]) -> str:
    """ "rank 3", "ranks 1, 2"."""
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))}"


def _renumbered(places: Sequence[int], ranks: Sequence[int] | None) -> tuple[int, ...]:
    return tuple(places if ranks is None else (ranks[place] for place in places))


def _how(text: str) -> str:
    """What has become of a rank that the host transport calls lost."""
    if "exited normally" in text:
        return LEFT
    _, aborted, reason = text.partition(" aborted: ")
    return f"aborted: {reason}" if aborted else "died"
