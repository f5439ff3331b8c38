"""Tiny models with random weights whose sizes are uneven for every number of ranks, and one step of each."""

import torch
from torch import Tensor, nn

from pycomm.models import GPT, GPTConfig

VOCAB = 53
KINDS = ("gpt", "llama", "llama-tied", "gpt2", "bloom", "bert")


def build(kind: str) -> nn.Module:
    """In fp64, so that the bounds of the comparisons can be small. 5 or 10 heads, 2 key/value heads."""
    torch.manual_seed(0)
    if kind == "gpt":
        return GPT(GPTConfig(VOCAB, 16, 2, num_heads=5, hidden=20, bias=True)).double()
    import transformers as hf

    if kind.startswith("llama"):
        config = hf.LlamaConfig(
            vocab_size=VOCAB, hidden_size=20, intermediate_size=26, num_hidden_layers=2, num_attention_heads=10,
            num_key_value_heads=2, head_dim=4, max_position_embeddings=16, tie_word_embeddings=kind == "llama-tied",
        )  # fmt: skip
        return hf.LlamaForCausalLM(config).double()
    if kind == "gpt2":
        config = hf.GPT2Config(
            vocab_size=VOCAB,
            n_positions=16,
            n_embd=20,
            n_layer=2,
            n_head=5,
            attn_pdrop=0.0,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
        )
        return hf.GPT2LMHeadModel(config).double()
    if kind == "bloom":
        return hf.BloomForCausalLM(hf.BloomConfig(vocab_size=VOCAB, hidden_size=20, n_layer=2, n_head=5)).double()
    config = hf.BertConfig(
        vocab_size=VOCAB, hidden_size=20, num_hidden_layers=2, num_attention_heads=5, intermediate_size=26,
        max_position_embeddings=16, attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0,
    )  # fmt: skip
    return hf.BertForMaskedLM(config).double()


def batch(step: int, rows: int = 2, seq: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(1, VOCAB, (rows, seq + 1), generator=generator)
    return ids[:, :-1], ids[:, 1:]


def loss_of(model: nn.Module, step: int, seq: int = 7) -> Tensor:
    ids, targets = batch(step, seq=seq)
    out = model(ids)
    logits = out if isinstance(out, Tensor) else out.logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
