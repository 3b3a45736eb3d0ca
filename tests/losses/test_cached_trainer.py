"""Losses that embed twice, by two models or for others, in sentence-transformers' own trainer: as its own do."""

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tileloss
from tileloss import losses

st = pytest.importorskip("sentence_transformers")
oracle = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
datasets = pytest.importorskip("datasets")


def guide_of(model: Any) -> Any:
    """Another model with the same tokenizer."""
    guide = copy.deepcopy(model).requires_grad_(False)
    for parameter in guide.parameters():
        parameter.mul_(1.5)
    return guide


CACHED = "CachedMultipleNegativesRankingLoss"
LOSSES: dict[str, Callable[[Any, Any], Any]] = {
    "cached": lambda library, model: getattr(library, CACHED)(model, mini_batch_size=5),
    "cached by tokens": lambda library, model: getattr(library, CACHED)(
        model, mini_batch_num_tokens=30, show_progress_bar=True
    ),
    "mega-batch": lambda library, model: library.MegaBatchMarginLoss(model, mini_batch_size=5),
    "guided": lambda library, model: library.CachedGISTEmbedLoss(
        model, guide_of(model), temperature=0.1, mini_batch_size=5
    ),
    "tension": lambda library, model: library.ContrastiveTensionLoss(model),
    "tension in batches": lambda library, model: library.ContrastiveTensionLossInBatchNegatives(model),
    "auto-encoder": lambda library, model: library.DenoisingAutoEncoderLoss(model),
    "widths": lambda library, model: library.MatryoshkaLoss(
        model, library.MultipleNegativesRankingLoss(model), [16, 8, 3], n_dims_per_step=2
    ),
    "widths of a cached loss": lambda library, model: library.MatryoshkaLoss(
        model, getattr(library, CACHED)(model, mini_batch_size=5), [16, 8, 3]
    ),
    "layers": lambda library, model: library.AdaptiveLayerLoss(model, library.MultipleNegativesRankingLoss(model)),
    "layers and widths": lambda library, model: library.Matryoshka2dLoss(
        model, library.MultipleNegativesRankingLoss(model), [16, 8, 3]
    ),
}

BACKENDS = {name: ["reference", "tiled"] if "cached" in name else ["auto"] for name in LOSSES}


@pytest.mark.parametrize(("name", "backend"), [(name, backend) for name in LOSSES for backend in BACKENDS[name]])
def test_steps_are_those_of_the_stock_class(
    name: str,
    backend: str,
    tiny_encoder: Callable[[], Any],
    texts: Callable[..., list[str]],
    tmp_path: Path,
    small_blocks: int,
) -> None:
    """Two steps, each of two accumulated batches, and an evaluation."""
    results = []
    for library in (losses, oracle):
        model = tiny_encoder()
        torch.manual_seed(4)
        loss = LOSSES[name](library, model)
        data = datasets.Dataset.from_dict({"anchor": texts(48, 0), "positive": texts(48, 1)})
        arguments = st.SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=12, gradient_accumulation_steps=2,
            per_device_eval_batch_size=12, learning_rate=0.01, logging_steps=1, eval_strategy="steps", eval_steps=2,
            save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True, seed=3,
        )  # fmt: skip
        trainer = st.SentenceTransformerTrainer(
            model, args=arguments, train_dataset=data, eval_dataset=data, loss=loss
        )
        random.seed(0)
        with tileloss.use_backend(backend):
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
