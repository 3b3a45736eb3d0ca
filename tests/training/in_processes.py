"""Trains the small model with sentence-transformers' trainer, in as many processes as a launcher has started.

Run by a launcher as `in_processes.py FOLDER`, where `model` and `data` are. Every process writes down what it logged
and where its weights ended, for several choices of losses: starting the processes is what takes time.
"""

import json
import sys
from pathlib import Path
from typing import Any

import datasets
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer import losses as stock

from tileloss import losses


def gathered(library: Any, model: Any) -> dict[str, Any]:
    in_batch = library.MultipleNegativesRankingLoss(model, gather_across_devices=True)
    return {"pairs": in_batch, "graded": library.CoSENTLoss(model)}


def mined(library: Any, model: Any) -> dict[str, Any]:
    return {"classes": library.BatchSemiHardTripletLoss(model)}


RUNS = {"ours": (gathered, losses), "stock": (gathered, stock), "mined": (mined, losses)}


def main(folder: Path) -> None:
    found = {}
    for name, (loss_of, library) in RUNS.items():
        model = SentenceTransformer(str(folder / "model"), device="cpu")
        loss = loss_of(library, model)
        data = datasets.load_from_disk(str(folder / "data"))
        arguments = SentenceTransformerTrainingArguments(
            output_dir=str(folder / name), max_steps=4, per_device_train_batch_size=8, learning_rate=1e-3,
            logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True, seed=3,
            # parts of one batch, so that all processes call the same loss: some exchange embeddings, others do not
            accelerator_config={"split_batches": True}, ddp_timeout=60,
        )  # fmt: skip
        data = datasets.DatasetDict({key: data[key] for key in loss})
        trainer = SentenceTransformerTrainer(model, args=arguments, train_dataset=data, loss=loss)
        trainer.train()
        found[name] = {
            "processes": arguments.world_size,
            "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
            "weights": [parameter.double().norm().item() for parameter in model.parameters()],
        }
    (folder / f"{arguments.process_index}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
