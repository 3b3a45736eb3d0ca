"""The logits of pairs: over every backend the definition's values and gradients, no less exact, in less memory."""

import importlib
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import tileloss
from tileloss.errors import BackendError, DeviceError, DtypeError, InputError, ShapeError
from tileloss.functional import pair_logits
from tileloss.tiled import pair_classifier as tiled

PARTS = [
    names for count in (1, 2, 3) for names in itertools.combinations(("rep", "difference", "multiplication"), count)
]
SIZES = (1, 2, 63, 100, 257)
WIDTHS = (1, 3, 65)
CLASSES = (1, 3, 20)
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.fixture(params=["reference", "tiled"])
def backend(request: pytest.FixtureRequest, tiny_blocks: None) -> Any:
    with tileloss.use_backend(request.param):
        yield request.param


@pytest.fixture
def tiny_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few rows of any of these widths."""
    monkeypatch.setitem(tiled._BLOCK_BYTES, "cpu", 65 * 7 * 4)


def inputs(
    size: int, width: int, classes: int = 3, parts: Any = ("rep", "difference"), dtype: torch.dtype = torch.double
) -> list[Tensor]:
    """Embeddings, weight, bias; some pairs are equal, and some in one number."""
    torch.manual_seed(0)
    count = sum(2 if name == "rep" else 1 for name in parts)
    first, second = torch.randn(size, width), torch.randn(size, width)
    second[::5] = first[::5]
    second[:, :1] = first[:, :1]
    return [x.to(dtype) for x in (first, second, torch.randn(classes, count * width), torch.randn(classes))]


def all_of(given: list[Tensor], parts: Any, backend: str) -> list[Tensor]:
    """Logits and the gradients of a weighted sum of them."""
    leaves = [x.clone().requires_grad_() for x in given]
    logits = pair_logits(*leaves, concatenate=parts, backend=backend)  # type: ignore[call-arg]
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(logits.shape, generator=generator, dtype=torch.float64)
    return [logits.detach(), *torch.autograd.grad((weights * logits.double()).sum(), leaves)]


@pytest.mark.parametrize("parts", PARTS, ids="+".join)
@pytest.mark.parametrize("size", SIZES)
def test_blocks_agree_with_the_definition(size: int, parts: tuple[str, ...], tiny_blocks: None) -> None:
    for width, classes in zip(WIDTHS, CLASSES, strict=True):
        given = inputs(size, width, classes, parts)
        found, expected = (all_of(given, parts, name) for name in ("tiled", "reference"))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_the_definition_pair_by_pair(backend: str) -> None:
    given = inputs(9, 4, 3, ("rep", "difference", "multiplication"))
    first, second, weight, bias = given
    logits = pair_logits(*given, concatenate=["multiplication", "rep", "difference"])
    for u, v, found in zip(first, second, logits, strict=True):
        features = torch.cat([u, v, (u - v).abs(), u * v])
        torch.testing.assert_close(found, weight @ features + bias, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_as_exact_as_eager(dtype: torch.dtype, tiny_blocks: None) -> None:
    """With a weight of the embeddings' dtype, and with a float32 one."""
    parts = ("rep", "difference", "multiplication")
    for size, width, weight_dtype in itertools.product(SIZES[2:], WIDTHS, {dtype, torch.float32}):
        first, second, weight, bias = inputs(size, width, 3, parts, dtype)
        given = [first, second, weight.to(weight_dtype), bias.to(weight_dtype)]
        truth = all_of([x.double() for x in given], parts, "reference")
        eager, found = (all_of(given, parts, name) for name in ("reference", "tiled"))
        assert [x.dtype for x in found] == [weight_dtype, dtype, dtype, weight_dtype, weight_dtype]
        for part, slack in enumerate((1e-5, 1e-4, 1e-4, 1e-4, 1e-4)):
            errors = [((x[part].double() - truth[part]).norm() / truth[part].norm()).item() for x in (found, eager)]
            assert errors[0] <= 3 * errors[1] + slack, (part, size, width, weight_dtype)


