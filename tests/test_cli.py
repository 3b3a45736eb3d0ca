"""The command line: what it answers, and what a whole training run leaves behind."""

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from tileloss import cli, losses
from tileloss.errors import InputError
from tileloss.losses import MultipleNegativesRankingLoss
from tileloss.similarity import dot_score

pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")

from tileloss import train  # noqa: E402
from tileloss.compare import compare_with_materialised  # noqa: E402
from tileloss.encoder import Encoder  # noqa: E402
from tileloss.evaluation import RetrievalTask, retrieval_metrics, retrieval_ranks  # noqa: E402
from tileloss.job import make_loss  # noqa: E402

SUBJECTS = ("file", "number", "server", "string", "matrix", "thread", "socket", "queue", "letter", "colour")
VERBS = ("open", "sort", "close", "parse", "invert", "start", "send", "clear", "print", "mix", "copy", "count")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A file of question and code that share verbs and subjects."""
    rows = [
        {"question": f"how do i {verb} the {subject} {extra}", "code": f"def f{extra}(x): return {subject}.{verb}(x)"}
        for verb in VERBS
        for subject in SUBJECTS
        for extra in ("quickly", "twice")
    ]
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def _train(pairs, folder, *options):
    return cli.main(
        ["train", "--data", str(pairs), "--output_dir", str(folder), "--held_out", "0.2", "--dimension", "32",
         "--vocabulary_size", "400", "--per_device_train_batch_size", "32", "--num_train_epochs", "3", "--use_cpu",
         "--disable_tqdm", "True", *options]
    )  # fmt: skip


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """A file of sentences, each labelled by its subject."""
    rows = [
        {"text": f"{verb} the {subject} {extra}", "label": SUBJECTS.index(subject)}
        for verb in VERBS
        for subject in SUBJECTS
        for extra in ("quickly", "twice")
    ]
    path = tmp_path_factory.mktemp("labelled") / "texts.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="module")
def finished(pairs, tmp_path_factory):
    """A folder in which a training run has ended."""
    folder = tmp_path_factory.mktemp("run")
    assert _train(pairs, folder) == 0
    return folder


def test_a_run_leaves_model_curves_and_figures(finished):
    assert {path.name for path in finished.iterdir()} == {"model", "loss.png", "recall.png", "metrics.json"}
    for name in ("loss.png", "recall.png"):
        assert (finished / name).read_bytes().startswith(b"\x89PNG")
    figures = json.loads((finished / "metrics.json").read_text())
    assert figures["after"]["recall@10"] > figures["before"]["recall@10"]
    assert figures["steps"] == 3 * (figures["train_pairs"] // 32)
    assert figures["train_pairs"] + figures["held_out_pairs"] == 240
    assert figures["pairs_per_second"] == pytest.approx(figures["steps"] * 32 / figures["train_seconds"], rel=0.1)
    evaluated = [record["step"] for record in figures["history"] if "eval_recall@10" in record]
    assert evaluated[0] == 0
    assert len(evaluated) == 5, "before, after each of three epochs, at the end"
    assert any("accuracy" in record for record in figures["history"])


def test_the_saved_model_loads_and_has_the_recall_that_was_reported(finished, pairs):
    from tileloss.data import load_data

    encoder = Encoder.from_pretrained(finished / "model")
    data = load_data(str(pairs), held_out=0.2)
    task = RetrievalTask.from_dataset(data.held_out, data.text_columns)
    ranks = retrieval_ranks(encoder.encode(task.queries), encoder.encode(task.documents), task.relevant)
    reported = json.loads((finished / "metrics.json").read_text())["after"]
    assert retrieval_metrics(ranks) == pytest.approx(reported)


def test_the_last_line_says_what_was_learned_and_the_step_is_compared(pairs, tmp_path, capsys):
    _train(pairs, tmp_path, "--num_train_epochs", "1")
    lines = capsys.readouterr().out.strip().splitlines()
    figures = json.loads((tmp_path / "metrics.json").read_text())
    assert lines[-1].startswith(
        f"recall@10 {figures['before']['recall@10']:.3f} -> {figures['after']['recall@10']:.3f}"
    )
    assert lines[-1].endswith(f"model in {tmp_path / 'model'}")
    assert f"{figures['steps']:,} steps of 32 pairs" in lines[-1]
    assert any(line.startswith("  tileloss ") for line in lines)
    assert any(line.startswith("  materialised ") for line in lines)
    assert figures["loss_step"]["materialised"]["peak_bytes"] > 32 * 32 * 4


def test_one_seed_gives_one_result(pairs, finished, tmp_path):
    _train(pairs, tmp_path, "--compare_materialised", "False")
    first, second = (json.loads((folder / "metrics.json").read_text()) for folder in (finished, tmp_path))
    assert first["after"] == second["after"]
    losses = [[record["loss"] for record in run["history"] if "loss" in record] for run in (first, second)]
    assert losses[0] == losses[1]
    assert second["loss_step"] == {}


def test_a_run_resumes_from_its_checkpoint(pairs, finished, tmp_path):
    _train(pairs, tmp_path, "--save_strategy", "epoch")
    checkpoint = sorted(tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))[1]
    _train(pairs, tmp_path / "again", "--resume_from_checkpoint", str(checkpoint))
    resumed = json.loads((tmp_path / "again" / "metrics.json").read_text())
    assert resumed["after"] == json.loads((finished / "metrics.json").read_text())["after"]


def test_a_saved_encoder_trains_on_with_negatives_and_a_loss_of_choice(finished, tmp_path):
    rows = [{"q": f"{v} the {s}", "d": f"{s}.{v}()", "n": "pass", "m": "no"} for v in VERBS for s in SUBJECTS]
    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_list(rows).to_parquet(str(path))
    status = _train(
        path, tmp_path / "out", "--model", str(finished / "model"), "--text_columns", "q", "d", "n",
        "--per_device_train_batch_size", "4", "--loss_options",
        '{"scale": 10, "similarity_fct": "dot", "hardness_mode": "hard_negatives", "hardness_strength": 1}',
    )  # fmt: skip
    assert status == 0
    assert Encoder.from_pretrained(tmp_path / "out" / "model").get_embedding_dimension() == 32


LABELLED = ["--per_label", "4", "--learning_rate", "0.1"]


def test_a_labelled_run_leaves_model_curves_and_figures_and_says_what_was_learned(labelled, tmp_path, capsys):
    assert _train(labelled, tmp_path, "--loss", "batch_semi_hard", "--num_train_epochs", "6", *LABELLED) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"model", "loss.png", "accuracy.png", "metrics.json"}
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    figures = json.loads((tmp_path / "metrics.json").read_text())
    before, after = figures["before"]["accuracy@1"], figures["after"]["accuracy@1"]
    assert after > before
    assert figures["train_texts"] + figures["held_out_texts"] == 240
    assert figures["steps"] == 6 * (figures["train_texts"] // 32)
    logged = [record for record in figures["history"] if "loss" in record]
    statistics = {"active", "active_share", "hardest_positive_distance", "hardest_negative_distance"}
    assert all(statistics <= record.keys() for record in logged)
    lines = capsys.readouterr().out.strip().splitlines()
    assert "10 labels" in lines[0]
    assert lines[-1].startswith(f"accuracy@1 {before:.3f} -> {after:.3f}")
    assert f"{figures['steps']:,} steps of 32 texts" in lines[-1]
    assert any(line.startswith("  materialised ") for line in lines)


@pytest.mark.parametrize("loss", ["batch_all", "batch_hard", "batch_hard_soft_margin", "BatchSemiHardTripletLoss"])
def test_every_labelled_loss_trains(labelled, tmp_path, loss):
    options = [] if loss == "batch_hard_soft_margin" else ["--margin", "0.3"]
    assert _train(labelled, tmp_path, "--loss", loss, "--distance", "cosine", *options, *LABELLED) == 0
    figures = json.loads((tmp_path / "metrics.json").read_text())
    assert figures["after"]["accuracy@1"] > figures["before"]["accuracy@1"]


def test_a_labelled_run_resumes_from_its_checkpoint(labelled, tmp_path):
    options = ["--loss", "batch_hard", *LABELLED]
    _train(labelled, tmp_path, "--save_strategy", "steps", "--save_steps", "8", *options)
    checkpoint = tmp_path / "checkpoint-8"
    _train(labelled, tmp_path / "again", "--resume_from_checkpoint", str(checkpoint), *options)
    whole, resumed = (json.loads((folder / "metrics.json").read_text()) for folder in (tmp_path, tmp_path / "again"))
    assert whole["steps"] % 3 == 0
    assert 8 % (whole["steps"] // 3) != 0, "the checkpoint is in the middle of an epoch"
    assert resumed["after"] == whole["after"]


def test_labelled_texts_for_a_loss_on_pairs_are_refused(labelled, tmp_path, capsys):
    assert _train(labelled, tmp_path) == 2
    assert "--loss batch_hard" in capsys.readouterr().err


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert all(command in text for command in cli.COMMANDS)


def test_help_of_a_command_is_its_own(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "usage: tileloss train" in text
    assert "--loss_options" in text
    assert "--learning_rate" in text


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom tileloss.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
        "print([name for name in ('transformers', 'datasets', 'matplotlib') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip().endswith("[]")


@pytest.mark.parametrize(
    "arguments", [[], ["fly"], ["train", "--no_such_option"], ["train", "--num_train_epochs", "x"]]
)
def test_wrong_arguments_end_with_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert "usage: tileloss" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "missing.jsonl"], "no file or folder 'missing.jsonl'"),
        (["--loss", "NoSuchLoss"], "multiple_negatives_ranking (MultipleNegativesRankingLoss)"),
        (["--loss", "NoSuchLoss"], "batch_hard (BatchHardTripletLoss)"),
        (["--margin", "1"], "MultipleNegativesRankingLoss has no argument 'margin'"),
        (["--distance", "cosine"], "MultipleNegativesRankingLoss has no argument 'distance_metric'"),
        (["--loss", "batch_hard", "--distance", "manhattan"], "euclidean or cosine"),
        (["--loss", "batch_hard_soft_margin", "--margin", "1"], "has no argument 'margin'"),
        (["--loss", "batch_hard", "--margin", "1", "--loss_options", '{"margin": 2}'], "given twice"),
        (["--loss", "batch_hard", "--per_label", "3"], "even number"),
        (["--loss", "batch_hard", "--per_device_train_batch_size", "8"], "holds no two labels of 8"),
        (["--loss", "batch_hard"], "needs a column 'label'"),
        (["--loss_options", "{scale: 3}"], "no JSON"),
        (["--loss_options", "[1]"], "JSON object"),
        (["--loss_options", '{"temperature": 3}'], "no argument 'temperature'. It has: scale,"),
        (["--loss_options", '{"scale": -1}'], "positive"),
        (["--loss_options", '{"similarity_fct": "sine"}'], "'cosine'"),
        (["--resume_from_checkpoint", "nowhere"], "no folder"),
        (["--model", "./nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_line_and_status_2(pairs, tmp_path, capsys, options, message):
    assert _train(pairs, tmp_path, *options) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("tileloss train: ")
    assert message in error


def test_a_missing_package_is_named_with_the_extra_that_brings_it(monkeypatch, capsys):
    def fail(name):
        raise ModuleNotFoundError("No module named 'transformers'", name="transformers")

    monkeypatch.setattr(cli.importlib, "import_module", fail)
    assert cli.main(["train"]) == 1
    assert "'tileloss[train]'" in capsys.readouterr().err


def test_an_interrupted_command_says_so(monkeypatch, capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "main", interrupted)
    assert cli.main(["train"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_every_option_of_the_loss_can_be_set():
    options = {"scale": 7, "similarity_fct": "dot", "directions": ["query_to_doc", "doc_to_query"],
               "partition_mode": "per_direction", "exclude_same_label": True}  # fmt: skip
    loss = make_loss("MultipleNegativesRankingLoss", json.dumps(options), nn.Identity())
    assert loss.similarity_fct is dot_score
    assert (loss.scale, loss.directions, loss.exclude_same_label) == (7, ("query_to_doc", "doc_to_query"), True)
    assert isinstance(make_loss("multiple_negatives_ranking", "{}", nn.Identity()), MultipleNegativesRankingLoss)
    with pytest.raises(InputError, match="hardness_mode"):
        make_loss("MultipleNegativesRankingLoss", '{"hardness_mode": "x", "hardness_strength": 1}', nn.Identity())


def test_the_distance_and_the_margin_of_a_labelled_loss_can_be_set():
    functions = losses.BatchHardTripletLossDistanceFunction
    loss = make_loss("batch_hard", "{}", nn.Identity(), margin=0.5, distance="cosine")
    assert (loss.distance_metric, loss.triplet_margin) == (functions.cosine_distance, 0.5)
    loss = make_loss("batch_all", '{"distance_metric": "euclidean"}', nn.Identity())
    assert (loss.distance_metric, loss.triplet_margin) == (functions.euclidean_distance, 5)


def test_a_loss_around_another_takes_it_by_name():
    encoder = nn.Identity()
    encoder.get_embedding_dimension = lambda: 8
    options = {"loss": "multiple_negatives_ranking", "matryoshka_dims": [8, 4], "n_dims_per_step": 1}
    loss = make_loss("matryoshka", json.dumps(options), encoder)
    assert isinstance(loss.loss, MultipleNegativesRankingLoss)
    assert (loss.loss.model, loss.matryoshka_dims, loss.n_dims_per_step) == (encoder, (8, 4), 1)
    for wrong, message in (({"loss": "unknown"}, "no such loss"), ({"matryoshka_dims": [9]}, "cannot exceed")):
        with pytest.raises(InputError, match=message):
            make_loss("matryoshka", json.dumps(options | wrong), encoder)


def test_an_argument_without_a_default_is_asked_for(monkeypatch):
    class NeedyLoss(nn.Module):
        def __init__(self, model, guide):
            super().__init__()
            self.guide = guide

    monkeypatch.setattr(losses, "NeedyLoss", NeedyLoss, raising=False)
    monkeypatch.setattr(losses, "__all__", [*losses.__all__, "NeedyLoss"])
    with pytest.raises(InputError, match="--loss needy needs 'guide'"):
        make_loss("needy", "{}", nn.Identity())
    assert make_loss("needy", '{"guide": 3}', nn.Identity()).guide == 3


class _Rows(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(16))

    def forward(self, features):
        return {"sentence_embedding": features["x"] @ self.weight}


def test_the_comparison_measures_the_matrix_that_the_materialised_form_holds():
    torch.manual_seed(0)
    features = [{"x": torch.randn(1024, 16)} for _ in range(2)]
    model = _Rows()
    costs = compare_with_materialised(MultipleNegativesRankingLoss(model), features, rounds=1)
    assert costs["materialised"].peak_bytes > 2 * 4 * 1024**2, "logits and their gradient"
    assert costs["tileloss"].peak_bytes < costs["materialised"].peak_bytes
    assert all(cost.seconds > 0 for cost in costs.values())
    assert model.weight.grad is None
    assert model.training


@pytest.mark.parametrize(("name", "entries"), [("batch_hard", 64 * 64), ("batch_all", 64 * 15 * 64)])
def test_mined_losses_are_materialised_where_their_largest_array_fits(monkeypatch, name, entries):
    torch.manual_seed(0)
    loss = make_loss(name, "{}", _Rows())
    features = [{"x": torch.randn(64, 16)}]
    labels = torch.arange(64) % 4
    for free, measured in ((16 * entries - 1, {"tileloss"}), (16 * entries, {"tileloss", "materialised"})):
        monkeypatch.setattr("tileloss.compare.available_memory", lambda device, free=free: free)
        assert compare_with_materialised(loss, features, labels, rounds=1).keys() == measured


def test_what_would_not_fit_is_not_materialised(monkeypatch, caplog):
    monkeypatch.setattr("tileloss.compare.available_memory", lambda device: 1000)
    features = [{"x": torch.randn(64, 16)} for _ in range(2)]
    costs = compare_with_materialised(MultipleNegativesRankingLoss(_Rows()), features, rounds=1)
    assert list(costs) == ["tileloss"]
    assert "not measured" in caplog.text
