"""Why a group of ranks cannot go on: found by one rank, told to all, and raised by each in its own call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pycomm.errors import PeerLostError, PeerTimeoutError, PycommError

__all__ = ["Cause", "ranks_text"]

_MARK = "cause:"
_MOST_BYTES = 400  # what fits beside the mark into the reason of an abort on the host transport


@dataclass(frozen=True)
class Cause:
    """The first failure of a group.

    Attributes:
        kind: "lost" (a rank died, left or gave up) or "expired" (ranks did not arrive in time).
        ranks: those at the root of it.
        text: a sentence that names them.
    """

    kind: str
    ranks: tuple[int, ...]
    text: str

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
        if not mark or len(fields) != 3 or fields[0] not in ("lost", "expired"):
            return None
        return cls(fields[0], tuple(int(number) for number in fields[1].split(",") if number), fields[2])

    def error(self, call: str, seq: int, group: str, *, later: bool = False) -> PycommError:
        """The exception of ``call``, which the failure ended, or which came ``later`` and was refused."""
        message = f"{call}: {self.text}"
        if later:
            message = f"{call}: the communicator {group!r} cannot be used any more: {self.text}"
        if self.kind == "expired":
            return PeerTimeoutError(message, op=call, seq=seq, group=group, missing_ranks=self.ranks)
        return PeerLostError(message, lost_ranks=self.ranks)


def ranks_text(ranks: Sequence[int]) -> str:
    """ "rank 3", "ranks 1, 2"."""
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))}"
