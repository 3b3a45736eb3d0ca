"""The built-in corpus and the reading of datasets: what is extracted, what is held out, what is refused."""

import json
import textwrap

import pytest

from tileloss.corpus import (
    Pair,
    SourceFile,
    builtin_corpus,
    installed_folders,
    is_held_out,
    prose,
    read_pairs,
    source_files,
    unique_pairs,
)
from tileloss.data import find_label_column, find_text_columns, load_data
from tileloss.errors import InputError

datasets = pytest.importorskip("datasets")


@pytest.fixture
def parse(tmp_path):
    """The pairs of a module with the given source."""

    def pairs_of(source, encoding="utf-8"):
        path = tmp_path / "module.py"
        path.write_bytes(textwrap.dedent(source).encode(encoding))
        return read_pairs(SourceFile(path, "package.module"))

    return pairs_of


def test_functions_and_methods_are_found_with_their_docstrings_cut_out(parse):
    pairs = parse(
        '''
        import os

        class Shop:
            """A class docstring is no pair."""

            if os.name == "posix":
                async def sell(self, price):
                    """Sell one apple for a price.

                    Args:
                        price: in euros.
                    """
                    # a comment stays
                    return price

        def outer(x):
            "Call the inner function twice."; y = x
            def inner(z):
                """Double what it is given."""
                return 2 * z
            return inner(inner(y))

        def undocumented(x):
            return x
        '''
    )
    assert [(pair.docstring, pair.module, pair.package) for pair in pairs] == [
        ("Sell one apple for a price.", "package.module", "package"),
        ("Call the inner function twice.", "package.module", "package"),
        ("Double what it is given.", "package.module", "package"),
    ]
    assert pairs[0].code == "async def sell(self, price):\n    # a comment stays\n    return price"
    assert pairs[1].code == (
        "def outer(x):\n    y = x\n    def inner(z):\n        return 2 * z\n    return inner(inner(y))"
    )
    assert pairs[2].code == "def inner(z):\n    return 2 * z"


def test_docstring_columns_are_counted_in_bytes(parse):
    (pair,) = parse('def f(ä="ö"): """Größer als vier Wörter hier."""; return "ü"')
    assert pair.docstring == "Größer als vier Wörter hier."
    assert pair.code == 'def f(ä="ö"): return "ü"'


def test_stubs_and_short_docstrings_are_left_out(parse):
    assert (
        parse(
            '''
            def stub():
                """Has a docstring but no body."""
            def protocol():
                """Has a docstring and an ellipsis."""
                ...
            def short():
                """Too short."""
                return 1
            '''
        )
        == []
    )


def test_files_that_cannot_be_read_give_none(parse):
    assert parse('def f(:\n    """Broken syntax in this file."""') is None
    assert parse('def f():\n    """Umlaute: äöü in Latin-1."""\n    return 1', encoding="latin-1") is None
    declared = '# -*- coding: latin-1 -*-\ndef f():\n    """Umlaute: äöü in Latin-1."""\n    return 1'
    (pair,) = parse(declared, encoding="latin-1")
    assert "äöü" in pair.docstring


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("One line.", "One line."),
        ("Two\n    lines, one\n    sentence.\n\n    And a paragraph.", "Two lines, one sentence. And a paragraph."),
        ("Text.\n\n    Args:\n        x: no prose.", "Text."),
        ("Text.\n\n    :param x: no prose", "Text."),
        ("Text.\n\n    >>> f(1)\n    2", "Text."),
        ("Text.\n\n    Parameters\n    ----------\n    x : int", "Text."),
        ("Text.\n\n    Algorithm\n    ---------\n    No section that we know.", "Text."),
        ("Returns the sum, which is prose.", "Returns the sum, which is prose."),
    ],
)
def test_prose_ends_where_reference_begins(docstring, expected):
    assert prose(docstring) == expected


def _write_package(root, modules):
    for module in range(modules):
        functions = "\n".join(
            f'def f{i}(x):\n    """Module {module} does the thing number {i}."""\n    return x + {module * 100 + i}\n'
            for i in range(3)
        )
        (root / f"m{module}.py").write_text(functions)


def test_corpus_is_split_by_module_and_nothing_leaks(tmp_path):
    root = tmp_path / "lib"
    root.mkdir()
    _write_package(root, 40)
    # a copy of a module under another name: whichever comes second must vanish, in whichever part
    (root / "z_copy.py").write_text((root / "m0.py").read_text())
    (root / "broken.py").write_text('"""x"""\ndef')
    corpus = builtin_corpus([root], held_out=0.3)
    train, test = corpus["train"], corpus["test"]
    assert len(train) + len(test) == 120
    assert not set(train["module"]) & set(test["module"])
    assert not set(train["code"]) & set(test["code"])
    assert "z_copy" not in {*train["module"], *test["module"]}
    assert corpus["train"].to_dict() == builtin_corpus([root], held_out=0.3)["train"].to_dict()


