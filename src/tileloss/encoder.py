"""Text encoders: modules that turn texts into one vector each, which a loss can train.

Problem: a loss needs a model that maps a feature dict to one with `sentence_embedding`, saved in a form that can be
loaded anywhere and safely. Method: one base class that tokenises, embeds, saves and loads, and two models: any model
of the transformers library under mean, first-token or last-token pooling, and a static encoder that averages one
learned vector per token. Trade-off: the static encoder knows no word order, but a step of it costs so little that it
trains on a CPU in a minute, and the loss is most of the step.

A saved encoder is a folder of JSON, safetensors and tokenizer files; nothing in it is ever executed.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from tileloss.errors import InputError
from tileloss.tokenizer import learn_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Features = dict[str, Any]
CONFIG_FILE = "encoder_config.json"
WEIGHTS_FILE = "model.safetensors"
POOLINGS = ("mean", "cls", "last")
# token ids of this many texts are kept, so that later epochs and evaluations need not tokenise again
REMEMBERED_TEXTS = 2**18


def pool(
    tokens: Tensor,  # (B, T, D)
    mask: Tensor,  # (B, T), 1 at tokens, 0 at padding on either side
    pooling: str = "mean",
) -> Tensor:  # (B, D)
    """One vector per row: the mean of its tokens, its first token ("cls") or its last token ("last").

    Padding may stand on the left or on the right. A row without any token gives zero under "mean".
    Time and memory O(B T D) for "mean", O(B D) otherwise.

    Raises:
        InputError: for a pooling that is none of the three.
    """
    if pooling == "mean":
        weights = mask.to(tokens.dtype)
        return torch.einsum("btd,bt->bd", tokens, weights) / weights.sum(1, keepdim=True).clamp(min=1)
    if pooling == "cls":
        index = mask.long().argmax(1)
    elif pooling == "last":
        index = mask.shape[1] - 1 - mask.long().flip(1).argmax(1)
    else:
        raise InputError(f"pooling must be one of {list(POOLINGS)}, got {pooling!r}.")
    return tokens[torch.arange(len(tokens), device=tokens.device), index]


def check_texts(texts: object) -> None:
    """Raise an InputError unless `texts` is a sequence of strings, and no string itself."""
    if isinstance(texts, str) or not isinstance(texts, Sequence):
        raise InputError(f"texts must be a list of strings, got a {type(texts).__name__}.")
    for position, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f"texts must be strings, but number {position} is a {type(text).__name__}.")


@torch.no_grad()
def embed_texts(
    model: nn.Module,
    preprocess: Callable[[list[str]], Features],
    texts: Sequence[str],
    *,
    batch_size: int = 256,
    show_progress: bool = False,
) -> Tensor:  # (N, D) float32 on the CPU
    """The embeddings of `texts` in their order, from any model that adds "sentence_embedding" to a feature dict.

    The model runs in evaluation mode on its own device and is left in the mode that it had. Texts are embedded longest
    first, so that a batch holds texts of similar length and a batch that does not fit shows at once.

    Raises:
        InputError: for texts that are no list of strings, an empty list, or a batch size below 1.
    """
    from tqdm import tqdm

    check_texts(texts)
    if not texts or batch_size < 1:
        raise InputError(f"Need at least one text and a positive batch_size, got {len(texts)} texts, {batch_size=}.")
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    order = sorted(range(len(texts)), key=lambda position: len(texts[position]), reverse=True)
    training = model.training
    model.eval()
    parts = []
    try:
        for start in tqdm(range(0, len(order), batch_size), desc="encoding", disable=not show_progress, leave=False):
            features = preprocess([texts[position] for position in order[start : start + batch_size]])
            features = {
                name: value.to(device) if isinstance(value, Tensor) else value for name, value in features.items()
            }
            parts.append(model(features)["sentence_embedding"].float().cpu())
    finally:
        model.train(training)
    sorted_embeddings = torch.cat(parts)
    return torch.empty_like(sorted_embeddings).index_copy_(0, torch.tensor(order), sorted_embeddings)


class Encoder(nn.Module):
    """A module that maps {"input_ids", "attention_mask"} to the same dict with "sentence_embedding" (B, D).

    Attributes:
        tokenizer: a `transformers` tokenizer.
        max_length: tokens of a text beyond this many are cut off.
    """

    kind: ClassVar[str]

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        super().__init__()
        if max_length < 1:
            raise InputError(f"max_length must be at least 1 token, got {max_length}.")
        self.tokenizer = tokenizer
        self.max_length = max_length

    @abstractmethod
    def forward(self, features: Features) -> Features:
        """Add "sentence_embedding" (B, D) to `features` and return it."""

    @abstractmethod
    def get_embedding_dimension(self) -> int:
        """The number of values in an embedding."""

    @abstractmethod
    def _config(self) -> dict[str, Any]:
        """What the constructor needs beside weights and tokenizer."""

    @abstractmethod
    def _save_weights(self, folder: Path) -> None: ...

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return next(self.parameters()).device

    def preprocess(self, texts: Sequence[str]) -> Features:
        """Tokenise: a plain dict with input_ids and attention_mask, (B, T) int64 on the CPU, T at most `max_length`.

        Raises:
            InputError: unless `texts` is a list of strings.
        """
        check_texts(texts)
        encoded = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        return dict(encoded)

    def encode(self, texts: Sequence[str], batch_size: int = 256, show_progress: bool = False) -> Tensor:
        """The embeddings of `texts`, (N, D) float32 on the CPU, in the order of `texts`, not normalised.

        Raises:
            InputError: for texts that are no list of strings, an empty list, or a batch size below 1.
        """
        return embed_texts(self, self.preprocess, texts, batch_size=batch_size, show_progress=show_progress)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write configuration (JSON), weights (safetensors) and tokenizer to `folder`, which is made if need be."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"encoder": self.kind, "max_length": self.max_length, **self._config()}
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
        self.tokenizer.save_pretrained(folder)
        self._save_weights(folder)

    @staticmethod
    def from_pretrained(
        name_or_path: str | Path, *, pooling: str | None = None, max_length: int | None = None
    ) -> Encoder:
        """Load what `save_pretrained` wrote, or any model of the transformers library, by folder or hub name.

        Args:
            name_or_path: a folder or the name of a repository on the hub.
            pooling: "mean", "cls" or "last"; by default the saved one, or "mean" for a model that has none. Static
                encoders have no choice.
            max_length: tokens of a text that are read; by default the saved number, or what the model can take, at
                most 512.

        Raises:
            InputError: when nothing can be loaded from there, the configuration is not one of ours, or pooling is
                given for a static encoder.
        """
        from transformers.utils import cached_file

        try:
            config_path = cached_file(str(name_or_path), CONFIG_FILE, _raise_exceptions_for_missing_entries=False)
        except OSError as error:
            raise InputError(f"No model folder and no hub model is called {str(name_or_path)!r}: {error}") from error
        config = json.loads(Path(config_path).read_text()) if config_path else {"encoder": TransformerEncoder.kind}
        if max_length is not None:
            config["max_length"] = max_length
        if config["encoder"] == StaticEncoder.kind:
            if pooling not in (None, "mean"):
                raise InputError(f"A static encoder averages its tokens; pooling={pooling!r} cannot be chosen.")
            return StaticEncoder._load(str(name_or_path), config)
        if config["encoder"] != TransformerEncoder.kind:
            raise InputError(f"{CONFIG_FILE} of {str(name_or_path)!r} names an unknown encoder {config['encoder']!r}.")
        return TransformerEncoder._load(str(name_or_path), config | ({"pooling": pooling} if pooling else {}))


class TransformerEncoder(Encoder):
    """A model of the transformers library with pooled token vectors.

    Args:
        transformer: a model whose output has `last_hidden_state` (B, T, D).
        tokenizer: its tokenizer; one without a padding token pads with its end-of-text token.
        pooling: "mean", "cls" (first token) or "last" (last token), padding on either side.
        max_length: tokens of a text that are read; by default what the model can take, at most 512.

    Raises:
        InputError: for an unknown pooling, an encoder-decoder, or a tokenizer that can pad with nothing.
    """

    kind = "transformer"

    def __init__(
        self,
        transformer: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        pooling: str = "mean",
        max_length: int | None = None,
    ) -> None:
        if pooling not in POOLINGS:
            raise InputError(f"pooling must be one of {list(POOLINGS)}, got {pooling!r}.")
        if transformer.config.is_encoder_decoder:
            raise InputError(
                f"{type(transformer).__name__} is an encoder-decoder, which has no single sequence of token vectors; "
                "pass its encoder, as `transformers.AutoModelForTextEncoding` loads it."
            )
        if tokenizer.pad_token is None:
            if tokenizer.eos_token is None:
                raise InputError("The tokenizer has neither a padding nor an end-of-text token; set its pad_token.")
            tokenizer.pad_token = tokenizer.eos_token
        if max_length is None:
            max_length = min(
                tokenizer.model_max_length, getattr(transformer.config, "max_position_embeddings", 512), 512
            )
        super().__init__(tokenizer, max_length)
        self.transformer = transformer
        self.pooling = pooling

    @property
    def transformers_model(self) -> PreTrainedModel:
        """The transformer, under the name that sentence-transformers has for it."""
        return self.transformer

    def forward(self, features: Features) -> Features:
        """Add "token_embeddings" (B, T, D) and "sentence_embedding" (B, D) to `features` and return it."""
        known = ("input_ids", "attention_mask", "token_type_ids")
        inputs = {name: features[name] for name in known if name in features}
        tokens = self.transformer(**inputs).last_hidden_state
        features["token_embeddings"] = tokens
        features["sentence_embedding"] = pool(tokens, features["attention_mask"], self.pooling)
        return features

    def get_embedding_dimension(self) -> int:
        return self.transformer.config.hidden_size

    def _config(self) -> dict[str, Any]:
        return {"pooling": self.pooling}

    def _save_weights(self, folder: Path) -> None:
        self.transformer.save_pretrained(folder)

    @classmethod
    def _load(cls, name_or_path: str, config: dict[str, Any]) -> TransformerEncoder:
        from safetensors import SafetensorError
        from transformers import AutoModel, AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
            # weights stored in half precision are trained in full: an optimiser's small steps vanish in bfloat16
            transformer = AutoModel.from_pretrained(name_or_path, trust_remote_code=False, dtype=torch.float32)
        except (OSError, ValueError) as error:
            raise InputError(f"transformers cannot load {name_or_path!r}: {error}") from error
        except (UnpicklingError, SafetensorError) as error:
            raise _not_only_numbers(name_or_path) from error
        return cls(transformer, tokenizer, config.get("pooling", "mean"), config.get("max_length"))


class StaticEncoder(Encoder):
    """The mean of one learned vector per token: no attention, no word order, a few megaflops for a text.

    Args:
        tokenizer: a fast tokenizer with a padding token; special tokens are not added to texts.
        dimension: values in an embedding.
        max_length: tokens of a text that are read.

    Memory: vocabulary * dimension * 4 bytes, three times that again while Adam trains it.
    """

    kind = "static"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, dimension: int = 256, max_length: int = 128) -> None:
        super().__init__(tokenizer, max_length)
        if dimension < 1:
            raise InputError(f"dimension must be at least 1, got {dimension}.")
        if tokenizer.pad_token_id is None:
            raise InputError("The tokenizer of a static encoder needs a padding token; set its pad_token.")
        self.embeddings = nn.EmbeddingBag(len(tokenizer), dimension, mode="mean", padding_idx=tokenizer.pad_token_id)
        self._remembered: dict[str, Tensor] = {}

    @classmethod
    def from_texts(
        cls, texts: Iterable[str], *, dimension: int = 256, vocabulary_size: int = 24_000, max_length: int = 128
    ) -> StaticEncoder:
        """An untrained encoder whose tokenizer is learned from `texts`; see `tileloss.tokenizer.learn_tokenizer`."""
        return cls(learn_tokenizer(texts, vocabulary_size), dimension, max_length)

    def preprocess(self, texts: Sequence[str]) -> Features:
        """As `Encoder.preprocess`, without special tokens; a text seen before is not tokenised again."""
        check_texts(texts)
        new = {text: len(text) for text in texts if text not in self._remembered}
        ids: dict[str, Tensor] = {}
        if new:
            encoded = self.tokenizer(
                list(new), add_special_tokens=False, truncation=True, max_length=self.max_length,
                return_attention_mask=False, return_token_type_ids=False,
            )["input_ids"]  # fmt: skip
            ids = {text: torch.tensor(row, dtype=torch.int32) for text, row in zip(new, encoded, strict=True)}
            if len(self._remembered) + len(ids) <= REMEMBERED_TEXTS:
                self._remembered.update(ids)
        rows = [self._remembered[text] if text in self._remembered else ids[text] for text in texts]
        padding = cast(int, self.embeddings.padding_idx)
        input_ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding).long()
        lengths = torch.tensor([len(row) for row in rows])
        mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
        return {"input_ids": input_ids, "attention_mask": mask}

    def forward(self, features: Features) -> Features:
        """Add "sentence_embedding" (B, D) to `features` and return it; a text without tokens gives zero."""
        padding = cast(int, self.embeddings.padding_idx)
        # the mask decides, whatever id stands at the padding
        ids = features["input_ids"].masked_fill(features["attention_mask"] == 0, padding)
        features["sentence_embedding"] = self.embeddings(ids)
        return features

    def get_embedding_dimension(self) -> int:
        return self.embeddings.embedding_dim

    def _config(self) -> dict[str, Any]:
        return {"dimension": self.embeddings.embedding_dim}

    def _save_weights(self, folder: Path) -> None:
        from safetensors.torch import save_file

        weights = {name: weight.detach().cpu().contiguous() for name, weight in self.state_dict().items()}
        save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})

    @classmethod
    def _load(cls, name_or_path: str, config: dict[str, Any]) -> StaticEncoder:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
        from transformers import PreTrainedTokenizerFast
        from transformers.utils import cached_file

        tokenizer = PreTrainedTokenizerFast.from_pretrained(name_or_path)
        encoder = cls(tokenizer, config["dimension"], config["max_length"])
        try:
            weights = load_file(cached_file(name_or_path, WEIGHTS_FILE))
        except OSError as error:
            raise InputError(f"{name_or_path!r} has no weights, {WEIGHTS_FILE}: {error}") from error
        except SafetensorError as error:
            raise _not_only_numbers(name_or_path) from error
        encoder.load_state_dict(weights)
        return encoder


def _not_only_numbers(name_or_path: str) -> InputError:
    return InputError(
        f"The weights of {name_or_path!r} are not read: they are damaged, or hold more than numbers, which would have "
        f"to be executed. Ask whoever made them for {WEIGHTS_FILE}."
    )
