"""How the columns of a batch go through the model: in which forwards and with what features, held to the oracle."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tileloss.losses.columns import embed_columns

oracle = pytest.importorskip("sentence_transformers.base.losses.merged_forward")


class Spy(nn.Module):
    """A mean over token vectors under the mask, which notes the rows and the width of every forward."""

    def __init__(self, key: str = "input_ids") -> None:
        super().__init__()
        self.calls: list[tuple[int, ...]] = []
        self.key = key
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.tokens = nn.Embedding(50, 4, dtype=torch.double)

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        ids = features[self.key]
        self.calls.append(tuple(ids.shape))
        if "offsets" in features:
            offsets = [*features["offsets"].tolist(), len(ids)]
            rows = [self.tokens(ids[a:b]).mean(0) for a, b in pairwise(offsets)]
            return {"sentence_embedding": torch.stack(rows)}
        mask = features.get("attention_mask", torch.ones_like(ids))[..., None]
        features["sentence_embedding"] = (self.tokens(ids) * mask).sum(1) / mask.sum(1)
        return features


def text(rows: int, width: int, **more: Any) -> dict[str, Any]:
    ids = torch.randint(50, (rows, width))
    mask = (torch.arange(width) < torch.randint(1, width + 1, (rows, 1))).long()
    return {"input_ids": ids, "attention_mask": mask, **more}


def static(rows: int) -> dict[str, Any]:
    return {"input_ids": torch.randint(50, (3 * rows,)), "offsets": torch.arange(0, 3 * rows, 3)}


def without(features: dict[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in features.items() if k != key}


BATCHES: dict[str, tuple[list[dict[str, Any]], list[int]]] = {
    "two columns": ([text(4, 5), text(4, 5)], [4, 4]),
    "three columns": ([text(4, 5), text(4, 6), text(4, 6)], [4, 8]),
    "widths that differ": ([text(4, 5), text(4, 9), text(4, 3), text(4, 6)], [4, 12]),
    "a modality": ([text(4, 5, modality="text") for _ in range(3)], [4, 8]),
    "modalities that differ": ([text(4, 5, modality=m) for m in ("text", "text", "image")], [4, 4, 4]),
    "a prompt": ([text(4, 5, prompt_length=n) for n in (3, 2, 2)], [4, 8]),
    "prompts that differ": ([text(4, 5, prompt_length=n) for n in (2, 2, 3)], [4, 4, 4]),
    "a prompt as a tensor": ([text(4, 5, prompt_length=torch.tensor([2])) for _ in range(3)], [4, 8]),
    "prompts by row": ([text(4, 5, prompt_length=torch.full((4,), 2)) for _ in range(3)], [4, 8]),
    "prompts by row that differ": (
        [text(4, 5, prompt_length=torch.full((4,), n)) for n in (2, 2, 3)],
        [4, 4, 4],
    ),
    "keys that differ": ([text(4, 5), text(4, 5), without(text(4, 5), "attention_mask")], [4, 4, 4]),
    "row counts that differ": ([text(4, 5), text(4, 5), text(3, 5)], [4, 4, 3]),
    "no mask": ([without(text(4, 5), "attention_mask") for _ in range(3)], [4, 8]),
    "flattened sequences": ([text(4, 5, cu_seq_lens_q=torch.arange(5)) for _ in range(3)], [4, 4, 4]),
    "static tokens": ([static(4) for _ in range(3)], [12, 12, 12]),
    "floats of one width": ([text(4, 5, weights=torch.rand(4, 5)) for _ in range(3)], [4, 8]),
    "floats that need padding": ([text(4, w, weights=torch.rand(4, w)) for w in (5, 5, 6)], [4, 4, 4]),
    "a scalar tensor": ([text(4, 5, thing=torch.tensor(1)) for _ in range(3)], [4, 4, 4]),
    "rows that are not the batch's": ([text(4, 5, grid=torch.ones(6, 2)) for _ in range(3)], [4, 4, 4]),
    "further axes alike": ([text(4, w, image=torch.ones(4, w, 2, dtype=torch.long)) for w in (5, 5, 6)], [4, 8]),
    "further axes that differ": ([text(4, 5, image=torch.ones(4, 5, n)) for n in (2, 2, 3)], [4, 4, 4]),
    "dimensions that differ": ([text(4, 5, x=torch.ones(4, *n)) for n in ((), (), (1,))], [4, 4, 4]),
    "arrays": ([text(4, 5, x=np.ones(4)) for _ in range(3)], [4, 4, 4]),
    "tensor and none": ([text(4, 5, x=x) for x in (None, None, torch.ones(4))], [4, 4, 4]),
    "lists": ([text(4, 5, x=[1, 2]) for _ in range(3)], [4, 8]),
}


def copies(batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [dict(features) for features in batch]


@pytest.mark.parametrize("name", BATCHES)
def test_forwards_and_embeddings_are_the_oracles(name: str) -> None:
    batch, rows = BATCHES[name]
    ours, theirs = Spy(), Spy()
    found, expected = embed_columns(ours, copies(batch)), oracle.embed_columns(theirs, copies(batch))
    assert [shape[0] for shape in ours.calls] == rows
    assert ours.calls == theirs.calls
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    gradients = [
        torch.autograd.grad(torch.cat([x.sin() for x in embeddings]).sum(), model.tokens.weight)[0]
        for model, embeddings in ((ours, found), (theirs, expected))
    ]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["three columns", "widths that differ", "no mask"])
def test_one_forward_gives_what_each_column_alone_does(name: str) -> None:
    batch, _ = BATCHES[name]
    merged = embed_columns(Spy(), copies(batch))
    for found, features in zip(merged, copies(batch), strict=True):
        expected = Spy()(features)["sentence_embedding"]
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_features_that_are_merged_are_left_as_they_were() -> None:
    """A wrapper loss hands over the same dicts again: nothing in them may have changed but what the model wrote."""
    batch = copies(BATCHES["widths that differ"][0])
    before = [{key: value.clone() for key, value in features.items()} for features in batch]
    embed_columns(Spy(), batch)
    for features, original in zip(batch, before, strict=True):
        assert all(torch.equal(features[key], value) for key, value in original.items())
    assert [list(features) for features in batch[1:]] == [["input_ids", "attention_mask"]] * 3
    assert "sentence_embedding" in batch[0]


def test_separate_columns_keep_what_the_model_wrote() -> None:
    batch = copies(BATCHES["two columns"][0])
    embed_columns(Spy(), batch)
    assert all("sentence_embedding" in features for features in batch)


def test_the_oracles_wrappers_forbid_merging_here_too() -> None:
    batch, _ = BATCHES["three columns"]
    model = Spy()
    with oracle.column_merging_disabled():
        embed_columns(model, copies(batch))
    assert [shape[0] for shape in model.calls] == [4, 4, 4]
    embed_columns(model, copies(batch))
    assert [shape[0] for shape in model.calls[3:]] == [4, 8]


def test_any_iterable_of_any_length() -> None:
    batch, _ = BATCHES["three columns"]
    assert embed_columns(Spy(), []) == []
    assert len(embed_columns(Spy(), copies(batch)[:1])) == 1
    found: list[Tensor] = embed_columns(Spy(), iter(copies(batch)))
    assert [len(x) for x in found] == [4, 4, 4]


def test_an_empty_batch_has_columns() -> None:
    empty = [{"input_ids": torch.zeros(0, 3, dtype=torch.long)} for _ in range(3)]
    assert [tuple(x.shape) for x in embed_columns(Spy(), empty)] == [(0, 4)] * 3
