"""The gradient cache: a loss over a whole batch in the activation memory of one mini-batch.

Problem: a loss with in-batch negatives needs all embeddings of a batch at once, and autograd would then hold the
activations of all of them. Method (Gao et al. 2021, arXiv 2101.06983): embed in mini-batches without a graph; compute
the loss and its gradients with respect to the embeddings; in the backward pass embed every mini-batch again, this time
with a graph, and push the kept gradient of its embeddings through it at once. Random state is replayed: dropout
draws the same masks both times. The price is a second forward pass of the model.

The loss that is returned is a leaf whose backward hook does the second half. So `loss.backward()` works as ever, and
so do gradient accumulation, a gradient scaler and everything else that scales the loss; `torch.autograd.grad` does
not, for there is no graph from the loss to the parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tileloss.errors import InputError, ShapeError
from tileloss.minibatches import Features, Range, mini_batch, mini_batch_ranges
from tileloss.sharded import equally_many, is_sharded, is_sharded_as_a_whole


class RandContext:
    """The random state of the CPU and of the tensors' devices as it is now; entering it brings that state back.

    On leaving, the generators continue from where they were before, as if nothing had been drawn in between.
    """

    def __init__(self, *tensors: Any) -> None:
        devices = {x.device for x in tensors if isinstance(x, Tensor)}
        self._state = _random_state(device for device in devices if device.type not in ("cpu", "meta"))
        self._outside: dict[torch.device | None, Tensor] = {}

    def __enter__(self) -> None:
        self._outside = _random_state(device for device in self._state if device is not None)
        _set_random_state(self._state)

    def __exit__(self, *_: object) -> None:
        _set_random_state(self._outside)


def _random_state(devices: Iterable[torch.device]) -> dict[torch.device | None, Tensor]:
    """The state of each device's generator, and under None that of the CPU."""
    state: dict[torch.device | None, Tensor] = {None: torch.get_rng_state()}
    for device in devices:
        module = torch.get_device_module(device)
        state[device] = module.get_rng_state() if device.type == "mps" else module.get_rng_state(device)
    return state


def _set_random_state(state: dict[torch.device | None, Tensor]) -> None:
    for device, generator in state.items():
        if device is None:
            torch.set_rng_state(generator)
        elif device.type == "mps":
            torch.mps.set_rng_state(generator)
        else:
            torch.get_device_module(device).set_rng_state(generator, device)


