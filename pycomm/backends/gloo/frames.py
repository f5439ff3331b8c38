"""Short frames from any rank of a group to any other: offers and replies of messages, news of failures, questions.

A frame is a fixed-size struct with some bytes behind it; nothing in it is pickled or evaluated, and one that makes no
sense is a failure of its sender. Whoever waits for a rank's frames also sees its connection close, at once if its
process ends.
"""

from __future__ import annotations

import struct
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import torch
import torch.distributed as dist

from pycomm.backends.gloo.wire import Wire, WireError

__all__ = ["BODY_BYTES", "Frame", "FrameError", "Frames", "Kind"]

_HEADER = struct.Struct("<BBHiqQq")  # kind, dtype, bytes behind, rank, id, count, tag
_FRAME_BYTES = 2048
_TAG = 3
_MOST_KEPT = 1024

BODY_BYTES = _FRAME_BYTES - _HEADER.size


class FrameError(Exception):
    """A frame makes no sense."""


class Kind(IntEnum):
    """What a frame says of the message ``id`` of its sender, or of the group."""

    OFFER = 0  # a message with this tag, dtype and count; small ones have their bytes behind
    ACCEPT = 1  # its receiver is ready for the data
    SENT = 2  # the data lie before this frame on the same connection
    TAKEN = 3  # the receiver has it
    REFUSE = 4  # the receive that matched has another dtype or count, these
    FAILED = 5  # the group cannot go on; a Cause behind
    LEFT = 6  # the rank has closed its communicator; a Cause behind if another group's failure is why
    HEARD = 7  # another group's failure, a Cause, is why the rank ends if it ends now; nothing behind: it goes on
    ASK = 8  # for whom does the receiver's process wait?
    ANSWER = 9  # tag: whether it waits; count: of processes at the root of that, which lie behind; then a text


@dataclass(frozen=True)
class Frame:
    """One frame; ``rank`` is its sender, ``dtype`` a number."""

    kind: Kind
    rank: int
    id: int = 0
    tag: int = 0
    dtype: int = 0
    count: int = 0
    body: bytes = b""

    def pack(self) -> bytes:
        header = _HEADER.pack(self.kind, self.dtype, len(self.body), self.rank, self.id, self.count, self.tag)
        return (header + self.body).ljust(_FRAME_BYTES, b"\0")

    @classmethod
    def unpack(cls, data: bytes, sender: int) -> Frame:
        """What came from rank ``sender``; :class:`FrameError` if it makes no sense."""
        kind, dtype, length, rank, number, count, tag = _HEADER.unpack_from(data)
        if kind >= len(Kind) or length > BODY_BYTES or rank != sender or number < 0:
            raise FrameError(f"kind {kind} with {length} bytes and number {number} by rank {rank}")
        return cls(Kind(kind), rank, number, tag, dtype, count, data[_HEADER.size : _HEADER.size + length])


class Frames:
    """Sends frames, and hands on what comes, in each sender's order. A thread for each other rank waits for its frames.

    Args:
        on_frame: called with each.
        on_gone: called with a rank whose connection is closed, after its last frame.
        on_bad: called with a rank that sent a frame that makes no sense, and why.
    """

    def __init__(
        self,
        wire: Wire,
        rank: int,
        world_size: int,
        on_frame: Callable[[Frame], None],
        on_gone: Callable[[int], None],
        on_bad: Callable[[int, str], None],
    ) -> None:
        self.gone: set[int] = set()
        self._wire = wire
        self._on_frame = on_frame
        self._on_gone = on_gone
        self._on_bad = on_bad
        self._lock = threading.RLock()  # a signal handler may come while this thread holds it
        # Sends whose end nobody has seen. Much older ones have gone, or their receiver has.
        self._kept: deque[tuple[int, dist.Work, torch.Tensor]] = deque(maxlen=_MOST_KEPT)
        self._threads = [
            threading.Thread(target=self._listen, args=(peer,), name=f"pycomm-frames-{peer}", daemon=True)
            for peer in range(world_size)
            if peer != rank
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def send(self, rank: int, frame: Frame) -> None:
        """Start to send; does not wait. Does nothing if ``rank`` is gone."""
        buffer = torch.frombuffer(bytearray(frame.pack()), dtype=torch.uint8)
        try:
            work = self._wire.send(buffer, rank, _TAG)
        except WireError:
            return
        with self._lock:
            self._kept.append((rank, work, buffer))

    def flush(self, deadline: float) -> None:
        """Wait until all frames have gone, or until ``deadline``, which cuts the wire."""
        with self._lock:
            kept = list(self._kept)
            self._kept.clear()
        for rank, work, _ in kept:
            try:
                self._wire.wait(work, rank, deadline)
            except WireError as error:
                if error.expired:
                    return

    def close(self) -> None:
        """Cut the wire and join the threads. Idempotent."""
        self._wire.cut()
        for thread in self._threads:
            if thread is not threading.current_thread() and thread.is_alive():
                thread.join()

    def _listen(self, peer: int) -> None:
        buffer = torch.empty(_FRAME_BYTES, dtype=torch.uint8, device="cpu")
        while True:
            try:
                self._wire.wait_long(self._wire.receive(buffer, peer, _TAG), peer)
            except WireError:
                self.gone.add(peer)
                self._on_gone(peer)
                return
            try:
                self._on_frame(Frame.unpack(buffer.numpy().tobytes(), peer))
            except FrameError as error:
                self._on_bad(peer, str(error))
