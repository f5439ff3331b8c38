"""The first lines of the command and of its workers: what signals do, and that a worker ends with its launcher."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from pycomm.spawn import ends_with_this_process, same_imports
from pycomm_command import StopSignals

DEADLINE_S = 60.0
# A program that listens, says so, and then is where no Python handler could run: in a C call that does not return.
STUCK = """
import ctypes, sys
from pycomm_command import StopSignals
signals = StopSignals()
signals.listen()
{phase}
print("ready", flush=True)
mutex = ctypes.create_string_buffer(64)
ctypes.CDLL(None).pthread_mutex_lock(mutex)
ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""
# One that gets KeyboardInterrupts.
AWAKE = """
import time
from pycomm_command import StopSignals
signals = StopSignals()
signals.listen()
{phase}
print("ready", flush=True)
for number in range(2):
    try:
        while True:
            if signals.requested() and number == 0:
                print("asked", flush=True)
                number = 1
            time.sleep(0.01)
    except KeyboardInterrupt:
        print("interrupted once", flush=True)
"""


def started(program: str, phase: str = "") -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", f"{same_imports()}\n{program.format(phase=phase)}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n", process.communicate(timeout=DEADLINE_S)[1]
    return process


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_process_that_has_nothing_to_lose_even_inside_a_c_call(signum: int, code: int) -> None:
    with started(STUCK) as process:
        process.send_signal(signum)
        _, errors = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, errors) == (code, "interrupted\n")


def test_in_training_the_first_asks_the_second_interrupts_and_the_third_ends() -> None:
    with started(AWAKE, "signals.become_orderly()") as process:
        assert process.stdout is not None
        for said in ("asked\n", "interrupted once\n"):
            process.send_signal(signal.SIGTERM if said == "asked\n" else signal.SIGINT)
            assert process.stdout.readline() == said
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, errors) == (143, "interrupted\n"), "the first signal is the one that counts"


def test_three_signals_end_a_process_that_is_stuck_in_training() -> None:
    with started(STUCK, "signals.become_orderly()") as process:
        while process.poll() is None:  # some may fall together
            process.send_signal(signal.SIGINT)
            with_limit(process)
        assert process.returncode == 130


def with_limit(process: "subprocess.Popen[str]") -> None:
    try:
        process.wait(0.2)
    except subprocess.TimeoutExpired:
        return


def test_a_command_with_something_to_clear_away_is_interrupted_at_once() -> None:
    with started(AWAKE, "signals.interrupt()") as process:
        assert process.stdout is not None
        process.send_signal(signal.SIGINT)
        assert "interrupted once\n" in iter(process.stdout.readline, "")
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130


def test_a_failing_worker_keeps_its_exit_code_while_its_interpreter_ends() -> None:
    """The launcher sends SIGTERM as soon as another worker has ended. The interpreter's end puts back the default of
    every signal that has a handler, so they must be ignored for real."""
    with started(STUCK, "signals.ignore()") as process:
        status = Path(f"/proc/{process.pid}/status").read_text()
        process.kill()
    (ignored,) = (int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigIgn"))
    for signum in (signal.SIGINT, signal.SIGTERM):
        assert ignored >> (signum - 1) & 1


def test_a_failing_worker_ignores_them() -> None:
    stop = StopSignals()
    stop.ignore()
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
        stop.arrived(signum)  # would end this process
    assert stop.exit_code() == 130


def test_a_child_ends_with_its_parent_however_that_ends() -> None:
    """A worker that has just begun, its signals blocked, must not outlive a launcher that was killed meanwhile."""
    child = f"{same_imports()}; import signal; signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65)); "
    parent = (
        f"{same_imports()}; import subprocess, sys; from pycomm.spawn import ends_with_this_process; "
        f"code = {child!r} + ends_with_this_process() + '; print(\"ready\", flush=True); signal.pause()'; "
        "process = subprocess.Popen([sys.executable, '-c', code], start_new_session=True); "
        "print(process.pid, flush=True); process.wait()"
    )
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = {process.stdout.readline(), process.stdout.readline()}
        (pid,) = (int(line) for line in said if line != "ready\n")
        (orphan,) = [found for found in psutil.process_iter() if found.pid == pid]
        process.kill()
        process.wait(DEADLINE_S)
        _, alive = psutil.wait_procs([orphan], timeout=DEADLINE_S)
        for left in alive:
            left.kill()
    assert not alive
    # One whose parent has gone before it could ask the kernel.
    late = ends_with_this_process().replace(str(os.getpid()), "1")
    done = subprocess.run([sys.executable, "-c", f"{same_imports()}; {late}; print('on')"], capture_output=True)
    assert (done.returncode, done.stdout) == (1, b"")
