"""Sizes, quantiles, bandwidths, ratios, and the values that tell a right result from a wrong one."""

import pytest
import torch
from buffers import count_wrong, fill
from command_line import Options, parse_arguments, parse_size, parse_sizes
from harness import Samples, bandwidths, percentile, rows_of
from operations import COLLECTIVES, DTYPES, OPERATIONS, PERIOD
from report import format_row, size_label


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("1", 1), ("64", 64), ("1K", 1024), ("3k", 3072), ("256M", 2**28), ("2G", 2**31), ("4KB", 4096), ("4KiB", 4096)],
)
def test_a_size(text, num_bytes):
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize("text", ["", "K", "0", "-4", "1.5M", "4T", "1K2"])
def test_what_is_no_size_is_refused_by_name(text):
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("1K", (1024,)),
        ("1K:16K", (1024, 4096, 16384)),
        ("1K:8K:2", (1024, 2048, 4096, 8192)),
        ("1K:10K", (1024, 4096, 10240)),  # the last is measured although the steps miss it
        ("2M,100,4K", (100, 4096, 2 * 2**20)),
        ("1K:4K,4K:8K:2", (1024, 4096, 8192)),
    ],
)
def test_sizes(text, sizes):
    assert parse_sizes(text) == sizes


def test_the_default_range_has_ten_sizes():
    assert parse_sizes("1K:256M") == tuple(2**10 * 4**i for i in range(10))


