"""sentence-transformers' names standing for our classes: which names, for how long, and what stays."""

import copy
import importlib
import logging
import pickle
import sys
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

import tileloss
from tileloss import losses
from tileloss.errors import VersionError
from tileloss.integrations import sentence_transformers as integration

pytest.importorskip("sentence_transformers")

PACKAGE = "sentence_transformers.sentence_transformer.losses"
MODULES = {  # where each loss is; not what is no loss
    name: getattr(losses, name).__module__.rpartition(".")[2]
    for name in losses.__all__
    if issubclass(getattr(losses, name), torch.nn.Module)
}


@pytest.fixture(autouse=True)
def _unpatched() -> Iterator[None]:
    tileloss.unpatch_sentence_transformers()
    yield
    tileloss.unpatch_sentence_transformers()


def held() -> dict[tuple[str, str], int]:
    """What every name of every module of sentence-transformers, and of this one, stands for."""
    modules = {name: module for name, module in sys.modules.items() if name.startswith("sentence_transformers")}
    return {
        (module, name): id(value)
        for module, holder in (modules | {__name__: sys.modules.get(__name__)}).items()
        for name, value in list(vars(holder).items() if holder else ())
        if not name.startswith("__")
    }


@pytest.mark.parametrize("name", MODULES)
def test_every_import_path_leads_to_ours(name: str) -> None:
    ours = getattr(losses, name)
    paths = [PACKAGE, f"{PACKAGE}.{MODULES[name]}", "sentence_transformers.losses"]
    old = f"sentence_transformers.losses.{name}"
    from sentence_transformers.util.deprecated_import import DEPRECATED_MODULE_PATHS

    if old in DEPRECATED_MODULE_PATHS:
        paths.append(old)
    with tileloss.patch_sentence_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        assert [getattr(importlib.import_module(path), name) for path in paths] == [ours] * len(paths)
        from sentence_transformers import losses as package

        assert getattr(package, name) is ours
    assert all(getattr(importlib.import_module(path), name) is not ours for path in paths)


def test_all_is_put_back() -> None:
    integration.counterparts()  # so that all modules are loaded that will be
    tileloss.patch_sentence_transformers().undo()
    before = held()
    patch = tileloss.patch_sentence_transformers()
    assert held() != before
    assert patch.classes == sorted(MODULES)
    patch.undo()
    assert held() == before
    assert patch.replacements == []
    tileloss.patch_sentence_transformers()
    tileloss.unpatch_sentence_transformers()
    tileloss.unpatch_sentence_transformers()
    assert held() == before


def test_a_block_inside_a_block_leaves_the_outer_one_alone() -> None:
    package = importlib.import_module(PACKAGE)
    with tileloss.patch_sentence_transformers():
        with tileloss.patch_sentence_transformers() as inner:
            assert inner.replacements == []
        assert package.MultipleNegativesRankingLoss is losses.MultipleNegativesRankingLoss
    assert package.MultipleNegativesRankingLoss is not losses.MultipleNegativesRankingLoss


def test_a_module_that_imported_the_class_before_has_ours_and_gets_its_own_back() -> None:
    """Also by another name; what it has bound anew in the meantime is its own affair."""
    stock = importlib.import_module(PACKAGE).MultipleNegativesRankingLoss
    user: Any = ModuleType("a_users_module")
    user.Loss, user.Other, user.KINDS = stock, stock, [stock]
    sys.modules[user.__name__] = user
    try:
        with tileloss.patch_sentence_transformers():
            assert user.Loss is losses.MultipleNegativesRankingLoss
            assert [stock] == user.KINDS, "what no name of a module stands for is not found"
            user.Other = 5
        assert (user.Loss, user.Other) == (stock, 5)
    finally:
        del sys.modules[user.__name__]


def test_what_is_imported_between_two_calls_is_found_by_the_second() -> None:
    stock = importlib.import_module(PACKAGE).MultipleNegativesRankingLoss
    user: Any = ModuleType("a_late_module")
    tileloss.patch_sentence_transformers()
    sys.modules[user.__name__] = user
    try:
        user.Loss = stock
        assert [r.name for r in tileloss.patch_sentence_transformers().replacements] == ["Loss"]
        tileloss.unpatch_sentence_transformers()
        assert user.Loss is stock
    finally:
        del sys.modules[user.__name__]


