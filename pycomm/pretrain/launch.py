"""Starts the workers of a run on this machine, through torch's launcher, and says in one piece what went wrong.

torch's own ways to meet (c10d, static) open a store on all of the host's interfaces. A run on one machine needs none of
them, so a rendezvous of its own listens on the loopback address alone.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import signal
import socket
import sys
import time
import uuid
from collections.abc import Sequence

from torch.distributed import PrefixStore, TCPStore
from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from pycomm import env
from pycomm.pretrain.worker import EXIT_ERROR, EXIT_PEER_LOST, EXIT_TOLD
from pycomm.spawn import same_imports
from pycomm_command import StopSignals

LOOPBACK = "127.0.0.1"
STORE_TIMEOUT = datetime.timedelta(seconds=600)


END_S = 30.0  # torch's launcher waits so long for the workers to end after SIGTERM, then kills them


class LoopbackRendezvous(RendezvousHandler):
    """The meeting point of a run on one machine: a store on a free loopback port, shared with the workers.

    torch's launcher asks it several times a second whether workers wait to join. That is where a signal that asked for
    a stop takes effect: between the launcher's own doings, never in the middle of them.
    """

    def __init__(self, run_id: str, signals: StopSignals) -> None:
        self._run_id = run_id
        self._signals = signals
        self.last_healthy_s = time.monotonic()
        listener = socket.create_server((LOOPBACK, 0))
        self._port: int = listener.getsockname()[1]
        # The store takes the descriptor over: nobody else can get the port between choosing it and using it.
        self._store = TCPStore(
            LOOPBACK,
            self._port,
            is_master=True,
            timeout=STORE_TIMEOUT,
            wait_for_workers=False,
            multi_tenant=True,
            master_listen_fd=listener.detach(),
        )

    def get_backend(self) -> str:
        return f"pycomm-{self._run_id}"  # one for each launch: a name in torch's registry is taken for good

    @property
    def use_agent_store(self) -> bool:
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        self._stop_if_asked()
        store = PrefixStore(self._run_id, self._store)
        return RendezvousInfo(store, 0, 1, RendezvousStoreInfo(LOOPBACK, self._port))

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass

    def num_nodes_waiting(self) -> int:
        self.last_healthy_s = time.monotonic()
        self._stop_if_asked()
        return 0

    def _stop_if_asked(self) -> None:
        signum = self._signals.signum
        if signum is not None:
            raise SignalException("asked to stop", signal.Signals(signum))

    def get_run_id(self) -> str:
        return self._run_id

    def shutdown(self) -> bool:
        return True


class TracebackFiles(LogsSpecs):
    """Where workers leave the traceback of an unexpected error: in the launcher's memory, so that nothing is left of it
    however the launcher ends. Their output goes where the launcher's goes."""

    _NONE = json.dumps({"message": "", "timestamp": 0}).encode()  # of a worker that leaves none

    def __init__(self) -> None:
        super().__init__()
        self._descriptors: list[int] = []

    @property
    def root_log_dir(self) -> str:
        return ""

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        files = {}
        for rank, environment in envs.items():
            descriptor = os.memfd_create(f"traceback of rank {rank}")
            self._descriptors.append(descriptor)
            os.write(descriptor, self._NONE)
            files[rank] = environment["TORCHELASTIC_ERROR_FILE"] = f"/proc/{os.getpid()}/fd/{descriptor}"
        console = dict.fromkeys(envs, "")
        return LogsDest(stdouts=console, stderrs=dict(console), error_files=files)

    def close(self) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)


def worker_code() -> str:
    """What a worker runs: this command, with its own arguments. torch's launcher puts the rank in."""
    return f"{same_imports()}\nfrom pycomm_command import work; work({os.getpid()}, ${{local_rank}})"


