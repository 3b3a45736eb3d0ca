"""`tileloss train`: train an embedding model on pairs or on labelled texts, and show what it learned and how fast.

Problem: whether a loss is worth having shows only in a whole run. Method: one command reads pairs, or labelled texts
where the loss learns from labels (by default the Python code installed here), makes an encoder (by default a static
one, learned from nothing), trains it with any loss of `tileloss.losses`, evaluates on held-out texts before, during
and after, and leaves the model, its curves and its figures in a folder. Trade-off: the defaults suit that first run;
every argument of the Trainer can be set. Started by torchrun or accelerate, every process trains on its own part of
each batch, and a loss that can gather across devices does.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import HfArgumentParser

import tileloss
from tileloss.backend import explain
from tileloss.compare import StepCost, compare_with_materialised
from tileloss.data import Labelled, TrainingData, find_class_column, load_data
from tileloss.encoder import StaticEncoder
from tileloss.errors import InputError
from tileloss.job import TrainArguments, TrainJob, make_encoder, make_loss
from tileloss.plots import plot_label_accuracy, plot_loss, plot_recall
from tileloss.sampling import check_layout
from tileloss.trainer import EmbeddingTrainer

METRICS = ("recall@1", "recall@10", "mrr@10")
LABEL_METRICS = ("accuracy@1", "map@r")


def parse(argv: Sequence[str] | None = None) -> tuple[TrainJob, TrainArguments]:
    """The job and the Trainer's arguments on a command line; wrong ones end the process with status 2.

    Raises:
        InputError: for an unknown loss, wrong loss options, a batch that cannot hold two texts of two labels, or a
            checkpoint that is not there.
    """
    parser = HfArgumentParser((TrainJob, TrainArguments), prog="tileloss train", description=__doc__)
    job, args, rest = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    # what is wrong is said before minutes of work
    make_loss(job.loss, job.loss_options, nn.Identity(), margin=job.margin, distance=job.distance)
    if job.labelled and args.per_device_train_batch_size is not None:
        check_layout(args.per_device_train_batch_size, job.per_label)
    if args.resume_from_checkpoint and not Path(args.resume_from_checkpoint).is_dir():
        raise InputError(f"--resume_from_checkpoint {args.resume_from_checkpoint!r} is no folder.")
    return job, args


def main(argv: Sequence[str] | None = None) -> int:
    """Run `tileloss train` with these arguments and return its exit status."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("tileloss").setLevel(logging.INFO)
    job, args = parse(argv)
    # of several processes one speaks for all
    with contextlib.nullcontext() if args.process_index == 0 else contextlib.redirect_stdout(None):
        run(job, args)
    return 0


