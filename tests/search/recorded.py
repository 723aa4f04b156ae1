"""What happens in other processes, line by line in a file."""

import os
from pathlib import Path


def record(file: str, line: str) -> None:
    """Append a line at once, whatever other processes append."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(descriptor, f"{line}\n".encode())
    os.close(descriptor)


def recorded(file: str | Path) -> list[str]:
    """Read the lines."""
    return Path(file).read_text().splitlines() if Path(file).exists() else []
