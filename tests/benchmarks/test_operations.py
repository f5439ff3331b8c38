"""The table of operations, against plain torch: what a right library leaves is right, anything else is counted."""

import pytest
import torch
from buffers import count_wrong, fill
from operations import COLLECTIVES, DTYPES, OPERATIONS, PERIOD, ROOT, is_sender, peer_of

WITH_DATA = [name for name, op in OPERATIONS.items() if op.sized]
CUT = ("reduce_scatter", "all_gather", "all_to_all", "gather", "scatter")


def _inputs(op, count, dtype, world_size, iteration):
    """Of each rank; what a rank does not send is noise that must not matter."""
    tensors = [torch.full((op.input_count(count, world_size),), 77).to(dtype) for _ in range(world_size)]
    for rank, tensor in enumerate(tensors):
        if op.sends(rank, world_size):
            fill(tensor, rank, iteration)
    return tensors


def _outputs(name, inputs):
    """What each rank's output must be; None where the operation leaves it alone."""
    n = len(inputs)
    total = torch.stack([tensor.double() for tensor in inputs]).sum(0).to(inputs[0].dtype)
    if name == "all_reduce":
        return [total] * n
    if name == "reduce":
        return [total if rank == ROOT else None for rank in range(n)]
    if name == "scan":
        prefixes = torch.stack([tensor.double() for tensor in inputs]).cumsum(0)
        return list(prefixes.to(inputs[0].dtype))
    if name == "reduce_scatter":
        return list(total.chunk(n))
    if name == "all_gather":
        return [torch.cat(inputs)] * n
    if name == "gather":
        return [torch.cat(inputs) if rank == ROOT else None for rank in range(n)]
    if name == "all_to_all":
        return [torch.cat([tensor.chunk(n)[rank] for tensor in inputs]) for rank in range(n)]
    if name == "broadcast":
        return [inputs[ROOT]] * n
    if name == "scatter":
        return list(inputs[ROOT].chunk(n))
    peers = [peer_of(rank, n) for rank in range(n)]
    receives = [peer is not None and (name == "ping_pong" or is_sender(peer)) for peer in peers]
    return [inputs[peer] if receiving else None for peer, receiving in zip(peers, receives, strict=True)]


@pytest.mark.parametrize(
    ("name", "world_size"), [(name, n) for name in WITH_DATA for n in range(OPERATIONS[name].min_ranks, 5)]
)
def test_a_right_result_is_right(name, world_size):
    op = OPERATIONS[name]
    for dtype in DTYPES:
        for size in (64, PERIOD * 24, 3 * PERIOD * 24 + 120):
            num_bytes = op.message_bytes(size, dtype, world_size)
            element = getattr(torch, dtype)
            inputs = _inputs(op, num_bytes // element.itemsize, element, world_size, iteration=4)
            outputs = _outputs(name, inputs)
            for rank, output in enumerate(outputs):
                assert op.receives(rank, world_size) == (output is not None)
                if output is None:
                    continue
                count = op.output_count or op.input_count
                assert output.numel() == count(num_bytes // element.itemsize, world_size)
                assert count_wrong(op, output, rank, world_size, 4) == 0


@pytest.mark.parametrize("name", WITH_DATA)
def test_one_wrong_element_a_stale_result_and_one_of_another_rank_are_counted(name):
    op, count = OPERATIONS[name], 64 * PERIOD
    outputs = _outputs(name, _inputs(op, count, torch.int32, 2, iteration=5))
    for rank, output in enumerate(outputs):
        if output is None:
            continue
        assert count_wrong(op, output, rank, 2, 6) > output.numel() // 2  # the iteration before
        shifted = output.roll(4096)
        assert count_wrong(op, shifted, rank, 2, 5) > output.numel() // 2  # a slice in another's place
        once = output.clone()
        once[output.numel() // 2] += 1
        assert count_wrong(op, once, rank, 2, 5) == 1


@pytest.mark.parametrize("name", ["reduce_scatter", "all_to_all", "scatter"])
def test_the_part_of_another_rank_is_wrong(name):
    op = OPERATIONS[name]
    outputs = _outputs(name, _inputs(op, 64 * PERIOD + 64, torch.int32, 2, iteration=1))
    assert count_wrong(op, outputs[1], 0, 2, 1) > outputs[1].numel() // 2


@pytest.mark.parametrize("name", CUT)
def test_messages_are_whole_parts(name):
    assert OPERATIONS[name].message_bytes(1000, "float32", 3) == 996
    assert OPERATIONS[name].message_bytes(8, "float32", 3) == 0
    assert OPERATIONS[name].bus_factor(4) == 0.75


@pytest.mark.parametrize("name", ["broadcast", "reduce", "send", "ping_pong"])
def test_messages_that_are_not_cut_go_once_over_a_link(name):
    assert OPERATIONS[name].message_bytes(1000, "float32", 3) == 1000
    assert OPERATIONS[name].bus_factor(4) == 1.0


def test_what_buffers_take():
    sizes = {name: OPERATIONS[name].buffer_bytes(1200, 3) for name in WITH_DATA}
    assert sizes == {
        "all_reduce": 1200, "broadcast": 1200, "reduce": 1200, "scan": 1200, "reduce_scatter": 1600,
        "scatter": 1600, "all_gather": 1600, "gather": 1600, "all_to_all": 2400, "ping_pong": 2400, "send": 2400,
    }  # fmt: skip


def test_the_script_of_collectives_has_all_but_messages():
    assert set(OPERATIONS) - set(COLLECTIVES) == {"ping_pong", "send"}
