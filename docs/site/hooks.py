"""What the site has beyond the files of docs/: pages of the interface, and the files elsewhere that pages link to.

The interface has a page for each module that holds public names. Those of the losses and functions are found through
`__all__`, so that a new loss has its page without anybody's doing. What stands outside docs/ appears on the site as if
docs/ were the root of the checkout; links are bent accordingly, so that the same link leads to the same page here and
in the checkout. Public names that a page sets in code become links to their entries.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tileloss import errors, functional, integrations, losses

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
OUTSIDE = ("CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/README.md", "benchmarks/results/*")


class Interface(NamedTuple):
    """A page of the interface: its chapter in the navigation, its title, and the names of a module that it shows."""

    chapter: str
    title: str
    module: str
    names: list[str]

    @property
    def path(self) -> str:
        """Its place on the site."""
        return f"api/{'/'.join(self.module.split('.')[1:])}.md"

    @property
    def markdown(self) -> str:
        """Its text, of which mkdocstrings makes the page."""
        options = {"heading_level": 1, "heading": self.title, "members": self.names}
        return "\n".join([f"::: {self.module}", "    options:", *(f"      {k}: {v!r}" for k, v in options.items())])


OTHERS = (
    Interface("", "Choice of a backend", "tileloss.backend", ["use_backend", "explain", "recorded", "Choice"]),
    Interface("", "Inside sentence-transformers", "tileloss.integrations", integrations.__all__),
    Interface(
        "",
        "Similarities",
        "tileloss.similarity",
        ["rowwise", "cos_sim", "dot_score", "euclidean_sim", "manhattan_sim"],
    ),
    Interface("", "Guides", "tileloss.guide", ["Guide"]),
    Interface("", "Several processes", "tileloss.distributed", ["contrastive_loss", "contrastive_loss_with_stats"]),
    Interface("", "What a loss owns", "tileloss.own_parameters", ["OwnParameters"]),
    Interface("", "Encoders", "tileloss.encoder", ["Encoder", "TransformerEncoder", "StaticEncoder"]),
    Interface("", "Trainer", "tileloss.trainer", ["EmbeddingTrainer", "PairCollator"]),
    Interface("", "Errors and warnings", "tileloss.errors", [name for name in vars(errors) if name[0].isupper()]),
)


def interface() -> Iterator[Interface]:
    """Every page of the interface, in the order of the navigation."""
    for chapter, package in (("Losses", losses), ("Functions", functional)):
        modules: dict[str, list[str]] = {}
        for name in sorted(package.__all__, key=str.lower):
            modules.setdefault(getattr(package, name).__module__, []).append(name)
        for module, names in modules.items():
            # losses and functions before what they are given or return
            names.sort(key=lambda name: (not name.endswith("Loss"), name[0].isupper()))
            yield Interface(chapter, names[0], module, names)
    yield from OTHERS


def on_config(config: MkDocsConfig) -> None:
    """Append the interface to the navigation."""
    chapters: dict[str, list[Any]] = {}
    for page in interface():
        chapters.setdefault(page.chapter, []).append({page.title: page.path})
    others = chapters.pop("")
    assert config.nav is not None
    config.nav.append({"Interface": [*({chapter: pages} for chapter, pages in chapters.items()), *others]})


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the pages of the interface and the files from outside docs/."""
    from mkdocs.structure.files import File

    for page in interface():
        files.append(File.generated(config, page.path, content=page.markdown))
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            place = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, place, abs_src_path=str(path)))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Bend the links across the border of docs/, which the site does not have, and link public names."""
    crossing = r"(?<=\]\()\.\./" if page.file.generated_by is None else r"(?<=\]\()docs/"
    prose_and_blocks = re.split(r"(^```.*?^```)", re.sub(crossing, "", markdown), flags=re.DOTALL | re.MULTILINE)
    prose_and_blocks[::2] = map(_with_links_to_entries, prose_and_blocks[::2])
    return "".join(prose_and_blocks)


def _with_links_to_entries(prose: str) -> str:
    entries: dict[str, str] = {}
    for page in interface():
        for name in page.names:
            entry = f"{page.module}.{name}"
            entries[entry] = entry
            entries.setdefault(name, entry)

    def linked(code: re.Match[str]) -> str:
        entry = entries.get(code["path"]) or entries.get(code["name"])
        return f"[{code[0]}][{entry}]" if entry else code[0]

    return re.sub(r"(?<!\[)`(?P<path>(?:tileloss\.(?:\w+\.)*)?(?P<name>\w+))`", linked, prose)
