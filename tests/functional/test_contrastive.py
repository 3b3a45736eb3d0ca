"""Objectives that must be equal, on every backend: the loss of CLIP, no hardness, exclusions, permutations."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tileloss.functional import contrastive_loss, contrastive_loss_with_stats
from tileloss.similarity import SIMILARITIES, cos_sim
from tileloss.spec import DIRECTIONS

pytestmark = pytest.mark.usefixtures("backend")

SYMMETRIC = ("query_to_doc", "doc_to_query")
MODES = ["in_batch_negatives", "hard_negatives", "all_negatives"]


def batch(size: int = 20, columns: int = 1, width: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return torch.randn(size, width).double(), torch.randn(columns * size, width).double()


def value_and_gradients(queries: Tensor, docs: Tensor, scale: float = 4.0, **options: object) -> list[Tensor]:
    """Loss and the gradients of queries, docs and scale."""
    inputs = [x.detach().clone().requires_grad_() for x in (queries, docs, torch.tensor(scale, dtype=queries.dtype))]
    loss = contrastive_loss(inputs[0], inputs[1], scale=inputs[2], **options)  # type: ignore[arg-type]
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]


def assert_equal(found: list[Tensor], expected: list[Tensor], parts: slice = slice(None)) -> None:
    for a, b in zip(found[parts], expected[parts], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def autograd(loss_of: object, *inputs: Tensor) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    loss = loss_of(*leaves)  # type: ignore[operator]
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def test_query_to_doc_is_cross_entropy() -> None:
    queries, docs = batch(columns=3)

    def plain(q: Tensor, d: Tensor, scale: Tensor) -> Tensor:
        return F.cross_entropy(cos_sim(q, d) * scale, torch.arange(len(q)))

    assert_equal(value_and_gradients(queries, docs), autograd(plain, queries, docs, torch.tensor(4.0).double()))


def test_both_directions_apart_are_the_loss_of_clip() -> None:
    queries, docs = batch()

    def clip(q: Tensor, d: Tensor, scale: Tensor) -> Tensor:
        logits, own = cos_sim(q, d) * scale, torch.arange(len(q))
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2

    found = value_and_gradients(queries, docs, directions=SYMMETRIC, partition="per_direction")
    assert_equal(found, autograd(clip, queries, docs, torch.tensor(4.0).double()))


def test_joint_symmetric_directions_are_one_softmax() -> None:
    queries, docs = batch()

    def joint(q: Tensor, d: Tensor, scale: Tensor) -> Tensor:
        logits = cos_sim(q, d) * scale
        return F.cross_entropy(torch.cat([logits, logits.T], dim=1), torch.arange(len(q)))

    found = value_and_gradients(queries, docs, directions=SYMMETRIC)
    assert_equal(found, autograd(joint, queries, docs, torch.tensor(4.0).double()))


def test_swapping_the_sides_of_the_loss_of_clip_swaps_the_gradients() -> None:
    queries, docs = batch()
    loss, d_queries, d_docs, d_scale = value_and_gradients(
        queries, docs, directions=SYMMETRIC, partition="per_direction"
    )
    swapped = value_and_gradients(docs, queries, directions=SYMMETRIC, partition="per_direction")
    assert_equal(swapped, [loss, d_docs, d_queries, d_scale])


def test_the_order_of_directions_means_nothing() -> None:
    queries, docs = batch(columns=2)
    backwards = value_and_gradients(queries, docs, directions=DIRECTIONS[::-1] + DIRECTIONS[:1])
    assert_equal(backwards, value_and_gradients(queries, docs, directions=DIRECTIONS))


@pytest.mark.parametrize("mode", MODES)
def test_hardness_of_no_strength_is_no_hardness(mode: str) -> None:
    queries, docs = batch(columns=3)
    plain = value_and_gradients(queries, docs)
    assert_equal(value_and_gradients(queries, docs, hardness=(mode, 0.0)), plain)
    assert_equal(value_and_gradients(queries, docs, hardness=(None, 3.0)), plain)
    assert not torch.isclose(value_and_gradients(queries, docs, hardness=(mode, 3.0))[0], plain[0])


def test_all_negatives_are_in_batch_and_hard_ones() -> None:
    """With no column of hard negatives "all" is "in batch", and "hard" is nothing."""
    queries, docs = batch()
    in_batch, hard, everything = (value_and_gradients(queries, docs, hardness=(mode, 3.0)) for mode in MODES)
    assert_equal(everything, in_batch)
    assert_equal(hard, value_and_gradients(queries, docs))


@pytest.mark.parametrize("directions", [("query_to_doc",), SYMMETRIC, DIRECTIONS])
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_permuting_the_batch_permutes_the_gradients(similarity: str, directions: tuple[str, ...]) -> None:
    queries, docs = batch(columns=2)
    ids = torch.arange(20) // 3
    order = torch.randperm(20)
    both = torch.cat([order, order + 20])
    options = {"similarity": similarity, "directions": directions, "hardness": ("all_negatives", 2.0)}
    loss, d_queries, d_docs, d_scale = value_and_gradients(queries, docs, exclude=ids, **options)
    permuted = value_and_gradients(queries[order], docs[both], exclude=ids[order], **options)
    assert_equal(permuted, [loss, d_queries[order], d_docs[both], d_scale])


@pytest.mark.parametrize("directions", [("query_to_doc",), SYMMETRIC])
def test_excluding_by_ids_is_excluding_by_the_mask_they_mean(directions: tuple[str, ...]) -> None:
    queries, docs = batch(columns=2)
    ids = torch.randint(8, (20,))
    rows, columns = torch.arange(20)[:, None], torch.arange(40)[None, :] % 20
    mask = (ids[rows] == ids[columns]) & (rows != columns)
    options = {"directions": directions, "hardness": ("all_negatives", 2.0)}
    by_ids = value_and_gradients(queries, docs, exclude=ids, **options)
    assert_equal(by_ids, value_and_gradients(queries, docs, exclude=mask, **options))
    assert_equal(by_ids, value_and_gradients(queries, docs, exclude=torch.cat([ids, ids]), **options))
    assert_equal(by_ids, value_and_gradients(queries, docs, exclude=ids.to(torch.int16), **options))


@pytest.mark.parametrize("directions", [("query_to_doc",), SYMMETRIC, DIRECTIONS])
def test_ids_that_never_match_exclude_nothing(directions: tuple[str, ...]) -> None:
    queries, docs = batch(columns=2)
    plain = value_and_gradients(queries, docs, directions=directions)
    assert_equal(value_and_gradients(queries, docs, directions=directions, exclude=torch.arange(20)), plain)
    nothing = torch.zeros(20, 40, dtype=torch.bool)
    assert_equal(value_and_gradients(queries, docs, directions=directions, exclude=nothing), plain)


def test_a_mask_leaves_the_positive_in() -> None:
    queries, docs = batch(columns=2)
    everything = torch.ones(20, 40, dtype=torch.bool)
    loss, d_queries, d_docs, _ = value_and_gradients(queries, docs, exclude=everything)
    assert loss == 0.0
    assert not d_queries.any()
    assert not d_docs.any()


def test_excluding_a_doc_is_leaving_it_out() -> None:
    """A document that no query meets has no gradient, and the others' are those of the batch without it."""
    queries, docs = batch(columns=2)
    mask = torch.zeros(20, 40, dtype=torch.bool)
    mask[:, 33] = True
    loss, d_queries, d_docs, d_scale = value_and_gradients(queries, docs, exclude=mask, directions=SYMMETRIC)
    kept = [j for j in range(40) if j != 33]
    assert not d_docs[33].any()
    without = value_and_gradients(queries, docs[kept], directions=SYMMETRIC)
    assert_equal([loss, d_queries, d_docs[kept], d_scale], without)


