"""Learning from texts alone: a decoder must write a text again from the embedding of a damaged copy of it."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from tileloss.errors import InputError, KindError, MissingError, ShapeError
from tileloss.losses import citations
from tileloss.losses.named_model import NamedModelLoss
from tileloss.losses.static_embeddings import reads_static_embeddings
from tileloss.minibatches import Features
from tileloss.sharded import is_sharded

logger = logging.getLogger(__name__)


class DenoisingAutoEncoderLoss(NamedModelLoss):
    """Cross-entropy of a decoder that sees only the embedding of a damaged text, and must write the text (TSDAE).

    Drop-in for sentence-transformers' class of this name: the same arguments, columns, values and gradients. The
    decoder is a causal language model of transformers with cross-attention, whose memory is the one embedding. With
    tied weights the encoder takes over the decoder's parameters of the same names, so that both train them.

    Columns are (damaged text, text); labels are ignored.

    Args:
        model: maps a feature dict to one that holds "sentence_embedding" (B, D), with a `tokenizer` and, as
            `transformers_model`, a model of transformers: a SentenceTransformer, or a `TransformerEncoder` of
            `tileloss.encoder`.
        decoder_name_or_path: what the decoder is loaded from, where it is not tied. Its hidden size must be the
            encoder's; texts are tokenised again if its tokenizer is of another class.
        tie_encoder_decoder: load the decoder from where the encoder came from, and share the weights. They are then
            the ones loaded, also where the encoder had been trained since.

    Attributes:
        encoder: the model.
        decoder: the decoder; its cross-attention, and whatever else the checkpoint lacks, is initialised at random.
        tokenizer_encoder, tokenizer_decoder: their tokenizers.
        need_retokenization: whether texts are tokenised again for the decoder.

    Raises:
        InputError (a ValueError): at construction, for a model with static embeddings, or a decoder that is no causal
            language model; at the call, for tied weights whose encoder was sharded by itself, which unties them.
        MissingError (an AssertionError): at construction, for untied weights without a decoder to load.
        KindError (an AssertionError): at construction, for a decoder of another hidden size or without
            cross-attention, and for tied weights with different tokenizers.
        ShapeError (a ValueError): at the call, for other than two columns.

    Cost: a forward and backward pass of the decoder, and its logits, (B, tokens, vocabulary), about three times.

    Source: Wang et al. 2021 (arXiv 2104.06979).

    >>> loss = DenoisingAutoEncoderLoss(model)  # doctest: +SKIP
    >>> loss([damaged_features, original_features], None).backward()  # doctest: +SKIP
    """

    _holds_model_as = "encoder"
    _is_tied = False  # so of those that `tileloss.accelerate` rebuilds, whose stock classes do not tell

    def __init__(
        self, model: nn.Module, decoder_name_or_path: str | None = None, tie_encoder_decoder: bool = True
    ) -> None:
        from transformers import AutoTokenizer

        super().__init__()
        transformer = _transformer_of(model)
        encoder_name_or_path = transformer.config._name_or_path
        if tie_encoder_decoder:
            if decoder_name_or_path:
                logger.warning("With tie_encoder_decoder=True, decoder_name_or_path has no effect: leave it out.")
            decoder_name_or_path = encoder_name_or_path
        elif decoder_name_or_path is None:
            raise MissingError("tie_encoder_decoder=False needs decoder_name_or_path: what to load the decoder from.")
        self.encoder = model
        self.tokenizer_encoder = cast(Any, model.tokenizer)
        self.tokenizer_decoder = AutoTokenizer.from_pretrained(decoder_name_or_path)
        self.need_retokenization = not isinstance(self.tokenizer_encoder, type(self.tokenizer_decoder))
        if tie_encoder_decoder and self.need_retokenization:
            raise KindError(
                f"Tied weights need one tokenizer, but the encoder has a {type(self.tokenizer_encoder).__name__} and "
                f"{decoder_name_or_path!r} a {type(self.tokenizer_decoder).__name__}."
            )
        self.decoder = _load_decoder(decoder_name_or_path, transformer.config.hidden_size).to(transformer.device)
        if self.tokenizer_decoder.pad_token is None:  # as GPT-2's
            self.tokenizer_decoder.pad_token = self.tokenizer_decoder.eos_token
            self.decoder.config.pad_token_id = self.decoder.config.eos_token_id
        loaded = len(AutoTokenizer.from_pretrained(encoder_name_or_path))
        if loaded != len(self.tokenizer_encoder):
            logger.warning(
                f"The encoder's tokenizer has grown from {loaded} tokens to {len(self.tokenizer_encoder)}: the "
                + ("decoder now has them too." if tie_encoder_decoder else "decoder may need them too.")
            )
        self._is_tied = tie_encoder_decoder
        if tie_encoder_decoder:
            if len(self.tokenizer_encoder) != len(self.tokenizer_decoder):
                self.tokenizer_decoder = self.tokenizer_encoder
                self.decoder.resize_token_embeddings(len(self.tokenizer_decoder))
            _share_parameters(transformer, self.decoder.base_model)

    def retokenize(self, sentence_features: Features) -> Features:
        """The decoder's features of the texts that the encoder's tokenizer made these from, on their device."""
        ids = sentence_features["input_ids"]
        texts = self.tokenizer_encoder.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=True)
        made = self.tokenizer_decoder(
            texts, padding=True, truncation="longest_first", return_tensors="pt", max_length=None
        )
        return made.to(ids.device)

    def forward(self, sentence_features: Iterable[Features], labels: Tensor | None = None) -> Tensor:
        """The loss (0-dim) of one batch: the feature dicts of the damaged texts and of the texts."""
        columns = list(sentence_features)
        if len(columns) != 2:
            raise ShapeError(f"DenoisingAutoEncoderLoss expects (damaged text, text), but got {len(columns)} columns.")
        if self._is_tied and is_sharded(self.encoder):
            raise InputError(
                "The encoder was sharded after its weights were tied to the decoder's, and no longer shares any: the "
                "two would be trained apart. Take tie_encoder_decoder=False, or a model that is not sharded."
            )
        damaged, original = columns
        ids = (self.retokenize(original) if self.need_retokenization else original)["input_ids"]
        embeddings = self.encoder(damaged)["sentence_embedding"]
        logits = self.decoder(
            input_ids=ids[:, :-1],
            attention_mask=None,  # its default, given by name for the hooks on a decoder that look it up
            encoder_hidden_states=embeddings[:, None],  # one place to look at
            encoder_attention_mask=damaged["attention_mask"][:, :1],
            use_cache=False,
        )[0]
        padding = self.tokenizer_decoder.pad_token_id
        # not the decoder's own loss of labels: that rounds float64 logits to float32
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=padding)

    def get_config_dict(self) -> dict[str, Any]:
        """The settings, as a model card shows them; keys and values are sentence-transformers'."""
        return {
            "decoder_name_or_path": self.decoder.config._name_or_path,
            "need_retokenization": self.need_retokenization,
        }

    @property
    def citation(self) -> str:
        """BibTeX of the paper that introduced TSDAE."""
        return citations.WANG_2021


