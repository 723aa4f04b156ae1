"""What a benchmark leaves: a table to read, and a JSON file that says where its figures come from."""

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
    file.write_text(json.dumps(report, indent=1) + "\n")
    print(table(rows))
    print(f"\n{report['hardware']}\nwritten to {file}")


def read_report(question: str, device: str = "cpu") -> dict[str, Any]:
    """Read what `write_report` wrote."""
    report: dict[str, Any] = json.loads((RESULTS / f"{question}-{device}.json").read_text())
    return report


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
