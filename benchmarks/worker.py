"""One rank of one contender: started by group.py, it obeys the driver's commands until it is told to stop.

Between commands it blocks reading its socket, so an idle group costs no time on any core. It ends at once when the
driver goes away, whatever it is in.
"""

from __future__ import annotations

import gc
import json
import mmap
import os
import select
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Client, Connection
from pathlib import Path

import torch
from buffers import count_wrong, fill
from contenders import BOUND, CONTENDERS
from contenders.base import Contender
from linux import cores, die_with_parent
from operations import OPERATIONS

_LINE_SLOT = 8  # int64 per rank on the start line: one cache line each


def _leave_when_driver_does(connection: Connection) -> None:
    poller = select.poll()
    poller.register(connection.fileno(), select.POLLRDHUP)
    poller.poll()
    os._exit(1)  # the main thread may be inside a library that waits for a peer which is gone


class StartLine:
    """Lines the ranks up, untimed, within a fraction of a microsecond before each timed operation.

    The libraries' own barriers release their ranks at very different times (gloo's: hundreds of microseconds apart),
    and the early rank's wait for the late one would be booked on the operation. Only timing rests on this: the
    contender's own barrier, called before it, is what orders memory.
    """

    def __init__(self, path: Path, rank: int, world_size: int) -> None:
        with path.open("r+b") as file:
            self._slots = memoryview(mmap.mmap(file.fileno(), 0)).cast("q")
        self._mine = rank * _LINE_SLOT
        self._others = [r * _LINE_SLOT for r in range(world_size) if r != rank]
        self._patience = 1000 if world_size <= cores() else 1
        self._ticket = 0

    def wait(self) -> None:
        self._ticket += 1
        slots, ticket, looks = self._slots, self._ticket, 0
        slots[self._mine] = ticket
        for other in self._others:
            while slots[other] < ticket:
                looks += 1
                if looks % self._patience == 0:  # unbounded here: the driver kills a group that takes too long
                    os.sched_yield()


class Job:
    """One operation on one size and dtype: its buffers, and turns of timed iterations."""

    def __init__(self, contender: Contender, line: StartLine, operation: str, dtype: str, num_bytes: int) -> None:
        self._contender, self._line, self._op = contender, line, OPERATIONS[operation]
        element = getattr(torch, dtype)
        count = num_bytes // element.itemsize
        world_size = contender.world_size
        self._input = contender.empty(self._op.input_count(count, world_size), element)
        self._output = self._input  # in place, unless the operation has an output of its own
        if self._op.output_count is not None:
            self._output = contender.empty(self._op.output_count(count, world_size), element)
        self._sends = self._op.sends(contender.rank, world_size)
        self._receives = self._op.receives(contender.rank, world_size)
        self._run = getattr(contender, operation)(self._input, self._output)
        self._iteration = 0

    def turn(self, iterations: int) -> dict[str, object]:
        """One warm-up and then ``iterations`` timed ones; the first and the last result are checked."""
        began = time.perf_counter()
        wrong, times_us = 0, []
        gc.disable()
        for i in range(iterations + 1):
            times_us.append(self._iterate())
            if self._receives and i in (0, iterations):
                wrong += count_wrong(
                    self._op, self._output, self._contender.rank, self._contender.world_size, self._iteration
                )
        gc.enable()
        return {"times_us": times_us[1:], "wrong": wrong, "wall_s": time.perf_counter() - began}

    def _iterate(self) -> float:
        self._iteration += 1
        if self._receives and self._output is not self._input:
            self._output.zero_()
        if self._sends:
            fill(self._input, self._contender.rank, self._iteration)
        self._contender.sync()
        run = self._run
        self._line.wait()
        start = time.perf_counter_ns()
        run()
        end = time.perf_counter_ns()
        self._contender.settle()
        return (end - start) / 1e3


class Session:
    """The commands of the driver, by name. ``tuning``: for which of the contenders in these processes.

    Args:
        tuned: makes the contender whose thresholds are as PYCOMM_TUNE says.
    """

    def __init__(self, contender: Contender, line: StartLine, tuned: Callable[[str], Contender]) -> None:
        self._line, self._tuned = line, tuned
        self._contenders = {"": contender}
        self._jobs: dict[str, Job] = {}

    def prepare(self, operation: str, dtype: str, num_bytes: int, tuning: str = "") -> dict[str, object]:
        if tuning not in self._contenders:
            self._contenders[tuning] = self._tuned(tuning)
        contender = self._contenders[tuning]
        reason = contender.unsupported(operation, getattr(torch, dtype), num_bytes)
        if reason is not None:
            return {"unsupported": reason}
        self._jobs[tuning] = Job(contender, self._line, operation, dtype, num_bytes)
        return {}

    def turn(self, iterations: int, tuning: str = "") -> dict[str, object]:
        if tuning not in self._jobs:
            raise RuntimeError("a turn before anything was prepared")
        return self._jobs[tuning].turn(iterations)

    def release(self, tuning: str = "") -> dict[str, object]:
        self._jobs.pop(tuning, None)
        return {}

    def close(self) -> None:
        for contender in self._contenders.values():
            contender.close()


def serve(connection: Connection, contender: Contender, session: Session) -> None:
    """Answer commands until "stop". An exception ends the process; the driver reads it in the log."""
    hello = {"rank": contender.rank, "pid": os.getpid(), "version": contender.version()}
    connection.send_bytes(json.dumps(hello).encode())
    while True:
        request = json.loads(connection.recv_bytes())
        command = request.pop("command")
        if command == "stop":
            return
        reply = getattr(session, command)(**request)
        connection.send_bytes(json.dumps(reply).encode())


def main() -> None:
    die_with_parent()
    name, world_size, directory = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    spec = BOUND if name == BOUND.name else CONTENDERS[name]
    rank = None if spec.wheel else int(os.environ["RANK"])
    contender = spec.load(rank, world_size)

    def tuned(tuning: str) -> Contender:
        os.environ["PYCOMM_TUNE"] = tuning
        return spec.load(rank, world_size)

    connection = Client(str(directory / "socket"), "AF_UNIX")
    threading.Thread(target=_leave_when_driver_does, args=(connection,), daemon=True).start()
    session = Session(contender, StartLine(directory / "start_line", contender.rank, world_size), tuned)
    serve(connection, contender, session)
    session.close()


if __name__ == "__main__":
    main()
