"""What one worker of a pretraining run does, from the first text file to the last picture.

Rank 0 also talks to people and writes the run's files. Every way to end has an exit code: 0 done; ``EXIT_ERROR``
failed, traceback recorded; ``EXIT_TOLD`` failed for a reason that people have been told; ``EXIT_PEER_LOST`` stopped
because another rank failed; 128 + signal number when it was asked to stop.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

import pycomm
from pycomm import env
from pycomm.communicator import Communicator
from pycomm.errors import PycommError
from pycomm.pretrain import checkpoint
from pycomm.pretrain.config import ConfigError, PretrainConfig, PretrainError
from pycomm.pretrain.data import Corpus, prepare
from pycomm.pretrain.files import file_errors
from pycomm.pretrain.loop import TrainState, abort_on_error, build_state, train
from pycomm.pretrain.run import Run
from pycomm_command import StopSignals, end_with_parent

EXIT_ERROR = 1
EXIT_TOLD = 2
EXIT_PEER_LOST = 3
PREPARE_TIMEOUT_S = 6 * 3600.0  # tokenizing much text takes its time; a rank 0 that dies meanwhile is noticed at once

Say = Callable[[str], None]


def main(config: PretrainConfig, command: str, signals: StopSignals) -> int:
    """Run one worker; reads rank and world size from the environment, as torchrun sets them.

    Args:
        config: of the run; checked here against the number of workers.
        command: the command line without ``--resume``, to tell people how to go on.
        signals: of this process; SIGINT and SIGTERM end it at once until training begins.

    Returns:
        The exit code.
    """
    launched = env.launch()
    is_lead = launched is None or launched.rank == 0
    try:
        if env.elastic_error_file() is not None:  # a launcher of torch's, which does not end before its workers
            end_with_parent(os.getppid())
        config.validate(1 if launched is None else launched.world_size)
        comm = pycomm.init("host", timeout_s=config.run.timeout_s)
        with comm, abort_on_error(comm), orderly_failure(signals):
            finished = pretrain(comm, config, command, signals)
    except KeyboardInterrupt:
        if is_lead:
            print("interrupted", file=sys.stderr)
        return signals.exit_code()
    except PretrainError as error:
        if is_lead:
            print(f"pycomm pretrain: {error}", file=sys.stderr)
        return EXIT_TOLD
    except PycommError as error:
        # A rank that is asked to stop may find that the others are gone already.
        if signals.requested():
            return signals.exit_code()
        if is_lead:
            print(f"pycomm pretrain: rank 0 stopped: {error}", file=sys.stderr)
        return EXIT_PEER_LOST
    return 0 if finished else signals.exit_code()


@contextmanager
def orderly_failure(signals: StopSignals) -> Iterator[None]:
    """Lets a failed worker end in peace, and leaves an unexpected error's traceback for the launcher.

    A launcher sends SIGTERM to all as soon as one worker has ended, and the others end within moments of being told of
    the failure. From here on this worker ignores that, so that its message and exit code are not lost. The launcher
    shows the traceback once; without one that asks for it, the error takes its usual way to the terminal.
    """
    try:
        yield
    except (PycommError, PretrainError):
        signals.ignore()
        raise
    except Exception as error:
        signals.ignore()
        if env.elastic_error_file() is None:
            raise
        get_error_handler().record_exception(error)
        raise WorkerFailed(f"{type(error).__name__}: {error}") from error


class WorkerFailed(SystemExit):
    """Ends a worker whose error has been recorded; its text is the reason that the other ranks are given."""

    def __init__(self, reason: str) -> None:
        super().__init__(EXIT_ERROR)
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


def pretrain(comm: Communicator, config: PretrainConfig, command: str, signals: StopSignals) -> bool:
    """One run. Collective; returns False if it was asked to stop before the last step."""
    console = Console() if comm.rank == 0 else None

    def say(text: str) -> None:
        if console is not None:
            console.print(text, highlight=False, markup=False, soft_wrap=True)

    corpus = shared_corpus(comm, config, say)
    state = build_state(comm, config)
    say(describe(comm, config, corpus, state))
    resumed = restore(comm, config, corpus, state, say)
    signals.become_orderly()
    if console is None:
        finished = train(comm, config, corpus, state, save=checkpoint.contribute, stop=signals.requested)
    else:
        with Run(config, corpus, resumed, state, console) as run:
            finished = train(comm, config, corpus, state, on_step=run.step, save=run.save, stop=signals.requested)
        if finished:
            run.conclude_finished(state)
        else:
            run.conclude_stopped(state.step, command)
    # A worker that ends is taken for lost by those that still work: all leave together.
    comm.barrier()
    return finished


def shared_corpus(comm: Communicator, config: PretrainConfig, say: Say) -> Corpus:
    """Every rank's view of the tokens; rank 0 builds them if the cache has none. Collective.

    Raises:
        ConfigError: no text, too little of it, or the ranks' texts differ.
    """
    if comm.rank == 0:
        with comm.busy("preparing the text and its tokenizer"):
            corpus = prepare(config, env.cache_dir(), say)
        comm.barrier(timeout_s=PREPARE_TIMEOUT_S)
    else:
        comm.barrier(timeout_s=PREPARE_TIMEOUT_S)
        corpus = prepare(config, env.cache_dir())
    rows = comm.agree([int(corpus.key[:15], 16)])
    if any(row != rows[0] for row in rows):
        raise ConfigError("the ranks found different text: --text and the Python version must agree on all hosts")
    return corpus


def restore(comm: Communicator, config: PretrainConfig, corpus: Corpus, state: TrainState, say: Say) -> Path | None:
    """Load what ``--resume`` asks for; returns the checkpoint on rank 0, None elsewhere and if there is none.

    Raises:
        ConfigError: (on rank 0) there is no such checkpoint, or it does not fit the run.
    """
    if config.resume is None:
        return None
    path = None
    if comm.rank == 0:
        with file_errors(f"--resume {config.resume}", "give another checkpoint"):
            path = checkpoint.find(config.resume, config.out_dir())
            notes = [] if path is None else checkpoint.check_fits(checkpoint.read_info(path), config, corpus.key)
        if path is None:
            say(f"--resume auto: no checkpoint in {config.out_dir()} yet, starting anew")
        for note in notes:
            say(f"differs from the checkpoint's run: {note}")
    if comm.agree([path is not None])[0][0]:  # rank 0 has found one
        checkpoint.load(path or Path(), comm, state)
        say(f"resumed from {path} after step {state.step}")
    return path


def describe(comm: Communicator, config: PretrainConfig, corpus: Corpus, state: TrainState) -> str:
    """What is about to be trained on what, in three lines."""
    shape = config.model
    accumulated = config.accumulation(comm.world_size)
    return (
        f"text: {corpus.text}; {len(corpus.train):,} tokens to learn from, {len(corpus.held_out):,} held out\n"
        f"model: GPT, {state.model.num_parameters():,} parameters ({shape.num_layers} layers of {shape.hidden}, "
        f"vocabulary {shape.vocab_size})\n"
        f"ranks: {comm.world_size} ({comm.backend}), {torch.get_num_threads()} threads each, ZeRO stage {config.zero}; "
        f"a step is {config.global_batch} sequences of {shape.max_seq} tokens, {accumulated} micro-batches a rank"
    )
