"""The own parameters of losses, kept together by sentence-transformers' trainers.

Problem: those trainers leave a loss's classifier, projection, scale or decoder to each process by itself (see
`tileloss.own_parameters`). Method: their `training_step` averages the gradients after the last backward of a step,
ahead of a gradient scaler and of clipping.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tileloss.own_parameters import OwnParameters


def synchronise_losses(trainer: Any) -> None:
    """Let a trainer of sentence-transformers keep what its losses own alike in all processes.

    Call it once, in every process, before training. In one process, or where losses own nothing, it changes nothing.

    Args:
        trainer: a SentenceTransformerTrainer, or another trainer of transformers with `loss` (a module or a dict of
            modules), of this library or another.

    >>> trainer = SentenceTransformerTrainer(model, train_dataset=pairs, loss=SoftmaxLoss(model, 384, 3))
    ... # doctest: +SKIP
    >>> synchronise_losses(trainer)  # doctest: +SKIP
    >>> trainer.train()  # doctest: +SKIP
    """
    losses = nn.ModuleList(trainer.loss.values() if isinstance(trainer.loss, dict) else [trainer.loss])
    own = OwnParameters(losses, trainer.model)
    own.broadcast()
    training_step = trainer.training_step

    def synchronised_training_step(*args: Any, **kwargs: Any) -> Tensor:
        loss = training_step(*args, **kwargs)
        if trainer.accelerator.sync_gradients:  # no further batch is to be accumulated
            own.average_gradients()
        return loss

    trainer.training_step = synchronised_training_step
