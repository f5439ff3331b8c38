"""Messages with everything that can vary about them, and what each receiver must find, bit for bit."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from pycomm import Work
from tests.host.blocks import FLOATS, INTS, Block, values
from tests.host.collective_cases import Caller, random_memory
from tests.host.reduce_reference import Raw

# Eager, in place or streamed, smaller and larger than the ring that streams.
MOST_BYTES = (0, 8, 1000, 10_000, 50_000, 400_000)
TAGS = (0, 0, 0, 1, -5, 1 << 40)


@dataclass(frozen=True)
class Message:
    """``from_any``: the receive names no source; the message's tag is used for nothing else then."""

    source: int
    destination: int
    count: int
    tag: int
    from_any: bool = False


@dataclass(frozen=True)
class Exchange:
    """Some messages of a group.

    Attributes:
        calls: "blocking", one after the other; "single", asynchronous calls; "batch".
        memory: one letter for what a rank sends, one for what it receives, by rank; see Case.
    """

    messages: tuple[Message, ...]
    dtype: str
    calls: str
    memory: str
    seed: int
    async_op: bool
    offset: int


def random_exchange(rng: random.Random, seed: int, world_size: int) -> Exchange:
    """Any exchange. Messages of one sender, receiver and tag follow each other, within an exchange and in the next."""
    calls = rng.choice(("blocking", "single", "batch")) if world_size > 1 else rng.choice(("single", "batch"))
    dtype = rng.choice((*FLOATS, *INTS, "bool"))
    itemsize = values(dtype, 1, 0).itemsize
    ranks = range(world_size)
    messages = []
    if rng.random() < 0.25:
        destination = rng.randrange(world_size)
        senders = [r for r in ranks if r != destination or calls != "blocking"]
        count = rng.randint(0, rng.choice(MOST_BYTES) // itemsize)
        tag = 1000 + seed
        messages = [
            Message(r, destination, count, tag, from_any=True)
            for r in rng.sample(senders, rng.randint(1, len(senders)))
        ]
    else:
        for _ in range(rng.randint(1, 6)):
            source = rng.randrange(world_size)
            destination = rng.choice([r for r in ranks if r != source or calls != "blocking"])
            count = rng.randint(0, rng.choice(MOST_BYTES) // itemsize)
            messages.append(Message(source, destination, count, rng.choice(TAGS)))
    return Exchange(
        tuple(messages),
        dtype,
        calls,
        random_memory(rng, 2 * world_size),
        seed,
        async_op=calls == "single" or (calls == "batch" and rng.random() < 0.5),
        offset=rng.choice((0, 0, 1, 7)),
    )


@dataclass
class Receive:
    """``sent``: what each possible source has sent; one of them is in ``block`` at the end."""

    block: Block
    sent: dict[int, Raw]
    source: int | None = None
    work: Work | None = None
    index_in_batch: int = -1

    def difference(self, source: int) -> str:
        return self.block.difference(self.sent[source])


@dataclass
class Exchanged:
    """An exchange under way, or done, on one rank."""

    case: Exchange
    works: list[Work] = field(default_factory=list)
    sends: list[tuple[Block, Raw]] = field(default_factory=list)
    receives: list[Receive] = field(default_factory=list)

    def check(self) -> None:
        for work in self.works:
            work.wait()
        senders = set(self.receives[0].sent) if self.receives else set()  # from any source: whose is still to come
        for receive in self.receives:
            if receive.work is not None:
                receive.source = receive.work.source
            if receive.source is None:  # of an asynchronous batch, which tells none
                candidates = (senders if len(receive.sent) > 1 else set()) or set(receive.sent)
                receive.source = next((r for r in candidates if not receive.difference(r)), min(candidates))
            difference = receive.difference(receive.source)
            assert not difference, f"from rank {receive.source}: {difference}: {self.case}"
            if len(receive.sent) > 1:
                assert receive.source in senders, f"twice from rank {receive.source}: {self.case}"
                senders.remove(receive.source)
        for block, raw in self.sends:
            difference = block.difference(raw)
            assert not difference, f"sent: {difference}: {self.case}"


class Exchanger:
    """Issues exchanges on one rank of ``caller``'s group."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller

    def issue(self, case: Exchange) -> Exchanged:
        comm = self._caller.comm
        exchanged = Exchanged(case)
        batch = comm.batch(async_op=case.async_op)
        num_in_batch = 0
        for number, message in enumerate(case.messages):
            if comm.rank == message.source:
                raw = self._values(case, number)
                block = self._caller.block(case, raw, 2 * comm.rank)
                exchanged.sends.append((block, raw))
                if case.calls == "batch":
                    batch.send(block.whole(), message.destination, message.tag)
                    num_in_batch += 1
                else:
                    work = comm.send(block.whole(), message.destination, message.tag, async_op=case.async_op)
                    exchanged.works += [work] if work is not None else []
            if comm.rank == message.destination:
                receive = self._receive(case, number)
                exchanged.receives.append(receive)
                source = None if message.from_any else message.source
                if case.calls == "batch":
                    batch.recv(receive.block.whole(), source, message.tag)
                    receive.index_in_batch = num_in_batch
                    num_in_batch += 1
                    continue
                outcome = comm.recv(receive.block.whole(), source, message.tag, async_op=case.async_op)
                if isinstance(outcome, int):
                    receive.source = outcome
                else:
                    receive.work = outcome
                    exchanged.works.append(outcome)
        if case.calls == "batch":
            with batch:
                pass
            if batch.work is not None:
                exchanged.works.append(batch.work)
            for receive in exchanged.receives:
                receive.source = batch.sources[receive.index_in_batch] if batch.work is None else None
        return exchanged

    def _values(self, case: Exchange, number: int) -> Raw:
        return values(case.dtype, case.messages[number].count, 64 * case.seed + number)

    def _receive(self, case: Exchange, number: int) -> Receive:
        message = case.messages[number]
        numbers = range(len(case.messages)) if message.from_any else [number]
        garbage = values(case.dtype, message.count, 64 * case.seed + 63)
        block = self._caller.block(case, garbage, 2 * self._caller.comm.rank + 1)
        return Receive(block, {case.messages[i].source: self._values(case, i) for i in numbers})
