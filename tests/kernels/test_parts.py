"""A part of a batch goes through the Triton passes as it goes through those in PyTorch."""

import pytest
import torch
from torch import Tensor

from tileloss import tiled
from tileloss.guide import Guide
from tileloss.kernels import TritonPasses
from tileloss.spec import DIRECTIONS, ContrastiveSpec
from tileloss.tiled import Needs, Passes
from tileloss.tiled.part import Part

SIZE, FIRST, COUNT, WIDTH = 40, 9, 17, 6
CROSS = ("query_to_doc", "doc_to_query")


class Middle(Part):
    """Some rows of a batch, the others of which are made up: the same for every call."""

    is_whole = False

    def __init__(self) -> None:
        super().__init__(SIZE)
        self.first, self.last, self.processes = FIRST, FIRST + COUNT, 3

    def total(self, docs: int) -> int:
        return docs // COUNT * SIZE

    def gathered(self, x: Tensor) -> Tensor:
        torch.manual_seed(len(x))
        columns = len(x) // COUNT
        if not x.is_floating_point():
            out = torch.randint(0, 20, (columns * SIZE,), device="cpu").to(x.device, x.dtype)
        else:
            out = torch.randn(columns * SIZE, *x.shape[1:], device="cpu").to(x.device, x.dtype) * x.float().std().to(x)
        for column, rows in zip(out.split(SIZE), x.split(COUNT), strict=True):
            column[self.rows] = rows
        return out

    def own(self, x: Tensor) -> Tensor:
        return torch.cat([column[self.rows] for column in x.split(SIZE)])

    def returned(self, dx: Tensor) -> Tensor:
        return self.own(dx)


class Ring(Part):
    """All rows of a batch, whose columns go round a ring of one."""

    is_whole = False
    is_ring = True


@pytest.mark.parametrize("part", [Middle(), Ring(COUNT)], ids=["middle", "ring"])
@pytest.mark.parametrize(
    ("directions", "partition", "hardness"),
    [
        (DIRECTIONS[:1], "joint", None),
        (CROSS, "per_direction", None),
        (DIRECTIONS, "joint", "all_negatives"),
        (("query_to_doc", "query_to_query", "doc_to_doc"), "joint", "hard_negatives"),
    ],
)
def test_a_part_without_a_guide(
    directions: tuple[str, ...],
    partition: str,
    hardness: str | None,
    part: Part,
    device: torch.device,
    poisoned_empty: None,
) -> None:
    compare(ContrastiveSpec("cosine", directions, partition, hardness, 1.5), part, device, with_guide=False)


@pytest.mark.parametrize("directions", [("query_to_doc",), ("query_to_doc", "query_to_query", "doc_to_doc")])
def test_a_part_with_a_guide(directions: tuple[str, ...], device: torch.device, poisoned_empty: None) -> None:
    """The queries stay those of the part, and so query_to_query has fewer columns than the others."""
    compare(ContrastiveSpec("torch_cosine", directions), Middle(), device, with_guide=True)


def compare(spec: ContrastiveSpec, part: Part, device: torch.device, with_guide: bool) -> None:
    torch.manual_seed(0)
    queries, docs, guide_queries, guide_docs = (
        torch.randn(rows, WIDTH, device=device) for rows in (COUNT, 2 * COUNT, COUNT, 2 * COUNT)
    )
    ids = None if with_guide else torch.arange(2 * COUNT, device=device) % 11
    guide = Guide(guide_queries, guide_docs, 0.1) if with_guide else None
    found, expected = (
        tiled.contrastive_loss(
            queries, docs, 4.0, spec, ids, None, Needs(True, True, True), guide, passes_class=passes, part=part
        )
        for passes in (TritonPasses, Passes)
    )
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-6)
