"""What a benchmark leaves: a table to read, and a JSON file that says where its figures come from."""

import itertools
import json
import math
import os
import platform
import re
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


def write_report(
    question: str,
    device: torch.device,
    settings: Mapping[str, Any],
    rows: Sequence[Row],
    before: Mapping[str, Any] | None = None,
) -> None:
    """Print a table and what has changed, and write the table with settings, hardware and versions to results/.

    A record of another kind of machine is not lost: it moves to results/other_machines/.

    Args:
        question: Name of the benchmark, which the file is called after, with the device.
        device: Where it was measured.
        settings: What it was called with.
        rows: The table, each row by column.
        before: The record to compare with. None takes the last one of this kind of machine.

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
    before = before or last_record(question, device)
    file = RESULTS / f"{question}-{device.type}.json"
    file.parent.mkdir(exist_ok=True)
    if file.exists() and (other := json.loads(file.read_text())["hardware"]) != report["hardware"]:
        place = _place_of(question, device, other)
        place.parent.mkdir(exist_ok=True)
        file.rename(place)
    _place_of(question, device, hardware(device)).unlink(missing_ok=True)
    file.write_text(json.dumps(report, indent=1) + "\n")
    print(table(rows))
    print(f"\nwritten to {file}")
    print("\n".join(comparison(before, report)))


def last_record(question: str, device: torch.device) -> dict[str, Any] | None:
    """Find the last record of this kind of machine, if there is one."""
    here = hardware(device)
    for file in (RESULTS / f"{question}-{device.type}.json", _place_of(question, device, here)):
        if file.exists():
            record: dict[str, Any] = json.loads(file.read_text())
            if record["hardware"] == here:
                return record
    return None


def _place_of(question: str, device: torch.device, machine: Mapping[str, Any]) -> Path:
    """Say where the record of a kind of machine is, while that of another is the newest."""
    name = re.sub(r"[^a-z0-9]+", "-", _name_of(machine).lower()).strip("-")
    return RESULTS / "other_machines" / f"{question}-{device.type}-{name}.json"


def _name_of(machine: Mapping[str, Any]) -> str:
    parts = [
        machine["cpu"],
        f"{machine['cores']} cores",
        f"{machine['threads']} threads",
        *filter(None, [machine.get("gpu")]),
    ]
    return ", ".join(parts)


def read_report(question: str, device: str = "cpu") -> dict[str, Any]:
    """Read what `write_report` wrote."""
    report: dict[str, Any] = json.loads((RESULTS / f"{question}-{device}.json").read_text())
    return report


def comparison(before: Mapping[str, Any] | None, report: Mapping[str, Any]) -> list[str]:
    """Say on which kind of machine a report was made, and which figures differ from the last record of that kind.

    Args:
        before: The last record, or None where there is none.
        report: The report.

    """
    machine = _name_of(report["hardware"])
    if before is None:
        return [
            f"There is no earlier record of this kind of machine ({machine}).",
            "To see what a change makes slower, run this command before and after it.",
        ]
    lines = [f"Compared with the last record of this kind of machine ({machine}), of {before['date']}:"]
    then, now = before["settings"], json.loads(json.dumps(report["settings"]))
    lines += [f"  setting {name}: was {then.get(name)}, is {now[name]}" for name in now if then.get(name) != now[name]]
    larger, smaller = changes(before["rows"], report["rows"])
    for text, found in (("Larger, so slower where it is a time:", larger), ("Smaller:", smaller)):
        lines += [text, *(f"  {each}" for each in found)] if found else []
    if not larger and not smaller:
        lines.append(f"No figure differs by more than {CHANGE:.0%}.")
    return lines


def changes(before: Sequence[Row], rows: Sequence[Row]) -> tuple[list[str], list[str]]:
    """Say which figures have become larger, and which smaller, by more than CHANGE. The largest changes come first.

    Args:
        before: The last record's rows.
        rows: Those of now. A row is that of before whose words and whole numbers are the same in all columns that
            stand before the first figure.

    """
    known = {_identity(row): row for row in before}
    found: list[tuple[float, str]] = []
    for row in rows:
        former = known.get(_identity(row), {})
        for column, value in row.items():
            old = former.get(column)
            if isinstance(value, float) and isinstance(old, float) and abs(value - old) > CHANGE * abs(old):
                name = ", ".join(map(str, _identity(row)))
                change = (value - old) / abs(old) if old else math.copysign(math.inf, value)
                found.append((change, f"{name}: {column} was {old:.3g}, is {value:.3g} ({change:+.0%})"))
    found.sort(key=lambda each: -abs(each[0]))
    return [text for change, text in found if change > 0], [text for change, text in found if change < 0]


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
