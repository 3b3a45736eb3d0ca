"""What others' code takes hold of beside the classes: a helper that it imports, an argument that its hooks look up."""

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch


def test_the_random_state_of_a_mini_batch_is_imported_from_the_cached_loss(library: ModuleType) -> None:
    """Cached losses that others write take it from there, to draw the same dropout twice."""
    module = importlib.import_module(f"{library.__name__}.cached_multiple_negatives_ranking")
    state = module.RandContext(torch.zeros(1))
    first = torch.rand(3)
    with state:
        assert torch.equal(torch.rand(3), first)
    assert not torch.equal(torch.rand(3), first)


def test_a_hook_on_the_decoder_finds_its_arguments_by_name(
    library: ModuleType, make: Callable[..., Any], batch: Callable[..., Any]
) -> None:
    loss = make(library, "DenoisingAutoEncoderLoss")
    seen: list[dict[str, Any]] = []
    loss.decoder.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    loss(*batch("DenoisingAutoEncoderLoss", loss.encoder))
    (arguments,) = seen
    assert arguments["attention_mask"] is None
    assert arguments["use_cache"] is False
    assert {"input_ids", "encoder_hidden_states", "encoder_attention_mask"} <= arguments.keys()
