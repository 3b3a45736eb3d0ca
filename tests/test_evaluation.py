"""The measure of retrieval: ranks, ties, values that are no numbers, repeated texts, and the metrics from them."""

import pytest
import torch
import torch.nn.functional as F

from tileloss import evaluation
from tileloss.errors import InputError, ShapeError
from tileloss.evaluation import RetrievalTask, retrieval_metrics, retrieval_ranks
from tileloss.similarity import dot_score


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
