import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """Every code block of a language in the README."""
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("block", blocks("python"), ids=lambda block: block.split("\n")[0])
def test_python_runs(block: str) -> None:
    quiet = f"import warnings; warnings.filterwarnings('ignore', '.*does not have many workers')\n{block}"
    subprocess.run([sys.executable, "-c", quiet], check=True)


def test_there_is_python_to_run_above_line_30() -> None:
    assert "```python" in "\n".join(README.splitlines()[:30])


def test_yaml_makes_the_callback_that_python_makes(tmp_path: Path) -> None:
    (block,) = blocks("yaml")
    (tmp_path / "ydrop.yaml").write_text(block)
    command: list[str | Path] = [
        *(sys.executable, ROOT / "examples/train.py", "fit", f"--config={ROOT / 'examples/configs/base.yaml'}"),
        *("--model.dropout=conductance", f"--config={tmp_path / 'ydrop.yaml'}", "--trainer.fast_dev_run=1"),
    ]
    subprocess.run(command, check=True)


def test_commands_name_files_and_options_that_exist() -> None:
    commands = [
        line for block in blocks("sh") for line in block.replace("\\\n", " ").splitlines() if "examples/" in line
    ]
    assert commands
    for word in (word for command in commands for word in shlex.split(command)):
        if word.startswith("examples/"):
            assert (ROOT / word).exists(), word
