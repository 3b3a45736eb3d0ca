"""A student's embeddings should be a teacher's."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tileloss.errors import ColumnsError, InputError, ShapeError
from tileloss.functional.mean_squared_error import mean_squared_error
from tileloss.functional.pairs import paired_columns
from tileloss.losses import citations
from tileloss.losses.columns import embed_columns
from tileloss.similarity import rounded_as

_METRICS = ("mse", "l2", "cosine")


class EmbedDistillLoss(nn.Module):
    """The embeddings of each column should be those that a teacher made of the same texts.

    Drop-in for sentence-transformers' class of this name: the same arguments, columns, values and gradients. The loss
    is the mean over columns of the mean distance of student and teacher, row by row, in one pass over both each way;
    neither their difference nor unit rows exist as a matrix. The result has the dtype of the student's embeddings, but
    under autocast float32.

    Columns are one or more texts. Labels are the teacher's embeddings: (B, D) for all columns alike, such as
    translations of one text, or (B, columns, D). They get no gradient, and are read in the student's dtype.

    Args:
        model: maps a feature dict to one that holds "sentence_embedding" (B, D), such as a SentenceTransformer.
        distance_metric: "cosine" (1 - cosine similarity), "l2" (the Euclidean distance) or "mse" (the mean, over rows
            and width, of squared differences).
        projection_dim: if set, a linear layer from the model's width to this one, the teacher's, is trained with the
            loss and applied to the student's embeddings. It is not part of the model: see `save_projection`.

    Attributes:
        projection: that layer, or None.

    Raises:
        InputError (a ValueError): at construction, for another metric; at the call, without labels.
        ShapeError (a ValueError): at the call, for labels that do not fit the columns or the embeddings.

    Cost: see `tileloss.functional.paired_distance`; with a projection also one GEMM each way.

    Source: Kim et al. 2023 (arXiv 2301.12005), equations 7 and 8.

    >>> loss = EmbedDistillLoss(model, projection_dim=1024)  # doctest: +SKIP
    >>> loss([text_features], teacher_embeddings).backward()  # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        distance_metric: Literal["mse", "l2", "cosine"] = "cosine",
        projection_dim: int | None = None,
    ) -> None:
        super().__init__()
        if distance_metric not in _METRICS:
            raise InputError(
                f"distance_metric must be one of {', '.join(map(repr, _METRICS))}, but got {distance_metric!r}."
            )
        self.model: Any = model  # with get_embedding_dimension and device, where there is a projection
        self.distance_metric = distance_metric
        self.projection_dim = projection_dim
        self.projection: nn.Linear | None = None
        if projection_dim is not None:
            self.projection = nn.Linear(model.get_embedding_dimension(), projection_dim, device=model.device)  # type: ignore[operator]

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None) -> Tensor:
        """The loss (0-dim) of one batch: a feature dict for each column, and the teacher's embeddings."""
        columns = list(sentence_features)
        if labels is None:
            raise InputError(
                f"{type(self).__name__} requires pre-computed teacher embeddings as labels, (batch_size, teacher_dim) "
                "or (batch_size, columns, teacher_dim): encode the texts by the teacher once, into a column of the "
                "dataset."
            )
        teacher = _by_column(labels.detach(), len(columns))
        return self.compute_loss_from_embeddings(embed_columns(self.model, columns), teacher)

    def compute_loss_from_embeddings(
        self, embeddings: Sequence[Tensor], teacher_embeddings: Tensor | Sequence[Tensor]
    ) -> Tensor:
        """The loss (0-dim) of embeddings (B, D) of each column.

        Args:
            embeddings: the student's.
            teacher_embeddings: the teacher's, for each column, or in a tensor as `forward` takes them.
        """
        if isinstance(teacher_embeddings, Tensor):
            teacher_embeddings = _by_column(teacher_embeddings, len(embeddings))
        if not len(embeddings) == len(teacher_embeddings) > 0:
            raise ColumnsError(
                f"There are {len(embeddings)} columns of student embeddings and {len(teacher_embeddings)} of teacher "
                "embeddings: there must be as many, and at least one."
            )
        distances = [self._distance(*pair) for pair in zip(embeddings, teacher_embeddings, strict=True)]
        return distances[0] if len(distances) == 1 else torch.stack(distances).mean()

    def _distance(
        self,
        student: Tensor,  # (B, D)
        teacher: Tensor,  # (B, D), or of the projection's width
    ) -> Tensor:
        """The mean distance (0-dim) of one column, in the student's dtype."""
        teacher = teacher.to(device=student.device, dtype=student.dtype)
        if self.projection is not None:
            student = self.projection(student)
        if student.shape != teacher.shape and teacher.shape != (1, *student.shape[1:]):  # one row counts for all
            raise ShapeError(
                f"The student's embeddings are {tuple(student.shape)} and the teacher's {tuple(teacher.shape)}: row i "
                "is the same text's in both. A student of another width than the teacher's needs the teacher's as "
                "projection_dim."
            )
        if self.distance_metric == "mse":
            distance = mean_squared_error(student, teacher)
        elif self.distance_metric == "l2":
            distance = paired_columns(student, [teacher], "euclidean")[0].mean()
        else:
            distance = (1 - paired_columns(student, [teacher], "torch_cosine")[0]).mean()
        return rounded_as(distance, student)

    def save_projection(self, path: str | os.PathLike[str]) -> None:
        """Write the projection, which no trainer saves with the model, as a safetensors file.

        Raises:
            InputError (a ValueError): where there is no projection.
        """
        from safetensors.torch import save_file

        if self.projection is None:
            raise InputError(
                f"No projection layer to save: {type(self).__name__} was made without projection_dim, and learns none."
            )
        save_file({name: x.contiguous() for name, x in self.projection.state_dict().items()}, path)

    def load_projection(self, path: str | os.PathLike[str]) -> None:
        """Take the projection from a file of `save_projection`, or sentence-transformers'; makes one where none is.

        The file is read as numbers; nothing in it is executed.

        Raises:
            ShapeError (a ValueError): for a file that holds no projection, or one of other widths than the loss' or
                the model's. The loss is then as it was.
            safetensors.SafetensorError: for a file of another kind, such as a pickle.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            state = load_file(path)
        except SafetensorError as error:
            raise SafetensorError(
                f"{os.fspath(path)} is no safetensors file, the only kind that a projection is read from, and nothing "
                f"in it was executed: write one with save_projection. {error}"
            ) from error
        shapes = {name: tuple(x.shape) for name, x in state.items()}
        taught, own = shapes.get("weight", ()), self.projection
        if len(taught) != 2 or shapes != {"weight": taught, "bias": taught[:1]}:
            raise ShapeError(f"{path} holds {shapes}, not a projection: a weight (to, from) and a bias (to,).")
        to, width = taught
        if own is None:
            expected = self.model.get_embedding_dimension()
            if width != expected:
                raise ShapeError(
                    f"The saved projection expects embeddings of width {width}, and the model's have {expected}."
                )
            own = nn.Linear(width, to, device=self.model.device)
        elif (own.in_features, own.out_features) != (width, to):
            raise ShapeError(
                f"The saved projection ({width} -> {to}) does not match the configured projection ({own.in_features} "
                f"-> {own.out_features})."
            )
        own.load_state_dict(state)
        self.projection, self.projection_dim = own, to

    def get_config_dict(self) -> dict[str, Any]:
        """The settings, as a model card shows them; keys and values are sentence-transformers'."""
        return {"distance_metric": self.distance_metric, "projection_dim": self.projection_dim}

    @property
    def citation(self) -> str:
        """BibTeX of the paper that introduced the loss."""
        return citations.KIM_2023


def _by_column(
    teacher: Tensor,  # (B, D) or (B, columns, D)
    columns: int,
) -> Sequence[Tensor]:  # (B, D) for each column
    if teacher.ndim == 2:
        return [teacher] * columns
    if teacher.ndim != 3:
        raise ShapeError(
            f"The labels must be teacher embeddings, (batch_size, teacher_dim) for all columns alike or (batch_size, "
            f"{columns}, teacher_dim), got shape {tuple(teacher.shape)}."
        )
    if teacher.shape[1] != columns:
        raise ShapeError(
            f"Number of label columns ({teacher.shape[1]}) does not match the number of text columns ({columns}): "
            f"pass (batch_size, {columns}, teacher_dim), or (batch_size, teacher_dim) for all columns alike."
        )
    return teacher.unbind(dim=1)
