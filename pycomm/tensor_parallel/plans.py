"""Which modules of a model are cut and how: Hugging Face's plans, pycomm's own, and how patterns meet names.

A plan maps patterns to styles. In a pattern ``*`` stands for one part of a dotted name; a pattern names a module if it
equals its name or the end of it after a dot.

===========================  =======================================================================================
style                        module
===========================  =======================================================================================
``colwise``                  linear, outputs cut
``colwise_gather_output``    the same, every rank gets all outputs (``colwise_rep`` means this too)
``rowwise``                  linear, inputs cut, outputs summed
``rowwise_split_input``      the same, of an input that is whole (``rowwise_rep``)
``vocab``                    embedding, rows cut (``embedding_rowwise``)
``sum_gradients``            whole on every rank, but applied to a part (``replicated_with_grad_allreduce``)
===========================  =======================================================================================
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

__all__ = ["Architecture", "architecture_of", "auto_plan", "matches", "styles_by_name"]

_ALIASES = {
    "colwise_rep": "colwise_gather_output",
    "rowwise_rep": "rowwise_split_input",
    "embedding_rowwise": "vocab",
    "replicated_with_grad_allreduce": "sum_gradients",
}
STYLES = ("colwise", "colwise_gather_output", "rowwise", "rowwise_split_input", "vocab", "sum_gradients")


@dataclass(frozen=True)
class Architecture:
    """What pycomm knows of a kind of model.

    Attributes:
        plan: patterns and styles.
        blocks: end of the name of the list of transformer blocks, between which activations are [batch, sequence,
            hidden]; for sequence parallel.
        gathered: modules of a block that need the whole sequence as their first argument.
    """

    plan: Mapping[str, str] = field(default_factory=dict)
    blocks: str = "layers"
    gathered: tuple[str, ...] = ("self_attn", "mlp")


_ARCHITECTURES = {
    "gpt2": Architecture(
        {
            "wte": "vocab",
            "h.*.attn.c_attn": "colwise",
            "h.*.attn.c_proj": "rowwise",
            "h.*.mlp.c_fc": "colwise",
            "h.*.mlp.c_proj": "rowwise",
            "lm_head": "colwise_gather_output",
        },
        blocks="h",
        gathered=("attn", "mlp"),
    ),
    "bloom": Architecture(
        {
            "word_embeddings": "vocab",
            "h.*.self_attention.query_key_value": "colwise",
            "h.*.self_attention.dense": "rowwise",
            "h.*.mlp.dense_h_to_4h": "colwise",
            "h.*.mlp.dense_4h_to_h": "rowwise",
            "lm_head": "colwise_gather_output",
        },
        blocks="h",
        gathered=("self_attention", "mlp"),
    ),
    "bert": Architecture(
        {
            "embeddings.word_embeddings": "vocab",
            "encoder.layer.*.attention.self.query": "colwise",
            "encoder.layer.*.attention.self.key": "colwise",
            "encoder.layer.*.attention.self.value": "colwise",
            "encoder.layer.*.attention.output.dense": "rowwise",
            "encoder.layer.*.intermediate.dense": "colwise",
            "encoder.layer.*.output.dense": "rowwise",
            "predictions.decoder": "colwise_gather_output",
        },
        blocks="encoder.layer",
        gathered=("attention.self", "intermediate"),
    ),
    "llama": Architecture(
        {
            "embed_tokens": "vocab",
            "layers.*.self_attn.q_proj": "colwise",
            "layers.*.self_attn.k_proj": "colwise",
            "layers.*.self_attn.v_proj": "colwise",
            "layers.*.self_attn.o_proj": "rowwise",
            "layers.*.mlp.gate_proj": "colwise",
            "layers.*.mlp.up_proj": "colwise",
            "layers.*.mlp.down_proj": "rowwise",
            "lm_head": "colwise_gather_output",
        },
    ),
    "GPT": Architecture(  # pycomm.models.GPT
        {
            "token_embedding": "vocab",
            "blocks.*.attention.query": "colwise",
            "blocks.*.attention.key": "colwise",
            "blocks.*.attention.value": "colwise",
            "blocks.*.attention.output": "rowwise",
            "blocks.*.mlp.up": "colwise",
            "blocks.*.mlp.down": "rowwise",
            "unembedding": "colwise_gather_output",
        },
        blocks="blocks",
        gathered=("attention", "mlp"),
    ),
}
_LIKE_LLAMA = ("mistral", "qwen2", "qwen3")


def architecture_of(model: nn.Module) -> Architecture | None:
    """By the configuration's ``model_type``, else by the class's name."""
    kind = getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__
    return _ARCHITECTURES.get("llama" if kind in _LIKE_LLAMA else kind)


def auto_plan(model: nn.Module) -> dict[str, str]:
    """The plan of ``parallelize(plan="auto")``, to look at or to change: Hugging Face's, else pycomm's own.

    Raises:
        ValueError: there is neither.
    """
    config: Any = getattr(model, "config", None)
    plan = dict(getattr(config, "base_model_tp_plan", None) or {})
    if plan:
        plan |= getattr(type(model), "_tp_plan", None) or {}
    own = architecture_of(model)
    if not plan and own is None:
        raise ValueError(
            f"{type(model).__name__} has no tensor-parallel plan, neither its own nor pycomm's: "
            f"pass plan={{pattern: style}} with styles {', '.join(STYLES)}"
        )
    return plan or dict(own.plan if own is not None else {})


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern names a module."""
    expression = re.escape(pattern).replace(r"\*", r"[^.]+")
    return re.fullmatch(rf"(?:.*\.)?{expression}", name) is not None


def styles_by_name(model: nn.Module, plan: Mapping[str, str], *, strict: bool) -> dict[str, str]:
    """Module name -> style.

    Args:
        strict: every pattern must name a module.

    Raises:
        ValueError: an unknown style, a pattern that names nothing (with near names), or two styles for one module.
    """
    names = [name for name, _ in model.named_modules() if name]
    found: dict[str, str] = {}
    for pattern, given in plan.items():
        style = _ALIASES.get(given, given)
        if style not in STYLES:
            raise ValueError(f"plan: {pattern!r} has the style {given!r}; it is one of {', '.join(STYLES)}")
        hits = [name for name in names if matches(pattern, name)]
        if not hits and strict:
            general = list(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names))
            ends = {name.rpartition(".")[2]: name for name in general}
            near = difflib.get_close_matches(pattern, general, 3, 0.5)
            near += [ends[end] for end in difflib.get_close_matches(pattern.rpartition(".")[2], ends, 3)]
            hint = f"did you mean {', '.join(map(repr, dict.fromkeys(near)))}?" if near else "no name is near"
            raise ValueError(f"plan: {pattern!r} names no module of {type(model).__name__}; {hint}")
        for name in hits:
            if found.setdefault(name, style) != style:
                raise ValueError(f"plan: {name!r} is to be both {found[name]!r} and {style!r}")
    return found
