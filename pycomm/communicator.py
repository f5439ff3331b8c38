"""The Communicator: a group of ranks, their symmetric memory, and its life from :func:`init` to ``close``.

One semantics on every back end. Calls of a communicator run in the order in which they are issued; an asynchronous
call returns a :class:`Work` at once. Tensors of :meth:`Communicator.empty` are symmetric: peers map them, so nothing is
copied. Any other contiguous tensor works too, staged. The calls that move data are in
``collectives.py`` and ``messages.py``.
"""

from __future__ import annotations

import atexit
import functools
import itertools
import logging
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from pycomm import _C, env
from pycomm._C import Work
from pycomm.arguments import checked_int, checked_shape, checked_timeout, checked_type, tensor_on
from pycomm.backends import NAMES, Backend, Capabilities, choose
from pycomm.backends.agreement import all_or_none, pack_numbers, unpack_numbers
from pycomm.backends.causes import raised
from pycomm.backends.gloo import HostsBackend
from pycomm.backends.nccl import NcclBackend, Offer, offer
from pycomm.backends.shm import Flag, ShmBackend
from pycomm.errors import PycommError
from pycomm.fused import FusedCalls
from pycomm.messages import Messages
from pycomm.rendezvous import Rendezvous

__all__ = ["Communicator", "Flag", "Work", "communicator_of", "init"]

Number = TypeVar("Number", int, float)
Result = TypeVar("Result")

_log = logging.getLogger("pycomm")
_EXIT_DRAIN_S = 10.0  # at interpreter exit, calls that no peer joins may hold the process back so long, all together


