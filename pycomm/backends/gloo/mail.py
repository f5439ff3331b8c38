"""Messages to ranks of other hosts: FIFO per (peer, direction, tag), independent of collectives.

A send becomes an OFFER. The receiver matches offers with its receives in order and keeps those that nobody wants yet,
so a tag never blocks another. A small message has its bytes in the offer: one frame, and a TAKEN back. For others the
receiver posts gloo's receive and says ACCEPT; the sender sends the data and then SENT, which therefore arrives behind
them; TAKEN ends it. Frames are handled on the thread that reads them, so messages progress whoever waits.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from pycomm import _C
from pycomm.backends.causes import Cause
from pycomm.backends.gloo.frames import BODY_BYTES, Frame, FrameError, Frames, Kind
from pycomm.backends.gloo.wire import Wire, WireError
from pycomm.errors import MismatchError, PycommError

__all__ = ["LocalReceive", "Mail"]

_FIRST_TAG, _NUM_TAGS = 16, 1 << 30  # of gloo, for data
_MOST_EAGER = 64  # unanswered offers to a rank, after which sends wait
_POLL_S = 0.001  # for messages of this host that a receive from any source waits for
_CHECK_S = 0.1  # for deadlines
_FRAME_S = 30.0  # for what has already come, or gone

# Starts to receive a message with a tag that has come from inside this host; None: none has.
LocalReceive = Callable[[torch.Tensor, int, float], _C.Work | None]


@dataclass(eq=False)
class _Message:
    """A send or receive under way. ``data``: what gloo sends or receives; ``local``: matched inside the host."""

    work: _C.Work
    call: _C.Call
    tensor: torch.Tensor
    deadline: float
    timeout_s: float
    id: int = 0
    data: dist.Work | None = None
    local: _C.Work | None = None

    @property
    def peer(self) -> int | None:
        return None if self.call.root < 0 else self.call.root

    @property
    def dtype(self) -> int:
        return _C.DTYPES.index(self.call.dtype)

    def fits(self, frame: Frame) -> bool:
        return (self.dtype, self.call.count) == (frame.dtype, frame.count)


class Mail:
    """The messages of this rank to and from other hosts, and its receives from any source.

    Args:
        fail: called with the cause when a message fails for good.
        expire: called with the peer (None: any), the call and its timeout when one has not come in time.
        local_receive: looks inside this host for receives from any source; None: nobody else is there.
        waits: of the communicator.
    """

    def __init__(
        self,
        rank: int,
        strict: bool,
        wire: Wire,
        frames: Frames,
        fail: Callable[[Cause], object],
        expire: Callable[[int | None, str, float], object],
        local_receive: LocalReceive | None,
        waits: _C.Waits,
    ) -> None:
        self._rank = rank
        self._strict = strict
        self._wire = wire
        self._frames = frames
        self._fail = fail
        self._expire = expire
        self._local_receive = local_receive
        self._waits = waits
        self._changed = threading.Condition()
        self._next_id = 0
        self._sends: dict[int, _Message] = {}  # by id, until TAKEN
        self._receives: list[_Message] = []  # not matched, in order
        self._incoming: dict[tuple[int, int], _Message] = {}  # by sender and id: data are on their way
        self._arrived: dict[int, list[Frame]] = {}  # by sender: offers that nobody wants yet, in order
        self._locals: list[_Message] = []  # matched inside the host
        self._gone: dict[int, Cause] = {}
        self._error: Callable[[str], PycommError] | None = None
        self._stopping = False
        self._watch_thread: threading.Thread | None = None

    def send(self, call: _C.Call, tensor: torch.Tensor, timeout_s: float) -> _C.Work:
        message, dst = self._message(call, tensor, timeout_s), call.root
        with self._changed:
            if self._refused(message):
                return message.work
            message.id, self._next_id = self._next_id, self._next_id + 1
            waiting = sum(other.peer == dst for other in self._sends.values())
            self._sends[message.id] = message
            body = b""
            if tensor.nbytes <= BODY_BYTES:
                body = _bytes_of(tensor).numpy().tobytes()
                if not self._strict and waiting < _MOST_EAGER:
                    message.work.finish(dst)
            self._reply(dst, Kind.OFFER, message, body)
            self._watch(dst)
        return message.work

    def receive(self, call: _C.Call, tensor: torch.Tensor, timeout_s: float) -> _C.Work:
        message = self._message(call, tensor, timeout_s)
        src = message.peer
        with self._changed:
            if self._refused(message):
                return message.work
            for peer, frames in self._arrived.items():
                found = next((frame for frame in frames if src in (None, peer) and frame.tag == call.tag), None)
                if found is not None:
                    frames.remove(found)
                    self._match(message, found)
                    return message.work
            self._receives.append(message)
            self._watch(src)
        return message.work

    def on_frame(self, frame: Frame) -> None:
        """On the thread that reads frames; :class:`FrameError` for one that makes no sense."""
        with self._changed:
            if self._error is not None:
                return
            if frame.kind == Kind.OFFER:
                _check_offer(frame)
                found = next(
                    (m for m in self._receives if m.peer in (None, frame.rank) and m.call.tag == frame.tag), None
                )
                if found is None:
                    self._arrived.setdefault(frame.rank, []).append(frame)
                else:
                    self._receives.remove(found)
                    self._match(found, frame)
            elif frame.kind == Kind.SENT:
                message = self._incoming.pop((frame.rank, frame.id), None)
                if message is None or message.peer not in (None, frame.rank):
                    raise FrameError(f"data of a message {frame.id} that nobody has asked for")
                self._settle(message, frame.rank)
                self._answer(frame, Kind.TAKEN)
            elif frame.kind == Kind.ACCEPT:
                self._send_data(self._sent(frame), frame.rank)
            elif frame.kind == Kind.TAKEN:
                self._settle(self._sends.pop(self._sent(frame).id), frame.rank)
            elif frame.kind == Kind.REFUSE:
                message = self._sends.pop(self._sent(frame).id)
                theirs = self._described("recv", frame)
                message.work.fail(_mismatch({self._rank: str(message.call), frame.rank: theirs}))

    def on_gone(self, rank: int, cause: Cause) -> None:
        """A rank has left or died, after all of its frames; ends the group if messages wait for it."""
        with self._changed:
            self._gone[rank] = cause
            incoming = any(peer == rank for peer, _ in self._incoming)
            if incoming or any(message.peer == rank for message in self._active()):
                self._fail(cause)

    def missing(self) -> set[int | None]:
        """Peers of messages that somebody waits for; None: any."""
        with self._changed:
            return {m.peer for m in self._active() if m.local is None and m.work.is_awaited()}

    def end(self, error: Callable[[str], PycommError]) -> None:
        """The group cannot go on: fail all messages, now and later, with ``error`` of their description."""
        with self._changed:
            self._error = error
            for message in self._active():
                message.work.fail(error(str(message.call)))
            self._sends.clear()
            self._receives.clear()
            self._incoming.clear()
            self._locals.clear()
            self._changed.notify_all()

    def drain(self, timeout_s: float) -> bool:
        """Wait until no message is active; false if ``timeout_s`` passes before."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._active(), timeout_s)

    def stop(self) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._watch_thread is not None and self._watch_thread is not threading.current_thread():
            self._watch_thread.join()

    # All of these are called with the lock held.

    def _message(self, call: _C.Call, tensor: torch.Tensor, timeout_s: float) -> _Message:
        work = _C.Work(self._waits, str(call))
        return _Message(work, call, tensor.detach(), time.monotonic() + timeout_s, timeout_s)

    def _described(self, kind: str, frame: Frame) -> str:
        """The other side of a message of this rank."""
        call = _C.Call(kind, dtype=_dtype_of(frame), root=self._rank, count=frame.count, splits=frame.tag)
        return str(call)

    def _refused(self, message: _Message) -> bool:
        if self._error is not None:
            message.work.fail(self._error(str(message.call)))
        return self._error is not None

    def _sent(self, answer: Frame) -> _Message:
        message = self._sends.get(answer.id)
        if message is None or message.peer != answer.rank:
            raise FrameError(f"an answer to a message {answer.id} that it was not sent")
        return message

    def _active(self) -> list[_Message]:
        """What somebody waits for: not small sends, which are done before they are taken."""
        unanswered = [message for message in self._sends.values() if not message.work.done()]
        return [*unanswered, *self._receives, *self._incoming.values(), *self._locals]

    def _reply(self, rank: int, kind: Kind, message: _Message, body: bytes = b"") -> None:
        frame = Frame(kind, self._rank, message.id, message.call.tag, message.dtype, message.call.count, body)
        self._frames.send(rank, frame)

    def _answer(self, offer: Frame, kind: Kind) -> None:
        self._frames.send(offer.rank, Frame(kind, self._rank, offer.id))

    def _match(self, message: _Message, offer: Frame) -> None:
        message.id = offer.id
        if not message.fits(offer):
            self._reply(offer.rank, Kind.REFUSE, message)
            message.work.fail(_mismatch({offer.rank: self._described("send", offer), self._rank: str(message.call)}))
        elif message.tensor.nbytes <= BODY_BYTES:
            if offer.body:
                _bytes_of(message.tensor).copy_(torch.frombuffer(bytearray(offer.body), dtype=torch.uint8))
            message.work.finish(offer.rank)
            self._answer(offer, Kind.TAKEN)
        else:
            self._incoming[offer.rank, offer.id] = message
            try:
                message.data = self._wire.receive(message.tensor, offer.rank, _data_tag(offer.id))
            except WireError:
                return  # on_gone() will end it
            self._answer(offer, Kind.ACCEPT)

    def _send_data(self, message: _Message, rank: int) -> None:
        try:
            message.data = self._wire.send(message.tensor, rank, _data_tag(message.id))
        except WireError:
            return  # as above
        self._frames.send(rank, Frame(Kind.SENT, self._rank, message.id))

    def _settle(self, message: _Message, rank: int) -> None:
        """End a message whose data have passed, so that waiting for gloo only collects its result."""
        try:
            if message.data is not None:
                self._wire.wait(message.data, rank, time.monotonic() + _FRAME_S)
        except WireError as error:
            message.work.fail(PycommError(f"{message.call}: {error}"))
        message.work.finish(rank)
        self._changed.notify_all()

    def _watch(self, peer: int | None) -> None:
        """Care for a message that has been registered."""
        if peer in self._gone:
            self._fail(self._gone[peer])
        if self._watch_thread is None:
            self._watch_thread = threading.Thread(target=self._watch_loop, name="pycomm-mail", daemon=True)
            self._watch_thread.start()
        self._changed.notify_all()

    def _watch_loop(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopping or self._active())
                if self._stopping:
                    return
                looks_here = self._local_receive is not None and any(m.peer is None for m in self._receives)
                self._changed.wait(_POLL_S if looks_here or self._locals else _CHECK_S)
                expired = self._poll()
            if expired is not None:  # without the lock: it calls end()
                self._expire(expired.peer, str(expired.call), expired.timeout_s)

    def _poll(self) -> _Message | None:
        """Look inside the host and at deadlines; a message that has not come in time, which ends the group."""
        for message in [m for m in self._receives if m.peer is None and self._local_receive is not None]:
            assert self._local_receive is not None
            message.local = self._local_receive(message.tensor, message.call.tag, message.timeout_s)
            if message.local is not None:
                self._receives.remove(message)
                self._locals.append(message)
        for message in [m for m in self._locals if m.local is not None and m.local.done()]:
            assert message.local is not None
            self._locals.remove(message)
            try:
                message.local.wait()
                message.work.finish(message.local.source)
            except PycommError as error:
                message.work.fail(error)
        now = time.monotonic()
        for message in self._active():
            if now > message.deadline and message.local is None:
                return message
        return None


def _dtype_of(frame: Frame) -> str:
    if frame.dtype >= len(_C.DTYPES):
        raise FrameError(f"dtype {frame.dtype}")
    return _C.DTYPES[frame.dtype]


def _check_offer(offer: Frame) -> None:
    """A small message has its bytes behind the offer, a large one nothing."""
    num_bytes = offer.count * int(getattr(torch, _dtype_of(offer)).itemsize)
    if len(offer.body) != (num_bytes if num_bytes <= BODY_BYTES else 0):
        raise FrameError(f"{len(offer.body)} bytes behind an offer of {num_bytes}")


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)


def _data_tag(number: int) -> int:
    return _FIRST_TAG + number % _NUM_TAGS


def _mismatch(calls: dict[int, str]) -> MismatchError:
    text = ", ".join(f"rank {rank} called {call}" for rank, call in sorted(calls.items()))
    return MismatchError(f"a message does not fit its receive: {text}", calls=calls)
