"""Plans of overlapped products (csrc/cuda/matmul/plan.hpp) in every order that they allow: no race, no deadlock, and
nothing that waits for what it does not need. That their results are right is tests/cuda_on_cpu/test_matmul.py's.
"""

from itertools import combinations

import pytest

from pycomm import _C

GATHER, SCATTER, ALL_REDUCE = OPS = ("all_gather_matmul", "matmul_reduce_scatter", "matmul_all_reduce")
SETS = {"shard", "arrived", "reduced"}  # buffers that have two sets, in turns
CALLS = 4  # a set is used again two calls later


def rows_of(world, seed=0):
    return [(4, 1, 6, 3, 5)[(rank + seed) % 5] for rank in range(world)]


def plans_of(op, world, pieces, lanes, mapped=True):
    return [_C.matmul_plan(op, rank, rows_of(world), pieces, lanes, mapped) for rank in range(world)]


def accesses(step, world):
    """(place, written?) of what a step touches."""
    if step["kind"] in ("signal", "await"):
        return []
    sources = [step["from"]]
    if step["kind"] == "reduce":
        rank, buffer, _, begin, end = step["from"]
        sources = [(rank, buffer, part, begin, end) for part in range(world)]
    return [(place, False) for place in sources] + [(step["to"], True)]


class History:
    """All steps of several calls of all ranks, and what happens before what: a bit set of earlier steps for each."""

    def __init__(self, ops, world, pieces, lanes, mapped):
        self.nodes = []  # (call, rank, index, step)
        self.number = {}
        for call, op in enumerate(ops, 1):
            for rank, plan in enumerate(plans_of(op, world, pieces, lanes, mapped)):
                for index, step in enumerate(plan):
                    self.number[call, rank, index] = len(self.nodes)
                    self.nodes.append((call, rank, index, step))
        self.world = world
        self.edges = [set() for _ in self.nodes]  # direct predecessors
        self._connect(len(ops))
        self.before = self._closure()

    def _connect(self, num_calls):
        signals, sends = {}, {}
        for node, (call, rank, _, step) in enumerate(self.nodes):
            if step["kind"] == "signal":
                signals[call, step["flag"], rank, step["peer"], step["piece"]] = node
            if step["kind"] == "exchange":
                sends.setdefault((call, rank, step["peer"]), []).append(node)
        last_on_lane, of_call = {}, {}
        received = {}
        for node, (call, rank, _, step) in enumerate(self.nodes):
            self.edges[node].update(self.number[call, rank, other] for other in step["after"])
            lane = (call, rank, step["lane"])
            if lane in last_on_lane:
                self.edges[node].add(last_on_lane[lane])
            last_on_lane[lane] = node
            # The caller's stream stands between a rank's calls.
            self.edges[node].update(of_call.get((call - 1, rank), ()))
            of_call.setdefault((call, rank), []).append(node)
            if step["kind"] == "await":
                self.edges[node].add(signals[call, step["flag"], step["peer"], rank, step["piece"]])
            if step["kind"] == "exchange":
                place = received.setdefault((call, step["source"], rank), 0)
                received[call, step["source"], rank] = place + 1
                self.edges[node].update(self.edges_of_sender(sends[call, step["source"], rank][place]))

    def edges_of_sender(self, sender):
        """A receive comes after what its sender did before it sent: the two are one rendezvous."""
        call, rank, _, step = self.nodes[sender]
        same_lane = [
            self.number[call, rank, i]
            for i in range(self.nodes[sender][2])
            if self.nodes[self.number[call, rank, i]][3]["lane"] == step["lane"]
        ]
        return [self.number[call, rank, other] for other in step["after"]] + same_lane[-1:]

    def _closure(self):
        """Fails if steps wait in a ring."""
        before, left = [None] * len(self.nodes), set(range(len(self.nodes)))
        while left:
            ready = [node for node in left if all(before[other] is not None for other in self.edges[node])]
            assert ready, "steps wait for each other"
            for node in ready:
                bits = 1 << node
                for other in self.edges[node]:
                    bits |= before[other]
                before[node] = bits
            left.difference_update(ready)
        return before

    def races(self):
        touched = {}
        for node, (call, _, _, step) in enumerate(self.nodes):
            for (rank, buffer, part, begin, end), writes in accesses(step, self.world):
                # A caller's own tensors are other ones in each call.
                turn = call % 2 if buffer in SETS else call if buffer in ("input", "output") else 0
                if begin < end:
                    touched.setdefault((rank, buffer, turn, part), []).append((node, begin, end, writes))
        found = []
        for place, uses in touched.items():
            for (a, a_begin, a_end, a_writes), (b, b_begin, b_end, b_writes) in combinations(uses, 2):
                if not (a_writes or b_writes) or a_end <= b_begin or b_end <= a_begin or a == b:
                    continue
                if not (self.before[b] >> a & 1 or self.before[a] >> b & 1):
                    found.append((place, self.nodes[a], self.nodes[b]))
        return found


