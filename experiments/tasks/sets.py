"""Write the tables and time series that Python packages ship as files that the data modules of the examples read.

    pip install aeon river statsmodels
    python -m experiments.tasks.sets --out data

Into data/tabular, a .csv each: `cancer` (scikit-learn's breast cancer), `phishing` and `segment` (river), `affairs` and
`vote` (statsmodels' fair and anes96). Into data/series, a .npz each: `power` (ItalyPowerDemand), `vowels`
(JapaneseVowels) and `arrows` (ArrowHead) of aeon. What a package has in two parts is put together.
"""

import argparse
import csv
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from aeon.datasets import load_classification
from sklearn.datasets import load_breast_cancer
from statsmodels.datasets import anes96, fair


def tables() -> dict[str, tuple[Sequence[str], Iterable[Sequence[Any]]]]:
    """Give the head and the rows of each table, whose last column is the target."""
    river: Any = import_module("river.datasets")  # which has no types
    cancer, affairs, vote = load_breast_cancer(), fair.load_pandas().data, anes96.load_pandas().data
    affairs["any"] = (affairs.pop("affairs") > 0).astype(int)
    # What the published model takes to predict the vote.
    vote = vote[["logpopul", "selfLR", "PID", "age", "educ", "income", "TVnews", "vote"]]
    found: dict[str, tuple[Sequence[str], Iterable[Sequence[Any]]]] = {
        "cancer": (
            [*cancer.feature_names, "benign"],
            [[*row, label] for row, label in zip(cancer.data, cancer.target, strict=True)],
        ),
        "affairs": (list(affairs), affairs.to_numpy().tolist()),
        "vote": (list(vote), vote.to_numpy().tolist()),
    }
    for name, data in (("phishing", river.Phishing()), ("segment", river.ImageSegments())):
        samples = list(data)
        found[name] = ([*samples[0][0], "target"], [[*x.values(), str(y)] for x, y in samples])
    return found


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data"))
    out = parser.parse_args().out
    for folder in ("tabular", "series"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    for name, (head, rows) in tables().items():
        with (out / "tabular" / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([head, *rows])
    for name, theirs in (("power", "ItalyPowerDemand"), ("vowels", "JapaneseVowels"), ("arrows", "ArrowHead")):
        x, y = load_classification(theirs)
        longest = max(series.shape[1] for series in x)
        padded = [np.pad(series, ((0, 0), (0, longest - series.shape[1])), constant_values=np.nan) for series in x]
        np.savez_compressed(out / "series" / f"{name}.npz", x=np.stack(padded).astype(np.float32), y=y)


if __name__ == "__main__":
    main()
