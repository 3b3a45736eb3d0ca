"""sentence-transformers' own trainer on a real model logs with our losses what it logs with its own, at every step."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import tileloss
from tileloss import losses
from tileloss.errors import InputError
from tileloss.integrations import save_losses
from tileloss.own_parameters import OwnParameters

st = pytest.importorskip("sentence_transformers")
stock = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
peft = pytest.importorskip("peft")

PRECISION = 1e-4


def in_batch(library: Any, model: Any) -> Any:
    return library.MultipleNegativesRankingLoss(model)


def cached(library: Any, model: Any) -> Any:
    return library.CachedMultipleNegativesRankingLoss(model, mini_batch_size=5)


def one_for_each_set(library: Any, model: Any) -> dict[str, Any]:
    return {
        "pairs": in_batch(library, model),
        "graded": library.CoSENTLoss(model),
        "classes": library.BatchSemiHardTripletLoss(model),
    }


def at_three_widths(library: Any, model: Any) -> Any:
    return library.MatryoshkaLoss(model, in_batch(library, model), [384, 128, 32])


def with_an_adapter(model: Any) -> None:
    model.add_adapter(peft.LoraConfig(task_type="FEATURE_EXTRACTION", r=4, init_lora_weights="gaussian"))


@dataclass(frozen=True)
class Way:
    """A way to train.

    Attributes:
        loss: makes the loss of a library for a model, or a dict of them.
        data: the name of the data set.
        options: training arguments.
        prepare: what is done to the model before.
    """

    loss: Callable[[Any, Any], Any] = in_batch
    data: str = "pairs"
    options: dict[str, Any] = field(default_factory=dict)
    prepare: Callable[[Any], None] = lambda model: None


# under bfloat16 any two runs part at the first update (the stock run from itself by 1.5e-4, with its loss times
# 1 + 3e-7), because rounding takes weights that differ in their last bit to either side: so there is none
NARROW = {"bf16": True, "learning_rate": 0.0}
COMPILED = {"torch_compile": True, "torch_compile_backend": "eager"}  # the backend that takes seconds
WAYS = {
    "one loss": Way(),
    "a loss for each set": Way(one_for_each_set, "all", {"max_steps": 6, "eval_steps": 6}),
    "named terms": Way(lambda library, model: library.GlobalOrthogonalRegularizationLoss(model)),
    "accumulated": Way(at_three_widths, options={"gradient_accumulation_steps": 2}),
    "recomputed": Way(options={"gradient_checkpointing": True}),
    "recomputed and cached": Way(cached, options={"gradient_checkpointing": True}),
    "bfloat16": Way(options=NARROW),
    "bfloat16 and cached": Way(cached, options=NARROW),
    "compiled": Way(at_three_widths, options=COMPILED),
    "an adapter": Way(prepare=with_an_adapter, options={"learning_rate": 1e-2}),
}


@pytest.fixture
def train(encoder: Callable[[], Any], make_trainer: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """Trains in one of the ways with a library's losses, ours on row blocks; gives the trainer."""

    def run(name: str, library: Any, **options: Any) -> Any:
        way, model = WAYS[name], encoder()
        torch.manual_seed(0)
        way.prepare(model)
        trainer = make_trainer(model, way.loss(library, model), way.data, **way.options | options)
        with tileloss.use_backend("tiled"):
            trainer.train()
        return trainer

    yield run
    torch.compiler.reset()


@pytest.mark.parametrize("name", WAYS)
def test_what_is_logged_is_what_the_stock_losses_log(
    name: str, train: Callable[..., Any], logged: Callable[[Any], Any], small_blocks: int
) -> None:
    found, expected = logged(train(name, losses)), logged(train(name, stock))
    assert sum("loss" in entry for entry in expected) >= 4
    assert any("eval_loss" in entry or "eval_pairs_loss" in entry for entry in expected)
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=PRECISION)


