"""What a contrastive objective is, apart from its tensors: a value that every layer below reads and none changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tileloss.arguments import finite_number
from tileloss.errors import InputError
from tileloss.similarity import SimilarityFn, recognise

DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
PARTITIONS = ("joint", "per_direction")
HARDNESS_MODES = (None, "in_batch_negatives", "hard_negatives", "all_negatives")


@dataclass(frozen=True)
class ContrastiveSpec:
    """Directions, partition, similarity and hardness of an in-batch softmax loss, checked when it is made.

    Attributes:
        similarity: a name of `tileloss.similarity.SIMILARITIES`, or a callable (N, D), (M, D) -> (N, M).
        directions: which blocks of similarities a row holds, a subset of `DIRECTIONS` with "query_to_doc" in it.
        partition: "joint", one softmax over all blocks of a row, or "per_direction", one over each, averaged.
        hardness: which logits get `hardness_strength * stop_gradient(similarity)` added: None or a `HARDNESS_MODES`.
        hardness_strength: not negative; without effect where `hardness` is None.

    Raises:
        InputError: when an attribute is none of these, or "per_direction" meets a direction without a positive.
    """

    similarity: str | SimilarityFn = "cosine"
    directions: Sequence[str] = ("query_to_doc",)
    partition: str = "joint"
    hardness: str | None = None
    hardness_strength: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "similarity", recognise(self.similarity))
        self._check_directions()
        if self.partition not in PARTITIONS:
            raise InputError(f"partition_mode must be 'joint' or 'per_direction', got {self.partition!r}.")
        if self.partition == "per_direction" and {"query_to_query", "doc_to_doc"} & set(self.directions):
            raise InputError(
                "partition_mode='per_direction' needs the positive among the candidates of every direction, and "
                "'query_to_query' and 'doc_to_doc' never hold it. Use partition_mode='joint', or leave those two out."
            )
        if self.hardness not in HARDNESS_MODES:
            raise InputError(f"hardness_mode must be one of {list(HARDNESS_MODES)}, got {self.hardness!r}.")
        if not finite_number(self.hardness_strength, "hardness_strength must be non-negative") >= 0:
            raise InputError(f"hardness_strength must be non-negative, got {self.hardness_strength!r}.")

    def _check_directions(self) -> None:
        if self.directions == (DIRECTIONS[0],):
            return  # the default needs no look, and in a small batch microseconds count
        if isinstance(self.directions, str):
            raise InputError(f"directions must be a tuple of names, got a string: write ({self.directions!r},).")
        if not self.directions:
            raise InputError("At least one direction must be specified.")
        unknown = sorted(set(map(str, self.directions)) - set(DIRECTIONS))
        if unknown:
            raise InputError(f"Invalid directions: {unknown}. Valid: {list(DIRECTIONS)}.")
        if "query_to_doc" not in self.directions:
            raise InputError("'query_to_doc' direction is required: it holds the positive pair.")
        # one order and no repeats, so that equal objectives compare equal
        object.__setattr__(self, "directions", tuple(name for name in DIRECTIONS if name in self.directions))

    @property
    def partitions(self) -> int:
        """How many softmaxes a row has."""
        return 1 if self.partition == "joint" else len(self.directions)

    @property
    def weighs_hardness(self) -> bool:
        """Whether any logit gets a hardness term."""
        return self.hardness is not None and self.hardness_strength > 0
