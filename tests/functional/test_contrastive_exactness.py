"""Rounding: the tiled form must be as exact as the same formula computed eagerly in the same dtype, or nearly so.

Three copies of the inputs: the tiled and the materialised form in the dtype under test, and the materialised form in
float64, which counts as the truth. The rule: an error of at most three times the eager one's, plus 1e-5 on the loss
and 1e-4 on gradients, in relative norms. An eager result in a narrow dtype is no measure: it is the less exact one.
"""

import itertools

import pytest
import torch
from torch import Tensor

from tileloss.functional import contrastive_loss
from tileloss.spec import DIRECTIONS

SYMMETRIC = ("query_to_doc", "doc_to_query")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OBJECTIVES = [
    {},
    {"directions": SYMMETRIC, "partition": "per_direction"},
    {"directions": DIRECTIONS},
    {"hardness": ("in_batch_negatives", 5.0)},
]
# temperatures at which a batch of random vectors is neither flat nor saturated
SCALES = {"cosine": 10.0, "dot": 0.1, "euclidean": 1.0, "manhattan": 0.2}


def value_and_gradients(queries: Tensor, docs: Tensor, scale: float, backend: str, options: dict) -> list[Tensor]:
    q, d = queries.clone().requires_grad_(), docs.clone().requires_grad_()
    s = torch.tensor(scale, dtype=torch.promote_types(q.dtype, torch.float32), requires_grad=True)
    loss = contrastive_loss(q, d, scale=s, backend=backend, **options)
    return [x.detach().double() for x in (loss, *torch.autograd.grad(loss, (q, d, s)))]


SLACK = {"loss": 1e-5, "queries": 1e-4, "docs": 1e-4, "scale": 1e-4}


def errors(found: list[Tensor], truth: list[Tensor]) -> list[float]:
    return [((a - b).norm() / b.norm()).item() for a, b in zip(found, truth, strict=True)]


def assert_exact(
    queries: Tensor,
    docs: Tensor,
    scale: float,
    options: dict,
    least_loss: float = 0.1,
    parts: tuple[str, ...] = tuple(SLACK),
) -> None:
    truth = value_and_gradients(queries.double(), docs.double(), scale, "reference", options)
    eager = errors(value_and_gradients(queries, docs, scale, "reference", options), truth)
    ours = errors(value_and_gradients(queries, docs, scale, "tiled", options), truth)
    assert truth[0] > least_loss, "a batch without hard rows shows nothing but the rounding of the positive"
    for (part, slack), error, allowed in zip(SLACK.items(), ours, eager, strict=True):
        assert part not in parts or error <= 3 * allowed + slack, f"{part}: {error:.1e} against {allowed:.1e} eagerly"


@pytest.mark.parametrize("options", OBJECTIVES)
@pytest.mark.parametrize("similarity", SCALES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_as_exact_as_eager(dtype: torch.dtype, similarity: str, options: dict, small_blocks: int) -> None:
    torch.manual_seed(0)
    for size, width in itertools.product((63, 100, 257), (1, 3, 65)):
        if (similarity, width) == ("cosine", 1):
            continue  # one-dimensional unit vectors have no gradient but rounding
        queries = torch.randn(size, width)
        docs = torch.cat([queries + 2.0 * torch.randn(size, width), queries + 2.0 * torch.randn(size, width)])
        assert_exact(queries.to(dtype), docs.to(dtype), SCALES[similarity], options | {"similarity": similarity})


@pytest.mark.parametrize("similarity", SCALES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_as_exact_as_eager_far_from_the_origin(dtype: torch.dtype, similarity: str, small_blocks: int) -> None:
    """Embeddings that share a large mean, as untrained encoders give: similarities differ in their last digits."""
    torch.manual_seed(0)
    queries = torch.randn(100, 64) + 5.0
    docs = queries + torch.randn(100, 64)
    assert_exact(queries.to(dtype), docs.to(dtype), SCALES[similarity] / 4, {"similarity": similarity})


@pytest.mark.parametrize("options", OBJECTIVES)
def test_as_exact_as_eager_when_nearly_learned(options: dict) -> None:
    """Every positive far above its negatives: the gradient is what is left of one minus almost one."""
    torch.manual_seed(0)
    queries = torch.randn(1024, 128)
    docs = queries + 0.8 * torch.randn(1024, 128)
    assert_exact(queries, docs, 20.0, options, least_loss=1e-4)


@pytest.mark.parametrize("options", OBJECTIVES)
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("size", [33, 100, 257])
def test_as_exact_as_eager_when_all_is_learned(size: int, similarity: str, options: dict, small_blocks: int) -> None:
    """The loss is some 1e-5: kept as a difference of numbers near the scale, nothing would be left of it."""
    torch.manual_seed(0)
    queries = torch.randn(size, 64)
    docs = queries + 0.1 * torch.randn(size, 64)
    scale = {"cosine": 20.0, "dot": 0.3}[similarity]
    # the scale's gradient is then a difference of nearly equal sums, of which a relative 1e-2 may be rounding
    parts = ("loss", "queries", "docs")
    assert_exact(queries, docs, scale, options | {"similarity": similarity}, least_loss=1e-7, parts=parts)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0, 1e4])
def test_no_scale_overflows(scale: float, small_blocks: int) -> None:
    torch.manual_seed(0)
    for dtype in DTYPES:
        queries = torch.nn.functional.normalize(torch.randn(63, 16))
        docs = torch.nn.functional.normalize(queries + 0.3 * torch.randn(63, 16))
        for options in OBJECTIVES:
            values = value_and_gradients(queries.to(dtype), docs.to(dtype), scale, "tiled", options)
            assert all(x.isfinite().all() for x in values), (dtype, options)


def test_narrow_inputs_are_summed_in_float32(small_blocks: int) -> None:
    """The loss of bfloat16 embeddings is that of the same numbers in float32, to float32's precision."""
    torch.manual_seed(0)
    queries, docs = torch.randn(257, 65).bfloat16(), torch.randn(257, 65).bfloat16()
    for options in OBJECTIVES:
        narrow = contrastive_loss(queries, docs, backend="tiled", **options)
        wide = contrastive_loss(queries.double(), docs.double(), backend="reference", **options)
        assert narrow.item() == pytest.approx(wide.item(), rel=1e-6)