@pytest.mark.parametrize("directions", [("query_to_doc",), SYMMETRIC])
def test_excluded_pairs_get_no_gradient(directions: tuple[str, ...]) -> None:
    """With unit vectors as queries, entry (j, i) of the docs' gradient is that of the logit of pair (i, j) alone."""
    torch.manual_seed(0)
    queries, docs = torch.eye(20).double(), torch.randn(40, 20).double()
    mask = torch.rand(20, 40) < 0.3
    mask.fill_diagonal_(False)
    d_docs = value_and_gradients(queries, docs, exclude=mask, directions=directions, similarity="dot")[2]
    assert torch.equal(d_docs.T == 0.0, mask)


def test_float_and_tensor_scale_are_equal() -> None:
    queries, docs = batch()
    for scale in (0.3, 20.0, 1e-3):
        as_float = contrastive_loss(queries, docs, scale=scale)
        for tensor in (torch.tensor(scale, dtype=torch.double), torch.tensor([scale], dtype=torch.double)):
            assert contrastive_loss(queries, docs, scale=tensor).item() == pytest.approx(as_float.item(), rel=1e-12)


def test_a_narrow_scale_does_not_round_the_gradients(backend: str) -> None:
    """A learnable temperature is float32 whatever the embeddings are."""
    scale = torch.tensor(20.0 / 3)
    inputs = torch.randn(2, 20, 9, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    gradients = []
    for given in (scale, float(scale)):
        queries, docs = (x.clone().requires_grad_() for x in inputs)
        contrastive_loss(queries, docs, scale=given).backward()
        gradients.append(torch.cat([queries.grad, docs.grad]))  # type: ignore[list-item]
    torch.testing.assert_close(*gradients, rtol=1e-13, atol=1e-16)


def test_a_scale_of_one_element_gets_a_gradient_of_its_shape() -> None:
    queries, docs = batch()
    for shape in ((), (1,), (1, 1)):
        scale = torch.full(shape, 4.0, dtype=torch.double, requires_grad=True)
        contrastive_loss(queries, docs, scale=scale).backward()
        assert scale.grad is not None
        assert scale.grad.shape == shape
        assert scale.grad.item() == pytest.approx(value_and_gradients(queries, docs)[3].item())


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("directions", [("query_to_doc",), SYMMETRIC, DIRECTIONS])
def test_two_runs_are_bitwise_equal(similarity: str, directions: tuple[str, ...]) -> None:
    queries, docs = (x.float() for x in batch(columns=2))
    first, second = (
        value_and_gradients(queries, docs, similarity=similarity, directions=directions) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_statistics_come_with_the_loss_and_carry_no_graph() -> None:
    queries, docs = batch(columns=2)
    queries.requires_grad_()
    loss, stats = contrastive_loss_with_stats(queries, docs)
    torch.testing.assert_close(loss, contrastive_loss(queries, docs))
    similarity = cos_sim(queries, docs).detach()
    negatives = similarity.clone().fill_diagonal_(-2.0).amax(dim=1)
    assert stats.accuracy == (similarity.diagonal() > negatives).float().mean()
    assert stats.positive_similarity.item() == pytest.approx(similarity.diagonal().mean().item(), rel=1e-6)
    assert stats.hardest_negative_similarity.item() == pytest.approx(negatives.mean().item(), rel=1e-6)
    assert all(x.dtype == torch.float32 and x.ndim == 0 and not x.requires_grad for x in stats)


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded", "offset"])
def test_any_strides(layout: str) -> None:
    torch.manual_seed(0)
    views = {
        "transposed": lambda: torch.randn(5, 20).double().T,
        "strided": lambda: torch.randn(40, 10).double()[::2, ::2],
        "expanded": lambda: torch.randn(1, 5).double().expand(20, 5),
        "offset": lambda: torch.randn(101).double()[1:].view(20, 5),
    }
    queries, docs = views[layout](), views[layout]()
    ids = torch.arange(40)[::2] // 3
    expected = value_and_gradients(queries.contiguous(), docs.contiguous(), exclude=ids.contiguous())

    q, d = queries.requires_grad_(), docs.requires_grad_()
    loss = contrastive_loss(q, d, scale=4.0, exclude=ids)
    assert_equal([loss.detach(), *torch.autograd.grad(loss, (q, d))], expected[:3])


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_sparse_embeddings_are_worth_their_dense_form(backend: str) -> None:
    dense = torch.randn(40, 8).relu().requires_grad_()
    expected = contrastive_loss(dense, torch.ones(40, 8).tril(), backend=backend)
    (gradient,) = torch.autograd.grad(expected, dense)
    found = contrastive_loss(dense.to_sparse(), torch.ones(40, 8).tril(), backend=backend)
    assert torch.equal(found, expected)
    # autograd gives a sparse input the gradient of the entries that it holds
    torch.testing.assert_close(torch.autograd.grad(found, dense)[0], gradient * (dense > 0))


@pytest.mark.parametrize("backend", ["auto", "reference", "tiled"])
def test_the_loss_of_an_empty_batch_is_nan_whatever_is_asked_for(backend: str) -> None:
    assert contrastive_loss(torch.zeros(0, 4), torch.zeros(0, 4), backend=backend).isnan()


@pytest.mark.parametrize("directions", [DIRECTIONS[:1], ("query_to_doc", "doc_to_query")])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_positive_that_is_no_number_is_seen_without_negatives(
    number: float, directions: tuple[str, ...], backend: str
) -> None:
    queries = torch.tensor([[1.0, number]])
    for partition in ("joint", "per_direction"):
        loss = contrastive_loss(queries, torch.ones(1, 2), directions=directions, partition=partition)
        assert loss.isnan()


def test_embeddings_of_no_width_are_all_alike(backend: str) -> None:
    queries = torch.empty(9, 0, requires_grad=True)
    loss = contrastive_loss(queries, torch.empty(9, 0))
    loss.backward()
    torch.testing.assert_close(loss.detach(), torch.tensor(9.0).log())


@pytest.mark.parametrize("mode", ["in_batch_negatives", "hard_negatives", "all_negatives"])
def test_hardness_of_others_makes_no_nan_of_an_infinite_distance(mode: str, backend: str) -> None:
    queries = torch.randn(5, 3)
    docs = torch.cat([queries, torch.randn(5, 3)])
    docs[7] = float("inf")
    assert contrastive_loss(queries, docs, similarity="euclidean", hardness=(mode, 0.5)).isfinite()
