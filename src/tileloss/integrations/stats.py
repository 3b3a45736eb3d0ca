"""What a loss saw on its way (`stats`), in the logs of sentence-transformers' trainers.

Problem: our losses keep statistics of their last call, such as the accuracy within the batch, and those trainers log
what a loss returns and nothing else. Method: a forward hook on each loss adds the statistics up, and the trainer's
`log` is given their means, so that they reach whatever it reports to. Trade-off: over several processes the figures
are those of the process that logs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from tileloss.errors import InputError


def log_stats(trainer: Any) -> None:
    """Let a trainer of sentence-transformers log the means of its losses' `stats` beside the losses themselves.

    Call it once, before training. In evaluation the names begin as that of the loss does ("eval_accuracy"); those of
    losses by data set carry the data set's name. The statistics are added up on their device, without waiting for it.

    Args:
        trainer: a SentenceTransformerTrainer, or another object with `loss` (a module or a dict of modules), `model`
            and `log(logs, ...)`. Wrappers such as MatryoshkaLoss have the statistics of what they hold.

    Raises:
        InputError (a ValueError): when none of its losses keeps statistics, such as those that are not of tileloss.

    >>> trainer = SentenceTransformerTrainer(model, train_dataset=pairs, loss=loss)  # doctest: +SKIP
    >>> log_stats(trainer)  # doctest: +SKIP
    >>> trainer.train()  # doctest: +SKIP
    """
    losses: Mapping[str, nn.Module] = trainer.loss if isinstance(trainer.loss, dict) else {"": trainer.loss}
    watched = {name: loss for name, loss in losses.items() if hasattr(loss, "stats")}
    if not watched:
        kinds = ", ".join(sorted({type(loss).__name__ for loss in losses.values()}))
        raise InputError(f"log_stats found no loss with statistics in the trainer, only {kinds}.")
    means = {True: _Means(), False: _Means()}  # of training, of evaluation
    for name, loss in watched.items():
        prefix = f"{name}_" if name else ""
        loss.register_forward_hook(_collector(prefix, lambda: means[trainer.model.training]))
    log = trainer.log

    def log_with_stats(logs: dict[str, float], *args: Any, **kwargs: Any) -> Any:
        evaluated = next((key for key in logs if key.startswith("eval_") and key.endswith("_loss")), None)
        if "loss" in logs:
            logs = logs | means[True].take("")
        elif evaluated is not None:
            # of several evaluation sets, each is logged by itself and under its name: "eval_name_loss"
            logs = logs | means[False].take("eval_" if "" not in losses else evaluated.removesuffix("loss"))
        return log(logs, *args, **kwargs)

    trainer.log = log_with_stats


class _Means:
    """Sums of named numbers, and how many of each were added."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor | float] = defaultdict(float)
        self._counts: dict[str, int] = defaultdict(int)

    def add(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums[name] + value.detach()
        self._counts[name] += 1

    def take(self, prefix: str) -> dict[str, float]:
        """The means so far, under names that begin with `prefix`; then all is forgotten."""
        taken = {prefix + name: float(total) / self._counts[name] for name, total in self._sums.items()}
        self._sums.clear()
        self._counts.clear()
        return taken


def _collector(prefix: str, means: Callable[[], _Means]) -> Callable[[Any, Any, Any], None]:
    def collect(loss: Any, inputs: Any, value: Any) -> None:
        stats = loss.stats  # many make them at every look
        if stats is not None:
            for name, number in stats._asdict().items():
                means().add(prefix + name, number)

    return collect
