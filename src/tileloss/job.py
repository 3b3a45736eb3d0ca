"""What `tileloss train` can be told: the job's own options, the Trainer's with other defaults, and what they make."""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from tileloss import losses
from tileloss.data import BUILTIN, TrainingData
from tileloss.encoder import POOLINGS, Encoder, StaticEncoder
from tileloss.errors import InputError
from tileloss.similarity import SIMILARITIES

STATIC = "static"
# those that mine triplets among the labelled texts of one column
LABELLED_LOSSES = (
    "BatchAllTripletLoss", "BatchHardTripletLoss", "BatchHardSoftMarginTripletLoss", "BatchSemiHardTripletLoss",
)  # fmt: skip
DISTANCES = ("euclidean", "cosine")


@dataclass
class TrainJob:
    """What to train, on what, with which loss."""

    data: str = field(
        default=BUILTIN,
        metadata={
            "help": "'builtin' (functions installed with this Python and their docstrings, or the packages that they "
            "are from as labels), a .json, .jsonl, .csv, .tsv or .parquet file, the folder of a saved dataset, or a "
            "dataset on the hub; its columns are anchor, positive and any negatives, or one text and 'label'"
        },
    )
    text_columns: list[str] | None = field(
        default=None, metadata={"help": "names of the text columns in order; by default all but 'label' and 'labels'"}
    )
    held_out: float = field(
        default=0.1, metadata={"help": "share of the data to evaluate on, where it has no test split"}
    )
    loss: str = field(
        default="multiple_negatives_ranking",
        metadata={
            "help": "for pairs multiple_negatives_ranking, for texts with labels batch_all, batch_hard, "
            "batch_hard_soft_margin or batch_semi_hard; or the name of any class of tileloss.losses"
        },
    )
    margin: float | None = field(
        default=None, metadata={"help": "how much farther a negative should be than a positive [the loss's own]"}
    )
    distance: str | None = field(
        default=None, metadata={"help": f"distance of the labelled losses: {' or '.join(DISTANCES)} [euclidean]"}
    )
    per_label: int = field(
        default=8, metadata={"help": "texts of one label that the labelled losses get together, an even number"}
    )
    loss_options: str = field(
        default="{}",
        metadata={"help": """arguments of the loss as JSON, such as '{"scale": 30, "similarity_fct": "dot"}'"""},
    )
    model: str = field(
        default=STATIC,
        metadata={
            "help": "'static' (one vector per token, averaged, learned from nothing), or the folder or hub name of a "
            "saved encoder or of any transformers model"
        },
    )
    pooling: str | None = field(
        default=None, metadata={"help": f"how a transformers model is pooled: {', '.join(POOLINGS)} [mean]"}
    )
    max_length: int | None = field(
        default=None, metadata={"help": "tokens of a text that are read [static: 128, others: what the model takes]"}
    )
    dimension: int = field(default=256, metadata={"help": "values in an embedding of a static model"})
    vocabulary_size: int = field(default=24_000, metadata={"help": "tokens of a static model's vocabulary, at most"})
    compare_materialised: bool = field(
        default=True, metadata={"help": "also measure a step of the loss with the whole matrix of similarities"}
    )

    @property
    def labelled(self) -> bool:
        """Whether the loss learns from labels."""
        return loss_class(self.loss) in LABELLED_LOSSES


@dataclass
class TrainArguments(TrainingArguments):
    """The Trainer's arguments, with defaults that suit large batches."""

    output_dir: str = field(default="runs/demo", metadata={"help": "folder for the model, its curves and its figures"})
    per_device_train_batch_size: int | None = field(
        default=None,
        metadata={"help": "pairs or labelled texts per step and device [static: 4096 or 2048, others: 64]"},
    )
    per_device_eval_batch_size: int | None = field(
        default=None, metadata={"help": "texts embedded at once in evaluation [static: 1024, others: 64]"}
    )
    learning_rate: float | None = field(
        default=None,
        metadata={"help": "highest learning rate [static: 0.2, others: 2e-5]"},
    )
    num_train_epochs: float | None = field(
        default=None,
        metadata={"help": "passes over the training part [static: 6, or with labels 10; others: 1]"},
    )
    warmup_steps: float = field(default=0.1, metadata={"help": "steps of warm-up, or their share of all if below 1"})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "how the learning rate falls"})
    logging_steps: float = field(default=5, metadata={"help": "steps between log entries, or their share if below 1"})
    eval_strategy: str = field(default="epoch", metadata={"help": "when to evaluate: no, steps or epoch"})
    save_strategy: str = field(default="no", metadata={"help": "when to write checkpoints: no, steps, epoch or best"})
    dataloader_drop_last: bool = field(
        default=True, metadata={"help": "leave out an epoch's incomplete batch, which has fewer negatives"}
    )
    dataloader_pin_memory: bool = field(default=True, metadata={"help": "pin memory where an accelerator is there"})
    use_cpu: bool = field(
        default=False, metadata={"help": "leave accelerators aside; where there is none, this is so anyway"}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=None, metadata={"help": "with several processes, look for parameters without a gradient [static: no]"}
    )
    report_to: str = field(default="none", metadata={"help": "trackers to report to, such as tensorboard"})

    def __post_init__(self) -> None:
        # without saying so, processes that a launcher starts on a machine without accelerators would not join
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        super().__post_init__()

    def fill(self, static: bool, labelled: bool = False) -> None:
        """Give what was left open its default for a static model, on pairs or labels, or for a transformers model."""
        defaults = {
            "per_device_train_batch_size": (2048 if labelled else 4096, 64),
            "per_device_eval_batch_size": (1024, 64),
            "learning_rate": (0.2, 2e-5),
            "num_train_epochs": (10 if labelled else 6, 1),
            "ddp_find_unused_parameters": (False, None),  # a static model's one parameter is always used
        }
        for name, (for_static, for_others) in defaults.items():
            if getattr(self, name) is None:
                setattr(self, name, for_static if static else for_others)
        # pinned memory speeds up copies to an accelerator; without one it is a warning in every run
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.accelerator.is_available()


