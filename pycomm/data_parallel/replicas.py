"""Are all ranks about to train the same model? And if so, make its values the same.

Done once, when a model is wrapped. Ranks whose models differ would average unrelated gradients without any error.
"""

from collections.abc import Sequence
from itertools import chain

import torch
from torch import nn

from pycomm.backends.agreement import MOST_NUMBERS, digest
from pycomm.communicator import Communicator
from pycomm.data_parallel.layout import dense_strides
from pycomm.errors import MismatchError

_TEXT_BYTES = 512


def check_same(what: str, entries: Sequence[str], comm: Communicator) -> None:
    """Compare lines that describe what the ranks are about to do. Collective.

    Args:
        what: they do if lines differ, for the message.
        entries: the first is about options, each other one about a tensor.

    Raises:
        MismatchError: on every rank; ``calls`` maps each rank to what it has at the first place that differs.
    """
    rows = comm.agree([len(entries), digest(repr(entries))])
    if all(row == rows[0] for row in rows):
        return
    num_most = max(count for count, _ in rows)
    digests = [digest(entry) for entry in entries] + [0] * (num_most - len(entries))  # 0: a rank lacks this one
    tables = (comm.agree(digests[begin : begin + MOST_NUMBERS]) for begin in range(0, num_most, MOST_NUMBERS))
    columns = chain.from_iterable(zip(*table, strict=True) for table in tables)
    first = next(number for number, column in enumerate(columns) if len(set(column)) > 1)
    own = entries[first] if first < len(entries) else f"nothing (it has {len(entries) - 1} parameters and buffers)"
    texts = comm.agree(list(own.encode()[:_TEXT_BYTES].ljust(_TEXT_BYTES, b"\0")))
    calls = {rank: bytes(text).rstrip(b"\0").decode(errors="replace") for rank, text in enumerate(texts)}
    listing = "; ".join(f"rank {rank} has {text}" for rank, text in calls.items())
    raise MismatchError(f"the ranks {what}; first difference: {listing}", calls=calls)


def broadcast_state(module: nn.Module, comm: Communicator, *, root: int = 0, only_buffers: bool = False) -> None:
    """Give every rank the parameters and buffers of rank ``root``, bit for bit. Collective."""
    for tensor in (*(() if only_buffers else module.parameters()), *module.buffers()):
        if tensor.numel() == 0:
            continue
        data = tensor.detach()
        message = data.contiguous()
        # As bytes: buffers may have dtypes that no reduction knows, such as bool.
        comm.broadcast(message.reshape(-1).view(torch.uint8), root=root)
        data.copy_(message)  # nothing to do if it was contiguous


def model_entries(module: nn.Module) -> list[str]:
    """One line per parameter and buffer, in their order: names, shapes, dtypes, layouts."""
    lines = []
    for name, param in module.named_parameters():
        # Buckets hold elements in memory order, so layouts must agree too. Strides of dimensions of size 1 say nothing.
        strides = [stride for stride, size in zip(dense_strides(param), param.shape, strict=True) if size > 1]
        trained = "" if param.requires_grad else ", frozen"
        lines.append(f"parameter {name!r} {param.dtype} {list(param.shape)} (strides {strides}{trained})")
    for name, buffer in module.named_buffers():
        lines.append(f"buffer {name!r} {buffer.dtype} {list(buffer.shape)}")
    return lines