def test_strides_do_not_matter(backend: str) -> None:
    first, second, weight, bias = inputs(20, 8)
    expected = all_of([first, second, weight, bias], ("rep", "difference"), backend)
    turned = [x.T.contiguous().T for x in (first, second, weight)]
    for a, b in zip(all_of([*turned, bias], ("rep", "difference"), backend), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    row = first[:1]
    assert torch.equal(
        pair_logits(row.expand(20, 8), second, weight, bias), pair_logits(row.repeat(20, 1), second, weight, bias)
    )


@pytest.mark.parametrize("wanted", list(itertools.product((True, False), repeat=4)))
def test_only_the_gradients_that_are_wanted(wanted: tuple[bool, ...], backend: str) -> None:
    given = inputs(20, 8)
    leaves = [x.clone().requires_grad_(need) for x, need in zip(given, wanted, strict=True)]
    logits = pair_logits(*leaves)
    assert logits.requires_grad is any(wanted)
    if any(wanted):
        logits.square().sum().backward()
        whole = [x.clone().requires_grad_() for x in given]
        pair_logits(*whole, backend="reference").square().sum().backward()  # type: ignore[call-arg]
        for a, b, need in zip(leaves, whole, wanted, strict=True):
            assert (a.grad is not None) is need
            if need:
                torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-12)


def test_no_bias(backend: str) -> None:
    first, second, weight, bias = inputs(20, 8)
    torch.testing.assert_close(
        pair_logits(first, second, weight), pair_logits(first, second, weight, bias) - bias, rtol=1e-12, atol=1e-12
    )
    weight.requires_grad_()
    pair_logits(first, second, weight).sum().backward()
    assert weight.grad is not None


def test_one_matrix_on_both_sides(backend: str) -> None:
    """The gradients of both sides meet in it; the difference has none."""
    x, _, weight, _ = inputs(20, 8)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(pair_logits(x, x, weight).sum(), x)
    expected = (weight[:, :8] + weight[:, 8:16]).sum(dim=0).expand_as(x)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
def test_an_empty_batch(shape: tuple[int, int], backend: str) -> None:
    first, second, weight, bias = inputs(*shape)
    leaves = [x.requires_grad_() for x in (first, second, weight, bias)]
    logits = pair_logits(*leaves)
    assert logits.shape == (shape[0], 3)
    logits.sum().backward()
    assert all(x.grad is not None and x.grad.shape == x.shape for x in leaves)


def test_a_nan_stays_in_its_row(backend: str) -> None:
    first, second, weight, bias = inputs(9, 4)
    first[3, 1] = float("nan")
    logits = pair_logits(first, second, weight, bias)
    assert logits[3].isnan().all()
    assert not logits[[0, 1, 2, 4, 5, 6, 7, 8]].isnan().any()


