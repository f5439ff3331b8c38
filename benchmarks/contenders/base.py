"""What a contender does for the worker: a buffer, an operation bound to it, a barrier."""

from __future__ import annotations

from collections.abc import Callable

import torch
from operations import is_sender, peer_of

Run = Callable[[], object]


def nothing() -> None:
    """The Run of a rank that has no part in the operation."""


class Contender:
    """One library in one rank's process.

    A subclass adds a method for every operation it has, called like the operation: ``(input, output) -> Run``.
    Whatever can be done once (looking up datatypes, wrapping buffers) is done there; calling the ``Run`` is what is
    timed. In-place operations get the same tensor twice. Every rank has both buffers, also where only the root's
    counts. ``ping_pong`` and ``send`` are made here of ``send_to`` and ``receive_from``.
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

    def send_to(self, tensor: torch.Tensor, peer: int) -> Run:
        """A blocking send: returns when ``tensor`` may be written again."""
        raise NotImplementedError

    def receive_from(self, tensor: torch.Tensor, peer: int) -> Run:
        """A blocking receive: returns when ``tensor`` holds the message."""
        raise NotImplementedError

    def send(self, input: torch.Tensor, output: torch.Tensor) -> Run:
        """One message, from the first rank of each pair to the second."""
        peer = peer_of(self.rank, self.world_size)
        if peer is None:
            return nothing
        return self.send_to(input, peer) if is_sender(self.rank) else self.receive_from(output, peer)

    def ping_pong(self, input: torch.Tensor, output: torch.Tensor) -> Run:
        """A message from the first rank of each pair to the second, and then one back."""
        peer = peer_of(self.rank, self.world_size)
        if peer is None:
            return nothing
        send, receive = self.send_to(input, peer), self.receive_from(output, peer)
        first, second = (send, receive) if is_sender(self.rank) else (receive, send)

        def there_and_back() -> None:
            first()
            second()

        return there_and_back

    def sync(self) -> None:
        """The library's own barrier, untimed; orders the ranks' writes before it with their reads after it."""
        raise NotImplementedError

    def settle(self) -> None:
        """Called untimed after each operation; for a contender whose operation returns before its peers' is done."""

    def close(self) -> None:
        """Orderly end; collective where the library's is."""
