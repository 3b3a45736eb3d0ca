"""How the loss behaves as a node of the autograd graph: twice backward, no gradient wanted, autocast, any dtype."""

import importlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import tileloss
from tileloss import reference, rowwise, tiled
from tileloss.functional import contrastive_loss, contrastive_loss_with_stats
from tileloss.spec import DIRECTIONS

SYMMETRIC = ("query_to_doc", "doc_to_query")
OBJECTIVES = [
    {},
    {"directions": SYMMETRIC, "partition": "per_direction"},
    {"directions": DIRECTIONS, "hardness": ("all_negatives", 2.0)},
    {"directions": DIRECTIONS, "similarity": "euclidean"},
    {"similarity": "manhattan"},
    {"similarity": rowwise(lambda a, b: (a @ b.T).tanh() + a[:, :1])},
]


def leaves(size: int = 9, columns: int = 2, width: int = 4, dtype: torch.dtype = torch.double) -> list[Tensor]:
    torch.manual_seed(0)
    parts = torch.randn(size, width), torch.randn(columns * size, width), torch.tensor(3.0)
    return [x.to(dtype).requires_grad_() for x in parts]


@pytest.mark.parametrize("options", OBJECTIVES)
def test_gradients_are_finite_differences(options: dict, backend: str) -> None:
    if "hardness" in options:
        options = options | {"hardness": None}  # its penalty is no function of the inputs as far as gradients go
    ids = torch.arange(9) // 2
    torch.autograd.gradcheck(
        lambda q, d, s: contrastive_loss(q, d, scale=s, exclude=ids, **options), leaves(), atol=1e-6
    )


@pytest.mark.parametrize("options", OBJECTIVES[:3])
def test_second_derivatives_are_finite_differences(options: dict, backend: str) -> None:
    if "hardness" in options:
        options = options | {"hardness": None}
    torch.autograd.gradgradcheck(
        lambda q, d, s: contrastive_loss(q, d, scale=s, **options), leaves(size=4, width=2), atol=1e-5
    )


