"""What the compile report compiles: every kernel, called over a covering set of features, dtypes and GPUs.

A primitive has one generator here. It calls its launchers inside `recorded`, with tensors on the meta device, and
yields the launches under the name of their case.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget

from tileloss.guide import Guide
from tileloss.kernels.chosen_pairs import pull_pairs
from tileloss.kernels.hardest import TritonHardest
from tileloss.kernels.launch import Launch, recorded
from tileloss.kernels.mining import TritonMining
from tileloss.kernels.pairs import paired_measure, paired_measure_backward
from tileloss.kernels.pairwise import pairwise_matrix
from tileloss.kernels.pairwise_backward import pairwise_matrix_backward
from tileloss.kernels.passes import TritonPasses
from tileloss.kernels.prefix_cosines import prefix_cosines, prefix_cosines_backward
from tileloss.kernels.prefix_passes import TritonPrefixPasses
from tileloss.kernels.triplet_masks import triplet_masks
from tileloss.metrics import METRICS
from tileloss.paired import DISTANCES
from tileloss.spec import ContrastiveSpec
from tileloss.tiled.mining import Classes, MiningProblem
from tileloss.tiled.pairs import NORM_CLAMPS
from tileloss.tiled.passes import Problem
from tileloss.tiled.tile import Tile

SIZE, DOCS, WIDTH = 8192, 2 * 8192, 768
MATRICES = [("query_to_doc", DOCS), ("query_to_query", SIZE), ("doc_to_doc", DOCS)]
GUIDED_MATRICES = [("query_to_doc", DOCS), ("query_to_query", SIZE), ("doc_to_doc", SIZE)]
COVERED = (
    "Each kernel with its features off, with all directions, ids and a hardness on, with a mask and another hardness "
    "on, and with a guide (float16: features off alone); the configurations to tune over with features off alone."
)


class Gpu(NamedTuple):
    """A target of the compiler, and the shared memory that a program may take there."""

    target: GPUTarget
    shared_memory: int


GPUS = {
    "sm_80": Gpu(GPUTarget("cuda", 80, 32), 163 << 10),
    "sm_90": Gpu(GPUTarget("cuda", 90, 32), 227 << 10),
    "sm_100": Gpu(GPUTarget("cuda", 100, 32), 227 << 10),
    "gfx942": Gpu(GPUTarget("hip", "gfx942", 64), 64 << 10),
}


class Feature(NamedTuple):
    """Parts of the objective to switch on, and the matrices to go through."""

    name: str
    spec: ContrastiveSpec
    matrices: list[tuple[str, int]]
    ids: Tensor | None = None
    mask: Tensor | None = None
    guide: Guide | None = None


def record_cases(gpu: Gpu) -> Iterator[tuple[str, Launch]]:
    """The launches of every case of every primitive, with the case's name; tensors are on the meta device.

    The name of a case says "default" where all configurations of a kernel are to be compiled, not the first one alone.
    """
    for primitive in (
        contrastive_cases,
        matryoshka_cases,
        prefix_cosines_cases,
        hardest_cases,
        pairs_cases,
        pairwise_cases,
        triplet_masks_cases,
        triplet_cases,
    ):
        yield from primitive(gpu)


def contrastive_cases(gpu: Gpu) -> Iterator[tuple[str, Launch]]:
    """The passes of the contrastive primitive, called as its driver calls them."""
    ids = torch.empty(DOCS, dtype=torch.int64, device="meta")
    mask = torch.empty(SIZE, DOCS, dtype=torch.bool, device="meta")
    guide = Guide(torch.empty(SIZE, 384, device="meta"), torch.empty(DOCS, 384, device="meta"))
    all_negatives = ContrastiveSpec(hardness="all_negatives", hardness_strength=1.0)
    in_batch = ContrastiveSpec(hardness="in_batch_negatives", hardness_strength=1.0)
    default = Feature("default", ContrastiveSpec(), MATRICES[:1])
    features = [
        default,
        Feature("3 directions, ids, all_negatives", all_negatives, MATRICES, ids=ids),
        Feature("mask, in_batch_negatives", in_batch, MATRICES[:1], mask=mask),
        Feature("guide, 3 directions", ContrastiveSpec(), GUIDED_MATRICES, guide=guide),
    ]
    cases = [("float32 ieee", torch.float32, "highest", features), ("bfloat16", torch.bfloat16, "highest", features)]
    cases.append(("float16", torch.float16, "highest", [default]))
    if gpu.target.backend != "hip":  # where float32 is always multiplied exactly
        cases.append(("float32 tf32", torch.float32, "high", features))
    before = torch.get_float32_matmul_precision()
    for name, dtype, precision, wanted in cases:
        torch.set_float32_matmul_precision(precision)
        for feature in wanted:
            with recorded(gpu.shared_memory) as launches:
                call_contrastive_passes(feature, dtype)
            yield from ((f"{name}, {feature.name}", found) for found in launches)
    torch.set_float32_matmul_precision(before)


def call_contrastive_passes(feature: Feature, dtype: torch.dtype) -> None:
    """Every pass once, as both walks of the driver call them."""
    problem = Problem(SIZE, DOCS, 20.0, feature.spec, feature.ids, feature.mask, feature.guide)
    queries, docs = (torch.empty(rows, WIDTH, dtype=dtype, device="meta") for rows in (SIZE, DOCS))
    passes = TritonPasses(problem, queries, docs)
    unit_queries, norms = passes.unit_rows(queries)
    unit_docs, _ = passes.unit_rows(docs)
    passes.unit_rows_backward(torch.empty(unit_queries.shape, device="meta"), unit_queries, norms, 1.0)
    tiles = [Tile(direction, 0, SIZE, 0, columns) for direction, columns in feature.matrices]
    block = torch.empty(SIZE, sum(tile.width for tile in tiles), device="meta")
    for gradients in (True, False):
        passes.softmax_gradient(tiles, block, gradients)
    if dtype == torch.float32:
        passes.halves(block)
    if feature.guide is not None:  # which goes with rows at hand alone
        return
    for direction, columns in feature.matrices:
        tile = Tile(direction, 0, SIZE, 0, columns, twins=(0, SIZE))
        right = unit_queries if direction == "query_to_query" else unit_docs
        normaliser, _ = passes.fused_normalisers(tile, unit_queries, right)
        passes.gradient(tile, torch.empty(SIZE, columns, device="meta"), normaliser, normaliser)


def hardest_cases(gpu: Gpu) -> Iterator[tuple[str, Launch]]:
    """The passes of the hardest-negative primitive, and chosen pairs with the norms' part as distances want it."""
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        queries, docs = (torch.empty(rows, WIDTH, dtype=dtype, device="meta") for rows in (SIZE, DOCS))
        weights = torch.empty(SIZE, 2, device="meta")
        partners = torch.empty(SIZE, 2, dtype=torch.int64, device="meta")
        sums = [torch.empty(x.shape, device="meta") for x in (queries, docs)]
        with recorded(gpu.shared_memory) as launches:
            passes = TritonHardest(queries, docs)
            row = torch.empty(SIZE, device="meta")
            passes.row_maxima(torch.empty(SIZE, DOCS, device="meta"), 0, row, partners[:, 0].contiguous(), row)
            passes.pull_pairs(weights, partners, queries, docs, *sums)
        yield from ((f"{name}, default", found) for found in launches)
        with recorded(gpu.shared_memory) as launches:
            pull_pairs(weights, partners, queries, docs, *sums, norms=True)
        yield from ((f"{name}, norms", found) for found in launches)


