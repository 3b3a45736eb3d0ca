"""The masks of valid pairs and triplets are the oracle's, for labels of any kind, on every backend."""

import pytest
import torch
from sentence_transformers.sentence_transformer.losses import BatchHardTripletLoss
from torch import Tensor

from tileloss import errors
from tileloss.functional import TripletMasks, triplet_masks

LABELS = {
    "two classes": torch.tensor([0, 1, 0, 1, 1, 0, 0]),
    "one class": torch.zeros(5, dtype=torch.int32),
    "classes of one": torch.arange(6),
    "huge": torch.tensor([2**62, 2**62 + 1, -(2**62), 2**62]),
    "bytes": torch.tensor([255, 0, 255, 1], dtype=torch.uint8),
    "booleans": torch.tensor([True, False, True]),
    "floats": torch.tensor([0.5, 0.25, 0.5, -0.0, 0.0]),
    "halves": torch.tensor([0.5, 0.25, 0.5]).bfloat16(),
    "doubles": torch.tensor([1.0, 1.0 + 1e-15, 1.0], dtype=torch.float64),
    "infinite": torch.tensor([torch.inf, torch.inf, -torch.inf, 1.0]),
    "not a number": torch.tensor([torch.nan, 1.0, torch.nan, 1.0, 2.0]),
    "one row": torch.tensor([3]),
    "more than a tile": torch.arange(70) % 9,
}


def oracle(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    theirs = BatchHardTripletLoss
    return (
        theirs.get_anchor_positive_triplet_mask(labels),
        theirs.get_anchor_negative_triplet_mask(labels),
        theirs.get_triplet_mask(labels),
    )


@pytest.mark.parametrize("name", LABELS)
def test_the_oracle_has_the_same(name: str, backend: str) -> None:
    labels = LABELS[name]
    found = triplet_masks(labels, triplets=True)
    assert isinstance(found, TripletMasks)
    for field, ours, theirs in zip(found._fields, found, oracle(labels), strict=True):
        assert ours is not None
        assert ours.dtype == torch.bool
        assert torch.equal(ours, theirs), field


def test_triplets_only_on_request(backend: str) -> None:
    found = triplet_masks(LABELS["two classes"])
    assert found.triplet is None
    assert torch.equal(found.anchor_positive, oracle(LABELS["two classes"])[0])


def test_labels_of_any_strides_and_as_a_column(backend: str) -> None:
    labels = LABELS["two classes"]
    for given in (labels[:, None], labels.repeat_interleave(2)[::2], torch.stack([labels, labels], 1)[:, 0]):
        for ours, expected in zip(triplet_masks(given, triplets=True), oracle(labels), strict=True):
            assert torch.equal(ours, expected)


def test_no_labels(backend: str) -> None:
    found = triplet_masks(torch.empty(0, dtype=torch.int64), triplets=True)
    assert [x.shape for x in found if x is not None] == [(0, 0), (0, 0), (0, 0, 0)]


def test_the_masks_are_three_memories(backend: str) -> None:
    found = triplet_masks(torch.tensor([0, 0, 1]))
    found.anchor_positive.fill_(True)
    assert not found.anchor_negative.all()


def test_one_graph_under_compile(backend: str) -> None:
    labels = LABELS["two classes"]
    compiled = torch.compile(lambda x: triplet_masks(x, triplets=True), fullgraph=True, backend="aot_eager")
    for ours, expected in zip(compiled(labels), oracle(labels), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize(
    ("labels", "raised", "says"),
    [
        ([0, 1], errors.InputError, "got list"),
        (torch.tensor(1), errors.ShapeError, "shape"),
        (torch.zeros(3, 2), errors.ShapeError, r"\(3, 2\)"),
        (torch.zeros(3, dtype=torch.complex64), errors.DtypeError, "complex64"),
    ],
)
def test_errors(labels: object, raised: type[Exception], says: str) -> None:
    with pytest.raises(raised, match=says):
        triplet_masks(labels)  # type: ignore[arg-type]


def test_a_backend_that_cannot_run() -> None:
    with pytest.raises(errors.BackendError, match="Triton"):
        triplet_masks(torch.tensor([0, 1]), backend="triton")
