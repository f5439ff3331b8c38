"""NCCL between GPUs. See docs/nccl.md.

Calls are enqueued and return at once: synchronous ones on the caller's current stream, asynchronous ones on the
communicator's own. NCCL does the sums, in an order of its own, but for the all-reduces that pycomm's own kernels do
where ranks map each other's memory (``symmetric.py``). What goes wrong surfaces at the next call or in
``synchronize``; :class:`pycomm.backends.nccl.watchdog.Watchdog` finds it out.
"""

from __future__ import annotations

import logging
import math
import os
import struct
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from pycomm import _C
from pycomm.arguments import REDUCED
from pycomm.backends import Backend, Capabilities
from pycomm.backends.causes import Cause
from pycomm.backends.nccl.control import groups_on_the_host
from pycomm.backends.nccl.gpu import Gpu
from pycomm.backends.nccl.library import load_nccl
from pycomm.backends.nccl.mapping import Mapper
from pycomm.backends.nccl.symmetric import Symmetric
from pycomm.backends.nccl.thresholds import Thresholds
from pycomm.backends.nccl.watchdog import Watchdog
from pycomm.backends.shm import ShmBackend
from pycomm.errors import BackendUnavailableError, MismatchError, PycommError, StrictOrderError
from pycomm.rendezvous import Rendezvous

__all__ = ["NcclBackend"]

_log = logging.getLogger("pycomm")
_SPLIT = struct.Struct("<?qq")
_ID_BYTES = 128  # of NCCL's unique id
_NO_BOUND_S = 1e8  # an operation's own deadline ends it
Enqueue = Callable[[_C.NcclOptions], _C.NcclOperation]


