"""What a contender does for the worker: a buffer, an operation bound to it, a barrier."""

from __future__ import annotations

from collections.abc import Callable

import torch

Run = Callable[[], object]


class Contender:
    """One library in one rank's process.

    A subclass adds a method for every operation it has, called like the operation: ``(input, output) -> Run``.
    Whatever can be done once (looking up datatypes, wrapping buffers) is done there; calling the ``Run`` is what is
    timed. In-place operations get the same tensor twice.
    """

    rank: int
    world_size: int

    def version(self) -> str:
        """Library, version and transport, for the header of the results."""
        raise NotImplementedError

    def unsupported(self, operation: str, dtype: torch.dtype, num_bytes: int) -> str | None:
        """Why this cell of the table cannot be measured; None when it can."""
        return None if hasattr(self, operation) else f"has no {operation} here"

    def empty(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised buffer [count] of the kind that this contender is measured on; may be collective."""
        return torch.empty(count, dtype=dtype)

    def sync(self) -> None:
        """The library's own barrier, untimed; orders the ranks' writes before it with their reads after it."""
        raise NotImplementedError

    def settle(self) -> None:
        """Called untimed after each operation; for a contender whose operation returns before its peers' is done."""

    def close(self) -> None:
        """Orderly end; collective where the library's is."""
