"""The trainer: what it hands to the loss, what it logs, evaluates, saves and resumes."""

from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tileloss.errors import InputError
from tileloss.evaluation import LabelTask, RetrievalTask, label_metrics
from tileloss.losses import GlobalOrthogonalRegularizationLoss, MultipleNegativesRankingLoss
from tileloss.similarity import SIMILARITIES, dot_score

transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")

from tileloss.data import Labelled  # noqa: E402
from tileloss.encoder import Encoder, StaticEncoder, TransformerEncoder  # noqa: E402
from tileloss.own_parameters import LOSS_FILE  # noqa: E402
from tileloss.tokenizer import learn_tokenizer  # noqa: E402
from tileloss.trainer import EmbeddingTrainer, PairCollator  # noqa: E402


# anchors and positives share no word: what is retrieved was learned
def _word(number, letters):
    return letters[number // 7] + letters[number % 7] * 2


PAIRS = datasets.Dataset.from_list(
    [{"anchor": _word(i, "abcdefg"), "positive": _word(i, "tuvwxyz")} for i in range(48)]
)
TOKENIZER = learn_tokenizer([*PAIRS["anchor"], *PAIRS["positive"]] * 2, 500)


def _encoder():
    torch.manual_seed(0)
    return StaticEncoder(TOKENIZER, dimension=24, max_length=8)


def _arguments(folder, **changes):
    defaults = {
        "output_dir": str(folder), "per_device_train_batch_size": 16, "learning_rate": 0.1, "num_train_epochs": 4,
        "logging_steps": 3, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True,
    }  # fmt: skip
    return transformers.TrainingArguments(**(defaults | changes))


def _trainer(folder, encoder=None, loss=None, **changes):
    encoder = encoder or _encoder()
    loss = loss or MultipleNegativesRankingLoss(encoder)
    return EmbeddingTrainer(encoder, _arguments(folder, **changes), loss, PAIRS, PAIRS)


def _learnable(encoder):
    return MultipleNegativesRankingLoss(encoder, scale=nn.Parameter(torch.tensor(5.0)))


def test_collator_keeps_the_order_of_columns_and_makes_plain_dicts():
    encoder = _encoder()
    rows = [{"negative": "n", "anchor": "q1", "positive": "d1", "label": 4}, {"negative": "m", "anchor": "q2", "positive": "d2", "label": 5}]  # fmt: skip  # noqa: E501
    batch = PairCollator(encoder.preprocess, ("anchor", "positive", "negative"), "label")(rows)
    assert batch["labels"].tolist() == [4, 5]
    assert all(type(features) is dict for features in batch["features"])
    for features, column in zip(batch["features"], ("anchor", "positive", "negative"), strict=True):
        expected = encoder.preprocess([row[column] for row in rows])
        assert torch.equal(features["input_ids"], expected["input_ids"])
    assert "labels" not in PairCollator(encoder.preprocess, ("anchor", "positive"))(rows)


def test_training_learns_and_evaluation_shows_it(tmp_path):
    trainer = _trainer(tmp_path, num_train_epochs=12)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert before["eval_recall@1"] < 0.2
    assert after["eval_recall@1"] > 0.9
    assert after["eval_candidates"] == 48


def test_labels_and_all_columns_reach_the_loss(tmp_path):
    seen = []

    class Spy(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, features, labels):
            seen.append((len(features), labels.tolist()))
            return sum(self.model(column)["sentence_embedding"].sum() for column in features)

    rows = PAIRS.add_column("label", list(range(48))).add_column("number", [1.5] * 48)
    encoder = _encoder()
    trainer = EmbeddingTrainer(
        encoder, _arguments(tmp_path, max_steps=3), Spy(encoder), rows, text_columns=("anchor", "positive")
    )
    trainer.train()
    assert [columns for columns, _ in seen] == [2, 2, 2]
    assert sorted(label for _, labels in seen for label in labels) == list(range(48))


def test_accumulated_batches_average_their_gradients(tmp_path):
    class WithOptions(StaticEncoder):
        # the Trainer takes such a model for one that is told how many labels the accumulated batches have
        def forward(self, features, **options):
            return super().forward(features)

    class Mean(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, features, labels):
            return self.model(features[0])["sentence_embedding"].mean()

    weights = []
    for batch, accumulated in ((16, 1), (4, 4)):
        torch.manual_seed(0)
        encoder = WithOptions(TOKENIZER, dimension=24, max_length=8)
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated}
        arguments = _arguments(tmp_path, max_steps=1, optim="sgd", **sizes)
        labelled = PAIRS.add_column("label", list(range(48)))
        EmbeddingTrainer(encoder, arguments, Mean(encoder), labelled).train()
        weights.append(encoder.embeddings.weight.detach())
    torch.testing.assert_close(*weights)


