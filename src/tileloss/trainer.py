"""Training an embedding model with a tileloss loss, on `transformers.Trainer`.

Problem: the Trainer expects a model that returns its own loss; an embedding loss instead wants every text column
embedded by the model, the whole batch at once. Method: a collator that tokenises each text column into a feature dict,
a `compute_loss` that hands them to the loss, and an `evaluate` that measures retrieval, or for labelled texts whether
neighbours share their label; those are also drawn label by label. Everything else (devices, mixed precision,
accumulation, schedules, logging, checkpoints) is the Trainer's. Trade-off: gradient accumulation averages the losses
of small batches; it does not make the batch larger, which is what in-batch negatives live on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainingArguments

from tileloss.data import Labelled, find_class_column, find_label_column, find_text_columns
from tileloss.encoder import Features, embed_texts
from tileloss.errors import InputError
from tileloss.evaluation import LabelTask, RetrievalTask, label_metrics, retrieval_metrics, retrieval_ranks
from tileloss.own_parameters import OwnParameters
from tileloss.sampling import LabelGroupedSampler
from tileloss.similarity import SIMILARITIES, cos_sim, recognise

if TYPE_CHECKING:
    from datasets import Dataset

# the similarity that ranks as a `distance_metric` of the mined losses does, by the name of that function
DISTANCES = {"cosine_distance": "cosine", "euclidean_distance": "euclidean", "eucledian_distance": "euclidean"}
Preprocess = Callable[[list[str]], Features]


class PairCollator:
    """Turns rows into {"features": one feature dict per text column, "labels": (B, ...) tensor or None}.

    Args:
        preprocess: turns a list of texts into a feature dict of tensors.
        text_columns: the columns to tokenise, in this order.
        label_column: the column that becomes "labels", if any.
    """

    def __init__(self, preprocess: Preprocess, text_columns: Sequence[str], label_column: str | None = None) -> None:
        self.preprocess = preprocess
        self.text_columns = tuple(text_columns)
        self.label_column = label_column

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        features = [dict(self.preprocess([row[column] for row in rows])) for column in self.text_columns]
        batch: dict[str, Any] = {"features": features}
        if self.label_column is not None:
            batch["labels"] = torch.tensor([row[self.label_column] for row in rows])
        return batch


class _ZeroLossGradients(TrainerCallback):
    """The Trainer zeroes the gradients of its model only; those of the loss's own parameters are zeroed here."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = list(parameters)

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        for parameter in self.parameters:
            parameter.grad = None


