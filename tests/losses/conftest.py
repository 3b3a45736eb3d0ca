"""A real text encoder for the losses to train: tiny, with random weights, with dropout, made without a download."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

WORDS = 40


def save_bert(folder: Path, words: list[str], seed: int) -> Path:
    """Fill a folder with a two-layer BERT and its tokenizer."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {name: i for i, name in enumerate(["[PAD]", "[UNK]", *words])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=32
    ).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1,
    )  # fmt: skip
    torch.manual_seed(seed)
    transformers.BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a two-layer BERT and its tokenizer, whose words are w0, w1, ..."""
    return save_bert(tmp_path_factory.mktemp("tiny_bert"), [f"w{i}" for i in range(WORDS)], seed=0)


@pytest.fixture(scope="session")
def other_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with other weights, and with the words in another order."""
    return save_bert(tmp_path_factory.mktemp("other_bert"), [f"w{i}" for i in reversed(range(WORDS))], seed=1)


@pytest.fixture
def tiny_encoder(tiny_bert: Path) -> Callable[..., Any]:
    """Makes a SentenceTransformer on the tiny BERT or another, in training mode; equal ones every time."""
    st = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer import modules

    def make(folder: Path = tiny_bert) -> Any:
        encoder = modules.Transformer(str(folder))
        pooling = modules.Pooling(encoder.get_embedding_dimension())
        return st.SentenceTransformer(modules=[encoder, pooling], device="cpu").train()

    return make


@pytest.fixture
def texts() -> Callable[..., list[str]]:
    """Texts of one to twelve words of the tiny BERT; equal ones for an equal seed."""

    def make(count: int, seed: int = 0) -> list[str]:
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(1, 13, (count,), generator=generator).tolist()
        return [" ".join(f"w{i}" for i in torch.randint(WORDS, (n,), generator=generator).tolist()) for n in lengths]

    return make