def test_two_runs_give_the_same_bits(poisoned_empty: None) -> None:
    given = inputs(700, 33, dtype=torch.float32)
    first, second = (all_of(given, ("rep", "difference"), "tiled") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not any(x.isnan().any() for x in first)


def away_from_zero(size: int, width: int, parts: Any) -> list[Tensor]:
    first, second, weight, bias = inputs(size, width, 2, parts)
    return [x.requires_grad_() for x in (first, second + 0.3, weight, bias)]


@pytest.mark.parametrize("parts", PARTS, ids="+".join)
def test_gradients_are_finite_differences(parts: tuple[str, ...], backend: str) -> None:
    leaves = away_from_zero(8, 3, parts)
    torch.autograd.gradcheck(lambda *x: pair_logits(*x, concatenate=parts), leaves)
    torch.autograd.gradgradcheck(lambda *x: pair_logits(*x, concatenate=parts), away_from_zero(3, 2, parts))


@pytest.mark.parametrize("related", [lambda x: x, lambda x: 2 * x.flip(1) + x, lambda x: x.detach()])
def test_second_derivative_of_inputs_that_share_a_source(related: Callable[[Tensor], Tensor], backend: str) -> None:
    """The gradient of a second that was computed from the first reaches the first once."""

    def derivatives(name: str) -> tuple[Tensor, Tensor]:
        x, _, weight, bias = inputs(9, 4, parts=("rep", "difference", "multiplication"))
        x.requires_grad_()
        logits = pair_logits(
            x, related(x), weight, bias, concatenate=("rep", "difference", "multiplication"), backend=name
        )  # type: ignore[call-arg]
        (first,) = torch.autograd.grad(logits.square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        return first, second

    for a, b in zip(derivatives(backend), derivatives("reference"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_autocast_changes_nothing(backend: str) -> None:
    given = inputs(20, 8, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = pair_logits(*given)
    assert torch.equal(found, pair_logits(*given))


def test_sparse_embeddings_are_made_dense(backend: str) -> None:
    first, second, weight, bias = inputs(9, 4)
    assert torch.equal(pair_logits(first.to_sparse(), second, weight, bias), pair_logits(first, second, weight, bias))


def test_small_batches_take_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    module = importlib.import_module("tileloss.functional.pair_classifier")
    monkeypatch.setattr(module, "block_pair_logits", lambda *given: called.append(given))
    for size, blocks in ((32, 0), (682, 0), (683, 1)):
        pair_logits(*inputs(size, 768, dtype=torch.float32))
        assert len(called) == blocks


def peak_bytes(backend: str) -> int:
    """The most that was allocated at one time during a forward and a backward, beside the inputs."""
    leaves = [x.requires_grad_() for x in inputs(2048, 64, dtype=torch.float32)]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        F.cross_entropy(pair_logits(*leaves, backend=backend), torch.zeros(2048).long()).backward()  # type: ignore[call-arg]
    peak = held = 0
    for event in trace.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def test_no_copy_of_the_embeddings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their two gradients, logits, and blocks: the definition holds three times as much."""
    monkeypatch.setitem(tiled._BLOCK_BYTES, "cpu", 1 << 14)
    one = 2048 * 64 * 4
    assert peak_bytes("tiled") < 2 * one + 4 * (1 << 14) + 40 * 2048 * 4
    assert peak_bytes("reference") > 6 * one, "or the measurement sees nothing"


def test_one_graph_with_the_same_numbers(backend: str) -> None:
    torch.compiler.reset()

    def loss(*given: Tensor) -> Tensor:
        first, *others = given
        return pair_logits(first.tanh(), *others).square().mean()

    leaves = [x.requires_grad_() for x in inputs(20, 5, dtype=torch.float32)]
    found = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)(*leaves)
    expected = loss(*leaves)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for a, b in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wanted", [(True,) * 4, (True, False, True, False), (False, True, False, True), (False,) * 4])
def test_opcheck(wanted: tuple[bool, ...], dtype: torch.dtype) -> None:
    given = inputs(9, 4, dtype=dtype)
    leaves = [x.clone().requires_grad_(need) for x, need in zip(given, wanted, strict=True)]
    # bfloat16 gradients agree to their own precision
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {}
    parts = [True, True, False]
    torch.library.opcheck(torch.ops.tileloss.pair_logits.default, (*leaves, parts), test_utils=CHECKS, **tolerance)
    first, second, weight, _ = given
    torch.library.opcheck(
        torch.ops.tileloss.pair_logits_backward.default,
        (torch.randn(9, 3, dtype=dtype), first, second, weight, parts, list(wanted)),
        test_utils=CHECKS,
    )


FIRST, SECOND, WEIGHT, BIAS = inputs(4, 3, dtype=torch.float32)
WRONG: list[tuple[type[Exception], tuple[Any, ...], dict[str, Any], str]] = [
    (ShapeError, (FIRST, SECOND[:3], WEIGHT, BIAS), {}, "row i of both is one pair"),
    (ShapeError, (FIRST, SECOND[:, :2], WEIGHT, BIAS), {}, "row i of both is one pair"),
    (ShapeError, (FIRST[0], SECOND, WEIGHT, BIAS), {}, "first must be a matrix of embeddings"),
    (ShapeError, (FIRST, SECOND, WEIGHT[:, 1:], BIAS), {}, "The weight has 8 columns.*3 vectors of 3.*must have 9"),
    (ShapeError, (FIRST, SECOND, WEIGHT, BIAS), {"concatenate": ["rep"]}, "2 vectors of 3"),
    (ShapeError, (FIRST, SECOND, WEIGHT, BIAS[1:]), {}, r"bias has shape \(2,\)"),
    (DtypeError, (FIRST.long(), SECOND, WEIGHT, BIAS), {}, "first must hold floating-point numbers"),
    (DtypeError, (FIRST, SECOND, WEIGHT, BIAS.double()), {}, "The bias is torch.float64"),
    (DeviceError, (FIRST, SECOND, WEIGHT.to("meta"), BIAS), {}, "move all to one device"),
    (InputError, ([[1.0]], SECOND, WEIGHT, BIAS), {}, "first must be a tensor, got list"),
    (InputError, (FIRST, SECOND, WEIGHT, BIAS), {"concatenate": ()}, "at least one of"),
    (InputError, (FIRST, SECOND, WEIGHT, BIAS), {"concatenate": "rep"}, "at least one of"),
    (TypeError, (FIRST, SECOND, WEIGHT, BIAS), {"concatenate": 2}, "at least one of"),
    (InputError, (FIRST, SECOND, WEIGHT, [0.0]), {}, "bias must be a tensor or None, got list"),
    (InputError, (FIRST, SECOND, WEIGHT, BIAS), {"concatenate": ["sum"]}, "at least one of"),
    (BackendError, (FIRST, SECOND, WEIGHT, BIAS), {"backend": "triton"}, "cannot run"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "given", "options", "message"), WRONG, ids=[m for *_, m in WRONG])
def test_bad_input(kind: type[Exception], given: tuple[Any, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(kind, match=message):
        pair_logits(*given, **options)