def matryoshka_cases(gpu: Gpu) -> Iterator[tuple[str, Launch]]:
    """The passes of the norms, over a part of a wider block; those of the loss are `contrastive_cases`."""
    product, grad = torch.empty(2, SIZE, 2 * DOCS, device="meta")[:, :, :DOCS].unbind()
    left, right = torch.empty(SIZE, device="meta"), torch.empty(DOCS, device="meta")
    with recorded(gpu.shared_memory) as launches:
        TritonPrefixPasses().cosines(product, left, right, grad)
        TritonPrefixPasses().answers(grad, product, left, right)
    yield from (("float32, default", found) for found in launches)


def prefix_cosines_cases(gpu: Gpu) -> Iterator[tuple[str, Launch]]:
    """Paired cosines at three widths there and back, of rows of any strides too."""
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        a = torch.empty(SIZE, WIDTH, dtype=dtype, device="meta")
        b = torch.empty(WIDTH, SIZE, dtype=dtype, device="meta").T
        with recorded(gpu.shared_memory) as launches:
            cosines, norms = prefix_cosines(a, b, [64, 256, 768])
            prefix_cosines_backward(cosines, a, b, cosines, norms, [64, 256, 768], [True, True])
        yield from ((f"{name}, default", found) for found in launches)


def pairs_cases(gpu: Gpu) -> Iterator[tuple[str, Launch]]:
    """Every measure of pairs there and back, with three others: two in a launch, and one that is added."""
    all_measures = (*DISTANCES, "dot", *NORM_CLAMPS)
    for name, dtype, measures in (("float32", torch.float32, all_measures), ("bfloat16", torch.bfloat16, ("angle",))):
        a, *others = (torch.empty(SIZE, WIDTH, dtype=dtype, device="meta") for _ in range(4))
        for measure in measures:
            with recorded(gpu.shared_memory) as launches:
                found, norms = paired_measure(a, others, measure, 1e-6)
                paired_measure_backward(found, a, others, found, norms, measure, 1e-6, [True] * 4)
            yield from ((f"{name}, {measure}", launch) for launch in launches)


