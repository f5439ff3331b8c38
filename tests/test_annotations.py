"""Constructors say which argument is wrong and what it must be, whatever is given for it."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import pycomm
from pycomm import Communicator
from pycomm.pipeline import Pipeline, PipelineStage, build
from pycomm.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding, parallelize
from tests.pool import Pool

VALUES: dict[str, object] = {
    "None": None,
    "3": 3,
    "-1": -1,
    "2.5": 2.5,
    "nan": float("nan"),
    "text": "text",
    "list": [1, 2],
    "dict": {"a": 1},
    "object": object(),
    "True": True,
    "tensor": torch.ones(2),
    "function": print,
    "module": nn.Linear(4, 4),
    "generator": (i for i in range(2)),
    "class": Communicator,
}
NUMBERS = {"3", "-1", "2.5", "nan"}
# What each kind of argument may be; of the rest an error must say that it may not.
COMM: set[str] = set()
INT, FLOAT, FLAG, DTYPE = {"3", "-1"}, NUMBERS, {"True"}, {"None"}
OPTIONAL_INT = INT | {"None"}
MODULE, FUNCTION = {"module"}, {"function", "class"}


def kinds(comm: Communicator) -> Iterator[tuple[Callable[..., Any], dict[str, object], dict[str, set[str]]]]:
    """Function, arguments that it takes, and what else each of its arguments may be."""
    ddp = pycomm.DataParallel(nn.Linear(4, 4), comm)
    linear, embedding, schedule = nn.Linear(4, 8), nn.Embedding(8, 4), build("gpipe", 1, 1)
    stage = PipelineStage(nn.Linear(4, 4), 0, 1, comm)
    sizes = {"in_features": INT, "out_features": INT, "comm": COMM}
    device = {"None"}
    column = {"bias": FLAG, "gather_output": FLAG, "sequence_parallel": FLAG, "overlap": FLAG, "unit": INT}
    row = {"bias": FLAG, "input_is_parallel": FLAG, "sequence_parallel": FLAG, "overlap": FLAG, "unit": INT}
    yield pycomm.Mesh, {"comm": comm, "dp": 1}, {"comm": COMM, "dp": INT, "pp": INT, "tp": INT}
    options = ("overlap", "symmetric", "find_unused", "broadcast_buffers")
    yield (
        lambda **arguments: pycomm.DataParallel(**({"module": nn.Linear(4, 4)} | arguments)),
        {"comm": comm},
        {"module": MODULE, "comm": COMM, "bucket_mb": FLOAT, "grad_dtype": DTYPE, "wire_dtype": DTYPE}
        | dict.fromkeys(options, FLAG),
    )
    numbers = dict.fromkeys(("lr", "eps", "weight_decay"), FLOAT)
    yield (
        lambda **arguments: pycomm.ShardedAdamW(**({"ddp": pycomm.DataParallel(nn.Linear(4, 4), comm)} | arguments)),
        {},
        numbers | {"ddp": set(), "betas": {"list"}, "stage": INT, "param_groups": {"None"}},
    )
    yield (
        pycomm.clip_grad_norm_,
        {"parameters": ddp, "max_norm": 1.0},
        {"parameters": {"tensor"}, "max_norm": FLOAT, "mesh": {"None"}, "error_if_nonfinite": FLAG},
    )
    yield (
        PipelineStage,
        {"module": nn.Linear(4, 4), "stage_index": 0, "num_stages": 1, "comm": comm},
        {"module": MODULE, "stage_index": INT, "num_stages": INT, "comm": COMM, "shared": {"None"}},
    )
    yield (
        Pipeline,
        {"stages": stage, "schedule": schedule, "loss_fn": nn.functional.mse_loss},
        {"stages": set(), "schedule": set(), "loss_fn": FUNCTION | MODULE, "ordered": FLAG},
    )
    made = {"in_features": 4, "out_features": 8, "comm": comm}
    yield ColumnParallelLinear, made, sizes | column | {"segments": INT, "dtype": DTYPE, "device": device | {"text"}}
    yield RowParallelLinear, made, sizes | row | {"dtype": DTYPE, "device": device | {"text"}}
    del column["bias"], row["bias"]
    for layer, flags in ((ColumnParallelLinear, column), (RowParallelLinear, row)):
        yield layer.from_linear, {"module": linear, "comm": comm}, flags | {"module": MODULE, "comm": COMM}
    counts = {"num_embeddings": INT, "embedding_dim": INT, "padding_idx": OPTIONAL_INT}
    flags = {"comm": COMM, "sequence_parallel": FLAG}
    yield (
        VocabParallelEmbedding,
        {"num_embeddings": 8, "embedding_dim": 4, "comm": comm},
        counts | flags | {"dtype": DTYPE, "device": device | {"text"}},
    )
    yield VocabParallelEmbedding.from_embedding, {"module": embedding, "comm": comm}, flags | {"module": set()}
    yield (
        lambda **arguments: parallelize(**({"model": nn.Sequential(nn.Linear(4, 4))} | arguments)),
        {"comm": comm, "plan": {"0": "colwise"}},
        {"model": MODULE, "comm": COMM, "plan": {"text"}, "sequence_parallel": FLAG, "overlap": FLAG},
    )


def unclear_errors(comm: Communicator) -> tuple[list[str], int]:
    """Where a wrong value was taken, or its error does not name the argument; and how many values were tried."""
    found, count = [], 0
    for function, arguments, kinds_of_arguments in kinds(comm):
        for name, may_be in kinds_of_arguments.items():
            for label, value in VALUES.items():
                count += 1
                try:
                    function(**(arguments | {name: value}))
                    outcome = "" if label in may_be else "was taken"
                except Exception as error:  # noqa: BLE001  (AttributeError and others are what this is about)
                    says = isinstance(error, TypeError) and name in str(error) and "must be" in str(error)
                    # One of the right type may be wrong otherwise, for torch or for the model.
                    outcome = "" if says or label in may_be else f"{type(error).__name__}: {error}"
                if outcome:
                    found.append(f"{function.__qualname__}({name}={label}): {outcome[:120]}")
    return found, count


def test_wrong_arguments_are_named_with_what_they_must_be(pool: Pool) -> None:
    """Catches the AttributeError deep inside that a wrong type leads to."""
    ((found, count),) = pool.run(1, unclear_errors)
    assert not found, f"{len(found)} of {count}:\n" + "\n".join(found)
    assert count > 1200


def errors_of_what_people_write(comm: Communicator) -> dict[str, str]:
    module = nn.Sequential(nn.Linear(4, 4))
    ddp = pycomm.DataParallel(nn.Linear(4, 4), comm)
    groups = [{"params": list(ddp.parameters())}]
    attempts: dict[str, Callable[[], object]] = {
        "parameters": lambda: pycomm.ShardedAdamW(module.parameters(), lr=1e-3),  # type: ignore[arg-type]
        "unwrapped": lambda: pycomm.ShardedAdamW(module),  # type: ignore[arg-type]
        "groups": lambda: pycomm.ShardedAdamW(ddp, groups),  # type: ignore[arg-type]
        "no params": lambda: pycomm.ShardedAdamW(ddp, param_groups=[{"lr": 1.0}]),
        "lr of a group": lambda: pycomm.ShardedAdamW(ddp, param_groups=[groups[0] | {"lr": "fast"}]),
        "clipped module": lambda: pycomm.clip_grad_norm_(module, 1.0),  # type: ignore[arg-type]
    }
    messages = {}
    for name, attempt in attempts.items():
        with pytest.raises((TypeError, ValueError)) as caught:
            attempt()
        messages[name] = str(caught.value)
    return messages


def test_errors_say_what_to_write(pool: Pool) -> None:
    """Catches that what torch's optimizers and DDP take gives an error that helps nobody, or a norm of nothing."""
    messages = pool.run(1, errors_of_what_people_write)[0]
    assert "ShardedAdamW(ddp, lr=...)" in messages["parameters"]
    assert "pycomm.DataParallel(module, comm)" in messages["unwrapped"]
    assert "param_groups=[...]" in messages["groups"]
    assert '"params"' in messages["no params"]
    assert "lr of a group is 'fast' (str); it must be a number" in messages["lr of a group"]
    assert "DataParallel" in messages["clipped module"]


def padding_row(comm: Communicator) -> tuple[int | None, list[float]]:
    layer = VocabParallelEmbedding(8, 4, comm, padding_idx=-1)
    layer(torch.tensor([7, 1])).sum().backward()
    assert layer.weight.grad is not None
    return layer.padding_idx, layer.weight.grad.sum(1).tolist()


def test_a_negative_padding_index_counts_from_the_end(pool: Pool) -> None:
    assert pool.run(1, padding_row) == [(7, [0.0, 4.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])]
