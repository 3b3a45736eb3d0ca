"""Every function under the transforms of torch.func, in batches that blocks would serve."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import tileloss
from tileloss import Guide, losses
from tileloss import functional as F
from tileloss.errors import BackendError, FallbackWarning

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


def rows() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(SIZE, WIDTH)


@pytest.fixture(autouse=True)
def nothing_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tileloss.backend, "_SMALL", {})
    monkeypatch.setattr(tileloss.backend, "_said", set())


@pytest.mark.filterwarnings("ignore::tileloss.errors.FallbackWarning")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_gradient_is_that_of_the_definition(name: str) -> None:
    function, x = FUNCTIONS[name], rows()
    leaf = x.clone().requires_grad_()
    with tileloss.use_backend("reference"):
        (expected,) = torch.autograd.grad(function(leaf), leaf)
    assert expected.norm() > 0
    torch.testing.assert_close(torch.func.grad(function)(x), expected)


@pytest.mark.filterwarnings("ignore::tileloss.errors.FallbackWarning")
def test_a_batch_of_batches_and_second_derivatives() -> None:
    x = rows().double()[:9, :3]
    docs = DOCS.double()[:9, :3]

    def loss(x: Tensor) -> Tensor:
        return F.contrastive_loss(x, docs)

    together = torch.func.vmap(loss)(torch.stack([x, 2 * x, -x]))
    torch.testing.assert_close(together, torch.stack([loss(x), loss(2 * x), loss(-x)]))
    hessian = torch.func.hessian(loss)(x)
    torch.testing.assert_close(hessian, torch.autograd.functional.hessian(loss, x))


def test_the_fallback_is_said_and_a_name_is_kept_to() -> None:
    with pytest.warns(FallbackWarning, match="'tiled' to the 'reference' backend: transforms of torch.func"):
        torch.func.grad(FUNCTIONS["contrastive"])(rows())
    with pytest.raises(BackendError, match=r"cannot run: transforms of torch\.func"), tileloss.use_backend("tiled"):
        torch.func.grad(FUNCTIONS["contrastive"])(rows())
    assert tileloss.backend.choose(rows()).backend == "tiled"


@pytest.mark.filterwarnings("ignore::tileloss.errors.FallbackWarning")
def test_a_loss_as_a_function_of_its_models_parameters() -> None:
    class Encoder(nn.Linear):
        def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:  # type: ignore[override]
            return {"sentence_embedding": super().forward(features["x"])}

    loss = losses.MultipleNegativesRankingLoss(Encoder(WIDTH, 5))
    columns = [{"x": rows()}, {"x": DOCS}]
    parameters = {name: value.detach() for name, value in loss.named_parameters()}
    found = torch.func.grad(lambda p: torch.func.functional_call(loss, p, (columns, None)))(parameters)
    loss(columns, None).backward()
    for name, parameter in loss.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)
