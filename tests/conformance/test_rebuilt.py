"""What `tileloss.accelerate` rebuilds has the value, the gradients and the state of what it was made from."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

import tileloss
from tileloss import losses


def test_value_gradients_and_state_are_kept(
    name: str,
    stock: ModuleType,
    make: Callable[..., Any],
    model_of: Callable[[Any], Any],
    value_and_gradients: Callable[..., Any],
) -> None:
    old = make(stock, name)
    model = model_of(old)
    state = torch.get_rng_state()
    new = tileloss.accelerate(old)
    assert torch.equal(torch.get_rng_state(), state)
    assert type(new) is getattr(losses, name)
    assert {n: id(p) for n, p in new.named_parameters()} == {n: id(p) for n, p in old.named_parameters()}
    assert new.get_config_dict() == old.get_config_dict()
    assert new.training == old.training
    assert not model.training, "the model's mode is its own"
    expected, gradients = value_and_gradients(name, old, model)
    found, found_gradients = value_and_gradients(name, new, model)
    assert abs(found - expected) <= 1e-8 * abs(expected)
    assert found_gradients.keys() == gradients.keys()
    for key, gradient in gradients.items():
        assert (found_gradients[key] - gradient).norm() <= 1e-8 * (gradient.norm() + 1e-3), key
