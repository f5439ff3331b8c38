"""The thread that looks after a group on NCCL: deadlines, lost ranks, errors that NCCL or the device report late, calls
that differ.

NCCL waits for ever and says nothing of why. So the ranks have a second communicator on the host, the control group, on
which their watchdogs meet in rounds (``pulse.py``), whatever the GPUs do. A rank that dies, leaves, aborts or stops is
seen there, by the errors of the host transport. A failure is settled once: the first cause counts, is told to the
others through the control group, aborts the NCCL communicator, and is raised by every later call.
"""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Callable, Sequence

import torch

from pycomm import _C
from pycomm.backends import Backend
from pycomm.backends.causes import LEFT, Cause, Heard, heard, ranks_text
from pycomm.backends.nccl.pulse import Comparison, Round
from pycomm.errors import PeerTimeoutError, PycommError

__all__ = ["Watchdog"]

_LOOK_S = 0.05
_GRACE_S = 1.0  # for news of the reason, before a rank names what it saw itself
_ROUND_S = 1e9  # a round waits as long as it takes: calls have their own deadlines
_BOARD = struct.Struct("<Q24s")  # calls, latest call: on the host's symmetric memory, of each rank


class Watchdog:
    """See the module.

    Args:
        core: the NCCL communicator.
        control: a communicator of the same ranks on the host, for this alone; None: a world of one.
        driver: for the thread's own settings.
    """

    def __init__(
        self, core: _C.NcclCommunicator, control: Backend | None, driver: _C.CudaDriver, group: str, timeout_s: float
    ) -> None:
        self.cause: Cause | None = None
        self.callbacks: list[Callable[[], None]] = []  # when there is a cause
        self._core = core
        self._control = control
        self._calls = None if control is None else control.calls()
        self._driver = driver
        self._group = group
        self._lock = threading.RLock()  # a signal handler may come while this thread holds it
        self._rank = 0 if control is None else control.rank
        self.tokens = [0] if control is None else control.tokens
        self._heard = Heard(self._rank, self.tokens)
        self._known = threading.Event()
        self._comparison = Comparison(core, group)
        self._round: Round | None = None
        self._exchange: tuple[_C.Work | None, torch.Tensor, torch.Tensor] | None = None  # keeps its tensors
        self._gone: Cause | None = None  # a peer has left: nobody compares any more
        self._suspected = 0.0  # when an error that a peer may explain was seen first
        self._board = self._shared_board(timeout_s)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="pycomm-nccl", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def leave(self, rank: int) -> None:
        """Tell the others that this rank leaves in peace, and stop. Idempotent."""
        if self.cause is None and self._control is not None:
            cause = self._heard.cause("left") or Cause("lost", (rank,), f"rank {rank} {LEFT}")
            self._control.abort(cause.encode())
        with self._lock:
            self.cause = self.cause or Cause("lost", (rank,), "the communicator is closed")
        self._stopping.set()
        if self._thread is not threading.current_thread() and self._thread.is_alive():
            self._thread.join()

    def abort(self, reason: str) -> None:
        """This rank gives up."""
        how = f"aborted: {reason}"
        self.settle(self._heard.cause(how) or Cause("lost", (self._rank,), f"rank {self._rank} {how}"))

    def check(self, call: str, seq: int) -> None:
        """Of every call: raise what has gone wrong so far."""
        self._heard.carry_on()
        if self.cause is not None:
            raise self.cause.error(call, seq, self._group, later=True)

    def check_all_here(self, call: str) -> None:
        """Raise if a rank has left, so that ``call``, of all ranks, would wait for it."""
        if self._gone is not None:
            raise self.settle(self._gone).error(call, self._core.num_calls(), self._group)

    def settle(self, cause: Cause, *, announce: bool = True) -> Cause:
        """The group cannot go on because of ``cause``, unless it has failed already; returns what counts."""
        cause = cause.rooted(self.tokens)
        with self._lock:
            if self.cause is not None:
                return self.cause
            self.cause = cause
        self._known.set()
        if announce and self._control is not None:
            self._control.abort(cause.encode())
        self._core.abort()
        for callback in self.callbacks:
            callback()
        if cause.roots:
            heard(cause.roots, f"{cause.text} (group {self._group!r})")
        return cause

    def failed_call(self, error: PycommError, timeout_s: float) -> PycommError:
        """What to raise for an error of the NCCL communicator that was met in enqueuing a call."""
        seq = self._core.num_calls()
        call = str(self._core.latest())
        if isinstance(error, PeerTimeoutError):
            cause = self.settle(self._expired(call, seq, None, timeout_s))
        else:
            self._known.wait(_GRACE_S)  # NCCL may see a peer's end before its watchdog tells the reason
            cause = self.cause or self.settle(Cause("failed", (), str(error)))
        return cause.error(f"{call}, call {seq} of {self._group!r}", seq, self._group)

    def _loop(self) -> None:
        self._driver.allow_queries_during_capture()
        while not self._stopping.wait(_LOOK_S):
            try:
                if self.cause is None:
                    self._look()
                if self.cause is None and self._gone is None and self._control is not None:
                    self._meet(self._control)
            except Exception as error:  # noqa: BLE001  (without this thread the group would hang: all must end)
                self.settle(Cause("failed", (), f"its watchdog failed: {type(error).__name__}: {error}"))

    def _look(self) -> None:
        """At deadlines, at what NCCL and the device say, and at pycomm's own kernels."""
        self._show()
        failures = self._core.kernel_failures()
        for code, rank, block, expected, seen in failures:
            if code == _C.KERNEL_EXPIRED:  # else another rank, or the host, has stopped it
                where = f"(block {block}, expected {expected}, seen {seen})"
                text = f"a kernel gave up: {ranks_text([rank])} did not come in time {where}"
                self.settle(Cause("expired", (rank,), text))
                return
        error = self._core.error()
        suspicion = f"NCCL: {error}" if error else "another rank's kernels stopped this rank's" if failures else ""
        if suspicion:
            self._suspected = self._suspected or time.monotonic()
            if time.monotonic() - self._suspected > _GRACE_S:
                self.settle(Cause("failed", (), suspicion))
            return
        unfinished = self._core.unfinished()
        for operation in unfinished:
            if operation.expired():
                peer = operation.source if operation.is_message else None
                self.settle(self._expired(operation.call, operation.seq, peer, operation.timeout_s))
                return
        if unfinished and self._gone is not None:
            self._await_end(unfinished)

    def _meet(self, control: Backend) -> None:
        """Take part in rounds; never waits for the others."""
        try:
            if self._exchange is None:
                self._round = self._comparison.round()
                self._send(control, next(self._round))
                return
            work, table, _ = self._exchange
            if work is not None and not work.done():
                return
            if work is not None:
                work.wait()
        except PycommError as error:
            self._lost(error)
            return
        assert self._round is not None
        size = table.numel() // control.world_size
        rows = [row.numpy().tobytes() for row in table.split(size)]
        try:
            self._send(control, self._round.send(rows))
        except StopIteration as end:
            self._exchange = self._round = None
            if end.value is not None:
                self.settle(end.value, announce=False)  # all find it out

    def _send(self, control: Backend, row: bytes) -> None:
        assert self._calls is not None
        mine = torch.frombuffer(bytearray(row), dtype=torch.uint8)
        table = torch.empty(len(row) * control.world_size, dtype=torch.uint8, device="cpu")
        self._exchange = self._calls.all_gather(table, mine, None, True, _ROUND_S), table, mine

    def _lost(self, error: PycommError) -> None:
        """The control group has failed."""
        cause = Cause.of_host(error, _ROUND_S, self.tokens)
        if LEFT in cause.text:
            self._gone = cause
        else:
            self.settle(cause, announce=False)

    def _await_end(self, unfinished: Sequence[_C.NcclOperation]) -> None:
        """A rank has left: what it had finished of its part finishes here, too; the rest never does."""
        assert self._gone is not None
        end = time.monotonic() + _GRACE_S
        for operation in unfinished:
            if not operation.reach(max(end - time.monotonic(), 0.0)):
                self.settle(self._gone)
                return

    def _expired(self, call: str, seq: int, peer: int | None, timeout_s: float) -> Cause:
        """``call`` did not end within ``timeout_s``: which ranks have not come to it, and what they are in."""
        shown = self._everyone()
        late = [rank for rank, (num_calls, _) in enumerate(shown) if num_calls < seq]
        missing = late if peer is None else [peer]
        if not missing:
            who = "its kernel" if "kernel" in call else "NCCL"
            text = f"all ranks have called it, but {who} did not finish within {timeout_s:g} s"
            return Cause("expired", (), text)
        states = "; ".join(
            f"rank {rank} has made {num_calls} call(s), the latest {latest}"
            for rank, (num_calls, latest) in enumerate(shown)
            if rank in missing
        )
        return Cause("expired", tuple(missing), f"{ranks_text(missing)} did not come within {timeout_s:g} s ({states})")

    def _everyone(self) -> list[tuple[int, str]]:
        """How many collectives each rank has called, and its latest call, as far as it is known here."""
        if self._board:
            rows = [_BOARD.unpack(board.numpy().tobytes()) for board in self._board]
            return [(num_calls, str(_C.Call.unpack(latest))) for num_calls, latest in rows]
        return [(row.num_calls, str(_C.Call.unpack(row.latest))) for row in self._comparison.rows]

    def _shared_board(self, timeout_s: float) -> list[torch.Tensor]:
        """Every rank's line, where the ranks share memory: readable also while a rank is stopped. Collective."""
        if self._control is None or self._control.name != "shm":
            return []
        mine = self._control.empty((_BOARD.size,), torch.uint8, timeout_s)
        mine.zero_()
        return self._control.peers(mine)

    def _show(self) -> None:
        """For people: a line that another rank reads while it is written misnames a call at worst."""
        if self._board and self._control is not None:
            line = bytearray(_BOARD.pack(self._core.num_calls(), self._core.latest().pack()))
            self._board[self._control.rank].copy_(torch.frombuffer(line, dtype=torch.uint8))
