"""Are all ranks about to train the same model? And if so, make its values the same.

Done once, when a model is wrapped. Ranks whose models differ would average unrelated gradients without any error.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import nn

from pycomm.communicator import Communicator
from pycomm.data_parallel.layout import dense_strides
from pycomm.errors import MismatchError

_TEXT_BYTES = 512


def check_same(what: str, entries: Sequence[str], comm: Communicator) -> None:
    """Compare lines that describe what the ranks are about to do. Collective.

    Two all-reduces of a few bytes per line; only where ranks differ, the first difference is fetched as text.

    Args:
        what: they do if lines differ, for the message.
        entries: the first is about options, each other one about a tensor.

    Raises:
        MismatchError: on every rank; ``calls`` maps each rank to what it has at the first place that differs.
    """
    count = torch.tensor([len(entries)], dtype=torch.int64, device=comm.device)
    comm.all_reduce(count, op="max")
    # Digests are positive; 0 marks what a rank with fewer entries lacks. max of (d, -d) is max and -min in one call.
    digests = [_digest(entry) for entry in entries] + [0] * (int(count) - len(entries))
    table = torch.tensor([digests, [-digest for digest in digests]], dtype=torch.int64, device=comm.device)
    comm.all_reduce(table, op="max")
    differing = torch.nonzero(table[0] != -table[1]).flatten().tolist()
    if not differing:
        return
    first = differing[0]
    own = entries[first] if first < len(entries) else f"nothing (it has {len(entries) - 1} parameters and buffers)"
    texts = _gather_texts(own, comm)
    listing = "; ".join(f"rank {rank} has {text}" for rank, text in enumerate(texts))
    raise MismatchError(f"the ranks {what}; first difference: {listing}", calls=dict(enumerate(texts)))


def broadcast_state(module: nn.Module, comm: Communicator, *, root: int = 0, only_buffers: bool = False) -> None:
    """Give every rank the parameters and buffers of rank ``root``, bit for bit. Collective."""
    for tensor in (*(() if only_buffers else module.parameters()), *module.buffers()):
        if tensor.numel() == 0:
            continue
        data = tensor.detach()
        is_contiguous = data.is_contiguous()
        message = data if is_contiguous else data.contiguous()
        # As bytes: buffers may have dtypes that no reduction knows, such as bool.
        comm.broadcast(message.reshape(-1).view(torch.uint8), root=root)
        if not is_contiguous:
            data.copy_(message)


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


def _digest(text: str) -> int:
    """1 .. 2**62: the same in every process, unlike hash()."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") % 2**62 + 1


def _gather_texts(own: str, comm: Communicator) -> Sequence[str]:
    """Every rank's text, cut to _TEXT_BYTES. Collective."""
    texts = []
    for root in range(comm.world_size):
        padded = list(own.encode()[:_TEXT_BYTES].ljust(_TEXT_BYTES, b"\0")) if root == comm.rank else [0] * _TEXT_BYTES
        message = torch.tensor(padded, dtype=torch.uint8, device=comm.device)
        comm.broadcast(message, root=root)
        texts.append(bytes(message.tolist()).rstrip(b"\0").decode(errors="replace"))
    return texts