class Communicator(FusedCalls, Messages):
    """A group of ranks. Made by :func:`init` and :meth:`split`; also a context manager that closes itself.

    Every call takes ``async_op`` (return a :class:`Work` at once instead of waiting) and ``timeout_s`` (None: the
    communicator's). Errors on the host are raised by the call itself, or by ``Work.wait``:

    * ``ValueError`` / ``TypeError``: wrong arguments; nothing was sent.
    * ``MismatchError``: ranks called different things; nothing was written and the communicator stays usable.
    * ``PeerTimeoutError``, ``PeerLostError``: ranks are missing or gone; the communicator cannot be used any more.

    Attributes:
        key: a text that no other communicator of this process ever has; :func:`communicator_of` finds it again.
        attached: what a layer above keeps for this communicator, and as long as it, by its class. It must refer to the
            communicator weakly, or that lives until the next garbage collection.
    """

    def __init__(self, backend: Backend, timeout_s: float) -> None:
        super().__init__(backend, timeout_s)
        self.backend = backend.name
        self.capabilities: Capabilities = backend.capabilities
        self.name = backend.group
        self._finalizer = weakref.finalize(self, _close, backend, self._calls, _EXIT_DRAIN_S)
        self._finalizer.atexit = False
        self.key = _known().add(self)
        self.attached: dict[type, Any] = {}

    def __deepcopy__(self, memo: dict[int, object]) -> Communicator:
        """Itself: copies of a module that has a communicator communicate with it."""
        return self

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Allocate symmetric memory: collective, the same bytes on every rank, contents undefined.

        Returns:
            A tensor of ``shape`` on ``comm.device`` whose memory every rank maps (on GPUs: where they can, else memory
            of this one; docs/nccl.md). Freeing it is local; the memory is used again once every rank has freed its
            part.

        Raises:
            MemoryError: a rank cannot have its memory, which is free on its host and inside the limits of its process
                and of its cgroups; on every rank, with the reason. Nothing was allocated, and the communicator goes on.
            MismatchError: ranks ask for different sizes.
            TypeError, ValueError: sizes or a dtype that cannot be; nothing was sent.
        """
        return self._backend.empty(checked_shape(shape, dtype), dtype, self.timeout_s)

    def peers(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's part of a symmetric tensor, mapped here, by rank; ``[rank]`` is ``tensor``'s own memory.

        Valid while its owner keeps its part; reading and writing is ordered by barriers or collectives only. Not
        collective.

        Args:
            tensor: contiguous, a tensor of :meth:`empty` or a part of one.
        """
        return self._backend.peers(tensor_on(self.device, tensor))

    def flag(self, tensor: torch.Tensor) -> Flag:
        """A barrier in two halves, :meth:`Flag.post` and :meth:`Flag.wait`: how far each rank has come.

        For operations that read peers' memory while they compute. Host transport only. Not collective.

        Args:
            tensor: one int64 of symmetric memory, zero on all ranks before the first post; nothing else writes it.

        Raises:
            ValueError: ``tensor`` is not one int64 of symmetric memory.
            BackendUnavailableError: another back end.
        """
        tensor = tensor_on(self.device, tensor, "flag")
        if tensor.dtype != torch.int64 or tensor.numel() != 1:
            raise ValueError(f"flag is {tensor.dtype} {list(tensor.shape)}: it must be one torch.int64")
        return self._backend.flag(tensor, self.timeout_s)

    def on_host(self) -> Communicator | None:
        """The same ranks on the host transport: this one, if it is of that; on NCCL a new one, made by all ranks.

        Returns:
            None: the ranks share no host, or are one rank on NCCL.
        """
        backend = self._backend.on_host(self.timeout_s)
        if backend is self._backend:
            return self
        return None if backend is None else Communicator(backend, self.timeout_s)

    def when_it_fails(self, callback: Callable[[], None]) -> None:
        """On NCCL: call ``callback``, in any thread, once the group has failed; to end what waits for it on the GPU."""
        self._backend.when_it_fails(callback)

    def agree(self, row: Sequence[Number]) -> list[list[Number]]:
        """Show every rank a small row of numbers, and see theirs: collective; nothing is enqueued on a GPU.

        Args:
            row: ints of 64 bits and floats, as many on every rank, 1024 at most. An int comes back as an int.

        Returns:
            Every rank's row, by rank.

        Raises:
            MismatchError: rows have different lengths, or a rank called something else; says who did what.
            TypeError, ValueError: the row is something else; nothing was sent.
        """
        rows = self._backend.agree(pack_numbers(row), self.timeout_s, count=len(row))
        return [unpack_numbers(other) for other in rows]

    def all_or_none(self, action: Callable[[], Result]) -> Result:
        """Run ``action`` on every rank, and return its result here if it succeeded on all of them: collective.

        For work of this rank that may fail on one rank alone, such as opening a file: none goes on without the others.

        Raises:
            MemoryError, PycommError: the action failed on a rank (MemoryError: for want of memory); the same on all
                ranks, with the reasons by rank.
        """
        return all_or_none(action, lambda row: self._backend.agree(row, self.timeout_s))

    def split(self, color: int | None, key: int | None = None) -> Communicator | None:
        """Divide the group: collective; ranks of equal ``color`` form a new communicator, ordered by (key, rank).

        Args:
            color: any integer; None: this rank is in no group and gets None.
            key: order in the new group; None: this rank's number here.
        """
        color = None if color is None else checked_int(color, "color", or_none=True)
        key = self.rank if key is None else checked_int(key, "key", or_none=True)
        backend = self._backend.split(color, key, self.timeout_s)
        return None if backend is None else Communicator(backend, self.timeout_s)

    def synchronize(self) -> None:
        """Block until all calls of this communicator that were made here are over, and raise what went wrong in them.

        On GPUs calls are over when the device is through with them, and errors surface here or at the next call.
        """
        self._calls.wait()
        self._backend.synchronize(self.timeout_s)
        self._calls.drop_finished()  # on GPUs they were not over before

    @contextmanager
    def cta_budget(self, max_ctas: int) -> Iterator[None]:
        """Collectives enqueued in the block take so many of the GPU's CTAs at most, so that a matmul beside them keeps
        the rest. The same on all ranks.

        Raises:
            BackendUnavailableError: the back end is not NCCL, or NCCL is older than 2.31.
        """
        with self._backend.cta_budget(max_ctas):
            yield

    @contextmanager
    def busy(self, what: str) -> Iterator[None]:
        """In the block this rank works on ``what`` ("training the tokenizer") and calls nothing. Peers on its host are
        told so when their wait for it runs out."""
        with _C.Activity(what):
            yield

    def abort(self, reason: str) -> None:
        """Tell all peers that this rank cannot go on: their waits raise ``PeerLostError`` with the reason at once.

        If it cannot go on because other ranks were lost, in this group or another, peers are told of those
        (``lost_ranks``).
        """
        checked_type(reason, str, "reason", "a text")
        self._backend.abort(reason.encode(errors="backslashreplace").decode())

    def close(self) -> None:
        """Finish what is queued and leave the group. Local; peers that still wait for this rank are told. Idempotent.

        Calls of other threads that are under way are waited for, up to ``timeout_s``, and then aborted. In a signal
        handler inside a call of this communicator, that call ends at once, with ``PeerLostError``.

        Tensors of :meth:`empty` stay valid.
        """
        self._leave(self.timeout_s)

    def _leave(self, drain_s: float) -> None:
        if self._finalizer.detach() is not None:
            _close(self._backend, self._calls, drain_s)

    def __enter__(self) -> Communicator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self.abort(f"{type(error).__name__}: {error}")
        self.close()

    def __repr__(self) -> str:
        return f"Communicator({self.name!r}, rank {self.rank} of {self.world_size}, {self.backend})"