@pytest.mark.parametrize("options", OBJECTIVES)
def test_gradients_under_create_graph_are_the_same(options: dict, backend: str) -> None:
    inputs = leaves()
    plain = torch.autograd.grad(contrastive_loss(inputs[0], inputs[1], scale=inputs[2], **options), inputs)
    loss = contrastive_loss(inputs[0], inputs[1], scale=inputs[2], **options)
    for found, expected in zip(torch.autograd.grad(loss, inputs, create_graph=True), plain, strict=True):
        assert found.requires_grad
        torch.testing.assert_close(found.detach(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("related", [lambda x: x, lambda x: 2 * x.flip(1) + x, lambda x: x.detach()])
def test_second_derivative_of_inputs_that_share_a_source(related: Callable[[Tensor], Tensor], backend: str) -> None:
    """The gradient of docs that were computed from queries reaches the queries once."""

    def derivatives(name: str) -> tuple[Tensor, Tensor]:
        queries = leaves()[0]
        loss = contrastive_loss(queries, related(queries), scale=3.0, backend=name)
        (first,) = torch.autograd.grad(loss, queries, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), queries)
        return first, second

    for found, expected in zip(derivatives(backend), derivatives("reference"), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("options", OBJECTIVES)
def test_a_second_backward_gives_the_same_numbers(options: dict, backend: str) -> None:
    inputs = leaves(dtype=torch.float)
    loss = contrastive_loss(inputs[0], inputs[1], scale=inputs[2], **options)
    loss.backward(retain_graph=True)
    first = [x.grad.clone() for x in inputs]  # type: ignore[union-attr]
    loss.backward()
    for x, once in zip(inputs, first, strict=True):
        torch.testing.assert_close(x.grad, 2 * once, rtol=1e-6, atol=0.0)


def test_the_gradient_of_the_loss_scales_them_all(backend: str) -> None:
    inputs = leaves()
    loss = contrastive_loss(inputs[0], inputs[1], scale=inputs[2])
    plain = torch.autograd.grad(loss, inputs, retain_graph=True)
    scaled = torch.autograd.grad(loss, inputs, torch.tensor(-7.0).double())
    for found, expected in zip(scaled, plain, strict=True):
        torch.testing.assert_close(found, -7.0 * expected)


class Wanted:
    """What the tiled walk was asked for, call by call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.needs: list[tuple[bool, bool, bool]] = []
        walk = tiled.contrastive_loss

        def spy(*args: object) -> tiled.Result:
            self.needs.append(tuple(args[6]))  # type: ignore[arg-type]
            return walk(*args)  # type: ignore[arg-type]

        monkeypatch.setattr(tiled, "contrastive_loss", spy)


@pytest.mark.parametrize("similarity", ["cosine", rowwise(lambda a, b: a @ b.T)])
@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True), (True,) * 3])
def test_a_side_without_gradient_costs_none(
    wanted: tuple[bool, bool, bool], similarity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = Wanted(monkeypatch)
    inputs = [x.requires_grad_(need) for x, need in zip(map(torch.Tensor.detach, leaves()), wanted, strict=True)]
    contrastive_loss(inputs[0], inputs[1], scale=inputs[2], similarity=similarity, backend="tiled").backward()
    assert spy.needs == [wanted]
    assert tuple(x.grad is not None for x in inputs) == wanted


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_without_grad_there_is_no_gradient_work(
    guard: Callable, monkeypatch: pytest.MonkeyPatch, small_blocks: int
) -> None:
    inputs = leaves()
    expected = contrastive_loss_with_stats(inputs[0], inputs[1], scale=inputs[2], backend="tiled")
    spy = Wanted(monkeypatch)
    monkeypatch.setattr(importlib.import_module("tileloss.tiled.similarity"), "accumulate", None)
    with guard():
        loss, stats = contrastive_loss_with_stats(inputs[0], inputs[1], scale=inputs[2], backend="tiled")
    assert spy.needs == [(False, False, False)]
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected[0].detach())
    torch.testing.assert_close(tuple(stats), tuple(expected[1]))


def test_the_backward_only_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the walk nor the definition runs again for a first derivative."""
    inputs = leaves()
    loss = contrastive_loss(inputs[0], inputs[1], scale=inputs[2], backend="tiled")
    monkeypatch.setattr(tiled, "contrastive_loss", None)
    monkeypatch.setattr(reference, "contrastive_loss", None)
    loss.backward()
    assert all(x.grad is not None for x in inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_of_loss_and_gradients(dtype: torch.dtype, backend: str) -> None:
    queries, docs, _ = leaves(dtype=dtype)
    scale = torch.tensor(3.0, requires_grad=True)
    for similarity in ("cosine", "dot", "euclidean", "manhattan", rowwise(lambda a, b: a @ b.T)):
        loss, stats = contrastive_loss_with_stats(queries, docs, scale=scale, similarity=similarity)
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert {x.dtype for x in stats} == {torch.float32}
        gradients = torch.autograd.grad(loss, (queries, docs, scale))
        assert [g.dtype for g in gradients] == [dtype, dtype, torch.float32]


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)])
def test_inputs_of_different_width_meet_in_float32(dtypes: tuple[torch.dtype, torch.dtype], backend: str) -> None:
    queries, docs, _ = leaves(dtype=torch.float32)
    q, d = (x.detach().to(dtype).requires_grad_() for x, dtype in zip((queries, docs), dtypes, strict=True))
    found, expected = contrastive_loss(q, d), contrastive_loss(q.float(), d.float())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0.0)
    assert [g.dtype for g in torch.autograd.grad(found, (q, d))] == list(dtypes)


def test_a_scale_of_another_dtype_does_not_decide_the_loss(backend: str) -> None:
    queries, docs, _ = leaves(dtype=torch.float32)
    for shape in ((), (1,)):
        scale = torch.full(shape, 3.0, dtype=torch.double, requires_grad=True)
        loss = contrastive_loss(queries, docs, scale=scale)
        assert loss.dtype == torch.float32
        assert torch.autograd.grad(loss, scale)[0].dtype == torch.double


@pytest.mark.parametrize("options", OBJECTIVES)
def test_autocast_changes_nothing(options: dict, backend: str) -> None:
    inputs = leaves(dtype=torch.float32)

    plain = contrastive_loss(inputs[0], inputs[1], scale=inputs[2], **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = contrastive_loss(inputs[0], inputs[1], scale=inputs[2], **options)
    assert torch.equal(inside, plain)
    for found, expected in zip(torch.autograd.grad(inside, inputs), torch.autograd.grad(plain, inputs), strict=True):
        assert torch.equal(found, expected)


def test_backends_agree_under_a_learned_temperature() -> None:
    """A few steps of gradient descent on all three inputs end in the same place."""

    def descend(name: str) -> list[Tensor]:
        inputs = leaves()
        for _ in range(5):
            with tileloss.use_backend(name):
                loss = contrastive_loss(inputs[0], inputs[1], scale=inputs[2], directions=SYMMETRIC)
            gradients = torch.autograd.grad(loss, inputs)
            inputs = [(x - 0.1 * g).detach().requires_grad_() for x, g in zip(inputs, gradients, strict=True)]
        return inputs

    for found, expected in zip(descend("tiled"), descend("reference"), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
