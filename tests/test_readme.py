import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCUMENTS = [README, *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(language: str, document: Path = README) -> list[str]:
    """Every code block of a language in a document."""
    return re.findall(rf"```{language}\n(.*?)```", document.read_text(), re.DOTALL)


def test_python_runs() -> None:
    # In one process, since each would import torch and Lightning for itself: every block has names of its own.
    programs = [*blocks("python"), "\n".join(blocks("python", ROOT / "docs" / "autodropout.md"))]
    assert len(programs) > 5
    quiet = "import warnings; warnings.filterwarnings('ignore', '.*does not have many workers')"
    runs = [
        f"exec(compile({program!r}, 'block {number}', 'exec'), {{'__name__': '__main__'}})"
        for number, program in enumerate(programs)
    ]
    subprocess.run([sys.executable, "-c", "\n".join([quiet, *runs])], check=True)


def test_there_is_python_to_run_above_line_30() -> None:
    assert "```python" in "\n".join(README.read_text().splitlines()[:30])


def test_yaml_makes_the_callback_that_python_makes(tmp_path: Path) -> None:
    (block,) = blocks("yaml")
    (tmp_path / "ydrop.yaml").write_text(block)
    command: list[str | Path] = [
        *(sys.executable, ROOT / "examples/train.py", "fit", f"--config={ROOT / 'examples/configs/base.yaml'}"),
        *("--model.dropout=conductance", f"--config={tmp_path / 'ydrop.yaml'}", "--trainer.fast_dev_run=1"),
    ]
    subprocess.run(command, check=True)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_commands_name_files_that_exist(document: Path) -> None:
    words = [word for block in blocks("sh", document) for word in shlex.split(block, comments=True)]
    programs = [ROOT / word for word in words if word.startswith("examples/")]
    assert programs or document.name not in ("README.md", "report.md")
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


@pytest.mark.parametrize("document", [README, ROOT / "docs/evidence.md"], ids=lambda document: document.name)
def test_accuracies_are_those_of_the_reports(document: Path) -> None:
    reports = "".join(report.read_text() for report in sorted((ROOT / "docs/results").rglob("*.md")))
    named = re.findall(r"[+-]?\d+\.\d\d ± \d+\.\d\d", document.read_text())
    assert len(named) > 50
    assert [each for each in named if each not in reports] == []