def test_the_compiled_model_is_the_one_that_runs(train: Callable[..., Any]) -> None:
    """In the loss, and in the loss inside it."""
    trainer = train("compiled", losses, max_steps=1, eval_strategy="no")
    for loss in (trainer.loss, trainer.loss.loss):
        assert isinstance(loss.model, torch._dynamo.OptimizedModule)
        assert loss.model._orig_mod is trainer.model


def test_an_adapter_alone_is_trained_and_saved(
    train: Callable[..., Any], encoder: Callable[[], Any], tmp_path: Path
) -> None:
    model = train("an adapter", losses).model
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("lora" in name for name in trained)
    model.save(str(tmp_path / "saved"), create_model_card=False)
    saved = encoder()
    saved.load_adapter(str(tmp_path / "saved"))
    texts = ["a cat sleeps on the roof"]
    adapted, plain = saved.encode(texts), encoder().encode(texts)
    assert adapted == pytest.approx(model.encode(texts), abs=1e-6)
    assert abs(adapted - plain).max() > 1e-3, "it learns"


@pytest.mark.parametrize("name", ["pairs", "rated"])
def test_a_resumed_run_goes_on_as_the_uninterrupted_one(
    name: str, encoder: Callable[[], Any], make_trainer: Callable[..., Any], logged: Callable[[Any], Any]
) -> None:
    """Also in a classifier, which is the loss's own, where the trainer is told to save it."""

    def run(model: Any, checkpoint: str | None = None) -> Any:
        loss = cached(losses, model) if name == "pairs" else losses.SoftmaxLoss(model, 384, num_labels=2)
        trainer = make_trainer(model, loss, name, save_strategy="steps", save_steps=2)
        if name == "rated":
            save_losses(trainer)
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer

    whole = run(encoder())
    other = encoder()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)  # so that nothing but the checkpoint can tell it the weights
    resumed = run(other, str(Path(whole.args.output_dir) / "checkpoint-2"))
    assert [entry["step"] for entry in logged(resumed)] == [1, 2, 3, 4, 4, 4]
    for ours, theirs in zip(logged(resumed)[:-1], logged(whole)[:-1], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)
    for a, b in zip(resumed.loss.parameters(), whole.loss.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    if name == "rated":
        with pytest.raises(InputError, match=r"has no loss\.safetensors, with what the loss owns: classifier\.weight"):
            OwnParameters(whole.loss, whole.model).load(whole.args.output_dir)
        of_three_classes = OwnParameters(losses.SoftmaxLoss(other, 384, num_labels=3), other)
        with pytest.raises(InputError, match=r"of another loss.*shapes of classifier\.weight, classifier\.bias"):
            of_three_classes.load(Path(whole.args.output_dir) / "checkpoint-2")


def test_the_card_of_a_saved_model_names_the_loss_of_each_data_set(
    encoder: Callable[[], Any], make_trainer: Callable[..., Any], tmp_path: Path
) -> None:
    """With its settings as the stock class shows them, and the citation and the tag of the class of its name."""
    model = encoder()
    trainer = make_trainer(model, one_for_each_set(losses, model), "all", max_steps=1)
    trainer.save_model(str(tmp_path / "saved"))
    card = (tmp_path / "saved" / "README.md").read_text(encoding="utf-8")
    for name, loss in one_for_each_set(losses, model).items():
        kind = type(loss)
        sections = [x for x in card.split("\n#### ") if x.startswith(f"{name}\n") and "* Loss:" in x]
        assert len(sections) == 2, "of the data set for training and of that for evaluation"
        for section in sections:
            assert f"* Loss: <code>{kind.__module__}.{kind.__qualname__}</code> with these parameters" in section
            settings = json.loads(section.split("```json\n")[1].split("```")[0])
            assert settings.keys() == loss.get_config_dict().keys()
        assert f"- loss:{kind.__name__}" in card
        assert loss.citation.strip() in card
