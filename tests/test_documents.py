"""What the documents say is so: their examples run, their links lead somewhere, their commands exist."""

import importlib
import pkgutil
import re
import subprocess
import sys
import tomllib
from doctest import DocTestFinder, DocTestRunner
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch

import tileloss
from tileloss.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")])


def ids(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def modules() -> list[str]:
    """Every module of the package but the kernels, whose import needs Triton."""
    found = [module.name for module in pkgutil.walk_packages(tileloss.__path__, "tileloss.")]
    return [name for name in found if not name.startswith("tileloss.kernels")]


@pytest.fixture
def no_download(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let `SentenceTransformer("any name")` be a tiny static model, and trainers write to a scratch folder."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    pytest.importorskip("datasets")
    tokenizers = pytest.importorskip("tokenizers")
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    words = {word: index for index, word in enumerate(["[UNK]", "reverse", "a", "list", "read", "file", "sort", "by"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model = sentence_transformers.SentenceTransformer(
        modules=[StaticEmbedding(tokenizer, embedding_dim=8)], device="cpu"
    )
    monkeypatch.setattr(sentence_transformers, "SentenceTransformer", lambda name: model)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", ["README.md", "docs/index.md", "docs/backends.md", "docs/large-batches.md"])
@pytest.mark.usefixtures("no_download")
def test_the_examples_run_as_written(name: str) -> None:
    """All of a page in order and in one namespace, as a reader would paste them."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert blocks
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, name, "exec"), namespace)
    tensors = [value for value in namespace.values() if isinstance(value, torch.Tensor)]
    assert tensors
    assert all(tensor.isfinite().all() for tensor in tensors)


@pytest.mark.parametrize("path", DOCUMENTS, ids=ids)
def test_links_lead_to_files(path: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", path.read_text(encoding="utf-8"))
    dead = [link for link in links if "://" not in link and not (path.parent / link).exists()]
    assert not dead


@pytest.mark.parametrize("path", DOCUMENTS, ids=ids)
def test_links_to_elsewhere_are_well_formed(path: Path) -> None:
    links = re.findall(r"\]\(([^)\s]*://[^)\s]*)", path.read_text(encoding="utf-8"))
    parts = [urlsplit(link) for link in links]
    assert all(part.scheme == "https" and re.fullmatch(r"[\w-]+(\.[\w-]+)+", part.netloc) for part in parts), links


@pytest.mark.parametrize("path", DOCUMENTS, ids=ids)
def test_commands_exist(path: Path) -> None:
    """Every `make x`, `tileloss x` and extra that a document names."""
    text = path.read_text(encoding="utf-8")
    code = "\n".join(
        re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE) + re.findall(r"`([^`\n]+)`", text)
    )
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z][a-z-]*)", code)) <= targets
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {name for names in re.findall(r"tileloss\[([a-z,]+)\]", code) for name in names.split(",")}
    assert extras <= set(project["optional-dependencies"])
    assert set(re.findall(r"(?:^|[\s/])tileloss ([a-z]+)", code)) <= set(COMMANDS)


@pytest.mark.parametrize("path", DOCUMENTS, ids=ids)
def test_paths_and_names_exist(path: Path) -> None:
    """Every path of the checkout and every dotted name of tileloss that a document sets in code."""
    code = re.findall(r"`([^`\s]+)`", path.read_text(encoding="utf-8"))
    paths = [word for word in code if re.fullmatch(r"(src|kernels|docs|tests|benchmarks|\.ci)/[\w./]*", word)]
    assert not [word for word in paths if not (ROOT / word).exists()]
    for name in (word for word in code if re.fullmatch(r"tileloss(\.\w+)+", word)):
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute) or importlib.import_module(name), name


@pytest.mark.parametrize("name", modules())
def test_docstring_examples_run(name: str) -> None:
    module = importlib.import_module(name)
    runner = DocTestRunner(verbose=False)
    torch.manual_seed(0)
    for example in DocTestFinder(exclude_empty=True).find(module, extraglobs={"torch": torch}):
        runner.run(example)
    assert runner.summarize(verbose=False).failed == 0


def test_the_changelog_knows_the_version() -> None:
    assert f"## {tileloss.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_tables_are_what_the_results_say() -> None:
    done = subprocess.run(
        [sys.executable, "-P", str(ROOT / "benchmarks" / "tables.py"), "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
