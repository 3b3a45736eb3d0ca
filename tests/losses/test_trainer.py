"""The losses inside sentence-transformers' own trainer: the same logged losses as its own classes, step by step."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from tileloss import losses

st = pytest.importorskip("sentence_transformers")
oracle = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
datasets = pytest.importorskip("datasets")
tokenizers = pytest.importorskip("tokenizers")

ROWS = 48


def static_model() -> Any:
    """A bag of word vectors: the cheapest model that the trainer takes."""
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    torch.manual_seed(0)
    vocabulary = {"[UNK]": 0} | {f"w{c}x{i}": 1 + c * ROWS + i for c in range(4) for i in range(ROWS)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    weights = torch.randn(len(vocabulary), 8).numpy()
    return st.SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_weights=weights)], device="cpu")


def dataset(columns: int) -> Any:
    return datasets.Dataset.from_dict({f"column {c}": [f"w{c}x{i}" for i in range(ROWS)] for c in range(columns)})


def train(kind: type, folder: Path, columns: int, **options: Any) -> tuple[list[float], list[float], float]:
    """The losses that the trainer logs in training and in evaluation, and a sum over the trained weights."""
    model = static_model()
    data = dataset(columns)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        loss = kind(model, **options)
    arguments = st.SentenceTransformerTrainingArguments(
        output_dir=str(folder), num_train_epochs=3, per_device_train_batch_size=16, per_device_eval_batch_size=16,
        learning_rate=0.1, logging_steps=1, eval_strategy="epoch", save_strategy="no", report_to="none", use_cpu=True,
        disable_tqdm=True, seed=3,
    )  # fmt: skip
    trainer = st.SentenceTransformerTrainer(model, args=arguments, train_dataset=data, eval_dataset=data, loss=loss)
    trainer.train()
    steps = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    evaluations = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    return steps, evaluations, sum(p.double().abs().sum().item() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "columns", "options"),
    [
        ("MultipleNegativesRankingLoss", 2, {}),
        (
            "MultipleNegativesRankingLoss",
            4,
            {
                "directions": ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"),
                "hardness_mode": "all_negatives",
                "hardness_strength": 3.0,
            },
        ),
        ("MultipleNegativesSymmetricRankingLoss", 3, {}),
        ("MegaBatchMarginLoss", 2, {"use_mini_batched_version": False}),
    ],
)
def test_logged_losses_are_those_of_the_stock_class(
    name: str, columns: int, options: dict[str, Any], tmp_path: Path, backend: str
) -> None:
    found = train(getattr(losses, name), tmp_path / "ours", columns, **options)
    expected = train(getattr(oracle, name), tmp_path / "theirs", columns, **options)
    assert [len(x) for x in found[:2]] == [9, 3], "three epochs of three steps, each with an evaluation"
    assert found[1][0] > found[1][-1], "it learns"
    for a, b in zip(found, expected, strict=True):
        assert a == pytest.approx(b, rel=1e-4)