def run(job: TrainJob, args: TrainArguments) -> dict[str, Any]:
    """Train, evaluate, and write model, curves and figures to `args.output_dir`.

    Returns:
        The figures, as metrics.json holds them.

    Raises:
        InputError: for data, a model or a loss that cannot be used; see `load_data`, `make_encoder` and `make_loss`.
    """
    transformers.set_seed(args.seed)
    data = load_data(
        job.data, text_columns=job.text_columns, held_out=job.held_out, labelled=job.labelled, workers=_workers(),
        progress=args.process_index == 0,
    )  # fmt: skip
    unit, names = ("texts", LABEL_METRICS) if job.labelled else ("pairs", METRICS)
    print(_contents(data, unit))
    encoder = make_encoder(job, data, args.resume_from_checkpoint)
    args.fill(static=isinstance(encoder, StaticEncoder), labelled=job.labelled)
    loss = make_loss(
        job.loss, job.loss_options, encoder, margin=job.margin, distance=job.distance, gather=args.world_size > 1
    )
    trainer = EmbeddingTrainer(
        encoder, args, loss, data.train, data.held_out, text_columns=data.text_columns,
        labelled=Labelled(job.per_label, data.group_column) if job.labelled else None,
    )  # fmt: skip
    parameters = sum(parameter.numel() for parameter in loss.parameters() if parameter.requires_grad)
    print(f"{type(encoder).__name__} of {parameters:,} parameters on {args.device}, {type(loss).__name__}")
    print(explain(torch.empty(args.train_batch_size, encoder.get_embedding_dimension(), device=args.device)))

    before = trainer.evaluate()
    print("before training: " + ", ".join(f"{name} {before[f'eval_{name}']:.3f}" for name in names))
    trained = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint).metrics
    # evaluation is not what is measured
    seconds = trained["train_runtime"] - sum(record.get("eval_runtime", 0) for record in trainer.state.log_history)
    after = trainer.evaluate()
    history = [{**before, "step": 0}, *trainer.state.log_history]
    folder = Path(args.output_dir)
    trainer.save_model(str(folder / "model"))
    # a loss of several processes cannot be measured by one
    costs = _compare(trainer) if job.compare_materialised and args.world_size == 1 else {}
    figures = {
        "before": {name: before[f"eval_{name}"] for name in names},
        "after": {name: after[f"eval_{name}"] for name in names},
        "steps": trainer.state.global_step,
        f"{unit}_per_step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "train_seconds": seconds,
        f"{unit}_per_second": trained["train_samples_per_second"] * trained["train_runtime"] / seconds,
        f"train_{unit}": len(data.train),
        f"held_out_{unit}": len(data.held_out),
        "loss_step": {name: asdict(cost) for name, cost in costs.items()},
        "job": asdict(job),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": _versions(),
        "history": history,
    }
    if trainer.is_world_process_zero():
        (folder / "metrics.json").write_text(json.dumps(figures, indent=2) + "\n")
        plot_loss(history, folder / "loss.png", type(loss).__name__)
        plot, picture = (plot_label_accuracy, "accuracy.png") if job.labelled else (plot_recall, "recall.png")
        plot(history, folder / picture, int(after["eval_candidates"]))
        print(_summary(figures, folder, unit))
    return figures


def _versions() -> dict[str, str]:
    return {
        "tileloss": tileloss.__version__, "torch": torch.__version__,
        "transformers": transformers.__version__, "python": platform.python_version(),
    }  # fmt: skip


def _workers() -> int:
    """Processes to read with: one per core that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _contents(data: TrainingData, unit: str) -> str:
    """How much there is to learn from, and what is held out how."""
    line = (
        f"{len(data.train):,} {unit} to learn from, {len(data.held_out):,} held out ({', '.join(data.text_columns)})"
    )
    if unit == "texts":
        line += f", {len(set(data.train[find_class_column(data.train)])):,} labels"
    if data.group_column is not None:
        line += f"; neighbours are looked for in another {data.group_column}"
    return line


def _compare(trainer: EmbeddingTrainer) -> dict[str, StepCost]:
    """Measure and print a step of the loss on the embeddings of a training batch, tile by tile and materialised."""
    if not hasattr(trainer.loss, "compute_loss_from_embeddings"):
        print(f"{type(trainer.loss).__name__} works on a model, not on embeddings: no comparison of its step.")
        return {}
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    costs = compare_with_materialised(trainer.loss, batch["features"], batch.get("labels"))
    unit = "pairs" if trainer.labelled is None else "texts"
    print(f"One step of the loss, forward and backward, on embeddings of {trainer.args.train_batch_size:,} {unit}:")
    for name, cost in costs.items():
        print(f"  {name:<12} {cost}")
    ours, materialised = costs["tileloss"], costs.get("materialised")
    if materialised is not None:
        line = f"  tileloss takes {ours.seconds / materialised.seconds:.2f} of the time"
        if ours.peak_bytes and materialised.peak_bytes:
            line += f" and {ours.peak_bytes / materialised.peak_bytes:.2f} of the memory"
        print(line)
    return costs


def _summary(figures: dict[str, Any], folder: Path, unit: str) -> str:
    """The last line: what was learned, how fast, and where it is."""
    name = "recall@10" if unit == "pairs" else "accuracy@1"
    before, after = figures["before"][name], figures["after"][name]
    times = f" ({after / before:.1f} times)" if before else ""
    return (
        f"{name} {before:.3f} -> {after:.3f}{times} on {figures[f'held_out_{unit}']:,} held-out {unit}, after "
        f"{figures['steps']:,} steps of {figures[f'{unit}_per_step']:,} {unit} in {figures['train_seconds']:.0f} s "
        f"({figures[f'{unit}_per_second']:,.0f} {unit}/s); model in {folder / 'model'}"
    )