@pytest.mark.parametrize("text", ["8K:1K", "1K:8K:1", "1K:8K:2:2", "1K:8K:x"])
def test_what_is_no_range_is_refused(text):
    with pytest.raises(ValueError, match="is not a range"):
        parse_sizes(text)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--backends", "gloo,smoke"], "unknown: smoke"),
        (["--backends", ""], "--backends"),
        (["--ops", "broadcast"], "--ops: unknown: broadcast; there are all_reduce"),
        (["--sizes", "2", "--dtype", "float32"], "hold no float32"),
        (["--ranks", "0"], "at least 1"),
        (["--plot", "curve.gif"], "must end in"),
        (["--json", "/no/such/directory/rows.jsonl"], "no directory"),
    ],
)
def test_a_command_line_that_cannot_work_is_refused_before_anything_starts(flags, complaint, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_arguments(flags, "")
    assert stop.value.code == 2
    assert complaint in capsys.readouterr().err


def test_sizes_are_rounded_down_to_whole_elements():
    assert parse_arguments(["--sizes", "1003,4K", "--dtype", "int64"], "").sizes == (1000, 4096)


def test_operations_are_chosen_of_those_of_the_script_in_the_order_given():
    assert parse_arguments([], "", COLLECTIVES).operations == COLLECTIVES
    assert parse_arguments(["--ops", "gather, reduce,gather"], "", COLLECTIVES).operations == ("gather", "reduce")


def test_messages_between_two_ranks_take_two(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--ranks", "1"], "", ("send",))
    assert "send takes at least 2" in capsys.readouterr().err


def test_percentile_is_the_nearest_rank():
    values = [float(x) for x in range(100, 0, -1)]
    assert percentile(values, 0.50) == 50.0
    assert percentile(values, 0.99) == 99.0
    assert percentile(values, 1.0) == 100.0
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([7.0], 0.99) == 7.0
    with pytest.raises(ValueError, match="no values"):
        percentile([], 0.5)


def test_bandwidths_are_in_ten_to_the_nine_bytes():
    # 10**6 bytes in 1,000 us are 10**9 bytes a second; four ranks send 2 * 3/4 of that over each link.
    assert bandwidths(10**6, 1000.0, OPERATIONS["all_reduce"].bus_factor(4)) == (1.0, 1.5)


def test_an_iteration_takes_as_long_as_its_slowest_rank():
    samples = Samples()
    samples.add([{"times_us": [1.0, 5.0], "wrong": 0}, {"times_us": [2.0, 4.0], "wrong": 3}])
    samples.add([{"times_us": [9.0], "wrong": 1}, {"times_us": [8.0], "wrong": 0}])
    assert samples.times_us == [2.0, 5.0, 9.0]
    assert samples.wrong == 4


def test_a_ping_pong_is_two_trips_and_shows_one():
    samples = Samples(trips=OPERATIONS["ping_pong"].trips)
    samples.add([{"times_us": [6.0], "wrong": 0}, {"times_us": [5.0], "wrong": 0}])
    assert samples.times_us == [3.0]


def _options(ranks=2):
    return Options(
        ranks, ("all_reduce",), (1024,), "float32", ("pycomm", "gloo"),
        turns=1, seconds=0.1, iterations=None, timeout_s=1.0,
    )  # fmt: skip


def test_rows_have_ratio_and_share():
    times = {"pycomm": [4.0, 4.0, 10.0], "gloo": [40.0, 44.0, 60.0], "bound": [2.0, 3.0, 1.0]}
    rows = rows_of("allreduce", "all_reduce", _options(), 1024, {k: Samples(v) for k, v in times.items()})
    by_name = {row.backend: row for row in rows}
    assert by_name["gloo"].ratio_to_pycomm == 11.0
    assert by_name["pycomm"].ratio_to_pycomm == 1.0
    assert by_name["pycomm"].bound_share == 0.5
    assert by_name["bound"].bound_share == 1.0
    assert by_name["gloo"].time_us_p99 == 60.0
    assert by_name["pycomm"].algbw_gbps == pytest.approx(0.256, rel=1e-12)  # 1,024 bytes in 4 us; two roundings


def test_without_the_bound_or_pycomm_the_cells_are_empty_and_the_line_says_so():
    (row,) = rows_of("allreduce", "all_reduce", _options(), 1024, {"gloo": Samples([10.0])})
    assert row.bound_share is None
    assert row.ratio_to_pycomm is None
    assert format_row(row).split()[-2:] == ["n/a", "n/a"]
    assert format_row(row).split()[:4] == ["1024", "256", "float32", "gloo"]


def test_size_labels():
    assert [size_label(x) for x in (0, 1000, 1024, 3 * 2**20, 2**30)] == ["0 B", "1000 B", "1 KB", "3 MB", "1 GB"]


def _reduced(count, dtype, world_size, iteration):
    buffers = [torch.empty(count, dtype=dtype) for _ in range(world_size)]
    for rank, buffer in enumerate(buffers):
        fill(buffer, rank, iteration)
    return torch.stack([buffer.double() for buffer in buffers]).sum(0).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, PERIOD - 1, PERIOD, 3 * PERIOD + 5])
def test_the_sum_of_what_the_ranks_fill_in_is_right(dtype, count):
    output = _reduced(count, getattr(torch, dtype), 3, iteration=4)
    assert [count_wrong(OPERATIONS["all_reduce"], output, rank, 3, 4) for rank in range(3)] == [0, 0, 0]


@pytest.mark.parametrize("place", [0, 1500, 2 * PERIOD, 2 * PERIOD + 6])
def test_a_single_wrong_element_is_counted(place):
    output = _reduced(2 * PERIOD + 7, torch.float32, 2, iteration=1)
    output[place] += 1
    assert count_wrong(OPERATIONS["all_reduce"], output, 0, 2, 1) == 1


def test_a_stale_a_missing_and_a_displaced_contribution_are_all_wrong():
    count, op = 64 * PERIOD, OPERATIONS["all_reduce"]
    output = _reduced(count, torch.float32, 2, iteration=5)
    assert count_wrong(op, output, 0, 2, 6) > count // 2  # the iteration before
    assert count_wrong(op, output, 0, 3, 5) > count // 2  # a rank left out
    assert count_wrong(op, output.roll(4096), 0, 2, 5) > count // 2  # a slice in another's place
