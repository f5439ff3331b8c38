"""Which rank acts for which, and which parts lie next to each other, without any process."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pycomm.backends import choose
from pycomm.backends.gloo.topology import Part, Topology, even_parts, in_agents_order
from pycomm.errors import BackendUnavailableError
from tests.hosts.helpers import hosts_of

layouts = st.lists(st.integers(0, 3), min_size=1, max_size=12)


@given(layouts)
def test_every_rank_has_one_agent_a_host(names: list[int]) -> None:
    for rank in range(len(names)):
        topology = Topology.of(rank, names)
        assert topology.world_size == len(names)
        assert [topology.hosts[h][p] for h, p in zip(topology.host_of, topology.local_of, strict=True)] == list(
            range(len(names))
        )
        for host, ranks in enumerate(topology.hosts):
            assert topology.agent(host, rank) in ranks
        assert topology.agent(topology.host, rank) == rank


@given(layouts, st.integers(0, 100))
def test_rails_need_no_reordering(names: list[int], count: int) -> None:
    for rank in range(len(names)):
        topology = Topology.of(rank, names)
        parts = even_parts(count, topology.rails())
        assert sum(part.count for part in parts) == count
        assert [part for group in in_agents_order(topology, parts) for part in group] == parts
        assert len({part.owner for part in parts}) == len(parts)


def test_hosts_come_in_the_order_of_their_lowest_rank() -> None:
    topology = Topology.of(3, "baab")
    assert topology.hosts == hosts_of("baab") == ((0, 3), (1, 2))
    assert (topology.host, topology.local_rank, topology.neighbours) == (0, 1, (0, 3))
    assert topology.rails() == [0, 1, 3, 2]
    assert not topology.flat
    assert Topology.of(0, "abc").flat
    assert in_agents_order(topology, [Part(r, r, 1) for r in range(4)]) == [
        [Part(0, 0, 1), Part(1, 1, 1)],
        [Part(2, 2, 1), Part(3, 3, 1)],
    ]


def test_the_choice_says_why() -> None:
    assert choose("auto", ["a", "a"]).name == choose("host", ["a", "a"]).name == "shm"
    several = choose("auto", ["a", "b", "a"])
    assert choose("host", ["a", "b", "a"]) == several
    assert (several.name, "3 ranks are on 2 hosts" in several.reason) == ("gloo+shm", True)
    assert choose("gloo", ["a", "a"]).name == choose("gloo", ["a", "b"]).name == "gloo"
    with pytest.raises(BackendUnavailableError, match="2 hosts.*'host'"):
        choose("shm", ["a", "b"])
