"""Models that pycomm pretrains and that its tests and examples use."""

from pycomm.models.gpt import GPT, GPTConfig, next_token_loss
from pycomm.models.gpt_stages import GPTStage, gpt_layers, gpt_stages, split_gpt

__all__ = ["GPT", "GPTConfig", "GPTStage", "gpt_layers", "gpt_stages", "next_token_loss", "split_gpt"]
