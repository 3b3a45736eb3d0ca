"""The in-batch softmax loss over row blocks: bounded memory, gradients ready when the forward returns.

Each direction is a matrix of similarities between two sets of rows; blocks of its rows are computed, turned into the
gradient of their logits in place, and multiplied back into the gradients of both sides. Two walks:

* rows: every direction's normaliser is at hand in its own block of rows, so each matrix costs three GEMMs in all;
* statistics first: with doc_to_query, a row's normaliser needs a whole column, so a first walk collects log-sum-exps
  of rows and columns and a second recomputes the blocks into gradients. query_to_doc and doc_to_query share their
  blocks (four GEMMs instead of six), and the symmetric matrices are walked over their upper triangle (two instead of
  three). Where all similarities fit a block's memory they stay between the walks, which spares each its second GEMM.

The walks (`tiled/walk.py`) are the same on every device. What happens to a block between its GEMMs is the business of
a `Passes` object, in PyTorch (`tiled/passes.py`) or in Triton (`tileloss.kernels.passes`). A batch that is spread over
processes has its columns gathered first, or sends them round (`tiled/ring.py`): the business of a `Part`.
"""

from __future__ import annotations

from torch import Tensor

from tileloss.guide import Guide
from tileloss.similarity import full_precision
from tileloss.spec import ContrastiveSpec
from tileloss.tiled.part import Part
from tileloss.tiled.passes import Passes, Problem
from tileloss.tiled.ring import RingWalk
from tileloss.tiled.walk import Needs, Result, Walk


def contrastive_loss(
    queries: Tensor,  # (B, D)
    docs: Tensor,  # (M, D): row i < B is the positive of query i
    scale: float | Tensor,
    spec: ContrastiveSpec,
    doc_ids: Tensor | None,  # (M,)
    mask: Tensor | None,  # (B, M) boolean
    needs: Needs,
    guide: Guide | None = None,
    passes_class: type[Passes] = Passes,
    part: Part | None = None,
) -> Result:
    """The loss, its statistics and its gradients, as `tileloss.reference.contrastive` defines them.

    With a `part`, the rows are that part of a batch over processes. Each must call with its own. The results are those
    of its rows, times the number of processes: the mean over these is the loss, and the gradient, of the batch.

    Memory beside the inputs: the prepared rows, a gradient for each side that needs one, and one or two blocks of
    similarities of bounded size. Time: three GEMMs of B x M x D, or four with doc_to_query.
    """
    part = Part(len(queries)) if part is None else part
    doc_ids = doc_ids if doc_ids is None else part.gathered(doc_ids)
    guide = guide if guide is None else guide._replace(docs=part.gathered(guide.docs))
    problem = Problem(part.size, part.total(len(docs)), scale, spec, doc_ids, mask, guide, part.first)
    passes = passes_class(problem, queries, docs)
    with full_precision(queries):
        return (RingWalk if part.is_ring else Walk)(queries, docs, passes, needs, part).run()