def test_statistics_are_averaged_over_the_logging_interval(tmp_path):
    class Stats(NamedTuple):
        accuracy: torch.Tensor

    class Counting(MultipleNegativesRankingLoss):
        calls = 0

        def forward(self, features, labels=None):
            loss = super().forward(features, labels)
            self.calls += 1
            self.stats = Stats(torch.tensor(float(self.calls)))
            return loss

    encoder = _encoder()
    trainer = _trainer(tmp_path, encoder, Counting(encoder), num_train_epochs=2)
    trainer.train()
    logged = [record["accuracy"] for record in trainer.state.log_history if "accuracy" in record]
    assert logged == [2.0, 5.0], "means of 1, 2, 3 and of 4, 5, 6"
    evaluated = trainer.evaluate()
    assert "accuracy" not in evaluated


def test_the_real_statistics_are_logged_beside_the_loss(tmp_path):
    trainer = _trainer(tmp_path)
    trainer.train()
    records = [record for record in trainer.state.log_history if "loss" in record]
    assert len(records) == 4
    for record in records:
        assert {"accuracy", "positive_similarity", "hardest_negative_similarity"} <= record.keys()
    assert records[-1]["accuracy"] > records[0]["accuracy"]


def test_a_loss_may_give_its_terms_by_name(tmp_path):
    """The spread of the texts: the terms are summed, trained, and logged by their names."""
    encoder = _encoder()
    trainer = _trainer(tmp_path, encoder, GlobalOrthogonalRegularizationLoss(encoder, mean_weight=10.0))
    trainer.train()
    records = [record for record in trainer.state.log_history if "loss" in record]
    for record in records:
        assert record["gor_mean"] + record["gor_second_moment"] == pytest.approx(record["loss"], abs=1e-4)
    assert records[-1]["loss"] < 0.9 * records[0]["loss"]


def test_a_temperature_of_the_loss_is_trained_with_fresh_gradients_each_step(tmp_path):
    # the model is frozen and every batch is the whole set, so that every gradient is nearly the first one
    scales = [5.0]
    for steps in (1, 2, 3):
        encoder = _encoder().requires_grad_(False)
        loss = _learnable(encoder)
        _trainer(
            tmp_path, encoder, loss, max_steps=steps, per_device_train_batch_size=48, optim="sgd", learning_rate=1e-3,
            lr_scheduler_type="constant", weight_decay=10.0, max_grad_norm=0,
        ).train()  # fmt: skip
        scales.append(loss.scale.item())
    first, second, third = (after - before for before, after in pairwise(scales))
    assert first != 0
    assert second == pytest.approx(first, rel=0.01), "gradients that are left would make it twice as large"
    assert third == pytest.approx(first, rel=0.01)


