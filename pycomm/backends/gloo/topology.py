"""Which ranks share a host: a pure function of what the ranks exchanged, the same on every rank."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

__all__ = ["Part", "Topology", "even_parts", "in_agents_order", "parts_of"]


@dataclass(frozen=True)
class Part:
    """A run of elements of a tensor, and the rank that owns it."""

    owner: int
    begin: int
    count: int


@dataclass(frozen=True)
class Topology:
    """The ranks of each host, seen by one of them.

    Attributes:
        rank: this process.
        hosts: ascending ranks of each host; hosts come in the order of their lowest rank. Ranks of a host need not be
            neighbours, and hosts may hold different numbers of them.
    """

    rank: int
    hosts: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, rank: int, names: Sequence[Hashable]) -> Topology:
        """From each rank's host, by any name; equal names are one host."""
        hosts: dict[Hashable, list[int]] = {}
        for r, name in enumerate(names):
            hosts.setdefault(name, []).append(r)
        return cls(rank, tuple(tuple(ranks) for ranks in hosts.values()))

    @property
    def world_size(self) -> int:
        return len(self.host_of)

    @cached_property
    def host_of(self) -> list[int]:
        """By rank: the index of its host."""
        placed = sorted((r, h) for h, ranks in enumerate(self.hosts) for r in ranks)
        return [h for _, h in placed]

    @cached_property
    def local_of(self) -> list[int]:
        """By rank: its place among the ranks of its host."""
        return [self.hosts[h].index(r) for r, h in enumerate(self.host_of)]

    @property
    def host(self) -> int:
        return self.host_of[self.rank]

    @property
    def neighbours(self) -> tuple[int, ...]:
        """The ranks of this host, this one included."""
        return self.hosts[self.host]

    @property
    def local_rank(self) -> int:
        return self.local_of[self.rank]

    @property
    def flat(self) -> bool:
        """No two ranks share a host."""
        return len(self.hosts) == self.world_size

    def is_here(self, rank: int) -> bool:
        return self.host_of[rank] == self.host

    def agent(self, host: int, rank: int) -> int:
        """The rank that acts on ``host`` for ``rank``: itself at home, elsewhere the one in its place, modulo."""
        ranks = self.hosts[host]
        return ranks[self.local_of[rank] % len(ranks)]

    def rails(self) -> list[int]:
        """Owners of a tensor's parts where any rank may be one: as many a host as the smallest host has, so that all
        hosts send and receive the same; in the order of their agents, so that each agent's parts are neighbours."""
        num_rails = min(len(ranks) for ranks in self.hosts)
        return [ranks[place] for place in range(num_rails) for ranks in self.hosts]


def even_parts(count: int, owners: Sequence[int]) -> list[Part]:
    """``count`` elements, divided as evenly as possible."""
    size, rest = divmod(count, len(owners))
    parts, begin = [], 0
    for i, owner in enumerate(owners):
        parts.append(Part(owner, begin, size + (i < rest)))
        begin += parts[-1].count
    return parts


def parts_of(counts: Sequence[int]) -> list[Part]:
    """Of a tensor that has ``counts[rank]`` elements of each rank, one after the other."""
    parts, begin = [], 0
    for rank, count in enumerate(counts):
        parts.append(Part(rank, begin, count))
        begin += count
    return parts


def in_agents_order(topology: Topology, parts: Iterable[Part]) -> list[list[Part]]:
    """By local rank of this host: the parts for whose owners it acts."""
    found: list[list[Part]] = [[] for _ in topology.neighbours]
    for part in parts:
        found[topology.local_of[topology.agent(topology.host, part.owner)]].append(part)
    return found
