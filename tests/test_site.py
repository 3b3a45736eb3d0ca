"""The site of the documentation is whole: every page can be reached, and every public name has its entry.

That its links lead somewhere is for `make docs` to find out, which builds it.
"""

import importlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

griffe = pytest.importorskip("griffe")
yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "docs" / "site"
CONFIG = yaml.safe_load((SITE / "mkdocs.yml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hooks", SITE / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def leaves(nav: Any) -> Iterator[str]:
    """The paths that a navigation names."""
    if isinstance(nav, str):
        yield nav
    else:
        for entry in nav.values() if isinstance(nav, dict) else nav:
            yield from leaves(entry)


def test_every_page_is_in_the_navigation(hooks: ModuleType) -> None:
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in ROOT.glob("docs/**/*.md")]
    outside = [path for path in hooks.OUTSIDE if path.endswith(".md")]
    assert sorted(leaves(CONFIG["nav"])) == sorted([*pages, *outside])


@pytest.mark.parametrize("package", ["tileloss", "tileloss.losses", "tileloss.functional", "tileloss.integrations"])
def test_every_public_name_has_an_entry(package: str, hooks: ModuleType) -> None:
    entries = [
        getattr(importlib.import_module(page.module), name) for page in hooks.interface() for name in page.names
    ]
    module = importlib.import_module(package)
    public = {name: getattr(module, name) for name in module.__all__}
    assert not [name for name, value in public.items() if not isinstance(value, ModuleType) and value not in entries]


def test_docstrings_fall_into_their_sections(hooks: ModuleType) -> None:
    """Names one by one, the result with its type, the example as an example: else the site shows something else."""
    options = CONFIG["plugins"][1]["mkdocstrings"]["handlers"]["python"]["options"]
    package = griffe.load(
        "tileloss",
        search_paths=[ROOT / "src"],
        docstring_parser="google",
        docstring_options=options["docstring_options"],
        extensions=griffe.load_extensions(*(SITE / name for name in options["extensions"])),
    )
    for page in hooks.interface():
        for name in page.names if page.chapter else ():
            documented = package[f"{page.module}.{name}".removeprefix("tileloss.")]
            text = documented.docstring.value
            sections = {section.kind.value: section.value for section in documented.docstring.parsed}
            assert ("examples" in sections) == (">>>" in text), name
            assert ("returns" in sections) == ("Returns:" in text), name
            entries = [*sections.get("parameters", ()), *sections.get("attributes", ())]
            assert not [entry.name for entry in entries if "," in entry.name], name
            for result in sections.get("returns", ()):
                assert str(result.annotation) == str(documented.returns), name
