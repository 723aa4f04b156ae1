"""The site: that its reference is complete, and its links can be checked. `.ci/docs` builds it."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

import lightning_ydrop
from lightning_ydrop import analysis, functional, uncertainty

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "docs" / "reference"


def documented() -> set[str]:
    """Every name of the reference, with its module."""
    names = set()
    for page in REFERENCE.glob("*.md"):
        module = ""
        for directive, name in re.findall(r"^\.\. (currentmodule|auto\w+):: (\S+)", page.read_text(), re.MULTILINE):
            if directive == "currentmodule":
                module = f"{name}."
            else:
                names.add(name if name.startswith("lightning_ydrop.") else module + name)
    return names


@pytest.mark.parametrize("module", [lightning_ydrop, analysis, functional, uncertainty], ids=lambda each: each.__name__)
def test_the_reference_has_every_public_name(module: object) -> None:
    there = {
        getattr(importlib.import_module(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in documented()
    }
    public: list[str] = getattr(module, "__all__")  # noqa: B009
    assert [name for name in public if getattr(module, name) not in there] == []


def test_every_page_is_in_the_menu() -> None:
    docs = ROOT / "docs"
    pages = {page.relative_to(docs).with_suffix("") for page in docs.rglob("*.md")}
    pages -= {page for page in pages if page.parts[0] in ("gallery", "tutorials")}
    listed = set()
    for index in docs.rglob("index.md"):
        for tree in re.findall(r"```\{toctree\}\n(.*?)```", index.read_text(), re.DOTALL):
            entries = [line for line in tree.splitlines() if line and not line.startswith(":")]
            listed |= {(index.parent / entry).resolve().relative_to(docs) for entry in entries}
    assert sorted(map(str, pages - listed)) == ["index"]


def spoken() -> str:
    """All that the package says, without what it puts in."""
    texts = []
    for file in (ROOT / "lightning_ydrop").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
                texts.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


def test_troubleshooting_quotes_what_is_said() -> None:
    rows = re.findall(r"^\| (.*?) \|", (ROOT / "docs/how-to/troubleshooting.md").read_text(), re.MULTILINE)
    quotes, said = [row for row in rows if row != "it says"], spoken()
    assert len(quotes) > 15
    assert [quote for quote in quotes if quote not in said] == []


def test_broken_links_are_found(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("check_links", ROOT / "docs" / "check_links.py")
    assert spec is not None
    assert spec.loader is not None
    check_links = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(check_links)
    (tmp_path / "a.html").write_text(
        '<a href="b.html#there">x</a><a href="b.html#gone"></a><img src="no.png"><a href="https://x.y">'
    )
    (tmp_path / "b.html").write_text('<h1 id="there">x</h1><a href="#there">y</a><a href="#nowhere">z</a>')
    assert sorted(check_links.broken(tmp_path)) == ["a.html: b.html#gone", "a.html: no.png", "b.html: #nowhere"]
