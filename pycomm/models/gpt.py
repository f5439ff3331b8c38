"""A small decoder-only transformer: pre-norm blocks, causal attention, GELU MLP.

It is written to be read, and to be cut: query, key and value are separate matrices so that tensor parallelism can give
whole heads to a rank, and every parameter's initial value depends on the seed and on its name alone, so that a rank
that builds only some of the layers gets the same numbers as one that builds them all.

Refs: "Language Models are Unsupervised Multitask Learners" (GPT-2, 2019) for the block and its initialisation;
"RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021) for rotary positions.

Shape suffixes: B batch, T positions in the sequence, D width (hidden size), H heads, K width of one head, V vocabulary.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT. Two models with equal configs have the same parameters.

    Attributes:
        vocab_size: number of token ids, V.
        max_seq: the longest sequence, in tokens.
        num_layers: transformer blocks.
        num_heads: attention heads; divides ``hidden``.
        hidden: width of the residual stream, D.
        mlp_ratio: width of the MLP's inner layer over ``hidden``.
        positions: "rope" (rotary, no parameters) or "learned" (an embedding per position).
        tie_embeddings: use the token embedding as output projection too.
        bias: give linear layers and norms a bias.
    """

    vocab_size: int = 1024
    max_seq: int = 128
    num_layers: int = 2
    num_heads: int = 4
    hidden: int = 128
    mlp_ratio: int = 4
    positions: Literal["rope", "learned"] = "rope"
    tie_embeddings: bool = True
    bias: bool = False

    def __post_init__(self) -> None:
        for name in ("vocab_size", "max_seq", "num_layers", "num_heads", "hidden", "mlp_ratio"):
            if getattr(self, name) < 1:
                raise ValueError(f"GPTConfig.{name} must be at least 1, got {getattr(self, name)}")
        if self.hidden % self.num_heads:
            raise ValueError(f"hidden ({self.hidden}) must be a multiple of num_heads ({self.num_heads})")
        if self.positions == "rope" and (self.hidden // self.num_heads) % 2:
            raise ValueError(f"rotary positions need an even head width, got {self.hidden // self.num_heads}")


class Attention(nn.Module):
    """Causal self-attention over H heads of width K = D / H."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.query = nn.Linear(config.hidden, config.hidden, bias=config.bias)
        self.key = nn.Linear(config.hidden, config.hidden, bias=config.bias)
        self.value = nn.Linear(config.hidden, config.hidden, bias=config.bias)
        self.output = nn.Linear(config.hidden, config.hidden, bias=config.bias)

    def _heads(self, x_BTD: Tensor) -> Tensor:
        x_BHTK: Tensor = x_BTD.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        return x_BHTK

    def forward(self, x_BTD: Tensor, rotation_TK: Tensor | None) -> Tensor:
        q_BHTK = self._heads(self.query(x_BTD))
        k_BHTK = self._heads(self.key(x_BTD))
        v_BHTK = self._heads(self.value(x_BTD))
        if rotation_TK is not None:
            q_BHTK = rotate(q_BHTK, rotation_TK)
            k_BHTK = rotate(k_BHTK, rotation_TK)
        mixed_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, is_causal=True)
        out: Tensor = self.output(mixed_BHTK.transpose(1, 2).flatten(2))
        return out


class MLP(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.hidden, config.mlp_ratio * config.hidden, bias=config.bias)
        self.down = nn.Linear(config.mlp_ratio * config.hidden, config.hidden, bias=config.bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        out: Tensor = self.down(F.gelu(self.up(x_BTD)))
        return out


class Block(nn.Module):
    """One pre-norm transformer layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden, bias=config.bias)
        self.attention = Attention(config)
        self.mlp_norm = nn.LayerNorm(config.hidden, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x_BTD: Tensor, rotation_TK: Tensor | None) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), rotation_TK)
        out: Tensor = x_BTD + self.mlp(self.mlp_norm(x_BTD))
        return out