def pairwise_cases(gpu: Gpu) -> Iterator[tuple[str, Launch]]:
    """Every metric there and back, between two matrices and within one."""
    cases = [("float32 ieee", torch.float32, "highest"), ("bfloat16", torch.bfloat16, "highest")]
    cases.append(("float16", torch.float16, "highest"))
    if gpu.target.backend != "hip":
        cases.append(("float32 tf32", torch.float32, "high"))
    before = torch.get_float32_matmul_precision()
    for name, dtype, precision in cases:
        torch.set_float32_matmul_precision(precision)
        for metric in METRICS:
            for within in (False, True):
                a = torch.empty(SIZE, WIDTH, dtype=dtype, device="meta")
                b = None if within else torch.empty(DOCS, WIDTH, dtype=dtype, device="meta")
                with recorded(gpu.shared_memory) as launches:
                    matrix = pairwise_matrix(a, b, metric, False)
                    pairwise_matrix_backward(matrix, a, b, matrix, metric, False, (True, True))
                feature = "within" if within else "default" if metric in ("euclidean", "manhattan") else "two"
                yield from ((f"{name}, {metric}, {feature}", found) for found in launches)
    torch.set_float32_matmul_precision(before)


def triplet_masks_cases(gpu: Gpu) -> Iterator[tuple[str, Launch]]:
    """The masks of pairs alone, and with those of triplets."""
    for dtype in (torch.int64, torch.float32):
        for triplets in (False, True):
            with recorded(gpu.shared_memory) as launches:
                triplet_masks(torch.empty(1024, dtype=dtype, device="meta"), triplets)
            yield from ((f"{dtype}, {'triplets' if triplets else 'pairs'}, default", found) for found in launches)


def triplet_cases(gpu: Gpu) -> Iterator[tuple[str, Launch]]:
    """The passes of the triplet primitive: every distance, both margins, and loss alone."""
    block, row = torch.empty(SIZE, SIZE, device="meta"), torch.empty(SIZE, device="meta")
    places = [torch.empty(SIZE, dtype=torch.int64, device="meta") for _ in range(3)]
    classes = Classes(torch.empty(SIZE, dtype=torch.int32, device="meta"), *places)
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        for distance, soft in (("euclidean", False), ("squared_euclidean", False), ("cosine", True)):
            squares = None if distance == "cosine" else row
            miner = TritonMining(
                MiningProblem(SIZE, classes, distance, 0.0 if soft else 5.0, soft),
                torch.empty(SIZE, WIDTH, dtype=dtype, device="meta"),
            )
            with recorded(gpu.shared_memory) as launches:
                for gradients in (True, False):
                    miner.all_triplets(0, block, squares, squares, gradients)
                    miner.semi_hard(0, block, squares, squares, gradients)
                miner.hard(0, block, squares, squares)
            yield from ((f"{name}, {distance}{', soft' if soft else ''}", found) for found in launches)