def _transformer_of(model: nn.Module) -> Any:
    """The model of transformers inside a text encoder."""
    if reads_static_embeddings(model):
        raise InputError(
            "DenoisingAutoEncoderLoss is not compatible with a SentenceTransformer model based on a StaticEmbedding: "
            "there is no transformer to share weights with, nor a mask of padding."
        )
    transformer = getattr(model, "transformers_model", None)
    if transformer is None:
        raise MissingError(
            f"DenoisingAutoEncoderLoss needs a model with a transformer as its attribute transformers_model, which "
            f"this {type(model).__name__} lacks."
        )
    return transformer


def _load_decoder(name_or_path: str, hidden_size: int) -> Any:
    """A causal language model with cross-attention to embeddings of this size; checked before its weights are read."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(name_or_path)
    if config.hidden_size != hidden_size:
        raise KindError(
            f"Hidden sizes do not match: the encoder has {hidden_size}, the decoder {name_or_path!r} "
            f"{config.hidden_size}, and the encoder's embeddings are the decoder's memory."
        )
    config.is_decoder = True
    config.add_cross_attention = True
    try:
        decoder = AutoModelForCausalLM.from_pretrained(name_or_path, config=config)
    except ValueError as error:
        raise InputError(f"transformers cannot load {name_or_path!r} as a causal language model: {error}") from error
    if "encoder_hidden_states" not in inspect.signature(decoder.forward).parameters:
        raise KindError(
            f"{type(decoder).__name__} has no cross-attention and would never see the encoder's embeddings. Take a "
            "decoder whose forward has the argument encoder_hidden_states, such as one of BERT, RoBERTa or GPT-2."
        )
    return decoder


def _share_parameters(encoder: nn.Module, decoder: nn.Module) -> None:
    """Put the decoder's parameters in the places of the encoder's that have the same names."""
    modules = dict(encoder.named_modules())
    shared = 0
    for name, parameter in decoder.named_parameters():
        path, _, attribute = name.rpartition(".")
        if hasattr(modules.get(path), attribute):
            setattr(modules[path], attribute, parameter)
            shared += 1
    if not shared:
        logger.warning("Encoder and decoder have no parameters of the same names: nothing is tied.")
