"""GISTEmbedLoss is sentence-transformers' in value, gradients, errors and settings, without its matrices."""

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from tileloss.errors import FallbackWarning, InputError, ShapeError
from tileloss.losses import GISTEmbedLoss

oracle = pytest.importorskip("sentence_transformers.sentence_transformer.losses")

WORDS = [f"word{index}" for index in range(50)]


def tokenizer_of(words: list[str]) -> PreTrainedTokenizerFast:
    raw = Tokenizer(WordLevel({word: place for place, word in enumerate(["[PAD]", "[UNK]", *words])}, "[UNK]"))
    raw.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]")


class Model(nn.Module):
    """A mean of token embeddings, with as much of a SentenceTransformer's interface as the loss asks for."""

    device = torch.device("cpu")

    def __init__(self, words: list[str], width: int, seed: int, max_seq_length: int = 16) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.tokenizer, self.max_seq_length = tokenizer_of(words), max_seq_length
        self.embedding = nn.Embedding(len(words) + 2, width, padding_idx=0).double()
        self.calls = 0

    def preprocess(self, texts: list[str]) -> dict[str, Tensor]:
        made = self.tokenizer(
            texts, padding=True, truncation=True, max_length=self.max_seq_length, return_tensors="pt"
        )
        return {key: made[key] for key in ("input_ids", "attention_mask")}

    def __getitem__(self, place: int) -> nn.Module:
        return [self.embedding][place]

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        self.calls += 1
        mask = features["attention_mask"][..., None].double()
        tokens = self.embedding(features["input_ids"]) * mask
        features["sentence_embedding"] = tokens.sum(1) / mask.sum(1)
        return features


def texts(rows: int, columns: int) -> list[list[str]]:
    generator = torch.Generator().manual_seed(3)
    draws = torch.randint(len(WORDS), (columns, rows, 6), generator=generator).tolist()
    return [[" ".join(WORDS[index] for index in row) for row in column] for column in draws]


def run(
    loss_class: type, rows: int, columns: int, words: list[str] = WORDS, length: int = 16, **options: Any
) -> list[Tensor]:
    model, guide = Model(WORDS, 8, seed=0), Model(words, 5, seed=1, max_seq_length=length)
    loss = loss_class(model, guide, temperature=0.2, **options)
    value = loss([model.preprocess(column) for column in texts(rows, columns)], None)
    value.backward()
    assert guide.embedding.weight.grad is None
    return [value.detach(), model.embedding.weight.grad]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"margin": 0.1},
        {"margin": 0.2, "margin_strategy": "relative"},
        {"contrast_anchors": False},
        {"contrast_positives": False, "contrast_anchors": False},
    ],
    ids=str,
)
@pytest.mark.parametrize(("rows", "columns"), [(1, 2), (30, 2), (30, 3)])
def test_value_and_gradients_are_the_oracles(rows: int, columns: int, options: dict[str, Any]) -> None:
    assert_same(run(GISTEmbedLoss, rows, columns, **options), run(oracle.GISTEmbedLoss, rows, columns, **options))


@pytest.mark.parametrize(("words", "length"), [(WORDS[::-1], 16), (WORDS, 4)], ids=["vocabulary", "length"])
def test_texts_are_tokenised_again_for_another_guide(words: list[str], length: int) -> None:
    found = run(GISTEmbedLoss, 12, 3, words, length)
    assert_same(found, run(oracle.GISTEmbedLoss, 12, 3, words, length))
    if words != WORDS:  # the same numbers mean other words to this guide
        assert not torch.isclose(found[0], run(GISTEmbedLoss, 12, 3)[0])


def test_a_large_batch_in_blocks(small_blocks: int) -> None:
    import tileloss

    with tileloss.use_backend("tiled"):
        found = run(GISTEmbedLoss, 100, 3, margin=0.05)
    assert_same(found, run(oracle.GISTEmbedLoss, 100, 3, margin=0.05))


