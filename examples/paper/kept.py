"""Networks that run.py has trained and kept."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from examples.paper.experiment import newest_logs
from examples.train import TrainCLI
from examples.train import main as train

# Of a run's config.yaml, what makes network and data again.
SECTIONS = ("seed_everything", "early_stopping", "checkpoint", "model", "data")


def read(folder: Path) -> list[Path]:
    """Find the results of a grid of one row, whose networks were kept.

    Raises:
        SystemExit: If there is no network beside one of them, they are of several rows, or an arm is there with several
            settings.

    """
    results = sorted(folder.rglob("result.json"))
    records = [record_of(result) for result in results]
    rows = {record["row"] for record in records}
    if len(rows) != 1:
        raise SystemExit(f"{folder} has results of {len(rows)} rows; one is wanted: name its folder with --runs.")
    same: dict[str, list[Any]] = {}
    for result, record in zip(results, records, strict=True):
        settings = [record[name] for name in ("varied", "settings", "files")]
        if same.setdefault(record["arm"], settings) != settings:
            raise SystemExit(
                f"{folder} has results of {record['arm']} with several settings or YAML files; one is wanted: name the "
                "folder of one with --runs."
            )
        checkpoint_of(result)
    return results


def checkpoint_of(result: Path) -> Path:
    """Find the checkpoint of a run at its lowest validation loss."""
    found = [file for file in (result.parent / "checkpoints").glob("*.ckpt") if file.name != "last.ckpt"]
    if len(found) != 1:
        raise SystemExit(
            f"There is not one checkpoint beside {result}: run.py keeps them with --keep-checkpoints, "
            "from runs that it had not done before."
        )
    return found[0]


def record_of(result: Path) -> dict[str, Any]:
    """Read what a run was and what it reached."""
    content: dict[str, Any] = json.loads(result.read_text())
    return content


def config_of(result: Path) -> dict[str, Any]:
    """Read the configuration that a run has had."""
    config: dict[str, Any] = yaml.safe_load((newest_logs(result.parent) / "config.yaml").read_text())
    return config


def made_again(config: Mapping[str, Any]) -> TrainCLI:
    """Make the network of a run again, untrained, and its data."""
    return train({section: config[section] for section in SECTIONS}, run=False)


def network(result: Path) -> TrainCLI:
    """Make the trained network of a run again, and its data."""
    cli = made_again(config_of(result))
    cli.model.load_state_dict(torch.load(checkpoint_of(result), map_location="cpu", weights_only=True)["state_dict"])
    return cli