SEQUENCES = [(op,) * CALLS for op in OPS] + [(GATHER, SCATTER, ALL_REDUCE, SCATTER), (ALL_REDUCE, GATHER) * 2]


@pytest.mark.parametrize("ops", SEQUENCES, ids="-".join)
@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("mapped", [True, False])
def test_all_orders_are_free_of_races_and_deadlocks(ops, world, mapped):
    for pieces, lanes in ((1, 8), (2, 2)) if world < 8 else ((1, 8),):
        assert History(ops, world, pieces, lanes, mapped).races() == []


def test_a_missing_dependency_is_found(monkeypatch):
    whole = _C.matmul_plan

    def weakened_at(index):
        """Plans whose step ``index`` waits neither for a flag nor for another lane."""

        def plan(*args):
            steps = whole(*args)
            steps[index]["after"] = []
            if steps[index]["kind"] == "await":
                nothing = (0, "nowhere", 0, 0, 0)
                steps[index].update({"kind": "copy", "from": nothing, "to": nothing})
            return steps

        return plan

    for op in OPS:
        steps = whole(op, 0, rows_of(3), 1, 8, True)
        for index, step in enumerate(steps):
            if step["kind"] == "await" or any(steps[other]["lane"] != step["lane"] for other in step["after"]):
                monkeypatch.setattr(_C, "matmul_plan", weakened_at(index))
                assert History((op,) * CALLS, 3, 1, 8, True).races() != [], (op, step)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("mapped", [True, False])
def test_ranks_that_do_one_step_at_a_time_do_not_deadlock(op, world, mapped):
    """So hardware queues that several streams share cannot deadlock either (CUDA_DEVICE_MAX_CONNECTIONS)."""
    plans = plans_of(op, world, 2, 8, mapped)
    next_step, flags, come = [0] * world, set(), {}
    moved = True
    while moved:
        moved = False
        for rank, plan in enumerate(plans):
            while next_step[rank] < len(plan):
                step = plan[next_step[rank]]
                flag = (step.get("flag"), step.get("peer"), rank, step.get("piece"))
                if step["kind"] == "await" and flag not in flags:
                    break
                if step["kind"] == "signal":
                    flags.add((step["flag"], rank, step["peer"], step["piece"]))
                if step["kind"] == "exchange":
                    # Both sides have come, or neither goes on: the k-th exchange from a rank meets the k-th to it.
                    come.setdefault((rank, step["peer"]), set()).add(next_step[rank])
                    met = [s for s in plan[: next_step[rank] + 1] if s.get("source") == step["source"]]
                    if len(come.get((step["source"], rank), ())) < len(met):
                        break
                next_step[rank] += 1
                moved = True
    assert next_step == [len(plan) for plan in plans]


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_own_rows_come_first_and_then_the_successors(world):
    rank = world // 2
    rows = rows_of(world)
    firsts = [sum(rows[:r]) for r in range(world)]
    order = [(rank + k) % world for k in range(world)]
    gathered = _C.matmul_plan(GATHER, rank, rows, 1, 8, True)
    assert [s["to"][3] for s in gathered if s["kind"] == "multiply"] == [firsts[r] for r in order]
    scattered = _C.matmul_plan(SCATTER, rank, rows, 1, 8, True)
    products = [s["from"][3] for s in scattered if s["kind"] == "multiply"]
    assert products == [firsts[r] for r in order[1:] + order[:1]]


def test_a_late_shard_holds_up_nothing_but_its_own_product():
    """With a lane a rank: every other rank's rows can be multiplied while one has not even come."""
    world, rank = 8, 0
    plan = _C.matmul_plan(GATHER, rank, rows_of(world), 2, 8, True)
    for late in range(1, world):
        blocked = set()
        for index, step in enumerate(plan):
            waits = step["kind"] == "await" and step["peer"] == late
            on_lane = any(plan[other]["lane"] == step["lane"] for other in blocked)
            if waits or on_lane or blocked.intersection(step["after"]):
                blocked.add(index)
        held_up = {plan[index]["to"][3] for index in blocked if plan[index]["kind"] == "multiply"}
        first = sum(rows_of(world)[:late])
        assert held_up == {
            s["to"][3] for s in plan if s["kind"] == "multiply" and first <= s["to"][3] < first + rows_of(world)[late]
        }


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("all_gather", 0, [1], 1, 1, True), "unknown operation"),
        ((GATHER, 2, [1, 1], 1, 1, True), "rank 2 of 2"),
        ((GATHER, 0, [1, -1], 1, 1, True), "not negative"),
        ((GATHER, 0, [], 1, 1, True), "rank 0 of 0"),
        ((GATHER, 0, [1], 65, 1, True), "1 to 64 pieces"),
        ((GATHER, 0, [1], 1, 0, True), "at least one lane"),
    ],
)
def test_wrong_arguments(args, said):
    with pytest.raises(ValueError, match=said):
        _C.matmul_plan(*args)
