"""A model that embeds nothing: for calling a loss with embeddings that are at hand."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn


class Given(nn.Module):
    """A model whose embeddings come with the features.

    Attributes:
        key: the name of the embeddings in the features.
    """

    max_seq_length = 512
    device = None  # a layer that a loss adds is made on the default device, and moved

    def __init__(self, key: str = "sentence_embedding") -> None:
        super().__init__()
        self.key = key

    @functools.cached_property
    def tokenizer(self) -> Any:
        """What guided losses ask a model for, and compare with their guide's: the same for all, of one word."""
        from tokenizers import Tokenizer
        from tokenizers.models import WordLevel
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"[UNK]": 0}, "[UNK]")))

    def get_embedding_dimension(self) -> None:
        """Nothing: the features decide."""

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        return {"sentence_embedding": features[self.key]}
