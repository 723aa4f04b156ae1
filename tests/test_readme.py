import os
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
# The modules that a clone's commands run.
HOMES = ("examples.", "benchmarks.", "experiments.")
DOCUMENTS = [README, *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(language: str, document: Path = README) -> list[str]:
    """Every code block of a language in a document."""
    return re.findall(rf"```{language}\n(.*?)```", document.read_text(), re.DOTALL)


def test_python_runs() -> None:
    # In one process, since each would import torch and Lightning for itself. The blocks of a page are one program.
    pages = [document for document in DOCUMENTS if "results" not in document.parts]
    programs = ["\n".join(blocks("python", page)) for page in pages if blocks("python", page)]
    assert len(programs) > 10
    quiet = "import warnings; warnings.filterwarnings('ignore', '.*does not have many workers')"
    runs = [
        f"exec(compile({program!r}, 'block {number}', 'exec'), {{'__name__': '__main__'}})"
        for number, program in enumerate(programs)
    ]
    subprocess.run([sys.executable, "-c", "\n".join([quiet, *runs])], check=True)


def test_there_is_python_to_run_above_line_30() -> None:
    assert "```python" in "\n".join(README.read_text().splitlines()[:30])


@pytest.mark.parametrize(
    ("document", "does"),
    [(README, "--trainer.fast_dev_run=1"), (ROOT / "docs/how-to/cli.md", "--print_config")],
    ids=["README.md", "cli.md"],
)
def test_yaml_makes_a_callback(document: Path, does: str, tmp_path: Path) -> None:
    (tmp_path / "ydrop.yaml").write_text("".join(blocks("yaml", document)))
    command: list[str | Path] = [
        *(sys.executable, "-m", "examples.train", "fit", f"--config={ROOT / 'examples/configs/base.yaml'}"),
        *("--model.dropout=vanilla", f"--config={tmp_path / 'ydrop.yaml'}", does),
    ]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 150


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_commands_name_files_that_exist(document: Path) -> None:
    words = [word for block in blocks("sh", document) for word in shlex.split(block, comments=True)]
    modules = [word for before, word in pairwise(words) if before == "-m" and word.startswith(HOMES)]
    programs = [ROOT / f"{module.replace('.', '/')}.py" for module in modules]
    programs += [ROOT / word for word in words if word.startswith("examples/")]
    # A report says in its first line how it was made.
    made_by = re.findall(r"^By `python -m (\S+?)[ `]", document.read_text(), re.MULTILINE)
    programs += [ROOT / f"{module.replace('.', '/')}.py" for module in made_by]
    assert made_by or document.name != "report.md"
    assert programs or document.name != "experiments.md"
    assert [path for path in programs if not path.exists()] == []


def anchors(document: Path) -> set[str]:
    """What links may name in a document, as GitHub names its headings."""
    headings = re.findall("^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_links_lead_somewhere(document: Path) -> None:
    for link in re.findall(r"\]\(([^)]*)\)", document.read_text()):
        place, _, anchor = link.partition("#")
        target = document.parent / place if place else document
        assert link.startswith("https://") or target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize(("document", "at_least"), [(README, 8), (ROOT / "docs/explanation/evidence.md", 90)])
def test_accuracies_are_those_of_the_reports(document: Path, at_least: int) -> None:
    reports = "".join(report.read_text() for report in sorted((ROOT / "docs/results").rglob("*.md")))
    named = re.findall(r"[+-]?\d+\.\d\d ± \d+\.\d\d", document.read_text())
    assert len(named) > at_least
    assert [each for each in named if each not in reports] == []
