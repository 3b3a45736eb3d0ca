"""The cosine similarity of two texts should be the number that the label gives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from tileloss.losses.columns import embed_columns, expect_columns
from tileloss.losses.labels import one_label_each
from tileloss.losses.prefixes import Prefixes, paired_loss
from tileloss.losses.wrapping import replaced


class CosineSimilarityLoss(nn.Module):
    """The cosine similarity of two texts should be the number that the label gives.

    Drop-in for sentence-transformers' class of this name: the same arguments, values and gradients. The loss is
    loss_fct(cos_score_transformation(cosine), label), by default the mean of (cosine - label)^2. Similarities and
    gradients take one pass over the embeddings each, without unit rows or products in between.

    Columns are (text, text), labels one number for each pair, such as a similarity between 0 and 1.

    Args:
        model: maps a feature dict to one that holds "sentence_embedding" (B, D), such as a SentenceTransformer.
        loss_fct: compares similarities (B,) with labels (B,), in float32 unless the embeddings are float64.
        cos_score_transformation: is applied to the similarities first.

    Raises:
        ShapeError (a ValueError and IndexError): at the call, for a single column, or labels that are not one a pair.
        MissingError (an AttributeError): at the call, without labels.

    Cost: see `tileloss.functional.paired_similarity`.

    Source: Reimers and Gurevych 2019 (arXiv 1908.10084), section 3, the regression objective.

    >>> loss = CosineSimilarityLoss(model)  # doctest: +SKIP
    >>> loss([first_features, second_features], torch.tensor([0.9, 0.1])).backward()  # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fct: Callable[[Tensor, Tensor], Tensor] = nn.MSELoss(),  # noqa: B008  # stateless, and shared on purpose
        cos_score_transformation: Callable[[Tensor], Tensor] = nn.Identity(),  # noqa: B008
    ) -> None:
        super().__init__()
        self.model = model
        self.loss_fct = loss_fct
        self.cos_score_transformation = cos_score_transformation
        self._prefixes: Prefixes | None = None

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor) -> Tensor:
        """The loss (0-dim) of one batch: a feature dict for each column, and a number for each pair."""
        columns = list(sentence_features)
        expect_columns(self, columns, ("text", "text"), more=True)
        return self.compute_loss_from_embeddings(embed_columns(self.model, columns), labels)

    def compute_loss_from_embeddings(self, embeddings: Sequence[Tensor], labels: Tensor) -> Tensor:
        """The loss (0-dim) of embeddings (B, D) of the first two columns, and a number for each pair."""
        expect_columns(self, embeddings, ("text", "text"), more=True)
        first, second = embeddings[:2]
        targets = one_label_each(self, labels, first, "the similarity")

        def compared(cosines: Tensor) -> Tensor:
            return self.loss_fct(self.cos_score_transformation(cosines), targets.float())

        return paired_loss(self._prefixes, first, second, "torch_cosine", compared)

    def at_prefixes(self, prefixes: Prefixes) -> AbstractContextManager[None]:
        """A block in which a call is the weighted sum over widths; see `tileloss.losses.prefixes`."""
        return replaced(self, "_prefixes", prefixes)

    def get_config_dict(self) -> dict[str, Any]:
        """The settings, as a model card shows them; keys and values are sentence-transformers'."""
        return {
            "loss_fct": _full_name(self.loss_fct),
            "cos_score_transformation": _full_name(self.cos_score_transformation),
        }


def _full_name(x: object) -> str:
    """The class of an object, or a class itself, with the module that it comes from."""
    kind = x if isinstance(x, type) else type(x)
    return kind.__name__ if kind.__module__ in (None, "builtins") else f"{kind.__module__}.{kind.__name__}"
