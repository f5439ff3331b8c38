"""Collectives that only training has: several passes over memory in one, on the host transport's symmetric tensors.

``pycomm.data_parallel`` builds their descriptors and keeps the memory behind them. Elsewhere it uses the
plain collectives, with the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pycomm import _C
from pycomm._C import Work
from pycomm.arguments import dtype_name
from pycomm.collectives import Collectives

__all__ = ["AdamWScalars", "FusedCalls", "dtype_name"]

# grad_scale, 1 - lr * weight_decay, 1 - beta1, beta2, 1 - beta2, sqrt(1 - beta2^t), eps, lr / (1 - beta1^t)
AdamWScalars = tuple[float, float, float, float, float, float, float, float]


class FusedCalls(Collectives):
    """What all ranks of a communicator whose capabilities have ``has_fused_step`` call together, in the same order."""

    def reduce_gradients(
        self, reduction: _C.GradientReduction, memory: torch.Tensor, *, accumulate: bool, async_op: bool
    ) -> Work | None:
        """Average the runs of elements that this rank owns over all ranks, and take their norms on the way.

        Args:
            reduction: the bucket, the runs, and where the averages and norms go.
            memory: the symmetric bucket, kept alive until the call is over.
            accumulate: add the averages to what the shard has.
        """
        work = _C.reduce_gradients(self._host, reduction, accumulate, async_op, self.timeout_s)
        return self._calls.keep(work, memory)

    def update_parameters(
        self,
        update: _C.ParameterUpdate,
        groups: Sequence[AdamWScalars],
        *,
        reduce_first: bool,
    ) -> None:
        """One step of AdamW on the runs that this rank owns; their new values go to every rank's parameters.

        Args:
            update: gradients, parameters, states, and the runs.
            groups: by the number of the parameter group in each run.
            reduce_first: average the gradients over the ranks on the way.
        """
        _C.update_everywhere(self._host, update, groups, reduce_first, self.timeout_s)

    @property
    def _host(self) -> _C.HostCommunicator:
        return self._backend.host()