def test_corpus_is_the_same_with_several_processes(tmp_path):
    _write_package(tmp_path, 70)
    alone, together = (builtin_corpus([tmp_path], workers=workers) for workers in (1, 2))
    assert alone["train"].to_dict() == together["train"].to_dict()
    assert alone["test"].to_dict() == together["test"].to_dict()


def test_unreadable_files_are_counted_and_said_once(tmp_path, caplog):
    _write_package(tmp_path, 40)
    for name in ("a", "b"):
        (tmp_path / f"{name}.py").write_text('"""x"""\ndef')
    builtin_corpus([tmp_path])
    (warning,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "2 of 42 files" in warning.getMessage()


def test_tests_and_vendored_copies_are_skipped(tmp_path):
    for name in ("kept/__init__.py", "kept/tests/a.py", "kept/_vendor/b.py", "kept/test_c.py", "kept/d.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    assert [file.module for file in source_files([tmp_path])] == ["kept", "kept.d"]


def test_the_standard_library_alone_has_thousands_of_pairs():
    files = source_files(installed_folders()[:1])
    assert len(files) > 400
    pairs = unique_pairs(pair for file in files[:60] for pair in read_pairs(file) or ())
    assert len(pairs) > 150


def test_duplicates_are_dropped_by_docstring_and_by_code():
    pairs = [
        Pair("Adds two numbers here.", "def f(): return 1", "a", "a"),
        Pair("adds two numbers here.", "def g(): return 2", "b", "b"),
        Pair("Something else entirely, though.", "def f():  return 1", "c", "c"),
        Pair("A third one.", "def h(): return 3", "d", "d"),
    ]
    assert [pair.module for pair in unique_pairs(pairs)] == ["a", "d"]


def test_held_out_share_is_kept_and_grows_monotonically():
    names = [f"package.module{i}" for i in range(4000)]
    tenth, fifth = ({name for name in names if is_held_out(name, share)} for share in (0.1, 0.2))
    assert 300 < len(tenth) < 500
    assert tenth < fifth


ROWS = [{"question": f"question {i}", "answer": f"answer {i}", "label": i % 3} for i in range(60)]


def _write(path, rows):
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    elif path.suffix in {".csv", ".tsv"}:
        separator = "," if path.suffix == ".csv" else "\t"
        lines = [separator.join(map(str, row.values())) for row in rows]
        path.write_text("\n".join([separator.join(rows[0]), *lines]))
    else:
        datasets.Dataset.from_list(rows).save_to_disk(str(path))
    return str(path)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.tsv", "a.parquet", "saved"])
def test_local_data_is_read_and_split(tmp_path, name):
    data = load_data(_write(tmp_path / name, ROWS), held_out=0.3)
    assert data.text_columns == ("question", "answer")
    assert len(data.train) + len(data.held_out) == len(ROWS)
    assert len(data.held_out) > 5
    assert not set(data.train["question"]) & set(data.held_out["question"])
    assert find_label_column(data.train) == "label"


def test_repeated_anchors_stay_on_one_side(tmp_path):
    rows = [{"anchor": f"q{i % 10}", "positive": f"p{i}"} for i in range(100)]
    data = load_data(_write(tmp_path / "a.jsonl", rows), held_out=0.5)
    assert not set(data.train["anchor"]) & set(data.held_out["anchor"])


def test_a_test_split_is_used_as_it_is(tmp_path):
    part = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": part.select(range(50)), "test": part.select(range(50, 60))}).save_to_disk(tmp_path)
    data = load_data(str(tmp_path))
    assert (len(data.train), len(data.held_out)) == (50, 10)


def test_columns_are_taken_by_name_and_in_order(tmp_path):
    rows = [{"id": i, "b": f"b{i}", "a": f"a{i}", "note": "x"} for i in range(40)]
    path = _write(tmp_path / "a.jsonl", rows)
    assert load_data(path, text_columns=["a", "b"]).text_columns == ("a", "b")
    with pytest.raises(InputError, match=r"'id' is not text.*--text_columns"):
        load_data(path)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"only": "text"}], "at least two text columns"),
        ([{"a": "x", "b": 1.5}], "'b' is not text"),
        ([{"a": "x", "b": "y"}, {"a": "z", "b": None}], "'b' has 1 missing"),
        ([{"a": "x", "b": "y", "label": "cat"}] * 9, "'label' must hold numbers"),
        ([{"a": "x", "b": "y"}], "leave nothing for the"),
    ],
)
def test_wrong_columns_are_refused_with_a_remedy(tmp_path, rows, message):
    with pytest.raises(InputError, match=message):
        load_data(_write(tmp_path / "a.jsonl", rows))