def test_isinstance_and_subclasses(tiny_encoder: Callable[..., Any]) -> None:
    package = importlib.import_module(PACKAGE)
    stock = package.MultipleNegativesRankingLoss

    class Earlier(stock):  # type: ignore[valid-type, misc]
        pass

    class EarlierCached(package.CachedMultipleNegativesRankingLoss):  # type: ignore[name-defined, misc]
        pass

    with tileloss.patch_sentence_transformers():
        made = package.MultipleNegativesRankingLoss(tiny_encoder())

        class Later(package.MultipleNegativesRankingLoss):  # type: ignore[name-defined, misc]
            pass

        assert isinstance(made, package.MultipleNegativesRankingLoss)
        assert type(made) is losses.MultipleNegativesRankingLoss
        assert issubclass(Later, losses.MultipleNegativesRankingLoss)
        assert issubclass(package.Matryoshka2dLoss, package.AdaptiveLayerLoss)
        earlier = EarlierCached(tiny_encoder())
        assert type(earlier.loss) is stock, "stock code beneath a class that was left keeps to stock classes"
    assert issubclass(Earlier, stock)
    assert isinstance(Earlier(tiny_encoder()), package.MultipleNegativesRankingLoss)


def test_losses_for_sparse_encoders_keep_their_bases_and_work() -> None:
    """Those with stock code beneath them, in modules whose own names have changed."""
    from sentence_transformers.sparse_encoder import losses as sparse

    stock = {name: getattr(importlib.import_module(PACKAGE), name) for name in MODULES}
    torch.manual_seed(0)
    columns = [torch.randn(6, 8).relu().requires_grad_() for _ in range(3)]
    model = torch.nn.Identity()

    def results() -> list[Any]:
        ranking = sparse.SparseMultipleNegativesRankingLoss(model)
        triplet = sparse.SparseTripletLoss(model)
        graded = sparse.SparseCoSENTLoss(model)
        splade = sparse.SpladeLoss(model, ranking, document_regularizer_weight=0.1)
        margins = sparse.SparseMarginMSELoss(model)
        return [
            ranking.compute_loss_from_embeddings(columns, None),
            triplet.compute_loss_from_embeddings(columns, None),
            triplet.get_config_dict(),
            graded.compute_loss_from_embeddings(columns[:2], torch.arange(6.0)),
            margins.compute_loss_from_embeddings(columns, torch.arange(6.0)),
            splade([{"sentence_embedding": column} for column in columns], None)["base_loss"],
        ]

    before = results()
    with tileloss.patch_sentence_transformers():
        assert sparse.SparseMultipleNegativesRankingLoss.__mro__[1] is stock["MultipleNegativesRankingLoss"]
        assert results() == before
    from sentence_transformers import multi_vector_encoder

    multi_vector = vars(multi_vector_encoder.losses)  # type: ignore[attr-defined]
    kinds = [kind for kind in multi_vector.values() if isinstance(kind, type)]
    assert kinds
    assert not any(kind.__module__.startswith("tileloss") for base in kinds for kind in base.__mro__)


def test_what_was_replaced_is_said_once_and_classes_left_on_stock_are_named(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(integration, "_reported", False)

    class Derived(importlib.import_module(PACKAGE).MegaBatchMarginLoss):  # type: ignore[misc]
        pass

    for _ in range(2):
        tileloss.patch_sentence_transformers().undo()
    first, second = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert first.startswith(f"tileloss stands in for {len(MODULES)} loss classes of sentence-transformers")
    assert all(name in first for name in MODULES)
    assert "Derived" in second


def test_an_untested_version_is_refused_unless_it_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    import sentence_transformers

    monkeypatch.setattr(sentence_transformers, "__version__", "99.1.0")
    before = held()
    with pytest.raises(VersionError, match=r"99\.1\.0 .* tested .* 6\.2\.0 .*allow_untested=True"):
        tileloss.patch_sentence_transformers()
    assert held() == before
    with tileloss.patch_sentence_transformers(allow_untested=True) as patch:
        assert patch.classes == sorted(MODULES)


def test_without_sentence_transformers_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ModuleNotFoundError, match="pip install sentence-transformers"):
        tileloss.patch_sentence_transformers()


def test_a_loss_made_while_patched_can_be_pickled_and_outlives_the_patch(tiny_encoder: Callable[..., Any]) -> None:
    package = importlib.import_module(PACKAGE)
    with tileloss.patch_sentence_transformers():
        loss = package.MegaBatchMarginLoss(tiny_encoder(), mini_batch_size=2)
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert type(other) is losses.MegaBatchMarginLoss
        assert other.get_config_dict() == loss.get_config_dict()
