"""What the pretraining tests share: a run small enough to take a second."""

import argparse
import json
import textwrap
from pathlib import Path

from pycomm.models import GPTConfig
from pycomm.pretrain import DataConfig, OptimConfig, PretrainConfig, RunConfig

# Sources that every Python has; about 120 kB together.
TEXT = (Path(argparse.__file__), Path(textwrap.__file__), Path(json.__file__).parent)
MODEL = GPTConfig(vocab_size=512, max_seq=32, num_layers=2, num_heads=2, hidden=32)
# With eps far above every entry of the gradient, AdamW's step is lr * m / (sqrt(v) + eps), about lr * m: momentum SGD.
# A rounding error in a gradient then moves a weight by about lr times that error. With the usual tiny eps it could move
# it by lr, however small the error, since noise is divided by noise.
SMOOTH = OptimConfig(lr=0.5, eps=1.0, warmup_steps=5, clip=1.0)


def small_config(**settings: object) -> PretrainConfig:
    """Two micro-batches a rank in a world of two, four in a world of one."""
    defaults: dict[str, object] = {
        "nproc": 1,
        "text": TEXT,
        "model": MODEL,
        "steps": 20,
        "global_batch": 8,
        "micro_batch": 2,
        "optim": SMOOTH,
        "data": DataConfig(val_sequences=8),
        "run": RunConfig(val_every=10, save_every=10, sample_tokens=8, timeout_s=60.0),
    }
    return PretrainConfig(**(defaults | settings))  # type: ignore[arg-type]