class EmbeddingTrainer(Trainer):
    """A `transformers.Trainer` for embedding models.

    Args:
        model: any module that maps a feature dict to one with "sentence_embedding" (B, D): an encoder of
            `tileloss.encoder`, a SentenceTransformer, or your own.
        args: as for the Trainer. `remove_unused_columns` is switched off: the columns are chosen here.
        loss: a module that is called as `loss(features, labels)` with a list of feature dicts and returns a scalar, or
            a dict of scalars, which are summed. It holds `model` as a submodule; parameters of its own (a learnable
            temperature) are trained and saved too.
        train_dataset: rows with text columns (anchor, positive, then any negatives) and perhaps "label" or "labels".
        eval_dataset: rows like those, or a dict of such datasets; see `evaluate`.
        text_columns: the text columns in order; by default all columns but the label.
        preprocess: turns a list of texts into a feature dict; by default `model.preprocess` or `model.tokenize`.
        labelled: for a loss that mines among texts of a batch by their labels: one text column, batches with at least
            two texts of each label that is in them, and another evaluation. The label column holds whole numbers.
        **kwargs: what else the Trainer takes (callbacks, optimizers, ...).

    Raises:
        InputError: for wrong columns, a model without `preprocess`, a loss that does not hold the model, or fewer rows
            than a batch where `dataloader_drop_last` leaves none.
    """

    control: TrainerControl

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        loss: nn.Module,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        *,
        text_columns: Sequence[str] | None = None,
        preprocess: Preprocess | None = None,
        labelled: Labelled | None = None,
        **kwargs: Any,
    ) -> None:
        self.preprocess = _preprocess_of(model) if preprocess is None else preprocess
        self._own_parameters = OwnParameters(loss, model)
        if len(self._own_parameters) == sum(1 for _ in loss.parameters()):
            raise InputError(
                f"{type(loss).__name__} does not hold the model to be trained, so nothing would be learned. "
                "Construct the loss with the same model: trainer = EmbeddingTrainer(model, args, Loss(model), ...)."
            )
        args.remove_unused_columns = False
        datasets = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
        given = [dataset for dataset in (train_dataset, *datasets) if dataset is not None]
        columns: Sequence[str] = text_columns or ()
        for dataset in given:
            # an evaluation set has the columns of the training set
            columns = find_text_columns(dataset, columns or None, labelled=labelled is not None)
        self.text_columns = tuple(columns)
        self.labelled = labelled
        find_labels = find_label_column if labelled is None else find_class_column
        # every set is checked, the first decides
        label_column = ([find_labels(dataset) for dataset in given] or [None])[0]
        self._sampler = None if train_dataset is None else _sampler(train_dataset, label_column, args, labelled)
        if train_dataset is not None:
            # rows are decoded whole: what is not used would cost time in every batch
            train_dataset = train_dataset.select_columns([*columns, *([label_column] if label_column else [])])
        self.loss = loss
        self._loss_model = model
        self._tasks: dict[int, tuple[Dataset, RetrievalTask | LabelTask]] = {}
        self._stats: dict[str, Tensor] = {}
        self._stats_steps = 0
        super().__init__(
            model=model,
            args=args,
            data_collator=PairCollator(self.preprocess, self.text_columns, label_column),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            **kwargs,
        )
        # the loss is a mean over the batch: the Trainer has to divide it by the number of accumulated batches
        self.model_accepts_loss_kwargs = False
        self.loss.to(args.device)
        self._own_parameters.broadcast()
        if self._own_parameters:
            self.add_callback(_ZeroLossGradients(self._own_parameters.values()))

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> torch.utils.data.Sampler | None:
        """The Trainer's sampler, or for labelled texts one that keeps texts of a label together."""
        # accelerate tells it the epoch, at the start of each and after a checkpoint
        return super()._get_train_sampler(train_dataset) if self._sampler is None else self._sampler

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's optimiser over the parameters of the model and those of the loss itself."""
        own = nn.ParameterDict({name.replace(".", "_"): p for name, p in self._own_parameters.items()})
        return super().create_optimizer(nn.ModuleList([self.model if model is None else model, own]))

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """The Trainer's choice among the model's parameters; decay would pull a temperature of the loss to zero."""
        own = {id(parameter) for parameter in self._own_parameters.values()}
        spared = {name for name, parameter in model.named_parameters() if id(parameter) in own}
        return [name for name in super().get_decay_parameter_names(model) if name not in spared]

    def _use_in_loss(self, model: nn.Module) -> None:
        """Put the wrapped model (data parallel, compiled) in the place of the plain one wherever the loss holds it."""
        if model is self._loss_model:
            return
        for module in list(self.loss.modules()):
            for name, child in list(module.named_children()):
                if child is self._loss_model:
                    setattr(module, name, model)
        self._loss_model = model

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of one batch: its terms' sum, where it gives terms by name.

        The terms, and the loss's `stats`, where it has any, are averaged into the next log entry.
        """
        self._use_in_loss(model)
        loss = self.loss(inputs["features"], inputs.get("labels"))
        stats = getattr(self.loss, "stats", None)
        shown = {} if stats is None else stats._asdict()
        if isinstance(loss, dict):
            shown |= loss
            loss = torch.stack(list(loss.values())).sum()
        if shown and model.training:
            for name, value in shown.items():
                self._stats[name] = self._stats.get(name, 0.0) + value.detach()
            self._stats_steps += 1
        return (loss, {}) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """The Trainer's step; over several processes the gradients of the loss's own parameters are averaged."""
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            self._own_parameters.average_gradients()
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log `logs`, and with a training loss the mean of the loss's `stats` since the last one."""
        if "loss" in logs and self._stats_steps:
            logs |= {name: (total / self._stats_steps).item() for name, total in self._stats.items()}
            self._stats, self._stats_steps = {}, 0
        super().log(logs, start_time)

    def evaluate(
        self,
        eval_dataset: Dataset | dict[str, Dataset] | str | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Quality over the whole evaluation set, with the number of candidates and of seconds that it took.

        Of pairs: recall@1, recall@10 and MRR@10 of search, where the distinct texts of all but the anchor column are
        the candidates. Of labelled texts: accuracy@1 and MAP@R of the labels of their neighbours among the distinct
        texts of the set. The similarity is that of the loss, cosine where it names none. Every process evaluates the
        whole set. Time: one pass of the model over the texts, then
        O(queries * candidates * dimension). Memory: the embeddings and 64 MiB.

        Raises:
            InputError: when there is no evaluation set, or its columns are not those of the training set.
        """
        chosen = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(chosen, str):
            chosen = self.eval_dataset[chosen]
        if isinstance(chosen, dict):
            metrics: dict[str, float] = {}
            for name, dataset in chosen.items():
                metrics |= self.evaluate(dataset, ignore_keys, f"{metric_key_prefix}_{name}")
            return metrics
        if chosen is None:
            raise InputError("There is no dataset to evaluate on; pass eval_dataset to the trainer or to evaluate().")
        start = time.perf_counter()
        task = self._task(chosen)
        if isinstance(task, LabelTask):
            measured = label_metrics(self._embed(task.texts), task.labels, task.groups, self._similarity())
            candidates = len(task.texts)
        else:
            queries, documents = self._embed(task.queries), self._embed(task.documents)
            measured = retrieval_metrics(retrieval_ranks(queries, documents, task.relevant, self._similarity()))
            candidates = len(task.documents)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in measured.items()}
        metrics[f"{metric_key_prefix}_candidates"] = candidates
        metrics[f"{metric_key_prefix}_runtime"] = round(time.perf_counter() - start, 4)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _embed(self, texts: Sequence[str]) -> Tensor:
        embeddings = embed_texts(self.model, self.preprocess, texts, batch_size=self.args.eval_batch_size)
        return embeddings.to(self.args.device)

    def _task(self, dataset: Dataset) -> RetrievalTask | LabelTask:
        # kept with the dataset itself, whose id is then not given to another
        if id(dataset) not in self._tasks:
            columns = find_text_columns(dataset, self.text_columns or None, labelled=self.labelled is not None)
            task: RetrievalTask | LabelTask
            if self.labelled is None:
                task = RetrievalTask.from_dataset(dataset, columns)
            else:
                task = LabelTask.from_dataset(
                    dataset, columns[0], find_class_column(dataset), self.labelled.group_column
                )
            self._tasks[id(dataset)] = (dataset, task)
        return self._tasks[id(dataset)][1]

    def _similarity(self) -> Callable[[Tensor, Tensor], Tensor]:
        # a distance of the mined losses is of all pairs of one set, so that its blocks are those of the namesake here
        distance = getattr(getattr(self.loss, "distance_metric", None), "__name__", "")
        if distance in DISTANCES:
            return SIMILARITIES[DISTANCES[distance]]
        similarity = recognise(getattr(self.loss, "similarity_fct", cos_sim))
        return SIMILARITIES[similarity] if isinstance(similarity, str) else similarity

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write the model as `save_pretrained` does, the loss's own parameters, and the arguments as JSON.

        A model without both `save_pretrained` and `from_pretrained` is written as its state dict.
        """
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        if _is_self_describing(self.model) or (state_dict is None and not self.is_in_train and _can_save(self.model)):
            self.model.save_pretrained(str(folder))
        else:
            super()._save(str(folder), state_dict)
            # pickled arguments would be executed by whoever loads them
            (folder / "training_args.bin").unlink(missing_ok=True)
        self._own_parameters.save(folder)
        (folder / "training_args.json").write_text(self.args.to_json_string() + "\n")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load the model and the loss's own parameters from a checkpoint that `_save` wrote."""
        if _is_self_describing(self.model):
            self.model.load_state_dict(self.model.from_pretrained(resume_from_checkpoint).state_dict())
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._own_parameters.load(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))


