"""What losses own, kept together and saved by sentence-transformers' trainers.

Problem: those trainers train a loss's classifier, projection, scale or decoder, but leave it to each process by itself
(see `tileloss.own_parameters`) and out of their checkpoints, so that a run that is resumed goes on with a new one.
Method: the methods of the trainer that take a step, save and load do so for these parameters too. The gradients are
averaged after the last backward of a step, ahead of a gradient scaler and of clipping.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tileloss.own_parameters import OwnParameters


def synchronise_losses(trainer: Any) -> None:
    """Let a trainer of sentence-transformers keep what its losses own alike in all processes.

    Call it once, in every process, before training. In one process, or where losses own nothing, it changes nothing.

    Args:
        trainer: a SentenceTransformerTrainer, or another trainer of transformers with `loss` (a module or a dict of
            modules), of this library or another.

    >>> trainer = SentenceTransformerTrainer(model, loss=SoftmaxLoss(model, 384, 3))  # doctest: +SKIP
    >>> synchronise_losses(trainer)  # doctest: +SKIP
    >>> trainer.train()  # doctest: +SKIP
    """
    own = OwnParameters(trainer.loss, trainer.model)
    own.broadcast()
    training_step = trainer.training_step

    def synchronised_training_step(*args: Any, **kwargs: Any) -> Tensor:
        loss = training_step(*args, **kwargs)
        if trainer.accelerator.sync_gradients:  # no further batch is to be accumulated
            own.average_gradients()
        return loss

    trainer.training_step = synchronised_training_step


def save_losses(trainer: Any) -> None:
    """Let a trainer of sentence-transformers save what its losses own beside the model, and load it again with it.

    Call it once, before training. Checkpoints and `save_model` then write `loss.safetensors`, which is read by
    `train(resume_from_checkpoint=...)` and by `load_best_model_at_end`. Where losses own nothing, it changes nothing.

    Args:
        trainer: as in `synchronise_losses`.

    Raises:
        InputError (a ValueError): at the loading, for a checkpoint without that file, or of other losses.

    >>> trainer = SentenceTransformerTrainer(model, loss=SoftmaxLoss(model, 384, 3))  # doctest: +SKIP
    >>> save_losses(trainer)  # doctest: +SKIP
    >>> trainer.train(resume_from_checkpoint=True)  # doctest: +SKIP
    """
    own = OwnParameters(trainer.loss, trainer.model)
    save, load = trainer._save, trainer._load_from_checkpoint

    def save_with_losses(output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        save(output_dir, *args, **kwargs)
        own.save(output_dir or trainer.args.output_dir)

    def load_with_losses(checkpoint: str, *args: Any, **kwargs: Any) -> None:
        load(checkpoint, *args, **kwargs)
        own.load(checkpoint)

    trainer._save, trainer._load_from_checkpoint = save_with_losses, load_with_losses
