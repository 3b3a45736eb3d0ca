"""The ranking loss: over every backend the definition's value and gradient, no less exact."""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tileloss.errors import BackendError, DeviceError, DtypeError, InputError, ShapeError
from tileloss.functional import ranking_loss

SIZES = (1, 2, 63, 100, 257)
LABELS: dict[str, Callable[[int], Tensor]] = {
    "all different": lambda size: torch.rand(size),
    "few": lambda size: torch.randint(3, (size,)),
    "two": lambda size: torch.rand(size) < 0.3,
    "equal": lambda size: torch.full((size,), 0.5),
    "ascending": torch.arange,
    "descending": lambda size: -torch.arange(size).double(),
    "half precision": lambda size: torch.randint(5, (size, 1)).bfloat16(),
    "infinite": lambda size: torch.tensor([float("inf"), 0.0, -float("inf")]).repeat(size)[:size],
}


@pytest.fixture(params=["pair by pair", "sorted"], autouse=True)
def _form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test twice: with all sizes compared pair by pair, and with none."""
    few = importlib.import_module("tileloss.tiled.ranking").FEW_ROWS
    monkeypatch.setitem(few, "cpu", 10**6 if request.param == "pair by pair" else 0)


def batch(size: int, labels: str = "all different", dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Scores as cosines times 20 are, up to 20 in size."""
    torch.manual_seed(0)
    return (20 * (2 * torch.rand(size) - 1)).to(dtype), LABELS[labels](size)


def value_and_gradient(scores: Tensor, labels: Tensor, backend: str) -> list[Tensor]:
    scores = scores.detach().requires_grad_()
    loss = ranking_loss(scores, labels, backend=backend)
    return [loss.detach(), *torch.autograd.grad(3 * loss, scores)]


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("size", SIZES)
def test_sorting_agrees_with_the_definition(size: int, labels: str) -> None:
    inputs = batch(size, labels)
    for a, b in zip(*(value_and_gradient(*inputs, name) for name in ("tiled", "reference")), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("labels", ["all different", "few", "two"])
def test_as_exact_as_eager(dtype: torch.dtype, labels: str) -> None:
    for size in (*SIZES[2:], 1000):
        scores, order = batch(size, labels, dtype)
        truth = value_and_gradient(scores.double(), order, "reference")
        eager, found = (value_and_gradient(scores, order, name) for name in ("reference", "tiled"))
        assert [x.dtype for x in found] == [torch.float32, dtype]
        for part, slack in enumerate((1e-5, 1e-4)):
            errors = [((x[part].double() - truth[part]).norm() / truth[part].norm()).item() for x in (found, eager)]
            assert errors[0] <= 3 * errors[1] + slack, (part, size)


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
@pytest.mark.parametrize("size", [2, 100])
def test_no_score_is_too_large(size: int, offset: float, backend: str) -> None:
    """Differences of thousands, and scores whose exponentials overflow."""
    scores, labels = batch(size, dtype=torch.float32)
    scores = 200 * scores
    found = value_and_gradient(scores + offset, labels, backend)
    truth = value_and_gradient((scores + offset).double(), labels, "reference")
    assert all(x.isfinite().all() for x in found)
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-3, atol=1e-6)  # a thousandth is the last digit of 12000


def test_scores_that_rank_right_give_nothing(backend: str) -> None:
    loss, gradient = value_and_gradient(100 * torch.arange(9.0), torch.arange(9), backend)
    assert loss.item() < 1e-6
    assert gradient.norm() < 1e-6


def test_permutations_and_monotone_labels_change_nothing(backend: str) -> None:
    scores, labels = batch(100, "few")
    loss, gradient = value_and_gradient(scores, labels, backend)
    shuffle = torch.randperm(100)
    for other, place in ((labels, shuffle), (labels.double().exp(), torch.arange(100))):
        found = value_and_gradient(scores[place], other[place], backend)
        torch.testing.assert_close(found[0], loss)
        torch.testing.assert_close(found[1], gradient[place], rtol=1e-9, atol=1e-12)


def test_the_gradient_sums_to_zero_and_shifts_change_nothing(backend: str) -> None:
    scores, labels = batch(100)
    loss, gradient = value_and_gradient(scores, labels, backend)
    assert abs(gradient.sum().item()) < 1e-12
    torch.testing.assert_close(value_and_gradient(scores + 7, labels, backend)[0], loss)


