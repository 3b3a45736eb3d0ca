"""The cached losses inside sentence-transformers' own trainer: step by step as its own classes, dropout and all."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tileloss import losses

st = pytest.importorskip("sentence_transformers")
oracle = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
datasets = pytest.importorskip("datasets")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("CachedMultipleNegativesRankingLoss", {"mini_batch_size": 5}),
        ("CachedMultipleNegativesRankingLoss", {"mini_batch_num_tokens": 30, "show_progress_bar": True}),
        ("MegaBatchMarginLoss", {"mini_batch_size": 5}),
    ],
)
def test_steps_are_those_of_the_stock_class(
    name: str,
    options: dict[str, Any],
    tiny_encoder: Callable[[], Any],
    texts: Callable[..., list[str]],
    tmp_path: Path,
    backend: str,
) -> None:
    """Two steps, each of two accumulated batches, and an evaluation."""
    results = []
    for kind in (getattr(losses, name), getattr(oracle, name)):
        model = tiny_encoder()
        data = datasets.Dataset.from_dict({"anchor": texts(48, 0), "positive": texts(48, 1)})
        arguments = st.SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=12, gradient_accumulation_steps=2,
            per_device_eval_batch_size=12, learning_rate=0.01, logging_steps=1, eval_strategy="steps", eval_steps=2,
            save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True, seed=3,
        )  # fmt: skip
        trainer = st.SentenceTransformerTrainer(
            model, args=arguments, train_dataset=data, eval_dataset=data, loss=kind(model, **options)
        )
        trainer.train()
        history = trainer.state.log_history
        steps = [(x["loss"], x["grad_norm"]) for x in history if "loss" in x]
        evaluations = [x["eval_loss"] for x in history if "eval_loss" in x]
        assert (len(steps), len(evaluations)) == (2, 1)
        weights = torch.cat([p.detach().flatten() for p in model.parameters()])
        results.append((*steps[0], *steps[1], *evaluations, weights))
    found, expected = results
    assert found[:-1] == pytest.approx(expected[:-1], rel=2e-4)
    assert (found[-1] - expected[-1]).norm() <= 2e-4 * expected[-1].norm()
