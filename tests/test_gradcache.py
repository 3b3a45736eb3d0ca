"""The gradient cache: the same gradients as one pass over the whole batch, with one mini-batch's graph at a time."""

import gc
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tileloss.errors import InputError, ShapeError
from tileloss.functional import contrastive_loss
from tileloss.gradcache import GradCache, RandContext, backward_by_columns

oracle = pytest.importorskip("sentence_transformers.base.losses.gradcache")


class Encoder(nn.Module):
    """Means of word vectors after dropout, through two layers: a text encoder in small."""

    def __init__(self, dropout: float = 0.3, width: int = 6) -> None:
        super().__init__()
        self.words = nn.Embedding(30, width)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 5))

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        mask = features["attention_mask"][:, :, None].to(self.words.weight.dtype)
        words = self.dropout(self.words(features["input_ids"])) * mask
        features["sentence_embedding"] = self.layers(words.sum(1) / mask.sum(1).clamp(min=1))
        return features


class Ranking(GradCache):
    """The smallest loss with a cache: in-batch ranking, with a factor of its own to train."""

    def __init__(self, model: nn.Module, mini_batch_size: int = 4, **settings: Any) -> None:
        super().__init__()
        self.model, self.mini_batch_size = model, mini_batch_size
        self.factor = nn.Parameter(torch.ones((), dtype=torch.double))
        for name, value in settings.items():
            setattr(self, name, value)

    def compute(self, columns: list[Tensor]) -> Tensor:
        return self.factor * contrastive_loss(*columns, scale=5.0)

    def calculate_loss(
        self, reps: Sequence[Sequence[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        return backward_by_columns(self.compute, reps, with_backward)

    def forward(self, sentence_features: Any, labels: Tensor | None = None) -> Tensor:
        return self.forward_cached(sentence_features, labels)


class OracleRanking(oracle.CachedLossMixin, Ranking):
    """The same loss in sentence-transformers' engine."""

    calculate_loss = Ranking.calculate_loss


def batch(rows: int = 10, columns: int = 2, width: int = 7, seed: int = 0) -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(seed)
    return [
        {
            "input_ids": torch.randint(30, (rows, width), generator=draw),
            "attention_mask": (torch.arange(width) < torch.randint(1, width + 1, (rows, 1), generator=draw)).long(),
            "modality": "text",
        }
        for _ in range(columns)
    ]


def encoder(**options: Any) -> Encoder:
    torch.manual_seed(0)
    return Encoder(**options).double()


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).norm() <= tolerance * value.norm(), name


def step(loss: nn.Module, features: list[dict[str, Any]], weight: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(1)
    loss.zero_grad()
    value = loss(features)
    (value * weight).backward()
    return value.detach(), gradients(loss)


def test_without_dropout_it_is_one_pass_over_the_batch() -> None:
    for settings in (
        {"mini_batch_size": 1},
        {"mini_batch_size": 3},
        {"mini_batch_size": 50},
        {"mini_batch_num_tokens": 9},
    ):
        loss = Ranking(encoder(dropout=0.0), **settings)
        value, found = step(loss, batch())
        loss.zero_grad()
        whole = loss.compute([loss.model(x)["sentence_embedding"] for x in batch()])
        whole.backward()
        torch.testing.assert_close(value, whole.detach())
        assert_equal(found, gradients(loss))


@pytest.mark.parametrize("settings", [{"mini_batch_size": 3}, {"mini_batch_num_tokens": 11}], ids=str)
def test_with_dropout_it_is_the_oracles_engine(settings: dict[str, Any]) -> None:
    """Masks are drawn in the same order, so that values and gradients agree bit by bit but for sums."""
    value, found = step(Ranking(encoder(), **settings), batch())
    expected_value, expected = step(OracleRanking(encoder(), **settings), batch())
    torch.testing.assert_close(value, expected_value)
    assert_equal(found, expected)
    assert torch.equal(step(Ranking(encoder(), **settings), batch())[0], value)


def test_the_second_pass_draws_what_the_first_drew() -> None:
    passes: dict[bool, list[Tensor]] = {False: [], True: []}

    class Spied(Ranking):
        def embed_minibatch(self, *args: Any, **kwargs: Any) -> Any:
            assert not args
            assert kwargs.keys() == {
                "sentence_feature", "begin", "end", "with_grad", "copy_random_state", "random_state"
            }  # fmt: skip
            result = super().embed_minibatch(**kwargs)
            passes[kwargs["with_grad"]].append(result[0].detach().clone())
            return result

    loss = Spied(encoder())
    value = loss(batch())
    drawn = torch.rand(3)  # between the passes, as the loss of another model would
    torch.manual_seed(7)
    expected_next = torch.rand(2)
    torch.manual_seed(7)
    value.backward()
    assert torch.equal(torch.rand(2), expected_next), "the generator continues as if nothing had been drawn"
    assert drawn.shape == (3,)
    assert len(passes[True]) == 6
    for first, second in zip(passes[False], passes[True], strict=True):
        assert torch.equal(first, second)


def test_random_state_is_brought_back() -> None:
    context = RandContext(torch.zeros(1), "no tensor")
    first = torch.rand(3)
    outside = torch.get_rng_state()
    for _ in range(2):
        with context:
            assert torch.equal(torch.rand(3), first)
        assert torch.equal(torch.get_rng_state(), outside)
    with pytest.raises(TypeError), context:
        torch.rand("no shape")
    assert torch.equal(torch.get_rng_state(), outside)


def test_the_loss_is_a_leaf_that_scales_all_gradients() -> None:
    """Gradient accumulation and gradient scalers act on the loss alone; the factor of the loss is scaled too."""
    loss = Ranking(encoder())
    _, once = step(loss, batch())
    assert "factor" in once
    _, scaled = step(loss, batch(), weight=1024.0)
    assert_equal(scaled, {name: 1024.0 * x for name, x in once.items()})
    torch.manual_seed(1)
    value = loss(batch())
    assert value.is_leaf
    assert value.requires_grad
    assert value.ndim == 0
    loss.zero_grad()
    for _ in range(2):
        value.backward()
    assert_equal(gradients(loss), {name: 2 * x for name, x in once.items()})
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(value, list(loss.parameters()))


def test_gradients_that_are_there_are_added_to() -> None:
    loss = Ranking(encoder())
    _, once = step(loss, batch())
    torch.manual_seed(1)
    (loss(batch()) / 4).backward()
    assert_equal(gradients(loss), {name: 1.25 * x for name, x in once.items()})


def test_two_forwards_before_one_backward() -> None:
    loss = Ranking(encoder())
    torch.manual_seed(1)
    first, second = loss(batch(seed=3)), loss(batch(6, seed=4))
    (first + 0.5 * second).backward()
    together = gradients(loss)
    loss.zero_grad()
    torch.manual_seed(1)
    loss(batch(seed=3)).backward()
    (0.5 * loss(batch(6, seed=4))).backward()
    assert_equal(together, gradients(loss))


def test_everything_goes_with_the_loss() -> None:
    for backward in (False, True):
        loss, features = Ranking(encoder()), batch()
        value = loss(features)
        kept = [weakref.ref(x["input_ids"]) for x in features]
        del features
        assert all(x() is not None for x in kept)
        if backward:
            value.backward()
        del value
        gc.collect()
        assert not any(x() is not None for x in kept)


def test_without_gradients_there_is_the_value_alone() -> None:
    class Spied(Ranking):
        def embed_minibatch(self, **kwargs: Any) -> Any:
            assert kwargs["copy_random_state"] is False
            result = super().embed_minibatch(**kwargs)
            assert result[1] is None
            return result

        def calculate_loss(self, reps: Any, labels: Any = None, **options: Any) -> Tensor:
            assert not options
            assert not any(x.requires_grad for column in reps for x in column)
            return super().calculate_loss(reps, labels)

    features = batch()
    model = encoder().eval()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            value = Spied(model)(features)
        assert not value.requires_grad
        torch.testing.assert_close(value.item(), Ranking(model)(features).item())
    assert not model.training, "the model's mode is left alone"


def test_graphs_live_one_mini_batch_at_a_time() -> None:
    """Counted by what autograd keeps: none in the first pass, and never more than one mini-batch's in the second."""
    alive, highest = 0, 0

    def freed() -> None:
        nonlocal alive
        alive -= 1

    class Counted(Encoder):
        def forward(self, features: dict[str, Any]) -> dict[str, Any]:
            def keep(x: Tensor) -> Tensor:
                nonlocal alive, highest
                held = x.detach().clone()
                weakref.finalize(held, freed)
                alive += 1
                highest = max(highest, alive)
                return held

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                return super().forward(features)

    torch.manual_seed(0)
    model = Counted().double()
    model(batch(4)[0])["sentence_embedding"].sum().backward()
    of_one, highest = highest, 0
    assert of_one > 0
    value = Ranking(model, mini_batch_size=4)(batch(40))
    assert highest == 0
    value.backward()
    assert highest == of_one
    assert alive == 0


def test_frozen_parameters_and_a_frozen_model() -> None:
    loss = Ranking(encoder())
    _, expected = step(loss, batch())
    loss.model.words.weight.requires_grad_(False)
    _, found = step(loss, batch())
    expected.pop("model.words.weight")
    assert_equal(found, expected)
    loss.model.requires_grad_(False)
    _, found = step(loss, batch())
    assert found.keys() == {"factor"}


def test_inputs_get_gradients_through_a_frozen_model() -> None:
    class Given(nn.Module):
        def forward(self, features: dict[str, Any]) -> dict[str, Any]:
            return {"sentence_embedding": features["vectors"].sin()}

    vectors = [torch.randn(9, 3, dtype=torch.double, requires_grad=True) for _ in range(2)]
    loss = Ranking(Given())
    loss([{"vectors": x} for x in vectors]).backward()
    whole = contrastive_loss(*(x.sin() for x in vectors), scale=5.0)
    for x, gradient in zip(vectors, torch.autograd.grad(whole, vectors), strict=True):
        torch.testing.assert_close(x.grad, gradient)


def test_autocast_is_the_same_in_both_passes() -> None:
    kinds: list[torch.dtype] = []

    class Spied(Ranking):
        def embed_minibatch(self, **kwargs: Any) -> Any:
            result = super().embed_minibatch(**kwargs)
            kinds.append(result[0].dtype)
            return result

    model = encoder().float()
    loss = Spied(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(batch(4))
    value.backward()
    assert kinds == [torch.bfloat16] * 4
    assert value.dtype == torch.float64, "of the factor; the loss itself sums in float32"
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    narrow = gradients(model)
    kinds.clear()
    model.zero_grad()
    torch.manual_seed(1)
    value = loss(batch(4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value.backward()
    assert kinds == [torch.float32] * 4
    assert narrow.keys() == gradients(model).keys()


def test_small_gradients_survive_float16() -> None:
    """The scale of a gradient scaler reaches them before they are rounded."""

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.eye(4))

        def forward(self, features: dict[str, Any]) -> dict[str, Any]:
            return {"sentence_embedding": F.linear(features["vectors"], self.weight).half()}

    class Small(Ranking):
        def compute(self, columns: list[Tensor]) -> Tensor:
            assert columns[0].dtype == torch.float32
            return sum(x.sum() for x in columns) * 1e-10

    model = Half()
    loss = Small(model)([{"vectors": torch.ones(8, 4)}] * 2)
    (loss * 2.0**20).backward()
    torch.testing.assert_close(model.weight.grad, torch.full((4, 4), 16 * 1e-10 * 2.0**20), rtol=1e-3, atol=0)


def test_gradient_scaler_steps_as_without_one() -> None:
    weights = []
    for enabled in (False, True):
        model = encoder().float()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", enabled=enabled)
        torch.manual_seed(1)
        for _ in range(2):
            optimizer.zero_grad()
            scaler.scale(Ranking(model)(batch())).backward()
            scaler.step(optimizer)
            scaler.update()
        weights.append([p.detach().clone() for p in model.parameters()])
    for plain, scaled in zip(*weights, strict=True):
        torch.testing.assert_close(plain, scaled)


def test_mixed_precision_with_a_scaler_is_one_pass_under_autocast() -> None:
    """As close as eight bits allow: the layers round their products, in other places for a mini-batch."""
    model = encoder(dropout=0.0).float()
    loss = Ranking(model).float()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    found = []
    for cached in (True, False):
        loss.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = loss(batch()) if cached else loss.compute([model(x)["sentence_embedding"] for x in batch()])
        scaler.scale(value).backward()
        found.append({name: x / 2.0**14 for name, x in gradients(loss).items()})
    assert found[0]["factor"].isfinite()
    assert_equal(*found, tolerance=2e-2)


def test_entries_that_belong_to_all_texts_reach_every_mini_batch() -> None:
    class Shifted(Encoder):
        def forward(self, features: dict[str, Any]) -> dict[str, Any]:
            assert features["modality"] == "text"
            assert features["prompt_length"].shape == (1,)
            assert features["table"].shape == (3, 5)
            features = super().forward(features)
            features["sentence_embedding"] = features["sentence_embedding"] + features["table"][features["which"]]
            return features

    torch.manual_seed(0)
    model = Shifted(dropout=0.0).double()
    shared = {"prompt_length": torch.tensor([2]), "table": torch.randn(3, 5).double(), "which": torch.tensor(1)}
    loss = Ranking(model)
    value, found = step(loss, [{**x, **shared} for x in batch()])
    loss.zero_grad()
    whole = loss.compute([model({**x, **shared})["sentence_embedding"] for x in batch()])
    whole.backward()
    torch.testing.assert_close(value, whole.detach())
    assert_equal(found, gradients(loss))


def test_unused_columns_are_named() -> None:
    class First(Ranking):
        def compute(self, columns: list[Tensor]) -> Tensor:
            return columns[0].sum()

    for kind in (First, type("Theirs", (OracleRanking,), {"compute": First.compute})):
        with pytest.raises(ValueError, match=r"did not use input column\(s\) 1, 2"):
            kind(encoder())(batch(columns=3))
    assert issubclass(InputError, ValueError)


def test_empty_batches_are_refused() -> None:
    with pytest.raises(ShapeError, match="The batch is empty"):
        Ranking(encoder())(batch(0))


def test_a_loss_that_defines_nothing_says_so() -> None:
    with pytest.raises(NotImplementedError, match="GradCache must define calculate_loss"):
        GradCache().calculate_loss([])


def test_progress_bar_for_each_column_and_pass(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    Ranking(encoder())(batch()).backward()
    assert capsys.readouterr().err == ""
    value = Ranking(encoder(), show_progress_bar=True)(batch())
    assert capsys.readouterr().err.count("3/3") == 2
    value.backward()
    assert capsys.readouterr().err.count("3/3") == 2


def test_a_missing_tqdm_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tqdm", None)
    with pytest.raises(ImportError, match="pip install tqdm"):
        Ranking(encoder(), show_progress_bar=True)(batch())


def test_embeddings_with_a_graph_get_their_gradients() -> None:
    """As wrappers hand them over: made from others, in parts, some with gradients already."""
    sources = [torch.randn(6, 3, dtype=torch.double, requires_grad=True) for _ in range(2)]
    expected = torch.autograd.grad(contrastive_loss(*sources, scale=5.0), sources)
    loss = Ranking(encoder())
    value = loss.calculate_loss([(x * 1.0).split(4) for x in sources], with_backward=True)
    assert not value.requires_grad
    for source, gradient in zip(sources, expected, strict=True):
        torch.testing.assert_close(source.grad, gradient)
    leaves = [[part.detach().requires_grad_() for part in x.split(4)] for x in sources]
    for _ in range(2):
        loss.calculate_loss(leaves, with_backward=True)
    for parts, gradient in zip(leaves, expected, strict=True):
        torch.testing.assert_close(torch.cat([part.grad for part in parts]), 2 * gradient)


class Halves(nn.Module):
    """Queries by one encoder and documents by another, as a router has them."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.docs = Encoder(), Encoder()

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        return (self.docs if features["modality"] == "doc" else self.queries)(features)


@pytest.mark.parametrize(
    "options",
    [{}, {"static_graph": True}, {"find_unused_parameters": True}, {"gradient_as_bucket_view": True}],
    ids=str,
)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.usefixtures("process_group")
def test_distributed_models_synchronise_once(options: dict[str, bool], frozen: bool) -> None:
    """After the last mini-batch; if that one is frozen, after one more with a gradient of zero; later if told so.

    A static graph is learnt from the very first mini-batch, which is sent as well.
    """
    torch.manual_seed(0)
    model = (Halves() if frozen else Encoder()).double()
    if frozen:
        model.docs.requires_grad_(False)
    features = batch()
    features[1]["modality"] = "doc"
    _, expected = step(Ranking(model), features)
    model.zero_grad()
    sent = []
    ddp = DistributedDataParallel(model, **options)
    ddp.register_comm_hook(None, lambda _, bucket: sent.append(bucket.index()) or _finished(bucket.buffer()))
    loss = Ranking(ddp)
    for turn in range(3):
        sent.clear()
        _, found = step(loss, features)
        assert len(sent) == (2 if turn == 0 and "static_graph" in options else 1), turn
        assert_equal({name.replace(".module", ""): x for name, x in found.items()}, expected)
    runs = []
    model.register_forward_hook(lambda *_: runs.append(None))
    with ddp.no_sync():
        sent.clear()
        step(loss, features)
        assert not sent
    assert len(runs) == 2 * 6, "and nothing is run to send"


def _finished(buffer: Tensor) -> Any:
    future: Any = torch.futures.Future()
    future.set_result(buffer)
    return future
