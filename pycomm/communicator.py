"""The Communicator: a group of ranks and the calls that move data between them.

One semantics on every back end (docs/algorithms.md has steps, bytes and order of each collective). Calls of a
communicator run in the order in which they are issued; an asynchronous call returns a :class:`Work` at once. Tensors
of
:meth:`Communicator.empty` are symmetric: peers map them, so nothing is copied. Any other contiguous tensor works too,
staged.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections import deque
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from pycomm import _C, env
from pycomm.backends import Backend, choose
from pycomm.backends.shm import ShmBackend
from pycomm.rendezvous import Rendezvous

__all__ = ["Communicator", "Work", "init"]

_log = logging.getLogger("pycomm")
_EXIT_DRAIN_S = 10.0  # at interpreter exit, operations that no peer joins may hold the process back so long


class Work:
    """An asynchronous operation. It keeps its tensors alive until it is done, even if the Work itself is dropped."""

    def __init__(self, core: _C.Work) -> None:
        self._core = core

    def wait(self, timeout_s: float | None = None) -> None:
        """Return when the operation is done; raise what went wrong in it.

        Args:
            timeout_s: seconds to wait here; None: as long as the operation's own timeout lets it run.

        Raises:
            TimeoutError: not done after ``timeout_s``; the operation goes on.
            PycommError: the operation failed.
        """
        self._core.wait(timeout_s)

    def done(self) -> bool:
        """True once the operation is over, well or not."""
        return self._core.done()


class Communicator:
    """A group of ranks. Made by :func:`init` and :meth:`split`; also a context manager that closes itself.

    Every call takes ``async_op`` (return a :class:`Work` at once instead of waiting) and ``timeout_s`` (None: the
    communicator's). Errors on the host are raised by the call itself, or by ``Work.wait``:

    * ``ValueError`` / ``TypeError``: wrong arguments; nothing was sent.
    * ``MismatchError``: ranks called different things; nothing was written and the communicator stays usable.
    * ``PeerTimeoutError``, ``PeerLostError``: ranks are missing or gone; the communicator cannot be used any more.
    """

    def __init__(self, backend: Backend, timeout_s: float, rendezvous: Rendezvous | None = None) -> None:
        self.rank = backend.rank
        self.world_size = backend.world_size
        self.backend = backend.name
        self.device = backend.device
        self.name = backend.group
        self.timeout_s = timeout_s
        self._backend = backend
        self._rendezvous = rendezvous  # rank 0's store serves as long as somebody may come for it
        self._in_flight: deque[tuple[_C.Work, torch.Tensor]] = deque()
        self._finalizer = weakref.finalize(self, _close, backend, self._in_flight, _EXIT_DRAIN_S)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Allocate symmetric memory: collective, the same bytes on every rank, contents undefined.

        Returns:
            A tensor of ``shape`` whose memory every rank maps. Freeing it is local; the memory is used again once every
            rank has freed its part.

        Raises:
            MemoryError: a rank cannot have its memory; on every rank, nothing was allocated.
            MismatchError: ranks ask for different sizes.
        """
        if any(size < 0 for size in shape):
            raise ValueError(f"empty: negative size in {tuple(shape)}")
        return self._backend.empty(shape, dtype, self.timeout_s)

    def peers(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's part of a symmetric tensor, mapped here, by rank; ``[rank]`` is ``tensor``'s own memory.

        Valid while its owner keeps its part; reading and writing is ordered by barriers or collectives only. Not
        collective.

        Args:
            tensor: contiguous, a tensor of :meth:`empty` or a part of one.
        """
        return self._backend.peers(self._checked(tensor))

    def all_reduce(
        self, tensor: Any, op: str = "sum", *, async_op: bool = False, timeout_s: float | None = None
    ) -> Work | None:
        """Reduce ``tensor`` over all ranks, in place, in rank order: the bits are the same on every rank.

        Push two-shot on symmetric tensors (2 x bytes touched a rank), staged in slices on others, one-shot when tiny.

        Args:
            tensor: contiguous, same dtype and number of elements on every rank (shapes may differ). float32 float64
                float16 bfloat16 int8 uint8 int32 int64. 16-bit floats accumulate in fp32 and round once.
            op: "sum", "avg" (floating point only), "min", "max" or "prod".
        """
        tensor = self._checked(tensor)
        return self._work(self._backend.all_reduce(tensor, op, async_op, self._timeout(timeout_s)), tensor)

    def broadcast(
        self, tensor: Any, root: int = 0, *, async_op: bool = False, timeout_s: float | None = None
    ) -> Work | None:
        """Copy ``tensor`` of rank ``root`` to ``tensor`` of every rank.

        Args:
            tensor: contiguous, same dtype and number of elements on every rank.
        """
        tensor = self._checked(tensor)
        return self._work(self._backend.broadcast(tensor, root, async_op, self._timeout(timeout_s)), tensor)

    def barrier(self, *, async_op: bool = False, timeout_s: float | None = None) -> Work | None:
        """Return once every rank has called it."""
        return self._work(self._backend.barrier(async_op, self._timeout(timeout_s)), None)

    def split(self, color: int | None, key: int | None = None) -> Communicator | None:
        """Divide the group: collective; ranks of equal ``color`` form a new communicator, ordered by (key, rank).

        Args:
            color: any integer; None: this rank is in no group and gets None.
            key: order in the new group; None: this rank's number here.
        """
        backend = self._backend.split(color, self.rank if key is None else key, self.timeout_s)
        return None if backend is None else Communicator(backend, self.timeout_s)

    def abort(self, reason: str) -> None:
        """Tell all peers that this rank cannot go on: their waits raise ``PeerLostError`` with the reason at once."""
        self._backend.abort(reason)

    def close(self) -> None:
        """Finish what is queued and leave the group. Local; peers that still wait for this rank are told. Idempotent.

        Tensors of :meth:`empty` stay valid.
        """
        if self._finalizer.detach() is not None:
            _close(self._backend, self._in_flight, self.timeout_s)

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

    def _timeout(self, timeout_s: float | None) -> float:
        return self.timeout_s if timeout_s is None else checked_timeout(timeout_s)

    def _checked(self, tensor: Any) -> torch.Tensor:
        """A torch tensor that the back end can address: contiguous, on its device. Shares memory with ``tensor``."""
        if not isinstance(tensor, torch.Tensor):
            if not hasattr(tensor, "__dlpack__"):
                raise TypeError(f"{type(tensor).__name__} is neither a tensor nor an array that speaks DLPack")
            tensor = torch.from_dlpack(tensor)
        assert isinstance(tensor, torch.Tensor)
        if tensor.device != self.device:
            raise ValueError(
                f"the tensor is on {tensor.device}, communicator {self.name!r} ({self.backend}) works on {self.device}"
            )
        if not tensor.is_contiguous():
            raise ValueError(
                f"the tensor is not contiguous (shape {tuple(tensor.shape)}, strides {tensor.stride()}): "
                f"pass tensor.contiguous() and copy the result back, or lay the tensor out contiguously"
            )
        return tensor

    def _work(self, core: _C.Work | None, tensor: torch.Tensor | None) -> Work | None:
        if core is None:
            return None
        while self._in_flight and self._in_flight[0][0].done():
            self._in_flight.popleft()
        if tensor is not None:
            self._in_flight.append((core, tensor))
        return Work(core)


def init(
    backend: str = "auto",
    timeout_s: float = 600.0,
    store: dist.Store | None = None,
    rank: int | None = None,
    world_size: int | None = None,
    strict: bool = False,
) -> Communicator:
    """Join the ranks that were launched together and return the communicator of all of them.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as torchrun sets them; beside an
    initialised torch.distributed it takes rank, world size and store from there; without any of these it is a world
    of one.

    Args:
        backend: "auto" or "shm" (processes of one host).
        timeout_s: seconds that any wait for another rank may take, here and in later calls.
        store: where the ranks meet, with ``rank`` and ``world_size``.
        strict: reject what works on the host but hangs on NCCL: calls on several communicators that ranks issue in
            different orders raise ``StrictOrderError`` on every rank. For tests; costs O(world_size ** 2) a call.

    Raises:
        ValueError: contradicting or missing arguments or environment variables.
        MismatchError: ranks have different versions, builds, world sizes or back ends.
        PeerTimeoutError: ranks did not come; names them.
        BackendUnavailableError: the back end cannot work here; says why.
    """
    checked_timeout(timeout_s)
    level = env.simd()
    if level is not None:
        _C.set_simd_level(level)
    rendezvous = Rendezvous(store, rank, world_size, timeout_s)
    greetings = rendezvous.greet(backend, strict)
    choice = choose(backend, [greeting.host for greeting in greetings])
    if rendezvous.rank == 0:
        _log.info("back end %s: %s", choice.name, choice.reason)
    return Communicator(ShmBackend.connect(rendezvous, "world", strict), timeout_s, rendezvous)


def checked_timeout(timeout_s: float) -> float:
    """``timeout_s``, or ValueError if it is no positive number of seconds."""
    if not timeout_s > 0 or math.isnan(timeout_s):
        raise ValueError(f"timeout_s={timeout_s}: it is a positive number of seconds")
    return timeout_s


def _close(backend: Backend, in_flight: deque[tuple[_C.Work, torch.Tensor]], drain_s: float) -> None:
    backend.close(drain_s)
    in_flight.clear()
