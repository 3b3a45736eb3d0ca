"""A guide rules out what its cosine similarity says, on every backend, as in the oracle's GISTEmbedLoss."""

import pytest
import torch
from torch import Tensor, nn

import tileloss
from tileloss import Guide
from tileloss.errors import DtypeError, InputError, ShapeError
from tileloss.functional import contrastive_loss
from tileloss.similarity import torch_cosine

pytestmark = pytest.mark.usefixtures("backend")

OWN_SIDES = ("query_to_doc", "query_to_query", "doc_to_doc")


def batch(size: int = 20, columns: int = 1, width: int = 5, guide_width: int = 7) -> list[Tensor]:
    """Queries, docs, and the guide's of both."""
    torch.manual_seed(0)
    rows = ((size, width), (columns * size, width), (size, guide_width), (columns * size, guide_width))
    return [torch.randn(shape, dtype=torch.float64) for shape in rows]


def value_and_gradients(queries: Tensor, docs: Tensor, scale: float = 4.0, **options: object) -> list[Tensor]:
    inputs = [x.detach().clone().requires_grad_() for x in (queries, docs, torch.tensor(scale, dtype=torch.float64))]
    loss = contrastive_loss(inputs[0], inputs[1], scale=inputs[2], similarity="torch_cosine", **options)  # type: ignore[arg-type]
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def oracle_gist(inputs: list[Tensor], margin: float, strategy: str, anchors: bool, positives: bool) -> list[Tensor]:
    """The oracle's loss and gradients, fed with these embeddings instead of a model's."""
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    queries, docs, guide_queries, guide_docs = inputs
    leaves = [queries.clone().requires_grad_(), docs.clone().requires_grad_()]
    size = len(queries)
    columns = [[leaves[0], *leaves[1].split(size)], [guide_queries, *guide_docs.split(size)]]
    loss = losses.GISTEmbedLoss.__new__(losses.GISTEmbedLoss)
    nn.Module.__init__(loss)
    loss.model, loss.guide = (Lookup(column) for column in columns)
    loss.temperature, loss.margin_strategy, loss.margin = 0.25, strategy, margin
    loss.contrast_anchors, loss.contrast_positives = anchors, positives
    loss.gather_across_devices = loss.must_retokenize = False
    loss.similarity_fct, loss.cross_entropy_loss = nn.CosineSimilarity(dim=-1), nn.CrossEntropyLoss()
    value = loss([{"column": index} for index in range(len(columns[0]))], None)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


class Lookup(nn.Module):
    """A model whose embeddings are given."""

    def __init__(self, columns: list[Tensor]) -> None:
        super().__init__()
        self.columns = columns

    def forward(self, features: dict) -> dict:
        return {"sentence_embedding": self.columns[features["column"]]}


@pytest.mark.parametrize(("anchors", "positives"), [(True, True), (False, False), (True, False), (False, True)])
@pytest.mark.parametrize(
    ("margin", "strategy"), [(0.0, "absolute"), (0.3, "absolute"), (-2.0, "absolute"), (0.4, "relative")]
)
@pytest.mark.parametrize("columns", [1, 2])
def test_value_and_gradients_are_the_oracles(
    anchors: bool, positives: bool, margin: float, strategy: str, columns: int
) -> None:
    inputs = batch(23, columns)
    directions = ["query_to_doc"] + anchors * ["query_to_query"] + positives * ["doc_to_doc"]
    guide = Guide(*inputs[2:], margin=margin, strategy=strategy)
    found = value_and_gradients(*inputs[:2], directions=directions, exclude=guide)
    assert_equal(found[:3], oracle_gist(inputs, margin, strategy, anchors, positives))


def test_a_guide_that_rules_nothing_out_is_no_guide() -> None:
    queries, docs, *guide = batch(columns=2)
    found = value_and_gradients(queries, docs, exclude=Guide(*guide, margin=-3.0))
    assert_equal(found, value_and_gradients(queries, docs))


def test_a_guide_is_the_mask_that_it_means() -> None:
    queries, docs, *guide = batch(columns=2)
    similarity = torch_cosine(*guide)
    mask = similarity > similarity.diagonal()[:, None] - 0.1
    found = value_and_gradients(queries, docs, exclude=Guide(*guide, margin=0.1))
    assert_equal(found, value_and_gradients(queries, docs, exclude=mask))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", [1, 8, 100])
