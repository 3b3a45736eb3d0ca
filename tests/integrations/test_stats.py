"""Statistics of the losses in the logs of sentence-transformers' trainer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tileloss import losses
from tileloss.errors import InputError
from tileloss.integrations import log_stats

st = pytest.importorskip("sentence_transformers")
datasets = pytest.importorskip("datasets")

STATS = {"accuracy", "positive_similarity", "hardest_negative_similarity"}


@pytest.fixture
def trainer(tiny_encoder: Callable[..., Any], texts: Callable[..., list[str]], tmp_path: Path) -> Callable[..., Any]:
    """Makes a trainer with two steps to go and an evaluation, for a loss or a dict of losses."""

    def make(loss: Callable[[Any], Any]) -> Any:
        model = tiny_encoder()
        made = loss(model)

        def data() -> Any:
            def rows() -> Any:  # a set of its own for each name: the trainer writes the name into it
                return datasets.Dataset.from_dict({"a": texts(8, seed=0), "b": texts(8, seed=1)})

            return datasets.DatasetDict({name: rows() for name in made}) if isinstance(made, dict) else rows()

        arguments = st.SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=4, per_device_eval_batch_size=4,
            logging_steps=2, eval_strategy="steps", eval_steps=4, save_strategy="no", report_to="none", use_cpu=True,
            disable_tqdm=True,
        )  # fmt: skip
        return st.SentenceTransformerTrainer(
            model, args=arguments, train_dataset=data(), eval_dataset=data(), loss=made
        )

    return make


def test_means_since_the_last_entry_are_logged_beside_the_loss(trainer: Callable[..., Any]) -> None:
    made = trainer(losses.MultipleNegativesRankingLoss)
    seen: list[dict[str, float]] = []
    made.loss.register_forward_hook(
        lambda loss, *_: seen.append({k: v.item() for k, v in loss.stats._asdict().items()})
    )
    log_stats(made)
    made.train()
    entries = [entry for entry in made.state.log_history if "loss" in entry]
    assert len(entries) == 2
    assert entries[0].keys() >= STATS
    for entry, calls in zip(entries, (seen[:2], seen[2:4]), strict=True):
        for name in STATS:
            assert entry[name] == pytest.approx(sum(call[name] for call in calls) / 2)
    (evaluation,) = (entry for entry in made.state.log_history if "eval_loss" in entry)
    assert evaluation["eval_accuracy"] == pytest.approx(sum(call["accuracy"] for call in seen[4:]) / 2)


def test_losses_by_data_set_and_wrappers_have_theirs(trainer: Callable[..., Any]) -> None:
    def loss(model: Any) -> dict[str, Any]:
        plain, cached = losses.MultipleNegativesRankingLoss(model), losses.CachedMultipleNegativesRankingLoss(model)
        return {"plain": plain, "cut": losses.MatryoshkaLoss(model, cached, [16, 8])}

    made = trainer(loss)
    log_stats(made)
    made.train()
    logged = {name for entry in made.state.log_history for name in entry}
    for name in ("plain_accuracy", "cut_accuracy"):
        assert {name, f"eval_{name}"} <= logged
    assert "accuracy" not in logged
    for entry in made.state.log_history:
        assert not ("eval_plain_loss" in entry and "eval_cut_accuracy" in entry)


def test_each_of_several_evaluation_sets_has_its_own(trainer: Callable[..., Any]) -> None:
    made = trainer(losses.MultipleNegativesRankingLoss)
    made.eval_dataset = datasets.DatasetDict({"one": made.eval_dataset, "two": made.eval_dataset})
    log_stats(made)
    made.evaluate()
    names = [entry.keys() for entry in made.state.log_history]
    assert any({"eval_one_loss", "eval_one_accuracy"} <= keys for keys in names)
    assert any({"eval_two_loss", "eval_two_accuracy"} <= keys for keys in names)


def test_losses_without_statistics_are_refused(trainer: Callable[..., Any]) -> None:
    stock = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    with pytest.raises(InputError, match="only MultipleNegativesRankingLoss"):
        log_stats(trainer(stock.MultipleNegativesRankingLoss))


def test_nothing_is_added_where_nothing_was_seen(trainer: Callable[..., Any]) -> None:
    made = trainer(losses.MultipleNegativesRankingLoss)
    log_stats(made)
    made.log({"loss": 1.0})
    made.log({"note": torch.pi})
    assert [entry.keys() & STATS for entry in made.state.log_history] == [set(), set()]
