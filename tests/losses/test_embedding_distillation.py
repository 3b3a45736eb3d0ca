"""The losses of a teacher's embeddings, EmbedDistill and MSE, against sentence-transformers' classes."""

import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tileloss.errors import ColumnsError, InputError, ShapeError
from tileloss.losses import EmbedDistillLoss, MSELoss

oracle = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
safetensors_errors = pytest.importorskip("safetensors")
safetensors = pytest.importorskip("safetensors.torch")

METRICS = ["cosine", "l2", "mse"]
SHAPES = [(1, 1, 3), (2, 2, 1), (63, 3, 65), (100, 1, 3), (257, 2, 65)]  # rows, columns, width


class Student(nn.Module):
    """A model whose features are its embeddings already."""

    device = torch.device("cpu")

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.width = width

    def get_embedding_dimension(self) -> int:
        return self.width

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        return features


def student(size: int, columns: int, width: int, dtype: torch.dtype = torch.double) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(size, width).to(dtype) for _ in range(columns)]


def teacher(*shape: int, dtype: torch.dtype = torch.double) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def value_and_gradients(loss: nn.Module, embeddings: list[Tensor], labels: Tensor) -> list[Tensor]:
    """The loss, and the gradients of embeddings and projection."""
    leaves = [x.clone().requires_grad_() for x in embeddings]
    value = loss([{"sentence_embedding": x} for x in leaves], labels)
    return [value.detach(), *torch.autograd.grad(value, [*leaves, *loss.parameters()])]


def compare(kind: type[nn.Module], embeddings: list[Tensor], labels: Tensor, tolerance: float, **options: Any) -> None:
    results = []
    for one in (kind, getattr(oracle, kind.__name__)):
        torch.manual_seed(2)
        loss = one(Student(embeddings[0].shape[1]), **options).to(embeddings[0].dtype)
        results.append(value_and_gradients(loss, embeddings, labels))
    found, expected = results
    assert [x.dtype for x in found] == [x.dtype for x in expected]
    for a, b in zip(found, expected, strict=True):
        assert (a - b).float().norm() <= tolerance * b.float().norm() + 1e-12


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shape", SHAPES)
def test_float64_agrees_to_1e_8(shape: tuple[int, int, int], metric: str, backend: str) -> None:
    """A teacher for all columns alike, and one for each."""
    size, columns, width = shape
    for labels in (teacher(size, width), teacher(size, columns, width)):
        compare(EmbedDistillLoss, student(*shape), labels, 1e-8, distance_metric=metric)
        compare(EmbedDistillLoss, student(*shape), labels[..., :1].repeat_interleave(9, -1), 1e-8,
                distance_metric=metric, projection_dim=9)  # fmt: skip


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shape", SHAPES)
def test_float32_agrees_to_2e_4(shape: tuple[int, int, int], metric: str, backend: str) -> None:
    size, columns, width = shape
    width = max(width, 2)  # between numbers a cosine has no gradient, but for rounding
    labels = teacher(size, columns, width, dtype=torch.float32)
    compare(EmbedDistillLoss, student(size, columns, width, torch.float32), labels, 2e-4, distance_metric=metric)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("metric", METRICS)
def test_narrow_embeddings(metric: str, dtype: torch.dtype, backend: str) -> None:
    """A loss and gradients in the embeddings' dtype, equal to the oracle's within its rounding."""
    tolerance = 4 * torch.finfo(dtype).eps
    labels = teacher(40, 65, dtype=torch.float32)
    compare(EmbedDistillLoss, student(40, 2, 65, dtype), labels, tolerance, distance_metric=metric)
    compare(EmbedDistillLoss, student(40, 2, 65, dtype), labels, tolerance, distance_metric=metric, projection_dim=65)


