"""Pretrain a GPT on text: the library's main job, and an example of how its parts fit together.

A run passes these files from top to bottom: ``launch`` (starts the workers) → ``worker`` (what each of them does) →
``text``, ``data`` and ``sampler`` (text to tokens, tokens to batches) → ``loop`` (the training itself) → ``run`` with
``checkpoint`` and ``display`` (what is left behind and shown). ``config`` holds every setting.
"""

from pycomm.pretrain.config import (
    PRESETS,
    ConfigError,
    DataConfig,
    OptimConfig,
    PretrainConfig,
    PretrainError,
    RunConfig,
)
from pycomm.pretrain.loop import StepRecord, TrainState, build_state, train

__all__ = [
    "PRESETS",
    "ConfigError",
    "DataConfig",
    "OptimConfig",
    "PretrainConfig",
    "PretrainError",
    "RunConfig",
    "StepRecord",
    "TrainState",
    "build_state",
    "train",
]
