"""The measures: ranks of retrieval and labels of neighbours, with ties, values that are no numbers, repeated texts."""

import pytest
import torch
import torch.nn.functional as F

from tileloss import evaluation
from tileloss.errors import InputError, ShapeError
from tileloss.evaluation import LabelTask, RetrievalTask, label_metrics, retrieval_metrics, retrieval_ranks
from tileloss.similarity import SIMILARITIES, dot_score


def _diagonal(size):
    return torch.arange(size)[:, None].expand(size, 2)


def test_ranks_do_not_depend_on_the_blocks(monkeypatch):
    torch.manual_seed(0)
    q, d = torch.randn(37, 8), torch.randn(50, 8)
    relevant = torch.tensor([(i, j) for i in range(37) for j in (i, (i * 7) % 50) if j % 3 or j == i])
    whole = retrieval_ranks(q, d, relevant)
    monkeypatch.setattr(evaluation, "BLOCK_ELEMENTS", 5 * 50)
    assert torch.equal(retrieval_ranks(q, d, relevant[torch.randperm(len(relevant))]), whole)
    scores = F.normalize(q) @ F.normalize(d).T
    for i in range(37):
        own = {int(j) for row, j in relevant if row == i}
        best = max(scores[i, j] for j in own)
        assert whole[i] == 1 + sum(bool(scores[i, j] > best) for j in range(50) if j not in own)


def test_a_collapsed_model_is_ranked_in_the_middle():
    same = torch.ones(101, 4)
    assert retrieval_ranks(same, same, _diagonal(101)).tolist() == [51.0] * 101
    assert retrieval_metrics(retrieval_ranks(same, same, _diagonal(101)))["recall@10"] == 0


def test_values_that_are_no_numbers_rank_last():
    torch.manual_seed(0)
    q, d = torch.randn(20, 4), torch.randn(20, 4)
    broken = q.clone()
    broken[3] = torch.nan
    ranks = retrieval_ranks(broken, d, _diagonal(20))
    assert ranks[3] == 21
    assert torch.equal(ranks[4:], retrieval_ranks(q, d, _diagonal(20))[4:])
    d[5] = torch.nan
    assert retrieval_ranks(q, d, _diagonal(20))[5] == 21


def test_repeated_texts_are_one_candidate_and_one_query():
    datasets = pytest.importorskip("datasets")
    rows = [("q", "a", "x"), ("q", "b", "a"), ("r", "a", "x"), ("q", "a", "y")]
    dataset = datasets.Dataset.from_list(
        [dict(zip(("anchor", "positive", "negative"), row, strict=True)) for row in rows]
    )
    task = RetrievalTask.from_dataset(dataset, ("anchor", "positive", "negative"))
    assert (task.queries, task.documents) == (["q", "r"], ["a", "b", "x", "y"])
    assert task.relevant.tolist() == [[0, 0], [0, 1], [1, 0]]
    # q is nearest to x, then to its positives b and a; r to b, which is none of its positives, then to a
    documents = torch.tensor([[0.5, 0.4], [0.6, 0.5], [0.9, 0.1], [0.0, 0.0]])
    ranks = retrieval_ranks(torch.eye(2), documents, task.relevant, dot_score)
    assert ranks.tolist() == [2.0, 2.0]


def test_metrics_are_those_of_the_definition():
    metrics = retrieval_metrics(torch.tensor([1.0, 1.5, 10.0, 11.0]))
    assert metrics == pytest.approx({"recall@1": 0.25, "recall@10": 0.75, "mrr@10": (1 + 1 / 1.5 + 0.1) / 4})
    with pytest.raises(InputError, match="no query"):
        retrieval_metrics(torch.empty(0))
    with pytest.raises(ShapeError, match="relevant"):
        retrieval_ranks(torch.ones(2, 3), torch.ones(2, 3), torch.tensor([[0, 0]]))
    with pytest.raises(ShapeError, match="Expected"):
        retrieval_ranks(torch.ones(2, 3), torch.ones(2, 4), _diagonal(2))


def _brute_label_metrics(embeddings, labels, groups, similarity):
    """accuracy@1 and MAP@R text by text, for similarities without ties."""
    scores = similarity(embeddings, embeddings)
    hits, precisions = [], []
    for i in range(len(labels)):
        candidates = [j for j in range(len(labels)) if groups[j] != groups[i]]
        count = sum(bool(labels[j] == labels[i]) for j in candidates)
        if not count:
            continue
        ranked = sorted(candidates, key=lambda j: -scores[i, j].item())
        same = [bool(labels[j] == labels[i]) for j in ranked[:count]]
        hits.append(same[0])
        precisions.append(sum(sum(same[: k + 1]) / (k + 1) for k in range(count) if same[k]) / count)
    return {
        "accuracy@1": sum(hits) / len(hits), "map@r": sum(precisions) / len(precisions), "queries": len(hits)
    }  # fmt: skip


