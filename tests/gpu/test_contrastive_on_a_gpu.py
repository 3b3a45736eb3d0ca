"""What only a GPU can show of the triton backend: its memory, its silence towards the host, its sizes, its tuner.

Exactness over the whole table of objectives is in tests/kernels, which runs there too.
"""

import os

os.environ.setdefault("TILELOSS_AUTOTUNE", "0")  # tuning takes seconds a kernel; the one test that needs it calls it

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import tileloss
from tileloss.functional import contrastive_loss, contrastive_loss_with_stats
from tileloss.spec import DIRECTIONS
from tileloss.tiled.blocks import BLOCK_BYTES

pytestmark = pytest.mark.gpu

CLIP = ("query_to_doc", "doc_to_query")
OBJECTIVES: dict[str, dict[str, Any]] = {
    "default": {},
    "three directions, hardness": {"directions": DIRECTIONS[:2] + DIRECTIONS[3:], "hardness": ("all_negatives", 2.0)},
    "clip": {"directions": CLIP, "partition": "per_direction"},
    "four directions": {"directions": DIRECTIONS},
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    torch.cuda.empty_cache()
    with tileloss.use_backend("triton"):
        yield


def batch(size: int, width: int, dtype: torch.dtype, columns: int = 1) -> tuple[Tensor, Tensor]:
    """Queries and documents whose positives are near, as leaves."""
    generator = torch.Generator("cuda").manual_seed(0)
    queries = torch.randn(size, width, device="cuda", generator=generator)
    docs = torch.randn(columns * size, width, device="cuda", generator=generator)
    docs[:size] += 0.5 * queries
    return queries.to(dtype).requires_grad_(), docs.to(dtype).requires_grad_()


def value_and_gradients(queries: Tensor, docs: Tensor, **options: Any) -> list[Tensor]:
    loss = contrastive_loss(queries, docs, **options)
    return [loss.detach(), *torch.autograd.grad(loss, (queries, docs))]


def error(found: Tensor, truth: Tensor) -> float:
    return ((found.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_sizes_that_fit_no_tile(name: str, dtype: torch.dtype) -> None:
    """Full-size tiles and blocks, against float64; unit vectors rounded to the dtype are the largest error."""
    queries, docs = batch(3001, 200, dtype, columns=2)
    exact = [x.detach().double().requires_grad_() for x in (queries, docs)]
    expected = value_and_gradients(*exact, backend="tiled", **OBJECTIVES[name])
    found = value_and_gradients(queries, docs, **OBJECTIVES[name])
    rounding = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
    for part, ours, truth in zip(("loss", "queries", "docs"), found, expected, strict=True):
        assert error(ours, truth) < rounding, part


def test_float32_is_exact_at_highest_and_not_bound_to_be_at_high() -> None:
    queries, docs = batch(8192, 768, torch.float32)  # so many that they are multiplied in halves
    exact = [x.detach().double().requires_grad_() for x in (queries, docs)]
    truth = value_and_gradients(*exact, backend="tiled", directions=CLIP)
    before = torch.get_float32_matmul_precision()
    try:
        for precision, allowed in (("highest", 1e-5), ("high", 5e-3)):
            torch.set_float32_matmul_precision(precision)
            found = value_and_gradients(queries, docs, directions=CLIP)
            assert max(error(a, b) for a, b in zip(found, truth, strict=True)) < allowed, precision
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_two_runs_give_the_same_bits(name: str, dtype: torch.dtype) -> None:
    queries, docs = batch(5000, 384, dtype)
    first, second = (value_and_gradients(queries, docs, **OBJECTIVES[name]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", ["default", "clip"])
def test_large_batches_stay_within_500_megabytes(name: str) -> None:
    """Beside the inputs and their gradients, forward and backward, where the similarities alone would be 2 GB."""
    queries, docs = batch(32_768, 768, torch.bfloat16)
    small = [x[:2048].detach().requires_grad_() for x in (queries, docs)]
    contrastive_loss(*small, **OBJECTIVES[name]).backward()  # whatever libraries set up once
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    contrastive_loss(queries, docs, **OBJECTIVES[name]).backward()
    gradients = queries.nbytes + docs.nbytes
    assert torch.cuda.max_memory_allocated() - before - gradients <= 500e6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_evaluation_holds_no_gradients(dtype: torch.dtype) -> None:
    queries, docs = batch(8192, 768, dtype)
    with torch.no_grad():
        contrastive_loss(queries, docs)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        contrastive_loss(queries, docs)
    prepared = queries.nbytes + docs.nbytes
    if dtype == torch.float32:  # in halves, and those of a block's left rows once more in another order
        prepared *= 2
    assert torch.cuda.max_memory_allocated() - before <= prepared + BLOCK_BYTES["cuda"] + (1 << 20)


@contextmanager
def no_host_waits() -> Iterator[None]:
    """PyTorch raises where the host would wait for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("exclude", ["nothing", "ids", "mask"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_host_never_waits(name: str, exclude: str) -> None:
    queries, docs = batch(2048, 128, torch.bfloat16)
    scale = torch.tensor(20.0, device="cuda", requires_grad=True)
    excluded = {
        "nothing": None,
        "ids": torch.arange(2048, device="cuda") // 2,
        "mask": torch.rand(2048, 2048, device="cuda") < 0.1,
    }[exclude]

    def step() -> None:
        loss, stats = contrastive_loss_with_stats(queries, docs, scale=scale, exclude=excluded, **OBJECTIVES[name])
        (loss + 0 * stats.accuracy).backward()

    step()
    with no_host_waits():
        step()


@pytest.mark.parametrize("exclude", ["nothing", "ids", "mask"])
def test_more_pairs_than_32_bits_count(exclude: str) -> None:
    size = 50_000
    assert size * size > 2**31
    queries, docs = batch(size, 16, torch.float16)
    excluded = {
        "nothing": lambda: None,
        "ids": lambda: torch.arange(size, device="cuda") // 2,
        "mask": lambda: torch.rand(size, size, device="cuda") < 0.5,
    }[exclude]()
    options = {"directions": CLIP, "exclude": excluded}
    found = value_and_gradients(queries, docs, **options)
    exact = [x.detach().float().requires_grad_() for x in (queries, docs)]
    expected = value_and_gradients(*exact, backend="tiled", **options)
    assert error(found[0], expected[0].double()) < 1e-4
    for part, ours, truth in zip(("queries", "docs"), found[1:], expected[1:], strict=True):
        assert error(ours[-1000:], truth[-1000:].double()) < 5e-3, part


def test_more_entries_than_32_bits_count() -> None:
    from tileloss.kernels.unit_rows import unit_rows

    x = torch.ones(2**25 + 3, 64, dtype=torch.float16, device="cuda")
    assert x.numel() > 2**31
    unit, norms = unit_rows(x, torch.float16)
    assert (norms[-3:] == 8.0).all()
    assert (unit[-3:] == 0.125).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tuning_changes_a_bit(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from tileloss.kernels import normalisers

    class Fixed:
        """The kernel in one of its configurations."""

        def __init__(self, config: Any) -> None:
            self.config = config

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            start = normalisers_fwd_kernel.fn[grid]
            return lambda *arguments, **constants: start(*arguments, **constants, **self.config.all_kwargs())

    normalisers_fwd_kernel = normalisers.normalisers_fwd_kernel
    queries, docs = batch(3001, 384, dtype)
    results = []
    for config in normalisers.CONFIGS:
        monkeypatch.setattr(normalisers, "normalisers_fwd_kernel", Fixed(config))
        results.append(value_and_gradients(queries, docs, directions=DIRECTIONS))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("name", ["default", "four directions"])
def test_one_graph_under_compile(name: str) -> None:
    def step(weight: Tensor, x: Tensor) -> Tensor:
        embeddings = (x @ weight).tanh()
        return contrastive_loss(embeddings[:500], embeddings[500:], **OBJECTIVES[name])

    weight = torch.randn(64, 96, device="cuda", requires_grad=True)
    x = torch.randn(1500, 64, device="cuda")
    compiled = torch.compile(step, fullgraph=True)
    (found,), (expected,) = (torch.autograd.grad(run(weight, x), weight) for run in (compiled, step))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("directions", ["query_to_doc", "query_to_doc+doc_to_query"])
def test_the_operator_is_sound(directions: str, dtype: torch.dtype) -> None:
    queries, docs = batch(200, 32, dtype)
    scale = torch.tensor(20.0, device="cuda", requires_grad=True)
    settings = {
        "queries": queries, "docs": docs, "scale_tensor": scale, "doc_ids": None, "mask": None, "guide_queries": None,
        "guide_docs": None, "guide_margin": 0.0, "guide_strategy": "absolute", "scale": 0.0, "similarity": "cosine",
        "directions": directions, "partition": "joint", "hardness": "", "hardness_strength": 0.0,
        "needs": [True, True, True], "backend": "triton",
    }  # fmt: skip
    arguments = tuple(settings[argument.name] for argument in torch.ops.tileloss.contrastive.default._schema.arguments)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.tileloss.contrastive.default, arguments, test_utils=checks)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_tensors_on_another_device_than_the_current_one() -> None:
    queries, docs = batch(300, 64, torch.bfloat16)
    there = [x.detach().to("cuda:1").requires_grad_() for x in (queries, docs)]
    for ours, expected in zip(
        value_and_gradients(*there, directions=CLIP), value_and_gradients(queries, docs, directions=CLIP), strict=True
    ):
        assert ours.device.index == 1
        assert torch.equal(ours.cpu(), expected.cpu())
