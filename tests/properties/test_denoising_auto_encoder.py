"""The denoising auto-encoder, whose decoder is transformers' own on every backend: sentence-transformers' answer.

Drawn are the tokens of damaged and whole texts, their lengths and the side of their padding.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tileloss.losses import DenoisingAutoEncoderLoss

from .judge import SUBJECT

oracle = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
pytestmark = pytest.mark.skipif(SUBJECT == "triton", reason="has no kernels")

# a draw runs two encoders and two decoders, forward and backward, and varies little: of a long search this has a tenth
few_draws = settings(max_examples=max(settings().max_examples // 10, min(settings().max_examples, 40)))

WORDS = 42  # of the vocabulary, of which 0 is padding


@pytest.fixture(params=["tied", "another decoder"])
def both(
    request: pytest.FixtureRequest, tiny_encoder: Callable[[], Any], other_bert: Path
) -> tuple[nn.Module, nn.Module]:
    """Our loss and the oracle's, of equal weights, without dropout."""
    options = () if request.param == "tied" else (str(other_bert), False)
    made = []
    for kind in (DenoisingAutoEncoderLoss, oracle.DenoisingAutoEncoderLoss):
        torch.manual_seed(4)
        made.append(kind(tiny_encoder(), *options).double().eval())
    return made[0], made[1]


@st.composite
def texts(draw: st.DrawFn, rows: int) -> dict[str, Tensor]:
    """A column of token ids (rows, width): one at least in every row, and two places, lest the decoder read none."""
    lengths = draw(st.lists(st.integers(1, 9), min_size=rows, max_size=rows))
    width, left = max(2, *lengths) + draw(st.sampled_from([0, 0, 3])), draw(st.booleans())
    ids = torch.randint(1, WORDS, (rows, width), generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    mask = mask.flip(1) if left else mask
    return {"input_ids": ids * mask, "attention_mask": mask}


@few_draws
@given(st.data())
def test_the_oracles_answer(both: tuple[nn.Module, nn.Module], data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 5))
    columns = [data.draw(texts(rows)) for _ in range(2)]
    found, expected = (answer(loss, columns) for loss in both)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-10, equal_nan=True)


@few_draws
@given(st.data())
def test_columns_are_left_as_they_were(both: tuple[nn.Module, nn.Module], data: st.DataObject) -> None:
    columns = [data.draw(texts(2)) for _ in range(2)]
    before = [{key: x.clone() for key, x in features.items()} for features in columns]
    both[0](columns)
    for features, original in zip(columns, before, strict=True):
        assert all(torch.equal(features[key], x) for key, x in original.items())


def answer(loss: nn.Module, columns: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The value, and the gradient of every parameter that has one."""
    loss.zero_grad()
    value = loss([dict(features) for features in columns], None)
    value.backward()
    gradients = {name: x.grad.clone() for name, x in loss.named_parameters() if x.grad is not None}
    return {"value": value.detach(), **gradients}
