"""Memory at a size that only a GPU could run: every allocation is counted on the meta device, and nothing runs."""

import importlib
from contextlib import nullcontext

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("torch.distributed._tools.mem_tracker")

from torch.distributed._tools.mem_tracker import MemTracker

from tileloss import tiled
from tileloss.kernels import TritonPasses, halves, launch
from tileloss.kernels.hardest import TritonHardest
from tileloss.spec import ContrastiveSpec
from tileloss.tiled import Needs, hardest, matmul

SIZE, WIDTH = 32_768, 768
ADDS_TO_A_WIDER_SUM = pytest.mark.skipif(
    torch.__version__ < "2.13", reason="this torch cannot add a narrow product to a float32 sum on the meta device"
)


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "_WIDE_RESULT_DEVICES", ("meta",))
    driver = importlib.import_module("tileloss.tiled.contrastive")
    for module in (driver, hardest):
        monkeypatch.setattr(module, "full_precision", lambda _: nullcontext())  # meta knows no autocast
    monkeypatch.setattr(launch, "Launch", lambda *_: None)  # a record would keep its tensors alive


@pytest.mark.parametrize("directions", [("query_to_doc",), ("query_to_doc", "doc_to_query")])
@pytest.mark.parametrize(
    ("dtype", "in_halves", "most"),
    [
        pytest.param(torch.bfloat16, False, 500e6, marks=ADDS_TO_A_WIDER_SUM),
        (torch.float32, False, 500e6),
        # prepared rows are half as large again, and a gradient is held twice
        pytest.param(torch.float32, True, 900e6, marks=ADDS_TO_A_WIDER_SUM),
    ],
)
def test_so_many_bytes_beside_inputs_and_gradients(
    dtype: torch.dtype, in_halves: bool, most: float, directions: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the similarities alone would be 2 or 4 GB."""
    monkeypatch.setattr(halves, "pays", lambda *_: in_halves)
    queries, docs = torch.empty(2, SIZE, WIDTH, dtype=dtype, device="meta")
    tracker = MemTracker()
    with launch.recorded(shared_memory=227 << 10), tracker:
        spec = ContrastiveSpec(directions=directions)
        tiled.contrastive_loss(
            queries, docs, 20.0, spec, None, None, Needs(True, True, False), passes_class=TritonPasses
        )
    assert 100e6 < peak_of(tracker) - (queries.nbytes + docs.nbytes) <= most


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_hardest_negatives_take_no_more(dtype: torch.dtype) -> None:
    queries, docs = torch.empty(2, SIZE, WIDTH, dtype=dtype, device="meta")
    tracker = MemTracker()
    with launch.recorded(shared_memory=227 << 10), tracker:
        found, index, own = hardest.hardest_negatives(queries, docs, "cosine", TritonHardest)
        hardest.hardest_negatives_backward(found, own, queries, docs, index, "cosine", [True, True], TritonHardest)
    assert 100e6 < peak_of(tracker) - (queries.nbytes + docs.nbytes) <= 500e6


def peak_of(tracker: MemTracker) -> int:
    (peak,) = (
        found["Total"] for device, found in tracker.get_tracker_snapshot("peak").items() if device.type == "meta"
    )
    return peak