def test_a_narrow_student_needs_a_narrow_projection() -> None:
    for kind in (EmbedDistillLoss, oracle.EmbedDistillLoss):
        with pytest.raises(RuntimeError, match="dtype"):
            kind(Student(), projection_dim=5)([{"sentence_embedding": torch.randn(4, 5).bfloat16()}], teacher(4, 5))


@pytest.mark.parametrize("options", [{}, {"projection_dim": 7}])
def test_mse(options: dict[str, int], backend: str) -> None:
    labels = teacher(20, options.get("projection_dim", 5))
    compare(MSELoss, student(20, 2, 5), labels, 1e-8, **options)
    assert isinstance(MSELoss(Student()), EmbedDistillLoss)


@pytest.mark.parametrize("metric", METRICS)
def test_the_automatic_choice_agrees_at_any_size(metric: str) -> None:
    for size in (20, 500):
        compare(EmbedDistillLoss, student(size, 2, 512), teacher(size, 512), 1e-8, distance_metric=metric)


@pytest.mark.parametrize("metric", METRICS)
def test_strides_zeros_and_perfect_students(metric: str, backend: str) -> None:
    """At distance zero there is no gradient, and from a zero row the cosine's is the oracle's."""
    (x,), labels = student(9, 1, 4), teacher(9, 4)
    x[3], labels[4], labels[5], x[6] = 0.0, 0.0, x[5], x[6] * 1e-9
    compare(EmbedDistillLoss, [x.T.contiguous().T], labels.T.contiguous().T, 1e-8, distance_metric=metric)
    compare(EmbedDistillLoss, [x], labels[:1].expand(9, 4), 1e-8, distance_metric=metric)
    compare(EmbedDistillLoss, [x], labels.float(), 1e-8, distance_metric=metric)


@pytest.mark.filterwarnings("ignore:Using a target size:UserWarning")
@pytest.mark.parametrize("metric", METRICS)
def test_one_teacher_for_the_whole_batch(metric: str, backend: str) -> None:
    compare(EmbedDistillLoss, student(9, 2, 4), teacher(1, 4), 1e-8, distance_metric=metric)


@pytest.mark.parametrize("metric", METRICS)
def test_an_empty_batch_is_nan(metric: str, backend: str) -> None:
    for kind in (EmbedDistillLoss, oracle.EmbedDistillLoss):
        assert value_and_gradients(kind(Student(), metric), student(0, 1, 4), teacher(0, 4))[0].isnan()


@pytest.mark.parametrize("metric", METRICS)
def test_embeddings_may_be_given_without_a_model(metric: str, backend: str) -> None:
    embeddings, labels = student(9, 2, 4), teacher(9, 2, 4)
    loss, theirs = (kind(Student(4), metric) for kind in (EmbedDistillLoss, oracle.EmbedDistillLoss))
    expected = theirs.compute_loss_from_embeddings(embeddings, list(labels.unbind(1)))
    for form in (labels, labels.unbind(1), list(labels.unbind(1))):
        torch.testing.assert_close(loss.compute_loss_from_embeddings(embeddings, form), expected, rtol=1e-8, atol=0)
    for form in (labels[:, 0], [labels[:, 0]] * 2):
        torch.testing.assert_close(
            loss.compute_loss_from_embeddings(embeddings, form),
            theirs.compute_loss_from_embeddings(embeddings, [labels[:, 0]] * 2),
            rtol=1e-8,
            atol=0,
        )


def test_teachers_get_no_gradient(backend: str) -> None:
    labels = teacher(9, 4).requires_grad_()
    leaf = student(9, 1, 4)[0].requires_grad_()
    EmbedDistillLoss(Student(4))([{"sentence_embedding": leaf}], labels).backward()
    assert labels.grad is None
    assert leaf.grad is not None


class Unreached(Student):
    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        raise AssertionError("work was done before the error")


WRONG: list[tuple[Any, str]] = [
    (None, "pre-computed teacher embeddings"),
    (teacher(4), r"teacher embeddings, .* got shape \(4,\)"),
    (teacher(4, 2, 5, 1), "got shape"),
    (teacher(4, 3, 5), r"Number of label columns \(3\) does not match"),
    (teacher(4, 1, 5), r"Number of label columns \(1\) does not match"),
]