def loss_names() -> dict[str, str]:
    """The class of every loss by its short name: "batch_hard" for BatchHardTripletLoss."""
    classes = [name for name in losses.__all__ if issubclass(getattr(losses, name), nn.Module)]
    bare = [re.sub("(?<=.)(Triplet)?Loss$", "", name) for name in classes]
    return {re.sub("(?<=[a-z])(?=[A-Z])", "_", name).lower(): full for name, full in zip(bare, classes, strict=True)}


def loss_class(name: str) -> str:
    """The name of the class in `tileloss.losses` that `name` is, or is short for.

    Raises:
        InputError: when there is none.
    """
    known = loss_names()
    if name not in {*known, *known.values()}:
        listing = ", ".join(f"{short} ({full})" for short, full in known.items())
        raise InputError(f"--loss {name}: there is no such loss. There are: {listing}.")
    return known.get(name, name)


def make_loss(
    name: str,
    options: str,
    model: nn.Module,
    *,
    margin: float | None = None,
    distance: str | None = None,
    gather: bool = False,
) -> nn.Module:
    """The loss called `name`, around `model`, with the arguments in the JSON object `options`.

    Similarities are given by name ("cosine", "dot", "euclidean", "manhattan"), and so are the distances of losses that
    learn from labels ("euclidean", "cosine"), and the loss that another one is put around. `margin` and `distance` are
    arguments too, where they are not None. With `gather`, a loss that can gather across devices does, unless the
    options say otherwise.

    Raises:
        InputError: for an unknown loss or argument, one that is missing or given twice, or options that are no JSON
            object.
    """
    kind = getattr(losses, loss_class(name))
    arguments = _json_object(options)
    parameters = {key: value for key, value in inspect.signature(kind).parameters.items() if key != "model"}
    known = f"{kind.__name__} has no argument {{!r}}. It has: {', '.join(parameters)}."
    if unknown := sorted(arguments.keys() - parameters.keys()):
        raise InputError(f"--loss_options: {known.format(unknown[0])}")
    for option, argument, value in (("margin", "margin", margin), ("distance", "distance_metric", distance)):
        if value is None:
            continue
        if argument not in parameters:
            raise InputError(f"--{option} {value}: {known.format(argument)}")
        if argument in arguments:
            raise InputError(f"{argument!r} is given twice, as --{option} and in --loss_options; leave one out.")
        arguments[argument] = value
    if gather and "gather_across_devices" in parameters:
        arguments.setdefault("gather_across_devices", True)
    needed = [key for key, value in parameters.items() if value.default is value.empty and key not in arguments]
    if needed:
        raise InputError(f"--loss {name} needs {needed[0]!r}: give it in --loss_options, or train from Python.")
    if isinstance(inner := arguments.get("loss"), str):
        arguments["loss"] = make_loss(inner, "{}", model, gather=gather)
    return kind(model, **(arguments | _named_functions(kind.__name__, arguments)))


def _json_object(options: str) -> dict[str, Any]:
    try:
        arguments = json.loads(options)
    except json.JSONDecodeError as error:
        raise InputError(f"--loss_options {options!r} is no JSON: {error}.") from error
    if not isinstance(arguments, dict):
        raise InputError(f'--loss_options must be a JSON object such as {{"scale": 30}}, got {options!r}.')
    return arguments


def _named_functions(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The functions for those arguments of the loss that name one."""
    functions = {}
    if isinstance(similarity := arguments.get("similarity_fct"), str):
        if similarity not in SIMILARITIES:
            raise InputError(
                f"--loss_options: similarity_fct must be one of {list(SIMILARITIES)}, got {similarity!r}."
            )
        functions["similarity_fct"] = SIMILARITIES[similarity]
    if name in LABELLED_LOSSES and (distance := arguments.get("distance_metric")) is not None:
        if distance not in DISTANCES:
            raise InputError(f"--distance must be {' or '.join(DISTANCES)}, got {distance!r}.")
        functions["distance_metric"] = getattr(losses.BatchHardTripletLossDistanceFunction, f"{distance}_distance")
    return functions


def make_encoder(job: TrainJob, data: TrainingData, checkpoint: str | None) -> Encoder:
    """The encoder that `job` describes; from `checkpoint`, if training is resumed from there."""
    if checkpoint is None and job.model == STATIC:
        texts = (text for column in data.text_columns for text in data.train[column])
        return StaticEncoder.from_texts(
            texts, dimension=job.dimension, vocabulary_size=job.vocabulary_size, max_length=job.max_length or 128
        )
    return Encoder.from_pretrained(checkpoint or job.model, pooling=job.pooling, max_length=job.max_length)
