"""The driver's side of one contender: starts its ranks, talks to them, names what went wrong, leaves nothing behind."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from contenders import Spec
from launch import free_port, processes_of
from linux import die_with_parent, mapped_shared_memory

_SLOT_BYTES = 64  # of the start line, per rank
_LOG_LINES = 8
_SHARED = "shared_memory"  # file in the directory: one path a line
Reply = dict[str, Any]


class GroupError(RuntimeError):
    """A contender's ranks died, hung or never started; says which, how, and what they printed last."""


def remove_traces(directory: Path) -> None:
    """Remove a group's directory, and before it the shared-memory files that its ranks had mapped."""
    listed = directory / _SHARED
    for line in listed.read_text().splitlines() if listed.exists() else ():
        Path(line).unlink(missing_ok=True)
    shutil.rmtree(directory, ignore_errors=True)


class Group:
    """``ranks`` processes of one contender.

    Args:
        spec: the contender.
        ranks: number of processes.
        directory: made here, removed by ``kill``; holds the socket, the start line and the ranks' log.
        turn_timeout_s: seconds that any one command may take.
    """

    def __init__(self, spec: Spec, ranks: int, directory: Path, turn_timeout_s: float) -> None:
        self.spec, self.name, self.ranks = spec, spec.name, ranks
        self.version = ""
        self._more: dict[str, object] = {}  # that every request says
        self._directory, self._timeout_s, self._port = directory, turn_timeout_s, free_port()
        self._connections: list[Connection] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        directory.mkdir(mode=0o700)
        (directory / "start_line").write_bytes(bytes(ranks * _SLOT_BYTES))
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(directory / "socket"))
        self._listener.listen(ranks)
        self._listener.settimeout(0.1)

    def start(self) -> None:
        """Start the processes and return at once. Each leads its own session: Ctrl-C reaches the driver alone."""
        with (self._directory / "log").open("wb") as log:
            for process in processes_of(self.spec, self.ranks, self._directory, self._port):
                self._processes.append(
                    subprocess.Popen(
                        process.command, env=process.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                        start_new_session=True, preexec_fn=die_with_parent,
                    )
                )  # fmt: skip

    def wait_ready(self) -> None:
        """Block until every rank has connected and reported. Raises GroupError (and kills the group)."""
        deadline = time.monotonic() + self.spec.start_timeout_s
        arrived: list[Connection] = []
        while len(arrived) < self.ranks:
            with contextlib.suppress(TimeoutError):
                arrived.append(Connection(self._listener.accept()[0].detach()))
            if self._how_it_ended():
                raise self._failure("did not start")
            if time.monotonic() > deadline:
                raise self._failure(f"did not start within {self.spec.start_timeout_s:.0f} s")
        replies = self._collect(arrived, deadline, "start")
        order = sorted(range(self.ranks), key=lambda i: replies[i]["rank"])
        self._connections = [arrived[i] for i in order]
        self.version = replies[0]["version"]
        # Some libraries unlink their shared memory only in an orderly end, or never; remember it for the others.
        shared = {path for reply in replies for path in mapped_shared_memory(reply["pid"])}
        (self._directory / _SHARED).write_text("\n".join(str(path) for path in shared))

    def tuned(self, name: str, tuning: str) -> Group:
        """The same processes, with another communicator whose thresholds are ``tuning``, as PYCOMM_TUNE writes them."""
        other = copy.copy(self)
        other.name, other._more = name, {"tuning": tuning}
        return other

    def request(self, command: str, **arguments: object) -> list[Reply]:
        """Send one command to every rank and return their replies in rank order. Raises GroupError."""
        if len(self._connections) < self.ranks:
            raise GroupError(f"{self.name} has lost its processes")
        message = json.dumps({"command": command, **self._more, **arguments}).encode()
        for connection in self._connections:
            with contextlib.suppress(OSError):  # a rank that is gone is named when its answer is read
                connection.send_bytes(message)
        return self._collect(self._connections, time.monotonic() + self._timeout_s, command)

    def ask_to_stop(self) -> None:
        """Tell the ranks to end in their library's orderly way, after what they are in; returns at once."""
        message = json.dumps({"command": "stop"}).encode()
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.send_bytes(message)

    def wait_stopped(self, deadline: float) -> None:
        """Wait for the processes to end, until ``deadline`` of ``time.monotonic``; then kill what is left."""
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
        self.kill()

    def kill(self) -> None:
        """End every process and remove every file of the group; ranks behind a launcher die with it."""
        for process in self._processes:
            if process.returncode is None or self.spec.wheel is not None:  # what a launcher started may outlive it
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        for connection in self._connections:  # ranks that an MPI launcher put in sessions of their own see this
            connection.close()
        self._connections.clear()  # tuned() groups have them, too
        self._listener.close()
        remove_traces(self._directory)

    def _collect(self, connections: list[Connection], deadline: float, doing: str) -> list[Reply]:
        waiting = {connection: rank for rank, connection in enumerate(connections)}
        replies: dict[int, Reply] = {}
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                late = ", ".join(str(rank) for rank in sorted(waiting.values()))
                raise self._failure(f"gave no answer in time to {doing}: rank {late}")
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = waiting.pop(connection)
                try:
                    replies[rank] = json.loads(connection.recv_bytes())
                except (EOFError, OSError):
                    raise self._failure(f"lost rank {rank} in {doing}", rank) from None
        return [replies[rank] for rank in range(self.ranks)]

    def _how_it_ended(self) -> str:
        ended = []
        for i, process in enumerate(self._processes):
            code = process.poll()
            if code is not None:
                who = f"rank {i}" if self.spec.wheel is None else "the launcher"
                how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"
                ended.append(f"{who} {how}")
        return "; ".join(ended)

    def _failure(self, what: str, lost_rank: int | None = None) -> GroupError:
        if lost_rank is not None:  # its socket closes a moment before it, or its launcher, can be waited for
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._processes[lost_rank if self.spec.wheel is None else 0].wait(2.0)
        ended = self._how_it_ended()
        printed = (self._directory / "log").read_text(errors="replace").strip().splitlines()[-_LOG_LINES:]
        self.kill()
        return GroupError("\n    | ".join([f"{self.name} {what}" + (f" ({ended})" if ended else ""), *printed]))