def launch(nproc: int, code: str, arguments: Sequence[str], signals: StopSignals) -> int:
    """Run ``python -c code *arguments`` in ``nproc`` workers and wait for them.

    A worker that fails ends the others; nothing is restarted. SIGINT and SIGTERM are passed on to the workers: the
    first asks them to stop, a second ends them at once, and a third ends this process, which takes them with it.

    Args:
        nproc: number of workers.
        code: what a worker runs, see :func:`worker_code`; ``${local_rank}`` in it is the rank.
        arguments: the worker's own.
        signals: of this process. SIGINT and SIGTERM are blocked while workers start, which inherit that.

    Returns:
        An exit code: 0, the workers' own, or 128 plus the number of the signal that stopped the run.
    """
    env.export_num_threads(max(1, len(os.sched_getaffinity(0)) // nproc))
    # torch's launcher would report a failure in its own words, at length; _explain says it once.
    logging.disable(logging.ERROR)
    signals.become_orderly()
    run_id = uuid.uuid4().hex
    meeting = LoopbackRendezvous(run_id, signals)
    rendezvous_handler_registry.register(meeting.get_backend(), lambda _: meeting)
    files = TracebackFiles()
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        run_id=run_id,
        role="pretrain",
        rdzv_backend=meeting.get_backend(),
        rdzv_endpoint=LOOPBACK,
        local_addr=LOOPBACK,
        max_restarts=0,
        monitor_interval=0.05,
        logs_specs=files,
        signals_to_handle="SIGHUP,SIGQUIT",  # the others are taken by ``signals``
    )
    try:
        # The launcher reads "$" in arguments as the start of a name.
        elastic_launch(config, sys.executable)("-c", code, *(text.replace("$", "$$") for text in arguments))
    except ChildFailedError as error:
        return _explain(error.failures, time.monotonic() - meeting.last_healthy_s)
    except SignalException as stopped:
        return 128 + stopped.sigval
    except KeyboardInterrupt:
        return signals.exit_code()
    finally:
        files.close()
        logging.disable(logging.NOTSET)
    return 0


def _explain(failures: dict[int, ProcessFailure], ending_s: float) -> int:
    """Print the cause of a failed run to stderr, unless a worker has; returns the exit code.

    Workers that stopped because another failed, or that the launcher ended afterwards, are not the cause.

    Args:
        failures: by rank.
        ending_s: how long it took from the first failure until all workers had ended.
    """
    for rank, failure in failures.items():
        message = failure.error_file_data.get("message")
        if isinstance(message, dict):
            print(f"rank {rank} failed:\n{message['extraInfo']['py_callstack'].rstrip()}", file=sys.stderr)
            return EXIT_ERROR
    codes = {failure.exitcode for failure in failures.values()}
    killed = sorted(rank for rank, failure in failures.items() if failure.exitcode == -signal.SIGKILL)
    # The launcher kills those that do not end; where nothing else has failed, one of the killed was the first failure.
    by_launcher = ending_s >= END_S and codes - {-signal.SIGKILL, -signal.SIGTERM}
    if by_launcher and killed:
        print(
            f"rank(s) {', '.join(map(str, killed))} did not end within {END_S:g} s after another had, and were killed: "
            "stopped (SIGSTOP, a debugger), or stuck in the kernel",
            file=sys.stderr,
        )
    for rank, failure in failures.items():
        if failure.exitcode >= 0 or failure.exitcode == -signal.SIGTERM or (by_launcher and rank in killed):
            continue
        name = signal.Signals(-failure.exitcode).name
        hint = " (by the kernel for want of memory? dmesg would say so)" if name == "SIGKILL" else ""
        print(f"rank {rank} was ended by {name}{hint}", file=sys.stderr)
        return EXIT_ERROR
    told = codes & {EXIT_TOLD, 128 + signal.SIGINT, 128 + signal.SIGTERM}
    if told:
        return min(told)
    if 0 not in failures or failures[0].exitcode != EXIT_PEER_LOST:  # else rank 0 has said what it saw
        print(f"workers ended with exit codes {sorted(codes)}", file=sys.stderr)
    return EXIT_ERROR
