"""What sentence-transformers' trainer does with a loss, point by point, with each of ours."""

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tileloss import losses

st = pytest.importorskip("sentence_transformers")
datasets = pytest.importorskip("datasets")

# which hold their model by another name than `model`, where the trainer does not look for it
BY_ANOTHER_NAME = {"ContrastiveTensionLoss", "ContrastiveTensionLossInBatchNegatives", "DenoisingAutoEncoderLoss"}


@pytest.fixture
def trainer(texts: Callable[..., list[str]], tmp_path: Path) -> Callable[..., Any]:
    """Makes a trainer of one step for a model and a loss, on a few rows of text."""

    def make(model: Any, loss: Any, columns: int = 2, **options: Any) -> Any:
        rows = {f"column {column}": texts(4, seed=column) for column in range(columns)}
        arguments = st.SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=4, report_to="none", use_cpu=True,
            save_strategy="no", disable_tqdm=True, logging_steps=1, **options,
        )  # fmt: skip
        return st.SentenceTransformerTrainer(
            model, args=arguments, train_dataset=datasets.Dataset.from_dict(rows), loss=loss
        )

    return make


class Wrapped(nn.Module):
    """As DistributedDataParallel wraps a model on a GPU: without its other methods, and with a copy of its input."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, features: dict[str, Any], **kwargs: Any) -> Any:
        return self.module(dict(features), **kwargs)


def test_the_model_is_a_registered_child_and_trained(
    name: str, make: Callable[..., Any], model_of: Callable[[Any], Any]
) -> None:
    """The optimiser is built from the loss's parameters; a dict of losses becomes a Sequential or a ModuleDict."""
    loss = make(losses, name)
    assert isinstance(loss, nn.Module)
    for holder in (nn.Sequential(OrderedDict({"a": loss})), nn.ModuleDict({"a": loss})):
        assert {id(p) for p in model_of(loss).parameters()} <= {id(p) for p in holder.parameters()}
        holder.zero_grad()
        holder.train()


def test_the_value_is_a_scalar_with_a_graph_or_a_dict_of_them_and_plain_without_gradients(
    name: str, make: Callable[..., Any], model_of: Callable[[Any], Any], batch: Callable[..., Any]
) -> None:
    """Called by position with a list of feature dicts; in evaluation under no_grad, with the same value."""
    loss = make(losses, name)
    columns, labels = batch(name, model_of(loss))
    before = [dict(column) for column in columns]
    value = loss(columns, labels)
    with torch.no_grad():
        evaluated = loss([dict(column) for column in before], labels)
    parts = [x if isinstance(x, dict) else {"": x} for x in (value, evaluated)]
    for (key, training), (other, evaluation) in zip(*(part.items() for part in parts), strict=True):
        assert key == other
        assert training.shape == ()
        assert training.requires_grad
        assert not evaluation.requires_grad
        assert torch.isclose(training, evaluation, rtol=1e-9)
    for column, old in zip(columns, before, strict=True):
        assert all(torch.equal(column[key], value) for key, value in old.items() if isinstance(value, torch.Tensor))


def test_a_wrapped_model_takes_the_place_of_the_plain_one_wherever_it_is_held(
    name: str, make: Callable[..., Any], trainer: Callable[..., Any], tiny_encoder: Callable[..., Any], batch: Any
) -> None:
    """`override_model_in_loss`, which looks for children called "model" at every depth."""
    made = trainer(tiny_encoder(), losses.MultipleNegativesRankingLoss)
    loss = make(losses, name)
    plain = getattr(loss, "model", None)
    if plain is None:
        assert name in BY_ANOTHER_NAME
        return
    columns, labels = batch(name, plain)
    wrapped = Wrapped(plain)
    assert made.override_model_in_loss(loss, wrapped) is loss
    assert loss.model is wrapped
    holders = [m for m in loss.modules() if m is not wrapped and m is not getattr(loss, "guide", None)]
    for holder in holders:
        assert all(child is not plain for child in holder._modules.values())
    value = loss(columns, labels)
    assert torch.isfinite(torch.stack(list(value.values())) if isinstance(value, dict) else value).all()


