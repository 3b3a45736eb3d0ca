"""`python -m tileloss.run`: scripts that take their losses from sentence-transformers run with ours, unedited."""

import json
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tileloss
from tileloss import run

pytest.importorskip("sentence_transformers")

# the four ways to import a loss, each trained for a step by the library's own trainer
SCRIPT = """
import json, os, sys, warnings
os.environ["A_SETTING"] = "made before the imports"
assert "sentence_transformers" not in sys.modules or len(sys.argv) > 3
warnings.simplefilter("ignore", DeprecationWarning)

import sentence_transformers.losses
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers import losses
from sentence_transformers.losses import MegaBatchMarginLoss
from sentence_transformers.sentence_transformer.losses.multiple_negatives_ranking import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer import modules
from datasets import Dataset

from neighbour import KIND

folder, out = sys.argv[1:3]
encoder = modules.Transformer(folder)
model = SentenceTransformer(modules=[encoder, modules.Pooling(encoder.get_embedding_dimension())], device="cpu")
rows = {"anchor": ["w1 w2", "w3", "w4 w5", "w6"], "positive": ["w1", "w3 w7", "w5", "w8"]}
made = [
    losses.MultipleNegativesRankingLoss(model, scale=5.0),
    sentence_transformers.losses.MatryoshkaLoss(model, MultipleNegativesRankingLoss(model), [16, 8]),
    MegaBatchMarginLoss(model, mini_batch_size=2),
    KIND(model),
]
logged = []
for loss in made:
    arguments = SentenceTransformerTrainingArguments(
        out, max_steps=1, per_device_train_batch_size=4, report_to="none", use_cpu=True, save_strategy="no",
        disable_tqdm=True, logging_steps=1,
    )
    trainer = SentenceTransformerTrainer(model, args=arguments, train_dataset=Dataset.from_dict(rows), loss=loss)
    trainer.train()
    logged.append(trainer.state.log_history[0]["loss"])
model.save(out)
kinds = [f"{type(loss).__module__}.{type(loss).__name__}" for loss in made]
print(json.dumps({"name": __name__, "kinds": kinds, "logged": logged, "argv": sys.argv}))
sys.exit(7)
"""
NEIGHBOUR = "from sentence_transformers.losses import CachedMultipleNegativesRankingLoss as KIND\n"
OURS = [
    "tileloss.losses.multiple_negatives_ranking.MultipleNegativesRankingLoss",
    "tileloss.losses.matryoshka.MatryoshkaLoss",
    "tileloss.losses.mega_batch_margin.MegaBatchMarginLoss",
    "tileloss.losses.cached_multiple_negatives_ranking.CachedMultipleNegativesRankingLoss",
]


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "scripts").mkdir()
    path = tmp_path / "scripts" / "train.py"
    path.write_text(SCRIPT)
    (path.parent / "neighbour.py").write_text(NEIGHBOUR)
    return path


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "argv", ["pytest"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    tileloss.unpatch_sentence_transformers()
    sys.modules.pop("neighbour", None)


def test_a_script_trains_with_our_losses_whichever_way_it_imports_them(
    script: Path, tiny_bert: Path, tmp_path: Path
) -> None:
    """In a process of its own: nothing is imported before the script does, and its exit status is the process's."""
    command = [sys.executable, "-m", "tileloss.run", str(script), str(tiny_bert), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 7, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["name"] == "__main__"
    assert found["kinds"] == OURS
    assert all(0 < loss < 100 for loss in found["logged"])
    assert found["argv"] == command[3:]
    assert "tileloss stands in for" in done.stderr
    card = (tmp_path / "out" / "README.md").read_text()
    assert "<code>tileloss.losses.cached_multiple_negatives_ranking.CachedMultipleNegativesRankingLoss</code>" in card
    assert "- loss:CachedMultipleNegativesRankingLoss" in card
    assert "gao2021scaling" in card


def test_a_script_that_patches_after_its_imports_trains_with_ours_too(
    script: Path, tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = SCRIPT.replace("folder, out =", "import tileloss\ntileloss.patch_sentence_transformers()\nfolder, out =")
    script.write_text(text.replace("[1:3]", "[1:3]; assert __name__ == '__main__'"))
    sys.argv = ["train.py", str(tiny_bert), str(tmp_path / "out"), "loaded"]
    sys.path.insert(0, str(script.parent))
    with pytest.raises(SystemExit):
        runpy.run_path(str(script), run_name="__main__")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["kinds"] == OURS


@pytest.mark.parametrize("status", [0, 3, None, "a message"])
def test_exit_statuses_pass_through(status: Any, tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text(f"import sys\nsys.exit({status!r})")
    with pytest.raises(SystemExit) as caught:
        run.main([str(path)])
    assert caught.value.code == status


def test_a_script_sees_itself_as_it_would_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "script.py"
    path.write_text("import sys\nprint(__name__, __file__, sys.argv, sys.path[0], sys.modules['__main__'].__file__)")
    assert run.main([str(path), "--scale", "3", "-m", "x"]) == 0
    expected = f"__main__ {path} {[str(path), '--scale', '3', '-m', 'x']} {tmp_path} {path}"
    assert capsys.readouterr().out.strip() == expected


def test_a_module_runs_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package = tmp_path / "a_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "job.py").write_text("import sys\nprint(__name__, __spec__.name, sys.argv)")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert run.main(["-m", "a_package.job", "--epochs", "2"]) == 0
    assert capsys.readouterr().out.strip() == f"__main__ a_package.job {[str(package / 'job.py'), '--epochs', '2']}"


def test_what_cannot_run_is_said_clearly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main([str(tmp_path / "missing.py")]) == 2
    assert "there is no script at" in capsys.readouterr().err
    assert run.main(["-m", "no_such_package.job"]) == 2
    assert "there is no module named 'no_such_package.job'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run.main([])
    monkeypatch.setattr(run.importlib.metadata, "version", lambda name: "99.0")
    (tmp_path / "script.py").write_text("print('ran')")
    assert run.main([str(tmp_path / "script.py")]) == 2
    assert "--allow-untested" in capsys.readouterr().err
    monkeypatch.setattr("sentence_transformers.__version__", "99.0")
    assert run.main(["--allow-untested", str(tmp_path / "script.py")]) == 0
    assert capsys.readouterr().out == "ran\n"


def test_a_script_without_sentence_transformers_is_told_so(tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text("print('ran')")
    command = [sys.executable, "-m", "tileloss.run", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout == "ran\n"
    assert "never imported sentence-transformers" in done.stderr
