"""Which backend serves a call: what is asked for, in what order of precedence, and what is said when it cannot run."""

import inspect
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch

import tileloss
from tileloss import backend, distributed, functional, reference, tiled
from tileloss.backend import choose, explain, requested, use_backend
from tileloss.errors import BackendError, FallbackWarning, InputError, ShapeError
from tileloss.functional import contrastive_loss
from tileloss.spec import DIRECTIONS

LARGE = 10**9
DISTRIBUTED = ["contrastive_loss", "contrastive_loss_with_stats"]


class Pretended:
    """A tensor's device and dtype without the device."""

    ndim = 2

    def __init__(self, device: str, dtype: torch.dtype = torch.float32, shape: tuple[int, int] = (4096, 64)) -> None:
        self.device, self.dtype, self.shape = torch.device(device), dtype, shape
        self.is_cpu = self.device.type == "cpu"


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_environment", "auto")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backend, "_said", set())
    monkeypatch.setattr(backend, "_TRITON_IS_INSTALLED", True)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The backends that calls have run on."""
    names: list[str] = []

    def spy(name: str, run: Callable) -> Callable:
        def spied(*args: object, **kwargs: object) -> object:
            names.append(name)
            return run(*args, **kwargs)

        return spied

    for name, module in (("reference", reference), ("tiled", tiled)):
        monkeypatch.setattr(module, "contrastive_loss", spy(name, module.contrastive_loss))
    return names


@pytest.mark.parametrize(
    ("directions", "largest"),
    [(("query_to_doc",), 256), (("query_to_doc", "doc_to_query"), 512), (DIRECTIONS, 256)],
    ids=["one", "both", "four"],
)
def test_small_batches_are_materialised_on_a_cpu(directions: tuple[str, ...], largest: int, ran: list[str]) -> None:
    for size in (largest, largest + 2):
        contrastive_loss(torch.randn(size, 2), torch.randn(size, 2), directions=directions)
    assert ran == ["reference", "tiled"]


def test_nesting_restores_what_was_asked_for_outside() -> None:
    assert requested() == "auto"
    with use_backend("reference"):
        with use_backend("tiled"):
            with use_backend("auto"):
                assert requested() == "auto"
            assert requested() == "tiled"
        assert requested() == "reference"
    assert requested() == "auto"


def test_an_exception_restores_it_too() -> None:
    with pytest.raises(ZeroDivisionError), use_backend("tiled"):
        raise ZeroDivisionError
    assert requested() == "auto"
    with pytest.raises(InputError), use_backend("reference"):
        contrastive_loss(torch.randn(3, 2), torch.randn(3, 2), scale=-1.0, backend="tiled")
    assert requested() == "auto"


def test_precedence_is_call_then_block_then_environment(ran: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    queries, docs = torch.randn(5, 3), torch.randn(5, 3)
    monkeypatch.setattr(backend, "_environment", "tiled")
    contrastive_loss(queries, docs)
    with use_backend("reference"):
        contrastive_loss(queries, docs)
        contrastive_loss(queries, docs, backend="tiled")
        contrastive_loss(queries, docs)
    with use_backend("auto"):
        contrastive_loss(queries, docs)  # small: the automatic choice, whatever the environment says
    assert ran == ["tiled", "reference", "tiled", "reference", "reference"]


@pytest.mark.parametrize(("value", "expected"), [("", "auto"), ("auto", "auto"), ("tiled", "tiled")])
def test_the_environment_counts_from_the_import_on(value: str, expected: str) -> None:
    code = "import tileloss.backend; print(tileloss.backend.requested())"
    environment = os.environ | {"TILELOSS_BACKEND": value}
    run = subprocess.run(
        [sys.executable, "-P", "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == expected


def test_every_function_says_that_a_backend_may_be_asked_for() -> None:
    """Type checkers, editors and the documentation read signatures, and see nothing of what a decorator adds."""
    for module, names in ((functional, functional.__all__), (distributed, DISTRIBUTED)):
        functions = [getattr(module, name) for name in names if inspect.isfunction(getattr(module, name))]
        assert len(functions) >= len(DISTRIBUTED)
        for function in functions:
            declared = inspect.signature(function).parameters.get("backend")
            assert declared is not None, function.__name__
            assert declared.kind is inspect.Parameter.KEYWORD_ONLY
            assert declared.default is None


def test_unknown_names_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"the backend must be 'auto' or one of \['reference', 'tiled', 'triton'\]"):
        use_backend("cuda").__enter__()
    with pytest.raises(InputError, match="got 'Tiled'"):
        contrastive_loss(torch.randn(3, 2), torch.randn(3, 2), backend="Tiled")
    monkeypatch.setattr(backend, "_environment", "fast")
    with pytest.raises(InputError, match=r"the environment variable TILELOSS_BACKEND must be .*, got 'fast'"):
        contrastive_loss(torch.randn(3, 2), torch.randn(3, 2))


def test_automatic_choice_by_size(ran: list[str]) -> None:
    for rows in (4, 600):
        contrastive_loss(torch.randn(rows, 3), torch.randn(rows, 3))
    assert ran == ["reference", "tiled"]


@pytest.mark.parametrize(
    ("device", "dtype", "expected"),
    [
        ("cuda", torch.float32, "triton"),
        ("cuda", torch.bfloat16, "triton"),
        ("xpu", torch.float16, "triton"),
        ("cpu", torch.float32, "tiled"),
        ("mps", torch.float32, "tiled"),
        ("cpu", torch.float64, "tiled"),
    ],
)
def test_automatic_choice_by_device(device: str, dtype: torch.dtype, expected: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(Pretended(device, dtype), LARGE).backend == expected  # type: ignore[arg-type]


def test_automatic_fallback_is_said_once_for_each_reason() -> None:
    wide = Pretended("cuda", torch.float64)
    with pytest.warns(
        FallbackWarning, match="'triton' to the 'tiled' backend: the Triton .* do not compute in float64"
    ):
        choice = choose(wide, LARGE)  # type: ignore[arg-type]
    assert choice.backend == "tiled"
    assert "float64" in choice.reason
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(wide, LARGE).backend == "tiled"  # type: ignore[arg-type]
    with pytest.warns(FallbackWarning, match="the similarity is special"):
        assert choose(Pretended("cuda"), LARGE, {"triton": "the similarity is special"}).backend == "tiled"  # type: ignore[arg-type]
    both = dict.fromkeys(("triton", "tiled"), "the similarity wants all rows")
    with pytest.warns(FallbackWarning, match="to the 'reference' backend"):
        assert choose(Pretended("cuda"), LARGE, both).backend == "reference"  # type: ignore[arg-type]


def test_a_gpu_without_triton_runs_tiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_TRITON_IS_INSTALLED", False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(Pretended("cuda"), LARGE).backend == "tiled"  # type: ignore[arg-type]
    with use_backend("triton"), pytest.raises(BackendError, match=r"Triton is not installed \(on Linux: pip install"):
        choose(Pretended("cuda"), LARGE)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("device", "dtype", "reason"),
    [
        ("cpu", torch.float32, "Triton has no kernels for cpu tensors"),
        ("mps", torch.float32, "Triton has no kernels for mps tensors"),
        ("cuda", torch.float64, "the Triton kernels do not compute in float64"),
    ],
)
def test_forcing_triton_where_it_cannot_run_says_why(device: str, dtype: torch.dtype, reason: str) -> None:
    tensor = Pretended(device, dtype)
    with use_backend("triton"), pytest.raises(BackendError, match=f"'triton' was asked for and cannot run: {reason}"):
        choose(tensor, 4)  # type: ignore[arg-type]


def test_forcing_triton_on_a_cpu_reaches_the_caller(ran: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match="no kernels for cpu"):
        contrastive_loss(torch.randn(3, 2), torch.randn(3, 2), backend="triton")
    monkeypatch.setattr(backend, "_environment", "triton")
    with pytest.raises(BackendError, match="no kernels for cpu"):
        contrastive_loss(torch.randn(3, 2), torch.randn(3, 2))
    assert ran == []


def test_the_interpreter_serves_cpu_tensors_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with use_backend("triton"):
        assert choose(Pretended("cpu"), LARGE).backend == "triton"  # type: ignore[arg-type]
        with pytest.raises(BackendError, match="float64"):
            choose(Pretended("cpu", torch.float64), LARGE)  # type: ignore[arg-type]
    assert choose(Pretended("cpu"), LARGE).backend == "tiled"  # type: ignore[arg-type]


def test_a_forced_backend_never_falls_back() -> None:
    with use_backend("tiled"):
        assert choose(Pretended("cpu"), 1).backend == "tiled"  # type: ignore[arg-type]
        with pytest.raises(BackendError, match="'tiled' was asked for and cannot run: no blocks"):
            choose(Pretended("cpu"), LARGE, {"tiled": "no blocks"})  # type: ignore[arg-type]
    with use_backend("reference"):
        assert choose(Pretended("cuda"), LARGE).backend == "reference"  # type: ignore[arg-type]


def test_explain_says_what_would_run_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert explain(torch.empty(4096, 384)) == (
        "An in-batch loss over 4,096 rows of 384 (float32, cpu) runs on the 'tiled' backend: "
        "it is the fastest on cpu.\n"
        "The 'triton' backend cannot serve it: Triton has no kernels for cpu tensors."
    )
    assert "runs on the 'reference' backend: at this size the materialised form is fastest" in explain(
        torch.empty(8, 4)
    )
    assert "(float32, cuda) runs on the 'triton' backend: it is the fastest on cuda" in explain(Pretended("cuda"))  # type: ignore[arg-type]
    with pytest.warns(FallbackWarning):
        assert "do not compute in float64" in explain(Pretended("cuda", torch.float64))  # type: ignore[arg-type]
    with use_backend("reference"):
        assert "'reference' backend: it was asked for by name." in explain(torch.empty(4096, 384))
    with use_backend("triton"):
        assert "would raise BackendError" in explain(torch.empty(4096, 384))
    monkeypatch.setattr(backend, "_TRITON_IS_INSTALLED", False)
    assert "Triton is not installed" in explain(Pretended("cuda"))  # type: ignore[arg-type]


def test_explain_wants_a_matrix() -> None:
    with pytest.raises(ShapeError, match=r"got shape \(5,\)"):
        explain(torch.empty(5))


def test_use_backend_is_at_the_top_level() -> None:
    assert tileloss.use_backend is use_backend
    assert tileloss.backend.explain is explain
