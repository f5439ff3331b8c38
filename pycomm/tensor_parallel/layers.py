"""Linear layers and embeddings cut over ranks.

The usual pair: ``ColumnParallelLinear`` cuts the outputs and takes an input that all ranks have,
``RowParallelLinear`` cuts the inputs and sums its outputs over ranks; whatever acts on single features may stand
between them. With ``sequence_parallel`` activations outside the pair are cut along the sequence, dim −2, instead of
being the same everywhere: the first layer gathers, the second one scatters, and norms and dropout in between see only
their part (make their parameters' gradients whole with :func:`sum_gradients`).

Weights are drawn as the unsharded module draws them, and then cut: the same ``torch.manual_seed`` gives the same full
weights for any number of ranks, which must be seeded alike. A layer holds the full weight for a moment when it is made.

Refs: "Megatron-LM" (2019); "Reducing Activation Recomputation in Large Transformer Models" (2022).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pycomm.annotations import check_at_least, check_types
from pycomm.checkpoints import Part
from pycomm.communicator import Communicator
from pycomm.tensor_parallel import products
from pycomm.tensor_parallel.functional import (
    copy_to_ranks,
    gather_from_ranks,
    reduce_from_ranks,
    reduce_scatter,
    scatter_to_ranks,
)
from pycomm.tensor_parallel.shards import Shard, shard_bounds
from pycomm.tensor_parallel.vocabulary import vocab_lookup

__all__ = ["ColumnParallelLinear", "ParallelLayer", "RowParallelLinear", "VocabParallelEmbedding", "sum_gradients"]


class ParallelLayer(nn.Module):
    """A module some of whose parameters are parts of larger ones.

    Attributes:
        comm: the ranks that have the other parts.
        shards: how each parameter of this module (not of its children) is cut, by its name. Those that are have
            the attribute ``is_part``.
    """

    comm: Communicator
    shards: dict[str, Shard]
    weight: nn.Parameter
    bias: nn.Parameter | None
    transposed: bool = False

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        super().register_parameter(name, param)
        self._mark_parts()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> ParallelLayer:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._mark_parts()  # some, such as to_empty(), make new parameters
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._mark_parts()  # copies of parameters lose their attributes

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if keep_vars or self.comm.world_size == 1:
            return
        of = f"what tensor-parallel rank {self.comm.rank} of {self.comm.world_size} has of a larger one"
        for name, shard in self.shards.items():
            if shard.dim is not None:
                destination[prefix + name] = Part.made_of(destination[prefix + name], of)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in self.shards:
            value = state_dict.get(prefix + name)
            if isinstance(value, Part):  # of which no parameter can be made, as assign=True does
                state_dict[prefix + name] = value.as_subclass(Tensor)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _mark_parts(self) -> None:
        """Say so to :func:`pycomm.clip_grad_norm_`, for which other parameters are the same on all ranks."""
        for name, shard in self.shards.items():
            param = self._parameters.get(name)
            if param is not None and shard.dim is not None:
                param.is_part = True  # type: ignore[attr-defined]

    def shard_sizes(self, name: str) -> list[int]:
        """How much of its cut dimension each rank has of parameter ``name``."""
        return [self.shards[name].size(self.comm.world_size, rank) for rank in range(self.comm.world_size)]

    def _take(self, name: str, full: Tensor) -> nn.Parameter:
        part = self.shards[name].take(full.detach(), self.comm.world_size, self.comm.rank)
        return nn.Parameter(part, requires_grad=full.requires_grad)

    def _cuts(self, in_features: int, out_features: int) -> dict[str, Shard]:
        """Of a linear layer: how weight, [out, in], and bias are cut."""
        raise NotImplementedError

    def _adopt(self, module: nn.Module, comm: Communicator) -> None:
        """Take this rank's part of a linear module's parameters."""
        self.in_features, self.out_features = _shape_of(module)
        shards = self._cuts(self.in_features, self.out_features)
        self.comm, self.shards = comm, shards
        self.transposed = not isinstance(module, nn.Linear)
        weight: Any = module.weight
        bias: Any = module.bias
        if self.transposed and shards["weight"].dim is not None:
            shards["weight"] = replace(shards["weight"], dim=1 - shards["weight"].dim)
        self.weight = self._take("weight", weight)
        if bias is None:
            del shards["bias"]
        self.register_parameter("bias", None if bias is None else self._take("bias", bias))

    @property
    def matrix(self) -> Tensor:
        """This rank's weight as [out, in], also of a module that stores it the other way round."""
        return self.weight.t() if self.transposed else self.weight


def is_linear(module: nn.Module) -> bool:
    """``nn.Linear``, or the Conv1D of transformers, which is one with its weight stored as [in, out]."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def out_features_of(module: nn.Module) -> int:
    """Of a linear module."""
    return _shape_of(module)[1]


def _shape_of(module: nn.Module) -> tuple[int, int]:
    """(in, out) features of a linear module."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    rows, columns = weight.shape
    return (columns, rows) if isinstance(module, nn.Linear) else (rows, columns)


