"""The texts of a batch for a model with another tokenizer: decoded, and tokenised again."""

from __future__ import annotations

import itertools
import math
from typing import Any

from torch import Tensor, nn

from tileloss.errors import InputError
from tileloss.losses.columns import Features
from tileloss.losses.static_embeddings import reads_static_embeddings


def check_tokenizers(model: nn.Module, guide: nn.Module) -> None:
    """Refuse models whose tokenizers cannot be compared or decode nothing."""
    if not (hasattr(model, "tokenizer") and hasattr(guide, "tokenizer")):
        raise InputError("Both the training model and the guiding model must have a tokenizer attribute.")
    from transformers import PreTrainedTokenizerBase

    for tokenizer in (model.tokenizer, guide.tokenizer):
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise InputError(
                "Both the training model and the guiding model must use a PreTrainedTokenizer from transformers, got "
                f"{type(tokenizer).__name__}."
            )


def must_retokenize(model: nn.Module, guide: nn.Module) -> bool:
    """Whether the guide cannot read the model's token ids: another vocabulary, or a shorter longest text.

    Raises:
        InputError: when it cannot, and the model is a StaticEmbedding, whose features hold no texts to decode.
    """
    differ = model.tokenizer.get_vocab() != guide.tokenizer.get_vocab()  # type: ignore[operator, union-attr]
    shorter = _longest(guide) < _longest(model)
    if (differ or shorter) and reads_static_embeddings(model):
        raise InputError(
            "The guide has another tokenizer, so texts must be decoded and tokenised again: then the Sentence "
            "Transformer model must not be based on a StaticEmbedding. Take a guide with the model's tokenizer."
        )
    return differ or shorter


def retokenized(features: Features, tokenizer: Any, guide: nn.Module) -> Features:
    """The guide's features of the texts that `tokenizer` made `features` from, on the guide's device."""
    texts = tokenizer.batch_decode(_token_ids(features), skip_special_tokens=True)
    made = guide.preprocess(texts)  # type: ignore[operator]
    device: Any = guide.device
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in made.items()}


def _longest(model: Any) -> float:
    """How many tokens a model takes, by sentence-transformers' name or by ours; models that do not say take any."""
    found = getattr(model, "max_seq_length", getattr(model, "max_length", None))
    return math.inf if found is None else found


def _token_ids(features: Features) -> Any:
    """A row of token ids for each text: as they are, or cut from one long row by the texts' boundaries."""
    ids = features["input_ids"]
    if "cu_seq_lens_q" in features:
        flat, bounds = ids[0].tolist(), features["cu_seq_lens_q"].tolist()
    elif "offsets" in features:
        flat, bounds = ids.tolist(), [*features["offsets"].tolist(), len(ids)]
    else:
        return ids
    return [flat[start:stop] for start, stop in itertools.pairwise(bounds)]
