"""Mutated messages and hostile processes while ranks meet: the job runs on, or init fails with one clear error; it
never crashes, hangs, or takes in a stranger.

Ranks are threads of one process, which a crash would end. PYCOMM_TEST_MESSAGES sets how many messages are mutated,
PYCOMM_TEST_SEED how (`make hostile`: 10,000).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import random
import signal
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pycomm import _C
from pycomm.backends.causes import Heard
from pycomm.backends.gloo.frames import Frame, FrameError, Kind
from pycomm.backends.gloo.inquiry import Inquiry
from pycomm.backends.gloo.mail import Mail
from pycomm.errors import PycommError
from pycomm.process import Process
from pycomm.records import Greeting
from pycomm.rendezvous import Rendezvous
from tests.test_meeting import Rank

NUM_MESSAGES = int(os.environ.get("PYCOMM_TEST_MESSAGES", "1000"))
SEED = int(os.environ.get("PYCOMM_TEST_SEED", "1"))
NUM_HOSTILE = 50
NOBODY = 65534
SOON_S = 15.0  # no meeting may last longer, whatever comes; its own deadline is twice that
log = logging.getLogger(__name__)

# csrc/host/bootstrap.cpp: magic, protocol, key, build, world_size, rank, pid, reserved, token
HELLO = struct.Struct("<IIQQQiiiiQ")
# csrc/host/control.hpp, Tuning: slice, one-shot, cached, strict, eager, stream; then pids and tokens of all ranks
TUNING, MOST_RANKS = struct.Struct("<6Q"), _C.MAX_RANKS
MAGIC = 0x79706D63


def connect(address: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(b"\0pycomm-" + address[:32].encode())
    return connection


def hello(address: str, rank: int) -> bytes:
    key = int(address[32:48], 16), int(address[48:64], 16)
    return HELLO.pack(MAGIC, _C.protocol_version(), *key, _C.build_id(), 2, rank, os.getpid(), 0, 12345)


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Other bits, another length, or other numbers."""
    changed = bytearray(data)
    kind = rng.randrange(5)
    if kind == 0:
        return bytes(changed[: rng.randrange(len(changed))])
    if kind == 1:
        return data + rng.randbytes(rng.choice([1, 8, 4096, 60_000]))
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(changed) // 4) * 4
        if kind == 2:
            changed[place + rng.randrange(4)] ^= 1 << rng.randrange(8)
        else:
            number = rng.choice([0, 1, 2, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, rng.getrandbits(32)])
            changed[place : place + 4] = struct.pack("<I", number)
    return bytes(changed)


def mutated_text(text: str, rng: random.Random) -> bytes:
    """The same for a value of the store: other bytes, other JSON."""
    kind = rng.randrange(4)
    if kind == 0:
        return mutated(text.encode(), rng)
    if kind == 1:
        return rng.choice(
            [b"", b"\xff\xfe", b"[" * 100_000, b"null", b"{}", b"[]", b'"x"', b"0" * 5000, b"a" * 200_000]
        )
    try:
        record = json.loads(text)
    except ValueError:
        return bytes(rng.randrange(256) for _ in range(rng.choice([0, 31, 64, 300])))
    name = rng.choice(sorted(record))
    if kind == 2:
        record[name] = rng.choice([None, -1, 1 << 70, 1.5, [], {}, "", "\0", "é" * 1000, True])
    else:
        record.pop(name)
        record[rng.choice(["other", name + "2"])] = 1
    return json.dumps(record).encode()


def some_descriptors(rng: random.Random, usual: list[int]) -> list[int]:
    """The right ones, none, too many, or others."""
    kind = rng.randrange(5)
    if kind == 0:
        return []
    if kind == 1:
        return usual + usual[-1:] * rng.choice([1, 2, 200])
    if kind == 2:
        return [0] * len(usual)
    return usual