@pytest.mark.parametrize(("labels", "message"), WRONG)
def test_labels_that_do_not_fit_the_columns(labels: Any, message: str) -> None:
    features = [{"sentence_embedding": x} for x in student(4, 2, 5)]
    with pytest.raises(ValueError):  # noqa: PT011  # in the oracle's words
        oracle.EmbedDistillLoss(Student())(features, labels)
    for kind in (EmbedDistillLoss, MSELoss):
        with pytest.raises(InputError, match=message):
            kind(Unreached())(iter(features), labels)


def test_teachers_of_another_shape() -> None:
    for labels in (teacher(3, 5), teacher(4, 6)):
        with pytest.raises(RuntimeError):
            oracle.EmbedDistillLoss(Student()).compute_loss_from_embeddings(student(4, 1, 5), [labels])
        with pytest.raises(ShapeError, match="projection_dim"):
            EmbedDistillLoss(Student()).compute_loss_from_embeddings(student(4, 1, 5), [labels])
    for columns, teachers in ((2, 1), (1, 2), (0, 0)):
        with pytest.raises(ColumnsError, match=f"{columns} columns of student embeddings and {teachers} of teacher"):
            EmbedDistillLoss(Student()).compute_loss_from_embeddings(
                student(4, columns, 5), [teacher(4, 5)] * teachers
            )


def test_metrics_that_there_are_not() -> None:
    for kind in (oracle.EmbedDistillLoss, EmbedDistillLoss):
        with pytest.raises(ValueError, match="distance_metric must be one of 'mse', 'l2', 'cosine', but got 'l1'"):
            kind(Student(), "l1")
    with pytest.raises(InputError):
        EmbedDistillLoss(Student(), "l1")  # type: ignore[arg-type]


def test_a_projection_travels_between_runs_and_packages(tmp_path: Path) -> None:
    """What one package saved the other loads, into a loss with a projection of that shape or with none."""
    for number, (saver, loader) in enumerate(
        [(EmbedDistillLoss, oracle.EmbedDistillLoss), (oracle.MSELoss, MSELoss), (MSELoss, EmbedDistillLoss)]
    ):
        path = tmp_path / f"{number}.safetensors"
        saved = saver(Student(), projection_dim=9)
        saved.save_projection(path)
        for options in ({}, {"projection_dim": 9}):
            loaded = loader(Student(), **options)
            loaded.load_projection(str(path))
            assert loaded.projection_dim == 9
            assert dict(loaded.named_parameters()).keys() == {"projection.weight", "projection.bias"}
            for a, b in zip(loaded.projection.parameters(), saved.projection.parameters(), strict=True):
                assert torch.equal(a, b)
                assert a.requires_grad


def test_no_projection_to_save(tmp_path: Path) -> None:
    for kind in (oracle.EmbedDistillLoss, EmbedDistillLoss, MSELoss):
        with pytest.raises(ValueError, match="No projection layer to save"):
            kind(Student()).save_projection(tmp_path / "projection.safetensors")
    with pytest.raises(InputError):
        EmbedDistillLoss(Student()).save_projection(tmp_path / "projection.safetensors")


def test_projections_of_other_widths(tmp_path: Path) -> None:
    path = tmp_path / "projection.safetensors"
    EmbedDistillLoss(Student(5), projection_dim=9).save_projection(path)
    for kind in (oracle.EmbedDistillLoss, EmbedDistillLoss):
        for width, options, message in (
            (4, {}, "expects"),
            (5, {"projection_dim": 8}, "does not match the configured"),
        ):
            loss = kind(Student(width), **options)
            before = loss.projection
            with pytest.raises(ValueError, match=message):
                loss.load_projection(path)
            assert loss.projection is before
            assert loss.projection_dim == options.get("projection_dim")


