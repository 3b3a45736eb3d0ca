"""The loss at small batch sizes, where the cost of a call shows: each backend, forward alone and with backward.

Run by `make bench`; large batches, memory and rivals are the business of `tileloss bench`.
"""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from tileloss.bench.contestants import CONTESTANTS, Contestant
from tileloss.bench.workloads import WORKLOADS, Case
from tileloss.errors import BackendError

BACKENDS = [name for name in CONTESTANTS if name.startswith("tileloss")]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def steps_or_skip(contestant: Contestant, case: Case) -> dict:
    """The contestant's steps, warm; a backend that cannot run on this machine skips and says why."""
    steps = contestant.steps(WORKLOADS[case.workload], case.embeddings())
    try:
        steps.forward_backward()
    except BackendError as error:
        pytest.skip(str(error))
    return steps._asdict()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("batch", [32, 512])
@pytest.mark.parametrize("workload", ["default", "four_directions"])
@pytest.mark.parametrize("kind", ["forward", "forward_backward"])
def test_small_batch(benchmark: BenchmarkFixture, kind: str, workload: str, batch: int, name: str) -> None:
    step = steps_or_skip(CONTESTANTS[name], Case(workload, batch, 384, device=DEVICE))[kind]
    benchmark.group = f"{workload}, B={batch}, D=384, {kind}"

    def drained() -> None:
        step()
        if DEVICE != "cpu":
            torch.accelerator.synchronize()

    benchmark(drained)