def test_copies_of_the_positive_stay_candidates_wherever_they_stand(dtype: torch.dtype, size: int) -> None:
    """A guide that embeds all texts alike lifts nothing above the threshold: rounding must not either."""
    queries, docs, *_ = batch(size)
    one = torch.randn(1, 300, dtype=dtype).expand(size, -1)
    found = contrastive_loss(queries, docs, directions=OWN_SIDES, exclude=Guide(one, one))
    everything = contrastive_loss(queries, docs, directions=OWN_SIDES, exclude=Guide(one, one, margin=-3.0))
    torch.testing.assert_close(found, everything)


def test_query_and_positive_of_one_text_leave_three_candidates() -> None:
    x = torch.randn(1, 5, dtype=torch.float64)
    g = torch.randn(1, 384, dtype=torch.float64)
    loss = contrastive_loss(x, x.clone(), directions=OWN_SIDES, exclude=Guide(g, g.clone()))
    torch.testing.assert_close(loss, torch.tensor(3.0, dtype=torch.float64).log())


@pytest.mark.parametrize("directions", [("query_to_doc",), OWN_SIDES])
def test_second_derivatives_are_those_of_the_definition(directions: tuple[str, ...]) -> None:
    queries, docs, *guide = batch(9)
    found = []
    for name in (None, "reference"):
        q = queries.clone().requires_grad_()
        loss = contrastive_loss(q, docs, directions=directions, exclude=Guide(*guide), backend=name)
        (gradient,) = torch.autograd.grad(loss, q, create_graph=True)
        found.append(torch.autograd.grad(gradient.square().sum(), q)[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)


def test_the_guide_gets_no_gradient() -> None:
    queries, docs, *guide = batch(9)
    leaves = [x.clone().requires_grad_() for x in guide]
    contrastive_loss(queries.requires_grad_(), docs, exclude=Guide(*leaves)).backward()
    assert all(leaf.grad is None for leaf in leaves)


def test_it_passes_through_compile() -> None:
    queries, docs, *guide = batch(9)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(q: Tensor, d: Tensor, gq: Tensor, gd: Tensor) -> Tensor:
        return contrastive_loss(q, d, exclude=Guide(gq, gd))

    torch.testing.assert_close(compiled(queries, docs, *guide), contrastive_loss(queries, docs, exclude=Guide(*guide)))


def test_bad_guides_are_refused() -> None:
    queries, docs, guide_queries, guide_docs = batch(9, columns=2)
    with pytest.raises(ShapeError, match="one row for each of the 18 docs"):
        contrastive_loss(queries, docs, exclude=Guide(guide_queries, guide_docs[:9]))
    with pytest.raises(ShapeError, match="width 7 and its docs 6"):
        contrastive_loss(queries, docs, exclude=Guide(guide_queries, guide_docs[:, :6]))
    with pytest.raises(DtypeError, match="floating-point"):
        contrastive_loss(queries, docs, exclude=Guide(guide_queries.long(), guide_docs))
    with pytest.raises(InputError, match="'absolute' or 'relative'"):
        contrastive_loss(queries, docs, exclude=Guide(guide_queries, guide_docs, strategy="percent"))
    with pytest.raises(InputError, match="guide's docs must be a tensor, got list"):
        contrastive_loss(queries, docs, exclude=Guide(guide_queries, guide_docs.tolist()))
    with pytest.raises(InputError, match="margin of a guide must be a finite number, got nan"):
        contrastive_loss(queries, docs, exclude=Guide(guide_queries, guide_docs, margin=float("nan")))
    both = ("query_to_doc", "doc_to_query")
    with pytest.raises(InputError, match="doc_to_query"):
        contrastive_loss(queries, docs, directions=both, exclude=Guide(guide_queries, guide_docs))


def test_float32_is_as_exact_as_the_rule_asks() -> None:
    inputs = [x.float() for x in batch(257, width=65, guide_width=33)]
    results = []
    for name, dtype in ((None, torch.float32), ("reference", torch.float32), ("reference", torch.float64)):
        queries, docs, *guide = (x.to(dtype) for x in inputs)
        q = queries.requires_grad_()
        loss = contrastive_loss(q, docs, directions=OWN_SIDES, exclude=Guide(*guide, margin=0.01), backend=name)
        results.append((loss.detach().double(), torch.autograd.grad(loss, q)[0].double()))
    (loss, grad), (eager_loss, eager_grad), (true_loss, true_grad) = results
    assert abs(loss - true_loss) <= 3 * abs(eager_loss - true_loss) + 1e-5 * abs(true_loss)
    assert (grad - true_grad).norm() <= 3 * (eager_grad - true_grad).norm() + 1e-4 * true_grad.norm()


def test_the_package_offers_it() -> None:
    assert tileloss.Guide is Guide
