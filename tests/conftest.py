"""What test files share: GPU tests only where there is a GPU, the backends that run everywhere, poisoned memory.

And a real text encoder for the losses to train: tiny, with random weights, with dropout, made without a download.
"""

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import tileloss

WORDS = 40

if torch.__version__ < "2.12":
    # its mse_loss has no gradients for two dtypes, in which sentence-transformers calls it for float64 embeddings
    _mse_loss = F.mse_loss

    def _mse_loss_of_two_dtypes(a: torch.Tensor, b: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        dtype = torch.promote_types(a.dtype, b.dtype)
        return _mse_loss(a.to(dtype), b.to(dtype), *args, **options)

    F.mse_loss = _mse_loss_of_two_dtypes


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with the tests that take minutes, lest one process wait for them at the end while the others have nothing.

    Leave out those marked `gpu` on a machine without one; pytest counts them as deselected.
    """
    items.sort(key=lambda item: item.path.name != "test_in_interpreter.py")
    if torch.cuda.is_available() or torch.xpu.is_available():
        return
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu:
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if item not in gpu]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> int:
    """Cut every walk into blocks of this many rows."""
    rows = 7
    blocks = importlib.import_module("tileloss.tiled.blocks")
    monkeypatch.setitem(blocks.BLOCK_BYTES, "cpu", 1)
    monkeypatch.setitem(blocks.MIN_ROWS, "cpu", rows)
    return rows


@pytest.fixture(params=["reference", "tiled"])
def backend(request: pytest.FixtureRequest, small_blocks: int) -> Any:
    """Each of the backends that need no GPU, forced for the length of the test."""
    with tileloss.use_backend(request.param):
        yield request.param


def _poison(tensor: torch.Tensor) -> torch.Tensor:
    """Fill with what no computation survives unnoticed: NaN, or an integer that is out of range as an index."""
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor.fill_(float("nan"))
    return tensor.fill_(True if tensor.dtype is torch.bool else torch.iinfo(tensor.dtype).max)


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let freshly allocated tensors hold poison instead of whatever the memory held before.

    A kernel that reads what nobody wrote then gives NaN every time, not garbage once in a while.
    """

    def poisoning(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def allocate_poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
            with torch.no_grad():
                return _poison(allocate(*args, **kwargs)).requires_grad_(kwargs.get("requires_grad", False))

        return allocate_poisoned

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoning(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, poisoning(getattr(torch.Tensor, name)))


@pytest.fixture
def process_group() -> Iterator[None]:
    """A group of processes of which this is the only one."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("torch is built without gloo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def save_bert(folder: Path, words: list[str], seed: int) -> Path:
    """Fill a folder with a two-layer BERT and its tokenizer."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {name: i for i, name in enumerate(["[PAD]", "[UNK]", *words])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=32
    ).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1,
    )  # fmt: skip
    torch.manual_seed(seed)
    transformers.BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a two-layer BERT and its tokenizer, whose words are w0, w1, ..."""
    return save_bert(tmp_path_factory.mktemp("tiny_bert"), [f"w{i}" for i in range(WORDS)], seed=0)


@pytest.fixture(scope="session")
def other_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with other weights, and with the words in another order."""
    return save_bert(tmp_path_factory.mktemp("other_bert"), [f"w{i}" for i in reversed(range(WORDS))], seed=1)


@pytest.fixture
def tiny_encoder(tiny_bert: Path) -> Callable[..., Any]:
    """Makes a SentenceTransformer on the tiny BERT or another, in training mode; equal ones every time."""
    st = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer import modules

    def make(folder: Path = tiny_bert) -> Any:
        encoder = modules.Transformer(str(folder))
        pooling = modules.Pooling(encoder.get_embedding_dimension())
        return st.SentenceTransformer(modules=[encoder, pooling], device="cpu").train()

    return make


@pytest.fixture
def texts() -> Callable[..., list[str]]:
    """Texts of one to twelve words of the tiny BERT; equal ones for an equal seed."""

    def make(count: int, seed: int = 0) -> list[str]:
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(1, 13, (count,), generator=generator).tolist()
        return [" ".join(f"w{i}" for i in torch.randint(WORDS, (n,), generator=generator).tolist()) for n in lengths]

    return make
