"""What cannot work, and who does not come: an error in every process, and no process waits for ever."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from batches import case
from torch import nn

from tileloss import distributed
from tileloss.errors import DtypeError, InputError, ShapeError
from tileloss.losses import MultipleNegativesRankingLoss


def refused(kind: type[Exception], words: str, call: Callable[[], Any]) -> None:
    """The call raises this, here and now."""
    with pytest.raises(kind, match=re.escape(words)):
        call()


@case
def what_cannot_work_is_an_error_in_every_process() -> None:
    here = dist.get_rank()
    queries, docs = torch.randn(2, 4, 3)
    loss = distributed.contrastive_loss
    wide = torch.randn(4, 3 + here)
    refused(ShapeError, "agree on the width: process 0 has 3, process 1 has 4", lambda: loss(wide, wide))
    refused(ShapeError, "document columns", lambda: loss(queries, torch.cat([docs] * (1 + here))))
    dtype = torch.float64 if here else torch.float32
    refused(DtypeError, "torch.float64", lambda: loss(queries.to(dtype), docs.to(dtype)))
    refused(InputError, "agree on the scale", lambda: loss(queries, docs, scale=1.0 + here))
    refused(InputError, "exchange", lambda: loss(queries, docs, exchange=["ring", "gather"][here % 2]))
    refused(InputError, "gradients wanted", lambda: loss(queries.requires_grad_(here == 0), docs))
    refused(InputError, "boolean exclude", lambda: loss(queries, docs, exclude=torch.eye(4, dtype=torch.bool)))
    refused(InputError, "one of ['auto', 'gather', 'ring']", lambda: loss(queries, docs, exchange="star"))


@case
def what_one_process_refuses_no_process_waits_for() -> None:
    last = dist.get_rank() == dist.get_world_size() - 1
    queries, docs = torch.randn(2, 4, 3)
    who = f"Process {dist.get_world_size() - 1} refused"
    few = docs[:2] if last else docs
    refused(
        ShapeError if last else InputError,
        "4 queries" if last else who,
        lambda: distributed.contrastive_loss(queries, few),
    )
    none = queries[:0] if last else queries
    refused(InputError, "is empty", lambda: distributed.contrastive_loss(none, none))
    ranking = MultipleNegativesRankingLoss(nn.Identity(), gather_across_devices=True, exclude_same_label=True)
    labels = None if last else torch.arange(4)
    refused(InputError, "needs labels", lambda: ranking.compute_loss_from_embeddings([queries, docs], labels))
    # and all go on together
    assert distributed.contrastive_loss(queries, docs).isfinite()


@case
def a_process_that_does_not_come_is_waited_for_until_the_timeout() -> None:
    group = dist.new_group(timeout=timedelta(seconds=2))
    queries, docs = torch.randn(2, 4, 3)
    start = time.monotonic()
    if dist.get_rank() == 0:
        refused(RuntimeError, "", lambda: distributed.contrastive_loss(queries, docs, group=group))
        assert time.monotonic() - start < 20
    else:
        time.sleep(3)
