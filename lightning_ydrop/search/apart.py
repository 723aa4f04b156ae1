"""A training in a program of its own, which a strategy with several processes needs."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_ydrop.layers.patterns import Pattern
from lightning_ydrop.search.files import write_patterns
from lightning_ydrop.search.training import Outcome, Report
from lightning_ydrop.search.workers import TrialError


def train_apart(
    config: Path, patterns: Mapping[str, Pattern], seed: int, folder: Path, report: Report | None = None
) -> Outcome:
    """Train in a program of its own, whose ranks a strategy such as DDP starts.

    Args:
        config: File of the configuration.
        patterns: By place.
        seed: Of weights, batches and masks.
        folder: Where checkpoints lie. The program's files lie beside it, as the training removes the folder.
        report: Called here after each validation there, as rank 0 asks for it.

    Returns:
        What the training reached.

    Raises:
        TrialError: If the program fails.

    """
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder.with_name(f"{folder.name}-{name}") for name in ("patterns.yaml", "outcome.json", "log.txt")}
    write_patterns(patterns, files["patterns.yaml"])
    command = [sys.executable, "-m", "lightning_ydrop.search", "train", str(config)]
    command += [str(files["patterns.yaml"]), str(seed), str(folder), str(files["outcome.json"])]
    status = _run(command, files["log.txt"], report)
    if status != 0:
        raise TrialError(f"The training ended with {status}; see {files['log.txt']}.")
    content: dict[str, Any] = json.loads(files["outcome.json"].read_text())
    for file in files.values():
        file.unlink()
    return Outcome(**content)


def report_over(questions: int, answers: int) -> Report:
    """Ask the program that started this one whether to stop, over two pipes.

    Args:
        questions: Descriptor to write to.
        answers: Descriptor to read from.

    Returns:
        What `train_apart` was given as `report`.

    """

    def report(epoch: int, reward: float) -> bool:
        os.write(questions, f"{json.dumps([epoch, reward])}\n".encode())
        answer = os.read(answers, 1)
        if not answer:
            raise TrialError("The worker that started this training is gone.")
        return answer == b"1"

    return report


def _run(command: list[str], log: Path, report: Report | None) -> int:
    """Run a program to its end, and answer what it asks."""
    # The program can import what this one can.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    questions, to_questions = os.pipe()
    from_answers, answers = os.pipe()
    theirs = () if report is None else (to_questions, from_answers)
    with log.open("ab") as text, os.fdopen(questions) as asked, os.fdopen(answers, "wb", buffering=0) as answering:
        try:
            program = subprocess.Popen(
                [*command, *map(str, theirs)], env=environment, stdout=text, stderr=subprocess.STDOUT, pass_fds=theirs
            )
        finally:
            os.close(to_questions)
            os.close(from_answers)
        try:
            if report is not None:
                for line in asked:
                    answering.write(b"1" if report(*json.loads(line)) else b"0")
            return program.wait()
        except BaseException:
            program.kill()
            program.wait()
            raise
