"""Starts the workers of a run on this machine, through torch's launcher, and says in one piece what went wrong.

torch's own ways to meet (c10d, static) open a store on all of the host's interfaces. A run on one machine needs none of
them, so a rendezvous of its own listens on the loopback address alone.
"""

from __future__ import annotations

import datetime
import logging
import os
import signal
import socket
import sys
import tempfile
import uuid
from collections.abc import Sequence

from torch.distributed import PrefixStore, TCPStore
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from pycomm import env
from pycomm.pretrain.worker import EXIT_ERROR, EXIT_PEER_LOST, EXIT_TOLD
from pycomm.spawn import same_imports

LOOPBACK = "127.0.0.1"
RENDEZVOUS = "pycomm-loopback"
# Importing torch takes seconds. A Ctrl-C meanwhile waits for ``StopSignals.install`` instead of ending in a traceback.
_WORKER = """\
import signal
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
from pycomm.cli import main
sys.exit(main())
"""
STORE_TIMEOUT = datetime.timedelta(seconds=600)


class LoopbackRendezvous(RendezvousHandler):
    """The meeting point of a run on one machine: a store on a free loopback port, shared with the workers."""

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
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
        return RENDEZVOUS

    @property
    def use_agent_store(self) -> bool:
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        store = PrefixStore(self._run_id, self._store)
        return RendezvousInfo(store, 0, 1, RendezvousStoreInfo(LOOPBACK, self._port))

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._run_id

    def shutdown(self) -> bool:
        return True


def worker_code() -> str:
    """What a worker runs: this command, with its own arguments."""
    return f"{same_imports()}\n{_WORKER}"


def launch(nproc: int, python_args: Sequence[str]) -> int:
    """Run ``python *python_args`` in ``nproc`` workers and wait for them.

    A worker that fails ends the others; nothing is restarted. Ctrl-C and SIGTERM are passed on to the workers.

    Args:
        nproc: number of workers.
        python_args: what follows the interpreter's name.

    Returns:
        An exit code: 0, the workers' own, or 128 plus the number of the signal that stopped the run.
    """
    env.export_num_threads(max(1, len(os.sched_getaffinity(0)) // nproc))
    # torch's launcher would report a failure in its own words, at length; _explain says it once.
    logging.disable(logging.ERROR)
    rendezvous_handler_registry.register(RENDEZVOUS, _create_rendezvous)
    with tempfile.TemporaryDirectory(prefix="pycomm_launch_") as log_dir:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=nproc,
            run_id=uuid.uuid4().hex,
            role="pretrain",
            rdzv_backend=RENDEZVOUS,
            rdzv_endpoint=LOOPBACK,
            local_addr=LOOPBACK,
            max_restarts=0,
            monitor_interval=0.05,
            logs_specs=DefaultLogsSpecs(log_dir=log_dir),
        )
        try:
            elastic_launch(config, sys.executable)(*python_args)
        except ChildFailedError as error:
            return _explain(error.failures)
        except SignalException as stopped:
            return 128 + stopped.sigval
        finally:
            logging.disable(logging.NOTSET)
    return 0


def _create_rendezvous(parameters: RendezvousParameters) -> RendezvousHandler:
    return LoopbackRendezvous(parameters.run_id)


def _explain(failures: dict[int, ProcessFailure]) -> int:
    """Print the cause of a failed run to stderr, unless a worker has; returns the exit code.

    Workers that stopped because another failed, or that the launcher ended afterwards, are not the cause.
    """
    for rank, failure in failures.items():
        message = failure.error_file_data.get("message")
        if isinstance(message, dict):
            print(f"rank {rank} failed:\n{message['extraInfo']['py_callstack'].rstrip()}", file=sys.stderr)
            return EXIT_ERROR
    for rank, failure in failures.items():
        if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM:
            name = signal.Signals(-failure.exitcode).name
            hint = " (is the machine out of memory?)" if name == "SIGKILL" else ""
            print(f"rank {rank} was ended by {name}{hint}", file=sys.stderr)
            return EXIT_ERROR
    codes = {failure.exitcode for failure in failures.values()}
    told = codes & {EXIT_TOLD, 128 + signal.SIGINT, 128 + signal.SIGTERM}
    if told:
        return min(told)
    if 0 not in failures or failures[0].exitcode != EXIT_PEER_LOST:  # else rank 0 has said what it saw
        print(f"workers ended with exit codes {sorted(codes)}", file=sys.stderr)
    return EXIT_ERROR
