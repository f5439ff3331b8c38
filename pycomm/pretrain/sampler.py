"""Which tokens a rank sees at a step: a function of (seed, step, position in the global batch) and of nothing else.

So one process and several see the same data when their global batches are equal, and a resumed run goes on exactly
where the other stopped, with no state to save. An epoch visits each block of ``seq`` tokens once, in an order that is a
keyed permutation computed index by index: no list of a billion shuffled numbers, and no dependence on a library's
random stream, which may change between versions.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from pycomm.pretrain.data import TokenArray

ROUNDS = 6  # of the Feistel network; four make it look random, two more cost nothing here


def permute(index: int, size: int, key: bytes) -> int:
    """Image of ``index`` under a permutation of range(size) that ``key`` chooses.

    A Feistel network is a permutation of the numbers of an even number of bits, whatever its round function; walking on
    until the image falls below ``size`` restricts it to range(size), in fewer than four steps on average.

    Raises:
        ValueError: ``index`` is outside of range(size).

    Ref: "Ciphers with Arbitrary Finite Domains" (2002), cycle walking.
    """
    if not 0 <= index < size:
        raise ValueError(f"index {index} is outside of range({size})")
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half_bits) - 1
    while True:
        left, right = index >> half_bits, index & mask
        for round_number in range(ROUNDS):
            message = bytes([round_number]) + right.to_bytes(8, "little")
            digest = hashlib.blake2b(message, key=key, digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "little") & mask)
        index = left << half_bits | right
        if index < size:
            return index


class Sampler:
    """Batches of training text.

    Args:
        tokens: [N] ids to learn from.
        seq: tokens of a sequence; N must be larger.
        global_batch: sequences of a step over all ranks.
        seed: chooses the order.
    """

    def __init__(self, tokens: TokenArray, seq: int, global_batch: int, seed: int) -> None:
        # One more block would fit into most texts, but not behind every epoch's offset.
        self.num_blocks = max(1, (len(tokens) - 1) // seq - 1)
        self._slack = len(tokens) - 1 - self.num_blocks * seq
        if self._slack < 0:
            raise ValueError(f"{len(tokens)} tokens are too few for one sequence of {seq} and its targets")
        self._tokens = tokens
        self._seq = seq
        self._global_batch = global_batch
        self._seed = seed

    def start(self, step: int, position: int) -> int:
        """Index of the first token of sequence ``position`` (from 0) of step ``step`` (from 1)."""
        epoch, index = divmod((step - 1) * self._global_batch + position, self.num_blocks)
        key = hashlib.blake2b(f"{self._seed}/{epoch}".encode(), digest_size=32).digest()
        # Epochs cut the text at different places, so that no token is the first of its sequence every time.
        offset = int.from_bytes(key[:8], "little") % (min(self._slack, self._seq - 1) + 1)
        return permute(index, self.num_blocks, key) * self._seq + offset

    def batch(self, step: int, positions: range) -> tuple[Tensor, Tensor]:
        """Sequences ``positions`` of step ``step``.

        Returns:
            tokens and targets, both [len(positions), seq] int64; a target is the token after.
        """
        starts = [self.start(step, position) for position in positions]
        return gather(self._tokens, starts, self._seq)


def gather(tokens: TokenArray, starts: list[int], seq: int) -> tuple[Tensor, Tensor]:
    """Copy the sequences that begin at ``starts``: tokens and targets, both [len(starts), seq] int64."""
    rows = np.stack([tokens[start : start + seq + 1] for start in starts]).astype(np.int64)
    both = torch.from_numpy(rows)
    return both[:, :-1].contiguous(), both[:, 1:].contiguous()