class ColumnParallelLinear(ParallelLayer):
    """``y = x A^T + b`` with A cut by rows: each rank computes some of the outputs.

    Args:
        in_features, out_features: of the whole layer.
        comm: the ranks that share it.
        gather_output: give every rank all outputs.
        sequence_parallel: the input is cut along dim −2 and gathered in the product.
        overlap: hide communication behind the products where ranks do not share a host's memory (there nothing can be
            hidden: docs/tensor_parallel.md); changes no bit.
        unit: outputs are cut in multiples of it (a head's width).
        segments: outputs are so many parts one after the other, each cut for itself (3: query, key and value).
    """

    @check_types()
    def __init__(
        self,
        in_features: int,
        out_features: int,
        comm: Communicator,
        bias: bool = True,
        gather_output: bool = False,
        sequence_parallel: bool = False,
        overlap: bool = True,
        *,
        unit: int = 1,
        segments: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_at_least("ColumnParallelLinear", 0, in_features=in_features, out_features=out_features)
        check_at_least("ColumnParallelLinear", 1, unit=unit, segments=segments)
        if gather_output and segments > 1:
            raise ValueError("gather_output does not go with segments: their parts would be in the wrong order")
        self.gather_output, self.sequence_parallel, self.overlap = gather_output, sequence_parallel, overlap
        self.unit, self.segments = unit, segments
        self.reduce_input = True  # False: the input's gradient is summed by who made it (``parallelize``)
        self.pad_empty = False  # True: a rank without units computes with one of zeros (``parallelize``)
        self._adopt(nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype), comm)

    @classmethod
    @check_types()
    def from_linear(
        cls,
        module: nn.Module,
        comm: Communicator,
        gather_output: bool = False,
        sequence_parallel: bool = False,
        overlap: bool = True,
        *,
        unit: int = 1,
        segments: int = 1,
    ) -> ColumnParallelLinear:
        """This rank's part of an unsharded linear module (or transformers' Conv1D), which is left as it is."""
        layer = cls(
            *_shape_of(module), comm, module.bias is not None, gather_output, sequence_parallel, overlap,
            unit=unit, segments=segments, device="meta",
        )  # fmt: skip
        layer._adopt(module, comm)
        return layer

    def _cuts(self, in_features: int, out_features: int) -> dict[str, Shard]:
        shard = Shard(0, out_features, self.unit, self.segments)
        return {"weight": shard, "bias": shard}

    def forward(self, x: Tensor) -> Tensor:
        """[…, in_features] (with sequence_parallel this rank's rows) -> […, this rank's outputs, or all of them]."""
        weight = self.matrix
        if self.sequence_parallel:
            out = products.all_gather_matmul(x, weight, self.comm, self.bias, overlap=self.overlap)
        elif self.reduce_input:
            out = products.copy_matmul(x, weight, self.comm, self.bias, overlap=self.overlap)
        else:
            out = F.linear(x, weight, self.bias)
        if self.pad_empty and weight.shape[0] == 0:
            out = F.pad(out, (0, self.shards["weight"].unit * self.shards["weight"].segments))
        if self.gather_output:
            out = gather_from_ranks(out, self.comm, -1, self.shard_sizes("weight"))
        return out

    def extra_repr(self) -> str:
        return _describe(self, f"sequence_parallel={self.sequence_parallel}, gather_output={self.gather_output}")


class RowParallelLinear(ParallelLayer):
    """``y = x A^T + b`` with A cut by columns: each rank has some of the inputs, outputs are summed over ranks.

    The bias is whole on every rank and added once, after the sum.

    Args:
        input_is_parallel: x has this rank's inputs only, as ``ColumnParallelLinear`` makes them; else x is whole, and
            cut here.
        sequence_parallel: the output is cut along dim −2.
        Others as of :class:`ColumnParallelLinear`.
    """

    @check_types()
    def __init__(
        self,
        in_features: int,
        out_features: int,
        comm: Communicator,
        bias: bool = True,
        input_is_parallel: bool = True,
        sequence_parallel: bool = False,
        overlap: bool = True,
        *,
        unit: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_at_least("RowParallelLinear", 0, in_features=in_features, out_features=out_features)
        check_at_least("RowParallelLinear", 1, unit=unit)
        self.input_is_parallel, self.sequence_parallel, self.overlap = input_is_parallel, sequence_parallel, overlap
        self.unit = unit
        self._adopt(nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype), comm)

    @classmethod
    @check_types()
    def from_linear(
        cls,
        module: nn.Module,
        comm: Communicator,
        input_is_parallel: bool = True,
        sequence_parallel: bool = False,
        overlap: bool = True,
        *,
        unit: int = 1,
    ) -> RowParallelLinear:
        """This rank's part of an unsharded linear module (or transformers' Conv1D), which is left as it is."""
        layer = cls(
            *_shape_of(module), comm, module.bias is not None, input_is_parallel, sequence_parallel, overlap,
            unit=unit, device="meta",
        )  # fmt: skip
        layer._adopt(module, comm)
        return layer

    def _cuts(self, in_features: int, out_features: int) -> dict[str, Shard]:
        return {"weight": Shard(1, in_features, self.unit), "bias": Shard(None)}

    def forward(self, x: Tensor) -> Tensor:
        """[…, this rank's inputs, or all of them] -> […, out_features] (with sequence_parallel this rank's rows)."""
        if not self.input_is_parallel:
            x = _own_features(x, self)
        elif x.shape[-1] != self.matrix.shape[1]:
            x = self._without_padding(x)
        product = products.matmul_reduce_scatter if self.sequence_parallel else products.matmul_all_reduce
        return product(x, self.matrix, self.comm, self.bias, overlap=self.overlap)

    def _without_padding(self, x: Tensor) -> Tensor:
        """A rank without heads computes with one of zeros (``parallelize``), which is cut off here."""
        if self.matrix.shape[1] or x.shape[-1] != self.shards["weight"].unit:
            raise ValueError(
                f"the input has {x.shape[-1]} features, this rank's part of {self.in_features} has "
                f"{self.matrix.shape[1]}: is the layer before it cut in the same units?"
            )
        return x[..., :0]

    def extra_repr(self) -> str:
        return _describe(
            self, f"sequence_parallel={self.sequence_parallel}, input_is_parallel={self.input_is_parallel}"
        )


