"""A contender that dies, hangs or never starts is named; nothing of it is left behind."""

import psutil
import pytest
from contenders import CONTENDERS, Spec, file_of
from group import Group, GroupError


@pytest.fixture
def make_group(tmp_path):
    groups = []

    def make(spec, timeout_s=60.0):
        groups.append(Group(spec, 2, tmp_path / spec.name, timeout_s))
        groups[-1].start()
        return groups[-1]

    yield make
    for group in groups:
        group.kill()


def _children():
    return {process.pid: process for process in psutil.Process().children()}


def _start(make_group, timeout_s=60.0):
    """A ready two-rank gloo group and its processes in rank order (pids ascend with the order of starting)."""
    before = _children()
    group = make_group(CONTENDERS["gloo"], timeout_s)
    ranks = [process for pid, process in sorted(_children().items()) if pid not in before]
    group.wait_ready()
    assert len(ranks) == 2
    return group, ranks


def test_a_killed_rank_is_named_with_its_signal_and_nothing_is_left(make_group, tmp_path):
    group, ranks = _start(make_group)
    group.request("prepare", operation="all_reduce", dtype="float32", num_bytes=4096)
    assert [reply["wrong"] for reply in group.request("turn", iterations=3)] == [0, 0]
    ranks[1].kill()
    with pytest.raises(GroupError, match=r"gloo lost rank \d in turn \(.*rank 1 was killed by SIGKILL"):
        group.request("turn", iterations=3)
    assert not any(process.is_running() for process in ranks)
    assert not (tmp_path / "gloo").exists()


def test_a_silent_rank_is_named_when_its_time_is_up(make_group):
    group, ranks = _start(make_group, timeout_s=1.0)
    ranks[1].suspend()
    with pytest.raises(GroupError, match="gloo gave no answer in time to release: rank 1"):
        group.request("release")
    assert not any(process.is_running() for process in ranks)


def test_ranks_that_fail_to_start_show_what_they_printed(make_group):
    group = make_group(Spec("smoke", "smoke:Smoke", (), "pip install smoke", "smoke signals"))
    with pytest.raises(GroupError, match=r"(?s)smoke did not start \(.*exited with status 1.*KeyError: 'smoke'"):
        group.wait_ready()


def test_what_is_not_installed_is_named_with_the_command_that_brings_it():
    spec = Spec("smoke", "smoke:Smoke", ("no_such_module_anywhere",), "pip install smoke", "smoke signals")
    assert spec.missing() == (
        "smoke is not measured: no_such_module_anywhere not installed here; get it with: pip install smoke"
    )
    spec = Spec("smoke", "smoke:Smoke", ("torch",), "pip install smoke", "smoke signals", wheel="no-such-wheel")
    assert "no-such-wheel not installed here" in spec.missing()


def test_a_file_that_a_wheel_does_not_bring_is_an_error_that_names_both():
    with pytest.raises(FileNotFoundError, match="installed torch brought no file called prterun"):
        file_of("torch", "prterun")