def init(
    backend: str = "auto",
    timeout_s: float = 600.0,
    store: dist.Store | None = None,
    rank: int | None = None,
    world_size: int | None = None,
    strict: bool = False,
    name: str = "world",
    device: torch.device | None = None,
) -> Communicator:
    """Join the ranks that were launched together and return the communicator of all of them.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as torchrun sets them, else what
    Open MPI's or MPICH's mpirun or SLURM's srun set; beside an initialised torch.distributed it takes rank, world size
    and store from there; without any of these it is a world of one.

    Args:
        backend: "auto": "nccl" where every rank can use it on a GPU of its own, else "host"; "nccl": GPUs, one a
            rank; "host": tensors on the CPU, whatever GPUs there are, through shared memory on one host, and on
            several through shared memory inside each and gloo between them; "shm": processes of one host; "gloo":
            sockets alone, between any processes. ``comm.device`` is where its tensors are.
        timeout_s: seconds that any wait for another rank may take, here and in later calls.
        store: where the ranks meet, with ``rank`` and ``world_size``.
        strict: reject what hangs on NCCL: calls on several communicators that ranks issue in different orders, and
            blocking calls that wait for each other, raise ``StrictOrderError`` on every rank that is part of it.
            For tests; costs O(world_size ** 2) a call.
        name: what errors call the group.
        device: of "nccl": this rank's GPU, with its index; None: the one that is current, else number LOCAL_RANK.

    Raises:
        ValueError, TypeError: contradicting, missing or wrong arguments or environment variables.
        MismatchError: ranks have different versions, builds, world sizes or back ends.
        PeerTimeoutError: ranks did not come; names them.
        PeerLostError: ranks died, or gave up with an error, before all had met; names them.
        PycommError: there is no store, or two processes are the same rank: two jobs were given one MASTER_PORT.
        BackendUnavailableError: the back end cannot work here; says why.
    """
    timeout_s = checked_timeout(timeout_s)
    checked_type(backend, str, "backend", f"one of the names {', '.join(NAMES)}")
    checked_type(strict, bool, "strict", "True or False")
    checked_type(name, str, "name", "a text")
    checked_type(store, dist.Store | None, "store", "a torch.distributed.Store, or None")
    checked_type(device, torch.device | None, "device", "a torch.device with its index, or None")
    rank = None if rank is None else checked_int(rank, "rank", or_none=True)
    world_size = None if world_size is None else checked_int(world_size, "world_size", or_none=True)
    if device is not None and (backend != "nccl" or device.type != "cuda" or device.index is None):
        raise ValueError(f"device={device} with backend={backend!r}: it is a CUDA device with its index, for 'nccl'")
    level = env.simd()
    if level is not None:
        _C.set_simd_level(level)
    try:
        with Rendezvous(store, rank, world_size, timeout_s) as rendezvous:
            return Communicator(_connect(rendezvous, backend, name, strict, device), timeout_s)
    except PycommError as error:
        raise raised(error)  # noqa: B904


def _connect(rendezvous: Rendezvous, backend: str, name: str, strict: bool, device: torch.device | None) -> Backend:
    """Choose the back end, as all ranks do, and connect to them."""
    mine = offer(asked_for=backend == "nccl") if backend in ("nccl", "auto") else Offer()
    greetings = rendezvous.greet(backend, strict, mine.version, mine.obstacle, mine.gpu)
    hosts = [greeting.host for greeting in greetings]
    choice = choose(
        backend,
        hosts,
        [greeting.obstacle for greeting in greetings],
        [greeting.gpu for greeting in greetings],
    )
    if rendezvous.rank == 0:
        _log.info("back end %s: %s", choice.name, choice.reason)
    if choice.name == "shm":
        return ShmBackend.connect(rendezvous, name, strict)
    if choice.name == "nccl":
        return NcclBackend.connect(rendezvous, hosts, name, device)
    places = list(range(len(hosts))) if choice.name == "gloo" else hosts
    return HostsBackend.connect(choice.name, rendezvous, places, name, strict)


def _close(backend: Backend, calls: _C.Calls, drain_s: float) -> None:
    backend.close(drain_s)
    calls.clear()


class _Known:
    """The communicators of this process, by key. What is still open when the interpreter exits is closed then, the
    latest first, in ``_EXIT_DRAIN_S`` in all: daemon threads may be in calls of any of them."""

    def __init__(self) -> None:
        self.by_key: weakref.WeakValueDictionary[str, Communicator] = weakref.WeakValueDictionary()
        self._numbers = itertools.count()
        atexit.register(self._close)

    def add(self, communicator: Communicator) -> str:
        key = f"{communicator.name}#{next(self._numbers)}"
        self.by_key[key] = communicator
        return key

    def _close(self) -> None:
        deadline = time.monotonic() + _EXIT_DRAIN_S
        for communicator in reversed(list(self.by_key.values())):
            communicator._leave(max(deadline - time.monotonic(), 0.0))


@functools.cache
def _known() -> _Known:
    return _Known()


def communicator_of(key: str) -> Communicator:
    """The communicator of that :attr:`Communicator.key`: operators of torch.library take texts, not objects.

    Raises:
        ValueError: it is gone, or never was.
    """
    found = _known().by_key.get(key)
    if found is None:
        raise ValueError(f"no communicator has the name {key!r} any more: keep it while its layers are used")
    return found