def test_settings_are_the_oracles() -> None:
    model, guide = Model(WORDS, 8, 0), Model(WORDS, 5, 1)
    settings = (model, guide, 0.1, "relative", 0.2, False, True)
    ours, theirs = GISTEmbedLoss(*settings), oracle.GISTEmbedLoss(*settings)
    assert ours.get_config_dict() == theirs.get_config_dict()
    assert ours.citation.split() == theirs.citation.split()
    assert [name for name, _ in ours.named_children()] == [name for name, _ in theirs.named_children()]
    assert ours.must_retokenize == theirs.must_retokenize


def test_the_guides_features_are_its_own() -> None:
    model, guide = Model(WORDS, 8, 0), Model(WORDS, 5, 1)
    columns = [model.preprocess(column) for column in texts(4, 2)]
    GISTEmbedLoss(model, guide)(columns, None)
    assert all(features["sentence_embedding"].shape == (4, 8) for features in columns)


@pytest.mark.parametrize("columns", [1, 4])
def test_other_columns_are_refused_before_anything_is_embedded(columns: int) -> None:
    model, guide = Model(WORDS, 8, 0), Model(WORDS, 5, 1)
    features = [model.preprocess(column) for column in texts(4, columns)]
    with pytest.raises(ShapeError, match="Expected 2 or 3 embeddings"):
        GISTEmbedLoss(model, guide)(features, None)
    assert model.calls == guide.calls == 0


def test_bad_options_are_refused() -> None:
    model, guide = Model(WORDS, 8, 0), Model(WORDS, 5, 1)
    with pytest.raises(InputError, match="margin_strategy must be 'absolute' or 'relative'"):
        GISTEmbedLoss(model, guide, margin_strategy="percent")
    with pytest.raises(InputError, match="temperature"):
        GISTEmbedLoss(model, guide, temperature=0.0)
    with pytest.raises(InputError, match="must have a tokenizer attribute"):
        GISTEmbedLoss(model, nn.Identity())
    guide.tokenizer = object()
    with pytest.raises(InputError, match="PreTrainedTokenizer"):
        GISTEmbedLoss(model, guide)


@pytest.mark.parametrize(
    ("attribute", "replacement"),
    [
        ("cross_entropy_loss", nn.CrossEntropyLoss(label_smoothing=0.1)),
        ("similarity_fct", nn.CosineSimilarity(-1, 0.5)),
    ],
)
def test_a_replaced_function_is_used(attribute: str, replacement: nn.Module) -> None:
    values = []
    for kind in (GISTEmbedLoss, oracle.GISTEmbedLoss):
        model, guide = Model(WORDS, 8, 0), Model(WORDS, 5, 1)
        loss = kind(model, guide, temperature=0.2)
        setattr(loss, attribute, replacement)
        values.append(loss([model.preprocess(column) for column in texts(9, 3)], None))
    torch.testing.assert_close(*values)


def test_a_replaced_function_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from tileloss import backend

    monkeypatch.setattr(backend, "_said", set())
    model, guide = Model(WORDS, 8, 0), Model(WORDS, 5, 1)
    loss = GISTEmbedLoss(model, guide)
    loss.cross_entropy_loss = nn.CrossEntropyLoss(label_smoothing=0.1)
    with pytest.warns(FallbackWarning, match="cross_entropy_loss"):
        loss([model.preprocess(column) for column in texts(9, 2)], None)


def test_16_bits_in_16_bits_out() -> None:
    columns = [torch.randn(9, 4).bfloat16() for _ in range(4)]
    loss = GISTEmbedLoss(Model(WORDS, 8, 0), Model(WORDS, 5, 1)).compute_loss_from_embeddings(columns[:2], columns[2:])
    assert loss.dtype == torch.bfloat16


def test_statistics_come_with_it() -> None:
    model, guide = Model(WORDS, 8, 0), Model(WORDS, 5, 1)
    loss = GISTEmbedLoss(model, guide)
    assert loss.stats is None
    loss([model.preprocess(column) for column in texts(9, 2)], None)
    assert loss.stats is not None
    assert 0 <= loss.stats.accuracy <= 1