def test_strides_do_not_matter(backend: str) -> None:
    scores, labels = batch(40)
    found = value_and_gradient(scores[::2], labels[::2], backend)
    for a, b in zip(found, value_and_gradient(scores[::2].clone(), labels[::2].clone(), backend), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(
        value_and_gradient(scores[:1].expand(9), labels[:9], backend),
        value_and_gradient(scores[:1].repeat(9), labels[:9], backend),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_an_empty_batch(backend: str) -> None:
    scores = torch.randn(0, requires_grad=True)
    loss = ranking_loss(scores, torch.randn(0))
    loss.backward()
    assert loss.item() == 0.0
    assert scores.grad is not None


def test_a_nan_score_is_seen(backend: str) -> None:
    scores, labels = batch(9)
    scores[4] = float("nan")
    assert ranking_loss(scores, labels).isnan()


@pytest.mark.parametrize("score", [float("nan"), float("inf"), float("-inf")])
def test_a_score_that_is_compared_with_none_does_not_count(score: float, backend: str) -> None:
    scores = torch.tensor([1.0, score, 2.0], requires_grad=True)
    loss = ranking_loss(scores, torch.ones(3))
    assert loss.item() == 0.0
    assert torch.autograd.grad(loss, scores)[0].tolist() == [0.0] * 3


def test_two_runs_give_the_same_bits() -> None:
    inputs = batch(5000, "few", torch.float32)
    first, second = (value_and_gradient(*inputs, "tiled") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_gradients_are_finite_differences(backend: str) -> None:
    scores, labels = batch(9, "few")
    scores = (scores / 10).requires_grad_()
    torch.autograd.gradcheck(lambda x: ranking_loss(x, labels), scores)
    torch.autograd.gradgradcheck(lambda x: ranking_loss(x, labels), scores)


def test_second_derivative_through_a_source(backend: str) -> None:
    """The gradient of scores that were computed from something reaches that once."""
    labels = batch(9, "few")[1]

    def derivatives(name: str) -> list[Tensor]:
        source = batch(9)[0].requires_grad_()
        loss = ranking_loss(source.tanh() * source.detach(), labels, backend=name)
        (first,) = torch.autograd.grad(loss, source, create_graph=True)
        return [first.detach(), *torch.autograd.grad(first.square().sum(), source)]

    for a, b in zip(derivatives(backend), derivatives("reference"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_retained_graph_gives_the_same_again(backend: str) -> None:
    scores, labels = batch(40)
    scores = scores.requires_grad_()
    loss = ranking_loss(scores, labels)
    first, second = (torch.autograd.grad(loss, scores, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("size", [64, 300])
def test_no_matrix_waits_for_the_backward(size: int) -> None:
    scores, labels = batch(size)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        ranking_loss(scores.requires_grad_(), labels)
    assert max(saved) == size


WRONG: list[tuple[type[Exception], tuple[Any, Any], dict[str, Any], str]] = [
    (InputError, ([1.0], torch.randn(1)), {}, "scores must be a tensor, got list"),
    (InputError, (torch.randn(1), [1.0]), {}, "labels must be a tensor with one number for each row, got list"),
    (ShapeError, (torch.randn(4, 1), torch.randn(4)), {}, r"scores must be a vector .*got shape \(4, 1\)"),
    (ShapeError, (torch.randn(4), torch.randn(3)), {}, r"There are 4 scores, so labels must have shape \(4,\)"),
    (ShapeError, (torch.randn(4), torch.randn(1, 4)), {}, r"got \(1, 4\)"),
    (DtypeError, (torch.ones(4).long(), torch.randn(4)), {}, "scores must hold floating-point numbers"),
    (DtypeError, (torch.randn(4), torch.randn(4) * 1j), {}, "labels must hold integers or floating-point numbers"),
    (DeviceError, (torch.randn(4), torch.empty(4, device="meta")), {}, "move them there"),
    (InputError, (torch.randn(2), torch.tensor([0.0, float("nan")])), {}, "labels hold nan"),
    (InputError, (torch.randn(4), torch.randn(4)), {"backend": "cuda"}, "must be 'auto' or one of"),
    (BackendError, (torch.randn(4).double(), torch.randn(4)), {"backend": "triton"}, "cannot run"),
]


@pytest.mark.parametrize(("kind", "inputs", "options", "message"), WRONG, ids=[m for *_, m in WRONG])
def test_bad_input(kind: type[Exception], inputs: tuple[Any, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(kind, match=message):
        ranking_loss(*inputs, **options)
