"""A GPT cut for pipeline parallelism, by hand or by cost.

Its *layers* are counted 0 … L + 1: the embedding, L blocks, and the final norm with the output projection. Parameters
keep the names that they have in the whole model, so state dicts of stages add up to that of the model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from pycomm.communicator import Communicator
from pycomm.models.gpt import GPT, run_layers
from pycomm.pipeline import PipelineStage, parameter_costs, partition

__all__ = ["GPTStage", "gpt_layers", "gpt_stages", "split_gpt"]

TIED = "token_embedding.weight"


class GPTStage(nn.Module):
    """A run of a GPT's layers.

    Args:
        model: the whole model; this stage refers to its parameters and does not copy them.
        layers: which layers, counted as in the module's docstring.
    """

    def __init__(self, model: GPT, layers: range) -> None:
        super().__init__()
        last = model.config.num_layers + 1
        self.embeds, self.scores = 0 in layers, last in layers
        if self.embeds:
            self.token_embedding = model.token_embedding
            self.position_embedding = model.position_embedding
        blocks = {str(layer - 1): model.blocks.get_submodule(str(layer - 1)) for layer in layers if 0 < layer < last}
        self.blocks = nn.ModuleDict(blocks)
        if self.scores:
            self.final_norm = model.final_norm
            self.unembedding = model.unembedding
        self.rotation_TK: Tensor | None
        self.register_buffer("rotation_TK", model.rotation_TK, persistent=False)
        self._max_seq = model.config.max_seq

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, T] or x [B, T, D] in, x [B, T, D] or logits [B, T, V] out; see :meth:`GPT.forward`."""
        return run_layers(self, x, self._max_seq, embeds=self.embeds, scores=self.scores)


def gpt_layers(model: GPT) -> list[nn.Module]:
    """Every layer by itself; each takes what the one before returned. For :func:`pycomm.pipeline.measure_layers`."""
    return [GPTStage(model, range(layer, layer + 1)) for layer in range(model.config.num_layers + 2)]


def split_gpt(model: GPT, num_stages: int, costs: Sequence[float] | None = None) -> list[range]:
    """The layers of each stage, so that the dearest stage is as cheap as can be.

    Args:
        num_stages: at most as many as layers.
        costs: one a layer, in any unit, the loss counted with the last. None: estimated from the products of a block
            and of the output projection.

    Raises:
        ValueError: more stages than layers, or another number of costs.
    """
    layers = gpt_layers(model)
    if costs is None:
        costs = [0.0, *parameter_costs(layers[1:])]
    if len(costs) != len(layers):
        raise ValueError(f"{len(layers)} costs are needed (embedding, blocks, output), got {len(costs)}")
    return partition(costs, num_stages)


def gpt_stages(
    model: GPT,
    comm: Communicator,
    rank_of: Sequence[int],
    cuts: Sequence[range] | None = None,
    *,
    wrap: Callable[[nn.Module], nn.Module] | None = None,
) -> list[PipelineStage]:
    """This rank's stages of ``model``, a tied embedding shared between those that have it.

    Args:
        model: the whole model, the same on all ranks; what belongs to others can be dropped afterwards.
        comm: the pipeline's ranks.
        rank_of: stage -> rank, as a Schedule has it.
        cuts: the layers of each stage; None: :func:`split_gpt`.
        wrap: what to make of a stage's module, such as a DataParallel.

    Raises:
        ValueError: the cuts do not divide the layers among the stages.
    """
    cuts = split_gpt(model, len(rank_of)) if cuts is None else cuts
    num_layers = model.config.num_layers + 2
    if len(cuts) != len(rank_of) or [layer for cut in cuts for layer in cut] != list(range(num_layers)):
        raise ValueError(f"the cuts are {list(cuts)}: they divide {num_layers} layers among {len(rank_of)} stages")
    is_tied = model.config.tie_embeddings and len(cuts) > 1
    stages = []
    for index, (rank, layers) in enumerate(zip(rank_of, cuts, strict=True)):
        if rank == comm.rank:
            module = GPTStage(model, layers)
            if is_tied and module.scores:
                # A copy, also where the embedding is on the same rank: then sums do not depend on where stages are.
                module.unembedding = copy.deepcopy(model.unembedding)
            ends = {"token_embedding.weight", "unembedding.weight"} if is_tied else set()
            shared = {TIED: param for name, param in module.named_parameters() if name in ends}  # noqa: B035  (one, or none)
            for param in shared.values():
                param.shard_turn = 0  # type: ignore[attr-defined]  # both copies' shards are the same for ZeRO
            wrapped = module if wrap is None else wrap(module)
            stages.append(PipelineStage(wrapped, index, len(cuts), comm, shared=shared))
    return stages