def test_wrong_sources_are_refused(tmp_path):
    (tmp_path / "broken.json").write_text('{"a": ')
    (tmp_path / "notes.txt").write_text("text")
    for source, message in [
        (tmp_path / "missing.jsonl", "no file or folder"),
        ("./nowhere", "no file or folder"),
        (tmp_path / "notes.txt", "Cannot tell the format"),
        (tmp_path / "broken.json", "Cannot read"),
    ]:
        with pytest.raises(InputError, match=message):
            load_data(str(source))
    with pytest.raises(InputError, match="between 0 and 1"):
        load_data("builtin", held_out=1.5)
    with pytest.raises(InputError, match="Not a folder"):
        builtin_corpus([tmp_path / "nowhere"])


def test_column_checks_name_what_there_is():
    empty = datasets.Dataset.from_dict({"a": [], "b": []})
    with pytest.raises(InputError, match="empty"):
        find_text_columns(empty)
    pair = datasets.Dataset.from_dict({"a": ["x"], "b": ["y"]})
    with pytest.raises(InputError, match=r"No column is called 'c'.*a \(string\), b \(string\)"):
        find_text_columns(pair, ["a", "c"])
    with pytest.raises(InputError, match="named twice"):
        find_text_columns(pair, ["a", "a"])
    listed = datasets.Dataset.from_dict({"a": ["x"], "b": ["y"], "labels": [[0.5, 1.0]]})
    assert find_label_column(listed) == "labels"


LABELLED = [{"text": f"text {i}", "label": i % 4} for i in range(80)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet", "saved"])
def test_labelled_texts_are_read_and_split(tmp_path, name):
    data = load_data(_write(tmp_path / name, LABELLED), held_out=0.3, labelled=True)
    assert data.text_columns == ("text",)
    assert data.group_column is None
    assert len(data.train) + len(data.held_out) == 80
    assert not set(data.train["text"]) & set(data.held_out["text"])


def test_held_out_texts_of_a_label_that_is_not_learned_are_dropped(tmp_path):
    rows = [*LABELLED, *({"text": f"rare {i}", "label": 100 + i} for i in range(50))]
    data = load_data(_write(tmp_path / "a.jsonl", rows), held_out=0.3, labelled=True)
    assert set(data.held_out["label"]) == {0, 1, 2, 3}
    assert len(data.train) + len(data.held_out) < 130


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "x", "kind": 3}], r"needs a column 'label'.*text, kind.*multiple_negatives_ranking"),
        ([{"text": "x", "label": 0.5}] * 9, "one whole number for each row"),
        ([{"text": "x", "label": [1, 0]}] * 9, "one whole number for each row"),
        ([{"text": "x", "label": "cat"}] * 9, "class_encode_column"),
        ([{"text": "x", "label": 1}, {"text": "y", "label": None}], "'label' has 1 missing"),
        ([{"a": "x", "b": "y", "label": 1}] * 9, "reads one text column. Name it, with --text_columns"),
    ],
)
def test_wrong_labelled_data_are_refused_with_a_remedy(tmp_path, rows, message):
    with pytest.raises(InputError, match=message):
        load_data(_write(tmp_path / "a.jsonl", rows), labelled=True)


def test_labelled_texts_for_a_loss_on_pairs_are_refused_with_a_remedy(tmp_path):
    with pytest.raises(InputError, match=r"an anchor and a positive.*--loss batch_hard"):
        load_data(_write(tmp_path / "a.jsonl", LABELLED))


def test_one_of_several_text_columns_is_taken_by_name(tmp_path):
    rows = [{"title": f"t{i}", "body": f"b{i}", "label": i % 2} for i in range(40)]
    data = load_data(_write(tmp_path / "a.jsonl", rows), text_columns=["body"], labelled=True)
    assert data.text_columns == ("body",)


def test_a_held_out_split_is_checked_for_labels_too(tmp_path):
    train = datasets.Dataset.from_list(LABELLED)
    datasets.DatasetDict({"train": train, "test": train.remove_columns("label")}).save_to_disk(tmp_path)
    with pytest.raises(InputError, match="needs a column 'label'"):
        load_data(str(tmp_path), labelled=True)
