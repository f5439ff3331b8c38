"""An optimizer's step that is under way while the next forward begins: who waits for which parameters.

The step leaves in a few parts, in the order in which forward needs the parameters. Before its forward, each module
waits for the parameters that it owns. Some modules read parameters of others, whose own forward nobody calls (as
torch.nn.MultiheadAttention does); so whatever belongs to a module that was never seen to run is waited for by the first
one that does. Reading without gradients, or in evaluation, takes other paths through some modules and waits for all.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from pycomm.communicator import Work
from pycomm.data_parallel.bucket import Slot
from pycomm.errors import PycommError

Part = tuple[Sequence[Slot], Work]  # parameters, and the operation that writes them


class PendingStep:
    """The parts of one model's step that may be under way.

    Args:
        module: gets hooks: on every forward, ``state_dict`` and ``load_state_dict`` in it.
        slots: its trainable parameters.
    """

    def __init__(self, module: nn.Module, slots: Iterable[Slot]) -> None:
        self._works: dict[int, Work] = {}  # by the parameter's index
        index_of = {id(slot.param): slot.index for slot in slots}
        self._not_run: dict[int, set[int]] = {}  # modules that were never seen to run, and the parameters they own
        for number, part in enumerate(module.modules()):
            own = {index_of[id(p)] for p in part.parameters(recurse=False) if id(p) in index_of}
            if own:
                self._not_run[number] = own
            part.register_forward_pre_hook(partial(_before_forward, weakref.ref(self), number, own))
            part.register_state_dict_pre_hook(partial(_before_state_dict, weakref.ref(self)))
            part.register_load_state_dict_pre_hook(partial(_before_state_dict, weakref.ref(self)))

    def add(self, parts: Iterable[Part]) -> None:
        """These have just left."""
        for slots, work in parts:
            self._works.update((slot.index, work) for slot in slots)

    def before_forward(self, module: nn.Module, number: int, own: set[int]) -> None:
        """``module``, number ``number`` of those that hooks are on, is about to read."""
        if self._works:
            if not (module.training and torch.is_grad_enabled()):
                self.finish()
            self._wait(own.union(*self._not_run.values()))
        self._not_run.pop(number, None)

    def finish(self) -> None:
        """Return when all is written; raise the first error."""
        self._wait(list(self._works))

    def _wait(self, indices: Iterable[int]) -> None:
        try:
            for index in indices:
                work = self._works.pop(index, None)
                if work is not None:
                    work.wait()
        except PycommError:
            self._works.clear()  # the parts after it failed, too: the communicator is closed for further use
            raise


# Hooks live as long as the modules and hold no strong reference, so that an optimizer that is gone frees its memory.
def _before_forward(
    pending: weakref.ref[PendingStep], number: int, own: set[int], module: nn.Module, _args: tuple[Any, ...]
) -> None:
    live = pending()
    if live is not None:
        live.before_forward(module, number, own)


def _before_state_dict(pending: weakref.ref[PendingStep], *_: Any) -> None:
    live = pending()
    if live is not None:
        live.finish()
