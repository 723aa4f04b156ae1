"""What a benchmark leaves: a table to read, and a JSON file that says where its figures come from."""

import itertools
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from examples.paper.tables import markdown

RESULTS = Path(__file__).parent / "results"
# The share by which a figure may differ from the last record before it is named.
CHANGE = 0.1
Row = Mapping[str, Any]


def write_report(question: str, device: torch.device, settings: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Print a table, and write it with settings, hardware and versions to results/.

    Args:
        question: Name of the benchmark, which the file is called after, with the device.
        device: Where it was measured.
        settings: What it was called with.
        rows: The table, each row by column.

    """
    report = {
        "question": question,
        "command": " ".join(["python", "-m", f"benchmarks.{question}", *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "settings": dict(settings),
        "hardware": hardware(device),
        "versions": {name: version(name) for name in ("torch", "lightning", "captum", "lightning-ydrop")},
        "rows": [dict(row) for row in rows],
    }
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{question}-{device.type}.json"
    before = json.loads(file.read_text()) if file.exists() else None
    file.write_text(json.dumps(report, indent=1) + "\n")
    print(table(rows))
    print(f"\n{report['hardware']}\nwritten to {file}")
    if before is not None and before["hardware"] == report["hardware"]:
        print("\n".join(changes(before["rows"], rows)))


def read_report(question: str, device: str = "cpu") -> dict[str, Any]:
    """Read what `write_report` wrote."""
    report: dict[str, Any] = json.loads((RESULTS / f"{question}-{device}.json").read_text())
    return report


def changes(before: Sequence[Row], rows: Sequence[Row]) -> list[str]:
    """Say which figures have become larger or smaller by more than CHANGE since the last record.

    Args:
        before: The last record's rows.
        rows: Those of now. A row is that of before whose words and whole numbers are the same in all columns that
            stand before the first figure.

    """
    known = {_identity(row): row for row in before}
    found = []
    for row in rows:
        former = known.get(_identity(row), {})
        for column, value in row.items():
            old = former.get(column)
            if isinstance(value, float) and isinstance(old, float) and abs(value - old) > CHANGE * abs(old):
                name = ", ".join(map(str, _identity(row)))
                found.append(f"{name}: {column} was {old:.3g} in the last record and is {value:.3g}")
    return found or [f"no figure differs by more than {CHANGE:.0%} from the last record"]


def _identity(row: Row) -> tuple[Any, ...]:
    return tuple(itertools.takewhile(lambda value: not isinstance(value, float), row.values()))


def hardware(device: torch.device) -> dict[str, Any]:
    """Name the machine."""
    found: dict[str, Any] = {"cpu": _cpu(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def table(rows: Sequence[Row]) -> str:
    """Lay rows out as a Markdown table; the first one's columns are the table's."""
    columns = list(rows[0])
    return markdown([columns, *([_cell(row[column]) for column in columns] for row in rows)])


def _cell(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_cell, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()