class GPT(nn.Module):
    """The whole model: token ids in, logits out.

    Args:
        config: the shape.
        seed: the initial weights depend on ``seed`` and the parameters' names, on nothing else; torch's global
            generator is neither read nor advanced for them.
    """

    def __init__(self, config: GPTConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        # Everything is created without storage and filled below, so that no time goes into weights drawn twice.
        with torch.device("meta"):
            self.token_embedding = nn.Embedding(config.vocab_size, config.hidden)
            self.position_embedding = (
                nn.Embedding(config.max_seq, config.hidden) if config.positions == "learned" else None
            )
            self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
            self.final_norm = nn.LayerNorm(config.hidden, bias=config.bias)
            self.unembedding = nn.Linear(config.hidden, config.vocab_size, bias=False)
        self.to_empty(device="cpu")
        if config.tie_embeddings:
            self.unembedding.weight = self.token_embedding.weight
        self.rotation_TK: Tensor | None
        rotation = rotary_table(config.max_seq, config.hidden // config.num_heads)
        self.register_buffer("rotation_TK", rotation if config.positions == "rope" else None, persistent=False)
        self._initialise(seed)

    @torch.no_grad()
    def _initialise(self, seed: int) -> None:
        # GPT-2: normal(0, 0.02), and the projections that write into the residual stream smaller by sqrt(2 * layers),
        # so that its variance does not grow with depth.
        residual_std = 0.02 / (2 * self.config.num_layers) ** 0.5
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                std = residual_std if name.endswith(("attention.output.weight", "mlp.down.weight")) else 0.02
                parameter.normal_(0.0, std, generator=_generator(seed, name))

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Score every next token.

        Args:
            tokens_BT: [B, T] int64, T at most ``config.max_seq``.

        Returns:
            logits [B, T, V] in the parameters' dtype; position t scores token t + 1.

        Raises:
            ValueError: the sequence is longer than ``config.max_seq``.
        """
        return run_layers(self, tokens_BT, self.config.max_seq)

    def num_parameters(self) -> int:
        """Number of trained values; a tied embedding counts once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, seq: int) -> int:
        """Floating-point operations that one token of a training step needs, forward and backward.

        6 for each weight of a matrix (2 forward, 4 backward), and 12 * layers * seq * hidden for the products of
        queries with keys and of weights with values. Embedding look-ups, norms and activations are left out; the
        causal half that attention may skip is counted, as is the custom.

        Args:
            seq: sequence length in tokens.

        Ref: "Efficient Large-Scale Language Model Training on GPU Clusters" (2021), eq. 3 without recomputation;
        "PaLM" (2022), appendix B.
        """
        c = self.config
        block_weights = (4 + 2 * c.mlp_ratio) * c.hidden * c.hidden
        weights = c.num_layers * block_weights + c.vocab_size * c.hidden
        return 6 * weights + 12 * c.num_layers * seq * c.hidden

    @torch.no_grad()
    def generate(
        self,
        prompt_ids: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue a prompt, one sampled token at a time.

        Args:
            prompt_ids: [T] int64, at least one token; only its last ``config.max_seq`` are looked at.
            max_new_tokens: how many tokens to add.
            temperature: divides the logits; 0 takes the likeliest token.
            generator: source of randomness, on the model's device.

        Returns:
            [T + max_new_tokens] int64, the prompt first.

        Raises:
            ValueError: an empty or batched prompt, or a negative temperature.
        """
        if prompt_ids.ndim != 1 or not len(prompt_ids):
            raise ValueError(f"prompt_ids must be one-dimensional and not empty, got shape {tuple(prompt_ids.shape)}")
        if temperature < 0:
            raise ValueError(f"temperature must not be negative, got {temperature}")
        ids = prompt_ids
        for _ in range(max_new_tokens):
            logits_V = self(ids[None, -self.config.max_seq :])[0, -1]
            if temperature == 0:
                chosen = logits_V.argmax(keepdim=True)
            else:
                chosen = torch.multinomial(F.softmax(logits_V / temperature, -1), 1, generator=generator)
            ids = torch.cat([ids, chosen])
        return ids


def run_layers(layers: Any, x: Tensor, max_seq: int, *, embeds: bool = True, scores: bool = True) -> Tensor:
    """Run a GPT, or a part of one that has some of its layers under their names there.

    Args:
        x: tokens [B, T] for a part that ``embeds``, else x [B, T, D].

    Returns:
        logits [B, T, V] from a part that ``scores``, else x [B, T, D].
    """
    seq = x.shape[1]  # less than that of the tokens where parallelize() cuts it between blocks
    if seq > max_seq:
        raise ValueError(f"sequence of {seq} tokens is longer than the model's max_seq {max_seq}")
    if embeds:
        x = layers.token_embedding(x)
        if layers.position_embedding is not None:
            x = x + layers.position_embedding.weight[:seq]
    for block in layers.blocks.children():
        x = block(x, layers.rotation_TK)
    return layers.unembedding(layers.final_norm(x)) if scores else x


def next_token_loss(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Cross-entropy in nats, the mean over all tokens; a scalar of the logits' dtype.

    Args:
        logits_BTV: [B, T, V] as ``GPT.forward`` returns them.
        targets_BT: [B, T] int64, the token that follows each position.
    """
    return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())


def rotary_table(max_seq: int, head_width: int) -> Tensor:
    """[max_seq, head_width] fp32: cosines in the first half of dim 1, sines in the second (base 10,000)."""
    # In fp64, since the angles reach max_seq radians and fp32 would lose their last digits.
    frequencies = 10_000.0 ** (-torch.arange(0, head_width, 2, dtype=torch.float64) / head_width)
    angles = torch.arange(max_seq, dtype=torch.float64)[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1).float()


def rotate(x_BHTK: Tensor, rotation_TK: Tensor) -> Tensor:
    """Turn each pair (k, k + K/2) of a head by its position's angle; same shape and dtype as ``x_BHTK``.

    ``rotation_TK`` may be for more positions.
    """
    cos, sin = rotation_TK[: x_BHTK.shape[-2]].to(x_BHTK.dtype).chunk(2, dim=-1)
    first, second = x_BHTK.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    # manual_seed takes 64 bits, but as a signed number when negative; 63 bits avoid the question.
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
