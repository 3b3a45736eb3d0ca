"""Memory at a size that only a GPU could run: every allocation is counted on the meta device, and nothing runs."""

import importlib
from contextlib import nullcontext

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("torch.distributed._tools.mem_tracker")

from torch.distributed._tools.mem_tracker import MemTracker

from tileloss import tiled
from tileloss.kernels import TritonPasses, launch
from tileloss.spec import ContrastiveSpec
from tileloss.tiled import Needs, matmul

SIZE, WIDTH = 32_768, 768


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "_WIDE_RESULT_DEVICES", ("meta",))
    driver = importlib.import_module("tileloss.tiled.contrastive")
    monkeypatch.setattr(driver, "full_precision", lambda _: nullcontext())  # meta knows no autocast
    monkeypatch.setattr(launch, "Launch", lambda *_: None)  # a record would keep its tensors alive


@pytest.mark.parametrize("directions", [("query_to_doc",), ("query_to_doc", "doc_to_query")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_at_most_500_megabytes_beside_inputs_and_gradients(dtype: torch.dtype, directions: tuple[str, ...]) -> None:
    """Where the similarities alone would be 2 or 4 GB."""
    queries, docs = torch.empty(2, SIZE, WIDTH, dtype=dtype, device="meta")
    tracker = MemTracker()
    with launch.recorded(shared_memory=227 << 10), tracker:
        spec = ContrastiveSpec(directions=directions)
        tiled.contrastive_loss(queries, docs, 20.0, spec, None, None, Needs(True, True, False), TritonPasses)
    (peak,) = (
        found["Total"] for device, found in tracker.get_tracker_snapshot("peak").items() if device.type == "meta"
    )
    assert 100e6 < peak - (queries.nbytes + docs.nbytes) <= 500e6