@pytest.mark.parametrize(
    "state",
    [
        {"weight": torch.zeros(9, 5)},
        {"bias": torch.zeros(9)},
        {"weight": torch.zeros(9), "bias": torch.zeros(9)},
        {"weight": torch.zeros(9, 5), "bias": torch.zeros(8)},
        {"weight": torch.zeros(9, 5), "bias": torch.zeros(9), "more": torch.zeros(1)},
    ],
    ids=lambda state: "+".join(state),
)
def test_files_that_hold_no_projection(state: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "projection.safetensors"
    safetensors.save_file(state, path)
    loss = EmbedDistillLoss(Student())
    with pytest.raises((ValueError, RuntimeError, KeyError)):
        oracle.EmbedDistillLoss(Student()).load_projection(path)
    with pytest.raises(ShapeError, match="not a projection"):
        loss.load_projection(path)
    assert loss.projection is None


def test_nothing_of_a_file_is_executed(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "sprung",))

    path = tmp_path / "projection.safetensors"
    path.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(safetensors_errors.SafetensorError, match="nothing in it was executed: write one with"):
        EmbedDistillLoss(Student()).load_projection(path)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("kind", "options"),
    [(EmbedDistillLoss, ()), (EmbedDistillLoss, ("l2", 7)), (MSELoss, ()), (MSELoss, (7,))],
)
def test_settings_are_the_oracles(kind: type[nn.Module], options: tuple[Any, ...]) -> None:
    torch.manual_seed(1)
    loss = kind(Student(), *options)
    torch.manual_seed(1)
    theirs = getattr(oracle, kind.__name__)(Student(), *options)
    assert list(loss.get_config_dict().items()) == list(theirs.get_config_dict().items())
    assert re.search(r"@\w+\{(\S+),", loss.citation)[1] == re.search(r"@\w+\{(\S+),", theirs.citation)[1]  # type: ignore[index]
    assert [name for name, _ in loss.named_children()] == [name for name, _ in theirs.named_children()]
    assert (loss.distance_metric, loss.projection_dim) == (theirs.distance_metric, theirs.projection_dim)
    assert all(torch.equal(a, b) for a, b in zip(loss.parameters(), theirs.parameters(), strict=True))
    copy, labels = pickle.loads(pickle.dumps(loss)), teacher(9, loss.projection_dim or 5, dtype=torch.float32)
    features = [{"sentence_embedding": x} for x in student(9, 2, 5, torch.float32)]
    assert torch.equal(copy(features, labels), loss(features, labels))


@pytest.mark.parametrize("metric", METRICS)
def test_second_derivatives(metric: str, backend: str) -> None:
    loss, labels = EmbedDistillLoss(Student(3), metric), teacher(4, 3)  # type: ignore[arg-type]
    leaves = [x.requires_grad_() for x in student(4, 2, 3)]
    torch.autograd.gradgradcheck(lambda *x: loss.compute_loss_from_embeddings(list(x), labels), leaves)


@pytest.mark.parametrize("projection_dim", [None, 7])
def test_a_model_and_its_projection_train(
    projection_dim: int | None, tiny_encoder: Any, texts: Any, backend: str
) -> None:
    """A transformer in training mode, with dropout: the same step as the oracle's."""
    results = []
    for kind in (EmbedDistillLoss, oracle.EmbedDistillLoss):
        model = tiny_encoder().double()
        torch.manual_seed(1)
        loss = kind(model, projection_dim=projection_dim).double()
        features = [dict(model.preprocess(texts(20, seed))) for seed in range(3)]
        torch.manual_seed(2)
        value = loss(features, teacher(20, projection_dim or 16))
        value.backward()
        results.append([value.detach(), *(p.grad for p in loss.parameters() if p.grad is not None)])
    largest = max(x.norm() for x in results[1])
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() <= 1e-8 * (b.norm() + 1e-3 * largest)
