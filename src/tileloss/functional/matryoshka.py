"""The in-batch softmax loss at several prefix widths at once, for embeddings that will be cut off (Matryoshka).

The similarity at every prefix is a partial sum of one and the same product, so all widths together take about three
full GEMMs, forward and backward, instead of three for each width. The price is a block of similarities for each
width, of the same bounded size together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from tileloss import reference
from tileloss.arguments import finite_number
from tileloss.backend import accepts_backend
from tileloss.functional.contrastive import Call, ContrastiveStats, check_call, choose_backend, stats_of
from tileloss.functional.matryoshka_op import block_matryoshka
from tileloss.functional.prefix_cosines import check_dims
from tileloss.guide import Guide
from tileloss.reference.contrastive import Seen
from tileloss.similarity import full_precision

# of a similarity, against one of a single width: with five widths of 768 numbers, blocks pay from 48 x 48 on a CPU,
# where one width waits for 256 x 256
_WORTH = 16


@accepts_backend
def matryoshka_contrastive_loss(
    queries: Tensor,  # (B, D)
    docs: Tensor,  # (M, D)
    *,
    dims: Sequence[int] | Mapping[int, float],
    scale: float | Tensor = 20.0,
    directions: Sequence[str] = ("query_to_doc",),
    partition: str = "joint",
    hardness: tuple[str | None, float] | None = None,
    exclude: Tensor | Guide | None = None,
    backend: str | None = None,
) -> Tensor:
    """The weighted sum over prefix widths d of `contrastive_loss(queries[:, :d], docs[:, :d])`, by cosine similarity.

    Args:
        queries: (B, D) floating point, any strides; sparse ones are made dense. The loss of an empty batch is nan.
        docs: (M, D), M >= B, as `contrastive_loss` takes them.
        dims: the K prefix widths, each from 1 to D, in any order, each of weight 1 as often as it is
            there; or a mapping from width to weight.
        scale: what cosines are multiplied by (1 / temperature); a positive number, or a 0-dim tensor, which gets its
            gradient.
        directions, partition, hardness, exclude: the objective at every width, as in `contrastive_loss`. A guide's
            embeddings are not cut off.
        backend: "reference", "tiled", "triton" or "auto", for this call alone; see `tileloss.backend`.

    Returns:
        A 0-dim tensor: float64 for float64 inputs, else float32. Differentiable in queries, docs and scale. A second
        derivative goes through the materialised definition: exact, in O(K B M) memory.

    Raises:
        ShapeError, DtypeError, DeviceError, InputError: for inputs that do not fit, before any work.
        BackendError: for a backend that was asked for by name and cannot run.

    Cost:
        Three GEMMs of B x M x D for query_to_doc forward and backward, whatever K is, four with doc_to_query; and K
        times the elementwise work of one width. On the tensor cores of a GPU, three GEMMs of B x M x d for each width
        d. Memory beside inputs and gradients: K + 1 blocks of 16 MB together on a CPU and 224 MB on a GPU, or of 256
        rows each where that is more; and a copy of inputs that are narrower than float32 or not contiguous.

    Source:
        Kusupati et al. 2022 (arXiv 2205.13147), over van den Oord et al. 2018 (1807.03748).

    >>> queries, docs = torch.randn(64, 32, requires_grad=True), torch.randn(64, 32)
    >>> matryoshka_contrastive_loss(queries, docs, dims=[32, 16, 8]).backward()
    >>> half = matryoshka_contrastive_loss(queries, docs, dims={32: 1.0, 16: 0.5})
    """
    call = check_call(queries, docs, scale, "cosine", directions, partition, hardness, exclude)
    return matryoshka_and_seen(call, dims)[0]


@accepts_backend
def matryoshka_contrastive_loss_with_stats(
    queries: Tensor,  # (B, D)
    docs: Tensor,  # (M, D)
    *,
    dims: Sequence[int] | Mapping[int, float],
    scale: float | Tensor = 20.0,
    directions: Sequence[str] = ("query_to_doc",),
    partition: str = "joint",
    hardness: tuple[str | None, float] | None = None,
    exclude: Tensor | Guide | None = None,
    backend: str | None = None,
) -> tuple[Tensor, dict[int, ContrastiveStats]]:
    """As `matryoshka_contrastive_loss`, with the statistics of the same pass at each width beside the loss."""
    call = check_call(queries, docs, scale, "cosine", directions, partition, hardness, exclude)
    loss, seen = matryoshka_and_seen(call, dims)
    return loss, {dim: stats_of(of_width) for dim, of_width in seen.items()}


def matryoshka_and_seen(
    call: Call, dims: Sequence[int] | Mapping[int, float]
) -> tuple[Tensor, dict[int, Tensor | Seen]]:
    """The loss of a checked call by cosine, and for each width what `stats_of` makes its statistics of."""
    given = check_dims(dims, call.queries.shape[1])
    weighted: dict[int, float] = {}
    for dim, weight in zip(given, _weights(dims, len(given)), strict=True):
        weighted[dim] = weighted.get(dim, 0.0) + weight
    widths = sorted(weighted)
    weights = [weighted[dim] for dim in widths]
    chosen = choose_backend(call.queries, call.docs, call.spec, _WORTH * len(call.queries) * len(call.docs))
    if chosen == "reference":
        with full_precision(call.queries):
            loss, seen = reference.matryoshka_contrastive_loss(*call, widths, weights)
            return loss, dict(zip(widths, seen, strict=True))
    loss, statistics = block_matryoshka(call, widths, weights, chosen)
    return loss, dict(zip(widths, statistics, strict=True))


def _weights(dims: Sequence[int] | Mapping[int, float], count: int) -> list[float]:
    if not isinstance(dims, Mapping):
        return [1.0] * count
    return [finite_number(x, "The weights of prefix widths must be finite numbers") for x in dims.values()]
