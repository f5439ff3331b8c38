"""Several hosts without GPUs: shared memory inside each host, torch's gloo between them.

:class:`HostsBackend` takes part in every call in the same way: the ranks compare what they call, then follow
``steps.py``. One thread a communicator runs its collectives in issue order; messages between hosts have their own
(``mail.py``). With one rank a host, real or taken as such (``backend="gloo"``), nothing but gloo is used.
docs/several_hosts.md has topology, bytes, order of sums and errors.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Hashable, Sequence

import torch
import torch.distributed as dist

from pycomm import _C, env
from pycomm.backends import Backend, Capabilities
from pycomm.backends.agreement import all_or_none
from pycomm.backends.causes import Cause, Heard, listeners, raised
from pycomm.backends.gloo.failure import Failure
from pycomm.backends.gloo.frames import Frame, Frames, Kind
from pycomm.backends.gloo.inquiry import Inquiry
from pycomm.backends.gloo.local import LocalGroup
from pycomm.backends.gloo.mail import Mail
from pycomm.backends.gloo.operations import CallQueue, together, weakly
from pycomm.backends.gloo.steps import Limit, Steps
from pycomm.backends.gloo.topology import Topology
from pycomm.backends.gloo.wire import Wire, WireError, open_device
from pycomm.errors import MismatchError, PeerTimeoutError, PycommError
from pycomm.rendezvous import Rendezvous

__all__ = ["HostsBackend"]

_FAREWELL_S = 1.0  # for the last frames of a rank that leaves
_SPLIT = struct.Struct("<?qq")
_ROW = struct.Struct("<Q24s")  # what a rank shows of a call before it takes part: its number, and all of it

Body = Callable[[Steps, Limit], None]


class HostsBackend(Backend):
    """One rank's end; see :class:`pycomm.backends.Backend`.

    Args:
        store: where connections are made, of this group and of its parts; not used otherwise. None: a world of one.
        check: raises when it is in vain to wait for the others to connect.
        tokens: the processes of the ranks.
    """

    device = torch.device("cpu")
    capabilities = Capabilities()

    def __init__(
        self,
        name: str,
        group: str,
        topology: Topology,
        local: LocalGroup,
        store: dist.Store | None,
        device: dist.ProcessGroupGloo.Device | None,
        strict: bool,
        timeout_s: float,
        check: Callable[[], None],
        tokens: Sequence[int],
    ) -> None:
        self.name = name
        self.group = group
        self.rank = topology.rank
        self.world_size = topology.world_size
        self._topology = topology
        self._local = local
        self._store = store
        self._device = device
        self._strict = strict
        self._timeout_s = timeout_s
        self._process = os.getpid()
        self._seq = 0
        self._num_splits = 0
        self._closed = False
        self._queue = CallQueue("pycomm-hosts")
        self._connecting: tuple[int, ...] = ()  # ranks of other hosts, to a part of this group
        self._waits = _C.Waits(self.rank, group, weakly(self.look), weakly(self.rest))
        self.tokens = list(tokens)
        self._heard = Heard(self.rank, self.tokens)
        self._has_told = False  # peers have been sent a HEARD that holds
        self._wire: Wire | None = None
        self._frames: Frames | None = None
        self._mail: Mail | None = None
        self._inquiry: Inquiry | None = None
        if store is not None and device is not None and self.world_size > 1:
            wires = [
                Wire(dist.PrefixStore(f"{group}/{use}", store), device, self.rank, self.world_size, timeout_s, check)
                for use in ("collectives", "messages")
            ]
            self._wire = wires[0]
            self._frames = Frames(wires[1], self.rank, self.world_size, self._on_frame, self._on_gone, self._on_bad)
            # The data of messages go the way of their frames, so that both arrive in order.
            ends = self._fail, self._expire
            self._mail = Mail(self.rank, strict, wires[1], self._frames, *ends, self._receive_here, self._waits)
            self._inquiry = Inquiry(self.rank, group, self.tokens, self._frames.send, self._missing, self._heard)
        self._failure = Failure(topology, self._frames, self._inquiry, self._cut, self.tokens, group)
        self._steps = Steps(topology, local, self._wire)
        if self._frames is not None:
            self._frames.start()
            listeners().add(self)

    @classmethod
    def connect(
        cls, name: str, rendezvous: Rendezvous, hosts: Sequence[Hashable], group: str, strict: bool
    ) -> HostsBackend:
        """Meet the ranks of this host, then those of all others.

        Args:
            hosts: by rank, the host by any name; ranks of equal names share memory.
        """
        topology = Topology.of(rendezvous.rank, hosts)
        local = LocalGroup.connect(rendezvous, topology, group)
        store = rendezvous.store
        device = None if store is None else open_device(rendezvous.address(), env.gloo_interface())
        others = [rank for rank in range(rendezvous.world_size) if rank != rendezvous.rank]
        args = store, device, strict, rendezvous.timeout_s, lambda: rendezvous.check(others), rendezvous.tokens()
        backend = cls(name, group, topology, local, *args)
        rendezvous.wait_for_all("connected")  # else one that dies before is seen by some as a closed connection alone
        return backend

    def submit(
        self,
        call: _C.Call,
        output: torch.Tensor | None,
        input: torch.Tensor | None,
        async_op: bool,
        timeout_s: float,
    ) -> _C.Work | None:
        into, source = (None if tensor is None else tensor.detach().view(-1) for tensor in (output, input))
        return self._run(call, lambda steps, limit: steps.run(call, into, source, limit), async_op, timeout_s)

    def exchange(
        self, messages: Sequence[tuple[_C.Call, torch.Tensor]], async_op: bool, timeout_s: float
    ) -> _C.Work | list[int]:
        works = [self._post(call, tensor, timeout_s) for call, tensor in messages]
        whole = works[0] if len(works) == 1 else together(works, self._waits)
        return self._outcome(whole, async_op) or [work.source for work in works]

    def agree(self, row: bytes, timeout_s: float, kind: str = "agree", count: int | None = None) -> list[bytes]:
        found: list[bytes] = []

        def body(steps: Steps, limit: Limit) -> None:
            found.extend(steps.table(row, limit) if row else [row] * self.world_size)  # as they entered the call

        call = _C.Call(kind, count=len(row) if count is None else count, splits=len(row))
        self._run(call, body, False, timeout_s)
        return found

    def empty(self, shape: Sequence[int], dtype: torch.dtype, timeout_s: float) -> torch.Tensor:
        """Symmetric inside each host."""
        found: list[torch.Tensor] = []

        def allocate(limit: Limit) -> torch.Tensor:
            try:
                return self._local.shm.empty(shape, dtype, limit.local_s)
            except MemoryError as error:
                raise MemoryError(self._failure.renumbered(str(error))) from None

        def body(steps: Steps, limit: Limit) -> None:
            found.append(all_or_none(lambda: allocate(limit), lambda row: steps.table(row, limit)))

        call = _C.Call("empty", count=torch.Size(shape).numel() * dtype.itemsize)
        self._run(call, body, False, timeout_s)
        return found[0]

    def peers(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        if len(self._topology.hosts) > 1:
            hosts = "; ".join(" ".join(map(str, ranks)) for ranks in self._topology.hosts)
            raise ValueError(
                f"peers: this group is on {len(self._topology.hosts)} hosts (ranks {hosts}), and only ranks of one "
                f"host map each other's memory: split the group by host, and allocate in the part"
            )
        return self._local.shm.peers(tensor)

    def split(self, color: int | None, key: int, timeout_s: float) -> Backend | None:
        found: list[Backend] = []

        def body(steps: Steps, limit: Limit) -> None:
            rows = steps.table(_SPLIT.pack(color is not None, color or 0, key), limit)
            choices = [_SPLIT.unpack(row) for row in rows]
            chosen = [(k, r) for r, (member, c, k) in enumerate(choices) if member and c == color]
            ranks = [r for _, r in sorted(chosen)] if color is not None else []
            position = ranks.index(self.rank) if ranks else 0
            local = self._local.split(color, position, limit.local_s)
            self._num_splits += 1
            if local is not None:
                found.append(self._part(local, ranks, f"{self.group}.{self._num_splits - 1}[{color}]"))

        self._run(_C.Call("split"), body, False, timeout_s)
        return found[0] if found else None

    def synchronize(self, timeout_s: float) -> None:
        """Nothing is under way that no Work stands for."""

    def abort(self, reason: str) -> None:
        self._check_process()
        how = f"aborted: {reason}"
        self._fail(self._heard.cause(how) or Cause("lost", (self.rank,), f"rank {self.rank} {how}"))

    def on_heard(self, processes: Sequence[int], text: str) -> None:
        """Another group of this process has failed: if this rank ends now, that is why."""
        cause = self._heard.cause("died")
        if cause is not None and self._failure.cause is None and not self._closed and self._process == os.getpid():
            self._has_told = True
            self._tell(Frame(Kind.HEARD, self.rank, body=cause.encode().encode()))

    def look(self) -> None:
        if self._inquiry is not None:
            self._inquiry.look()

    def rest(self) -> None:
        if self._inquiry is not None:
            self._inquiry.rest()

    def close(self, drain_s: float) -> None:
        """Finish what is queued, tell the others, close all connections. Local; idempotent."""
        if self._closed or self._process != os.getpid():
            return
        self._closed = True
        limit = Limit(drain_s)
        inside = self._waits.of_this_thread()
        if inside is not None:
            self.abort(f"closed inside {inside}")
        elif not (self._queue.drain(limit.left_s) and (self._mail is None or self._mail.drain(limit.left_s))):
            self.abort(f"closed with operations that no peer had joined after {drain_s:g} s")
        if self._frames is not None:
            cause = self._heard.cause("left")
            self._tell(Frame(Kind.LEFT, self.rank, body=b"" if cause is None else cause.encode().encode()))
            self._frames.flush(Limit(_FAREWELL_S).deadline)
        self._local.close(limit.left_s)
        self._failure.close("the communicator is closed")
        if self._wire is not None:
            self._wire.cut()
        self._queue.stop(_FAREWELL_S)
        if self._mail is not None:
            self._mail.stop()
        if self._frames is not None:
            self._frames.close()

    def _run(self, call: _C.Call, body: Body, async_op: bool, timeout_s: float) -> _C.Work | None:
        """Queue a collective; wait for it unless asynchronous."""
        self._begin()
        self._waits.check_outside()
        work = _C.Work(self._waits, str(call), is_collective=not async_op)
        self._queue.submit(work, lambda: self._execute(call, body, Limit(timeout_s)))
        return self._outcome(work, async_op)

    def _outcome(self, work: _C.Work, async_op: bool) -> _C.Work | None:
        if async_op:
            return work
        try:
            work.wait()
        except KeyboardInterrupt:
            self.abort("interrupted while it waited")
            raise
        return None

    def _execute(self, call: _C.Call, body: Body, limit: Limit) -> None:
        """On the queue's thread: enter the call with all ranks, then do it."""
        if self._failure.cause is not None:
            raise self._failure.cause.error(str(call), self._seq, self.group, later=True)
        self._seq += 1
        try:
            limit.restart()
            self._enter(call, limit)
            body(self._steps, limit)
        except MismatchError:
            raise
        except (WireError, PycommError) as error:
            cause = self._cause_of(error, limit.timeout_s)
        else:
            return
        raise cause.error(f"{call}, call {self._seq} of {self.group!r}", self._seq, self.group)

    def _enter(self, call: _C.Call, limit: Limit) -> None:
        rows = self._steps.table(_ROW.pack(self._seq, call.pack()), limit)
        if all(row == rows[self.rank] for row in rows):
            return
        shown = [_ROW.unpack(row) for row in rows]
        calls = {rank: str(_C.Call.unpack(packed)) for rank, (_, packed) in enumerate(shown)}
        if len(set(calls.values())) == 1:
            calls = {rank: f"{text}, its call {shown[rank][0]}" for rank, text in calls.items()}
        text = ", ".join(f"rank {rank} called {text}" for rank, text in calls.items())
        raise MismatchError(f"call {self._seq} of group {self.group!r}: {text}", calls=calls)

    def _post(self, call: _C.Call, tensor: torch.Tensor, timeout_s: float) -> _C.Work:
        """Start a message: inside the host by the host transport, else by mail."""
        self._begin()
        if self._failure.cause is not None:
            raise raised(self._failure.cause.error(call.kind, self._seq, self.group, later=True))
        peer = None if call.root < 0 else call.root
        if self._mail is None or (peer is not None and self._topology.is_here(peer)):
            place = None if peer is None else self._topology.local_of[peer]
            try:
                return self._here(self._local.start(call.kind == "send", tensor, place, call.tag, timeout_s))
            except PycommError as error:  # the host knows of a failure before this rank does
                raise raised(self._of_host(error)) from None
        return (self._mail.send if call.kind == "send" else self._mail.receive)(call, tensor, timeout_s)

    def _receive_here(self, tensor: torch.Tensor, tag: int, timeout_s: float) -> _C.Work | None:
        try:
            work = self._local.receive_arrived(tensor, tag, timeout_s)
        except PycommError as error:
            self._of_host(error)  # ends all messages
            return None
        return None if work is None else self._here(work)

    def _here(self, work: _C.Work) -> _C.Work:
        """A message inside this host, with ranks of the whole group in source and errors."""

        def wait(timeout_s: float | None) -> None:
            try:
                work.wait(timeout_s)
            except PycommError as error:
                raise raised(self._of_host(error)) from None

        ranks = self._topology.neighbours
        return _C.Work.relayed(self._waits, "a message inside the host", [work], wait, ranks)

    def _of_host(self, error: BaseException) -> BaseException:
        """An error of a message inside this host, with the group's ranks; it ends the group unless it is a mismatch."""
        if isinstance(error, MismatchError):
            return self._failure.mismatch(error)
        assert isinstance(error, PycommError)
        cause = self._fail(self._failure.of_host(error, self._timeout_s))
        return cause.error("a message inside the host", self._seq, self.group)

    def _on_frame(self, frame: Frame) -> None:
        """On the thread that reads frames."""
        assert self._mail is not None
        if frame.kind == Kind.FAILED:
            cause = Cause.decode(frame.body.decode(errors="replace"))
            self._failure.settle(cause or Cause("lost", (frame.rank,), "it failed"), announce=False)
        elif frame.kind in (Kind.LEFT, Kind.HEARD):
            cause = Cause.decode(frame.body.decode(errors="replace"))
            if cause is None:
                self._failure.told.pop(frame.rank, None)
            else:
                self._failure.told[frame.rank] = cause
            if frame.kind == Kind.LEFT:
                self._failure.left.add(frame.rank)
                self._on_gone(frame.rank)
        elif frame.kind in (Kind.ASK, Kind.ANSWER):
            assert self._inquiry is not None
            self._inquiry.on_frame(frame)
        else:
            self._mail.on_frame(frame)

    def _on_gone(self, rank: int) -> None:
        assert self._mail is not None
        self._mail.on_gone(rank, self._failure.of_gone(rank))

    def _cause_of(self, error: WireError | PycommError, timeout_s: float) -> Cause:
        """The group cannot go on because of ``error``; returns what counts."""
        if isinstance(error, WireError):
            return self._fail(self._failure.of_wire(error, timeout_s))
        return self._fail(self._failure.of_host(error, timeout_s))

    def _on_bad(self, rank: int, why: str) -> None:
        self._fail(Cause("failed", (rank,), f"rank {rank} sent something that makes no sense: {why}"))

    def _fail(self, cause: Cause) -> Cause:
        return self._failure.settle(cause, announce=True)

    def _expire(self, peer: int | None, call: str, timeout_s: float) -> None:
        """A message between hosts has not come in time."""
        waited = self._others if peer is None else (peer,)
        said = f"did not answer {call} within {timeout_s:g} s"
        self._fail(self._failure.expired(waited, () if peer is None else waited, said))

    @property
    def _others(self) -> tuple[int, ...]:
        """The ranks of other hosts."""
        return tuple(rank for rank in range(self.world_size) if not self._topology.is_here(rank))

    def _missing(self) -> set[int]:
        """The ranks of other hosts that callers wait for."""
        peers = set() if self._mail is None else self._mail.missing()
        ranks = set(self._others) if None in peers else {peer for peer in peers if peer is not None}
        return ranks.union(self._steps.missing, self._connecting) if self._queue.is_awaited() else ranks

    def _cut(self, cause: Cause) -> None:
        """End all that waits on this rank."""
        self._local.abort(cause.encode())
        if self._wire is not None:
            self._wire.cut()
        if self._mail is not None:
            self._mail.end(lambda call: cause.error(call, 0, self.group))

    def _part(self, local: LocalGroup, ranks: Sequence[int], group: str) -> Backend:
        """A new group of these ranks, of which this is one."""
        hosts = [self._topology.host_of[rank] for rank in ranks]
        if not self._topology.flat and len(set(hosts)) == 1:
            return local.shm
        topology = Topology.of(ranks.index(self.rank), hosts)

        def check() -> None:
            if (cause := self._failure.cause) is not None:
                raise WireError(next(iter(cause.ranks), self.rank), False, cause.text)
            gone = set() if self._frames is None else self._frames.gone
            for rank in ranks:
                if rank in gone and rank not in self._failure.left:
                    raise WireError(rank, False, "its connection is closed")

        args = self._store, self._device, self._strict, self._timeout_s
        self._connecting = tuple(rank for rank in ranks if not self._topology.is_here(rank))
        try:
            return HostsBackend(self.name, group, topology, local, *args, check, [self.tokens[rank] for rank in ranks])
        except PeerTimeoutError as error:
            late = WireError(self.rank, True, str(error))
            late.waited = late.silent = self._connecting
            raise late from error
        finally:
            self._connecting = ()

    def _tell(self, frame: Frame) -> None:
        assert self._frames is not None
        for rank in range(self.world_size):
            if rank != self.rank:
                self._frames.send(rank, frame)

    def _begin(self) -> None:
        """Of every call: whether it may be issued."""
        self._check_process()
        if self._closed:
            raise PycommError(f"communicator {self.group!r} is closed")
        self._heard.carry_on()
        if self._has_told:
            self._has_told = False
            self._tell(Frame(Kind.HEARD, self.rank))

    def _check_process(self) -> None:
        if self._process != os.getpid():
            raise PycommError("this is a forked process: the communicator belongs to its parent")