class Meeting:
    """Ranks that meet in threads, each of whose outcome is a communicator or what it raised."""

    def __init__(self) -> None:
        self.outcomes: dict[int, Any] = {}
        self.threads: list[threading.Thread] = []

    def lead(self, listener: _C.Listener | None = None) -> str:
        """Start rank 0; returns its address. It listens until it has met the other one."""
        listener = listener or _C.Listener()
        self._start(0, [listener], "")
        return listener.address

    def follow(self, address: str) -> None:
        self._start(1, [None], address)

    def _start(self, rank: int, listener: list[_C.Listener | None], address: str) -> None:
        def run() -> None:
            try:
                self.outcomes[rank] = _C.HostCommunicator("w", rank, 2, listener[0], address, 2 * SOON_S, False, {})
            except PycommError as error:
                self.outcomes[rank] = error
            listener.clear()

        self.threads.append(threading.Thread(target=run))
        self.threads[-1].start()

    def end(self) -> str:
        """Whether all have met, and then a sum is right, or have failed."""
        for thread in self.threads:
            thread.join(SOON_S)
            assert not thread.is_alive(), "a rank waits"
        comms = [outcome for outcome in self.outcomes.values() if isinstance(outcome, _C.HostCommunicator)]
        if len(comms) == 2:
            tensors = [torch.full((3,), float(comm.rank + 1)) for comm in comms]
            works = [_C.Calls(comm).all_reduce(t, "sum", True, SOON_S) for comm, t in zip(comms, tensors, strict=True)]
            for work in works:
                assert work is not None
                work.wait()
            assert all(tensor.tolist() == [3.0] * 3 for tensor in tensors)
        for comm in comms:
            comm.close(0.1)
        return "met" if len(comms) == 2 else "refused" if not comms else "one side"


def from_a_stranger(rng: random.Random) -> str:
    """Somebody without the key: both ranks meet whatever it says."""
    meeting, pidfd = Meeting(), os.pidfd_open(os.getpid())
    address = meeting.lead()
    without_key = address[:32] + f"{rng.getrandbits(128):032x}"
    with connect(address) as stranger:
        with contextlib.suppress(OSError):  # it has been turned away
            socket.send_fds(stranger, [mutated(hello(without_key, 1), rng)[:100_000]], some_descriptors(rng, [pidfd]))
        meeting.follow(address)
        outcome = meeting.end()
    os.close(pidfd)
    assert outcome == "met", meeting.outcomes
    return outcome


def whole_hello(data: bytes, address: str, rank: int) -> bool:
    """Whether it says all that the hello of that rank has to: only pid, reserved field and token may be others."""
    num_fields = 7 if rank else 6  # rank 0's number is not asked for
    return (
        len(data) == HELLO.size and HELLO.unpack(data)[:num_fields] == HELLO.unpack(hello(address, rank))[:num_fields]
    )


def from_a_rank(rng: random.Random) -> str:
    """Somebody with the key, who says that it is rank 1; then comes rank 1, whose place may have been taken."""
    meeting, pidfd = Meeting(), os.pidfd_open(os.getpid())
    address = meeting.lead()
    with connect(address) as impostor:
        message, descriptors = mutated(hello(address, 1), rng), some_descriptors(rng, [pidfd])
        with contextlib.suppress(OSError):
            socket.send_fds(impostor, [message], descriptors)
        meeting.follow(address)
        outcome = meeting.end()
    os.close(pidfd)
    if outcome == "one side":
        assert whole_hello(message, address, 1), message.hex()
        assert descriptors == [pidfd], descriptors
        assert isinstance(meeting.outcomes[1], PycommError), meeting.outcomes
        return "took rank 1's place"
    return outcome