class VocabParallelEmbedding(ParallelLayer):
    """An embedding cut by rows: each rank looks up the ids that it has, and the results are summed over ranks.

    Args:
        num_embeddings, embedding_dim: of the whole.
        comm: the ranks that share it.
        padding_idx: as of ``nn.Embedding``: zeros when made, and no gradient.
        sequence_parallel: the output is cut along dim −2.
    """

    @check_types()
    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        comm: Communicator,
        *,
        padding_idx: int | None = None,
        sequence_parallel: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_at_least("VocabParallelEmbedding", 0, num_embeddings=num_embeddings, embedding_dim=embedding_dim)
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise ValueError(f"VocabParallelEmbedding: padding_idx is {padding_idx}, of {num_embeddings} embeddings")
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.comm, self.sequence_parallel = comm, sequence_parallel
        self.shards = {"weight": Shard(0, num_embeddings)}
        self.start, _ = shard_bounds(num_embeddings, comm.world_size, comm.rank)
        full = nn.Embedding(num_embeddings, embedding_dim, padding_idx, device=device, dtype=dtype)
        self.padding_idx = full.padding_idx  # from the end, if it was negative
        self.weight = self._take("weight", full.weight)

    @classmethod
    @check_types()
    def from_embedding(
        cls, module: nn.Embedding, comm: Communicator, sequence_parallel: bool = False
    ) -> VocabParallelEmbedding:
        """This rank's part of an unsharded module, which is left as it is.

        Raises:
            ValueError: it renormalises, scales gradients by frequency or makes sparse ones.
        """
        if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
            raise ValueError("max_norm, scale_grad_by_freq and sparse are not there for a vocabulary cut over ranks")
        layer = cls(
            module.num_embeddings, module.embedding_dim, comm, padding_idx=module.padding_idx,
            sequence_parallel=sequence_parallel, device="meta",
        )  # fmt: skip
        layer.weight = layer._take("weight", module.weight)
        return layer

    def forward(self, ids: Tensor) -> Tensor:
        """[…] int64 -> […, embedding_dim].

        Raises:
            IndexError: an id is outside the whole vocabulary.
        """
        mine = vocab_lookup(ids, self.weight, self.start, self.num_embeddings, self.padding_idx)
        return reduce_scatter(mine, self.comm) if self.sequence_parallel else reduce_from_ranks(mine, self.comm)

    def extra_repr(self) -> str:
        return _describe(self, f"{self.num_embeddings} embeddings of {self.embedding_dim}")


def sum_gradients(module: nn.Module, comm: Communicator) -> None:
    """Sum the gradients of ``module``'s parameters over ranks in every backward, before they reach ``.grad``.

    For modules that all ranks have whole and apply to their own part of the tokens, such as a norm between
    sequence-parallel layers. Names and parameters stay as they are.
    """

    def total(grad: Tensor) -> Tensor:
        return reduce_from_ranks(grad, comm)

    for param in module.parameters():
        param.register_hook(total)


def _own_features(x: Tensor, layer: ParallelLayer) -> Tensor:
    shard = layer.shards["weight"]
    if shard.unit == 1:
        return scatter_to_ranks(x, layer.comm, -1)
    ((start, size),) = shard.intervals(layer.comm.world_size, layer.comm.rank)
    return copy_to_ranks(x, layer.comm).narrow(-1, start, size)


def _describe(layer: ParallelLayer, what: str) -> str:
    return f"{what}, rank {layer.comm.rank} of {layer.comm.world_size}: {tuple(layer.weight.shape)}"