@pytest.mark.parametrize("make_loss", [MultipleNegativesRankingLoss, _learnable])
def test_a_resumed_run_ends_where_the_whole_run_ends(tmp_path, make_loss):
    def run(folder, **changes):
        encoder = _encoder()
        loss = make_loss(encoder)
        trainer = _trainer(folder, encoder, loss, save_strategy="steps", save_steps=5, lr_scheduler_type="constant", **changes)  # fmt: skip  # noqa: E501
        return trainer, encoder, loss

    whole, whole_encoder, whole_loss = run(tmp_path / "whole", max_steps=9)
    whole.train()
    resumed, encoder, loss = run(tmp_path / "resumed", max_steps=9)
    with torch.no_grad():
        encoder.embeddings.weight.zero_()  # what counts must come from the checkpoint
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert torch.equal(encoder.embeddings.weight, whole_encoder.embeddings.weight)
    assert torch.equal(torch.as_tensor(loss.scale), torch.as_tensor(whole_loss.scale))
    assert (tmp_path / "whole" / "checkpoint-5" / LOSS_FILE).exists() is (make_loss is _learnable)
    assert not list((tmp_path / "whole" / "checkpoint-5").glob("training_args.bin"))
    checkpoint = Encoder.from_pretrained(tmp_path / "whole" / "checkpoint-5")
    assert checkpoint.encode(["abb"]).shape == (1, 24)


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path):
    trainer = _trainer(
        tmp_path, eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True, num_train_epochs=3,
        metric_for_best_model="eval_recall@1", greater_is_better=False,
    )  # fmt: skip
    trainer.train()
    recalls = [record["eval_recall@1"] for record in trainer.state.log_history if "eval_recall@1" in record]
    assert min(recalls) < max(recalls)
    assert trainer.evaluate()["eval_recall@1"] == min(recalls)


def test_two_runs_with_one_seed_are_equal_and_with_another_differ(tmp_path):
    weights = []
    for seed in (1, 1, 2):
        encoder = _encoder()
        _trainer(tmp_path, encoder, seed=seed).train()
        weights.append(encoder.embeddings.weight.detach().clone())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_evaluation_ranks_by_the_similarity_of_the_loss(tmp_path):
    encoder = _encoder()
    with torch.no_grad():
        encoder.embeddings.weight[TOKENIZER("vuu")["input_ids"]] *= 100
    recalls = [
        _trainer(tmp_path, encoder, MultipleNegativesRankingLoss(encoder, similarity_fct=fct)).evaluate()[
            "eval_mrr@10"
        ]
        for fct in (MultipleNegativesRankingLoss(encoder).similarity_fct, dot_score)
    ]
    task = RetrievalTask.from_dataset(PAIRS, ("anchor", "positive"))
    q, d = encoder.encode(task.queries), encoder.encode(task.documents)
    for recall, scores in zip(recalls, (F.normalize(q) @ F.normalize(d).T, q @ d.T), strict=True):
        ranks = (scores > scores.diag()[:, None]).sum(1) + 1
        assert recall == pytest.approx(torch.where(ranks <= 10, 1 / ranks, 0).mean().item(), abs=1e-6)
    assert recalls[0] != recalls[1]


def test_several_evaluation_sets_are_evaluated_by_name(tmp_path):
    encoder = _encoder()
    parts = {"first": PAIRS.select(range(10)), "rest": PAIRS.select(range(10, 48))}
    trainer = EmbeddingTrainer(encoder, _arguments(tmp_path), MultipleNegativesRankingLoss(encoder), PAIRS, parts)
    metrics = trainer.evaluate()
    assert (metrics["eval_first_candidates"], metrics["eval_rest_candidates"]) == (10, 38)
    assert trainer.evaluate("first")["eval_candidates"] == 10


def test_a_transformer_trains_and_its_saved_model_is_the_trained_one(tmp_path):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(TOKENIZER), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        hidden_dropout_prob=0.0,
    )  # fmt: skip
    encoder = TransformerEncoder(transformers.BertModel(config), TOKENIZER)
    start = encoder.encode(["abb"])
    trainer = _trainer(tmp_path, encoder, learning_rate=1e-2, max_steps=3)
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    loaded = Encoder.from_pretrained(tmp_path / "model").encode(["abb"])
    assert torch.equal(loaded, encoder.encode(["abb"]))
    assert not torch.allclose(loaded, start)


class _Bag(nn.Module):
    """A model of the user's own: no preprocess, no save_pretrained."""

    def __init__(self):
        super().__init__()
        self.bag = nn.EmbeddingBag(128, 8)

    def forward(self, features):
        return {"sentence_embedding": self.bag(features["codes"])}


def _codes(texts):
    return {"codes": torch.tensor([[*map(ord, text.ljust(12))] for text in texts])}


