"""What blocks and definitions call has a kernel for Apple's GPUs, by PyTorch's own table: none is at hand to ask.

The table is the one that PyTorch's dispatcher is generated from. It does not say which dtypes a kernel takes, except
that no Apple GPU has float64.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tileloss

from .test_compile import CASES, WIDTH, made, of_embeddings

DEVICE = "MPS"
# made of operators that have kernels, or of nothing that a device computes
EVERYWHERE = {
    "CompositeImplicitAutograd", "CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional",
    "BackendSelect",
}  # fmt: skip
ROWS = 300  # too many for any loss to be small


@functools.cache
def operators() -> dict[str, dict[str, Any]]:
    """The entries of PyTorch's table, by name and overload."""
    yaml, torchgen = map(pytest.importorskip, ("yaml", "torchgen"))
    table = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native" / "native_functions.yaml"
    return {entry["func"].split("(")[0]: entry for entry in yaml.safe_load(table.read_text())}


@functools.cache
def has_kernel(name: str) -> bool:
    entry = operators()[name]
    if "structured_delegate" in entry:
        return has_kernel(entry["structured_delegate"])
    keys = [
        key.strip() for listed in entry.get("dispatch", {"CompositeImplicitAutograd": ""}) for key in listed.split(",")
    ]
    return DEVICE in keys or not EVERYWHERE.isdisjoint(keys)


class Watch(TorchDispatchMode):
    """A block in which operators are looked up, ours by what they are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.missing: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "tileloss":
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        found = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::") + f".{func._schema.overload_name}".rstrip(".")
        if not has_kernel(name):
            self.missing.add(name)
        if any(isinstance(x, Tensor) and x.dtype == torch.float64 for x in tree_leaves((args, kwargs, found))):
            self.missing.add(f"{name} of float64")
        return found


# triplets are mined by other passes where classes are small
SMALL_CLASSES = [(name, lambda rows: torch.arange(rows) // 4) for name in CASES if name.startswith("Batch")]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("backend", ["tiled", "reference"])
@pytest.mark.parametrize(("name", "labels"), [*((name, case.labels) for name, case in CASES.items()), *SMALL_CLASSES])
def test_every_operator_has_a_kernel(
    name: str, labels: Callable[[int], Any], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tileloss.tiled.mining._WITHOUT_FLOAT64", ("cpu",))
    loss = made(name)
    columns = [torch.randn(ROWS, WIDTH, requires_grad=True) for _ in range(CASES[name].columns)]
    with tileloss.use_backend(backend), Watch() as watch:
        value = of_embeddings(loss)(columns, labels(ROWS))
        value = sum(value.values()) if isinstance(value, dict) else value
        torch.autograd.grad(value, columns)
    assert not watch.missing