def _sampler(
    dataset: Dataset, label_column: str | None, args: TrainingArguments, labelled: Labelled | None
) -> LabelGroupedSampler | None:
    """What draws labelled texts, or None for pairs; raises where there is not one batch to draw."""
    sampler = None
    if labelled is not None:
        seed = args.seed if args.data_seed is None else args.data_seed
        labels = torch.tensor(dataset[label_column][:])
        sampler = LabelGroupedSampler(labels, args.train_batch_size, labelled.per_label, seed)
    rows = len(dataset if sampler is None else sampler)
    if args.dataloader_drop_last and rows < args.train_batch_size:
        raise InputError(
            f"{rows} rows are less than one batch of {args.train_batch_size}, and incomplete batches are dropped. "
            "Lower per_device_train_batch_size, or switch dataloader_drop_last off."
        )
    return sampler


def _is_self_describing(model: nn.Module) -> bool:
    return _can_save(model) and hasattr(type(model), "from_pretrained")


def _can_save(model: nn.Module) -> bool:
    return hasattr(model, "save_pretrained")


def _preprocess_of(model: nn.Module) -> Preprocess:
    for name in ("preprocess", "tokenize"):
        if callable(method := getattr(model, name, None)):
            return method
    raise InputError(
        f"{type(model).__name__} has neither a method `preprocess` nor `tokenize`; pass preprocess=, a function that "
        "turns a list of texts into a dict of tensors."
    )