def from_rank_0(rng: random.Random) -> str:
    """A welcome that is none."""
    address = f"{rng.getrandbits(256):064x}"
    tuning = _C.tuning(2, {})
    order = ("slice_bytes", "one_shot_bytes", "cached_bytes", "", "eager_bytes", "stream_bytes")
    numbers = TUNING.pack(*(tuning[name] if name else 0 for name in order))
    pids = struct.pack(f"<{MOST_RANKS}i", *[os.getpid()] * 2, *[0] * (MOST_RANKS - 2))
    tokens = struct.pack(f"<{MOST_RANKS}Q", *range(MOST_RANKS))
    memory = os.memfd_create("control", os.MFD_ALLOW_SEALING)
    os.truncate(memory, rng.choice([1 << 26, 4096]))
    fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    pidfd, meeting = os.pidfd_open(os.getpid()), Meeting()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.bind(b"\0pycomm-" + address[:32].encode())
        server.listen()
        meeting.follow(address)
        connection, _ = server.accept()
        with connection:
            connection.recv(1000)
            whole = hello(address, 0) + numbers + pids + tokens
            welcome, usual = mutated(whole, rng), [memory, pidfd, pidfd]
            descriptors = some_descriptors(rng, usual)
            with contextlib.suppress(OSError):
                socket.send_fds(connection, [welcome], descriptors)
            outcome = meeting.end()
    os.close(memory)
    os.close(pidfd)
    if outcome == "one side":  # rank 1 alone, since there is no rank 0
        assert len(welcome) == len(whole)
        assert whole_hello(welcome[: HELLO.size], address, 0), welcome[: HELLO.size].hex()
        assert descriptors == usual, descriptors
        end = HELLO.size + TUNING.size
        same = welcome[HELLO.size : end] == numbers
        return "other pids or tokens" if same else "other thresholds that can be used"
    return outcome


def an_address(rng: random.Random) -> str:
    meeting = Meeting()
    text = mutated_text(f"{rng.getrandbits(256):064x}", rng).decode("latin-1")
    meeting.follow(text)
    return meeting.end()


def from_the_store(rng: random.Random, *, mutates: bool = True) -> str:
    """Rank 1's part of a meeting, with one value mutated, as rank 0 reads it; or rank 0's address, as rank 1 does."""
    seat = {**asdict(Process.current()), "round": 1, "rank": 1, "token": 1, "claim": "0"}
    failure = {"kind": "lost", "ranks": [1], "text": "it gave up", "roots": [1]}
    values = {
        "1/arrival/1": json.dumps(seat),
        "1/greeting/1": json.dumps(asdict(Greeting(2, "host"))),
        "1/shm/1": f"{rng.getrandbits(256):064x}",
        "1/failed": json.dumps(failure),
        "1/outcome": json.dumps(failure),
        "seat/0": json.dumps({**seat, "rank": 0}),
    }
    chosen = rng.choice(sorted(values)) if mutates else ""
    store = dist.HashStore()
    base = dist.PrefixStore("pycomm/none/0", store)
    base.add("1/arrivals", 1)
    for key, value in values.items():
        if key == chosen:
            base.set(key, mutated_text(value, rng))  # type: ignore[arg-type]
        elif key not in ("1/failed", "1/outcome", "seat/0"):
            base.set(key, value)
    try:
        with Rendezvous(store, 0, 2, 0.3) as rendezvous:
            rendezvous.greet("host", False)
            rendezvous.check([1])
            rendezvous.get("shm/1", rank=1, num_hex_digits=_C.ADDRESS_DIGITS)
    except PycommError:
        return "refused"
    return "met"


