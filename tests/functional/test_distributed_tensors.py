"""A DTensor, of which each process holds a part, is refused by every function before any work."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tileloss import functional as F
from tileloss.errors import InputError


@pytest.fixture
def distribute(process_group: None) -> Callable[[Tensor], Tensor]:
    """Makes a DTensor over the one process that there is."""
    tensors = pytest.importorskip("torch.distributed.tensor")
    mesh = dist.init_device_mesh("cpu", (1,))
    return lambda x: tensors.distribute_tensor(x, mesh, [tensors.Shard(0)])


def test_embeddings(
    function: Callable[[Tensor], Tensor], rows: Tensor, distribute: Callable[[Tensor], Tensor]
) -> None:
    with pytest.raises(InputError, match=r"must be a plain tensor.*, got a DTensor\. Give its full_tensor"):
        function(distribute(rows))


def test_the_other_arguments(rows: Tensor, docs: Tensor, distribute: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(InputError, match=r"^docs must be a plain tensor"):
        F.contrastive_loss(rows, distribute(docs))
    with pytest.raises(InputError, match=r"^b must be a plain tensor"):
        F.paired_similarity(rows, distribute(docs))
    with pytest.raises(InputError, match=r"^labels must be a plain tensor"):
        F.triplet_loss(rows, distribute(torch.arange(len(rows)) // 4))
    with pytest.raises(InputError, match=r"^labels must be a plain tensor"):
        F.triplet_masks(distribute(torch.arange(4) // 2))


def test_what_the_message_advises(rows: Tensor, docs: Tensor, distribute: Callable[[Tensor], Tensor]) -> None:
    whole = distribute(rows).full_tensor()  # type: ignore[attr-defined]
    torch.testing.assert_close(F.contrastive_loss(whole, docs), F.contrastive_loss(rows, docs))