def test_a_module_of_your_own_trains_with_a_preprocess_function_and_resumes(tmp_path):
    def run(**changes):
        torch.manual_seed(0)
        model = _Bag()
        arguments = _arguments(tmp_path, save_strategy="steps", save_steps=2, max_steps=4, **changes)
        return model, EmbeddingTrainer(
            model, arguments, MultipleNegativesRankingLoss(model), PAIRS, preprocess=_codes
        )  # fmt: skip

    model, trainer = run()
    trainer.train()
    again, trainer = run()
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(again.bag.weight, model.bag.weight)
    with pytest.raises(InputError, match="preprocess"):
        EmbeddingTrainer(model, _arguments(tmp_path), MultipleNegativesRankingLoss(model), PAIRS)


def test_a_sentence_transformer_trains_saves_and_resumes(tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    def run():
        torch.manual_seed(0)
        module = StaticEmbedding(TOKENIZER.backend_tokenizer, embedding_dim=8)
        model = sentence_transformers.SentenceTransformer(modules=[module], device="cpu")
        return model, _trainer(tmp_path, model, save_strategy="steps", save_steps=2, max_steps=4)

    model, trainer = run()
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    loaded = sentence_transformers.SentenceTransformer(str(tmp_path / "model"), device="cpu")
    texts = PAIRS["anchor"][:3]
    assert (loaded.encode(texts) == model.encode(texts)).all()
    again, trainer = run()
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert (again.encode(texts) == model.encode(texts)).all()


def test_a_wrapped_model_takes_the_place_of_the_plain_one_in_the_loss(tmp_path):
    class Wrapped(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module
            self.calls = 0

        def forward(self, features):
            self.calls += 1
            return self.module(features)

    encoder = _encoder()
    trainer = _trainer(tmp_path, encoder)
    wrapped = Wrapped(encoder)
    batch = trainer.data_collator([PAIRS[i] for i in range(4)])
    expected = trainer.compute_loss(encoder, batch)
    assert torch.equal(trainer.compute_loss(wrapped, batch), expected)
    assert wrapped.calls == 2


def test_mistakes_are_refused_before_training(tmp_path):
    encoder = _encoder()
    loss = MultipleNegativesRankingLoss(encoder)
    with pytest.raises(InputError, match="does not hold the model"):
        EmbeddingTrainer(_encoder(), _arguments(tmp_path), loss, PAIRS)
    with pytest.raises(InputError, match="less than one batch"):
        EmbeddingTrainer(
            encoder, _arguments(tmp_path, per_device_train_batch_size=64, dataloader_drop_last=True), loss, PAIRS
        )
    with pytest.raises(InputError, match="two text columns"):
        EmbeddingTrainer(encoder, _arguments(tmp_path), loss, PAIRS.select_columns(["anchor"]))
    with pytest.raises(InputError, match="no dataset to evaluate"):
        EmbeddingTrainer(encoder, _arguments(tmp_path), loss, PAIRS).evaluate()


# a text is one word of its label's own and one of its number: what is nearest before training is the number's
LABELLED = datasets.Dataset.from_list(
    [
        {"text": f"{_word(i % 6, 'abcdefg')} {_word(i // 6, 'tuvwxyz')}", "label": i % 6, "file": i // 6}
        for i in range(54)
    ]
)


class _Mining(nn.Module):
    """Batch-hard on cosine distances in a few lines, with what a test wants to know of its batches."""

    def __init__(self, model):
        super().__init__()
        self.sentence_embedder = model
        self.batches = []

    def forward(self, features, labels):
        (column,) = features
        embeddings = F.normalize(self.sentence_embedder(column)["sentence_embedding"])
        self.batches.append((column["input_ids"].sum(1).tolist(), labels.tolist()))
        distances = 1 - embeddings @ embeddings.T
        same = labels[:, None] == labels
        farthest = (distances * same).amax(1)
        nearest = (distances + 4.0 * same).amin(1)
        return F.softplus(4 * (farthest - nearest)).mean()


def _labelled_trainer(folder, encoder=None, dataset=LABELLED, group_column=None, **changes):
    encoder = encoder or _encoder()
    arguments = _arguments(folder, **({"per_device_train_batch_size": 12, "dataloader_drop_last": True} | changes))
    return EmbeddingTrainer(
        encoder, arguments, _Mining(encoder), dataset, dataset, text_columns=("text",),
        labelled=Labelled(per_label=4, group_column=group_column),
    )  # fmt: skip


def test_labelled_batches_hold_pairs_of_a_label_and_epochs_differ(tmp_path):
    trainer = _labelled_trainer(tmp_path, num_train_epochs=3)
    trainer.train()
    batches = trainer.loss.batches
    assert len(batches) == 3 * 4, "48 of 54 texts: one of nine is left out for each label, for an even number"
    for _, labels in batches:
        assert all(labels.count(label) >= 2 for label in labels)
        assert len(set(labels)) >= 2
    first, second = batches[:4], batches[4:8]
    assert first != second


def test_training_on_labels_brings_them_together_and_evaluation_shows_it(tmp_path):
    trainer = _labelled_trainer(tmp_path, num_train_epochs=12)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert before["eval_accuracy@1"] < 0.7
    assert after["eval_accuracy@1"] > 0.9
    assert after["eval_map@r"] > before["eval_map@r"]
    assert after["eval_candidates"] == 54


def test_neighbours_are_looked_for_outside_the_group(tmp_path):
    encoder = _encoder()
    embeddings = encoder.encode(LABELLED["text"])
    measured = []
    for group_column in (None, "file"):
        trainer = _labelled_trainer(tmp_path, encoder, group_column=group_column)
        task = LabelTask.from_dataset(LABELLED, "text", "label", group_column)
        expected = label_metrics(embeddings, task.labels, task.groups)
        metrics = trainer.evaluate()
        assert {name: metrics[f"eval_{name}"] for name in expected} == pytest.approx(expected)
        measured.append(metrics["eval_accuracy@1"])
    assert measured[0] != measured[1]


def test_neighbours_are_ranked_by_the_distance_of_the_loss(tmp_path):
    def euclidean_distance(embeddings):
        return torch.cdist(embeddings, embeddings)

    encoder = _encoder()
    with torch.no_grad():
        encoder.embeddings.weight.mul_(torch.rand(len(TOKENIZER), 1).exp().square())
    trainer = _labelled_trainer(tmp_path, encoder)
    cosine = trainer.evaluate()["eval_map@r"]
    trainer.loss.distance_metric = euclidean_distance
    euclidean = trainer.evaluate()["eval_map@r"]
    embeddings = encoder.encode(LABELLED["text"])
    labels = torch.tensor(LABELLED["label"])
    assert cosine == pytest.approx(label_metrics(embeddings, labels)["map@r"])
    assert euclidean == pytest.approx(label_metrics(embeddings, labels, None, SIMILARITIES["euclidean"])["map@r"])
    assert cosine != euclidean


@pytest.mark.parametrize("step", [4, 6])
def test_a_resumed_labelled_run_draws_the_batches_that_were_left(tmp_path, step):
    def run(folder):
        return _labelled_trainer(folder, save_strategy="steps", save_steps=step, lr_scheduler_type="constant", max_steps=11)  # fmt: skip  # noqa: E501

    whole = run(tmp_path / "whole")
    whole.train()
    resumed = run(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    assert resumed.loss.batches == whole.loss.batches[step:]
    assert torch.equal(resumed._loss_model.embeddings.weight, whole._loss_model.embeddings.weight)


def test_mistakes_with_labels_are_refused_before_training(tmp_path):
    for dataset, changes, message in [
        (LABELLED.remove_columns("label"), {}, "needs a column 'label'"),
        (LABELLED, {"per_device_train_batch_size": 52}, "48 rows are less than one batch of 52"),
        (LABELLED, {"per_device_train_batch_size": 13}, "even number"),
        (LABELLED, {"per_device_train_batch_size": 6}, "holds no two labels of 4 texts"),
        (LABELLED.filter(lambda row: row["label"] == 0), {}, "two labels with two examples"),
    ]:
        with pytest.raises(InputError, match=message):
            _labelled_trainer(tmp_path, dataset=dataset, **changes)