class GradCache(nn.Module):
    """The base of losses with a gradient cache: they give `calculate_loss` and call `forward_cached`.

    Time is that of the loss and of three model passes, where two suffice without a cache: two forward, one backward.
    Memory is that of one mini-batch's activations, of the embeddings and their gradients, and of what
    `calculate_loss` takes. Losses returned by several forwards may be alive at once; each holds its own features,
    gradients and random states, and frees them when it is dropped.

    Attributes:
        model: maps a feature dict to one that holds "sentence_embedding", a row for each example.
        mini_batch_size: rows that are embedded at a time.
        mini_batch_num_tokens: if set, as many rows as have this many tokens without padding, instead.
        show_progress_bar: show one bar per column and pass, by tqdm.
        uses_gradient_cache: tells wrappers that the model runs again in the backward pass.
    """

    model: nn.Module
    mini_batch_size: int
    mini_batch_num_tokens: int | None = None
    show_progress_bar: bool = False
    uses_gradient_cache: bool = True

    def calculate_loss(
        self,
        reps: Sequence[Sequence[Tensor]],  # of each column, of each mini-batch: (rows, D)
        labels: Any = None,
        *,
        with_backward: bool = False,
    ) -> Tensor:
        """The loss (0-dim) of the embeddings; `with_backward` also adds to their `.grad` and returns it detached."""
        raise NotImplementedError(f"{type(self).__name__} must define calculate_loss.")

    def embed_minibatch(
        self,
        sentence_feature: Features,
        begin: int,
        end: int,
        with_grad: bool,
        copy_random_state: bool,
        random_state: RandContext | None = None,
    ) -> tuple[Tensor, RandContext | None]:
        """Embeddings (end - begin, D) of these rows, and the random state before them if `copy_random_state`."""
        features = mini_batch(sentence_feature, begin, end)
        with random_state or nullcontext(), nullcontext() if with_grad else torch.no_grad():
            # a model may move its inputs to its own devices, and draws its random numbers there
            state = RandContext(*features.values(), *self.model.parameters()) if copy_random_state else None
            return self.model(features)["sentence_embedding"], state

    def embed_minibatch_iter(
        self,
        sentence_feature: Features,
        with_grad: bool,
        copy_random_state: bool,
        random_states: Sequence[RandContext | None] | None = None,
        ranges: Sequence[Range] | None = None,
    ) -> Iterator[tuple[Any, ...]]:
        """What `embed_minibatch` gives for one mini-batch of a column after the other: embeddings come first."""
        if ranges is None:
            ranges = mini_batch_ranges(sentence_feature, self.mini_batch_size, self.mini_batch_num_tokens)
        for index, (begin, end) in enumerate(_progress(ranges, self.show_progress_bar)):
            yield self.embed_minibatch(
                sentence_feature=sentence_feature,
                begin=begin,
                end=end,
                with_grad=with_grad,
                copy_random_state=copy_random_state,
                random_state=None if random_states is None else random_states[index],
            )

    def forward_cached(self, sentence_features: Iterable[Features], labels: Tensor | None = None) -> Tensor:
        """The loss (0-dim) of a batch, a leaf whose backward embeds again; under `no_grad`, the loss alone.

        Raises:
            ShapeError: for a column without rows.
            InputError: where DistributedDataParallel wraps the loss and not its model, and there are other processes;
                where `fully_shard` was given the loss and not its model; where another process with its part of a
                sharded model raised one of these, or has another number of columns.
        """
        columns = list(sentence_features)
        recording = torch.is_grad_enabled()
        if recording:
            self._refuse_to_be_distributed()
        # all ranges before the first forward: a model that writes to its features must not move them in the second
        ranges, counts = self._mini_batches(columns)
        reps: list[list[Tensor]] = []
        between: list[tuple[tuple[Any, ...], ...]] = []
        random_states: list[tuple[RandContext | None, ...]] = []
        for features, column_ranges, count in zip(columns, ranges, counts, strict=True):
            embedded = self.embed_minibatch_iter(
                sentence_feature=features, with_grad=False, copy_random_state=recording, ranges=column_ranges
            )
            kept = ((_kept(part, recording), *others) for part, *others in embedded)
            parts, *others, states = zip(*kept, strict=True)
            reps.append(list(parts[:count]))
            between.append(tuple(other[:count] for other in others))
            random_states.append(states)
        beside = self._beside(between, labels)
        if not recording:
            return self.calculate_loss(reps, beside)
        with _set_aside(self._own_tensors()) as gradients_of_own:
            loss, gradients = self.calculate_loss_and_cache_gradients(reps, beside)
        gradients = [
            [*found, *(torch.zeros_like(found[-1]) for _ in column_ranges[len(found) :])]
            for found, column_ranges in zip(gradients, ranges, strict=True)
        ]
        autocast = _autocast_here(reps[0][0].device)
        replay = _Replay(self, columns, ranges, random_states, gradients, list(gradients_of_own()), autocast)
        loss.register_hook(replay)
        return loss

    def _mini_batches(self, columns: Sequence[Features]) -> tuple[list[list[Range]], list[int]]:
        """The ranges of each column that the model is run on, and how many of them its embeddings are from.

        They are all, but where the model is sharded and other processes have more to run it on.
        """

        def cut() -> list[list[Range]]:
            ranges = [mini_batch_ranges(x, self.mini_batch_size, self.mini_batch_num_tokens) for x in columns]
            if not all(ranges):
                raise ShapeError("The batch is empty: every column needs at least one row.")
            return ranges

        if is_sharded(self.model):
            return equally_many(cut)
        ranges = cut()
        return ranges, [len(column_ranges) for column_ranges in ranges]

    def _refuse_to_be_distributed(self) -> None:
        """A forward that was called by DistributedDataParallel, not one that calls it, would give wrong gradients.

        That sends gradients off after the first backward of the model, and of all others would know nothing. And what
        `fully_shard` made of a loss holds the parameters together for the length of its forward, not of its backward.
        """
        if is_sharded_as_a_whole(self) and not is_sharded_as_a_whole(self.model):
            raise InputError(
                f"{type(self).__name__} was sharded by fully_shard, and its model, which is not, has no whole "
                "parameters when the backward runs it again. Give fully_shard the model and not the loss, or take the "
                "loss without the gradient cache."
            )
        ddp = DistributedDataParallel._get_active_ddp_module()
        if ddp is not None and torch.distributed.get_world_size(ddp.process_group) > 1:
            raise InputError(
                f"{type(self).__name__} runs inside a module that DistributedDataParallel wraps, which would average "
                "the gradients of its first mini-batch alone. Wrap the model and not the loss, as the trainers of "
                "transformers and sentence-transformers do, or take the loss without the gradient cache."
            )

    def calculate_loss_and_cache_gradients(
        self, reps: Sequence[Sequence[Tensor]], beside: Any = None
    ) -> tuple[Tensor, list[list[Tensor]]]:
        """The loss (0-dim, a new leaf) and the gradient of each mini-batch's embeddings.

        Args:
            reps: of each column the embeddings of its mini-batches, which require gradients and have none yet.
            beside: what `calculate_loss` is given beside them: the labels.
        """
        loss = self.calculate_loss(reps, beside, with_backward=True).detach().requires_grad_()
        unused = [str(index) for index, parts in enumerate(reps) if any(part.grad is None for part in parts)]
        if unused:
            raise InputError(
                f"The loss computation of {type(self).__name__} did not use input column(s) {', '.join(unused)}: "
                "their embeddings received no gradient. A column costs two forward passes; remove it from the dataset."
            )
        return loss, [[part.grad for part in parts if part.grad is not None] for parts in reps]

    def _beside(self, between: Sequence[tuple[tuple[Any, ...], ...]], labels: Tensor | None) -> Any:
        """What `calculate_loss` is given beside the embeddings: the labels.

        Or, of each column, what `embed_minibatch` returns between the embeddings and the random state.
        """
        return labels

    def _own_tensors(self) -> list[Tensor]:
        """What the loss trains beside the model, such as a scale: gets its gradient when the model gets its own."""
        of_model = {id(parameter) for parameter in self.model.parameters()}
        return [x for x in self.parameters() if x.requires_grad and id(x) not in of_model]


