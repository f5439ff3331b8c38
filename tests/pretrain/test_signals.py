"""What Ctrl-C and SIGTERM do to a worker, before and during training."""

import signal
from collections.abc import Iterator

import pytest

from pycomm.pretrain.signals import STOPPING, StopSignals


@pytest.fixture
def stop() -> Iterator[StopSignals]:
    before = {signum: signal.getsignal(signum) for signum in STOPPING}
    yield StopSignals()
    for signum, handler in before.items():
        signal.signal(signum, handler)


def test_before_training_a_signal_interrupts(stop: StopSignals) -> None:
    stop.install()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)
    assert stop.exit_code() == 143


def test_during_training_the_first_asks_and_the_second_interrupts(stop: StopSignals) -> None:
    stop.install()
    stop.become_orderly()
    assert not stop.requested()
    signal.raise_signal(signal.SIGINT)
    assert stop.requested()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)
    assert stop.exit_code() == 130, "the first signal is the one that counts"


def test_a_signal_that_came_too_early_is_not_lost(stop: StopSignals) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        stop.install()
    # install() was interrupted between unblocking and returning; nothing may stay blocked.
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(STOPPING)
    assert stop.exit_code() == 143


def test_a_failing_worker_ignores_them(stop: StopSignals) -> None:
    stop.install()
    stop.ignore()
    for signum in STOPPING:
        signal.raise_signal(signum)
    assert not stop.requested()