class Deaf:
    """Stands for the connections of a Mail: everything can be called."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: None


def a_frame(rng: random.Random) -> str:
    mail = Mail(0, False, Deaf(), Deaf(), lambda _: None, lambda *_: None, None, _C.Waits(0, "world"))
    inquiry = Inquiry(0, "world", [1, 2], lambda *_: None, lambda: {1}, Heard(0, [1, 2]))
    mail.send(_C.Call("send", dtype="float32", root=1, count=1, splits=7), torch.ones(1), 1.0)
    work = mail.receive(_C.Call("recv", dtype="float32", root=1, count=5, splits=7), torch.ones(5), 1.0)
    float32 = 0
    frames = [
        Frame(Kind.OFFER, 1, 0, 7, float32, 5, torch.full((5,), 3.0).numpy().tobytes()),
        Frame(Kind.TAKEN, 1, 0),
        Frame(Kind.ACCEPT, 1, 0),
        Frame(Kind.SENT, 1, 0),
        Frame(Kind.REFUSE, 1, 0, 7, float32, 5),
        Frame(Kind.ASK, 1),
        Frame(Kind.ANSWER, 1, tag=1, count=2, body=struct.pack("<QIQI", 2, 0, 3, 1) + b"rank 1 is in barrier() #5"),
    ]
    whole = rng.choice(frames).pack()
    data = (mutated(whole[:60], rng).ljust(60, b"\0") + whole[60:])[: len(whole)]
    try:
        frame = Frame.unpack(data, 1)
        (inquiry if frame.kind in (Kind.ASK, Kind.ANSWER) else mail).on_frame(frame)
        inquiry.look()
        return "taken"
    except FrameError:
        return "refused"
    finally:
        inquiry.rest()
        mail.stop()
        del work


KINDS = (from_a_stranger, from_a_rank, from_rank_0, an_address, from_the_store, a_frame)


def campaign(seed: int, num_messages: int) -> Counter[str]:
    found: Counter[str] = Counter()
    assert from_the_store(random.Random(seed), mutates=False) == "met"  # else any value would be refused
    for number in range(num_messages):
        kind: Callable[[random.Random], str] = KINDS[number % len(KINDS)]
        start = time.monotonic()
        try:
            outcome = kind(random.Random(f"{seed} {number}"))
        except BaseException as error:
            error.add_note(f"message {number} of seed {seed}, {kind.__name__}")
            raise
        found[f"{kind.__name__}: {outcome}"] += 1
        assert time.monotonic() - start < 2 * SOON_S
    return found


def test_mutated_messages() -> None:
    """A crash shows as a process without an outcome, a hang as a rank that waits."""
    found, seconds = Rank(campaign, SEED, NUM_MESSAGES).outcome(limit_s=60.0 + NUM_MESSAGES)
    assert isinstance(found, Counter), found
    log.info("%d mutated messages in %.0f s: %s", NUM_MESSAGES, seconds, dict(sorted(found.items())))
    assert found.total() == NUM_MESSAGES
    assert not [outcome for outcome in found if outcome.endswith("one side")], found
    assert found["from_a_stranger: met"] > 0
    assert found["from_a_rank: refused"] > 0
    assert found["from_rank_0: refused"] > 0


@contextlib.contextmanager
def hostile_connections(address: str, uid: int | None, num: int) -> Iterator[None]:
    """A process of that user that connects and says nothing."""
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if uid is not None:
                os.setuid(uid)
            connections = [connect(address) for _ in range(num)]
            os.write(writable, b"x")
            signal.pause()
            del connections
        finally:
            os._exit(1)
    try:
        os.close(writable)
        assert os.read(readable, 1) == b"x", "it could not connect"
        yield
    finally:
        os.close(readable)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def meet_beside(uid: int | None) -> str:
    meeting, listener = Meeting(), _C.Listener()
    address = listener.address
    with hostile_connections(address, uid, NUM_HOSTILE):
        meeting.lead(listener)
        meeting.follow(address)
        return meeting.end()


@pytest.mark.parametrize("uid", [NOBODY, None])
def test_silent_connections_hold_up_nobody(uid: int | None) -> None:
    """Of another user, and of this one, before any rank has come."""
    if uid is not None and os.geteuid() != 0:
        pytest.skip("only root can start a process of another user")
    outcome, seconds = Rank(meet_beside, uid).outcome()
    assert outcome == "met"
    assert seconds < SOON_S


def test_an_address_that_is_too_long_is_refused() -> None:
    """It was copied over the end of the socket's address, by whoever could write into the store."""
    outcome, _ = Rank(_C.HostCommunicator, "w", 1, 2, None, "a" * 100_000, 1.0, False, {}).outcome()
    assert outcome[0] == "PycommError"
    assert "has 100000 characters" in outcome[1]


def test_a_seat_that_is_no_text_is_refused() -> None:
    """It was compared, decoded leniently, with what lies there, for ever."""
    store = dist.HashStore()
    seat = {**asdict(Process.current()), "round": 1, "rank": 0, "token": 1, "claim": "0", "host": "H"}
    text = json.dumps(seat).encode().replace(b'"H"', b'"\xff"')
    dist.PrefixStore("pycomm/none/0", store).set("seat/0", text)  # type: ignore[arg-type]
    with pytest.raises(PycommError, match="the seat of rank 0 .* makes no sense"):
        Rendezvous(store, 0, 2, 1.0)