def backward_by_columns(
    compute: Callable[[list[Tensor]], Tensor],  # of each column (B, D)
    reps: Sequence[Sequence[Tensor]],  # of each column, of each mini-batch: (rows, D)
    with_backward: bool,
) -> Tensor:
    """`calculate_loss` for a loss that needs no mini-batches: one call of `compute` with whole columns.

    With `with_backward`, the mini-batches' gradients are views of the columns' gradients, not copies.
    """
    columns = [torch.cat(list(parts)) if len(parts) > 1 else parts[0] for parts in reps]
    if not with_backward:
        return compute(columns)
    leaves = [column.detach().requires_grad_() for column in columns]
    del columns
    loss = compute(leaves)
    loss.backward()
    computed, its_gradients = [], []
    for leaf, parts in zip(leaves, reps, strict=True):
        if leaf.grad is None:
            continue
        for part, gradient in zip(parts, leaf.grad.split([len(part) for part in parts]), strict=True):
            if part.is_leaf and part.grad is None:
                part.grad = gradient
            else:
                computed.append(part)
                its_gradients.append(gradient)
    if computed:  # all at once, for they may share a graph
        torch.autograd.backward(computed, its_gradients)
    return loss.detach()


@dataclass
class _Replay:
    """The second half of a cached step: embeds every mini-batch again and pushes its gradient into the model.

    It belongs to one forward, so that a second forward before the first backward changes nothing here.
    """

    loss: GradCache
    columns: list[Features]
    ranges: list[list[Range]]
    random_states: list[tuple[RandContext | None, ...]]
    gradients: list[list[Tensor]]
    own: list[tuple[Tensor, Tensor]]
    autocast: Callable[[], AbstractContextManager[None]]

    def __call__(self, d_loss: Tensor) -> None:
        model = getattr(self.loss.model, "_orig_mod", self.loss.model)
        ddp = model if isinstance(model, DistributedDataParallel) else None
        left = sum(map(len, self.ranges))
        trained: tuple[int, int] | None = None  # the last mini-batch whose embeddings had a graph
        for column in range(len(self.columns)):
            iterator = self._embedded_again(column, slice(None))
            for index, gradient in enumerate(self.gradients[column]):
                left -= 1
                with torch.enable_grad(), _synchronised(ddp, last=left == 0):
                    with self.autocast():
                        part, *_ = next(iterator)
                    if part.requires_grad:
                        part.backward((gradient * d_loss).to(part.dtype))
                        trained = column, index
                    synchronised = left == 0 and part.requires_grad
            next(iterator, None)  # so that a progress bar reaches its end
        if ddp is not None and ddp.require_backward_grad_sync and trained is not None and not synchronised:
            self._synchronise(ddp, *trained)
        for tensor, gradient in self.own:
            tensor.backward((gradient * d_loss).to(tensor.dtype))

    def _embedded_again(self, column: int, which: slice) -> Iterator[tuple[Any, ...]]:
        return self.loss.embed_minibatch_iter(
            sentence_feature=self.columns[column],
            with_grad=True,
            copy_random_state=False,
            random_states=self.random_states[column][which],
            ranges=self.ranges[column][which],
        )

    def _synchronise(self, ddp: DistributedDataParallel, column: int, index: int) -> None:
        """Send off the sums of gradients when the last mini-batch had none: by one more, with a gradient of zero."""
        ddp.require_forward_param_sync = False  # the processes that are done already will not take part in that
        with torch.enable_grad(), self.autocast():
            part, *_ = next(self._embedded_again(column, slice(index, index + 1)))
            part.backward(torch.zeros_like(part))


def _kept(part: Tensor, recording: bool) -> Tensor:
    """A mini-batch's embeddings as the loss sees them, where its gradient will be read."""
    if not recording:
        return part.detach()
    # a float16 gradient would underflow before the scale of a gradient scaler, known in the backward, reaches it
    part = part.float() if part.dtype == torch.float16 else part
    return part.detach().requires_grad_()


@contextmanager
def _set_aside(tensors: Sequence[Tensor]) -> Iterator[Callable[[], Iterator[tuple[Tensor, Tensor]]]]:
    """Collect the gradients that the block gives to `tensors`, whose own `.grad` are as before afterwards."""
    before = [x.grad for x in tensors]
    found: list[Tensor | None] = []
    for x in tensors:
        x.grad = None
    try:
        yield lambda: ((x, g) for x, g in zip(tensors, found, strict=True) if g is not None)
    finally:
        found += [x.grad for x in tensors]
        for x, gradient in zip(tensors, before, strict=True):
            x.grad = gradient


@contextmanager
def _synchronised(ddp: DistributedDataParallel | None, last: bool) -> Iterator[None]:
    """One mini-batch of a model that may be distributed: only the last one sends gradients between processes."""
    if ddp is None:
        yield
    elif ddp.static_graph and not ddp._static_graph_delay_allreduce_enqueued:
        # with a static graph the reducer learns the graph from its first backward, which must be a synchronised one
        outside, ddp.require_backward_grad_sync = ddp.require_backward_grad_sync, True
        try:
            yield
        finally:
            ddp.require_backward_grad_sync = outside
    else:
        with nullcontext() if last else ddp.no_sync():
            yield


def _autocast_here(device: torch.device) -> Callable[[], AbstractContextManager[None]]:
    """A factory of contexts with autocast as it is now: a backward is run outside the region of its forward."""
    states = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in {"cpu", device.type}]

    @contextmanager
    def restored() -> Iterator[None]:
        with ExitStack() as stack:
            for kind, enabled, dtype in states:
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled))
            yield

    return restored


def _progress(ranges: Sequence[Range], shown: bool) -> Iterable[Range]:
    if not shown:
        return ranges
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("show_progress_bar=True needs tqdm: pip install tqdm, or leave the bar out.") from error
    return tqdm(ranges, desc="Embed mini-batches")