def test_gradients_are_divided_where_the_trainer_divides_the_loss(
    name: str, make: Callable[..., Any], model_of: Callable[[Any], Any], value_and_gradients: Callable[..., Any]
) -> None:
    """For gradient accumulation, after the forward: also under a gradient cache."""
    loss = make(losses, name)
    model = model_of(loss)
    _, whole = value_and_gradients(name, loss, model)

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loss = loss

        def forward(self, *args: Any) -> Any:
            value = self.loss(*args)
            return (torch.stack(list(value.values())).sum() if isinstance(value, dict) else value) / 2

    _, half = value_and_gradients(name, Half(), model)
    assert {f"loss.{key}" for key in whole} == half.keys()
    for key, gradient in whole.items():
        assert torch.allclose(half[f"loss.{key}"], gradient / 2, rtol=1e-8, atol=1e-12), key


def test_a_factory_a_dict_and_model_init_are_taken(
    trainer: Callable[..., Any], tiny_encoder: Callable[..., Any], texts: Callable[..., list[str]]
) -> None:
    """A class makes the loss of the trainer's model; so does every value of a dict."""
    model = tiny_encoder()
    made = trainer(model, losses.MultipleNegativesRankingLoss)
    assert made.loss.model is model
    before = [p.clone() for p in model.parameters()]
    made.train()
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    made.model_init = lambda: tiny_encoder()
    new = made.call_model_init()
    assert made.loss.model is new


def test_low_precision_of_the_trainer_reaches_the_loss_as_float32(
    trainer: Callable[..., Any], tiny_encoder: Callable[..., Any]
) -> None:
    model = tiny_encoder()
    loss = losses.MultipleNegativesRankingLoss(model)
    seen: list[torch.dtype] = []
    compute = loss.compute_loss_from_embeddings

    def look(embeddings: Any, labels: Any = None) -> Any:
        seen.extend(x.dtype for x in embeddings)
        return compute(embeddings, labels)

    loss.compute_loss_from_embeddings = look  # type: ignore[method-assign]
    made = trainer(model, loss, bf16=True)
    made.train()
    assert set(seen) == {torch.float32}


def test_model_cards_name_our_class_show_its_settings_and_cite_its_paper(
    trainer: Callable[..., Any], tiny_encoder: Callable[..., Any]
) -> None:
    """As code, because the library links its own classes only; nested losses are cited and tagged too."""
    model = tiny_encoder()
    made = trainer(model, losses.MatryoshkaLoss(model, losses.MultipleNegativesRankingLoss(model, scale=3.0), [16, 8]))
    made.train()
    card = model._generate_model_card() if hasattr(model, "_generate_model_card") else _saved_card(model, made)
    assert "Loss: <code>tileloss.losses.matryoshka.MatryoshkaLoss</code>" in card
    assert '"loss": "MultipleNegativesRankingLoss"' in card
    for tag in ("loss:MatryoshkaLoss", "loss:MultipleNegativesRankingLoss"):
        assert f"- {tag}" in card
    for heading, key in (("MatryoshkaLoss", "kusupati2024matryoshka"), ("MultipleNegativesRankingLoss", "oord2019")):
        assert f"#### {heading}\n" in card
        assert key in card


def _saved_card(model: Any, trainer: Any) -> str:
    model.save(trainer.args.output_dir)
    return (Path(trainer.args.output_dir) / "README.md").read_text(encoding="utf-8")


def test_sparse_wrappers_take_ours_by_its_embeddings(tiny_encoder: Callable[..., Any]) -> None:
    """SpladeLoss and its kin call `compute_loss_from_embeddings` of the loss that they are given."""
    from sentence_transformers.sparse_encoder.losses import SpladeLoss

    columns = [torch.randn(6, 8).relu().requires_grad_() for _ in range(2)]
    model = nn.Identity()
    splade = SpladeLoss(model, losses.MultipleNegativesRankingLoss(model), document_regularizer_weight=0.1)
    value = splade([{"sentence_embedding": column} for column in columns], None)
    assert value["base_loss"] == losses.MultipleNegativesRankingLoss(model).compute_loss_from_embeddings(columns)