# far apart, every Euclidean similarity is a large negative number: none may fall below what stands for no candidate
@pytest.mark.parametrize("spread", [1, 1e6])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("name", ["cosine", "euclidean"])
def test_labels_of_neighbours_are_counted_by_the_definition_whatever_the_blocks(monkeypatch, grouped, name, spread):
    torch.manual_seed(0)
    labels = torch.tensor([5, 5, 9, 9, 9, -1, 7, 7, 7, 7, *[3] * 30])
    embeddings = spread * (torch.randn(40, 6, dtype=torch.float64) + labels[:, None] / 9)
    groups = torch.randint(12, (40,)) if grouped else torch.arange(40)
    similarity = SIMILARITIES[name]
    expected = _brute_label_metrics(embeddings, labels, groups, similarity)
    assert 0.1 < expected["map@r"] < 0.9
    assert expected["queries"] <= 39, "the label of a single text is not asked for"
    given = groups if grouped else None
    assert label_metrics(embeddings, labels, given, similarity) == pytest.approx(expected)
    monkeypatch.setattr(evaluation, "BLOCK_ELEMENTS", 7 * 40)
    assert label_metrics(embeddings, labels, given, similarity) == pytest.approx(expected)


def test_neighbours_agree_with_pytorch_metric_learning():
    calculators = pytest.importorskip("pytorch_metric_learning.utils.accuracy_calculator")
    inference = pytest.importorskip("pytorch_metric_learning.utils.inference")
    distances = pytest.importorskip("pytorch_metric_learning.distances")
    torch.manual_seed(1)
    labels = torch.arange(90) % 7
    embeddings = torch.randn(90, 8, dtype=torch.float64) + labels[:, None].double().sin()
    knn = inference.CustomKNN(distances.CosineSimilarity())
    theirs = calculators.AccuracyCalculator(
        include=("precision_at_1", "mean_average_precision_at_r"), knn_func=knn, device=torch.device("cpu")
    ).get_accuracy(embeddings, labels)
    ours = label_metrics(embeddings, labels)
    assert ours["accuracy@1"] == pytest.approx(theirs["precision_at_1"])
    assert ours["map@r"] == pytest.approx(theirs["mean_average_precision_at_r"])


def test_a_collapsed_model_finds_a_label_as_often_as_chance():
    labels = torch.tensor([0] * 3 + [1] * 8)
    accuracy = label_metrics(torch.ones(11, 4), labels)["accuracy@1"]
    assert accuracy == pytest.approx((3 * 2 / 10 + 8 * 7 / 10) / 11)


def test_values_that_are_no_numbers_are_nobodys_neighbours():
    embeddings = torch.tensor([[1.0, 0.0], [1.0, 0.1], [torch.nan, 0.0], [0.0, 1.0], [0.1, 1.0]])
    measured = label_metrics(embeddings, torch.tensor([0, 0, 0, 1, 1]))
    assert measured["accuracy@1"] == pytest.approx(4 / 5)
    assert measured["queries"] == 5


def test_labels_need_a_neighbour_and_fitting_shapes():
    with pytest.raises(InputError, match="outside its own group"):
        label_metrics(torch.eye(3), torch.tensor([0, 0, 1]), torch.tensor([4, 4, 5]))
    with pytest.raises(ShapeError, match=r"\(N,\) labels"):
        label_metrics(torch.eye(3), torch.tensor([0, 0]))


def test_a_label_task_has_each_text_once():
    datasets = pytest.importorskip("datasets")
    rows = {"text": ["a", "b", "a", "c"], "label": [3, 4, 5, 3], "file": ["x", "y", "z", "x"]}
    dataset = datasets.Dataset.from_dict(rows)
    task = LabelTask.from_dataset(dataset, "text", "label", "file")
    assert task.texts == ["a", "b", "c"]
    assert task.labels.tolist() == [3, 4, 3]
    assert task.groups[0] == task.groups[2] != task.groups[1]
    assert LabelTask.from_dataset(dataset, "text", "label").groups.unique().numel() == 3
    with pytest.raises(InputError, match="no column 'folder' of groups, only text, label, file"):
        LabelTask.from_dataset(dataset, "text", "label", "folder")
