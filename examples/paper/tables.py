"""Tables in Markdown."""

import statistics
from collections.abc import Iterable, Sequence


def markdown(lines: Iterable[Sequence[object]]) -> str:
    """Lay out lines of cells, of which the first is the head."""
    head, *others = lines
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in (head, ["---"] * len(head), *others))


def spread(values: Sequence[float], digits: int) -> str:
    """Write mean ± standard deviation, or the value where there is but one; nothing for none."""
    if not values:
        return ""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean
