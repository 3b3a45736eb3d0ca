"""A step on a GPU moves nothing between host and device and asks the device nothing, shown without a GPU.

Nor does it call what PyTorch has in no deterministic form there, and refuses under `use_deterministic_algorithms`.

Tensors on the meta device have shapes and no numbers. Whatever reads one on the host fails, and whatever brings it
numbers from the host is an operator that meets both, or a call with a list. Our operators run as they are, not by the
shapes they announce, and kernels are noted instead of launched. What PyTorch's own operators do inside is left for a
GPU to show.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import tileloss
from tileloss import functional, losses

from .test_compile import CASES, WIDTH, Case, Given, grades, made, of_embeddings

pytest.importorskip("triton")

ROWS = 24
DIMS = [3, 8, 5]
BACKENDS = ("reference", "tiled", "triton")
# what a shape depends on has to be waited for: how many triplets there are, or rows in the largest class
WAITS = {("reference", "BatchAllTripletLoss"), *(("tiled", name) for name in CASES if name.startswith("Batch"))}
# a classifier is GEMMs, and runs as tiled on a GPU
WITHOUT_KERNELS = {"SoftmaxLoss"}

# MatryoshkaLoss over what shares its products in three ways, or does not
INNER: dict[str, tuple[Callable[[nn.Module], nn.Module], Callable[[int], Any]]] = {
    "rows": (losses.MultipleNegativesRankingLoss, lambda rows: None),
    "rows and columns": (losses.MultipleNegativesSymmetricRankingLoss, lambda rows: None),
    "paired cosines": (losses.CoSENTLoss, grades),
    "width by width": (losses.TripletLoss, lambda rows: None),
}
FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "distances": functional.pairwise_distance,
    "Manhattan distances": lambda a, b: functional.pairwise_distance(a, b, metric="manhattan"),
    "similarities": functional.pairwise_similarity,
    "a learnable scale": lambda a, b: functional.contrastive_loss(a, b, scale=a.norm()),
    "a learnable scale of prefixes": lambda a, b: functional.matryoshka_contrastive_loss(
        a, b, dims=DIMS, scale=a.norm()
    ),
    "weighted prefixes": lambda a, b: functional.matryoshka_contrastive_loss(a, b, dims={8: 1.0, 3: 0.25}),
    "cosines of prefixes": lambda a, b: functional.prefix_cosines(a, b, dims=DIMS),
}
# on CUDA, by the documentation of `use_deterministic_algorithms`; scans of floating-point numbers alone
REFUSED = {"histc", "bincount", "put", "put_", "median", "nanmedian", "kthvalue"}
REFUSED_FLOATING = {"cumsum", "cumsum_", "cumprod", "cumprod_"}


class Watch(TorchDispatchMode):
    """A block in which no operator meets both the host and the meta device, and ours show what they are made of."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "tileloss":
            with self, torch._C._EnableTorchFunction(), WatchCalls():  # which PyTorch turns off in here
                return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        found = func(*args, **kwargs)
        devices = {x.device.type for x in tree_leaves((args, kwargs, found)) if isinstance(x, Tensor)}
        assert len(devices) < 2, f"{func} brings numbers from one device to another"
        if "meta" in devices:
            name, results = func.overloadpacket.__name__, tree_leaves(found)
            floating = any(isinstance(x, Tensor) and x.is_floating_point() for x in results)
            assert name not in REFUSED, f"{func} has no deterministic form"
            assert not (floating and name in REFUSED_FLOATING), f"{func} has no deterministic form"
        return found


class WatchCalls(TorchFunctionMode):
    """A block in which no list becomes a tensor on the meta device, for which PyTorch needs no operator there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name in ("__getitem__", "__setitem__"):
            assert not _holds_a_list(args[1]), "rows chosen by a list"
        found = func(*args, **kwargs)
        if name in ("tensor", "as_tensor", "new_tensor") and found.is_meta:
            data = args[1] if name == "new_tensor" else args[0]
            assert isinstance(data, Tensor), f"{name} brings {data} to the device"
        return found


def _holds_a_list(index: Any) -> bool:
    return isinstance(index, list) or (isinstance(index, tuple) and any(isinstance(x, list) for x in index))


@contextmanager
def without_numbers(backend: str, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """A block in which the meta device stands for a GPU."""
    from tileloss.kernels.launch import recorded

    patch.setattr("tileloss.backend._TRITON_DEVICES", ("meta",))
    patch.setattr("tileloss.similarity.is_autocast_enabled", lambda kind: False)  # which knows no such device
    with tileloss.use_backend(backend), recorded(shared_memory=227 << 10), Watch(), WatchCalls():
        yield


def on_meta(columns: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.empty(ROWS, WIDTH, dtype=dtype, device="meta", requires_grad=True) for _ in range(columns)]


def step(function: Callable[..., Any], columns: list[Tensor], labels: Any) -> None:
    value = function(columns, labels)
    value = sum(value.values()) if isinstance(value, dict) else value
    torch.autograd.grad(value, columns)


def after_a_first(loss: nn.Module, columns: int, labels: Any) -> tuple[Callable[..., Any], Any]:
    """The loss and its labels on the meta device, after a step on a CPU, in which a loss may look at labels."""
    step(of_embeddings(loss), [torch.randn(ROWS, WIDTH, requires_grad=True) for _ in range(columns)], labels)
    return of_embeddings(loss.to("meta")), tree_map_only(Tensor, lambda x: x.to("meta"), labels)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_losses(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "triton" and name in WITHOUT_KERNELS:
        pytest.skip("has no kernels")
    case = CASES[name]
    function, labels = after_a_first(made(name), case.columns, case.labels(ROWS))
    with without_numbers(backend, monkeypatch):
        if (backend, name) not in WAITS:
            step(function, on_meta(case.columns), labels)
            return
        with pytest.raises((RuntimeError, NotImplementedError), match=r"item\(\)|nonzero"):
            step(function, on_meta(case.columns), labels)


# on a GPU float32 of the highest precision shares the products of all widths, and what is narrower does not
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", INNER)
def test_losses_at_several_widths(
    name: str, backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, labels_of = INNER[name]
    model = Given()
    loss = losses.MatryoshkaLoss(model, make(model), DIMS, [1.0, 0.5, 2.0])
    columns = 3 if name == "width by width" else 2
    function, labels = after_a_first(loss, columns, labels_of(ROWS))
    with without_numbers(backend, monkeypatch):
        step(function, on_meta(columns, dtype), labels)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with without_numbers(backend, monkeypatch):
        step(lambda columns, _: FUNCTIONS[name](*columns).sum(), on_meta(2), None)


@pytest.mark.usefixtures("_without_a_collector")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [*CASES, *INNER])
def test_nothing_waits_for_the_garbage_collector(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a step has made is gone when it ends: a circle of references would hold a GPU's memory for some steps."""
    if name in WITHOUT_KERNELS and backend == "triton":
        pytest.skip("has no kernels")
    case = CASES.get(name) or Case(3 if name == "width by width" else 2, INNER[name][1])
    model = Given()
    loss = made(name) if name in CASES else losses.MatryoshkaLoss(model, INNER[name][0](model), DIMS)
    function, labels = of_embeddings(loss), case.labels(ROWS)
    monkeypatch.setattr("tileloss.kernels.launch.Launch", lambda *_: None)  # a record would keep its tensors alive
    if backend == "triton":
        function, labels = after_a_first(loss, case.columns, labels)
    with without_numbers(backend, monkeypatch) if backend == "triton" else tileloss.use_backend(backend):
        counts = []
        for _ in range(3):  # the first fills caches, such as of constants
            columns = [x if backend == "triton" else x.new_ones(x.shape, device="cpu") for x in on_meta(case.columns)]
            step(function, [x.detach().requires_grad_() for x in columns], labels)
            del columns
            counts.append(tensors())
    assert counts[1] == counts[2]


def tensors() -> int:
    """How many tensors are alive that were made in the test, the collector not having run."""
    return sum(issubclass(type(x), Tensor) for x in gc.get_objects())


@pytest.fixture
def _without_a_collector() -> Iterator[None]:
    gc.freeze()  # what is there now is not looked through
    gc.disable()
    yield
    gc.enable()
    gc.unfreeze()
