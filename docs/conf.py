"""How Sphinx builds the site: `.ci/docs`."""

import importlib
import inspect
import re
import sys
from pathlib import Path

from sphinx.application import Sphinx

import lightning_ydrop

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the tutorials train the networks of examples/

project = "lightning-ydrop"
author = "the lightning-ydrop authors"
copyright = f"2026, {author}"
release = version = lightning_ydrop.__version__
REPOSITORY = "https://github.com/lightning-ydrop/lightning-ydrop"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.linkcode",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["tutorials/*.rst", "sg_execution_times.rst"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

default_role = "code"  # in docstrings, as in Markdown
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_class_signature = "mixed"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

sphinx_gallery_conf = {
    "examples_dirs": "tutorials",
    "gallery_dirs": "gallery",
    "filename_pattern": r"\.py$",
    "within_subsection_order": "FileNameSortKey",
    "remove_config_comments": True,
    "download_all_examples": False,
    "show_memory": False,
    "show_signature": False,
    "abort_on_example_error": True,
}

html_theme = "furo"
pygments_dark_style = "monokai"
html_title = f"lightning-ydrop {release}"
html_show_sphinx = False
html_theme_options = {
    "source_repository": REPOSITORY,
    "source_branch": "main",
    "source_directory": "docs/",
}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


def linkcode_resolve(domain: str, info: dict[str, str]) -> str | None:
    """Find the source of a documented object in the repository."""
    found = importlib.import_module(info["module"])
    for name in info["fullname"].split("."):
        found = getattr(found, name, None)
    found = inspect.unwrap(found.fget if isinstance(found, property) else found)
    if not (inspect.isclass(found) or inspect.isroutine(found)):
        return None
    file = Path(inspect.getsourcefile(found) or "").relative_to(Path(lightning_ydrop.__file__).parents[1])
    return f"{REPOSITORY}/blob/main/{file}#L{inspect.getsourcelines(found)[1]}"


def link_to_the_repository(app: Sphinx, page: str, source: list[str]) -> None:
    """Let links to files outside of docs/, which GitHub follows, lead to the repository."""
    here = (ROOT / "docs" / page).parent

    def absolute(found: re.Match[str]) -> str:
        place, hash_, anchor = found[1].partition("#")
        target = (here / place).resolve()
        if place.startswith("https:") or not place or not target.exists() or target.is_relative_to(ROOT / "docs"):
            return found[0]
        return f"]({REPOSITORY}/{'tree' if target.is_dir() else 'blob'}/main/{target.relative_to(ROOT)}{hash_}{anchor})"

    source[0] = re.sub(r"\]\(([^)\s]+)\)", absolute, source[0])


def escape_shapes(app: Sphinx, what: str, name: str, value: object, options: object, lines: list[str]) -> None:
    """Keep the asterisk of shapes such as (B, *) from being the beginning of emphasis."""
    lines[:] = [re.sub(r"(?<=[ (])\*(?=[),])", r"\\*", line) for line in lines]


def setup(app: Sphinx) -> None:
    """Connect what is above."""
    app.connect("source-read", link_to_the_repository)
    app.connect("autodoc-process-docstring", escape_shapes, priority=400)  # before napoleon
