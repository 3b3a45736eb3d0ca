"""A call of every function, as a function of one matrix, in batches that blocks would serve."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tileloss import Guide
from tileloss import functional as F

SIZE, WIDTH = 300, 12
torch.manual_seed(0)
DOCS = torch.randn(SIZE, WIDTH)
WEIGHT = torch.randn(2, 3 * WIDTH)
LABELS = torch.arange(SIZE) // 4

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "contrastive": lambda x: F.contrastive_loss(x, DOCS, directions=("query_to_doc", "doc_to_query")),
    "guided": lambda x: F.contrastive_loss(x, DOCS, exclude=Guide(DOCS.flip(1), DOCS)),
    "matryoshka": lambda x: F.matryoshka_contrastive_loss(x, DOCS, dims=[WIDTH, 4]),
    "every triplet": lambda x: F.triplet_loss(x, LABELS, mining="all"),
    "hard triplets": lambda x: F.triplet_loss(x, LABELS, mining="hard"),
    "semi-hard triplets": lambda x: F.triplet_loss(x, LABELS, mining="semi_hard"),
    "hardest negatives": lambda x: F.hardest_negatives(x, DOCS).similarity.sum(),
    "distances": lambda x: F.pairwise_distance(x, DOCS).sum(),
    "similarities": lambda x: F.pairwise_similarity(x, DOCS).square().sum(),
    "paired similarities": lambda x: F.paired_similarity(x, DOCS).square().sum(),
    "paired distances": lambda x: F.paired_distance(x, DOCS).sum(),
    "prefix cosines": lambda x: F.prefix_cosines(x, DOCS, dims=[WIDTH, 4]).square().sum(),
    "pair classifier": lambda x: F.pair_logits(x, DOCS, WEIGHT).square().sum(),
    "ranking": lambda x: F.ranking_loss(x[:, 0], LABELS.float()),
    "dispersion": lambda x: sum(F.dispersion(x), torch.zeros(())),
}


@pytest.fixture(params=FUNCTIONS)
def function(request: pytest.FixtureRequest) -> Callable[[Tensor], Tensor]:
    """Every function of `tileloss.functional` in turn."""
    return FUNCTIONS[request.param]


@pytest.fixture
def rows() -> Tensor:
    """What the functions take."""
    torch.manual_seed(1)
    return torch.randn(SIZE, WIDTH)


@pytest.fixture
def docs() -> Tensor:
    """What contrastive ones compare it with."""
    return DOCS
