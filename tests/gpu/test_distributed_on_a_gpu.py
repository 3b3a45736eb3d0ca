"""A group on NCCL, of the one process that there is: its collectives, and a batch's part on the GPU."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tileloss import losses, reference, tiled
from tileloss.agreement import agree
from tileloss.collectives import GroupPart
from tileloss.spec import DIRECTIONS, ContrastiveSpec
from tileloss.tiled import Needs

pytestmark = pytest.mark.gpu
SIZE, WIDTH = 1000, 64


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    if not dist.is_nccl_available():
        pytest.skip("torch is built without NCCL")
    dist.init_process_group("nccl", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_processes_agree_over_nccl(group: None) -> None:
    assert agree(lambda: "input", lambda _: (SIZE, {"width": WIDTH}), None) == ("input", [SIZE])


@pytest.mark.parametrize("directions", [DIRECTIONS[:1], ("query_to_doc", "doc_to_query"), DIRECTIONS])
def test_a_gathered_part_is_computed_as_the_definition_says(directions: tuple[str, ...], group: None) -> None:
    from tileloss.kernels import TritonPasses

    torch.manual_seed(0)
    queries, docs = torch.randn(SIZE, WIDTH, device="cuda"), torch.randn(2 * SIZE, WIDTH, device="cuda")
    spec = ContrastiveSpec(directions=directions)
    found = tiled.contrastive_loss(
        queries, docs, 20.0, spec, None, None, Needs(True, True, False), passes_class=TritonPasses,
        part=GroupPart([SIZE]),
    )  # fmt: skip
    leaves = [x.double().requires_grad_() for x in (queries, docs)]
    loss, _ = reference.contrastive_loss(*leaves, 20.0, spec)
    torch.testing.assert_close(found.loss.double(), loss.detach(), rtol=1e-5, atol=1e-5)
    for gradient, expected in zip(found[2:4], torch.autograd.grad(loss, leaves), strict=True):
        assert gradient is not None
        assert (gradient.double() - expected).norm() < 1e-4 * expected.norm()


def test_a_loss_of_several_layers_trains_a_model_that_gets_copies_of_its_features(
    group: None, tiny_encoder: Callable[[], Any], texts: Callable[..., list[str]]
) -> None:
    found = []
    for wrap in (lambda model: model, lambda model: DistributedDataParallel(model, [0], find_unused_parameters=True)):
        model = tiny_encoder().to("cuda").eval()
        inner = losses.MultipleNegativesRankingLoss(model)
        loss = losses.AdaptiveLayerLoss(model, inner, n_layers_per_step=-1)
        loss.model = inner.model = wrap(model)
        columns = [dict(model.preprocess(texts(8, seed))) for seed in range(2)]
        value = loss([{key: x.cuda() if torch.is_tensor(x) else x for key, x in c.items()} for c in columns], None)
        value.backward()
        found.append([value.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
