"""A pretraining worker with a bug on rank 1: started by a test through the real launcher."""

import sys
from pathlib import Path

from torch import Tensor

from pycomm import env
from pycomm.pretrain import loop, worker
from pycomm_command import StopSignals
from tests.pretrain.helpers import small_config


def buggy_loss(logits: Tensor, targets: Tensor) -> Tensor:
    raise ZeroDivisionError("a bug on rank 1")


if __name__ == "__main__":
    launched = env.launch()
    if launched is not None and launched.rank == 1:
        loop.next_token_loss = buggy_loss
    sys.exit(worker.main(small_config(steps=1000, out=Path(sys.argv[1])), "pycomm pretrain", StopSignals()))