class NcclBackend(Backend):
    """One rank's end; see :class:`pycomm.backends.Backend`.

    Args:
        control: a group of the same ranks on the host, for the watchdog; None: a world of one.
        desk: another, for what all ranks agree on in calls.

    Attributes:
        own_kernels: which all-reduces pycomm's kernels do, or why none.
    """

    name = "nccl"
    capabilities = Capabilities(orders_on_device=True)

    def __init__(
        self,
        core: _C.NcclCommunicator,
        library: _C.NcclLibrary,
        gpu: Gpu,
        control: Backend | None,
        desk: Backend | None,
        group: str,
        rank: int,
        world_size: int,
        timeout_s: float,
    ) -> None:
        self.device = gpu.device
        self.rank = rank
        self.world_size = world_size
        self.group = group
        self._core = core
        self._library = library
        self._gpu = gpu
        self._control = control
        self._desk = desk
        self._timeout_s = timeout_s
        self._num_splits = 0
        self._max_ctas = 0
        self._closed = False
        self._waits = _C.Waits(rank, group)
        self._process = os.getpid()
        self.thresholds = Thresholds.agreed(desk, world_size, timeout_s)
        self._byte = torch.zeros(1, dtype=torch.uint8, device=gpu.device)  # what barriers reduce
        self._watchdog = Watchdog(core, control, gpu.driver, group, timeout_s)
        self.tokens = self._watchdog.tokens
        self._watchdog.start()
        self._mapper = None if desk is None or world_size == 1 else Mapper(core, library, gpu, desk, self.agree)
        self._symmetric: Symmetric | None = None
        self.own_kernels = "not used: a world of one"
        if self._mapper is not None:
            try:
                self._symmetric, self.own_kernels = self._mapper.agreed(self.thresholds, timeout_s)
            except PycommError:
                self._watchdog.leave(rank)
                raise
            if rank == 0:
                _log.info("group %s: own kernels on GPUs: %s", group, self.own_kernels)

    @classmethod
    def connect(
        cls, rendezvous: Rendezvous, hosts: Sequence[Hashable], group: str, device: torch.device | None = None
    ) -> NcclBackend:
        """Meet all ranks, on the host first.

        Args:
            hosts: by rank, the host by any name.
            device: None: this rank's own choice.
        """
        library, gpu = load_nccl(), Gpu.of_this_rank(device)
        rank, world_size, timeout_s = rendezvous.rank, rendezvous.world_size, rendezvous.timeout_s
        control, desk = groups_on_the_host(rendezvous, hosts, group)
        if rank == 0:
            unique_id = library.unique_id()
            rendezvous.put("nccl/id", unique_id.hex())
        else:
            unique_id = bytes.fromhex(rendezvous.get("nccl/id", rank=0, num_hex_digits=2 * _ID_BYTES))
        core = _C.NcclCommunicator(library, gpu.core, rank, world_size)
        core.connect(unique_id, timeout_s)
        return cls(core, library, gpu, control, desk, group, rank, world_size, timeout_s)

    def submit(
        self,
        call: _C.Call,
        output: torch.Tensor | None,
        input: torch.Tensor | None,
        async_op: bool,
        timeout_s: float,
    ) -> _C.Work | None:
        """By pycomm's own kernels where they are faster, else by NCCL.

        A barrier blocks the host, unlike other calls: code after it may rely on files that other ranks have written.
        """
        is_barrier = call.kind == "barrier"
        if is_barrier:
            call = call.at(self._byte.data_ptr(), self._byte.data_ptr())
        prefixes = None
        if call.kind == "scan":
            assert output is not None
            prefixes = _prefixes(output.detach().view(-1), call.op, self.rank, self.world_size)
            call = call.at(output.data_ptr(), prefixes.data_ptr())
        enqueue = partial(self._core.submit, call)
        # A budget is for NCCL to keep, and the kernels know numbers only.
        if call.kind == "all_reduce" and self._symmetric is not None and self._max_ctas == 0:
            assert output is not None
            kernel = self._symmetric.all_reduce(call, output.nbytes) if output.dtype in REDUCED else None
            if kernel is not None:
                enqueue = partial(self._core.submit_kernel, *kernel)
        operation = self._enqueue(enqueue, async_op, timeout_s, True)
        if is_barrier and not async_op:
            self._host_wait(operation)
        return self._work(operation, blocks=is_barrier, memory=prefixes) if async_op else None

    def exchange(
        self, messages: Sequence[tuple[_C.Call, torch.Tensor]], async_op: bool, timeout_s: float
    ) -> _C.Work | list[int]:
        calls = [call for call, _ in messages]
        to_itself = 0
        for call in calls:
            if call.root < 0:
                raise ValueError("src=None: NCCL cannot receive from any source; name the rank that sends")
            to_itself += (1 if call.kind == "send" else -1) if call.root == self.rank else 0
        if to_itself != 0:
            raise StrictOrderError("a message to oneself: NCCL hangs unless its send and receive are in one batch()")
        operation = self._enqueue(partial(self._core.exchange, calls), async_op, timeout_s, False)
        return self._work(operation) if async_op else [call.root for call in calls]

    def empty(self, shape: Sequence[int], dtype: torch.dtype, timeout_s: float) -> torch.Tensor:
        """Memory of this GPU, which peers map where all can; then it is zero."""
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        self.agree(b"", timeout_s, "empty", num_bytes)
        if self._symmetric is None or self._mapper is None or num_bytes == 0:
            return torch.empty(*shape, dtype=dtype, device=self.device)
        return self._symmetric.add(self._mapper.memory(num_bytes, timeout_s), shape, dtype)

    def peers(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        if self._symmetric is None:
            raise BackendUnavailableError(f"peers: ranks do not map each other's memory: {self.own_kernels}")
        return self._symmetric.peers(tensor)

    def split(self, color: int | None, key: int, timeout_s: float) -> NcclBackend | None:
        rows = self.agree(_SPLIT.pack(color is not None, color or 0, key), timeout_s, "split", 0)
        choices = [_SPLIT.unpack(row) for row in rows]
        colors = sorted({c for member, c, _ in choices if member})
        chosen = sorted((k, r) for r, (member, c, k) in enumerate(choices) if member and c == color)
        ranks = [r for _, r in chosen] if color is not None else []
        number, self._num_splits = self._num_splits, self._num_splits + 1
        place = ranks.index(self.rank) if ranks else 0
        control = desk = None
        if self._desk is not None:
            control = self._desk.split(color, place, timeout_s)
            if control is not None:
                desk = control.split(0, place, timeout_s)
        position = None if color is None else colors.index(color)  # NCCL's colors are not negative
        try:
            core = self._core.split(position, place, len(ranks), timeout_s)
        except PycommError as error:
            raise self._watchdog.failed_call(error, timeout_s) from None
        if core is None:
            return None
        group = f"{self.group}.{number}[{color}]"
        return NcclBackend(core, self._library, self._gpu, control, desk, group, place, len(ranks), self._timeout_s)

    @contextmanager
    def cta_budget(self, max_ctas: int) -> Iterator[None]:
        """Collectives enqueued in the block take so many CTAs at most; sends and receives are NCCL's choice."""
        if max_ctas < 1:
            raise ValueError(f"max_ctas={max_ctas}: it is a positive number")
        if not self._library.has_call_config:
            raise BackendUnavailableError(
                f"CTA budgets of single calls need NCCL 2.31, this is {self._library.version} ({self._library.file}); "
                f"NCCL_MAX_CTAS limits all calls of a process"
            )
        before, self._max_ctas = self._max_ctas, max_ctas
        try:
            yield
        finally:
            self._max_ctas = before

    def on_host(self, timeout_s: float) -> ShmBackend | None:
        """A group of the same ranks over shared memory, made by all of them; None: they share no host, or are one."""
        return self._desk.split(0, self.rank, timeout_s) if isinstance(self._desk, ShmBackend) else None

    def when_it_fails(self, callback: Callable[[], None]) -> None:
        """Call ``callback``, in any thread, once the group cannot go on."""
        self._watchdog.callbacks.append(callback)

    def synchronize(self, timeout_s: float) -> None:
        """Wait on the host for all that was enqueued, and raise what went wrong."""
        for operation in self._core.unfinished():
            self._host_wait(operation)
        self._watchdog.check("synchronize()", self._core.num_calls())

    def abort(self, reason: str) -> None:
        self._check_process()
        self._watchdog.abort(reason)

    def close(self, drain_s: float) -> None:
        """Finish what is queued, tell the others, leave. Local; idempotent."""
        if self._closed or self._process != os.getpid():
            return
        self._closed = True
        inside = self._waits.of_this_thread()
        if inside is not None:
            self.abort(f"closed inside {inside}")
        if self._watchdog.cause is None and not self._core.close(drain_s):
            self.abort(f"closed with operations that did not end within {drain_s:g} s")
        self._watchdog.leave(self.rank)
        for group in (self._desk, self._control):
            if group is not None:
                group.close(0.0)

    def _enqueue(self, enqueue: Enqueue, async_op: bool, timeout_s: float, of_all: bool) -> _C.NcclOperation:
        self._begin()
        self._watchdog.check("this call", self._core.num_calls() + 1)
        if of_all:
            self._watchdog.check_all_here("this call")
        options = _C.NcclOptions(self._gpu.current_stream(), async_op, timeout_s, self._max_ctas)
        try:
            return enqueue(options)
        except PycommError as error:
            raise self._watchdog.failed_call(error, timeout_s) from None
        except KeyboardInterrupt:
            self.abort("interrupted while it enqueued a call")
            raise

    def _work(
        self, operation: _C.NcclOperation, *, blocks: bool = False, memory: torch.Tensor | None = None
    ) -> _C.Work:
        """``memory``: what the call needs beside its tensors, and keeps as long."""
        wait = partial(self._wait, operation, blocks, memory)
        return _C.Work.relayed(self._waits, operation.call, [operation], wait)

    def _wait(
        self, operation: _C.NcclOperation, blocks: bool, memory: torch.Tensor | None, timeout_s: float | None
    ) -> None:
        """Make the current stream wait for the operation; the host, too, with ``timeout_s`` and if it ``blocks``."""
        self._watchdog.check(operation.call, operation.seq)
        operation.make_wait(self._gpu.current_stream())
        if timeout_s is None and not blocks:
            return
        if not operation.reach(_NO_BOUND_S if timeout_s is None else timeout_s):
            raise TimeoutError(f"{operation.call}: not done after {timeout_s:g} s; it goes on")
        self._watchdog.check(operation.call, operation.seq)

    def _host_wait(self, operation: _C.NcclOperation) -> None:
        try:
            self._work(operation, blocks=True).wait()
        except KeyboardInterrupt:
            self.abort("interrupted while it waited")
            raise

    def agree(self, row: bytes, timeout_s: float, kind: str = "agree", count: int | None = None) -> list[bytes]:
        """Over the host; what is enqueued on GPUs goes on meanwhile."""
        call = f"{kind}()"
        self._begin()
        self._watchdog.check(call, self._core.num_calls() + 1)
        if self._desk is None:
            return [row]
        self._watchdog.check_all_here(call)
        try:
            return self._desk.agree(row, timeout_s, kind, count)
        except MismatchError as error:
            text = ", ".join(f"rank {rank} called {call}" for rank, call in error.calls.items())
            raise MismatchError(f"group {self.group!r}: {text}", calls=error.calls) from None
        except PycommError as error:
            cause = Cause.of_host(error, timeout_s, self.tokens)
            raise self._watchdog.settle(cause).error(call, self._core.num_calls(), self.group) from None

    def _check_process(self) -> None:
        if self._process != os.getpid():
            raise PycommError("this is a forked process: the communicator belongs to its parent")

    def _begin(self) -> None:
        """Of every call: whether it may be issued."""
        self._check_process()
        if self._closed:
            raise PycommError(f"communicator {self.group!r} is closed")


def _prefixes(values: torch.Tensor, op: str, rank: int, world_size: int) -> torch.Tensor:
    """[world_size, N], what this rank gives to each rank's prefix: the values, or what changes nothing.

    Of the current stream: a call there may be left alone with it, one on another stream may not.
    """
    neutral: complex = 1 if op == "prod" else 0
    if op == "sum" and (values.is_complex() or values.is_floating_point()):
        neutral = complex(-0.0, -0.0) if values.is_complex() else -0.0  # 0.0 would change the sign of -0.0
    elif op in ("min", "max"):
        dtype = values.dtype
        if dtype == torch.bool:
            neutral = op == "min"
        elif dtype.is_floating_point:
            neutral = math.inf if op == "min" else -math.inf
        else:
            neutral = torch.iinfo(dtype).max if op == "min" else torch.iinfo(dtype).min
    prefixes = values.new_full((world_size, values.numel()), neutral)
    prefixes[rank:] = values
    return prefixes
