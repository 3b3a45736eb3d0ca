"""The built-in corpus with labels: which packages count, what is held out, and that no module is on both sides."""

import pytest

from tileloss.corpus import Pair
from tileloss.data import find_class_column, load_data
from tileloss.errors import InputError
from tileloss.labelled_corpus import MAXIMUM_FUNCTIONS, labelled_corpus, split_package, split_packages

datasets = pytest.importorskip("datasets")


def _package(name, modules, functions):
    return [
        Pair(f"Does {name} {m} {f}.", f"def {name}_{m}_{f}(): return {f}", f"{name}.m{m}", name)
        for m in range(modules)
        for f in range(functions)
    ]


@pytest.mark.parametrize("held_out", [0.1, 0.5, 0.99])
@pytest.mark.parametrize(("modules", "functions"), [(4, 8), (7, 9), (40, 30)])
def test_whole_modules_are_held_out_and_some_are_left_on_both_sides(modules, functions, held_out):
    train, test = split_package(_package("p", modules, functions), held_out)
    inside, outside = ({pair.module for pair in part} for part in (train, test))
    assert not inside & outside
    assert len(inside) >= 2
    assert len(outside) >= 2
    assert len(outside) <= max(2, round(held_out * modules))
    assert len(train) <= MAXIMUM_FUNCTIONS
    if modules * functions < 100:
        assert len(train) + len(test) == modules * functions


def test_the_split_does_not_depend_on_the_order_or_on_other_packages():
    pairs, others = _package("p", 9, 20), _package("q", 5, 10)
    assert split_packages(pairs + others, 0.2)["p"] == split_packages(pairs[::-1], 0.2)["p"]


def test_packages_that_are_too_small_are_left_out():
    pairs = [*_package("few", 4, 7), *_package("flat", 3, 90), *_package("kept", 4, 8)]
    assert list(split_packages(pairs, 0.1)) == ["kept"]


def test_a_package_whose_held_out_places_go_to_one_module_is_left_out():
    pairs = _package("p", 4, 9)
    outside = {pair.module for pair in split_package(pairs, 0.1)[1]}
    crowded, other = sorted(outside)
    rest = [pair for pair in pairs if pair.module != other]
    many = [Pair(f"Does {i}.", f"def g{i}(): return {i}", crowded, "p") for i in range(4000)]
    lone = next(pair for pair in pairs if pair.module == other)
    train, test = split_package([*rest, *many, lone], 0.1)
    assert {pair.module for pair in test} == {crowded}
    assert train
    assert split_packages([*rest, *many, lone], 0.1) == {}


def _write(root, packages):
    for name in packages:
        for module in range(5):
            functions = "\n".join(
                f'def f{i}(x):\n    """In {name} {module} this does thing {i}."""\n    return {name}({module}, {i})\n'
                for i in range(8)
            )
            (root / name).mkdir(exist_ok=True)
            (root / name / f"m{module}.py").write_text(functions)


def test_functions_are_labelled_by_package_without_their_docstrings(tmp_path):
    _write(tmp_path, ["alpha", "beta", "gamma"])
    parts = labelled_corpus([tmp_path], held_out=0.2)
    for part in parts.values():
        assert part.features["label"].names == ["alpha", "beta", "gamma"]
        assert set(part["label"]) == {0, 1, 2}
        for row in part:
            name = part.features["label"].int2str(row["label"])
            assert row["module"].startswith(f"{name}.m")
            assert f"return {name}(" in row["code"]
            assert "does thing" not in row["code"]
    assert not set(parts["train"]["module"]) & set(parts["test"]["module"])
    assert not set(parts["train"]["code"]) & set(parts["test"]["code"])
    assert find_class_column(parts["train"]) == "label"


def test_one_package_is_nothing_to_tell_apart(tmp_path):
    _write(tmp_path, ["alpha"])
    with pytest.raises(InputError, match=r"two packages of 4 modules and 32 .* found 1"):
        labelled_corpus([tmp_path])
    with pytest.raises(InputError, match="between 0 and 1"):
        labelled_corpus([tmp_path], held_out=0)


def test_the_built_in_data_are_labelled_on_request(tmp_path, monkeypatch):
    _write(tmp_path, ["alpha", "beta"])
    monkeypatch.setattr("tileloss.corpus.installed_folders", lambda: [tmp_path])
    data = load_data("builtin", labelled=True)
    assert data.text_columns == ("code",)
    assert data.group_column == "module"
    assert load_data("builtin", held_out=0.5).text_columns == ("docstring", "code")
