"""Models that pycomm pretrains and that its tests and examples use."""

from pycomm.models.gpt import GPT, GPTConfig, next_token_loss

__all__ = ["GPT", "GPTConfig", "next_token_loss"]
