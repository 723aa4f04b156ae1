"""The results that docs/ holds, and the recorded runs that they are made of."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from examples.paper import experiment
from tests.examples.programs import ROOT

RESULTS = ROOT / "docs/results"
RECORDS = sorted(RESULTS.rglob("*.jsonl"))
# A document's first lines name the command that has made it.
COMMAND = re.compile(r"By `python -m (examples\.paper\.\w+) (--runs docs/.*?)`")
DOCUMENTS = [document for document in sorted(RESULTS.rglob("*.md")) if COMMAND.search(document.read_text())]


def name_of(file: Path) -> str:
    return str(file.relative_to(RESULTS))


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_documents_are_made_of_the_records(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = COMMAND.search(document.read_text())
    assert found is not None
    program, arguments = found.groups()
    monkeypatch.chdir(ROOT)
    importlib.import_module(program).main([*shlex.split(arguments), "--out", str(tmp_path / document.name)])
    assert (tmp_path / document.name).read_text() == document.read_text()
    assert [made.name for made in tmp_path.iterdir() if not (document.parent / made.name).exists()] == []


@pytest.mark.parametrize("record", RECORDS, ids=name_of)
def test_records_are_of_the_configurations_of_today(record: Path) -> None:
    runs = experiment.results_in([record])
    assert runs
    for run in runs:
        varied = tuple(f"{name}={value}" for name, value in run["varied"].items())
        again = experiment.Run(run["row"], run["arm"], run["seed"], varied, tuple(run["settings"]), Path())
        assert again.identity.items() <= run.items()


def test_every_record_is_made_into_a_document() -> None:
    texts = "".join(document.read_text() for document in DOCUMENTS)
    assert RECORDS
    assert [record.name for record in RECORDS if str(record.relative_to(ROOT)) not in texts] == []
