"""What backward, clipping and the optimizer tell each other about a step. They share nothing else."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(eq=False)
class Step:
    """The step that a model's gradients are for.

    A synchronising backward begins it, another one begins it anew, clipping notes what it found, ``optimizer.step()``
    reads all of it. It ends when gradients are zeroed, dropped after a failed backward, or used up by the optimizer.
    GradScaler needs no entry: it scales the averages in place and decides itself whether the optimizer steps.
    """

    has_gradients: bool = False  # those of a synchronising backward; begin() and end(): the engine
    is_averaged: bool = True  # False: left to the optimizer's step; begin(), then averaged(): the gradients' memory
    norm: float | None = None  # clipped(): clip_grad_norm_
    grad_scale: float = 1.0  # clipped(): by which the optimizer multiplies

    @property
    def is_finite(self) -> bool:
        """As far as anybody has looked."""
        return self.norm is None or math.isfinite(self.norm)

    def begin(self, *, is_averaged: bool) -> None:
        """Averages have come, or will in the optimizer's step."""
        self.has_gradients, self.is_averaged = True, is_averaged
        self.norm, self.grad_scale = None, 1.0

    def averaged(self) -> None:
        """What was left to the optimizer's step is done."""
        self.is_averaged = True

    def clipped(self, norm: float, factor: float) -> None:
        """The gradients' norm, before the optimizer multiplies them by ``factor``."""
        self.norm = norm
        self.grad_scale *= factor

    def end(self) -> None:
        """There are no gradients any more."""
        self.has_gradients, self.is_averaged = False, True
