"""What the watchdogs of a group show each other, and how they find calls that differ.

Watchdogs meet in rounds, an all_gather on the host each. In a round every rank shows how many collectives it has called
and the hash of its calls up to a number that all know from the round before: the least count of all ranks. Hashes that
differ mean that some call up to there differs; the ranks then show each other the hashes one by one, and the first call
that differs. Messages are shown as they are, each once, and matched by number between their two ranks.

Every rank computes from the same tables in the same order, so all come to the same verdict in the same round.
"""

from __future__ import annotations

import struct
from collections.abc import Generator
from dataclasses import dataclass

from pycomm import _C
from pycomm.backends.causes import Cause

__all__ = ["Comparison", "Round", "Row"]

# calls, hash, number of the hash, messages to show, latest call
_ROW = struct.Struct("<QQQQ24s")
_MESSAGE = struct.Struct("<Q24s")
MOST_MESSAGES = 64  # a rank shows in a round
_MOST_CALLS = 1 << 16  # compared in a round

# Yields rows, all ranks of equal size, is sent the tables that they make, by rank, and returns the verdict.
Round = Generator[bytes, list[bytes], Cause | None]


@dataclass(frozen=True)
class Row:
    """What a rank shows in a round.

    Attributes:
        num_calls: collectives that it has called.
        hash: of its calls up to ``hashed``.
        num_messages: that it wants to show.
        latest: its latest call, packed.
    """

    num_calls: int
    hash: int
    hashed: int
    num_messages: int
    latest: bytes

    @classmethod
    def of(cls, core: _C.NcclCommunicator, hashed: int) -> Row:
        return cls(core.num_calls(), core.hash(hashed), hashed, core.num_messages(), core.latest().pack())

    def pack(self) -> bytes:
        return _ROW.pack(self.num_calls, self.hash, self.hashed, self.num_messages, self.latest)

    @classmethod
    def unpack(cls, row: bytes) -> Row:
        return cls(*_ROW.unpack(row))


class Comparison:
    """Compares the calls of a group round by round.

    Attributes:
        rows: the last table, by rank; empty before the first round.
    """

    def __init__(self, core: _C.NcclCommunicator, group: str) -> None:
        self.rows: list[Row] = []
        self._core = core
        self._group = group
        self._agreed = 0  # all ranks have called so many, or more
        self._unmatched: dict[tuple[int, int, int, bool], _C.Call] = {}  # source, destination, number, is a send

    def round(self) -> Round:
        """One round; the verdict is None while all agree."""
        table = yield Row.of(self._core, self._agreed).pack()
        self.rows = rows = [Row.unpack(row) for row in table]
        agreed = self._agreed
        if len({row.hash for row in rows}) > 1:
            return (yield from self._dispute(self._core.num_confirmed(), agreed))
        self._core.confirm(agreed)
        self._agreed = min(min(row.num_calls for row in rows), agreed + _MOST_CALLS)
        most = min(max(row.num_messages for row in rows), MOST_MESSAGES)
        if most == 0:
            return None
        size = most * _MESSAGE.size
        table = yield self._core.take_messages(most).ljust(size, b"\0")
        return self._match(table)

    def _dispute(self, first: int, last: int) -> Round:
        """The first call after ``first`` that differs; one up to ``last`` does."""
        mine = struct.pack(f"<{last - first}Q", *(self._core.hash(number) for number in range(first + 1, last + 1)))
        table = yield mine
        hashes = [struct.unpack(f"<{last - first}Q", row) for row in table]
        number = next(first + 1 + i for i, found in enumerate(zip(*hashes, strict=True)) if len(set(found)) > 1)
        table = yield self._core.call(number).pack()
        calls = {rank: str(_C.Call.unpack(call)) for rank, call in enumerate(table)}
        text = ", ".join(f"rank {rank} called {call}" for rank, call in calls.items())
        return Cause("mismatch", (), f"call {number} of group {self._group!r}: {text}", calls)

    def _match(self, table: list[bytes]) -> Cause | None:
        for rank, row in enumerate(table):
            for number, packed in _MESSAGE.iter_unpack(row):
                if number == 0:
                    continue
                call = _C.Call.unpack(packed)
                is_send = call.kind == "send"
                source, destination = (rank, call.root) if is_send else (call.root, rank)
                other = self._unmatched.pop((source, destination, number, not is_send), None)
                if other is None:
                    self._unmatched[source, destination, number, is_send] = call
                elif not _fits(other, call):
                    send, receive = (call, other) if is_send else (other, call)
                    calls = {source: str(send), destination: str(receive)}
                    if source == destination:
                        calls = {source: f"{send} and {receive}"}
                    text = ", ".join(f"rank {r} called {call}" for r, call in calls.items())
                    note = "NCCL matches the messages of two ranks in order, whatever their tags"
                    which = f"message {number} from rank {source} to rank {destination} of group {self._group!r}"
                    return Cause("mismatch", (), f"{which}: {text}; {note}", calls)
        return None


def _fits(a: _C.Call, b: _C.Call) -> bool:
    """A send and a receive: one dtype, count and tag."""
    return (a.dtype, a.count, a.tag) == (b.dtype, b.count, b.tag)
