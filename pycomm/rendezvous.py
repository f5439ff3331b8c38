"""How processes that were launched together find each other: a store, and a greeting over it.

The store is, in this order: one that the caller gives; that of an initialised torch.distributed; the launcher's; one
that rank 0 opens on MASTER_ADDR alone. Keys carry the job's name, where the launcher gives it one, the restart attempt
and how often this rank has called ``init`` on that store, a *round*. The store is the job's own and is trusted; values
are JSON, never pickle, and are checked before they are used.

In a round each rank in turn

    takes its seat     no other living process may have it: else two jobs have been given one port
    arrives            from now on the others of its host see whether it still runs
    greets             and compares all greetings
    connects           through addresses in the store, or sockets that these lead to
    has finished       rank 0, whose store it may be, waits for that before it goes on

A rank that fails on the way leaves its reason in the store, which all others look at while they wait, and the first
reason counts. Ranks that wait give signs of life there: when a wait runs out, those at the root of it give none.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import secrets
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from types import TracebackType
from typing import Any

import torch.distributed as dist

from pycomm import _C, env
from pycomm.errors import MismatchError, PeerLostError, PeerTimeoutError, PycommError
from pycomm.process import Process, siblings
from pycomm.records import Failure, Greeting, Seat, decoded, encoded
from pycomm.stores import open_store

__all__ = ["Rendezvous", "UnconnectedError", "known_to_end"]

_log = logging.getLogger("pycomm")
_POLL_S = 0.01
_LOOK_S = 0.05  # how often a waiting rank looks at the others
_FAREWELL_S = 5.0  # for the last ranks to finish with a store that ends with this process
_TELL_S = 30.0  # for ranks that are on their way to a round that has failed
_SIBLING_S = 2.0  # for a process of an earlier run to end
_SILENCE_S = 3.0  # a rank that gives no sign of life for so long does not wait for others
_SEATS_S = 1.0  # how often it looks for those that have not arrived
_FOLLOWER_S = 10.0  # for a process to come in place of one that has ended since an earlier round
_MET = "met"
_TAKEN = "init: rank 0 cannot serve the job's store, since something else has opened"

known_to_end: set[int] = set()  # processes of whose end callers have been told by an error


class UnconnectedError(PycommError):
    """A connection to other ranks could not be made, and why is not known here."""


class Rendezvous:
    """Rank, world size and a store that all ranks reach; a world of one has no store.

    Also a context manager, for all that is done to connect: it tells the other ranks if this one fails in the block.

    Args:
        store: a torch.distributed Store, with ``rank`` and ``world_size``; None to find one.
        timeout_s: seconds that any wait for other ranks may take.

    Raises:
        ValueError: arguments or environment variables contradict each other or are missing.
        PycommError: the store cannot be opened or reached, or another living process is this rank already.
    """

    def __init__(self, store: dist.Store | None, rank: int | None, world_size: int | None, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._store: dist.Store | None = None
        self._is_one_host = True
        self._owner = store
        self._serves = False  # the store is in this process
        self._arrived: dict[int, Seat] = {}  # as far as it has been read
        self._num_arrivals = 0
        self._begin = time.monotonic()
        self._look_at_seats_at = self._begin + _SEATS_S
        launched = env.launch() if rank is None or world_size is None or store is None else None
        self._set_rank(launched, rank, world_size)
        if self.world_size == 1:
            if launched is None and store is None and (others := env.tasks_elsewhere()) > 1:
                _log.warning(
                    f"a world of one: SLURM_NTASKS={others}, but this process is none of them; start it with srun"
                )
            return
        # Only a port tells apart what was launched by plain variables, and two jobs may have the same.
        self._plain = launched if self._owner is None and launched is not None else None
        is_own = True
        if self._owner is None:
            if launched is None:
                raise ValueError(
                    f"world_size={self.world_size} needs a way for the ranks to meet: pass store=, start with "
                    f"torchrun, or set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT"
                )
            self._owner, is_own = open_store(launched, timeout_s)
            self._serves = is_own and self.rank == 0 and not launched.agent_store
            if launched.job or launched.agent_store:
                self._plain = None
        self._where = "the job's store" if launched is None else f"the store at {launched.where}"
        job = f"{launched.job or 'none'}/{launched.restart}" if launched is not None else "none/0"
        self._base = dist.PrefixStore(f"pycomm/{job}", self._owner)
        with self._reaching():
            if not is_own and self._plain is not None:
                self._refuse_taken_port()
            self._take_seat()
            if not is_own:  # the launcher has named the job, so its other ranks are told without disturbing that one
                text = f"{_TAKEN} {self._where}; set MASTER_PORT to a free port"
                failure = Failure("lost", [self.rank], text, [_C.process_token()])
                self._base.set(f"{self._round}/failed", encoded(failure))
                raise PycommError(failure.text)

    def _set_rank(self, launched: env.Launch | None, rank: int | None, world_size: int | None) -> None:
        """Take rank and world size from the first source that has them."""
        if rank is not None or world_size is not None:
            if rank is None or world_size is None:
                raise ValueError("give both rank and world_size, or neither")
            if not 0 <= rank < world_size:
                raise ValueError(f"rank={rank} is not in 0 … world_size - 1 = {world_size - 1}")
            self.rank, self.world_size = rank, world_size
        elif self._owner is None and dist.is_available() and dist.is_initialized():
            self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
            self._owner = dist.distributed_c10d._get_default_store()
        elif launched is not None:
            self.rank, self.world_size = launched.rank, launched.world_size
        elif self._owner is not None:
            raise ValueError("a store needs rank and world_size: pass them, or set RANK and WORLD_SIZE")
        else:
            self.rank, self.world_size = 0, 1

    @property
    def store(self) -> dist.Store | None:
        """The store of this call of init, for connections that are made through one; None in a world of one.

        A connection of its own, so that waiting there does not keep this rank from looking at the others.
        """
        own: Any = self._store  # torch's stubs leave clone() out
        return None if own is None else own.clone()

    def address(self) -> str:
        """This host's own address on the way to the store, for others to connect to; 127.0.0.1 where it has none."""
        store = self._owner
        while isinstance(store, dist.PrefixStore):
            store = store.underlying_store
        if not isinstance(store, dist.TCPStore):
            return "127.0.0.1" if self._is_one_host else socket.gethostname()
        family, kind, protocol, _, address = socket.getaddrinfo(store.host, store.port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)  # of a datagram socket: chooses the route, sends nothing
            return str(probe.getsockname()[0])

    def put(self, key: str, value: str) -> None:
        """Publish ``value`` under ``key``."""
        if self._store is not None:
            with self._reaching():
                self._store.set(key, value)

    def get(self, key: str, *, rank: int, num_hex_digits: int) -> str:
        """Wait for the hexadecimal digits that ``rank`` publishes under ``key``.

        Raises:
            PeerTimeoutError: they did not come within the timeout.
            PeerLostError: the rank has died or given up.
            PycommError: something else came.
        """
        assert self._store is not None
        with self._reaching():
            self._wait({rank: key})
            value = self._store.get(key)
        if re.fullmatch(rb"[0-9a-f]{%d}" % num_hex_digits, value) is None:
            raise PycommError(
                f"init: rank {rank} published {len(value)} bytes as {key}, not {num_hex_digits} hexadecimal digits; "
                f"does something else write into {self._where}?"
            )
        return value.decode("ascii")

    def greet(self, backend: str, strict: bool, nccl: str = "", obstacle: str = "", gpu: str = "") -> list[Greeting]:
        """Exchange greetings; returns everyone's, by rank. The arguments are those of :class:`Greeting`.

        Raises:
            MismatchError: versions, builds, protocols, world sizes or back ends differ; names both sides.
            PeerTimeoutError: ranks did not come; names them.
            PeerLostError: ranks have died or given up; names them.
            PycommError: two processes are the same rank, or what came is no greeting.
        """
        mine = Greeting(self.world_size, backend, strict, nccl, obstacle, gpu)
        if self._store is None:
            return [mine]
        texts = self._gather("greeting", json.dumps(asdict(mine)))
        greetings = [decoded(Greeting, text, f"rank {r}'s greeting in {self._where}") for r, text in enumerate(texts)]
        self._is_one_host = len({greeting.host for greeting in greetings}) == 1
        names = ["version", "protocol", "build", "world_size", "backend", "strict"]
        if not any(greeting.obstacle for greeting in greetings):  # else that says more
            names.append("nccl")
        for name in names:
            values = {r: str(getattr(greeting, name)) for r, greeting in enumerate(greetings)}
            if len(set(values.values())) == 1:
                continue
            other = next(r for r in values if values[r] != values[self.rank])
            raise MismatchError(
                f"init: ranks differ in {name}: rank {self.rank} has {values[self.rank]}, rank {other} has "
                f"{values[other]}; all ranks need one installation of pycomm and the same arguments of init()",
                calls={r: f"init({name}={value})" for r, value in values.items()},
            )
        with self._reaching():
            self._look_for_siblings()
            self._settle(_MET)
        return greetings

    def tokens(self) -> list[int]:
        """The processes of all ranks, which have greeted each other, by rank."""
        if self._store is None:
            return [_C.process_token()]
        with self._reaching():
            self._read_arrivals()
        if len(self._arrived) < self.world_size:
            raise PycommError(f"init: a rank has greeted and not arrived: something else writes into {self._where}")
        return [self._arrived[rank].token for rank in range(self.world_size)]

    def wait_for_all(self, place: str) -> None:
        """Wait until every rank has come to ``place``."""
        if self._store is not None:
            self._gather(place, "")

    def check(self, missing: Sequence[int]) -> None:
        """Raise if it is in vain to wait for these ranks: one has died, or some rank has given up."""
        if self._store is None:
            return
        with self._reaching():
            self._store.add(f"alive/{self.rank}", 1)
            if self._store.check(["failed"]):
                raise decoded(Failure, self._store.get("failed"), f"a failure in {self._where}").error()
            self._read_arrivals()
            for rank in missing:
                seat = self._arrived.get(rank)
                # What has finished has had all that it needed, and others may have what they need of it.
                if seat and seat.is_running() is False and not self._store.check([f"finished/{rank}"]):
                    raise self._lost([seat], "died before all ranks had met")
            if (now := time.monotonic()) >= self._look_at_seats_at:
                self._look_at_seats_at = now + _SEATS_S
                self._look_at_seats([rank for rank in missing if rank not in self._arrived])

    def _look_at_seats(self, ranks: Sequence[int]) -> None:
        """Raise if a process that was one of ``ranks`` last has ended on its way into this round; or if some have ended
        since an earlier one that this process was in, too, and nobody follows them.

        Where an error has told the caller of its end, somebody may start another in its place at leisure.
        """
        seats = [
            decoded(Seat, self._base.get(f"seat/{rank}"), f"the seat of rank {rank} in {self._where}")
            for rank in ranks
            if self._base.check([f"seat/{rank}"])
        ]
        ended = [seat for seat in seats if seat.round <= self._round and seat.is_running() is False]
        if on_the_way := [seat for seat in ended if seat.round == self._round]:
            raise self._lost(on_the_way, "died before all ranks had met")
        is_late = time.monotonic() >= self._begin + _FOLLOWER_S
        if is_late and self._returns and any(seat.token not in known_to_end for seat in ended):
            what = f"ended since an earlier init, and no process came instead within {_FOLLOWER_S:g} s; start it again"
            raise self._lost(ended, what)

    @staticmethod
    def _lost(seats: Sequence[Seat], what: str) -> PycommError:
        text = f"init: {', '.join(f'rank {seat.rank} ({seat})' for seat in seats)} {what}"
        return Failure("lost", [seat.rank for seat in seats], text, [seat.token for seat in seats]).error()

    def _failure(self, error: BaseException) -> Failure:
        """Why this rank fails."""
        kind, ranks, text = "lost", [self.rank], str(error)
        if isinstance(error, PeerTimeoutError):
            kind, ranks = "missing", error.missing_ranks
        elif isinstance(error, PeerLostError):
            ranks = error.lost_ranks or ranks
        else:
            text = f"init: rank {self.rank} gave up: {type(error).__name__}: {error}"
        roots = list(error._root[0]) if isinstance(error, PycommError) else []
        return Failure(kind, ranks, text, roots or [self._arrived[r].token for r in ranks if r in self._arrived])

    def _explained(self, error: PycommError) -> PycommError:
        """A wait of this rank has run out, or a connection could not be made: the error that names those at the root.

        They give no sign of life, since all others wait themselves. ``error`` itself if there are none.
        """
        assert self._store is not None
        store, silent = self._store, [rank for rank in range(self.world_size) if rank != self.rank]
        before = {rank: store.add(f"alive/{rank}", 0) for rank in silent}
        end = time.monotonic() + _SILENCE_S
        while silent and time.monotonic() < end:
            try:
                self.check(silent)
            except PycommError as found:  # here or by another rank
                return found
            silent = [
                r for r in silent if store.add(f"alive/{r}", 0) == before[r] and not store.check([f"finished/{r}"])
            ]
            time.sleep(_LOOK_S)
        late = error.missing_ranks if isinstance(error, PeerTimeoutError) else None
        if not silent or silent == late:
            return error
        text = f"{error}; rank(s) {', '.join(map(str, silent))} are at the root of it: all others wait themselves"
        roots = [self._arrived[rank].token for rank in silent if rank in self._arrived]
        return Failure("lost" if late is None else "missing", silent, text, roots).error()

    def __enter__(self) -> Rendezvous:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._store is None:
            return
        cause = error
        with contextlib.suppress(dist.DistError):  # nobody is there to be told
            if isinstance(error, UnconnectedError) or (isinstance(error, PeerTimeoutError) and error.op == "init"):
                cause = self._explained(error)
            if cause is not None:
                failure = self._failure(cause)
                first = self._store.compare_set("failed", "", encoded(failure))
                if isinstance(cause, PeerLostError | PeerTimeoutError):
                    if first == encoded(failure).encode():
                        cause._root = (failure.roots, failure.text)
                    else:
                        cause = decoded(Failure, first, f"a failure in {self._where}").error()
            self._store.set(f"finished/{self.rank}", "")
            self._base.set(f"told/{os.getpid()}", "")
            if self._serves:
                self._wait_until_finished()
                if isinstance(error, Exception):
                    self._tell_siblings()
        if cause is not None and cause is not error:
            raise cause from error

    def _take_seat(self) -> None:
        """Find this rank's round, and arrive in it."""
        me, token, number, expected = Process.current(), _C.process_token(), 1, ""
        self._returns = False  # this process was in the round before
        while True:
            claim = secrets.token_hex(8)
            seat = json.dumps(asdict(Seat(**asdict(me), round=number, rank=self.rank, token=token, claim=claim)))
            found = self._base.compare_set(f"seat/{self.rank}", expected, seat)
            if found == seat.encode():
                break
            last = decoded(Seat, found, f"the seat of rank {self.rank} in {self._where}")
            if self._plain is not None and last.process != me:
                self._refuse_seat_of(last, me)
            self._returns = last.process == me
            number, expected = last.round + 1, found.decode()
        self._round = number
        self._arrive(seat)

    def _arrive(self, seat: str) -> None:
        self._store = dist.PrefixStore(str(self._round), self._base)
        place = self._store.add("arrivals", 1)
        self._store.set(f"arrival/{place}", seat)

    def _refuse_seat_of(self, last: Seat, me: Process) -> None:
        """Another process was this rank before: refuse to follow if it lives, or if it met ranks of two jobs."""
        if last.process.is_running() and not last.process.is_relative():
            self._conflict(last.round, last.process, me, self.rank)
        outcome = dist.PrefixStore(str(last.round), self._base)
        if outcome.check(["outcome"]) and (text := outcome.get("outcome")) != _MET.encode():
            self._base.set(f"told/{os.getpid()}", "")
            raise decoded(Failure, text, f"the outcome in {self._where}").error()

    def _refuse_taken_port(self) -> None:
        """This rank should have served the store, and somebody else does."""
        if self._base.check(["seat/0"]):
            last = decoded(Seat, self._base.get("seat/0"), f"the seat of rank 0 in {self._where}")
            self._conflict(last.round, last.process, Process.current(), 0)
        raise PycommError(f"{_TAKEN} {self._where}; choose a free port")

    def _read_arrivals(self) -> None:
        assert self._store is not None
        total = self._store.add("arrivals", 0)
        while self._num_arrivals < total and self._store.check([f"arrival/{self._num_arrivals + 1}"]):
            self._num_arrivals += 1
            text = self._store.get(f"arrival/{self._num_arrivals}")
            seat = decoded(Seat, text, f"an arrival in {self._where}")
            self._arrived[seat.rank] = seat

    def _look_for_siblings(self) -> None:
        """Refuse to go on if a process that has not come here was started beside this one as a rank of its job.

        Then whoever came as that rank belongs to another job that was given the same port.
        """
        if self._plain is None or self._round > 1:
            return
        self._read_arrivals()
        deadline = time.monotonic() + _SIBLING_S
        while absent := self._absent_siblings():
            if time.monotonic() > deadline:
                other, rank = absent[0]
                self._conflict(self._round, self._arrived[rank].process, other, rank)
            time.sleep(_LOOK_S)

    def _tell_siblings(self) -> None:
        """Serve the store until ranks that are on their way have come and seen that this round has failed."""
        deadline = time.monotonic() + min(self.timeout_s, _TELL_S)
        while absent := self._absent_siblings():
            if time.monotonic() > deadline or self._base.check([f"told/{other.pid}" for other, _ in absent]):
                return
            time.sleep(_LOOK_S)

    def _absent_siblings(self) -> list[tuple[Process, int]]:
        """Processes that were started beside this one as ranks of its job and have not come, and their ranks."""
        if self._plain is None or env.launch_of(os.getpid()) != self._plain:
            return []
        present = [(seat.boot, seat.namespace, seat.pid) for seat in self._arrived.values()]
        absent = []
        for pid in siblings():
            launched = env.launch_of(pid)
            if launched is None or (launched.where, launched.world_size) != (self._plain.where, self.world_size):
                continue
            with contextlib.suppress(OSError):  # it has just ended
                other = Process.of(pid)
                if (other.boot, other.namespace, other.pid) not in present:
                    absent.append((other, launched.rank))
        return absent

    def _conflict(self, number: int, first: Process, second: Process, rank: int) -> None:
        """Two processes are one rank: fail the round ``number`` for all unless it has met already, and this rank."""
        assert self._plain is not None
        text = (
            f"init: two processes are rank {rank} of the job at {self._plain.where}: {first} and {second}. "
            f"If they belong to two jobs, give each job a MASTER_PORT of its own; if not, end one of them"
        )
        failure = encoded(Failure("conflict", [rank], text))
        store = dist.PrefixStore(str(number), self._base)
        if store.compare_set("outcome", "", failure) == failure.encode():
            store.compare_set("failed", "", failure)
        self._base.set(f"told/{os.getpid()}", "")
        raise PycommError(text)

    def _settle(self, outcome: str) -> None:
        """All have greeted each other, and nobody has said before that two of them belong to different jobs."""
        assert self._store is not None
        found = self._store.compare_set("outcome", "", outcome)
        if found != outcome.encode():
            raise decoded(Failure, found, f"the outcome in {self._where}").error()

    def _wait_until_finished(self) -> None:
        """Until every rank that has arrived and still runs is through with the store, for some seconds at most."""
        assert self._store is not None
        deadline = time.monotonic() + min(self.timeout_s, _FAREWELL_S)
        while time.monotonic() < deadline:
            self._read_arrivals()
            running = [rank for rank, seat in self._arrived.items() if seat.is_running() is not False]
            if self._store.check([f"finished/{rank}" for rank in running]):
                return
            time.sleep(_POLL_S)

    def _gather(self, place: str, value: str) -> list[bytes]:
        """What every rank, by rank, has brought to ``place``."""
        assert self._store is not None
        keys = {rank: f"{place}/{rank}" for rank in range(self.world_size)}
        with self._reaching():
            self._store.set(keys[self.rank], value)
            self._wait(keys)
            values: list[bytes] = self._store.multi_get(list(keys.values()))
        return values

    def _wait(self, keys: dict[int, str]) -> None:
        """Wait until every rank has set its key. Polls, so that Ctrl-C works and torch does not report each slice."""
        assert self._store is not None
        deadline = time.monotonic() + self.timeout_s
        next_look = time.monotonic() + _LOOK_S
        while not self._store.check(list(keys.values())):
            now = time.monotonic()
            if now >= next_look or now >= deadline:
                missing = [r for r, key in keys.items() if not self._store.check([key])]
                self.check(missing)
                next_look = now + _LOOK_S
                if missing and now >= deadline:
                    raise PeerTimeoutError(
                        f"init: rank(s) {', '.join(map(str, missing))} of {self.world_size} did not come within "
                        f"{self.timeout_s:g} s",
                        op="init",
                        missing_ranks=missing,
                    )
            time.sleep(_POLL_S)

    @contextlib.contextmanager
    def _reaching(self) -> Iterator[None]:
        """Say what it means that the store does not answer."""
        try:
            yield
        except dist.DistError as error:
            text = f"init: {self._where} cannot be reached any more: {error}"
            if self._plain is not None and self.rank != 0:
                raise PeerLostError(f"{text}; rank 0, which served it, has ended", lost_ranks=[0]) from error
            raise PycommError(text) from error
