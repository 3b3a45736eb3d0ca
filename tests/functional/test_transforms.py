"""Every function under the transforms of torch.func, in batches that blocks would serve."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import tileloss
from tileloss import functional as F
from tileloss import losses
from tileloss.errors import BackendError, FallbackWarning


@pytest.fixture(autouse=True)
def nothing_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tileloss.backend, "_SMALL", {})
    monkeypatch.setattr(tileloss.backend, "_said", set())


@pytest.mark.filterwarnings("ignore::tileloss.errors.FallbackWarning")
def test_the_gradient_is_that_of_the_definition(function: Callable[[Tensor], Tensor], rows: Tensor) -> None:
    leaf = rows.clone().requires_grad_()
    with tileloss.use_backend("reference"):
        (expected,) = torch.autograd.grad(function(leaf), leaf)
    assert expected.norm() > 0
    torch.testing.assert_close(torch.func.grad(function)(rows), expected)


@pytest.mark.filterwarnings("ignore::tileloss.errors.FallbackWarning")
def test_a_batch_of_batches_and_second_derivatives(rows: Tensor, docs: Tensor) -> None:
    x, docs = rows.double()[:9, :3], docs.double()[:9, :3]

    def loss(x: Tensor) -> Tensor:
        return F.contrastive_loss(x, docs)

    together = torch.func.vmap(loss)(torch.stack([x, 2 * x, -x]))
    torch.testing.assert_close(together, torch.stack([loss(x), loss(2 * x), loss(-x)]))
    hessian = torch.func.hessian(loss)(x)
    torch.testing.assert_close(hessian, torch.autograd.functional.hessian(loss, x))


def test_the_fallback_is_said_and_a_name_is_kept_to(rows: Tensor, docs: Tensor) -> None:
    def loss(x: Tensor) -> Tensor:
        return F.contrastive_loss(x, docs)

    with pytest.warns(FallbackWarning, match="'tiled' to the 'reference' backend: transforms of torch.func"):
        torch.func.grad(loss)(rows)
    with pytest.raises(BackendError, match=r"cannot run: transforms of torch\.func"), tileloss.use_backend("tiled"):
        torch.func.grad(loss)(rows)
    assert tileloss.backend.choose(rows).backend == "tiled"


@pytest.mark.filterwarnings("ignore::tileloss.errors.FallbackWarning")
def test_a_loss_as_a_function_of_its_models_parameters(rows: Tensor, docs: Tensor) -> None:
    class Encoder(nn.Linear):
        def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:  # type: ignore[override]
            return {"sentence_embedding": super().forward(features["x"])}

    loss = losses.MultipleNegativesRankingLoss(Encoder(rows.shape[1], 5))
    columns = [{"x": rows}, {"x": docs}]
    parameters = {name: value.detach() for name, value in loss.named_parameters()}
    found = torch.func.grad(lambda p: torch.func.functional_call(loss, p, (columns, None)))(parameters)
    loss(columns, None).backward()
    for name, parameter in loss.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)
