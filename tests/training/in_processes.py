"""Trains the small model with sentence-transformers' trainer and ours, in as many processes as a launcher has started.

Run by a launcher as `in_processes.py FOLDER`, where `model` and `data` are. Every process writes down what it logged
and where its weights ended, for several choices of losses: starting the processes is what takes time.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer import losses as stock
from torch import nn

from tileloss import losses
from tileloss.integrations import synchronise_losses
from tileloss.trainer import EmbeddingTrainer


def gathered(library: Any) -> Callable[[Any], dict[str, nn.Module]]:
    return lambda model: {
        "pairs": library.MultipleNegativesRankingLoss(model, gather_across_devices=True),
        "graded": library.CoSENTLoss(model),
    }


def mined(model: Any) -> dict[str, nn.Module]:
    return {"classes": losses.BatchSemiHardTripletLoss(model)}


def owning(model: Any) -> dict[str, nn.Module]:
    """Losses with parameters of their own, which begin differently in every process, of either library."""
    rank = int(os.environ["RANK"])
    tension = losses.ContrastiveTensionLossInBatchNegatives(model, scale=20 + rank)
    return {"classes": tension, "rated": stock.SoftmaxLoss(model, 384, num_labels=2)}


def owning_one(model: Any) -> dict[str, nn.Module]:
    scale = nn.Parameter(torch.tensor(20.0 + int(os.environ["RANK"])))
    return {"pairs": losses.MultipleNegativesRankingLoss(model, scale=scale)}


def synchronised(model: Any, **options: Any) -> Any:
    trainer = SentenceTransformerTrainer(model, **options)
    synchronise_losses(trainer)
    return trainer


def of_ours(model: Any, args: Any, train_dataset: Any, loss: Any) -> Any:
    return EmbeddingTrainer(model, args, loss["pairs"], train_dataset["pairs"])


RUNS = {
    "ours": (gathered(losses), SentenceTransformerTrainer),
    "stock": (gathered(stock), SentenceTransformerTrainer),
    "mined": (mined, SentenceTransformerTrainer),
    "owning": (owning, synchronised),
    "of ours": (owning_one, of_ours),
}


def main(folder: Path) -> None:
    found = {}
    for name, (loss_of, trainer_of) in RUNS.items():
        model = SentenceTransformer(str(folder / "model"), device="cpu")
        loss = loss_of(model)
        data = datasets.load_from_disk(str(folder / "data"))
        arguments = SentenceTransformerTrainingArguments(
            output_dir=str(folder / name), max_steps=4, per_device_train_batch_size=8, learning_rate=1e-3,
            logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True, seed=3,
            # parts of one batch, so that all processes call the same loss: some exchange embeddings, others do not
            accelerator_config={"split_batches": True}, ddp_timeout=60,
        )  # fmt: skip
        data = datasets.DatasetDict({key: data[key] for key in loss})
        trainer = trainer_of(model, args=arguments, train_dataset=data, loss=loss)
        trainer.train()
        found[name] = {
            "processes": arguments.world_size,
            "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
            "weights": [parameter.double().norm().item() for parameter in nn.ModuleDict(loss).parameters()],
        }
    (folder / f"{arguments.process_index}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
