"""Rewriting a model that is there: its linear layers, embeddings and attention cut over ranks, by name patterns.

Modules are replaced in place and keep the names of their parameters, so ``state_dict`` keys stay. Activations between
blocks are whole on every rank, or with ``sequence_parallel`` cut along the sequence: then the first block's input is
scattered, attention and MLP gather theirs, and the last block's output is gathered.

Refs: "Megatron-LM" (2019) for where to cut a transformer; "Reducing Activation Recomputation in Large Transformer
Models" (2022) for sequence parallel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from pycomm.annotations import check_types
from pycomm.communicator import Communicator
from pycomm.tensor_parallel.dropout import ParallelDropout
from pycomm.tensor_parallel.functional import all_gather, copy_to_ranks, gather_from_ranks, scatter_to_ranks
from pycomm.tensor_parallel.heads import FUSED, KEY_VALUE, QUERY, RepeatedHeadsLinear, fits_queries, head_width
from pycomm.tensor_parallel.layers import (
    ColumnParallelLinear,
    ParallelLayer,
    RowParallelLinear,
    VocabParallelEmbedding,
    is_linear,
    out_features_of,
    sum_gradients,
)
from pycomm.tensor_parallel.plans import Architecture, architecture_of, auto_plan, matches, styles_by_name
from pycomm.tensor_parallel.shards import Shard, shard_bounds

__all__ = ["parallelize", "shards_of"]

_SEQUENCE = -2
_COLUMN_LIKE = ("colwise", "colwise_gather_output", "vocab")


@check_types()
def parallelize(
    model: nn.Module,
    comm: Communicator,
    plan: Mapping[str, str] | str = "auto",
    *,
    sequence_parallel: bool = False,
    overlap: bool = True,
) -> nn.Module:
    """Cut ``model`` over the ranks of ``comm``, in place. Every rank calls it with the same model and plan.

    Ranks need the same weights beforehand (the same seed), or a model without any that is loaded afterwards
    (:func:`pycomm.tensor_parallel.meta_parameters`, :func:`pycomm.tensor_parallel.load_safetensors`). Attention is cut
    by whole heads; a rank without any computes with one of zeros. Tied weights stay tied: where a plan names one of
    them, the others follow. ``nn.Dropout`` becomes :class:`ParallelDropout`, so masks do not depend on the number of
    ranks, but dropout of attention weights must be 0 in training.

    Args:
        plan: pattern -> style, see ``plans.py``; "auto": the Hugging Face tp plan, else pycomm's own for the
            architectures it knows (GPT-2, BLOOM, BERT, Llama, pycomm's GPT).
        sequence_parallel: cut activations between blocks along the sequence; for architectures that pycomm knows.
        overlap: as of the layers; changes no bit.

    Returns:
        ``model``.

    Raises:
        ValueError: no plan is known; a pattern names no module (the error lists near names); a style does not fit its
            module, or two tied weights are to be cut differently. The model is unchanged then.
    """
    if isinstance(plan, str):
        if plan != "auto":
            raise ValueError(f'plan={plan!r}: it is "auto" or a mapping from patterns to styles')
        styles = styles_by_name(model, auto_plan(model), strict=False)
    else:
        styles = styles_by_name(model, plan, strict=True)
    known = architecture_of(model)
    if sequence_parallel and known is None:
        raise ValueError(f"sequence_parallel: pycomm does not know where the blocks of {type(model).__name__} are")
    ties = _tied(model)
    _let_ties_follow(model, styles, ties)
    _check(model, styles)
    attentions = {name: module for name, module in model.named_modules() if _is_cut(name, module, styles)}
    widths = {name: head_width(module) for name, module in attentions.items()}
    layers = {name: _cut(model, name, style, comm, widths, overlap) for name, style in styles.items()}
    for name, layer in layers.items():
        if layer is not None:
            _set(model, name, layer)
    _retie(model, ties, layers)
    for name, module in attentions.items():
        _adapt_attention(module, comm, widths[name] or 1)
    if known is not None and comm.world_size > 1:
        (_cut_sequence if sequence_parallel else _share_copies)(model, comm, known)
    _replace_dropout(model, comm, attentions, known if sequence_parallel else None)
    return model


def shards_of(model: nn.Module) -> dict[str, tuple[Shard, Communicator]]:
    """Parameter name -> how it is cut and over which ranks, of all that are; tied ones under each of their names."""
    by_id: dict[int, tuple[Shard, Communicator]] = {}
    for module in model.modules():
        if isinstance(module, ParallelLayer):
            for name, shard in module.shards.items():
                if shard.dim is not None:
                    by_id[id(getattr(module, name))] = (shard, module.comm)
    named = model.named_parameters(remove_duplicate=False)
    return {name: by_id[id(param)] for name, param in named if id(param) in by_id}


# What is cut


def _tied(model: nn.Module) -> list[list[tuple[str, str]]]:
    """Groups of (module name, parameter name) that are one parameter."""
    groups: dict[int, list[tuple[str, str]]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        owner, _, own_name = name.rpartition(".")
        groups.setdefault(id(param), []).append((owner, own_name))
    return [group for group in groups.values() if len(group) > 1]


def _let_ties_follow(model: nn.Module, styles: dict[str, str], ties: list[list[tuple[str, str]]]) -> None:
    for group in ties:
        owners = [owner for owner, name in group if name == "weight"]
        planned = {owner: styles[owner] for owner in owners if owner in styles}
        if not planned:
            continue
        if any(style not in _COLUMN_LIKE for style in planned.values()):
            raise ValueError(
                f"plan: {', '.join(planned)} share a weight with {', '.join(owners)}: cut them all by rows"
            )
        for owner in owners:
            embeds = isinstance(model.get_submodule(owner), nn.Embedding)
            styles.setdefault(owner, "vocab" if embeds else "colwise_gather_output")


def _check(model: nn.Module, styles: Mapping[str, str]) -> None:
    for name, style in styles.items():
        module = model.get_submodule(name)
        fits = isinstance(module, nn.Embedding) if style == "vocab" else is_linear(module) or style == "sum_gradients"
        if not fits:
            wanted = "an nn.Embedding" if style == "vocab" else "a linear module"
            raise ValueError(f"plan: {name!r} is {type(module).__name__}; {style!r} takes {wanted}")


def _is_cut(name: str, module: nn.Module, styles: Mapping[str, str]) -> bool:
    """Whether it is an attention whose queries are cut."""
    children = [child for child in (*QUERY, *FUSED) if f"{name}.{child}".lstrip(".") in styles]
    return bool(children) and head_width(module) is not None


def _cut(
    model: nn.Module, name: str, style: str, comm: Communicator, widths: Mapping[str, int | None], overlap: bool
) -> ParallelLayer | None:
    module = model.get_submodule(name)
    if style == "sum_gradients":
        sum_gradients(module, comm)
        return None
    if style == "vocab":
        assert isinstance(module, nn.Embedding)
        return VocabParallelEmbedding.from_embedding(module, comm)
    parent, _, child = name.rpartition(".")
    # BERT's output projection is a cousin of its queries: attention.output.dense and attention.self.query.
    cousin = f"{parent.rpartition('.')[0]}.self"
    width = widths.get(parent) or (widths.get(cousin) if style.startswith("rowwise") else None) or 1
    if style.startswith("rowwise"):
        whole = style == "rowwise_split_input"
        return RowParallelLinear.from_linear(
            module, comm, input_is_parallel=not whole, overlap=overlap, unit=1 if whole else width
        )
    if child in KEY_VALUE and parent in widths:
        attention = model.get_submodule(parent)
        query = next(getattr(attention, query) for query in QUERY if hasattr(attention, query))
        num_heads = out_features_of(query) // width
        if not fits_queries(num_heads, out_features_of(module) // width, comm.world_size):
            return RepeatedHeadsLinear(module, comm, num_heads, width, overlap)
    gather = style == "colwise_gather_output"
    segments = 3 if child == "c_attn" and parent in widths else 1
    unit = 3 * width if child == "query_key_value" else width
    layer = ColumnParallelLinear.from_linear(module, comm, gather, overlap=overlap, unit=unit, segments=segments)
    layer.pad_empty = parent in widths
    return layer


def _set(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _retie(model: nn.Module, ties: list[list[tuple[str, str]]], layers: Mapping[str, ParallelLayer | None]) -> None:
    for group in ties:
        cut = [getattr(layers[owner], name) for owner, name in group if layers.get(owner) is not None]
        for owner, name in group if cut else []:
            model.get_submodule(owner)._parameters[name] = cut[0]


# What goes with it


def _adapt_attention(attention: Any, comm: Communicator, width: int) -> None:
    """Tell an attention module how many heads it has now: what it reads in forward, by the names in use."""
    query = next(getattr(attention, name) for name in (*QUERY, *FUSED) if hasattr(attention, name))
    per_head = query.shards["weight"].unit * query.shards["weight"].segments
    num_heads = query.out_features // per_head
    first, last = shard_bounds(num_heads, comm.world_size, comm.rank)
    here = max(1, last - first)  # see ColumnParallelLinear.pad_empty
    for name in ("num_heads", "num_attention_heads"):
        if hasattr(attention, name):
            setattr(attention, name, here)
    for name in ("split_size", "all_head_size"):
        if hasattr(attention, name):
            setattr(attention, name, here * width)
    keys = [getattr(attention, name) for name in KEY_VALUE if hasattr(attention, name)]
    if keys and isinstance(keys[0], RepeatedHeadsLinear) and hasattr(attention, "num_key_value_groups"):
        attention.num_key_value_groups = 1
    if type(attention).__name__ == "BloomAttention":

        def own_alibi(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            """[batch * heads, 1, keys] -> this rank's heads."""
            alibi = kwargs["alibi"].unflatten(0, (-1, num_heads))
            kwargs["alibi"] = alibi[:, min(first, num_heads - 1) :][:, :here].flatten(0, 1)
            return args, kwargs

        attention.register_forward_pre_hook(own_alibi, with_kwargs=True)

    def refuse_dropout(module: nn.Module, args: Any) -> None:
        rate = _attention_dropout(module)
        if module.training and rate > 0:
            raise ValueError(
                f"dropout of attention weights (p={rate}) would differ between layouts: set it to 0 in the model's "
                f"configuration, or call eval()"
            )

    attention.register_forward_pre_hook(refuse_dropout)


def _attention_dropout(attention: nn.Module) -> float:
    for name in ("attention_dropout", "attn_dropout", "dropout"):
        found = getattr(attention, name, 0.0)
        rate = getattr(found, "p", found)
        if isinstance(rate, float) and rate > 0:
            return rate
    return 0.0


def _blocks(model: nn.Module, known: Architecture) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and matches(known.blocks, name):
            yield from ((f"{name}.{i}", block) for i, block in enumerate(module))


def _cut_sequence(model: nn.Module, comm: Communicator, known: Architecture) -> None:
    blocks = list(_blocks(model, known))
    if not blocks:
        raise ValueError(f"sequence_parallel: {type(model).__name__} has no blocks named {known.blocks!r}")

    def whole(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return gather_from_ranks(output, comm, _SEQUENCE)
        return (gather_from_ranks(output[0], comm, _SEQUENCE), *output[1:])

    _change_input(blocks[0][1], lambda x: scatter_to_ranks(x, comm, _SEQUENCE))
    blocks[-1][1].register_forward_hook(whole)
    for _, block in blocks:
        for name, module in block.named_modules():
            if name in known.gathered:
                _change_input(module, lambda x: all_gather(x, comm, _SEQUENCE))
            if isinstance(module, ColumnParallelLinear | RepeatedHeadsLinear):
                module.reduce_input = False  # the gathering in front of it does
            elif isinstance(module, RowParallelLinear):
                module.sequence_parallel = True
            elif next(module.parameters(recurse=False), None) is not None and not isinstance(module, ParallelLayer):
                _sum_own(module, comm)


def _share_copies(model: nn.Module, comm: Communicator, known: Architecture) -> None:
    """Sum the gradient of an input that several layers take (queries, keys, values; gate and up) once, not in each."""
    for _, block in _blocks(model, known):
        for name, module in block.named_modules():
            if name not in known.gathered:
                continue
            takers = [
                child for child in module.children() if isinstance(child, ColumnParallelLinear | RepeatedHeadsLinear)
            ]
            if len(takers) < 2 or any(is_linear(child) for child in module.modules()):
                continue  # a layer that is not cut has the whole gradient already
            _change_input(module, lambda x: copy_to_ranks(x, comm))
            for taker in takers:
                taker.reduce_input = False


def _change_input(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Of a module that takes hidden states as its first argument."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    module.register_forward_pre_hook(hook, with_kwargs=True)


def _sum_own(module: nn.Module, comm: Communicator) -> None:
    if next(module.children(), None) is None:
        sum_gradients(module, comm)


def _replace_dropout(
    model: nn.Module, comm: Communicator, attentions: Mapping[str, nn.Module], cut: Architecture | None
) -> None:
    """``cut``: what is known of a model whose sequence is cut inside its blocks."""
    inside = [name for name, _ in _blocks(model, cut)] if cut is not None else []
    for name, module in list(model.named_modules()):
        is_inside = any(name.startswith(f"{block}.") for block in inside)
        if is_inside and isinstance(getattr(module, "hidden_dropout", None), float) and module.hidden_dropout > 0:
            raise ValueError(
                f"{name} draws dropout itself (hidden_dropout), which sequence_parallel cannot cut: set it to 0"
            )
        if not isinstance(module, nn.Dropout) or module.p == 0:
            continue
        parent, _, child = name.rpartition(".")
        if parent in attentions and not child.startswith("resid"):
            continue  # of attention weights: refused in training
        _set(model, name, ParallelDropout(module.p, comm, _SEQUENCE if is_inside else None))
